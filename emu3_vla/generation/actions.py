"""Write one action chunk, token by token, where the grammar says what may come."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from action_tokenizer import ActionGrammar
from emu3_vla.generation.cache import CachedTrunk
from emu3_vla.model import BlockEmu3ForCausalLM
from emu3_vla.vocabulary import CompactVocabulary


class DecodingFailed(ValueError):
    """The model's logits are not numbers, so there is nothing to choose from."""


@dataclass(frozen=True)
class WrittenChunk:
    """ids: action ids, end of chunk not among them. entropy: of each id's choice, in nats, after masking.

    probability: of the ids written, each given those before it, multiplied together; masked and at temperature 1.
    """

    ids: list[int]
    entropy: list[float]
    probability: float


class ActionWriter:
    """Decodes chunks of one shape with one model. temperature 0 takes the likeliest id that is permitted."""

    def __init__(self, model: BlockEmu3ForCausalLM, vocabulary: CompactVocabulary, grammar: ActionGrammar, temperature: float = 0.0):
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}, expected at least 0")
        start, end = vocabulary.action_start, vocabulary.end_of_chunk + 1
        self._head = model.lm_head.weight[start:end].detach()
        self._embeddings = model.model.embed_tokens.weight[start:end].detach()
        self._grammar, self._temperature = grammar, temperature
        self._refused = torch.from_numpy(~grammar.mask_rows)

    @torch.inference_mode()
    def write(self, trunk: CachedTrunk, state_H: torch.Tensor, generator: torch.Generator | None = None) -> WrittenChunk:
        """Write until the chunk is whole. state_H: the trunk's state after "begin of action"; generator: for temperature above 0.

        The cache then holds all ids but the last: nothing was asked after it, and end of chunk is all that may follow.
        Raises DecodingFailed.
        """
        grammar, state = self._grammar, self._grammar.start()
        ids, entropies, log_probability = [], [], 0.0
        while True:
            logits = (self._head @ state_H).float()
            log_p = self._masked(logits, state)
            index = self._choose(log_p, generator)
            log_probability += log_p[index].item()
            entropies.append(_entropy(log_p))
            ids.append(index)
            state = grammar.advance(state, index)
            if grammar.is_finished(state):
                return WrittenChunk(ids, entropies, math.exp(log_probability))
            state_H = trunk.extend(self._embeddings[index][None])[0]

    def _masked(self, logits: torch.Tensor, state: int) -> torch.Tensor:
        """Log-probabilities over what the grammar permits."""
        if not torch.isfinite(logits).all():
            raise DecodingFailed("the model's logits hold NaN or infinity; its weights or its input are broken, and no action was made")
        refused = self._refused[self._grammar.row_of_state[state]]
        return torch.log_softmax(logits.masked_fill(refused, -torch.inf), dim=0)

    def _choose(self, log_p: torch.Tensor, generator: torch.Generator | None) -> int:
        if self._temperature == 0:
            return int(log_p.argmax())
        return int(torch.multinomial((log_p / self._temperature).softmax(0), 1, generator=generator))


def _entropy(log_p: torch.Tensor) -> float:
    return float(torch.special.entr(log_p.exp()).sum())
