"""`emu3-vla eval` from outside: worker counts, kills and errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emu3_vla.cli import UsageError, compose
from eval.run import ChainLog, EvalConfig, EvalOptions, main

ROOT = Path(__file__).parents[2]


def config(folder, policy="expert", **options):
    return EvalConfig(policy=policy, eval=EvalOptions(**{"num_sequences": 4, "workers": 2} | options), output_dir=str(folder))


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def without_time(results):
    kept = {key: value for key, value in results.items() if key not in ("timing", "config", "git_commit")}
    kept["chains"] = [
        {key: value for key, value in chain.items() if key not in ("seconds", "attempts")}
        | {"attempts": [{k: v for k, v in a.items() if "seconds" not in k} for a in chain["attempts"]]}
        for chain in kept["chains"]
    ]
    return kept


@pytest.fixture(scope="module")
def expert_results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    main(config(folder, workers=1))
    return results(folder)


def test_results_hold_what_they_must(expert_results):
    needed = (
        "num_sequences average_length success_rate ci95 chains protocol deviations seed git_commit policy scene assets renderer "
        "versions timing per_task errors"
    )
    assert set(needed.split()) <= set(expert_results)
    assert expert_results["num_sequences"] == len(expert_results["chains"]) == 4
    assert sum(expert_results["success_rate"]) == pytest.approx(expert_results["average_length"])
    assert any("first 4 of the 1000" in deviation for deviation in expert_results["deviations"])
    assert [chain["index"] for chain in expert_results["chains"]] == [0, 1, 2, 3]
    for key in ("initial_state", "subtasks", "num_solved", "steps", "seconds"):
        assert key in expert_results["chains"][0]


def test_zero_actions_score_zero(tmp_path):
    main(config(tmp_path, policy="zero", num_sequences=2, max_steps=20))
    assert results(tmp_path)["average_length"] == 0.0
    assert results(tmp_path)["success_rate"] == [0.0] * 5


def test_number_of_workers_changes_nothing(tmp_path, expert_results):
    main(config(tmp_path, workers=3))
    assert without_time(results(tmp_path)) == without_time(expert_results)


def command(folder, *options, policy="expert"):
    return [
        *(sys.executable, "-m", "emu3_vla.cli", "eval", f"policy={policy}", "eval.num_sequences=4", "eval.workers=2"),
        *(f"output_dir={folder}", *options),
    ]


def run_command(*arguments, environment=None, **options):
    return subprocess.run(
        command(*arguments, **options), cwd=ROOT, capture_output=True, text=True, timeout=250, env=environment or os.environ
    )


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def wait_until(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_killed_half_way_and_run_again_gives_the_same(tmp_path, expert_results):
    folder, log = tmp_path / "run", tmp_path / "run" / "chains.jsonl"
    process = subprocess.Popen(command(folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= 1)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert not (folder / "results.json").exists()
    before = log.read_text().splitlines()
    log.write_text("\n".join(before) + '\n{"index": 3, "initial_st')  # a line cut short
    again = run_command(folder)
    assert again.returncode == 0, again.stderr
    lines = log.read_text().splitlines()
    assert lines[: len(before)] == before
    assert sorted(json.loads(line)["index"] for line in lines) == [0, 1, 2, 3]
    assert without_time(results(folder)) == without_time(expert_results)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_a_killed_worker_loses_no_chain(tmp_path, expert_results):
    folder, log = tmp_path / "run", tmp_path / "run" / "chains.jsonl"
    process = subprocess.Popen(command(folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= 1)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    assert without_time(results(folder)) == without_time(expert_results)


POLICIES = """
import os, numpy as np

class Nan:
    name, requires = "nan", frozenset()
    def reset(self, instruction, *, task=None, seed=None): pass
    def infer(self, observation): return {"actions": np.full((10, 7), np.nan)}

class Crash(Nan):
    def infer(self, observation): os.kill(os.getpid(), 11)

class Healed(Nan):
    def infer(self, observation):
        if os.path.exists(os.environ["HEALED"]):
            return {"actions": np.array([[0, 0, 0, 0, 0, 0, 1.0]])}
        raise RuntimeError("not healed yet")

class Unready(Nan):
    def __init__(self): raise ValueError("model/model.safetensors is cut short")
"""


@pytest.fixture
def plugged(tmp_path):
    (tmp_path / "odd_policies.py").write_text(POLICIES)
    path = os.pathsep.join(filter(None, (str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "HEALED": str(tmp_path / "healed")}


def test_nan_actions_are_errors_and_the_command_fails(tmp_path, plugged):
    folder = tmp_path / "run"
    done = run_command(folder, "eval.num_sequences=2", policy="odd_policies:Nan", environment=plugged)
    assert done.returncode == 1
    assert "2 of 2 chains ended by an error" in done.stderr and "InvalidAction: action has a NaN" in done.stderr
    assert (results(folder)["errors"], results(folder)["average_length"]) == (2, None)


def test_a_chain_that_kills_two_workers_is_an_error(tmp_path, plugged):
    folder = tmp_path / "run"
    done = run_command(folder, "eval.num_sequences=1", policy="odd_policies:Crash", environment=plugged)
    assert done.returncode == 1
    assert "WorkerDied: the worker process died 2 times in this chain, last with exit code -11" in done.stderr


def test_errors_are_tried_again_by_the_same_command(tmp_path, plugged):
    folder, options = tmp_path / "run", ("eval.num_sequences=1", "eval.max_steps=5")
    assert run_command(folder, *options, policy="odd_policies:Healed", environment=plugged).returncode == 1
    (tmp_path / "healed").touch()
    again = run_command(folder, *options, policy="odd_policies:Healed", environment=plugged)
    assert again.returncode == 0, again.stderr
    assert (results(folder)["errors"], results(folder)["average_length"]) == (0, 0.0)


def test_a_policy_that_cannot_be_made_says_why(tmp_path, plugged):
    done = run_command(tmp_path / "run", policy="odd_policies:Unready", environment=plugged)
    assert done.returncode == 2
    assert "model/model.safetensors is cut short" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policy=expret"], "did you mean 'expert'"),
        (["env.scene=E"], "unknown scene 'E'"),
        (["eval.num_sequences=0"], "eval.num_sequences=0"),
        (["eval.num_sequnces=5"], "did you mean 'eval.num_sequences'"),
        (["eval.tasks=[open_door]"], "unknown task 'open_door'"),
        (["eval.annotations=nowhere.yaml"], "no annotations file"),
    ],
)
def test_wrong_options_are_said(overrides, message):
    with pytest.raises(UsageError, match=message):
        compose("eval", ["policy=zero", *overrides])


def test_one_process_at_a_time(tmp_path):
    with ChainLog(tmp_path / "chains.jsonl"):
        with pytest.raises(ValueError, match="another process is writing"):
            ChainLog(tmp_path / "chains.jsonl").__enter__()


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "chains.jsonl").write_text('{"index": 0, "error": null}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2: not a chain's record"):
        ChainLog(tmp_path / "chains.jsonl").__enter__()
