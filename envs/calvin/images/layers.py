"""The static camera, drawn in layers: table and floor once, fixtures when moved, the rest always.

PyBullet's CPU renderer pays for every covered pixel (about 0.25 µs), so the table is most of an image's price, and it
never moves. Layers are put together by depth, pixel by pixel. The image is that of drawing everything at once, whatever
was drawn before (where two surfaces are closer than a micrometre, either may be seen).
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import pybullet as pb

from envs.calvin.randomization import Light
from envs.calvin.scenes import StaticCamera

NEAR_M = 1.5
"""Nothing comes this close to the static camera. A near plane far out keeps depth exact to a micrometre."""
BACKDROP_RGB = (222, 226, 232)
"""Where nothing is: our scenes have no floor to be seen, it would be the dearest object of all."""

Part = tuple[int, int]
Layer = tuple[np.ndarray, np.ndarray]
"""Colour uint8 (H, W, 4), row 0 at the top, its last channel of no meaning; PyBullet's raw depth float32 (H, W) in [0, 1]."""


class LayeredCamera:
    """A camera that does not move, over one loaded scene.

    fixed: parts (body, link) that never move. fixtures: parts that move now and then, all described by the `key` of
    `render`. movers: everything else, drawn each time. A camera is for one loading and one look of the scene.
    backdrop: RGB where nothing is.
    """

    def __init__(
        self,
        client: int,
        camera: StaticCamera,
        fixed: list[Part],
        fixtures: list[Part],
        movers: list[Part],
        light: Light | None = None,
        backdrop: tuple[int, int, int] = BACKDROP_RGB,
    ):
        self.client, self.camera, self.light, self.backdrop = client, camera, light or Light(), backdrop
        self.fixed, self.fixtures, self.movers = fixed, fixtures, movers
        self.view = pb.computeViewMatrix(camera.look_from, camera.look_at, camera.up)
        self.projection = pb.computeProjectionMatrixFOV(camera.fov_deg, camera.width / camera.height, NEAR_M, camera.far_m)
        self.background: Layer | None = None
        self.still: Layer | None = None
        self.still_key: Hashable = None  # what `still` shows
        self.last_key: Hashable = None
        self.resting_key: Hashable = None  # of fixtures that stood still for two images

    def render(self, key: Hashable, unseen: Sequence[Part] = ()) -> tuple[np.ndarray, np.ndarray]:
        """uint8 RGB (H, W, 3), row 0 at the top, and float64 depth (H, W) [m]; the far plane where nothing is.

        key: equal for two calls exactly if the fixtures stand and look the same (positions, lights). unseen: movers that are not in view
        now, which spares the trouble of finding it out.
        """
        if self.background is None:
            self.background = with_backdrop(self._draw(hidden=self.fixtures + self.movers), self.backdrop)
        if self.last_key == key:
            self.resting_key = key
        self.last_key = key
        if self.resting_key != key:
            image = _over(self._draw(hidden=[*self.fixed, *unseen]), self.background)
        else:  # worth a layer of its own
            if self.still_key != key:
                self.still, self.still_key = _over(self._draw(hidden=self.fixed + self.movers), self.background), key
            image = _over(self._draw(hidden=[*self.fixed, *self.fixtures, *unseen]), self.still)
        return rgb_and_depth(image, NEAR_M, self.camera.far_m)

    def forget_fixtures(self) -> None:
        """Put the next images together as a new camera would; what has been drawn stays drawn."""
        self.last_key = self.resting_key = None

    def _draw(self, hidden: list[Part]) -> Layer:
        """Everything but the hidden parts."""
        with hidden_parts(self.client, hidden):
            return draw(self.client, self.camera.width, self.camera.height, self.view, self.projection, self.light)


@contextlib.contextmanager
def hidden_parts(client: int, parts: list[Part]) -> Iterator[None]:
    """Leave some parts out of what is drawn inside: PyBullet does not draw what is wholly transparent."""
    colors = {uid: pb.getVisualShapeData(uid, physicsClientId=client) for uid in {uid for uid, _ in parts}}
    rgba = {(uid, shape[1]): shape[7] for uid, shapes in colors.items() for shape in shapes}
    for part in parts:
        pb.changeVisualShape(*part, rgbaColor=(*rgba[part][:3], 0), physicsClientId=client)
    try:
        yield
    finally:
        for part in parts:
            pb.changeVisualShape(*part, rgbaColor=rgba[part], physicsClientId=client)


def draw(client: int, width: int, height: int, view, projection, light: Light, egl: bool = False) -> Layer:
    """What a client shows, without shadows and segmentation.

    Every parameter of the light is sent each time: PyBullet keeps the last ones.
    """
    _, _, rgba, depth, _ = pb.getCameraImage(
        width,
        height,
        view,
        projection,
        lightDirection=light.direction,
        lightColor=light.color,
        shadow=0,
        lightAmbientCoeff=light.ambient,
        lightDiffuseCoeff=light.diffuse,
        lightSpecularCoeff=light.specular,
        flags=pb.ER_NO_SEGMENTATION_MASK,
        renderer=pb.ER_BULLET_HARDWARE_OPENGL if egl else pb.ER_TINY_RENDERER,
        physicsClientId=client,
    )
    return np.reshape(np.asarray(rgba, np.uint8), (height, width, 4)), np.reshape(np.asarray(depth, np.float32), (height, width))


def rgb_and_depth(layer: Layer, near_m: float, far_m: float) -> tuple[np.ndarray, np.ndarray]:
    """A layer as uint8 RGB (H, W, 3) and float64 depth (H, W) [m]."""
    rgb = np.empty((*layer[1].shape, 3), np.uint8)
    for channel in range(3):  # five times as fast as copying three of every four bytes at once
        rgb[..., channel] = layer[0][..., channel]
    return rgb, depth_in_m(layer[1], near_m, far_m)


def depth_in_m(depth: np.ndarray, near_m: float, far_m: float) -> np.ndarray:
    """PyBullet's raw depth as float64 metres along the camera's axis."""
    return far_m * near_m / (far_m - (far_m - near_m) * depth.astype(np.float64))


def with_backdrop(layer: Layer, backdrop: tuple[int, int, int] = BACKDROP_RGB) -> Layer:
    """The layer with the backdrop's colour where nothing is."""
    colors, depth = layer
    color = np.array([*backdrop, 255], dtype=np.uint8).view(np.uint32)
    return _unpacked(np.where(depth >= 1, color, _packed(colors))), depth


def _over(front: Layer, back: Layer) -> Layer:
    """The nearer of two layers, pixel by pixel."""
    nearer = front[1] < back[1]
    return _unpacked(np.where(nearer, _packed(front[0]), _packed(back[0]))), np.where(nearer, front[1], back[1])


def _packed(colors: np.ndarray) -> np.ndarray:
    """One number a pixel, which numpy chooses from much faster: (H, W, 4) as (H, W)."""
    return colors.view(np.uint32)[..., 0]


def _unpacked(colors: np.ndarray) -> np.ndarray:
    return colors[..., None].view(np.uint8)
