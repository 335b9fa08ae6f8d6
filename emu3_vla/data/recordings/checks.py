"""What is suspicious about an episode: found from its numbers, and from its frames while they go by.

Thresholds are meant to find what a person would want to look at, not to judge: a gripper that stays shut may well be the task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from emu3_vla.data.recordings.lerobot import CLOCK_TOLERANCE_S, LeRobotSource
from emu3_vla.data.recordings.recording import Recording, RecordingError, Schema, Source, is_action
from emu3_vla.data.recordings.video import video_facts

FROZEN_S = 1.0  # a picture that stands so long
CHANGED_LEVELS = 12  # a pixel that differs by more from one frame to the next has changed: less is the codec
CHANGED_SHARE = 0.002  # of the pixels; fewer that change are no motion
MOVED = 0.05  # while some state changes by this share of its range
JUMP_TIMES = 12.0  # a step so many times its entry's larger ones (95th percentile)
JUMP_SHARE = 0.15  # and at least this share of the entry's range over all episodes: what rests trembles by less
FINGERS = ("robot_obs", 6)  # CALVIN's fingers close within a step or two
COARSE = 4  # every so many pixels are compared
GRIPPER_MOVES_IN = 0.5  # a gripper that does not move is suspicious where it moves in this share of the other episodes
SHORT_SHARE = 0.2  # of the median length


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something to look at. step: where it begins; None: the whole episode."""

    episode: int
    kind: str
    what: str
    step: int | None = None

    def record(self) -> dict:
        return asdict(self)


def findings_in(source: Source, recording: Recording, number: int, frames: bool) -> Iterator[Finding]:
    """Everything but what only a comparison with other episodes shows."""
    yield from _not_finite(recording, number)
    yield from _clock(recording, source.schema, number)
    if not any(sentence.strip() for sentence in recording.instructions):
        yield Finding(episode=number, kind="no instruction", what="nothing says what was asked for")
    if isinstance(source, LeRobotSource):
        yield from _video_clocks(source, number)
    if frames:
        for camera in source.schema.cameras:
            yield from _frozen(recording, source.schema, camera, number)


def _not_finite(recording: Recording, number: int) -> Iterator[Finding]:
    for name, values in recording.columns.items():
        if values.dtype.kind != "f":
            continue
        bad = ~np.isfinite(values.reshape(len(values), -1))
        if not is_action(name):
            bad = bad & ~bad.all(axis=0)  # an entry that is never there was not recorded
        if bad.any():
            steps = np.flatnonzero(bad.any(axis=1))
            what = f"{name}: {len(steps)} of {len(values)} steps are NaN or infinite"
            yield Finding(episode=number, kind="not finite", what=what, step=int(steps[0]))


def _clock(recording: Recording, schema: Schema, number: int) -> Iterator[Finding]:
    if recording.time_s is None or len(recording) < 2:
        return
    gaps = np.diff(recording.time_s)
    late = np.abs(recording.time_s - recording.time_s[0] - np.arange(len(recording)) / schema.rate_hz)
    if (gaps <= 0).any():
        step = int(np.flatnonzero(gaps <= 0)[0]) + 1
        yield Finding(episode=number, kind="clock", what=f"time does not go on at {recording.time_s[step]:.3f} s", step=step)
    elif late.max() > CLOCK_TOLERANCE_S:
        step, rate = int(np.argmax(late > CLOCK_TOLERANCE_S)), 1 / np.median(gaps)
        what = f"off the even rate by up to {late.max():.3g} s; median {rate:.4g} Hz, longest gap {gaps.max():.3g} s"
        yield Finding(episode=number, kind="clock", what=what, step=step)


