"""`emu3-vla inspect`: what a dataset holds, and what in it is suspicious.

    emu3-vla inspect recordings/pick
    emu3-vla inspect recordings/pick --rerun=[0,17] --view          # these episodes as Rerun recordings, and open them
    emu3-vla inspect outputs/episodes frames=false                   # numbers and clocks alone: nothing is decoded

Reads every episode once, whatever the format; inspection.json has all that the table shows, and more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from emu3_vla.data.episodes import write_text_atomic
from emu3_vla.data.recordings.checks import Comparison, Finding, damaged, findings_in
from emu3_vla.data.recordings.formats import open_dataset
from emu3_vla.data.recordings.recording import Recording, RecordingError, Schema, Source

REPORT = "inspection.json"
SHOWN = 30  # findings, sentences and entries in the table; the file has all


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Options of `emu3-vla inspect`."""

    dataset: str
    """Folder: LeRobot v2.0, v2.1 or v3.0, an episode store, or a split of a CALVIN dataset."""
    frames: bool = True
    """Decode every frame, to find frozen cameras and damaged videos."""
    rerun: tuple[int, ...] = ()
    """Episodes to write as Rerun recordings."""
    view: bool = False
    """Open these in Rerun's viewer."""
    output_dir: str = ""

    def __post_init__(self):
        if self.view and not self.rerun:
            raise ValueError("view=true shows the episodes of rerun=[…]; name some")


def main(config: InspectConfig) -> None:
    """Inspect, print the table, and write inspection.json and the recordings into output_dir. Prints where."""
    source = open_dataset(config.dataset)
    if unknown := [number for number in config.rerun if not 0 <= number < len(source.lengths)]:
        raise ValueError(f"rerun={unknown[0]}: {source.path} has episodes 0 to {len(source.lengths) - 1}")
    report = inspect(source, config.frames)
    folder = Path(config.output_dir)
    write_text_atomic(folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False))
    _print(report)
    recordings = _write_recordings(folder, source, config.rerun)
    print(folder / REPORT)
    if config.view:
        subprocess.Popen([sys.executable, "-m", "rerun", *map(str, recordings)])


