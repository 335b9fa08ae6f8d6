"""What an observation, an action and an episode are: keys, shapes, dtypes, units and rates, in one place.

Imports numpy alone, so a client on a robot, the model's data code and the simulator can share it.

Frames: *world* is CALVIN's frame (metres; x to the right when facing the table, y away from the robot into the cabinet, z up).
Orientations are Euler angles x-y-z in radians as `pybullet.getEulerFromQuaternion` gives them, quaternions are (x, y, z, w).
Source: CALVIN's dataset README and calvin_env `envs/play_table_env.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

CONTROL_HZ = 30
PHYSICS_HZ = 240

RGB_STATIC = "rgb_static"
RGB_GRIPPER = "rgb_gripper"
ROBOT_OBS = "robot_obs"
SCENE_OBS = "scene_obs"
DEPTH_STATIC = "depth_static"
DEPTH_GRIPPER = "depth_gripper"
RGB_TACTILE = "rgb_tactile"
DEPTH_TACTILE = "depth_tactile"
CAMERAS = (RGB_STATIC, RGB_GRIPPER)
STATES = (ROBOT_OBS, SCENE_OBS)

ACTION_DIM = 7
"""Relative Cartesian action: dx, dy, dz (unit 0.02 m), rotations about x, y, z (unit 0.05 rad), gripper (+1 open, -1 close)."""
ACTION_COMPONENTS = ("dx", "dy", "dz", "rx", "ry", "rz", "gripper")
MAX_RELATIVE_POSITION_M = 0.02
MAX_RELATIVE_ROTATION_RAD = 0.05
GRIPPER_OPEN, GRIPPER_CLOSE = 1.0, -1.0


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of an observation: its shape, dtype and what its entries mean."""

    shape: tuple[int, ...]
    dtype: str
    meaning: str


OBSERVATION: dict[str, ArraySpec] = {
    RGB_STATIC: ArraySpec(shape=(200, 200, 3), dtype="uint8", meaning="static camera, RGB, row 0 at the top"),
    RGB_GRIPPER: ArraySpec(shape=(84, 84, 3), dtype="uint8", meaning="wrist camera, RGB, row 0 at the top"),
    ROBOT_OBS: ArraySpec(
        shape=(15,),
        dtype="float64",
        meaning="tool position [m] (3), tool Euler angles [rad] (3), gripper width [m], arm joints [rad] (7), last gripper action",
    ),
    SCENE_OBS: ArraySpec(
        shape=(24,),
        dtype="float64",
        meaning="slide [m], drawer [m], button [m], switch [m], bulb (0/1), LED (0/1), three blocks x (position [m], Euler [rad])",
    ),
}

SENSORS: dict[str, ArraySpec] = {
    DEPTH_STATIC: ArraySpec(shape=(200, 200), dtype="float32", meaning="static camera, metres along its axis"),
    DEPTH_GRIPPER: ArraySpec(shape=(84, 84), dtype="float32", meaning="wrist camera, metres along its axis"),
    RGB_TACTILE: ArraySpec(shape=(160, 120, 6), dtype="uint8", meaning="RGB of the left, then of the right finger's sensor"),
    DEPTH_TACTILE: ArraySpec(shape=(160, 120, 2), dtype="float32", meaning="how far the left, the right membrane is pressed in [m]"),
}
"""What an environment adds when asked to. Keys, shapes and dtypes are those of CALVIN's dataset."""


@dataclass(frozen=True, kw_only=True)
class ActionUnits:
    """What an action of 1 is, and how many a second there are. The defaults are those of everything here that takes actions.

    kind: "tool", a step of the tool in the world frame, or "joints", of up to six joints in units of rotation_unit_rad.
    """

    kind: str = "tool"
    position_unit_m: float = MAX_RELATIVE_POSITION_M
    rotation_unit_rad: float = MAX_RELATIVE_ROTATION_RAD
    rate_hz: float = CONTROL_HZ

    def __post_init__(self):
        if self.kind not in ("tool", "joints"):
            raise ValueError(f"actions are of kind {self.kind!r}, expected tool or joints")
        for name in ("position_unit_m", "rotation_unit_rad", "rate_hz"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"actions: {name} is {value!r}, expected a number above 0")

    def __str__(self) -> str:
        if self.kind == "joints":
            return f"steps of joints of {self.rotation_unit_rad:g} rad at {self.rate_hz:g} Hz"
        return f"steps of the tool of {self.position_unit_m:g} m and {self.rotation_unit_rad:g} rad at {self.rate_hz:g} Hz"


