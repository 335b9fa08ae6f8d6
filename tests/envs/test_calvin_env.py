"""One contract for the environment, whatever it is loaded from."""

import gymnasium
import numpy as np
import pytest

from envs.calvin import CalvinEnv
from envs.spec import OBSERVATION, InvalidAction

STAY = np.array([0, 0, 0, 0, 0, 0, 1], dtype=np.float32)


@pytest.fixture(scope="module")
def env():
    made = CalvinEnv("D", observe="on_demand")
    yield made
    made.close()


def _play(env, seed: int, steps: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    states = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        action = np.r_[rng.uniform(-1, 1, 6), rng.choice([-1.0, 1.0])]
        states.append(env.step(action)[0])
    return [np.concatenate([state["robot_obs"], state["scene_obs"]]) for state in states]


@pytest.mark.parametrize("scene", "ABCD")
def test_observations_and_actions_are_as_declared(scene):
    env = CalvinEnv(scene)
    observation, info = env.reset(seed=1)
    assert set(observation) == set(OBSERVATION)
    assert env.observation_space.contains(observation)
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (7,), np.float32)
    observation, reward, terminated, truncated, info = env.step(STAY)
    assert env.observation_space.contains(observation)
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert set(info["scene_info"]["movable_objects"]) == {"block_red", "block_blue", "block_pink"}
    assert observation["rgb_static"].std() > 20 and observation["rgb_gripper"].std() > 20
    env.close()


def test_on_demand_leaves_images_out_until_asked(env):
    observation, _ = env.reset(seed=0)
    assert set(observation) == {"robot_obs", "scene_obs"}
    assert env.observation_space.contains(observation)
    assert set(env.observe()) == set(OBSERVATION)


def test_same_seed_same_states_in_a_used_environment(env):
    first = _play(env, seed=5)
    _play(env, seed=6)
    np.testing.assert_array_equal(first, _play(env, seed=5))
    other = CalvinEnv("D", observe="on_demand")
    np.testing.assert_array_equal(first, _play(other, seed=5))
    other.close()


def test_seed_of_the_constructor_is_that_of_the_first_reset():
    env = CalvinEnv("D", observe="on_demand", seed=5)
    expected = CalvinEnv("D", observe="on_demand").reset(seed=5)[0]
    np.testing.assert_array_equal(env.reset()[0]["scene_obs"], expected["scene_obs"])


def test_a_state_is_restored(env):
    env.reset(seed=2)
    for _ in range(5):
        env.step(np.array([0, 0.5, 0, 0, 0, 0, -1], dtype=np.float32))
    state = env.state()
    observation, _ = env.reset(options=state)
    # One physics step passes in a reset, and the gripper command is not part of what is restored.
    np.testing.assert_allclose(observation["robot_obs"][:14], state["robot_obs"][:14], atol=2e-3)
    np.testing.assert_allclose(observation["scene_obs"], state["scene_obs"], atol=2e-3)


def test_relative_action_moves_the_tool_by_two_centimetres_a_unit(env):
    before = env.reset(seed=0)[0]["robot_obs"][:3]
    for _ in range(5):
        env.step(np.array([0, 0, 0.5, 0, 0, 0, 1]))
    for _ in range(5):
        after = env.step(STAY)[0]["robot_obs"][:3]
    np.testing.assert_allclose(after - before, [0, 0, 0.05], atol=5e-3)


@pytest.mark.parametrize("action_space,size", [("absolute", 7), ("joint", 8)])
def test_other_action_spaces_reach_their_goal(action_space, size):
    env = CalvinEnv("D", observe="on_demand", action_space=action_space)
    robot = env.reset(seed=0)[0]["robot_obs"]
    goal = np.r_[robot[:6] if action_space == "absolute" else robot[7:14], 1.0]
    goal[2 if action_space == "absolute" else 0] += 0.05
    for _ in range(20):
        observation = env.step(goal)[0]["robot_obs"]
    reached = observation[:6] if action_space == "absolute" else observation[7:14]
    np.testing.assert_allclose(reached[:3], goal[:3], atol=5e-3)
    with pytest.raises(InvalidAction, match=rf"expected \({size},\)"):
        env.step(np.zeros(size + 1))
    env.close()


@pytest.mark.parametrize(
    "action,message",
    [
        (np.zeros(6), r"shape \(6,\), expected \(7,\)"),
        ([0, 0, np.nan, 0, 0, 0, 1], "NaN or infinite"),
        ([0, 0, 1.5, 0, 0, 0, 1], r"leaves \[-1, 1\]"),
        ([0, 0, 0, 0, 0, 0, 0.5], "exactly -1"),
    ],
)
def test_a_bad_action_is_named_and_moves_nothing(env, action, message):
    before = env.reset(seed=0)[0]
    with pytest.raises(InvalidAction, match=message):
        env.step(action)
    np.testing.assert_array_equal(before["robot_obs"], env.state()["robot_obs"])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"scene": "E"}, "unknown scene 'E'"),
        ({"observe": "allways"}, "did you mean 'always'"),
        ({"action_space": "relativ"}, "did you mean 'relative'"),
        ({"version": "head"}, "is not one of 1431a46, 797142c"),
    ],
)
def test_unknown_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CalvinEnv(**options)


def test_missing_and_incomplete_assets_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        CalvinEnv("D", assets=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="incomplete for scene D: no franka_panda"):
        CalvinEnv("D", assets=tmp_path)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"robot_obs": np.zeros(14)}, r"robot_obs has shape \(14,\), expected \(15,\)"),
        ({"scene_obs": np.full(24, np.nan)}, "scene_obs has a NaN"),
        ({"scene": np.zeros(24)}, "unknown reset option 'scene'"),
    ],
)
def test_bad_reset_states_are_named(env, options, message):
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)


def test_the_pinned_version_forgets_that_the_led_was_on():
    scene_obs = np.zeros(24)
    scene_obs[5] = 1
    scene_obs[6:] = np.array([[0.05, -0.12, 0.46, 0, 0, 1.5], [0.23, -0.12, 0.46, 0, 0, 1.5], [0.1, 0.09, 0.461, 0, 0, 1.5]]).ravel()
    on = {}
    for version in ("1431a46", "797142c"):
        env = CalvinEnv("D", observe="on_demand", version=version)
        info = env.reset(options={"scene_obs": scene_obs})[1]["scene_info"]
        on[version] = info["buttons"]["base__button"]["logical_state"]
        assert info["lights"]["led"]["logical_state"] == 1
        env.close()
    assert on == {"1431a46": 0, "797142c": 1}
