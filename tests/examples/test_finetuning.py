"""Fine-tuning on recordings: the operator shows the task as a person would, the success rule is not met in passing, all of it runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emu3_vla import cli
from emu3_vla.data.recordings.formats import open_dataset
from emu3_vla.data.recordings.mapped import MappedSource
from emu3_vla.data.recordings.mapping import load_mapping
from envs.calvin.scenes import DRAWER
from envs.spec import ROBOT_OBS
from eval.statistics import wilson_interval
from examples.finetune import compare, evaluate
from examples.finetune.task import NEAR_M, POINTING_STEPS, SENTENCES, TASK, Judge, begin, make_env, place
from examples.finetune.teleoperation import MAX_STEPS, Operator, record
from policies.simple import ZeroPolicy

ROOT = Path(__file__).parents[2]
MAPPING = str(ROOT / "examples/finetune/mapping.yaml")
PAGE = (ROOT / "docs/finetune.md").read_text().replace("\\\n", " ")
COMMANDS = [line.split("  #")[0] for line in PAGE.splitlines() if line.startswith("emu3-vla ")]


@pytest.fixture(scope="module")
def env():
    env = make_env()
    yield env
    env.close()


def show(env, seed) -> tuple[np.ndarray, bool]:
    """The operator's actions from one start, without pictures, and whether they did it."""
    rng = np.random.default_rng(seed)
    state, judge = begin(env, rng)
    operator, actions, done = Operator(rng, place(env.info())), [], False
    while not done and len(actions) < MAX_STEPS:
        actions.append(operator.act(state[ROBOT_OBS][:6]))
        state, _, _, _, info = env.step(actions[-1])
        done = judge(info)
    return np.array(actions), done


def test_the_operator_does_it_slowly_and_never_twice_alike(env):
    shown = [show(env, seed) for seed in range(3)]
    for actions, done in shown:
        motion = np.abs(actions[:, :3]).max(axis=1)
        assert done and 60 < len(actions) < MAX_STEPS
        assert motion.max() < 0.8, "nobody moves an arm at full speed by hand"
        assert np.count_nonzero(motion < 0.1) > 20, "and people stop to look"
        assert np.abs(actions[-POINTING_STEPS:, :3]).max() > 0, "a hand trembles"
    again, _ = show(env, 0)
    np.testing.assert_array_equal(again, shown[0][0])
    assert len({len(actions) for actions, _ in shown}) > 1


def info(tool, drawer=0.0):
    return {"robot_info": {"tcp_pos": tuple(tool)}, "scene_info": {"doors": {DRAWER: {"current_state": drawer}}}}


def test_the_rule_asks_for_a_second_above_the_handle():
    there = place(info([0, 0, 0]))
    judge = Judge(info([0, 0, 0]))
    near, far = there + [0.9 * NEAR_M, 0, 0], there + [1.1 * NEAR_M, 0, 0]
    judged = [judge(info(near)) for _ in range(POINTING_STEPS - 1)] + [judge(info(far))]
    assert not any(judged), "a hand on its way elsewhere"
    assert [judge(info(near)) for _ in range(POINTING_STEPS)] == [False] * (POINTING_STEPS - 1) + [True]


def test_the_rule_follows_the_drawer_and_refuses_one_that_was_moved():
    closed, opened = place(info([0, 0, 0])), place(info([0, 0, 0], 0.2))
    np.testing.assert_allclose(closed - opened, [0, 0.2, 0])
    judge = Judge(info([0, 0, 0], 0.2))
    assert not any(judge(info(closed, 0.2)) for _ in range(2 * POINTING_STEPS)), "where the handle of a closed drawer would be"
    judge = Judge(info([0, 0, 0]))
    assert not any(judge(info(opened, 0.2)) for _ in range(2 * POINTING_STEPS)), "it was opened meanwhile"


