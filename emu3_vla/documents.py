"""Documents: episodes as sequences of segments, laid out over trunk positions with their next-token targets.

    <bos> instruction  then, for each of up to K chunks of one episode, `horizon` steps apart:
    <begin of image static> blocks  <begin of image gripper> blocks  <begin of action> action ids  end of chunk

Every chunk is supervised given all before it, so a model sees 0 .. K-1 past chunks and any of these numbers may be used when acting.

Axes: L positions, N blocks, C = block_size² codes of a block, B documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from emu3_vla.vocabulary import CompactVocabulary

IGNORE = -100
"""Target of positions after which nothing is supervised: padding, disturbed chunks, and positions before a block."""

LENGTH_MULTIPLE = 8
"""Batches are padded to this, so that compiled code and matrix kernels meet few distinct shapes."""


class DocumentError(ValueError):
    """A segment that does not fit the vocabulary."""


@dataclass(frozen=True)
class Text:
    """Text ids, int (n,). The document's <bos> comes before the first."""

    ids: Sequence[int]


@dataclass(frozen=True)
class Image:
    """One image. name: as in the vocabulary. codes: integers (rows, columns) in [0, codebook_size)."""

    name: str
    codes: np.ndarray


@dataclass(frozen=True)
class ActionChunk:
    """Action ids of one chunk. supervised: False where the demonstrator did not choose these actions; they stay as context."""

    ids: Sequence[int]
    supervised: bool = True


Segment = Text | Image | ActionChunk


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A document over L positions with N blocks.

    ids: int64 (L,); `pad` where a block stands. targets: int64 (L,), the next id, or IGNORE.
    codes: int64 (N, C), row by row within a block. block_at: int64 (N,), positions of the blocks, ascending; the position before a
    block predicts it. places: int64 (N,), see CompactVocabulary.places.
    """

    ids: np.ndarray
    targets: np.ndarray
    codes: np.ndarray
    block_at: np.ndarray
    places: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Documents padded on the right to one length. Attention is causal, so no document sees padding and none sees another.

    ids_BL, targets_BL: int64. codes_NC, places_N: int64. block_at_N: int64, index into the flattened B×L positions.
    chunks: number of supervised action chunks. positions: number that are not padding.
    """

    ids_BL: torch.Tensor
    targets_BL: torch.Tensor
    codes_NC: torch.Tensor
    places_N: torch.Tensor
    block_at_N: torch.Tensor
    chunks: int
    positions: int

    def to(self, device: torch.device | str) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in values.items()})


