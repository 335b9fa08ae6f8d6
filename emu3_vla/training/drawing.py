"""Pictures for preference pairs: drawn by a model for a caption, and judged by the real pictures that they look most like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from emu3_vla.documents import Begin, Image, Text, collate, from_blocks
from emu3_vla.model import BlockEmu3ForCausalLM
from emu3_vla.vocabulary import CompactVocabulary

NEIGHBOURS = 5


@torch.inference_mode()
def draw(
    model: BlockEmu3ForCausalLM,
    vocabulary: CompactVocabulary,
    captions: Sequence[Sequence[int]],
    temperature: float,
    generator: torch.Generator,
) -> list[list[Image]]:
    """Every image of the vocabulary for each caption (text ids), its codes drawn one after another at this temperature, above 0."""
    blank = [Image(grid.name, np.zeros((grid.rows, grid.columns), np.int64)) for grid in vocabulary.images]
    batch = collate([[Begin(), Text(caption), *blank] for caption in captions], vocabulary)
    blocks_BNC = batch.codes_NC.view(len(captions), -1, vocabulary.codes_per_block)
    numbers_BN = torch.arange(len(batch.codes_NC)).view(len(captions), -1)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        shares = (logits.float() / temperature).softmax(-1)
        return torch.multinomial(shares, 1, generator=generator).squeeze(1)

    for number in range(blocks_BNC.shape[1]):  # what is still blank comes later, and nothing sees what comes later
        own = numbers_BN[:, number]
        states = model.states(batch)[batch.block_at_N[own] - 1]
        blocks_BNC[:, number] = model.depth.write(states, batch.block_context(own), choose)
    return [_images(blocks.numpy(), vocabulary) for blocks in blocks_BNC]


class NearestPictures:
    """Says of a picture how far a caption is true of it: as far as it is of the real pictures that look most like it.

    codes: (N, rows, columns) of real pictures. captions: of each, clauses with ", " between them. vectors: (codes, width), the vision
    tokenizer's.
    """

    def __init__(self, codes: np.ndarray, captions: Sequence[str], vectors: torch.Tensor):
        self._vectors = vectors.float()
        self._features = self._features_of(codes)
        self._clauses = [_clauses(caption) for caption in captions]

    def score(self, codes: np.ndarray, caption: str) -> float:
        """Share of the caption's clauses that hold in the nearest pictures, in [0, 1]. codes: (rows, columns)."""
        distances = torch.cdist(self._features_of(codes[None]), self._features)[0]
        nearest = distances.topk(min(NEIGHBOURS, len(self._clauses)), largest=False).indices.tolist()
        wanted = _clauses(caption)
        return float(np.mean([len(wanted & self._clauses[number]) / len(wanted) for number in nearest]))

    def _features_of(self, codes: np.ndarray) -> torch.Tensor:
        return self._vectors[torch.from_numpy(codes.astype(np.int64))].flatten(1)


def _images(blocks_NC: np.ndarray, vocabulary: CompactVocabulary) -> list[Image]:
    images, first = [], 0
    for grid in vocabulary.images:
        after = first + vocabulary.blocks(grid.name)
        images.append(Image(grid.name, from_blocks(blocks_NC[first:after], grid.rows, grid.columns)))
        first = after
    return images


def _clauses(caption: str) -> set[str]:
    return set(caption.rstrip(".").split(", "))
