"""Where things are in the four scenes, in the world frame: what a planner needs to know of a table.

Derived from the description that our own tables are built from; calvin_env's tables have the same dimensions. World frame: metres, x to
the robot's right along the table, y from the robot to the cabinet, z up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from envs.calvin.build import tables as table
from envs.calvin.scenes import BLOCK_LENGTHS_M, GLOBAL_SCALING, scene_named

Span = tuple[float, float]

REACH_X_M = 0.36
"""The arm reaches the table top accurately between -REACH_X_M and +REACH_X_M."""


def _scaled(*lengths_m: float) -> tuple[float, ...]:
    return tuple(round(GLOBAL_SCALING * length, 9) for length in lengths_m)


TABLE_X = _scaled(-table.HALF_WIDTH, table.HALF_WIDTH)
TABLE_Y = _scaled(-table.HALF_DEPTH, table.FOOT_Y)
(TABLE_TOP_Z,) = _scaled(table.TOP)
(SHELF_Z,) = _scaled(table.CAVITY_FLOOR + table.PLANK_BOX[1][1])
_FLOOR_BOX, _, _, _BACK_BOX, _FRONT_BOX, *_, _BAR_BOX = table.DRAWER_BOXES
(DRAWER_FLOOR_Z,) = _scaled(table.DRAWER_FLOOR + _FLOOR_BOX[1][1])
(BLOCK_WIDTH_M,) = _scaled(0.05)
"""Short sides of every block."""
DRAWER_HALF_WIDTH_M = GLOBAL_SCALING * (table.DRAWER_HALF - 0.025)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One scene's fixtures and blocks [m]; spans are (low, high)."""

    button: tuple[float, float]
    """x and y of the button's centre; the ring around it has `ring_radius`."""
    ring_radius: float
    switch_x: float
    drawer_x: float
    drawer_limit: float
    slide_handle_x: float
    """x of the sliding door's handle when the door is at zero; the door moves to -x by up to `slide_limit`."""
    slide_limit: float
    door: Span
    """x that the door covers when it is at zero."""
    cavity: Span
    """x of the cabinet's inside."""
    block_lengths: dict[str, float]
    """Colour → long side."""

    def openings(self, slide: float) -> tuple[Span, Span]:
        """x left and right of the door at `slide` that is open to the cabinet; a span may be empty (high < low)."""
        return (self.cavity[0], self.door[0] - slide), (self.door[1] - slide, self.cavity[1])

    def opening(self, slide: float) -> Span:
        """The wider of the two openings."""
        return max(self.openings(slide), key=lambda span: span[1] - span[0])

    def drawer_inside(self, drawer: float) -> tuple[Span, Span]:
        """x and y of the drawer's inside that the table top does not cover, when it is open by `drawer`."""
        x = self.drawer_x - DRAWER_HALF_WIDTH_M, self.drawer_x + DRAWER_HALF_WIDTH_M
        front, back = _scaled(-_FRONT_BOX[0][2], -_BACK_BOX[1][2])
        return x, (front - drawer, min(TABLE_Y[0], back - drawer))

    def drawer_handle_y(self, drawer: float) -> float:
        """y of the middle of the gap between the drawer's front and its handle."""
        return GLOBAL_SCALING * -(_FRONT_BOX[1][2] + _BAR_BOX[0][2]) / 2 - drawer

    def free_table_x(self) -> Span:
        """The longest stretch of the table top that is in reach and beside the button's ring."""
        x = self.button[0]
        sides = (-REACH_X_M, x - self.ring_radius), (x + self.ring_radius, REACH_X_M)
        return max(sides, key=lambda span: span[1] - span[0])


@cache
def layout_of(scene: str) -> Layout:
    """The layout of scene "A", "B", "C" or "D". Raises ValueError for another."""
    blocks = scene_named(scene).blocks
    t = table.TABLES[scene]
    (low_x, _, _), (high_x, _, _) = table.SLIDE_BOXES[0]
    (post_low_x, _, _), (post_high_x, _, _) = table.SLIDE_BOXES[1]
    sizes = {name.removeprefix("block_"): urdf.removesuffix(".urdf").rsplit("_", 1)[1] for name, urdf in blocks.items()}
    ring_radius, switch_x, drawer_x, drawer_limit = _scaled(table.RING_RADIUS, t.switch, t.drawer, table.DRAWER_TRAVEL)
    slide_handle_x, slide_limit = _scaled(t.slide + (post_low_x + post_high_x) / 2, t.slide_limit)
    return Layout(
        button=_scaled(t.button, table.BUTTON_Y),
        ring_radius=ring_radius,
        switch_x=switch_x,
        drawer_x=drawer_x,
        drawer_limit=drawer_limit,
        slide_handle_x=slide_handle_x,
        slide_limit=slide_limit,
        door=_scaled(t.slide + low_x, t.slide + high_x),
        cavity=_scaled(*t.cavity),
        block_lengths={color: _scaled(BLOCK_LENGTHS_M[size])[0] for color, size in sizes.items()},
    )
