"""Token store: episodes as ids, with the tokenizers that wrote them.

    store = TokenStore.open("outputs/tokenize/first")
    episodes = store.episodes()                 # list[TokenizedEpisode], all in memory: ids are small
    train, held_out = store.split(0.05)
    tokenizers = store.tokenizers()             # .vision, .action, .text, .normalizer

Layout: tokens.json (manifest), vision_tokenizer/, action_tokenizer/, text_tokenizer/, normalizer.json, shards/00042.zarr. The manifest
holds a hash of each tokenizer; a store whose tokenizers are not the ones that wrote its ids is refused. A finished store may lie behind any
URL that fsspec reads: TokenStore.open("s3://bucket/tokens").
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from action_tokenizer import ActionNormalizer, FastTokenizer
from emu3_vla.data.episodes import (
    json_text,
    open_shard,
    read_array,
    read_manifest,
    shard_indices,
    split_shards,
    write_shard_atomic,
    write_text_atomic,
)
from emu3_vla.data.remote import UrlPath, is_url, mirror
from emu3_vla.emu3_text import TIKTOKEN_FILES, Emu3TextTokenizer
from emu3_vla.number_words import NumberWords, StateWords
from emu3_vla.text import TextTokenizer

if TYPE_CHECKING:
    from emu3_vla.vision_tokenizer import VisionTokenizer

FORMAT = "emu3-vla-tokens"
SCHEMA = 1
SHARD_FORMAT = "emu3-vla-token-shard"
MANIFEST = "tokens.json"

VISION, ACTION, TEXT, NORMALIZER = "vision_tokenizer", "action_tokenizer", "text_tokenizer", "normalizer.json"
ASKED = ("asked_ids", "asked_lengths")
STATE, SCENE = "state_numbers", "scene_numbers"
NUMBERS = {STATE: "state_FS", SCENE: "scene_FS"}
"""Columns of numbers that are said in words, and the fields of an episode that they are."""
TOKENIZERS = (VISION, ACTION, TEXT, NORMALIZER)


class TokenStoreError(ValueError):
    """A token store that is missing parts, damaged, unfinished, or made by other tokenizers."""


class Asked:
    """Questions about frames and their answers, as text ids: F frames, Q questions a frame, each with its answer.

    ids: uint16 or, of a large vocabulary, uint32 (n,), question, answer, question, ... frame after frame. lengths_FQ2: uint16 (F, Q, 2),
    how many of them each takes.
    """

    def __init__(self, ids: np.ndarray, lengths_FQ2: np.ndarray):
        self.ids, self.lengths_FQ2 = ids, lengths_FQ2
        self._ends = np.cumsum(lengths_FQ2.ravel(), dtype=np.int64)
        if (self._ends[-1] if len(self._ends) else 0) != len(ids):
            raise ValueError(f"questions and answers have {len(ids)} ids, expected {self._ends[-1] if len(self._ends) else 0}")

    @classmethod
    def of(cls, frames: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]]) -> Asked:
        """From the ids of questions and answers of each frame. Raises ValueError where frames have different numbers of them."""
        if len({len(pairs) for pairs in frames}) > 1:
            raise ValueError(f"frames have {sorted({len(pairs) for pairs in frames})} questions, expected as many each")
        texts = [text for pairs in frames for pair in pairs for text in pair]
        lengths = np.array([len(text) for text in texts], np.uint16).reshape(len(frames), -1, 2)
        ids = np.array([index for text in texts for index in text], np.uint32)
        return cls(ids.astype(np.uint16) if ids.max(initial=0) < 2**16 else ids, lengths)

    def pair(self, frame: int, question: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a question about a frame and of its answer."""
        at = 2 * (frame * self.lengths_FQ2.shape[1] + question)
        middle, end = self._ends[at], self._ends[at + 1]
        return self.ids[middle - self.lengths_FQ2[frame, question, 0] : middle], self.ids[middle:end]


