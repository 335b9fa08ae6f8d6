"""`emu3-vla convert`: a dataset of recordings into another format.

    emu3-vla convert source=recordings/pick target_format=zarr mapping=absolute_pose output_dir=outputs/pick
    emu3-vla convert source=outputs/episodes target_format=lerobot_v3.0 output_dir=outputs/episodes_lerobot
    emu3-vla convert source=recordings/pick target_format=lerobot_v2.1 video.lossless=true 'skip=[3,17]'

What will be lost is listed before anything is written, and again in conversion.json beside the data. Episodes are written in parts; a part
that is there is whole, so the same command goes on after a kill and ends with the same bytes. Until the last part is written the folder is
no dataset of its format.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from emu3_vla.data.episodes import write_text_atomic
from emu3_vla.data.recordings import calvin, lerobot_v21, lerobot_v30, zarr_store
from emu3_vla.data.recordings.formats import named, open_dataset, require_pyarrow
from emu3_vla.data.recordings.lerobot import CLOCK_TOLERANCE_S
from emu3_vla.data.recordings.mapped import MappedSource
from emu3_vla.data.recordings.mapping import MappingError, load_mapping
from emu3_vla.data.recordings.recording import Part, Recording, RecordingError, Source, Target, is_action, parts_of, require_finite
from emu3_vla.data.recordings.video import VideoConfig

RECORD = "conversion.json"
PARTS = ".parts"


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Options of `emu3-vla convert`."""

    source: str
    """Folder of a dataset: LeRobot v2.0, v2.1 or v3.0, an episode store, or a split of a CALVIN dataset. Its format is detected."""
    target_format: str
    """calvin, lerobot_v2.1, lerobot_v3.0 or zarr."""
    mapping: str = ""
    """Which key is what: a YAML file, or a preset of configs/mappings. Needed where a foreign LeRobot dataset becomes our own episodes."""
    skip: tuple[int, ...] = ()
    """Episodes to leave out, by their number in the source."""
    steps_per_part: int = 0
    """A part (Zarr shard, LeRobot v3.0 file) ends with the episode that reaches so many steps; 0: what suits the format."""
    video: VideoConfig = field(default_factory=VideoConfig)
    """How LeRobot's videos are compressed."""
    workers: int = 1
    """Processes, one thread each."""
    output_dir: str = ""

    def __post_init__(self):
        named(self.target_format)
        if self.workers < 1 or self.steps_per_part < 0:
            raise ValueError(f"workers={self.workers} must be at least 1 and steps_per_part={self.steps_per_part} at least 0")


class Chosen:
    """A dataset without the episodes that are left out."""

    def __init__(self, source: Source, skip: tuple[int, ...]):
        if unknown := [number for number in skip if not 0 <= number < len(source.lengths)]:
            raise ValueError(f"skip={unknown[0]}: {source.path} has episodes 0 to {len(source.lengths) - 1}")
        self.source, self.format, self.path, self.schema = source, source.format, source.path, source.schema
        self.numbers = [number for number in range(len(source.lengths)) if number not in skip]
        if not self.numbers:
            raise ValueError(f"skip leaves no episode of {source.path}")
        self.lengths = [source.lengths[number] for number in self.numbers]
        self.told = [source.told[number] for number in self.numbers]
        self.losses = source.losses + ([f"{len(skip)} episodes are left out (skip)"] if skip else [])

    def read(self, number: int) -> Recording:
        return self.source.read(self.numbers[number])


def main(config: ConvertConfig) -> None:
    """Write the missing parts of the dataset in output_dir. Prints its folder."""
    folder = Path(config.output_dir)
    source, target = opened(config)
    parts = parts_of(source.lengths, config.steps_per_part or target.steps_per_part)
    record = _record(config, source, parts)
    earlier = _earlier(folder, record)
    if not earlier:
        print(
            f"{source.path}: {source.format}, {len(source.lengths)} episodes, {sum(source.lengths)} steps at {source.schema.rate_hz:g} Hz"
        )
        record["losses"] = [*source.losses, *_merged(source, target), *target.losses, *survey(source)]
        _say(record["losses"], target.format)
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder / RECORD, json.dumps(record | {"finished": False}, indent=1, ensure_ascii=False))
    elif earlier["finished"]:
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # all that a kill at the very end leaves
        print(f"{folder} is finished already")
        return
    else:
        record["losses"] = earlier["losses"]
    _write_parts(config, source, target, parts)
    written = [(part, json.loads(_part_file(folder, part).read_text())) for part in parts]
    target.finish(written)
    write_text_atomic(folder / RECORD, json.dumps(record | {"finished": True}, indent=1, ensure_ascii=False))
    shutil.rmtree(folder / PARTS)
    print(f"{len(source.lengths)} episodes, {sum(source.lengths)} steps, {target.format}: {folder}")


def opened(config: ConvertConfig) -> tuple[Chosen, Target]:
    """What is read and what is written. Raises an error that names what does not fit."""
    format = named(config.target_format)
    if format.startswith("lerobot"):
        require_pyarrow()
    source: Source = open_dataset(config.source)
    name = config.mapping or _usual_mapping(source, format)
    if name:
        source = MappedSource(source, load_mapping(name)[0], name)
    chosen = Chosen(source, config.skip)
    folder = Path(config.output_dir)
    if format == "zarr":
        return chosen, zarr_store.Target(folder, chosen.schema)
    if format == "calvin":
        return chosen, calvin.Target(folder, chosen.schema)
    layout = lerobot_v21 if format == "lerobot_v2.1" else lerobot_v30
    return chosen, layout.Target(folder, chosen.schema, chosen.told, config.video)


