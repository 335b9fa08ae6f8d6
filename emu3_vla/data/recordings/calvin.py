"""CALVIN's layout: one npz file a step, with what is said of them in arrays beside it.

episode_0358482.npz: actions (absolute), rel_actions, robot_obs, scene_obs, rgb_static, rgb_gripper, and depth and tactile images that are
not carried. ep_start_end_ids.npy: first and last step of each uninterrupted recording. lang_annotations/auto_lang_ann.npy: which stretches
of them show which task, and a sentence for each; where it is there, these stretches are the episodes. statistics.yaml and
.hydra/merged_config.yaml are for CALVIN's own programs. Units are those of envs.spec. What we write has `imitate` in each file too, and
frame_is_new where not every step has a frame of its own.
Source: CALVIN's `dataset/README.md`, `calvin_models/calvin_agent/datasets/`.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from emu3_vla.data.episodes import write_text_atomic
from emu3_vla.data.recordings.recording import Column, Part, Picture, Recording, RecordingError, Schema, blocks_of, every_step, fresh
from envs.spec import CAMERAS, CONTROL_HZ, MAX_RELATIVE_POSITION_M, MAX_RELATIVE_ROTATION_RAD, RGB_GRIPPER, RGB_STATIC

IDS, LENGTHS, LANGUAGE = "ep_start_end_ids.npy", "ep_lens.npy", "lang_annotations/auto_lang_ann.npy"
STATISTICS, CONFIG = "statistics.yaml", ".hydra/merged_config.yaml"
NORMALIZE = "calvin_agent.utils.transforms.NormalizeVector"
IMITATE, FRESH = "imitate", "frame_is_new"


class Source:
    """A split of a CALVIN dataset, such as its folder `training`."""

    format = "calvin"

    def __init__(self, path: Path):
        self.path = path
        spans = np.atleast_2d(np.load(path / IDS))
        language = self._language()
        if language:
            spans = np.array([span for span, _, _ in language])
        self.spans = [(int(start), int(end)) for start, end in spans]
        self.lengths = [end - start + 1 for start, end in self.spans]
        self.tasks = [task for _, task, _ in language] or [""] * len(self.spans)
        self.told = [(sentence,) for _, _, sentence in language] or [("",)] * len(self.spans)
        if wrong := next((number for number, length in enumerate(self.lengths) if length < 1), None):
            raise RecordingError(f"{path}: episode {wrong} ends before it begins ({self.spans[wrong]})")
        first = self._load(self.spans[0][0], None, "episode 0")
        self.cameras = tuple(
            name for name, values in first.items() if values.dtype == np.uint8 and values.ndim == 3 and values.shape[-1] == 3
        )
        self.losses = [f"{name}: not carried" for name in first if name not in self.cameras and first[name].ndim > 1]
        self.losses += self._unread(language)
        self.stored = {name: Column(dtype=str(values.dtype), shape=values.shape) for name, values in first.items() if values.ndim < 2}
        self.schema = Schema(
            rate_hz=float(CONTROL_HZ),
            columns={name: column for name, column in self.stored.items() if name != FRESH} | {IMITATE: Column(dtype="bool")},
            cameras={name: Picture(height=first[name].shape[0], width=first[name].shape[1]) for name in self.cameras},
            robot="panda",
            every_step=FRESH not in self.stored,
        )

    def _language(self) -> list[tuple[tuple[int, int], str, str]]:
        """First and last step, task and sentence of each annotated stretch; none where there are no annotations."""
        path = self.path / LANGUAGE
        if not path.is_file():
            return []
        read = load_object_array(path)
        try:
            spans, tasks, sentences = read["info"]["indx"], read["language"]["task"], read["language"]["ann"]
            return [((int(a), int(b)), str(task), _sentence(text)) for (a, b), task, text in zip(spans, tasks, sentences, strict=True)]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RecordingError(f"{path} has not the form of CALVIN's annotations ({error!r})") from error

    def _unread(self, language: list) -> list[str]:
        if not language:
            return [f"no {LANGUAGE}: episodes have no instruction, and a policy cannot be trained on them without"]
        steps = sum(int(end) - int(start) + 1 for start, end in np.atleast_2d(np.load(self.path / IDS)))
        seen: np.ndarray = np.unique(np.concatenate([np.arange(start, end + 1) for start, end in self.spans]))
        return [f"{steps - len(seen)} of {steps} steps are in no annotated stretch and are left out"] if len(seen) < steps else []

    def read(self, number: int) -> Recording:
        (start, end), where = self.spans[number], f"episode {number} of {self.path} (steps {self.spans[number]})"
        names = tuple(self.stored)
        steps = [self._load(step, names, where) for step in range(start, end + 1)]
        columns = {name: np.stack([step[name] for step in steps]) for name in names}
        for name, column in self.stored.items():
            columns[name] = columns[name].astype(column.dtype, copy=False)
        columns.setdefault(IMITATE, np.ones(len(steps), bool))
        frame_step = np.flatnonzero(columns.pop(FRESH)) if FRESH in columns else np.arange(len(steps))
        return Recording(
            where=where,
            columns=columns,
            instructions=self.told[number],
            instruction_of=np.zeros(len(steps), np.int64),
            task=self.tasks[number],
            frame_step=frame_step,
            frames=lambda camera: blocks_of(self._load(start + int(step), (camera,), where)[camera] for step in frame_step),
            info={"calvin_steps": [start, end]},
        )

    def _load(self, step: int, names: tuple[str, ...] | None, where: str) -> dict[str, np.ndarray]:
        path = self.path / f"episode_{step:07d}.npz"
        if not path.is_file():
            raise RecordingError(f"{where}: {path.name} is missing in {self.path}")
        try:
            with np.load(path) as archive:
                return {name: archive[name] for name in (archive.files if names is None else names)}
        except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
            raise RecordingError(f"{where}: {path} is damaged or cut short ({error})") from error
        except KeyError as error:
            raise RecordingError(f"{where}: {path} lacks {error.args[0]}") from error


def _sentence(text: Any) -> str:
    """CALVIN's own file has one sentence a stretch; some copies wrap it in a list."""
    return str(text[0]) if isinstance(text, list | tuple | np.ndarray) else str(text)


