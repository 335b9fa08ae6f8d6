"""How the scripted expert handles blocks: lift, push, rotate, stack, unstack, and put into drawer and cabinet.

The oracle compares the moment a task begins with the present one, contacts included: a block that a finger still touches when the next
task begins can make that one impossible. So pushes and rotations end with the block let go.
"""

from __future__ import annotations

from math import atan2, ceil, hypot, inf

import numpy as np
from scipy.spatial.transform import Rotation

from envs.calvin.expert.arm import (
    BLOCK_Z,
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
from envs.calvin.expert.fixture_skills import FINGERS_HALF_M, FORWARD_Y
from envs.calvin.expert.grasping import SHELF_TILT_RAD, grasp, push_back, reach_for
from envs.calvin.layout import DRAWER_FLOOR_Z, SHELF_Z, TABLE_TOP_Z
from envs.calvin.tasks import PUSH_M
from envs.spec import MAX_RELATIVE_POSITION_M

MIDDLE_TILT_RAD = -0.3
"""A tilted hand had better lean back from the cabinet than over it."""
LEVEL_RAD = 0.08
TURN_RAD, MOST_TURN_RAD = 1.35, 1.6
"""How far a block is rotated (the oracle asks for 60 degrees), and the most that the wrist turns at once."""
ASTRAY_M = 0.06
"""A block that was moved this far is put back when it is rotated: it counts within 0.1 m alone."""
RAISED_M = 0.008
"""How high a block is raised to be turned or shifted, and dropped from."""
OVER_RING_M = 0.03
"""How high it is raised to pass over the button's ring."""
CLOSED_HALF_M = 0.012
"""Half the thickness of the closed fingers at the height of a block."""
RUN_UP_M = 0.03
"""Gap from which the fingers set out to push."""
SHORT_M = 0.03
"""What is left of a push when it is too little for another one."""
SLIDE_ON_M = 0.02
"""How far a pushed block may slide on."""
GRAZE_M = 0.01
"""A block may overlap the button's ring by so much."""
CLEAR_OF_DOOR_Y = -0.045
"""Further back, fingers that push along x meet the door's handle."""
NEAR_ROBOT_X, STEEP_RAD = -0.2, 0.3
"""To the left of this x, so near to the robot, the hand cannot be tilted by more than this."""
STACK_Z = CARRY_Z + 0.02
"""Height at which a held block passes over a stack."""
SHELF_Y = 0.09
SURFACE_Z = {"table": TABLE_TOP_Z, "shelf": SHELF_Z, "drawer": DRAWER_FLOOR_Z, "floor": 0.0}


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
    room = _room_to_ring(arm, block, side) - left_to_go
    past_ring = arm.layout.button[1] + arm.layout.ring_radius + block.reach_along(PI / 2)
    if room < 0 and past_ring < CLEAR_OF_DOOR_Y:
        yield from push_back(arm, block, past_ring - block.position[1])
    elif left_to_go > SHORT_M:
        yield from _stroke(arm, color, side, left_to_go if room > SLIDE_ON_M else left_to_go - SHORT_M)
    else:
        yield from _shift(arm, color, side * (left_to_go + 0.006), RAISED_M if room > 0 else OVER_RING_M)


def _room_to_ring(arm: Arm, block: Block, side: int) -> float:
    """How far the block can be pushed along x before it meets the button's ring [m]; infinite where the ring is not in its way."""
    (x, y), radius = arm.layout.button, arm.layout.ring_radius
    ahead = side * (x - block.position[0])
    in_the_way = ahead > 0 and abs(y - block.position[1]) < radius + block.reach_along(PI / 2) - GRAZE_M
    return ahead - radius - block.reach_along(0) if in_the_way else inf


def _stroke(arm: Arm, color: str, side: int, distance: float) -> Actions:
    """Push with closed fingers at full speed; when they stop, the block slides on for a centimetre or two, across the line."""
    block = arm.block(color)
    x, y, _ = block.position
    touching = block.reach_along(0) + CLOSED_HALF_M
    yield from arm.grip(CLOSE, 1)
    yield from arm.travel(x - side * (touching + RUN_UP_M), y, DOWN)
    y = arm.block(color).position[1]
    yield from arm.move([x - side * (touching + RUN_UP_M), y, BLOCK_Z], hold=6, provided=arm.lies_at(block))
    steps = ceil((distance + RUN_UP_M) / MAX_RELATIVE_POSITION_M)
    # Steps of one length: a short last one would slow the fingers down before they stop.
    speed = (distance + RUN_UP_M) / (steps * MAX_RELATIVE_POSITION_M)
    yield from arm.move([x + side * (distance - touching), y, BLOCK_Z], speed=speed, brake=False)
    for _ in range(8):
        before = arm.block(color).position[0]
        yield arm.still()
        if abs(arm.block(color).position[0] - before) < 1e-3:
            break
    yield from arm.move([arm.target[0] - side * 0.02, y, BLOCK_Z])
    yield from arm.up(TRAVEL_Z)


def _shift(arm: Arm, color: str, dx: float, raised_m: float) -> Actions:
    """The last centimetres of a push that fell short: raised a little, and dropped."""
    yield from grasp(arm, color)
    x, y, z = arm.target[:3]
    holds = arm.holds(color)
    yield from arm.move([x, y, z + raised_m], hold=2, provided=holds)
    goal = np.array([x + dx, y, z + raised_m])
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


def put_down(arm: Arm, color: str, *, near: tuple[float, float] | None = None, tilt: bool = True) -> Actions:
    """Lay the held block on a free place of the table, nearest to here or to `near` (x, y); level, if the hand may tilt for it."""
    low, high = arm.layout.free_table_x()
    spots = [(x, y) for x in np.arange(low + 0.05, high - 0.04, 0.03) for y in (-0.12, -0.09, -0.15)]
    x, y = free_spot(spots, arm.blocks(without=color), near or tuple(arm.target[:2]), clearance_m=0.11)
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
    others = arm.blocks(without=color, place="drawer")
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
    yield from reach_for(arm, color)
    left, right = arm.layout.opening(arm.slide)
    xs = np.arange(left + FINGERS_HALF_M, right - FINGERS_HALF_M + 0.005, 0.01)
    spots = [(x, SHELF_Y) for x in xs] or [((left + right) / 2, SHELF_Y)]
    others = arm.blocks(without=color, place="shelf")
    x, _ = free_spot(spots, others, ((left + right) / 2, SHELF_Y), clearance_m=0.10)
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
    x, y, z = base.position
    yaw = nearest_turn(base.yaw, PI / 2, PI / 2)
    if x < NEAR_ROBOT_X and abs(level(arm, color, yaw)[1]) > STEEP_RAD:
        yield from put_down(arm, color, near=(0.0, y), tilt=False)
        raise Interrupted
    yield from arm.up(STACK_Z)
    holds = arm.holds(color)
    yield from arm.move([x, y, STACK_Z], level(arm, color, yaw), hold=4, provided=holds)
    yield from make_level(arm, color, yaw)
    base = arm.block(base.color)
    block = arm.block(color)
    dx, dy, dz = arm.tool[:3] - block.position
    x, y, z = base.position
    z += base.height / 2 + block.height / 2
    yield from arm.move([x + dx, y + dy, z + dz + 0.003], hold=6, speed=0.5, tolerance_m=0.003, provided=holds)
    if arm.off_target_m() > 0.02:  # the tilted hand does not get there: let the block fall flat, and take it from above
        yield from put_down(arm, color, near=(0.0, y), tilt=False)
        raise Interrupted
    yield from arm.grip(OPEN, 14)
    yield from arm.move([*arm.target[:2], STACK_Z], hold=20)
    yield from arm.wait(8)


def stack_base(arm: Arm, color: str) -> Block:
    """The block to stack on: one with nothing on top, lying on the table if there is one."""
    others = [block for block in arm.blocks(without=color) if block.place != "floor"]
    if not others:
        raise Interrupted
    covered = {below.color for block in others for below in others if is_on_another(arm, block) and below is not block}
    return min(others, key=lambda b: (b.color in covered, b.place != "table", b.place != "drawer", abs(b.position[0] - 0.1)))


def unstack(arm: Arm) -> Actions:
    """Take the top block off, and lay it on the table."""
    color = top_block(arm)
    yield from reach_for(arm, color)
    yield from arm.up(STACK_Z)
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