def inspect(source: Source, frames: bool) -> dict[str, Any]:
    """What inspection.json says."""
    findings: list[Finding] = []
    comparison, ranges = Comparison.empty(), {name: Range() for name, column in source.schema.columns.items() if column.dtype != "string"}
    gaps_s: list[float] = []
    columns = (TextColumn("inspect"), BarColumn(), MofNCompleteColumn(), TextColumn("episodes"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty() and not sys.stdout.isatty()) as progress:
        bar = progress.add_task("", total=len(source.lengths))
        for number in range(len(source.lengths)):
            try:
                recording = source.read(number)
                for name, range_ in ranges.items():
                    range_.add(recording.columns[name])
                if recording.time_s is not None and len(recording) > 1:
                    gaps_s.append(float(np.median(np.diff(recording.time_s))))
                findings += comparison.add(recording, source.schema, number)
                findings += findings_in(source, recording, number, frames)
            except RecordingError as error:
                findings.append(damaged(number, error))
            progress.update(bar, advance=1)
    findings += comparison.findings()
    return _report(source, ranges, gaps_s, sorted(findings, key=lambda finding: finding.episode))


def _report(source: Source, ranges: dict[str, Range], gaps_s: list[float], findings: list[Finding]) -> dict[str, Any]:
    schema, lengths = source.schema, source.lengths
    told = Counter(sentence for sentences in source.told for sentence in sentences)
    return {
        "dataset": str(source.path),
        "format": source.format,
        "robot": schema.robot,
        "episodes": len(lengths),
        "steps": sum(lengths),
        "seconds": sum(lengths) / schema.rate_hz,
        "rate_hz": schema.rate_hz,
        "measured_rate_hz": float(1 / np.median(gaps_s)) if gaps_s and np.median(gaps_s) > 0 else None,
        "length": {"shortest": min(lengths, default=0), "median": float(np.median(lengths or [0])), "longest": max(lengths, default=0)},
        "cameras": {name: [picture.height, picture.width] for name, picture in schema.cameras.items()},
        "frame_at_every_step": schema.every_step,
        "columns": {name: _column(schema, name, range_) for name, range_ in ranges.items()},
        "instructions": dict(told.most_common()),
        "not_read": source.losses,
        "findings": [finding.record() for finding in findings],
    }


def _column(schema: Schema, name: str, range_: Range) -> dict[str, Any]:
    column = schema.columns[name]
    return {"dtype": column.dtype, "shape": list(column.shape), "names": column.names, **range_.record()}


class Range:
    """Least, largest, mean and spread of each entry of a column, over finite values."""

    def __init__(self):
        self.low = self.high = self.total = self.squares = self.count = None

    def add(self, values: np.ndarray) -> None:
        flat = values.reshape(len(values), -1).astype(np.float64)
        finite = np.isfinite(flat)
        known = np.where(finite, flat, 0)
        low, high = np.where(finite, flat, np.inf).min(axis=0), np.where(finite, flat, -np.inf).max(axis=0)
        parts = (low, high, known.sum(axis=0), (known**2).sum(axis=0), finite.sum(axis=0))
        if self.count is None:
            self.low, self.high, self.total, self.squares, self.count = parts
            return
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        self.total, self.squares, self.count = self.total + parts[2], self.squares + parts[3], self.count + parts[4]

    def record(self) -> dict[str, list]:
        """None for entries that were never finite."""
        if self.count is None:
            return {}
        count = np.maximum(self.count, 1)
        mean = self.total / count
        std = np.sqrt(np.maximum(self.squares / count - mean**2, 0))
        known = self.count > 0
        parts = {"min": self.low, "max": self.high, "mean": mean, "std": std}
        return {name: [float(v) if k else None for v, k in zip(values, known, strict=True)] for name, values in parts.items()}


def _print(report: dict[str, Any]) -> None:
    console = Console()
    cameras = ", ".join(f"{name} {width}×{height}" for name, (height, width) in report["cameras"].items())
    minutes, length = report["seconds"] / 60, report["length"]
    console.print(f"[bold]{report['dataset']}[/bold]: {report['format']}{', ' + report['robot'] if report['robot'] else ''}")
    console.print(f"{report['episodes']} episodes, {report['steps']} steps at {report['rate_hz']:g} Hz, {minutes:.1f} min; ", end="")
    console.print(f"{length['shortest']} to {length['longest']} steps, median {length['median']:g}")
    console.print(f"cameras: {cameras or 'none'}{'' if report['frame_at_every_step'] else ' (not at every step)'}")
    for sentence in report["not_read"]:
        console.print(f"not read: {sentence}")
    table = Table("column", "entry", "min", "max", "mean", "std")
    for name, column in report["columns"].items():
        for entry in range(min(len(column.get("min", [])), SHOWN)):
            numbers = [column[part][entry] for part in ("min", "max", "mean", "std")]
            table.add_row(name if not entry else "", str(entry), *("–" if number is None else f"{number:.4g}" for number in numbers))
    console.print(table)
    table = Table("instruction", "episodes")
    for sentence, count in list(report["instructions"].items())[:SHOWN]:
        table.add_row(sentence or "–", str(count))
    console.print(table)
    _print_findings(console, report["findings"])


def _print_findings(console: Console, findings: list[dict[str, Any]]) -> None:
    if not findings:
        console.print("nothing suspicious")
        return
    kinds = Counter(finding["kind"] for finding in findings)
    table = Table("episode", "step", "kind", "what", title=", ".join(f"{kind}: {count}" for kind, count in kinds.most_common()))
    for finding in findings[:SHOWN]:
        table.add_row(str(finding["episode"]), "" if finding["step"] is None else str(finding["step"]), finding["kind"], finding["what"])
    console.print(table)
    if len(findings) > SHOWN:
        console.print(f"and {len(findings) - SHOWN} more in {REPORT}")


def _write_recordings(folder: Path, source: Source, episodes: tuple[int, ...]) -> list[Path]:
    paths = []
    for number in episodes:
        from emu3_vla.data.recordings.viewing import write_recording

        paths.append(folder / f"episode_{number:06d}.rrd")
        recording: Recording = source.read(number)
        write_recording(paths[-1], recording, source.schema)
        print(paths[-1])
    return paths
