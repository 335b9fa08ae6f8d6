"""How the scripted expert handles blocks: lift, push, rotate, stack, unstack, and put into drawer and cabinet.

The oracle compares the moment a task begins with the present one, contacts included: a block that a finger still touches when the next
task begins can make that one impossible. So pushes and rotations end with the block let go.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import atan2, ceil, cos, hypot, sin

import numpy as np
from scipy.spatial.transform import Rotation

from envs.calvin.expert_arm import (
    CARRY_Z,
    CLEAR_Z,
    CLOSE,
    DOWN,
    OPEN,
    PI,
    TRAVEL_Z,
    Actions,
    Arm,
    Block,
    Interrupted,
    free_spot,
    nearest_turn,
    wrap,
)
from envs.calvin.fixture_skills import FINGERS_HALF_M, FORWARD_Y, open_drawer, uncover
from envs.calvin.layout import BLOCK_WIDTH_M, DRAWER_FLOOR_Z, SHELF_Z, TABLE_TOP_Z
from envs.spec import MAX_RELATIVE_POSITION_M

SHELF_TILT_RAD = -0.6
MIDDLE_TILT_RAD = -0.3
"""A tilted hand had better lean back from the cabinet."""
LEVEL_RAD = 0.08
TURN_RAD, MOST_TURN_RAD = 1.35, 1.6
ASTRAY_M = 0.06
RAISED_M = 0.008
FINGER_OPEN_M, FINGER_HALF_M, FINGER_WIDTH_HALF_M = 0.044, 0.008, 0.01
"""Middle of an open finger from the middle of the hand, and half a finger's thickness and width."""
CLOSED_HALF_M = 0.012
"""Half the thickness of the closed fingers at the height of a block."""
SHIFT_M = 0.012
WIDEST_M = 0.06
"""Longest side that the fingers close across with room to spare."""
ROOM_Y = -0.06
GRAZE_M = 0.01
PUSH_M, SHORT_M = 0.1, 0.03
SURFACE_Z = {"table": TABLE_TOP_Z, "shelf": SHELF_Z, "drawer": DRAWER_FLOOR_Z, "floor": 0.0}


# -- grasping


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
            yield from make_room(arm, block, grip.hit[0])
        else:
            yield from push_back(arm, block, 0.07)
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


def make_room(arm: Arm, block: Block, neighbour: Block) -> Actions:
    """Push a neighbour along y until a finger fits between it and the block: to the cabinet, or from it if it is near there already."""
    yield from push_back(arm, neighbour, 0.07 if neighbour.position[1] < ROOM_Y else -0.07)


def push_back(arm: Arm, block: Block, distance: float) -> Actions:
    """Push a block along y with closed fingers: towards the cabinet, or towards the robot where the distance [m] is negative."""
    x, y, _ = block.position
    side = 1 if distance > 0 else -1
    touching = block.reach_along(PI / 2) + FINGER_WIDTH_HALF_M
    yield from arm.grip(CLOSE, 1)
    yield from arm.travel(x, y - side * (touching + 0.02), DOWN)
    yield from arm.move([x, y - side * (touching + 0.02), 0.46], hold=3)
    yield from arm.move([x, y + distance - side * touching, 0.46], speed=0.6, hold=4)
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
    if arm.block(color).position[1] > -0.205 and arm.drawer < arm.layout.drawer_limit - 0.01:
        yield from open_drawer(arm)
        yield from arm.up(CLEAR_Z)


def lift(arm: Arm, color: str) -> Actions:
    """Up from the table or out of the drawer."""
    yield from reach_for(arm, color)
    yield from arm.move([*arm.target[:2], 0.58], speed=0.6, hold=5, provided=arm.holds(color))


def lift_from_shelf(arm: Arm, color: str) -> Actions:
    """Up from the cabinet's shelf, towards its mouth."""
    yield from reach_for(arm, color)
    yield from arm.move([arm.target[0], arm.target[1] - 0.02, 0.54], speed=0.5, hold=8, provided=arm.holds(color))


# -- moving on the table


