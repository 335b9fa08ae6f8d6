"""Preference pairs on disk: what a model wrote twice for one prompt, the better one first.

    store = PairStore.create(folder, vocabulary, hashes, made_by={...})
    store.write_shard(0, pairs)
    pairs = PairStore.open(folder).pairs()

A side is one document or several: a drawn image is one, a rollout is one for each chunk that was written, as the policy saw it then. Its
documents stand in the file as the ids that `documents.write` gives, and how many of the leading segments were given, not written.

Layout: pairs.json (manifest), vocabulary.json, shards/00042.zarr. The manifest holds the hashes of the tokenizers whose ids these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from emu3_vla.data.episodes import json_text, open_shard, read_array, read_manifest, shard_indices, write_shard_atomic, write_text_atomic
from emu3_vla.documents import Segment, Text, parse, write
from emu3_vla.vocabulary import Vocabulary, load_vocabulary

FORMAT, SHARD_FORMAT, SCHEMA = "emu3-vla-pairs", "emu3-vla-pair-shard", 1
MANIFEST, VOCABULARY = "pairs.json", "vocabulary.json"
CHOSEN, REJECTED = 0, 1


class PairStoreError(ValueError):
    """A pair store that is missing parts, damaged, or of another vocabulary or tokenizers."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """One document that a model wrote. given: how many of its segments, from the first on, were given to it."""

    segments: Sequence[Segment]
    given: int

    def __post_init__(self):
        if not 0 <= self.given < len(self.segments):
            raise ValueError(f"{self.given} of {len(self.segments)} segments were given, expected fewer than there are")
        if self.given and isinstance(self.segments[self.given - 1], Text) and isinstance(self.segments[self.given], Text):
            raise ValueError("a text that was given stands before one that was written; read again they would be one")

    def document(self) -> list[Segment]:
        """Its segments, supervised where the model wrote them."""
        return [_context(part) if number < self.given else part for number, part in enumerate(self.segments)]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt. scores: of the chosen and the rejected side, the higher the better. about: in words, for people."""

    chosen: Sequence[Written]
    rejected: Sequence[Written]
    scores: tuple[float, float]
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.chosen or not self.rejected:
            raise ValueError("a side of a pair has no document; expected at least one on each")
        if not self.scores[CHOSEN] > self.scores[REJECTED]:
            raise ValueError(f"the chosen side scores {self.scores[CHOSEN]}, the rejected one {self.scores[REJECTED]}; expected more")


