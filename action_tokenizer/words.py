"""Where GPT-2's regular expression cuts text into words, for many chunks of characters at once.

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

Published FAST vocabularies were fitted with it, so their ids depend on it: a coefficient's character happens to be a letter, a digit, a
space or something else. All its choices are local (a run of one kind, a space before it, a lone apostrophe), so array operations do.

Source: GPT-2 `encoder.py`, as `tokenizers` applies it in its ByteLevel pre-tokenizer.
"""

from __future__ import annotations

import numpy as np
from tokenizers.pre_tokenizers import PreTokenizer

_UNKNOWN, _LETTER, _NUMBER, _OTHER, _SPACE = range(5)
_REPRESENTATIVE = {_LETTER: "a", _NUMBER: "1", _OTHER: "!", _SPACE: "\t"}
_BLANK, _APOSTROPHE = ord(" "), ord("'")
_CONTRACTIONS = ("s", "t", "re", "ve", "m", "ll", "d")


class WordSplitter:
    """Word starts as the given ByteLevel pre-tokenizer finds them."""

    def __init__(self, pre_tokenizer: PreTokenizer):
        self._pre_tokenizer = pre_tokenizer
        self._kind = np.zeros(0x110000, np.uint8)

    def starts(self, points: np.ndarray, length: int) -> np.ndarray:
        """Whether a word starts at each code point: integers (N * length,) of N chunks to bool (N * length,)."""
        kind = self._kinds(points)
        first = np.zeros(len(points), bool)
        first[::length] = True
        starts = first | (kind != np.roll(kind, 1))
        self._attach_blanks(points, kind, first, starts)
        self._cut_contractions(points, kind, first, starts)
        return starts

    def _kinds(self, points: np.ndarray) -> np.ndarray:
        for point in np.unique(points[self._kind[points] == _UNKNOWN]):
            self._kind[point] = self._ask(chr(point))
        return self._kind[points]

    def _ask(self, char: str) -> int:
        """The kind of a character, from the library itself: its tables of letters are the ones that count."""
        for kind, representative in _REPRESENTATIVE.items():
            if len(self._pre_tokenizer.pre_tokenize_str(representative + char)) == 1:
                return kind
        raise AssertionError(f"{char!r} forms no word with any kind of character")

    @staticmethod
    def _attach_blanks(points, kind, first, starts) -> None:
        """The last of a run of spaces stands apart, and if it is a blank the next word begins with it."""
        last = np.flatnonzero((kind[:-1] == _SPACE) & (kind[1:] != _SPACE) & ~first[1:])
        starts[last] = True
        starts[last + 1] = points[last] != _BLANK

    @staticmethod
    def _cut_contractions(points, kind, first, starts) -> None:
        """A lone apostrophe that begins a word takes an s, t, re, ... after it along, and nothing more."""
        lone = np.flatnonzero((points == _APOSTROPHE) & starts)
        room = np.append(first, [True] * 3)  # past the end counts as another chunk
        padded = np.append(points, [0] * 3)
        for letters in _CONTRACTIONS:
            follows = np.ones(len(lone), bool)
            for offset, letter in enumerate(letters, 1):
                follows &= (padded[lone + offset] == ord(letter)) & ~room[lone + offset]
            for offset in range(1, len(letters) + 1):
                starts[lone[follows] + offset] = False
            after = lone[follows] + len(letters) + 1
            starts[after[after < len(starts)]] = True