def to_blocks(codes: np.ndarray, block_size: int) -> np.ndarray:
    """Cut grids of codes into blocks, both in raster order: (..., rows, columns) -> (..., blocks, block_size²)."""
    *lead, rows, columns = codes.shape
    split = codes.reshape(*lead, rows // block_size, block_size, columns // block_size, block_size)
    return np.moveaxis(split, -2, -3).reshape(*lead, -1, block_size**2)


def from_blocks(blocks: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The inverse of `to_blocks`: (..., blocks, block_size²) -> (..., rows, columns)."""
    lead, block_size = blocks.shape[:-2], round(blocks.shape[-1] ** 0.5)
    split = blocks.reshape(*lead, rows // block_size, columns // block_size, block_size, block_size)
    return np.moveaxis(split, -2, -3).reshape(*lead, rows, columns)


def length_of(segments: Sequence[Segment], vocabulary: CompactVocabulary) -> int:
    """Number of positions that `lay_out` will use."""
    return 1 + sum(_segment_length(segment, vocabulary) for segment in segments)


def lay_out(segments: Sequence[Segment], vocabulary: CompactVocabulary) -> Layout:
    """Place a document's segments on trunk positions. Raises DocumentError for ids or grids that the vocabulary does not have."""
    length = length_of(segments, vocabulary)
    ids = np.full(length, vocabulary.pad, np.int64)
    supervised = np.ones(length, bool)  # of the id at this position
    blocks, block_at, places = [], [], []
    ids[0], at = vocabulary.bos, 1
    for segment in segments:
        if isinstance(segment, Image):
            ids[at] = vocabulary.begin_image(segment.name)
            blocks.append(image_blocks(segment, vocabulary))
            block_at.append(np.arange(at + 1, at + 1 + len(blocks[-1])))
            places.append(np.asarray(vocabulary.places(segment.name)))
            supervised[block_at[-1]] = False  # their codes are the depth decoder's to predict
        else:
            written = _text(segment, vocabulary) if isinstance(segment, Text) else _action(segment, vocabulary)
            ids[at : at + len(written)] = written
            if isinstance(segment, ActionChunk):
                supervised[at + 1 : at + len(written)] = segment.supervised
        at += _segment_length(segment, vocabulary)
    targets = np.full(length, IGNORE, np.int64)
    targets[:-1] = np.where(supervised[1:], ids[1:], IGNORE)
    return Layout(
        ids=ids,
        targets=targets,
        codes=np.concatenate(blocks) if blocks else np.zeros((0, vocabulary.codes_per_block), np.int64),
        block_at=np.concatenate(block_at) if block_at else np.zeros(0, np.int64),
        places=np.concatenate(places) if places else np.zeros(0, np.int64),
    )


def collate(documents: Sequence[Sequence[Segment]], vocabulary: CompactVocabulary) -> Batch:
    """Lay out documents side by side, padded on the right to the longest (rounded up to LENGTH_MULTIPLE)."""
    layouts = [lay_out(document, vocabulary) for document in documents]
    longest = max(len(layout.ids) for layout in layouts)
    width = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    ids = np.full((len(layouts), width), vocabulary.pad, np.int64)
    targets = np.full((len(layouts), width), IGNORE, np.int64)
    for row, layout in enumerate(layouts):
        ids[row, : len(layout.ids)] = layout.ids
        targets[row, : len(layout.ids)] = layout.targets
    block_at = np.concatenate([layout.block_at + row * width for row, layout in enumerate(layouts)])
    return Batch(
        ids_BL=torch.from_numpy(ids),
        targets_BL=torch.from_numpy(targets),
        codes_NC=torch.from_numpy(np.concatenate([layout.codes for layout in layouts])),
        places_N=torch.from_numpy(np.concatenate([layout.places for layout in layouts])),
        block_at_N=torch.from_numpy(block_at),
        chunks=sum(isinstance(part, ActionChunk) and part.supervised for document in documents for part in document),
        positions=sum(len(layout.ids) for layout in layouts),
    )


def image_blocks(image: Image, vocabulary: CompactVocabulary) -> np.ndarray:
    """Blocks of one image, checked against the vocabulary: int64 (blocks, C). Raises DocumentError."""
    grid = vocabulary.grid(image.name)
    codes = np.asarray(image.codes)
    if codes.shape != (grid.rows, grid.columns):
        raise DocumentError(f"image {image.name!r} has codes of shape {codes.shape}, expected ({grid.rows}, {grid.columns})")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= vocabulary.codebook_size:
        raise DocumentError(
            f"image {image.name!r} has codes in [{low}, {high}], expected [0, {vocabulary.codebook_size}): "
            "they come from another vision tokenizer"
        )
    return to_blocks(codes.astype(np.int64), vocabulary.block_size)


def _segment_length(segment: Segment, vocabulary: CompactVocabulary) -> int:
    if isinstance(segment, Image):
        return 1 + vocabulary.blocks(segment.name)
    return len(segment.ids) + (2 if isinstance(segment, ActionChunk) else 0)


def _text(segment: Text, vocabulary: CompactVocabulary) -> np.ndarray:
    return _checked(segment.ids, vocabulary.text_size, "text")


def _action(segment: ActionChunk, vocabulary: CompactVocabulary) -> np.ndarray:
    """Begin of action, the ids, end of chunk."""
    ids = _checked(segment.ids, vocabulary.action_size, "action")
    return np.concatenate([[vocabulary.begin_action], ids + vocabulary.action_start, [vocabulary.end_of_chunk]])


def _checked(ids: Sequence[int], size: int, what: str) -> np.ndarray:
    array = np.asarray(ids, np.int64)
    if array.ndim != 1 or not len(array):
        raise DocumentError(f"{what} segment has ids of shape {array.shape}, expected at least one id in a row")
    if array.min() < 0 or array.max() >= size:
        raise DocumentError(
            f"{what} ids lie in [{array.min()}, {array.max()}], expected [0, {size}): they come from another {what} tokenizer"
        )
    return array
