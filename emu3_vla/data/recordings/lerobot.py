"""What LeRobot's v2.1 and v3.0 have in common: features, tables of rows, statistics. Their layouts on disk are lerobot_v21 and lerobot_v30.

A foreign dataset passes with the names that it has. Our own episodes (schema.canonical) are written under LeRobot's names and read back
from them:

    actions      action (float32)
    robot_obs    observation.state (float32: what LeRobot's policies read), and robot_obs as it is (float64)
    <camera>     observation.images.<camera>
    steps without a frame of their own show the last one, and frame_is_new is false there

Task names and what else is known of episodes lie in meta/emu3_vla.json and meta/emu3_vla_episodes.jsonl, which LeRobot does not look at.
Source: LeRobot 0.3.3 and 0.4.4, `lerobot/datasets/`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emu3_vla.data.episodes import write_text_atomic
from emu3_vla.data.recordings.recording import (
    Column,
    Part,
    Picture,
    Recording,
    RecordingError,
    Schema,
    blocks_of,
    every_step,
    fresh,
)
from emu3_vla.data.recordings.statistics import PictureStatistics, statistics
from emu3_vla.data.recordings.tables import column_to_numpy, numpy_to_column, read_json, read_lines
from emu3_vla.data.recordings.video import VideoConfig, read_video, require_size, write_video
from envs.spec import ROBOT_OBS

if TYPE_CHECKING:
    import pyarrow as pa

INFO = "meta/info.json"
OURS = "meta/emu3_vla.json"
OUR_EPISODES = "meta/emu3_vla_episodes.jsonl"

# Every dataset has these; they say where a row belongs and are made anew when it is written.
PLACE = {
    "timestamp": Column(dtype="float32"),
    "frame_index": Column(dtype="int64"),
    "episode_index": Column(dtype="int64"),
    "index": Column(dtype="int64"),
    "task_index": Column(dtype="int64"),
}
ACTION, STATE, IMAGES, FRESH = "action", "observation.state", "observation.images.", "frame_is_new"
NUMBERS = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
ACTION_NAMES = ["dx", "dy", "dz", "rx", "ry", "rz", "gripper"]
STATE_NAMES = [*("x", "y", "z", "rx", "ry", "rz", "gripper_width"), *(f"joint_{joint}" for joint in range(1, 8)), "gripper_action"]

# LeRobot asks that a row's time is its number over the rate, to this.
CLOCK_TOLERANCE_S = 1e-4


class LeRobotSource:
    """A dataset in either layout; a subclass says where an episode's rows and videos lie."""

    format = ""

    def __init__(self, path: Path):
        self.path = path
        self.info = read_json(path / INFO)
        if missing := [name for name in ("fps", "features", "data_path") if not self.info.get(name)]:
            raise RecordingError(f"{path / INFO} lacks {', '.join(missing)}")
        self.losses: list[str] = []
        self.ours = read_json(path / OURS) if (path / OURS).is_file() else None
        self.video_keys: list[str] = []
        self.image_keys: list[str] = []
        self.tasks, self.lengths, self.told = self._read_metadata()
        self._check_totals()
        self.schema = self._schema()
        self.known = _our_episodes(path, len(self.lengths)) if self.ours else [{} for _ in self.lengths]

    def _read_metadata(self) -> tuple[dict[int, str], list[int], list[tuple[str, ...]]]:
        """Sentences by task_index; steps, and sentences, of each episode."""
        raise NotImplementedError

    def _rows(self, number: int) -> pa.Table:
        raise NotImplementedError

    def video(self, number: int, key: str) -> tuple[Path, int]:
        """File that holds a camera's frames of an episode, and the number of the first of them in it."""
        raise NotImplementedError

    def _check_totals(self) -> None:
        for name, found in (("total_episodes", len(self.lengths)), ("total_frames", sum(self.lengths))):
            if self.info.get(name, found) != found:
                raise RecordingError(
                    f"{self.path / INFO} says {name}={self.info[name]}, but the episodes that the metadata list have {found}; "
                    "an upload or a merge was cut short: fetch the dataset again"
                )

    def _schema(self) -> Schema:
        columns, cameras = {}, {}
        for key, feature in self.info["features"].items():
            kind, shape = feature["dtype"], tuple(feature["shape"])
            facts = (feature.get("info") or {}) | (feature.get("video_info") or {})
            if kind in ("video", "image"):
                if facts.get("video.is_depth_map") or facts.get("is_depth_map"):
                    self.losses.append(f"{key}: depth video is not carried")
                    continue
                (self.video_keys if kind == "video" else self.image_keys).append(key)
                cameras[key] = _picture(shape, feature.get("names"))
            elif key in PLACE:
                continue
            elif kind in (*NUMBERS, "string"):
                columns[key] = Column(dtype=kind, shape=() if shape == (1,) else shape, names=feature.get("names"))
            else:
                self.losses.append(f"{key}: features of type {kind} are not carried")
        schema = Schema(
            rate_hz=float(self.info["fps"]),
            columns=columns,
            cameras=cameras,
            robot=self.info.get("robot_type") or "",
            about=(self.ours or {}).get("about", {}),
        )
        return canonical(schema) if self.ours and self.ours["canonical"] else schema

    def read(self, number: int) -> Recording:
        where = f"episode {number} of {self.path}"
        rows, length = self._rows(number), self.lengths[number]
        if rows.num_rows != length:
            raise RecordingError(f"{where} has {rows.num_rows} rows, and {length} by the metadata")
        stored = {key for key in rows.column_names}
        wanted = [key for key in (*self.info["features"],) if key in PLACE or key in self._stored_columns()]
        if missing := sorted(set(wanted) - stored):
            raise RecordingError(f"{where}: its rows lack {', '.join(missing)}, which {INFO} lists")
        place = {key: column_to_numpy(rows, key, PLACE[key], where) for key in PLACE if key in stored}
        self._check_place(place, number, where)
        columns = {key: column_to_numpy(rows, key, column, where) for key, column in self._stored_columns().items()}
        instructions, instruction_of = self._instructions(place["task_index"], number, where)
        frame_step = np.arange(length)
        if self.schema.canonical:
            columns, frame_step = from_lerobot(columns, length)
        return Recording(
            where=where,
            columns=columns,
            instructions=instructions,
            instruction_of=instruction_of,
            task=self.known[number].get("task", ""),
            time_s=place["timestamp"].astype(np.float64) if "timestamp" in place else None,
            frame_step=frame_step,
            frames=lambda camera: self._frames(number, camera, frame_step, where),
            info=self.known[number].get("info", {}),
        )

    def _stored_columns(self) -> dict[str, Column]:
        """Columns by the names that they have on disk."""
        return {
            key: Column(dtype=feature["dtype"], shape=() if tuple(feature["shape"]) == (1,) else tuple(feature["shape"]))
            for key, feature in self.info["features"].items()
            if key not in PLACE and feature["dtype"] in (*NUMBERS, "string")
        }

    def _check_place(self, place: dict[str, np.ndarray], number: int, where: str) -> None:
        expected = {"episode_index": np.full(self.lengths[number], number), "frame_index": np.arange(self.lengths[number])}
        for key, values in expected.items():
            if key in place and not np.array_equal(place[key], values):
                step = int(np.flatnonzero(place[key] != values)[0])
                raise RecordingError(f"{where}: {key} is {place[key][step]} in row {step}, expected {values[step]}")

    def _instructions(self, task_index: np.ndarray, number: int, where: str) -> tuple[tuple[str, ...], np.ndarray]:
        used, first, of = np.unique(task_index, return_index=True, return_inverse=True)
        order = np.argsort(first)
        if unknown := [int(index) for index in used if int(index) not in self.tasks]:
            raise RecordingError(f"{where}: task_index {unknown[0]} is not in the dataset's {len(self.tasks)} tasks")
        sentences = tuple(self.tasks[int(used[index])] for index in order)
        if set(sentences) != set(self.told[number]):
            raise RecordingError(f"{where}: its rows are of the tasks {list(sentences)}, and of {list(self.told[number])} by the metadata")
        return sentences, np.argsort(order)[of].astype(np.int64)

    def _frames(self, number: int, camera: str, frame_step: np.ndarray, where: str) -> Iterator[np.ndarray]:
        key = IMAGES + camera if self.schema.canonical else camera
        length = self.lengths[number]
        if key in self.image_keys:
            return blocks_of(_decoded(self._rows(number), key, where))
        path, first = self.video(number, key)
        blocks = read_video(path, first, length, self.schema.rate_hz, where)
        return blocks if len(frame_step) == length else _chosen(blocks, frame_step)


