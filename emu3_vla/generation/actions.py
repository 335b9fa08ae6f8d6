"""Write one action chunk, token by token, where the grammar says what may come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress

import torch
import torch.nn.functional as F

from action_tokenizer import ActionGrammar
from action_tokenizer.prefix import CommittedPrefix
from emu3_vla.generation.cache import LEAST_ROWS, CachedSequence, Product
from emu3_vla.generation.sampling import DecodingFailed
from emu3_vla.model import BlockEmu3ForCausalLM
from emu3_vla.vocabulary import CompactVocabulary

# Ids that are weighed against a committed prefix: the likeliest so many. Weighing all of them takes longer than the model does.
CANDIDATES = 64


@dataclass(frozen=True)
class WrittenChunk:
    """ids: action ids, end of chunk not among them. entropy: of each id's choice, in nats, after masking.

    probability: of the ids written, each given those before it, multiplied together; masked and at temperature 1.
    """

    ids: list[int]
    entropy: list[float]
    probability: float


@dataclass
class _Chunk:
    """A chunk as far as it is written. state: the grammar's."""

    state: int
    ids: list[int] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    log_probability: float = 0.0
    prefix: CommittedPrefix | None = None


class ActionWriter:
    """Decodes chunks of one shape with one model. temperature 0 takes the likeliest id that is permitted."""

    def __init__(self, model: BlockEmu3ForCausalLM, vocabulary: CompactVocabulary, grammar: ActionGrammar, temperature: float = 0.0):
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}, expected at least 0")
        start, end = vocabulary.action_start, vocabulary.end_of_chunk + 1
        self._head = Product(model.lm_head.weight[start:end])
        self._embeddings = model.model.embed_tokens.weight[start:end].detach()
        self._grammar, self._temperature = grammar, temperature
        self._refused = torch.from_numpy(~grammar.mask_rows).to(self._embeddings.device)

    def write(self, sequence: CachedSequence, state_H: torch.Tensor, generator: torch.Generator | None = None) -> WrittenChunk:
        """Write until the chunk is whole. state_H: the trunk's state after "begin of action"; generator: for temperature above 0.

        The sequence then holds all ids but the last: nothing was asked after it, and end of chunk is all that may follow.
        Raises DecodingFailed.
        """
        return self.write_each([sequence], state_H[None], [generator])[0]

    @torch.inference_mode()
    def write_each(
        self,
        sequences: Sequence[CachedSequence],
        states_SH: torch.Tensor,
        generators: Sequence[torch.Generator | None],
        prefixes: Sequence[CommittedPrefix | None] | None = None,
    ) -> list[WrittenChunk]:
        """What `write` gives for each sequence, one step of all at a time. Raises DecodingFailed.

        prefixes: of each chunk what is decided already; its ids are then chosen as both the model and the prefix have it, and "entropy"
        and "probability" are of that choice.
        """
        chunks = [_Chunk(self._grammar.start(), prefix=prefix) for prefix in prefixes or [None] * len(sequences)]
        unfinished, states = list(range(len(chunks))), list(states_SH)
        while True:
            logits = self._logits(torch.stack(states))
            following = self._go_on([chunks[number] for number in unfinished], logits, [generators[number] for number in unfinished])
            going = [not self._grammar.is_finished(chunks[number].state) for number in unfinished]
            following, unfinished = list(compress(following, going)), list(compress(unfinished, going))
            if not unfinished:
                return [WrittenChunk(chunk.ids, chunk.entropy, math.exp(chunk.log_probability)) for chunk in chunks]
            embedded = self._embeddings[following].split(1)
            extended = sequences[0].trunk.extend_each([(sequences[number], row) for number, row in zip(unfinished, embedded, strict=True)])
            states = [state_1H[0] for state_1H in extended]

    def _logits(self, states_SH: torch.Tensor) -> torch.Tensor:
        """Of the ids of actions and end of chunk: float32 (S, V + 1). In LEAST_ROWS rows or more, see there."""
        return self._head(F.pad(states_SH, (0, 0, 0, max(0, LEAST_ROWS - len(states_SH)))))[: len(states_SH)].float()

    def _go_on(
        self, chunks: Sequence[_Chunk], logits_SV: torch.Tensor, generators: Sequence[torch.Generator | None]
    ) -> list[int]:
        """Choose the next id of each chunk from the logits that follow it: all rows in one pass, none of which depends on the others."""
        log_p_SV = self._masked(logits_SV, [chunk.state for chunk in chunks])
        for row, chunk in enumerate(chunks):
            if chunk.prefix is not None:
                log_p_SV[row] = _heeding(chunk.prefix, log_p_SV[row])
        indices = self._choose(log_p_SV, generators)
        chosen = log_p_SV[torch.arange(len(indices)), indices].tolist()
        for chunk, index, log_p, entropy in zip(chunks, indices, chosen, _entropies(log_p_SV), strict=True):
            chunk.log_probability += log_p
            chunk.entropy.append(entropy)
            chunk.ids.append(index)
            if chunk.prefix is not None:
                chunk.prefix.write(index)
            chunk.state = self._grammar.advance(chunk.state, index)
        return indices

    def _masked(self, logits_SV: torch.Tensor, states: Sequence[int]) -> torch.Tensor:
        """Log-probabilities over what the grammar permits in each state."""
        if not torch.isfinite(logits_SV).all():
            raise DecodingFailed("the model's logits hold NaN or infinity; its weights or its input are broken, and no action was made")
        rows = torch.from_numpy(self._grammar.row_of_state[list(states)]).long()
        refused_SV = self._refused[rows.to(self._refused.device)]
        return torch.log_softmax(logits_SV.masked_fill(refused_SV, -torch.inf), dim=1)

    def _choose(self, log_p_SV: torch.Tensor, generators: Sequence[torch.Generator | None]) -> list[int]:
        if self._temperature == 0:
            return log_p_SV.argmax(1).tolist()
        shares_SV = (log_p_SV / self._temperature).softmax(1)
        return [int(torch.multinomial(row, 1, generator=own)) for row, own in zip(shares_SV, generators, strict=True)]


def _heeding(prefix: CommittedPrefix, log_p: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the likeliest candidates given the committed prefix too; the others get none."""
    best = log_p.topk(min(CANDIDATES, int(torch.isfinite(log_p).sum()))).indices
    scores = torch.from_numpy(prefix.scores(best.tolist())).to(log_p)
    heeded = torch.full_like(log_p, -torch.inf)
    heeded[best] = log_p[best] + scores
    return torch.log_softmax(heeded, dim=0)


def _entropies(log_p_SV: torch.Tensor) -> list[float]:
    return torch.special.entr(log_p_SV.exp()).sum(1).tolist()
