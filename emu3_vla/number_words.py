"""Numbers as words: each number is cut into bins, and each bin of each number is a word of the text tokenizer.

    words = StateWords.fit(robot_obs, ("x", "y", "z", "yaw", "width"))        # robot_obs (N, 15)
    words.sentence(words.numbers(observation["robot_obs"]))                   # "<x 17><y 203><z 88><yaw 64><width 255>"

Two things are said so. What the arm feels of itself: a camera shows the hand to a few centimetres, the arm knows it to a millimetre. And
what the arm sees, where the recordings know what there was to see: a model that has to say where things are learns to see them.
As words both are ids like any other, in front of the actions.
Precedents: the state in the prompt of pi0-FAST (arXiv 2501.09747), PaliGemma's <loc0123>, embodied chain of thought (arXiv 2407.08693).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, pi
from typing import Any, Self

import numpy as np

from envs.spec import OBSERVATION, ROBOT_OBS

BINS = 256
ENTRIES = {"x": 0, "y": 1, "z": 2, "roll": 3, "pitch": 4, "yaw": 5, "width": 6}
"""Of robot_obs: tool position [m], tool Euler angles [rad], gripper width [m]."""
ANGLES = ("roll", "pitch", "yaw")


class NumberWordsError(ValueError):
    """Numbers that cannot be said, or words that cannot be."""


@dataclass(frozen=True)
class NumberWords:
    """S numbers by name, and the range of each that is cut into `bins`; what lies beyond falls into the last one.

    powers: bins are equally wide in sign(v)·|v|^power; below 1 they are finer near zero. None given: 1 for each. relative: of each the name
    of the number, of these or of the arm's state, that it must be added to for its place or heading in the world; empty where there is
    none. None given: empty for each.
    """

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    bins: int = BINS
    powers: tuple[float, ...] = ()
    relative: tuple[str, ...] = ()

    def __post_init__(self):
        if self.relative and len(self.relative) != len(self.names):
            raise NumberWordsError(f"relative is {self.relative}, expected {len(self.names)} names, or none")
        for name in filter(None, self.relative):
            if name not in (*self.names, *ENTRIES):
                raise NumberWordsError(f"relative names {name!r}, expected one of {', '.join((*self.names, *ENTRIES))}")
        if self.powers and (len(self.powers) != len(self.names) or not all(0 < power <= 1 for power in self.powers)):
            raise NumberWordsError(f"powers are {self.powers}, expected {len(self.names)} above 0 and up to 1, or none")
        if not self.names or len(set(self.names)) != len(self.names):
            raise NumberWordsError(f"numbers are {', '.join(self.names) or 'none'}, expected some, each once")
        if not len(self.names) == len(self.low) == len(self.high) or self.bins < 2:
            raise NumberWordsError(f"{len(self.names)} names have {len(self.low)} and {len(self.high)} limits and {self.bins} bins")
        for name, low, high in zip(self.names, self.low, self.high, strict=True):
            if not (isfinite(low) and isfinite(high) and low < high):
                raise NumberWordsError(f"the range of {name} is [{low}, {high}], expected two numbers, the first below the second")

    @classmethod
    def within(
        cls,
        limits: Mapping[str, tuple[float, float]],
        bins: int = BINS,
        powers: Mapping[str, float] | None = None,
        relative: Mapping[str, str] | None = None,
    ) -> Self:
        """Of numbers whose ranges are known. powers: of those that have one below 1. relative: of those that are."""
        low, high = (tuple(float(limit[side]) for limit in limits.values()) for side in (0, 1))
        of_each = tuple(float(powers.get(name, 1)) for name in limits) if powers else ()
        return cls(tuple(limits), low, high, bins, of_each, tuple(relative.get(name, "") for name in limits) if relative else ())

    def numbers(self, values: np.ndarray) -> np.ndarray:
        """Bins of values (..., S): uint16 (..., S). Raises NumberWordsError for one that is not finite, or for another count."""
        values = np.asarray(values, np.float64)
        if values.shape[-1:] != (len(self.names),):
            raise NumberWordsError(f"values have shape {values.shape}, expected (..., {len(self.names)}): {', '.join(self.names)}")
        if not np.isfinite(values).all():
            raise NumberWordsError(f"not finite: {', '.join(self.names)} are {values}")
        low, high = self._warped(np.array(self.low)), self._warped(np.array(self.high))
        return ((self._warped(values) - low) / (high - low) * self.bins).clip(0, self.bins - 1).astype(np.uint16)

    def values(self, numbers: np.ndarray) -> np.ndarray:
        """The middles of bins (..., S): float64 (..., S)."""
        low, high = self._warped(np.array(self.low)), self._warped(np.array(self.high))
        warped = low + (np.asarray(numbers) + 0.5) / self.bins * (high - low)
        return np.sign(warped) * np.abs(warped) ** (1 / np.array(self.powers or 1.0))

    def _warped(self, values: np.ndarray) -> np.ndarray:
        return np.sign(values) * np.abs(values) ** np.array(self.powers or 1.0)

    def word(self, entry: int, number: int) -> str:
        """Of one bin of one number."""
        return f"<{self.names[entry]} {number}>"

    def sentence(self, numbers: np.ndarray) -> str:
        """Of the bins (S,)."""
        return "".join(self.word(entry, int(number)) for entry, number in enumerate(numbers))

    @cached_property
    def words(self) -> list[str]:
        """All there are, number by number."""
        return [self.word(entry, number) for entry in range(len(self.names)) for number in range(self.bins)]

    def spelled(self, encode: Callable[[str], Sequence[int]]) -> SpelledNumbers:
        """The same in the ids of a text tokenizer."""
        return SpelledNumbers(self, [list(encode(word)) for word in self.words])

    def fields(self) -> dict[str, Any]:
        """As plain values, for a manifest."""
        plain = {"names": list(self.names), "low": list(self.low), "high": list(self.high), "bins": self.bins}
        return plain | {name: list(values) for name in ("powers", "relative") if (values := getattr(self, name))}

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        """From what `fields` gave. Raises NumberWordsError."""
        try:
            low, high = tuple(fields["low"]), tuple(fields["high"])
            return cls(tuple(fields["names"]), low, high, fields["bins"], *(tuple(fields.get(name, ())) for name in ("powers", "relative")))
        except (TypeError, KeyError) as error:
            raise NumberWordsError(f"{fields} does not say how numbers are put into words: {error}") from error


class StateWords(NumberWords):
    """Of some entries of the arm's state, by their names in ENTRIES."""

    def __post_init__(self):
        check_entries(self.names)
        super().__post_init__()

    @classmethod
    def fit(cls, states: np.ndarray, names: Sequence[str], bins: int = BINS) -> StateWords:
        """Ranges that hold these states (N, 15); angles, which go round, have [-pi, pi].

        Raises NumberWordsError for none, for one that is not finite, and for an entry that never changes.
        """
        check_entries(names)
        columns = np.asarray(states, np.float64)[:, [ENTRIES[name] for name in names]]
        limits = {}
        for name, values in zip(names, columns.T, strict=True):
            missing = np.count_nonzero(~np.isfinite(values))
            if missing or not len(values):
                raise NumberWordsError(f"{name} of the arm's state is missing in {missing} of {len(values)} steps; leave it out")
            if np.ptp(values) == 0:
                raise NumberWordsError(f"{name} of the arm's state is {values[0]:g} in all of {len(values)} steps; leave it out")
            limits[name] = (-pi, pi) if name in ANGLES else (values.min(), values.max())
        if len(limits) != len(names):
            raise NumberWordsError(f"numbers are {', '.join(names)}, expected each once")
        return cls.within(limits, bins)

    def numbers(self, robot_obs: np.ndarray) -> np.ndarray:
        """Bins of states (..., 15): uint16 (..., S). Raises NumberWordsError for one that is not finite or of another size."""
        robot_obs = np.asarray(robot_obs, np.float64)
        if robot_obs.shape[-1:] != OBSERVATION[ROBOT_OBS].shape:
            raise NumberWordsError(f"{ROBOT_OBS} has shape {robot_obs.shape}, expected (..., {OBSERVATION[ROBOT_OBS].shape[0]})")
        values = robot_obs[..., [ENTRIES[name] for name in self.names]]
        turns = np.array([name in ANGLES for name in self.names])
        return super().numbers(np.where(turns, (values + pi) % (2 * pi) - pi, values))