def _picture(shape: tuple[int, ...], names: list[str] | None) -> Picture:
    """Datasets give (height, width, channels) or (channels, height, width), and names that tell which."""
    if names and names[0].startswith("channel"):
        return Picture(height=shape[1], width=shape[2])
    return Picture(height=shape[0], width=shape[1])


def _decoded(rows: pa.Table, key: str, where: str) -> Iterator[np.ndarray]:
    """Frames that lie in the rows as PNG or JPEG."""
    from PIL import Image, UnidentifiedImageError

    for step, cell in enumerate(rows[key].to_pylist()):
        if not cell or not cell.get("bytes"):
            raise RecordingError(f"{where}: {key} of step {step} is {'outside the table' if cell else 'missing'}; expected an image in it")
        try:
            yield np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise RecordingError(f"{where}: {key} of step {step} is no image ({error})") from error


def _chosen(blocks: Iterator[np.ndarray], steps: np.ndarray) -> Iterator[np.ndarray]:
    start = 0
    for block in blocks:
        local = steps[(steps >= start) & (steps < start + len(block))] - start
        start += len(block)
        if len(local):
            yield block[local]


# -- our episodes under LeRobot's names, and back


def canonical(schema: Schema) -> Schema:
    """The schema that `features_of` was given for our own episodes. Raises RecordingError where it is not one of those."""
    columns = dict(schema.columns)
    if ACTION not in columns or not all(key.startswith(IMAGES) for key in schema.cameras):
        raise RecordingError(f"{OURS} says that the dataset holds our own episodes, but {INFO} lists other features; remove {OURS}")
    for key in (STATE, FRESH):
        columns.pop(key, None)
    renamed = {"actions" if key == ACTION else key: column for key, column in columns.items()}
    return Schema(
        rate_hz=schema.rate_hz,
        columns=renamed,
        cameras={key.removeprefix(IMAGES): picture for key, picture in schema.cameras.items()},
        robot=schema.robot,
        every_step=FRESH not in schema.columns,
        canonical=True,
        about=schema.about,
    )


