"""Arms: the simulated one behaves like a real one, stops by its own watchdog, and runs in the same loop as simulation."""

import json
import math
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.robot import PERIOD_S, Arm, ArmOverrun, ArmStopped, RobotEnv, SimulatedArmOptions, Watchdog
from envs.simulated_arm import MOST_QUEUED, SimulatedArm
from envs.spec import InvalidAction
from eval.chain import run_chain
from eval.environment import EnvConfig
from eval.protocol import load_instructions
from eval.rollout import RolloutConfig, main
from eval.run import EvalConfig, EvalOptions
from eval.run import main as evaluate
from eval.sequences import long_horizon_sequences
from policies.safety import SafetyOptions
from policies.simple import ZeroPolicy

FORWARD = np.array([0, 0.5, 0, 0, 0, 0, 1.0])
IDEAL = SimulatedArmOptions(
    command_delay_s=0, observation_delay_s=0, observation_jitter_s=0, position_noise_m=0, angle_noise_rad=0
)  # fmt: skip


@pytest.fixture(scope="module")
def arm():
    arm = SimulatedArm()
    yield arm
    arm.close()


@pytest.fixture
def realtime():
    arm = SimulatedArm(SimulatedArmOptions(realtime=True, command_delay_s=0.01))
    arm.home()
    yield arm
    arm.close()


def tool(arm) -> np.ndarray:
    """Where the tool truly is."""
    with arm._lock:
        return arm.env.state()["robot_obs"][:3]


def test_is_an_arm_with_the_contract_of_an_environment(arm):
    assert isinstance(arm, Arm)
    env = RobotEnv(arm)
    state, info = env.reset()
    assert state["robot_obs"].shape == (15,) and "scene_info" in info
    state = env.step(FORWARD)[0]
    assert env.observe()["rgb_static"].shape == (200, 200, 3)
    assert env.statistics() == {"periods": 1, "idle_periods": 1}, "the first command is still on its way"
    with pytest.raises(InvalidAction, match="NaN"):
        env.step(np.full(7, math.nan))
    with pytest.raises(ArmStopped, match=r"home\(\) releases it"):
        env.step(FORWARD)
    with pytest.raises(ValueError, match=r"object is no arm: it has no observe\(\)"):
        RobotEnv(object())


def test_virtual_time_is_reproducible_noise_and_all(arm):
    def ran():
        env = RobotEnv(arm)
        env.reset()
        return np.array([env.step(FORWARD)[0]["robot_obs"] for _ in range(12)])

    first = ran()
    np.testing.assert_array_equal(first, ran())
    arm.home()
    measured = np.array([arm._measured(np.zeros(15)) for _ in range(500)])
    np.testing.assert_allclose(measured[:, 0].std(), arm.options.position_noise_m, rtol=0.15)
    assert not measured[:, 14].any(), "a command is known, not measured"


def test_commands_and_observations_are_late():
    arm = SimulatedArm(SimulatedArmOptions(**{**vars(IDEAL), "command_delay_s": 0.1, "observation_delay_s": 0.2}))
    arm.home()
    start, truth, seen = tool(arm), [], []
    for _ in range(20):
        arm.command(FORWARD)
        arm.advance()
        truth.append(tool(arm)[1] - start[1])
        seen.append(arm.observe(images=False)["robot_obs"][1] - start[1])
    assert [period.commanded for period in arm.log] == [False] * 3 + [True] * 17
    np.testing.assert_allclose(seen[8:], truth[2:-6], atol=1e-12)
    assert truth[-1] > 0.05
    arm.close()


def test_it_stops_in_the_first_period_without_a_command(arm):
    arm.home()
    for _ in range(15):
        arm.command(FORWARD)
        arm.advance()
    arm.advance()  # the last command, which was on its way
    moving = arm.sent()[0]
    arm.advance()
    stopped, held = arm.sent()
    assert held and np.linalg.norm(stopped[:3] - moving[:3]) > 1e-3, "it is sent to where it is, not to where it was sent"
    for _ in range(10):
        arm.advance()
        np.testing.assert_array_equal(arm.sent()[0], stopped)
    arm.command(FORWARD)  # and goes on when commands come again
    arm.advance(), arm.advance()
    np.testing.assert_allclose(arm.sent()[0][1] - stopped[1], 0.01)


