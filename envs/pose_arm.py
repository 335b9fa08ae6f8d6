"""Arms that are sent to poses: what is the same for all of them, and LeRobot's robots as such arms.

    class MyArm(PoseArm):
        def read(self, images): ...            # what the sensors say
        def send(self, pose, gripper): ...     # to the controller
        def go_home(self): ...

A relative action moves a target that is kept here, so lost steps do not add up; when commands cease, a watchdog holds the arm where it is.
Nothing here imports LeRobot: an arm is given the robot that its user made.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from envs.robot import LATELY, PERIOD_S, ArmStopped, Observation, Watchdog, at_wall, held_pose
from envs.spec import (
    CAMERAS,
    GRIPPER_OPEN,
    MAX_RELATIVE_POSITION_M,
    MAX_RELATIVE_ROTATION_RAD,
    OBSERVATION,
    ROBOT_OBS,
    check_action,
)

UNIT = np.array([MAX_RELATIVE_POSITION_M] * 3 + [MAX_RELATIVE_ROTATION_RAD] * 3)
JOINTS = 7  # places for joints in robot_obs; an arm with fewer leaves the rest at zero


class Reading(NamedTuple):
    """What an arm's sensors say. tool: pose (6,), position [m] and Euler angles x-y-z [rad], in the frame of the arm's base.

    width_m: between the fingers. joints_rad: at most seven. images: camera's observation key → uint8 (H, W, 3), RGB, any size.
    """

    tool: np.ndarray
    width_m: float
    joints_rad: Sequence[float]
    images: Mapping[str, np.ndarray]


class PoseArm:
    """See the module's text; an envs.robot.Arm.

    base: pose (6,) of the arm's base in the world frame in which its policy was trained (envs.spec). watchdog_s: without a command for
    so long the arm is held where it is. The default is one control period after the next command was due.
    Subclasses set `name` and implement `read`, `send`, `go_home` and, where there is hardware to let go of, `let_go`. These are called one
    at a time.
    """

    name = "pose"

    def __init__(self, *, base: Sequence[float] = (0, 0, 0, 0, 0, 0), watchdog_s: float = 2 * PERIOD_S):
        base = np.asarray(base, np.float64)
        if base.shape != (6,) or not np.isfinite(base).all():
            raise ValueError(f"base has shape {base.shape}, expected six finite numbers: position [m] and Euler angles [rad] in the world")
        self._base_position, self._base_turn = base[:3], Rotation.from_euler("xyz", base[3:])
        self._lock, self._gripper, self._closed = threading.RLock(), GRIPPER_OPEN, False
        self._sent: deque[np.ndarray] = deque(maxlen=LATELY)
        self._watchdog = Watchdog(watchdog_s, self._hold)
        self._stopped, self._held, self._commands, self._homed_s = ", or not homed yet", True, 0, time.monotonic()
        self._walls: tuple[np.ndarray, np.ndarray] | None = None
        self._seen: np.ndarray | None = None  # where the tool was seen since the last command

    # -- for subclasses

    def read(self, images: bool) -> Reading:
        """What the sensors say now; pictures where they are asked for."""
        raise NotImplementedError

    def send(self, pose: np.ndarray, gripper: float) -> None:
        """Send the arm to a pose (6,) in the frame of its base; gripper: +1 open, -1 closed."""
        raise NotImplementedError

    def go_home(self) -> None:
        """Move to the starting pose and return when the arm is there."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Close the connection to the hardware."""

    # -- the interface of envs.robot.Arm

    def observe(self, images: bool = True) -> Observation:
        """See Arm."""
        with self._lock:
            seen = self.read(images)
            self._seen = self._in_world(seen.tool)
            joints = np.zeros(JOINTS)
            joints[: len(seen.joints_rad)] = seen.joints_rad
            robot_obs = np.r_[self._seen, seen.width_m, joints, self._gripper]
        pictures = {key: fitted(seen.images[key], OBSERVATION[key].shape[:2]) for key in CAMERAS if key in seen.images} if images else {}
        return {ROBOT_OBS: robot_obs, **pictures}

    def command(self, action: np.ndarray) -> None:
        """See Arm."""
        action = check_action(action)
        with self._lock:
            if not self._stopped and self._walls is not None:
                self._mind_walls()
            if self._stopped:
                raise ArmStopped(f"the arm was stopped{self._stopped}; home() releases it")
            self._gripper = float(action[-1])
            self._send_to(self._sent[-1] + action[:6] * UNIT)
            self._held, self._commands = False, self._commands + 1
            self._watchdog.feed()

    def stop(self) -> None:
        """See Arm."""
        with self._lock:
            if not self._stopped:
                self._stopped = " by its program"
                self._hold()

    def confine(self, low_m: np.ndarray, high_m: np.ndarray) -> None:
        """See Arm. What was observed before a command is looked at, a period ahead of where the tool moves; walls of the controller's own
        look oftener."""
        with self._lock:
            self._walls, self._was = (np.array(low_m, np.float64), np.array(high_m, np.float64)), self._tool()

    def home(self, options: dict[str, np.ndarray] | None = None) -> None:
        """See Arm; `options` say where a simulated arm begins, and are nothing that a real one could do."""
        with self._lock:
            self.go_home()
            self._gripper, self._walls = GRIPPER_OPEN, None
            self._sent.clear()
            self._sent.append(self._tool())
            self._stopped, self._held, self._commands, self._homed_s = "", True, 0, time.monotonic()

    def close(self) -> None:
        """See Arm."""
        if not self._closed:
            self._closed = True
            self.stop()
            self._watchdog.close()
            self.let_go()

    def sent(self) -> tuple[np.ndarray, bool]:
        """See Arm."""
        with self._lock:
            return self._sent[-1].copy(), self._held

    @property
    def periods(self) -> int:
        """Control periods since `home`."""
        return int((time.monotonic() - self._homed_s) / PERIOD_S)

    @property
    def idle_periods(self) -> int:
        """Those without a command."""
        return max(0, self.periods - self._commands)

    # --

    def _hold(self) -> None:
        """Send the arm to where it is."""
        with self._lock:
            if self._sent:
                self._send_to(held_pose(self._tool(), self._sent))
                self._held = True

    def _mind_walls(self) -> None:
        """Stand still where the tool, wherever it was sent, is about to pass a wall."""
        tool, self._seen = self._tool() if self._seen is None else self._seen, None  # reading an arm may take its cameras' time
        coming, self._was = 2 * tool[:3] - self._was[:3], tool
        if reason := at_wall(coming, self._walls):
            self._stopped = reason
            self._hold()

    def _tool(self) -> np.ndarray:
        """Where the tool is: pose (6,) in the world."""
        return self._in_world(self.read(images=False).tool)

    def _send_to(self, pose: np.ndarray) -> None:
        self._sent.append(pose)
        position = self._base_turn.inv().apply(pose[:3] - self._base_position)
        turn = self._base_turn.inv() * Rotation.from_euler("xyz", pose[3:])
        self.send(np.r_[position, turn.as_euler("xyz")], self._gripper)

    def _in_world(self, pose: np.ndarray) -> np.ndarray:
        turn = self._base_turn * Rotation.from_euler("xyz", pose[3:])
        return np.r_[self._base_position + self._base_turn.apply(pose[:3]), turn.as_euler("xyz")]


