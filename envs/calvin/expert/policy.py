"""A scripted expert for all 34 tasks in all four scenes, closed-loop on state: it reads robot_obs and scene_obs, never images, and
answers one action a step.

A plan is a generator of actions: first the arm is freed from whatever it was at, then comes the task's skill. It is started again from
the present state when it ends without success and when what it relied on no longer holds, so slips and disturbances are recovered from.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import numpy as np

from envs.calvin.expert import block_skills, fixture_skills
from envs.calvin.expert.arm import CLEAR_Z, OPEN, PI, Actions, Arm, Block, Interrupted
from envs.calvin.expert.fixture_skills import FORWARD_Y
from envs.calvin.tasks import COLORS, TASKS, check_task
from envs.spec import ROBOT_OBS, SCENE_OBS

CARRYING = ("place_in_drawer", "place_in_slider", "stack_block")
HANDLE_HALF_M = 0.08
JAMMED_M = 0.06
TAKING = ("lift", "rotate", "push_into", "unstack")


class ExpertPolicy:
    """Scripted expert of one scene ("A", "B", "C" or "D"); a Policy. acceleration: see Arm. Raises ValueError for another scene."""

    requires = frozenset({ROBOT_OBS, SCENE_OBS})

    def __init__(self, scene: str = "D", acceleration: float = inf):
        self.name = "expert"
        self.arm = Arm(scene, acceleration)
        self.task: str | None = None

    def reset(self, instruction: str, *, task: str | None = None, seed: int | None = None) -> None:
        """Start on `task`; where it is not given, on the task that our own wordings mean by `instruction`."""
        if task is None:
            from envs.calvin.language import task_of

            task = task_of(instruction)
        self.task = check_task(task)
        self.plan: Actions | None = None
        self.start: dict[str, Block] | None = None

    def begin_chain(self) -> None:
        """Forget where the arm was sent: it has been put elsewhere."""
        self.arm.forget()

    def infer(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One action: {"actions": float32 (1, 7)}."""
        if self.task is None:
            raise RuntimeError("the expert was asked for an action before reset(instruction, task=...)")
        self.sense(observation)
        action = self._next_action()
        self.arm.executed(action)
        return {"actions": action[None].astype(np.float32)}

    def executed(self, action: np.ndarray) -> None:
        """Account for an action (7,) that somebody else gave the arm, and plan again from where it takes it."""
        self.arm.executed(action)
        self.plan = None

    def altered(self, action: np.ndarray, given: np.ndarray) -> None:
        """Account for an action (7,) of this policy of which the arm was given something else; the plan goes on from there."""
        self.arm.executed(np.r_[(given - action)[:-1], given[-1]])

    def sense(self, observation: dict[str, np.ndarray]) -> None:
        """Take in robot_obs (15,) and scene_obs (24,)."""
        self.arm.sense(observation)
        if self.start is None:
            self.start = {block.color: block for block in self.arm.blocks()}
            self.start_held = self.arm.held()

    def _next_action(self) -> np.ndarray:
        for _ in range(3):
            if self.plan is None:
                self.plan = self._attempt()
            try:
                return next(self.plan)
            except (StopIteration, Interrupted):
                self.plan = None
        return self.arm.still()

    def _attempt(self) -> Actions:
        yield from self._free_arm()
        yield from SKILLS[self.task](self)
        yield self.arm.still()

    def _free_arm(self) -> Actions:
        """Let go of what is not wanted, back out of the cabinet or off a handle, and level the wrist."""
        arm = self.arm
        held = arm.held()
        if arm.off_target_m() > JAMMED_M:  # pushed against something: first stop pushing
            yield from arm.move(arm.tool[:3], arm.tool[3:])
        if held and self._wants(held):
            if arm.tool[1] > 0:
                yield from self._back_out()
            return
        if held and block_skills.lifted_m(arm, arm.block(held)) > 0.012:
            yield from self._back_out()
            yield from block_skills.put_down(arm, held)
        elif arm.gripper < 0 and arm.width > 0.005:
            yield from arm.grip(OPEN, 8)
        handle = arm.layout.slide_handle_x - arm.slide
        if arm.tool[1] > 0 and abs(arm.tool[0] - handle) < HANDLE_HALF_M:  # in the door's handle, whose way out is along x
            out = handle + (HANDLE_HALF_M if arm.tool[0] > handle else -HANDLE_HALF_M)
            yield from arm.move([out, *arm.tool[1:3]])
        yield from self._back_out()
        yield from arm.up(CLEAR_Z)
        yield from arm.move(arm.target[:3], [PI, 0, arm.target[5]])

    def _back_out(self) -> Actions:
        """Out of the cabinet's way, above what stands on the table."""
        arm = self.arm
        if arm.target[1] > -0.10:
            yield from arm.move([arm.target[0], min(arm.target[1], 0.0), max(arm.target[2], 0.53)])
            yield from arm.move([arm.target[0], FORWARD_Y, max(arm.target[2], 0.58)])

    def _wants(self, held: str) -> bool:
        """Whether the task is done with that block in the fingers."""
        if self.task in CARRYING or self.task == "push_into_drawer":
            return True
        if self.task == "unstack_block":
            return held == block_skills.top_block(self.arm)
        return self.task.startswith(TAKING) and self.task.split("_")[1] == held


