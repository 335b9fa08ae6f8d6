"""Action tokenizers: FAST with a decoder that cannot be surprised, its grammar, binning baselines, and the normaliser.

Imports numpy and tokenizers (and scipy, when something is encoded); never torch.
"""

from action_tokenizer.errors import (
    ActionTokenizerError,
    BadActions,
    CoefficientOutOfRange,
    MalformedActionTokens,
    TokenizerFilesError,
)
from action_tokenizer.fast import FastTokenizer
from action_tokenizer.grammar import ActionGrammar
from action_tokenizer.normalizer import ActionNormalizer
from action_tokenizer.statistics import ActionStatistics

__all__ = [
    "ActionGrammar",
    "ActionNormalizer",
    "ActionStatistics",
    "ActionTokenizerError",
    "BadActions",
    "CoefficientOutOfRange",
    "FastTokenizer",
    "MalformedActionTokens",
    "TokenizerFilesError",
]
