"""Run by test_pose_arm in an environment that has LeRobot: a robot derived from its base class behind the adapter."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lerobot.robots import Robot, RobotConfig

from envs.pose_arm import LeRobotArm, matrix_of, pose_of

MOTORS = ("x", "y", "z", "a", "b", "c", "gripper")


@RobotConfig.register_subclass("gantry")
@dataclass
class GantryConfig(RobotConfig):
    pass


class Gantry(Robot):
    config_class, name = GantryConfig, "gantry"
    observation_features = {f"{motor}.pos": float for motor in MOTORS} | {"front": (48, 64, 3)}
    action_features = {f"{motor}.pos": float for motor in MOTORS}
    is_connected = is_calibrated = False

    def connect(self, calibrate: bool = True) -> None:
        self.is_connected, self.positions = True, dict.fromkeys(self.action_features, 0.0)

    def calibrate(self) -> None:
        pass

    def configure(self) -> None:
        pass

    def get_observation(self):
        return self.positions | {"front": np.zeros((48, 64, 3), np.uint8)}

    def send_action(self, action):
        self.positions = dict(action)
        return action

    def disconnect(self) -> None:
        self.is_connected = False


class Kinematics:
    def forward_kinematics(self, joints):
        return matrix_of(np.r_[joints[:3] / 1000, np.deg2rad(joints[3:6])])

    def inverse_kinematics(self, joints, pose):
        pose = pose_of(pose)
        return np.r_[pose[:3] * 1000, np.rad2deg(pose[3:])]


with tempfile.TemporaryDirectory() as folder:
    robot = Gantry(GantryConfig(id="test", calibration_dir=Path(folder)))
    arm = LeRobotArm(
        robot, kinematics=Kinematics(), joints=MOTORS[:6], cameras={"rgb_static": "front"}, home=[0] * 6, home_s=0.0
    )
    arm.home()
    arm.command([0.5, 0, 0, 0, 0, 0, 1])
    assert arm.observe()["rgb_static"].shape == (200, 200, 3)
    print("x.pos", round(robot.positions["x.pos"], 6))
    arm.close()
