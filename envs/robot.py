"""Arms: the small interface that a real or simulated arm is driven through, and the environment that runs it.

    arm = SimulatedArm(scene="D")                # envs.simulated_arm; or your own class with these methods
    env = RobotEnv(arm)                          # the same contract as CalvinEnv, so the same loop, recordings and results

An arm takes one command every control period (1/30 s). Its own watchdog, not the program that commands it, stops it when commands cease:
that program may be what died.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from envs.calvin.scenes import scene_named
from envs.spec import CONTROL_HZ, RGB_STATIC, ROBOT_OBS, SCENE_OBS, check_action

PERIOD_S = 1 / CONTROL_HZ
Observation = dict[str, np.ndarray]


class ArmStopped(RuntimeError):
    """A command for an arm that was stopped; `home` releases it."""


class ArmOverrun(RuntimeError):
    """More commands than the arm carries out: the sender does not keep to the control rate."""


@dataclass(frozen=True, kw_only=True)
class SimulatedArmOptions:
    """How far from ideal the arm is. Defaults: a network and a USB camera."""

    realtime: bool = False  # keep to the clock on the wall; false: virtual time, reproducible
    command_delay_s: float = 0.03  # from `command` to the motion
    observation_delay_s: float = 0.03  # from the moment that is seen to the observation's arrival
    observation_jitter_s: float = 0.015  # added to that, uniformly from 0 to this
    images_every: int = 2  # control periods from one picture to the next: a camera of 15 Hz
    position_noise_m: float = 0.0005  # standard deviation, of the measured tool position and the gripper's width
    angle_noise_rad: float = 0.001  # of the tool's and the joints' measured angles

    def __post_init__(self):
        for name in ("command_delay_s", "observation_delay_s", "observation_jitter_s", "position_noise_m", "angle_noise_rad"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"env.simulated_arm.{name}={getattr(self, name)} is outside [0, 1]")
        if self.images_every < 1:
            raise ValueError(f"env.simulated_arm.images_every={self.images_every}, expected at least 1")


@runtime_checkable
class Arm(Protocol):
    """What an arm's class has to offer. Frames, units and keys are those of envs.spec.

    Optional, where the arm can: `sent()`, (pose (6,), held): the position [m] and Euler angles [rad] to which it was sent, commands on
    their way included, and whether it has held still since the last command. `judge(task) -> bool`: whether that task is solved (a
    button, a person, a sensor); without it no subtask of a rollout counts as solved. `confine(low_m, high_m)`: virtual walls for the tool's
    position (3,), world frame, until the next `home`: the arm's own controller stops it, for good, before it passes one. `idle_periods`,
    `periods`: control periods since `home` without a command, and all.
    """

    name: str

    def observe(self, images: bool = True) -> Observation:
        """The newest observation that has arrived: "robot_obs" (15,) always, the cameras' images where asked for."""
        ...

    def command(self, action: np.ndarray) -> None:
        """Carry out one relative Cartesian action (7,) during one control period. Raises InvalidAction, ArmStopped, ArmOverrun."""
        ...

    def stop(self) -> None:
        """Stand still now, and refuse commands until `home`."""
        ...

    def home(self, options: dict[str, np.ndarray] | None = None) -> None:
        """Go to the starting pose and be ready. options: {"robot_obs": …, "scene_obs": …}, a state that a simulated arm begins in."""
        ...

    def close(self) -> None:
        """Stop and let go of the hardware. Harmless when done twice."""
        ...


LATELY = 12
"""Control periods by which an arm may lag behind where it was sent."""


def held_pose(tool: np.ndarray, sent_lately: Sequence[np.ndarray]) -> np.ndarray:
    """Where to hold an arm whose commands ceased: at `tool` (6,), but within everything to which it was sent lately (newest last).

    An arm that shot past its target a little is not told to stay there, so limits on what it is sent hold for this too. Angles are
    unwrapped to the newest.
    """
    last = sent_lately[-1]
    pose = np.array(tool, np.float64)
    pose[3:] = last[3:] + (pose[3:] - last[3:] + np.pi) % (2 * np.pi) - np.pi
    return pose.clip(np.min(sent_lately, axis=0), np.max(sent_lately, axis=0))


def at_wall(coming: np.ndarray, walls: tuple[np.ndarray, np.ndarray]) -> str:
    """Why an arm whose tool will be at `coming` (3,) has to stop; empty if it lies between the walls, low and high corner (3,)."""
    outside = np.maximum(walls[0] - coming, coming - walls[1])
    if outside.max() <= 0:
        return ""
    return f": its tool came to a wall along {'xyz'[outside.argmax()]}, where it was not sent: is that pose out of its reach?"


