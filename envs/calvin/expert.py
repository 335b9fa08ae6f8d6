"""A scripted expert for all 34 tasks, closed-loop on state: it reads robot_obs and scene_obs, never images, and answers one action a step.

A skill is a generator of actions. It looks at the present state whenever it matters (where is the block now, is it in the fingers, how
far is the drawer), and is started again from the present state when it ends without success, so slips and disturbances are recovered from.

World frame, metres and radians. The wrist points down at Euler (π, 0, ·); the third angle is the yaw of the hand, and the fingers close
along the hand's y axis: with yaw ψ they close across a block whose own yaw is ψ (modulo π).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from envs.calvin.scenes import scene_named
from envs.calvin.tasks import COLORS, check_task
from envs.spec import ACTION_DIM, MAX_RELATIVE_POSITION_M, MAX_RELATIVE_ROTATION_RAD, ROBOT_OBS, SCENE_OBS

PI = np.pi
DOWN = np.array([PI, 0, PI / 2])
OPEN, CLOSE = 1.0, -1.0
Actions = Iterator[np.ndarray]

LOST_TARGET_M, LOST_TARGET_RAD = 0.12, 1.2
HELD_RADIUS_M = 0.045
TABLE_EDGE_Y_M, TABLE_TOP_M = 0.03, 0.43


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a scene's fixtures are, in the world frame [m]."""

    button: tuple[float, float]
    switch_x: float
    drawer_x: float
    drawer_handle_y: float
    slide_handle_x: float
    slide_limit: float
    cabinet_left: float
    cabinet_right: float
    free_table: tuple[float, float]


LAYOUTS = {
    "D": Layout(
        button=(-0.12, -0.12),
        switch_x=0.30,
        drawer_x=0.18,
        drawer_handle_y=-0.207,
        slide_handle_x=0.04,
        slide_limit=0.28,
        cabinet_left=-0.34,
        cabinet_right=0.14,
        free_table=(0.15, -0.14),
    )
}


def wrap(angle):
    """Angle [rad] into [-π, π)."""
    return (np.asarray(angle) + PI) % (2 * PI) - PI


