"""What acting while thinking buys: the arm's idle time, and how chunks join.

    python -m benchmarks.acting seconds=60
    python -m benchmarks.acting seconds=0 chains=20

In real time, on the simulated arm with its delays and noise: chunks one after another (the arm waits for each decision) against chunks that
are decided while the last one is executed. In virtual time, on the first official chains: what the older observation costs in success, and
how far apart chunks are where they join, with ids written freely and with ids that heed the committed steps. Its latencies are processor
time of the deciding thread, and the idle share is what follows from them: what a core of its own would give, on a busy machine too.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import closing
from dataclasses import replace

import numpy as np

import policies
from envs.robot import SimulatedArmOptions
from envs.spec import COMMITTED_ACTIONS, CONTROL_HZ
from eval.chain import run_chain
from eval.environment import ROBOT, EnvConfig
from eval.protocol import MAX_STEPS, load_instructions, select_chains
from policies.chunking import ChunkedPolicy, ChunkingOptions

AHEAD = 3


class _Unheeding:
    """A policy that is not told what is executed meanwhile."""

    def __init__(self, policy):
        self.policy, self.name, self.requires, self.reset = policy, policy.name, policy.requires, policy.reset

    def infer(self, observation):
        return self.policy.infer({key: value for key, value in observation.items() if key != COMMITTED_ACTIONS})


def main(seconds: float = 60.0, chains: int = 10, ahead: int = AHEAD, policy: str = policies.SHIPPED) -> None:
    """Print both tables. seconds: of real time a row; 0 leaves that table out, as chains=0 does the other."""
    actor = policies.load(policy)
    if seconds:
        _print_realtime(actor, seconds)
    if chains:
        _print_virtual(actor, chains, ahead)


def _print_realtime(actor, seconds: float) -> None:
    rows = {
        "synchronous": ChunkingOptions(),
        f"asynchronous, {AHEAD} steps ahead": ChunkingOptions(ahead=AHEAD),
        "asynchronous, as measured": ChunkingOptions(ahead=None),
    }
    print(f"simulated arm in real time, policy {actor.name}, {seconds:.0f} s each; load of this machine {os.getloadavg()[0]:.1f}")
    print(f"{'':28} {'idle':>6} {'decisions':>9} {'p50 ms':>7} {'p99 ms':>7} {'dropped':>8} {'held steps':>10}")
    for name, options in rows.items():
        counted = _realtime(actor, options, seconds)
        print(
            f"{name:28} {counted['idle_periods'] / counted['periods']:6.1%} {counted['decisions']:9} {counted['p50']:7.1f} "
            f"{counted['p99']:7.1f} {counted['dropped_deadlines']:8} {counted['held_steps']:10}"
        )


class _Timed(_Unheeding):
    """A policy whose decisions are timed where they are made, by `clock`."""

    def __init__(self, policy, clock=time.perf_counter):
        super().__init__(policy)
        self.clock, self.taken_s = clock, []

    def infer(self, observation):
        began = self.clock()
        answer = self.policy.infer(observation)
        self.taken_s.append(self.clock() - began)
        return answer


def _realtime(actor, options: ChunkingOptions, seconds: float) -> dict:
    """One row: chains one after another until the time is over; homing between them does not count."""
    arm = SimulatedArmOptions(realtime=True)
    env, timed = EnvConfig(simulator=ROBOT, simulated_arm=arm).make(), _Timed(actor)
    acting = timed if options.plain else ChunkedPolicy(timed, replace(options, late="hold"))
    total = {"periods": 0, "idle_periods": 0, "dropped_deadlines": 0, "held_steps": 0, "decisions": 0}
    began, instructions = time.monotonic(), load_instructions()
    with closing(env):
        for index, chain in select_chains(1000):
            if time.monotonic() - began > seconds:
                break
            result = run_chain(env, acting, index, chain, instructions, max_steps=150, seed=0)
            if result.error:
                raise RuntimeError(f"chain {index}: {result.error['message']}")
            for key in total:
                total[key] += result.acting.get(key, 0)
    milliseconds = 1000 * np.array(timed.taken_s)
    return total | {
        "decisions": len(milliseconds),
        "p50": float(np.percentile(milliseconds, 50)),
        "p99": float(np.percentile(milliseconds, 99)),
    }


def _print_virtual(actor, chains: int, ahead: int) -> None:
    rows = {
        "synchronous": (actor, ChunkingOptions()),
        f"{ahead} ahead, ids written freely": (_Unheeding(actor), ChunkingOptions(ahead=ahead)),
        f"{ahead} ahead, ids heed the prefix": (actor, ChunkingOptions(ahead=ahead)),
        "execute 5, ensemble 0.1": (actor, ChunkingOptions(execute=5, ensemble=0.1)),
    }
    print(f"\nin virtual time, the first {chains} chains")
    titles = ("    solved", "gap", "step at joins", "elsewhere", "p50 ms", "p99 ms", "idle", "late")
    print(f"{'':32}" + "".join(f"{title:>{max(len(title), 6) + 2}}" for title in titles))
    for name, (inner, options) in rows.items():
        cells = _virtual(inner, options, chains)
        print(f"{name:32}" + "".join(f"{cell:>{max(len(title), 6) + 2}}" for title, cell in zip(titles, cells, strict=True)), flush=True)


class _Joins(ChunkedPolicy):
    """Notes which of the executed steps are the first that a new chunk decided."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.steps: dict[bool, list[float]] = {True: [], False: []}
        self.last = None

    def reset(self, instruction, *, task=None, seed=None):
        super().reset(instruction, task=task, seed=seed)
        self.last = None

    def infer(self, observation):
        before = len(self._chain_latencies_s)
        answer = super().infer(observation)
        new = len(self._chain_latencies_s) > before
        for row, action in enumerate(answer["actions"][:, :-1]):
            if self.last is not None:
                self.steps[new and row == 0].append(float(np.abs(action - self.last).max()))
            self.last = action
        return answer


