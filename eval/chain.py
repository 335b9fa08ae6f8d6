"""One chain: five subtasks in a row by the long-horizon protocol's rules, in one simulator, with one policy.

A subtask starts where the last one ended (nothing is reset between them), has `max_steps` control steps, and is solved at the first
step after which the oracle reports it, inside a chunk too: the rest of that chunk is dropped. The first unsolved subtask ends the chain.

What happens in a chain depends on the seed, the chain, the variants and the policy alone, never on which chains ran before it.

A chain is a generator that asks for decisions (`chain_steps`), so that one policy can decide for several simulators at once
(eval.lockstep); `run_chain` answers it with one policy.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.calvin.tasks import completed_tasks
from envs.spec import ACTION_DIM, CAMERAS, ROBOT_OBS, SCENE_OBS, InvalidAction, check_action
from eval.sequences import Chain, Condition, initial_state
from eval.variants import LateEyes, LateHands, Push, Variants, hold
from policies.base import Policy
from policies.safety import PERIOD_S, SafetyEvent, SafetyGuard, SafetyOptions

if TYPE_CHECKING:
    from envs.calvin import CalvinEnv


@dataclass(kw_only=True)
class Attempt:
    """One subtask as it went. `happened` are the tasks that the oracle saw between its start and its end, on failure only.

    pushed_steps: steps (of `steps`) on which a push took the place of the policy's action.
    """

    task: str
    instruction: str
    success: bool = False
    steps: int = 0
    decisions: int = 0
    seconds: float = 0.0
    policy_seconds: float = 0.0
    pushed_steps: int = 0
    happened: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class ChainResult:
    """One chain as it went. `error` tells what broke (simulator or policy); such a chain is no failure of the policy.

    approach: the tasks that the scripted expert did first, to reach the state in which it begins (single-task evaluation alone).
    renderer, calvin_env: as the simulator that ran it names them; empty where the chain did not begin.
    safety: every intervention of the guard (policies.safety.SafetyEvent), where there is one. acting: how the arm was kept busy: latency of
    decisions, dropped deadlines, idle periods; as far as policy and arm keep account of them.
    """

    index: int
    initial_state: Condition
    subtasks: tuple[str, ...]
    num_solved: int = 0
    steps: int = 0
    seconds: float = 0.0
    attempts: list[Attempt] = field(default_factory=list)
    approach: tuple[str, ...] = ()
    renderer: str = ""
    calvin_env: str = ""
    safety: list[dict[str, Any]] = field(default_factory=list)
    acting: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain containers."""
        return asdict(self) | {"subtasks": list(self.subtasks), "approach": list(self.approach)}


class Watcher:
    """Sees a chain go by; recordings and progress lines are watchers. Every method here does nothing."""

    def chain_begins(self, env: CalvinEnv, index: int, subtasks: tuple[str, ...]) -> None:
        """After the reset, before anything moved."""

    def subtask_begins(self, position: int, attempt: Attempt) -> None:
        """After the policy's reset."""

    def decided(self, answer: dict[str, Any]) -> None:
        """The policy answered; `answer["actions"]` was checked."""

    def guarded(self, events: list[SafetyEvent]) -> None:
        """The guard changed the action of the step that comes now."""

    def stepped(self, env: CalvinEnv, action: np.ndarray, before: np.ndarray, attempt: Attempt) -> None:
        """One control step was made. before: robot_obs (15,) ahead of it. attempt.success is already settled."""

    def subtask_ends(self, position: int, attempt: Attempt) -> None:
        """Solved, or out of steps."""

    def chain_ends(self, result: ChainResult) -> None:
        """Also after an error."""


def subtask_seed(seed: int, chain: int, position: int) -> int:
    """Seed of whatever a policy draws during one subtask: a function of these three alone."""
    return int(np.random.SeedSequence([seed, chain, position]).generate_state(1)[0])


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What every chain of an evaluation has in common. instructions: task → the sentence that the protocol says."""

    instructions: dict[str, str]
    max_steps: int
    seed: int
    variants: Variants = field(default_factory=Variants)
    safety: SafetyOptions = field(default_factory=SafetyOptions)


Observation = dict[str, np.ndarray]
Decisions = Generator[Observation, tuple[dict[str, Any], float], ChainResult]
"""Yields observations, is sent (answer, seconds that it took) or thrown the policy's exception, returns how the chain went."""

Start = Callable[["CalvinEnv", ChainResult, Rules], Observation]
"""Puts the simulator into the state in which a chain begins, and returns robot_obs and scene_obs."""


