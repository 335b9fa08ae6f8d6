"""Time of one control decision, from two images to an action chunk, with its split.

    OMP_NUM_THREADS=1 python benchmarks/decision.py
    OMP_NUM_THREADS=1 python benchmarks/decision.py --policy <folder> --decisions 300

The policy acts in the simulator from the official chains' first states, 20 decisions a start, so that what it sees and writes is what it
meets in an evaluation; one thread. "wall" is what the arm waits; "meanwhile" what is computed ahead while it moves, which it does for
333 ms. "processor" is what both cost together where other programs keep the cores busy, and what to compare between machines; the split is
wall time. The bars, on one idle core: p50 60 ms, p99 120 ms.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np

import policies
from envs.calvin import CalvinEnv
from envs.spec import ROBOT_OBS, SCENE_OBS
from eval.protocol import load_instructions, select_chains
from eval.sequences import initial_state

DECISIONS_A_START = 20


def decide(policy, decisions: int) -> dict[str, np.ndarray]:
    """Milliseconds of each decision: wall, processor, and the stages that the policy names."""
    env, instructions, rows = CalvinEnv(scene="D", observe="on_demand"), load_instructions(), []
    for _, (state, tasks) in select_chains(-(-decisions // DECISIONS_A_START)):
        robot_obs, scene_obs = initial_state(state)
        env.reset(options={ROBOT_OBS: robot_obs, SCENE_OBS: scene_obs})
        policy.reset(instructions[tasks[0]])
        for _ in range(DECISIONS_A_START):
            observation = env.observe()
            wall, processor = time.perf_counter(), time.process_time()
            answer = policy.infer(observation)
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            ahead, ahead_processor = time.perf_counter(), time.process_time()
            policy.prepare()
            ahead, ahead_processor = time.perf_counter() - ahead, time.process_time() - ahead_processor
            row = {"wall": wall, "processor": processor + ahead_processor} | answer["timing_s"]
            rows.append(row | {"meanwhile": ahead, "ids": len(answer["token_ids"]) / 1e3})
            for action in answer["actions"]:
                env.step(action)
    env.close()
    return {name: np.array([row[name] for row in rows]) * 1e3 for name in rows[0]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default=policies.SHIPPED)
    parser.add_argument("--decisions", type=int, default=100)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model's arithmetic")
    parser.add_argument("--int8-draft", action="store_true", help="let a copy of the trunk in int8 guess action ids")
    parser.add_argument("--lossy", type=int, help="let guesses at action ids count as right after so many rounds")
    arguments = parser.parse_args()
    policy = policies.load(arguments.policy, dtype=arguments.dtype, int8_draft=arguments.int8_draft, lossy=arguments.lossy)
    decide(policy, DECISIONS_A_START)  # the first decisions of a process prepare kernels and memory
    figures = decide(policy, arguments.decisions)
    machine = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"{arguments.policy}, {arguments.dtype}: {len(figures['wall'])} decisions, {machine}; milliseconds")
    print(f"{'':12}{'least':>8}{'p50':>8}{'p99':>8}")
    for name, values in figures.items():
        least, half, most = np.percentile(values, [0, 50, 99])
        print(f"{name:12}{least:8.1f}{half:8.1f}{most:8.1f}")


if __name__ == "__main__":
    main()
