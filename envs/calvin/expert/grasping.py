"""How the scripted expert takes hold of a block: where the fingers go, and what is moved out of their way; from above or on the shelf."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, hypot, sin

import numpy as np
from scipy.spatial.transform import Rotation

from envs.calvin.expert.arm import BLOCK_Z, CARRY_Z, CLEAR_Z, CLOSE, DOWN, OPEN, PI, Actions, Arm, Block, Interrupted, nearest_turn
from envs.calvin.expert.fixture_skills import FINGERS_HALF_M, FORWARD_Y, open_drawer, uncover
from envs.calvin.layout import BLOCK_WIDTH_M

SHELF_TILT_RAD = -0.6
"""How far the hand leans back when it reaches into the cabinet."""
FINGER_OPEN_M, FINGER_HALF_M, FINGER_WIDTH_HALF_M = 0.044, 0.008, 0.01
"""Middle of an open finger from the middle of the hand, and half a finger's thickness and width."""
SHIFT_M = 0.012
"""How far from a block's centre the hand may be when the fingers close: they draw the block in."""
WIDEST_M = 0.06
"""Longest side that the fingers close across with room to spare."""
ROOM_M = 0.05
"""How far a block is pushed to make room beside it; further, and what is stacked on it would touch the door's handle."""
TOWARDS_CABINET_Y = -0.06
"""Blocks in front of this y are pushed towards the cabinet, others away from it."""
UNDER_TABLE_Y = -0.205
"""A block in the drawer whose centre is beyond this y is partly under the table."""


@dataclass(frozen=True, slots=True)
class Grip:
    """A grasp from above: yaw of the hand [rad], x and y of its middle [m], and what a finger would come down on."""

    yaw: float
    x: float
    y: float
    hit: tuple[Block, ...]
    on_button: bool


def grasp(arm: Arm, color: str, *, turn: float = 0.0) -> Actions:
    """Take hold of a block from above, across its short side. turn: how far the wrist will turn after it [rad].

    Raises Interrupted if missed.
    """
    if arm.held() == color:
        return
    block = arm.block(color)
    grip = best_grip(arm, block, turn)
    if block.place == "table" and (grip.hit or grip.on_button):
        if grip.hit:
            yield from make_room(arm, grip.hit[0])
        else:
            yield from push_back(arm, block, ROOM_M)
        block = arm.block(color)
        grip = best_grip(arm, block, turn)
    safe_z = max(CLEAR_Z, block.position[2] + 0.1)
    yield from arm.grip(OPEN, 4)
    yield from arm.up(safe_z)
    yield from arm.move([grip.x, grip.y, safe_z], [PI, 0, grip.yaw], hold=4, provided=arm.lies_at(block, 0.03))
    block = arm.block(color)
    grip = best_grip(arm, block, turn)
    height = block.position[2] + 0.002
    yield from arm.move([grip.x, grip.y, height], [PI, 0, grip.yaw], hold=6, tolerance_m=0.005, provided=arm.lies_at(block))
    yield from arm.grip(CLOSE)
    if arm.held() != color:
        raise Interrupted


def best_grip(arm: Arm, block: Block, turn: float = 0.0, *, sideways: float = 1.0) -> Grip:
    """Fingers across a side that fits between them, clear of neighbours and button, the short side first, the wrist near its middle.

    turn: how far the wrist will turn afterwards [rad]. sideways: how much it matters that the fingers close along x.
    """
    yaws = [block.yaw] if block.length > WIDEST_M else [block.yaw, block.yaw + PI / 2]
    shifts = (0.0, SHIFT_M, -SHIFT_M)
    grips = [_grip(arm, block, nearest_turn(yaw, PI / 2 - turn / 2), aside) for yaw in yaws for aside in shifts]

    def cost(grip: Grip) -> float:
        across_long_side = block.length > BLOCK_WIDTH_M + 0.01 and abs(sin(grip.yaw - block.yaw)) > 0.5
        shifted = hypot(grip.x - block.position[0], grip.y - block.position[1])
        return 10 * (len(grip.hit) + grip.on_button) + 2 * across_long_side + sideways * abs(grip.yaw + turn / 2 - PI / 2) + 20 * shifted

    return min(grips, key=cost)


