"""FAST: a chunk of actions as a few tokens, and back.

    from action_tokenizer import FastTokenizer
    tokenizer = FastTokenizer.fit(chunks, scale=10, vocab_size=512)
    ids = tokenizer.encode(chunks)
    actions = tokenizer.decode(ids)

normalised chunk (T, A) → DCT along time, × scale, rounded → one character per coefficient → byte-level BPE → ids.

Legend: N chunks, T steps, A action dimensions, V ids of the vocabulary.
Source: FAST (arXiv 2501.09747) and its published processor, whose ids and files this reads and writes unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from action_tokenizer import auto_processor, bytelevel, dct, files
from action_tokenizer.detokenize import Repairs, TokenTable
from action_tokenizer.encoding import ChunkEncoder
from action_tokenizer.errors import ActionTokenizerError, CoefficientOutOfRange
from action_tokenizer.grammar import ActionGrammar, byte_transitions
from action_tokenizer.prefix import CommittedPrefix


class FastTokenizer:
    """DCT and byte-level BPE of action chunks. Immutable; safe to share between threads.

    scale, min_token: see `files.ProcessorConfig`. horizon, action_dim: the shape fitted on, or None where the files do not say.
    vocab_size: number of ids, 0 .. vocab_size - 1.
    """

    def __init__(self, bpe: Tokenizer, config: files.ProcessorConfig):
        self._bpe = bpe
        self.config = config
        self.scale, self.min_token = config.scale, config.min_token
        self.horizon, self.action_dim = config.horizon, config.action_dim
        self.vocab_size = bpe.get_vocab_size()
        self._encoder = ChunkEncoder(bpe)
        self._grammars: dict[tuple, ActionGrammar] = {}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FastTokenizer:
        """Read the published layout. Raises TokenizerFilesError for missing, truncated or foreign files."""
        return cls(*files.read(folder))

    @classmethod
    def fit(
        cls,
        chunks: np.ndarray | Iterable[np.ndarray],
        *,
        scale: float = 10,
        vocab_size: int = 1024,
        limit: float = 1.0,
    ) -> FastTokenizer:
        """Fit a vocabulary. See `fitting.fit`, which says what the arguments mean."""
        from action_tokenizer.fitting import fit

        return cls(*fit(chunks, scale=scale, vocab_size=vocab_size, limit=limit))

    def save_pretrained(self, folder: str | Path, *, processor_code: bool = False) -> Path:
        """Write the published layout. Returns the folder.

        processor_code: write the module too that AutoProcessor runs (with `trust_remote_code=True`). No other reader needs it.
        """
        folder = files.write(folder, self._bpe, self.config)
        if processor_code:
            files.write_text(folder / auto_processor.FILE, auto_processor.SOURCE)
        return folder

    def encode(self, chunks, *, clip: bool = False) -> list[list[int]]:
        """Tokens of each chunk.

        chunks: real (N, T, A), or (T, A) for one; normalised, usually within [-1, 1].
        clip: write the nearest coefficient that the vocabulary has, where it lacks the exact one, instead of refusing.
        Returns N lists of ids. Raises BadActions, CoefficientOutOfRange.
        """
        array_NTA = dct.check_chunks(chunks)
        coefficients_NTA = dct.quantize(array_NTA, self.scale)
        return self._encoder.encode(self._code_points(coefficients_NTA, clip).reshape(len(array_NTA), -1))

    def decode(self, ids: Sequence[Sequence[int]], *, horizon: int | None = None, action_dim: int | None = None) -> np.ndarray:
        """Actions of each list of ids: float64 (N, T, A).

        horizon, action_dim: T and A; default: those fitted on.
        Raises MalformedActionTokens for the first list that does not hold exactly T×A coefficients.
        """
        horizon, action_dim = self._shape(horizon, action_dim)
        code_points = self._table.code_points(ids, expected=horizon * action_dim)
        return self._actions(code_points, horizon, action_dim)

    def decode_lenient(
        self, ids: Sequence[Sequence[int]], *, horizon: int | None = None, action_dim: int | None = None
    ) -> tuple[np.ndarray, Repairs]:
        """`decode` that mends malformed lists: unreadable bytes and ids left out, missing coefficients 0, surplus ones cut.

        For analysis of a model's errors; what it returns for a malformed list is no action that anyone chose, so not for an arm.
        Returns float64 (N, T, A), and how often it did what.
        """
        horizon, action_dim = self._shape(horizon, action_dim)
        code_points, repairs = self._table.code_points_lenient(ids, expected=horizon * action_dim, fill=-self.min_token)
        return self._actions(code_points, horizon, action_dim), repairs

    def grammar(self, horizon: int | None = None, action_dim: int | None = None, *, limit: float | None = None) -> ActionGrammar:
        """The automaton of id sequences that decode to exactly T×A coefficients.

        limit: permit only coefficients that a chunk within [-limit, limit] can have. Default: all that `decode` reads.
        """
        horizon, action_dim = self._shape(horizon, action_dim)
        if (horizon, action_dim, limit) not in self._grammars:
            self._grammars[horizon, action_dim, limit] = self._grammar(horizon, action_dim, limit)
        return self._grammars[horizon, action_dim, limit]

    def _grammar(self, horizon: int, action_dim: int, limit: float | None) -> ActionGrammar:
        bounds = (0, bytelevel.MAX_CODE_POINT)
        if limit is not None:
            if not limit > 0:
                raise ActionTokenizerError(f"limit is {limit}, expected a positive number")
            bound = dct.coefficient_bound(horizon, self.scale, limit)
            bounds = (max(0, -bound - self.min_token), bound - self.min_token)
        return ActionGrammar(byte_transitions(self._token_bytes, *bounds), horizon=horizon, action_dim=action_dim)

    def committed(self, actions_nA, *, horizon: int | None = None, correlation: float) -> CommittedPrefix:
        """For writing a chunk whose first n actions (normalised, (n, A)) are decided already; see `prefix`. Raises BadActions."""
        return CommittedPrefix(
            actions_nA,
            horizon=self._shape(horizon, self.action_dim)[0],
            token_bytes=self._token_bytes,
            min_token=self.min_token,
            scale=self.scale,
            correlation=correlation,
        )

    def has_coefficients(self, coefficients: np.ndarray) -> np.ndarray:
        """Whether each coefficient can be encoded: integers of any shape to bool of that shape."""
        return np.isin(np.asarray(coefficients) - self.min_token, self._representable)

    def covers(self, chunks) -> np.ndarray:
        """Whether each chunk can be encoded as it is: real (N, T, A) to bool (N,). Raises BadActions."""
        coefficients_NTA = dct.quantize(dct.check_chunks(chunks), self.scale)
        return self.has_coefficients(coefficients_NTA).all(axis=(1, 2))

    @property
    def coefficient_range(self) -> tuple[int, int]:
        """Smallest and largest coefficient that can be encoded. Published vocabularies can have gaps between; `encode` refuses those."""
        return int(self._representable[0]) + self.min_token, int(self._representable[-1]) + self.min_token

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        return [bytelevel.token_bytes(self._bpe.id_to_token(index)) for index in range(self.vocab_size)]

    @cached_property
    def _table(self) -> TokenTable:
        return TokenTable(self._token_bytes)

    @cached_property
    def _representable(self) -> np.ndarray:
        """Ascending code points all of whose bytes encoding can emit."""
        vocabulary = self._bpe.get_vocab()
        known = {byte for byte, char in bytelevel.byte_to_char().items() if char in vocabulary}
        # Past two bytes a vocabulary would have to hold thousands of coefficients; 16 bits are searched, which covers three.
        points = [point for point in range(0x10000) if point not in bytelevel.SURROGATES and known.issuperset(chr(point).encode())]
        if not points:
            raise ActionTokenizerError("this tokenizer's vocabulary holds no byte, so it can encode no coefficient at all")
        return np.array(points)

    @cached_property
    def _is_representable(self) -> np.ndarray:
        """`_representable` as a table over code points."""
        table = np.zeros(self._representable[-1] + 1, bool)
        table[self._representable] = True
        return table

    def _code_points(self, coefficients_NTA: np.ndarray, clip: bool) -> np.ndarray:
        """Characters of coefficients. Integers (N, T, A) in and out."""
        points_NTA, known = coefficients_NTA - self.min_token, self._representable
        if points_NTA.min() >= 0 and points_NTA.max() < len(self._is_representable):
            if self._is_representable.take(points_NTA).all():
                return points_NTA
        right = np.searchsorted(known, points_NTA).clip(max=len(known) - 1)
        missing = known[right] != points_NTA
        if clip:
            left = (right - 1).clip(min=0)
            nearer_left = np.abs(known[left] - points_NTA) <= np.abs(known[right] - points_NTA)
            return np.where(nearer_left, known[left], known[right])
        chunk, step, dim = (int(index) for index in np.argwhere(missing)[0])
        value, (low, high) = int(coefficients_NTA[chunk, step, dim]), self.coefficient_range
        raise CoefficientOutOfRange(
            f"coefficient {value} (chunk {chunk}, frequency {step}, dimension {dim}) is not in this tokenizer's vocabulary, which "
            f"covers {low} to {high} at scale {self.scale}; {int(missing.sum())} of {missing.size} are missing. Normalise or clip the "
            "actions, fit with a larger limit, or pass clip=True",
            chunk=chunk, step=step, dim=dim, value=value,
        )  # fmt: skip

    def _actions(self, code_points: np.ndarray, horizon: int, action_dim: int) -> np.ndarray:
        coefficients = code_points.astype(np.int64) + self.min_token
        return dct.dequantize(coefficients.reshape(-1, horizon, action_dim), self.scale)

    def _shape(self, horizon: int | None, action_dim: int | None) -> tuple[int, int]:
        shape = (self.horizon if horizon is None else horizon, self.action_dim if action_dim is None else action_dim)
        if None in shape:
            raise ActionTokenizerError("this tokenizer's files do not say its horizon and action_dim; pass both")
        if min(shape) < 1:
            raise ActionTokenizerError(f"horizon and action_dim are {shape}, expected positive integers")
        return shape