class _Plain(pickle.Unpickler):
    """Arrays and plain containers alone: a dataset must not run code."""

    ALLOWED = {
        *((module, name) for module in ("numpy.core.multiarray", "numpy._core.multiarray") for name in ("_reconstruct", "scalar")),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, expected arrays, lists and text alone")
        return super().find_class(module, name)


def load_object_array(path: Path) -> Any:
    """The object in an .npy file that numpy wrote with pickle. Raises RecordingError where it is anything but plain data."""
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(file)
            if not dtype.hasobject or shape != ():
                raise ValueError(f"it is {dtype} of shape {shape}, expected one object")
            return _Plain(io.BytesIO(file.read())).load().item()
        except (ValueError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError) as error:
            raise RecordingError(f"{path} cannot be read: {error}") from error


class Target:
    """A folder in CALVIN's layout. ep_start_end_ids.npy, which makes it one, is written last."""

    format = "calvin"
    steps_per_part = 500  # files of a few minutes' work at most

    def __init__(self, folder: Path, schema: Schema):
        self.folder, self.schema = folder, schema
        if missing := [name for name in ("actions", "robot_obs") if name not in schema.columns]:
            raise RecordingError(f"CALVIN's layout needs {missing[0]!r}, which the mapping does not give")
        if missing := [camera for camera in CAMERAS if camera not in schema.cameras]:
            raise RecordingError(f"CALVIN's layout needs camera {missing[0]!r}, which the mapping does not give")
        self.exact = "source.rel_actions" in schema.columns and "source.actions" in schema.columns
        self.losses = [
            "language embeddings are not made: CALVIN's relabel_with_new_lang_model.py makes them from the sentences",
            f"{CONFIG} says what is known of the recording, not how calvin_env is to be built: the original simulator cannot start from it",
        ]
        if not self.exact:
            self.losses.append("absolute actions were not recorded: `actions` is robot_obs moved by the relative action")
        if "scene_obs" not in schema.columns:
            self.losses.append("scene_obs is not known and is left out: CALVIN's loaders must be told not to ask for it")
        if not schema.every_step:
            self.losses.append(f"steps without a frame of their own show the last one ({FRESH} is false there)")
        carried = {"actions", "robot_obs", "scene_obs", "imitate", *(("source.rel_actions", "source.actions") if self.exact else ())}
        self.losses += [f"{name}: CALVIN's layout has no place for it" for name in schema.columns if name not in carried]
        if schema.rate_hz != CONTROL_HZ:
            self.losses.append(f"the rate of {schema.rate_hz:g} Hz: CALVIN's programs take {CONTROL_HZ} Hz for granted")

    def write_part(self, part: Part, recordings: Iterator[Recording]) -> dict[str, Any]:
        episodes, step = [], part.first_step
        for recording in recordings:
            columns = self._columns(recording)
            frames = zip(*(_singly(every_step(recording, camera)) for camera in CAMERAS), strict=True)
            for index, pictures in enumerate(frames):
                values = {name: column[index] for name, column in columns.items()} | dict(
                    zip((RGB_STATIC, RGB_GRIPPER), pictures, strict=True)
                )
                self._write_step(step + index, values)
            episodes.append(self._record(recording, columns, step))
            step += len(recording)
        return {"episodes": episodes}

    def _columns(self, recording: Recording) -> dict[str, np.ndarray]:
        given = recording.columns
        if self.exact:
            columns = {"actions": given["source.actions"], "rel_actions": given["source.rel_actions"]}
        else:
            relative = given["actions"].astype(np.float64)
            columns = {"actions": absolute(relative, given["robot_obs"]), "rel_actions": relative}
        columns["robot_obs"] = given["robot_obs"]
        if "scene_obs" in given:
            columns["scene_obs"] = given["scene_obs"]
        columns[IMITATE] = given[IMITATE]
        return columns if self.schema.every_step else columns | {FRESH: fresh(recording)}

    def _write_step(self, step: int, values: dict[str, np.ndarray]) -> None:
        path = self.folder / f"episode_{step:07d}.npz"
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, **values)
        temporary.replace(path)

    def _record(self, recording: Recording, columns: dict[str, np.ndarray], first: int) -> dict[str, Any]:
        sums = {
            name: {"sum": columns[name].sum(axis=0).tolist(), "squares": (columns[name] ** 2).sum(axis=0).tolist()}
            for name in ("robot_obs", "scene_obs")
            if name in columns
        }
        relative = columns["rel_actions"]
        return {
            "length": len(recording),
            "first": first,
            "task": recording.task or recording.instructions[0],
            "instruction": recording.instructions[0],
            "sums": sums,
            "action_min": relative.min(axis=0).tolist(),
            "action_max": relative.max(axis=0).tolist(),
        }

    def finish(self, parts: list[tuple[Part, dict[str, Any]]]) -> None:
        episodes = [episode for _, written in parts for episode in written["episodes"]]
        spans = np.array([(episode["first"], episode["first"] + episode["length"] - 1) for episode in episodes])
        write_text_atomic(self.folder / STATISTICS, yaml.safe_dump(_statistics(episodes), default_flow_style=None))
        (self.folder / CONFIG).parent.mkdir(exist_ok=True)
        write_text_atomic(self.folder / CONFIG, yaml.safe_dump(self._config()))
        if any(episode["instruction"] for episode in episodes):
            (self.folder / LANGUAGE).parent.mkdir(exist_ok=True)
            language = {"ann": [episode["instruction"] for episode in episodes], "task": [episode["task"] for episode in episodes]}
            info = {"episodes": [], "indx": [tuple(span) for span in spans.tolist()]}
            _save(self.folder / LANGUAGE, np.array({"language": language, "info": info}, dtype=object))
        _save(self.folder / LENGTHS, spans[:, 1] - spans[:, 0] + 1)
        _save(self.folder / IDS, spans)

    def _config(self) -> dict[str, Any]:
        cameras = {name: {"width": picture.width, "height": picture.height} for name, picture in self.schema.cameras.items()}
        scene = self.schema.about.get("scene")
        return {"control_freq": self.schema.rate_hz, "cameras": cameras, "robot": self.schema.robot} | (
            {"scene": f"calvin_scene_{scene}"} if scene else {}
        )


