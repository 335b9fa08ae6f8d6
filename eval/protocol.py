"""What CALVIN's two protocols are, what an evaluation did, and where the two differ.

Source: CALVIN (arXiv 2112.03227), LH-MTLC and MTLC; mees/calvin calvin_models/calvin_agent/evaluation/evaluate_policy.py and
evaluate_policy_singlestep.py, and conf/callbacks/rollout_lh for the number of rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from envs.calvin.language import validation_instruction
from envs.calvin.tasks import TASKS
from eval.sequences import CHAIN_LENGTH, OFFICIAL_CHAINS, Chain, long_horizon_sequences

LH_MTLC, MTLC = PROTOCOLS = ("lh_mtlc", "mtlc")
"""Long-horizon: chains of five subtasks. Single-task: each task by itself."""
MAX_STEPS = 360
SINGLE_TASK_MAX_STEPS = 240
ROLLOUTS_PER_TASK = 10
CALVINS_SENTENCES = "CALVIN's validation sentences (new_playtable_validation.yaml, first of each task)"
OWN_SENTENCES = "emu3-vla's own validation sentences"
CALVINS_ASSETS = "calvin_env data/"

CALVINS_STARTS = "the first frames of CALVIN's annotated validation episodes"
REACHED_STARTS = "states that the scripted expert reached by one to three other tasks"

_SHARED: dict[str, Any] = {
    "tasks": len(TASKS),
    "scene": "D",
    "assets": CALVINS_ASSETS,
    "calvin_env": "1431a46",
    "instructions": CALVINS_SENTENCES,
    "control_hz": 30,
    "success": "the first step on which the task oracle reports the subtask",
    "variants": {},
}

OFFICIAL: dict[str, Any] = {
    "name": "CALVIN LH-MTLC",
    "chains": OFFICIAL_CHAINS,
    "subtasks_per_chain": CHAIN_LENGTH,
    "max_steps": MAX_STEPS,
    **_SHARED,
    "reset_between_subtasks": False,
}

OFFICIAL_SINGLE_TASK: dict[str, Any] = {
    "name": "CALVIN MTLC",
    "rollouts_per_task": ROLLOUTS_PER_TASK,
    "starts": CALVINS_STARTS,
    "max_steps": SINGLE_TASK_MAX_STEPS,
    **_SHARED,
}


def used_protocol(
    *,
    chains: int | str,
    max_steps: int,
    tasks: int,
    scene: str,
    own_assets: bool,
    version: str,
    own_sentences: bool,
    variants: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The long-horizon protocol as an evaluation followed it: the fields of OFFICIAL with what was used instead.

    chains: how many of the official ones, from the first on; or, where they were chosen otherwise, which, in words. variants: as
    `Variants.described` gives them.
    """
    return OFFICIAL | {
        "chains": chains,
        "max_steps": max_steps,
        "tasks": tasks,
        "scene": scene,
        "assets": _assets(own_assets),
        "calvin_env": version,
        "instructions": OWN_SENTENCES if own_sentences else CALVINS_SENTENCES,
        "variants": dict(variants or {}),
    }


def used_single_task_protocol(
    *,
    rollouts_per_task: int,
    max_steps: int,
    tasks: int,
    scene: str,
    own_assets: bool,
    version: str,
    own_sentences: bool,
    variants: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The single-task protocol as an evaluation followed it: the fields of OFFICIAL_SINGLE_TASK with what was used instead."""
    return OFFICIAL_SINGLE_TASK | {
        "rollouts_per_task": rollouts_per_task,
        "starts": REACHED_STARTS,
        "max_steps": max_steps,
        "tasks": tasks,
        "scene": scene,
        "assets": _assets(own_assets),
        "calvin_env": version,
        "instructions": OWN_SENTENCES if own_sentences else CALVINS_SENTENCES,
        "variants": dict(variants or {}),
    }


def _assets(own: bool) -> str:
    return "emu3-vla's own low-polygon assets" if own else CALVINS_ASSETS


_WORDING = {
    "chains": "the first {used} of the {official} chains",
    "rollouts_per_task": "{used} rollouts a task for {official}",
    "starts": "{used} for {official}",
    "max_steps": "{used} steps a subtask for {official}",
    "tasks": "only chains of {used} chosen tasks for all {official}",
    "scene": "scene {used} for {official}",
    "assets": "{used} for those of {official}",
    "calvin_env": "calvin_env {used} for {official}",
    "instructions": "{used} for {official}",
}


def deviations(used: dict[str, Any], errors: int = 0) -> list[str]:
    """Each difference from the official protocol of that name in words; empty when there is none.

    errors: chains left out because they broke.
    """
    official = OFFICIAL_SINGLE_TASK if used["name"] == OFFICIAL_SINGLE_TASK["name"] else OFFICIAL
    single = official is OFFICIAL_SINGLE_TASK
    found = [f"variant {name}: {words}" for name, words in used["variants"].items()]
    for key, wanted in official.items():
        if key == "variants" or used[key] == wanted:
            continue
        if key == "chains" and isinstance(used[key], str):
            found.append(f"{used[key]} for the {wanted} official chains")
        elif key == "scene" and not single:
            found.append(
                f"scene {used[key]} for {wanted}, its chains begun in initial states of our own: CALVIN defines them for {wanted} alone"
            )
        elif key == "tasks" and single:
            found.append(f"only {used[key]} chosen tasks for all {wanted}")
        else:
            found.append(_WORDING[key].format(used=used[key], official=wanted))
    if errors:
        kind = "rollout" if single else "chain"
        found.append(f"{errors} {kind}{'s' if errors > 1 else ''} broke by an error and {'are' if errors > 1 else 'is'} left out")
    return found


def select_chains(number: int, tasks: Sequence[str] = ()) -> list[tuple[int, Chain]]:
    """The chains to run: (official index, chain).

    Without `tasks` the first `number` of the 1000; with them the first `number` of those among the 1000 whose five subtasks are all in
    `tasks` (chains are left out, never cut). Raises ValueError where there are not that many, or for an unknown task.
    """
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}; the tasks are {', '.join(TASKS)}")
    if not tasks:
        return list(enumerate(long_horizon_sequences(number)))
    if number < 1:
        raise ValueError(f"number of chains is {number}, expected at least 1")
    allowed = set(tasks)
    chains = [(index, chain) for index, chain in enumerate(long_horizon_sequences()) if allowed.issuperset(chain[1])]
    if len(chains) < number:
        raise ValueError(
            f"only {len(chains)} of the {OFFICIAL_CHAINS} chains consist of those {len(allowed)} tasks; {number} were asked for"
        )
    return chains[:number]


def load_instructions(annotations: str | Path = "") -> dict[str, str]:
    """Task → the sentence that the evaluation speaks.

    annotations: CALVIN's new_playtable_validation.yaml, of which the first sentence of each task is taken; empty for our own.
    Raises ValueError for a file that does not hold a sentence for each of the 34 tasks.
    """
    if not annotations:
        return {task: validation_instruction(task) for task in TASKS}
    path = Path(annotations)
    if not path.is_file():
        raise ValueError(f"no annotations file {path}; expected CALVIN's new_playtable_validation.yaml")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected task names with lists of sentences")
    missing = [task for task in TASKS if not content.get(task) or not str(content[task][0]).strip()]
    if missing:
        raise ValueError(f"{path} has no sentence for {missing[0]}" + (f" and {len(missing) - 1} more tasks" if missing[1:] else ""))
    return {task: str(content[task][0]) for task in TASKS}