class ExpertPolicy:
    """Scripted expert of one scene; a Policy.

    Raises ValueError for a scene whose layout it does not know.
    """

    requires = frozenset({ROBOT_OBS, SCENE_OBS})

    def __init__(self, scene: str = "D"):
        description = scene_named(scene)
        if scene not in LAYOUTS:
            raise ValueError(f"the expert knows scenes {', '.join(LAYOUTS)}, not {scene!r}")
        self.name = "expert"
        self.layout = LAYOUTS[scene]
        self.block_order = [name.removeprefix("block_") for name in description.blocks]
        self.task: str | None = None
        self.target: np.ndarray | None = None
        self.gripper = OPEN

    def reset(self, instruction: str, *, task: str | None = None, seed: int | None = None) -> None:
        """Start on `task`; where it is not given, on the task that our own wordings mean by `instruction`."""
        if task is None:
            from envs.calvin.language import task_of

            task = task_of(instruction)
        self.task = check_task(task)
        self.plan: Actions | None = None

    def begin_chain(self) -> None:
        """Forget where the arm was sent: it has been put elsewhere."""
        self.target = None

    def infer(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One action: {"actions": float32 (1, 7)}."""
        if self.task is None:
            raise RuntimeError("the expert was asked for an action before reset(instruction, task=...)")
        self.sense(observation)
        if self.plan is None:
            self.plan = self._plan()
        try:
            action = next(self.plan)
        except StopIteration:
            self.plan = self._plan()
            action = next(self.plan)
        self.executed(action)
        return {"actions": action[None].astype(np.float32)}

    def executed(self, action: np.ndarray) -> None:
        """Account for an action (7,) that the arm was given; called for our own, and by whoever injects others between."""
        if self.target is not None:
            self.target[:3] += np.asarray(action[:3], dtype=np.float64) * MAX_RELATIVE_POSITION_M
            self.target[3:] += np.asarray(action[3:6], dtype=np.float64) * MAX_RELATIVE_ROTATION_RAD
        self.gripper = float(np.sign(action[6]))

    def sense(self, observation: dict[str, np.ndarray]) -> None:
        """Take in robot_obs (15,) and scene_obs (24,)."""
        robot, self.scene_obs = observation[ROBOT_OBS], observation[SCENE_OBS]
        self.tool = np.array(robot[:6])
        self.width = float(robot[6])
        self.gripper = float(robot[14])
        # The arm's target is persistent and not observed. Ours is followed by counting actions; after a reset it is the tool's pose.
        if self.target is not None:
            off_m = np.abs(self.target[:3] - self.tool[:3]).max()
            off_rad = np.abs(wrap(self.target[3:] - self.tool[3:])).max()
        if self.target is None or off_m > LOST_TARGET_M or off_rad > LOST_TARGET_RAD:
            self.target = self.tool.copy()

    # -- what is where

    def block(self, color: str) -> tuple[np.ndarray, float]:
        """Position [m] and yaw [rad] of a block."""
        pose = self.scene_obs[6:].reshape(-1, 6)[self.block_order.index(color)]
        return pose[:3], float(pose[5])

    @property
    def slide(self) -> float:
        return float(self.scene_obs[0])

    @property
    def drawer(self) -> float:
        return float(self.scene_obs[1])

    def held_block(self) -> str | None:
        """The block between closed fingers, if there is one."""
        if self.gripper > 0 or self.width < 0.01:
            return None
        nearest = min(COLORS, key=lambda color: np.linalg.norm(self.block(color)[0] - self.tool[:3]))
        return nearest if np.linalg.norm(self.block(nearest)[0] - self.tool[:3]) < HELD_RADIUS_M else None

    # -- motions

    def move(self, position, euler=None, *, speed: float = 1.0, hold: int = 0, tolerance_m: float = 0.008) -> Actions:
        """Move the target to a pose, at most `speed` units an axis a step, then wait until the tool is there (or `hold` steps)."""
        position = np.asarray(position, dtype=np.float64)
        euler = self.target[3:].copy() if euler is None else np.asarray(euler, dtype=np.float64)
        while True:
            shift = (position - self.target[:3]) / MAX_RELATIVE_POSITION_M
            turn = wrap(euler - self.target[3:]) / MAX_RELATIVE_ROTATION_RAD
            if np.abs(shift).max() < 5e-3 and np.abs(turn).max() < 2e-2:
                break
            yield np.r_[np.clip(shift, -speed, speed), np.clip(turn, -speed, speed), self.gripper]
        for _ in range(hold):
            if np.linalg.norm(self.tool[:3] - position) < tolerance_m:
                break
            yield self._still()

    def wait(self, steps: int) -> Actions:
        """Hold the pose."""
        for _ in range(steps):
            yield self._still()

    def grip(self, command: float, steps: int = 10) -> Actions:
        """Open (+1) or close (-1), and wait."""
        if command != self.gripper:
            for _ in range(steps):
                yield np.r_[np.zeros(6), command]

    def up(self, height_m: float = 0.56) -> Actions:
        """Straight up to a height, if below it."""
        yield from self.move([*self.target[:2], max(height_m, self.target[2])])

    def _still(self) -> np.ndarray:
        return np.r_[np.zeros(ACTION_DIM - 1), self.gripper]

    # -- plans

    def _plan(self) -> Actions:
        yield from self._retreat()
        yield from self._skill()
        yield self._still()

    def _skill(self) -> Actions:
        task, words = self.task, self.task.split("_")
        if task in ("turn_on_led", "turn_off_led"):
            return self._press_button()
        if task == "turn_on_lightbulb":
            return self._switch_on()
        if task == "turn_off_lightbulb":
            return self._switch_off()
        if task.startswith("move_slider"):
            return self._move_slider(left=words[2] == "left")
        if words[0] == "lift":
            return self._lift_from_shelf(words[1]) if words[3] == "slider" else self._lift(words[1])
        if words[0] == "rotate":
            return self._rotate(words[1], left=words[3] == "left")
        if words[0] == "push" and task != "push_into_drawer":
            return self._push(words[1], right=words[3] == "right")
        return getattr(self, f"_{task}")()

    def _retreat(self) -> Actions:
        """Let go of what is not wanted, back out of the cabinet or off a handle, and level the wrist."""
        if self.task in ("place_in_drawer", "place_in_slider", "stack_block") and self.held_block():
            return
        if self.task.startswith(("lift", "rotate", "push_into", "unstack")) and self.held_block() == self._wanted_block():
            return
        if self.gripper < 0 and self.width > 0.005:
            yield from self.grip(OPEN, 8)
        if self.target[1] > -0.10:
            yield from self.move([*self.target[:2], max(self.target[2], 0.50)])
            yield from self.move([self.target[0], -0.12, max(self.target[2], 0.52)])
        yield from self.up()
        yield from self.move(self.target[:3].copy(), [PI, 0, self.target[5]])

    def _wanted_block(self) -> str | None:
        words = self.task.split("_")
        if words[1] in COLORS:
            return words[1]
        if self.task == "unstack_block":
            return self._highest()
        return None

    def _highest(self) -> str:
        return max(COLORS, key=lambda color: self.block(color)[0][2])

    # -- fixtures

    def _press_button(self) -> Actions:
        x, y = self.layout.button
        yield from self.grip(CLOSE, 1)
        yield from self.up(0.53)
        yield from self.move([x, y, 0.53], DOWN)
        yield from self.move([x, y, 0.452], hold=4)
        yield from self.move([x, y, 0.53], hold=6)

    def _switch_on(self) -> Actions:
        """Closed fingers, tilted forward, under the lever; then up along its slope."""
        x, tilted = self.layout.switch_x, [PI, -1.05, PI / 2]
        yield from self.grip(CLOSE, 1)
        yield from self.up(0.55)
        yield from self.move([x - 0.05, -0.15, 0.55], tilted)
        yield from self.move([x, -0.12, 0.47], tilted, hold=3)
        yield from self.move([x, 0.015, 0.475], tilted, hold=3)
        yield from self.move([x, 0.075, 0.60], tilted, speed=0.4, hold=10)

    def _switch_off(self) -> Actions:
        x, tilted = self.layout.switch_x, [PI, -0.9, PI / 2]
        yield from self.grip(CLOSE, 1)
        yield from self.up(0.60)
        yield from self.move([x - 0.05, -0.12, 0.64], tilted)
        yield from self.move([x, 0.0, 0.66], tilted, hold=2)
        yield from self.move([x, 0.095, 0.655], tilted, hold=4)
        yield from self.move([x, 0.035, 0.54], tilted, speed=0.4, hold=8)

    def _open_drawer(self) -> Actions:
        x, y = self.layout.drawer_x, self.layout.drawer_handle_y - self.drawer
        yield from self.grip(CLOSE, 1)
        yield from self.up(0.5)
        yield from self.move([x, y - 0.093, 0.50], DOWN)
        yield from self.move([x, y, 0.46])
        yield from self.move([x, y, 0.36], hold=2)
        yield from self.move([x, -0.42, 0.36], speed=0.6, hold=3)

    def _close_drawer(self) -> Actions:
        x, y = self.layout.drawer_x, self.layout.drawer_handle_y + 0.002 - self.drawer
        yield from self.grip(CLOSE, 1)
        yield from self.up(0.5)
        yield from self.move([x, y, 0.50], DOWN)
        yield from self.move([x, y, 0.37], hold=2)
        yield from self.move([x, -0.19, 0.37], speed=0.6, hold=4)

    def _move_slider(self, left: bool) -> Actions:
        layout, side = self.layout, 1 if left else -1
        handle = layout.slide_handle_x - self.slide
        goal = layout.slide_handle_x - (layout.slide_limit + 0.04 if left else -0.04)
        yield from self.grip(CLOSE, 1)
        yield from self.up(0.56)
        yield from self.move([handle + side * 0.085, -0.06, 0.56], DOWN)
        yield from self.move([handle + side * 0.085, -0.03, 0.53], hold=2)
        yield from self.move([goal, -0.03, 0.53], speed=0.6, hold=4)

    # -- blocks

    def _grasp(self, color: str, safe_m: float = 0.56) -> Actions:
        """Open above the block, across its short side; go down; close."""
        if self.held_block() == color:
            return
        position, yaw = self.block(color)
        psi = yaw + PI * np.round((PI / 2 - yaw) / PI)
        yield from self.grip(OPEN, 4)
        yield from self.up(safe_m)
        yield from self.move([*position[:2], safe_m], [PI, 0, psi], hold=4)
        position, _ = self.block(color)
        yield from self.move([*position[:2], position[2] + 0.002], hold=4)
        yield from self.grip(CLOSE)

    def _lift(self, color: str) -> Actions:
        yield from self._grasp(color)
        yield from self.move([*self.target[:2], 0.58], speed=0.6, hold=5)

    def _lift_from_shelf(self, color: str) -> Actions:
        if self.held_block() != color:
            yield from self._clear_door(self.block(color)[0][0])
            position, tilted = self.block(color)[0], [PI, -0.6, PI / 2]
            yield from self.grip(OPEN, 1)
            yield from self.up(0.60)
            yield from self.move([position[0], -0.12, 0.60], DOWN)
            yield from self.move([position[0], position[1] - 0.12, 0.58], tilted)
            yield from self.move([position[0], position[1] - 0.06, position[2] + 0.06], tilted, hold=2)
            yield from self.move([position[0], position[1] - 0.005, position[2] + 0.005], tilted, hold=3)
            yield from self.grip(CLOSE, 12)
        yield from self.move([self.target[0], self.target[1] - 0.02, 0.54], speed=0.5, hold=8)

    def _clear_door(self, x: float) -> Actions:
        """Slide the door away from the compartment at `x`."""
        left = x < (self.layout.cabinet_left + self.layout.cabinet_right) / 2 + 0.02
        if left and self.slide > 0.02:
            yield from self._move_slider(left=False)
        elif not left and self.slide < self.layout.slide_limit - 0.02:
            yield from self._move_slider(left=True)
        else:
            return
        yield from self.move([self.target[0], -0.10, max(self.target[2], 0.54)])
        yield from self.up(0.58)

    def _push(self, color: str, right: bool) -> Actions:
        side = 1 if right else -1
        x, y, _ = self.block(color)[0]
        yield from self.grip(CLOSE, 1)
        yield from self.up(0.54)
        yield from self.move([x - side * 0.09, y, 0.54], DOWN)
        yield from self.move([x - side * 0.09, y, 0.46], hold=2)
        yield from self.move([x + side * 0.10, y, 0.46], speed=0.5, hold=4)
        yield from self.up(0.54)

    def _rotate(self, color: str, left: bool) -> Actions:
        yield from self._grasp(color)
        turn = np.array([0, 0, 1.35 if left else -1.35])
        yield from self.move(self.target[:3].copy(), self.target[3:] + turn, hold=3)
        yield from self.grip(OPEN)
        yield from self.up(0.54)

    def _place_in_drawer(self) -> Actions:
        if not self.held_block():
            yield from self._grasp(self._nearest_block())
        x, y = self.layout.drawer_x, -0.10 - self.drawer
        yield from self.up(0.60)
        yield from self.move([x, y, 0.60])
        yield from self.move([x, y, 0.44])
        yield from self.move([x, y, 0.40], hold=2)
        yield from self.grip(OPEN, 12)
        yield from self.move([x, y, 0.56], hold=8)

    def _place_in_slider(self) -> Actions:
        if not self.held_block():
            yield from self._grasp(self._nearest_block())
        layout, door = self.layout, self.slide
        if door < layout.slide_limit / 2:
            x = (layout.cabinet_left - 0.1 - door) / 2
        else:
            x = (layout.cabinet_right + 0.04 - door + layout.cabinet_right) / 2
        tilted = [PI, -0.6, self.target[5]]
        yield from self.up(0.60)
        yield from self.move([x, -0.10, 0.58])
        yield from self.move([x, -0.02, 0.56], tilted)
        yield from self.move([x, 0.07, 0.50], tilted)
        yield from self.move([x, 0.085, 0.472], tilted, hold=3)
        yield from self.grip(OPEN, 12)
        yield from self.move([x, 0.0, 0.53], tilted, hold=4)
        yield from self.move([x, -0.12, 0.58], tilted, hold=8)

    def _nearest_block(self) -> str:
        return min(self._on_table() or COLORS, key=lambda color: np.linalg.norm(self.block(color)[0] - self.tool[:3]))

    def _on_table(self) -> list[str]:
        return [color for color in COLORS if self.block(color)[0][1] < TABLE_EDGE_Y_M and self.block(color)[0][2] > TABLE_TOP_M]

    def _stack_block(self) -> Actions:
        held = self.held_block()
        if held is None:
            held = self._nearest_block()
            yield from self._grasp(held)
        below = [color for color in self._on_table() if color != held and self.block(color)[0][2] < 0.52]
        if not below:
            below = [color for color in COLORS if color != held]
        position, yaw = self.block(below[0])
        yield from self.up(0.62)
        yield from self.move([*position[:2], 0.60], [PI, 0, yaw + PI * np.round((self.target[5] - yaw) / PI)], hold=4)
        position, _ = self.block(below[0])
        yield from self.move([*position[:2], position[2] + 0.052], hold=4, speed=0.5)
        yield from self.grip(OPEN, 14)
        yield from self.move([*position[:2], 0.62], hold=20)
        yield from self.wait(8)

    def _unstack_block(self) -> Actions:
        yield from self._grasp(self._highest(), safe_m=0.62)
        yield from self.up(0.62)
        x, y = self.layout.free_table
        yield from self.move([x, y, 0.60])
        yield from self.move([x, y, 0.475], hold=3)
        yield from self.grip(OPEN)
        yield from self.up(0.56)

    def _push_into_drawer(self) -> Actions:
        color = self.held_block() or min(self._on_table() or COLORS, key=lambda color: self.block(color)[0][2])
        yield from self._grasp(color)
        yield from self._place_in_drawer()