def _usual_mapping(source: Source, format: str) -> str:
    """The mapping that goes without saying; empty: none is needed."""
    if source.format == "calvin":
        return "calvin"
    if source.schema.canonical or format.startswith("lerobot"):
        return ""
    raise MappingError(
        f"{source.path} is {source.format} with cameras {', '.join(source.schema.cameras) or 'none'} and columns "
        f"{', '.join(source.schema.columns)}; say with mapping= which of them is what (docs/data.md), to write {format}"
    )


def _merged(source: Chosen, target: Target) -> list[str]:
    changed = sum(len(sentences) > 1 for sentences in source.told)
    if not changed or target.format.startswith("lerobot"):
        return []
    return [f"{changed} episodes change their instruction on the way; the first one is kept for all their steps"]


def survey(source: Chosen) -> list[str]:
    """Losses that only the numbers show: clipped actions, clocks. Raises for actions that are not finite, before anything is written."""
    mapped = source.source if isinstance(source.source, MappedSource) else None
    if source.format == "calvin" and mapped and mapped.mapping.actions.kind == "copy":
        return []  # a file a step: looking twice would double the time, and nothing here can depend on the numbers
    clipped, largest, count, worst_s = 0, 0.0, 0, 0.0
    with _progress("look through", "episodes") as progress:
        bar = progress.add_task("", total=len(source.lengths))
        for number, place in enumerate(source.numbers):
            recording, beyond = mapped.read_uncut(place) if mapped else (source.read(number), np.zeros(0))
            require_finite(recording, [name for name in recording.columns if is_action(name)])
            if recording.time_s is not None:
                even = np.arange(len(recording)) / source.schema.rate_hz
                worst_s = max(worst_s, float(np.abs(recording.time_s - recording.time_s[0] - even).max()))
            clipped, count, largest = clipped + int((beyond > 0).sum()), count + beyond.size, max(largest, float(beyond.max(initial=0)))
            progress.update(bar, advance=1)
    found = []
    if clipped:
        found.append(f"actions: {100 * clipped / count:.2g} % of their entries are cut to ±1 (the largest was ±{1 + largest:.3g})")
    if worst_s > CLOCK_TOLERANCE_S:
        found.append(
            f"timestamps: they leave the even rate of {source.schema.rate_hz:g} Hz by up to {worst_s:.3g} s; the even ones are written"
        )
    return found


def _say(losses: list[str], format: str) -> None:
    if not losses:
        print(f"nothing is lost in {format}")
        return
    print(f"lost in {format}:")
    for loss in losses:
        print(f"  - {loss}")


def _record(config: ConvertConfig, source: Chosen, parts: list[Part]) -> dict[str, Any]:
    """What conversion.json says, but for the losses."""
    lengths = hashlib.sha256(json.dumps([source.lengths, source.told]).encode()).hexdigest()
    mapping = config.mapping and load_mapping(config.mapping)[1]
    return {
        "source": str(source.path),
        "source_format": source.format,
        "target_format": named(config.target_format),
        "episodes": len(source.lengths),
        "steps": sum(source.lengths),
        "rate_hz": source.schema.rate_hz,
        "parts": len(parts),
        "source_digest": lengths,
        "skip": list(config.skip),
        "mapping": config.mapping,
        "mapping_text": mapping,
        "video": asdict(config.video) if config.target_format.startswith("lerobot") else None,
    }


def _earlier(folder: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the run that goes on here. Raises RecordingError where the source or the mapping is another one by now."""
    if not (folder / RECORD).is_file():
        return None
    earlier = json.loads((folder / RECORD).read_text())
    for name in ("source_digest", "mapping_text", "parts"):
        if earlier[name] != record[name]:
            raise RecordingError(f"{folder} was begun with another {name.split('_')[0]} than there is now; convert into a new folder")
    return earlier


def _part_file(folder: Path, part: Part) -> Path:
    return folder / PARTS / f"{part.number:06d}.json"


def _write_parts(config: ConvertConfig, source: Chosen, target: Target, parts: list[Part]) -> None:
    """Parts that are not there yet, with a live bar."""
    folder = Path(config.output_dir)
    missing = [part for part in parts if not _part_file(folder, part).exists()]
    steps = {part.number: sum(part.lengths) for part in parts}
    with _progress("convert", "steps") as progress:
        total = sum(steps.values())
        bar = progress.add_task("", total=total, completed=total - sum(steps[part.number] for part in missing))
        if config.workers == 1:
            for part in missing:
                _write_part(folder, source, target, part)
                progress.update(bar, advance=steps[part.number])
            return
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # for the workers
        with multiprocessing.get_context("spawn").Pool(min(config.workers, max(1, len(missing)))) as pool:
            for number in pool.imap_unordered(_write_there, [(config, part) for part in missing]):
                progress.update(bar, advance=steps[number])


def _write_part(folder: Path, source: Chosen, target: Target, part: Part) -> None:
    """Write one part and then its record, which says that it is there."""
    written = target.write_part(part, _recordings(source, part))
    write_text_atomic(_part_file(folder, part), json.dumps(written))


def _write_there(job: tuple[ConvertConfig, Part]) -> int:
    """The same in a worker process; returns the part's number."""
    config, part = job
    _write_part(Path(config.output_dir), *_opened(config), part)
    return part.number


@cache  # once a process, not once a part
def _opened(config: ConvertConfig) -> tuple[Chosen, Target]:
    return opened(config)


def _recordings(source: Chosen, part: Part) -> Iterator[Recording]:
    for number in range(part.first_episode, part.first_episode + len(part.lengths)):
        recording = source.read(number)
        require_finite(recording, [name for name in recording.columns if is_action(name)])
        yield recording


def _progress(what: str, unit: str) -> Progress:
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=not sys.stderr.isatty() and not sys.stdout.isatty())
