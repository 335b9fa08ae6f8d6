"""What the arm feels of itself, in words: numbers of its state, each cut into bins, each bin a word of the text tokenizer.

    words = StateWords.fit(robot_obs, ("x", "y", "z", "yaw", "width"))        # robot_obs (N, 15)
    words.sentence(words.numbers(observation["robot_obs"]))                   # "<x 17><y 203><z 88><yaw 64><width 255>"

A camera shows the hand to a few centimetres; the arm knows it to a millimetre. As words it is ids like any other, in front of the actions.
Precedents: the state in the prompt of pi0-FAST (arXiv 2501.09747), PaliGemma's <loc0123>.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, pi
from typing import Any

import numpy as np

from envs.spec import OBSERVATION, ROBOT_OBS

BINS = 256
ENTRIES = {"x": 0, "y": 1, "z": 2, "roll": 3, "pitch": 4, "yaw": 5, "width": 6}
"""Of robot_obs: tool position [m], tool Euler angles [rad], gripper width [m]."""
ANGLES = ("roll", "pitch", "yaw")


class StateWordsError(ValueError):
    """A state that cannot be said, or words that cannot be."""


@dataclass(frozen=True)
class StateWords:
    """Which entries of the state are said, and the range (S,) of each that is cut into `bins`; what lies beyond falls into the last one."""

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    bins: int = BINS

    def __post_init__(self):
        check_names(self.names)
        if not len(self.names) == len(self.low) == len(self.high) or self.bins < 2:
            raise StateWordsError(f"{len(self.names)} names have {len(self.low)} and {len(self.high)} limits and {self.bins} bins")
        for name, low, high in zip(self.names, self.low, self.high, strict=True):
            if not (isfinite(low) and isfinite(high) and low < high):
                raise StateWordsError(f"the range of {name} is [{low}, {high}], expected two numbers, the first below the second")

    @classmethod
    def fit(cls, states: np.ndarray, names: Sequence[str], bins: int = BINS) -> StateWords:
        """Ranges that hold these states (N, 15); angles, which go round, have [-pi, pi].

        Raises StateWordsError for none, for one that is not finite, and for an entry that never changes.
        """
        check_names(names)
        columns = np.asarray(states, np.float64)[:, [ENTRIES[name] for name in names]]
        low, high = [], []
        for name, values in zip(names, columns.T, strict=True):
            missing = np.count_nonzero(~np.isfinite(values))
            if missing or not len(values):
                raise StateWordsError(f"{name} of the arm's state is missing in {missing} of {len(values)} steps; leave it out")
            if np.ptp(values) == 0:
                raise StateWordsError(f"{name} of the arm's state is {values[0]:g} in all of {len(values)} steps; leave it out")
            low.append(-pi if name in ANGLES else float(values.min()))
            high.append(pi if name in ANGLES else float(values.max()))
        return cls(tuple(names), tuple(low), tuple(high), bins)

    def numbers(self, robot_obs: np.ndarray) -> np.ndarray:
        """Bins of states (..., 15): uint16 (..., S). Raises StateWordsError for one that is not finite or of another size."""
        robot_obs = np.asarray(robot_obs, np.float64)
        if robot_obs.shape[-1:] != OBSERVATION[ROBOT_OBS].shape:
            raise StateWordsError(f"{ROBOT_OBS} has shape {robot_obs.shape}, expected (..., {OBSERVATION[ROBOT_OBS].shape[0]})")
        values = robot_obs[..., [ENTRIES[name] for name in self.names]]
        if not np.isfinite(values).all():
            raise StateWordsError(f"{ROBOT_OBS} is not finite in {', '.join(self.names)}: {values}")
        turns = np.array([name in ANGLES for name in self.names])
        values = np.where(turns, (values + pi) % (2 * pi) - pi, values)
        low, high = np.array(self.low), np.array(self.high)
        return ((values - low) / (high - low) * self.bins).clip(0, self.bins - 1).astype(np.uint16)

    def word(self, entry: int, number: int) -> str:
        """Of one bin of one entry."""
        return f"<{self.names[entry]} {number}>"

    def sentence(self, numbers: np.ndarray) -> str:
        """Of the bins (S,) of one state."""
        return "".join(self.word(entry, int(number)) for entry, number in enumerate(numbers))

    @cached_property
    def words(self) -> list[str]:
        """All there are, entry by entry."""
        return [self.word(entry, number) for entry in range(len(self.names)) for number in range(self.bins)]

    def spelled(self, encode: Callable[[str], Sequence[int]]) -> SpelledStates:
        """The same in the ids of a text tokenizer."""
        return SpelledStates(self, [list(encode(word)) for word in self.words])

    def fields(self) -> dict[str, Any]:
        """As plain values, for a manifest."""
        return {"names": list(self.names), "low": list(self.low), "high": list(self.high), "bins": self.bins}

    @classmethod
    def of(cls, fields: dict[str, Any]) -> StateWords:
        """From what `fields` gave. Raises StateWordsError."""
        try:
            return cls(tuple(fields["names"]), tuple(fields["low"]), tuple(fields["high"]), fields["bins"])
        except (TypeError, KeyError) as error:
            raise StateWordsError(f"{fields} does not say how a state is put into words: {error}") from error


class SpelledStates:
    """States as text ids. ids_of: of each word, in the order of StateWords.words."""

    def __init__(self, words: StateWords, ids_of: list[list[int]]):
        self.words, self._ids_of = words, ids_of
        self._starts = np.arange(len(words.names)) * words.bins

    @property
    def most_ids(self) -> int:
        """Of the longest state."""
        by_entry = [self._ids_of[start : start + self.words.bins] for start in self._starts]
        return sum(max(map(len, ids)) for ids in by_entry)

    def ids(self, numbers: np.ndarray) -> list[int]:
        """Text ids of the bins (S,) of one state."""
        return [index for word in (self._starts + numbers).tolist() for index in self._ids_of[word]]

    def single_ids(self) -> np.ndarray | None:
        """Id of each word, int64 (S, bins), where the text tokenizer has every word as one id."""
        if any(len(ids) != 1 for ids in self._ids_of):
            return None
        return np.array(self._ids_of, np.int64).reshape(len(self.words.names), self.words.bins)


def check_names(names: Sequence[str]) -> None:
    """Raise StateWordsError for names that are no entries of the state, or twice the same."""
    for name in names:
        if name not in ENTRIES:
            raise StateWordsError(f"the arm's state has no {name!r}, only {', '.join(ENTRIES)}")
    if not names or len(set(names)) != len(names):
        raise StateWordsError(f"entries of the arm's state are {', '.join(names) or 'none'}, expected some, each once")
