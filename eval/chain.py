"""One chain: five subtasks in a row by the long-horizon protocol's rules, in one simulator, with one policy.

A subtask starts where the last one ended (nothing is reset between them), has `max_steps` control steps, and is solved at the first
step after which the oracle reports it, inside a chunk too: the rest of that chunk is dropped. The first unsolved subtask ends the chain.

What happens in a chain depends on the seed, the chain and the policy alone, never on which chains ran before it.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.calvin.tasks import completed_tasks
from envs.spec import CAMERAS, ROBOT_OBS, SCENE_OBS, InvalidAction, check_action
from eval.sequences import Chain, Condition, initial_state
from policies.base import Policy

if TYPE_CHECKING:
    from envs.calvin import CalvinEnv


@dataclass(kw_only=True)
class Attempt:
    """One subtask as it went. `happened` are the tasks that the oracle saw between its start and its end, on failure only."""

    task: str
    instruction: str
    success: bool = False
    steps: int = 0
    decisions: int = 0
    seconds: float = 0.0
    policy_seconds: float = 0.0
    happened: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class ChainResult:
    """One chain as it went. `error` tells what broke (simulator or policy); such a chain is no failure of the policy.

    renderer, calvin_env: as the simulator that ran it names them; empty where the chain did not begin.
    """

    index: int
    initial_state: Condition
    subtasks: tuple[str, ...]
    num_solved: int = 0
    steps: int = 0
    seconds: float = 0.0
    attempts: list[Attempt] = field(default_factory=list)
    renderer: str = ""
    calvin_env: str = ""
    error: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain containers."""
        return asdict(self) | {"subtasks": list(self.subtasks)}


class Watcher:
    """Sees a chain go by; recordings and progress lines are watchers. Every method here does nothing."""

    def chain_begins(self, env: CalvinEnv, index: int, subtasks: tuple[str, ...]) -> None:
        """After the reset, before anything moved."""

    def subtask_begins(self, position: int, attempt: Attempt) -> None:
        """After the policy's reset."""

    def decided(self, answer: dict[str, Any]) -> None:
        """The policy answered; `answer["actions"]` was checked."""

    def stepped(self, env: CalvinEnv, action: np.ndarray, before: np.ndarray, attempt: Attempt) -> None:
        """One control step was made. before: robot_obs (15,) ahead of it. attempt.success is already settled."""

    def subtask_ends(self, position: int, attempt: Attempt) -> None:
        """Solved, or out of steps."""

    def chain_ends(self, result: ChainResult) -> None:
        """Also after an error."""


def subtask_seed(seed: int, chain: int, position: int) -> int:
    """Seed of whatever a policy draws during one subtask: a function of these three alone."""
    return int(np.random.SeedSequence([seed, chain, position]).generate_state(1)[0])


def run_chain(
    env: CalvinEnv,
    policy: Policy,
    index: int,
    chain: Chain,
    instructions: dict[str, str],
    *,
    max_steps: int,
    seed: int,
    watcher: Watcher | None = None,
) -> ChainResult:
    """Run chain number `index` and say how it went.

    env: a CalvinEnv with observe="on_demand". An exception of the simulator or the policy (InvalidAction for an action that may not
    reach an arm) does not propagate: it becomes the result's `error`.
    """
    condition, subtasks = chain
    watcher = watcher or Watcher()
    result = ChainResult(index=index, initial_state=condition, subtasks=subtasks, renderer=env.renderer, calvin_env=env.version)
    began = time.perf_counter()
    try:
        robot_obs, scene_obs = initial_state(condition, env.scene.name)
        state, _ = env.reset(options={ROBOT_OBS: robot_obs, SCENE_OBS: scene_obs})
        begin_chain = getattr(policy, "begin_chain", None)
        if begin_chain is not None:  # the arm was put elsewhere: a policy that carries a belief about it between subtasks drops it
            begin_chain()
        watcher.chain_begins(env, index, subtasks)
        for position, task in enumerate(subtasks):
            attempt = Attempt(task=task, instruction=instructions[task])
            result.attempts.append(attempt)
            policy.reset(attempt.instruction, task=task, seed=subtask_seed(seed, index, position))
            watcher.subtask_begins(position, attempt)
            state = _run_subtask(env, policy, attempt, state, max_steps, watcher)
            watcher.subtask_ends(position, attempt)
            if not attempt.success:
                break
    except Exception as error:  # noqa: BLE001 - nothing is hidden: it is recorded as this chain's error and makes the command fail
        result.error = _describe(error, result)
    result.num_solved = sum(attempt.success for attempt in result.attempts)
    result.steps = sum(attempt.steps for attempt in result.attempts)
    result.seconds = time.perf_counter() - began
    watcher.chain_ends(result)
    return result


def _run_subtask(
    env: CalvinEnv, policy: Policy, attempt: Attempt, state: dict[str, np.ndarray], max_steps: int, watcher: Watcher
) -> dict[str, np.ndarray]:
    began = time.perf_counter()
    sees = bool(policy.requires & set(CAMERAS))
    start = info = env.info()
    pending: deque[np.ndarray] = deque()
    while attempt.steps < max_steps and not attempt.success:
        if not pending:
            observation = env.observe() if sees else state
            asked = time.perf_counter()
            answer = policy.infer(observation)
            attempt.policy_seconds += time.perf_counter() - asked
            attempt.decisions += 1
            pending.extend(checked_chunk(answer))
            watcher.decided(answer)
        action = pending.popleft()
        before = state[ROBOT_OBS]
        state, _, _, _, info = env.step(action)
        attempt.steps += 1
        attempt.success = attempt.task in completed_tasks(start, info, (attempt.task,))
        watcher.stepped(env, action, before, attempt)
    if not attempt.success:
        attempt.happened = sorted(completed_tasks(start, info))
    attempt.seconds = time.perf_counter() - began
    return state


def checked_chunk(answer: dict[str, Any]) -> np.ndarray:
    """A policy's actions as float64 (T, 7), T >= 1. Raises InvalidAction, before any of them was executed, saying what is wrong."""
    if "actions" not in answer:
        raise InvalidAction(f"the policy answered without 'actions'; it gave {', '.join(sorted(answer)) or 'nothing'}")
    actions = np.asarray(answer["actions"])
    if actions.ndim != 2 or not len(actions):
        raise InvalidAction(f"the policy's actions have shape {actions.shape}, expected (T, 7) with T >= 1")
    return np.array([check_action(action) for action in actions])


def _describe(error: Exception, result: ChainResult) -> dict[str, Any]:
    at = result.attempts[-1] if result.attempts else None
    return {
        "type": type(error).__name__,
        "message": str(error),
        "subtask": at.task if at else None,
        "step": at.steps if at else None,
        "traceback": traceback.format_exc(),
    }
