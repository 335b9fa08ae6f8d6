"""Episode store: recorded episodes on disk, a shard at a time.

    store = EpisodeStore.create("outputs/collect/first", metadata={"wordings": {...}, "seed": 0})
    store.write_shard(0, episodes)            # whole or not at all: written beside its place, then renamed
    for index in store.shard_indices():
        episodes = store.read_shard(index)

Layout: `store.json` (schema, metadata) and one Zarr v3 group per shard, `shards/00042.zarr`. In a shard the episodes' arrays are
concatenated along their first axis; the group's attributes say how long each episode is. An array is one file, or one per FRAMES_PER_FILE
frames, compressed with Zstandard and checksummed (CRC-32C) per few frames, so a damaged byte is found when it is read. Recordings of real
arms lack `scene_obs`, and may have further arrays with a row a step: `extra/<name>`, named by the attribute "extra".
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from emu3_vla.data.remote import UrlPath
from envs.spec import CAMERAS, Episode

FORMAT = "emu3-vla-episodes"
SCHEMA = 1
SHARD_FORMAT = "emu3-vla-episode-shard"

STEP_ARRAYS = {"actions": "float32", "robot_obs": "float64", "scene_obs": "float64", "imitate": "bool"}
FRAME_ARRAYS = {"frame_step": "int64", "rgb_static": "uint8", "rgb_gripper": "uint8"}
RATE = "rate_hz"  # in a store's metadata; without it the simulator's
SCENE = "scene_obs"
EXTRA = "extra/"

# Neighbouring frames of an episode share most of their bytes, and Zstandard sees that only inside one chunk.
FRAMES_PER_CHUNK = 8
STEPS_PER_CHUNK = 4096
# What a writer must hold of a camera at once.
FRAMES_PER_FILE = 1024


class EpisodeStoreError(ValueError):
    """A store or shard that is missing, foreign, damaged, or would be overwritten."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a store holds, read from its records alone. `tasks` counts episodes per task."""

    shards: int
    episodes: int
    steps: int
    frames: int
    tasks: dict[str, int]


