"""Coordinates of the report's success curves, in the SVG's own pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 36, 116, 16, 40
LABEL_APART = 12
RUN_OFFSET = 5  # runs stand a little beside each other, so that their intervals can be told apart


def success_chart(runs: Sequence[dict[str, Any]], published: Sequence[Any], length: int) -> dict[str, Any]:
    """Lines of "share of chains that solved at least k subtasks" over k = 1..length.

    runs: {"label", "color", "results"}; a run without a score has no line. published: eval.published.Published with success rates.
    """
    step = (WIDTH - LEFT - RIGHT) / max(length - 1, 1)

    def x(position: int) -> float:
        return round(LEFT + step * position, 1)

    others = [_line(row.success_rate, x, 0, label=f"{row.method} · {row.trained_on}", kind=row.trained_on) for row in published]
    ours = []
    for number, run in enumerate(run for run in runs if run["results"]["success_rate"]):
        offset = RUN_OFFSET * number
        line = _line(run["results"]["success_rate"], x, offset, label=run["label"], color=run["color"], name=run["name"])
        for point, (low, high) in zip(line["points"], run["results"]["ci95"]["success_rate"], strict=True):
            point |= {"y_low": _y(low), "y_high": _y(high)}
        ours.append(line)
    _place_labels([*ours, *others])
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "base": _y(0),
        "grid": [{"share": share, "y": _y(share)} for share in (0, 0.25, 0.5, 0.75, 1)],
        "ticks": [{"position": k + 1, "x": x(k)} for k in range(length)],
        "ours": ours,
        "published": others,
    }


def _y(share: float) -> float:
    return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - share), 1)


def _line(rates: Sequence[float], x, offset: float, **labels: str) -> dict[str, Any]:
    points = [{"x": x(k) + offset, "y": _y(rate), "rate": rate} for k, rate in enumerate(rates)]
    return {"points": points, "path": " ".join(f"{point['x']},{point['y']}" for point in points), **labels}


def _place_labels(lines: list[dict[str, Any]]) -> None:
    """Give each line the height of its label, at its end or as near as the labels above it allow; then up again from the bottom."""
    ordered = sorted(lines, key=lambda line: line["points"][-1]["y"])
    lowest = TOP
    for line in ordered:
        line["label_y"] = max(line["points"][-1]["y"], lowest)
        lowest = line["label_y"] + LABEL_APART
    highest = _y(0)
    for line in reversed(ordered):
        line["label_y"] = round(min(line["label_y"], highest), 1)
        highest = line["label_y"] - LABEL_APART
