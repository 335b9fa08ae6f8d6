"""What CalvinEnv does beyond the contract that all environments share (test_contract.py)."""

import gymnasium
import numpy as np
import pytest

import envs.calvin
from envs.calvin import CalvinEnv, Randomization
from envs.spec import OBSERVATION, SENSORS

STAY = np.array([0, 0, 0, 0, 0, 0, 1], dtype=np.float32)
BLOCKS = slice(6, None)


@pytest.fixture(scope="module")
def env():
    made = CalvinEnv("D", observe="on_demand")
    yield made
    made.close()


def test_on_demand_leaves_images_out_until_asked(env):
    observation, _ = env.reset(seed=0)
    assert set(observation) == {"robot_obs", "scene_obs"}
    assert set(env.observe()) == set(OBSERVATION)


def test_seed_of_the_constructor_is_that_of_the_first_reset():
    env = CalvinEnv("D", observe="on_demand", seed=5)
    expected = CalvinEnv("D", observe="on_demand").reset(seed=5)[0]
    np.testing.assert_array_equal(env.reset()[0]["scene_obs"], expected["scene_obs"])
    assert not np.array_equal(env.reset()[0]["scene_obs"], expected["scene_obs"])


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


@pytest.mark.parametrize("action_space", ["absolute", "joint"])
def test_other_action_spaces_reach_their_goal(action_space):
    env = CalvinEnv("D", observe="on_demand", action_space=action_space)
    robot = env.reset(seed=0)[0]["robot_obs"]
    goal = np.r_[robot[:6] if action_space == "absolute" else robot[7:14], 1.0]
    goal[2 if action_space == "absolute" else 0] += 0.05
    for _ in range(20):
        observation = env.step(goal)[0]["robot_obs"]
    reached = observation[:6] if action_space == "absolute" else observation[7:14]
    np.testing.assert_allclose(reached[:3], goal[:3], atol=5e-3)
    env.close()


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


@pytest.mark.parametrize(
    "options,message",
    [
        ({"version": "head"}, "is not one of 1431a46, 797142c"),
        ({"renderer": "tinny"}, "did you mean 'tiny'"),
        ({"depth": 1}, "depth=1 is not a bool"),
        ({"tactile": "yes"}, "tactile='yes' is not a bool"),
        ({"randomization": {"textures": True}}, "expected an envs.calvin.randomization.Randomization"),
    ],
)
def test_unknown_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CalvinEnv(**options)


def test_new_options_are_keyword_only():
    with pytest.raises(TypeError):
        CalvinEnv("D", None, "always", "relative", "1431a46", 0, True)


# -- sensors


@pytest.mark.parametrize("depth,tactile", [(False, False), (True, False), (False, True), (True, True)])
def test_sensors_are_added_when_asked_for(depth, tactile):
    env = CalvinEnv("D", depth=depth, tactile=tactile)
    asked = {key for key in SENSORS if (tactile if "tactile" in key else depth)}
    observation, _ = env.reset(seed=0)
    assert set(observation) == set(OBSERVATION) | asked == set(env.observation_space)
    env.close()


def test_depth_is_the_distance_along_the_camera_axis():
    env = CalvinEnv("D", observe="on_demand", depth=True)
    env.reset(seed=0)
    static = env.observe()["depth_static"]
    # The static camera stands 4.2 m from the point of the table that it looks at; nothing of the scene is nearer than 3 m.
    assert 3.9 < np.median(static) < 4.4
    assert static.min() > 3.0
    before = _table_depth_m(env)
    for _ in range(10):
        env.step(np.array([0, 0, -0.5, 0, 0, 0, 1], dtype=np.float32))
    assert 0.03 < before - _table_depth_m(env) < 0.15, "ten centimetres down bring the table nearer to the wrist camera"
    env.close()


def _table_depth_m(env) -> float:
    depth = env.observe()["depth_gripper"]
    return float(np.median(depth[depth < 1.9]))  # beyond is nothing, up to the far plane at 2 m


# -- randomisation


def test_looks_are_drawn_from_the_seed():
    env = CalvinEnv("D", observe="on_demand", randomization=Randomization(textures=True, lights=True, camera_jitter=1.0))
    states, images = [], []
    for seed in (1, 2, 1):
        states.append(env.reset(seed=seed)[0]["scene_obs"])
        images.append(env.observe()["rgb_static"])
    np.testing.assert_array_equal(images[0], images[2])
    assert (images[0] != images[1]).mean() > 0.5
    np.testing.assert_array_equal(states[0], states[1], "blocks are not among what is drawn")
    env.reset()
    assert (images[2] != env.observe()["rgb_static"]).mean() > 0.5, "an unseeded reset goes on with the stream"
    env.close()


def test_drawn_blocks_are_those_of_the_plain_environment(env):
    randomized = CalvinEnv("D", observe="on_demand", randomization=Randomization(block_poses=True, textures=True))
    drawn = [randomized.reset(seed=seed)[0]["scene_obs"] for seed in (1, 2)]
    assert not np.array_equal(drawn[0][BLOCKS], drawn[1][BLOCKS])
    np.testing.assert_array_equal(drawn[1], env.reset(seed=2)[0]["scene_obs"])
    randomized.close()


def test_given_states_win_over_drawn_blocks(env):
    given = env.reset(seed=3)[0]
    expected = env.reset(options=given)[0]
    randomized = CalvinEnv("D", observe="on_demand", randomization=Randomization(block_poses=True))
    np.testing.assert_array_equal(randomized.reset(seed=1, options=given)[0]["scene_obs"], expected["scene_obs"])
    randomized.close()


def test_a_randomisation_that_draws_nothing_shows_the_usual_images(env):
    plain = CalvinEnv("D", observe="on_demand", randomization=Randomization())
    state = plain.reset(seed=1)[0]
    state = plain.reset(options=state)[0]
    observed = plain.observe()
    env.reset(options=plain.reset(seed=1)[0])
    for camera in ("rgb_static", "rgb_gripper"):
        np.testing.assert_array_equal(observed[camera], env.observe()[camera])
    plain.close()


# -- Gymnasium


def test_gymnasium_makes_it_by_name():
    env = gymnasium.make(envs.calvin.ENV_ID, scene="A", observe="on_demand", render_mode="rgb_array")
    assert env.unwrapped.scene.name == "A"
    env.reset(seed=0)
    assert env.render().shape == (200, 200, 3)
    env.close()
