"""Actions to about [-1, 1] per dimension before tokenizing, and back after decoding.

    normalizer = ActionNormalizer.fit(actions)                 # or .from_statistics(shard_a.merge(shard_b))
    normalizer.save(folder / "normalizer.json")

The gripper is kept apart: it is -1 or +1 already, and stretching a binary command by its quantiles would only move it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from action_tokenizer import files
from action_tokenizer.errors import ActionTokenizerError, BadActions, TokenizerFilesError
from action_tokenizer.statistics import ActionStatistics, check_actions

MODES = ("quantile", "minmax", "meanstd")
LOW_QUANTILE, HIGH_QUANTILE = 0.01, 0.99


@dataclass(frozen=True, kw_only=True)
class ActionNormalizer:
    """normalised = (action - center) / half_range, per dimension.

    mode: "quantile" puts the 1 % and 99 % quantiles at -1 and +1, "minmax" the extremes, "meanstd" gives mean 0 and deviation 1.
    center, half_range: float64 (A,), in the actions' units. passthrough: dimensions that are left as they are (center 0, half_range 1).
    count: number of actions behind the figures. A dimension that never varied is only shifted (half_range 1).
    """

    mode: str
    center: np.ndarray
    half_range: np.ndarray
    passthrough: tuple[int, ...]
    count: int

    def __post_init__(self):
        if self.mode not in MODES:
            raise ActionTokenizerError(f"normaliser mode is {self.mode!r}, expected one of {', '.join(MODES)}")
        center, half_range = (np.asarray(value, np.float64) for value in (self.center, self.half_range))
        if center.ndim != 1 or center.shape != half_range.shape:
            raise ActionTokenizerError(f"center has shape {center.shape} and half_range {half_range.shape}, expected (A,) both")
        if not (np.isfinite(center).all() and np.isfinite(half_range).all() and (half_range > 0).all()):
            raise ActionTokenizerError("center and half_range must be finite, and half_range above 0")
        object.__setattr__(self, "center", center)
        object.__setattr__(self, "half_range", half_range)
        object.__setattr__(self, "passthrough", tuple(_dims(self.passthrough, len(center))))

    @classmethod
    def fit(cls, actions, *, mode: str = "quantile", passthrough: Sequence[int] = (-1,)) -> ActionNormalizer:
        """From real actions (..., A). passthrough: dimensions kept apart; default the last, the gripper. Raises BadActions."""
        return cls.from_statistics(ActionStatistics.of(actions), mode=mode, passthrough=passthrough)

    @classmethod
    def from_statistics(
        cls, statistics: ActionStatistics, *, mode: str = "quantile", passthrough: Sequence[int] = (-1,)
    ) -> ActionNormalizer:
        """From statistics, which shards can gather and merge."""
        if mode not in MODES:
            raise ActionTokenizerError(f"normaliser mode is {mode!r}, expected one of {', '.join(MODES)}")
        if mode == "meanstd":
            center, half_range = statistics.mean.copy(), statistics.std
        else:
            low, high = statistics.low, statistics.high
            if mode == "quantile":
                low, high = statistics.quantile(LOW_QUANTILE), statistics.quantile(HIGH_QUANTILE)
            center, half_range = (low + high) / 2, (high - low) / 2
        dims = _dims(passthrough, len(center))
        # Rounding leaves a constant dimension with a spread of some 1e-17, which must not become the unit.
        half_range = np.where(half_range > 1e-9 * np.maximum(np.abs(center), 1e-3), half_range, 1.0)
        center[dims], half_range[dims] = 0.0, 1.0
        return cls(mode=mode, center=center, half_range=half_range, passthrough=tuple(dims), count=statistics.count)

    @property
    def action_dim(self) -> int:
        """A."""
        return len(self.center)

    def normalize(self, actions, *, clip: bool = False) -> np.ndarray:
        """Real (..., A) in the actions' units to float64 (..., A). clip: cut at [-1, 1], passed-through dimensions excepted."""
        normalized = (self._check(actions) - self.center) / self.half_range
        if clip:
            stretched = [dim for dim in range(self.action_dim) if dim not in self.passthrough]
            normalized[..., stretched] = normalized[..., stretched].clip(-1, 1)
        return normalized

    def denormalize(self, normalized) -> np.ndarray:
        """The inverse of `normalize` where nothing was clipped: float64 (..., A), in the actions' units."""
        return self._check(normalized) * self.half_range + self.center

    def save(self, path: str | Path) -> Path:
        """Write normalizer.json, whole or not at all. Returns its path."""
        values = {
            "mode": self.mode,
            "center": self.center.tolist(),
            "half_range": self.half_range.tolist(),
            "passthrough": list(self.passthrough),
            "count": self.count,
        }
        files.write_text(Path(path), json.dumps(values, indent=1))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> ActionNormalizer:
        """Read what `save` wrote. Raises TokenizerFilesError."""
        values = files.read_json(Path(path))
        names = {"mode", "center", "half_range", "passthrough", "count"}
        if values.keys() != names:
            raise TokenizerFilesError(f"{path} holds {sorted(values)}, expected {sorted(names)}; it is no normaliser of this program")
        try:
            return cls(**values)
        except (ActionTokenizerError, TypeError, ValueError) as error:
            raise TokenizerFilesError(f"{path}: {error}") from error

    def _check(self, actions) -> np.ndarray:
        array = check_actions(actions)
        if array.shape[-1] != self.action_dim:
            raise BadActions(f"actions have {array.shape[-1]} dimensions, this normaliser was fitted on {self.action_dim}")
        return array


def _dims(dims: Sequence[int], action_dim: int) -> list[int]:
    """Dimensions counted from 0, ascending. Raises ActionTokenizerError for one that does not exist."""
    bad = [dim for dim in dims if not -action_dim <= dim < action_dim]
    if bad:
        raise ActionTokenizerError(f"passthrough names dimension {bad[0]}, but actions have {action_dim}")
    return sorted({dim % action_dim for dim in dims})
