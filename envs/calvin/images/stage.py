"""What is seen of a simulation: a second PyBullet world, with the same bodies at the same places, that is never simulated.

Reading and preparing visual meshes is most of the work of loading a scene, so the world that is loaded anew for each reset has none, and
this one is loaded once, when the first image is asked for. Body and link numbers are the same in both. Images are those of drawing the
simulated world itself, bit for bit: link poses follow from joint positions by the same arithmetic.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pybullet as pb

from envs.calvin import scenes
from envs.calvin.images.egl import captured, load_egl
from envs.calvin.images.layers import draw
from envs.calvin.loading.robot_urdf import robot_urdf
from envs.calvin.randomization import Look, Vector, Wood

if TYPE_CHECKING:
    from envs.calvin.simulation import Simulation

TINY_RENDERER = "PyBullet TinyRenderer (CPU)"
TEXTURED_LINKS = ("base_link", "plank_link", "slide_link", "drawer_link")
"""Links of our own tables that are cut from the wood atlas."""

Part = tuple[int, int]
Rgba = tuple[float, float, float, float]


class Stage:
    """The visible twin of one simulation. `look`: how it is to be seen; a change shows at the next `synced()`."""

    def __init__(self, simulation: Simulation, egl: bool):
        self.simulation, self.egl = simulation, egl
        self.look = Look()
        self.client = -1
        self.loads = 0
        self.renderer = TINY_RENDERER
        if egl:  # at once: where there is no EGL, the simulation must not start
            self._connect()

    def close(self) -> None:
        """Release the client. Harmless when done twice."""
        if self.client >= 0 and pb.isConnected(self.client):
            if self.egl:
                with captured():  # the plugin prints a farewell
                    pb.disconnect(self.client)
            else:
                pb.disconnect(self.client)
        self.client, self.loads = -1, 0

    def synced(self) -> int:
        """The client that holds what is seen: bodies posed as the simulation is now, lamps and look as they are now."""
        if not self.loads or self._shown_wood() not in (None, self.look.wood):
            self._load()
        if self.look != self._shown:
            self._show(self.look)
        self._pose()
        for lamp, state in self.simulation.lights.items():
            if self._lamps.get(lamp) != state:
                self._light(lamp, state)
        return self.client

    # -- loading

    def _connect(self) -> None:
        self.client = pb.connect(pb.DIRECT)
        if self.client < 0:
            raise RuntimeError("PyBullet gave no client for images; too many simulators in one process?")
        if self.egl:
            try:
                self.renderer = load_egl(self.client)
            except Exception:
                self.close()
                raise

    def _load(self) -> None:
        """The scene as it is made, in the simulation's order. A client that has shown another texture is replaced: it never frees one."""
        loads = self.loads
        if loads:
            self.close()
        if self.client < 0:
            self._connect()
        simulation = self.simulation
        robot = self._urdf(robot_urdf(simulation.folder, scenes.ROBOT_URDF), basePosition=scenes.ROBOT_BASE_POSITION, useFixedBase=True)
        pedestal = _add_pedestal(self.client)
        files = simulation.scene.blocks.values()
        blocks = [self._urdf(simulation.folder / file, globalScaling=scenes.GLOBAL_SCALING) for file in files]
        table = self._urdf(simulation.folder / simulation.scene.table_urdf, globalScaling=scenes.GLOBAL_SCALING)
        plane = self._urdf(simulation.folder / scenes.PLANE_URDF)
        bodies = [robot, pedestal, *blocks, table, plane]
        assert bodies == sorted(simulation.body_names), f"bodies are numbered {bodies}, and {list(simulation.body_names)} where they move"
        shapes = [shape for uid in simulation.body_names for shape in pb.getVisualShapeData(uid, physicsClientId=self.client)]
        self.shapes: list[tuple] = shapes
        self._made: dict[Part, Rgba] = {(shape[0], shape[1]): shape[7] for shape in shapes}
        self._joints = {uid: _movable_joints(uid, self.client) for uid in (robot, table)}
        self._shown, self._lamps, self.loads = Look(), {}, loads + 1
        if self.egl:
            self._warm_up()

    def _warm_up(self) -> None:
        """Draw twice: the plugin prints the vendor again with its first two images, and sets its shadows up anew after each."""
        camera = scenes.STATIC_CAMERA
        view = pb.computeViewMatrix(camera.look_from, camera.look_at, camera.up)
        projection = pb.computeProjectionMatrixFOV(camera.fov_deg, camera.width / camera.height, camera.near_m, camera.far_m)
        with captured():
            for _ in range(2):
                draw(self.client, camera.width, camera.height, view, projection, self.look.light, egl=True)

    def _urdf(self, path: str | Path, **options) -> int:
        return pb.loadURDF(str(path), physicsClientId=self.client, **options)

    # -- poses and lamps

    def _pose(self) -> None:
        simulation = self.simulation
        for uid, joints in self._joints.items():
            states = pb.getJointStates(uid, joints, physicsClientId=simulation.client)
            pb.resetJointStatesMultiDof(uid, joints, [state[:1] for state in states], physicsClientId=self.client)
        for uid in simulation.blocks.values():
            pose = pb.getBasePositionAndOrientation(uid, physicsClientId=simulation.client)
            pb.resetBasePositionAndOrientation(uid, *pose, physicsClientId=self.client)

    def _light(self, lamp: str, state: int) -> None:
        link = self.simulation.table_links[scenes.LIGHT_LINKS[lamp]]
        rgba = scenes.LIGHT_ON_RGBA[lamp] if state else scenes.LIGHT_OFF_RGBA
        pb.changeVisualShape(self.simulation.table, link, rgbaColor=rgba, physicsClientId=self.client)
        self._lamps[lamp] = state

    # -- looks

    def _show(self, look: Look) -> None:
        simulation = self.simulation
        lamps = {(simulation.table, simulation.table_links[link]) for link in scenes.LIGHT_LINKS.values()}
        tints = {simulation.robot: look.robot_tint, simulation.table: look.table_tint}
        tints |= dict.fromkeys(simulation.blocks.values(), look.block_tint)
        for part, rgba in self._made.items():
            if part[0] in tints and part not in lamps:
                pb.changeVisualShape(*part, rgbaColor=_tinted(rgba, tints[part[0]]), physicsClientId=self.client)
        shown, self._shown = self._shown_wood(), look
        if self._shown_wood() != shown:
            self._texture(look.wood.atlas())

    def _shown_wood(self) -> Wood | None:
        """The wood that the table has been given in place of its own; only our own tables are cut from it."""
        return self._shown.wood if self.simulation.own_assets else None

    def _texture(self, png: bytes) -> None:
        simulation = self.simulation
        with tempfile.TemporaryDirectory() as folder:  # a name that is new: PyBullet remembers the files that it has read
            file = Path(folder) / "wood.png"
            file.write_bytes(png)
            texture = pb.loadTexture(str(file), physicsClientId=self.client)
        for name in TEXTURED_LINKS:
            link = simulation.table_links[name]
            pb.changeVisualShape(simulation.table, link, textureUniqueId=texture, physicsClientId=self.client)

    # -- for drawing elsewhere

    def visual_shapes(self) -> list[dict]:
        """What is to be seen, once; see `Simulation.visual_shapes`."""
        if self.egl:
            return self._shapes_by_tiny()
        client = self.synced()
        shapes = []
        for uid, name in self.simulation.body_names.items():
            for data in pb.getVisualShapeData(uid, physicsClientId=client):
                link, file = data[1], data[4].decode()
                shapes.append(
                    {
                        "body": name,
                        "uid": uid,
                        "link": link,
                        "link_name": "base" if link < 0 else pb.getJointInfo(uid, link, physicsClientId=client)[12].decode(),
                        "geometry": data[2],
                        "dimensions": data[3],
                        "file": os.path.normpath(file) if file else "",
                        "rgba": data[7],
                        "position": data[5],
                        "quaternion": data[6],
                    }
                )
        return shapes

    def _shapes_by_tiny(self) -> list[dict]:
        """PyBullet leaves the file names of a client with the EGL plugin unset: they are read from one without it."""
        plain = Stage(self.simulation, egl=False)
        plain.look = self.look
        try:
            return plain.visual_shapes()
        finally:
            plain.close()


def _add_pedestal(client: int) -> int:
    """The white cylinder that the robot stands on; it is seen, but touches nothing."""
    x, y, height = scenes.ROBOT_BASE_POSITION
    cylinder = pb.createVisualShape(
        pb.GEOM_CYLINDER,
        rgbaColor=[1, 1, 1, 1],
        radius=0.13,
        length=height,
        visualFramePosition=[x - 0.05, y, height / 2],
        physicsClientId=client,
    )
    return pb.createMultiBody(baseVisualShapeIndex=cylinder, physicsClientId=client)


def _movable_joints(uid: int, client: int) -> list[int]:
    joints = range(pb.getNumJoints(uid, physicsClientId=client))
    return [joint for joint in joints if pb.getJointInfo(uid, joint, physicsClientId=client)[2] != pb.JOINT_FIXED]


def _tinted(rgba: Rgba, tint: Vector) -> Rgba:
    return (*(value * factor for value, factor in zip(rgba[:3], tint, strict=True)), rgba[3])