def push(arm: Arm, color: str, start: Block, right: bool) -> Actions:
    """Push the block along x until it is PUSH_M from `start`, without touching it as it gets there."""
    side = 1 if right else -1
    block = arm.block(color)
    left_to_go = PUSH_M - side * (block.position[0] - start.position[0])
    past_ring = arm.layout.button[1] + arm.layout.ring_radius + block.reach_along(PI / 2)
    if _ring_is_ahead(arm, block, side, left_to_go):
        yield from push_back(arm, block, past_ring - block.position[1])
    elif left_to_go > SHORT_M:
        yield from _stroke(arm, color, side, left_to_go)
    else:
        yield from _shift(arm, color, side * (left_to_go + 0.006))


def _ring_is_ahead(arm: Arm, block: Block, side: int, distance: float) -> bool:
    """Whether the block, pushed so far along x, would meet the button's ring."""
    (x, y), radius = arm.layout.button, arm.layout.ring_radius
    ahead = side * (x - block.position[0])
    aside = radius + block.reach_along(PI / 2) - GRAZE_M
    return 0 < ahead < distance + radius + block.reach_along(0) and abs(y - block.position[1]) < aside


def _stroke(arm: Arm, color: str, side: int, distance: float) -> Actions:
    """Push with closed fingers at full speed; when they stop, the block slides on for a centimetre or two, across the line."""
    block = arm.block(color)
    x, y, _ = block.position
    touching = block.reach_along(0) + CLOSED_HALF_M
    yield from arm.grip(CLOSE, 1)
    yield from arm.travel(x - side * (touching + 0.03), y, DOWN)
    y = arm.block(color).position[1]
    yield from arm.move([x - side * (touching + 0.03), y, 0.46], hold=6, provided=arm.lies_at(block))
    steps = ceil((distance + 0.03) / MAX_RELATIVE_POSITION_M)
    # Steps of one length: a short last one would slow the fingers down before they stop.
    yield from arm.move([x + side * (distance - touching), y, 0.46], speed=(distance + 0.03) / (steps * MAX_RELATIVE_POSITION_M))
    for _ in range(8):
        before = arm.block(color).position[0]
        yield arm.still()
        if abs(arm.block(color).position[0] - before) < 1e-3:
            break
    yield from arm.move([arm.target[0] - side * 0.02, y, 0.46])
    yield from arm.up(TRAVEL_Z)


def _shift(arm: Arm, color: str, dx: float) -> Actions:
    """The last centimetres of a push that fell short: raised a little, and dropped."""
    yield from grasp(arm, color)
    x, y, z = arm.target[:3]
    holds = arm.holds(color)
    yield from arm.move([x, y, z + RAISED_M], hold=2, provided=holds)
    goal = np.array([x + dx, y, z + RAISED_M])
    yield from arm.move(goal, hold=6, tolerance_m=0.003, provided=holds)
    # Stretched out far, the arm hangs back by millimetres that count here.
    yield from arm.move(goal + [goal[0] - arm.tool[0], 0, 0], hold=6, tolerance_m=0.0, provided=holds)
    yield from arm.grip(OPEN)
    yield from arm.up(TRAVEL_Z)


def rotate(arm: Arm, color: str, start: Block, left: bool) -> Actions:
    """Raise the block a little, turn it, and let it fall into place: back to where it was at `start`, if it has been moved from there."""
    goal_yaw = start.yaw + (TURN_RAD if left else -TURN_RAD)
    turn = wrap(goal_yaw - arm.block(color).yaw)
    turn = min(max(turn, -MOST_TURN_RAD), MOST_TURN_RAD)
    yield from reach_for(arm, color, turn=turn)
    x, y, z = arm.target[:3]
    holds = arm.holds(color)
    if hypot(*(arm.block(color).position - start.position)[:2]) > ASTRAY_M:
        yield from arm.up(CARRY_Z)
        yield from arm.move([*start.position[:2], CARRY_Z], [PI, 0, arm.target[5] + turn], hold=4, provided=holds)
        yield from lower(arm, color, *start.position[:2], TABLE_TOP_Z)
    else:
        yield from arm.move([x, y, z + RAISED_M], hold=2, provided=holds)
        yield from arm.move([x, y, z + RAISED_M], [PI, 0, arm.target[5] + turn], hold=3, provided=holds)
        yield from arm.grip(OPEN)
        yield from arm.up(TRAVEL_Z)


