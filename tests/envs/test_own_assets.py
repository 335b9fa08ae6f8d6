"""Our own scenes: generated files, numbers of the robot and the tables, what the cameras see and what it costs."""

import io
import json
from pathlib import Path

import numpy as np
import pybullet as pb
import pytest
from PIL import Image

from envs.calvin import scenes
from envs.calvin.build import assets as build_assets
from envs.calvin.build import low_polygon
from envs.calvin.build import tables as build_tables
from envs.calvin.images.layers import BACKDROP_RGB, depth_in_m, draw
from envs.calvin.loading.robot_urdf import robot_urdf
from envs.calvin.randomization import Light
from envs.calvin.simulation import PINNED, Simulation

JOINTS = ["base__button", "base__switch", "base__slide", "base__drawer", "base__led", "base__light", "base__plank"]
SLIDE_LIMIT_M = {"A": 0.28, "B": 0.304, "C": 0.24, "D": 0.28}


@pytest.fixture(scope="module", params="ABCD")
def simulation(request):
    simulation = Simulation(scenes.scene_named(request.param), scenes.OWN_ASSETS, PINNED)
    yield simulation
    simulation.close()


@pytest.fixture(scope="module")
def scene_d():
    simulation = Simulation(scenes.scene_named("D"), scenes.OWN_ASSETS, PINNED)
    yield simulation
    simulation.close()


# -- files


@pytest.fixture(scope="module")
def files():
    return build_assets.build()


def test_the_folder_is_what_the_generator_writes(files):
    folder = scenes.OWN_ASSETS
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert on_disk == set(files)
    assert [name for name, content in files.items() if (folder / name).read_bytes() != content] == []


def test_generating_again_gives_the_same_bytes_and_prints_where(files, tmp_path, capsys):
    build_assets.main(tmp_path)
    assert str(tmp_path) in capsys.readouterr().out
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())


def test_package_stays_small_and_polygons_few(files):
    assert sum(map(len, files.values())) < 500_000
    for name in build_tables.TABLES:
        meshes = [text for path, text in files.items() if path.startswith(f"calvin_table_{name}/meshes") and "link" in path]
        assert len(meshes) == 8
        assert sum(text.count(b"\nf ") for text in meshes) < 500


def test_every_scene_file_is_there():
    for scene in scenes.SCENES.values():
        assert scenes.asset_folder(scene, None) == scenes.OWN_ASSETS


def test_texture_is_a_picture_that_others_can_read():
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = Image.open(io.BytesIO(low_polygon.png(pixels, [(i, 2 * i, 255 - i) for i in range(12)])))
    np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[..., 1], 2 * pixels)
    looks = [np.asarray(Image.open(scenes.OWN_ASSETS / f"calvin_table_{n}/textures/table.png").convert("RGB")) for n in "ABCD"]
    means = np.array([look[:88].mean(axis=(0, 1)) for look in looks])
    distances = np.linalg.norm(means[:, None] - means[None], axis=-1) + 1000 * np.eye(4)
    assert distances.min() > 30, "two scenes look alike"


def test_convex_mesh_is_closed_and_faces_outwards():
    corners = [(x, y, z) for x in (0, 1) for y in (0, 2) for z in (0, 3)]
    mesh = low_polygon.convex_mesh(corners)
    assert mesh.triangles == 12
    volume = 0.0
    for points, _ in mesh.polygons:
        for i in range(1, len(points) - 1):
            volume += np.dot(points[0], np.cross(points[i], points[i + 1])) / 6
    assert volume == pytest.approx(6)


# -- robot description


def test_robot_description_without_placeholders_is_used_where_it_is(tmp_path):
    (tmp_path / "arm.urdf").write_text("<robot/>")
    assert robot_urdf(tmp_path, "arm.urdf") == str(tmp_path / "arm.urdf")


def test_missing_borrowed_mesh_is_named(tmp_path):
    (tmp_path / "arm.urdf").write_text('<mesh filename="${pybullet_data}/nowhere/link.obj"/>')
    with pytest.raises(FileNotFoundError, match=r"nowhere/link\.obj, which does not exist; is pybullet"):
        robot_urdf(tmp_path, "arm.urdf")


# -- numbers


