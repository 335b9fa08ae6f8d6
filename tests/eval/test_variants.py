"""Variants: what they draw depends on seed and chain alone, and they are said."""

import numpy as np
import pytest

from emu3_vla.cli import UsageError, compose
from envs.calvin.language import validation_wordings
from envs.calvin.tasks import TASKS
from eval import protocol
from eval.chain import Watcher, run_chain
from eval.environment import EnvConfig
from eval.sequences import initial_state, long_horizon_sequences
from eval.variants import NAMES, DisturbanceOptions, LateEyes, LateHands, Variants, chosen_variants
from policies.simple import RandomPolicy, ZeroPolicy

CHAINS = long_horizon_sequences(6)
INSTRUCTIONS = protocol.load_instructions()
CALM = DisturbanceOptions(push_probability=1.0, push_steps=(5, 5), push_window=(3, 3))


@pytest.fixture(scope="module")
def env():
    env = EnvConfig().make()
    yield env
    env.close()


class Poses(Watcher):
    def __init__(self):
        self.actions, self.decisions = [], 0

    def stepped(self, env, action, before, attempt):
        self.actions.append(np.array(action))

    def decided(self, answer):
        self.decisions += 1


def run(env, policy, names, index=0, seed=0, watcher=None, steps=25, options=CALM):
    variants = Variants(names=chosen_variants(names), disturbance=options)
    result = run_chain(env, policy, index, CHAINS[index], INSTRUCTIONS, max_steps=steps, seed=seed, variants=variants, watcher=watcher)
    assert result.error is None, result.error
    return result, env.state()


def test_names_and_groups():
    assert chosen_variants("none") == chosen_variants([]) == ()
    assert chosen_variants("disturbances") == ("pushes", "latency", "camera_jitter")
    assert chosen_variants(["pushes", "resampled_poses", "pushes"]) == ("resampled_poses", "pushes")
    with pytest.raises(ValueError, match="eval.variant=push is not one of .*did you mean 'pushes'"):
        chosen_variants("push")


@pytest.mark.parametrize("scene", "ABCD")
def test_resampled_poses_keep_blocks_where_their_tasks_need_them(scene):
    variants = Variants(names=("resampled_poses",))
    for index, (condition, _) in enumerate(long_horizon_sequences(50)):
        _, official = initial_state(condition, scene)
        drawn = variants.scene_obs(official, condition, scene, 0, index)
        np.testing.assert_array_equal(drawn[:6], official[:6])
        assert not np.array_equal(drawn, official)
        np.testing.assert_array_equal(drawn, variants.scene_obs(official, condition, scene, 0, index))
        assert not np.array_equal(drawn, variants.scene_obs(official, condition, scene, 1, index))
        blocks, before = drawn[6:].reshape(3, 6), official[6:].reshape(3, 6)
        np.testing.assert_array_equal(blocks[:, 2:5], before[:, 2:5])
        on_table = before[:, 1] < 0
        assert (np.abs(blocks[~on_table, :2] - before[~on_table, :2]) <= 0.03).all()
        if on_table.sum() == 2:
            assert np.linalg.norm(np.diff(blocks[on_table, :2], axis=0)) > 0.12


def test_unseen_wordings_are_ours_beyond_the_first():
    variants, said = Variants(names=("unseen_wordings",)), set()
    for task in TASKS:
        for chain in range(20):
            wording = variants.instruction(task, INSTRUCTIONS[task], 0, chain, 0)
            assert wording in validation_wordings()[task][1:]
            said.add(wording)
    assert len(said) == sum(len(wordings) - 1 for wordings in validation_wordings().values())


def test_a_push_takes_the_place_of_actions_at_its_steps(env):
    watcher = Poses()
    result, state = run(env, ZeroPolicy(), "pushes", watcher=watcher)
    moved = [step for step, action in enumerate(watcher.actions) if np.abs(action[:6]).max() > 0]
    assert moved == [3, 4, 5, 6, 7]
    assert (result.attempts[0].pushed_steps, result.steps, watcher.decisions) == (5, 25, 20)
    assert len({action[6] for action in watcher.actions}) == 1, "a push leaves the gripper as it was"
    _, again = run(env, ZeroPolicy(), "pushes")
    np.testing.assert_array_equal(state["robot_obs"], again["robot_obs"])
    _, other = run(env, ZeroPolicy(), "pushes", seed=1)
    assert not np.array_equal(state["robot_obs"], other["robot_obs"])


