"""Single-task evaluation (CALVIN's MTLC): every task by itself, several times, from states in which it is possible.

CALVIN takes those states from the first frames of its annotated validation episodes, and resets the simulator into them. Without the
dataset ours are reached: from an initial condition of the long-horizon protocol the scripted expert does one to three other tasks, and
the state it ends in is what the simulator is reset into. What a rollout starts from depends on its number and the scene alone.

Source: CALVIN (arXiv 2112.03227), MTLC; mees/calvin calvin_models/calvin_agent/evaluation/evaluate_policy_singlestep.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from envs.calvin.expert.policy import ExpertPolicy
from envs.calvin.tasks import TASKS, check_task, completed_tasks
from envs.spec import ROBOT_OBS, SCENE_OBS
from eval.chain import ChainResult, Observation, Rules, reset_to
from eval.sequences import Chain, Condition, initial_conditions, initial_state, is_valid_chain

if TYPE_CHECKING:
    from envs.calvin import CalvinEnv

APPROACH_LENGTHS = (1, 3)
APPROACH_MAX_STEPS = 360
CANDIDATES = 6
"""Starts that are tried for one rollout, in order: the expert does not reach every one."""

Approach = tuple[Condition, tuple[str, ...]]


class StartNotReached(RuntimeError):
    """The expert reached none of the states that a rollout may start from."""


def select_rollouts(per_task: int, tasks: Sequence[str] = ()) -> list[tuple[int, Chain]]:
    """The rollouts to run: (index, chain of one task), all tasks once, then all again.

    Rollout number k of task number t (in CALVIN's order) has index k · 34 + t, whichever tasks are chosen. The chain's condition is that
    of the first of its `starts`. Raises ValueError for an unknown task or no rollouts.
    """
    if per_task < 1:
        raise ValueError(f"eval.rollouts_per_task={per_task}, expected at least 1")
    for task in tasks:
        check_task(task)
    chosen = [number for number, task in enumerate(TASKS) if not tasks or task in tasks]
    indices = [rollout * len(TASKS) + number for rollout in range(per_task) for number in chosen]
    return [(index, (_first_condition(index), (TASKS[index % len(TASKS)],))) for index in indices]


def starts(index: int) -> Iterator[Approach]:
    """What rollout `index` may begin with: (initial condition, tasks that the expert does first), in the order in which they are tried.

    Random conditions and tasks after which the rollout's task is possible in exactly one way; CANDIDATES of them.
    """
    return islice(_approaches(index), CANDIDATES)


@cache
def _first_condition(index: int) -> Condition:
    return next(starts(index))[0]


@cache
def _conditions() -> tuple[Condition, ...]:
    return tuple(initial_conditions())


def _approaches(index: int) -> Iterator[Approach]:
    task = TASKS[index % len(TASKS)]
    others = [name for name in TASKS if name != task]
    conditions = _conditions()
    rng = np.random.default_rng([index, len(TASKS)])
    while True:
        condition = conditions[rng.integers(len(conditions))]
        length = rng.integers(*APPROACH_LENGTHS, endpoint=True)
        approach = tuple(others[number] for number in rng.permutation(len(others))[:length])
        if is_valid_chain(condition, (*approach, task)):
            yield dict(condition), approach


class ReachedStart:
    """Puts the simulator where a rollout begins (an eval.chain.Start). Raises StartNotReached."""

    def __init__(self, scene: str):
        self.expert = ExpertPolicy(scene)

    def __call__(self, env: CalvinEnv, result: ChainResult, rules: Rules) -> Observation:
        for condition, approach in starts(result.index):
            state = self._approach(env, condition, approach, result.index, rules)
            if state is not None:
                result.initial_state, result.approach = condition, approach
                return reset_to(env, state, result.index, rules)
        raise StartNotReached(
            f"the expert reached none of the {CANDIDATES} states that rollout {result.index} ({result.subtasks[0]}) may start from"
        )

    def _approach(self, env: CalvinEnv, condition: Condition, tasks: tuple[str, ...], index: int, rules: Rules) -> Observation | None:
        """The state after the expert has done `tasks`, or None where it fails at one."""
        robot_obs, scene_obs = initial_state(condition, env.scene.name)
        scene_obs = rules.variants.scene_obs(scene_obs, condition, env.scene.name, rules.seed, index)
        state = reset_to(env, {ROBOT_OBS: robot_obs, SCENE_OBS: scene_obs}, index, rules)
        self.expert.begin_chain()
        for task in tasks:
            state = self._do(env, task, state)
            if state is None:
                return None
        return {ROBOT_OBS: state[ROBOT_OBS], SCENE_OBS: state[SCENE_OBS]}

    def _do(self, env: CalvinEnv, task: str, state: Observation) -> Observation | None:
        self.expert.reset(task, task=task)
        start = env.info()
        for _ in range(APPROACH_MAX_STEPS):
            state, _, _, _, info = env.step(self.expert.infer(state)["actions"][0])
            if task in completed_tasks(start, info, (task,)):
                return state
        return None
