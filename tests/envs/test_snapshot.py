"""Snapshots: exact in another process and through JSON, bounded, and refused where they do not belong."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from envs.calvin import CalvinEnv, Randomization, Snapshot
from envs.calvin import snapshot as snapshots
from envs.calvin.snapshot import History, SnapshotMismatch, SnapshotUnavailable, state_vector

LED_BLOCKS = [[0.05, -0.12, 0.46, 0, 0, 1.5], [0.23, -0.12, 0.46, 0, 0, 1.5], [0.1, 0.09, 0.461, 0, 0, 1.5]]

CONTINUE = """
import json, sys
import numpy as np
from envs.calvin import CalvinEnv, Snapshot
folder = sys.argv[1]
env = CalvinEnv("D", observe="on_demand")
env.restore(Snapshot.from_json(open(f"{folder}/snapshot.json").read()))
states = [np.concatenate(list(env.step(action)[0].values())) for action in np.load(f"{folder}/actions.npy")]
np.save(f"{folder}/states.npy", states)
contacts = env.info()["robot_info"]["contacts"]
json.dump([contacts, env.np_random.bit_generator.state], open(f"{folder}/rest.json", "w"))
"""


@pytest.fixture(scope="module")
def env():
    made = CalvinEnv("D", observe="on_demand")
    yield made
    made.close()


def _pushing(env, count: int = 40, seed: int = 5) -> list[np.ndarray]:
    """Random actions from a reset with the arm low over the table, so that it soon pushes blocks about."""
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    actions = [np.r_[rng.uniform(-1, 1, 6), rng.choice([-1.0, 1.0])] for _ in range(count)]
    for action in actions[: count // 2]:
        action[2] = -0.9
    return actions


def _states(env, actions) -> np.ndarray:
    return np.array([np.concatenate(list(env.step(action)[0].values())) for action in actions])


def test_another_process_goes_on_exactly_from_json(env, tmp_path):
    actions = _pushing(env, 80)
    _states(env, actions[:50])
    assert env.info()["robot_info"]["contacts"], "the arm should touch something, or the test proves little"
    (tmp_path / "snapshot.json").write_text(env.snapshot().to_json())
    np.save(tmp_path / "actions.npy", actions[50:])
    expected = _states(env, actions[50:])
    subprocess.run([sys.executable, "-c", CONTINUE, str(tmp_path)], check=True, timeout=120)
    np.testing.assert_array_equal(np.load(tmp_path / "states.npy"), expected)
    rest = json.loads((tmp_path / "rest.json").read_text())
    assert rest == json.loads(json.dumps([env.info()["robot_info"]["contacts"], env.np_random.bit_generator.state]))


@pytest.mark.parametrize("copy", [lambda made: pickle.loads(pickle.dumps(made)), lambda made: Snapshot.from_json(made.to_json())])
def test_copies_lose_nothing(env, copy):
    _states(env, _pushing(env, 6))
    made = env.snapshot()
    copied = copy(made)
    for name in ("commands", "state", "target"):
        np.testing.assert_array_equal(getattr(copied, name), getattr(made, name))
        assert getattr(copied, name).dtype == np.float64
    for name in ("scene", "version", "assets_sha256", "randomization", "rng", "rng_at_reset"):
        assert getattr(copied, name) == getattr(made, name)
    env.restore(copied)
    np.testing.assert_array_equal(state_vector(env.simulation), made.state)


def test_an_episode_that_began_in_given_states_is_restored(env):
    scene_obs = np.r_[0.1, 0.05, 0, 0, 0, 1, np.ravel(LED_BLOCKS)]
    env.reset(options={"scene_obs": scene_obs})
    actions = [np.array([0, 0, -0.5, 0, 0, 0, -1.0])] * 6
    _states(env, actions)
    made, expected = env.snapshot(), _states(env, actions)
    scene_obs[:] = 0  # the snapshot keeps its own copy
    observation, info = env.restore(made)
    assert observation["robot_obs"][14] == -1 and info["robot_info"]["gripper_action"] == -1
    assert info["scene_info"]["lights"]["led"]["logical_state"] == 1
    np.testing.assert_array_equal(_states(env, actions), expected)


def test_relative_actions_go_on_from_the_same_target(env):
    actions = _pushing(env, 10)
    _states(env, actions)
    target = env.simulation.target_position.copy(), env.simulation.target_euler.copy()
    made = env.snapshot()
    _states(env, actions)
    env.restore(made)
    np.testing.assert_array_equal(env.simulation.target_position, target[0])
    np.testing.assert_array_equal(env.simulation.target_euler, target[1])


def test_another_action_space_may_go_on(env):
    actions = _pushing(env, 10)
    _states(env, actions)
    made = env.snapshot()
    joint = CalvinEnv("D", observe="on_demand", action_space="joint")
    observation, _ = joint.restore(made)
    np.testing.assert_array_equal(observation["robot_obs"], env.state()["robot_obs"])
    joint.close()


def test_a_snapshot_of_a_restored_episode_is_complete(env):
    actions = _pushing(env, 12)
    _states(env, actions[:4])
    first = env.snapshot()
    env.restore(first)
    _states(env, actions[4:8])
    second = env.snapshot()
    assert len(second.commands) == 8
    expected = _states(env, actions[8:])
    env.restore(second)
    np.testing.assert_array_equal(_states(env, actions[8:]), expected)


def test_images_of_a_randomised_scene_come_back():
    env = CalvinEnv("D", observe="on_demand", randomization=Randomization(block_poses=True, textures=True, lights=True, camera_jitter=1.0))
    env.reset(seed=1)
    env.reset()
    made, images = env.snapshot(), env.observe()
    env.reset()
    following = env.state()["scene_obs"]
    env.restore(made)
    np.testing.assert_array_equal(env.observe()["rgb_static"], images["rgb_static"])
    assert np.array_equal(env.reset()[0]["scene_obs"], following), "the random stream goes on as it did"
    env.close()


def test_a_snapshot_does_not_change_the_episode(env):
    actions = _pushing(env, 20)
    plain = _states(env, actions)
    _pushing(env, 20)
    watched = []
    for action in actions:
        env.snapshot()
        watched += list(_states(env, [action]))
    np.testing.assert_array_equal(plain, watched)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"scene": "A"}, "the snapshot has scene 'D', this environment 'A'"),
        ({"version": "797142c"}, "the snapshot has version '1431a46', this environment '797142c'"),
        ({"randomization": Randomization(lights=True)}, "the snapshot has randomization None"),
    ],
)
def test_a_foreign_snapshot_is_refused_and_changes_nothing(env, options, message):
    env.reset(seed=0)
    made = env.snapshot()
    foreign = CalvinEnv(**{"scene": "D", "observe": "on_demand"} | options)
    before = foreign.reset(seed=3)[0]
    with pytest.raises(SnapshotMismatch, match=message):
        foreign.restore(made)
    np.testing.assert_array_equal(foreign.state()["scene_obs"], before["scene_obs"])
    foreign.close()


def test_other_assets_are_refused(env, calvin_assets):
    original = CalvinEnv("D", assets=calvin_assets, observe="on_demand")
    original.reset(seed=0)
    with pytest.raises(SnapshotMismatch, match="assets_sha256"):
        env.restore(original.snapshot())
    original.close()


def test_what_was_moved_by_hand_is_noticed(env):
    env.reset(seed=0)
    simulation = env.simulation
    uid = simulation.blocks["block_red"]
    simulation._place(uid, (0.1, -0.1, 0.6), (0, 0, 0, 1))
    env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
    made = env.snapshot()
    with pytest.raises(SnapshotMismatch, match="moved outside of step"):
        env.restore(made)
    with pytest.raises(ResetNeeded, match="could not be restored"):
        env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
    env.reset(seed=0)


@pytest.mark.parametrize("given", [None, "snapshot", {"scene": "D"}])
def test_anything_but_a_snapshot_is_refused(env, given):
    with pytest.raises(SnapshotMismatch, match=r"expected what snapshot\(\) returned"):
        env.restore(given)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "scene": "D"}', '{"format": 2}'])
def test_text_that_is_no_snapshot_is_named(text):
    with pytest.raises(ValueError, match="not a snapshot"):
        Snapshot.from_json(text)


def test_a_snapshot_without_commands_is_no_snapshot(env):
    env.reset(seed=0)
    fields = json.loads(env.snapshot().to_json()) | {"commands": None}
    with pytest.raises(ValueError):
        Snapshot.from_json(json.dumps(fields))


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(snapshots, "MAX_STEPS", 10)
    history = History(None, None, {})
    for step in range(12):
        history.record(np.full(7, step), 1)
        if step == 9:
            assert history.commands().shape == (10, 8)
    assert len(history._commands) == 10 * 8
    with pytest.raises(SnapshotUnavailable, match="12 steps and only 10 are kept"):
        history.commands()


def test_a_snapshot_needs_an_episode():
    env = CalvinEnv("D", observe="on_demand")
    with pytest.raises(ResetNeeded):
        env.snapshot()
    env.close()