@dataclass(frozen=True, kw_only=True)
class TokenizedEpisode:
    """One episode as ids. F frames at control steps `frame_step`.

    static_codes   uint16 (F, h, w)   codes of the static camera, row 0 at the top
    gripper_codes  uint16 (F, h, w)   of the wrist camera
    frame_step     int64 (F,)         ascending
    action_ids     F lists            FAST ids of the normalised actions [step, step + horizon); past the end zero motion, gripper kept
    chunk_imitate  bool (F,)          every action of that chunk is the demonstrator's own
    shard: number of the shard that it lies in, which is also the episode store's where there is one store.
    asked: questions about every frame with their answers, where the store has some.
    state_FS, scene_FS: uint16 (F, S), bins of the arm's state, and of what there is to see, at each frame, where the store has them; see
    emu3_vla.number_words.
    """

    task: str
    instruction: str
    shard: int
    static_codes: np.ndarray
    gripper_codes: np.ndarray
    frame_step: np.ndarray
    action_ids: list[list[int]]
    chunk_imitate: np.ndarray
    asked: Asked | None = None
    state_FS: np.ndarray | None = None
    scene_FS: np.ndarray | None = None

    def __post_init__(self):
        counts = {name: len(getattr(self, name)) for name in ("static_codes", "gripper_codes", "action_ids", "chunk_imitate")}
        if self.asked:
            counts["asked"] = len(self.asked.lengths_FQ2)
        counts |= {name: len(said) for name in NUMBERS.values() if (said := getattr(self, name)) is not None}
        wrong = {name: count for name, count in counts.items() if count != len(self.frame_step)}
        if wrong:
            raise ValueError(f"episode of {self.task!r} has {len(self.frame_step)} frames, but {wrong}")


@dataclass(frozen=True, kw_only=True)
class Tokenizers:
    """The four that a store was written with."""

    vision: VisionTokenizer
    action: FastTokenizer
    text: TextTokenizer | Emu3TextTokenizer
    normalizer: ActionNormalizer


