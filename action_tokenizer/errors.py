"""The named errors of this package. All are ValueErrors, so a caller that does not care can catch that."""

from __future__ import annotations


class ActionTokenizerError(ValueError):
    """Any refusal of this package."""


class BadActions(ActionTokenizerError):
    """Actions that cannot be encoded or normalised: wrong shape or dtype, empty, NaN or infinite."""


class CoefficientOutOfRange(ActionTokenizerError):
    """A coefficient for which this tokenizer has no characters; byte-level BPE would have dropped or changed it in silence.

    chunk, step, dim: where the first such coefficient stands in the batch (`step` counts DCT frequencies). value: the coefficient.
    """

    def __init__(self, message: str, *, chunk: int, step: int, dim: int, value: int):
        super().__init__(message)
        self.chunk, self.step, self.dim, self.value = chunk, step, dim, value


class MalformedActionTokens(ActionTokenizerError):
    """Ids that are not the tokens of one chunk of the wanted shape.

    chunk: index in the batch. position: index of the first id at fault, or the number of ids where the list ends too early.
    expected, actual: number of coefficients wanted, and number that the ids hold (up to the fault, where there is one).
    """

    def __init__(self, message: str, *, chunk: int, position: int, expected: int, actual: int):
        super().__init__(message)
        self.chunk, self.position, self.expected, self.actual = chunk, position, expected, actual


class TokenizerFilesError(ActionTokenizerError):
    """Tokenizer or normaliser files that are missing, truncated, or of another kind."""
