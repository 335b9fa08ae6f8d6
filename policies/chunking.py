"""Acting while thinking: a chunk is executed while the next one is decided, and the two join without a jump.

    policy = ChunkedPolicy(policy, ChunkingOptions(ahead=3))

`ahead` control steps before the chunk ends, the next decision begins, in a thread, on what is seen then. The steps that are left are
executed meanwhile, so the new chunk is asked to begin with them: they are put into the observation (envs.spec.COMMITTED_ACTIONS), a policy
that heeds them writes a chunk that goes on from there, and `rejoin` makes its first steps exactly those that were executed.

Imports numpy alone, so it runs where the arm is, around a policy that is elsewhere.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from envs.spec import ACTION_DIM, COMMITTED_ACTIONS, CONTROL_HZ, GRIPPER_CLOSE, GRIPPER_OPEN, InvalidAction
from policies.base import Policy

HOLD, WAIT, STOP = LATE = ("hold", "wait", "stop")
JOIN_CORRELATION = 0.8
"""Of neighbouring steps of a chunk: how fast a correction at its committed end dies away after it, by a fifth a step."""

LATENCIES_KEPT = 100
FIRST_AHEAD = 3  # steps reserved for a decision before one was measured


class DecisionLate(RuntimeError):
    """A decision was not there when the arm needed it."""


@dataclass(frozen=True, kw_only=True)
class ChunkingOptions:
    """How chunks follow one another. The defaults are plain chunks: decide, execute all of it, decide."""

    ahead: int | None = 0  # control steps that a decision gets, executed meanwhile; 0: the arm waits for it; null: as long as measured
    execute: int | None = None  # steps of each chunk before the next takes over; null: all
    ensemble: float | None = None  # ACT's temporal ensembling: chunks that overlap are averaged, weighted by exp(-ensemble * age rank)
    late: str = HOLD  # what the arm does while a decision is late: hold (keep the pose), wait (get no command) or stop (end the run)
    give_up_s: float = 10.0  # in real time, a decision that takes longer ends the run, whatever `late` says

    def __post_init__(self):
        if self.ahead is not None and self.ahead < 0:
            raise ValueError(f"chunking.ahead={self.ahead}, expected at least 0, or null for as long as decisions take")
        if self.execute is not None and self.execute < 1:
            raise ValueError(f"chunking.execute={self.execute}, expected at least 1, or null for whole chunks")
        if self.ensemble is not None and not (math.isfinite(self.ensemble) and self.ensemble >= 0):
            raise ValueError(f"chunking.ensemble={self.ensemble}, expected a finite number from 0 (all chunks alike), or null")
        if self.late not in LATE:
            raise ValueError(f"chunking.late={self.late} is not one of {', '.join(LATE)}")
        if not self.give_up_s > 0:
            raise ValueError(f"chunking.give_up_s={self.give_up_s}, expected a time above 0")

    @property
    def plain(self) -> bool:
        """Whether chunks are executed as without these options."""
        return (self.ahead, self.execute, self.ensemble) == (0, None, None)

    def described(self) -> dict[str, str]:
        """For results: {"chunking": what is done, in words} where it is not plain."""
        if self.plain:
            return {}
        ahead = {None: "as early as decisions are measured to take", 0: "when the chunk ends"}.get(
            self.ahead, f"{self.ahead} control steps before the chunk ends"
        )
        words = [f"the next chunk is decided {ahead}"]
        words += [f"{self.execute} steps of a chunk are executed"] if self.execute is not None else []
        words += [f"overlapping chunks are averaged (exp(-{self.ensemble:g} i))"] if self.ensemble is not None else []
        return {"chunking": ", ".join([*words, f"late decisions: {self.late}"])}


def rejoin(chunk_TA: np.ndarray, committed_nA: np.ndarray) -> np.ndarray:
    """The chunk with its first n actions replaced by those that were committed, and what follows bent so that it goes on from them.

    The gap at the last committed step dies away along the chunk: the most likely continuation where deviations of neighbouring steps
    correlate (an Ornstein-Uhlenbeck process, of which the last committed step says all). The gripper, which knows two states only, is left.
    """
    n, steps = len(committed_nA), np.arange(1, len(chunk_TA) - len(committed_nA) + 1)
    joined = np.array(chunk_TA, dtype=np.float64)
    gap = committed_nA[-1, :-1] - joined[n - 1, :-1]
    joined[n:, :-1] = (joined[n:, :-1] + JOIN_CORRELATION ** steps[:, None] * gap).clip(-1, 1)
    joined[:n] = committed_nA
    return joined


def join_gap(chunk_TA: np.ndarray, committed_nA: np.ndarray) -> float:
    """How far the chunk, as it was decided, is from the last committed step: the largest difference of a motion's component."""
    return float(np.abs(chunk_TA[len(committed_nA) - 1, :-1] - committed_nA[-1, :-1]).max())


