"""What stands between any policy and any arm: limits, and what happens to a command that is broken, old or missing.

    guard = SafetyGuard(SafetyOptions(enabled=True))
    guard.reset(robot_obs)                       # where the arm is, at rest
    action, events = guard.filter(action)        # once every control period; None where no command came

The guard keeps the pose to which the arm was sent (in metres and radians) and its velocity, and moves them as little from what was asked
as the limits allow. A command is only let through if, braking as hard as the acceleration limit allows from there on, the arm would still
come to rest inside the box: so limits on position, velocity and acceleration hold together, for ever, whatever comes next. They are limits
of what is sent; where the tool then is, the arm's own controller has to mind (envs.robot.Arm.confine), which looks more often.

Imports numpy alone, so it runs on the arm's own computer.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from envs.spec import (
    ACTION_DIM,
    CONTROL_HZ,
    GRIPPER_CLOSE,
    GRIPPER_OPEN,
    MAX_RELATIVE_POSITION_M,
    MAX_RELATIVE_ROTATION_RAD,
    InvalidAction,
    real_array,
)

DIMENSIONS = ("x", "y", "z", "rx", "ry", "rz", "gripper")
VELOCITY, ACCELERATION, WORKSPACE, ROTATION = "velocity", "acceleration", "workspace", "rotation"
INVALID, STALE, MISSING, GRIPPER, STOP = "invalid", "stale", "missing", "gripper", "stop"
ON_INVALID = HOLD, END = ("hold", "stop")

PERIOD_S = 1 / CONTROL_HZ
UNIT = np.array([MAX_RELATIVE_POSITION_M] * 3 + [MAX_RELATIVE_ROTATION_RAD] * 3)  # of a relative action, in metres and radians
_SAME = 1e-9  # action units: a smaller difference is rounding, not a clamp
_REST = 1e-9  # metres or radians a second
LARGEST = 1e6  # action units: beyond it the arithmetic would only overflow


class OutsideLimits(ValueError):
    """The arm stands where the limits do not allow it to be, so no command can be judged."""


class SafetyStopped(RuntimeError):
    """The guard brought the arm to rest and refuses further commands until it is reset."""


Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class SafetyOptions:
    """The limits. Defaults: CALVIN's table, and the fastest motion that a relative action can ask for."""

    enabled: bool = False  # off for CALVIN's protocols, from which a guard is a deviation
    workspace_m: tuple[Range, Range, Range] = ((-0.45, 0.50), (-0.60, 0.30), (0.28, 0.85))  # box of the tool, world frame: x, y, z
    margin_m: float = 0.01  # the arm is sent no nearer to the box's walls, since an arm strays a little from where it is sent
    rotation_rad: tuple[float, float, float] = (0.8, 1.2, math.pi)  # how far the tool may turn from its start, about each axis
    velocity_m_s: tuple[float, float, float] = (0.6, 0.6, 0.6)
    velocity_rad_s: tuple[float, float, float] = (1.5, 1.5, 1.5)
    acceleration_m_s2: tuple[float, float, float] = (9.0, 9.0, 9.0)
    acceleration_rad_s2: tuple[float, float, float] = (22.0, 22.0, 22.0)
    stale_s: float = 1.0  # a command decided on an observation older than this is not carried out
    watchdog_s: float = 0.5  # without a usable command for so long, the guard stops for good
    gripper_steps: int = 3  # control steps for which a new gripper command must be repeated before it counts; 1: at once
    on_invalid: str = END  # a command that is no action (NaN, wrong shape): hold (brake, wait for the next) or stop (brake, end the run)

    def __post_init__(self):
        for axis, (low, high) in zip("xyz", self.workspace_m, strict=True):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"safety.workspace_m of {axis} is [{low}, {high}], expected two ascending finite numbers")
            if not 0 <= 2 * self.margin_m < high - low:
                raise ValueError(
                    f"safety.margin_m={self.margin_m}, expected at least 0 and less than half of workspace_m along {axis}, [{low}, {high}]"
                )
        for name in ("rotation_rad", "velocity_m_s", "velocity_rad_s", "acceleration_m_s2", "acceleration_rad_s2"):
            values = getattr(self, name)
            if len(values) != 3 or not all(math.isfinite(value) and value > 0 for value in values):
                raise ValueError(f"safety.{name}={list(values)}, expected three finite numbers above 0")
        if not (self.stale_s > 0 and self.watchdog_s > 0):
            raise ValueError(f"safety.stale_s={self.stale_s} and safety.watchdog_s={self.watchdog_s} must be above 0")
        if self.gripper_steps < 1:
            raise ValueError(f"safety.gripper_steps={self.gripper_steps}, expected at least 1")
        if self.on_invalid not in ON_INVALID:
            raise ValueError(f"safety.on_invalid={self.on_invalid} is not one of {', '.join(ON_INVALID)}")

    def described(self) -> dict[str, str]:
        """For results: {"safety": the limits in words} where the guard is on, else nothing."""
        if not self.enabled:
            return {}
        limits = ", ".join(f"{name} {value}" for name, value in asdict(self).items() if name != "enabled")
        return {"safety": f"every action passes a guard ({limits})"}


