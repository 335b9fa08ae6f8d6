"""Stands in for a person at a 3-D mouse who shows the new task, and records what they do as a LeRobot v2.1 dataset.

    python -m examples.finetune.teleoperation output_dir=outputs/pointing/recorded episodes=50 seed=0

A person is slow, aims badly, stops to look, corrects, and their hand trembles; no two attempts are alike. What is written is what a
recorder of LeRobot's would write: the pose that the arm was sent to and the one that was measured, as positions, quaternions and the
opening of the hand, and two cameras, all under names of its own. Nothing in it is emu3-vla's: `mapping.yaml` says what it means.

Every episode depends on (seed, its number) alone. Attempts that failed are thrown away, as people do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from emu3_vla.data.recordings.lerobot import INFO
from emu3_vla.data.recordings.lerobot_v21 import Target
from emu3_vla.data.recordings.recording import Column, Part, Picture, Recording, Schema, blocks_of
from emu3_vla.data.recordings.video import VideoConfig
from envs.robot import RobotEnv
from envs.spec import (
    CONTROL_HZ,
    GRIPPER_CLOSE,
    GRIPPER_OPEN,
    MAX_RELATIVE_POSITION_M,
    MAX_RELATIVE_ROTATION_RAD,
    OBSERVATION,
    RGB_GRIPPER,
    RGB_STATIC,
    ROBOT_OBS,
)
from eval.progress import LiveLine
from examples.finetune.task import SENTENCES, begin, make_env, place

UNITS = np.repeat([MAX_RELATIVE_POSITION_M, MAX_RELATIVE_ROTATION_RAD], 3)
MAX_STEPS = 400
ATTEMPTS = 20
GOOD_ENOUGH_M = 0.025  # from the place, where a person leaves it at that
OPEN_WIDTH_M = 0.08
UPRIGHT_RAD = np.array([np.pi, 0.0, np.pi / 2])  # Euler angles of a hand that points down, as at home

POSE_NAMES = ["x", "y", "z", "qx", "qy", "qz", "qw", "gripper"]
CAMERAS = {"observation.images.front": RGB_STATIC, "observation.images.wrist": RGB_GRIPPER}
SCHEMA = Schema(
    rate_hz=CONTROL_HZ,
    columns={key: Column(dtype="float32", shape=(8,), names=POSE_NAMES) for key in ("action", "observation.state")},
    cameras={key: Picture(height=OBSERVATION[ours].shape[0], width=OBSERVATION[ours].shape[1]) for key, ours in CAMERAS.items()},
    robot="simulated_arm",
)


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How one person moves in one attempt."""

    speed: float  # at the middle of a reach, in actions an axis: 0.3 is 6 mm a step, 18 cm/s
    aim: float  # standard deviation of a reach's end, as a share of its length
    tremor: float  # standard deviation of the trembling, in actions
    looking_steps: tuple[int, int]  # shortest and longest stop between two reaches

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Manner:
        return cls(speed=rng.uniform(0.3, 0.6), aim=rng.uniform(0.05, 0.12), tremor=rng.uniform(0.01, 0.04), looking_steps=(3, 9))


class Operator:
    """One attempt at pointing to `place_m` (3,). `act` is asked once a control step, with the tool's pose as the person sees it."""

    def __init__(self, rng: np.random.Generator, place_m: np.ndarray, manner: Manner | None = None):
        self.rng, self.place_m, self.manner = rng, place_m, manner or Manner.drawn(rng)
        self.gripper, self._tremor = GRIPPER_OPEN, np.zeros(6)
        self._seen, self._upright = np.zeros(6), UPRIGHT_RAD + self.rng.normal(0, 0.04, 3)
        self._plan = self._show()

    def act(self, tool: np.ndarray) -> np.ndarray:
        """The next action (7,), given the tool's pose (6,)."""
        self._seen = np.asarray(tool, np.float64)
        moved = next(self._plan)
        # A hand trembles slowly: what is left of the last step's trembling, and some more.
        self._tremor = 0.8 * self._tremor + self.rng.normal(0, 0.6 * self.manner.tremor, 6)
        return np.r_[(moved + self._tremor * np.repeat([1.0, 0.3], 3)).clip(-1, 1), self.gripper]

    def _show(self) -> Iterator[np.ndarray]:
        yield from self._look()
        self.gripper = GRIPPER_CLOSE
        yield from self._reach(self.place_m + [0, 0, self.rng.uniform(0.06, 0.12)])
        yield from self._look()
        while True:  # until somebody sees that it is done
            while np.linalg.norm(self._seen[:3] - self.place_m) > GOOD_ENOUGH_M:
                yield from self._reach(self.place_m, speed=0.7 * self.manner.speed)
                yield from self._look()
            yield np.zeros(6)

    def _reach(self, goal: np.ndarray, speed: float = 0.0) -> Iterator[np.ndarray]:
        """A reach towards `goal` (3,) that ends about there: slow, fast, slow, along the smoothest curve (minimum jerk)."""
        way = goal - self._seen[:3]
        way = way + self.rng.normal(0, self.manner.aim * np.linalg.norm(way) / np.sqrt(3), 3)
        turn = (self._upright - self._seen[3:] + np.pi) % (2 * np.pi) - np.pi + self.rng.normal(0, 0.03, 3)  # the wrist is held about level
        units = np.r_[way, turn] / UNITS
        steps = max(4, int(np.ceil(1.875 * np.abs(units).max() / (speed or self.manner.speed))))
        time = np.arange(steps + 1) / steps
        done = time**3 * (10 - 15 * time + 6 * time**2)
        yield from np.diff(done)[:, None] * units

    def _look(self) -> Iterator[np.ndarray]:
        for _ in range(self.rng.integers(*self.manner.looking_steps, endpoint=True)):
            yield np.zeros(6)


