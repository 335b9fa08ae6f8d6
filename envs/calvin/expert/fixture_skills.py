"""How the scripted expert works the table: button, switch, drawer and sliding door.

Each skill is a generator of actions, begun with the arm somewhere in free space; what it leaves undone, the next attempt does.
"""

from __future__ import annotations

from envs.calvin.expert.arm import CLEAR_Z, CLOSE, DOWN, PI, Actions, Arm

FORWARD_Y = -0.12
"""y at which the hand is clear of the cabinet at any height."""
HANDLE_Y = -0.015
"""y at which the fingertips are behind the front of the door's handle."""
FINGERS_HALF_M = 0.06
"""Half the width of the open fingers, with room for them."""

COVERED_M = 0.075
"""The hand does not pass freely this near the door."""


def press_button(arm: Arm) -> Actions:
    """Down on the button with closed fingers, and up again; each press toggles."""
    x, y = arm.layout.button
    yield from arm.grip(CLOSE, 1)
    yield from arm.travel(x, y, DOWN)
    yield from arm.move([x, y, 0.452], hold=4)
    yield from arm.move([x, y, 0.53], hold=6)


def switch_on(arm: Arm) -> Actions:
    """Closed fingers, tilted forward, under the lever; then up along its slope."""
    x, tilted = arm.layout.switch_x, [PI, -0.55, PI / 2]
    yield from arm.grip(CLOSE, 1)
    yield from arm.travel(x, -0.15, tilted)
    yield from arm.move([x, FORWARD_Y, 0.47], tilted, hold=4)
    yield from arm.move([x, 0.015, 0.475], tilted, hold=4)
    yield from arm.move([x, 0.075, 0.60], tilted, speed=0.4, hold=10)


def switch_off(arm: Arm) -> Actions:
    """Closed fingers, tilted forward, over the lever; then down along its slope."""
    x, tilted = arm.layout.switch_x, [PI, -0.9, PI / 2]
    yield from arm.grip(CLOSE, 1)
    yield from arm.up(0.60)
    yield from arm.move([x, FORWARD_Y, 0.64], tilted)
    yield from arm.move([x, 0.0, 0.66], tilted, hold=2)
    yield from arm.move([x, 0.095, 0.655], tilted, hold=4)
    yield from arm.move([x, 0.035, 0.54], tilted, speed=0.4, hold=8)


def open_drawer(arm: Arm) -> Actions:
    """Closed fingers into the handle from above, and back towards the robot."""
    x, y = arm.layout.drawer_x, arm.layout.drawer_handle_y(arm.drawer)
    yield from _into_drawer_handle(arm, x, y)
    yield from arm.move([x, y - (arm.layout.drawer_limit - arm.drawer), 0.36], speed=0.6, hold=3)


def close_drawer(arm: Arm) -> Actions:
    """Closed fingers into the handle from above, and forward until the front meets the table."""
    x, y = arm.layout.drawer_x, arm.layout.drawer_handle_y(arm.drawer)
    yield from _into_drawer_handle(arm, x, y)
    yield from arm.move([x, arm.layout.drawer_handle_y(0) + 0.02, 0.36], speed=0.6, hold=4)


def _into_drawer_handle(arm: Arm, x: float, y: float) -> Actions:
    yield from arm.grip(CLOSE, 1)
    yield from arm.travel(x, y, DOWN)
    yield from arm.move([x, y, 0.36], hold=3)


def move_slider(arm: Arm, left: bool) -> Actions:
    """Closed fingers beside the door's handle, and push it to its limit."""
    layout, side = arm.layout, 1 if left else -1
    handle = layout.slide_handle_x - arm.slide
    goal = layout.slide_handle_x - (layout.slide_limit if left else 0)
    yield from arm.grip(CLOSE, 1)
    yield from arm.up(CLEAR_Z)
    yield from arm.move([handle + side * 0.085, -0.06, CLEAR_Z], DOWN, hold=3)
    yield from arm.move([handle + side * 0.085, HANDLE_Y, 0.53], hold=3)
    yield from arm.move([goal - side * 0.04, HANDLE_Y, 0.53], speed=0.6, hold=4)


def uncover(arm: Arm, x: float) -> Actions:
    """Slide the door away from x, if it is in front of it or near, as far as it goes."""
    layout = arm.layout
    left, right = layout.door[0] - arm.slide, layout.door[1] - arm.slide
    to_left = x > (layout.cavity[0] + layout.cavity[1]) / 2 + 0.02
    to_go = layout.slide_limit - arm.slide if to_left else arm.slide
    if to_go < 0.01 or not left - COVERED_M < x < right + COVERED_M:
        return
    yield from move_slider(arm, left=to_left)
    yield from arm.move([arm.target[0], -0.10, max(arm.target[2], 0.54)])
    yield from arm.up(0.58)