def _video_clocks(source: LeRobotSource, number: int) -> Iterator[Finding]:
    """Frames that are missing, or not where the rows' clock has them: from the files' own times, without decoding."""
    length, rate = source.lengths[number], source.schema.rate_hz
    for key in source.video_keys:
        path, first = source.video(number, key)
        times = video_facts(path, f"episode {number} of {source.path}").times_s * rate - first
        own = times[(times > -0.5) & (times < length - 0.5)]
        steps = np.round(own).astype(int)
        missing = np.setdiff1d(np.arange(length), steps)
        if len(missing):
            what = f"{key}: {len(missing)} of {length} frames are not in {path.name}"
            yield Finding(episode=number, kind="missing frames", what=what, step=int(missing[0]))
        if len(own) and np.abs(own - steps).max() / rate > CLOCK_TOLERANCE_S:
            worst = int(np.argmax(np.abs(own - steps)))
            what = f"{key}: a frame is {1000 * abs(own[worst] - steps[worst]) / rate:.1f} ms from its row"
            yield Finding(episode=number, kind="clock", what=what, step=int(steps[worst]))


@dataclass(frozen=True, kw_only=True)
class _Jump:
    """A value that is suddenly elsewhere. size: by how much, a range of its entry's."""

    name: str
    entry: int
    size: float
    finding: Finding


def _entries(recording: Recording) -> Iterator[tuple[str, int, np.ndarray]]:
    """Every number that an episode records, as float64 (T,)."""
    for name, values in recording.columns.items():
        if values.dtype.kind == "f" and len(values) >= 8:
            flat = values.reshape(len(values), -1).astype(np.float64)
            yield from ((name, entry, flat[:, entry]) for entry in range(flat.shape[1]))


def _jumps(recording: Recording, schema: Schema, number: int) -> Iterator[_Jump]:
    for name, entry, values in _entries(recording):
        step = _jump(values)
        if step is None or (schema.canonical and (name, entry) == FINGERS):
            continue
        before, after = values[step - 1], values[step]
        what = f"{name}[{entry}] goes from {before:.4g} to {after:.4g} in one step"
        finding = Finding(episode=number, kind="jump", what=what, step=step)
        yield _Jump(name=name, entry=entry, size=abs(after - before), finding=finding)


def _jump(values: np.ndarray) -> int | None:
    """Step (T,) after which a value is somewhere else. Switches, turns by 2π and what is not finite do not count."""
    if not np.isfinite(values).all() or len(np.unique(values)) <= 4:
        return None
    moved = np.abs(np.diff(values))
    moved[np.abs(moved - 2 * np.pi) < 0.2] = 0
    far = (moved > JUMP_TIMES * np.percentile(moved, 95)) & (moved > 1e-9)
    return int(np.argmax(far)) + 1 if far.any() else None


def _frozen(recording: Recording, schema: Schema, camera: str, number: int) -> Iterator[Finding]:
    changes = np.concatenate([[1.0], *_changes(recording, camera)])
    still = changes <= CHANGED_SHARE
    for start, end in _runs(still):
        first, last = int(recording.frame_step[max(start - 1, 0)]), int(recording.frame_step[end - 1])
        seconds = (last - first) / schema.rate_hz
        if seconds >= FROZEN_S and _moves(recording, first, last):
            what = f"{camera} shows one picture for {seconds:.1f} s while the arm moves"
            yield Finding(episode=number, kind="frozen camera", what=what, step=first)


def _changes(recording: Recording, camera: str) -> Iterator[np.ndarray]:
    """Share of the pixels that change from each frame to the next."""
    last = None
    for block in recording.frames(camera):
        coarse = block[:, ::COARSE, ::COARSE].astype(np.int16)
        joined = coarse if last is None else np.concatenate([last, coarse])
        yield (np.abs(np.diff(joined, axis=0)).max(axis=3) > CHANGED_LEVELS).mean(axis=(1, 2))
        last = coarse[-1:]


