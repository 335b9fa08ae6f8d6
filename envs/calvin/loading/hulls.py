"""Convex hulls as PyBullet builds them, from fewer points: sorting and merging triangle corners is most of what a reset costs.

Bullet takes the corners of all triangles, so each point comes about six times. Its hull has the same vertices if each comes once, but in
another order, and contact solving may depend on the order. The order follows from how the sorted corners are halved, again and again, and
that from the repeats. Here the fewest repeats are found that are halved in the same way. Whoever uses them checks that the hulls are equal.

Source: Bullet `src/LinearMath/btConvexHullComputer.cpp`, `btConvexHullInternal::compute` and `computeInternal`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pybullet as pb

GRID = 10216
"""Bullet rounds corners to a grid of this many cells along each side of their bounds."""
URDF = (
    '<robot name="hull"><link name="base"><inertial><mass value="1"/><inertia ixx="1" ixy="0" ixz="0" iyy="1" iyz="0" izz="1"/></inertial>'
    '<visual><geometry><box size="0.001 0.001 0.001"/></geometry></visual>'
    '<collision><geometry><mesh filename="{mesh}" scale="{scale}"/></geometry></collision></link></robot>'
)


def fewest_corners(corners: Sequence[str], scale: Sequence[float]) -> list[str]:
    """The fewest of these corners, each a text "x y z", that are halved as all of them would be. scale: of x, y and z."""
    cells = _cells(np.array([corner.split() for corner in corners], dtype=np.float32).astype(np.float64) * scale)
    points, first, repeats = np.unique(cells, axis=0, return_index=True, return_counts=True)  # rows are sorted as Bullet sorts
    tree = _halve(0, len(corners), np.repeat(np.arange(len(points)), repeats))
    count = _fewest(tree, 1)
    while count % 3:  # to be written as triangles
        count = _fewest(tree, count + 1)
    wanted = np.zeros(len(points), dtype=int)
    _fill(tree, count, wanted)
    return [corners[index] for index, count in zip(first, wanted, strict=True) for _ in range(count)]


def _cells(points: np.ndarray) -> np.ndarray:
    """Grid cells of points (N, 3): int (N, 3), in the order in which Bullet compares them (longest side, middle, shortest)."""
    low, high = points.min(axis=0), points.max(axis=0)
    size = high - low
    longest, shortest = int(np.argmax(size)), int(np.argmin(size))
    if longest == shortest:
        shortest = (longest + 1) % 3
    middle = 3 - longest - shortest
    step = size / GRID * (1 if (middle + 1) % 3 == longest else -1)
    inverse = np.divide(1.0, step, out=np.zeros(3), where=step != 0)
    cells = ((points - (low + high) * 0.5) * inverse).astype(np.int64)
    return cells[:, [longest, middle, shortest]]


@dataclass
class _Half:
    """A run of sorted corners, and how Bullet halves it. Both halves are None for one point, or two that come once each."""

    first: int
    last: int
    pair: bool
    left: _Half | None = None
    right: _Half | None = None
    fewest_right: int = 0  # corners that the right half takes at least


def _halve(start: int, end: int, point_of: np.ndarray) -> _Half:
    """point_of: per sorted corner the number of its point."""
    half = _Half(int(point_of[start]), int(point_of[end - 1]), pair=end - start == 2 and point_of[start] != point_of[end - 1])
    if half.first == half.last or half.pair:
        return half
    middle = start + (end - start) // 2
    after = start + int(np.searchsorted(point_of[start:end], point_of[middle - 1], side="right"))
    half.left = _halve(start, middle, point_of)
    if after < end:
        half.right = _halve(after, end, point_of)
        half.fewest_right = _fewest(half.right, 1)
    return half


def _fewest(half: _Half, least: int) -> int:
    """The fewest corners, but `least`, that are halved so."""
    if half.left is None:
        return 2 if half.pair else max(least, 1)
    return _split(half, max(least, 3))[0]


def _split(half: _Half, least: int) -> tuple[int, int, int]:
    """(corners in all, in the left half, in the right); what is missing are repeats of the left half's last point, which Bullet skips."""
    right = half.fewest_right
    left = _fewest(half.left, max(least // 2, right - 1, 1))
    return max(2 * left if right <= left else 2 * left + 1, least), left, right


def _fill(half: _Half, count: int, repeats: np.ndarray) -> None:
    """Add the repeats of each point in `count` corners."""
    if half.left is None:
        repeats[half.first] += 1 if half.pair else count
        repeats[half.last] += 1 if half.pair else 0
        return
    _, left, right = _split(half, count)
    _fill(half.left, left, repeats)
    if half.right:
        _fill(half.right, right, repeats)
    repeats[half.left.last] += count - left - right


class HullBuilder:
    """Asks PyBullet for the hulls of OBJ texts. A context manager: it holds a folder and, once asked, a physics client."""

    def __enter__(self) -> HullBuilder:
        self.folder = tempfile.TemporaryDirectory()
        self.client, self.built = -1, 0
        return self

    def __exit__(self, *_) -> None:
        if self.client >= 0:
            pb.disconnect(self.client)
        self.folder.cleanup()

    def hulls(self, text: str, scale: str, scaling: float) -> tuple[tuple, tuple]:
        """Vertices [m] in Bullet's order, one object after the other, and the bounds (lowest, highest) that collisions use.

        scale: the mesh's attribute in a URDF; scaling: globalScaling of the body.
        """
        if self.client < 0:
            self.client = pb.connect(pb.DIRECT)
            if self.client < 0:
                raise RuntimeError("PyBullet gave no client to build hulls in; too many simulators in one process?")
        self.built += 1  # a new name each time: PyBullet remembers the files that it has read
        mesh, urdf = (Path(self.folder.name) / f"{self.built}{suffix}" for suffix in (".obj", ".urdf"))
        mesh.write_text(text)
        urdf.write_text(URDF.format(mesh=mesh, scale=scale))
        body = pb.loadURDF(str(urdf), globalScaling=scaling, physicsClientId=self.client)
        found = pb.getMeshData(body, -1, physicsClientId=self.client)[1], pb.getAABB(body, -1, physicsClientId=self.client)
        pb.removeBody(body, physicsClientId=self.client)
        return found
