"""The new task: point at the drawer, in a scene that the shipped policy has never seen.

`calvin-d` was trained in scene D on CALVIN's 34 tasks. Two of them take hold of the drawer's handle, none of them stops above it. Scene
B has a table of another wood, other blocks, and button, switch, lamp and LED elsewhere. The drawer may be open or closed: one has to look.

    env = make_env()
    state, judge = begin(env, np.random.default_rng(0))
    ...
    judge(env.info())                # after every control step; true once the hand has pointed for long enough
"""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.calvin.layout import layout_of
from envs.calvin.scenes import DRAWER
from envs.robot import Observation, RobotEnv
from envs.spec import ROBOT_OBS, SCENE_OBS
from eval.environment import ROBOT, EnvConfig
from eval.sequences import initial_conditions, initial_state

TASK = "point_at_drawer"
SCENE = "B"
SENTENCES = (
    "point at the drawer",
    "point to the handle of the drawer",
    "show me the drawer",
    "hold the hand above the drawer handle",
    "indicate where the drawer is",
)
"""What the operators were told; a policy is evaluated on the first."""

POINT_Z_M = 0.44
"""Height at which a hand points at the handle, whose top is at 0.40."""
NEAR_M, POINTING_STEPS = 0.05, 30
"""So near must the tool stay for so many control steps in a row (1 s): a hand on its way to something else does not."""
SHIFTED_M = 0.02
"""Nor does a hand that moved the drawer."""
ARM_NOISE_RAD = 0.05
"""Standard deviation of the joints' start around the neutral pose."""


ENV = EnvConfig(simulator=ROBOT, scene=SCENE)
"""Scene B under the simulated arm: commands 30 ms late, noisy and older observations, in virtual time."""


def make_env() -> RobotEnv:
    """The simulated arm in its scene."""
    return ENV.make()


def begin(env: RobotEnv, rng: np.random.Generator) -> tuple[Observation, Judge]:
    """Reset to a random start of the task. Returns the first state and the judge of this attempt.

    Doors, lights and blocks are as in one of the long-horizon protocol's initial conditions; the arm stands near its neutral pose.
    """
    conditions = list(initial_conditions())
    robot_obs, scene_obs = initial_state(conditions[rng.integers(len(conditions))], SCENE)
    robot_obs[7:14] += rng.normal(0, ARM_NOISE_RAD, 7)
    state, info = env.reset(options={ROBOT_OBS: robot_obs, SCENE_OBS: scene_obs})
    return state, Judge(info)


class Judge:
    """The success rule of one attempt, from the simulator's state. pointing: steps in a row, up to the last one that was judged."""

    def __init__(self, start: dict[str, Any]):
        self.drawer_m, self.pointing = drawer_m(start), 0

    def __call__(self, info: dict[str, Any]) -> bool:
        """Whether the task is done, given `info` after one more control step."""
        near = np.linalg.norm(np.array(info["robot_info"]["tcp_pos"]) - place(info)) < NEAR_M
        self.pointing = self.pointing + 1 if near and abs(drawer_m(info) - self.drawer_m) < SHIFTED_M else 0
        return self.pointing >= POINTING_STEPS


def drawer_m(info: dict[str, Any]) -> float:
    """How far the drawer is open [m]."""
    return info["scene_info"]["doors"][DRAWER]["current_state"]


def place(info: dict[str, Any]) -> np.ndarray:
    """Where a hand points at the drawer: above the middle of its handle, wherever that is now. World frame [m]."""
    layout = layout_of(SCENE)
    return np.array([layout.drawer_x, layout.drawer_handle_y(drawer_m(info)), POINT_Z_M])
