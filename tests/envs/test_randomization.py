"""Looks: drawn from a seed, seen in images alone, gone after the next reset."""

import dataclasses

import numpy as np
import pytest

from envs.calvin import scenes
from envs.calvin.randomization import STATIC_SHIFT_M, Light, Look, Randomization, Wood
from envs.calvin.simulation import PINNED, Simulation

D = scenes.scene_named("D")
EVERYTHING = Randomization(block_poses=True, textures=True, lights=True, camera_jitter=1.0)
WOOD = Wood(seed=1, rings=4.0, table=((90, 60, 40), (140, 100, 60)), door=((200, 180, 140), (230, 210, 180)))
SCENE_OBS = np.zeros(24)
SCENE_OBS[6:] = np.array([(0.05, -0.12, 0.46, 0, 0, 1.5), (0.23, -0.12, 0.46, 0, 0, 1.5), (0.12, -0.05, 0.46, 0, 0, 1.5)]).ravel()


@pytest.fixture(scope="module", params=["own", "original"])
def simulation(request):
    folder = scenes.OWN_ASSETS if request.param == "own" else request.getfixturevalue("calvin_assets")
    made = Simulation(D, folder, PINNED)
    yield made
    made.close()


@pytest.fixture
def own():
    made = Simulation(D, scenes.OWN_ASSETS, PINNED)
    yield made
    made.close()


def start(simulation: Simulation, look: Look | None = None) -> None:
    simulation.fresh()
    simulation.reset_scene(SCENE_OBS)
    simulation.reset_robot(np.array(scenes.NEUTRAL_JOINTS_RAD), 0.08)
    simulation.substep()
    if look is not None:
        simulation.set_look(look)


def images(simulation: Simulation) -> tuple[np.ndarray, np.ndarray]:
    return simulation.render_static()[0], simulation.render_gripper()[0]


def same(first, second) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# -- drawing


def test_same_seed_same_look():
    assert EVERYTHING.draw(np.random.default_rng(3)) == EVERYTHING.draw(np.random.default_rng(3))
    assert EVERYTHING.draw(np.random.default_rng(3)) != EVERYTHING.draw(np.random.default_rng(4))


def test_nothing_switched_on_is_the_scenes_own_look():
    assert Randomization().draw(np.random.default_rng(0)) == Look()
    assert Randomization(block_poses=True).draw(np.random.default_rng(0)) == Look()


def test_each_kind_has_a_stream_of_its_own():
    rngs = [np.random.default_rng(7) for _ in range(3)]
    lights, textures, both = (
        options.draw(rng)
        for options, rng in zip(
            (Randomization(lights=True), Randomization(textures=True), Randomization(lights=True, textures=True)), rngs, strict=True
        )
    )
    assert both == dataclasses.replace(textures, light=lights.light)
    assert len({rng.integers(2**63) for rng in rngs}) == 1, "what is switched on changes what is drawn afterwards"


def test_jitter_scales_with_its_option():
    small, large = (Randomization(camera_jitter=scale).draw(np.random.default_rng(1)) for scale in (0.5, 2.0))
    np.testing.assert_allclose(np.array(large.static_shift_m), 4 * np.array(small.static_shift_m))
    assert 0 < np.abs(large.static_shift_m).max() <= 2 * STATIC_SHIFT_M


