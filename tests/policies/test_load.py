"""Finding policies by name or folder, and the policies without a model."""

import numpy as np
import pytest

import policies
from envs.spec import check_action
from policies.base import Policy
from policies.simple import RandomPolicy, ReplayEnded, ReplayPolicy, ZeroPolicy


def actions_of(policy, decisions=3, **reset):
    policy.reset("open the drawer", **reset)
    return np.concatenate([policy.infer({})["actions"] for _ in range(decisions)])


@pytest.mark.parametrize("name", ["zero", "random"])
def test_simple_policies_are_policies_with_valid_actions(name):
    policy = policies.load(name)
    assert isinstance(policy, Policy) and policy.name == name
    for action in actions_of(policy, seed=0):
        check_action(action)


def test_zero_never_moves():
    assert not actions_of(ZeroPolicy())[:, :6].any()


def test_random_is_a_function_of_the_seed():
    np.testing.assert_array_equal(actions_of(RandomPolicy(), seed=5), actions_of(RandomPolicy(), seed=5))
    assert not np.array_equal(actions_of(RandomPolicy(), seed=5), actions_of(RandomPolicy(), seed=6))


def test_expert_loads_by_name():
    policy = policies.load("expert", scene="D")
    assert isinstance(policy, Policy)
    assert policy.requires == {"robot_obs", "scene_obs"}


def test_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match=r"'expret' is no known name and no folder; did you mean 'expert'\?"):
        policies.load("expret")
    with pytest.raises(ValueError, match="known names: expert, zero, random, replay"):
        policies.load("qqqqqqqq")


def test_a_class_of_ones_own_loads_by_its_dotted_name():
    assert isinstance(policies.load("policies.simple:RandomPolicy", chunk=3), RandomPolicy)
    with pytest.raises(ValueError, match="no module 'no_such_module'"):
        policies.load("no_such_module.inner:Policy")
    with pytest.raises(ValueError, match="has no attribute 'Rondom'"):
        policies.load("policies.simple:Rondom")


def test_unknown_option_lists_the_options():
    with pytest.raises(ValueError, match="policy 'random': got an unexpected keyword argument 'chunks'; its options: chunk"):
        policies.load("random", chunks=3)
    with pytest.raises(ValueError, match="policy 'zero': .*; its options: none"):
        policies.load("zero", speed=1)
    with pytest.raises(ValueError, match="chunk=0"):
        policies.load("random", chunk=0)


def test_folder_without_parts_says_which(tmp_path):
    with pytest.raises(ValueError, match=r"policy.yaml is missing \(and model, "):
        policies.load(tmp_path)
    for name in policies.CHECKPOINT_PARTS:
        (tmp_path / name).touch()
    (tmp_path / "normalizer.json").unlink()
    with pytest.raises(ValueError, match="normalizer.json is missing; a checkpoint folder is"):
        policies.load(tmp_path)


@pytest.mark.parametrize("policy", [ZeroPolicy(), RandomPolicy()])
@pytest.mark.parametrize("instruction", ["", "  "])
def test_empty_instruction_is_refused(policy, instruction):
    with pytest.raises(ValueError, match="instruction is empty"):
        policy.reset(instruction)


def test_replay_plays_the_tasks_actions_and_then_says_that_it_ended(tmp_path):
    recorded = np.random.default_rng(0).uniform(-1, 1, (3, 7)).astype(np.float32)
    recorded[:, -1] = -1
    np.savez(tmp_path / "a.npz", open_drawer=recorded, actions=recorded[:1])
    policy = ReplayPolicy(tmp_path / "a.npz")
    np.testing.assert_array_equal(actions_of(policy, task="open_drawer"), recorded)
    with pytest.raises(ReplayEnded, match="all 3 recorded actions"):
        policy.infer({})
    np.testing.assert_array_equal(actions_of(policy, 1, task="close_drawer"), recorded[:1])


def test_unusable_replays_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no file"):
        policies.load("replay", path=tmp_path / "none.npz")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match="is not a whole .npz file"):
        ReplayPolicy(tmp_path / "cut.npz")
    np.savez(tmp_path / "flat.npz", open_drawer=np.zeros(7))
    with pytest.raises(ValueError, match=r"'open_drawer' has shape \(7,\)"):
        ReplayPolicy(tmp_path / "flat.npz")
    np.savez(tmp_path / "nan.npz", open_drawer=np.full((2, 7), np.nan))
    with pytest.raises(ValueError, match="NaN"):
        ReplayPolicy(tmp_path / "nan.npz")
    np.savez(tmp_path / "other.npz", open_drawer=np.ones((2, 7)))
    with pytest.raises(ValueError, match="no recording of 'close_drawer'"):
        ReplayPolicy(tmp_path / "other.npz").reset("shut it", task="close_drawer")
