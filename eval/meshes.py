"""Triangles of the simulator's visual shapes, for drawing them elsewhere: OBJ and binary STL files, boxes and cylinders.

Every triangle has its own three vertices and its face normal, so low-polygon shapes look as flat as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SPHERE, BOX, CYLINDER, MESH, PLANE, CAPSULE = 2, 3, 4, 5, 6, 7  # PyBullet's geometry types
CYLINDER_SIDES = 24


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A triangle soup. positions, normals: float32 (3·T, 3), metres; texcoords: float32 (3·T, 2), origin at the top left, or None;
    texture: uint8 (H, W, 3) or None."""

    positions: np.ndarray
    normals: np.ndarray
    texcoords: np.ndarray | None = None
    texture: np.ndarray | None = None


def mesh_of(shape: dict[str, Any]) -> Mesh:
    """The triangles of one of `Simulation.visual_shapes()`, in the shape's own frame.

    Raises ValueError for a geometry or a file that cannot be read.
    """
    geometry, size = shape["geometry"], np.array(shape["dimensions"], dtype=np.float64)
    if geometry == BOX:
        return box(size)
    if geometry == CYLINDER:
        return cylinder(length_m=size[0], radius_m=size[1])
    if geometry == MESH:
        return load_mesh(Path(shape["file"]), scale=size)
    raise ValueError(f"{shape['body']}/{shape['link_name']}: geometry {geometry} (PyBullet's numbering) cannot be drawn")


def box(size_m: np.ndarray) -> Mesh:
    """A box with sides `size_m` (3,) about the origin."""
    corners = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)]) * size_m
    quads = ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3))
    return _soup(corners[[corner for a, b, c, d in quads for corner in (a, b, c, a, c, d)]])


def cylinder(*, length_m: float, radius_m: float) -> Mesh:
    """A closed cylinder along z about the origin."""
    angles = 2 * np.pi * np.arange(CYLINDER_SIDES + 1) / CYLINDER_SIDES
    rim = radius_m * np.stack([np.cos(angles), np.sin(angles), np.zeros_like(angles)], axis=1)
    up = np.array([0, 0, length_m / 2])
    corners = []
    for a, b in zip(rim[:-1], rim[1:], strict=True):
        corners += [a - up, b - up, b + up, a - up, b + up, a + up, up, a + up, b + up, -up, b - up, a - up]
    return _soup(np.array(corners))


def load_mesh(path: Path, scale: np.ndarray) -> Mesh:
    """The triangles in an OBJ (with its diffuse texture) or binary STL file. scale: (3,). Raises ValueError for anything else."""
    suffix = path.suffix.lower()
    if suffix == ".obj":
        return _load_obj(path, scale)
    if suffix == ".stl":
        return _load_stl(path, scale)
    raise ValueError(f"{path}: cannot read {suffix or 'a file without suffix'}; expected .obj or .stl")


def _load_stl(path: Path, scale: np.ndarray) -> Mesh:
    content = path.read_bytes()
    triangle = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    count = int(np.frombuffer(content, "<u4", 1, 80)[0]) if len(content) >= 84 else -1
    if len(content) != 84 + count * triangle.itemsize:
        raise ValueError(f"{path} is not a whole binary STL file ({len(content)} bytes, {count} triangles)")
    return _soup(np.frombuffer(content, triangle, count, 84)["corners"].reshape(-1, 3) * scale)


def _load_obj(path: Path, scale: np.ndarray) -> Mesh:
    vertices, texcoords, faces, materials = [], [], [], None
    for line in path.read_text(errors="replace").splitlines():
        key, _, rest = line.strip().partition(" ")
        if key == "v":
            vertices.append([float(number) for number in rest.split()[:3]])
        elif key == "vt":
            texcoords.append([float(number) for number in rest.split()[:2]])
        elif key == "mtllib":
            materials = path.parent / rest.strip()
        elif key == "f":
            corners = [_corner(word, len(vertices), len(texcoords)) for word in rest.split()]
            faces += [corner for i in range(1, len(corners) - 1) for corner in (corners[0], corners[i], corners[i + 1])]
    if not faces:
        raise ValueError(f"{path} holds no faces")
    index = np.array(faces)
    texture = _texture(materials) if texcoords and (index[:, 1] >= 0).all() else None
    uv = np.array(texcoords)[index[:, 1]] if texture is not None else None
    return _soup(np.array(vertices)[index[:, 0]] * scale, uv, texture)


def _corner(word: str, vertices: int, texcoords: int) -> tuple[int, int]:
    """(vertex, texture coordinate or -1) of "7", "7/2", "7//3" or "7/2/3"; negative numbers count from the last."""
    parts = word.split("/")
    vertex = int(parts[0])
    uv = int(parts[1]) if len(parts) > 1 and parts[1] else 0
    return (vertex - 1 if vertex > 0 else vertices + vertex), (uv - 1 if uv > 0 else texcoords + uv if uv < 0 else -1)


def _texture(materials: Path | None) -> np.ndarray | None:
    if materials is None or not materials.is_file():
        return None
    for line in materials.read_text(errors="replace").splitlines():
        key, _, rest = line.strip().partition(" ")
        image = materials.parent / rest.strip()
        if key == "map_Kd" and image.is_file():
            return np.asarray(Image.open(image).convert("RGB"))
    return None


def _soup(corners: np.ndarray, uv: np.ndarray | None = None, texture: np.ndarray | None = None) -> Mesh:
    triangles = corners.reshape(-1, 3, 3)
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    normals = np.divide(normals, lengths, out=np.zeros_like(normals), where=lengths > 0)
    return Mesh(
        positions=corners.astype(np.float32),
        normals=np.repeat(normals, 3, axis=0).astype(np.float32),
        # Files count v from the bottom.
        texcoords=None if uv is None else np.stack([uv[:, 0], 1 - uv[:, 1]], axis=1).astype(np.float32),
        texture=texture,
    )
