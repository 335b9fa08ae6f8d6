"""The scripted expert solves tasks in every scene, recovers from disturbances, and its demonstrations are what they say."""

import numpy as np
import pybullet as pb
import pytest

from envs.calvin.env import CalvinEnv
from envs.calvin.expert.demonstrate import DemonstrationConfig, demonstrate
from envs.calvin.expert.policy import SKILLS, ExpertPolicy
from envs.calvin.tasks import TASKS, completed_tasks
from eval.sequences import initial_state, long_horizon_sequences

SCENES = ("A", "B", "C", "D")


@pytest.fixture(scope="module")
def envs():
    made: dict[str, CalvinEnv] = {}

    def env_of(scene: str) -> CalvinEnv:
        if scene not in made:
            made[scene] = CalvinEnv(scene, observe="on_demand")
        return made[scene]

    yield env_of
    for env in made.values():
        env.close()


@pytest.fixture
def env(envs):
    return envs("D")


def _begin(env, expert, chain: int) -> tuple[str, ...]:
    condition, tasks = long_horizon_sequences(chain + 1)[chain]
    robot_obs, scene_obs = initial_state(condition, env.scene.name)
    env.reset(options={"robot_obs": robot_obs, "scene_obs": scene_obs})
    expert.begin_chain()
    return tasks


def _solve(env, expert, task: str, disturb=None) -> bool:
    """Let the expert do the task; `disturb(step, observation)` may return an action to be executed instead of its own."""
    expert.reset("", task=task)
    start, observation = env.info(), env.state()
    for step in range(360):
        action = disturb(step, observation) if disturb else None
        if action is None:
            action = expert.infer(observation)["actions"][0]
        else:
            expert.sense(observation)
            expert.executed(action)
        observation, _, _, _, info = env.step(action)
        if completed_tasks(start, info, among=[task]):
            return True
    return False


@pytest.mark.parametrize("scene", SCENES)
def test_expert_solves_official_chains_in_every_scene(envs, scene):
    env, expert = envs(scene), ExpertPolicy(scene)
    assert [_solve(env, expert, task) for chain in range(5) for task in _begin(env, expert, chain)] == [True] * 25


@pytest.mark.parametrize("scene", SCENES)
def test_expert_solves_chains_with_the_original_assets(calvin_assets, scene):
    env, expert = CalvinEnv(scene, assets=calvin_assets, observe="on_demand"), ExpertPolicy(scene)
    assert [_solve(env, expert, task) for chain in range(2) for task in _begin(env, expert, chain)] == [True] * 10
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_expert_solves_every_task_in_every_scene(envs, scene):
    env, expert = envs(scene), ExpertPolicy(scene)
    unsolved = set(TASKS)
    for chain in range(120):
        tasks = _begin(env, expert, chain)
        if unsolved.intersection(tasks):
            unsolved -= {task for task in tasks if _solve(env, expert, task)}
    assert not unsolved


class _Burst:
    """Random actions, gripper included, for some steps."""

    def __init__(self, begins: int, steps: int, seed: int):
        self.begins, self.ends, self.rng = begins, begins + steps, np.random.default_rng(seed)
        self.drift = self.rng.uniform(-1, 1, 6) * [1, 1, 0.7, 0.3, 0.3, 0.6]

    def __call__(self, step, observation):
        if not self.begins <= step < self.ends:
            return None
        motion = np.clip(self.drift + self.rng.normal(0, 0.3, 6), -1, 1)
        return np.r_[motion, self.rng.choice([-1, 1])].astype(np.float32)


class _Knock:
    """Puts a block elsewhere at one step, turned: it slid 3 cm."""

    def __init__(self, env, color: str, at: int):
        self.env, self.body, self.at, self.done = env, env.simulation.blocks[f"block_{color}"], at, False

    def __call__(self, step, observation):
        if step == self.at:
            client = {"physicsClientId": self.env.simulation.client}
            (x, y, z), _ = pb.getBasePositionAndOrientation(self.body, **client)
            assert z < 0.47, "it lies on the table still"
            pb.resetBasePositionAndOrientation(self.body, (x + 0.03, y + 0.02, z), pb.getQuaternionFromEuler((0, 0, 1.1)), **client)
            self.done = True


DISTURBED = ("turn_on_led", "turn_on_lightbulb", "open_drawer", "move_slider_left", "rotate_{0}_block_left", "push_{0}_block_right")


def _scene_for(env, expert, color: str, number: int) -> None:
    """Lights off, drawer closed, door right, that block on the table: every one of DISTURBED is possible."""
    matching = [
        chain
        for chain, _ in long_horizon_sequences()
        if chain["led"] == chain["lightbulb"] == 0
        and (chain["slider"], chain["drawer"], chain[f"{color}_block"]) == ("right", "closed", "table")
    ]
    robot_obs, scene_obs = initial_state(matching[number % len(matching)], env.scene.name)
    env.reset(options={"robot_obs": robot_obs, "scene_obs": scene_obs})
    expert.begin_chain()


