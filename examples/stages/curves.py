"""The curves of all stages as one picture, and the first and last held-out losses of each as a table.

python -m examples.stages.curves outputs/stages
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from emu3_vla.data.episodes import write_text_atomic

STAGES = (
    "pretrain_images",
    "pretrain_video",
    "world_model",
    "vla",
    "vla_all",
    "quality",
    "understand_describe",
    "understand_instruct",
    "interleave",
    "dpo_rollouts",
    "dpo_pictures",
)
"""Runs of examples/stages/run.sh, in order."""
COLUMNS = 4
COLOURS = {"action": "#ff725c", "text": "#4269d0", "vision": "#3ca951", "preference": "#a463f2"}
LOSS = "loss_"
Curve = dict[str, list[tuple[int, float]]]
"""{kind of token: (step, loss)}"""


def curves(rows: Sequence[Mapping]) -> tuple[Curve, Curve]:
    """(training, held-out) losses of the rows of a metrics.jsonl, by kind of token; of special ids none."""
    training: Curve = {}
    held_out: Curve = {}
    for row in rows:
        for found, into in ((row, training), (row.get("validation", {}), held_out)):
            for name, value in found.items():
                kind = name.removeprefix(LOSS)
                if name.startswith(LOSS) and kind in COLOURS:
                    into.setdefault(kind, []).append((row["step"], value))
    return training, held_out


def counted(metrics: Path) -> list[dict]:
    """Rows of a run; what a run wrote again after it was cut off counts once."""
    rows: dict[tuple[int, bool], dict] = {}
    for line in metrics.read_text().splitlines():
        row = json.loads(line)
        if "step" in row and "event" not in row:
            rows[row["step"], "validation" in row] = row
    return [rows[key] for key in sorted(rows)]


def draw(found: Mapping[str, tuple[Curve, Curve]], path: Path) -> None:
    """A panel for each stage: training losses as lines, held-out ones as points."""
    rows = -(-len(found) // COLUMNS)
    figure, panels = pyplot.subplots(rows, COLUMNS, figsize=(3.4 * COLUMNS, 2.5 * rows), constrained_layout=True)
    for panel in panels.flat[len(found) :]:
        panel.axis("off")
    for panel, (name, (training, held_out)) in zip(panels.flat, found.items(), strict=False):
        for kind, points in training.items():
            panel.plot(*zip(*points, strict=True), color=COLOURS[kind], linewidth=0.9, alpha=0.7)
        for kind, points in held_out.items():
            panel.plot(*zip(*points, strict=True), color=COLOURS[kind], marker="o", markersize=3, linewidth=0, label=kind)
        panel.set_title(name, fontsize=10)
        panel.tick_params(labelsize=7)
        panel.legend(fontsize=7, frameon=False)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("loss, nats", fontsize=9)
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="svg", metadata={"Date": None})
    temporary.replace(path)


def table(found: Mapping[str, tuple[Curve, Curve]]) -> str:
    """Held-out losses of each stage, first → last, as Markdown."""
    lines = ["| stage | steps | " + " | ".join(COLOURS) + " |", "|---|---|" + "---|" * len(COLOURS)]
    for name, (_, held_out) in found.items():
        steps = max(points[-1][0] for points in held_out.values())
        said = [f"{held_out[kind][0][1]:.3f} → {held_out[kind][-1][1]:.3f}" if kind in held_out else "" for kind in COLOURS]
        lines.append(f"| `{name}` | {steps} | {' | '.join(said)} |")
    return "\n".join(lines) + "\n"


def main(folder: str) -> None:
    """Write curves.svg and curves.md into the folder. Raises FileNotFoundError where a stage was not run."""
    found = {name: curves(counted(Path(folder) / name / "metrics.jsonl")) for name in STAGES}
    draw(found, Path(folder) / "curves.svg")
    write_text_atomic(Path(folder) / "curves.md", table(found))
    print(table(found))
    print(Path(folder) / "curves.svg")


if __name__ == "__main__":
    main(*sys.argv[1:])
