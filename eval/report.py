"""results.json as one self-contained page: opens offline, on a phone and on a wide screen.

    emu3-vla report outputs/eval/3f2a91c0 --compare=outputs/eval/77c01b2e     two evaluations, side by side

`emu3-vla eval` and `emu3-vla rollout` write the page of their own results themselves.
"""

from __future__ import annotations

import base64
import io
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
from PIL import Image

from eval.charts import success_chart
from eval.gallery import FAILURES_FOLDER, Failure, failures_in
from eval.keeping import RECORDINGS_FOLDER, recording_name
from eval.protocol import OFFICIAL
from eval.published import ROWS, SIMULATOR
from eval.results import REPORT_FILE, read_results
from eval.statistics import FEWEST_FOR_INTERVAL

TEMPLATES = Path(__file__).parent / "templates"
EMBED_LIMIT_BYTES = 24 * 2**20
GALLERY_SHOWN, GALLERY_MOST = 12, 48
"""Failures at first sight, and in the page at all; the others stay in their folder."""

RUN_COLORS = ("var(--run-a)", "var(--run-b)", "var(--run-c)", "var(--run-d)")
SAME_RULES = ("name", "subtasks_per_chain", "max_steps", "control_hz", "reset_between_subtasks", "success")
"""Fields of the protocol that results shown side by side must share. The others (scene, assets, chains …) are shown where they differ."""


class DifferentRules(ValueError):
    """Results of different protocols, which mean nothing side by side."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Options of `emu3-vla report`."""

    results: str  # results.json, or the folder that holds it
    compare: tuple[str, ...] | str = ()  # up to three others, to be shown beside it
    output_dir: str = ""

    def __post_init__(self):
        object.__setattr__(self, "compare", (self.compare,) if isinstance(self.compare, str) else tuple(self.compare))
        if len(self.compare) >= len(RUN_COLORS):
            raise ValueError(f"compare= names {len(self.compare)} results, expected at most {len(RUN_COLORS) - 1}")


def main(config: ReportConfig) -> None:
    """Write report.html anew and print where it is."""
    results, others = read_results(config.results), [read_results(path) for path in config.compare]
    path, source = Path(config.output_dir) / REPORT_FILE, Path(config.results)
    write_report(results, path, compare=others, kept_in=source if source.is_dir() else source.parent)
    print(path)


def write_report(
    results: dict[str, Any],
    path: Path,
    *,
    video: Path | None = None,
    thumbnails: Sequence[dict[str, Any]] = (),
    compare: Sequence[dict[str, Any]] = (),
    kept_in: Path | None = None,
) -> None:
    """Write report.html, whole or not at all.

    results: what results.json holds. video: an MP4, embedded up to 24 MiB and linked by its name above that. thumbnails: as
    `VideoWriter.thumbnails` gives them (chain, position, task, success, image uint8 RGB). compare: other results, shown beside these.
    kept_in: folder with the pictures of failures and the recordings (see eval.keeping); default: the page's own.
    Raises DifferentRules for results to compare with that are of another protocol, naming the field.
    """
    for other in compare:
        check_same_rules(results, other)
    runs = _runs([results, *compare])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "number": _number, "words": lambda name: str(name).replace("_", " ")}
    failures, left_out = _gallery(results, kept_in or path.parent, path.parent)
    published = _published(results)
    length = len(results["success_rate"] or ())
    page = environment.get_template("report.html.j2").render(
        results=results,
        runs=runs,
        few=FEWEST_FOR_INTERVAL,
        chart=success_chart(runs, [row for row in published if row.success_rate], length) if length > 1 else None,
        published=published,
        published_simulator=SIMULATOR,
        tasks=_tasks(runs),
        failures=failures,
        failures_shown=GALLERY_SHOWN,
        failures_left_out=left_out,
        facts=_facts(runs),
        timing=_timing(runs),
        video=_video(video),
        thumbnails=[thumbnail | {"image": _picture(thumbnail["image"])} for thumbnail in thumbnails],
    )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page)
    temporary.replace(path)


def check_same_rules(results: dict[str, Any], other: dict[str, Any]) -> None:
    """Raises DifferentRules naming the first rule in which the protocols differ."""
    for key in SAME_RULES:
        ours, theirs = results["protocol"].get(key), other["protocol"].get(key)
        if ours != theirs:
            raise DifferentRules(f"protocol.{key} is {ours!r} here and {theirs!r} in the results to compare with; evaluate both alike")


