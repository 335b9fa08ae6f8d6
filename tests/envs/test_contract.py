"""One contract for every environment: spaces, dtypes, determinism, exact snapshots, error texts, whatever it is loaded from."""

import re
import warnings
from collections.abc import Callable

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.utils.env_checker import check_env

from envs.calvin.env import CalvinEnv
from envs.calvin.randomization import Randomization
from envs.spec import OBSERVATION, SENSORS, InvalidAction

EVERYTHING = Randomization(block_poses=True, textures=True, lights=True, camera_jitter=1.0)
OWN = {
    "A": {"scene": "A", "observe": "on_demand"},
    "B": {"scene": "B", "observe": "on_demand"},
    "C": {"scene": "C", "observe": "on_demand"},
    "D": {"scene": "D", "observe": "on_demand"},
    "every-image": {"scene": "D"},
    "every-sensor": {"scene": "A", "depth": True, "tactile": True, "randomization": EVERYTHING},
    "absolute": {"scene": "D", "observe": "on_demand", "action_space": "absolute"},
    "joint": {"scene": "D", "observe": "on_demand", "action_space": "joint"},
    "newer-version": {"scene": "D", "observe": "on_demand", "version": "797142c"},
}
CASES = (*OWN, "original-assets", "calvin_env")
SENSOR_OF_SHAPE = OBSERVATION | SENSORS


@pytest.fixture(scope="module", params=CASES)
def make(request) -> Callable[..., gymnasium.Env]:
    """Makes environments of one kind; its options can be overridden."""
    if request.param in OWN:
        return lambda **options: CalvinEnv(**OWN[request.param] | options)
    assets = request.getfixturevalue("calvin_assets")
    if request.param == "original-assets":
        return lambda **options: CalvinEnv(**{"scene": "D", "assets": assets, "observe": "on_demand"} | options)
    pytest.importorskip("calvin_env", reason="the package calvin_env is not installed: pip install 'emu3-vla[calvin]'")
    from envs.calvin_official import OfficialCalvinEnv

    return lambda **options: OfficialCalvinEnv(**{"scene": "D", "assets": assets, "observe": "on_demand"} | options)


@pytest.fixture(scope="module")
def env(make):
    made = make()
    yield made
    made.close()


@pytest.fixture(scope="module")
def other(make):
    made = make()
    yield made
    made.close()


@pytest.fixture
def exact_reset(env):
    if not isinstance(env, CalvinEnv):
        pytest.skip("calvin_env's reset keeps traces of what went before")


def _actions(env, count: int, seed: int = 3) -> list[np.ndarray]:
    """Random actions of the environment's mode, around where its episode begins."""
    rng = np.random.default_rng(seed)
    grippers = rng.choice([-1.0, 1.0], size=count)
    if env.action_mode == "relative":
        return [np.r_[rng.uniform(-1, 1, 6), gripper].astype(np.float32) for gripper in grippers]
    robot = env.state()["robot_obs"]
    start = robot[:6] if env.action_mode == "absolute" else robot[7:14]
    return [np.r_[start + rng.uniform(-0.1, 0.1, len(start)), gripper] for gripper in grippers]


def _play(env, actions) -> list[tuple[dict, dict]]:
    return [(step[0], step[4]) for step in map(env.step, actions)]


def _assert_same(first: list[tuple[dict, dict]], second: list[tuple[dict, dict]]) -> None:
    """Observations bit by bit; infos with every contact's bodies, positions and forces."""
    assert len(first) == len(second)
    for (observation, info), (other_observation, other_info) in zip(first, second, strict=True):
        assert set(observation) == set(other_observation)
        for key, value in observation.items():
            np.testing.assert_array_equal(value, other_observation[key], err_msg=key)
        assert info == other_info


# -- spaces, dtypes, layout


def test_observations_and_actions_are_as_declared(env):
    observation, _ = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    assert env.action_space.shape == ((8,) if env.action_mode == "joint" else (7,))
    observation, reward, terminated, truncated, _ = env.step(_actions(env, 1)[0])
    assert env.observation_space.contains(observation)
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert type(reward) is float and type(terminated) is bool and type(truncated) is bool


def test_observe_reads_every_sensor(env):
    env.reset(seed=1)
    observation = env.observe()
    expected = set(OBSERVATION) | (set(SENSORS) if getattr(env, "tactile", False) else set())
    assert set(observation) == expected
    for key, value in observation.items():
        assert (value.shape, str(value.dtype)) == (SENSOR_OF_SHAPE[key].shape, SENSOR_OF_SHAPE[key].dtype), key
    assert observation["rgb_static"].std() > 10 and observation["rgb_gripper"].std() > 10
    np.testing.assert_array_equal(env.render(), observation["rgb_static"])
    assert env.renderer and isinstance(env.renderer, str)


