"""Touch: closed fingers on a block leave a dent in both sensors, empty ones none."""

import numpy as np
import pytest

from envs.calvin import CalvinEnv
from envs.calvin.tactile import DENT_M, HEIGHT, WIDTH, shade

UPSIDE_DOWN_RAD = np.pi


@pytest.fixture(scope="module")
def env():
    made = CalvinEnv("D", observe="on_demand", action_space="absolute", tactile=True)
    yield made
    made.close()


def _move(env, position_m, yaw_rad: float, gripper: int, steps: int = 40) -> None:
    for _ in range(steps):
        env.step(np.r_[position_m, UPSIDE_DOWN_RAD, 0, yaw_rad, gripper])


def _grasp(env, height_m: float = 0.0) -> np.ndarray:
    """Close the fingers across the red block, `height_m` above its middle; the block's position."""
    block = env.reset(seed=0)[0]["scene_obs"][6:12]
    above, at = block[:3] + (0, 0, 0.1), block[:3] + (0, 0, height_m)
    _move(env, above, block[5], gripper=1, steps=80)
    _move(env, at, block[5], gripper=1)
    _move(env, at, block[5], gripper=-1)
    return block


def _touch(env) -> tuple[np.ndarray, np.ndarray]:
    observation = env.observe()
    return observation["rgb_tactile"], observation["depth_tactile"]


def test_empty_fingers_feel_nothing_open_or_closed(env):
    env.reset(seed=0)
    resting, depth = _touch(env)
    assert not depth.any()
    np.testing.assert_array_equal(resting[..., :3], resting[..., 3:])
    pose = env.state()["robot_obs"]
    _move(env, pose[:3] + (0, 0, 0.1), pose[5], gripper=-1)
    assert env.state()["robot_obs"][6] < 0.001, "closed"
    rgb, depth = _touch(env)
    assert not depth.any()
    np.testing.assert_array_equal(rgb, resting)


def test_a_grasped_block_dents_both_sensors(env):
    env.reset(seed=0)
    resting, _ = _touch(env)
    _grasp(env)
    rgb, depth = _touch(env)
    for finger in (0, 1):
        dent = depth[..., finger]
        assert 0.5 * DENT_M < dent.max() <= DENT_M
        assert 0.3 < (dent > 1e-4).mean() < 0.9
        row, column = np.unravel_index(dent.argmax(), dent.shape)
        assert abs(column - WIDTH / 2) < 15, "the pad bulges, so a flat face presses its middle most"
        image, rest = (pixels[..., 3 * finger : 3 * finger + 3].astype(int) for pixels in (rgb, resting))
        assert (np.abs(image - rest).max(axis=-1) > 10).mean() > 0.1
        untouched = dent < 1e-7
        assert np.abs(image - rest)[untouched].max() <= 60, "far from the dent the image changes at its edge alone"
        assert np.median(np.abs(image - rest)[untouched]) <= 1


def test_only_the_end_of_the_finger_feels_a_block_held_high(env):
    _grasp(env, height_m=0.014)
    _, depth = _touch(env)
    end, root = depth[: HEIGHT // 8], depth[-HEIGHT // 8 :]
    for finger in (0, 1):
        assert depth[..., finger].max() > 0.5 * DENT_M
        assert end[..., finger].mean() > 10 * max(root[..., finger].mean(), 1e-9), "row 0 is the fingertip's end"


def test_letting_go_leaves_no_dent(env):
    block = _grasp(env)
    assert _touch(env)[1].any()
    _move(env, block[:3] + (0, 0, 0.02), block[5], gripper=1, steps=20)
    assert not _touch(env)[1].any()


def test_touch_leaves_states_and_images_alone():
    with_touch, plain = (CalvinEnv("D", observe="on_demand", tactile=tactile) for tactile in (True, False))
    for env in (with_touch, plain):
        env.reset(seed=0)
    for _ in range(10):
        action = np.array([0.2, 0, -1, 0, 0, 0, -1])
        observations = [env.step(action)[0] for env in (with_touch, plain)]
        images = [env.observe() for env in (with_touch, plain)]
        np.testing.assert_array_equal(observations[0]["scene_obs"], observations[1]["scene_obs"])
        np.testing.assert_array_equal(images[0]["rgb_gripper"], images[1]["rgb_gripper"])
        np.testing.assert_array_equal(images[0]["rgb_static"], images[1]["rgb_static"])
    with_touch.close(), plain.close()


def test_original_assets_feel_the_same(calvin_assets):
    env = CalvinEnv("D", assets=calvin_assets, observe="on_demand", action_space="absolute", tactile=True)
    _grasp(env)
    _, depth = _touch(env)
    assert (depth.max(axis=(0, 1)) > 0.5 * DENT_M).all()
    env.close()


def test_three_lights_show_which_way_the_membrane_slopes():
    column = np.arange(WIDTH) - WIDTH / 2
    flat = shade(np.zeros((HEIGHT, WIDTH))).astype(int)
    ridge = np.broadcast_to(0.0005 * np.exp(-((column / 12) ** 2)), (HEIGHT, WIDTH))
    change = shade(ridge).astype(int) - flat
    middle = slice(HEIGHT // 2 - 20, HEIGHT // 2 + 20)
    right, left = change[middle, WIDTH // 2 + 8], change[middle, WIDTH // 2 - 8]
    assert (right[:, 0] > 5).all() and (left[:, 0] < -5).all(), "red stands on the right"
    assert (left[:, 1] > 5).all() and (right[:, 1] < -5).all(), "green stands on the left"
