"""Segments as one stream of ids, and back: `parse` is the exact inverse of `write`.

Emu3's form (Source: baaivision/Emu3 emu3/mllm/processing_emu3.py; videos, actions and reasoning: baaivision/UniVLA, same file):

    image      <begin image> rows*columns <image token>         (codes of a row     <end of line>)  per row    <end of frame> <end image>
    video      <begin image> frames*rows*columns <image token>  (codes of a frame   <end of frame>) per frame  <end image>
    actions    <begin action> action ids <end of chunk>
    reasoning  <begin reasoning> text ids <end of reasoning>

Sizes are written in the text ids of their digits and "*". With block_size m above 1 a row is a row of blocks, and sizes still count codes.

A compact vocabulary's image is <begin image NAME> and its codes; the name says how many. There the codes of a block follow each other,
and blocks are in raster order. A block of m = 1 is a code, so both forms are in raster order then.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NoReturn

import numpy as np

from emu3_vla.documents.pictures import pictures_of
from emu3_vla.documents.segments import (
    ActionChunk,
    Begin,
    DocumentError,
    End,
    OpenAction,
    OpenReasoning,
    Reasoning,
    Segment,
    Text,
    check_order,
)
from emu3_vla.vocabulary import Emu3Vocabulary, Vocabulary


class MalformedDocument(DocumentError):
    """Ids that are no document. position: index into the ids. found: the id there, None at the end of the stream. expected: in words."""

    def __init__(self, position: int, found: int | None, expected: str, vocabulary: Vocabulary):
        self.position, self.found, self.expected = position, found, expected
        what = "the stream ends" if found is None else f"found {vocabulary.describe(found)}"
        super().__init__(f"malformed document at position {position}: {what}, expected {expected}")


def write(segments: Sequence[Segment], vocabulary: Vocabulary) -> np.ndarray:
    """Ids of a document: int64 (n,), one per code whatever the block size.

    Raises DocumentError for segments in an order that cannot be, or with ids, sizes or kinds that the vocabulary does not have.
    """
    check_order(segments)
    return np.concatenate([np.zeros(0, np.int64), *(spell(segment, vocabulary) for segment in segments)])


def parse(
    ids: np.ndarray | Sequence[int], vocabulary: Vocabulary, *, prompt: bool = False, order: str | np.ndarray = "raster"
) -> list[Segment]:
    """Segments of a stream: integers (n,) -> list; `write` gives the same ids again.

    prompt: the last segment may be open, as it is where a model is to go on. order: of the blocks of its images (see Image). Padding is no
    document: strip it first.
    Raises MalformedDocument, saying at which position what came and what was expected.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DocumentError(f"ids have shape {array.shape} and type {array.dtype}, expected integers in a row")
    return _Reader(array.astype(np.int64), vocabulary, prompt, order).document()


def spell(segment: Segment, vocabulary: Vocabulary) -> np.ndarray:
    """Ids of one segment: int64 (n,). Raises DocumentError."""
    match segment:
        case Begin():
            return np.array([vocabulary.bos])
        case End():
            return np.array([vocabulary.eos])
        case Text():
            return _text_ids(segment, vocabulary)
        case ActionChunk():
            return np.concatenate([[vocabulary.begin_action], _action_ids(segment, vocabulary), [vocabulary.end_of_chunk]])
        case OpenAction():
            return np.array([vocabulary.begin_action])
        case Reasoning() | OpenReasoning():
            return _reasoning_ids(segment, vocabulary)
    return pictures_of(vocabulary).spell(segment)


def spelled_length(segment: Segment, vocabulary: Vocabulary) -> tuple[int, int]:
    """Number of ids that `spell` gives, without spelling or checking them: (all but codes, codes)."""
    match segment:
        case Text():
            return len(segment.ids), 0
        case ActionChunk() | Reasoning():
            return len(segment.ids) + 2, 0
        case Begin() | End() | OpenAction() | OpenReasoning():
            return 1, 0
    return pictures_of(vocabulary).length(segment)