def test_a_recording_is_foreign_and_its_mapped_actions_do_the_task_again(env, tmp_path):
    assert record(tmp_path / "recorded", episodes=1, seed=5) == 0
    source = open_dataset(tmp_path / "recorded")
    assert source.format == "lerobot_v2.1" and not source.schema.canonical and source.told == [(SENTENCES[0],)]
    mapping = load_mapping(MAPPING)[0]
    assert list(mapping.tasks) == list(SENTENCES) and set(mapping.tasks.values()) == {TASK}
    recording, beyond = MappedSource(source, mapping, MAPPING).read_uncut(0)
    assert recording.task == TASK and not beyond.any(), "no action had to be cut"
    assert len(recording.frame_step) == -(-len(recording) // 5)
    _, judge = begin(env, np.random.default_rng([5, 0]))
    judged = [judge(env.step(action)[4]) for action in recording.columns["actions"].astype(np.float64)]
    assert any(judged)


def test_an_evaluation_counts_errors_apart(env):
    standing = evaluate.rollout(env, ZeroPolicy(), 0, seed=1, instruction=SENTENCES[0], max_steps=20)
    assert (standing.success, standing.steps, standing.error) == (False, 20, "")
    broken = evaluate.rollout(env, ZeroPolicy(), 1, seed=1, instruction=" ", max_steps=20)
    assert "ValueError" in broken.error
    solved = [evaluate.Rollout(number=number, success=True, steps=90) for number in range(3)]
    counted = evaluate.summary([standing, broken, *solved])
    assert (counted["n"], counted["successes"], counted["failures"], counted["errors"]) == (4, 3, 1, 1)
    assert counted["ci95"] == list(wilson_interval(3, 4)) and counted["rate"] == 0.75
    assert evaluate.summary([broken])["rate"] is None


def test_evaluations_begin_where_no_recording_did(env):
    recorded = begin(env, np.random.default_rng([1, 0]))[0]
    evaluated = begin(env, np.random.default_rng([1, 0, evaluate.STARTS]))[0]
    assert np.abs(recorded[ROBOT_OBS][7:14] - evaluated[ROBOT_OBS][7:14]).max() > 0.01


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_are_accepted(command):
    words = shlex.split(command)[1:]
    trained = [word for word in words if re.match(r"policy=(outputs|ws)", word)]
    words = [word for word in words if word not in trained] + (["policy=expert"] if trained else [])
    words = [word for word in words if not word.startswith("env.arm=")]
    assert cli.compose(words[0], words[1:])


def test_the_page_says_what_the_script_runs():
    script = re.sub(r"\s+", " ", (ROOT / "examples/finetune/run.sh").read_text().replace("\\\n", " "))
    for option in ("checkpoint=calvin-d", "lora_rank=16 optimizer.learning_rate=1e-3"):
        assert option in script and option in re.sub(r"\s+", " ", PAGE), option
    for name, value in re.findall(r"\b(EPISODES|PART|SHARDS|CHAINS|STEPS|BATCH|ROLLOUTS|PER_TASK)=(\d+) ", script.split("if [")[0]):
        said = {"EPISODES": "episodes", "SHARDS": "shards", "CHAINS": "chains_per_shard", "STEPS": "steps", "BATCH": "batch_size"}
        said |= {"PART": "steps_per_part", "ROLLOUTS": "rollouts", "PER_TASK": "eval.rollouts_per_task"}
        assert f" {said[name]}={value} " in PAGE, name


@pytest.mark.slow
def test_all_of_it_runs_in_miniature_and_goes_on(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path / "out"), "SMALL": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        ran = subprocess.run(["bash", "examples/finetune/run.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "is recorded already" in ran.stdout and "is finished already" in ran.stdout
    table = [line for line in ran.stdout.splitlines() if re.match(r"\| (before|lora|full) \|", line)]
    assert len(table) == 3 and len(compare.rows(tmp_path / "out")) == 3
    assert (tmp_path / "out/lora/adapter/adapter_config.json").is_file() and not (tmp_path / "out/full/adapter").exists()
    results = json.loads((tmp_path / "out/new_task/full/results.json").read_text())
    assert results["task"] == TASK and results["n"] + results["errors"] == 1
    policy = (tmp_path / "out/lora/policy/policy.yaml").read_text()
    assert "position_unit_m: 0.02" in policy


def test_what_other_options_left_is_no_answer(tmp_path):
    told = {"policy": "calvin-d", "seed": 1, "instruction": SENTENCES[0], "rollouts_asked": 50, "max_steps": 240}
    (tmp_path / "results.json").write_text(json.dumps(told))
    assert evaluate.main("calvin-d", str(tmp_path), max_steps=240) == told
    with pytest.raises(SystemExit, match="is of max_steps=240, not 20; delete it"):
        evaluate.main("calvin-d", str(tmp_path), max_steps=20)
    with pytest.raises(SystemExit, match="is of policy=calvin-d, not other"):
        evaluate.main("other", str(tmp_path), max_steps=240)
