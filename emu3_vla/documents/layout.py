"""Documents over the positions of a trunk, with their next-token targets.

An id that is no vision code has a position of its own. A block of codes has one too, and its codes are the depth decoder's to predict;
with Emu3's vocabulary and blocks of one code there is no depth decoder, and codes are ids like any other.

    <bos> instruction  then, for each of up to K chunks of one episode, `horizon` steps apart:
    <begin of image static> blocks  <begin of image gripper> blocks  <begin of action> action ids  end of chunk

is what a policy is trained on. Every chunk is supervised given all before it, so a model sees 0 .. K-1 past chunks and any of these
numbers may be used when acting.

Axes: L positions, N blocks, C = block_size² codes of a block, B documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from emu3_vla.documents.pictures import in_order
from emu3_vla.documents.segments import ActionChunk, Begin, Image, Segment, check_order
from emu3_vla.documents.stream import spell, spelled_length
from emu3_vla.documents.weights import LossWeights, weights_of
from emu3_vla.vocabulary import CompactVocabulary, Vocabulary

IGNORE = -100
"""Target of positions after which nothing is supervised: padding, disturbed chunks, prompts, and positions before a block."""

LENGTH_MULTIPLE = 8
"""Batches are padded to this, so that compiled code and matrix kernels meet few distinct shapes."""

ALL = LossWeights()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A document over L positions with N blocks.

    ids: int64 (L,); `pad` where a block stands. targets: int64 (L,), the next id, or IGNORE. weights: float32 (L,), of each target in the
    loss, 0 where it is IGNORE. codes: int64 (N, C), row by row within a block. block_at: int64 (N,), positions of the blocks, ascending;
    the position before a block predicts it. block_weights: float32 (N,), of each block's codes in the loss, 0 where they are not
    supervised. places: int64 (N,), see CompactVocabulary.places.
    """

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    codes: np.ndarray
    block_at: np.ndarray
    block_weights: np.ndarray
    places: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Documents padded on the right to one length. Attention is causal, so no document sees padding and none sees another.

    ids_BL, targets_BL: int64. codes_NC, places_N: int64. block_at_N: int64, index into the flattened B×L positions.
    weights_BL, block_weights_N: float32, see Layout. chunks: number of supervised action chunks. positions: number that are not padding.
    """

    ids_BL: torch.Tensor
    targets_BL: torch.Tensor
    weights_BL: torch.Tensor
    codes_NC: torch.Tensor
    places_N: torch.Tensor
    block_at_N: torch.Tensor
    block_weights_N: torch.Tensor
    chunks: int
    positions: int

    def to(self, device: torch.device | str) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in values.items()})


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
    weight = weights_of(segments, spelled, vocabulary, weights)
    codes = block_at = np.zeros(0, np.int64)
    if not vocabulary.vision_in_head:
        ids, weight, codes, block_at = _fold(ids, weight, vocabulary)
    block_weights, weight[block_at] = weight[block_at], 0
    targets = np.full(len(ids), IGNORE, np.int64)
    targets[:-1] = np.where(weight[1:] > 0, ids[1:], IGNORE)
    return Layout(
        ids=ids,
        targets=targets,
        weights=np.append(weight[1:], np.float32(0)),
        codes=codes.reshape(-1, vocabulary.codes_per_block),
        block_at=block_at,
        block_weights=block_weights,
        places=_places(segments, vocabulary, len(block_at)),
    )


def collate(documents: Sequence[Sequence[Segment]], vocabulary: Vocabulary, weights: LossWeights = ALL) -> Batch:
    """Lay out documents side by side, padded on the right to the longest (rounded up to LENGTH_MULTIPLE)."""
    layouts = [lay_out(document, vocabulary, weights) for document in documents]
    longest = max(len(layout.ids) for layout in layouts)
    width = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    ids = np.full((len(layouts), width), vocabulary.pad, np.int64)
    targets = np.full((len(layouts), width), IGNORE, np.int64)
    target_weights = np.zeros((len(layouts), width), np.float32)
    for row, layout in enumerate(layouts):
        length = len(layout.ids)
        ids[row, :length], targets[row, :length], target_weights[row, :length] = layout.ids, layout.targets, layout.weights
    block_at = np.concatenate([layout.block_at + row * width for row, layout in enumerate(layouts)])
    return Batch(
        ids_BL=torch.from_numpy(ids),
        targets_BL=torch.from_numpy(targets),
        weights_BL=torch.from_numpy(target_weights),
        codes_NC=torch.from_numpy(np.concatenate([layout.codes for layout in layouts])),
        places_N=torch.from_numpy(np.concatenate([layout.places for layout in layouts])),
        block_at_N=torch.from_numpy(block_at),
        block_weights_N=torch.from_numpy(np.concatenate([layout.block_weights for layout in layouts])),
        chunks=sum(isinstance(part, ActionChunk) and part.supervised for document in documents for part in document),
        positions=sum(len(layout.ids) for layout in layouts),
    )


def _begins(segments: Sequence[Segment]) -> bool:
    return bool(segments) and isinstance(segments[0], Begin)


def _fold(ids: np.ndarray, weight: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One position per block: its ids and weights (L,), the codes, and the blocks' positions. Codes of a block follow each other."""
    is_code = ids >= vocabulary.vision_start
    codes = ids[is_code] - vocabulary.vision_start
    first_of_block = np.flatnonzero(is_code)[:: vocabulary.codes_per_block]
    kept = ~is_code
    kept[first_of_block] = True
    block_at = np.flatnonzero(is_code[kept])
    ids, weight = ids[kept], weight[kept]
    ids[block_at] = vocabulary.pad
    return ids, weight, codes, block_at


def _places(segments: Sequence[Segment], vocabulary: Vocabulary, blocks: int) -> np.ndarray:
    """Which place each block has: int64 (blocks,)."""
    if not isinstance(vocabulary, CompactVocabulary):
        return np.zeros(blocks, np.int64)
    images = [segment for segment in segments if isinstance(segment, Image)]
    places = [in_order(image, np.asarray(vocabulary.places(image.name)), vocabulary.block_size) for image in images]
    return np.concatenate([np.arange(0), *places])