def test_joints_have_calvins_names_order_and_limits(simulation):
    infos = [pb.getJointInfo(simulation.table, i, simulation.client) for i in range(7)]
    assert [info[1].decode() for info in infos] == JOINTS
    limits = {info[1].decode(): info[9] for info in infos}
    assert limits["base__slide"] == pytest.approx(SLIDE_LIMIT_M[simulation.scene.name])
    assert (limits["base__drawer"], limits["base__switch"], limits["base__button"]) == pytest.approx((0.22, 0.088, 0.02))
    links = {pb.getJointInfo(simulation.robot, i, simulation.client)[12].decode(): i for i in range(18) if i < 16}
    chosen = {"panda_hand": 8, "panda_leftfinger": 9, "panda_rightfinger": 11, "gripper_cam": 14, "tcp": 15}
    assert {name: links[name] for name in chosen} == chosen


def test_numbers_are_those_of_the_original(simulation, reference):
    model = json.loads((reference / "calvin" / f"model_{simulation.scene.name}.json").read_text())
    bodies = {"robot": simulation.robot, "table": simulation.table, "plane": simulation.plane} | simulation.blocks
    for name, uid in bodies.items():
        links = model["bodies"][name]["links"]
        assert uid == model["bodies"][name]["uid"]
        assert pb.getNumJoints(uid, simulation.client) == len(links) - 1
        for link in links:
            _check_link(simulation.client, uid, link)


def _check_link(client: int, uid: int, expected: dict) -> None:
    number, dynamics = expected["link"], expected["dynamics"]
    mass, friction, _, centre, _, _, rolling, spinning, damping, stiffness, *_ = pb.getDynamicsInfo(uid, number, client)
    keys = ("mass", "lateral_friction", "rolling_friction", "spinning_friction", "contact_damping", "contact_stiffness")
    assert (mass, friction, rolling, spinning, damping, stiffness) == pytest.approx([dynamics[key] for key in keys])
    np.testing.assert_allclose(centre, dynamics["inertial_pos"], atol=1e-9)
    if number < 0:
        return
    info, joint = pb.getJointInfo(uid, number, client), expected["joint"]
    assert (info[1].decode(), info[2], info[12].decode(), info[16]) == tuple(joint[k] for k in ("name", "type", "linkName", "parentIndex"))
    np.testing.assert_allclose(info[14], joint["parentFramePos"], atol=1e-5)
    assert abs(np.dot(info[15], joint["parentFrameOrn"])) == pytest.approx(1, abs=1e-9)
    if joint["type"] != pb.JOINT_FIXED:
        np.testing.assert_allclose(info[8:12], [joint[k] for k in ("lower", "upper", "maxForce", "maxVelocity")], atol=1e-9)
        np.testing.assert_allclose(info[13], joint["axis"], atol=1e-6)
    if "collision" in expected and expected["collision"]:  # Bullet pads the boxes of hulls by up to 4 mm, and of boxes not at all
        np.testing.assert_allclose(pb.getAABB(uid, number, client), expected["aabb"], atol=0.006)


# -- physics


def test_blocks_rest_on_table_shelf_and_in_the_drawer(scene_d):
    state = np.zeros(24)
    state[1] = 0.22
    spots = {"base_link": (0.2, -0.1, 0.47), "plank_link": (-0.25, 0.09, 0.47), "drawer_link": (0.18, -0.22, 0.41)}
    for start, spot in zip((6, 12, 18), spots.values(), strict=True):
        state[start : start + 3] = spot
    scene_d.reset_scene(state)
    scene_d.substep(480)
    heights = scene_d.scene_obs()[6:].reshape(3, 6)[:, 2]
    np.testing.assert_allclose(heights, (0.46, 0.461, 0.36), atol=2e-4)
    for link, uid in zip(spots, scene_d.blocks.values(), strict=True):
        touched = {point[4] for point in pb.getContactPoints(uid, scene_d.table, physicsClientId=scene_d.client)}
        assert touched == {scene_d.table_links[link]}


def test_closed_door_keeps_a_block_out_of_the_cabinet(scene_d):
    state = np.zeros(24)
    for start, spot in zip((6, 12, 18), ((0.04, -0.06, 0.46), (0.3, -0.1, 0.46), (0.2, -0.1, 0.46)), strict=True):
        state[start : start + 3] = spot
    scene_d.reset_scene(state)
    block = scene_d.blocks["block_red"]
    for _ in range(240):
        centre = pb.getBasePositionAndOrientation(block, scene_d.client)[0]
        pb.applyExternalForce(block, -1, (0, 8, 0), centre, pb.WORLD_FRAME, scene_d.client)
        scene_d.substep()
    assert scene_d.scene_obs()[7] < 0.03