Skill = Callable[[ExpertPolicy], Actions]


def _carrying(skill: Callable[[Arm, str], Actions], away_from: str = "") -> Skill:
    """A skill done with the block that was held when the task began; where none was, with one that is not `away_from` yet."""
    return lambda expert: skill(expert.arm, block_skills.block_to_carry(expert.arm, expert.start_held, away_from))


def _skills() -> dict[str, Skill]:
    fixtures, blocks = fixture_skills, block_skills
    skills: dict[str, Skill] = {
        "turn_on_led": lambda expert: fixtures.press_button(expert.arm),
        "turn_off_led": lambda expert: fixtures.press_button(expert.arm),
        "turn_on_lightbulb": lambda expert: fixtures.switch_on(expert.arm),
        "turn_off_lightbulb": lambda expert: fixtures.switch_off(expert.arm),
        "open_drawer": lambda expert: fixtures.open_drawer(expert.arm),
        "close_drawer": lambda expert: fixtures.close_drawer(expert.arm),
        "move_slider_left": lambda expert: fixtures.move_slider(expert.arm, left=True),
        "move_slider_right": lambda expert: fixtures.move_slider(expert.arm, left=False),
        "place_in_drawer": _carrying(blocks.place_in_drawer, away_from="drawer"),
        "push_into_drawer": _carrying(blocks.place_in_drawer, away_from="drawer"),
        "place_in_slider": _carrying(blocks.place_in_slider, away_from="shelf"),
        "stack_block": _carrying(blocks.stack),
        "unstack_block": lambda expert: blocks.unstack(expert.arm),
    }
    for color in COLORS:
        skills |= _skills_for(color)
    return {task: skills[task] for task in TASKS}


def _skills_for(color: str) -> dict[str, Skill]:
    blocks = block_skills
    return {
        f"rotate_{color}_block_right": lambda expert: blocks.rotate(expert.arm, color, expert.start[color], left=False),
        f"rotate_{color}_block_left": lambda expert: blocks.rotate(expert.arm, color, expert.start[color], left=True),
        f"push_{color}_block_right": lambda expert: blocks.push(expert.arm, color, expert.start[color], right=True),
        f"push_{color}_block_left": lambda expert: blocks.push(expert.arm, color, expert.start[color], right=False),
        f"lift_{color}_block_table": lambda expert: blocks.lift(expert.arm, color),
        f"lift_{color}_block_drawer": lambda expert: blocks.lift(expert.arm, color),
        f"lift_{color}_block_slider": lambda expert: blocks.lift_from_shelf(expert.arm, color),
    }


SKILLS = _skills()
"""Task → what does it."""
