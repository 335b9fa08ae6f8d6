"""The Emu3 policy: its contract, its cache against computing everything anew, its refusals."""

import numpy as np
import pytest
import tiny_tokens
import torch

from emu3_vla.checkpoint import load
from emu3_vla.documents import ActionChunk, Image, Text, collate, length_of
from envs.spec import COMMITTED_ACTIONS, check_action
from policies import CHECKPOINTS, SHIPPED
from policies.base import Policy
from policies.emu3 import Emu3Policy

SHIPPED_FOLDER = CHECKPOINTS / SHIPPED


def _observation(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "rgb_static": random.integers(0, 256, (200, 200, 3), dtype=np.uint8),
        "rgb_gripper": random.integers(0, 256, (84, 84, 3), dtype=np.uint8),
    }


def _felt_observation(seed: int) -> dict[str, np.ndarray]:
    """What the shipped policy asks for: the arm's state too."""
    return _observation(seed) | {"robot_obs": np.random.default_rng(seed).uniform(-0.3, 0.3, 15)}


def _watch_states(policy: Emu3Policy) -> list[torch.Tensor]:
    """The trunk's states after "begin of action", as decisions come to be made."""
    seen, write = [], policy._writer.write_each
    policy._writer.write_each = lambda sequences, chunks, states, *rest: (
        seen.extend(rows[0] for rows in states) or write(sequences, chunks, states, *rest)
    )
    return seen


@pytest.fixture
def policy(tiny_checkpoint) -> Emu3Policy:
    return Emu3Policy(tiny_checkpoint)


def test_is_a_policy(policy):
    assert isinstance(policy, Policy)
    assert policy.requires == {"rgb_static", "rgb_gripper"}
    policy.reset("go left")
    decision = policy.infer(_observation(0))
    assert decision["actions"].shape == (10, 7) and decision["actions"].dtype == np.float32
    for action in decision["actions"]:
        check_action(action)
    assert decision["timing_s"].keys() == {"encode", "past", "prefill", "decode", "detokenize"}
    assert len(decision["token_ids"]) == len(decision["entropy"]) > 0


def test_actions_are_what_the_ids_say(policy):
    policy.reset("go left")
    decision = policy.infer(_observation(0))
    tokenizer, normalizer = policy.checkpoint.action_tokenizer, policy.checkpoint.normalizer
    exact = normalizer.denormalize(tokenizer.decode([decision["token_ids"]], horizon=10, action_dim=7)[0])
    np.testing.assert_allclose(decision["actions"][:, :6], exact[:, :6].clip(-1, 1), atol=1e-6)
    assert decision["clipped"] == (np.abs(exact[:, :6]) > 1).sum()
    np.testing.assert_array_equal(decision["actions"][:, 6], np.where(exact[:, 6] >= 0, 1, -1))


@pytest.mark.parametrize("history", [0, 1, 2])
def test_cache_gives_what_the_whole_document_gives(tiny_checkpoint, history):
    """Over more chunks than are shown, the state after "begin of action" is the one computed from the document alone."""
    policy = Emu3Policy(tiny_checkpoint, history=history)
    seen = _watch_states(policy)
    reference = load(tiny_checkpoint, dtype=torch.float32)
    policy.reset("go left")
    past = []
    for step in range(5):
        images = policy._alone.look(_observation(step))
        decision = policy.infer(_observation(step))
        shown = past[len(past) - history :] if history else []
        expected = _state(reference, [Text(reference.text_tokenizer.encode("go left")), *sum(shown, []), *images])
        torch.testing.assert_close(seen[-1], expected, atol=2e-4, rtol=1e-3)
        past.append([*images, ActionChunk(decision["token_ids"])])


def test_what_is_read_ahead_changes_no_bit(policy):
    """The past is in the cache before it is asked for, and ids, their entropy and probability are what they would have been."""
    decided = []
    for ahead in (False, True):
        policy.reset("go left")
        for step in range(5):
            if ahead:
                policy.prepare()
                assert policy._alone.past_is_read
            decision = policy.infer(_observation(step))
            decided.append((decision["token_ids"], decision["entropy"], decision["probability"]))
            assert not policy._alone.past_is_read
    assert decided[:5] == decided[5:]
    policy.reset("go right")
    policy.prepare()
    policy.reset("go left")
    assert policy.infer(_observation(0))["token_ids"] == decided[0][0]


