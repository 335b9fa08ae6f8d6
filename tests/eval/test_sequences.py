"""The long-horizon chains and their initial states, against the protocol's recorded ones."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from envs.calvin.layout import layout_of
from eval import sequences


def reference_file(name):
    folder = os.environ.get("EMU3_VLA_REFERENCE")
    if not folder:
        pytest.skip("EMU3_VLA_REFERENCE is not set: the recorded chains are not at hand")
    return Path(folder) / "calvin" / name


def test_chains_equal_the_official_ones():
    recorded = json.loads(reference_file("eval_sequences.json").read_text())
    assert [[condition, list(tasks)] for condition, tasks in sequences.long_horizon_sequences()] == recorded


def test_initial_states_equal_the_official_ones():
    recorded = np.load(reference_file("initial_states.npz"))
    states = [sequences.initial_state(condition) for condition, _ in sequences.long_horizon_sequences()]
    np.testing.assert_array_equal(np.array([robot for robot, _ in states]), recorded["robot_obs"])
    np.testing.assert_array_equal(np.array([scene for _, scene in states]), recorded["scene_obs"])


@pytest.mark.slow
def test_drawing_the_chains_gives_the_table():
    assert sequences.derive_sequences() == sequences.long_horizon_sequences()


def test_one_draw_of_the_table_is_reproduced():
    # Eight chains: the first eight conditions of array_split get one each, so their generators start as the official ones do.
    conditions = list(sequences.initial_conditions())
    drawn = sequences.derive_sequences(8)
    official = sequences.long_horizon_sequences()
    first = [drawn_chain for drawn_chain in drawn if drawn_chain[0] in conditions[:8]]
    assert len(first) == 8
    assert all(chain in official for chain in first)


def test_every_chain_is_valid_and_conditions_are_shared_evenly():
    chains = sequences.long_horizon_sequences()
    assert len(list(sequences.initial_conditions())) == 192
    assert all(sequences.is_valid_chain(condition, tasks) for condition, tasks in chains)
    assert not sequences.is_valid_chain(chains[0][0], ("open_drawer",)), "its drawer is open"
    shares = Counter(str(condition) for condition, _ in chains)
    assert set(shares.values()) == {5, 6}


def test_global_random_state_is_left_alone():
    np.random.seed(7)
    before = np.random.get_state()[1].copy()
    sequences.initial_state(sequences.long_horizon_sequences(3)[0][0])
    sequences.derive_sequences(1)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_hash_is_fnv1_with_initial_zero():
    # Recorded seed of the first official chain.
    assert sequences.initial_state_seed(sequences.long_horizon_sequences(1)[0][0]) == 2138410836


@pytest.mark.parametrize("number", [0, -3, 1001])
def test_numbers_outside_the_protocol_are_refused(number):
    with pytest.raises(ValueError, match="give 1 to 1000"):
        sequences.long_horizon_sequences(number)


@pytest.mark.parametrize("scene", ["A", "B", "C"])
def test_states_of_other_scenes_lie_to_their_fixtures_as_those_of_d_do(scene):
    layout = layout_of(scene)
    slots = list(layout.block_lengths)
    for condition in sequences.initial_conditions():
        robot_obs, scene_obs = sequences.initial_state(condition, scene)
        of_d = sequences.initial_state(condition)
        np.testing.assert_array_equal(robot_obs, of_d[0])
        np.testing.assert_array_equal(scene_obs[1:6], of_d[1][1:6])
        assert scene_obs[0] == (layout.slide_limit if condition["slider"] == "left" else 0)
        blocks, blocks_of_d = scene_obs[6:].reshape(3, 6), of_d[1][6:].reshape(3, 6)
        for row, colour in enumerate(sequences.COLOURS):
            x, y, _, _, _, yaw = blocks[slots.index(colour)]
            place = condition[f"{colour}_block"]
            assert yaw == blocks_of_d[row, 5] and y == pytest.approx(blocks_of_d[row, 1], abs=1e-5)
            if place == "table":
                gap = abs(x - layout.button[0]) - layout.ring_radius
                assert gap > 0.12 and abs(x) < 0.24, "within reach, and room for a push of 0.1 m"
            else:
                left, right = layout.openings(0 if place == "slider_left" else layout.slide_limit)[place == "slider_right"]
                assert left + 0.08 < x < right - 0.08
        gaps = [np.hypot(*(a - b)[:2]) for a, b in zip(blocks, np.roll(blocks, 1, axis=0), strict=True)]
        assert min(gaps) > 0.15


def test_unknown_scenes_are_refused():
    with pytest.raises(ValueError, match="unknown scene 'E'"):
        sequences.initial_state(sequences.long_horizon_sequences(1)[0][0], scene="E")
