"""Several simulators to a policy, single tasks, and engines: none of them changes a result."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from envs.calvin.expert.policy import ExpertPolicy
from envs.calvin.tasks import TASKS
from eval.chain import Rules, run_chain
from eval.environment import EnvConfig
from eval.lockstep import BatchedPolicy, Job, LockStep, NotBatched
from eval.protocol import load_instructions, select_chains
from eval.run import EvalConfig, EvalOptions, main
from eval.single_task import ReachedStart, select_rollouts, starts
from eval.workers import Waiting
from policies.simple import RandomPolicy, ZeroPolicy

ROOT = Path(__file__).parents[2]
RULES = Rules(instructions=load_instructions(), max_steps=30, seed=0)


class Batch(RandomPolicy):
    """Random, for several at once; every number but its own random stream could be shared."""

    sizes: list[int] = []

    def sessions(self, number):
        return [RandomPolicy() for _ in range(number)]

    def infer_many(self, sessions, observations):
        Batch.sizes.append(len(sessions))
        return [session.infer(observation) for session, observation in zip(sessions, observations, strict=True)]


class OneIsBroken(Batch):
    """Fails on every batch with its first session in it."""

    def sessions(self, number):
        class Broken(RandomPolicy):
            def infer(self, observation):
                raise RuntimeError("the first session is broken")

        return [Broken(), *super().sessions(number - 1)]


def lockstep(policy, simulators):
    job = Job(policy=f"{__name__}:{policy}", env=EnvConfig(), rules=RULES, simulators=simulators)
    records = [result.to_json() for result in LockStep(job).run(select_chains(5))]
    return {
        record["index"]: (record["num_solved"], record["steps"], [a["task"] for a in record["attempts"]]) for record in records
    }, records


def test_lock_step_gives_what_one_by_one_gives():
    assert isinstance(Batch(), BatchedPolicy) and not isinstance(ZeroPolicy(), BatchedPolicy)
    Batch.sizes.clear()
    together, _ = lockstep("Batch", 3)
    assert max(Batch.sizes) == 3
    assert together == lockstep("Batch", 1)[0] and sorted(together) == [0, 1, 2, 3, 4]


def test_one_that_breaks_in_a_batch_is_one_error():
    _, records = lockstep("OneIsBroken", 2)
    broken = [record for record in records if record["error"]]
    assert 0 < len(broken) < 5 and len(records) == 5
    assert {record["error"]["message"] for record in broken} == {"the first session is broken"}


def test_a_policy_that_cannot_share_says_so():
    with pytest.raises(NotBatched, match="eval.simulators=2: policy 'zero' decides for one simulator"):
        LockStep(Job(policy="zero", env=EnvConfig(), rules=RULES, simulators=2))


def test_a_checkpoint_decides_for_several(tiny_checkpoint):
    """Also for chains whose neighbours come and go, with fewer running at the end."""

    def results(simulators):
        job = Job(policy=str(tiny_checkpoint), env=EnvConfig(), rules=RULES, simulators=simulators)
        return {result.index: _without_times(result.to_json()) for result in LockStep(job).run(select_chains(5))}

    together = results(4)
    assert together == results(2) == results(1)
    assert all(chain["attempts"][0]["decisions"] == 3 for chain in together.values())


def _without_times(record: dict) -> dict:
    attempts = [{key: value for key, value in attempt.items() if "seconds" not in key} for attempt in record["attempts"]]
    return {key: value for key, value in record.items() if key != "seconds"} | {"attempts": attempts}


def test_chains_of_a_dead_worker_run_alone_and_twice_at_most():
    tasks = [(index, ({}, ("open_drawer",))) for index in range(4)]
    waiting = Waiting(tasks)
    taken = waiting.take(0, 3)
    assert [index for index, _ in taken] == [0, 1, 2] and waiting.give_back(taken, "exit code -11") == []
    assert [index for index, _ in waiting.take(1, 3)] == [3], "a busy worker gets no suspect"
    assert waiting.take(0, 3) == [tasks[0]], "a suspect runs alone"
    (given_up,) = waiting.give_back([tasks[0]], "exit code -11")
    assert (given_up["index"], given_up["error"]["type"]) == (0, "WorkerDied")
    assert len(waiting) == 2


def test_rollouts_are_numbered_whatever_tasks_are_chosen():
    everything = dict(select_rollouts(2))
    assert len(everything) == 68 and [chain[1][0] for chain in everything.values()] == [*TASKS, *TASKS]
    some = dict(select_rollouts(2, ["open_drawer", "stack_block"]))
    assert some.items() <= everything.items() and len(some) == 4
    assert all(1 <= len(approach) <= 3 for index in some for _, approach in starts(index))


@pytest.mark.parametrize("task", ["place_in_drawer", "lift_red_block_drawer", "unstack_block", "turn_off_led"])
def test_expert_solves_a_task_from_a_reached_start(task):
    env, index = EnvConfig().make(), TASKS.index(task)
    chain = dict(select_rollouts(1, [task]))[index]
    outcomes = []
    for policy in (ExpertPolicy(), ZeroPolicy()):
        result = run_chain(env, policy, index, chain, load_instructions(), max_steps=240, seed=0, start=ReachedStart("D"))
        assert result.error is None and len(result.attempts) == 1 and result.approach
        outcomes.append(result.num_solved)
    env.close()
    assert outcomes == [1, 0]


# -- the command


def without_time(folder):
    found = json.loads((folder / "results.json").read_text())
    for chain in found["chains"]:
        del chain["seconds"]
        for attempt in chain["attempts"]:
            del attempt["seconds"], attempt["policy_seconds"]
    return {key: found[key] for key in ("chains", "average_length", "per_task", "deviations", "success_rate", "renderer")}


SINGLE = dict(protocol="mtlc", rollouts_per_task=2, tasks=("open_drawer", "turn_on_led"), variant=("resampled_poses", "pushes"), workers=1)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    main(EvalConfig(policy="expert", eval=EvalOptions(**SINGLE), output_dir=str(folder)))
    return folder


def command(folder, *options):
    single = ["eval.protocol=mtlc", "eval.rollouts_per_task=2", "eval.tasks=[open_drawer,turn_on_led]"]
    variant = "eval.variant=[pushes,resampled_poses]"
    return [sys.executable, "-m", "emu3_vla.cli", "eval", "policy=expert", *single, variant, f"output_dir={folder}", *options]


def test_single_task_results_say_what_they_are(single):
    found = json.loads((single / "results.json").read_text())
    assert found["protocol"]["name"] == "CALVIN MTLC" and found["protocol"]["max_steps"] == 240
    said = "\n".join(found["deviations"])
    for words in (
        "variant pushes",
        "variant resampled_poses",
        "2 rollouts a task for 10",
        "scripted expert reached",
        "only 2 chosen tasks",
    ):
        assert words in said
    assert {task: row["attempts"] for task, row in found["per_task"].items()} == {"open_drawer": 2, "turn_on_led": 2}
    assert found["success_rate"] == [found["average_length"]]


def killed_then_again(folder, *options):
    log = folder / "chains.jsonl"
    process = subprocess.Popen(command(folder, *options), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n")):
        assert time.monotonic() < end and process.poll() is None, "no rollout was finished"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(command(folder, *options), cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert again.returncode == 0, again.stderr
    indices = [json.loads(line)["index"] for line in log.read_text().splitlines()]
    assert len(indices) == len(set(indices)) == 4, "no rollout runs twice"


def test_single_tasks_killed_and_run_again_give_the_same(tmp_path, single):
    killed_then_again(tmp_path / "run", "eval.workers=2")
    assert without_time(tmp_path / "run") == without_time(single)


def test_ray_gives_the_same_after_a_kill(tmp_path, single):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'emu3-vla[ray]'")
    killed_then_again(tmp_path / "run", "eval.workers=2", "eval.engine=ray")
    assert without_time(tmp_path / "run") == without_time(single)


def test_a_chain_that_kills_two_ray_actors_is_an_error(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'emu3-vla[ray]'")
    (tmp_path / "deadly.py").write_text(
        "import os\nfrom policies.simple import ZeroPolicy\n"
        "class Crash(ZeroPolicy):\n    def infer(self, observation): os.kill(os.getpid(), 9)\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH"))))
    arguments = ["policy=deadly:Crash", "eval.num_sequences=1", "eval.engine=ray", f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-m", "emu3_vla.cli", "eval", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 1 and "WorkerDied: the worker process died 2 times in this chain" in done.stderr


def test_ray_that_is_missing_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package ray, which is not installed: pip install 'emu3-vla\[ray\]'"):
        EvalConfig(policy="zero", eval=EvalOptions(engine="ray"))
