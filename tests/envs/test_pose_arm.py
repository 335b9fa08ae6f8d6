"""Arms that are sent to poses: LeRobot's robots (a stand-in of the same interface) and the Franka example with a fake driver."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import examples.franka as franka
from envs.pose_arm import LeRobotArm, fitted, matrix_of, pose_of
from envs.robot import PERIOD_S, Arm, ArmStopped, RobotEnv
from eval.chain import run_chain
from eval.protocol import load_instructions
from eval.sequences import long_horizon_sequences
from policies.safety import SafetyOptions
from policies.simple import RandomPolicy, ZeroPolicy

ROOT = Path(__file__).parents[2]
FORWARD = np.array([0.5, 0, 0, 0, 0, 0, 1.0])
OPENS_WIDE = SafetyOptions(enabled=True, workspace_m=((-0.1, 0.2), (-0.2, 0.2), (0.1, 0.4)))


class Gantry:
    """Kinematics of a robot whose six joints are its tool's pose: millimetres and degrees."""

    def forward_kinematics(self, joints):
        return matrix_of(np.r_[joints[:3] / 1000, np.deg2rad(joints[3:6])])

    def inverse_kinematics(self, joints, pose):
        pose = pose_of(pose)
        return np.r_[pose[:3] * 1000, np.rad2deg(pose[3:])]


class StandIn:
    """The part of LeRobot's Robot that the adapter uses: flat dictionaries, "<motor>.pos" and cameras by name."""

    name, motors = "gantry", ("x", "y", "z", "a", "b", "c")

    def __init__(self):
        self.is_connected, self.sent = False, []
        self.positions = dict.fromkeys((f"{motor}.pos" for motor in self.motors), 0.0) | {"gripper.pos": 0.0, "z.pos": 250.0}

    def connect(self, calibrate=True):
        self.is_connected = True

    def get_observation(self):
        return self.positions | {"front": np.full((48, 64, 3), 7, np.uint8), "wrist": np.zeros((84, 84, 3), np.uint8)}

    def send_action(self, action):
        assert all(type(value) is float for value in action.values()) and action.keys() == self.positions.keys()
        self.sent.append((time.monotonic(), action))
        # It covers three quarters of the way before it is asked again.
        self.positions = {key: 0.25 * self.positions[key] + 0.75 * action[key] for key in action}
        return action

    def disconnect(self):
        self.is_connected = False


def lerobot_arm(robot=None, **options):
    given = {"home": [0, 0, 250, 0, 0, 0], "home_s": 0.0, "cameras": {"rgb_static": "front", "rgb_gripper": "wrist"}}
    robot = robot or StandIn()
    return LeRobotArm(robot, kinematics=Gantry(), joints=StandIn.motors, **given | options)


@pytest.fixture
def arm():
    arm = lerobot_arm()
    arm.home()
    yield arm
    arm.close()


def test_a_lerobot_robot_is_an_arm(arm):
    assert isinstance(arm, Arm) and arm.robot.is_connected and arm.name == "gantry"
    seen = arm.observe()
    assert seen["rgb_static"].shape == (200, 200, 3) and seen["rgb_gripper"].shape == (84, 84, 3) and (seen["rgb_static"] == 7).all()
    np.testing.assert_allclose(seen["robot_obs"][:6], [0, 0, 0.25, 0, 0, 0], atol=1e-9)
    for _ in range(3):
        arm.command(FORWARD)
    assert arm.robot.sent[-1][1]["x.pos"] == pytest.approx(30.0), "three times half of 20 mm, though the robot lags"
    assert arm.robot.sent[-1][1]["gripper.pos"] == 100.0
    arm.command([0, 0, 0, 0, 0, 1, -1])
    assert arm.robot.sent[-1][1]["c.pos"] == pytest.approx(np.rad2deg(0.05)) and arm.robot.sent[-1][1]["gripper.pos"] == 0.0
    arm.stop()
    with pytest.raises(ArmStopped):
        arm.command(FORWARD)
    arm.close()
    assert not arm.robot.is_connected


def test_it_stops_before_a_wall_wherever_it_was_sent(arm):
    arm.confine(np.array([-0.1, -0.1, 0.1]), np.array([0.1, 0.1, 0.4]))
    for _ in range(3):
        arm.command(FORWARD)
    for place in (35.0, 70.0):  # pulled aside, faster and faster, by what is none of its commands
        arm.robot.positions["y.pos"] = place
        arm.observe(images=False)
        if place == 35.0:
            arm.command(FORWARD)
    arm.robot.positions["y.pos"] = 0.0  # what was observed counts, not what would be read now
    with pytest.raises(ArmStopped, match=r"its tool came to a wall along y, where it was not sent.*; home\(\) releases it"):
        arm.command(FORWARD)
    assert arm.sent()[1]
    with pytest.raises(ArmStopped, match="a wall along y"):
        arm.command(FORWARD)
    arm.home()
    arm.command(FORWARD)