@pytest.mark.parametrize(
    "options,message",
    [
        ({"lights": 1}, "lights=1 is not a bool"),
        ({"textures": "yes"}, "textures='yes' is not a bool"),
        ({"block_poses": None}, "block_poses=None is not a bool"),
        ({"camera_jitter": -0.1}, r"camera_jitter=-0.1 is not a number in \[0, 4\]"),
        ({"camera_jitter": float("nan")}, "camera_jitter=nan is not a number"),
        ({"camera_jitter": True}, "camera_jitter=True is not a number"),
        ({"camera_jitter": "1"}, "camera_jitter='1' is not a number"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Randomization(**options)


# -- showing


def test_the_default_look_is_the_scene_as_it_is(simulation):
    start(simulation)
    before = images(simulation)
    start(simulation, EVERYTHING.draw(np.random.default_rng(0)))
    assert not same(images(simulation), before)
    simulation.set_look(Look())
    assert same(images(simulation), before)


def test_a_look_lasts_until_the_scene_is_loaded_again(simulation):
    start(simulation)
    before = images(simulation)
    start(simulation, Look(robot_tint=(0.5, 1.0, 0.5)))
    assert not same(images(simulation), before)
    start(simulation)
    assert same(images(simulation), before)


def test_same_look_same_images_whatever_was_seen_before(simulation):
    look, other = (EVERYTHING.draw(np.random.default_rng(seed)) for seed in (1, 2))
    fresh = Simulation(D, simulation.folder, PINNED)
    start(fresh, look)
    expected = images(fresh)
    fresh.close()
    for before in (other, None):
        start(simulation, before)
        images(simulation)
        start(simulation, look)
        assert same(images(simulation), expected)


@pytest.mark.parametrize(
    "look,changes",
    [
        (Look(static_shift_m=(0.05, 0, 0)), (True, False)),
        (Look(static_target_shift_m=(0, 0, 0.02)), (True, False)),
        (Look(gripper_shift_m=(0, 0.004, 0)), (False, True)),
        (Look(gripper_turn_rad=(0, 0.03, 0)), (False, True)),
        (Look(light=Light(direction=(1.0, -1.0, 1.0))), (True, True)),
        (Look(light=Light(color=(0.8, 1.0, 1.0))), (True, True)),
        (Look(light=Light(ambient=0.4)), (True, True)),
        (Look(table_tint=(0.9, 1.0, 0.8)), (True, True)),
        (Look(robot_tint=(0.9, 1.0, 0.8)), (True, True)),
        (Look(block_tint=(0.7, 0.7, 0.7)), (True, True)),
    ],
    ids=lambda value: (
        next((f.name for f in dataclasses.fields(value) if getattr(value, f.name) != getattr(Look(), f.name)), "")
        if isinstance(value, Look)
        else ""
    ),
)
def test_each_part_of_a_look_is_seen_where_it_should(simulation, look, changes):
    start(simulation)
    before = images(simulation)
    simulation.set_look(look)
    assert tuple(not np.array_equal(a, b) for a, b in zip(images(simulation), before, strict=True)) == changes


def test_wood_and_backdrop_are_those_of_our_own_scenes(simulation):
    start(simulation)
    before = images(simulation)
    simulation.set_look(Look(wood=WOOD, backdrop=(170, 190, 180)))
    after = images(simulation)
    if not simulation.own_assets:
        assert same(after, before)
        return
    assert (after[0] == (170, 190, 180)).all(axis=-1).mean() > 0.1
    table = np.abs(after[0].astype(int) - before[0]).max(axis=-1) > 8
    assert table.mean() > 0.3


def test_looks_change_no_state(own):
    states = []
    for look in (Look(), EVERYTHING.draw(np.random.default_rng(5))):
        start(own, look)
        for step in range(10):
            own.command(own.inverse_kinematics(*own.relative_target(np.array([0.5, 0.2, -1, 0, 0, 0.3]))), 1)
            own.substep(8)
            if step % 3 == 0:
                images(own)
        states.append([*own.robot_obs(), *own.scene_obs()])
    assert states[0] == states[1]


def test_lamps_keep_the_colours_that_say_on_and_off(own):
    """Their colour is a state."""
    for lit, rgba in ((0, scenes.LIGHT_OFF_RGBA), (1, scenes.LIGHT_ON_RGBA[scenes.LED])):
        start(own, Look(table_tint=(0.5, 0.5, 0.5)))
        own._set_light(scenes.LED, lit)
        own.render_static()
        colors = {(shape["body"], shape["link_name"]): shape["rgba"] for shape in own.visual_shapes()}
        assert colors["table", "led_link"] == rgba
        assert colors["table", "base"] == (0.5, 0.5, 0.5, 1.0)


def test_blocks_keep_their_hue(own):
    """Tasks name blocks by colour: whatever the look, the brightest channels of each block are those of its name."""
    named = {"block_red": (1, 0, 0), "block_blue": (0, 0, 1), "block_pink": (1, 0, 1)}
    for seed in range(25):
        look = EVERYTHING.draw(np.random.default_rng(seed))
        start(own, look)
        own.reset_robot(np.array([0.5, *scenes.NEUTRAL_JOINTS_RAD[1:]]), 0.08)  # out of the way
        pixels = own.render_static()[0].reshape(-1, 3).astype(int)
        for name, channels in named.items():
            on, off = (pixels[:, [i for i in range(3) if channels[i] == wanted]] for wanted in (1, 0))
            block = (on.min(axis=1) > 45) & (off.max(axis=1) < 12)
            if name == "block_pink":
                assert np.ptp(pixels[block], axis=1).min() > 40
            assert block.sum() > 60, (name, seed)


@pytest.mark.parametrize("look", [None, Randomization(), {"wood": WOOD}])
def test_only_a_look_can_be_set(own, look):
    with pytest.raises(ValueError, match=r"expected envs\.calvin\.randomization\.Look"):
        own.set_look(look)
