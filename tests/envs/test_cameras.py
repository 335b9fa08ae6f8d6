"""Images: drawn from a world of their own, by either renderer, of the state and the look alone."""

import importlib.util

import numpy as np
import pybullet as pb
import pytest

from envs.calvin import scenes
from envs.calvin.images import cameras, egl, stage
from envs.calvin.images.cameras import RendererUnavailable
from envs.calvin.images.culling import Boxes
from envs.calvin.images.layers import depth_in_m, draw, hidden_parts
from envs.calvin.randomization import Light, Look, Wood
from envs.calvin.simulation import HEAD, Simulation

D = scenes.scene_named("D")
STATIC, GRIPPER = scenes.STATIC_CAMERA, scenes.GRIPPER_CAMERA
WOOD = Wood(seed=1, rings=4.0, table=((90, 60, 40), (140, 100, 60)), door=((200, 180, 140), (230, 210, 180)))


@pytest.fixture(scope="module", params=["own", "original"])
def folder(request):
    return scenes.OWN_ASSETS if request.param == "own" else request.getfixturevalue("calvin_assets")


@pytest.fixture(scope="module")
def simulation(folder):
    made = Simulation(D, folder, HEAD)
    yield made
    made.close()


def start(simulation: Simulation, seed: int = 0) -> None:
    simulation.fresh()
    simulation.reset_scene_randomly(np.random.default_rng(seed))
    simulation.reset_robot(np.array(scenes.NEUTRAL_JOINTS_RAD), 0.08)
    simulation.substep()


def wander(simulation: Simulation, seed: int, steps: int = 12) -> None:
    """A few random control steps, down towards table and blocks."""
    action = np.random.default_rng(seed).uniform(-1, 1, 6)
    action[2] = -0.8
    for _ in range(steps):
        simulation.command(simulation.inverse_kinematics(*simulation.relative_target(action)), 1 if seed % 2 else -1)
        simulation.substep(8)
        simulation.update_lights()


def state(simulation: Simulation) -> list[float]:
    return [*simulation.robot_obs(), *simulation.scene_obs()]


def views(simulation: Simulation) -> list[tuple[scenes.Camera, list[float]]]:
    """Both cameras with their view matrices, worked out from the simulated world."""
    position, orientation = pb.getLinkState(simulation.robot, cameras.GRIPPER_CAMERA_LINK, physicsClientId=simulation.client)[:2]
    rotation = np.array(pb.getMatrixFromQuaternion(orientation)).reshape(3, 3)
    return [
        (STATIC, pb.computeViewMatrix(STATIC.look_from, STATIC.look_at, STATIC.up)),
        (GRIPPER, pb.computeViewMatrix(position, position + rotation[:, 1], -rotation[:, 2])),
    ]


def projection(camera: scenes.Camera) -> list[float]:
    return pb.computeProjectionMatrixFOV(camera.fov_deg, camera.width / camera.height, camera.near_m, camera.far_m)


# -- the world that is seen


@pytest.fixture
def plain(folder, monkeypatch):
    """A simulation whose own world can be seen, as calvin_env's can: nothing is taken from what it loads."""
    create = pb.createMultiBody

    def create_with_pedestal(physicsClientId, **options):
        return create(physicsClientId=physicsClientId, **options) if options else stage._add_pedestal(physicsClientId)

    monkeypatch.setattr(pb, "createMultiBody", create_with_pedestal)
    monkeypatch.setattr("envs.calvin.simulation.collision_urdf", lambda path, scaling: path)
    made = Simulation(D, folder, HEAD)
    yield made
    made.close()