class TokenStore:
    """A folder of token shards. `metadata`:

    horizon, action_dim: shape of a chunk. actions: what an action of 1 is, as envs.spec.ActionUnits; absent in older stores. grids:
    {camera: [rows, columns]}. codebook_size, action_vocab_size, text_vocab_size. wordings: {task: sentences}. questions: who asked about
    the frames, "" for nobody. state, scene: fields of NumberWords where the arm's state, and what there is to see, is said, else absent.
    hashes: of each tokenizer. shards: numbers of all shards that belong to it. shard_groups: the same by episode store. source: the
    episode stores (their folders as given, metadata, totals).
    """

    def __init__(self, path: Path, metadata: dict[str, Any], url: str = ""):
        self.path = path  # of manifest and tokenizers, and of the shards too unless these are behind a URL
        self.metadata = metadata
        self._place = UrlPath(url) if url else path

    @classmethod
    def create(cls, path: str | Path, metadata: dict[str, Any]) -> TokenStore:
        """Write the manifest of a store whose tokenizers lie in `path` already. Raises TokenStoreError if one is there."""
        path = Path(path)
        if (path / MANIFEST).exists():
            raise TokenStoreError(f"{path} is a token store already; open it with TokenStore.open")
        record = {"format": FORMAT, "schema": SCHEMA, "metadata": metadata | {"hashes": hashes(path)}}
        (path / "shards").mkdir(parents=True, exist_ok=True)
        write_text_atomic(path / MANIFEST, json_text(record, f"metadata of the token store {path}"))
        return cls(path, record["metadata"])

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """The store in `path`, a folder or a URL. Raises FileNotFoundError, or TokenStoreError naming a tokenizer that is not its own."""
        url = str(path) if is_url(path) else ""
        path = mirror(url, MANIFEST, TOKENIZERS) if url else Path(path)
        record = read_manifest(path / MANIFEST, FORMAT, SCHEMA, "a token store", TokenStoreError)
        store = cls(path, record["metadata"], url)
        store.require_hashes(hashes(path), f"the one in {path}")
        return store

    def require_hashes(self, found: dict[str, str], whose: str) -> None:
        """Raise TokenStoreError naming the first tokenizer in `found` that is not the one this store was written with."""
        for name, digest in found.items():
            if self.metadata["hashes"][name] != digest:
                raise TokenStoreError(
                    f"{self.path} was written by another {name} (SHA-256 {self.metadata['hashes'][name][:12]}…) than {whose} "
                    f"({digest[:12]}…); tokenize into a new folder"
                )

    def __str__(self) -> str:
        return str(self._place)

    def shard_path(self, index: int) -> Path | UrlPath:
        return self._place / "shards" / f"{index:05d}.zarr"

    def has_shard(self, index: int) -> bool:
        """Whether shard `index` is there; a shard that is there is whole."""
        return self.shard_path(index).exists()

    def shard_indices(self) -> list[int]:
        """Numbers of the shards that are there, ascending."""
        return shard_indices(self._place / "shards")

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are still to be written."""
        there = set(self.shard_indices())
        return [index for index in self.metadata["shards"] if index not in there]

    def write_shard(self, index: int, episodes: Sequence[TokenizedEpisode]) -> Path:
        """Write shard `index`, whole or not at all. Raises TokenStoreError if it is there, ValueError for no episodes."""
        target = self.path / "shards" / f"{index:05d}.zarr"
        if target.exists():
            raise TokenStoreError(f"{target} is there already; shards are never overwritten")
        if not episodes:
            raise ValueError(f"shard {index} of {self.path} would hold no episode; write at least one")
        lengths = [len(ids) for episode in episodes for ids in episode.action_ids]
        all_ids = [index for episode in episodes for ids in episode.action_ids for index in ids]
        columns = {
            "static_codes": _join(episodes, "static_codes", np.uint16),
            "gripper_codes": _join(episodes, "gripper_codes", np.uint16),
            "frame_step": _join(episodes, "frame_step", np.int64),
            "chunk_imitate": _join(episodes, "chunk_imitate", np.bool_),
            "action_lengths": np.array(lengths, np.int64),
            "action_ids": np.array(all_ids, np.int64),
        }
        if any(episode.asked for episode in episodes):
            if not all(episode.asked for episode in episodes):
                raise ValueError(f"some episodes of shard {index} have questions and some have none")
            columns["asked_ids"] = np.concatenate([episode.asked.ids for episode in episodes])
            columns["asked_lengths"] = np.concatenate([episode.asked.lengths_FQ2 for episode in episodes])
        for column, name in NUMBERS.items():
            if any(getattr(episode, name) is not None for episode in episodes):
                columns[column] = _join(episodes, name, np.uint16)
        records = [{"task": e.task, "instruction": e.instruction, "frames": len(e.frame_step)} for e in episodes]
        write_shard_atomic(target, columns, {"format": SHARD_FORMAT, "schema": SCHEMA, "episodes": records})
        return target

    def read_shard(self, index: int) -> list[TokenizedEpisode]:
        """The episodes of shard `index`, in the episode store's order. Raises TokenStoreError."""
        path = self.shard_path(index)
        if not path.exists():
            raise TokenStoreError(f"{self} has no shard {index}; run the same tokenize command again to finish it")
        group = open_shard(path, SHARD_FORMAT, SCHEMA, TokenStoreError)
        names = ("static_codes", "gripper_codes", "frame_step", "chunk_imitate", "action_lengths", "action_ids")
        has_questions = bool(self.metadata.get("questions"))
        said = [column for column in NUMBERS if self._words_of(column) is not None]
        optional = (*(ASKED if has_questions else ()), *said)
        columns = {name: read_array(group, name, path) for name in (*names, *optional)}
        self._require_known(columns, path)
        starts = np.concatenate([[0], np.cumsum(columns["action_lengths"])])
        episodes, frame, asked_before = [], 0, 0
        for record in group.attrs["episodes"]:
            rows = slice(frame, frame + record["frames"])
            asked = None
            if has_questions:
                lengths_FQ2 = columns["asked_lengths"][rows]
                asked_after = asked_before + int(lengths_FQ2.sum())
                asked = Asked(columns["asked_ids"][asked_before:asked_after], lengths_FQ2)
                asked_before = asked_after
            ids = [columns["action_ids"][starts[row] : starts[row + 1]].tolist() for row in range(rows.start, rows.stop)]
            arrays = {name: columns[name][rows] for name in ("static_codes", "gripper_codes", "frame_step", "chunk_imitate")}
            arrays |= {NUMBERS[column]: columns[column][rows] for column in said}
            episodes.append(
                TokenizedEpisode(task=record["task"], instruction=record["instruction"], shard=index, action_ids=ids, asked=asked, **arrays)
            )
            frame = rows.stop
        return episodes

    def _require_known(self, columns: dict[str, np.ndarray], path: Path | UrlPath) -> None:
        """Raise TokenStoreError for a shard without frames, or with ids that the store's tokenizers do not have."""
        if not len(columns["frame_step"]):
            raise TokenStoreError(f"{path} is empty: none of its episodes has a frame; delete that shard and make it again")
        sizes = {"static_codes": "codebook_size", "gripper_codes": "codebook_size", "action_ids": "action_vocab_size"}
        for name, size in (sizes | {"asked_ids": "text_vocab_size"}).items():
            ids = columns.get(name, np.zeros(0, int))
            if ids.min(initial=0) < 0 or ids.max(initial=0) >= self.metadata[size]:
                raise TokenStoreError(
                    f"{path}: {name} has ids in [{ids.min()}, {ids.max()}], expected [0, {self.metadata[size]}), as {MANIFEST} states "
                    f"({size}): they come from another tokenizer; delete that shard and make it again"
                )
        for column in NUMBERS:
            self._require_sayable(column, columns.get(column), path)

    def _require_sayable(self, column: str, numbers: np.ndarray | None, path: Path | UrlPath) -> None:
        words = self._words_of(column)
        if words and (numbers.shape[1:] != (len(words.names),) or numbers.max(initial=0) >= words.bins):
            raise TokenStoreError(
                f"{path}: {column} has shape {numbers.shape} up to {numbers.max(initial=0)}, expected (frames, {len(words.names)}) "
                f"below {words.bins}, as {MANIFEST} states; delete that shard and make it again"
            )

    def episodes(self, shards: Sequence[int] | None = None) -> list[TokenizedEpisode]:
        """Episodes of `shards`, by default of all. Raises TokenStoreError for a store that is not finished."""
        missing = self.missing_shards()
        if missing:
            raise TokenStoreError(
                f"{self} is unfinished: {len(missing)} of {len(self.metadata['shards'])} shards are missing; "
                "run the same tokenize command again"
            )
        chosen = self.metadata["shards"] if shards is None else shards
        return [episode for index in chosen for episode in self.read_shard(index)]

    def split(self, validation_fraction: float) -> tuple[list[TokenizedEpisode], list[TokenizedEpisode]]:
        """Episodes to train on and episodes held out, by whole shards: the shards that the vision tokenizer's training held out at the
        same fraction. Raises ValueError where too few shards are there."""
        groups = self.metadata.get("shard_groups", [self.metadata["shards"]])  # absent in stores of before there were several
        splits = [split_shards(group, validation_fraction) for group in groups]
        train, held_out = ([shard for split in splits for shard in split[side]] for side in (0, 1))
        return self.episodes(train), self.episodes(held_out)

    @property
    def state_words(self) -> StateWords | None:
        """How the arm's state is said, where it is."""
        return StateWords.of(self.metadata["state"]) if self.metadata.get("state") else None

    @property
    def scene_words(self) -> NumberWords | None:
        """How what there is to see is said, where it is."""
        return NumberWords.of(self.metadata["scene"]) if self.metadata.get("scene") else None

    def _words_of(self, column: str) -> NumberWords | None:
        return self.state_words if column == STATE else self.scene_words

    def tokenizers(self) -> Tokenizers:
        """The tokenizers in the store's folder. Raises the tokenizer's own error where one is damaged."""
        from emu3_vla.vision_tokenizer import VisionTokenizer

        return Tokenizers(
            vision=VisionTokenizer.from_pretrained(self.path / VISION),
            action=FastTokenizer.from_pretrained(self.path / ACTION),
            text=text_tokenizer(self.path / TEXT),
            normalizer=ActionNormalizer.load(self.path / NORMALIZER),
        )