class PairStore:
    """A folder of pair shards. metadata: hashes (of the tokenizers), made_by (command and options)."""

    def __init__(self, path: Path, vocabulary: Vocabulary, metadata: dict[str, Any]):
        self.path, self.vocabulary, self.metadata = path, vocabulary, metadata

    @classmethod
    def create(cls, path: str | Path, vocabulary: Vocabulary, hashes: dict[str, str], made_by: dict[str, Any]) -> PairStore:
        """Start a store, or go on with the one there if it is the same. Raises PairStoreError if another is there."""
        path, metadata = Path(path), {"hashes": hashes, "made_by": made_by}
        text = json_text({"format": FORMAT, "schema": SCHEMA, "metadata": metadata}, f"metadata of the pair store {path}")
        if (path / MANIFEST).exists():
            store = cls.open(path)
            if (path / MANIFEST).read_text() != text or store.vocabulary != vocabulary:
                raise PairStoreError(f"{path} is a pair store that was made otherwise; choose another folder")
            return store
        (path / "shards").mkdir(parents=True, exist_ok=True)
        vocabulary.save(path / VOCABULARY)
        write_text_atomic(path / MANIFEST, text)
        return cls(path, vocabulary, metadata)

    @classmethod
    def open(cls, path: str | Path) -> PairStore:
        """The store in `path`. Raises FileNotFoundError, PairStoreError."""
        path = Path(path)
        record = read_manifest(path / MANIFEST, FORMAT, SCHEMA, "a store of preference pairs", PairStoreError)
        return cls(path, load_vocabulary(path / VOCABULARY), record["metadata"])

    def require(self, vocabulary: Vocabulary, hashes: dict[str, str], whose: str) -> None:
        """Raise PairStoreError where ids mean something else here than in `whose`."""
        if self.vocabulary != vocabulary:
            raise PairStoreError(f"{self.path} has the vocabulary {self.vocabulary}, {whose} has {vocabulary}; make pairs with its policy")
        for name, digest in self.metadata["hashes"].items():
            if hashes.get(name) != digest:
                raise PairStoreError(f"{self.path} was written with another {name} than {whose}; make pairs with its own policy")

    def has_shard(self, index: int) -> bool:
        """Whether shard `index` is there; a shard that is there is whole."""
        return self._shard_path(index).exists()

    def write_shard(self, index: int, pairs: Sequence[Pair]) -> None:
        """Write shard `index`, whole or not at all; it may hold no pair. Raises DocumentError for what the vocabulary does not have."""
        rows = [
            (number, side, document)
            for number, pair in enumerate(pairs)
            for side, documents in ((CHOSEN, pair.chosen), (REJECTED, pair.rejected))
            for document in documents
        ]
        ids = [write(document.segments, self.vocabulary) for _, _, document in rows]
        columns = {
            "ids": np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32),
            "lengths": np.array([len(part) for part in ids], np.int64),
            "given": np.array([self._given(document) for _, _, document in rows], np.int64),
            "pair": np.array([number for number, _, _ in rows], np.int64),
            "side": np.array([side for _, side, _ in rows], np.int64),
        }
        records = [{"scores": list(pair.scores), "about": pair.about} for pair in pairs]
        write_shard_atomic(self._shard_path(index), columns, {"format": SHARD_FORMAT, "schema": SCHEMA, "pairs": records})

    def __len__(self) -> int:
        """Number of pairs."""
        paths = [self._shard_path(index) for index in shard_indices(self.path / "shards")]
        return sum(len(open_shard(path, SHARD_FORMAT, SCHEMA, PairStoreError).attrs["pairs"]) for path in paths)

    def pairs(self) -> list[Pair]:
        """All pairs, shard by shard. Raises PairStoreError, MalformedDocument, and where there is none."""
        found = [pair for index in shard_indices(self.path / "shards") for pair in self._read_shard(index)]
        if not found:
            raise PairStoreError(f"{self.path} holds no pair: no two answers differed enough, or its command was cut off; run it again")
        return found

    def _read_shard(self, index: int) -> list[Pair]:
        path = self._shard_path(index)
        group = open_shard(path, SHARD_FORMAT, SCHEMA, PairStoreError)
        ids, lengths, given, pair_of, side_of = (read_array(group, name, path) for name in ("ids", "lengths", "given", "pair", "side"))
        ends = np.cumsum(lengths)
        records = group.attrs["pairs"]
        sides: list[tuple[list[Written], list[Written]]] = [([], []) for _ in records]
        for end, length, leading, number, side in zip(ends, lengths, given, pair_of, side_of, strict=True):
            segments = parse(ids[end - length : end], self.vocabulary)
            sides[number][side].append(Written(segments=segments, given=int(leading)))
        return [
            Pair(chosen=chosen, rejected=rejected, scores=tuple(record["scores"]), about=dict(record["about"]))
            for (chosen, rejected), record in zip(sides, records, strict=True)
        ]

    def _given(self, document: Written) -> int:
        """How many segments were given as they are read again: texts that follow each other become one."""
        return len(parse(write(document.segments[: document.given], self.vocabulary), self.vocabulary, prompt=True))

    def _shard_path(self, index: int) -> Path:
        return self.path / "shards" / f"{index:05d}.zarr"


def _context(segment: Segment) -> Segment:
    """The segment, not supervised, where it can be."""
    supervised = is_dataclass(segment) and "supervised" in {part.name for part in fields(segment)}
    return replace(segment, supervised=False) if supervised else segment
