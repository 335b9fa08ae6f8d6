"""Documents over the positions of a trunk, with their next-token targets.

An id that is no vision code has a position of its own. A block of codes has one too, and its codes are the depth decoder's to predict;
with Emu3's vocabulary and blocks of one code there is no depth decoder, and codes are ids like any other.

    <bos> instruction  then, for each of up to K chunks of one episode, `horizon` steps apart:
    <begin of image static> blocks  <begin of image gripper> blocks  <begin of action> action ids  end of chunk

is what a policy is trained on. Every chunk is supervised given all before it, so a model sees 0 .. K-1 past chunks and any of these
numbers may be used when acting.

Axes: L positions, N blocks, C = block_size² codes of a block, B documents, S = SAID text ids.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from emu3_vla.documents.pictures import in_order
from emu3_vla.documents.segments import ActionChunk, Begin, DocumentError, Image, Segment, check_order
from emu3_vla.documents.spans import Spans
from emu3_vla.documents.stream import spell, spelled_length
from emu3_vla.documents.weights import SPECIAL, LossWeights, kinds_of, weights_of
from emu3_vla.vocabulary import CompactVocabulary, Vocabulary

IGNORE = -100
"""Target of positions after which nothing is supervised: padding, disturbed chunks, prompts, and positions before a block."""

NOTHING = -1
"""Codes of a block where no picture of its name came before, and text ids where no text did."""

SAID = 32
"""Of the text that was said before a picture so many ids are told, the last ones."""

LENGTH_MULTIPLE = 8
"""Batches are padded to this, so that compiled code and matrix kernels meet few distinct shapes."""

ALL = LossWeights()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A document over L positions with N blocks.

    ids: int64 (L,); `pad` where a block stands. targets: int64 (L,), the next id, or IGNORE. weights: float32 (L,), of each target in the
    loss, 0 where it is IGNORE. kinds: int8 (L,), of each target, an index into KINDS. codes: int64 (N, C), row by row within a block.
    block_at: int64 (N,), positions of the blocks, ascending; the position before a block predicts it. block_weights: float32 (N,), of
    each block's codes in the loss, 0 where they are not supervised. places: int64 (N,), see CompactVocabulary.places. before: int64 (N, C),
    codes of the last block that stood at the same place in this document, or NOTHING. said: int64 (N, S), the last text ids before the
    block, NOTHING in front of the first: in this document and after its last actions, since what was said before those was said of another
    picture.
    """

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    kinds: np.ndarray
    codes: np.ndarray
    block_at: np.ndarray
    block_weights: np.ndarray
    places: np.ndarray
    before: np.ndarray
    said: np.ndarray


@dataclass(frozen=True, kw_only=True)
class BlockContext:
    """What the depth decoder is given of N blocks beside the trunk's states before them: int64, as in Layout."""

    before_NC: torch.Tensor
    places_N: torch.Tensor
    said_NS: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Documents padded on the right to one length, or packed several to a row.

    A document a row: attention is causal, so none sees padding and none sees another. Packed: `spans` says where each document stands, and
    attention and positions keep to it.

    ids_BL, targets_BL: int64. kinds_BL: int8, of the targets, see Layout. codes_NC, before_NC, places_N, said_NS: int64. block_at_N: int64,
    index into the flattened B×L positions.
    weights_BL, block_weights_N: float32, see Layout. chunks: number of supervised action chunks. positions: number that are not padding.
    """

    ids_BL: torch.Tensor
    targets_BL: torch.Tensor
    weights_BL: torch.Tensor
    kinds_BL: torch.Tensor
    codes_NC: torch.Tensor
    before_NC: torch.Tensor
    places_N: torch.Tensor
    said_NS: torch.Tensor
    block_at_N: torch.Tensor
    block_weights_N: torch.Tensor
    chunks: int
    positions: int
    spans: Spans | None = None

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.ids_BL) if self.spans is None else len(self.spans)

    def block_context(self, blocks: torch.Tensor | slice = slice(None)) -> BlockContext:
        """Of these of its N blocks; by default of all."""
        return BlockContext(before_NC=self.before_NC[blocks], places_N=self.places_N[blocks], said_NS=self.said_NS[blocks])

    def document_at(self, positions: np.ndarray) -> np.ndarray:
        """Number of the document at each position, an index into the flattened B×L: int64, of the shape of `positions`."""
        return positions // self.ids_BL.shape[1] if self.spans is None else self.spans.document_at(positions)

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Its tensors in page-locked memory, from which a GPU copies while it computes. Rows of one document each alone."""
        return self._each(lambda value: value.pin_memory()) if self.spans is None else self

    def _each(self, change: Callable[[Any], Any]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: change(value) if isinstance(value, (torch.Tensor, Spans)) else value for name, value in values.items()})