def _runs(all_results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each result with its letter, name and colour; a single one needs no letter."""
    letters = "ABCD" if len(all_results) > 1 else ("",)
    return [
        {"label": letter or "this run", "name": f"{letter} {results['policy']}".strip(), "color": color, "results": results}
        for letter, color, results in zip(letters, RUN_COLORS, all_results, strict=False)
    ]


def _published(results: dict[str, Any]) -> Sequence[Any]:
    """Rows worth showing: beside long-horizon chains, enough of them for a share to mean something."""
    comparable = results["protocol"]["name"] == OFFICIAL["name"] and len(results["success_rate"] or ()) == OFFICIAL["subtasks_per_chain"]
    return ROWS if comparable and results["scored"] >= FEWEST_FOR_INTERVAL else ()


def _tasks(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a task, hardest for the first run first: name, and each run's figures (None where it never came to it)."""
    names = sorted({task for run in runs for task in run["results"]["per_task"]})
    rows = [{"task": task, "cells": [run["results"]["per_task"].get(task) for run in runs]} for task in names]
    return sorted(rows, key=lambda row: (row["cells"][0] is None, (row["cells"][0] or {}).get("rate", 0)))


def _gallery(results: dict[str, Any], kept_in: Path, page_folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Pictures of failed subtasks, as many tasks as possible first, and how many are left out of the page."""
    attempts = {
        (chain["index"], position): attempt
        for chain in results["chains"]
        for position, attempt in enumerate(chain["attempts"])
        if chain["error"] is None and not attempt["success"]
    }
    by_task: dict[str, list[Failure]] = defaultdict(list)
    for failure in failures_in(kept_in / FAILURES_FOLDER):
        if (failure.chain, failure.position) in attempts:
            by_task[failure.task].append(failure)
    rounds = max(map(len, by_task.values()), default=0)
    ordered = [found[number] for number in range(rounds) for _, found in sorted(by_task.items()) if number < len(found)]
    pictures = []
    for failure in ordered[:GALLERY_MOST]:
        recording = kept_in / RECORDINGS_FOLDER / recording_name(failure.chain)
        pictures.append(
            {
                "chain": failure.chain,
                "position": failure.position,
                "image": "data:image/jpeg;base64," + base64.b64encode(failure.path.read_bytes()).decode(),
                "attempt": {"instruction": "", "happened": []} | attempts[failure.chain, failure.position],
                "recording": quote(os.path.relpath(recording, page_folder)) if recording.is_file() else "",
            }
        )
    return pictures, len(ordered) - len(pictures)


def _facts(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the runs were made with: a row a fact, a value a run, and whether the runs differ in it."""
    packages = sorted({name for run in runs for name in run["results"]["versions"]})
    columns = []
    for run in runs:
        results = run["results"]
        columns.append(
            {
                "policy": results["policy"],
                "trained by commit": (results.get("policy_provenance") or {}).get("git_commit"),
                "simulator": results["simulator"],
                "renderer": results["renderer"],
                "scene": results["scene"],
                "assets": results["assets"],
                "calvin_env behaviour": results["calvin_env"],
                "instructions": results["protocol"].get("instructions"),
                "variants": ", ".join(results["protocol"].get("variants") or {}) or "none",
                "seed": results["seed"],
                "commit": results["git_commit"] or "not run from a git checkout",
                **{name: results["versions"].get(name) for name in packages},
            }
        )
    return _rows(columns)


def _timing(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shown = (
        ("control steps", "steps", 0),
        ("steps a second and worker", "steps_per_s_and_worker", 1),
        ("decisions", "decisions", 0),
        ("milliseconds a decision", "decision_ms", 1),
        ("seconds in chains", "chain_s", 1),
        ("wall seconds of the last run", "wall_s", 1),
    )
    return _rows([{name: _number(run["results"]["timing"].get(key), digits) for name, key, digits in shown} for run in runs])


def _rows(columns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Columns of equal keys as rows; a row in which no column has anything is left out."""
    rows = []
    for name in columns[0]:
        values = [column[name] for column in columns]
        if any(value is not None for value in values):
            words = ["–" if value is None else str(value) for value in values]
            rows.append({"name": name, "values": words, "differs": len(set(words)) > 1})
    return rows


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _number(value: Any, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _picture(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _video(path: Path | None) -> dict[str, str] | None:
    if path is None:
        return None
    if path.stat().st_size > EMBED_LIMIT_BYTES:
        return {"source": path.name, "note": f"The video is beside this page: {path.name}"}
    return {"source": "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode(), "note": ""}