class _Reader:
    """A position in a stream, moved on by each segment that is read."""

    def __init__(self, ids: np.ndarray, vocabulary: Vocabulary, prompt: bool, order: str | np.ndarray):
        self.ids, self.vocabulary, self._prompt, self.order = ids, vocabulary, prompt, order
        self.at = 0

    def document(self) -> list[Segment]:
        segments: list[Segment] = []
        while self.at < len(self.ids):
            segments.append(self._segment(segments[-1] if segments else None))
        return segments

    def fail(self, position: int, expected: str) -> NoReturn:
        found = int(self.ids[position]) if position < len(self.ids) else None
        raise MalformedDocument(position, found, expected, self.vocabulary)

    @property
    def next(self) -> int | None:
        """The id at the position, None at the end."""
        return int(self.ids[self.at]) if self.at < len(self.ids) else None

    @property
    def open_here(self) -> bool:
        """Whether a prompt ends here."""
        return self._prompt and self.at == len(self.ids)

    def take(self, index: int) -> None:
        """Step over an id that must come now."""
        if self.next != index:
            self.fail(self.at, self.vocabulary.describe(index))
        self.at += 1

    def rows(self, count: int, width: int, closing: int | None) -> np.ndarray:
        """`count` rows of `width` codes, each with an id that closes it, or without: int64 (count, width)."""
        span = width + (closing is not None)
        region = self.ids[self.at : self.at + count * span] - self.vocabulary.vision_start
        is_wrong = (region < 0) | (region >= self.vocabulary.codebook_size)
        if closing is not None:
            is_wrong[width::span] = region[width::span] != closing - self.vocabulary.vision_start
        if is_wrong.any() or len(region) < count * span:
            first = int(is_wrong.argmax()) if is_wrong.any() else len(region)
            row, column = divmod(first, span)
            closes = column == width and closing is not None
            expected = self.vocabulary.describe(closing) if closes else "a vision code"
            self.fail(self.at + first, f"{expected} (row {row + 1} of {count} has {column} of {width} codes so far)")
        self.at += len(region)
        return region.reshape(count, span)[:, :width]

    @cached_property
    def image_ends(self) -> np.ndarray:
        """Positions of the ids that end images, in Emu3's form."""
        return np.flatnonzero(self.ids == self.vocabulary.end_of_image)

    def _segment(self, before: Segment | None) -> Segment:
        vocabulary, index = self.vocabulary, self.next
        if isinstance(before, End) and index != vocabulary.bos:
            self.fail(self.at, f"{vocabulary.describe(vocabulary.bos)} after the end of a document")
        if vocabulary.is_text(self.ids[self.at]):
            return Text(self._run(self._not_text))
        if index == vocabulary.bos and (before is None or isinstance(before, End)):
            self.at += 1
            return Begin()
        if index == vocabulary.eos:
            self.at += 1
            return End()
        if index == vocabulary.begin_action:
            return self._chunk()
        if isinstance(vocabulary, Emu3Vocabulary) and index == vocabulary.begin_reasoning:
            return self._reasoning()
        if (picture := pictures_of(vocabulary).read(self)) is not None:
            return picture
        return self.fail(self.at, "text, or an id that begins a segment")

    def _chunk(self) -> ActionChunk | OpenAction:
        self.at += 1
        if self.open_here:
            return OpenAction()
        ids = self._run(self._not_action)
        if not len(ids) or self.next != self.vocabulary.end_of_chunk:
            ending = f" or {self.vocabulary.describe(self.vocabulary.end_of_chunk)}" if len(ids) else ""
            self.fail(self.at, f"an action id{ending}")
        self.at += 1
        return ActionChunk(self.vocabulary.to_actions(ids))

    def _reasoning(self) -> Reasoning | OpenReasoning:
        self.at += 1
        if self.open_here:
            return OpenReasoning()
        ids = self._run(self._not_text)
        if not len(ids):
            self.fail(self.at, "text")
        self.take(self.vocabulary.end_of_reasoning)
        return Reasoning(ids)

    def _run(self, breaks: np.ndarray) -> np.ndarray:
        """Ids from here to the next of these positions."""
        after = np.searchsorted(breaks, self.at)
        start, self.at = self.at, int(breaks[after]) if after < len(breaks) else len(self.ids)
        return self.ids[start : self.at]

    @cached_property
    def _not_text(self) -> np.ndarray:
        return np.flatnonzero(~self.vocabulary.is_text(self.ids))

    @cached_property
    def _not_action(self) -> np.ndarray:
        return np.flatnonzero(~self.vocabulary.is_action(self.ids))


def _text_ids(segment: Text | Reasoning, vocabulary: Vocabulary) -> np.ndarray:
    ids = _checked_row(segment.ids, "text")
    is_text = vocabulary.is_text(ids)
    if not is_text.all():
        raise DocumentError(
            f"text ids lie in [{ids.min()}, {ids.max()}], expected [0, {vocabulary.text_size}): "
            f"they come from another text tokenizer, or hold {vocabulary.describe(int(ids[~is_text][0]))}, which is no text"
        )
    return ids


def _action_ids(segment: ActionChunk, vocabulary: Vocabulary) -> np.ndarray:
    ids = _checked_row(segment.ids, "action")
    if ids.min() < 0 or ids.max() >= vocabulary.action_size:
        raise DocumentError(
            f"action ids lie in [{ids.min()}, {ids.max()}], expected [0, {vocabulary.action_size}): they come from another action tokenizer"
        )
    return vocabulary.from_actions(ids)


def _reasoning_ids(segment: Reasoning | OpenReasoning, vocabulary: Vocabulary) -> np.ndarray:
    if not isinstance(vocabulary, Emu3Vocabulary):
        raise DocumentError(f"a compact vocabulary writes no {type(segment).__name__}: it has no ids that begin and end it")
    if isinstance(segment, OpenReasoning):
        return np.array([vocabulary.begin_reasoning])
    return np.concatenate([[vocabulary.begin_reasoning], _text_ids(segment, vocabulary), [vocabulary.end_of_reasoning]])


def _checked_row(ids: Sequence[int], what: str) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
        raise DocumentError(f"{what} segment has ids of shape {array.shape} and type {array.dtype}, expected at least one id in a row")
    return array.astype(np.int64)