def test_images_are_those_of_the_simulated_world_drawn_whole(simulation, plain):
    for seed in range(4):
        for each in (simulation, plain):
            start(each, seed)
            wander(each, seed)
        assert state(simulation) == state(plain)
        for lamp, lit in simulation.lights.items():
            link = plain.table_links[scenes.LIGHT_LINKS[lamp]]
            rgba = scenes.LIGHT_ON_RGBA[lamp] if lit else scenes.LIGHT_OFF_RGBA
            pb.changeVisualShape(plain.table, link, rgbaColor=rgba, physicsClientId=plain.client)
        images = simulation.render_static(), simulation.render_gripper()
        for (rgb, depth_m), (camera, view) in zip(images, views(plain), strict=True):
            whole, raw = draw(plain.client, camera.width, camera.height, view, projection(camera), Light())
            stray = 3 if camera is STATIC else 0  # surfaces closer than a micrometre, of which layers may show the other
            assert (rgb != whole[..., :3]).any(axis=-1)[raw < 1].sum() <= stray
            assert (np.abs(depth_m - depth_in_m(raw, camera.near_m, camera.far_m)) > 2e-3).sum() <= stray


def test_an_image_does_not_depend_on_what_was_drawn_before(folder, simulation):
    start(simulation, seed=8)
    for seed in range(3):
        wander(simulation, seed)
        simulation.render_static()
    other = Simulation(D, folder, HEAD)
    for each in (simulation, other):
        start(each, seed=5)
        wander(each, seed=1)
    for _ in range(3):  # the third time fixtures are a layer of their own
        np.testing.assert_array_equal(simulation.render_static()[0], other.render_static()[0])
        np.testing.assert_array_equal(simulation.render_gripper()[0], other.render_gripper()[0])
    other.close()


def test_lamps_are_seen_as_they_are(simulation):
    start(simulation)
    dark = simulation.render_static()[0]
    simulation._set_light(scenes.LED, 1)
    lit = simulation.render_static()[0]
    assert ((lit[..., 1] > 120) & (lit[..., 0] < 60)).sum() > 100
    start(simulation)
    np.testing.assert_array_equal(simulation.render_static()[0], dark)


def test_drawing_leaves_the_state_alone(folder, simulation):
    blind = Simulation(D, folder, HEAD)
    for each in (simulation, blind):
        start(each, seed=2)
    for seed in range(6):
        for each in (simulation, blind):
            wander(each, seed, steps=5)
        simulation.render_static(), simulation.render_gripper()
        assert state(simulation) == state(blind)
    blind.close()


def test_nothing_is_loaded_for_images_until_one_is_asked_for():
    made = Simulation(D, scenes.OWN_ASSETS, HEAD)
    assert made.cameras.stage.client == -1
    made.render_gripper()
    assert made.cameras.stage.client >= 0
    made.close()
    made.close()
    assert made.cameras.stage.client == -1


def test_any_camera_can_be_drawn(simulation):
    start(simulation)
    camera = scenes.Camera(width=64, height=48, fov_deg=40, near_m=0.1, far_m=5)
    rgb, depth_m = simulation.cameras.draw(camera, pb.computeViewMatrix((0.1, -1.0, 1.0), (0.1, 0, 0.45), (0, 0, 1)))
    assert rgb.shape == (48, 64, 3) and rgb.dtype == np.uint8
    assert 0.5 < np.median(depth_m) < 2.0


# -- what is out of view


def test_parts_left_out_change_no_pixel(simulation):
    rng = np.random.default_rng(0)
    left_out = 0
    for _ in range(12):
        simulation.reset_robot(np.array(scenes.NEUTRAL_JOINTS_RAD) + rng.uniform(-0.8, 0.8, 7), 0.08)
        client = simulation.cameras.stage.synced()
        boxes = Boxes(client, simulation.robot, simulation.cameras.stage.shapes)
        for camera, view in views(simulation):
            matrices = view, projection(camera)
            unseen = boxes.outside(*matrices)
            left_out += len(unseen)
            whole = draw(client, camera.width, camera.height, *matrices, Light())
            with hidden_parts(client, unseen):
                rest = draw(client, camera.width, camera.height, *matrices, Light())
            np.testing.assert_array_equal(whole[0], rest[0])
            np.testing.assert_array_equal(whole[1], rest[1])
    assert left_out > 60


