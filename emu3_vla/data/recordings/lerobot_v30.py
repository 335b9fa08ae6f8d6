"""LeRobot v3.0: many episodes in one parquet file and one video a camera; metadata in parquet.

meta/info.json, meta/stats.json, meta/tasks.parquet, meta/episodes/chunk-000/file-000.parquet; data/chunk-000/file-000.parquet;
videos/<camera>/chunk-000/file-000.mp4. The table of episodes says in which file each lies and from which moment on. We give rows and
videos of the same episodes the same numbers, so that each such group is a part of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emu3_vla.data.episodes import write_text_atomic
from emu3_vla.data.recordings.lerobot import CHUNK, LeRobotSource, LeRobotTarget, episodes_in_order
from emu3_vla.data.recordings.recording import Part, Recording, RecordingError
from emu3_vla.data.recordings.statistics import joined
from emu3_vla.data.recordings.tables import read_table, write_table

if TYPE_CHECKING:
    import pyarrow as pa

VERSIONS = ("v3.0",)
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA, VIDEO, EPISODES = f"data/{FILE}.parquet", "videos/{video_key}/" + FILE + ".mp4", f"meta/episodes/{FILE}.parquet"
TASKS, STATISTICS = "meta/tasks.parquet", "meta/stats.json"
# pandas' word for an index without a name; LeRobot looks tasks up by it.
TASK_COLUMN = "__index_level_0__"


class Source(LeRobotSource):
    """A v3.0 dataset: several episodes to a table and to a video, metadata as parquet."""

    format = "lerobot_v3.0"

    def _read_metadata(self) -> tuple[dict[int, str], list[int], list[tuple[str, ...]]]:
        where = str(self.path)
        table = read_table(self.path / TASKS, where)
        sentences = next((name for name in table.column_names if name != "task_index"), None)
        if sentences is None:
            raise RecordingError(f"{self.path / TASKS} has no column of sentences beside task_index")
        tasks = dict(zip(table["task_index"].to_pylist(), table[sentences].to_pylist(), strict=True))
        files = sorted((self.path / "meta/episodes").glob("*/*.parquet"))
        if not files:
            raise RecordingError(f"{self.path} has no meta/episodes/*/*.parquet")
        self._episodes: list[dict[str, Any]] = []
        for file in files:
            found = read_table(file, where)
            # Every statistic has its own columns, hundreds of them, which nobody needs here.
            self._episodes += found.select([name for name in found.column_names if not name.startswith("stats/")]).to_pylist()
        self._episodes.sort(key=lambda episode: episode["episode_index"])
        if [episode["episode_index"] for episode in self._episodes] != list(range(len(self._episodes))):
            raise RecordingError(f"{self.path}/meta/episodes does not number its {len(self._episodes)} episodes 0, 1, 2, …")
        self._opened: tuple[Path, pa.Table] | None = None
        return tasks, [int(episode["length"]) for episode in self._episodes], [tuple(episode["tasks"]) for episode in self._episodes]

    def _rows(self, number: int) -> pa.Table:
        import pyarrow.compute as pc

        episode = self._episodes[number]
        place = {"chunk_index": episode["data/chunk_index"], "file_index": episode["data/file_index"]}
        path = self.path / self.info["data_path"].format(**place)
        if self._opened is None or self._opened[0] != path:  # episodes of one file follow each other: read it once
            self._opened = (path, read_table(path, f"episode {number} of {self.path}"))
        table = self._opened[1]
        if "episode_index" not in table.column_names:
            raise RecordingError(f"{path} has no column episode_index")
        return table.filter(pc.equal(table["episode_index"], number))

    def video(self, number: int, key: str) -> tuple[Path, int]:
        episode = self._episodes[number]
        place = {name: episode[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
        start_s = float(episode[f"videos/{key}/from_timestamp"])
        return self.path / self.info["video_path"].format(video_key=key, **place), round(start_s * float(self.info["fps"]))


class Target(LeRobotTarget):
    """Writes v3.0."""

    format = "lerobot_v3.0"
    version = "v3.0"
    steps_per_part = 20_000  # minutes of writing, and files of some tens of megabytes

    def write_part(self, part: Part, recordings: Iterator[Recording]) -> dict[str, Any]:
        import pyarrow as pa

        place = _place(part.number)
        held = list(recordings)  # their numbers; frames stay on disk
        tables, first_step = [], part.first_step
        for number, recording in enumerate(held, part.first_episode):
            tables.append(self.rows(recording, number, first_step))
            first_step += len(recording)
        seen = {
            camera: self.write_camera(self.folder / VIDEO.format(video_key=key, **place), camera, held)
            for camera, key in self.cameras.items()
        }
        write_table(pa.concat_tables(tables), self.folder / DATA.format(**place))
        return {
            "episodes": [
                self.record(recording, table, {camera: found[index] for camera, found in seen.items()})
                for index, (recording, table) in enumerate(zip(held, tables, strict=True))
            ]
        }

    def finish(self, parts: list[tuple[Part, dict[str, Any]]]) -> None:
        for part, written in parts:
            write_table(self._table_of_episodes(part, written["episodes"]), self.folder / EPISODES.format(**_place(part.number)))
        write_table(self._table_of_tasks(), self.folder / TASKS)
        episodes = episodes_in_order(parts)
        write_text_atomic(self.folder / STATISTICS, json.dumps(joined([episode["stats"] for episode in episodes]), indent=4))
        more = {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "data_path": DATA, "video_path": VIDEO}
        self.write_info(episodes, more if self.cameras else more | {"video_path": None})

    def _table_of_episodes(self, part: Part, episodes: list[dict[str, Any]]) -> pa.Table:
        import pyarrow as pa

        place, rows, first = _place(part.number), [], 0
        for number, episode in enumerate(episodes, part.first_episode):
            row = {"episode_index": number, "tasks": episode["tasks"], "length": episode["length"]}
            row |= {f"data/{name}": value for name, value in place.items()}
            row |= {"dataset_from_index": part.first_step + first, "dataset_to_index": part.first_step + first + episode["length"]}
            for key in self.cameras.values():
                row |= {f"videos/{key}/{name}": value for name, value in place.items()}
                row[f"videos/{key}/from_timestamp"] = first / self.schema.rate_hz
                row[f"videos/{key}/to_timestamp"] = (first + episode["length"]) / self.schema.rate_hz
            row |= {f"stats/{key}/{name}": values for key, found in episode["stats"].items() for name, values in found.items()}
            rows.append(row | {f"meta/episodes/{name}": value for name, value in place.items()})
            first += episode["length"]
        return pa.Table.from_pylist(rows)

    def _table_of_tasks(self) -> pa.Table:
        """As pandas writes a frame whose index are the sentences."""
        import pyarrow as pa

        table = pa.table({"task_index": list(self.task_index.values()), TASK_COLUMN: list(self.task_index)})
        described = [_described("task_index", "task_index", "int64"), _described(None, TASK_COLUMN, "unicode")]
        pandas = {"index_columns": [TASK_COLUMN], "column_indexes": [], "columns": described, "pandas_version": "2.2.0"}
        return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _described(name: str | None, field: str, kind: str) -> dict[str, Any]:
    numpy = kind if kind == "int64" else "object"
    return {"name": name, "field_name": field, "pandas_type": kind, "numpy_type": numpy, "metadata": None}


def _place(number: int) -> dict[str, int]:
    return {"chunk_index": number // CHUNK, "file_index": number % CHUNK}
