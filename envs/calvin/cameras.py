"""The two cameras of a scene, and the looks and renderers that they draw it with."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pybullet as pb

from envs.calvin import scenes
from envs.calvin.layers import BACKDROP_RGB, LayeredCamera, depth_in_m, draw, with_backdrop
from envs.calvin.randomization import Look, Vector
from envs.calvin.scenes import Camera

if TYPE_CHECKING:
    from envs.calvin.simulation import Simulation

RENDERERS = ("tiny", "egl")
TINY_RENDERER = "PyBullet TinyRenderer (CPU)"
GRIPPER_CAMERA_LINK = 14
TEXTURED_LINKS = ("base_link", "plank_link", "slide_link", "drawer_link")


class RendererUnavailable(RuntimeError):
    """A renderer that this machine cannot run. The message says what is missing and what to do."""


class Cameras:
    """What is seen of one simulation. An image is drawn when it is asked for, and depends on state and look alone."""

    def __init__(self, simulation: Simulation, renderer: str):
        if renderer not in RENDERERS:
            raise ValueError(f"renderer={renderer!r} is not one of {', '.join(RENDERERS)}")
        if renderer == "egl":
            raise RendererUnavailable("renderer='egl' cannot be used yet; use renderer='tiny'")
        self.simulation = simulation
        self.renderer = TINY_RENDERER
        self.look = Look()
        self.layered: LayeredCamera | None = None

    def loaded(self) -> None:
        """The scene has been loaded anew: it has its own look, and nothing drawn before is of use."""
        self.look = Look()
        self.layered = None

    def set_look(self, look: Look) -> None:
        """See the scene so from now on, until it is loaded again. Raises ValueError for a look that the assets cannot show."""
        if not isinstance(look, Look):
            raise ValueError(f"look is a {type(look).__name__}, expected envs.calvin.randomization.Look")
        client = self.simulation.client
        for uid, links, before, after in self._tinted(look):
            for shape in pb.getVisualShapeData(uid, physicsClientId=client):
                if links is None or shape[1] in links:
                    rgb = [value / old * new for value, old, new in zip(shape[7][:3], before, after, strict=True)]
                    pb.changeVisualShape(uid, shape[1], rgbaColor=(*rgb, shape[7][3]), physicsClientId=client)
        if look.wood is not None and self.simulation.own_assets:
            self._retexture(look.wood.atlas())
        self.look, self.layered = look, None

    def _tinted(self, look: Look) -> list[tuple[int, set[int] | None, Vector, Vector]]:
        """Per body: its links to tint (None: all), and the old and the new tint."""
        simulation = self.simulation
        wooden = {link for name, link in simulation.table_links.items() if name not in scenes.LIGHT_LINKS.values()}
        bodies = [(simulation.robot, None, self.look.robot_tint, look.robot_tint)]
        bodies += [(uid, None, self.look.block_tint, look.block_tint) for uid in simulation.blocks.values()]
        bodies += [(simulation.table, wooden, self.look.table_tint, look.table_tint)]
        return [body for body in bodies if body[2] != body[3]]

    def _retexture(self, png: bytes) -> None:
        simulation = self.simulation
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "wood.png"
            file.write_bytes(png)
            texture = pb.loadTexture(str(file), physicsClientId=simulation.client)
        for link in TEXTURED_LINKS:
            pb.changeVisualShape(simulation.table, simulation.table_links[link], textureUniqueId=texture, physicsClientId=simulation.client)

    # -- images

    def static(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (200, 200, 3) and depth float64 (200, 200) [m] from the static camera."""
        if self.simulation.own_assets:
            if self.layered is None:
                self.layered = self._layered_camera()
            return self.layered.render(self._fixture_key())
        camera = self._static_camera()
        return self.draw(camera, pb.computeViewMatrix(camera.look_from, camera.look_at, camera.up))

    def gripper(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (84, 84, 3) and depth float64 (84, 84) [m] from the wrist camera."""
        position, orientation = pb.getLinkState(self.simulation.robot, GRIPPER_CAMERA_LINK, physicsClientId=self.simulation.client)[:2]
        if any(self.look.gripper_shift_m) or any(self.look.gripper_turn_rad):
            turn = pb.getQuaternionFromEuler(self.look.gripper_turn_rad)
            position, orientation = pb.multiplyTransforms(position, orientation, self.look.gripper_shift_m, turn)
        rotation = np.array(pb.getMatrixFromQuaternion(orientation)).reshape(3, 3)
        return self.draw(scenes.GRIPPER_CAMERA, pb.computeViewMatrix(position, position + rotation[:, 1], -rotation[:, 2]))

    def draw(self, camera: Camera, view: list[float]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 RGB (H, W, 3), row 0 at the top, and float64 depth (H, W) [m] along its axis, from any camera.

        view: PyBullet's 4x4 view matrix, 16 numbers column by column (world → camera, which looks along its -z).
        """
        projection = pb.computeProjectionMatrixFOV(camera.fov_deg, camera.width / camera.height, camera.near_m, camera.far_m)
        layer = draw(self.simulation.client, camera.width, camera.height, view, projection, self.look.light)
        rgb, depth = with_backdrop(layer, self._backdrop) if self.simulation.own_assets else (np.ascontiguousarray(layer[0]), layer[1])
        return rgb, depth_in_m(depth, camera.near_m, camera.far_m)

    @property
    def _backdrop(self) -> tuple[int, int, int]:
        return self.look.backdrop or BACKDROP_RGB

    def _static_camera(self) -> scenes.StaticCamera:
        camera = scenes.STATIC_CAMERA
        return replace(
            camera,
            look_from=_shifted(camera.look_from, self.look.static_shift_m),
            look_at=_shifted(camera.look_at, self.look.static_target_shift_m),
        )

    def _layered_camera(self) -> LayeredCamera:
        """The static camera of our own scenes: what moves and what does not, as (body, link)."""
        simulation = self.simulation
        table = {name: (simulation.table, link) for name, link in simulation.table_links.items()}
        fixed = [table.pop("base_link"), table.pop("plank_link"), (simulation.pedestal, -1), (simulation.robot, -1)]
        shapes = pb.getVisualShapeData(simulation.robot, physicsClientId=simulation.client)
        movers = [(simulation.robot, shape[1]) for shape in shapes if shape[1] >= 0]
        movers += [(uid, -1) for uid in simulation.blocks.values()]
        parts = fixed, list(table.values()), list(dict.fromkeys(movers))
        return LayeredCamera(simulation.client, self._static_camera(), *parts, self.look.light, self._backdrop)

    def _fixture_key(self) -> tuple:
        joints = (scenes.SLIDE, scenes.DRAWER, scenes.BUTTON, scenes.SWITCH)
        return (*map(self.simulation.fixture, joints), *self.simulation.lights.values())


def _shifted(point: Vector, shift: Vector) -> Vector:
    return tuple(a + b for a, b in zip(point, shift, strict=True))
