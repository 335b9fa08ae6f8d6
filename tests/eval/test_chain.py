"""The rules of one chain, in the real simulator."""

import numpy as np
import pytest

from envs.calvin import CalvinEnv
from envs.calvin.expert.policy import ExpertPolicy
from envs.calvin.language import validation_instruction
from envs.spec import InvalidAction
from eval.chain import Watcher, checked_chunk, run_chain, subtask_seed
from eval.protocol import load_instructions
from eval.sequences import long_horizon_sequences
from policies.simple import RandomPolicy, ZeroPolicy

INSTRUCTIONS = load_instructions()
CHAINS = long_horizon_sequences(4)


@pytest.fixture(scope="module")
def env():
    env = CalvinEnv(observe="on_demand")
    yield env
    env.close()


def run(env, policy, index=0, **options):
    return run_chain(env, policy, index, CHAINS[index], INSTRUCTIONS, **{"max_steps": 360, "seed": 0} | options)


def without_time(result):
    record = result.to_json()
    record.pop("seconds")
    for attempt in record["attempts"]:
        attempt.pop("seconds"), attempt.pop("policy_seconds")
    return record


class Chunks:
    """An expert that answers in chunks of ten: it plays its own actions, found by a first run, from a list."""

    name, requires = "chunks", frozenset()

    def __init__(self, actions):
        self.actions, self.asked = actions, 0

    def reset(self, instruction, *, task=None, seed=None):
        pass

    def infer(self, observation):
        start, self.asked = 10 * self.asked, self.asked + 1
        return {"actions": self.actions[start : start + 10]}


class Recorder(Watcher):
    def __init__(self):
        self.calls, self.actions = [], []

    def chain_begins(self, env, index, subtasks):
        self.calls.append("chain begins")

    def subtask_begins(self, position, attempt):
        self.calls.append(f"subtask {position} begins")

    def stepped(self, env, action, before, attempt):
        assert before.shape == (15,)
        self.actions.append(action)

    def subtask_ends(self, position, attempt):
        self.calls.append(f"subtask {position} ends {'well' if attempt.success else 'badly'}")

    def chain_ends(self, result):
        self.calls.append("chain ends")


def test_expert_solves_a_chain_and_the_watcher_sees_it_in_order(env):
    watcher = Recorder()
    result = run(env, ExpertPolicy(), watcher=watcher)
    assert (result.num_solved, result.error) == (5, None)
    assert result.steps == sum(a.steps for a in result.attempts) == len(watcher.actions)
    middle = [f"subtask {i} {what}" for i in range(5) for what in ("begins", "ends well")]
    assert watcher.calls == ["chain begins", *middle, "chain ends"]
    assert [a.instruction for a in result.attempts] == [validation_instruction(task) for task in CHAINS[0][1]]


def test_success_within_a_chunk_ends_the_subtask_and_drops_the_rest(env):
    watcher = Recorder()
    first = run(env, ExpertPolicy(), watcher=watcher).attempts[0]
    padded = np.concatenate([np.array(watcher.actions[: first.steps]), np.tile([0, 0, 0, 0, 0, 0, 1.0], (20, 1))])
    assert first.steps % 10, "the recorded success must fall inside a chunk"
    second = Recorder()
    again = run(env, Chunks(padded), watcher=second).attempts[0]
    assert (again.success, again.steps) == (True, first.steps)
    assert again.decisions == first.steps // 10 + 1


def test_first_failure_ends_the_chain_after_max_steps(env):
    result = run(env, ZeroPolicy(), max_steps=25)
    assert (result.num_solved, result.steps, len(result.attempts), result.error) == (0, 25, 1, None)
    assert result.attempts[0].happened == []


def test_chains_do_not_depend_on_those_before(env):
    alone = without_time(run(env, ExpertPolicy(), 2))
    policy = ExpertPolicy()
    run(env, policy, 1, max_steps=40)
    assert without_time(run(env, policy, 2)) == alone


def test_random_policy_is_seeded_by_seed_chain_and_subtask(env):
    def last_pose(seed):
        result = run(env, RandomPolicy(), max_steps=15, seed=seed)
        assert result.error is None
        return env.state()["robot_obs"]

    np.testing.assert_array_equal(last_pose(0), last_pose(0))
    assert not np.array_equal(last_pose(0), last_pose(1))
    assert len({subtask_seed(s, c, p) for s in range(3) for c in range(3) for p in range(3)}) == 27


class Broken(ZeroPolicy):
    def __init__(self, actions):
        self.actions, self.calls = actions, 0

    def infer(self, observation):
        self.calls += 1
        if self.calls < 3:
            return super().infer(observation)
        if isinstance(self.actions, Exception):
            raise self.actions
        return {"actions": self.actions}


@pytest.mark.parametrize(
    ("actions", "kind", "message"),
    [
        (np.full((10, 7), np.nan), "InvalidAction", "NaN"),
        (np.zeros((10, 6)), "InvalidAction", r"shape (6,)"),
        (np.zeros(7), "InvalidAction", r"shape (7,), expected (T, 7)"),
        (np.zeros((0, 7)), "InvalidAction", r"shape (0, 7)"),
        (RuntimeError("the decoder gave up"), "RuntimeError", "the decoder gave up"),
    ],
)
def test_a_broken_answer_is_an_error_of_the_chain_not_a_failure(env, actions, kind, message):
    result = run(env, Broken(actions))
    assert result.error["type"] == kind and message in result.error["message"]
    assert (result.error["subtask"], result.error["step"], result.steps) == (CHAINS[0][1][0], 2, 2)
    assert "Traceback" in result.error["traceback"]


def test_no_action_of_a_bad_chunk_is_executed():
    chunk = np.zeros((10, 7))
    chunk[:, -1] = 1
    assert checked_chunk({"actions": chunk}).shape == (10, 7)
    chunk[9, 0] = 1.5
    with pytest.raises(InvalidAction, match="leaves"):
        checked_chunk({"actions": chunk})
    with pytest.raises(InvalidAction, match="without 'actions'; it gave entropy"):
        checked_chunk({"entropy": 1})
