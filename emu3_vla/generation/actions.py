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
        self._refused = torch.from_numpy(~grammar.mask_rows)

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
            following = [self._go_on(chunks[number], row, generators[number]) for number, row in zip(unfinished, logits, strict=True)]
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

    def _go_on(self, chunk: _Chunk, logits: torch.Tensor, generator: torch.Generator | None) -> int:
        """Choose the chunk's next id from the logits that follow it."""
        log_p = self._masked(logits, chunk.state)
        if chunk.prefix is not None:
            log_p = _heeding(chunk.prefix, log_p)
        index = self._choose(log_p, generator)
        chunk.log_probability += log_p[index].item()
        chunk.entropy.append(_entropy(log_p))
        chunk.ids.append(index)
        if chunk.prefix is not None:
            chunk.prefix.write(index)
        chunk.state = self._grammar.advance(chunk.state, index)
        return index

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


def _heeding(prefix: CommittedPrefix, log_p: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the likeliest candidates given the committed prefix too; the others get none."""
    best = log_p.topk(min(CANDIDATES, int(torch.isfinite(log_p).sum()))).indices
    scores = torch.from_numpy(prefix.scores(best.tolist())).to(log_p)
    heeded = torch.full_like(log_p, -torch.inf)
    heeded[best] = log_p[best] + scores
    return torch.log_softmax(heeded, dim=0)


def _entropy(log_p: torch.Tensor) -> float:
    return float(torch.special.entr(log_p.exp()).sum())
