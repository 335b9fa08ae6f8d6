"""Touch: two camera-based sensors in the finger pads, as the DIGIT sensors of CALVIN's dataset.

A small camera behind each pad sees the soft membrane in front of it. Where a body presses, the membrane is dented: `depth_tactile` is the
dent in metres, `rgb_tactile` is how red, green and blue lights around the camera show its slope.

This is a model of our own, drawn by PyBullet; no extra package is needed. The original draws with tacto, which installs under no Python
that this project supports (its urdfpy wants networkx 2.2, which ends at Python 3.9). Shapes, units and signs are CALVIN's, the sensor's
measures are DIGIT's, but pixels are not tacto's: there is no noise here, so equal states give equal images, and only bodies that push
against the pad's front leave a mark.

How a dent is made: the bodies in front of the pad are drawn into a depth image from behind it. PyBullet's bodies are rigid and stay about a
millimetre apart, so that gap is taken off, and the body is moved into the membrane by a distance proportional to its normal force.

Source: TACTO (arXiv 2012.08456), `tacto/renderer.py` and `config_digit.yml`; DIGIT (arXiv 2005.14679).
"""

from __future__ import annotations

import functools

import numpy as np
import pybullet as pb

from envs.calvin.images.layers import depth_in_m, hidden_parts
from envs.calvin.simulation import Simulation

TIP_LINKS = (10, 12)
"""Left and right fingertip: the order of the channels. In a link's frame x points out of the pad, z to the fingertip's end."""

HEIGHT, WIDTH = 160, 120
EYE_M = np.array((0.0, 0.0, 0.0172))
"""The camera in the link's frame, on the axis of the pad."""
FRONT_M = 0.02014
"""From the camera to the middle of the membrane."""
SAG_M, SAG_Y_M, SAG_Z_M = 0.00064, 0.005, 0.0082
"""The membrane bulges: it lies SAG_M further back at SAG_Y_M to the side, or at SAG_Z_M up or down. Measured on the pads' meshes."""
PAD_HEIGHT_M = 0.025
NEAR_M, FAR_M = 0.017, 0.06
"""The near plane cuts the finger away, which the pad stands out of by three millimetres."""

DENT_M, FULL_FORCE_N = 0.0015, 100.0
"""A body that presses with this force or more goes this deep. tacto: 5 mm at 100 N into a gel of 5 mm; this pad has 3."""
MARGIN_M = 0.002
"""No more than this is taken off as the gap that PyBullet leaves between touching bodies."""
SMOOTHING_PX = 2.0
"""The membrane bends over this much at an edge (Gaussian)."""

LIGHT_RING_M, LIGHT_PLANE_M = 0.02, 0.005
LIGHT_ANGLES_DEG = (30, 150, 270)
"""Red, green, blue: on a ring of this radius around the camera's axis, this far in front of the camera; 0 to the side, 90 up."""
AMBIENT, BRIGHTNESS = 0.08, 1.1


