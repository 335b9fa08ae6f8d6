"""Guesses at the next items, for lossless parallel decoding: a wrong guess costs time and changes nothing.

A draft is `draft(written, count)`: all items so far, the prompt's among them, to at most `count` that may follow. The grammar cuts what
it does not allow. What the engine computed behind a wrong guess is its next guess already (Jacobi iteration), so drafts fill only the
rest of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from emu3_vla.generation.grammar import Block, Item

Draft = Callable[[Sequence[Item], int], list[Item]]


def repeat_last(written: Sequence[Item], count: int) -> list[Item]:
    """The last item again: neighbours in a picture are alike. Of blocks, their codes at the places that follow."""
    last = written[-1]
    if isinstance(last, Block):
        return [Block(last.place + step, last.codes) for step in range(1, count + 1)]
    return [last] * count


def above(columns: int) -> Draft:
    """What was written `columns` items ago, for pictures: the row above, or with the length of a frame the frame before."""

    def draft(written: Sequence[Item], count: int) -> list[Item]:
        if len(written) < columns:
            return []
        source = list(written[-columns:])
        return [source[step % columns] for step in range(count)]

    return draft


class NGrams:
    """What followed the last few items when they stood together before: in earlier sequences that were `add`ed, or in this one.

    longest: items that are compared, the longest match first. Source: prompt lookup decoding (Saxena, 2023).
    """

    def __init__(self, longest: int = 3, sequences: Iterable[Sequence[Item]] = ()):
        self._longest, self._followers = longest, {}
        for sequence in sequences:
            self.add(sequence)

    def add(self, sequence: Sequence[Item]) -> None:
        """Remember a sequence, a previous chunk for example; the newest is asked first."""
        for at in range(1, len(sequence)):
            for length in range(1, min(self._longest, at) + 1):
                self._followers[tuple(sequence[at - length : at])] = (sequence, at)

    def __call__(self, written: Sequence[Item], count: int) -> list[Item]:
        for length in range(min(self._longest, len(written)), 0, -1):
            tail = tuple(written[-length:])
            if tail in self._followers:
                sequence, at = self._followers[tail]
                return list(sequence[at : at + count])
            if (at := _last_occurrence(written, tail)) is not None:
                return list(written[at : at + count])
        return []


def _last_occurrence(written: Sequence[Item], tail: tuple[Item, ...]) -> int | None:
    """Where the items after the latest earlier occurrence of `tail` begin."""
    length = len(tail)
    for at in range(len(written) - 1, length - 1, -1):
        if written[at - 1] == tail[-1] and tuple(written[at - length : at]) == tail:
            return at
    return None