def official_start(env: CalvinEnv, result: ChainResult, rules: Rules) -> Observation:
    """The protocol's initial state of the chain's condition, as far as the variants leave it."""
    robot_obs, scene_obs = initial_state(result.initial_state, env.scene.name)
    scene_obs = rules.variants.scene_obs(scene_obs, result.initial_state, env.scene.name, rules.seed, result.index)
    return reset_to(env, {ROBOT_OBS: robot_obs, SCENE_OBS: scene_obs}, result.index, rules)


def reset_to(env: CalvinEnv, state: Observation, index: int, rules: Rules) -> Observation:
    """Reset into `state`; cameras are displaced as the chain's number says, where the variants ask for it."""
    return env.reset(seed=rules.variants.reset_seed(rules.seed, index), options=state)[0]


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
    variants: Variants | None = None,
    start: Start = official_start,
    safety: SafetyOptions | None = None,
) -> ChainResult:
    """Run chain number `index` and say how it went.

    env: a CalvinEnv with observe="on_demand". An exception of the simulator or the policy (InvalidAction for an action that may not
    reach an arm) does not propagate: it becomes the result's `error`.
    """
    variants, safety = variants or Variants(), safety or SafetyOptions()
    rules = Rules(instructions=instructions, max_steps=max_steps, seed=seed, variants=variants, safety=safety)
    steps = chain_steps(env, policy, index, chain, rules, watcher=watcher, start=start)
    try:
        observation = next(steps)
        while True:
            began = time.perf_counter()
            try:
                answer = policy.infer(observation)
            except Exception as error:  # noqa: BLE001 - the chain records it
                observation = steps.throw(error)
            else:
                observation = steps.send((answer, time.perf_counter() - began))
    except StopIteration as ended:
        return ended.value


def chain_steps(
    env: CalvinEnv,
    policy: Policy,
    index: int,
    chain: Chain,
    rules: Rules,
    *,
    watcher: Watcher | None = None,
    start: Start = official_start,
) -> Decisions:
    """The chain as a generator of the observations that decisions are asked for; see `Decisions`. `policy` is told of chains and
    subtasks, but never asked: that is the caller's part."""
    condition, subtasks = chain
    watcher = watcher or Watcher()
    result = ChainResult(index=index, initial_state=condition, subtasks=subtasks, renderer=env.renderer, calvin_env=env.version)
    began = time.perf_counter()
    try:
        state = start(env, result, rules)
        begin_chain = getattr(policy, "begin_chain", None)
        if begin_chain is not None:  # the arm was put elsewhere: a policy that carries a belief about it between subtasks drops it
            begin_chain()
        guard = _Guarded(env, rules.safety, result, watcher, state) if rules.safety.enabled else None
        watcher.chain_begins(env, index, subtasks)
        for position, task in enumerate(subtasks):
            said = rules.variants.instruction(task, rules.instructions[task], rules.seed, index, position)
            attempt = Attempt(task=task, instruction=said)
            result.attempts.append(attempt)
            policy.reset(attempt.instruction, task=task, seed=subtask_seed(rules.seed, index, position))
            watcher.subtask_begins(position, attempt)
            push = rules.variants.push(rules.seed, index, position)
            state = yield from _Subtask(env, policy, attempt, rules, watcher, guard).steps(state, push)
            watcher.subtask_ends(position, attempt)
            if not attempt.success:
                break
    except Exception as error:  # noqa: BLE001 - nothing is hidden: it is recorded as this chain's error and makes the command fail
        result.error = _describe(error, result)
    result.acting = _acting(env, policy)
    _at_rest(env, policy, result)
    result.num_solved = sum(attempt.success for attempt in result.attempts)
    result.steps = sum(attempt.steps for attempt in result.attempts)
    result.seconds = time.perf_counter() - began
    watcher.chain_ends(result)
    return result


