"""Small recordings to convert: our own episodes, and a foreign arm's in LeRobot's layouts and names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from emu3_vla.data.episodes import EpisodeStore
from emu3_vla.data.recordings import lerobot_v21, lerobot_v30
from emu3_vla.data.recordings.recording import Column, Picture, Recording, Schema, parts_of
from emu3_vla.data.recordings.video import VideoConfig
from envs.spec import Episode

QUICK = VideoConfig(preset="ultrafast", crf=20)
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
RATE_HZ = 15


def picture(height: int, width: int, step: int, seed: int) -> np.ndarray:
    """A smooth picture with a square that moves two pixels a step: uint8 (height, width, 3)."""
    down, across = np.mgrid[:height, :width]
    channels = [40 + 2 * seed + 60 * np.sin((down + 11 * seed) / 17) ** 2, 60 + 90 * across / width, 90 + 40 * np.cos(across / 23)]
    image = np.stack(channels, axis=2).astype(np.uint8)
    left = (5 + 2 * step) % (width - 16)
    image[height // 3 : height // 3 + 14, left : left + 14] = (230, 60, 40)
    return image


def own_episode(seed: int, steps: int = 24, every: int = 1) -> Episode:
    """One as `collect` leaves it."""
    random = np.random.default_rng(seed)
    frame_step = np.arange(0, steps, every)
    return Episode(
        task=f"task_{seed % 2}",
        instruction=f"do thing {seed % 3}",
        actions=np.concatenate([random.uniform(-1, 1, (steps, 6)), np.sign(random.normal(size=(steps, 1)))], axis=1).astype(np.float32),
        robot_obs=np.cumsum(random.normal(0, 0.01, (steps, 15)), axis=0),
        scene_obs=random.normal(size=(steps, 24)),
        imitate=random.random(steps) < 0.8,
        frame_step=frame_step,
        rgb_static=np.stack([picture(200, 200, step, seed) for step in frame_step]),
        rgb_gripper=np.stack([picture(84, 84, step, seed) for step in frame_step]),
        info={"seed": seed},
    )


def own_store(folder: Path, episodes: list[Episode], per_shard: int = 2) -> EpisodeStore:
    store = EpisodeStore.create(folder, {"scene": "D", "seed": 0})
    for start in range(0, len(episodes), per_shard):
        store.write_shard(start // per_shard, episodes[start : start + per_shard])
    return store


def all_episodes(folder: Path) -> list[Episode]:
    store = EpisodeStore.open(folder)
    return [episode for index in store.shard_indices() for episode in store.read_shard(index)]


@dataclass
class ForeignArm:
    """An arm that commands absolute poses in millimetres and degrees with a gripper from 0 to 1, with cameras of its own sizes.

    Its pose moves by a known step: `motion` (T, 6) in metres and radians. spoil: changes a recording's columns.
    """

    lengths: list[int] = field(default_factory=lambda: [20, 33, 12])
    spoil: Callable[[int, dict[str, np.ndarray]], None] = lambda number, columns: None
    schema: Schema = field(
        default_factory=lambda: Schema(
            rate_hz=RATE_HZ,
            robot="foreign",
            columns={
                "action": Column(dtype="float32", shape=(7,), names=["x", "y", "z", "rx", "ry", "rz", "gripper"]),
                "observation.state": Column(dtype="float32", shape=(7,), names={"motors": ["x", "y", "z", "rx", "ry", "rz", "gripper"]}),
                "next.done": Column(dtype="bool"),
                "grid": Column(dtype="int32", shape=(2, 3)),
                "remark": Column(dtype="string"),
            },
            cameras={FRONT: Picture(height=96, width=128), WRIST: Picture(height=64, width=64)},
        )
    )

    @property
    def told(self) -> list[tuple[str, ...]]:
        return [("pick it up", "put it down") if number == 1 else ("pick it up",) for number in range(len(self.lengths))]

    @staticmethod
    def motion(number: int, steps: int) -> np.ndarray:
        random = np.random.default_rng(100 + number)
        return np.concatenate([random.uniform(-0.015, 0.015, (steps, 3)), random.uniform(-0.04, 0.04, (steps, 3))], axis=1)

    def read(self, number: int) -> Recording:
        steps = self.lengths[number]
        start = np.array([0.3, 0.0, 0.4, np.pi - 0.05, 0.1, -0.2])
        moved = self.motion(number, steps)
        poses = start + np.concatenate([np.zeros((1, 6)), np.cumsum(moved, axis=0)])
        scale = np.array([1000] * 3 + [180 / np.pi] * 3)
        gripper = (np.arange(steps + 1) % 10 < 5).astype(float)[:, None]
        rows = np.concatenate([poses * scale, gripper], axis=1).astype(np.float32)
        columns = {
            "action": rows[1:].copy(),
            "observation.state": rows[:-1].copy(),
            "next.done": np.arange(steps) == steps - 1,
            "grid": np.arange(6 * steps, dtype=np.int32).reshape(steps, 2, 3),
            "remark": np.array([f"step {step}" for step in range(steps)], dtype=object),
        }
        self.spoil(number, columns)
        told = self.told[number]
        return Recording(
            where=f"foreign episode {number}",
            columns=columns,
            instructions=told,
            instruction_of=(np.arange(steps) >= steps // 2).astype(np.int64) * (len(told) - 1),
            frame_step=np.arange(steps),
            frames=lambda camera: iter([self.pictures(camera, number)]),
        )

    def pictures(self, camera: str, number: int) -> np.ndarray:
        size = self.schema.cameras[camera]
        return np.stack([picture(size.height, size.width, step, number) for step in range(self.lengths[number])])

    def write(self, folder: Path, version: str = "v2.1", steps_per_part: int = 30) -> Path:
        """As a LeRobot dataset of that version."""
        layout = {"v2.1": lerobot_v21, "v3.0": lerobot_v30}[version]
        target = layout.Target(folder, self.schema, self.told, QUICK)
        written = []
        for part in parts_of(self.lengths, 1 if version == "v2.1" else steps_per_part):
            recordings = (self.read(number) for number in range(part.first_episode, part.first_episode + len(part.lengths)))
            written.append((part, target.write_part(part, recordings)))
        target.finish(written)
        return folder


MAPPING = """
cameras:
  rgb_static: {key: observation.images.front, fit: crop}
  rgb_gripper: {key: observation.images.wrist}
actions:
  kind: absolute
  position: {key: action, entries: [0, 1, 2], unit: mm}
  rotation: {key: action, entries: [3, 4, 5], unit: deg}
  gripper: {key: action, entries: [6], open: 1, closed: 0}
state:
  position: {key: observation.state, entries: [0, 1, 2], unit: mm}
  rotation: {key: observation.state, entries: [3, 4, 5], unit: deg}
  gripper: {key: observation.state, entries: [6], open: 1, closed: 0, width_m: 0.08}
"""