# -- pictures


def test_drawing_in_layers_is_drawing_at_once(simulation):
    rng = np.random.default_rng(3)
    camera = scenes.STATIC_CAMERA
    view = pb.computeViewMatrix(camera.look_from, camera.look_at, camera.up)
    projection = pb.computeProjectionMatrixFOV(camera.fov_deg, 1, camera.near_m, camera.far_m)
    for step in range(6):
        if step % 3 == 0:  # the second time in a row that fixtures stand still they become a layer of their own
            simulation.reset_scene_randomly(rng)
            for joint in JOINTS[:4]:
                simulation._set_fixture(joint, rng.uniform(*simulation.joint_limits[joint]))
            simulation._set_light("led", step % 2)
        simulation.reset_robot(np.array(scenes.NEUTRAL_JOINTS_RAD) + rng.uniform(-0.3, 0.3, 7), rng.uniform(0, 0.08))
        rgb, depth_m = simulation.render_static()
        whole, raw_depth = draw(simulation.cameras.stage.synced(), 200, 200, view, projection, Light())
        empty = raw_depth >= 1
        assert (rgb[empty] == BACKDROP_RGB).all()
        assert (rgb != whole[..., :3]).any(axis=-1)[~empty].sum() <= 3
        close = np.abs(depth_m - depth_in_m(raw_depth, camera.near_m, camera.far_m)) < 0.002
        assert close.mean() > 0.9999


def test_layers_leave_no_trace_in_the_scene(scene_d):
    def colors():
        client = scene_d.cameras.stage.synced()
        return [shape[7] for uid in scene_d.body_names for shape in pb.getVisualShapeData(uid, physicsClientId=client)]

    before = colors()
    first = scene_d.render_static()[0]
    assert colors() == before
    np.testing.assert_array_equal(scene_d.render_static()[0], first)
    np.testing.assert_array_equal(scene_d.render_static()[0], first)


def test_lights_blocks_and_handles_can_be_seen(scene_d):
    state = np.zeros(24)
    for start, x in zip((6, 12, 18), (0.05, 0.15, 0.27), strict=True):
        state[start : start + 3] = (x, -0.1, 0.46)
    scene_d.reset_scene(state)
    dark = scene_d.render_static()[0].astype(int)
    state[4:6] = 1
    scene_d.reset_scene(state)
    lit = scene_d.render_static()[0].astype(int)
    red, green, blue = (lit[..., i] for i in range(3))
    seen = {
        "LED": (green > 120) & (red < 60) & (blue < 60),
        "bulb": (red > 90) & (green > 90) & (blue < 30),
        "red block": (red > 110) & (green < 40) & (blue < 40),
        "blue block": (blue > 110) & (red < 40) & (green < 40),
        "pink block": (red > 110) & (blue > 110) & (green < 40),
        "handles": (np.ptp(lit, axis=-1) < 12) & (lit.max(axis=-1) < 75),
    }
    assert {name: int(mask.sum()) for name, mask in seen.items() if mask.sum() < 60} == {}
    changed = (lit != dark).any(axis=-1)
    assert changed.sum() > 200 and not (changed & ~(seen["LED"] | seen["bulb"])).any()


def test_a_wrist_image_shows_the_fingers_and_the_table(scene_d):
    scene_d.reset_robot(np.array(scenes.NEUTRAL_JOINTS_RAD), 0.08)
    rgb, depth_m = scene_d.render_gripper()
    assert rgb.shape == (84, 84, 3) and rgb.dtype == np.uint8
    assert 0.05 < (depth_m < 0.3).mean() < 0.6
    wood = (rgb[..., 0] > rgb[..., 2].astype(int) + 15) & (depth_m < 1)
    assert wood.mean() > 0.2


def test_assets_are_found_without_a_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    simulation = Simulation(scenes.scene_named("B"), scenes.OWN_ASSETS, PINNED)
    assert simulation.render_static()[0].std() > 10
    simulation.close()
    assert Path(scenes.OWN_ASSETS).is_absolute()
