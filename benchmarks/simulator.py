"""Speed of the simulator against CALVIN's published loop, as ratios of one run.

    OMP_NUM_THREADS=1 python benchmarks/simulator.py
    OMP_NUM_THREADS=1 python benchmarks/simulator.py --assets <calvin_env's data folder>      # the original parts too

One thread, processor time, scene D, random actions. The loops take turns, a burst of 60 steps (a usual subtask) each; the best burst
counts, being the least disturbed one. "published" is calvin_env's loop: both images at every step, each drawn whole with its segmentation
mask. It is calvin_env itself where that package is installed; else our physics, which makes the same calls, with the images drawn as
calvin_env draws them. Resets are without images, into a given state.
"on demand" looks once in ten steps, as a policy does that predicts ten actions at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pybullet as pb

from envs.calvin import CalvinEnv, scenes
from envs.calvin.images.cameras import GRIPPER_CAMERA_LINK
from envs.calvin.scenes import NEUTRAL_JOINTS_RAD, Camera
from envs.calvin.tasks import TASKS, completed_tasks

BURST, LOOK_EVERY = 60, 10
ACTIONS = np.random.default_rng(0).uniform(-0.5, 0.5, (BURST, 7))  # relative, so that the arm wanders
ACTIONS[:, 6] = np.where(np.arange(BURST) < BURST // 2, 1.0, -1.0)
SCENE_OBS = np.zeros(24)
SCENE_OBS[6:] = np.array([(0.05, -0.12, 0.46, 0, 0, 1.5), (0.23, -0.12, 0.46, 0, 0, 1.5), (0.1, 0.09, 0.461, 0, 0, 1.5)]).ravel()
ROBOT_OBS = np.r_[np.zeros(6), 0.08, NEUTRAL_JOINTS_RAD, 1.0]
START = {"robot_obs": ROBOT_OBS, "scene_obs": SCENE_OBS}


def whole_image(env: CalvinEnv, camera: Camera, view: list[float]) -> np.ndarray:
    """One image as calvin_env draws it: every polygon of the scene, with depth and segmentation mask."""
    projection = pb.computeProjectionMatrixFOV(camera.fov_deg, camera.width / camera.height, camera.near_m, camera.far_m)
    client = env.simulation.cameras.stage.synced()
    return pb.getCameraImage(camera.width, camera.height, view, projection, renderer=pb.ER_TINY_RENDERER, physicsClientId=client)[2]


def draw_as_published(env: CalvinEnv) -> None:
    """Both images, drawn whole."""
    static = scenes.STATIC_CAMERA
    whole_image(env, static, pb.computeViewMatrix(static.look_from, static.look_at, static.up))
    position, orientation = pb.getLinkState(env.simulation.robot, GRIPPER_CAMERA_LINK, physicsClientId=env.simulation.client)[:2]
    rotation = np.array(pb.getMatrixFromQuaternion(orientation)).reshape(3, 3)
    whole_image(env, scenes.GRIPPER_CAMERA, pb.computeViewMatrix(position, position + rotation[:, 1], -rotation[:, 2]))


def published_loop(assets: Path) -> tuple[str, Callable[[], float]]:
    """What stands for the published loop, and a burst of it."""
    if importlib.util.find_spec("calvin_env") is not None:
        from envs.calvin_official import OfficialCalvinEnv

        return "calvin_env itself", burst(OfficialCalvinEnv("D", assets=assets, observe="always"), look_every=None)
    env = CalvinEnv("D", assets=assets, observe="on_demand")
    return "our physics with the images drawn as calvin_env does (calvin_env is not installed)", burst(env, 1, draw_as_published)


def burst(env, look_every: int | None, look: Callable = CalvinEnv.observe) -> Callable[[], float]:
    """A function that plays a burst of steps from one start, and returns milliseconds a step. look_every: None for never."""

    def play() -> float:
        env.reset(options=START)
        started = time.process_time()
        for step, action in enumerate(ACTIONS):
            if look_every and step % look_every == 0:
                look(env)
            env.step(action)
        return (time.process_time() - started) * 1e3 / len(ACTIONS)

    play()  # the first image loads what is seen
    return play


def reset(env: CalvinEnv) -> Callable[[], float]:
    """A function that steps once, so that there is something to undo, and returns milliseconds of a reset without images."""

    def play() -> float:
        env.step(ACTIONS[0])
        started = time.process_time()
        env.reset(options=START)
        return (time.process_time() - started) * 1e3

    env.reset(options=START)
    return play


def oracle(env: CalvinEnv) -> Callable[[], float]:
    """A function that returns milliseconds of judging one task, the mean over all 34."""
    _, start = env.reset(options=START)
    for action in ACTIONS:
        end = env.step(action)[4]

    def play() -> float:
        started = time.process_time()
        for task in TASKS:
            completed_tasks(start, end, among=[task])
        return (time.process_time() - started) * 1e3 / len(TASKS)

    return play


def measure(plays: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Least milliseconds of each, taking turns."""
    figures: dict[str, list[float]] = {name: [] for name in plays}
    for _ in range(rounds):
        for name, play in plays.items():
            figures[name].append(play())
    return {name: min(values) for name, values in figures.items()}


def loops(assets: Path | None) -> tuple[str, dict[str, Callable[[], float]]]:
    """What stands for the published loop ("" without original assets), and everything that is to be timed."""
    own = CalvinEnv("D", observe="on_demand")
    plays = {
        "own, step without images": burst(own, None),
        "own, both images every step": burst(CalvinEnv("D", observe="on_demand"), 1),
        "own, on demand": burst(CalvinEnv("D", observe="on_demand"), LOOK_EVERY),
        "own, reset": reset(CalvinEnv("D", observe="on_demand")),
        "oracle, one task": oracle(own),
    }
    if assets is None:
        return "", plays
    baseline, published = published_loop(assets)
    plays |= {
        "published loop": published,
        "original, step without images": burst(CalvinEnv("D", assets=assets, observe="on_demand"), None),
        "original, both images every step": burst(CalvinEnv("D", assets=assets, observe="on_demand"), 1),
        "original, on demand": burst(CalvinEnv("D", assets=assets, observe="on_demand"), LOOK_EVERY),
        "original, reset": reset(CalvinEnv("D", assets=assets, observe="on_demand")),
    }
    return baseline, plays


def ratios(figures: dict[str, float]) -> dict[str, float]:
    """How many times as fast as the published loop; and the oracle's share of a step, in per cent."""
    found = {"oracle, % of our step without images": 100 * figures["oracle, one task"] / figures["own, step without images"]}
    published = figures.get("published loop")
    for name in ("own, both images every step", "own, on demand", "original, both images every step", "original, on demand"):
        if published is not None:
            found[f"{name}, times the published loop"] = published / figures[name]
    return found


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, help="calvin_env's data folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    baseline, plays = loops(arguments.assets)
    figures = measure(plays, arguments.rounds)
    print(f"milliseconds a step (or a reset, a task judged), best of {arguments.rounds} rounds")
    for name, value in figures.items():
        print(f"  {name:<56}{value:9.3f}")
    print(
        f"published loop: {baseline}" if baseline else "no published loop and no original assets: give calvin_env's data folder by --assets"
    )
    for name, value in ratios(figures).items():
        print(f"  {name:<56}{value:9.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"published": baseline, "milliseconds": figures, "ratios": ratios(figures)}, indent=1))


if __name__ == "__main__":
    main()