def test_info_is_what_the_task_oracle_reads(env):
    _, info = env.reset(seed=1)
    assert set(info) == {"robot_info", "scene_info"}
    assert {"tcp_pos", "tcp_orn", "gripper_opening_width", "arm_joint_states", "gripper_action", "uid", "contacts"} <= set(
        info["robot_info"]
    )
    scene = info["scene_info"]
    assert set(scene["movable_objects"]) == {"block_red", "block_blue", "block_pink"}
    for block in scene["movable_objects"].values():
        assert {"current_pos", "current_orn", "contacts", "uid"} <= set(block)
        assert block["contacts"], "a block rests on something"
        assert all(contact[1] == block["uid"] for contact in block["contacts"])
    assert {name: set(value) for name, value in scene["lights"].items()} == {"lightbulb": {"logical_state"}, "led": {"logical_state"}}
    assert set(scene["doors"]) == {"base__slide", "base__drawer"}


class _ExactGripper(gymnasium.ActionWrapper):
    """Samples of the action space, made valid: the gripper knows open and closed alone."""

    def action(self, action):
        action[-1] = 1 if action[-1] >= 0 else -1
        return action


def test_gymnasium_finds_no_fault(make, exact_reset):
    env = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(_ExactGripper(env), skip_close_check=True)
    env.close()
    expected = ("different from the unwrapped version", "infinity", "symmetric and normalized", "not having a spec")
    assert not [str(warning.message) for warning in caught if not any(text in str(warning.message) for text in expected)]


# -- determinism


def test_same_seed_same_episode_in_a_used_environment(env, other, exact_reset):
    def episode(played, seed):
        start = played.reset(seed=seed)
        return [start, *_play(played, _actions(played, 12))]

    first = episode(env, 5)
    different = episode(env, 6)
    assert not np.array_equal(first[0][0]["scene_obs"], different[0][0]["scene_obs"])
    _assert_same(first, episode(env, 5))
    _assert_same(first, episode(other, 5))


def test_images_depend_on_seed_and_actions_alone(env, other, exact_reset):
    def last(played):
        played.reset(seed=7)
        _play(played, _actions(played, 5))
        return played.observe()

    first = last(env)
    env.step(_actions(env, 1)[0])
    env.observe()
    for again in (last(env), last(other)):
        _assert_same([(first, {})], [(again, {})])


def test_two_environments_do_not_influence_each_other(env, other, exact_reset):
    env.reset(seed=2)
    actions = _actions(env, 10)
    alone = _play(env, actions)
    env.reset(seed=2)
    other.reset(seed=3)
    together = []
    for action in actions:
        other.step(_actions(other, 1, seed=9)[0])
        together += _play(env, [action])
        other.observe()
    _assert_same(alone, together)


def test_the_callers_arrays_are_left_alone(env):
    state = env.reset(seed=1)[0]
    states = {key: state[key].copy() for key in ("robot_obs", "scene_obs")}
    action = _actions(env, 1)[0]
    kept_states, kept_action = {key: value.copy() for key, value in states.items()}, action.copy()
    observation = env.reset(options=states)[0]
    kept = observation["robot_obs"].copy()
    env.step(action)
    np.testing.assert_array_equal(action, kept_action)
    np.testing.assert_array_equal(observation["robot_obs"], kept)
    for key, value in states.items():
        np.testing.assert_array_equal(value, kept_states[key])


# -- snapshots


def test_a_snapshot_is_gone_on_from_exactly(env, other):
    if not hasattr(env, "snapshot"):
        pytest.skip("this environment offers no snapshots")
    env.reset(seed=11)
    actions = _actions(env, 24)
    _play(env, actions[:12])
    here, snapshot = (env.state(), env.info()), env.snapshot()
    onwards = _play(env, actions[12:])
    drawn = env.np_random.random()
    for restored in (env, other):
        observation, info = restored.restore(snapshot)
        _assert_same([here], [({key: observation[key] for key in here[0]}, info)])
        _assert_same(onwards, _play(restored, actions[12:]))
        assert restored.np_random.random() == drawn


