"""docs/arms.md: its commands are accepted, its snippets run, its defaults are those of the code."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from emu3_vla import cli
from envs.robot import RobotEnv
from policies.chunking import ChunkingOptions
from policies.safety import SafetyOptions
from tests.envs.test_pose_arm import Gantry, StandIn

PAGE = (Path(__file__).parents[1] / "docs/arms.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMANDS = [line.split("  #")[0] for line in PAGE.splitlines() if line.startswith("emu3-vla ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted(command):
    config = cli.compose("rollout", [*shlex.split(command)[2:], "policy=expert"])
    assert config.env.simulator == "robot"


def test_the_preset_acts_while_thinking():
    config = cli.compose("rollout", ["preset=arm", "policy=expert"])
    assert config.env.realtime and config.safety.enabled and config.chunking.ahead == 3


def test_the_guard_snippet_prints_what_it_says(capsys):
    exec(SNIPPETS[0], {"robot_obs": np.r_[0, -0.1, 0.5, np.zeros(11), 1.0]})
    assert capsys.readouterr().out.strip() == re.search(r"print\(\*events\) +# (.*)", SNIPPETS[0])[1]


class Driver:
    def __init__(self):
        self.at = np.array([0.4, 0.3, 0.3, 0, 0, 0.0])

    def pose(self):
        return self.at

    def width(self):
        return 0.08

    def joints(self):
        return np.zeros(6)

    def follow(self, pose, opened):
        self.at = pose

    def go_home(self):
        pass

    def newest(self):
        return np.zeros((480, 640, 3), np.uint8)


def test_the_snippet_of_ones_own_arm_runs():
    driver = Driver()
    names = {"driver": driver, "camera": driver, "wrist": driver}
    exec(SNIPPETS[1], names)
    env = RobotEnv(names["arm"])
    env.reset()
    env.step(np.array([0, 0, 1, 0, 0, 0, 1.0]))
    assert driver.at[2] == pytest.approx(0.32) and env.observe()["rgb_static"].shape == (200, 200, 3)
    env.close()


def test_the_lerobot_snippet_makes_an_arm():
    class Arm6(StandIn):
        motors = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll")

        def __init__(self):
            super().__init__()
            self.positions.pop("z.pos")

    class Five(Gantry):
        def forward_kinematics(self, joints):
            return super().forward_kinematics(np.r_[joints, 0])

    names = {"robot": Arm6(), "kinematics": Five()}
    exec(SNIPPETS[2], names)
    arm = names["make_arm"]()
    assert arm.observe()["robot_obs"].shape == (15,) and arm.robot.is_connected
    arm.close()


@pytest.mark.parametrize(("prefix", "options"), [("safety", SafetyOptions()), ("chunking", ChunkingOptions())])
def test_tables_name_every_option_with_its_default(prefix, options):
    for name, value in vars(options).items():
        if name == "enabled":
            continue
        (row,) = [line for line in PAGE.splitlines() if line.startswith("| `") and re.search(rf"`(safety\.|chunking\.)?{name}`", line)]
        shown = row.split("|")[2].strip()
        if isinstance(value, (str, int, float)) or value is None:
            assert shown == ("null" if value is None else f"{value:g}" if isinstance(value, (int, float)) else value), name
