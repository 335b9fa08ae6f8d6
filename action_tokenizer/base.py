"""What every action tokenizer is: chunks to ids, back, and the grammar of those ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from action_tokenizer.grammar import ActionGrammar


@runtime_checkable
class ActionTokenizer(Protocol):
    """FAST and the baselines. N chunks, T steps, A dimensions; ids are 0 .. vocab_size - 1."""

    vocab_size: int

    def encode(self, chunks, *, clip: bool = False) -> list[list[int]]:
        """Ids of real chunks (N, T, A) or (T, A).

        Raises BadActions, and CoefficientOutOfRange for what the vocabulary cannot write, unless `clip` asks for the nearest.
        """
        ...

    def covers(self, chunks) -> np.ndarray:
        """Whether each of real chunks (N, T, A) can be encoded without clipping: bool (N,). Raises BadActions."""
        ...

    def decode(
        self, ids: Sequence[Sequence[int]], *, horizon: int | None = None, action_dim: int | None = None
    ) -> np.ndarray:
        """Actions, float64 (N, T, A). Raises MalformedActionTokens."""
        ...

    def grammar(self, horizon: int | None = None, action_dim: int | None = None) -> ActionGrammar:
        """The automaton of id sequences that decode to T×A values."""
        ...