def test_a_mesh_of_an_unknown_kind_is_named(tmp_path):
    (tmp_path / "link.dae").write_text("<COLLADA/>")
    shape = (0, 1, pb.GEOM_MESH, (1, 1, 1), str(tmp_path / "link.dae").encode(), (0, 0, 0), (0, 0, 0, 1), (1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"link\.dae is neither an OBJ nor an STL"):
        Boxes(0, 0, [shape])


# -- renderers


def test_unknown_renderer_is_named():
    with pytest.raises(ValueError, match="renderer='gpu' is not one of tiny, egl"):
        Simulation(D, scenes.OWN_ASSETS, HEAD, renderer="gpu")


def test_tiny_is_the_default():
    made = Simulation(D, scenes.OWN_ASSETS, HEAD)
    assert made.renderer == "PyBullet TinyRenderer (CPU)"
    made.close()


def test_where_there_is_no_egl_it_is_said_and_nothing_else_draws(monkeypatch):
    monkeypatch.setenv("EGL_VISIBLE_DEVICES", "99")
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "/nowhere.json")
    egl._probe.cache_clear()
    with pytest.raises(RendererUnavailable, match="does not start here .*apt-get install libegl1.*renderer='tiny' needs nothing"):
        Simulation(D, scenes.OWN_ASSETS, HEAD, renderer="egl")


def test_a_build_without_the_plugin_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RendererUnavailable, match="no eglRenderer module .*Use renderer='tiny'"):
        Simulation(D, scenes.OWN_ASSETS, HEAD, renderer="egl")


def test_standard_output_is_caught_and_given_back(capfd):
    with egl.captured() as output:
        importlib.import_module("os").write(1, b"GL_VENDOR=x\n")
    print("after")
    assert output == ["GL_VENDOR=x\n"]
    assert capfd.readouterr().out == "after\n"


@pytest.fixture
def by_egl(folder, capfd):
    """A simulation that draws by EGL; skipped where this machine cannot."""
    egl._probe.cache_clear()
    try:
        made = Simulation(D, folder, HEAD, renderer="egl")
    except RendererUnavailable as error:
        pytest.skip(str(error))
    yield made
    made.close()


def test_egl_names_its_vendor_and_prints_nothing(by_egl, capfd):
    start(by_egl)
    by_egl.render_static()
    by_egl.close()
    name, vendor, renderer, *version = by_egl.renderer.replace("PyBullet EGL: ", "PyBullet EGL, ").split(", ")
    assert name == "PyBullet EGL" and vendor and renderer and version
    assert "GL_" not in by_egl.renderer
    assert capfd.readouterr().out == ""


def test_egl_shows_the_same_scene(by_egl, simulation):
    for each in (by_egl, simulation):
        start(each, seed=3)
        wander(each, seed=1)
    assert state(by_egl) == state(simulation)
    for camera in ("render_static", "render_gripper"):
        (rgb, depth_m), (tiny, tiny_depth_m) = getattr(by_egl, camera)(), getattr(simulation, camera)()
        assert rgb.shape == tiny.shape and rgb.dtype == np.uint8 and depth_m.dtype == np.float64
        assert 1 < np.abs(rgb.astype(int) - tiny).mean() < 25  # it is not the same picture
        assert np.median(np.abs(depth_m - tiny_depth_m)) < 0.005


def test_egl_images_do_not_depend_on_what_was_drawn_before(by_egl):
    start(by_egl, seed=3)
    first = by_egl.render_static()[0], by_egl.render_gripper()[0]
    by_egl.set_look(Look(light=Light(direction=(80.0, -60.0, 50.0)), static_shift_m=(0.1, 0, 0), wood=WOOD))
    other = by_egl.render_static()[0]
    assert np.abs(other.astype(int) - first[0]).mean() > 3
    start(by_egl, seed=3)
    np.testing.assert_array_equal(by_egl.render_gripper()[0], first[1])
    np.testing.assert_array_equal(by_egl.render_static()[0], first[0])