class _Subtask:
    """One subtask: the loop of looking, deciding, moving and judging."""

    def __init__(self, env: CalvinEnv, policy: Policy, attempt: Attempt, rules: Rules, watcher: Watcher, guard: _Guarded | None):
        self.env, self.policy, self.attempt, self.watcher, self.guard = env, policy, attempt, watcher, guard
        self.judge = getattr(env, "completed", completed_tasks)  # a real arm has no oracle
        self.observed_s = 0.0  # on the clock of `_clock`: when that was seen which the pending actions were decided on
        self.max_steps = rules.max_steps
        sees = bool(policy.requires & set(CAMERAS))
        self.eyes = LateEyes(env, sees, rules.variants.observation_latency)
        self.hands = LateHands(rules.variants.action_latency) if rules.variants.action_latency else None
        self.pending: deque[np.ndarray] = deque()

    def steps(self, state: Observation, push: Push | None) -> Generator[Observation, tuple[dict[str, Any], float], Observation]:
        """Returns the state at the end."""
        env, attempt, pending = self.env, self.attempt, self.pending
        began = time.perf_counter()
        start = info = env.info()
        while attempt.steps < self.max_steps and not attempt.success:
            pushed = push is not None and push.covers(attempt.steps)
            self.eyes.look(attempt.steps, len(pending), state)
            if not pending and not pushed:
                answer, seconds = yield self.eyes.seen()
                attempt.policy_seconds += seconds
                attempt.decisions += 1
                chunk = checked_chunk(answer) if self.guard is None else unchecked_chunk(answer)
                pending.extend(chunk)
                # Real time went on while the policy decided; a simulation's did not.
                self.observed_s = self._clock() - _age_s(answer, seconds if getattr(env, "realtime", False) else 0.0)
                if np.shape(chunk[0]) == (ACTION_DIM,):  # else it is broken, and the guard says so
                    self.watcher.decided(answer)
            action = self._action(state, push if pushed else None)
            before = state[ROBOT_OBS]
            state, _, _, _, info = env.step(action)
            attempt.steps += 1
            attempt.success = attempt.task in self.judge(start, info, (attempt.task,))
            self.watcher.stepped(env, action, before, attempt)
        if not attempt.success:
            attempt.happened = sorted(self.judge(start, info))
        attempt.seconds = time.perf_counter() - began
        return state

    def _action(self, state: Observation, push: Push | None) -> np.ndarray:
        """What reaches the arm now: the policy's next action, late where there is latency, unless a push takes its place."""
        action = self.pending.popleft() if self.pending else None
        if self.hands is not None:
            action = self.hands.executes(action, state)
        if push is not None:
            self.attempt.pushed_steps += 1
            action = self._guarded(push.action(hold(state)[-1]), age_s=0.0)
            self._tell("executed", action)
            return action
        given = self._guarded(action, age_s=self._clock() - self.observed_s)
        if given is not action and not np.array_equal(given, action):
            self._tell("altered", action, given)
        return given

    def _guarded(self, action: Any, age_s: float) -> np.ndarray:
        return action if self.guard is None else self.guard.filter(action, age_s=age_s)

    def _tell(self, what: str, *actions: np.ndarray) -> None:
        """A policy that keeps account of where the arm was sent (the expert) is told what took the place of its action."""
        told = getattr(self.policy, what, None)
        if told is not None:
            told(*actions)

    def _clock(self) -> float:
        """Seconds: of the wall for an arm in real time, else of the simulation."""
        return time.monotonic() if getattr(self.env, "realtime", False) else self.attempt.steps * PERIOD_S


class _Guarded:
    """The guard of one chain, and where its events go. state: in which the chain begins."""

    def __init__(self, env: CalvinEnv, options: SafetyOptions, result: ChainResult, watcher: Watcher, state: Observation):
        self.guard, self.result, self.watcher = SafetyGuard(options), result, watcher
        self.sent = getattr(env, "sent", lambda: None)
        self.guard.reset(state[ROBOT_OBS])
        if hasattr(env, "confine"):
            env.confine(*np.transpose(options.workspace_m))

    def filter(self, action: Any, age_s: float) -> np.ndarray:
        """What reaches the arm. Raises SafetyStopped."""
        sent = self.sent()
        if sent is not None:
            self.guard.follow(*sent)
        action, events = self.guard.filter(action, age_s=age_s)
        if events:
            self.result.safety += [event.to_json() for event in events]
            self.watcher.guarded(events)
        return action


def unchecked_chunk(answer: Any) -> list[Any]:
    """A policy's actions for the guard, which judges them one by one; a malformed chunk is one bad command."""
    try:
        actions = np.asarray(answer["actions"])
    except (TypeError, KeyError, ValueError):  # no dictionary, no actions in it, or rows of different lengths
        return ["no actions"]
    return list(actions) if actions.ndim == 2 and len(actions) and actions.dtype.kind in "fiu" else ["no actions"]


def _age_s(answer: Any, otherwise: float) -> float:
    """How long before the answer that was seen which it was decided on, as the policy says, or `otherwise` where it does not."""
    return float(answer.get("age_s", otherwise)) if isinstance(answer, dict) else otherwise


def _at_rest(env: CalvinEnv, policy: Policy, result: ChainResult) -> None:
    """Stop an arm that has to be stopped, and a decision that nobody waits for any more."""
    for end in (getattr(env, "halt", None), getattr(policy, "end_chain", None)):
        try:
            if end is not None:
                end()
        except Exception as error:  # noqa: BLE001 - the chain records it
            result.error = result.error or _describe(error, result)


def _acting(env: CalvinEnv, policy: Policy) -> dict[str, Any]:
    """What policy and arm counted."""
    counted = [getattr(who, "statistics", dict)() for who in (policy, env)]
    return {name: value for counts in counted for name, value in counts.items()}


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
