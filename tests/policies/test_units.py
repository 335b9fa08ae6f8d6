"""What an action of 1 is travels from a recording to the policy that acts, and an arm of other units converts it or refuses by name."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_tokens
from served import serving

import policies
from emu3_vla import checkpoint
from emu3_vla.data.episodes import EpisodeStore
from emu3_vla.data.tokenize import Sources
from emu3_vla.data.tokens import MANIFEST, TokenStore
from emu3_vla.training.initial import ForeignTokens, new_model
from emu3_vla.training.source import open_source
from envs.spec import COMMITTED_ACTIONS, ActionUnits
from eval.environment import EnvConfig, load_policy
from policies.client import RemotePolicy
from policies.units import ActionUnitsMismatch, Converted, in_units

SMALL = ActionUnits(position_unit_m=0.005, rotation_unit_rad=0.025)
PICTURES = {"rgb_static": np.zeros((200, 200, 3), np.uint8), "rgb_gripper": np.zeros((84, 84, 3), np.uint8)}


class Steps:
    """Answers full steps in its own units, and keeps what it was told."""

    name, requires = "steps", frozenset({"robot_obs"})

    def __init__(self, units=SMALL):
        self.action_units, self.seen, self.told = units, [], []

    def reset(self, instruction, *, task=None, seed=None):
        self.told.append((instruction, seed))

    def begin_chain(self):
        self.told.append("begin_chain")

    def executed(self, action):
        self.told.append(action)

    def infer(self, observation):
        self.seen.append(observation)
        return {"actions": np.array([[1, -1, 0.5, 1, -1, 0.5, 1], [0, 0, 0, 0, 0, 0, -1]], np.float32), "token_ids": [3]}


def make_store(folder, **about):
    return EpisodeStore.create(folder, {"wordings": {}, **about})


@pytest.fixture(scope="module")
def small_tokens(tiny_store, tmp_path_factory):
    """The tiny store as if its recordings had been of small steps."""
    import shutil

    folder = tmp_path_factory.mktemp("units") / "tokens"
    shutil.copytree(tiny_store.path, folder)
    record = json.loads((folder / MANIFEST).read_text())
    record["metadata"]["actions"] = dataclasses.asdict(SMALL)
    (folder / MANIFEST).write_text(json.dumps(record))
    return TokenStore.open(folder)


@pytest.fixture(scope="module")
def small_policy(small_tokens, tmp_path_factory):
    return tiny_tokens.train(small_tokens.path, tmp_path_factory.mktemp("small"), steps=2)


def test_steps_are_converted_both_ways():
    given = Steps()
    policy = in_units(given)
    policy.reset("go", seed=3)
    policy.begin_chain()
    committed = np.array([[0.25, 0, 0, 0.5, 0, 0, 1.0]])
    answer = policy.infer({"robot_obs": np.zeros(15), COMMITTED_ACTIONS: committed})
    np.testing.assert_allclose(answer["actions"][0], [0.25, -0.25, 0.125, 0.5, -0.5, 0.25, 1], rtol=1e-6)
    assert answer["actions"].dtype == np.float32 and answer["actions"][1, 6] == -1 and answer["token_ids"] == [3]
    np.testing.assert_allclose(given.seen[0][COMMITTED_ACTIONS], [[1, 0, 0, 1, 0, 0, 1]])
    policy.executed(np.array([0.25, 0, 0, 0, 0, 0.5, -1.0]))
    np.testing.assert_allclose(given.told.pop(), [1, 0, 0, 0, 0, 1, -1])
    assert given.told == [("go", 3), "begin_chain"] and policy.action_units == ActionUnits()


def test_equal_units_change_nothing_and_batches_do_not_pass_by():
    policy = policies.load("zero")
    assert in_units(policy) is policy
    given = Steps()
    given.sessions = given.infer_many = lambda *_: pytest.fail("not converted")
    assert not hasattr(in_units(given), "infer_many") and not hasattr(in_units(given), "sessions")


@pytest.mark.parametrize(
    "units,said",
    [
        (ActionUnits(kind="joints"), "steps of joints of 0.05 rad at 30 Hz, and the arm takes steps of the tool.* that moves joints"),
        (ActionUnits(rate_hz=10), "at 10 Hz, and the arm takes .* would be 3 times as fast as it was shown; train on .* 30 Hz"),
        (ActionUnits(position_unit_m=0.05), "of policy steps are steps of the tool of 0.05 m .* convert .* with position_unit_m=0.02"),
        (ActionUnits(position_unit_m=0.01, rotation_unit_rad=0.1), "of 0.01 m and 0.1 rad .* rotation_unit_rad=0.05 or less"),
    ],
)
def test_what_an_arm_cannot_do_is_refused_by_name(units, said):
    with pytest.raises(ActionUnitsMismatch, match=said):
        in_units(Steps(units))


@pytest.mark.parametrize("values", [{"kind": "wheels"}, {"position_unit_m": 0}, {"rotation_unit_rad": float("inf")}, {"rate_hz": "30"}])
def test_units_that_cannot_be_are_refused(values):
    with pytest.raises(ValueError, match="actions"):
        ActionUnits(**values)


def test_stores_of_different_units_are_not_tokenized_together(tmp_path):
    make_store(tmp_path / "usual")
    make_store(tmp_path / "usual_too", rate_hz=30.0)
    make_store(tmp_path / "small", actions={"kind": "tool", "position_unit_m": 0.005, "rotation_unit_rad": 0.025}, rate_hz=30)
    make_store(tmp_path / "slow", rate_hz=10)
    assert Sources([tmp_path / "usual", tmp_path / "usual_too"]).units() == ActionUnits()
    assert Sources([tmp_path / "small"]).units() == SMALL
    for other, said in (("small", "of 0.005 m and 0.025 rad at 30 Hz"), ("slow", "at 10 Hz")):
        with pytest.raises(ValueError, match=f"the actions of .*{other} are .*{said}, those of .*usual .*0.02 m .*convert them"):
            Sources([tmp_path / "usual", tmp_path / other]).units()


def test_a_checkpoint_says_what_its_recordings_did(small_tokens, small_policy, tiny_checkpoint, tmp_path):
    assert checkpoint.read_policy(small_policy / checkpoint.POLICY).actions == SMALL
    assert policies.load(small_policy).action_units == SMALL
    acting = load_policy(str(small_policy), EnvConfig())
    assert isinstance(acting, Converted)
    acting.reset("go left", seed=0)
    alone = policies.load(small_policy)
    alone.reset("go left", seed=0)
    factor = np.r_[np.repeat([0.25, 0.5], 3), 1]
    np.testing.assert_allclose(acting.infer(PICTURES)["actions"], alone.infer(PICTURES)["actions"] * factor, rtol=1e-6)
    # A checkpoint of before there were other units has none in its policy.yaml.
    assert checkpoint.read_policy(policies.CHECKPOINTS / policies.SHIPPED / checkpoint.POLICY).actions == ActionUnits()
    config = tiny_tokens.config(small_tokens.path, tmp_path, init_from=str(tiny_checkpoint))
    with pytest.raises(ForeignTokens, match="actions of init_from=.* 0.02 m .*, those of the token store .* 0.005 m .*convert"):
        new_model(config, open_source(config.tokens, 4))


def test_a_served_policy_says_its_units():
    with serving(Steps()) as server:
        assert server.metadata["actions"] == {"kind": "tool", "position_unit_m": 0.005, "rotation_unit_rad": 0.025, "rate_hz": 30}
        remote = RemotePolicy(server.address)
        assert remote.action_units == SMALL
        remote.close()
        served = load_policy(server.address, EnvConfig())
        served.reset("go")
        np.testing.assert_allclose(served.infer({"robot_obs": np.zeros(15)})["actions"][0, :3], [0.25, -0.25, 0.125])
        served.close()
