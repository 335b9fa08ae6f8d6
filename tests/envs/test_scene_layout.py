"""What the planner knows of a table agrees with the tables as they are loaded: ours and the original ones."""

import numpy as np
import pybullet as pb
import pytest

from envs.calvin.env import CalvinEnv
from envs.calvin.layout import BLOCK_WIDTH_M, layout_of
from envs.calvin.scenes import DRAWER, SLIDE

SCENES = ("A", "B", "C", "D")


def _frame(env: CalvinEnv, link: str) -> np.ndarray:
    """Position of a table link's frame [m]."""
    simulation = env.simulation
    return np.array(pb.getLinkState(simulation.table, simulation.table_links[link], physicsClientId=simulation.client)[4])


def _check(env: CalvinEnv) -> None:
    env.reset(options={"scene_obs": np.zeros(24)})
    layout, limits = layout_of(env.scene.name), env.simulation.joint_limits
    assert limits[SLIDE][1] == pytest.approx(layout.slide_limit, abs=1e-9)
    assert limits[DRAWER][1] == pytest.approx(layout.drawer_limit, abs=1e-9)
    np.testing.assert_allclose(_frame(env, "button_link")[:2], layout.button, atol=2e-3)
    assert _frame(env, "switch_link")[0] == pytest.approx(layout.switch_x, abs=2e-3)
    assert _frame(env, "drawer_link")[0] == pytest.approx(layout.drawer_x, abs=2e-3)
    assert _frame(env, "slide_link")[0] == pytest.approx(layout.door[0], abs=2e-3)
    for color, length in layout.block_lengths.items():
        box = pb.getCollisionShapeData(env.simulation.blocks[f"block_{color}"], -1, physicsClientId=env.simulation.client)[0]
        assert box[3] == pytest.approx((length, BLOCK_WIDTH_M, BLOCK_WIDTH_M), abs=1e-6)
    env.close()


@pytest.mark.parametrize("scene", SCENES)
def test_layout_agrees_with_our_tables(scene):
    _check(CalvinEnv(scene, observe="on_demand"))


@pytest.mark.parametrize("scene", SCENES)
def test_layout_agrees_with_the_original_tables(calvin_assets, scene):
    _check(CalvinEnv(scene, assets=calvin_assets, observe="on_demand"))


def test_scene_d_in_numbers():
    layout = layout_of("D")
    assert (layout.button, layout.ring_radius, layout.switch_x) == ((-0.12, -0.12), 0.04, 0.3)
    assert (layout.drawer_x, layout.drawer_limit, layout.slide_limit) == (0.18, 0.22, 0.28)
    assert layout.slide_handle_x == pytest.approx(0.04)
    assert layout.block_lengths == {"red": 0.056, "blue": 0.04, "pink": 0.08}
    assert layout.drawer_handle_y(0.1) == pytest.approx(-0.31)


def test_door_opens_the_side_that_it_leaves():
    layout = layout_of("B")
    assert layout.opening(0) == layout.openings(0)[0]
    assert layout.opening(layout.slide_limit) == layout.openings(layout.slide_limit)[1]
    assert layout.openings(layout.slide_limit)[0][1] < layout.cavity[0], "the door covers the left end"


def test_inside_of_the_drawer_is_what_the_table_leaves_open():
    layout = layout_of("A")
    (left, right), (front, back) = layout.drawer_inside(0.22)
    assert (left + right) / 2 == pytest.approx(layout.drawer_x) and right - left == pytest.approx(0.36)
    assert (front, back) == (pytest.approx(-0.38), pytest.approx(-0.18))
    _, (front, back) = layout.drawer_inside(0.1)
    assert (front, back) == (pytest.approx(-0.26), pytest.approx(-0.18)), "the rest is under the table"


def test_unknown_scene_is_named():
    with pytest.raises(ValueError, match="unknown scene 'E'"):
        layout_of("E")