def test_the_watchdog_holds_it_one_period_after_the_command_that_did_not_come(arm):
    for _ in range(5):
        arm.command(FORWARD)
        time.sleep(PERIOD_S / 2)
    last_s, last = arm.robot.sent[-1]
    assert not arm.sent()[1]
    time.sleep(6 * PERIOD_S)
    held_s, held = arm.robot.sent[-1]
    pose, holds = arm.sent()
    assert holds and 2 * PERIOD_S <= held_s - last_s < 5 * PERIOD_S, "its thread waits two periods, and this machine may be busy"
    assert held["x.pos"] < last["x.pos"] and pose[0] * 1000 == pytest.approx(held["x.pos"])
    arm.command(FORWARD)
    assert arm.robot.sent[-1][1]["x.pos"] == pytest.approx(held["x.pos"] + 10), "and it goes on from there"


def test_it_runs_in_the_loop_behind_the_guard(arm):
    result = run_chain(
        RobotEnv(arm), RandomPolicy(), 0, long_horizon_sequences(1)[0], load_instructions(), max_steps=20, seed=0, safety=OPENS_WIDE
    )
    assert result.error is None and result.steps == 20 and result.num_solved == 0
    assert result.acting["periods"] >= 19 and len(result.safety) > 5
    x = np.array([action["x.pos"] for _, action in arm.robot.sent]) / 1000
    assert x.max() <= 0.2 + 1e-9 and x.min() >= -0.1 - 1e-9


def test_wrong_robots_are_said():
    with pytest.raises(ValueError, match="cameras name 'front', expected observation keys among rgb_static, rgb_gripper"):
        lerobot_arm(cameras={"front": "rgb_static"})
    with pytest.raises(ValueError, match="home has 2 joint positions for 6 joints"):
        lerobot_arm(home=[0, 0])
    with pytest.raises(ValueError, match=r"base has shape \(3,\), expected six finite numbers"):
        lerobot_arm(base=(0, 0, 0))
    with pytest.raises(ValueError, match="the robot 'gantry' observes no 'top', only a.pos"):
        lerobot_arm(cameras={"rgb_static": "top"}).home()


def test_the_base_stands_anywhere_in_the_world():
    arm = lerobot_arm(base=(1, 2, 0, 0, 0, np.pi / 2))
    arm.home()
    np.testing.assert_allclose(arm.observe()["robot_obs"][:6], [1, 2, 0.25, 0, 0, np.pi / 2], atol=1e-9)
    arm.command(FORWARD)  # the world's x is minus the base's y
    sent = arm.robot.sent[-1][1]
    assert sent["x.pos"] == pytest.approx(0, abs=1e-6) and sent["y.pos"] == pytest.approx(-10)
    arm.close()


def test_pictures_are_cut_in_the_middle_and_scaled():
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 255
    np.testing.assert_array_equal(fitted(wide, (50, 50)), np.full((50, 50, 3), 255))
    with pytest.raises(ValueError, match=r"a camera gave float64 \(4, 4, 3\), expected uint8"):
        fitted(np.zeros((4, 4, 3)), (2, 2))


class FakeDriver:
    """A Franka that is wherever it was told to be."""

    def __init__(self):
        self.position, self.quaternion = np.array([0.4, 0.3, 0.3]), np.array([1.0, 0, 0, 0])
        self.calls = []

    def state(self):
        return self.position, self.quaternion, np.zeros(7), 0.08

    def follow(self, position_m, quaternion):
        self.position, self.quaternion = position_m, quaternion
        self.calls.append("follow")

    def grip(self, opened):
        self.calls.append(f"grip {'open' if opened else 'shut'}")

    def move_joints(self, joints_rad):
        self.calls.append("home")

    def frames(self):
        return {"table": np.zeros((480, 640, 3), np.uint8), "wrist": np.zeros((480, 640, 3), np.uint8)}


def test_the_franka_example_runs_with_a_driver(monkeypatch):
    with pytest.raises(NotImplementedError, match=r"write connect\(\) in examples/franka.py"):
        franka.make_arm()
    driver = FakeDriver()
    monkeypatch.setattr(franka, "connect", lambda: driver)
    env = RobotEnv(franka.make_arm())
    start = env.reset()[0]["robot_obs"]
    np.testing.assert_allclose(start[:3], np.array(franka.BASE[:3]) + driver.position)
    assert driver.calls == ["grip open", "home"] and env.observe()["rgb_gripper"].shape == (84, 84, 3)
    env.step(np.array([0, 0, 1, 0, 0, 0, -1.0]))
    assert driver.position[2] == pytest.approx(0.32) and driver.calls[-2:] == ["follow", "grip shut"]
    np.testing.assert_allclose(Rotation.from_quat(driver.quaternion).magnitude(), np.pi, atol=1e-6)
    result = run_chain(
        env, ZeroPolicy(), 0, long_horizon_sequences(1)[0], load_instructions(), max_steps=5, seed=0, safety=SafetyOptions(enabled=True)
    )
    assert result.error is None and result.steps == 5
    env.close()


@pytest.mark.skipif("EMU3_VLA_LEROBOT_PYTHON" not in os.environ, reason="EMU3_VLA_LEROBOT_PYTHON names no Python with lerobot")
def test_lerobots_own_base_class():
    """A robot derived from LeRobot's class, in the environment where LeRobot is installed. See docs/arms.md."""
    python, program = os.environ["EMU3_VLA_LEROBOT_PYTHON"], Path(__file__).with_name("lerobot_robot.py")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([python, program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("x.pos 10.0")


def test_the_adapter_imports_no_lerobot():
    code = "import sys, envs.pose_arm; assert not {'lerobot', 'torch', 'pybullet'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
