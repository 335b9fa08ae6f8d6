"""The scripted expert solves tasks, recovers from disturbances, and its demonstrations are what they say."""

import numpy as np
import pytest

from envs.calvin.demonstrate import DemonstrationConfig, demonstrate
from envs.calvin.env import CalvinEnv
from envs.calvin.expert import SKILLS, ExpertPolicy
from envs.calvin.tasks import TASKS, completed_tasks
from eval.sequences import initial_state, long_horizon_sequences


@pytest.fixture(scope="module")
def env():
    made = CalvinEnv("D", observe="on_demand")
    yield made
    made.close()


def _begin(env, expert, chain: int) -> tuple[str, ...]:
    condition, tasks = long_horizon_sequences(chain + 1)[chain]
    robot_obs, scene_obs = initial_state(condition)
    env.reset(options={"robot_obs": robot_obs, "scene_obs": scene_obs})
    expert.begin_chain()
    return tasks


def _solve(env, expert, task: str) -> bool:
    expert.reset("", task=task)
    start, observation = env.info(), env.state()
    for _ in range(360):
        observation, _, _, _, info = env.step(expert.infer(observation)["actions"][0])
        if completed_tasks(start, info, among=[task]):
            return True
    return False


def test_expert_solves_official_chains(env):
    expert = ExpertPolicy("D")
    solved = [_solve(env, expert, task) for chain in range(4) for task in _begin(env, expert, chain)]
    assert np.mean(solved) >= 0.95


def test_every_task_has_a_skill():
    assert tuple(SKILLS) == TASKS


def test_demonstration_recovers_from_its_disturbance(env):
    expert = ExpertPolicy("D")
    task = _begin(env, expert, 0)[0]
    config = DemonstrationConfig(disturbance_probability=1.0, disturbance_window=(10, 12))
    episode = demonstrate(env, expert, task, "do it", np.random.default_rng(0), config)
    disturbed = np.flatnonzero(~episode.imitate)
    low, high = config.disturbance_steps
    assert 10 <= disturbed[0] <= 12 and low <= len(disturbed) <= high
    assert np.all(np.diff(disturbed) == 1)
    assert disturbed[-1] + 1 in episode.frame_step
    assert np.abs(episode.actions).max() <= 1 and set(np.unique(episode.actions[:, 6])) <= {-1.0, 1.0}


def test_actions_of_a_demonstration_replay_to_its_states(env):
    expert = ExpertPolicy("D")
    task = _begin(env, expert, 3)[0]
    episode = demonstrate(env, expert, task, "do it", np.random.default_rng(1), DemonstrationConfig())
    _begin(env, expert, 3)
    for action, robot_obs, scene_obs in zip(episode.actions, episode.robot_obs, episode.scene_obs, strict=True):
        state = env.state()
        np.testing.assert_array_equal(state["robot_obs"], robot_obs)
        np.testing.assert_array_equal(state["scene_obs"], scene_obs)
        env.step(action)


def test_what_the_expert_does_not_know_is_named():
    with pytest.raises(ValueError, match="unknown scene 'X'"):
        ExpertPolicy("X")
    with pytest.raises(ValueError, match="did you mean 'open_drawer'"):
        ExpertPolicy("D").reset("", task="open_drawr")
    with pytest.raises(ValueError, match="disturbance_probability=2"):
        DemonstrationConfig(disturbance_probability=2)