class Watchdog:
    """Calls `stop` once when it was not fed for `period_s`; the next `feed` arms it again.

    For arms whose own controller has none. It runs in a thread of this process, so it outlives a policy that hangs or dies elsewhere, but
    not this process: run the program that commands the arm apart from the policy (a policy server), or rely on the controller.
    """

    def __init__(self, period_s: float, stop: Callable[[], None]):
        if not period_s > 0:
            raise ValueError(f"a watchdog's period is {period_s} s, expected a time above 0")
        self.period_s, self.stop = period_s, stop
        self.expired = 0
        self._due: float | None = None
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def feed(self) -> None:
        """A command went out."""
        with self._changed:
            self._due = time.monotonic() + self.period_s
            self._changed.notify()

    def close(self) -> None:
        """End the thread; nothing is stopped any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                left = None if self._due is None else self._due - time.monotonic()
                if not self._closed and (left is None or left > 0):
                    self._changed.wait(left)
                    continue
                if self._closed:
                    return
                self._due = None
                self.expired += 1
            self.stop()  # not under the lock: it may take as long as it likes


class RobotEnv:
    """An arm with the contract of CalvinEnv, so that `eval` runs it: reset, step, state, observe, render, info, close.

    `step` sends one command and returns when the control period is over. Clocks that the arm keeps itself (a simulated arm in virtual
    time) are asked to advance instead of waiting: an arm with `advance()` and without `realtime`.
    scene: which of CALVIN's scenes the arm stands in, for chains whose beginning depends on it.
    """

    def __init__(self, arm: Arm, *, scene: str = "D"):
        missing = [method for method in ("observe", "command", "stop", "home", "close") if not callable(getattr(arm, method, None))]
        if missing:
            raise ValueError(f"{type(arm).__name__} is no arm: it has no {missing[0]}(); see envs.robot.Arm")
        self.arm, self.scene = arm, scene_named(scene)
        self.renderer, self.version = getattr(arm, "renderer", f"cameras of the arm {arm.name}"), getattr(arm, "version", f"arm {arm.name}")
        self.realtime = getattr(arm, "realtime", not hasattr(arm, "advance"))
        if hasattr(arm, "simulation"):
            self.simulation = arm.simulation
        self._due: float | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict]:
        """Home the arm. options: see Arm.home."""
        self.arm.home(options)
        self._due = None
        return self.state(), self.info()

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict]:
        """One control period. Raises what `Arm.command` raises; then the arm is stopped."""
        try:
            self.arm.command(check_action(action))
        except Exception:
            self.arm.stop()
            raise
        self._pass_period()
        return self.state(), 0.0, False, False, self.info()

    def halt(self) -> None:
        """Stop the arm: a chain ended, by an error too."""
        self.arm.stop()

    def state(self) -> Observation:
        """robot_obs, and scene_obs (NaN (24,) for an arm that cannot know it)."""
        seen = self.arm.observe(images=False)
        return {ROBOT_OBS: seen[ROBOT_OBS], SCENE_OBS: seen.get(SCENE_OBS, np.full(24, np.nan))}

    def observe(self) -> Observation:
        """Everything that the arm observes."""
        return self.arm.observe()

    def render(self) -> np.ndarray | None:
        """uint8 (H, W, 3), the newest picture of the static camera; None where the arm has none."""
        return self.arm.observe().get(RGB_STATIC)

    def info(self) -> dict[str, Any]:
        """What tasks are judged by, for a simulated arm; nothing else."""
        return self.arm.info() if hasattr(self.arm, "info") else {}

    def sent(self) -> tuple[np.ndarray, bool] | None:
        """See Arm; None where the arm does not say."""
        return self.arm.sent() if hasattr(self.arm, "sent") else None

    def confine(self, low_m: np.ndarray, high_m: np.ndarray) -> None:
        """See Arm; nothing where the arm has no walls of its own."""
        if hasattr(self.arm, "confine"):
            self.arm.confine(low_m, high_m)

    def completed(self, start: dict, info: dict, among: tuple[str, ...] | None = None) -> set[str]:
        """The tasks that were solved between two infos: by the oracle in simulation, by `Arm.judge` else."""
        if info:
            from envs.calvin.tasks import completed_tasks

            return completed_tasks(start, info, among)
        judge = getattr(self.arm, "judge", None)
        return {task for task in among or () if judge is not None and judge(task)}

    def statistics(self) -> dict[str, float]:
        """Control periods since the last reset, and how many of them the arm idled for want of a command; empty where it does not say."""
        if not hasattr(self.arm, "idle_periods"):
            return {}
        return {"periods": self.arm.periods, "idle_periods": self.arm.idle_periods}

    def close(self) -> None:
        """Let go of the arm."""
        self.arm.close()

    def _pass_period(self) -> None:
        if not self.realtime:
            self.arm.advance()
            return
        now = time.monotonic()
        # Deadlines follow one another, so that a late step is caught up; after a pause (a decision) they begin anew.
        self._due = now + PERIOD_S if self._due is None or now - self._due > PERIOD_S else self._due + PERIOD_S
        time.sleep(max(0.0, self._due - now))