def test_the_state_of_the_arm_stands_before_the_actions(tmp_path):
    """A policy that was trained with it demands it, and decides on it; what the cache holds is what the document gives."""
    store = tiny_tokens.tiny_store(tmp_path / "tokens", shards=2, episodes_per_shard=2, felt=True)
    folder = tiny_tokens.train(store.path, tmp_path / "run", steps=2, validation_fraction=0.5)
    policy, reference = Emu3Policy(folder, history=1), load(folder, dtype=torch.float32)
    assert policy.requires == {"rgb_static", "rgb_gripper", "robot_obs"}
    seen = _watch_states(policy)
    policy.reset("go left")
    with pytest.raises(ValueError, match="has no 'robot_obs'"):
        policy.infer(_observation(0))
    past, text = [], Text(reference.text_tokenizer.encode("go left"))
    for step in range(3):
        looked = policy.look(_observation(step) | {"robot_obs": tiny_tokens.state_of(step)})
        assert [type(part) for part in looked] == [Image, Image, Text] and len(looked[-1].ids) == 2
        decision = policy.infer(_observation(step) | {"robot_obs": tiny_tokens.state_of(step)})
        expected = _state(reference, [text, *past, *looked])
        torch.testing.assert_close(seen[-1], expected, atol=2e-4, rtol=1e-3)
        past = [*looked, ActionChunk(decision["token_ids"])]
    before = policy.look(_observation(0) | {"robot_obs": tiny_tokens.state_of(0)})[-1].ids
    assert before != policy.look(_observation(0) | {"robot_obs": tiny_tokens.state_of(3)})[-1].ids


def test_a_policy_says_what_it_sees_before_it_acts(tmp_path):
    """The words are in the document before the actions, and in what is remembered; guesses from the last look change nothing."""
    store = tiny_tokens.tiny_store(tmp_path / "tokens", shards=2, episodes_per_shard=2, felt=True)
    folder = tiny_tokens.train(store.path, tmp_path / "run", steps=2, validation_fraction=0.5, scene_fraction=0.5)
    policy, reference = Emu3Policy(folder, history=1), load(folder, dtype=torch.float32)
    seen = _watch_states(policy)
    policy.reset("go left")
    past, text = [], Text(reference.text_tokenizer.encode("go left"))
    for step in range(3):
        observation = _observation(step) | {"robot_obs": tiny_tokens.state_of(step)}
        looked = policy.look(observation)
        decision = policy.infer(observation)
        assert list(decision["scene"]) == ["speed", "missing", "odd"] and "describe" in decision["timing_s"]
        said = Text(policy.scenes.ids(tiny_tokens.SCENE.numbers(list(decision["scene"].values()))))
        expected = _state(reference, [text, *past, *looked, said])
        torch.testing.assert_close(seen[-1], expected, atol=2e-4, rtol=1e-3)
        past = [*looked, said, ActionChunk(decision["token_ids"])]


@torch.no_grad()
def _state(reference, document: list) -> torch.Tensor:
    document = [*document, ActionChunk([0])]
    states = reference.model.states(collate([document], reference.vocabulary))
    return states[length_of(document, reference.vocabulary) - 3]  # before the id and end of chunk: "begin of action"


def test_reset_forgets(policy):
    policy.reset("go left")
    first = [policy.infer(_observation(step)) for step in range(3)]
    policy.reset("go right")
    policy.infer(_observation(9))
    policy.reset("go left")
    again = [policy.infer(_observation(step)) for step in range(3)]
    assert [d["token_ids"] for d in first] == [d["token_ids"] for d in again]


def test_drawing_is_seeded_by_reset(tiny_checkpoint):
    policy, drawn = Emu3Policy(tiny_checkpoint, temperature=1.5), []
    for seed in (5, 5, 6):
        policy.reset("go left", seed=seed)
        drawn.append([policy.infer(_observation(step))["token_ids"] for step in range(2)])
    assert drawn[0] == drawn[1] != drawn[2]


def test_looks_and_listens(policy):
    """Neither the pictures nor the instruction are ignored."""
    black, white = ({name: np.full_like(image, value) for name, image in _observation(0).items()} for value in (0, 255))
    policy.reset("go left")
    codes = [policy._alone.look(observation)[0].codes for observation in (black, white)]
    assert not np.array_equal(*codes), "the tiny tokenizer tells black from white"
    states = _watch_states(policy)
    for instruction, observation in (("go left", black), ("go right", black), ("go left", white)):
        policy.reset(instruction)
        policy.infer(observation)
    assert not torch.allclose(states[0], states[1]) and not torch.allclose(states[0], states[2])


