"""Prompts as items of the trunk's positions, and items as embeddings and ids.

An item is an id, or a Block of codes (emu3_vla.generation.grammar). Two prompts that begin with the same items have the same states there,
which is what prefix reuse goes by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from emu3_vla.documents import Segment, lay_out, parse
from emu3_vla.generation.grammar import Block, Item
from emu3_vla.model import BlockEmu3ForCausalLM
from emu3_vla.vocabulary import Vocabulary

Prompt = Sequence[Segment] | Sequence[Item] | np.ndarray


class PromptError(ValueError):
    """A prompt that the model cannot be given."""


def items_of(prompt: Prompt, vocabulary: Vocabulary | None, ids: int) -> list[Item]:
    """Items of a document, of stream ids, or as they are. ids: how many the model's head has.

    Raises PromptError for an empty prompt or an id that the model lacks, DocumentError for what is no document.
    """
    if len(prompt) == 0:
        raise PromptError("the prompt is empty; expected at least a begin of document")
    if any(isinstance(item, Block) for item in prompt):
        return list(prompt)
    plain = isinstance(prompt[0], (int, np.integer))
    if plain and (vocabulary is None or vocabulary.vision_in_head):
        items = [int(index) for index in prompt]
        if min(items) < 0 or max(items) >= ids:
            raise PromptError(f"the prompt's ids lie in [{min(items)}, {max(items)}], but the model has {ids}")
        return items
    if vocabulary is None:
        raise PromptError("a prompt of segments needs the vocabulary; give ids, or a checkpoint that has one")
    layout = lay_out(parse(prompt, vocabulary, prompt=True) if plain else list(prompt), vocabulary)
    items: list[Item] = layout.ids.tolist()
    for at, place, codes in zip(layout.block_at.tolist(), layout.places.tolist(), layout.codes.tolist(), strict=True):
        items[at] = Block(place, tuple(codes))
    return items


def ids_of(items: Sequence[Item], vocabulary: Vocabulary | None) -> list[int]:
    """Stream ids of items, as `emu3_vla.documents.parse` reads them."""
    ids: list[int] = []
    for item in items:
        if isinstance(item, Block):
            ids += [vocabulary.vision_start + code for code in item.codes]
        else:
            ids.append(item)
    return ids


class Embedder:
    """Embeddings of items: (n, H)."""

    def __init__(self, model: torch.nn.Module):
        self._ids = model.model.embed_tokens.weight.detach()
        self._blocks = model.blocks if isinstance(model, BlockEmu3ForCausalLM) else None

    @torch.inference_mode()
    def __call__(self, items: Sequence[Item]) -> torch.Tensor:
        at = [number for number, item in enumerate(items) if isinstance(item, Block)]
        embedded = self._ids[[0 if isinstance(item, Block) else item for item in items]]
        if at:
            codes = torch.tensor([items[number].codes for number in at], device=embedded.device)
            places = torch.tensor([items[number].place for number in at], device=embedded.device)
            embedded[at] = self._blocks(codes, places).to(embedded.dtype)
        return embedded


def embed(model: BlockEmu3ForCausalLM, vocabulary: Vocabulary, segments: Sequence[Segment]) -> torch.Tensor:
    """Embeddings of a document's positions: (n, H), <bos> first. Those of a part of it do not depend on the rest."""
    return Embedder(model)(items_of(segments, vocabulary, len(model.lm_head.weight)))
