"""Characters of coefficients to ids: by the `tokenizers` library for a few chunks, in lockstep for many. Both give the same ids."""

from __future__ import annotations

import json
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

from action_tokenizer import bytelevel
from action_tokenizer.merging import Merger, UnsuitableMerges
from action_tokenizer.words import WordSplitter

MANY_CHUNKS = 64
"""From this many on, lockstep is faster."""
_MOST_IDS = 4096
"""Lockstep keeps a table over pairs of ids (32 MiB at this size); larger vocabularies always go through the library."""


class ChunkEncoder:
    """BPE of chunks. bpe: a tokenizer that `files` has checked. Safe to share between threads."""

    def __init__(self, bpe: Tokenizer):
        self._bpe = bpe

    def encode(self, points_NL: np.ndarray) -> list[list[int]]:
        """Ids of each row of code points: integers (N, L) to N lists. Every byte must be in the vocabulary."""
        text = points_NL.astype("<u4").tobytes().decode("utf-32-le")
        if len(points_NL) < MANY_CHUNKS or self._merger is None:
            length = points_NL.shape[1]
            rows = [text[start : start + length] for start in range(0, len(text), length)]
            return [self._bpe.encode(row, add_special_tokens=False).ids for row in rows]
        return self._encode_many(points_NL, text.encode("utf-8"))

    def _encode_many(self, points_NL: np.ndarray, text: bytes) -> list[list[int]]:
        points, length = points_NL.ravel(), points_NL.shape[1]
        begins = _begins(points, len(text))
        starts = begins[::length] if self._splitter is None else begins[self._splitter.starts(points, length)]
        ids, position = self._merger.encode(text, starts)
        cuts = [*np.searchsorted(position, begins[::length]).tolist(), len(ids)]
        flat = self._integers.take(ids).tolist()
        return [flat[start:end] for start, end in zip(cuts[:-1], cuts[1:], strict=True)]

    @cached_property
    def _integers(self) -> np.ndarray:
        """Each id as the one Python integer that every list shares: no allocation an id, and lists are read again from cache."""
        return np.array(range(self._bpe.get_vocab_size()), dtype=object)

    @cached_property
    def _splitter(self) -> WordSplitter | None:
        """What cuts chunks into words; None where a chunk is one word."""
        return WordSplitter(self._bpe.pre_tokenizer) if self._files["pre_tokenizer"].get("use_regex", True) else None

    @cached_property
    def _merger(self) -> Merger | None:
        """The merges in lockstep; None where the vocabulary does not meet its conditions."""
        vocabulary = self._files["model"]["vocab"]
        if len(vocabulary) > _MOST_IDS or self._files["model"].get("ignore_merges"):
            return None
        alphabet = bytelevel.char_to_byte()
        tokens = {
            index: bytes(alphabet[char] for char in token)
            for token, index in vocabulary.items()
            if all(char in alphabet for char in token)
        }
        merges = [(vocabulary[left], vocabulary[right], vocabulary[left + right]) for left, right in self._files["model"]["merges"]]
        try:
            return Merger(tokens, merges, len(vocabulary))
        except UnsuitableMerges:
            return None

    @cached_property
    def _files(self) -> dict:
        return json.loads(self._bpe.to_str())


def _begins(points: np.ndarray, total: int) -> np.ndarray:
    """Where each code point's bytes begin in UTF-8 of `total` bytes. Nothing here needs four of them."""
    if total == len(points):
        return np.arange(total)
    size = 1 + (points >= 0x80) + (points >= 0x800)
    return np.cumsum(size) - size