def test_stop_holds_until_home(arm):
    arm.home()
    arm.command(FORWARD)
    arm.advance()
    arm.stop()
    before = arm.sent()[0]
    arm.advance()
    np.testing.assert_array_equal(arm.sent()[0], before)
    with pytest.raises(ArmStopped):
        arm.command(FORWARD)
    arm.home()
    arm.command(FORWARD)


def test_a_sender_that_does_not_keep_the_rate_is_refused(arm):
    arm.home()
    with pytest.raises(ArmOverrun, match="send one every 33.3 ms"):
        for _ in range(20):
            arm.command(FORWARD)
            if len(arm._inbox) > 3:
                arm._ticks += 1  # time goes on, and the arm is busy


# -- the program that commands it dies


def _sends(connection) -> None:
    while True:
        connection.send(FORWARD)
        time.sleep(PERIOD_S)


def _forwarded(arm, connection, until_s: float) -> list[float]:
    """Hand the commands that come over to the arm; when they came."""
    came = []
    while time.monotonic() < until_s:
        try:
            if connection.poll(0.002):
                arm.command(connection.recv())
                came.append(arm._now())
        except (EOFError, ConnectionResetError):
            break
        except ArmOverrun:
            pass  # this machine paused, and caught up
    return came


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_the_arm_stops_within_one_period_when_its_commander_dies(realtime, how):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_sends, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(20), "the commander did not start"
    theirs.close()
    came = _forwarded(realtime, ours, time.monotonic() + 0.7)
    os.kill(process.pid, how)
    came += _forwarded(realtime, ours, time.monotonic() + 0.4)
    time.sleep(0.6)
    with realtime._lock:
        log = list(realtime.log)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    last = max(row for row, period in enumerate(log) if period.commanded)
    assert len(came) > 10 and len(log) > last + 6
    assert log[last].sent[1] > log[last - 3].sent[1], "it was moving"
    # The first control period without a command is the one that stops it, and from there on it is sent nowhere else.
    for period in log[last + 1 :]:
        np.testing.assert_array_equal(period.sent, log[last + 1].sent)
    assert np.abs(log[-1].tool[:3] - log[last].tool[:3]).max() < 0.02
    # The last command arrives, is on its way, waits for those before it and for the next period's beginning, and lasts for one period.
    due_s = came[-1] + realtime.options.command_delay_s
    waited = sum(period.commanded and period.time_s >= due_s for period in log) - 1
    assert waited <= MOST_QUEUED
    assert log[last + 1].time_s <= due_s + (waited + 2) * PERIOD_S


class _Remote(ZeroPolicy):
    """A policy in another process."""

    requires = frozenset({"robot_obs"})

    def __init__(self, connection, patience_s):
        self.connection, self.patience_s = connection, patience_s

    def infer(self, observation):
        self.connection.send("go on")
        if not self.connection.poll(self.patience_s):
            raise TimeoutError("the policy does not answer")
        return {"actions": self.connection.recv()}


def _decides(connection) -> None:
    connection.send("ready")
    while connection.recv():
        connection.send(np.tile(FORWARD, (5, 1)))


def test_a_policy_killed_in_mid_rollout_ends_the_chain_and_the_arm_stands(realtime):
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_decides, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    assert ours.poll(20) and ours.recv() == "ready"
    asked = []

    class Killed(_Remote):
        def infer(self, observation):
            asked.append(1)
            if len(asked) == 6:
                os.kill(process.pid, signal.SIGSTOP)
            return super().infer(observation)

    chain = long_horizon_sequences(1)[0]
    result = run_chain(RobotEnv(realtime), Killed(ours, 0.5), 0, chain, load_instructions(), max_steps=200, seed=0)
    process.kill()
    assert result.error["type"] == "TimeoutError" and result.steps == 25
    last = max(row for row, period in enumerate(realtime.log) if period.commanded)
    after = [period.sent for period in realtime.log[last + 1 :]]
    assert len(after) > 10, "it stood while the chain waited for an answer"
    for pose in after:
        np.testing.assert_array_equal(pose, after[0])
    with pytest.raises(ArmStopped):
        realtime.command(FORWARD)
    assert result.acting["idle_periods"] >= len(after) - 5