def from_lerobot(columns: dict[str, np.ndarray], length: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns of one of our own episodes, and the steps that have a frame."""
    own = {"actions" if key == ACTION else key: values for key, values in columns.items() if key not in (STATE, FRESH)}
    return own, np.flatnonzero(columns[FRESH]) if FRESH in columns else np.arange(length)


def to_lerobot(recording: Recording, schema: Schema) -> dict[str, np.ndarray]:
    """Columns by LeRobot's names: the inverse of `from_lerobot`."""
    if not schema.canonical:
        return recording.columns
    columns = {ACTION if key == "actions" else key: values for key, values in recording.columns.items()}
    if ROBOT_OBS in columns:
        columns[STATE] = columns[ROBOT_OBS].astype(np.float32)
    if not schema.every_step:
        columns[FRESH] = fresh(recording)
    return columns


def columns_of(schema: Schema) -> dict[str, Column]:
    """Columns as `to_lerobot` gives them."""
    if not schema.canonical:
        return schema.columns
    columns = {ACTION if key == "actions" else key: column for key, column in schema.columns.items()}
    columns[ACTION] = Column(dtype="float32", shape=(len(ACTION_NAMES),), names=ACTION_NAMES)
    if ROBOT_OBS in columns:
        columns[STATE] = Column(dtype="float32", shape=(len(STATE_NAMES),), names=STATE_NAMES)
        columns[ROBOT_OBS] = Column(dtype="float64", shape=(len(STATE_NAMES),), names=STATE_NAMES)
    if not schema.every_step:
        columns[FRESH] = Column(dtype="bool")
    return columns


def camera_keys(schema: Schema) -> dict[str, str]:
    """Our name of a camera: LeRobot's."""
    return {camera: IMAGES + camera if schema.canonical else camera for camera in schema.cameras}


class LeRobotTarget:
    """Writes either layout; a subclass says where rows, videos and metadata go.

    told: sentences of each episode, which number the tasks.
    """

    format = ""
    version = ""
    steps_per_part = 1

    def __init__(self, folder: Path, schema: Schema, told: list[tuple[str, ...]], video: VideoConfig):
        self.folder, self.schema, self.video = folder, schema, video
        self.columns, self.cameras = columns_of(schema), camera_keys(schema)
        self.task_index: dict[str, int] = {}
        for sentence in (sentence for sentences in told for sentence in sentences):
            self.task_index.setdefault(sentence, len(self.task_index))
        for camera, picture in schema.cameras.items():
            require_size(picture.width, picture.height, video, camera)
        self.losses = [f"{camera}: frames are compressed ({video.says()})" for camera in schema.cameras if video.says()]
        if not schema.every_step:
            self.losses.append("steps without a frame of their own show the last one (frame_is_new is false there)")

    def rows(self, recording: Recording, episode: int, first_step: int) -> pa.Table:
        """The table of one episode."""
        import pyarrow as pa

        length = len(recording)
        steps = np.arange(length)
        index_of = np.array([self.task_index[sentence] for sentence in recording.instructions], np.int64)
        place = {
            "timestamp": (steps / self.schema.rate_hz).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(length, episode),
            "index": first_step + steps,
            "task_index": index_of[recording.instruction_of],
        }
        columns = to_lerobot(recording, self.schema)
        arrays = {key: numpy_to_column(columns[key], column) for key, column in self.columns.items()}
        return pa.table(arrays | {key: pa.array(values) for key, values in place.items()})

    def record(self, recording: Recording, table: pa.Table, pictures: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What the metadata will say of one episode."""
        columns = self.columns | PLACE
        where = recording.where
        numbers = {
            key: statistics(column_to_numpy(table, key, column, where)) for key, column in columns.items() if column.dtype != "string"
        }
        return {
            "length": len(recording),
            "tasks": list(recording.instructions),
            "task": recording.task,
            "info": recording.info,
            "stats": numbers | {self.cameras[camera]: found for camera, found in pictures.items()},
        }

    def write_camera(self, path: Path, camera: str, recordings: list[Recording]) -> list[dict[str, Any]]:
        """One video of these episodes, one after another; returns each one's statistics."""
        found: list[PictureStatistics] = []

        def frames() -> Iterator[np.ndarray]:
            for recording in recordings:
                found.append(PictureStatistics(len(recording)))
                for block in every_step(recording, camera):
                    found[-1].see(block)
                    yield block

        write_video(path, frames(), self.schema.rate_hz, self.video)
        return [statistic.result() for statistic in found]

    def features(self) -> dict[str, Any]:
        features: dict[str, Any] = {}
        for camera, key in self.cameras.items():
            picture = self.schema.cameras[camera]
            features[key] = {
                "dtype": "video",
                "shape": [picture.height, picture.width, 3],
                "names": ["height", "width", "channels"],
                "info": {
                    "video.height": picture.height,
                    "video.width": picture.width,
                    "video.codec": self.video.codec,
                    "video.pix_fmt": "gbrp" if self.video.lossless else self.video.pixel_format,
                    "video.is_depth_map": False,
                    "video.fps": _plain(self.schema.rate_hz),
                    "video.channels": 3,
                    "has_audio": False,
                },
            }
        for key, column in (self.columns | PLACE).items():
            features[key] = {"dtype": column.dtype, "shape": list(column.shape) or [1], "names": column.names}
        return features

    def write_info(self, episodes: list[dict[str, Any]], more: dict[str, Any]) -> None:
        """meta/info.json last of all: without it there is no dataset."""
        if self.schema.canonical:
            _write_our_episodes(self.folder, self.schema, episodes)
        info = {
            "codebase_version": self.version,
            "robot_type": self.schema.robot or None,
            "total_episodes": len(episodes),
            "total_frames": sum(episode["length"] for episode in episodes),
            "total_tasks": len(self.task_index),
            "chunks_size": CHUNK,
            "fps": _plain(self.schema.rate_hz),
            "splits": {"train": f"0:{len(episodes)}"},
            **more,
            "features": self.features(),
        }
        write_text_atomic(self.folder / INFO, json.dumps(info, indent=4, ensure_ascii=False))


CHUNK = 1000  # files of one folder


def _plain(number: float) -> int | float:
    """Rates are whole numbers in most datasets, and LeRobot expects them to look so."""
    return int(number) if float(number).is_integer() else number


def _write_our_episodes(folder: Path, schema: Schema, episodes: list[dict[str, Any]]) -> None:
    lines = [json.dumps({"task": episode["task"], "info": episode["info"]}, ensure_ascii=False) for episode in episodes]
    write_text_atomic(folder / OUR_EPISODES, "\n".join(lines) + "\n")
    write_text_atomic(folder / OURS, json.dumps({"canonical": True, "about": schema.about}, indent=1, ensure_ascii=False))


def _our_episodes(path: Path, count: int) -> list[dict[str, Any]]:
    lines = read_lines(path / OUR_EPISODES)
    if len(lines) != count:
        raise RecordingError(f"{path / OUR_EPISODES} has {len(lines)} lines, expected one for each of the {count} episodes")
    return lines


def episodes_in_order(parts: list[tuple[Part, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Records of the episodes of all parts, part after part."""
    return [episode for _, written in parts for episode in written["episodes"]]
