"""Gymnasium's vector API: the same numbers as single environments, infos whole, bad input refused before anything moves."""

import os
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ClosedEnvironmentError

import envs.calvin
from envs.calvin import CalvinEnv, info_of, make_vector
from envs.calvin.tasks import completed_tasks
from envs.calvin.vector import THREAD_VARIABLES
from envs.spec import InvalidAction

COUNT = 2


@pytest.fixture(scope="module", params=["sync", "async"])
def vector(request):
    made = make_vector(COUNT, workers=request.param, scene="D", observe="on_demand")
    yield made
    made.close()


@pytest.fixture(scope="module")
def singles():
    made = [CalvinEnv("D", observe="on_demand") for _ in range(COUNT)]
    yield made
    for env in made:
        env.close()


def _actions(count: int = 15) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate([rng.uniform(-1, 1, (count, COUNT, 6)), rng.choice([-1.0, 1.0], (count, COUNT, 1))], axis=2).astype(np.float32)


def _assert_rows(observations, infos, expected) -> None:
    for index, (observation, info) in enumerate(expected):
        for key, value in observation.items():
            np.testing.assert_array_equal(observations[key][index], value)
        assert info_of(infos, index) == info


def test_each_environment_is_as_one_alone(vector, singles):
    observations, infos = vector.reset(seed=4)
    starts = [env.reset(seed=4 + index) for index, env in enumerate(singles)]
    _assert_rows(observations, infos, starts)
    assert not np.array_equal(observations["scene_obs"][0], observations["scene_obs"][1]), "each has a stream of its own"
    for actions in _actions():
        observations, rewards, terminations, truncations, infos = vector.step(actions)
        steps = [env.step(action) for env, action in zip(singles, actions, strict=True)]
        _assert_rows(observations, infos, [(step[0], step[4]) for step in steps])
        assert not rewards.any() and not terminations.any() and not truncations.any()
    for seen, env in zip(vector.call("observe"), singles, strict=True):
        for key, value in env.observe().items():
            np.testing.assert_array_equal(seen[key], value)
    start = starts[0][1]
    assert completed_tasks(start, info_of(infos, 0)) == completed_tasks(start, steps[0][4])


def test_unseeded_resets_go_on_with_each_stream(vector, singles):
    vector.reset(seed=[8, 3])
    expected = [env.reset(seed=seed) and env.reset() for env, seed in zip(singles, (8, 3), strict=True)]
    _assert_rows(*vector.reset(), expected)


def test_each_environment_takes_its_own_state(vector, singles):
    states = [env.reset(seed=20 + index)[0] for index, env in enumerate(singles)]
    batch = {key: np.stack([state[key] for state in states]) for key in ("robot_obs", "scene_obs")}
    expected = [env.reset(options=state) for env, state in zip(singles, states, strict=True)]
    _assert_rows(*vector.reset(options=batch), expected)


def test_some_are_reset_and_the_others_go_on(vector, singles):
    vector.reset(seed=1)
    moved = vector.step(_actions(1)[0])[0]
    observations, infos = vector.reset(seed=[7, 7], options={"reset_mask": np.array([False, True])})
    np.testing.assert_array_equal(observations["robot_obs"][0], moved["robot_obs"][0])
    expected, info = singles[1].reset(seed=7)
    np.testing.assert_array_equal(observations["scene_obs"][1], expected["scene_obs"])
    assert info_of(infos, 0) == {} and info_of(infos, 1) == info


def test_snapshots_are_taken_and_restored_in_each(vector):
    vector.reset(seed=2)
    actions = _actions(10)
    for action in actions[:5]:
        vector.step(action)
    snapshots = vector.call("snapshot")
    expected = [vector.step(action)[0] for action in actions[5:]]
    restored = vector.restore_each(snapshots)
    assert len(restored) == COUNT and set(restored[0][0]) == {"robot_obs", "scene_obs"}
    for action, observations in zip(actions[5:], expected, strict=True):
        again = vector.step(action)[0]
        for key in observations:
            np.testing.assert_array_equal(again[key], observations[key])
    with pytest.raises(ValueError, match="1 snapshots for 2 environments"):
        vector.restore_each(snapshots[:1])


def test_nothing_resets_by_itself(vector):
    assert vector.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.DISABLED