def test_watchdog_of_arms_that_have_none():
    stops = []
    dog = Watchdog(0.05, lambda: stops.append(time.monotonic()))
    time.sleep(0.1)
    assert not stops, "before the first command there is nothing to stop"
    for _ in range(8):
        dog.feed()
        time.sleep(0.02)
    assert not stops
    fed = time.monotonic()
    dog.feed()
    time.sleep(0.25)
    assert len(stops) == dog.expired == 1 and stops[0] - fed >= 0.05
    dog.close()
    with pytest.raises(ValueError, match="expected a time above 0"):
        Watchdog(0, stops.clear)


# -- behind the guard

numbers = st.one_of(st.floats(-1, 1), st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([1.0, -1.0, 1e308]))
answers = st.one_of(
    st.lists(numbers, min_size=7, max_size=7).map(lambda action: np.array([action])),
    st.lists(numbers, max_size=9),
    st.none(),
    st.tuples(st.sampled_from([1.0, -1.0]), st.integers(0, 5), st.integers(1, 25)).map(
        lambda draw: np.tile(np.r_[draw[0] * (np.arange(6) == draw[1]), 1.0], (draw[2], 1))  # straight at a wall
    ),
    st.tuples(st.lists(st.sampled_from([1.0, -1.0]), min_size=6, max_size=6), st.integers(1, 25)).map(
        lambda draw: np.tile(np.r_[draw[0], 1.0], (draw[1], 1))  # along all axes at once, to where the arm cannot reach
    ),
)
tight = SafetyOptions(
    enabled=True,
    workspace_m=((-0.1, 0.15), (-0.3, 0.0), (0.4, 0.75)),
    rotation_rad=(0.3, 0.3, 0.5),
    velocity_m_s=(0.3, 0.45, 0.6),
    acceleration_m_s2=(3.0, 6.0, 9.0),
    on_invalid="hold",
)


class _Plays(ZeroPolicy):
    """Answers whatever was drawn; between answers there may be no command at all, when the arm's own watchdog steps in."""

    def __init__(self, drawn, arm):
        self.drawn, self.arm = list(drawn), arm

    def infer(self, observation):
        if not self.drawn:
            return {"actions": np.array([[0, 0, 0, 0, 0, 0, 1.0]])}
        answer, pause = self.drawn.pop(0)
        for _ in range(pause):
            self.arm.advance()
        return {"actions": answer}


def _guarded(arm, drawn):
    chain = long_horizon_sequences(1)[0]
    return run_chain(RobotEnv(arm), _Plays(drawn, arm), 0, chain, load_instructions(), max_steps=70, seed=0, safety=tight)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(answers, st.integers(0, 4)), min_size=3, max_size=10))
def test_no_policy_makes_the_simulated_arm_exceed_its_limits(arm, drawn):
    result = _guarded(arm, drawn)
    assert result.error is None or result.error["type"] in ("SafetyStopped", "ArmStopped")
    poses, tools = np.array([period.sent for period in arm.log]), np.array([period.tool for period in arm.log])
    moved = np.array([period.commanded and not period.held for period in arm.log])
    low, high = np.array(tight.workspace_m).T
    assert (poses[:, :3] >= low - 1e-9).all() and (poses[:, :3] <= high + 1e-9).all()
    assert (tools[:, :3] >= low).all() and (tools[:, :3] <= high).all()
    assert (np.abs(poses[moved, 3:] - poses[0, 3:]) <= np.array(tight.rotation_rad) + 0.02).all()  # its start is measured, with noise
    velocity = np.diff(poses, axis=0)[:, :3] / PERIOD_S
    both = moved[1:] & moved[:-1]
    assert (np.abs(velocity[both]) <= np.array(tight.velocity_m_s) + 1e-9).all()
    running = both[1:] & both[:-1]
    change = np.diff(velocity, axis=0)[running] / PERIOD_S
    assert (np.abs(change) <= np.array(tight.acceleration_m_s2) + 1e-6).all()