# -- putting down


def level(arm: Arm, color: str, yaw: float) -> list[float]:
    """Euler angles of the hand, its yaw given, that bring the held block's faces level.

    A block that was taken with the hand tilted, or that has turned about the fingers, hangs tilted when the hand points straight down.
    """
    hand, block = (Rotation.from_euler("xyz", euler).as_matrix() for euler in (arm.tool[3:], arm.block_pose(color)[3:]))
    axes = hand.T @ block  # the block's axes, as columns, in the hand's frame; the fingers close along its y
    x, _, z = axes[:, np.argmin(np.abs(axes[1]))]
    return [PI, nearest_turn(atan2(x, z), MIDDLE_TILT_RAD, PI / 2), yaw]


def make_level(arm: Arm, color: str, yaw: float) -> Actions:
    """Turn the hand until the held block is level: its tilt may have changed on the way."""
    for _ in range(3):
        euler = level(arm, color, yaw)
        if abs(euler[1] - arm.target[4]) < LEVEL_RAD:
            return
        yield from arm.move(arm.target[:3], euler, hold=3, provided=arm.holds(color))


def put_down(arm: Arm, color: str, *, tilt: bool = True) -> Actions:
    """Lay the held block on a free place of the table and let go; level, where the hand may tilt for it."""
    low, high = arm.layout.free_table_x()
    spots = [(x, y) for x in np.arange(low + 0.05, high - 0.04, 0.03) for y in (-0.12, -0.09, -0.15)]
    x, y = free_spot(spots, arm.blocks(without=color), tuple(arm.target[:2]), clearance_m=0.11)
    yield from arm.up(CARRY_Z)
    euler = level(arm, color, arm.target[5]) if tilt else [PI, 0, arm.target[5]]
    yield from arm.move([x, y, CARRY_Z], euler, provided=arm.holds(color))
    yield from lower(arm, color, x, y, TABLE_TOP_Z)


def lower(arm: Arm, color: str, x: float, y: float, surface_z: float, above_m: float = 0.004) -> Actions:
    """Bring the held block's centre over (x, y), its underside to a surface, and let go."""
    block = arm.block(color)
    dx, dy, dz = arm.tool[:3] - block.position
    z = surface_z + block.height / 2 + above_m + dz
    yield from arm.move([x + dx, y + dy, z], hold=4, speed=0.6, tolerance_m=0.004, provided=arm.holds(color))
    yield from arm.grip(OPEN)
    yield from arm.up(CLEAR_Z)


def place_in_drawer(arm: Arm, color: str) -> Actions:
    """Carry a block into the open drawer, to a free place of it."""
    yield from reach_for(arm, color)
    yield from arm.up(CARRY_Z)
    (left, right), (front, back) = arm.layout.drawer_inside(arm.drawer)
    margin = FINGERS_HALF_M + 0.005
    xs = np.linspace(left + margin, right - margin, 9)
    spots = [(x, y) for x in xs for y in _inset(front, back, 0.045)]
    others = [other for other in arm.blocks(without=color, place="drawer")]
    x, y = free_spot(spots, others, (arm.layout.drawer_x, (front + back) / 2), clearance_m=0.10)
    yield from arm.move([x, y, CARRY_Z], level(arm, color, PI / 2), provided=arm.holds(color))
    yield from arm.move([x, y, 0.42], provided=arm.holds(color))
    yield from lower(arm, color, x, y, DRAWER_FLOOR_Z, above_m=0.015)


def _inset(low: float, high: float, margin: float) -> list[float]:
    """Three places between two walls, each `margin` from them; the middle where there is no room."""
    if high - low < 2 * margin:
        return [(low + high) / 2]
    return [(low + high) / 2, low + margin, high - margin]