def _runs(true: np.ndarray) -> list[tuple[int, int]]:
    """Starts and ends of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], true, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _moves(recording: Recording, first: int, last: int) -> bool:
    """Whether a state changes between two steps by more than a share of its range in the episode. Without states: taken to."""
    states = [
        values.reshape(len(values), -1).astype(np.float64)
        for name, values in recording.columns.items()
        if values.dtype.kind == "f" and not is_action(name) and not name.startswith("source.")
    ]
    if not states:
        return True
    every = np.concatenate(states, axis=1)
    every = every[:, np.isfinite(every).all(axis=0)]
    span, moved = np.ptp(every, axis=0), np.ptp(every[first : last + 1], axis=0)
    return bool((moved > MOVED * np.maximum(span, 1e-3)).any())


@dataclass(kw_only=True)
class Comparison:
    """What only all episodes together show: duplicates, jumps, grippers that never move, episodes that are much too short.

    bounds: least and greatest of each entry of each column.
    """

    seen: dict[str, int]
    lengths: dict[int, int]
    still_gripper: list[int]
    jumps: list[_Jump]
    bounds: dict[tuple[str, int], tuple[float, float]]
    with_gripper: int = 0

    @classmethod
    def empty(cls) -> Comparison:
        return cls(seen={}, lengths={}, still_gripper=[], jumps=[], bounds={})

    def add(self, recording: Recording, schema: Schema, number: int) -> Iterator[Finding]:
        """Take note of an episode; yields a finding where an earlier one is the same."""
        self.lengths[number] = len(recording)
        self.jumps += _jumps(recording, schema, number)
        for name, entry, values in _entries(recording):
            if len(known := values[np.isfinite(values)]):
                low, high = self.bounds.get((name, entry), (np.inf, -np.inf))
                self.bounds[name, entry] = min(low, known.min()), max(high, known.max())
        commands = [recording.columns[name] for name in sorted(recording.columns) if is_action(name)]
        if commands:
            digest = hashlib.sha256(b"".join(np.ascontiguousarray(values).tobytes() for values in commands)).hexdigest()
            if digest in self.seen:
                yield Finding(episode=number, kind="duplicate", what=f"every action is that of episode {self.seen[digest]}")
            self.seen.setdefault(digest, number)
        gripper = gripper_of(recording, schema)
        if gripper is not None:
            self.with_gripper += 1
            if np.ptp(gripper) == 0:
                self.still_gripper.append(number)

    def findings(self) -> Iterator[Finding]:
        for jump in self.jumps:
            low, high = self.bounds[jump.name, jump.entry]
            if jump.size > JUMP_SHARE * (high - low):
                yield jump.finding
        moving = self.with_gripper - len(self.still_gripper)
        if self.with_gripper and moving / self.with_gripper >= GRIPPER_MOVES_IN:
            for number in self.still_gripper:
                yield Finding(episode=number, kind="gripper", what=f"never moves; it does in {moving} of {self.with_gripper} episodes")
        median = float(np.median(list(self.lengths.values()))) if self.lengths else 0
        for number, length in self.lengths.items():
            if length < SHORT_SHARE * median:
                yield Finding(episode=number, kind="short", what=f"{length} steps, where half of the episodes have {median:g} and more")


def gripper_of(recording: Recording, schema: Schema) -> np.ndarray | None:
    """The gripper's command (T,), where it can be told which that is."""
    if schema.canonical:
        return recording.columns["actions"][:, 6]
    for name, column in schema.columns.items():
        if not is_action(name):
            continue
        values = recording.columns[name].reshape(len(recording), -1)
        if "gripper" in name:
            return values[:, -1]
        names = column.names.values() if isinstance(column.names, dict) else [column.names]
        flat = [str(entry) for group in names if isinstance(group, list) for entry in group]
        found = [index for index, entry in enumerate(flat) if "gripper" in entry.lower()]
        if found and found[0] < values.shape[1]:
            return values[:, found[0]]
    return None


def damaged(number: int, error: RecordingError) -> Finding:
    """An episode that could not be read, as a finding."""
    return Finding(episode=number, kind="damaged", what=str(error))
