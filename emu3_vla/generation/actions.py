"""Write one action chunk, where the grammar says what may come.

Where the likeliest ids are taken, several are written in one pass: guesses stand as far as they are what would have been written one by
one, and what the model says behind a wrong one is the next guess (Jacobi decoding, arXiv 2305.10427). A copy of the trunk in int8 guesses
better (speculative decoding; emu3_vla.generation.int8_draft). The ids are the same. `lossy` alone gives that up: guesses that were computed
anew so many times count as written, also behind one that changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from action_tokenizer import ActionGrammar
from action_tokenizer.prefix import CommittedPrefix
from emu3_vla.generation.cache import LEAST_ROWS, CachedSequence, Product
from emu3_vla.generation.sampling import DecodingFailed
from emu3_vla.model import BlockEmu3ForCausalLM
from emu3_vla.vocabulary import CompactVocabulary

if TYPE_CHECKING:
    from emu3_vla.generation.int8_draft import Int8Trunk  # which imports Numba

# Guesses that go through the trunk beside an id. A row more is nearly free where reading the weights takes the time.
WINDOW, DRAFT_WINDOW = 7, 15


@dataclass(frozen=True)
class WrittenChunk:
    """ids: action ids, end of chunk not among them. entropy: of each id's choice, in nats, after masking.

    probability: of the ids written, each given those before it, multiplied together; masked and at temperature 1. With `lossy` both are
    given the guesses that each id was chosen behind.
    """

    ids: list[int]
    entropy: list[float]
    probability: float


@dataclass
class Chunk:
    """A chunk as far as it is written. state: the grammar's. guess: of all ids, those written included. ahead: guesses that stand in the
    sequence behind the id last written, or behind "begin of action". unread: the last of the ids, which the sequence does not hold yet.
    rounds: how often what is ahead was computed."""

    state: int
    guess: list[int]
    ahead: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    unread: int = 0
    rounds: int = 0
    entropy: list[float] = field(default_factory=list)
    log_probability: float = 0.0
    prefix: CommittedPrefix | None = None


class ActionWriter:
    """Decodes chunks of one shape with one model. temperature 0 takes the likeliest id that is permitted. draft: writes guesses. lossy:
    after so many rounds guesses count as right, at temperature 0; None: the ids are those of one at a time."""

    def __init__(
        self,
        model: BlockEmu3ForCausalLM,
        vocabulary: CompactVocabulary,
        grammar: ActionGrammar,
        temperature: float = 0.0,
        *,
        draft: Int8Trunk | None = None,
        lossy: int | None = None,
    ):
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}, expected at least 0")
        if lossy is not None and (lossy < 1 or draft is not None or temperature):
            raise ValueError(
                f"lossy is {lossy}, expected at least 1 round, at temperature=0 and without int8_draft, or None for exact results"
            )
        start, end = vocabulary.action_start, vocabulary.end_of_chunk + 1
        self._head = Product(model.lm_head.weight[start:end])
        self._embeddings = model.model.embed_tokens.weight[start:end].detach()
        self._grammar, self._temperature, self._draft, self._lossy = grammar, temperature, draft, lossy
        self._refused = torch.from_numpy(~grammar.mask_rows).to(self._embeddings.device)

    def write(self, sequence: CachedSequence, state_H: torch.Tensor, generator: torch.Generator | None = None) -> WrittenChunk:
        """Write until the chunk is whole. state_H: the trunk's state after "begin of action"; generator: for temperature above 0.

        The sequence then holds all ids but the last: nothing was asked after it, and end of chunk is all that may follow. With `lossy` it
        may lack more of them. Raises DecodingFailed.
        """
        return self.write_each([sequence], [self.begin()], [state_H[None]], [generator])[0]

    def begin(self, guess: Sequence[int] = (), prefix: CommittedPrefix | None = None) -> Chunk:
        """A chunk of which nothing is written.

        guess: ids that may be right, such as the chunk's before; they change the time alone. prefix: what is decided already; ids are then
        chosen as both the model and the prefix have it, and "entropy" and "probability" are of that choice.
        """
        chunk = Chunk(self._grammar.start(), list(guess), prefix=prefix)
        chunk.ahead = self._permitted(chunk)
        return chunk

    def ahead(self, chunk: Chunk) -> torch.Tensor:
        """Embeddings (k, H) of its guesses, to go through the trunk with what stands before them."""
        return self._embeddings[chunk.ahead]

    @torch.inference_mode()
    def write_each(
        self,
        sequences: Sequence[CachedSequence],
        chunks: Sequence[Chunk],
        states: Sequence[torch.Tensor],
        generators: Sequence[torch.Generator | None],
    ) -> list[WrittenChunk]:
        """What `write` gives for each sequence, one step of all at a time. Raises DecodingFailed.

        chunks: begun, their guesses behind "begin of action" in the sequences. states: of each (1 + k, H), after that and after each guess.
        """
        unfinished, states = list(range(len(chunks))), list(states)
        while True:
            self._go_on(
                [chunks[number] for number in unfinished],
                self._logits(torch.cat(states)),
                [sequences[number] for number in unfinished],
                [generators[number] for number in unfinished],
            )
            unfinished = [number for number in unfinished if not self._grammar.is_finished(chunks[number].state)]
            if not unfinished:
                return [WrittenChunk(chunk.ids, chunk.entropy, math.exp(chunk.log_probability)) for chunk in chunks]
            for number in unfinished if self._draft and not self._temperature else ():
                if chunks[number].prefix is None:
                    chunks[number].ahead = self._guessed(chunks[number], sequences[number])
            following = [self._embeddings[_following(chunks[number])] for number in unfinished]
            read = sequences[0].trunk.extend_each([(sequences[number], rows) for number, rows in zip(unfinished, following, strict=True)])
            states = [rows[-1 - len(chunks[number].ahead) :] for number, rows in zip(unfinished, read, strict=True)]

    def _logits(self, states_SH: torch.Tensor) -> torch.Tensor:
        """Of the ids of actions and end of chunk: float32 (S, V + 1). In LEAST_ROWS rows or more, see there."""
        return self._head(F.pad(states_SH, (0, 0, 0, max(0, LEAST_ROWS - len(states_SH)))))[: len(states_SH)].float()

    def _go_on(
        self,
        chunks: Sequence[Chunk],
        logits_RV: torch.Tensor,
        sequences: Sequence[CachedSequence],
        generators: Sequence[torch.Generator | None],
    ) -> None:
        """Choose the next ids of each chunk from the logits that follow its last id and its guesses: R rows in one pass, none of which
        depends on the others."""
        states = [self._states(chunk) for chunk in chunks]
        log_p_RV = self._masked(logits_RV, [state for of_chunk in states for state in of_chunk])
        first = 0
        for chunk, of_chunk in zip(chunks, states, strict=True):
            if chunk.prefix is not None:
                log_p_RV[first] = _heeding(chunk.prefix, log_p_RV[first])
            first += len(of_chunk)
        rows = [generator for generator, of_chunk in zip(generators, states, strict=True) for _ in of_chunk]
        indices = self._choose(log_p_RV, rows)
        chosen = log_p_RV[torch.arange(len(indices)), indices].tolist()
        choices = iter(zip(indices, chosen, _entropies(log_p_RV), strict=True))
        for chunk, sequence, of_chunk in zip(chunks, sequences, states, strict=True):
            self._take(chunk, sequence, list(islice(choices, len(of_chunk))))

    def _states(self, chunk: Chunk) -> list[int]:
        """The grammar's, where each of the chunk's next ids is chosen."""
        return list(accumulate(chunk.ahead, self._grammar.advance, initial=chunk.state))

    def _take(self, chunk: Chunk, sequence: CachedSequence, choices: list[tuple[int, float, float]]) -> None:
        """Chosen ids, each with its log-probability and entropy: the first is certain, each other is if the guess before it was right, or
        where enough rounds were made, as far as the grammar lets it stand."""
        written, ahead = len(chunk.ids), chunk.ahead
        right = next((at for at, guess in enumerate(ahead) if guess != choices[at][0]), len(ahead))
        chunk.rounds += 1
        enough = self._lossy is not None and chunk.rounds >= self._lossy
        for at, (index, log_p, entropy) in enumerate(choices):
            if at > right and not (enough and self._stands(chunk.state, index)):
                break
            chunk.ids.append(index)
            chunk.entropy.append(entropy)
            chunk.log_probability += log_p
            if chunk.prefix is not None:
                chunk.prefix.write(index)
            chunk.state = self._grammar.advance(chunk.state, index)
        # What was put in behind the last right guess is of a chunk that is not written.
        sequence.truncate(sequence.length - (len(ahead) - right))
        chunk.unread = len(chunk.ids) - written - right
        chunk.rounds = 0 if enough else chunk.rounds
        chunk.guess[written : written + len(choices)] = [index for index, _, _ in choices]
        chunk.ahead = self._permitted(chunk)

    def _stands(self, state: int, index: int) -> bool:
        """Whether the grammar lets an id follow in this state."""
        return not self._grammar.is_finished(state) and bool(self._grammar.mask(state)[index])

    def _guessed(self, chunk: Chunk, sequence: CachedSequence) -> list[int]:
        """What the draft would write next, to the chunk's end or as far as the window goes."""
        ahead, state, last = [], chunk.state, chunk.ids[-1]
        while len(ahead) < DRAFT_WINDOW:
            states = self._draft.extend([sequence], [sequence.length + len(ahead)], self._embeddings[[last]])
            last = int(self._masked(self._logits(torch.stack(states)), [state]).argmax())
            state = self._grammar.advance(state, last)
            if self._grammar.is_finished(state):
                break
            ahead.append(last)
        return ahead

    def _permitted(self, chunk: Chunk) -> list[int]:
        """Of the next WINDOW guesses those that the grammar lets stand, except one that would end the chunk. None where the likeliest id is
        not what is taken."""
        ahead, state = [], chunk.state
        if self._temperature or chunk.prefix is not None:
            return ahead
        for index in chunk.guess[len(chunk.ids) : len(chunk.ids) + WINDOW]:
            if not self._stands(state, index):
                break
            state = self._grammar.advance(state, index)
            if self._grammar.is_finished(state):
                break
            ahead.append(index)
        return ahead

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


def _following(chunk: Chunk) -> list[int]:
    """What goes through the trunk next: the ids that it has not seen, and the guesses behind them."""
    return [*chunk.ids[len(chunk.ids) - chunk.unread :], *chunk.ahead]


def _heeding(prefix: CommittedPrefix, log_p: torch.Tensor) -> torch.Tensor:
    """Log-probabilities given the committed prefix too. All that are permitted are weighed: what goes on from the prefix may be an id that
    the model alone would hardly write."""
    permitted = torch.isfinite(log_p).nonzero().squeeze(1)
    heeded = torch.full_like(log_p, -torch.inf)
    heeded[permitted] = log_p[permitted] + torch.from_numpy(prefix.scores(permitted.cpu().numpy())).to(log_p)
    return torch.log_softmax(heeded, dim=0)


def _entropies(log_p_SV: torch.Tensor) -> list[float]:
    return torch.special.entr(log_p_SV.exp()).sum(1).tolist()
