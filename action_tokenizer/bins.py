"""Binning baselines: one id for every action value.

Source: RT-1 (arXiv 2212.06817) and OpenVLA (arXiv 2406.09246): 256 uniform bins over [-1, 1] a dimension. Quantile bins put the same
number of values into each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from action_tokenizer import files
from action_tokenizer.dct import check_chunks
from action_tokenizer.detokenize import check_counts
from action_tokenizer.errors import ActionTokenizerError, BadActions, CoefficientOutOfRange, TokenizerFilesError
from action_tokenizer.grammar import ActionGrammar, single_transitions

FILE = "bins.json"


class BinTokenizer:
    """One id per value, steps outer, dimensions inner, the same ids for every dimension. Immutable.

    edges: float64 (A, V - 1), ascending: bin b holds edges[b - 1] <= value < edges[b]. centers: float64 (A, V), what ids decode to.
    low, high: the values that can be encoded, (A,) each. horizon, action_dim: the shape of chunks, if known.
    """

    def __init__(self, *, edges, centers, low, high, horizon: int | None = None):
        self.edges, self.centers, self.low, self.high = (np.asarray(a, np.float64) for a in (edges, centers, low, high))
        self.action_dim, self.vocab_size = self.centers.shape
        self.horizon = horizon
        if self.edges.shape != (self.action_dim, self.vocab_size - 1):
            raise ActionTokenizerError(f"edges have shape {self.edges.shape}, expected {(self.action_dim, self.vocab_size - 1)}")
        if not np.isfinite(self.centers).all() or np.isnan(self.edges).any() or (np.diff(self.edges) < 0).any():
            raise ActionTokenizerError("bin edges must ascend, and centers be finite")

    @classmethod
    def uniform(cls, *, action_dim: int, bins: int = 256, limit: float = 1.0, horizon: int | None = None) -> BinTokenizer:
        """`bins` bins of equal width over [-limit, limit]."""
        _check_bins(bins)
        edges = np.linspace(-limit, limit, bins + 1)
        repeat = (action_dim, 1)
        return cls(
            edges=np.tile(edges[1:-1], repeat),
            centers=np.tile((edges[1:] + edges[:-1]) / 2, repeat),
            low=np.full(action_dim, -limit),
            high=np.full(action_dim, limit),
            horizon=horizon,
        )

    @classmethod
    def fit_quantiles(cls, chunks, *, bins: int = 256) -> BinTokenizer:
        """Bins that hold equally many of the values in `chunks`, real (N, T, A), per dimension; each decodes to the mean of its values.

        Everything can be encoded: the outer bins are open.
        """
        _check_bins(bins)
        array_NTA = check_chunks(chunks).astype(np.float64)
        columns = array_NTA.reshape(-1, array_NTA.shape[2]).T
        edges = np.quantile(columns, np.arange(1, bins) / bins, axis=1).T
        centers = np.array([_centers(column, row) for column, row in zip(columns, edges, strict=True)])
        unbounded = np.full(len(columns), np.inf)
        return cls(edges=edges, centers=centers, low=-unbounded, high=unbounded, horizon=array_NTA.shape[1])

    def encode(self, chunks, *, clip: bool = False) -> list[list[int]]:
        """See `base.ActionTokenizer.encode`. Raises BadActions for another number of dimensions too."""
        array_NTA = self._check(chunks)
        outside = (array_NTA < self.low) | (array_NTA > self.high)
        if outside.any() and not clip:
            chunk, step, dim = (int(index) for index in np.argwhere(outside)[0])
            value = array_NTA[chunk, step, dim]
            raise CoefficientOutOfRange(
                f"action {value} (chunk {chunk}, step {step}, dimension {dim}) is outside the bins' {self.low[dim]} to {self.high[dim]}; "
                "normalise or clip the actions, or pass clip=True",
                chunk=chunk, step=step, dim=dim, value=value,
            )  # fmt: skip
        ids = [np.searchsorted(edges, array_NTA[:, :, dim], side="right") for dim, edges in enumerate(self.edges)]
        return np.stack(ids, axis=2).reshape(len(array_NTA), -1).tolist()

    def covers(self, chunks) -> np.ndarray:
        """See `base.ActionTokenizer.covers`."""
        array_NTA = self._check(chunks)
        return ((array_NTA >= self.low) & (array_NTA <= self.high)).all(axis=(1, 2))

    def decode(self, ids: Sequence[Sequence[int]], *, horizon: int | None = None, action_dim: int | None = None) -> np.ndarray:
        """See `base.ActionTokenizer.decode`."""
        horizon = self._horizon(horizon, action_dim)
        flat = check_counts(ids, expected=horizon * self.action_dim, vocab_size=self.vocab_size)
        return self.centers[np.arange(self.action_dim), flat.reshape(-1, horizon, self.action_dim)]

    def grammar(self, horizon: int | None = None, action_dim: int | None = None) -> ActionGrammar:
        """See `base.ActionTokenizer.grammar`: T×A ids, whichever they are."""
        return ActionGrammar(
            single_transitions(self.vocab_size), horizon=self._horizon(horizon, action_dim), action_dim=self.action_dim
        )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write bins.json into `folder`. Returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: getattr(self, name).tolist() for name in ("edges", "centers")}
        # JSON has no infinity; null is "everything".
        values |= {name: [v if np.isfinite(v) else None for v in getattr(self, name).tolist()] for name in ("low", "high")}
        files.write_text(folder / FILE, json.dumps(values | {"horizon": self.horizon}))
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> BinTokenizer:
        """Read what `save_pretrained` wrote. Raises TokenizerFilesError."""
        path = Path(folder) / FILE
        values = files.read_json(path)
        try:
            bounds = {
                name: [sign * np.inf if v is None else v for v in values[name]] for name, sign in (("low", -1), ("high", 1))
            }
            return cls(edges=values["edges"], centers=values["centers"], horizon=values["horizon"], **bounds)
        except (KeyError, TypeError, ValueError) as error:
            raise TokenizerFilesError(f"{path} does not hold whole bins: {error!r}") from error

    def _check(self, chunks) -> np.ndarray:
        array_NTA = check_chunks(chunks).astype(np.float64)
        if array_NTA.shape[2] != self.action_dim:
            raise BadActions(f"actions have {array_NTA.shape[2]} dimensions, these bins were made for {self.action_dim}")
        return array_NTA

    def _horizon(self, horizon: int | None, action_dim: int | None) -> int:
        if action_dim not in (None, self.action_dim):
            raise ActionTokenizerError(f"action_dim is {action_dim}, these bins were made for {self.action_dim}")
        horizon = self.horizon if horizon is None else horizon
        if horizon is None or horizon < 1:
            raise ActionTokenizerError(f"horizon is {horizon}, expected a positive integer")
        return horizon


def _check_bins(bins: int) -> None:
    if bins < 2:
        raise ActionTokenizerError(f"{bins} bins, expected at least 2")


def _centers(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean of the values in each bin: float64 (V,). Empty bins, which repeated quantiles leave, get their upper edge."""
    index = np.searchsorted(edges, values, side="right")
    count = np.bincount(index, minlength=len(edges) + 1)
    total = np.bincount(index, weights=values, minlength=len(edges) + 1)
    return np.where(count > 0, total / np.maximum(count, 1), np.append(edges, edges[-1]))
