"""Robot and table descriptions without what is only seen: a reset loads them again, and most of that time is reading meshes.

A copy is written once per process. It gives the same physics to the last bit: the corners of every convex mesh stay the same, in the same
order and as often as before, because Bullet's convex hulls depend on all three. Only what Bullet does not read goes: normals, texture
coordinates, unused corners, and digits that a 32-bit float has no room for. A mesh that is not simple enough to be certain stays as it is.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

SPECK = '<visual><geometry><box size="0.001 0.001 0.001"/></geometry></visual>'
"""PyBullet prepares a link's collision meshes for drawing where it has nothing else to draw."""
IGNORED = ("vn", "vt", "s", "mtllib", "usemtl")
"""Lines of an OBJ file that say nothing about where the corners are. (A material ends no object in PyBullet's reader.)"""


@functools.cache
def collision_urdf(path: str) -> str:
    """Path of a copy of the URDF at `path` that has no visual shapes and compact collision meshes.

    Raises FileNotFoundError for a mesh that is missing.
    """
    tree = ET.parse(path)
    folder = Path(tempfile.mkdtemp(prefix="emu3_vla_collision_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for link in tree.getroot().iter("link"):
        for visual in link.findall("visual"):
            link.remove(visual)
        if link.find("collision") is not None:
            link.append(ET.fromstring(SPECK))
        for collision in link.findall("collision"):
            for mesh in collision.iter("mesh"):
                file = _mesh_file(Path(path), mesh.attrib["filename"])
                convex = "concave" not in collision.attrib
                mesh.set("filename", str(_compact_copy(file, folder) if convex and file.suffix.lower() == ".obj" else file))
    copy = folder / Path(path).name
    tree.write(copy)
    return str(copy)


def _mesh_file(urdf: Path, name: str) -> Path:
    """The file that PyBullet finds for a mesh: beside the URDF, or else beside the nearest folder above it."""
    relative = name.removeprefix("file://").removeprefix("package://").removeprefix("model://")
    for folder in urdf.resolve().parents:
        if (folder / relative).is_file():
            return folder / relative
    raise FileNotFoundError(
        f"{urdf} needs the mesh {name}, which is in no folder from {urdf.resolve().parent} upwards; are the assets complete?"
    )


def _compact_copy(file: Path, folder: Path) -> Path:
    text = compact_obj(file.read_text())
    if text is None:
        return file
    copy = folder / f"{len(list(folder.iterdir()))}_{file.name}"
    copy.write_text(text)
    return copy


def compact_obj(text: str) -> str | None:
    """An OBJ text of the same triangles in the same order, as short as can be; None for one with anything but triangles."""
    corners: list[str] = []
    numbers: dict[str, int] = {}
    lines: list[str] = []
    for line in text.splitlines():
        kind, *values = line.split() or ["#"]
        if kind == "v":
            corners.append(" ".join(_shortest(value) for value in values[:3]))
        elif kind == "f":
            indices = [int(value.split("/")[0]) for value in values]
            if len(indices) != 3 or not all(0 < index <= len(corners) for index in indices):
                return None
            lines.append("f " + " ".join(str(numbers.setdefault(corners[index - 1], len(numbers) + 1)) for index in indices))
        elif kind in ("o", "g"):
            lines.append(f"o {len(lines)}")
        elif kind not in IGNORED and not kind.startswith("#"):
            return None
    return "\n".join([*(f"v {corner}" for corner in numbers), *lines]) + "\n"


def _shortest(value: str) -> str:
    """The fewest digits that a reader of 32-bit floats takes for the same number (it reads 64 bits, then rounds)."""
    single = np.float32(float(value))
    short = np.format_float_positional(single, unique=True, trim="-")
    return short if np.float32(float(short)) == single else value
