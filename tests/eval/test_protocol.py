"""Deviations from the official protocol, the choice of chains, and instructions."""

import pytest
import yaml

from envs.calvin.tasks import TASKS
from eval import protocol
from eval.sequences import long_horizon_sequences

AS_OFFICIAL = dict(chains=1000, max_steps=360, tasks=34, scene="D", own_assets=False, version="1431a46", own_sentences=False)


def test_the_official_settings_deviate_in_nothing():
    used = protocol.used_protocol(**AS_OFFICIAL)
    assert used == protocol.OFFICIAL
    assert protocol.deviations(used) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"chains": 100}, "the first 100 of the 1000 chains"),
        ({"max_steps": 200}, "200 steps a subtask for 360"),
        ({"tasks": 12}, "only chains of 12 chosen tasks for all 34"),
        ({"scene": "B"}, "scene B for D, its chains begun in initial states of our own"),
        ({"own_assets": True}, "emu3-vla's own low-polygon assets for those of calvin_env data/"),
        ({"version": "797142c"}, "calvin_env 797142c for 1431a46"),
        ({"own_sentences": True}, "emu3-vla's own validation sentences for CALVIN's validation sentences"),
    ],
)
def test_each_difference_is_said(changed, said):
    (deviation,) = protocol.deviations(protocol.used_protocol(**AS_OFFICIAL | changed))
    assert said in deviation


def test_errors_are_a_deviation():
    assert protocol.deviations(protocol.used_protocol(**AS_OFFICIAL), errors=2) == ["2 chains broke by an error and are left out"]


def test_chains_are_the_first_official_ones():
    official = long_horizon_sequences()
    assert protocol.select_chains(7) == list(enumerate(official[:7]))


def test_task_filter_keeps_whole_chains_in_official_order():
    official = long_horizon_sequences()
    tasks = [task for task in TASKS if not task.startswith("rotate")]
    chosen = protocol.select_chains(50, tasks)
    assert len(chosen) == 50
    assert all(official[index] == chain and set(chain[1]) <= set(tasks) for index, chain in chosen)
    indices = [index for index, _ in chosen]
    skipped = set(range(indices[-1])) - set(indices)
    assert indices == sorted(indices)
    assert all(any(task.startswith("rotate") for task in official[index][1]) for index in skipped)


def test_impossible_choices_are_refused():
    with pytest.raises(ValueError, match="unknown task 'open_door'"):
        protocol.select_chains(1, ["open_door"])
    with pytest.raises(ValueError, match=r"only \d+ of the 1000 chains consist of those 2 tasks; 5 were asked for"):
        protocol.select_chains(5, ["open_drawer", "close_drawer"])
    with pytest.raises(ValueError, match="give 1 to 1000"):
        protocol.select_chains(0)


def test_annotations_file_is_read_and_checked(tmp_path):
    sentences = {task: [f"do {task}", "second"] for task in TASKS}
    path = tmp_path / "new_playtable_validation.yaml"
    path.write_text(yaml.safe_dump(sentences))
    assert protocol.load_instructions(path) == {task: f"do {task}" for task in TASKS}
    del sentences["stack_block"]
    path.write_text(yaml.safe_dump(sentences))
    with pytest.raises(ValueError, match="no sentence for stack_block"):
        protocol.load_instructions(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="holds a list"):
        protocol.load_instructions(path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        protocol.load_instructions(path)
    with pytest.raises(ValueError, match="no annotations file"):
        protocol.load_instructions(tmp_path / "none.yaml")


def test_own_instructions_cover_all_tasks():
    instructions = protocol.load_instructions()
    assert set(instructions) == set(TASKS) and all(instructions.values())