def test_action_latency_delays_the_same_actions(env):
    plain, late = Poses(), Poses()
    run(env, RandomPolicy(), "none", watcher=plain)
    run(env, RandomPolicy(), "latency", watcher=late, options=DisturbanceOptions(observation_latency=0, action_latency=3))
    assert all(np.abs(action[:6]).max() == 0 for action in late.actions[:3])
    np.testing.assert_array_equal(late.actions[3:], plain.actions[:-3])


class Looks:
    """Notes which moment it is shown; answers chunks of a given length."""

    name, requires = "looks", frozenset({"robot_obs"})

    def __init__(self, chunk):
        self.chunk, self.shown = chunk, []

    def reset(self, instruction, *, task=None, seed=None):
        self.shown.clear()

    def infer(self, observation):
        self.shown.append(observation["robot_obs"].copy())
        return {"actions": np.tile([0.3, 0, 0, 0, 0, 0, 1.0], (self.chunk, 1))}


@pytest.mark.parametrize(("chunk", "latency"), [(1, 3), (2, 3), (3, 3), (10, 3), (10, 0), (4, 10)])
def test_observations_come_late_and_from_the_right_moment(env, chunk, latency):
    class States(Watcher):
        def __init__(self):
            self.before = []

        def stepped(self, env, action, before, attempt):
            self.before.append(before)

    watcher, policy = States(), Looks(chunk)
    options = DisturbanceOptions(observation_latency=latency, action_latency=0 if latency else 1)
    run(env, policy, "latency" if latency else "none", watcher=watcher, options=options)
    for number, shown in enumerate(policy.shown):
        np.testing.assert_array_equal(shown, watcher.before[max(0, number * chunk - latency)])


def test_images_are_rendered_only_where_a_decision_may_ask():
    class Counting:
        looked = 0

        def observe(self):
            self.looked += 1
            return {}

    counting = Counting()
    eyes = LateEyes(counting, True, 2)
    for step in range(20):
        pending = -step % 10
        eyes.look(step, pending, {})
    assert counting.looked == 1 + 2 + 1 + 2, "in each chunk of ten: the decision itself, and the two moments up to two ahead of the next"
    hands = LateHands(0)
    assert hands.executes(np.ones(7), {"robot_obs": np.ones(15)}).tolist() == [1] * 7


def test_camera_jitter_is_of_the_chain_and_moves_pictures_alone():
    options = DisturbanceOptions(camera_jitter=1.0)
    env = EnvConfig().make(options.camera_jitter)
    pictures = {}
    for index, seed in ((0, 0), (1, 0), (0, 0), (0, 1)):
        run(env, ZeroPolicy(), "camera_jitter", index=index, seed=seed, steps=1, options=options)
        picture, state = env.observe()["rgb_static"], env.state()["scene_obs"]
        if (index, seed) in pictures:
            np.testing.assert_array_equal(picture, pictures[index, seed][0])
        pictures[index, seed] = picture, state
    env.close()
    assert not np.array_equal(pictures[0, 0][0], pictures[0, 1][0])
    np.testing.assert_array_equal(pictures[0, 0][1], pictures[0, 1][1])


def test_each_variant_is_a_deviation_by_name():
    described = Variants(names=NAMES).described()
    used = protocol.OFFICIAL | {"variants": described}
    assert [text.split(":")[0] for text in protocol.deviations(used)] == [f"variant {name}" for name in NAMES]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.variant=posh"], "eval.variant=posh is not one of"),
        (["eval.disturbance.push_steps=[5,2]"], "two ascending numbers"),
        (["eval.disturbance.push_probability=2"], "outside"),
        (["eval.protocol=mtcl"], "did you mean 'mtlc'"),
        (["eval.engine=rai"], "did you mean 'ray'"),
        (["eval.protocol=mtlc", "eval.rollouts_per_task=0"], "eval.rollouts_per_task=0"),
    ],
)
def test_wrong_options_are_said(overrides, message):
    with pytest.raises(UsageError, match=message):
        compose("eval", ["policy=zero", *overrides])


def test_options_reach_the_config():
    config = compose("eval", ["policy=zero", "eval.variant=disturbances", "policy_options.temperature=0.5"])
    assert config.eval.variant == ("pushes", "latency", "camera_jitter")
    assert config.policy_options.given() == {"temperature": 0.5}
    assert (config.eval.steps, compose("eval", ["policy=zero", "eval.protocol=mtlc"]).eval.steps) == (360, 240)