def _virtual(inner, options: ChunkingOptions, chains: int) -> list[str]:
    """A row's cells: subtasks solved of those attempted, mean gap at joins before it is closed, mean step (largest component) at joins and
    elsewhere, latency of decisions, and if they take that long: share of control periods without a command, and how many are late."""
    timed = _Timed(inner, time.thread_time)
    env, acting = EnvConfig().make(), _Joins(timed, options, realtime=False)
    solved = attempts = steps = 0
    gaps: list[float] = []
    for index, chain in select_chains(chains):
        result = run_chain(env, acting, index, chain, load_instructions(), max_steps=MAX_STEPS, seed=0)
        if result.error:
            raise RuntimeError(f"chain {index}: {result.error['message']}")
        solved, attempts, steps = solved + result.num_solved, attempts + len(result.attempts), steps + result.steps
        gaps += acting.gaps
    env.close()
    taken_s = np.array(timed.taken_s)
    over_s = taken_s - (options.ahead or 0) / CONTROL_HZ  # the first decision of a subtask has nothing ahead of it; it counts alike
    idle = np.ceil(over_s.clip(0) * CONTROL_HZ).sum()
    return [
        f"{solved} of {attempts}",
        f"{np.mean(gaps or [0]):.3f}",
        f"{np.mean(acting.steps[True]):.3f}",
        f"{np.mean(acting.steps[False]):.3f}",
        *(f"{1000 * np.percentile(taken_s, q):.1f}" for q in (50, 99)),
        f"{idle / (idle + steps):.1%}",
        f"{int((over_s > 0).sum()) if options.ahead else 0}",
    ]


if __name__ == "__main__":
    given = dict(argument.split("=") for argument in sys.argv[1:])
    main(**{name: value if name == "policy" else int(value) for name, value in given.items()})
