"""Action tokenizers: FAST with a decoder that cannot be surprised, its grammar, binning baselines, and the normaliser.

Imports numpy and tokenizers (and scipy, when something is encoded); never torch.
"""

from action_tokenizer.base import ActionTokenizer
from action_tokenizer.bins import BinTokenizer
from action_tokenizer.chunks import chunks_of
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
    "ActionTokenizer",
    "ActionTokenizerError",
    "BadActions",
    "BinTokenizer",
    "CoefficientOutOfRange",
    "FastTokenizer",
    "MalformedActionTokens",
    "TokenizerFilesError",
    "chunks_of",
]
