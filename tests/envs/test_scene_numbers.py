"""What there is to see in a scene, in numbers."""

import numpy as np
import pytest

from envs.calvin import CalvinEnv
from envs.calvin.layout import layout_of
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
    way = [numbers[f"{first}_{side}"] for side in ("right", "forward", "up")]
    np.testing.assert_allclose(observation[ROBOT_OBS][:3] + way, scene_obs[6:9])
    assert all(low <= numbers[name] <= high for name, (low, high) in SceneNumbers.limits.items())
    heading = observation[ROBOT_OBS][5] + numbers[f"{first}_turn"]
    assert abs(np.sin(heading - scene_obs[11])) < 1e-6, "up to half a turn, a block that lies flat has the yaw of its Euler angles"
    env.close()


def test_an_open_drawer_and_a_door_at_its_end_are_within_the_limits():
    for name, scene in (("slide", "B"), ("drawer", "D")):
        layout = layout_of(scene)
        most = {"slide": layout.slide_limit, "drawer": layout.drawer_limit}[name]
        assert 0.8 < most / SceneNumbers.limits[name][1] <= 1


def test_an_unknown_scene():
    with pytest.raises(ValueError):
        SceneNumbers("E")