@dataclass
class Attempt:
    """What was recorded of one attempt, a row or frame a step. solved: whether the task was done at its end."""

    sent: list[np.ndarray]
    measured: list[np.ndarray]
    frames: dict[str, list[np.ndarray]]
    solved: bool = False


def attempt(env: RobotEnv, rng: np.random.Generator) -> Attempt:
    """The operator tries once, filmed."""
    state, judge = begin(env, rng)
    operator, kept = Operator(rng, place(env.info())), Attempt([], [], {key: [] for key in CAMERAS})
    while len(kept.sent) < MAX_STEPS and not kept.solved:
        seen = env.observe()
        for key, ours in CAMERAS.items():
            kept.frames[key].append(seen[ours])
        kept.measured.append(_row(seen[ROBOT_OBS][:6], seen[ROBOT_OBS][6] / OPEN_WIDTH_M))
        action = operator.act(state[ROBOT_OBS][:6])
        state, _, _, _, info = env.step(action)
        kept.sent.append(_row(env.sent()[0], float(action[-1] > 0)))
        kept.solved = judge(info)
    return kept


def _row(pose: np.ndarray, opening: float) -> np.ndarray:
    """Position [m], quaternion (x, y, z, w), opening of the hand from 0 to 1: float32 (8,)."""
    quaternion = Rotation.from_euler("xyz", pose[3:]).as_quat()
    quaternion *= np.sign(quaternion[0])  # q and -q are one turn; of a hand that points down x is far from zero, so this one never jumps
    return np.r_[pose[:3], quaternion, np.clip(opening, 0, 1)].astype(np.float32)


def record(folder: Path, episodes: int, seed: int, line: LiveLine | None = None) -> int:
    """Write a dataset of so many solved attempts. Returns how many failed. Raises RuntimeError where one episode fails again and again."""
    told = [(SENTENCES[number % len(SENTENCES)],) for number in range(episodes)]
    target, env, parts, first_step, failed = Target(folder, SCHEMA, told, VideoConfig()), make_env(), [], 0, 0
    for number in range(episodes):
        rng = np.random.default_rng([seed, number])
        for _ in range(ATTEMPTS):
            kept = attempt(env, rng)
            if kept.solved:
                break
            failed += 1
        else:
            raise RuntimeError(f"episode {number} of seed {seed} failed {ATTEMPTS} times in a row: can the arm still reach the drawer?")
        part = Part(number=number, first_episode=number, first_step=first_step, lengths=(len(kept.sent),))
        parts.append((part, target.write_part(part, iter([_recording(number, told[number], kept)]))))
        first_step += len(kept.sent)
        if line is not None:
            line.show(f"{number + 1} of {episodes} episodes · {first_step} steps · {failed} attempts failed")
    target.finish(parts)
    env.close()
    return failed


def _recording(number: int, told: tuple[str, ...], kept: Attempt) -> Recording:
    steps = len(kept.sent)
    return Recording(
        where=f"attempt {number}",
        columns={"action": np.array(kept.sent), "observation.state": np.array(kept.measured)},
        instructions=told,
        instruction_of=np.zeros(steps, np.int64),
        frame_step=np.arange(steps),
        frames=lambda camera: blocks_of(iter(kept.frames[camera])),
    )


def main(output_dir: str, episodes: int = 50, seed: int = 0) -> None:
    """Record into `output_dir`. What was cut off before its last episode is recorded again, to the same files."""
    folder = Path(output_dir)
    if (folder / INFO).is_file():
        print(f"{folder} is recorded already; delete it or choose another output_dir=")
        return
    if strange := [path.name for path in folder.glob("*") if path.name not in ("data", "videos", "meta")]:
        raise SystemExit(f"{folder} holds {strange[0]}, which is no part of a recording; choose another output_dir=")
    with LiveLine() as line:
        failed = record(folder, episodes, seed, line)
    print(f"{episodes} episodes ({failed} attempts failed and were thrown away): {folder}")


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main(**{name: value if name == "output_dir" else int(value) for name, value in given.items()})
