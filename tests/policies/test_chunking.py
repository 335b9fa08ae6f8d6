"""Chunks that are executed while the next is decided: they join without a jump, and lateness has a name."""

import threading
import time

import numpy as np
import pytest

import policies
from envs.calvin import CalvinEnv
from envs.spec import COMMITTED_ACTIONS, InvalidAction
from policies.base import Policy
from policies.chunking import JOIN_CORRELATION, ChunkedPolicy, ChunkingOptions, DecisionLate, check_committed, rejoin
from policies.emu3 import Emu3Policy

T = 10


class Chunks:
    """Answers chunk after chunk: x is 0.1 of the decision's number, y of the step within the chunk. delay_s: what it takes."""

    name, requires = "chunks", frozenset({"robot_obs"})

    def __init__(self, delay_s=0.0):
        self.delay_s, self.decisions, self.seen = delay_s, 0, []

    def reset(self, instruction, *, task=None, seed=None):
        self.decisions = 0

    def infer(self, observation):
        self.seen.append(observation)
        time.sleep(self.delay_s)
        self.decisions += 1
        actions = np.zeros((T, 7))
        actions[:, 0], actions[:, 1], actions[:, 6] = 0.1 * self.decisions, 0.01 * np.arange(T), 1
        return {"actions": actions, "entropy": [self.decisions]}


def observation(step=0):
    return {"robot_obs": np.r_[np.zeros(14), 1.0], "step": step}


def simulated(policy, steps=40, **options) -> tuple[np.ndarray, ChunkedPolicy]:
    """Execute so many steps in virtual time."""
    chunked = ChunkedPolicy(policy, ChunkingOptions(**options), realtime=False)
    chunked.reset("go")
    executed = []
    while len(executed) < steps:
        executed += list(chunked.infer(observation(len(executed)))["actions"])
    return np.array(executed[:steps]), chunked


def test_is_a_policy():
    assert isinstance(ChunkedPolicy(Chunks(), ChunkingOptions(ahead=2)), Policy)