# -- errors


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda action: action[:-1], r"shape \(\d,\), expected \(\d,\)"),
        (lambda action: np.r_[action, 1.0], r"shape \(\d,\), expected \(\d,\)"),
        (lambda action: action[None], r"shape \(1, \d\), expected \(\d,\)"),
        (lambda action: np.r_[np.nan, action[1:]], "NaN or infinite"),
        (lambda action: np.r_[np.inf, action[1:]], "NaN or infinite"),
        (lambda action: np.r_[1e300, action[1:].astype(float)], r"beyond 1000|leaves \[-1, 1\]"),
        (lambda action: np.r_[action[:-1], 0.5], r"exactly -1 \(close\) or \+1"),
        (lambda action: None, "expected real numbers"),
        (lambda action: "forward", "expected real numbers"),
        (lambda action: action.astype(str), "expected real numbers"),
        (lambda action: action.astype(complex), "dtype complex"),
        (lambda action: action > 0, "dtype bool"),
        (lambda action: {"action": action}, "expected real numbers"),
        (lambda action: [*action[:-1].tolist(), [1.0]], "no array of numbers"),
    ],
)
def test_a_bad_action_is_named_and_moves_nothing(env, change, message):
    before = env.reset(seed=0)[0]
    with pytest.raises(InvalidAction, match=message):
        env.step(change(_actions(env, 1)[0]))
    for key, value in env.state().items():
        np.testing.assert_array_equal(before[key], value)


def test_a_relative_action_out_of_range_is_named(make):
    env = make(action_space="relative")
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match=r"leaves \[-1, 1\]"):
        env.step([0, 0, 1.5, 0, 0, 0, 1])
    env.close()


@pytest.mark.parametrize("convert", [list, lambda action: action.astype(np.float16), lambda action: action.round().astype(int)])
def test_lists_integers_and_half_floats_are_actions_too(env, convert, exact_reset):
    env.reset(seed=0)
    action = convert(_actions(env, 1)[0])
    first = env.step(action)[0]["robot_obs"]
    env.reset(seed=0)
    np.testing.assert_array_equal(first, env.step(np.array(action, dtype=np.float64))[0]["robot_obs"])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"robot_obs": np.zeros(14)}, r"robot_obs has shape \(14,\), expected \(15,\)"),
        ({"scene_obs": np.zeros((24, 1))}, r"scene_obs has shape \(24, 1\), expected \(24,\)"),
        ({"scene_obs": np.full(24, np.nan)}, "scene_obs has a NaN"),
        ({"scene_obs": np.full(24, 0.5)}, r"expected 0 or 1"),
        ({"robot_obs": np.full(15, 1e300)}, "robot_obs has an entry beyond 1000"),
        ({"robot_obs": "home"}, "robot_obs is no array of numbers"),
        ({"robot_obs": [[1.0], [1.0, 2.0]]}, "robot_obs is no array of numbers"),
        ({"scene": np.zeros(24)}, "unknown reset option 'scene'"),
        ([1, 2], "reset options are a list"),
        ("neutral", "reset options are a str"),
    ],
)
def test_bad_reset_states_are_named_and_change_nothing(env, options, message):
    before = env.reset(seed=4)[0]
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)
    np.testing.assert_array_equal(before["scene_obs"], env.state()["scene_obs"])


@pytest.mark.parametrize("seed", [-1, 1.5, "zero", True])
def test_a_bad_seed_is_named(env, make, seed):
    with pytest.raises(ValueError, match="expected a non-negative integer"):
        env.reset(seed=seed)
    with pytest.raises(ValueError, match="expected a non-negative integer"):
        make(seed=seed)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"scene": "E"}, "unknown scene 'E'"),
        ({"scene": ["A"]}, r"unknown scene \['A'\]"),
        ({"observe": "allways"}, "did you mean 'always'"),
        ({"action_space": "relativ"}, "did you mean 'relative'"),
        ({"observe": None}, "observe=None is not one of always, on_demand"),
        ({"render_mode": "human"}, "render_mode='human' is not one of rgb_array"),
    ],
)
def test_unknown_options_are_named(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_missing_assets_are_named(make, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        make(assets=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="assets=5 is no path"):
        make(assets=5)
    with pytest.raises(FileNotFoundError, match="incomplete for scene [A-D]: no franka_panda") as incomplete:
        make(assets=tmp_path)
    assert "did you mean" not in str(incomplete.value)


def test_the_folder_above_the_assets_is_recognised(make, tmp_path):
    named = re.search(r"no (\S+) and", str(_refusal(make, tmp_path)))[1]
    file = tmp_path / "data" / named
    file.parent.mkdir(parents=True)
    file.touch()
    assert f"did you mean {tmp_path / 'data'}?" in str(_refusal(make, tmp_path))


def _refusal(make, folder):
    with pytest.raises(FileNotFoundError) as refused:
        make(assets=folder)
    return refused.value


def test_nothing_goes_before_a_reset_or_after_close(make):
    env = make()
    uses = (lambda: env.step(env.action_space.sample()), env.observe, env.state, env.info, env.render)
    for use in uses:
        with pytest.raises(ResetNeeded, match=r"reset\(\)"):
            use()
    env.close()
    env.close()
    for use in (*uses, env.reset):
        with pytest.raises(ClosedEnvironmentError, match="has been closed"):
            use()
