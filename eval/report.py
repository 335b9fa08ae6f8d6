"""results.json as one self-contained page: opens offline, on a phone and on a wide screen."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from eval.statistics import FEWEST_FOR_INTERVAL

TEMPLATES = Path(__file__).parent / "templates"
EMBED_LIMIT_BYTES = 24 * 2**20
CHART_WIDTH, CHART_HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 14, 34


def write_report(results: dict[str, Any], path: Path, *, video: Path | None = None, thumbnails: list[dict[str, Any]] | None = None) -> None:
    """Write report.html, whole or not at all.

    results: what results.json holds. video: an MP4, embedded up to 24 MiB and linked by its name above that. thumbnails: as
    `VideoWriter.thumbnails` gives them (chain, position, task, success, image uint8 RGB).
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "number": _number, "words": lambda name: str(name).replace("_", " ")}
    page = environment.get_template("report.html.j2").render(
        results=results,
        few=FEWEST_FOR_INTERVAL,
        positions=_positions(results),
        chart=_chart(results),
        rows=list(results["per_task"].items()),
        chains=results["chains"],
        facts=_facts(results),
        video=_video(video),
        thumbnails=[thumbnail | {"image": _picture(thumbnail["image"])} for thumbnail in thumbnails or ()],
    )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page)
    temporary.replace(path)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _number(value: Any, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _positions(results: dict[str, Any]) -> list[dict[str, Any]]:
    if results["success_rate"] is None:
        return []
    intervals = results["ci95"]["success_rate"]
    return [
        {"position": position, "rate": rate, "low": low, "high": high}
        for position, (rate, (low, high)) in enumerate(zip(results["success_rate"], intervals, strict=True), 1)
    ]


def _chart(results: dict[str, Any]) -> dict[str, Any] | None:
    """Coordinates of the success curve, in the SVG's pixels."""
    positions = _positions(results)
    if not positions:
        return None
    width, height = CHART_WIDTH - LEFT - RIGHT, CHART_HEIGHT - TOP - BOTTOM

    def y(share: float) -> float:
        return round(TOP + height * (1 - share), 1)

    step = width / len(positions)
    bars = [
        entry
        | {
            "x": round(LEFT + step * (entry["position"] - 0.5), 1),
            "y": y(entry["rate"]),
            "y_low": y(entry["low"]),
            "y_high": y(entry["high"]),
            "height": round(height * entry["rate"], 1),
        }
        for entry in positions
    ]
    grid = [{"share": share, "y": y(share)} for share in (0, 0.25, 0.5, 0.75, 1)]
    frame = {"width": CHART_WIDTH, "height": CHART_HEIGHT, "left": LEFT, "right": CHART_WIDTH - RIGHT, "base": y(0)}
    return frame | {"bar": round(step * 0.56, 1), "bars": bars, "grid": grid}


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("policy", results["policy"]),
        ("simulator", results["simulator"]),
        ("scene", results["scene"]),
        ("assets", results["assets"]),
        ("calvin_env behaviour", results["calvin_env"]),
        ("renderer", results["renderer"]),
        ("seed", results["seed"]),
        ("commit", results["git_commit"] or "not run from a git checkout"),
        *results["versions"].items(),
    ]
    return [(name, str(value)) for name, value in facts]


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
