"""Writing a chunk whose first actions are decided already: how likely they are, given the ids written so far.

    prefix = tokenizer.committed(actions_nA, horizon=10)     # the first n actions of the chunk, normalised
    scores = prefix.scores(candidates)                       # for each id that could come next: log p(committed | written, id)
    prefix.write(index)

FAST writes frequencies, lowest first, so no id stands for the first actions alone: they are fixed by all coefficients together. By Bayes'
rule p(id | written, committed) ∝ p(id | written) · p(committed | written, id). The model gives the first factor. The second needs what is
still to be written, over which this integrates: coefficients of a stationary process whose neighbouring steps correlate, Gaussian, so that
what is written predicts what is not, and everything is closed form. The last ids are judged exactly: all coefficients are then known.

Legend: T steps, F = T frequencies, A dimensions, n committed steps, C candidates, k frequencies written.
Coefficients here are divided by the tokenizer's scale.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from action_tokenizer.dct import basis
from action_tokenizer.errors import BadActions

DEVIATION = 1.0  # of a normalised action, whatever dimension; wide, since a narrow one would pull to zero


class CommittedPrefix:
    """One chunk's prefix, and what of the chunk is written. token_bytes: of each id; correlation: of neighbouring steps, in (0, 1)."""

    def __init__(
        self, committed_nA: np.ndarray, *, horizon: int, token_bytes: Sequence[bytes], min_token: int, scale: float, correlation: float
    ):
        committed_nA = np.asarray(committed_nA, np.float64)
        if committed_nA.ndim != 2 or not 0 < len(committed_nA) < horizon or not np.isfinite(committed_nA).all():
            raise BadActions(
                f"committed actions have shape {committed_nA.shape}, expected finite (n, A) with 1 <= n < {horizon}, the chunk's steps"
            )
        if not 0 < correlation < 1:
            raise ValueError(f"correlation of neighbouring steps is {correlation}, expected above 0 and below 1")
        self._bytes, self._min_token, self._scale = token_bytes, min_token, scale
        self._horizon, self._dims = horizon, committed_nA.shape[1]
        whitening, self._predict, self._log_scale = _whitening(len(committed_nA), horizon, scale, correlation)
        self._wanted = np.einsum("kmn,na->kam", whitening, committed_nA)
        self._written = np.zeros((self._dims, horizon))
        self._count, self._pending, self._table = 0, b"", _spelled_out(tuple(token_bytes), min_token, scale)

    def scores(self, candidates: Sequence[int]) -> np.ndarray:
        """log p(committed | what is written, each candidate): float64 (C,). Candidates are ids that the grammar permits."""
        counts_C, following_CK = self._following(np.asarray(candidates))
        written_CK = np.repeat(self._written.T.reshape(1, -1), len(counts_C), axis=0)  # dimensions are inner, as they are written
        room = written_CK.shape[1] - self._count
        written_CK[:, self._count :] = np.pad(following_CK, ((0, 0), (0, max(0, room - following_CK.shape[1]))))[:, :room]
        written_CAF = written_CK.reshape(len(counts_C), -1, self._dims).swapaxes(1, 2)
        count_C = self._count + counts_C
        # How many frequencies each dimension has: dimensions are inner, the first ones are ahead.
        known_CA = (count_C[:, None] - np.arange(self._dims) + self._dims - 1) // self._dims
        predicted = np.einsum("camf,caf->cam", self._predict[known_CA], written_CAF)
        wanted = self._wanted[known_CA, np.arange(self._dims)]
        return (self._log_scale[known_CA] - 0.5 * np.square(wanted - predicted).sum(axis=2)).sum(axis=1)

    def write(self, index: int) -> None:
        """Take `index` as written."""
        coefficients, self._pending = self._read(index)
        self._place(self._written, self._count, coefficients)
        self._count += len(coefficients)

    def _following(self, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many coefficients each candidate completes, (C,), and these, padded with zeros, (C, most)."""
        if not self._pending:
            counts_V, coefficients_VK = self._table
            return counts_V[candidates], coefficients_VK[candidates]
        return _padded([self._read(index)[0] for index in candidates.tolist()])

    def _read(self, index: int) -> tuple[list[float], bytes]:
        """The coefficients that an id completes, and the bytes of a half-read one after it."""
        text = self._pending + self._bytes[index]
        characters, used = codecs.utf_8_decode(text, "strict", False)
        return [(ord(character) + self._min_token) / self._scale for character in characters], text[used:]

    def _place(self, written_AF: np.ndarray, start: int, coefficients: list[float]) -> None:
        frequency, dim = np.divmod(np.arange(start, start + len(coefficients)), self._dims)
        written_AF[dim, frequency] = coefficients


@lru_cache(maxsize=8)
def _spelled_out(token_bytes: tuple[bytes, ...], min_token: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """What each id completes where no character is half read: number of coefficients int (V,), and these, padded, float64 (V, most)."""
    texts = [codecs.utf_8_decode(token, "ignore", False)[0] for token in token_bytes]
    return _padded([[(ord(character) + min_token) / scale for character in text] for text in texts])


def _padded(rows: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array([len(row) for row in rows])
    table = np.zeros((len(rows), counts.max(initial=0)))
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return counts, table


@lru_cache(maxsize=64)
def _whitening(n: int, horizon: int, scale: float, correlation: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For k = 0 … F known frequencies w of one dimension: the committed steps P are N(mean, covariance) with mean linear in w.

    Returns W (F + 1, n, n) and G (F + 1, n, F), so that W P − G w is standard normal, and log |W| (F + 1,).
    """
    steps = np.arange(horizon)
    basis_TF = basis(horizon)
    rounding = 1 / (scale * np.sqrt(12))  # standard deviation of what rounding a coefficient takes away
    process_TT = DEVIATION**2 * correlation ** np.abs(steps[:, None] - steps[None])
    covariance_FF = basis_TF.T @ process_TT @ basis_TF + rounding**2 * np.eye(horizon)
    whiten, known, log_scale = [], [], []
    for k in range(horizon + 1):
        regression = np.linalg.solve(covariance_FF[:k, :k], covariance_FF[:k, k:]).T  # of the unknown frequencies on the known
        left = covariance_FF[k:, k:] - regression @ covariance_FF[:k, k:]
        mean_nF = np.zeros((n, horizon))
        mean_nF[:, :k] = basis_TF[:n, :k] + basis_TF[:n, k:] @ regression
        spread = basis_TF[:n, k:] @ left @ basis_TF[:n, k:].T + rounding**2 * np.eye(n)
        whitening = np.linalg.inv(np.linalg.cholesky(spread))
        whiten.append(whitening)
        known.append(whitening @ mean_nF)
        log_scale.append(np.log(np.diag(whitening)).sum())
    return np.array(whiten), np.array(known), np.array(log_scale)