@dataclass(frozen=True, kw_only=True)
class SafetyEvent:
    """One intervention. asked, given: in action units (0.02 m, 0.05 rad; gripper ±1); asked is None where it was no number.

    step: control steps since the guard's reset; time_s: the same in seconds. detail: what a broken command was.
    """

    kind: str
    dimension: str
    asked: float | None
    given: float | None
    step: int
    time_s: float
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain containers."""
        return asdict(self)

    def __str__(self) -> str:
        if self.detail:
            return f"safety: {self.kind}: {self.detail}"
        return f"safety: {self.kind}: {self.dimension} asked {self.asked:+.3f}, given {self.given:+.3f}"


class SafetyGuard:
    """Filters the commands of one arm. `reset` before the first, then `filter` once every control period.

    pose: where the arm was sent, (6,): tool position [m], and how far it was turned since the reset about each axis [rad].
    velocity: of that, (6,), per second. An arm that says where it was sent is followed: `follow`, before each `filter`.
    """

    def __init__(self, options: SafetyOptions):
        self.options = options
        self.box = np.transpose(options.workspace_m)
        turns = np.array(options.rotation_rad)
        self.low, self.high = np.r_[self.box[0] + options.margin_m, -turns], np.r_[self.box[1] - options.margin_m, turns]
        fastest = UNIT * CONTROL_HZ  # what an action can say at most
        self.fastest = np.minimum([*options.velocity_m_s, *options.velocity_rad_s], fastest)
        self.change = np.array([*options.acceleration_m_s2, *options.acceleration_rad_s2]) * PERIOD_S  # of velocity, in one period
        self.pose: np.ndarray | None = None

    def reset(self, robot_obs: np.ndarray) -> None:
        """The arm stands still at `robot_obs` (see envs.spec). Raises OutsideLimits where it may not be there."""
        pose = np.r_[np.asarray(robot_obs, np.float64)[:3], np.zeros(3)]
        for axis, at, low, high in zip(DIMENSIONS, pose, *self.box, strict=False):
            if not low <= at <= high:
                raise OutsideLimits(
                    f"the arm stands at {axis} = {at:.4f} m, outside the workspace [{low}, {high}] of safety.workspace_m; move it inside "
                    "by hand, or widen the box"
                )
        self.pose, self.velocity, self.start = pose, np.zeros(6), np.asarray(robot_obs, np.float64)[3:6]
        self.gripper = GRIPPER_OPEN if robot_obs[14] > 0 else GRIPPER_CLOSE
        self.repeated = self.without = self.step = 0
        self.stopping = ""

    def follow(self, pose: np.ndarray, held: bool) -> None:
        """Take over where the arm says that it is sent: (6,), position [m] and Euler angles [rad]; held: and stands still.

        For arms that stop by themselves (their watchdog), after which they are elsewhere than their commands add up to.
        """
        turned = pose[3:] - self.start - self.pose[3:]
        self.pose = np.r_[pose[:3], self.pose[3:] + (turned + np.pi) % (2 * np.pi) - np.pi]
        if held:
            self.velocity = np.zeros(6)

    def filter(self, command: Any, *, age_s: float = 0.0) -> tuple[np.ndarray, list[SafetyEvent]]:
        """What the arm is to do in this control period: float64 (7,), and what was changed about `command`.

        command: an action as a policy means it, or None where none came. age_s: of the observation that it was decided on.
        Raises SafetyStopped once the arm rests after a stop.
        """
        if self.pose is None:
            raise RuntimeError("the guard was asked before reset(robot_obs); it does not know where the arm is")
        if self.stopping and not (np.abs(self.velocity) > _REST).any():
            raise SafetyStopped(f"the arm was stopped: {self.stopping}; find out why, then reset")
        action, events = (None, []) if self.stopping else self._judged(command, age_s)
        if action is None:
            given, _ = self._moved(np.zeros(6))  # braking is the guard's own doing, no clamp of what was asked
        else:
            given, clamps = self._moved(action[:6])
            events = clamps + self._gripped(action[6])
        self.step += 1
        return np.r_[given, self.gripper], events

    # -- a command as a whole

    def _judged(self, command: Any, age_s: float) -> tuple[np.ndarray | None, list[SafetyEvent]]:
        """The command as float64 (7,), or None and why it is not carried out."""
        action, event = None, None
        if command is None:
            event = self._event(MISSING, "no command came in time; braking")
        elif not age_s <= self.options.stale_s:  # an age that is NaN is stale too
            event = self._event(STALE, f"decided on an observation {age_s:.3f} s old, more than {self.options.stale_s} s; braking")
        else:
            try:
                action = real_array(command, (ACTION_DIM,))
            except InvalidAction as error:
                event = self._event(INVALID, f"{error}"[:300])
        if event is None:
            self.without = 0
            return action, []
        self.without += 1
        return None, [event, *self._stop(event)]

    def _stop(self, event: SafetyEvent) -> list[SafetyEvent]:
        """Whether `event` makes the guard stop for good."""
        if event.kind == INVALID and self.options.on_invalid == END:
            self.stopping = event.detail
        elif self.without * PERIOD_S >= self.options.watchdog_s:
            self.stopping = f"no usable command for {self.without * PERIOD_S:.2f} s, last: {event.detail}"
        return [self._event(STOP, self.stopping)] if self.stopping else []

    # -- motion

    def _moved(self, asked: np.ndarray) -> tuple[np.ndarray, list[SafetyEvent]]:
        """Advance the pose by the motion nearest to `asked` (action units, (6,)) that the limits allow; that motion, and its clamps."""
        least, most = self._velocities()
        wanted = asked.clip(-LARGEST, LARGEST) * UNIT * CONTROL_HZ
        allowed = wanted.clip(least, np.maximum(least, most)) * PERIOD_S / UNIT  # the two can cross by a rounding
        clamped = np.abs(allowed - asked) > _SAME
        given = np.where(clamped, allowed, asked).clip(-1, 1)
        events = [self._clamp(dim, asked[dim], given[dim]) for dim in np.flatnonzero(clamped)]
        self.velocity = given * UNIT * CONTROL_HZ
        self.pose = self.pose + given * UNIT
        return given, events

    def _velocities(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest velocity (6,) that every limit allows in the coming period.

        Braking from the last velocity is always among them: who may stop in time now may still do so one braking step later.
        """
        self.bounds = {  # kind: least, greatest
            VELOCITY: (-self.fastest, self.fastest),
            ACCELERATION: (self.velocity - self.change, self.velocity + self.change),
            WORKSPACE: (-_brakeable(self.pose - self.low, self.change), _brakeable(self.high - self.pose, self.change)),
        }
        least, most = (np.array(side) for side in zip(*self.bounds.values(), strict=True))
        return least.max(axis=0), most.min(axis=0)

    def _clamp(self, dim: int, asked: float, given: float) -> SafetyEvent:
        """The event of one clamped dimension, named after the tightest limit."""
        sign, side = (1, 1) if asked > given else (-1, 0)
        kind = min(self.bounds, key=lambda kind: sign * self.bounds[kind][side][dim])
        if kind == WORKSPACE and dim >= 3:
            kind = ROTATION
        return self._event(kind, dimension=DIMENSIONS[dim], asked=float(asked), given=float(given))

    def _gripped(self, asked: float) -> list[SafetyEvent]:
        """Let the gripper follow a command that has been repeated often enough."""
        wanted = GRIPPER_OPEN if asked > 0 else GRIPPER_CLOSE
        self.repeated = self.repeated + 1 if wanted != self.gripper else 0
        if self.repeated >= self.options.gripper_steps:
            self.gripper, self.repeated = wanted, 0
        if asked == self.gripper:
            return []
        return [self._event(GRIPPER, dimension=DIMENSIONS[6], asked=float(asked), given=self.gripper)]

    def _event(self, kind: str, detail: str = "", dimension: str = "", asked: float | None = None, given: float | None = None):
        return SafetyEvent(
            kind=kind, dimension=dimension, asked=asked, given=given, step=self.step, time_s=self.step * PERIOD_S, detail=detail
        )


def _brakeable(room: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The greatest velocity at which one may move for a period and then, slowing down by `change` a period, stay within `room`.

    Moving at v = (m + r)·change, 0 <= r < 1, for a period and braking covers ((m + 1)·v − change·m·(m + 1)/2) periods' worth.
    """
    room = np.maximum(room, 0) / PERIOD_S
    periods = np.floor((np.sqrt(1 + 8 * room / change) - 1) / 2)
    return room / (periods + 1) + change * periods / 2