def text_tokenizer(folder: Path) -> TextTokenizer | Emu3TextTokenizer:
    """The text tokenizer in a folder: Emu3's own where its tokens lie there as a list of ranks, else one of ours."""
    kind = Emu3TextTokenizer if any((folder / name).exists() for name in TIKTOKEN_FILES) else TextTokenizer
    return kind.from_pretrained(folder)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every tokenizer in `folder`. Raises TokenStoreError naming one that is missing."""
    missing = [name for name in TOKENIZERS if not (folder / name).exists()]
    if missing:
        raise TokenStoreError(f"{folder} lacks {', '.join(missing)}; restore it or tokenize into a new folder")
    return {name: content_hash(folder / name) for name in TOKENIZERS}


def content_hash(path: Path) -> str:
    """SHA-256 over a file, or over the names and contents of all files in a folder, in the order of their names."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        content = file.read_bytes()
        name = file.relative_to(path).as_posix() if file != path else ""
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _join(episodes: Sequence[TokenizedEpisode], name: str, dtype: type) -> np.ndarray:
    parts = [getattr(episode, name) for episode in episodes]
    wrong = [part.dtype for part in parts if part.dtype != dtype]
    if wrong:
        raise ValueError(f"{name} is {wrong[0]}, expected {np.dtype(dtype)}")
    return np.concatenate(parts)