def test_refusals(tiny_checkpoint, policy):
    with pytest.raises(ValueError, match="infer was called before reset"):
        policy.infer(_observation(0))
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="instruction is empty"):
            policy.reset(empty)
    with pytest.raises(ValueError, match="text ids, expected at most 256; shorten it"):
        policy.reset("Ж" * 300)
    policy.reset("go left")
    with pytest.raises(ValueError, match="no 'rgb_gripper', only rgb_static; this policy requires it"):
        policy.infer({"rgb_static": _observation(0)["rgb_static"]})
    with pytest.raises(ValueError, match="expected uint8"):
        policy.infer(_observation(0) | {"rgb_static": np.zeros((200, 200, 3), np.float32)})
    for options, message in (
        ({"history": 3}, "history is 3, expected 0 to 2"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of float32, bfloat16"),
        ({"threads": 0}, "threads is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Emu3Policy(tiny_checkpoint, **options)


def _decide(sessions, policy, rounds: int) -> list[list[list[int]]]:
    """Token ids of every session, round by round, each seeing pictures of its own."""
    ids = []
    for step in range(rounds):
        answers = policy.infer_many(sessions, [_observation(100 * number + step) for number in range(len(sessions))])
        ids.append([answer["token_ids"] for answer in answers])
    return ids


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_sessions_answer_as_each_would_alone(tiny_checkpoint, temperature, workers):
    policy = Emu3Policy(tiny_checkpoint, temperature=temperature, workers=workers)
    sessions = policy.sessions(5)
    for number, session in enumerate(sessions):
        session.reset("go left" if number % 2 else "go right", seed=number)
    together = _decide(sessions, policy, rounds=4)
    for number, session in enumerate(policy.sessions(5)):
        assert isinstance(session, Policy)
        session.reset("go left" if number % 2 else "go right", seed=number)
        alone = [session.infer(_observation(100 * number + step))["token_ids"] for step in range(4)]
        assert alone == [ids[number] for ids in together]


@pytest.mark.parametrize("workers", [1, 2])
def test_not_a_bit_of_an_answer_depends_on_who_else_is_asked(workers):
    """Of the shipped policy, whose products are large enough for a CPU to choose among its ways of summing."""
    policy = Emu3Policy(SHIPPED_FOLDER, workers=workers)
    for together in (2, 5):
        sessions, (alone,) = policy.sessions(together), policy.sessions(1)
        for number, session in enumerate(sessions):
            session.reset("open the drawer" if number % 2 else "turn on the led")
        alone.reset("open the drawer" if (together - 1) % 2 else "turn on the led")
        for step in range(2):
            answers = policy.infer_many(sessions, [_felt_observation(10 * number + step) for number in range(together)])
            own = alone.infer(_felt_observation(10 * (together - 1) + step))
            assert own["token_ids"] == answers[-1]["token_ids"] and own["entropy"] == answers[-1]["entropy"]
            assert own["probability"] == answers[-1]["probability"]


def test_guesses_of_an_int8_draft_change_no_answer(tiny_checkpoint):
    """Alone and together, and with the first actions committed."""
    pytest.importorskip("numba")
    plain, drafted = Emu3Policy(tiny_checkpoint), Emu3Policy(tiny_checkpoint, int8_draft=True)
    answers = []
    for policy in (plain, drafted):
        sessions = policy.sessions(3)
        for session in sessions:
            session.reset("go left")
        policy.reset("go left")
        alone = [policy.infer(_observation(step))["token_ids"] for step in range(4)]
        ahead = policy.infer(_observation(9) | {COMMITTED_ACTIONS: np.zeros((2, 7), np.float32)})["token_ids"]
        answers.append((alone, ahead, _decide(sessions, policy, rounds=3)))
    assert answers[0] == answers[1]


def test_a_lossy_decision_is_remembered_as_it_was_made(tiny_checkpoint):
    """After it the next prompt is what a policy reads that was told of it."""
    with pytest.raises(ValueError, match="lossy is 0, expected at least 1 round"):
        Emu3Policy(tiny_checkpoint, lossy=0)
    policy = Emu3Policy(tiny_checkpoint, lossy=1)
    policy.reset("go left")
    for step in range(3):
        answer = policy.infer(_observation(step))
        assert answer["actions"].shape == (10, 7)
        assert policy.last_chunk[-1].ids == answer["token_ids"]
    session = policy._alone
    fresh = policy.new_sequence()
    past = torch.cat([session._instruction, *session._past])
    session.policy.read_past([session])
    fresh.extend(past)
    assert session.sequence.length == fresh.length
    torch.testing.assert_close(session.sequence.extend(past[:1]), fresh.extend(past[:1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_that_fails_leaves_every_session_as_it_was(tiny_checkpoint, workers):
    policy = Emu3Policy(tiny_checkpoint, temperature=1.5, workers=workers)
    first, second, untouched = policy.sessions(3)
    for session in (first, second, untouched):
        session.reset("go left", seed=1)
        session.infer(_observation(0))
    good = _observation(1)
    with pytest.raises(ValueError, match="no 'rgb_gripper'"):
        policy.infer_many([first, second], [good, {"rgb_static": good["rgb_static"]}])
    write, policy._writer.write_each = policy._writer.write_each, lambda *arguments, **options: 1 / 0
    with pytest.raises(ZeroDivisionError):
        policy.infer_many([first, second], [good, good])
    policy._writer.write_each = write
    assert first.infer(good)["token_ids"] == second.infer(good)["token_ids"] == untouched.infer(good)["token_ids"]
