"""A scatter plot of a few named points, as SVG text: enough for the comparison, and no dependency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 420, 70, 56, 44, 190
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2")


def scatter_svg(points: Sequence[tuple[str, float, float]], *, x_label: str, y_label: str, title: str) -> str:
    """points: (name, x, y), at least one, not negative. Both axes start at 0. Returns an SVG document."""
    x_ticks, y_ticks = ticks(max(x for _, x, _ in points)), ticks(max(y for _, _, y in points))

    def across(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / x_ticks[-1]

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / y_ticks[-1]

    parts = [f'<text x="{LEFT}" y="24" font-size="16" font-weight="600">{escape(title)}</text>']
    for value in x_ticks:
        parts.append(f'<line x1="{across(value):.1f}" x2="{across(value):.1f}" y1="{TOP}" y2="{up(0):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{across(value):.1f}" y="{up(0) + 18:.1f}" text-anchor="middle">{value:g}</text>')
    for value in y_ticks:
        parts.append(f'<line x1="{LEFT}" x2="{across(x_ticks[-1]):.1f}" y1="{up(value):.1f}" y2="{up(value):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for number, (name, x, y) in enumerate(points):
        colour = COLOURS[number % len(COLOURS)]
        hint = f"<title>{escape(name)}: {x:.3g}, {y:.3g}</title>"
        parts.append(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="6" fill="{colour}">{hint}</circle>')
        parts.append(f'<circle cx="{WIDTH - RIGHT + 16}" cy="{TOP + 10 + 22 * number}" r="6" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 28}" y="{TOP + 14 + 22 * number}">{escape(name)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{across(x_ticks[-1] / 2):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text x="18" y="{middle}" text-anchor="middle" transform="rotate(-90 18 {middle})">{escape(y_label)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *parts, "</svg>"])


def ticks(largest: float) -> list[float]:
    """Round numbers from 0 to the first at or above `largest`, four to eight of them."""
    if largest <= 0:
        return [0.0, 1.0]
    step = 10.0 ** math.floor(math.log10(largest))
    step = next(step * factor for factor in (2, 1, 0.5, 0.2) if largest / (step * factor) > 3)
    return [step * number for number in range(math.ceil(largest / step - 1e-9) + 1)]
