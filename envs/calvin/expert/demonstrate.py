"""One demonstration: the scripted expert does a task, is disturbed, recovers; what happened becomes an Episode.

A disturbance is a burst of random actions, or a policy that drives first and is then relieved. Its steps are recorded but marked as not to
be imitated; what the expert does after it is the recovery that a policy needs to see, and after a policy's own mistakes the one that this
policy needs most (DAgger, arXiv 1011.0686). Frames are rendered every few steps, on a grid that starts anew after a disturbance, because
that is when a policy that decides once per chunk would look.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from envs.calvin.env import CalvinEnv
from envs.calvin.expert.policy import ExpertPolicy
from envs.calvin.tasks import completed_tasks
from envs.spec import ACTION_DIM, GRIPPER_CLOSE, GRIPPER_OPEN, RGB_GRIPPER, RGB_STATIC, ROBOT_OBS, SCENE_OBS, Episode


@dataclass(frozen=True, kw_only=True)
class DemonstrationConfig:
    """How demonstrations are made."""

    acceleration: float = 0.2
    """Of the expert's motions; see expert.arm.Arm. Starts and stops that take a few steps are fewer action ids, and easier to foresee,
    than axes that go at full speed or not at all."""
    max_steps: int = 360
    """Control steps after which an attempt counts as failed."""
    frame_stride: int = 5
    """A frame is rendered every so many steps; the policy's chunk must be a multiple of it."""
    disturbance_probability: float = 0.5
    """Share of episodes with a burst of random actions in them."""
    disturbance_steps: tuple[int, int] = (4, 14)
    """Shortest and longest burst."""
    disturbance_window: tuple[int, int] = (4, 70)
    """First and last step at which a burst may begin."""
    gripper_flip_probability: float = 0.25
    """Share of bursts that also open or close the gripper at random."""
    driven_probability: float = 0.75
    """Share of episodes in which a driving policy, where there is one, acts before the expert; these have no burst."""
    driven_steps: tuple[int, int] = (10, 150)
    """Shortest and longest drive."""

    def __post_init__(self):
        if self.frame_stride < 1 or self.max_steps < 1:
            raise ValueError(f"frame_stride={self.frame_stride} and max_steps={self.max_steps} must be at least 1")
        if not self.acceleration > 0:
            raise ValueError(f"acceleration={self.acceleration} must be above 0; it is in units of an action a step")
        for name in ("disturbance_probability", "gripper_flip_probability", "driven_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]")
        for name in ("disturbance_steps", "disturbance_window", "driven_steps"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name}={[low, high]} must be two ascending numbers from 1")


class Driver(Protocol):
    """A policy that reads nothing but the cameras; see policies.base.Policy."""

    requires: frozenset[str]

    def reset(self, instruction: str, *, task: str | None = None, seed: int | None = None) -> None: ...

    def infer(self, observation: dict[str, np.ndarray]) -> dict[str, Any]: ...


def demonstrate(
    env: CalvinEnv,
    expert: ExpertPolicy,
    task: str,
    instruction: str,
    rng: np.random.Generator,
    config: DemonstrationConfig,
    driver: Driver | None = None,
) -> Episode | None:
    """Let the expert do `task` from the environment's present state; None if it did not within max_steps.

    env: must be observe="on_demand" (images are rendered where frames are wanted). rng: draws the disturbance. driver: acts at the
    beginning of a share of the episodes. Where it solves the task before it is relieved, no step of the episode is to be imitated.
    """
    expert.reset(instruction, task=task)
    disturbance = _disturbance(driver, instruction, rng, config)
    start, observation = env.info(), env.state()
    steps: dict[str, list] = {"actions": [], "robot_obs": [], "scene_obs": [], "imitate": []}
    frames: dict[str, list] = {"frame_step": [], RGB_STATIC: [], RGB_GRIPPER: []}
    next_frame = 0
    for step in range(config.max_steps):
        disturbed = disturbance.covers(step)
        looks = step == next_frame or disturbance.ends_at(step)
        if looks or disturbance.wants_to_look(step):
            observation = env.observe()
        if looks:
            frames["frame_step"].append(step)
            for camera in (RGB_STATIC, RGB_GRIPPER):
                frames[camera].append(observation[camera])
            next_frame = step + config.frame_stride
        if disturbed:
            action = disturbance.action(observation)
            expert.sense(observation)
            expert.executed(action)
        else:
            action = expert.infer(observation)["actions"][0]
        for key, value in (("actions", action), (ROBOT_OBS, observation[ROBOT_OBS]), (SCENE_OBS, observation[SCENE_OBS])):
            steps[key].append(value)
        steps["imitate"].append(not disturbed)
        observation, _, _, _, info = env.step(action)
        if completed_tasks(start, info, among=[task]):
            return Episode(
                task=task,
                instruction=instruction,
                actions=np.array(steps["actions"], dtype=np.float32),
                robot_obs=np.array(steps[ROBOT_OBS]),
                scene_obs=np.array(steps[SCENE_OBS]),
                imitate=np.array(steps["imitate"]),
                frame_step=np.array(frames["frame_step"], dtype=np.int64),
                rgb_static=np.array(frames[RGB_STATIC]),
                rgb_gripper=np.array(frames[RGB_GRIPPER]),
            )
    return None


def _disturbance(driver: Driver | None, instruction: str, rng: np.random.Generator, config: DemonstrationConfig) -> _Burst | _Drive:
    if driver is None or rng.random() >= config.driven_probability:
        return _Burst(rng, config)
    driver.reset(instruction, seed=int(rng.integers(2**31)))
    return _Drive(driver, int(rng.integers(*config.driven_steps, endpoint=True)))


class _Drive:
    """A policy acts from the first step on, and is relieved in the middle of a chunk as likely as not."""

    def __init__(self, driver: Driver, end: int):
        self.driver, self.end = driver, end
        self.pending: deque[np.ndarray] = deque()

    def covers(self, step: int) -> bool:
        return step < self.end

    def ends_at(self, step: int) -> bool:
        return step == self.end

    def wants_to_look(self, step: int) -> bool:
        return self.covers(step) and not self.pending

    def action(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """float32 (7,) for one driven step; `observation` holds images where it wanted to look."""
        if not self.pending:
            self.pending.extend(self.driver.infer(observation)["actions"])
        return np.asarray(self.pending.popleft(), np.float32)


class _Burst:
    """One burst of random actions: a drift in a random direction with noise on top."""

    def __init__(self, rng: np.random.Generator, config: DemonstrationConfig):
        self.rng = rng
        happens = rng.random() < config.disturbance_probability
        self.start = int(rng.integers(*config.disturbance_window, endpoint=True)) if happens else config.max_steps
        self.end = self.start + int(rng.integers(*config.disturbance_steps, endpoint=True))
        self.drift = rng.uniform(-1, 1, ACTION_DIM - 1) * np.array([1, 1, 0.7, 0.3, 0.3, 0.6])
        self.flips = rng.random() < config.gripper_flip_probability
        self.gripper = float(rng.choice([GRIPPER_CLOSE, GRIPPER_OPEN]))

    def covers(self, step: int) -> bool:
        return self.start <= step < self.end

    def ends_at(self, step: int) -> bool:
        return step == self.end

    def wants_to_look(self, step: int) -> bool:
        return False

    def action(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """float32 (7,) for one disturbed step."""
        last_gripper = observation[ROBOT_OBS][-1]
        motion = np.clip(self.drift + self.rng.normal(0, 0.3, ACTION_DIM - 1), -1, 1)
        return np.r_[motion, self.gripper if self.flips else last_gripper].astype(np.float32)