def _grip(arm: Arm, block: Block, yaw: float, aside_m: float) -> Grip:
    """The grasp with that yaw, the hand's middle aside by so much in the direction in which the fingers close."""
    along, across = sin(yaw), -cos(yaw)
    x, y = block.position[0] + aside_m * along, block.position[1] + aside_m * across
    fingers = [(x + side * FINGER_OPEN_M * along, y + side * FINGER_OPEN_M * across) for side in (1, -1)]
    level = [other for other in arm.blocks(without=block.color) if abs(other.position[2] - block.position[2]) < 0.035]
    hit = tuple(other for other in level if any(other.gap_to(*finger) < FINGER_HALF_M for finger in fingers))
    button, radius = arm.layout.button, arm.layout.ring_radius + FINGER_HALF_M
    return Grip(yaw, x, y, hit, any(hypot(px - button[0], py - button[1]) < radius for px, py in fingers))


def make_room(arm: Arm, neighbour: Block) -> Actions:
    """Push a block out of the way of a finger, along y: towards the cabinet, or from it if it is near there already."""
    yield from push_back(arm, neighbour, ROOM_M if neighbour.position[1] < TOWARDS_CABINET_Y else -ROOM_M)


def push_back(arm: Arm, block: Block, distance: float) -> Actions:
    """Push a block along y with closed fingers: towards the cabinet, or towards the robot where the distance [m] is negative."""
    x, y, _ = block.position
    side = 1 if distance > 0 else -1
    touching = block.reach_along(PI / 2) + FINGER_WIDTH_HALF_M
    yield from arm.grip(CLOSE, 1)
    yield from arm.travel(x, y - side * (touching + 0.02), DOWN)
    yield from arm.move([x, y - side * (touching + 0.02), BLOCK_Z], hold=3)
    yield from arm.move([x, y + distance - side * touching, BLOCK_Z], speed=0.6, hold=4)
    yield from arm.up(CLEAR_Z)


def reach_for(arm: Arm, color: str, *, turn: float = 0.0) -> Actions:
    """Take hold of a block wherever it lies, from above, or on the cabinet's shelf. turn: as in `grasp`."""
    if arm.held() == color:
        return
    block = arm.block(color)
    if block.place == "floor":
        yield from arm.wait(30)
        raise Interrupted
    if block.place == "shelf":
        yield from grasp_on_shelf(arm, color)
        return
    if block.place == "drawer":
        yield from uncover_drawer(arm, color)
    yield from grasp(arm, color, turn=turn)


def grasp_on_shelf(arm: Arm, color: str) -> Actions:
    """Take hold of a block in the cabinet, the hand tilted forward."""
    yield from uncover(arm, arm.block(color).position[0])
    block = arm.block(color)
    grip = best_grip(arm, block, sideways=20.0)
    _, y, z = block.position
    x, tilted = _inside_opening(arm, block, grip.x), tilted_forward(SHELF_TILT_RAD, grip.yaw)
    yield from arm.grip(OPEN, 1)
    yield from arm.up(CARRY_Z)
    yield from arm.move([x, FORWARD_Y, CARRY_Z], DOWN)
    yield from arm.move([x, y - 0.12, 0.58], tilted, provided=arm.lies_at(block))
    yield from arm.move([x, y - 0.06, z + 0.06], tilted, hold=2, provided=arm.lies_at(block))
    yield from arm.move([x, y - 0.005, z + 0.005], tilted, hold=12, tolerance_m=0.005, provided=arm.lies_at(block))
    yield from arm.grip(CLOSE, 12)
    if arm.held() != color:
        raise Interrupted


def _inside_opening(arm: Arm, block: Block, x: float) -> float:
    """x of the hand, shifted a little where a finger would meet the door or the cabinet's side."""
    for left, right in arm.layout.openings(arm.slide):
        if left < block.position[0] < right and right - left > 2 * FINGERS_HALF_M:
            inside = min(max(x, left + FINGERS_HALF_M), right - FINGERS_HALF_M)
            return min(max(inside, block.position[0] - SHIFT_M), block.position[0] + SHIFT_M)
    return x


def tilted_forward(tilt: float, yaw: float) -> np.ndarray:
    """Euler angles of a hand that points down with that yaw and is then tilted about the world's x axis: fingers forward, palm back."""
    euler = (Rotation.from_euler("x", -tilt) * Rotation.from_euler("xyz", [PI, 0, yaw])).as_euler("xyz")
    return euler if abs(euler[0]) > PI / 2 else np.array([euler[0] + PI, PI - euler[1], euler[2] + PI])


def uncover_drawer(arm: Arm, color: str) -> Actions:
    """Pull the drawer out where the block in it is still under the table's edge."""
    if arm.block(color).position[1] > UNDER_TABLE_Y and arm.drawer < arm.layout.drawer_limit - 0.01:
        yield from open_drawer(arm)
        yield from arm.up(CLEAR_Z)
