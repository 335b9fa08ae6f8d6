"""What there is to see in a scene, in numbers."""

from math import pi

import numpy as np
import pytest

from envs.calvin import CalvinEnv
from envs.calvin.scene_numbers import SceneNumbers
from envs.spec import ROBOT_OBS, SCENE_OBS


@pytest.mark.parametrize(("scene", "first"), [("A", "pink"), ("D", "red")])
def test_numbers_are_the_simulators(scene, first):
    """Blocks by their colour, whichever comes first in a scene's observation."""
    env = CalvinEnv(scene, observe="on_demand")
    observation, _ = env.reset(seed=3)
    numbers = dict(zip(SceneNumbers.limits, SceneNumbers(scene).of(observation[ROBOT_OBS], observation[SCENE_OBS]), strict=True))
    scene_obs = observation[SCENE_OBS]
    np.testing.assert_allclose([numbers["slide"], numbers["drawer"], numbers["bulb"], numbers["led"]], scene_obs[[0, 1, 4, 5]])
    np.testing.assert_allclose([numbers[f"{first}_{axis}"] for axis in "xyz"], scene_obs[6:9])
    assert all(low <= numbers[name] <= high for name, (low, high) in SceneNumbers.limits.items())
    assert all(0 <= numbers[f"{color}_yaw"] < pi for color in ("red", "blue", "pink"))
    env.close()


def test_an_unknown_scene():
    with pytest.raises(ValueError):
        SceneNumbers("E")
