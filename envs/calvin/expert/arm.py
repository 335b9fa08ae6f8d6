"""The scripted expert's arm: what it sees of the state, and the motions that its skills are made of.

A skill is a generator of actions (float64 (7,)). Between two of them the arm has taken in a new state, so a skill may look at the present
state whenever it matters. Where what a skill relied on no longer holds (the block slipped, the arm is jammed) it raises Interrupted,
and the expert begins again from the present state.

World frame, metres and radians. The wrist points down at Euler (π, 0, ·); the third angle is the yaw of the hand, and the fingers close
along the hand's y axis: with yaw ψ they close across a block whose own yaw is ψ (modulo π).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import atan2, cos, hypot, inf, sin, sqrt

import numpy as np

from envs.calvin.layout import BLOCK_WIDTH_M, DRAWER_FLOOR_Z, TABLE_TOP_Z, TABLE_Y, Layout, layout_of
from envs.calvin.scenes import scene_named
from envs.calvin.tasks import COLORS
from envs.spec import ACTION_DIM, MAX_RELATIVE_POSITION_M, MAX_RELATIVE_ROTATION_RAD, ROBOT_OBS, SCENE_OBS

PI = np.pi
DOWN = np.array([PI, 0, PI / 2])
OPEN, CLOSE = 1.0, -1.0
BLOCK_Z = TABLE_TOP_Z + BLOCK_WIDTH_M / 2
"""Height of the middle of a block that lies on the table."""
CLEAR_Z = 0.56
"""Height at which closed fingers pass over everything on the table but a stack."""
TRAVEL_Z = 0.53
"""Height at which they pass over blocks that lie singly."""
CARRY_Z = 0.60
"""Height at which a held block passes over everything on the table."""
Actions = Iterator[np.ndarray]

HELD_RADIUS_M = 0.045
HELD_WIDTH_M = (0.02, 0.07)
LEASH_M, LEASH_STEPS = 0.10, 12
TELEPORT_M = 0.15
ACTION_UNITS = np.repeat([MAX_RELATIVE_POSITION_M, MAX_RELATIVE_ROTATION_RAD], 3)
REACHED_UNITS, TURNED_UNITS = 5e-3, 2e-2


class Interrupted(Exception):
    """What the running plan relies on no longer holds; plan again from the present state."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block as it lies. position: x, y, z [m] of its centre. yaw: heading of its long side, or of a side if it stands on end [rad]."""

    color: str
    position: np.ndarray
    yaw: float
    length: float
    """Horizontal long side [m]."""
    height: float

    @property
    def place(self) -> str:
        """Where it is: "table", "shelf", "drawer" or "floor"; a held or stacked block counts as on what is below it."""
        _, y, z = self.position
        if z < DRAWER_FLOOR_Z:
            return "floor"
        if z < TABLE_TOP_Z:
            return "drawer"
        return "shelf" if y > TABLE_Y[1] + 0.01 else "table" if y > TABLE_Y[0] else "drawer"

    def reach_along(self, angle: float) -> float:
        """Half extent [m] of its outline along a horizontal direction."""
        turn = self.yaw - angle
        return (self.length * abs(cos(turn)) + BLOCK_WIDTH_M * abs(sin(turn))) / 2

    def gap_to(self, x: float, y: float) -> float:
        """Distance [m] of a point from its outline, along the nearer of its two axes; negative inside."""
        x, y = x - self.position[0], y - self.position[1]
        along, across = x * cos(self.yaw) + y * sin(self.yaw), y * cos(self.yaw) - x * sin(self.yaw)
        return max(abs(along) - self.length / 2, abs(across) - BLOCK_WIDTH_M / 2)


def wrap(angle):
    """Angle [rad] into [-π, π)."""
    return (angle + PI) % (2 * PI) - PI


def nearest_turn(angle: float, to: float, period: float = PI) -> float:
    """`angle` plus the multiple of `period` that brings it nearest `to`."""
    return angle + period * round((to - angle) / period)


def in_range(yaw: float) -> float:
    """The hand's yaw [rad] as the wrist can be turned to it: between -π/2 and 3π/2."""
    return nearest_turn(yaw, PI / 2, 2 * PI)


