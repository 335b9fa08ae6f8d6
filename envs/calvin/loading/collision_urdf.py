"""Robot and table descriptions without what is only seen: a reset loads them again, and most of that time is reading meshes.

A copy is written once per process. It gives the same physics to the last bit: visual meshes go, normals, texture coordinates, needless
repeats of corners (see `hulls`), and digits that a 32-bit float has no room for. A mesh whose hulls would not be the same stays as it is.
"""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from envs.calvin.loading.hulls import HullBuilder, fewest_corners
from envs.calvin.loading.robot_urdf import temporary_folder

SPECK = '<visual><geometry><box size="0.001 0.001 0.001"/></geometry></visual>'
"""PyBullet prepares a link's collision meshes for drawing where it has nothing else to draw."""


@functools.cache
def collision_urdf(path: str, scaling: float = 1.0) -> str:
    """Path of a copy of the URDF at `path` that is quick to load with `globalScaling=scaling`, and has nothing to be seen.

    Raises FileNotFoundError for a mesh that is missing.
    """
    tree = ET.parse(path)
    folder = temporary_folder("emu3_vla_collision_")
    with HullBuilder() as builder:
        for link in tree.getroot().iter("link"):
            for visual in link.findall("visual"):
                link.remove(visual)
            collisions = link.findall("collision")
            for collision in collisions:
                for mesh in collision.iter("mesh"):
                    file = _mesh_file(Path(path), mesh.attrib["filename"])
                    if "concave" not in collision.attrib and file.suffix.lower() == ".obj":
                        file = _quick_copy(file, folder, builder, mesh.get("scale", "1 1 1"), scaling)
                    mesh.set("filename", str(file))
            if collisions:
                link.append(ET.fromstring(SPECK))
    copy = folder / Path(path).name
    tree.write(copy)
    return str(copy)


def _mesh_file(urdf: Path, name: str) -> Path:
    """The file that PyBullet finds for a mesh: beside the URDF, or else beside the nearest folder above it."""
    relative = name.removeprefix("file://").removeprefix("package://").removeprefix("model://")
    for folder in urdf.resolve().parents:
        if (folder / relative).is_file():
            return folder / relative
    raise FileNotFoundError(f"{urdf} needs the mesh {name}, which is in no folder from there upwards; are the assets complete?")


def _quick_copy(file: Path, folder: Path, builder: HullBuilder, scale: str, scaling: float) -> Path:
    """A copy with the very same hulls, with as few corners as they take; the file itself where it has more than triangles."""
    text = file.read_text()
    objects = triangle_corners(text)
    if objects is None:
        return file
    factors = [float(factor) * scaling for factor in scale.split()]
    wanted = builder.hulls(text, scale, scaling)
    for corners in ([fewest_corners(corners, factors) for corners in objects], objects):
        short = obj(corners)
        if builder.hulls(short, scale, scaling) == wanted:
            copy = folder / f"{builder.built}_{file.name}"
            copy.write_text(short)
            return copy
    return file


def triangle_corners(text: str) -> list[list[str]] | None:
    """Per object of an OBJ text the corners "x y z" of its triangles; None where a face is no triangle of positive indices."""
    vertices: list[str] = []
    objects: list[list[str]] = [[]]
    for line in text.splitlines():
        kind, *values = line.split() or ["#"]
        if kind == "v":
            vertices.append(" ".join(map(_shortest, values[:3])))
        elif kind == "f":
            indices = [int(value.split("/")[0]) for value in values]
            if len(indices) != 3 or not all(0 < index <= len(vertices) for index in indices):
                return None
            objects[-1] += [vertices[index - 1] for index in indices]
        elif kind in ("o", "g"):
            objects.append([])
    return [corners for corners in objects if corners]


def obj(objects: Sequence[Sequence[str]]) -> str:
    """An OBJ text with one object per list of corners, three to a triangle."""
    numbers: dict[str, int] = {}
    lines = []
    for index, corners in enumerate(objects):
        indices = [str(numbers.setdefault(corner, len(numbers) + 1)) for corner in corners]
        lines += [f"o {index}", *(f"f {' '.join(indices[i : i + 3])}" for i in range(0, len(indices), 3))]
    return "\n".join([*(f"v {corner}" for corner in numbers), *lines]) + "\n"


def _shortest(value: str) -> str:
    """The fewest digits of the 32-bit float that PyBullet reads there."""
    return str(np.float32(float(value)))
