"""What acting while thinking buys: the arm's idle time, and how chunks join.

    python -m benchmarks.acting seconds=60
    python -m benchmarks.acting seconds=0 chains=20

In real time, on the simulated arm with its delays and noise: chunks one after another (the arm waits for each decision) against chunks that
are decided while the last one is executed. In virtual time, on the first official chains: what the older observation costs in success, and
how far apart chunks are where they join, with ids written freely and with ids that heed the committed steps.
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
from envs.spec import COMMITTED_ACTIONS
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
    """A policy whose decisions are timed where they are made."""

    def __init__(self, policy):
        super().__init__(policy)
        self.taken_s: list[float] = []

    def infer(self, observation):
        began = time.perf_counter()
        answer = self.policy.infer(observation)
        self.taken_s.append(time.perf_counter() - began)
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
    print(f"{'':32} {'solved':>7} {'attempts':>8} {'gap':>6} {'step at joins':>14} {'step elsewhere':>15}")
    for name, (inner, options) in rows.items():
        solved, attempts, gap, joins, others = _virtual(inner, options, chains)
        print(f"{name:32} {solved:7} {attempts:8} {gap:6.3f} {joins:14.3f} {others:15.3f}")


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


def _virtual(inner, options: ChunkingOptions, chains: int) -> tuple[int, int, float, float, float]:
    """Subtasks solved, attempted, mean gap at joins before it is closed, mean step (largest component) at joins and elsewhere."""
    env, acting = EnvConfig().make(), _Joins(inner, options, realtime=False)
    solved = attempts = 0
    gaps: list[float] = []
    for index, chain in select_chains(chains):
        result = run_chain(env, acting, index, chain, load_instructions(), max_steps=MAX_STEPS, seed=0)
        if result.error:
            raise RuntimeError(f"chain {index}: {result.error['message']}")
        solved, attempts = solved + result.num_solved, attempts + len(result.attempts)
        gaps += acting.gaps
    env.close()
    return solved, attempts, float(np.mean(gaps or [0])), float(np.mean(acting.steps[True])), float(np.mean(acting.steps[False]))


if __name__ == "__main__":
    given = dict(argument.split("=") for argument in sys.argv[1:])
    main(**{name: value if name == "policy" else int(value) for name, value in given.items()})
