"""What passes between formats: an episode whose numbers are in memory and whose frames are still on disk.

Axes: T control steps, F frames, n frames of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# What is held of a camera at once.
FRAMES_PER_BLOCK = 64


class RecordingError(ValueError):
    """A dataset that is missing parts, damaged, contradicts itself, or cannot be what is asked of it; says where."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One value a step. dtype: numpy's name, or "string". shape: of one step's value. names: of its entries, in whatever form the
    dataset gives them."""

    dtype: str
    shape: tuple[int, ...] = ()
    names: Any = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Size of a camera's frames [pixels]."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}×{self.height}"


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What every episode of a dataset has.

    every_step: whether each camera has a frame at each step. canonical: whether the columns and cameras are those of envs.spec.Episode (and
    its `extra`); else they have the names that the dataset gives them. about: what else the dataset says of itself, JSON-able.
    """

    rate_hz: float
    columns: dict[str, Column]
    cameras: dict[str, Picture]
    robot: str = ""
    every_step: bool = True
    canonical: bool = False
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One episode.

    where           what errors call it
    columns         (T, ...) each, as Schema.columns says
    instructions    what was asked for; several where it changed on the way
    instruction_of  int64 (T,): which of these was in force
    task            name of the task, "" where the format has none
    time_s          float64 (T,): by the recorder's clock; None where only the rate is known
    frame_step      int64 (F,): ascending; the steps that have a frame, taken before the step's action
    frames          camera -> its F frames in blocks uint8 (n, height, width, 3)
    info            what else was said of this episode, JSON-able
    """

    where: str
    columns: dict[str, np.ndarray]
    instructions: tuple[str, ...]
    instruction_of: np.ndarray
    frame_step: np.ndarray
    frames: Callable[[str], Iterator[np.ndarray]]
    task: str = ""
    time_s: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.instruction_of)


class Source(Protocol):
    """A dataset to read. lengths: steps of each episode. told: its instructions. losses: what it holds that no Recording carries."""

    format: str
    path: Path
    schema: Schema
    lengths: list[int]
    told: list[tuple[str, ...]]
    losses: list[str]

    def read(self, number: int) -> Recording:
        """Episode `number`, counted from 0. Raises RecordingError."""
        ...


class Target(Protocol):
    """A dataset to write, part by part. Parts may be written in any order and by several processes; each appears whole or not at all.

    losses: what the format cannot hold of what it is given. steps_per_part: a part ends with the episode that reaches so many steps.
    """

    format: str
    losses: list[str]
    steps_per_part: int

    def write_part(self, part: Part, recordings: Iterator[Recording]) -> dict[str, Any]:
        """Write these episodes; returns what `finish` must know of them, JSON-able."""
        ...

    def finish(self, parts: list[tuple[Part, dict[str, Any]]]) -> None:
        """Write what is said of all parts together. Before this the folder is no dataset of that format."""
        ...


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive episodes that are written together. first_episode, first_step: counted over the whole dataset."""

    number: int
    first_episode: int
    first_step: int
    lengths: tuple[int, ...]


def parts_of(lengths: list[int], steps_per_part: int) -> list[Part]:
    """Cut a dataset into parts of whole episodes. Depends on the lengths alone, so every run cuts alike."""
    parts: list[Part] = []
    first_episode = first_step = steps = 0
    for number, length in enumerate(lengths):
        steps += length
        if steps >= steps_per_part or number == len(lengths) - 1:
            chosen = tuple(lengths[first_episode : number + 1])
            parts.append(Part(number=len(parts), first_episode=first_episode, first_step=first_step, lengths=chosen))
            first_episode, first_step, steps = number + 1, first_step + steps, 0
    return parts


def blocks_of(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Single frames (H, W, 3) as blocks (n, H, W, 3)."""
    block: list[np.ndarray] = []
    for frame in frames:
        block.append(frame)
        if len(block) == FRAMES_PER_BLOCK:
            yield np.stack(block)
            block = []
    if block:
        yield np.stack(block)


def every_step(recording: Recording, camera: str) -> Iterator[np.ndarray]:
    """A frame for each of the T steps, in blocks: between frames the last one is held, before the first one the first.

    Raises RecordingError for an episode without a frame.
    """
    if not len(recording.frame_step):
        raise RecordingError(f"{recording.where} has no frame of {camera!r}, and the format needs one at each step")
    blocks = recording.frames(camera)
    if len(recording.frame_step) == len(recording):
        yield from blocks
        return
    ends = np.append(recording.frame_step[1:], len(recording))
    repeats = np.diff(ends, prepend=0)
    start = 0
    for block in blocks:
        yield from blocks_of(frame for frame, times in zip(block, repeats[start:], strict=False) for _ in range(times))
        start += len(block)


def fresh(recording: Recording) -> np.ndarray:
    """bool (T,): whether the step has a frame of its own."""
    steps = np.zeros(len(recording), bool)
    steps[recording.frame_step] = True
    return steps


def require_finite(recording: Recording, names: list[str]) -> None:
    """Raise RecordingError where one of these columns holds a NaN or an infinity."""
    for name in names:
        values = recording.columns[name]
        if values.dtype.kind != "f":
            continue
        bad = ~np.isfinite(values.reshape(len(values), -1))
        if bad.any():
            step, entry = (int(index) for index in np.argwhere(bad)[0])
            raise RecordingError(
                f"{recording.where}: {name!r} is {values.reshape(len(values), -1)[step, entry]} at step {step}, entry {entry} "
                f"({int(bad.any(axis=1).sum())} of {len(values)} steps are not finite); an arm cannot be taught by that: leave the episode "
                "out with skip=[…]"
            )


def is_action(name: str) -> bool:
    """Whether a column is one of the commands given to the robot, by the names that the formats use."""
    return name.split(".")[0] in ("action", "actions", "rel_actions", "abs_actions")