COMMITTED_ACTIONS = "committed_actions"
"""Key under which an observation tells a policy the actions (n, 7) that will be executed while it decides: the chunk that it answers begins
with them. A policy that heeds it answers "committed": n as well. See policies.chunking."""

ACTION = ArraySpec(shape=(ACTION_DIM,), dtype="float32", meaning="relative Cartesian action in [-1, 1]; gripper exactly -1 or +1")


class InvalidAction(ValueError):
    """An action that must not reach an arm: wrong shape, not finite, out of range, or a gripper command that is neither +1 nor -1."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One recorded attempt at one task.

    T control steps at 30 Hz; F frames, taken *before* the action of step `frame_step[f]`.

    actions      float32 (T, 7)          relative Cartesian actions as executed
    robot_obs    float64 (T, 15)         before the action of that step; NaN where a real arm's recording lacks the entry
    scene_obs    float64 (T, 24)         None where nobody knows the scene's state: recordings of real arms
    imitate      bool (T,)               False where the action was an injected disturbance, not the demonstrator's choice
    frame_step   int64 (F,)              ascending, in [0, T)
    rgb_static   uint8 (F, 200, 200, 3)
    rgb_gripper  uint8 (F, 84, 84, 3)
    extra        numeric (T, ...) each   what else the recording holds of each step, under the names that it has there

    task: name of the task; of recordings without such names, the instruction itself.
    """

    task: str
    instruction: str
    actions: np.ndarray
    robot_obs: np.ndarray
    scene_obs: np.ndarray | None = None
    imitate: np.ndarray
    frame_step: np.ndarray
    rgb_static: np.ndarray
    rgb_gripper: np.ndarray
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    info: dict = field(default_factory=dict)

    def __post_init__(self):
        steps, frames = len(self.actions), len(self.frame_step)
        expected = {
            "actions": (steps, ACTION_DIM),
            "robot_obs": (steps, 15),
            "imitate": (steps,),
            "rgb_static": (frames, 200, 200, 3),
            "rgb_gripper": (frames, 84, 84, 3),
        }
        if self.scene_obs is not None:
            expected["scene_obs"] = (steps, 24)
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"episode of {self.task!r}: {name} has shape {getattr(self, name).shape}, expected {shape}")
        for name, values in self.extra.items():
            if len(values) != steps or values.dtype.kind not in "biuf":
                raise ValueError(
                    f"episode of {self.task!r}: extra {name!r} is {values.dtype} with {len(values)} rows, expected {steps} rows of numbers"
                )
        if frames and (np.any(np.diff(self.frame_step) <= 0) or self.frame_step[0] < 0 or self.frame_step[-1] >= steps):
            raise ValueError(f"episode of {self.task!r}: frame_step must ascend within [0, {steps}), got {self.frame_step.tolist()}")


def real_array(action: object, shape: tuple[int, ...], meaning: str = "") -> np.ndarray:
    """`action` as float64 of that shape, or InvalidAction: not an array of real numbers, of another shape, or not finite."""
    try:
        array = np.asarray(action)
    except (TypeError, ValueError) as error:
        raise InvalidAction(f"action is no array of numbers: {error}") from error
    if array.dtype.kind not in "fiu":
        raise InvalidAction(f"action {action!r} has dtype {array.dtype}, expected real numbers of shape {shape}{meaning}")
    if array.shape != shape:
        raise InvalidAction(f"action has shape {array.shape}, expected {shape}{meaning}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise InvalidAction(f"action has a NaN or infinite entry: {array.tolist()}; nothing was sent to the arm")
    return array


def check_action(action: np.ndarray) -> np.ndarray:
    """Return `action` as float64 (7,) or raise InvalidAction saying what is wrong with it."""
    array = real_array(action, (ACTION_DIM,), ": dx dy dz rx ry rz gripper")
    if np.abs(array).max() > 1.0:
        raise InvalidAction(f"action {array.tolist()} leaves [-1, 1]; scale it (unit 0.02 m and 0.05 rad) or clip it yourself")
    if array[-1] not in (GRIPPER_CLOSE, GRIPPER_OPEN):
        raise InvalidAction(f"gripper command is {array[-1]}, expected exactly -1 (close) or +1 (open)")
    return array
