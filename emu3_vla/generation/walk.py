"""A grammar followed along what another engine writes, for that engine's logits processors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emu3_vla.generation.grammar import Grammar


class GrammarWalk:
    """One sequence's place in its grammar."""

    def __init__(self, grammar: Grammar):
        self.grammar, self._state, self._seen = grammar, grammar.start, 0

    @property
    def is_final(self) -> bool:
        return self.grammar.is_final(self._state)

    def follow(self, written: Sequence[int]) -> None:
        """Go on to the end of what was written, from the start again where that is shorter than before (a preempted request)."""
        if len(written) < self._seen:
            self._state, self._seen = self.grammar.start, 0
        for index in written[self._seen :]:
            # Behind the end an engine may ask on until it sees that the sequence is over.
            if not self.is_final:
                self._state = self.grammar.advance(self._state, int(index))
        self._seen = len(written)

    def refuse(self, logits_V: torch.Tensor) -> torch.Tensor:
        """The logits with -inf where the grammar refuses, unchanged behind its end: float (V,)."""
        if self.is_final:
            return logits_V
        choice = self.grammar.choice(self._state)
        allowed = torch.full_like(logits_V, -torch.inf)
        own = logits_V[choice.start : choice.stop]
        if choice.mask is not None:
            own = own.masked_fill(torch.from_numpy(~choice.mask).to(own.device), -torch.inf)
        allowed[choice.start : choice.stop] = own
        return allowed
