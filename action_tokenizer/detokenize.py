"""Ids to characters, strictly or leniently, many chunks at a time.

Strict reading trusts nothing: ids must exist, their bytes must be UTF-8 that ends where the list ends, and each list must hold exactly
the wanted number of characters.
"""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from action_tokenizer.errors import ActionTokenizerError, MalformedActionTokens


@dataclass(frozen=True, kw_only=True)
class Repairs:
    """What lenient decoding did, over the whole batch.

    malformed: lists that needed any repair. padded, cut: coefficients added as 0, and left out at the end. unreadable: stretches of
    bytes that were no character. unknown: ids outside the vocabulary.
    """

    chunks: int
    malformed: int
    padded: int
    cut: int
    unreadable: int
    unknown: int


class TokenTable:
    """The bytes of every id."""

    def __init__(self, token_bytes: list[bytes]):
        self._lookup = dict(enumerate(token_bytes))
        self._pool = np.frombuffer(b"".join(token_bytes), np.uint8)
        self._length = np.array([len(text) for text in token_bytes])
        self._begin = np.cumsum(self._length) - self._length

    def code_points(self, ids: Sequence[Sequence[int]], *, expected: int) -> np.ndarray:
        """Code points of all lists, one after another: uint32 (N * expected,). Raises MalformedActionTokens."""
        rows = _lists(ids)
        flat = _flat(rows)
        if len(flat) == 0 or flat.min() < 0 or flat.max() >= len(self._length):
            self._explain(rows, expected)
        text, end = self._text(flat)
        bounds = end[np.append(0, np.cumsum([len(row) for row in rows]))]
        try:
            points = np.frombuffer(text.tobytes().decode("utf-8").encode("utf-32-le"), dtype="<u4")
        except UnicodeDecodeError:
            points = None
        if points is None or not _each_holds(text, bounds, expected):
            self._explain(rows, expected)
        return points

    def _text(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of `flat` ids, one after another: uint8 (L,); and where each id begins, with L at the end: int64 (K + 1,)."""
        length = self._length.take(flat)
        end = np.append(0, np.cumsum(length))
        # Each byte lies one after the one before it in the pool, but for a jump wherever an id begins. Every id has a byte.
        jump = self._begin.take(flat)
        jump[1:] -= jump[:-1] + length[:-1] - 1
        source = np.ones(end[-1], np.intp)
        source[end[:-1]] = jump
        return self._pool.take(np.cumsum(source, out=source)), end

    def code_points_lenient(self, ids: Sequence[Sequence[int]], *, expected: int, fill: int) -> tuple[np.ndarray, Repairs]:
        """Code points as `code_points` gives them, each list mended to `expected`; and what that took."""
        rows, counts = [], np.zeros(5, np.int64)
        for chunk in _lists(ids):
            known = [index for index in chunk if index in self._lookup]
            points, unreadable = _readable(b"".join(self._lookup[index] for index in known))
            padded, cut = max(0, expected - len(points)), max(0, len(points) - expected)
            repair = np.array([padded, cut, unreadable, len(chunk) - len(known)])
            counts += [int(repair.any()), *repair]
            rows.append(np.concatenate([points[:expected], np.full(padded, fill, "<u4")]))
        malformed, padded, cut, unreadable, unknown = (int(count) for count in counts)
        repairs = Repairs(
            chunks=len(rows), malformed=malformed, padded=padded, cut=cut, unreadable=unreadable, unknown=unknown
        )
        return np.concatenate(rows), repairs

    def _explain(self, rows: list[list[int]], expected: int) -> None:
        """Find the first fault and raise MalformedActionTokens for it."""
        for chunk, row in enumerate(rows):
            self._explain_chunk(chunk, row, expected)
        raise AssertionError("a batch was refused but every chunk of it is well formed")

    def _explain_chunk(self, chunk: int, row: Sequence[int], expected: int) -> None:
        reader, count = codecs.getincrementaldecoder("utf-8")(), 0

        def fault(position: int, what: str):
            raise MalformedActionTokens(
                f"chunk {chunk}, position {position}: {what}; expected {expected} coefficients, {count} read before",
                chunk=chunk, position=position, expected=expected, actual=count,
            )  # fmt: skip

        for position, index in enumerate(row):
            if index not in self._lookup:
                fault(position, f"id {index} is not in the vocabulary of {len(self._lookup)}")
            try:
                held = len(reader.decode(self._lookup[index]))
            except UnicodeDecodeError:
                fault(position, f"id {index} does not go on with the half character before it, or starts with such a half")
            if count + held > expected:
                fault(position, f"id {index} holds {held} coefficients where {expected - count} are owed")
            count += held
        if reader.getstate()[0]:
            fault(len(row), "the list ends within a character")
        if count < expected:
            fault(len(row), f"the list ends {expected - count} coefficients too early")


def check_counts(ids: Sequence[Sequence[int]], *, expected: int, vocab_size: int) -> np.ndarray:
    """Lists of exactly `expected` ids below `vocab_size`, one after another: int64 (N * expected,). Raises MalformedActionTokens."""
    rows = _lists(ids)
    for chunk, row in enumerate(rows):
        if len(row) != expected:
            raise MalformedActionTokens(
                f"chunk {chunk}: {len(row)} ids, one a value, where {expected} are expected",
                chunk=chunk, position=min(len(row), expected), expected=expected, actual=len(row),
            )  # fmt: skip
    flat = np.array(rows, np.int64).ravel()
    unknown = np.flatnonzero((flat < 0) | (flat >= vocab_size))
    if len(unknown):
        chunk, position = divmod(int(unknown[0]), expected)
        raise MalformedActionTokens(
            f"chunk {chunk}, position {position}: id {flat[unknown[0]]} is not in the vocabulary of {vocab_size}",
            chunk=chunk, position=position, expected=expected, actual=position,
        )  # fmt: skip
    return flat


def _lists(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """`ids` as a list of lists of integers. Raises ActionTokenizerError for an empty batch or a bare list of ids."""
    if len(ids) == 0:
        raise ActionTokenizerError("no lists of ids to decode; leave empty batches out")
    return [row if type(row) is list else _list(row) for row in ids]


def _list(row) -> list[int]:
    if isinstance(row, np.ndarray) and row.ndim == 1:
        return row.tolist()
    if isinstance(row, Sequence) and not isinstance(row, str):
        return list(row)
    raise ActionTokenizerError(f"expected a list of lists of ids, one list a chunk, but one of them is {row!r}")


def _flat(rows: list[list[int]]) -> np.ndarray:
    """All ids, one after another: int64 (K,)."""
    flat = []
    for row in rows:
        flat += row
    try:
        return np.frombuffer(array("q", flat), np.int64)
    except (TypeError, OverflowError) as error:
        raise ActionTokenizerError(f"ids must be integers of at most 64 bits: {error}") from error


def _each_holds(text: np.ndarray, bounds: np.ndarray, expected: int) -> bool:
    """Whether each of the stretches of `text` between `bounds` has `expected` characters and begins with a whole one.

    text: uint8 (L,), known to be valid UTF-8 as a whole. bounds: ascending, from 0 to L.
    """
    if (np.diff(bounds) == 0).any():
        return False
    begins_character = (text & 0xC0) != 0x80
    counts = np.add.reduceat(begins_character, bounds[:-1], dtype=np.int64)
    return bool((counts == expected).all() and begins_character[bounds[:-1]].all())


def _readable(text: bytes) -> tuple[np.ndarray, int]:
    """The characters of damaged UTF-8 as uint32, and the number of stretches that were none."""
    characters = text.decode("utf-8", errors="surrogateescape").encode("utf-32-le", errors="surrogatepass")
    points = np.frombuffer(characters, dtype="<u4")
    # Undecodable bytes came through as surrogates, which valid UTF-8 cannot hold.
    damaged = (points >= 0xD800) & (points < 0xE000)
    stretches = int((np.diff(damaged.astype(np.int8), prepend=0) == 1).sum())
    return points[~damaged], stretches
