"""Questions about a moment say what the state holds."""

import numpy as np
import pytest

from emu3_vla.text import TextTokenizer
from envs.calvin.expert.policy import ExpertPolicy
from envs.calvin.questions import DESCRIBE, Questions
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
