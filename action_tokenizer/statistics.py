"""Statistics of actions that can be gathered shard by shard and merged: count, mean, spread, range and quantiles.

Quantiles come from a histogram whose bins are 1/128 of an octave wide and remember the least and greatest value that fell into them.
Merging adds bins, so the order and the cut of shards change nothing, and a value that is alone in its bin, or repeated (a saturated
±1), comes back exactly. Elsewhere a quantile is off by less than its bin: 0.8 % of the value.

Source: the bins are those of HdrHistogram (linear within an octave); variances merge as in Chan, Golub and LeVeque (1979).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from action_tokenizer.errors import BadActions, TokenizerFilesError

_BINS_AN_OCTAVE = 128
_HISTOGRAM_FIELDS = ("keys", "counts", "low", "high")
_LEAST_EXPONENT = -40
"""Magnitudes below 2**-41 share the bin of zero."""


@dataclass(frozen=True, kw_only=True)
class _Histogram:
    """Occupied bins of one dimension, ascending: int64 keys and counts, float64 least and greatest values, all (bins,)."""

    keys: np.ndarray
    counts: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> _Histogram:
        values = np.sort(values)
        return cls._grouped(_bin(values), np.ones(len(values), np.int64), values, values)

    @classmethod
    def _grouped(cls, keys, counts, low, high) -> _Histogram:
        """Join equal keys of a list that is sorted by key."""
        first = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
        return cls(
            keys=keys[first],
            counts=np.add.reduceat(counts, first),
            low=np.minimum.reduceat(low, first),
            high=np.maximum.reduceat(high, first),
        )

    def merge(self, other: _Histogram) -> _Histogram:
        parts = [np.concatenate([getattr(self, name), getattr(other, name)]) for name in _HISTOGRAM_FIELDS]
        order = np.argsort(parts[0], kind="stable")
        return self._grouped(*(part[order] for part in parts))

    def quantile(self, fraction: float) -> float:
        """Linear interpolation between neighbouring ranks, as numpy's default."""
        rank = fraction * (self.counts.sum() - 1)
        below, above = (self._at(int(index)) for index in (np.floor(rank), np.ceil(rank)))
        return float(below + (above - below) * (rank - np.floor(rank)))

    def _at(self, rank: int) -> float:
        """The value of a rank, taking the values of a bin as evenly spread between its least and greatest."""
        ends = np.cumsum(self.counts)
        index = int(np.searchsorted(ends, rank, side="right"))
        inside = rank - (ends[index] - self.counts[index])
        return self.low[index] + (self.high[index] - self.low[index]) * inside / max(self.counts[index] - 1, 1)


@dataclass(frozen=True, kw_only=True)
class ActionStatistics:
    """Statistics of `count` actions of A dimensions, in the actions' own units. Arrays are float64 (A,).

    m2: sum of squared deviations from `mean`.
    """

    count: int
    mean: np.ndarray
    m2: np.ndarray
    low: np.ndarray
    high: np.ndarray
    histograms: tuple[_Histogram, ...]

    @classmethod
    def of(cls, actions) -> ActionStatistics:
        """Statistics of real actions (..., A). Raises BadActions for an empty array, NaN or infinity."""
        actions_NA = check_actions(actions)
        actions_NA = actions_NA.reshape(-1, actions_NA.shape[-1])
        mean = actions_NA.mean(axis=0)
        return cls(
            count=len(actions_NA),
            mean=mean,
            m2=((actions_NA - mean) ** 2).sum(axis=0),
            low=actions_NA.min(axis=0),
            high=actions_NA.max(axis=0),
            histograms=tuple(_Histogram.of(column) for column in actions_NA.T),
        )

    @classmethod
    def of_many(cls, parts: Iterable) -> ActionStatistics:
        """Statistics of arrays (..., A) that come one after another, as from a store that is larger than memory."""
        merged = None
        for part in parts:
            statistics = cls.of(part)
            merged = statistics if merged is None else merged.merge(statistics)
        if merged is None:
            raise BadActions("no actions to gather statistics of")
        return merged

    def merge(self, other: ActionStatistics) -> ActionStatistics:
        """Statistics of both sets of actions together. Raises BadActions for another number of dimensions."""
        if len(self.mean) != len(other.mean):
            raise BadActions(f"statistics of {len(self.mean)} and of {len(other.mean)} dimensions cannot be merged")
        count, shift = self.count + other.count, other.mean - self.mean
        return ActionStatistics(
            count=count,
            mean=self.mean + shift * (other.count / count),
            m2=self.m2 + other.m2 + shift**2 * (self.count * other.count / count),
            low=np.minimum(self.low, other.low),
            high=np.maximum(self.high, other.high),
            histograms=tuple(a.merge(b) for a, b in zip(self.histograms, other.histograms, strict=True)),
        )

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of the population: float64 (A,)."""
        return np.sqrt(self.m2 / self.count)

    def quantile(self, fraction: float) -> np.ndarray:
        """The value below which `fraction` of the actions lie, per dimension: float64 (A,)."""
        if not 0 <= fraction <= 1:
            raise BadActions(f"quantile {fraction} is not between 0 and 1")
        return np.array([histogram.quantile(fraction) for histogram in self.histograms])

    def save(self, path: str | Path) -> Path:
        """Write as an npz file, whole or not at all. Returns its path."""
        path = Path(path)
        arrays = {"count": np.int64(self.count), "mean": self.mean, "m2": self.m2, "low": self.low, "high": self.high}
        for dim, histogram in enumerate(self.histograms):
            arrays |= {f"{name}_{dim}": getattr(histogram, name) for name in _HISTOGRAM_FIELDS}
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        temporary.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> ActionStatistics:
        """Read what `save` wrote. Raises TokenizerFilesError for another or a damaged file."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = dict(stored)
            return cls(
                count=int(arrays["count"]),
                **{name: arrays[name] for name in ("mean", "m2", "low", "high")},
                histograms=tuple(
                    _Histogram(**{name: arrays[f"{name}_{dim}"] for name in _HISTOGRAM_FIELDS})
                    for dim in range(len(arrays["mean"]))
                ),
            )
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise TokenizerFilesError(f"{path} does not hold whole action statistics: {error}") from error


def check_actions(actions) -> np.ndarray:
    """`actions` as float64 (..., A). Raises BadActions for no axis, an empty array, a dtype that is not real, NaN or infinity."""
    array = np.asarray(actions)
    if array.dtype.kind not in "fiu" or array.ndim < 1:
        raise BadActions(f"actions have dtype {array.dtype} and shape {array.shape}, expected real numbers (..., A)")
    if array.size == 0:
        raise BadActions(f"actions have shape {array.shape}: there are none")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0]
        raise BadActions(f"action {array[tuple(where)]} at index {where.tolist()}; expected finite numbers")
    return array


def _bin(values: np.ndarray) -> np.ndarray:
    """Bin of each value: int64, ascending with the value, 0 around zero."""
    mantissa, exponent = np.frexp(np.abs(values))
    inside = np.floor((mantissa - 0.5) * (2 * _BINS_AN_OCTAVE)).astype(np.int64)
    key = 1 + (exponent.astype(np.int64) - _LEAST_EXPONENT) * _BINS_AN_OCTAVE + inside
    return np.where((values == 0) | (exponent < _LEAST_EXPONENT), 0, np.sign(values).astype(np.int64) * key)