@pytest.mark.parametrize(
    "actions,message",
    [
        (np.zeros((COUNT + 1, 7)), "expected one for each of 2 environments"),
        (None, "expected one for each of 2 environments"),
        (np.array([[0, 0, 0, 0, 0, 0, 1], [0, 0, np.nan, 0, 0, 0, 1]]), "environment 1: action has a NaN"),
        (np.zeros((COUNT, 6)), r"environment 0: action has shape \(6,\)"),
        ([[0, 0, 0, 0, 0, 0, 1], "stay"], "environment 1: .*expected real numbers"),
    ],
)
def test_a_bad_action_moves_none(vector, actions, message):
    before = vector.reset(seed=0)[0]
    with pytest.raises(InvalidAction, match=message):
        vector.step(actions)
    for index, state in enumerate(vector.call("state")):
        np.testing.assert_array_equal(before["robot_obs"][index], state["robot_obs"])
    vector.step(_actions(1)[0])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"robot_obs": np.zeros(15)}, "needs one state for each of 2|has shape"),
        ({"scene_obs": np.zeros((COUNT, 23))}, r"scene_obs has shape \(23,\)"),
        ({"scene": np.zeros((COUNT, 24))}, "unknown reset option 'scene'"),
        ("home", "reset options are a str"),
    ],
)
def test_bad_states_are_refused_before_any_reset(vector, options, message):
    before = vector.reset(seed=0)[0]
    with pytest.raises(ValueError, match=message):
        vector.reset(options=options)
    np.testing.assert_array_equal(vector.call("state")[0]["robot_obs"], before["robot_obs"][0])


def test_bad_seeds_are_refused(vector):
    for seed in (-1, [0, -1], "zero"):
        with pytest.raises(ValueError, match="expected a non-negative integer"):
            vector.reset(seed=seed)


@pytest.mark.parametrize(
    "count,options,message",
    [
        (0, {}, "num_envs=0 is not a positive integer"),
        (True, {}, "num_envs=True"),
        (1, {"workers": "asink"}, "did you mean 'async'"),
        (1, {"seed": -3}, "expected a non-negative integer"),
        (1, {"scene": "E"}, "unknown scene 'E'"),
        (1, {"workers": "sync", "observe": "allways"}, "did you mean 'always'"),
    ],
)
def test_bad_options_are_named(count, options, message):
    with pytest.raises(ValueError, match=message):
        make_vector(count, **options)


def test_seed_of_the_maker_is_that_of_the_first_reset(singles):
    made = make_vector(COUNT, workers="sync", scene="D", observe="on_demand", seed=6)
    _assert_rows(*made.reset(), [env.reset(seed=6 + index) for index, env in enumerate(singles)])
    made.close()


def test_workers_run_on_one_thread_each(vector):
    if not isinstance(vector, gymnasium.vector.AsyncVectorEnv):
        pytest.skip("there are no other processes")
    if not Path("/proc/self/environ").exists():
        pytest.skip("this system does not show the variables that a process was started with")
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    for process in vector.processes:
        variables = Path(f"/proc/{process.pid}/environ").read_bytes().decode().split("\0")
        assert {f"{name}=1" for name in THREAD_VARIABLES} <= set(variables)
    assert before == {name: os.environ.get(name) for name in THREAD_VARIABLES}


def test_images_come_in_batches():
    made = make_vector(COUNT, workers="sync", scene="D", depth=True)
    observations, _ = made.reset(seed=0)
    assert observations["rgb_static"].shape == (COUNT, 200, 200, 3) and observations["depth_gripper"].shape == (COUNT, 84, 84)
    made.close()


def test_use_after_close_is_named():
    made = make_vector(1, workers="sync", scene="D", observe="on_demand")
    made.reset(seed=0)
    made.close()
    with pytest.raises(ClosedEnvironmentError):
        made.step(_actions(1)[0][:1])


def test_gymnasium_makes_a_vector_by_name():
    made = gymnasium.make_vec(envs.calvin.ENV_ID, num_envs=COUNT, vectorization_mode="sync", scene="B", observe="on_demand")
    observations, _ = made.reset(seed=0)
    assert observations["scene_obs"].shape == (COUNT, 24)
    made.close()
