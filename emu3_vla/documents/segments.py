"""What documents are made of: typed segments, each with its own kind of content.

`supervised`, where a segment has it, says whether its ids are targets of training. It is not written into the stream: what is parsed is
all supervised. Segments are equal if they are of one type and hold the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np


class DocumentError(ValueError):
    """A document that does not fit the vocabulary, or ids that are no document."""


class _Segment:
    """Equality by content, for arrays and lists of ids alike."""

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(np.array_equal(getattr(self, part.name), getattr(other, part.name)) for part in fields(self))

    __hash__ = None


@dataclass(frozen=True, eq=False)
class Begin(_Segment):
    """Begin of a document. May stand first, or right after an End where documents are packed."""


@dataclass(frozen=True, eq=False)
class End(_Segment):
    """End of a document. May stand last, or before a Begin."""

    supervised: bool = True


@dataclass(frozen=True, eq=False)
class Text(_Segment):
    """Text ids, int (n,), at least one. Of two texts in a row `parse` makes one."""

    ids: Sequence[int]
    supervised: bool = True


@dataclass(frozen=True, eq=False)
class Reasoning(_Segment):
    """Text ids, int (n,), that the model thinks before it acts. Emu3's vocabulary only (UniVLA's begin and end of thought)."""

    ids: Sequence[int]
    supervised: bool = True


@dataclass(frozen=True, eq=False)
class Image(_Segment):
    """One image. codes: integers (rows, columns) in [0, codebook_size).

    name: as in a compact vocabulary, where it gives the size. Emu3's stream holds the size but no names, and is parsed to name "".
    order: in which its blocks are written (a block of one code is a code), by name or place by place: emu3_vla.documents.orders. The
    stream does not say it.
    """

    name: str
    codes: np.ndarray
    supervised: bool = True
    order: str | np.ndarray = "raster"


@dataclass(frozen=True, eq=False)
class Video(_Segment):
    """Frames of one size. codes: integers (shown, rows, columns), shown at least 1. Emu3's vocabulary only.

    frames: the number that the stream announces; None: as many as are shown. UniVLA announces more where it shows the first frames alone,
    and writes single camera images as videos of one frame.
    """

    codes: np.ndarray
    frames: int | None = None
    supervised: bool = True

    def __post_init__(self):
        if self.frames is None:
            object.__setattr__(self, "frames", len(self.codes))


@dataclass(frozen=True, eq=False)
class ActionChunk(_Segment):
    """Action tokenizer's ids of one chunk, at least one.

    supervised: False where the demonstrator did not choose these actions; they stay as context, and that actions come is still a target.
    """

    ids: Sequence[int]
    supervised: bool = True


@dataclass(frozen=True, eq=False)
class OpenImage(_Segment):
    """End of a prompt: an image of this size begins here, for the model to draw. name: see Image."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True, eq=False)
class OpenVideo(_Segment):
    """End of a prompt: a video of `frames` frames, of which the first (shown, rows, columns) are given and the model films the rest."""

    frames: int
    codes: np.ndarray


@dataclass(frozen=True, eq=False)
class OpenAction(_Segment):
    """End of a prompt: the model acts here."""


@dataclass(frozen=True, eq=False)
class OpenReasoning(_Segment):
    """End of a prompt: the model thinks here. Emu3's vocabulary only."""


Segment = Begin | End | Text | Reasoning | Image | Video | ActionChunk | OpenImage | OpenVideo | OpenAction | OpenReasoning
OPEN = (OpenImage, OpenVideo, OpenAction, OpenReasoning)


def to_blocks(codes: np.ndarray, block_size: int) -> np.ndarray:
    """Cut grids of codes into blocks, both in raster order: (..., rows, columns) -> (..., blocks, block_size²)."""
    *lead, rows, columns = codes.shape
    split = codes.reshape(*lead, rows // block_size, block_size, columns // block_size, block_size)
    return split.swapaxes(-2, -3).reshape(*lead, rows * columns // block_size**2, block_size**2)


def from_blocks(blocks: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The inverse of `to_blocks`: (..., blocks, block_size²) -> (..., rows, columns)."""
    lead, block_size = blocks.shape[:-2], round(blocks.shape[-1] ** 0.5)
    split = blocks.reshape(*lead, rows // block_size, columns // block_size, block_size, block_size)
    return split.swapaxes(-2, -3).reshape(*lead, rows, columns)


def check_order(segments: Sequence[Segment]) -> None:
    """Begin stands first or after End, End last or before Begin, open segments last. Raises DocumentError."""
    for number, segment in enumerate(segments):
        before = segments[number - 1] if number else None
        name = type(segment).__name__
        if isinstance(segment, Begin) and number and not isinstance(before, End):
            raise DocumentError(f"segment {number} is Begin, which stands first or right after End, not after {type(before).__name__}")
        if isinstance(before, End) and not isinstance(segment, Begin):
            raise DocumentError(f"segment {number} is {name}, but after End only Begin may come")
        if isinstance(segment, OPEN) and number < len(segments) - 1:
            raise DocumentError(f"segment {number} is {name}, which only the end of a prompt may be; {len(segments) - 1 - number} follow")