class Arm:
    """The arm of one scene: its state as observed, its target as commanded, and motions.

    acceleration: most that the commanded speed changes by in a step, in units an axis [1 unit = 0.02 m or 0.05 rad a step]. Infinite:
    every axis goes as fast as it may, stopping where it has to. Finite: all axes set out and arrive together, on a straight line.
    """

    def __init__(self, scene: str, acceleration: float = inf):
        if not acceleration > 0:
            raise ValueError(f"acceleration is {acceleration}, expected above 0; it is in units of an action a step")
        self.acceleration = acceleration
        self.pace = 0.0  # speed of the last step of a move, in units of the fastest axis
        self.layout: Layout = layout_of(scene)
        self.block_order = [name.removeprefix("block_") for name in scene_named(scene).blocks]
        self.target: np.ndarray | None = None
        self.tool = np.zeros(6)
        self.gripper = OPEN

    # -- state

    def forget(self) -> None:
        """Drop what is believed of the target: the arm has been put elsewhere."""
        self.target = None

    def sense(self, observation: dict[str, np.ndarray]) -> None:
        """Take in robot_obs (15,) and scene_obs (24,)."""
        robot, self.scene_obs = observation[ROBOT_OBS], observation[SCENE_OBS]
        before, self.tool = self.tool, np.array(robot[:6], dtype=np.float64)
        self.width = float(robot[6])
        self.gripper = float(robot[14])
        # The target is persistent and not observed. Ours is followed by counting actions; after a reset it is the tool's pose.
        if self.target is None or hypot(*(self.tool - before)[:3].tolist()) > TELEPORT_M:
            self.target = self.tool.copy()
            self.target[5] = in_range(self.target[5])
        self._blocks: dict[str, Block] = {}

    def executed(self, action: np.ndarray) -> None:
        """Account for an action (7,) that the arm was given."""
        if self.target is not None:
            self.target += action[:6] * ACTION_UNITS
        self.gripper = OPEN if action[6] > 0 else CLOSE
        self.pace = float(np.abs(action[:6]).max())

    @property
    def slide(self) -> float:
        """How far the sliding door is moved to -x [m]."""
        return float(self.scene_obs[0])

    @property
    def drawer(self) -> float:
        """How far the drawer is open [m]."""
        return float(self.scene_obs[1])

    def block(self, color: str) -> Block:
        """The block of that colour."""
        if color not in self._blocks:
            self._blocks[color] = _block(color, self.block_pose(color), self.layout.block_lengths[color])
        return self._blocks[color]

    def block_pose(self, color: str) -> np.ndarray:
        """Position [m] and Euler angles [rad] of a block, (6,)."""
        at = 6 + 6 * self.block_order.index(color)
        return self.scene_obs[at : at + 6]

    def blocks(self, *, without: str | None = None, place: str | None = None) -> list[Block]:
        """All blocks, but for one, or those in one place."""
        blocks = [self.block(color) for color in COLORS if color != without]
        return [block for block in blocks if place in (None, block.place)]

    def distance_to(self, block: Block) -> float:
        """From the tool's centre to the block's [m]."""
        return hypot(*(self.tool[:3] - block.position).tolist())

    def held(self) -> str | None:
        """Colour of the block between closed fingers, if there is one."""
        nearest = min(self.blocks(), key=self.distance_to)
        return nearest.color if self._is_in_fingers(nearest) else None

    def _is_in_fingers(self, block: Block) -> bool:
        closed = self.gripper < 0 and HELD_WIDTH_M[0] < self.width < HELD_WIDTH_M[1]
        return closed and self.distance_to(block) < HELD_RADIUS_M

    def holds(self, color: str) -> Callable[[], bool]:
        """Condition for `move`: the block is still in the fingers."""
        return lambda: self._is_in_fingers(self.block(color))

    def lies_at(self, block: Block, within_m: float = 0.015) -> Callable[[], bool]:
        """Condition for `move`: the block is still where it was when this was asked."""
        return lambda: float(np.abs(self.block(block.color).position - block.position).max()) < within_m

    def off_target_m(self) -> float:
        """How far the tool is from where it was sent [m]."""
        return hypot(*(self.target - self.tool)[:3].tolist())

    # -- motions

    def still(self) -> np.ndarray:
        """The action that changes nothing."""
        return np.array([0.0] * (ACTION_DIM - 1) + [self.gripper])

    def move(
        self,
        position,
        euler=None,
        *,
        speed: float = 1.0,
        hold: int = 0,
        tolerance_m: float = 0.008,
        brake: bool = True,
        provided: Callable[[], bool] | None = None,
    ) -> Actions:
        """Move the target to a pose, at most `speed` units an axis a step, then wait until the tool is there (or `hold` steps).

        brake: slow down towards the end, where acceleration is finite. Raises Interrupted when `provided` stops being true, or when the
        tool does not follow.
        """
        x, y, z = map(float, position)
        roll, pitch, yaw = map(float, self.target[3:] if euler is None else euler)
        yaw = in_range(yaw)
        behind = 0
        while True:
            if provided is not None and not provided():
                raise Interrupted
            target = self.target.tolist()
            shift = [(goal - at) / MAX_RELATIVE_POSITION_M for goal, at in zip((x, y, z), target, strict=False)]
            # The yaw goes not the short way round, but the way that the wrist can turn.
            turn = wrap(roll - target[3]), wrap(pitch - target[4]), yaw - target[5]
            turn = [angle / MAX_RELATIVE_ROTATION_RAD for angle in turn]
            if max(map(abs, shift)) < REACHED_UNITS and max(map(abs, turn)) < TURNED_UNITS:
                break
            behind = behind + 1 if self._lags(shift) else 0
            if behind > LEASH_STEPS:
                raise Interrupted
            if behind:
                shift = [0.0, 0.0, 0.0]
            yield np.array([*self._limited(shift + turn, speed, brake), self.gripper])
        for _ in range(hold):
            if hypot(self.tool[0] - x, self.tool[1] - y, self.tool[2] - z) < tolerance_m:
                break
            if provided is not None and not provided():
                raise Interrupted
            yield self.still()

    def _limited(self, way: list[float], speed: float, brake: bool) -> list[float]:
        """The part of what is left of the way (6,), in units, that is done in this step."""
        if self.acceleration == inf:
            return [min(max(unit, -speed), speed) for unit in way]
        left = max(map(abs, way))
        step = min(left, speed, self.pace + self.acceleration)
        if brake:
            step = min(step, max(self.acceleration, sqrt(2 * self.acceleration * left) - self.acceleration / 2))
        return [unit * step / left if left else 0.0 for unit in way]

    def _lags(self, shift: list[float]) -> bool:
        """Whether the target is far ahead of the tool, and `shift` takes it further."""
        ahead = (self.target[:3] - self.tool[:3]).tolist()
        return hypot(*ahead) > LEASH_M and sum(a * s for a, s in zip(ahead, shift, strict=True)) > 0

    def wait(self, steps: int) -> Actions:
        """Hold the pose."""
        for _ in range(steps):
            yield self.still()

    def grip(self, command: float, steps: int = 10) -> Actions:
        """Open (+1) or close (-1), and wait; nothing where that is already the command."""
        if command != self.gripper:
            for _ in range(steps):
                yield np.array([0.0] * (ACTION_DIM - 1) + [command])

    def up(self, height_m: float = CLEAR_Z, euler=None) -> Actions:
        """Straight up to a height, if below it."""
        yield from self.move([self.target[0], self.target[1], max(height_m, self.target[2])], euler)

    def travel(self, x: float, y: float, euler) -> Actions:
        """Closed fingers up, over whatever stands on the table, to above a place."""
        highest = max([block.position[2] + block.height / 2 for block in self.blocks(place="table")], default=TABLE_TOP_Z)
        z = max(TRAVEL_Z, min(highest + 0.04, CARRY_Z))
        yield from self.up(z)
        yield from self.move([x, y, z], euler, hold=4)


def _block(color: str, pose: np.ndarray, long_m: float) -> Block:
    roll, pitch, yaw = pose[3:]
    if abs(cos(pitch)) > 0.7:
        return Block(color, pose[:3].copy(), float(yaw), long_m, BLOCK_WIDTH_M)
    # It stands on end, and its long axis has no heading: take its y axis.
    x = cos(yaw) * sin(pitch) * sin(roll) - sin(yaw) * cos(roll)
    y = sin(yaw) * sin(pitch) * sin(roll) + cos(yaw) * cos(roll)
    return Block(color, pose[:3].copy(), atan2(y, x), BLOCK_WIDTH_M, long_m)


def free_spot(spots: list[tuple[float, float]], taken: list[Block], near: tuple[float, float], clearance_m: float) -> tuple[float, float]:
    """Of `spots` (x, y), the one nearest to `near` with no block within `clearance_m`; where there is none, the one with most room."""

    def room(spot) -> float:
        return min((hypot(spot[0] - b.position[0], spot[1] - b.position[1]) for b in taken), default=1.0)

    return max(spots, key=lambda spot: (min(room(spot), clearance_m), -hypot(spot[0] - near[0], spot[1] - near[1])))