class EpisodeStore:
    """A folder of episode shards. Make one with `create` or `open`; several processes may write different shards at once."""

    def __init__(self, path: Path, metadata: dict[str, Any]):
        self.path = path
        self.metadata = metadata

    @classmethod
    def create(cls, path: str | Path, metadata: dict[str, Any]) -> EpisodeStore:
        """Start a store in the folder `path`, or go on with the one there if its metadata is the same.

        metadata: JSON-able, e.g. {"wordings": {task: [sentence, ...]}, "scene": "D", "seed": 0}.
        Raises EpisodeStoreError if a store with other metadata is there, ValueError if `metadata` is not JSON.
        """
        path = Path(path)
        record = {"format": FORMAT, "schema": SCHEMA, "metadata": metadata}
        text = json_text(record, f"metadata of the episode store {path}")
        file = path / "store.json"
        if file.exists():
            store = cls.open(path)
            if store.metadata != json.loads(text)["metadata"]:
                raise EpisodeStoreError(
                    f"{path} is an episode store with other metadata; open it with EpisodeStore.open, or choose another folder"
                )
            return store
        (path / "shards").mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, text)
        return cls(path, json.loads(text)["metadata"])

    @classmethod
    def open(cls, path: str | Path) -> EpisodeStore:
        """The store in the folder `path`. Raises FileNotFoundError if there is none, EpisodeStoreError if it is not ours."""
        path = Path(path)
        record = read_manifest(path / "store.json", FORMAT, SCHEMA, "an episode store", EpisodeStoreError)
        return cls(path, record["metadata"])

    def shard_path(self, index: int) -> Path:
        return self.path / "shards" / f"{index:05d}.zarr"

    def has_shard(self, index: int) -> bool:
        """Whether shard `index` is there; a shard that is there is whole."""
        return self.shard_path(index).exists()

    def shard_indices(self) -> list[int]:
        """The numbers of the shards that are there, ascending."""
        return shard_indices(self.path / "shards")

    def write_shard(self, index: int, episodes: Sequence[Episode], frames: Mapping[str, Iterable[np.ndarray]] | None = None) -> Path:
        """Write `episodes` as shard `index`; returns its folder. The same episodes give the same bytes.

        frames: of each camera, all frames of these episodes in blocks uint8 (n, H, W, 3), where they are too many to be held at once;
        then the episodes' own arrays of them only count.
        Raises EpisodeStoreError if that shard is there already, ValueError for no episodes, an `info` that is not JSON, or episodes
        that do not have the same arrays.
        """
        target = self.shard_path(index)
        if target.exists():
            raise EpisodeStoreError(f"{target} is there already; shards are never overwritten")
        if not episodes:
            raise ValueError(f"shard {index} of {self.path} would hold no episode; write at least one")
        records = [_record(episode) for episode in episodes]
        json_text(records, f"task, instruction and info of the episodes for {target}")
        attributes = {"format": SHARD_FORMAT, "schema": SCHEMA, "episodes": records}
        columns: dict[str, np.ndarray | Blocks] = {}
        for name, dtype in _shared_arrays(episodes).items():
            if frames and name in CAMERAS:
                shape = getattr(episodes[0], name).shape[1:]
                columns[name] = Blocks(shape=(sum(record["frames"] for record in records), *shape), dtype=dtype, blocks=frames[name])
            else:
                columns[name] = np.concatenate([_exact(episode, name, dtype) for episode in episodes])
        if episodes[0].extra:
            attributes["extra"] = list(episodes[0].extra)
        write_shard_atomic(target, columns, attributes)
        return target

    def records(self, index: int) -> list[dict[str, Any]]:
        """Per episode of shard `index`: {task, instruction, steps, frames, info}, without reading an array."""
        return list(self._group(index).attrs["episodes"])

    def read_shard(self, index: int) -> list[Episode]:
        """All episodes of shard `index`, in the order they were written. Raises EpisodeStoreError."""
        steps, extra = self.step_arrays(index)
        columns = self.read_columns(index, (*steps, *FRAME_ARRAYS, *(EXTRA + name for name in extra)))
        return [
            Episode(
                task=record["task"],
                instruction=record["instruction"],
                info=dict(record["info"]),
                extra={name: arrays.pop(EXTRA + name) for name in extra},
                **arrays,
            )
            for record, arrays in zip(self.records(index), columns, strict=True)
        ]

    def step_arrays(self, index: int) -> tuple[list[str], list[str]]:
        """What shard `index` has with a row a step: fields of Episode, and names of its `extra`."""
        group = self._group(index)
        return [name for name in STEP_ARRAYS if name != SCENE or SCENE in group], list(group.attrs.get("extra", []))

    def extra_types(self, index: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Of each `extra` of shard `index`: dtype and shape of one step's value, without reading it."""
        group, names = self._group(index), self.step_arrays(index)[1]
        return {name: (str(group[EXTRA + name].dtype), tuple(group[EXTRA + name].shape[1:])) for name in names}

    def read_columns(self, index: int, names: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Only the arrays `names` (fields of envs.spec.Episode) of every episode of shard `index`. Raises EpisodeStoreError."""
        group, path = self._group(index), self.shard_path(index)
        if SCENE in names and SCENE not in group:
            raise EpisodeStoreError(f"{path} has no {SCENE}: its recordings know nothing of the scene's state")
        columns = {name: read_array(group, name, path) for name in names}
        episodes, step, frame = [], 0, 0
        for record in group.attrs["episodes"]:
            steps, frames = slice(step, step + record["steps"]), slice(frame, frame + record["frames"])
            episodes.append({name: columns[name][frames if name in FRAME_ARRAYS else steps] for name in names})
            step, frame = steps.stop, frames.stop
        return episodes

    def read_frames(self, camera: str, index: int, frames: slice = slice(None)) -> np.ndarray:
        """Frames of one camera of shard `index`, episodes one after another: uint8 (N, H, W, 3).

        frames: which of the shard's frames; only the chunks of FRAMES_PER_CHUNK frames that it touches are read.
        Raises EpisodeStoreError, and ValueError for a camera that is not one of envs.spec.CAMERAS.
        """
        if camera not in CAMERAS:
            raise ValueError(f"unknown camera {camera!r}, expected one of {', '.join(CAMERAS)}")
        return read_array(self._group(index), camera, self.shard_path(index), frames)

    def totals(self) -> Totals:
        """How much the store holds, from the shards' records."""
        records = [record for index in self.shard_indices() for record in self.records(index)]
        return Totals(
            shards=len(self.shard_indices()),
            episodes=len(records),
            steps=sum(record["steps"] for record in records),
            frames=sum(record["frames"] for record in records),
            tasks=dict(sorted(Counter(record["task"] for record in records).items())),
        )

    def __len__(self) -> int:
        """Number of episodes."""
        return sum(len(self.records(index)) for index in self.shard_indices())

    def _group(self, index: int) -> zarr.Group:
        path = self.shard_path(index)
        if not path.exists():
            there = self.shard_indices()
            raise EpisodeStoreError(f"{self.path} has no shard {index}; it has {len(there)} ({there[:3]}…{there[-1:]})")
        return open_shard(path, SHARD_FORMAT, SCHEMA, EpisodeStoreError)


def _record(episode: Episode) -> dict[str, Any]:
    return {
        "task": episode.task,
        "instruction": episode.instruction,
        "steps": len(episode.actions),
        "frames": len(episode.frame_step),
        "info": episode.info,
    }


def _shared_arrays(episodes: Sequence[Episode]) -> dict[str, str]:
    """Names and dtypes of the arrays that a shard of these episodes has. Raises ValueError where one lacks what another has."""
    first = episodes[0]
    extra = {name: str(values.dtype) for name, values in first.extra.items()}
    for episode in episodes:
        if (episode.scene_obs is None) != (first.scene_obs is None) or list(episode.extra) != list(extra):
            raise ValueError(
                f"episode of {episode.task!r} has not the same arrays as that of {first.task!r} (scene_obs, or extra: "
                f"{list(episode.extra)} and {list(extra)}); write them into different stores"
            )
    if wrong := next((name for name in extra if "/" in name or not name), None):
        raise ValueError(f"extra {wrong!r}: a name must not be empty or contain '/'")
    arrays = STEP_ARRAYS | FRAME_ARRAYS
    if first.scene_obs is None:
        arrays = {name: dtype for name, dtype in arrays.items() if name != SCENE}
    return arrays | {EXTRA + name: dtype for name, dtype in extra.items()}


def _exact(episode: Episode, name: str, dtype: str) -> np.ndarray:
    array = episode.extra[name.removeprefix(EXTRA)] if name.startswith(EXTRA) else getattr(episode, name)
    if array.dtype != dtype:
        raise ValueError(f"episode of {episode.task!r}: {name} is {array.dtype}, expected {dtype}; convert it before writing")
    return array


# The pieces below know nothing of episodes: the token store is built of the same ones.


def json_text(value: Any, what: str) -> str:
    """`value` as JSON text. Raises ValueError naming `what` if it is not JSON (NaN, numpy scalars, ...)."""
    try:
        return json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from error


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` beside `path`, then rename it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read_manifest(path: Path, format: str, schema: int, what: str, error: type[ValueError]) -> dict[str, Any]:
    """The JSON object in `path`, which must be of `format` and `schema`. Raises FileNotFoundError or `error`."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} does not exist, expected the folder of {what}")
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not {what}: it has no {path.name}")
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as problem:
        raise error(f"{path} is damaged or cut short ({problem}); restore it or make the store again") from problem
    if not isinstance(record, dict) or record.get("format") != format:
        raise error(f"{path} is not the manifest of {what}: expected format {format!r}")
    if record.get("schema") != schema:
        raise error(f"{path} has schema {record.get('schema')!r}, this program reads schema {schema}; make the store again")
    return record


def shard_indices(folder: Path | UrlPath) -> list[int]:
    """Numbers of the shards `NNNNN.zarr` in `folder`, ascending; hidden (unfinished) ones are not counted."""
    names = folder.names() if isinstance(folder, UrlPath) else [path.name for path in folder.glob("[0-9]*.zarr")]
    return sorted(int(name.removesuffix(".zarr")) for name in names if name.removesuffix(".zarr").isdigit())


def split_shards(indices: Sequence[int], validation_fraction: float) -> tuple[list[int], list[int]]:
    """Shards to train on and shards held out, spread evenly; the same indices and fraction give the same split.

    At least one shard is held out unless the fraction is 0. Raises ValueError if nothing would be left to train on.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}, expected at least 0 and below 1")
    count = math.ceil(validation_fraction * len(indices))
    if len(indices) <= count:
        raise ValueError(f"{len(indices)} shards, of which {count} would be held out, leave none to train on; collect more")
    places = np.linspace(0, len(indices) - 1, 2 * count + 1).round().astype(int)[1::2]
    held_out = {indices[place] for place in places}
    return [index for index in indices if index not in held_out], sorted(held_out)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """An array too large to be held: its shape, and its rows in blocks of any length."""

    shape: tuple[int, ...]
    dtype: str
    blocks: Iterable[np.ndarray]

    def regular(self, rows: int) -> Iterator[np.ndarray]:
        """The same rows in blocks of `rows`, the last one shorter. Raises ValueError where they are not as many as `shape` says."""
        waiting = np.zeros((min(rows, self.shape[0]), *self.shape[1:]), self.dtype)
        filled = total = 0
        for block in self.blocks:
            if block.dtype != waiting.dtype or block.shape[1:] != self.shape[1:]:
                raise ValueError(
                    f"a block is {block.dtype} {block.shape}, expected {self.dtype} (n, {', '.join(map(str, self.shape[1:]))})"
                )
            total += len(block)
            while len(block) and total <= self.shape[0]:
                taken = block[: len(waiting) - filled]
                waiting[filled : filled + len(taken)] = taken
                filled, block = filled + len(taken), block[len(taken) :]
                if filled == len(waiting):
                    yield waiting
                    filled = 0
        if total != self.shape[0]:
            raise ValueError(f"the blocks hold {total} rows, expected {self.shape[0]}")
        if filled:
            yield waiting[:filled]


def write_shard_atomic(target: Path, columns: Mapping[str, np.ndarray | Blocks], attributes: dict[str, Any]) -> None:
    """Write arrays and attributes as one Zarr group at `target`: under a hidden name, then renamed."""
    temporary = target.with_name(f".{target.name}.tmp")
    if temporary.exists():  # a writer of this very shard was killed; nobody else writes to this name
        shutil.rmtree(temporary)
    group = zarr.create_group(str(temporary), attributes=attributes)
    for name, column in columns.items():
        _write_array(group, name, column)
    temporary.rename(target)


def _write_array(group: zarr.Group, name: str, values: np.ndarray | Blocks) -> None:
    rows, pictures = values.shape[0], len(values.shape) > 2
    chunk = max(1, min(FRAMES_PER_CHUNK if pictures else STEPS_PER_CHUNK, rows))
    chunks = max(1, math.ceil(rows / chunk))
    per_file = min(chunks, FRAMES_PER_FILE // FRAMES_PER_CHUNK) if pictures else chunks
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk, *values.shape[1:]),
        shards=(per_file * chunk, *values.shape[1:]),
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        # Otherwise a chunk of zeros is left out, and a lost file could not be told from one.
        config={"write_empty_chunks": True},
    )
    start = 0
    for block in values.regular(array.shards[0]) if isinstance(values, Blocks) else [values] if rows else []:
        array[start : start + len(block)] = block
        start += len(block)


def open_shard(path: Path | UrlPath, format: str, schema: int, error: type[ValueError]) -> zarr.Group:
    """The Zarr group at `path`, checked to be a shard of `format`. Raises `error`."""
    try:
        group = zarr.open_group(str(path), mode="r")
    except (OSError, ValueError, KeyError) as problem:
        raise error(f"{path} cannot be opened as a Zarr group ({problem}); delete that shard and make it again") from problem
    if group.attrs.get("format") != format or group.attrs.get("schema") != schema:
        raise error(
            f"{path} is of format {group.attrs.get('format')!r} and schema {group.attrs.get('schema')!r}, expected {format!r} and {schema}"
        )
    return group


def read_array(group: zarr.Group, name: str, path: Path | UrlPath, rows: slice = slice(None)) -> np.ndarray:
    """Rows of one array of a shard. Raises EpisodeStoreError where a file is missing or its checksum is wrong."""
    try:
        array = group[name]
        # Zarr reads a missing file as zeros. We write every one, so its absence is damage.
        for number in range(math.ceil(array.shape[0] / array.shards[0])):
            if not (path / f"{name}/c/{'/'.join([str(number), *'0' * (array.ndim - 1)])}").is_file():
                raise FileNotFoundError(f"no data file {number} of {name}")
        return np.asarray(array[rows])
    except (OSError, ValueError, KeyError, RuntimeError) as problem:
        raise EpisodeStoreError(f"{path}: array {name!r} is damaged ({problem}); delete that shard and make it again") from problem
