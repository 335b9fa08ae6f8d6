"""How often a policy does the new task, from starts that nobody recorded.

    python -m examples.finetune.evaluate policy=calvin-d output_dir=outputs/pointing/before
    python -m examples.finetune.evaluate policy=outputs/pointing/lora/policy rollouts=50 seed=1 output_dir=outputs/pointing/after

Rollout k of a seed begins in the same state whatever the policy is, so two policies are compared on the same starts. Leaves results.json:
successes, failures and errors apart, the rate with its 95 % Wilson interval, each rollout, the seed and the commit.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.robot import RobotEnv
from eval.chain import checked_chunk
from eval.environment import load_policy
from eval.progress import LiveLine
from eval.provenance import git_commit, policy_provenance
from eval.results import write_json
from eval.statistics import wilson_interval
from examples.finetune.task import ENV, NEAR_M, POINTING_STEPS, SCENE, SENTENCES, TASK, begin, make_env
from policies.base import Policy

MAX_STEPS = 240  # as CALVIN allows a single task; the operators needed about 100
STARTS = 1  # a third number beside seed and rollout: evaluations never begin as a recording of the same seed did


@dataclass(kw_only=True)
class Rollout:
    """One attempt of a policy. error: what broke, in which case it says nothing about the policy."""

    number: int
    success: bool = False
    steps: int = 0
    decisions: int = 0
    error: str = ""


def rollout(env: RobotEnv, policy: Policy, number: int, *, seed: int, instruction: str, max_steps: int) -> Rollout:
    """Attempt number `number`: look, decide, execute the chunk, until the task is done or out of steps."""
    result = Rollout(number=number)
    try:
        _, judge = begin(env, np.random.default_rng([seed, number, STARTS]))
        if hasattr(policy, "begin_chain"):
            policy.begin_chain()
        policy.reset(instruction, seed=number)
        while result.steps < max_steps and not result.success:
            chunk = checked_chunk(policy.infer(env.observe()))
            result.decisions += 1
            for action in chunk[: max_steps - result.steps]:
                info = env.step(action)[4]
                result.steps += 1
                result.success = judge(info)
                if result.success:
                    break
    except Exception as error:  # noqa: BLE001 - counted apart and reported; the other rollouts go on
        result.error = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    return result


def summary(rollouts: list[Rollout]) -> dict[str, Any]:
    """Counts, and the rate with its interval over the rollouts that did not break; without any, the rate is None."""
    scored = [result for result in rollouts if not result.error]
    successes = sum(result.success for result in scored)
    counts = {"n": len(scored), "successes": successes, "failures": len(scored) - successes, "errors": len(rollouts) - len(scored)}
    if not scored:
        return counts | {"rate": None, "ci95": None}
    return counts | {"rate": successes / len(scored), "ci95": list(wilson_interval(successes, len(scored)))}


def main(
    policy: str, output_dir: str, rollouts: int = 50, seed: int = 1, instruction: str = SENTENCES[0], max_steps: int = MAX_STEPS
) -> dict[str, Any]:
    """Evaluate, print the rate, write results.json into `output_dir`; what the same options left there is read.

    Exits with 1 where rollouts broke, and where other options left something there.
    """
    file = Path(output_dir) / "results.json"
    asked = {"policy": policy, "seed": seed, "instruction": instruction, "rollouts_asked": rollouts, "max_steps": max_steps}
    if file.exists():
        found = json.loads(file.read_text())
        if other := [name for name, value in asked.items() if found.get(name) != value]:
            name = other[0]
            raise SystemExit(f"{file} is of {name}={found.get(name)}, not {asked[name]}; delete it or choose another output_dir=")
        print(f"{file} is there already")
        return found
    provenance = policy_provenance(policy)
    actor, env, done = load_policy(policy, ENV), make_env(), []
    with LiveLine() as line:
        for number in range(rollouts):
            done.append(rollout(env, actor, number, seed=seed, instruction=instruction, max_steps=max_steps))
            line.show(f"{number + 1} of {rollouts} rollouts · {sum(result.success for result in done)} solved")
    env.close()
    counted = summary(done)
    file.parent.mkdir(parents=True, exist_ok=True)
    rule = f"the tool stays within {NEAR_M} m of the place above the handle for {POINTING_STEPS} control steps in a row, within {max_steps}"
    told = {"task": TASK, "scene": SCENE, "success_rule": rule} | asked
    results = told | counted | {"git_commit": git_commit(), "policy_provenance": provenance, "rollouts": [*map(asdict, done)]}
    write_json(file, results)
    if counted["n"]:
        low, high = counted["ci95"]
        print(f"{policy}: {instruction!r} in scene {SCENE}: {counted['successes']} of {counted['n']} ({low:.0%} to {high:.0%})")
    print(file)
    if counted["errors"]:
        raise SystemExit(f"{counted['errors']} of {rollouts} rollouts broke; they are counted apart")
    return results


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main(**{name: int(value) if name in ("rollouts", "seed", "max_steps") else value for name, value in given.items()})
