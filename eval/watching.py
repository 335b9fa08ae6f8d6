"""Watchers of a chain that others are made of: several at once, one rendering for all, a live line."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.chain import Attempt, ChainResult, Watcher
from eval.progress import LiveLine
from policies.safety import SafetyEvent

if TYPE_CHECKING:
    from envs.calvin import CalvinEnv


class Camera:
    """Looks at most once at each moment, however many watchers want to see it: rendering costs more than physics."""

    def __init__(self):
        self._moment: bytes | None = None
        self._seen: dict[str, np.ndarray] = {}

    def observe(self, env: CalvinEnv) -> dict[str, np.ndarray]:
        """`env.observe()`, or what it gave last where nothing has moved since."""
        moment = b"".join(array.tobytes() for array in env.state().values())
        if moment != self._moment:
            self._seen, self._moment = env.observe(), moment
        return self._seen


class Watchers(Watcher):
    """Several watchers, told in order."""

    def __init__(self, *watchers: Watcher):
        self.watchers = watchers

    def chain_begins(self, env: CalvinEnv, index: int, subtasks: tuple[str, ...]) -> None:
        for watcher in self.watchers:
            watcher.chain_begins(env, index, subtasks)

    def subtask_begins(self, position: int, attempt: Attempt) -> None:
        for watcher in self.watchers:
            watcher.subtask_begins(position, attempt)

    def decided(self, answer: dict[str, Any]) -> None:
        for watcher in self.watchers:
            watcher.decided(answer)

    def guarded(self, events: list[SafetyEvent]) -> None:
        for watcher in self.watchers:
            watcher.guarded(events)

    def stepped(self, env: CalvinEnv, action: np.ndarray, before: np.ndarray, attempt: Attempt) -> None:
        for watcher in self.watchers:
            watcher.stepped(env, action, before, attempt)

    def subtask_ends(self, position: int, attempt: Attempt) -> None:
        for watcher in self.watchers:
            watcher.subtask_ends(position, attempt)

    def chain_ends(self, result: ChainResult) -> None:
        for watcher in self.watchers:
            watcher.chain_ends(result)


class LiveSubtask(Watcher):
    """The live line of a rollout: subtask, step, action rate, success so far."""

    SHOWS_EVERY_S = 0.1

    def __init__(self, line: LiveLine, *, chains: int, max_steps: int):
        self.line, self.chains, self.max_steps = line, chains, max_steps
        self.chain = self.steps = self.solved = self.tried = 0
        self.began, self.last = time.monotonic(), 0.0

    def chain_begins(self, env: CalvinEnv, index: int, subtasks: tuple[str, ...]) -> None:
        self.chain += 1
        self.subtasks = subtasks

    def subtask_begins(self, position: int, attempt: Attempt) -> None:
        self.position = position
        self._show(attempt)

    def stepped(self, env: CalvinEnv, action: np.ndarray, before: np.ndarray, attempt: Attempt) -> None:
        self.steps += 1
        if time.monotonic() - self.last > self.SHOWS_EVERY_S:
            self._show(attempt)

    def subtask_ends(self, position: int, attempt: Attempt) -> None:
        self.solved += attempt.success
        self.tried += 1
        outcome = "solved" if attempt.success else "not solved"
        self.line.leave(f"  chain {self.chain}/{self.chains}  {outcome:10}  {attempt.steps:4} steps  “{attempt.instruction}”")

    def _show(self, attempt: Attempt) -> None:
        self.last = time.monotonic()
        rate = self.steps / max(self.last - self.began, 1e-6)
        self.line.show(
            f"chain {self.chain}/{self.chains} · subtask {self.position + 1}/{len(self.subtasks)} {attempt.task} · "
            f"step {attempt.steps}/{self.max_steps} · {rate:.0f} actions/s · {self.solved} of {self.tried} solved"
        )