def length_of(segments: Sequence[Segment], vocabulary: Vocabulary) -> int:
    """Number of positions that `lay_out` will use."""
    lengths = [spelled_length(segment, vocabulary) for segment in segments]
    per_position = 1 if vocabulary.vision_in_head else vocabulary.codes_per_block
    return (not _begins(segments)) + sum(plain + codes // per_position for plain, codes in lengths)


def lay_out(segments: Sequence[Segment], vocabulary: Vocabulary, weights: LossWeights = ALL) -> Layout:
    """Place a document's segments on trunk positions, with <bos> before them if they have no Begin.

    Where a kind's weight is 0, its ids are no targets. Raises DocumentError for what the vocabulary does not have.
    """
    segments = segments if _begins(segments) else [Begin(), *segments]
    check_order(segments)
    spelled = [spell(segment, vocabulary) for segment in segments]
    ids = np.concatenate(spelled)
    weight, kinds = weights_of(segments, spelled, vocabulary, weights), kinds_of(segments, spelled, vocabulary)
    codes = block_at = np.zeros(0, np.int64)
    if not vocabulary.vision_in_head:
        kept, codes, block_at = _fold(ids, vocabulary)
        ids, weight, kinds = ids[kept], weight[kept], kinds[kept]
        ids[block_at] = vocabulary.pad
    block_weights, weight[block_at] = weight[block_at], 0
    targets = np.full(len(ids), IGNORE, np.int64)
    targets[:-1] = np.where(weight[1:] > 0, ids[1:], IGNORE)
    codes, places = codes.reshape(-1, vocabulary.codes_per_block), _places(segments, vocabulary, len(block_at))
    return Layout(
        ids=ids,
        targets=targets,
        weights=np.append(weight[1:], np.float32(0)),
        kinds=np.append(kinds[1:], SPECIAL),
        codes=codes,
        block_at=block_at,
        block_weights=block_weights,
        places=places,
        before=_before(places, codes, vocabulary),
        said=_said(ids, block_at, vocabulary),
    )


def collate(documents: Sequence[Sequence[Segment]], vocabulary: Vocabulary, weights: LossWeights = ALL) -> Batch:
    """Lay out documents side by side, padded on the right to the longest (rounded up to LENGTH_MULTIPLE)."""
    layouts = [lay_out(document, vocabulary, weights) for document in documents]
    longest = max(len(layout.ids) for layout in layouts)
    width = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    starts = np.arange(len(layouts)) * width
    return _assemble(documents, layouts, starts, (len(layouts), width), vocabulary)


def pack(
    rows: Sequence[Sequence[Sequence[Segment]]], vocabulary: Vocabulary, context: int, weights: LossWeights = ALL, *, trim: bool = False
) -> Batch:
    """Lay out documents one behind another, several to a row of `context` positions: rows of documents, see `plan_rows`.

    trim: make the rows no longer than the fullest needs (rounded up to LENGTH_MULTIPLE). Raises DocumentError for a row that is too long.
    """
    documents = [document for row in rows for document in row]
    layouts = [lay_out(document, vocabulary, weights) for document in documents]
    lengths = np.array([len(layout.ids) for layout in layouts], np.int64)
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    used = np.bincount(row_of, lengths, minlength=len(rows)).astype(np.int64)
    if used.max(initial=0) > context:
        raise DocumentError(f"row {used.argmax()} of a batch has {used.max()} positions, expected at most context={context}")
    if trim:
        context = min(context, -(-int(used.max(initial=1)) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    starts = np.cumsum(lengths) - lengths + (np.arange(len(rows)) * context - (np.cumsum(used) - used))[row_of]
    return _assemble(documents, layouts, starts, (len(rows), context), vocabulary, Spans.of(starts, lengths, (len(rows), context)))


def _assemble(
    documents: Sequence[Sequence[Segment]],
    layouts: Sequence[Layout],
    starts: np.ndarray,
    shape: tuple[int, int],
    vocabulary: Vocabulary,
    spans: Spans | None = None,
) -> Batch:
    """Layouts at their starts in the flattened positions of a batch of this shape."""
    size = shape[0] * shape[1]
    ids, targets = np.full(size, vocabulary.pad, np.int64), np.full(size, IGNORE, np.int64)
    target_weights, kinds = np.zeros(size, np.float32), np.full(size, SPECIAL, np.int8)
    for start, layout in zip(starts.tolist(), layouts, strict=True):
        own = slice(start, start + len(layout.ids))
        ids[own], targets[own], target_weights[own], kinds[own] = layout.ids, layout.targets, layout.weights, layout.kinds
    nothing = np.zeros(0, np.int64)  # rows may be empty
    block_at = [nothing, *(layout.block_at + start for start, layout in zip(starts.tolist(), layouts, strict=True))]
    no_codes = nothing.reshape(0, vocabulary.codes_per_block)
    codes, before = ([no_codes, *(getattr(layout, name) for layout in layouts)] for name in ("codes", "before"))
    said = [nothing.reshape(0, SAID), *(layout.said for layout in layouts)]
    block_weights = [nothing.astype(np.float32), *(layout.block_weights for layout in layouts)]
    return Batch(
        ids_BL=torch.from_numpy(ids).view(shape),
        targets_BL=torch.from_numpy(targets).view(shape),
        weights_BL=torch.from_numpy(target_weights).view(shape),
        kinds_BL=torch.from_numpy(kinds).view(shape),
        codes_NC=torch.from_numpy(np.concatenate(codes)),
        before_NC=torch.from_numpy(np.concatenate(before)),
        places_N=torch.from_numpy(np.concatenate([nothing, *(layout.places for layout in layouts)])),
        said_NS=torch.from_numpy(np.concatenate(said)),
        block_at_N=torch.from_numpy(np.concatenate(block_at)),
        block_weights_N=torch.from_numpy(np.concatenate(block_weights)),
        chunks=sum(isinstance(part, ActionChunk) and part.supervised for document in documents for part in document),
        positions=sum(len(layout.ids) for layout in layouts),
        spans=spans,
    )


def plan_rows(lengths: Sequence[int], context: int, rows: int | None = None) -> tuple[list[list[int]], list[int]]:
    """Which documents of these lengths share a row, none of them cut: the longest first, each into the fullest row that still takes it.

    rows: number of rows, empty ones among them; documents that find no place are left out. None: as many as are needed.
    Returns the documents of each row, and those left out. Raises DocumentError for a document that no row can take.
    """
    by_length = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    if by_length and lengths[by_length[0]] > context:
        raise DocumentError(
            f"a document has {lengths[by_length[0]]} positions, expected at most context={context}: documents are never cut; "
            "raise the context, or show fewer chunks, moments or questions in a document"
        )
    planned: list[list[int]] = [[] for _ in range(rows or 0)]
    free = [(context, row) for row in range(rows or 0)]  # ascending
    left_out = []
    for number in by_length:
        at = bisect.bisect_left(free, (lengths[number], -1))
        if at < len(free):
            room, row = free.pop(at)
        elif rows is None:
            room, row = context, len(planned)
            planned.append([])
        else:
            left_out.append(number)
            continue
        planned[row].append(number)
        bisect.insort(free, (room - lengths[number], row))
    return planned, left_out


def _begins(segments: Sequence[Segment]) -> bool:
    return bool(segments) and isinstance(segments[0], Begin)


def _fold(ids: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One position per block: which ids keep one, bool (n,); the codes; and the blocks' positions. Codes of a block follow each other."""
    is_code = ids >= vocabulary.vision_start
    codes = ids[is_code] - vocabulary.vision_start
    first_of_block = np.flatnonzero(is_code)[:: vocabulary.codes_per_block]
    kept = ~is_code
    kept[first_of_block] = True
    return kept, codes, np.flatnonzero(is_code[kept])


def _places(segments: Sequence[Segment], vocabulary: Vocabulary, blocks: int) -> np.ndarray:
    """Which place each block has: int64 (blocks,)."""
    if not isinstance(vocabulary, CompactVocabulary):
        return np.zeros(blocks, np.int64)
    images = [segment for segment in segments if isinstance(segment, Image)]
    places = [in_order(image, np.asarray(vocabulary.places(image.name)), vocabulary.block_size) for image in images]
    return np.concatenate([np.arange(0), *places])


def _before(places: np.ndarray, codes: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Of each block the codes of the last one before it at its place: int64 (N, C), NOTHING where there is none."""
    before = np.full_like(codes, NOTHING)
    if isinstance(vocabulary, CompactVocabulary):
        in_turn = np.argsort(places, kind="stable")
        again = places[in_turn[1:]] == places[in_turn[:-1]]
        before[in_turn[1:][again]] = codes[in_turn[:-1][again]]
    return before


def _said(ids: np.ndarray, block_at: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Of each block the last text ids before it: int64 (N, S), see Layout."""
    texts, ends = vocabulary.is_text(ids), ids == vocabulary.end_of_chunk
    texts[block_at] = ends[block_at] = False  # where blocks stand there are no ids, whatever fills them
    count = np.cumsum(texts)
    since = np.maximum.accumulate(np.where(ends, count, 0))[block_at]
    columns_NS = count[block_at][:, None] + np.arange(-SAID, 0)
    told = np.append(ids[texts], NOTHING)
    return told[np.where(columns_NS >= since[:, None], columns_NS, -1)]
