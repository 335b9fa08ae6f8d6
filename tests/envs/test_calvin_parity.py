"""State for state what calvin_env does, when given its assets."""

import json

import numpy as np
import pytest

from envs.calvin.env import CalvinEnv
from envs.calvin.tasks import completed_tasks

TRACES = ("A0", "C0", "D0", "D2", "D4", "Dabs0")


@pytest.fixture(scope="module")
def environments(calvin_assets):
    """One environment a scene, used again and again: a reset must leave nothing of what was simulated before."""
    made = {}

    def get(scene: str, action_space: str) -> CalvinEnv:
        key = scene, action_space
        if key not in made:
            made[key] = CalvinEnv(scene, assets=calvin_assets, observe="on_demand", version="797142c", action_space=action_space)
        return made[key]

    yield get
    for env in made.values():
        env.close()


@pytest.mark.parametrize("name", TRACES)
def test_recorded_trace_is_replayed_exactly(name, reference, environments):
    trace = np.load(reference / f"calvin/trace_{name}.npz")
    env = environments(json.loads(str(trace["meta"]))["scene"], "absolute" if trace["absolute"] else "relative")
    observation, _ = env.reset(options={"robot_obs": trace["robot_obs_reset"], "scene_obs": trace["scene_obs_reset"]})
    np.testing.assert_array_equal(observation["robot_obs"], trace["robot_obs"][0])
    np.testing.assert_array_equal(observation["scene_obs"], trace["scene_obs"][0])
    for step, action in enumerate(trace["actions"], start=1):
        observation = env.step(action)[0]
        np.testing.assert_array_equal(observation["robot_obs"], trace["robot_obs"][step])
        np.testing.assert_array_equal(observation["scene_obs"], trace["scene_obs"][step])


@pytest.mark.parametrize("name", ["D0", "A0"])
def test_images_match_the_recorded_frames(name, reference, environments):
    trace = np.load(reference / f"calvin/trace_{name}.npz")
    env = environments(json.loads(str(trace["meta"]))["scene"], "relative")
    env.reset(options={"robot_obs": trace["robot_obs_reset"], "scene_obs": trace["scene_obs_reset"]})
    frames = dict(zip(trace["frame_steps"].tolist(), range(len(trace["frame_steps"])), strict=True))
    for step in range(len(trace["actions"]) + 1):
        if step in frames:
            images = env.observe()
            for camera in ("rgb_static", "rgb_gripper"):
                difference = np.abs(images[camera].astype(int) - trace[camera][frames[step]].astype(int)).max(axis=-1)
                assert (difference > 2).mean() <= 0.01, (camera, step)
            for camera, (_, depth_m) in (("static", env.simulation.render_static()), ("gripper", env.simulation.render_gripper())):
                recorded_m = trace[f"depth_{camera}"][frames[step]]
                # calvin_env's static depth comes in steps of half a millimetre; our layers are finer.
                assert (np.abs(depth_m - recorded_m) > 1e-3).mean() <= 0.01, (camera, step)
        if step < len(trace["actions"]):
            env.step(trace["actions"][step])


def test_demonstrations_succeed_at_the_recorded_step(reference, environments):
    demos = np.load(reference / "calvin/demos.npz")
    states = np.load(reference / "calvin/initial_states.npz")
    env = environments("D", "relative")
    recorded = {name: entry for name, entry in json.loads(str(demos["index"]))["tasks"].items() if f"{name}/actions" in demos}
    assert len(recorded) >= 10
    for name, entry in recorded.items():
        row = entry["sequence"]
        _, start = env.reset(options={key: states[key][row] for key in ("robot_obs", "scene_obs")})
        subtasks = list(zip(entry["subtasks"], entry["success_at_step"], strict=True))
        for step, action in enumerate(demos[f"{name}/actions"], start=1):
            info = env.step(action)[4]
            if subtasks and completed_tasks(start, info, among=[subtasks[0][0]]):
                assert step == subtasks.pop(0)[1], name
                start = info
        assert not subtasks, name