class SpelledNumbers:
    """Numbers as text ids. ids_of: of each word, in the order of NumberWords.words."""

    def __init__(self, words: NumberWords, ids_of: list[list[int]]):
        self.words, self._ids_of = words, ids_of
        self._starts = np.arange(len(words.names)) * words.bins

    @property
    def most_ids(self) -> int:
        """Of the longest sentence."""
        by_entry = [self._ids_of[start : start + self.words.bins] for start in self._starts]
        return sum(max(map(len, ids)) for ids in by_entry)

    def ids(self, numbers: np.ndarray) -> list[int]:
        """Text ids of the bins (S,)."""
        return [index for word in (self._starts + numbers).tolist() for index in self._ids_of[word]]

    def single_ids(self) -> np.ndarray | None:
        """Id of each word, int64 (S, bins), where the text tokenizer has every word as one id."""
        if any(len(ids) != 1 for ids in self._ids_of):
            return None
        return np.array(self._ids_of, np.int64).reshape(len(self.words.names), self.words.bins)


def check_entries(names: Sequence[str]) -> None:
    """Raise NumberWordsError for names that are no entries of the arm's state."""
    for name in names:
        if name not in ENTRIES:
            raise NumberWordsError(f"the arm's state has no {name!r}, only {', '.join(ENTRIES)}")