def absolute(relative: np.ndarray, robot_obs: np.ndarray) -> np.ndarray:
    """Absolute actions (T, 7) of relative ones: the pose before the step, moved by them; Euler angles added, as CALVIN does.

    The inverse of CALVIN's own way from `actions` to `rel_actions`, as long as those were not clipped.
    """
    scale = np.array([MAX_RELATIVE_POSITION_M] * 3 + [MAX_RELATIVE_ROTATION_RAD] * 3)
    moved = robot_obs[:, :6] + relative[:, :6] * scale
    moved[:, 3:] = (moved[:, 3:] + np.pi) % (2 * np.pi) - np.pi
    return np.concatenate([moved, relative[:, 6:]], axis=1)


def _singly(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for block in blocks:
        yield from block


def _statistics(episodes: list[dict[str, Any]]) -> dict[str, Any]:
    """What CALVIN normalises by."""
    count = sum(episode["length"] for episode in episodes)
    found: dict[str, Any] = {}
    for name in episodes[0]["sums"]:
        mean = np.sum([episode["sums"][name]["sum"] for episode in episodes], axis=0) / count
        squares = np.sum([episode["sums"][name]["squares"] for episode in episodes], axis=0) / count
        std = np.sqrt(np.maximum(squares - mean**2, 0))
        found[name] = [{"_target_": NORMALIZE, "mean": mean.tolist(), "std": std.tolist()}]
    found["act_min_bound"] = np.min([episode["action_min"] for episode in episodes], axis=0).tolist()
    found["act_max_bound"] = np.max([episode["action_max"] for episode in episodes], axis=0).tolist()
    return found


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array, allow_pickle=array.dtype == object)
    temporary.replace(path)
