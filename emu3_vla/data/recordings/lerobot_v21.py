"""LeRobot v2.1: a parquet file and a video a camera for each episode, metadata in JSON lines. v2.0 is read too.

meta/info.json, meta/tasks.jsonl, meta/episodes.jsonl, meta/episodes_stats.jsonl; data/chunk-000/episode_000000.parquet;
videos/chunk-000/<camera>/episode_000000.mp4. Where files lie is said by info.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emu3_vla.data.episodes import write_text_atomic
from emu3_vla.data.recordings.lerobot import CHUNK, LeRobotSource, LeRobotTarget, episodes_in_order
from emu3_vla.data.recordings.recording import Part, Recording, RecordingError
from emu3_vla.data.recordings.tables import read_lines, read_table, write_table

if TYPE_CHECKING:
    import pyarrow as pa

VERSIONS = ("v2.1", "v2.0")
DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
TASKS, EPISODES, STATISTICS = "meta/tasks.jsonl", "meta/episodes.jsonl", "meta/episodes_stats.jsonl"


class Source(LeRobotSource):
    """A v2.1 dataset: a table and videos per episode, metadata as JSON lines."""

    format = "lerobot_v2.1"

    def _read_metadata(self) -> tuple[dict[int, str], list[int], list[tuple[str, ...]]]:
        tasks = {int(line["task_index"]): line["task"] for line in read_lines(self.path / TASKS)}
        episodes = sorted(read_lines(self.path / EPISODES), key=lambda line: line["episode_index"])
        if [line["episode_index"] for line in episodes] != list(range(len(episodes))):
            raise RecordingError(f"{self.path / EPISODES} does not number its {len(episodes)} episodes 0, 1, 2, …")
        return tasks, [int(line["length"]) for line in episodes], [tuple(line["tasks"]) for line in episodes]

    def _place(self, pattern: str, number: int, key: str = "") -> Path:
        chunk = number // int(self.info.get("chunks_size", CHUNK))
        return self.path / self.info[pattern].format(episode_chunk=chunk, episode_index=number, video_key=key)

    def _rows(self, number: int) -> pa.Table:
        return read_table(self._place("data_path", number), f"episode {number} of {self.path}")

    def video(self, number: int, key: str) -> tuple[Path, int]:
        return self._place("video_path", number, key), 0


class Target(LeRobotTarget):
    """Writes v2.1."""

    format = "lerobot_v2.1"
    version = "v2.1"
    steps_per_part = 1  # every episode has files of its own

    def write_part(self, part: Part, recordings: Iterator[Recording]) -> dict[str, Any]:
        episodes, first_step = [], part.first_step
        for number, recording in enumerate(recordings, part.first_episode):
            place = {"episode_chunk": number // CHUNK, "episode_index": number}
            table = self.rows(recording, number, first_step)
            pictures = {}
            for camera, key in self.cameras.items():
                pictures[camera] = self.write_camera(self.folder / VIDEO.format(video_key=key, **place), camera, [recording])[0]
            write_table(table, self.folder / DATA.format(**place))
            episodes.append(self.record(recording, table, pictures))
            first_step += len(recording)
        return {"episodes": episodes}

    def finish(self, parts: list[tuple[Part, dict[str, Any]]]) -> None:
        episodes = episodes_in_order(parts)
        lines = {
            TASKS: [{"task_index": index, "task": sentence} for sentence, index in self.task_index.items()],
            EPISODES: [
                {"episode_index": number, "tasks": episode["tasks"], "length": episode["length"]} for number, episode in enumerate(episodes)
            ],
            STATISTICS: [{"episode_index": number, "stats": episode["stats"]} for number, episode in enumerate(episodes)],
        }
        (self.folder / "meta").mkdir(exist_ok=True)
        for name, values in lines.items():
            write_text_atomic(self.folder / name, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
        chunks = -(-len(episodes) // CHUNK)
        more = {"total_videos": len(episodes) * len(self.cameras), "total_chunks": chunks, "data_path": DATA, "video_path": VIDEO}
        self.write_info(episodes, more if self.cameras else more | {"video_path": None})