class Kinematics(Protocol):
    """A robot's geometry, in its own joint units, as LeRobot's `RobotKinematics` has it."""

    def forward_kinematics(self, joints: np.ndarray) -> np.ndarray:
        """Tool pose as a homogeneous matrix (4, 4), metres."""
        ...

    def inverse_kinematics(self, joints: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Joints that reach `pose` (4, 4), searched from `joints` on."""
        ...


class LeRobotArm(PoseArm):
    """A robot of LeRobot's (or of its interface: connect, get_observation, send_action, disconnect) as an arm.

    joints: names of its arm's motors in the order of `kinematics`, which answer as "<name>.pos". gripper: that motor's name, with its
    positions when `closed` and `opened`, between which the fingers open by `width_m`. cameras: observation key (envs.spec) → camera's name.
    home: joint positions to start from, in the robot's units; reached along a straight line in `home_s` seconds. degrees: whether joint
    positions are degrees.
    """

    def __init__(
        self,
        robot: Any,
        *,
        kinematics: Kinematics,
        joints: Sequence[str],
        cameras: Mapping[str, str],
        home: Sequence[float],
        gripper: str = "gripper",
        closed: float = 0.0,
        opened: float = 100.0,
        width_m: float = 0.08,
        degrees: bool = True,
        home_s: float = 3.0,
        **options: Any,
    ):
        unknown = sorted(set(cameras) - set(CAMERAS))
        if unknown:
            raise ValueError(f"cameras name {unknown[0]!r}, expected observation keys among {', '.join(CAMERAS)}")
        if len(home) != len(joints):
            raise ValueError(f"home has {len(home)} joint positions for {len(joints)} joints: {', '.join(joints)}")
        super().__init__(**options)
        self.robot, self.kinematics, self.name = robot, kinematics, robot.name
        self._names, self._cameras, self._home, self._home_s = tuple(joints), dict(cameras), np.asarray(home, np.float64), home_s
        self._finger, self._closed_at, self._opened_at, self._width_m, self._degrees = gripper, closed, opened, width_m, degrees
        if not robot.is_connected:
            robot.connect()

    def read(self, images: bool) -> Reading:
        """See PoseArm."""
        seen = self.robot.get_observation()
        missing = [name for name in (*self._motor_keys(), *self._cameras.values()) if name not in seen]
        if missing:
            raise ValueError(f"the robot {self.name!r} observes no {missing[0]!r}, only {', '.join(sorted(seen))}")
        joints = self._joints(seen)
        open_share = (seen[f"{self._finger}.pos"] - self._closed_at) / (self._opened_at - self._closed_at)
        return Reading(
            tool=pose_of(self.kinematics.forward_kinematics(joints)),
            width_m=float(np.clip(open_share, 0, 1)) * self._width_m,
            joints_rad=np.deg2rad(joints) if self._degrees else joints,
            images={key: seen[name] for key, name in self._cameras.items()},
        )

    def send(self, pose: np.ndarray, gripper: float) -> None:
        """See PoseArm."""
        # Searched from what was sent last: reading the robot here would read its cameras too, thirty times a second.
        self._near = np.asarray(self.kinematics.inverse_kinematics(self._near, matrix_of(pose)))[: len(self._names)]
        self._send_joints(self._near, gripper)

    def go_home(self) -> None:
        """See PoseArm."""
        start, began = self._joints(self.robot.get_observation()), time.monotonic()
        share = 0.0
        while share < 1:
            share = min(1.0, (time.monotonic() - began) / self._home_s) if self._home_s > 0 else 1.0
            self._send_joints(start + share * (self._home - start), GRIPPER_OPEN)
            time.sleep(PERIOD_S)
        self._near = self._home

    def let_go(self) -> None:
        """See PoseArm."""
        self.robot.disconnect()

    def _motor_keys(self) -> list[str]:
        return [f"{name}.pos" for name in (*self._names, self._finger)]

    def _joints(self, seen: Mapping[str, Any]) -> np.ndarray:
        return np.array([seen[f"{name}.pos"] for name in self._names], np.float64)

    def _send_joints(self, joints: np.ndarray, gripper: float) -> None:
        positions = [*joints[: len(self._names)], self._opened_at if gripper > 0 else self._closed_at]
        self.robot.send_action({key: float(value) for key, value in zip(self._motor_keys(), positions, strict=True)})


def fitted(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The middle of a picture, uint8 (H, W, 3), as large as its shape allows, scaled to `shape` (h, w)."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"a camera gave {image.dtype} {image.shape}, expected uint8 (H, W, 3), RGB")
    scale = min(image.shape[0] / shape[0], image.shape[1] / shape[1])
    height, width = round(shape[0] * scale), round(shape[1] * scale)
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    cut = Image.fromarray(image[top : top + height, left : left + width])
    return np.asarray(cut.resize((shape[1], shape[0]), Image.Resampling.BOX if scale >= 1 else Image.Resampling.BILINEAR))


def matrix_of(pose: np.ndarray) -> np.ndarray:
    """Homogeneous matrix (4, 4) of a pose (6,): position [m], Euler angles x-y-z about fixed axes [rad]."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = Rotation.from_euler("xyz", pose[3:]).as_matrix(), pose[:3]
    return matrix


def pose_of(matrix: np.ndarray) -> np.ndarray:
    """The inverse of `matrix_of`."""
    return np.r_[matrix[:3, 3], Rotation.from_matrix(matrix[:3, :3]).as_euler("xyz")]