class TactileSensors:
    """Both sensors of one simulation."""

    def __init__(self, simulation: Simulation):
        self.simulation = simulation

    def sense(self) -> tuple[np.ndarray, np.ndarray]:
        """rgb_tactile uint8 (160, 120, 6) and depth_tactile float32 (160, 120, 2) [m], left then right; row 0 at the fingertip's end."""
        dents = [self._dent(link) for link in TIP_LINKS]
        images = [_resting_image() if dent is None else shade(dent) for dent in dents]
        depths = [np.zeros((HEIGHT, WIDTH)) if dent is None else dent for dent in dents]
        return np.concatenate(images, axis=2), np.stack(depths, axis=2).astype(np.float32)

    def _dent(self, link: int) -> np.ndarray | None:
        """How deep the membrane of one pad is pressed in, float64 (H, W) [m]; None where nothing presses."""
        eye, rotation = self._camera(link)
        forces = self._forces_n(link, outward=rotation[:, 0])
        if not forces:
            return None
        depth, codes = self._draw(link, eye, rotation)
        gap = depth - _resting_depth()
        dent = np.zeros((HEIGHT, WIDTH))
        for code, force in forces.items():
            seen = codes == code
            if seen.any():
                margin = np.clip(gap[seen].min(), 0, MARGIN_M)
                pressed = DENT_M * min(force / FULL_FORCE_N, 1.0)
                dent[seen] = np.clip(pressed + margin - gap[seen], 0, FRONT_M - NEAR_M)
        return _smooth(dent)

    def _camera(self, link: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the camera is [m], and the link's axes as columns, in the world."""
        simulation = self.simulation
        position, orientation = pb.getLinkState(simulation.robot, link, physicsClientId=simulation.client)[4:6]
        rotation = np.array(pb.getMatrixFromQuaternion(orientation)).reshape(3, 3)
        return np.array(position) + rotation @ EYE_M, rotation

    def _forces_n(self, link: int, outward: np.ndarray) -> dict[int, float]:
        """What pushes against the pad's front: PyBullet's segmentation code of a body's link → force [N] along the pad's normal."""
        simulation = self.simulation
        forces: dict[int, float] = {}
        for contact in pb.getContactPoints(bodyA=simulation.robot, linkIndexA=link, physicsClientId=simulation.client):
            force = -np.dot(contact[7], outward) * contact[9]  # the normal points from the other body to the pad
            if force > 0:
                code = contact[2] + (contact[4] + 1 << 24)
                forces[code] = forces.get(code, 0.0) + force
        return forces

    def _draw(self, link: int, eye: np.ndarray, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Depth [m] along the camera's axis of what is in front of the pad, and its segmentation codes, both (H, W)."""
        view = pb.computeViewMatrix(eye, eye + rotation[:, 0], rotation[:, 2])
        fov_deg = 2 * np.degrees(np.arctan(PAD_HEIGHT_M / 2 / FRONT_M))
        projection = pb.computeProjectionMatrixFOV(fov_deg, WIDTH / HEIGHT, NEAR_M, FAR_M)
        client = self.simulation.cameras.stage.synced()
        with hidden_parts(client, [(self.simulation.robot, link)]):
            _, _, _, depth, codes = pb.getCameraImage(
                WIDTH,
                HEIGHT,
                view,
                projection,
                shadow=0,
                flags=pb.ER_SEGMENTATION_MASK_OBJECT_AND_LINKINDEX,
                renderer=pb.ER_TINY_RENDERER,
                physicsClientId=client,
            )
        return depth_in_m(np.reshape(depth, (HEIGHT, WIDTH)), NEAR_M, FAR_M), np.reshape(codes, (HEIGHT, WIDTH))


def shade(dent: np.ndarray) -> np.ndarray:
    """What the sensor's camera sees: uint8 RGB (H, W, 3) of the membrane dented by `dent` (H, W) [m], lit by the three lights."""
    points = _points(_resting_depth() - dent)
    normals = np.cross(np.gradient(points, axis=1), np.gradient(points, axis=0))  # towards the camera
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    image = np.empty((HEIGHT, WIDTH, 3))
    for channel, angle in enumerate(np.radians(LIGHT_ANGLES_DEG)):
        light = np.array((LIGHT_RING_M * np.cos(angle), LIGHT_RING_M * np.sin(angle), LIGHT_PLANE_M))
        towards = light - points
        distance = np.linalg.norm(towards, axis=2)
        cosine = (normals * towards).sum(axis=2) / distance
        image[..., channel] = AMBIENT + BRIGHTNESS * np.maximum(cosine, 0) * (LIGHT_RING_M / distance) ** 2
    return np.clip(255 * image, 0, 255).astype(np.uint8)


@functools.cache
def _resting_image() -> np.ndarray:
    return shade(np.zeros((HEIGHT, WIDTH)))


@functools.cache
def _rays() -> tuple[np.ndarray, np.ndarray]:
    """Where the ray of every pixel goes per metre of depth: sideways and up, both (H, W)."""
    up = (0.5 - (np.arange(HEIGHT) + 0.5) / HEIGHT) * PAD_HEIGHT_M / FRONT_M
    side = ((np.arange(WIDTH) + 0.5) / WIDTH - 0.5) * PAD_HEIGHT_M / FRONT_M * WIDTH / HEIGHT
    return np.broadcast_to(side, (HEIGHT, WIDTH)), np.broadcast_to(up[:, None], (HEIGHT, WIDTH))


@functools.cache
def _resting_depth() -> np.ndarray:
    """Depth [m] (H, W) of the membrane that nothing touches: a paraboloid, met by every pixel's ray."""
    side, up = _rays()
    a = SAG_M * ((side / SAG_Y_M) ** 2 + (up / SAG_Z_M) ** 2)
    # depth = FRONT_M - a depth², where a > 0 except on the axis, which no pixel's centre lies on
    return (np.sqrt(1 + 4 * a * FRONT_M) - 1) / (2 * a)


def _points(depth: np.ndarray) -> np.ndarray:
    """Camera coordinates [m] (H, W, 3), side, up, forward, of a depth image."""
    side, up = _rays()
    return np.stack((side * depth, up * depth, depth), axis=2)


def _smooth(image: np.ndarray) -> np.ndarray:
    return _blur(HEIGHT) @ image @ _blur(WIDTH).T


@functools.cache
def _blur(size: int) -> np.ndarray:
    """A Gaussian of SMOOTHING_PX as a matrix (size, size) whose rows sum to one, so that edges do not darken."""
    offsets = np.arange(size)[:, None] - np.arange(size)
    kernel = np.exp(-0.5 * (offsets / SMOOTHING_PX) ** 2)
    return kernel / kernel.sum(axis=1, keepdims=True)
