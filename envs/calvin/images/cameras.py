"""The two cameras of a scene, the renderers that draw them, and how looks move them.

Renderers: "tiny" is PyBullet's TinyRenderer on the CPU, with which CALVIN's numbers and our own models are made. "egl" is PyBullet's OpenGL
renderer on a graphics card (or on the CPU by Mesa, where an image takes 50-130 ms). It shows the same scene, but not in the same pixels: it
filters textures, lights otherwise and casts shadows. In scene D, by Mesa 22.3, at the start of the benchmark's fourth chain, the mean
difference in RGB is 7.3 of 255 in the static and 7.2 in the wrist image with our own assets (24 % and 16 % of the pixels differ by more
than 10), and 13.1 and 16.8 with the original ones (44 % and 50 %). Depth differs by 1-2 mm in the median pixel. A policy that has seen one
renderer only should not be judged with the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pybullet as pb

from envs.calvin import scenes
from envs.calvin.images.culling import Boxes
from envs.calvin.images.egl import RendererUnavailable
from envs.calvin.images.layers import BACKDROP_RGB, NEAR_M, LayeredCamera, draw, hidden_parts, rgb_and_depth, with_backdrop
from envs.calvin.images.stage import Stage
from envs.calvin.randomization import Look, Vector
from envs.calvin.scenes import Camera

if TYPE_CHECKING:
    from envs.calvin.simulation import Simulation

__all__ = ["RENDERERS", "Cameras", "RendererUnavailable"]

RENDERERS = ("tiny", "egl")
GRIPPER_CAMERA_LINK = 14
WHITE_RGB = (255, 255, 255)
"""What PyBullet paints where nothing is."""


class Cameras:
    """Both cameras of one simulation. An image is drawn when it is asked for; it depends on the state and the look alone.

    Raises ValueError for an unknown renderer and RendererUnavailable for one that this machine cannot run.
    """

    def __init__(self, simulation: Simulation, renderer: str):
        if renderer not in RENDERERS:
            raise ValueError(f"renderer={renderer!r} is not one of {', '.join(RENDERERS)}")
        self.simulation = simulation
        self.stage = Stage(simulation, egl=renderer == "egl")
        self._layered: LayeredCamera | None = None
        self._layered_for: tuple | None = None
        self._boxes: Boxes | None = None

    @property
    def renderer(self) -> str:
        """What draws the images, vendor included."""
        return self.stage.renderer

    @property
    def look(self) -> Look:
        """How the scene is seen."""
        return self.stage.look

    def reset(self) -> None:
        """The scene has been loaded anew: back to its own look, and to what a new process would draw bit for bit."""
        self.stage.look = Look()
        if self._layered is not None:
            self._layered.forget_fixtures()

    def set_look(self, look: Look) -> None:
        """See the scene so until it is loaded anew. Raises ValueError for anything but a Look."""
        if not isinstance(look, Look):
            raise ValueError(f"look is a {type(look).__name__}, expected envs.calvin.randomization.Look")
        self.stage.look = look

    def close(self) -> None:
        """Release what draws. Harmless when done twice."""
        self.stage.close()

    # -- images

    def static(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (200, 200, 3) and depth float64 (200, 200) [m] from the static camera."""
        client = self.stage.synced()
        camera = self._static_camera()
        if self.stage.egl:
            far_near = replace(camera, near_m=NEAR_M)  # OpenGL's 24 bits of depth are too few for a near plane of 1 cm
            return self._draw(client, far_near, pb.computeViewMatrix(camera.look_from, camera.look_at, camera.up))
        if self._layered_for != (self.stage.loads, self.look):
            self._layered, self._layered_for = self._layered_camera(client, camera), (self.stage.loads, self.look)
        camera = self._layered
        return camera.render(self._fixture_key(), unseen=self._robot_boxes(client).outside(camera.view, camera.projection))

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
        return self._draw(self.stage.synced(), camera, view)

    def _draw(self, client: int, camera: Camera, view: list[float]) -> tuple[np.ndarray, np.ndarray]:
        projection = pb.computeProjectionMatrixFOV(camera.fov_deg, camera.width / camera.height, camera.near_m, camera.far_m)
        unseen = [] if self.stage.egl else self._robot_boxes(client).outside(view, projection)
        with hidden_parts(client, unseen):
            layer = draw(client, camera.width, camera.height, view, projection, self.look.light, egl=self.stage.egl)
        return rgb_and_depth(with_backdrop(layer, self._backdrop()), camera.near_m, camera.far_m)

    def _backdrop(self) -> tuple[int, int, int]:
        return (self.look.backdrop or BACKDROP_RGB) if self.simulation.own_assets else WHITE_RGB

    def _robot_boxes(self, client: int) -> Boxes:
        if self._boxes is None or self._boxes.client != client:
            self._boxes = Boxes(client, self.simulation.robot, self.stage.shapes)
        return self._boxes

    def _static_camera(self) -> scenes.StaticCamera:
        camera = scenes.STATIC_CAMERA
        return replace(
            camera,
            look_from=_shifted(camera.look_from, self.look.static_shift_m),
            look_at=_shifted(camera.look_at, self.look.static_target_shift_m),
        )

    def _layered_camera(self, client: int, camera: scenes.StaticCamera) -> LayeredCamera:
        """The static camera, and what moves and what does not, as (body, link)."""
        simulation = self.simulation
        table = {name: (simulation.table, link) for name, link in simulation.table_links.items()}
        fixed = [table.pop("base_link"), table.pop("plank_link"), (simulation.pedestal, -1), (simulation.robot, -1), (simulation.plane, -1)]
        movers = [(simulation.robot, shape[1]) for shape in self.stage.shapes if shape[0] == simulation.robot and shape[1] >= 0]
        movers += [(uid, -1) for uid in simulation.blocks.values()]
        parts = fixed, list(table.values()), list(dict.fromkeys(movers))
        return LayeredCamera(client, camera, *parts, self.look.light, self._backdrop())

    def _fixture_key(self) -> tuple:
        joints = (scenes.SLIDE, scenes.DRAWER, scenes.BUTTON, scenes.SWITCH)
        return (*map(self.simulation.fixture, joints), *self.simulation.lights.values())


def _shifted(point: Vector, shift: Vector) -> Vector:
    return tuple(a + b for a, b in zip(point, shift, strict=True))