def test_without_options_chunks_follow_one_another_whole():
    policy = Chunks()
    executed, _ = simulated(policy)
    np.testing.assert_allclose(executed[:, 0], 0.1 * (1 + np.arange(40) // T))
    assert [seen["step"] for seen in policy.seen] == [0, 10, 20, 30]
    assert not any(COMMITTED_ACTIONS in seen for seen in policy.seen)


def test_the_next_decision_sees_what_is_there_ahead_of_the_chunks_end_and_is_told_what_is_executed_meanwhile():
    policy = Chunks()
    executed, chunked = simulated(policy, ahead=3)
    assert [seen["step"] for seen in policy.seen][:4] == [0, 7, 14, 21]
    for seen in policy.seen[1:4]:
        np.testing.assert_array_equal(seen[COMMITTED_ACTIONS], executed[seen["step"] : seen["step"] + 3])
    counted = chunked.statistics()
    assert counted["dropped_deadlines"] == counted["joins_forced"] == 0 and counted["joins_bent"] >= 4
    assert counted["join_gap_mean"] == pytest.approx(0.12, abs=0.02)


def test_chunks_join_without_a_jump():
    executed, chunked = simulated(Chunks(), ahead=3)
    jumps = np.abs(np.diff(executed[:, 0]))
    # Each chunk differs from the last by 0.1 throughout and more where that was not made good yet; in one step (1 - correlation) of it is.
    assert max(chunked.gaps) < 0.13 and jumps.max() <= (1 - JOIN_CORRELATION) * max(chunked.gaps) + 1e-9
    plain, _ = simulated(Chunks())
    assert np.abs(np.diff(plain[:, 0])).max() == pytest.approx(0.1)


def test_rejoin_keeps_the_prefix_exactly_and_the_rest_in_range():
    random = np.random.default_rng(0)
    for n in (1, 4, 9):
        chunk, committed = random.uniform(-1, 1, (T, 7)), random.uniform(-1, 1, (n, 7))
        joined = rejoin(chunk, committed)
        np.testing.assert_array_equal(joined[:n], committed)
        assert np.abs(joined[:, :6]).max() <= 1
        np.testing.assert_array_equal(joined[n:, 6], chunk[n:, 6])
    same = random.uniform(-1, 1, (T, 7))
    np.testing.assert_allclose(rejoin(same, same[:4]), same)


def test_what_follows_the_prefix_is_the_likeliest_continuation():
    """The same as conditioning a Gaussian whose steps correlate on the gaps at all committed steps."""
    random, steps, n = np.random.default_rng(1), np.arange(T), 4
    chunk, committed = random.uniform(-0.2, 0.2, (T, 7)), random.uniform(-0.2, 0.2, (n, 7))
    covariance = JOIN_CORRELATION ** np.abs(steps[:, None] - steps)
    shift = covariance[n:, :n] @ np.linalg.solve(covariance[:n, :n], committed - chunk[:n])
    np.testing.assert_allclose(rejoin(chunk, committed)[n:, :6], (chunk[n:] + shift)[:, :6], atol=1e-12)


def test_temporal_ensembling_weighs_overlapping_chunks():
    executed, _ = simulated(Chunks(), steps=8, execute=2, ensemble=0.5)
    weights = np.exp(-0.5 * np.arange(3))
    assert executed[0, 0] == pytest.approx(0.1)
    assert executed[2, 0] == pytest.approx(np.average([0.1, 0.2], weights=weights[:2]))
    assert executed[5, 0] == pytest.approx(np.average([0.1, 0.2, 0.3], weights=weights))
    assert executed[5, 1] == pytest.approx(np.average([0.05, 0.03, 0.01], weights=weights))
    np.testing.assert_array_equal(executed[:, 6], 1)


def test_fewer_steps_than_the_chunk_has():
    policy = Chunks()
    executed, _ = simulated(policy, steps=20, execute=5, ahead=2)
    assert [seen["step"] for seen in policy.seen][:4] == [0, 3, 6, 9]
    assert np.isfinite(executed).all()


# -- in real time


class Gate(Chunks):
    """Answers the first decision at once, and each later one when it is let."""

    def __init__(self):
        super().__init__()
        self.open = threading.Event()

    def infer(self, seen):
        if self.decisions and not self.open.wait(20):
            raise AssertionError("never let")
        return super().infer(seen)


def started(policy, **options) -> ChunkedPolicy:
    """Its first chunk executed, its second asked for."""
    chunked = ChunkedPolicy(policy, ChunkingOptions(ahead=3, **options))
    chunked.reset("go")
    assert len(chunked.infer(observation())["actions"]) == 7
    assert len(chunked.infer(observation())["actions"]) == 3
    return chunked


def test_hold_keeps_the_pose_until_the_decision_is_there():
    policy = Gate()
    chunked = started(policy, late="hold")
    for _ in range(4):
        np.testing.assert_array_equal(chunked.infer(observation())["actions"], [[0, 0, 0, 0, 0, 0, 1]])
    policy.open.set()
    time.sleep(0.1)
    answer = chunked.infer(observation())
    assert answer["actions"].shape == (4, 7) and answer["entropy"] == [2]
    second = np.c_[np.full(T, 0.2), 0.01 * np.arange(T), np.zeros((T, 4)), np.ones(T)]
    whole = rejoin(second, policy.seen[1][COMMITTED_ACTIONS])
    np.testing.assert_allclose(answer["actions"], whole[3:7]), "nothing of the plan is left out"
    counted = chunked.statistics()
    assert (counted["dropped_deadlines"], counted["held_steps"], counted["decisions"], counted["late"]) == (1, 4, 2, "hold")
    assert answer["age_s"] > 0.1


@pytest.mark.parametrize("realtime", [True, False])
def test_the_policy_computes_ahead_while_the_arm_executes(realtime):
    """Once a decision; a reset waits for its end, and where time stands still meanwhile nothing is gained and nothing asked."""
    policy, going, ended = Chunks(), threading.Event(), []

    def prepare():
        going.set()
        time.sleep(0.1)
        ended.append(policy.decisions)

    policy.prepare = prepare
    chunked = ChunkedPolicy(policy, ChunkingOptions(ahead=3), realtime=realtime)
    chunked.reset("go")
    chunked.infer(observation())
    assert going.wait(5 if realtime else 0.2) == realtime
    chunked.reset("go elsewhere")
    assert ended == ([1] if realtime else [])
    chunked.close()


def test_what_fails_ahead_is_raised_by_the_next_decision():
    """And not by silence: the thread that decides lives on, also after a reset."""
    policy, going = Chunks(), threading.Event()

    def prepare():
        going.set()
        raise RuntimeError("no memory is left")

    policy.prepare = prepare
    chunked = ChunkedPolicy(policy, ChunkingOptions(ahead=3))
    for _ in range(2):
        going.clear()
        chunked.reset("go")
        chunked.infer(observation())
        assert going.wait(5)
        chunked.infer(observation())  # what is left of the first chunk, while the second is asked for
        with pytest.raises(RuntimeError, match="no memory is left"):
            for _ in range(100):
                chunked.infer(observation())
                time.sleep(0.01)
    chunked.close()


def test_wait_gives_no_command_and_stop_ends_the_run():
    policy = Gate()
    chunked = started(policy, late="wait")
    threading.Timer(0.2, policy.open.set).start()
    began = time.monotonic()
    assert chunked.infer(observation())["entropy"] == [2] and time.monotonic() - began > 0.15
    assert chunked.statistics()["dropped_deadlines"] == 1
    policy = Gate()
    with pytest.raises(DecisionLate, match=r"not there after its 3 control steps \(chunking.late=stop\)"):
        started(policy, late="stop").infer(observation())
    policy.open.set()


@pytest.mark.parametrize("late", ["hold", "wait"])
def test_a_policy_that_hangs_ends_the_run(late):
    policy = Gate()
    chunked = started(policy, late=late, give_up_s=0.3)
    with pytest.raises(DecisionLate, match=r"no decision for 0.3 s \(chunking.give_up_s\); is the policy still there"):
        for _ in range(100):
            chunked.infer(observation())
            time.sleep(0.02)
    with pytest.raises(DecisionLate):
        chunked.reset("try again"), "a policy is not asked while it still thinks"
    policy.open.set()
    time.sleep(0.1)
    chunked.reset("try again")


def test_a_decision_for_what_is_over_is_dropped():
    policy = Gate()
    chunked = started(policy)
    threading.Timer(0.1, policy.open.set).start()
    chunked.reset("something else")
    assert chunked.infer(observation())["actions"][0, 0] == pytest.approx(0.1), "the first decision of the new subtask"
    chunked.begin_chain()
    assert chunked.statistics()["decisions"] == 0 and chunked.statistics()["decision_ms_p50"] is None


def test_what_the_policy_raises_is_raised():
    class Broken(Chunks):
        def infer(self, seen):
            raise ZeroDivisionError("no")

    chunked = ChunkedPolicy(Broken(), ChunkingOptions(ahead=1))
    chunked.reset("go")
    with pytest.raises(ZeroDivisionError):
        chunked.infer(observation())


def test_steps_reserved_follow_from_what_decisions_take():
    quick, slow = (ChunkedPolicy(Chunks(delay), ChunkingOptions(ahead=None)) for delay in (0.0, 0.08))
    for chunked in (quick, slow):
        chunked.reset("go")
        for _ in range(6):
            chunked.infer(observation())
            time.sleep(0.1)
    assert quick._ahead() == 1 and 3 <= slow._ahead() <= 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ahead": -1}, "chunking.ahead=-1"),
        ({"execute": 0}, "chunking.execute=0"),
        ({"ensemble": -0.1}, "chunking.ensemble=-0.1"),
        ({"late": "hope"}, "chunking.late=hope is not one of hold, wait, stop"),
        ({"give_up_s": 0.0}, "chunking.give_up_s=0.0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ChunkingOptions(**options)


def test_what_cannot_be_done_is_said():
    with pytest.raises(ValueError, match="give a number of control steps"):
        ChunkedPolicy(Chunks(), ChunkingOptions(ahead=None), realtime=False)
    with pytest.raises(InvalidAction, match="expected \\(T, 7\\) with T > 10"):
        simulated(Chunks(), ahead=10)
    for wrong in (np.zeros((10, 7)), np.zeros((2, 6)), np.full((2, 7), np.nan)):
        with pytest.raises(InvalidAction, match=r"expected finite \(n, 7\) with 1 <= n < 10"):
            check_committed(wrong, 10)


# -- the model writes a chunk that goes on from what is committed


def pictures(seed):
    random = np.random.default_rng(seed)
    shapes = {"rgb_static": (200, 200, 3), "rgb_gripper": (84, 84, 3)}
    return {name: random.integers(0, 256, shape, dtype=np.uint8) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def seen():
    """What the cameras see where a chain begins."""
    env = CalvinEnv(observe="on_demand")
    env.reset(seed=0)
    yield env.observe()
    env.close()


def test_emu3_writes_ids_that_go_on_from_the_committed_actions(seen):
    """The shipped policy: the ids themselves heed the prefix, and what is executed begins with it exactly."""
    policy = Emu3Policy(policies.CHECKPOINTS / policies.SHIPPED)
    tokenizer, normalizer = policy.checkpoint.action_tokenizer, policy.checkpoint.normalizer
    off = {"free": [], "forced": []}
    for instruction in ("open the drawer", "turn on the led light", "push the red block to the left"):
        for motion in ([0.5, -0.3, 0, 0, 0, 0, 1.0], [-0.4, 0.2, 0.3, 0, 0, 0.2, -1.0]):
            committed = np.tile(motion, (3, 1))
            for name, told in (("free", {}), ("forced", {COMMITTED_ACTIONS: committed})):
                policy.reset(instruction)
                answer = policy.infer(seen | told)
                ids = normalizer.denormalize(tokenizer.decode([answer["token_ids"]])[0])
                off[name].append(np.abs(ids[:3, :6] - committed[:, :6]).mean())
            np.testing.assert_array_equal(answer["actions"][:3], committed.astype(np.float32))
            assert answer["committed"] == 3 and np.isfinite(answer["join_gap"])
    assert np.mean(off["forced"]) < 0.5 * np.mean(off["free"]), off


def test_emu3_refuses_a_prefix_that_leaves_nothing_to_decide(tiny_checkpoint):
    policy = Emu3Policy(tiny_checkpoint)
    policy.reset("go left")
    assert policy.infer(pictures(0))["committed"] == 0
    with pytest.raises(InvalidAction, match="expected finite"):
        policy.infer(pictures(0) | {COMMITTED_ACTIONS: np.zeros((10, 7))})


def test_emu3_answers_sessions_with_and_without_a_prefix_together(tiny_checkpoint):
    policy = Emu3Policy(tiny_checkpoint)
    sessions = policy.sessions(2)
    for session in sessions:
        session.reset("go right")
    committed = np.tile([0.2, 0.1, 0, 0, 0, 0, -1.0], (2, 1))
    plain, forced = policy.infer_many(sessions, [pictures(1), pictures(1) | {COMMITTED_ACTIONS: committed}])
    sessions[0].reset("go right")
    np.testing.assert_array_equal(sessions[0].infer(pictures(1))["actions"], plain["actions"])
    np.testing.assert_array_equal(forced["actions"][:2], committed.astype(np.float32))