def place_in_slider(arm: Arm, color: str) -> Actions:
    """Carry a block through the cabinet's open half to a free place on the shelf."""
    if arm.held() != color:
        yield from reach_for(arm, color)
    left, right = arm.layout.opening(arm.slide)
    xs = np.arange(left + FINGERS_HALF_M, right - FINGERS_HALF_M + 0.005, 0.01)
    spots = [(x, 0.09) for x in xs] or [((left + right) / 2, 0.09)]
    others = arm.blocks(without=color, place="shelf")
    x, _ = free_spot(spots, others, ((left + right) / 2, 0.09), clearance_m=0.10)
    tilted = [PI, SHELF_TILT_RAD, PI / 2]
    holds = arm.holds(color)
    yield from arm.up(CARRY_Z)
    yield from arm.move([x, -0.10, 0.58], provided=holds)
    yield from arm.move([x, -0.02, 0.56], tilted, provided=holds)
    yield from arm.move([x, 0.07, 0.50], tilted, provided=holds)
    yield from arm.move([x, 0.085, 0.472], tilted, hold=3, provided=holds)
    yield from arm.grip(OPEN, 12)
    yield from arm.move([x, 0.0, 0.53], tilted, hold=4)
    yield from arm.move([x, FORWARD_Y, 0.58], tilted, hold=8)


def stack(arm: Arm, color: str) -> Actions:
    """Set a block on another that lies free."""
    yield from reach_for(arm, color)
    base = stack_base(arm, color)
    yield from arm.up(CARRY_Z + 0.02)
    x, y, z = base.position
    yaw = nearest_turn(base.yaw, PI / 2, PI / 2)
    holds = arm.holds(color)
    yield from arm.move([x, y, CARRY_Z + 0.02], level(arm, color, yaw), hold=4, provided=holds)
    yield from make_level(arm, color, yaw)
    base = arm.block(base.color)
    block = arm.block(color)
    dx, dy, dz = arm.tool[:3] - block.position
    x, y, z = base.position
    z += base.height / 2 + block.height / 2
    yield from arm.move([x + dx, y + dy, z + dz + 0.003], hold=6, speed=0.5, tolerance_m=0.003, provided=holds)
    if arm.off_target_m() > 0.02:  # the tilted hand does not get there: let the block fall flat, and take it from above
        yield from put_down(arm, color, tilt=False)
        raise Interrupted
    yield from arm.grip(OPEN, 14)
    yield from arm.move([*arm.target[:2], CARRY_Z + 0.02], hold=20)
    yield from arm.wait(8)


def stack_base(arm: Arm, color: str) -> Block:
    """The block to stack on: lying on the table if there is one, else wherever there is one with nothing on top."""
    others = [block for block in arm.blocks(without=color) if block.place != "floor"]
    if not others:
        raise Interrupted
    return min(others, key=lambda block: (block.place != "table", block.place != "drawer", abs(block.position[0] - 0.1)))


def unstack(arm: Arm) -> Actions:
    """Take the top block off, and lay it on the table."""
    color = top_block(arm)
    yield from reach_for(arm, color)
    yield from arm.up(CARRY_Z + 0.02)
    yield from put_down(arm, color)


def top_block(arm: Arm) -> str:
    """The block that lies on another; where there is none, the highest."""
    resting = [block for block in arm.blocks() if is_on_another(arm, block)]
    return max(resting or arm.blocks(), key=lambda block: block.position[2]).color


def is_on_another(arm: Arm, block: Block) -> bool:
    """Whether another block is right below this one."""
    return any(
        0.03 < block.position[2] - other.position[2] < 0.075
        and hypot(*(block.position - other.position)[:2]) < (block.length + other.length) / 2
        for other in arm.blocks(without=block.color)
    )


def block_to_carry(arm: Arm, first: str | None, away_from: str = "") -> str:
    """The held block, else `first`, else one to take up: not in `away_from`, on the table rather than elsewhere, the nearest of those."""
    held = arm.held()
    if held:
        return held
    blocks = [block for block in arm.blocks() if block.place != "floor"]
    if not blocks:
        raise Interrupted
    return min(blocks, key=lambda b: (b.color != first, b.place == away_from, b.place != "table", arm.distance_to(b))).color


def lifted_m(arm: Arm, block: Block) -> float:
    """How high the block's underside is above what it would lie on [m]: the shelf, the drawer or the table."""
    return block.position[2] - block.height / 2 - SURFACE_Z[block.place]
