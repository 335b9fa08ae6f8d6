"""Which parts of the robot a camera cannot see at all, so that they need not be drawn.

PyBullet's CPU renderer transforms and lights every triangle before it finds that none is in the image. From the wrist most of the arm is
behind the camera. Leaving a part out changes no pixel: it is left out only if a box around its meshes is wholly outside the view.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pybullet as pb

MARGIN_M = 0.005
"""Boxes are larger by this on each side: far more than rounding can move them."""


class Boxes:
    """Boxes around the visual meshes of one body's links. shapes: rows of pb.getVisualShapeData; links with other geometry are left out."""

    def __init__(self, client: int, uid: int, shapes: Sequence[tuple]):
        self.client, self.uid = client, uid
        corners: dict[int, list[np.ndarray]] = {}
        for shape in shapes:
            if shape[0] == uid and shape[1] >= 0 and shape[2] == pb.GEOM_MESH:
                corners.setdefault(shape[1], []).append(_corners_m(shape))
        everything = {shape[1] for shape in shapes if shape[0] == uid and shape[2] != pb.GEOM_MESH}
        links = [link for link in corners if link not in everything]
        self.links = [link for link in links for _ in corners[link]]
        self.corners = np.array([box for link in links for box in corners[link]]).reshape(-1, 8, 3)

    def outside(self, view: Sequence[float], projection: Sequence[float]) -> list[tuple[int, int]]:
        """The parts (body, link) of which nothing is in view. Both matrices as PyBullet has them: 16 numbers, column by column."""
        if not self.links:
            return []
        to_clip = np.reshape(projection, (4, 4)).T @ np.reshape(view, (4, 4)).T
        states = pb.getLinkStates(self.uid, self.links, physicsClientId=self.client)
        turns = np.array([pb.getMatrixFromQuaternion(state[5]) for state in states]).reshape(-1, 3, 3)
        places = self.corners @ turns.swapaxes(1, 2) + np.array([state[4] for state in states])[:, None]
        x, y, _, w = np.moveaxis(places @ to_clip[:, :3].T + to_clip[:, 3], -1, 0)
        beyond = np.stack((w, w - x, w + x, w - y, w + y)) < 0  # behind the camera, or past one of four sides
        unseen = beyond.all(axis=2).any(axis=0)
        seen = {link for link, out in zip(self.links, unseen, strict=True) if not out}
        return [(self.uid, link) for link in dict.fromkeys(self.links) if link not in seen]


def _corners_m(shape: tuple) -> np.ndarray:
    """Eight corners [m] of a box around one visual mesh, (8, 3), in the frame of its link."""
    low, high = _mesh_bounds(shape[4].decode())
    scaled = np.array((low, high)) * shape[3]
    low, high = scaled.min(axis=0) - MARGIN_M, scaled.max(axis=0) + MARGIN_M
    corners = np.array(list(itertools.product(*zip(low, high, strict=True))))
    return corners @ np.reshape(pb.getMatrixFromQuaternion(shape[6]), (3, 3)).T + shape[5]


@functools.cache
def _mesh_bounds(file: str) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest coordinates of an OBJ or binary STL file. Raises ValueError for another format."""
    data = Path(file).read_bytes()
    suffix = Path(file).suffix.lower()
    if suffix == ".obj":
        points = np.array([line.split()[1:4] for line in data.split(b"\n") if line[:2] in (b"v ", b"v\t")], dtype=np.float64)
    elif suffix == ".stl":
        facet = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
        points = np.frombuffer(data, facet, offset=84)["corners"].reshape(-1, 3).astype(np.float64)
    else:
        raise ValueError(f"mesh {file} is neither an OBJ nor an STL file; expected one of the robot's visual meshes")
    return points.min(axis=0), points.max(axis=0)
