"""Quick copies of the descriptions: the very same hulls, masses and joints, from less to read."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pybullet as pb
import pytest

from envs.calvin import scenes
from envs.calvin.loading.collision_urdf import collision_urdf, obj, triangle_corners
from envs.calvin.loading.hulls import HullBuilder, fewest_corners
from envs.calvin.loading.robot_urdf import robot_urdf

TETRAHEDRON = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 2 3 4\nf 3 1 4\n"


@pytest.fixture(scope="module", params=["own", "original"])
def folder(request):
    return scenes.OWN_ASSETS if request.param == "own" else request.getfixturevalue("calvin_assets")


@pytest.fixture
def client():
    made = pb.connect(pb.DIRECT)
    yield made
    pb.disconnect(made)


@pytest.fixture
def builder():
    with HullBuilder() as made:
        yield made


def physics(path: str, scaling: float, client: int) -> list:
    """Everything that moving and touching depends on, link by link."""
    uid = pb.loadURDF(path, globalScaling=scaling, physicsClientId=client)
    facts = []
    for link in range(-1, pb.getNumJoints(uid, physicsClientId=client)):
        facts.append(pb.getDynamicsInfo(uid, link, physicsClientId=client))
        facts.append(pb.getAABB(uid, link, physicsClientId=client))
        shapes = pb.getCollisionShapeData(uid, link, physicsClientId=client)
        facts.append([(shape[2], shape[3], *shape[5:]) for shape in shapes])  # but for the body's number and the file's name
        if any(shape[2] == pb.GEOM_MESH for shape in shapes):
            facts.append(pb.getMeshData(uid, link, physicsClientId=client))
        if link >= 0:
            facts.append(pb.getJointInfo(uid, link, physicsClientId=client))
    return facts


@pytest.mark.parametrize("scene", "ABCD")
def test_a_copy_has_the_same_physics_to_the_last_bit(folder, scene, client):
    description = scenes.scene_named(scene)
    files = [(scenes.ROBOT_URDF, 1.0), (description.table_urdf, scenes.GLOBAL_SCALING), (scenes.PLANE_URDF, 1.0)]
    files += [(block, scenes.GLOBAL_SCALING) for block in description.blocks.values()]
    for name, scaling in files:
        path = robot_urdf(folder, name)
        copy = collision_urdf(path, scaling)
        assert copy != path and Path(copy).is_file()
        assert physics(path, scaling, client) == physics(copy, scaling, client), name


def test_a_copy_is_shorter_and_shows_nothing(folder, client):
    copy = collision_urdf(robot_urdf(folder, scenes.ROBOT_URDF), 1.0)
    uid = pb.loadURDF(copy, physicsClientId=client)
    assert {shape[2] for shape in pb.getVisualShapeData(uid, physicsClientId=client)} == {pb.GEOM_BOX}
    meshes = [file for file in Path(copy).parent.iterdir() if file.suffix == ".obj"]
    assert len(meshes) >= 9
    assert sum(file.stat().st_size for file in meshes) < 200_000


def test_a_copy_is_written_once():
    path = robot_urdf(scenes.OWN_ASSETS, scenes.ROBOT_URDF)
    assert collision_urdf(path, 1.0) is collision_urdf(path, 1.0)


@pytest.mark.parametrize("seed", range(12))
def test_fewer_corners_give_the_same_hull_in_the_same_order(seed, builder):
    rng = np.random.default_rng(seed)
    points = [" ".join(map(str, np.float32(point))) for point in rng.normal(size=(rng.integers(8, 120), 3)) * (1, 0.3, 2)]
    corners = [points[index] for index in rng.integers(0, len(points), 900)]
    scaling = float(rng.choice([1.0, 0.8]))
    lean = fewest_corners(corners, [scaling] * 3)
    assert len(lean) % 3 == 0 and len(lean) < 900
    assert set(lean) == set(corners)
    assert builder.hulls(obj([corners]), "1 1 1", scaling) == builder.hulls(obj([lean]), "1 1 1", scaling)


def test_the_order_is_not_that_of_naming_each_corner_once(builder):
    """If it were, there would be nothing to search for."""
    rng = np.random.default_rng(0)
    points = [" ".join(map(str, np.float32(point))) for point in rng.normal(size=(99, 3))]
    corners = [points[index] for index in rng.integers(0, 99, 900)]
    many, once = (builder.hulls(obj([some]), "1 1 1", 1.0)[0] for some in (corners, sorted(set(corners))))
    assert Counter(many) == Counter(once) and many != once


def test_triangles_are_read_object_by_object():
    text = "mtllib x.mtl\no first\n" + TETRAHEDRON + "g second\nusemtl wood\nf 1/1/1 2//2 4/3\n"
    first, second = triangle_corners(text)
    assert len(first) == 12 and second == ["0.0 0.0 0.0", "1.0 0.0 0.0", "0.0 0.0 1.0"]


@pytest.mark.parametrize("face", ["f 1 2 3 4", "f -1 -2 -3", "f 1 2 9"])
def test_faces_that_are_not_plain_triangles_leave_the_mesh_as_it_is(face, tmp_path):
    assert triangle_corners(TETRAHEDRON + face + "\n") is None
    (tmp_path / "body.obj").write_text(TETRAHEDRON + "f 1 2 3 4\n")
    urdf = tmp_path / "body.urdf"
    urdf.write_text('<robot name="x"><link name="l"><collision><geometry><mesh filename="body.obj"/></geometry></collision></link></robot>')
    assert str(tmp_path / "body.obj") in Path(collision_urdf(str(urdf), 1.0)).read_text()


def test_a_forked_child_leaves_the_copies_to_its_parent():
    code = (
        "import os, sys; from pathlib import Path; from envs.calvin.loading.robot_urdf import temporary_folder\n"
        "folder = temporary_folder('emu3_vla_test_'); child = os.fork()\n"
        "if child == 0: sys.exit()\n"
        "os.waitpid(child, 0); assert folder.is_dir(); print(folder)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not Path(ended.stdout.strip()).exists()


def test_a_missing_mesh_is_named(tmp_path):
    urdf = tmp_path / "body.urdf"
    mesh = '<mesh filename="package://meshes/nowhere.obj"/>'
    urdf.write_text(f'<robot name="x"><link name="l"><collision><geometry>{mesh}</geometry></collision></link></robot>')
    with pytest.raises(FileNotFoundError, match=r"body\.urdf needs the mesh package://meshes/nowhere\.obj.*are the assets complete"):
        collision_urdf(str(urdf), 1.0)