def check_committed(committed: Any, horizon: int) -> np.ndarray:
    """Committed actions as float64 (n, 7). Raises InvalidAction for another shape, or as many as the chunk is long."""
    actions = np.asarray(committed, np.float64)
    if actions.ndim != 2 or actions.shape[1] != ACTION_DIM or not 0 < len(actions) < horizon or not np.isfinite(actions).all():
        raise InvalidAction(
            f"{COMMITTED_ACTIONS} has shape {actions.shape}, expected finite (n, {ACTION_DIM}) with 1 <= n < {horizon}, the chunk's steps"
        )
    return actions


@dataclass
class _Plan:
    """A chunk that was decided. start: its first step, counted on while actions are executed, not while a decision is late."""

    start: int
    actions: np.ndarray
    asked_s: float


@dataclass
class _Flight:
    """A decision on its way: asked for at `start`, with so many `committed` steps."""

    start: int
    committed: np.ndarray
    began_s: float
    future: Future


class ChunkedPolicy:
    """A Policy that answers `policy`'s chunks in pieces, each as long as nothing has to be looked at or waited for.

    realtime: whether time goes on while the policy thinks. In a simulation it does not: there every decision takes exactly `ahead` steps,
    and none is late. "age_s" of an answer: how old the observation is that the first of its actions was decided on.
    """

    def __init__(self, policy: Policy, options: ChunkingOptions, *, realtime: bool = True):
        if not realtime and options.ahead is None:
            raise ValueError("chunking.ahead=null measures decisions, which take no time in a simulation; give a number of control steps")
        self.policy, self.options, self.realtime = policy, options, realtime
        self.name, self.requires = policy.name, policy.requires
        self._preparing = threading.Lock()
        self._unprepared: Exception | None = None  # why computing ahead failed; the next decision fails so
        self._asked: SimpleQueue[tuple[Future, dict[str, np.ndarray]] | None] = SimpleQueue()
        # A daemon: a policy that hangs must not keep the program from ending.
        threading.Thread(target=self._decide, name="decisions", daemon=True).start()
        self._flight: _Flight | None = None
        self.latencies_s: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._forget_counts()
        self._clear()

    # -- as every policy

    def begin_chain(self) -> None:
        """See policies.base.Policy."""
        self._land()
        self._forget_counts()
        begin = getattr(self.policy, "begin_chain", None)
        if begin is not None:
            with self._preparing:
                begin()

    def end_chain(self) -> None:
        """Nothing more is asked in this chain: what is under way is waited for and dropped."""
        self._land()

    def reset(self, instruction: str, *, task: str | None = None, seed: int | None = None) -> None:
        """See policies.base.Policy. A decision for the subtask before, still on its way, is waited for and dropped."""
        self._land()
        self._clear()
        with self._preparing:
            self._unprepared = None
            self.policy.reset(instruction, task=task, seed=seed)

    def infer(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        """The next actions. Raises DecisionLate, InvalidAction for a chunk too short to act ahead, and what the policy raises."""
        answer: dict[str, Any] = {}
        if self._flight is None and not self._queue:
            self._begin(observation)
        if self._flight is not None:
            collected = self._collect()
            if collected is None:
                return self._held()
            answer = collected
        ahead = self._ahead()
        if ahead == 0 or len(self._queue) > ahead:
            taken = len(self._queue) - ahead
        else:
            taken = len(self._queue)
            self._begin(observation)
        plan = self._plans[-1]
        age_s = time.monotonic() - plan.asked_s if self.realtime else (self._step - plan.start) / CONTROL_HZ
        actions = np.array([self._queue.popleft() for _ in range(taken)])
        self._step += taken
        self._gripper = float(actions[-1, -1])
        return {**answer, "actions": actions, "age_s": age_s}

    def statistics(self) -> dict[str, Any]:
        """Of this chain: decisions and their latency, deadlines that were dropped, and how chunks were joined."""
        milliseconds = 1000 * np.array(self._chain_latencies_s or [math.nan])
        p50, p99 = (None if math.isnan(milliseconds[0]) else float(np.percentile(milliseconds, q)) for q in (50, 99))
        return {
            "decisions": len(self._chain_latencies_s),
            "decision_ms_p50": p50,
            "decision_ms_p99": p99,
            "ahead_steps": self._ahead(),
            "dropped_deadlines": self.dropped,
            "held_steps": self.held,
            "late": self.options.late,
            "joins_forced": self.forced,
            "joins_bent": self.bent,
            "join_gap_mean": float(np.mean(self.gaps)) if self.gaps else None,
        }

    def close(self) -> None:
        """End the thread."""
        self._land()
        self._asked.put(None)

    # -- one decision

    def _begin(self, observation: dict[str, np.ndarray]) -> None:
        """Ask for a chunk from now on; what is queued is executed meanwhile."""
        committed = np.array(self._queue).reshape(-1, ACTION_DIM)
        if len(committed):
            observation = {**observation, COMMITTED_ACTIONS: committed}
        self._flight = _Flight(self._step, committed, time.monotonic(), Future())
        self._asked.put((self._flight.future, observation))
        self._asked_late = False

    def _decide(self) -> None:
        """The thread: results are (answer, when it was there)."""
        while (asked := self._asked.get()) is not None:
            future, observation = asked
            try:
                if self._unprepared is not None:
                    raise self._unprepared
                future.set_result((self.policy.infer(observation), time.monotonic()))
            except Exception as error:  # noqa: BLE001 - raised again where it is collected
                future.set_exception(error)
            else:
                self._prepare()

    def _prepare(self) -> None:
        """Let the policy compute ahead while the arm executes; in a simulation nothing moves meanwhile."""
        prepare = getattr(self.policy, "prepare", None)
        if self.realtime and prepare is not None:
            with self._preparing:
                try:
                    prepare()
                except Exception as error:  # noqa: BLE001 - raised by the next decision: this thread has to live until then
                    self._unprepared = error

    def _collect(self) -> dict[str, Any] | None:
        """The decision that is due now, its actions queued; None while it is late and the arm is to hold."""
        flight = self._flight
        # Only what was asked for ahead of time can be late; before the first chunk there is nothing to execute meanwhile.
        has_deadline = self.realtime and len(flight.committed) > 0
        waits = not has_deadline or self.options.late == WAIT
        left_s = self._left_s(flight)
        if has_deadline and not flight.future.done() and not self._asked_late:
            self.dropped, self._asked_late = self.dropped + 1, True
            if self.options.late == STOP:
                raise DecisionLate(f"the decision was not there after its {len(flight.committed)} control steps (chunking.late=stop)")
        try:
            answer, done_s = flight.future.result(timeout=left_s if waits else 0)
        except NotYet:
            if flight.future.done():
                raise  # the policy's own
            if waits or left_s == 0:
                raise self._given_up() from None
            return None
        finally:
            if flight.future.done():
                self._flight = None
        self._note(done_s - flight.began_s)
        self._queue_up(flight, answer)
        return {key: value for key, value in answer.items() if key != "actions"}

    def _queue_up(self, flight: _Flight, answer: dict[str, Any]) -> None:
        actions = np.asarray(answer.get("actions", ()), dtype=np.float64)
        n = len(flight.committed)
        if actions.ndim != 2 or actions.shape[1] != ACTION_DIM or len(actions) <= n:
            raise InvalidAction(
                f"the policy's actions have shape {actions.shape}, expected (T, {ACTION_DIM}) with T > {n}, the steps that were executed "
                "meanwhile; lower chunking.ahead, or use a policy with longer chunks"
            )
        if n:
            heeded = answer.get("committed") == n
            self.gaps.append(float(answer["join_gap"]) if heeded else join_gap(actions, flight.committed))
            self.forced, self.bent = self.forced + heeded, self.bent + (not heeded)
            actions = rejoin(actions, flight.committed)
        self._plans.append(_Plan(flight.start, actions, flight.began_s))
        length = len(actions) if self.options.execute is None else min(len(actions), max(self.options.execute, n + 1))
        self._plans = [plan for plan in self._plans if plan.start + len(plan.actions) > self._step]
        self._queue = deque(self._planned(step) for step in range(self._step, flight.start + length))

    def _planned(self, step: int) -> np.ndarray:
        """The action of a step: the newest chunk's, or the weighted mean of all chunks that reach it, oldest first."""
        chunks = [plan.actions[step - plan.start] for plan in self._plans if plan.start <= step < plan.start + len(plan.actions)]
        if self.options.ensemble is None:
            return chunks[-1]
        weights = np.exp(-self.options.ensemble * np.arange(len(chunks)))
        mean = np.average(chunks, axis=0, weights=weights)
        mean[-1] = GRIPPER_OPEN if mean[-1] >= 0 else GRIPPER_CLOSE
        return mean

    def _held(self) -> dict[str, Any]:
        """One step of keeping the pose, while a decision is late."""
        self.held += 1
        return {"actions": np.r_[np.zeros(ACTION_DIM - 1), self._gripper][None], "age_s": 0.0}

    def _ahead(self) -> int:
        """Control steps that a decision gets."""
        if self.options.ahead is not None:
            return self.options.ahead
        if not self.latencies_s:
            return FIRST_AHEAD
        # One step more than all but the slowest took: the decision is collected at a step's beginning.
        longest = max((len(plan.actions) for plan in self._plans), default=2)
        return min(max(1, longest // 2), 1 + math.floor(np.percentile(self.latencies_s, 95) * CONTROL_HZ))

    # -- bookkeeping

    def _note(self, seconds: float) -> None:
        self.latencies_s.append(seconds)
        self._chain_latencies_s.append(seconds)

    def _land(self) -> None:
        """Wait for a decision on its way and drop it, whatever it is: it belongs to what is over."""
        if self._flight is not None:
            try:
                self._flight.future.exception(timeout=self._left_s(self._flight))
            except NotYet:
                raise self._given_up() from None  # and it stays: a policy is not asked while it still thinks
            self._flight = None

    def _left_s(self, flight: _Flight) -> float | None:
        """Seconds until the decision is given up; None in a simulation, which has the time."""
        return max(0.0, flight.began_s + self.options.give_up_s - time.monotonic()) if self.realtime else None

    def _given_up(self) -> DecisionLate:
        return DecisionLate(f"no decision for {self.options.give_up_s:g} s (chunking.give_up_s); is the policy still there?")

    def _clear(self) -> None:
        self._queue: deque[np.ndarray] = deque()
        self._plans: list[_Plan] = []
        self._step, self._gripper, self._asked_late = 0, GRIPPER_OPEN, False

    def _forget_counts(self) -> None:
        self._chain_latencies_s: list[float] = []
        self.dropped = self.held = self.forced = self.bent = 0
        self.gaps: list[float] = []