@pytest.mark.parametrize("task", [*DISTURBED, "lift_{0}_block_table"])
@pytest.mark.parametrize("scene", SCENES)
def test_expert_recovers_from_bursts_of_random_actions(envs, scene, task):
    env, expert = envs(scene), ExpertPolicy(scene)
    for seed, color in enumerate(("red", "blue", "pink")):
        _scene_for(env, expert, color, seed)
        # A block that a burst has tipped over cannot be rotated any more, so there the burst comes before the hand is at the block.
        burst = _Burst(begins=3 if task.startswith("rotate") else 12 + 7 * seed, steps=8, seed=seed)
        assert _solve(env, expert, task.format(color), burst), f"burst {seed}"


@pytest.mark.parametrize("task", ["lift_{0}_block_table", "rotate_{0}_block_left", "push_{0}_block_left"])
@pytest.mark.parametrize("scene", SCENES)
def test_expert_recovers_when_the_block_is_knocked_away(envs, scene, task):
    env, expert = envs(scene), ExpertPolicy(scene)
    for number, color in enumerate(("red", "blue", "pink")):
        _scene_for(env, expert, color, number)
        knock = _Knock(env, color, at=10)
        assert _solve(env, expert, task.format(color), knock), color
        assert knock.done


def test_a_dropped_block_is_taken_up_again(env):
    expert = ExpertPolicy("D")
    _scene_for(env, expert, "red", 0)
    assert _solve(env, expert, "lift_red_block_table")

    def let_go(step, observation):
        return np.array([0, 0, 0, 0, 0, 0, 1], np.float32) if step < 12 else None

    assert _solve(env, expert, "place_in_slider", let_go)


def test_answers_are_a_function_of_the_observations(env):
    def play() -> list[np.ndarray]:
        expert = ExpertPolicy("D")
        task = _begin(env, expert, 2)[0]
        expert.reset("", task=task)
        observation, actions = env.state(), []
        for _ in range(60):
            actions.append(expert.infer(observation)["actions"])
            observation = env.step(actions[-1][0])[0]
        return actions

    np.testing.assert_array_equal(play(), play())


def test_wrist_never_turns_past_its_range(envs):
    """Past it the arm collapses: the hand's yaw must stay between -π/2 and 3π/2 also where a block lies at an awkward angle."""
    env, expert = envs("D"), ExpertPolicy("D")
    for yaw in np.linspace(-np.pi, np.pi, 7):
        _scene_for(env, expert, "pink", 0)
        state = env.state()
        state["scene_obs"][6:].reshape(3, 6)[expert.arm.block_order.index("pink"), 5] = yaw
        env.reset(options=state)
        expert.begin_chain()
        assert _solve(env, expert, "rotate_pink_block_left"), yaw
        assert -np.pi / 2 - 0.1 < expert.arm.target[5] < 1.5 * np.pi + 0.1


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


class _Forward:
    """Looks, then moves forward for seven steps. Keeps what it was shown and told."""

    requires = frozenset({"rgb_static", "rgb_gripper"})

    def __init__(self):
        self.seen, self.told = [], []

    def reset(self, instruction, *, task=None, seed=None):
        self.told.append((instruction, task))

    def infer(self, observation):
        self.seen.append(observation["rgb_static"])
        return {"actions": np.tile(np.array([0, 0.5, 0, 0, 0, 0, 1], np.float32), (7, 1))}


def test_expert_relieves_a_driver(env):
    expert, driver = ExpertPolicy("D"), _Forward()
    task = _begin(env, expert, 0)[0]
    config = DemonstrationConfig(driven_probability=1.0, driven_steps=(17, 17))
    episode = demonstrate(env, expert, task, "do it", np.random.default_rng(0), config, driver)
    assert driver.told == [("do it", None)]
    assert not episode.imitate[:17].any() and episode.imitate[17:].all()
    assert np.all(episode.actions[:17, 1] == 0.5)
    assert list(episode.frame_step[:6]) == [0, 5, 10, 15, 17, 22], "the grid starts anew when the expert takes over"
    assert len(driver.seen) == 3  # at steps 0, 7 and 14, each time what the camera shows then
    np.testing.assert_array_equal(driver.seen[0], episode.rgb_static[0])
    assert not np.array_equal(driver.seen[1], driver.seen[0])


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
    with pytest.raises(ValueError, match="driven_steps=.5, 2. must be two ascending"):
        DemonstrationConfig(driven_steps=(5, 2))


def test_smooth_motions_are_bounded_straight_and_still_solve(env):
    expert = ExpertPolicy("D", acceleration=0.2)
    tasks = _begin(env, expert, 3)
    actions = []
    for task in tasks:
        expert.reset("", task=task)
        start, observation = env.info(), env.state()
        for _ in range(360):
            actions.append(expert.infer(observation)["actions"][0])
            observation, _, _, _, info = env.step(actions[-1])
            if solved := completed_tasks(start, info, among=[task]):
                break
        assert solved, task
    pace = np.abs(np.array(actions)[:, :6]).max(axis=1)
    # Plans that are broken off stop at once; nothing ever starts at once.
    assert np.diff(pace).max() < 0.2 + 1e-6
    assert (np.abs(np.diff(pace)) > 0.2 + 1e-6).mean() < 0.05


def test_an_acceleration_of_nothing_is_refused():
    with pytest.raises(ValueError, match="acceleration is 0, expected above 0"):
        ExpertPolicy("D", acceleration=0)