def test_an_arm_that_strays_to_a_wall_is_stopped_at_it(arm):
    """Sent along all axes at once, inside its box, to poses that its joints cannot take."""
    result = _guarded(arm, [(np.tile(np.r_[1.0, 1, -1, 1, 1, 1, 1], (25, 1)), 0)] * 3)
    assert result.error["type"] == "ArmStopped" and "its tool came to a wall along" in result.error["message"]
    tools = np.array([period.tool for period in arm.log])
    low, high = np.array(tight.workspace_m).T
    assert (tools[:, :3] >= low).all() and (tools[:, :3] <= high).all()
    stopped_at = tool(arm)
    for _ in range(30):
        arm.advance()
    np.testing.assert_allclose(tool(arm), stopped_at, atol=2e-3)
    arm.home()
    for _ in range(30):  # the walls are gone with it
        arm.command(np.r_[-1.0, np.zeros(5), 1.0])
        arm.advance()
    assert tool(arm)[0] < low[0]


# -- the same loop and recordings


def test_a_rollout_on_the_simulated_arm_leaves_the_same_files(tmp_path):
    env = EnvConfig(simulator="robot")
    options = {"policy": "expert", "tasks": ("turn_on_led",), "frame_stride": 20, "max_steps": 40, "safety": SafetyOptions(enabled=True)}
    main(RolloutConfig(env=env, output_dir=str(tmp_path), **options))
    assert {path.name for path in tmp_path.iterdir()} == {"recording.rrd", "rollout.mp4", "results.json", "report.html"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["simulator"] == "robot" and results["num_sequences"] == 1 and results["errors"] == 0
    assert results["chains"][0]["acting"]["periods"] >= results["chains"][0]["steps"]


def test_an_evaluation_on_the_simulated_arm_counts_what_failed(tmp_path):
    """Pictures of a failure come from the arm's cameras."""
    env = EnvConfig(simulator="robot")
    evaluate(EvalConfig(env=env, policy="zero", eval=EvalOptions(num_sequences=1, max_steps=12), output_dir=str(tmp_path)))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["errors"] == 0 and results["average_length"] == 0
    assert list((tmp_path / "failures").iterdir())


class Button:
    """The smallest arm: it has a pose, and a person who says when the task is done."""

    name = "button"

    def __init__(self):
        self.commands, self.stopped = [], False

    def observe(self, images=True):
        return {"robot_obs": np.r_[np.zeros(6), 0.08, np.zeros(7), 1.0]}

    def command(self, action):
        self.commands.append(action)

    def stop(self):
        self.stopped = True

    def home(self, options=None):
        self.stopped = False

    def close(self):
        pass

    def judge(self, task):
        return len(self.commands) >= 4

    def advance(self):
        pass


def test_an_arm_of_the_users_own_is_found_by_its_dotted_name():
    env = EnvConfig(simulator="robot", arm="tests.envs.test_robot:Button").make()
    result = run_chain(env, ZeroPolicy(), 0, long_horizon_sequences(1)[0], load_instructions(), max_steps=9, seed=0)
    assert result.error is None and result.num_solved == 5 and result.attempts[0].steps == 4
    assert env.arm.stopped and result.renderer == "cameras of the arm button"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arm": "robot.py"}, "env.arm=robot.py: expected simulated or package.module:function"),
        ({"simulator": "emu3-vla", "arm": "a:b"}, "together with env.simulator=robot"),
        ({"arm": "nowhere_at_all:make"}, "no module 'nowhere_at_all'"),
        ({"arm": "envs.robot:make"}, "has no attribute 'make'"),
    ],
)
def test_wrong_arms_are_said(options, message):
    with pytest.raises(ValueError, match=message):
        EnvConfig(**{"simulator": "robot"} | options).make()
    with pytest.raises(ValueError, match=r"env.simulated_arm.command_delay_s=3 is outside \[0, 1\]"):
        SimulatedArmOptions(command_delay_s=3)
