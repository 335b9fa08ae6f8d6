"""A Franka arm through a driver of your own, without ROS.

    emu3-vla rollout env.simulator=robot env.arm=examples.franka:make_arm safety.enabled=true chunking.ahead=3 'tasks=[open_drawer]'

Replace `connect` by what talks to your arm: any object with the five methods of `Driver`. Keep its real-time loop (1 kHz over FCI) in
the driver, in a process of its own: it follows the last pose that it was given, and its own watchdog is what stops the arm if everything
here dies.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from scipy.spatial.transform import Rotation

from envs.pose_arm import PoseArm, Reading
from envs.spec import RGB_GRIPPER, RGB_STATIC

# Where the arm's base stands in CALVIN's frame, from your own calibration: position [m], Euler angles [rad].
BASE = (-0.34, -0.46, 0.24, 0.0, 0.0, 0.0)
HOME_JOINTS_RAD = (-1.2178, 1.0399, 2.1198, -2.3421, -0.8702, 1.6412, 0.5534)  # CALVIN's neutral pose


class Driver(Protocol):
    """What this example needs of a driver. Positions in metres, quaternions (x, y, z, w), both of the tool in the frame of the base."""

    def state(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Tool position (3,), tool quaternion (4,), joints [rad] (7,), width between the fingers [m]."""
        ...

    def follow(self, position_m: np.ndarray, quaternion: np.ndarray) -> None:
        """Make this the pose that the impedance controller follows; return at once."""
        ...

    def grip(self, opened: bool) -> None:
        """Open or close the hand; return at once."""
        ...

    def move_joints(self, joints_rad: np.ndarray) -> None:
        """Move there slowly; return when there."""
        ...

    def frames(self) -> dict[str, np.ndarray]:
        """The cameras' newest pictures: "table" and "wrist", uint8 (H, W, 3), RGB."""
        ...


class FrankaArm(PoseArm):
    """A Franka as an envs.robot.Arm."""

    name = "franka"

    def __init__(self, driver: Driver, **options):
        super().__init__(base=BASE, **options)
        self.driver, self.opened = driver, True

    def read(self, images: bool) -> Reading:
        position, quaternion, joints, width = self.driver.state()
        frames = self.driver.frames() if images else {}
        named = {RGB_STATIC: frames["table"], RGB_GRIPPER: frames["wrist"]} if images else {}
        return Reading(np.r_[position, Rotation.from_quat(quaternion).as_euler("xyz")], width, joints, named)

    def send(self, pose: np.ndarray, gripper: float) -> None:
        self.driver.follow(pose[:3], Rotation.from_euler("xyz", pose[3:]).as_quat())
        if self.opened != (gripper > 0):
            self.opened = gripper > 0
            self.driver.grip(self.opened)

    def go_home(self) -> None:
        self.opened = True
        self.driver.grip(True)
        self.driver.move_joints(np.array(HOME_JOINTS_RAD))


def connect() -> Driver:
    """Your driver."""
    raise NotImplementedError("write connect() in examples/franka.py: return an object with the methods of Driver that talks to your arm")


def make_arm() -> FrankaArm:
    """What env.arm=examples.franka:make_arm calls."""
    return FrankaArm(connect())
