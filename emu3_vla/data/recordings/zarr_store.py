"""Our episode store (emu3_vla.data.episodes) as a source and a target of recordings: the one format that is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np

from emu3_vla.data.episodes import RATE, EpisodeStore, EpisodeStoreError
from emu3_vla.data.recordings.recording import FRAMES_PER_BLOCK, Column, Part, Picture, Recording, RecordingError, Schema
from envs.spec import CAMERAS, CONTROL_HZ, OBSERVATION, Episode

STEP_SHAPES = {"actions": (7,), "robot_obs": (15,), "scene_obs": (24,), "imitate": ()}
STEP_TYPES = {"actions": "float32", "robot_obs": "float64", "scene_obs": "float64", "imitate": "bool"}


class Source:
    """An episode store that is there."""

    format = "zarr"

    def __init__(self, path: Path):
        self.path = path
        self.store = EpisodeStore.open(path)
        self.losses: list[str] = []
        self._place: list[tuple[int, int, int]] = []  # shard, number in it, its first frame there
        self._records: list[dict[str, Any]] = []
        for shard in self.store.shard_indices():
            first = 0
            for number, record in enumerate(self.store.records(shard)):
                self._place.append((shard, number, first))
                self._records.append(record)
                first += record["frames"]
        self.lengths = [record["steps"] for record in self._records]
        self.told = [(record["instruction"],) for record in self._records]
        self.schema = self._schema()
        self._opened: tuple[int, list[dict[str, np.ndarray]]] | None = None

    def _schema(self) -> Schema:
        shards = self.store.shard_indices()
        if not shards:
            raise RecordingError(f"{self.path} has no shard in it")
        held = [self.store.step_arrays(shard) for shard in shards]
        if different := next((shard for shard, arrays in zip(shards, held, strict=True) if arrays != held[0]), None):
            raise RecordingError(f"{self.path}: shard {different} has not the same arrays as shard {shards[0]}; convert them one by one")
        self._steps, self._extra = held[0]
        columns = {name: Column(dtype=STEP_TYPES[name], shape=STEP_SHAPES[name]) for name in self._steps}
        types = self.store.extra_types(shards[0])
        columns |= {name: Column(dtype=dtype, shape=shape) for name, (dtype, shape) in types.items()}
        return Schema(
            rate_hz=float(self.store.metadata.get(RATE, CONTROL_HZ)),
            columns=columns,
            cameras={camera: Picture(height=OBSERVATION[camera].shape[0], width=OBSERVATION[camera].shape[1]) for camera in CAMERAS},
            every_step=all(record["frames"] == record["steps"] for record in self._records),
            canonical=True,
            about=self.store.metadata,
        )

    def read(self, number: int) -> Recording:
        shard, place, first = self._place[number]
        record, where = self._records[number], f"episode {number} of {self.path} (shard {shard})"
        if self._opened is None or self._opened[0] != shard:  # episodes of one shard follow each other: read it once
            names = [*self._steps, "frame_step", *(f"extra/{name}" for name in self._extra)]
            self._opened = (shard, self.store.read_columns(shard, names))
        columns = {name.removeprefix("extra/"): values for name, values in self._opened[1][place].items()}
        return Recording(
            where=where,
            instructions=(record["instruction"],),
            instruction_of=np.zeros(record["steps"], np.int64),
            task=record["task"],
            frame_step=columns.pop("frame_step"),
            columns=columns,
            frames=lambda camera: self._frames(camera, shard, first, record["frames"], where),
            info=record["info"],
        )

    def _frames(self, camera: str, shard: int, first: int, count: int, where: str) -> Iterator[np.ndarray]:
        for start in range(first, first + count, FRAMES_PER_BLOCK):
            try:
                yield self.store.read_frames(camera, shard, slice(start, min(start + FRAMES_PER_BLOCK, first + count)))
            except EpisodeStoreError as error:
                raise RecordingError(f"{where}: {error}") from error


class Target:
    """An episode store that is made. It is one once `finish` has written store.json."""

    format = "zarr"
    steps_per_part = 1000  # collected shards are about so large; training holds out whole shards

    def __init__(self, folder: Path, schema: Schema):
        self.folder, self.schema = folder, schema
        self.metadata = schema.about | {RATE: schema.rate_hz}
        self.losses: list[str] = []
        for name, expected in STEP_SHAPES.items():
            column = schema.columns.get(name)
            if column is None and name != "scene_obs":
                raise RecordingError(f"the store needs {name!r}, which the mapping does not give")
            if column is not None and tuple(column.shape) != expected:
                raise RecordingError(f"the store needs {name!r} of shape {list(expected)}, the mapping gives {list(column.shape)}")
        for camera in CAMERAS:
            height, width, _ = OBSERVATION[camera].shape
            if schema.cameras.get(camera) != Picture(height=height, width=width):
                raise RecordingError(
                    f"the store needs camera {camera!r} of {width}×{height}, the mapping gives {schema.cameras.get(camera, 'none')}"
                )
        self._extra = [name for name, column in schema.columns.items() if name not in STEP_SHAPES and column.dtype != "string"]
        self.losses += [f"{name}: the store holds numbers, not text" for name, column in schema.columns.items() if column.dtype == "string"]

    def write_part(self, part: Part, recordings: Iterator[Recording]) -> dict[str, Any]:
        held = list(recordings)
        frames = {camera: chain.from_iterable(map(methodcaller("frames", camera), held)) for camera in CAMERAS}
        (self.folder / "shards").mkdir(parents=True, exist_ok=True)
        store = EpisodeStore(self.folder, self.metadata)
        if not store.has_shard(part.number):  # else a run was killed between the shard and its record
            store.write_shard(part.number, [self._episode(recording) for recording in held], frames)
        return {"episodes": [{"length": len(recording)} for recording in held]}

    def _episode(self, recording: Recording) -> Episode:
        """The episode, with frames that only count."""
        instruction = recording.instructions[0]
        columns = recording.columns
        return Episode(
            task=recording.task or instruction,
            instruction=instruction,
            actions=columns["actions"],
            robot_obs=columns["robot_obs"],
            scene_obs=columns.get("scene_obs"),
            imitate=columns["imitate"],
            frame_step=recording.frame_step,
            extra={name: columns[name] for name in self._extra},
            info=recording.info,
            **{camera: np.broadcast_to(np.uint8(0), (len(recording.frame_step), *OBSERVATION[camera].shape)) for camera in CAMERAS},
        )

    def finish(self, parts: list[tuple[Part, dict[str, Any]]]) -> None:
        EpisodeStore.create(self.folder, self.metadata)
