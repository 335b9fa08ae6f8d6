"""What the evaluation harness costs beside the simulator, and how fast the expert gets through chains.

    python -m benchmarks.evaluation chains=4 repeats=5

The same actions are run twice, alternately: through `run_chain` (protocol, oracle, checks, statistics of a subtask), and by calling the
simulator's reset and step alone. Times are processor time of this one process, and of the repeats the least is taken, so a busy machine
matters little. The bar for the overhead is 5 %.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from envs.calvin.expert.policy import ExpertPolicy
from envs.spec import ROBOT_OBS, SCENE_OBS
from eval.chain import Watcher, run_chain
from eval.environment import EnvConfig
from eval.protocol import MAX_STEPS, load_instructions, select_chains
from eval.sequences import initial_state

BAR = 0.05


class _Actions(Watcher):
    """Keeps what was executed."""

    def __init__(self):
        self.executed: list[np.ndarray] = []

    def stepped(self, env, action, before, attempt):
        self.executed.append(action)


class _Played:
    """Answers recorded actions in chunks of ten: a policy that costs nothing."""

    name, requires = "played", frozenset()

    def __init__(self, actions: list[np.ndarray], lengths: list[int]):
        self.subtasks = iter(np.split(np.array(actions), np.cumsum(lengths)[:-1]))

    def reset(self, instruction, *, task=None, seed=None):
        self.actions, self.at = next(self.subtasks), 0

    def infer(self, observation):
        self.at += 10
        return {"actions": self.actions[self.at - 10 : self.at]}


def main(chains: int = 4, repeats: int = 5) -> None:
    """Print seconds, the overhead, and the expert's rate."""
    env, instructions, expert = EnvConfig().make(), load_instructions(), ExpertPolicy()
    harness_s = simulator_s = expert_s = wall_s = 0.0
    steps = solved = 0
    for index, chain in select_chains(chains):
        watcher = _Actions()
        began, began_wall = time.process_time(), time.perf_counter()
        result = run_chain(env, expert, index, chain, instructions, max_steps=MAX_STEPS, seed=0, watcher=watcher)
        expert_s += time.process_time() - began
        wall_s += time.perf_counter() - began_wall
        if result.error:
            raise RuntimeError(f"chain {index}: {result.error['message']}")
        lengths = [attempt.steps for attempt in result.attempts]
        alone, through = [], []
        for _ in range(repeats):
            alone.append(_alone(env, chain, watcher.executed))
            through.append(_through(env, index, chain, instructions, watcher.executed, lengths, result.num_solved))
        simulator_s, harness_s = simulator_s + min(alone), harness_s + min(through)
        steps, solved = steps + result.steps, solved + result.num_solved
    env.close()
    overhead = harness_s / simulator_s - 1
    print(f"{chains} chains, {steps} steps: simulator alone {simulator_s:.2f} s, through the harness {harness_s:.2f} s of processor time")
    print(f"overhead of the harness {overhead:+.1%} (bar {BAR:.0%}), {1e6 * (harness_s - simulator_s) / steps:.0f} µs a step")
    print(
        f"expert: {chains / expert_s:.2f} chains/s of processor time, {chains / wall_s:.2f} by the clock, one process; "
        f"average length {solved / chains:.2f}; its own share {1 - harness_s / expert_s:.0%}"
    )


def _alone(env, chain, actions) -> float:
    began = time.process_time()
    robot_obs, scene_obs = initial_state(chain[0], env.scene.name)
    env.reset(options={ROBOT_OBS: robot_obs, SCENE_OBS: scene_obs})
    for action in actions:
        env.step(action)
    return time.process_time() - began


def _through(env, index, chain, instructions, actions, lengths, solved) -> float:
    began = time.process_time()
    result = run_chain(env, _Played(actions, lengths), index, chain, instructions, max_steps=MAX_STEPS, seed=0)
    seconds = time.process_time() - began
    if (result.num_solved, result.steps) != (solved, len(actions)):
        raise RuntimeError(f"chain {index} went otherwise when played again: {result.num_solved} solved in {result.steps} steps")
    return seconds


if __name__ == "__main__":
    main(**{name: int(value) for name, value in (argument.split("=") for argument in sys.argv[1:])})
