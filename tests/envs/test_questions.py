"""Questions about a moment say what the state holds."""

import numpy as np
import pytest

from emu3_vla.text import TextTokenizer
from envs.calvin.expert.policy import ExpertPolicy
from envs.calvin.questions import DESCRIBE, KINDS, Questions, clauses, heading_deg, is_right, kind_of, way_mm
from eval.sequences import initial_state, long_horizon_sequences


@pytest.fixture
def state():
    condition, _ = long_horizon_sequences(1)[0]
    return initial_state(condition)


def _answers(robot_obs, scene_obs) -> dict[str, str]:
    return dict(Questions("D").about(robot_obs, scene_obs))


def test_lights_drawer_and_door_follow_the_state(state):
    robot_obs, scene_obs = (part.copy() for part in state)
    for value, drawer, door, light in ((0.0, 0.0, 0.0, 0.0), (1.0, 0.2, 0.27, 1.0)):
        scene_obs[0], scene_obs[1], scene_obs[4], scene_obs[5] = door, drawer, light, light
        answers = _answers(robot_obs, scene_obs)
        assert answers["is the light bulb on?"] == answers["is the green light on?"] == ("yes." if value else "no.")
        assert answers["is the drawer open?"] == ("yes." if value else "no.")
        assert answers["where is the sliding door?"] == ("left." if value else "right.")
        assert f"the light bulb is {'on' if value else 'off'}" in answers[DESCRIBE]


def test_distances_are_from_the_hand_along_the_axes(state):
    robot_obs, scene_obs = (part.copy() for part in state)
    at = 6 + 6 * ExpertPolicy("D").arm.block_order.index("blue")
    scene_obs[at : at + 3] = robot_obs[:3] + [0.1234, -0.051, -0.1]
    scene_obs[at + 3 : at + 6] = [0, 0, np.pi / 4]
    answers = _answers(robot_obs, scene_obs)
    assert answers["how far is the blue block from the hand?"] == "125 right 50 back 100 down."
    assert answers["how is the blue block turned?"] == "45 degrees."


def test_a_held_block_is_in_the_hand(state):
    robot_obs, scene_obs = (part.copy() for part in state)
    at = 6 + 6 * ExpertPolicy("D").arm.block_order.index("pink")
    robot_obs[6], robot_obs[14] = 0.04, -1
    scene_obs[at : at + 3] = robot_obs[:3]
    answers = _answers(robot_obs, scene_obs)
    assert answers["what is in the hand?"] == "the pink block."
    assert answers["where is the pink block?"] == "in the hand."


def test_every_answer_ends_with_its_only_full_stop_and_its_words_are_known(state):
    tokenizer = TextTokenizer.fit(Questions.sentences(), vocab_size=1024)
    for question, answer in Questions("D").about(*state):
        assert question.endswith("?") and answer.endswith(".") and answer.count(".") == 1
        assert tokenizer.decode(tokenizer.encode(answer)) == answer
        assert len(tokenizer.encode(answer)) <= len(answer.split()) + answer.count(",") + 4, "numbers and words are an id each"


def test_answers_are_read_back(state):
    robot_obs, scene_obs = (part.copy() for part in state)
    order = ExpertPolicy("D").arm.block_order
    for number, color in enumerate(("red", "blue", "pink")):
        at = 6 + 6 * order.index(color)
        scene_obs[at : at + 3] = robot_obs[:3] + np.array([0.12, -0.05, 0.0]) * (number + 1)
    answers = _answers(robot_obs, scene_obs)
    assert {kind_of(question) for question in answers} == set(KINDS.values())
    np.testing.assert_array_equal(way_mm(answers["how far is the pink block from the hand?"]), [360, -150, 0])
    said = clauses(answers[DESCRIBE])
    assert list(said) == ["drawer", "door", "light bulb", "green light", "red block", "blue block", "pink block"]
    assert ", ".join(f"the {thing} is {state}" for thing, state in said.items()) + "." == answers[DESCRIBE]


@pytest.mark.parametrize(
    "answer", ["", "yes.", "1 right 2 back.", "1 right 2 back 3 sideways.", "1 up 2 back 3 right.", "x right 2 back 3 up."]
)
def test_what_is_no_distance_is_refused(answer):
    with pytest.raises(ValueError, match="is no distance"):
        way_mm(answer)


@pytest.mark.parametrize(
    "question, answer, truth, right",
    [
        ("is the drawer open?", "yes.", "yes.", True),
        ("is the drawer open?", "yes.", "no.", False),
        ("how far is the red block from the hand?", "20 right 40 back 5 up.", "40 right 20 back 15 down.", True),
        ("how far is the red block from the hand?", "20 right 40 back 5 up.", "45 right 40 back 5 up.", False),
        ("how far is the switch from the hand?", "yes.", "45 right 40 back 5 up.", False),
        ("how is the red block turned?", "165 degrees.", "0 degrees.", True),
        ("how is the red block turned?", "60 degrees.", "90 degrees.", False),
        ("how is the red block turned?", "600 degrees.", "60 degrees.", False),
        ("how is the red block turned?", "no.", "60 degrees.", False),
    ],
)
def test_numbers_are_right_within_half_a_block_and_a_step(question, answer, truth, right):
    assert is_right(question, answer, truth) is right


def test_what_is_no_truth_is_no_answers_fault():
    with pytest.raises(ValueError, match="'yes.' is no distance"):
        is_right("how far is the switch from the hand?", "5 right 0 back 0 up.", "yes.")
    with pytest.raises(ValueError, match="'180 degrees.' is no heading"):
        heading_deg("180 degrees.")


def test_strange_words_are_no_question_and_no_clause():
    with pytest.raises(ValueError, match="no question about CALVIN"):
        kind_of("is it raining?")
    assert clauses("down. down, the door is left, the the, is") == {"door": "left"}
