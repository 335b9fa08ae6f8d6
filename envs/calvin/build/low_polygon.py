"""Low-polygon meshes, wood textures and URDF text: the pen and paper of `assets`, `robot` and `tables`.

Everything is exact arithmetic on integers and short decimals, and images are stored uncompressed, so that the same
inputs give the same bytes on every machine.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass, field

import numpy as np

Point = tuple[float, float, float]

# The atlas of a table: rows of one image, each a ramp of shades. Name → (first row, rows). A polygon is cut from one.
ATLAS_WIDTH = 192
SWATCHES = {"wood": (0, 88), "inside": (88, 56), "door": (144, 56), "metal": (200, 16), "groove": (216, 8)}
ATLAS_HEIGHT = 224
ATLAS_WIDTH_M = 1.15
SHADES = 48


@dataclass
class Mesh:
    """Flat polygons (m), each cut from a swatch of the atlas; written as one OBJ, which is one object to draw."""

    polygons: list[tuple[tuple[Point, ...], str]] = field(default_factory=list)

    def polygon(self, points: list[Point], swatch: str = "wood") -> None:
        """Add a convex polygon, counter-clockwise as seen from outside."""
        self.polygons.append((tuple(points), swatch))

    def box(self, low: Point, high: Point, swatch: str = "wood", faces: str = "-x +x -y +y -z +z") -> None:
        """Add an axis-aligned box between two corners; `faces` names those that can be seen."""
        corner = (low, high)
        for face in faces.split():
            axis, side = "xyz".index(face[1]), int(face[0] == "+")
            first, second = (axis + 1) % 3, (axis + 2) % 3
            ring = [(0, 0), (1, 0), (1, 1), (0, 1)]
            points = []
            for a, b in ring if side else ring[::-1]:
                point = [0.0, 0.0, 0.0]
                point[axis], point[first], point[second] = corner[side][axis], corner[a][first], corner[b][second]
                points.append(tuple(point))
            self.polygon(points, swatch)

    def prism(self, outline: list[tuple[float, float]], low_x: float, high_x: float, swatch: str = "wood") -> None:
        """Add a solid with the outline (y, z), counter-clockwise seen from +x, between two values of x."""
        self.polygon([(high_x, y, z) for y, z in outline], swatch)
        self.polygon([(low_x, y, z) for y, z in reversed(outline)], swatch)
        for (y0, z0), (y1, z1) in zip(outline, outline[1:] + outline[:1], strict=True):
            self.polygon([(low_x, y0, z0), (low_x, y1, z1), (high_x, y1, z1), (high_x, y0, z0)], swatch)

    def turned(
        self, profile: list[tuple[float, float]], sides: int, axis: str, centre: Point, swatch: str = "wood"
    ) -> None:
        """Add a solid of revolution about `axis`, "y" or "z".

        profile: (radius, height) from bottom to top; centre: where height is 0.
        """
        rings = [[_around(radius, height, i / sides, axis, centre) for i in range(sides)] for radius, height in profile]
        for below, above in zip(rings, rings[1:], strict=False):
            for i in range(sides):
                j = (i + 1) % sides
                self.polygon([below[i], below[j], above[j], above[i]], swatch)
        self.polygon(rings[-1], swatch)
        self.polygon(rings[0][::-1], swatch)

    @property
    def triangles(self) -> int:
        return sum(len(points) - 2 for points, _ in self.polygons)

    def obj(self, material: str = "") -> str:
        """The mesh as OBJ text; with a `material` library (file name) it also has texture coordinates."""
        lines = [f"mtllib {material}", "usemtl table"] if material else []
        numbers: dict[str, int] = {}
        texture_numbers: dict[str, int] = {}
        faces = []
        for index, (points, swatch) in enumerate(self.polygons):
            corners = [numbers.setdefault("v " + _decimals(p), len(numbers) + 1) for p in points]
            if material:
                texture = [
                    texture_numbers.setdefault("vt " + _decimals(t), len(texture_numbers) + 1)
                    for t in _cut(points, swatch, index)
                ]
                faces.append("f " + " ".join(f"{v}/{t}" for v, t in zip(corners, texture, strict=True)))
            else:
                faces.append("f " + " ".join(map(str, corners)))
        return "\n".join([*lines, *numbers, *texture_numbers, *_triangulated(faces)]) + "\n"


def hulls_obj(hulls: list[list[Point]]) -> str:
    """OBJ with one object per convex solid, given by its corners; PyBullet makes a convex hull of each.

    The faces only have to name every corner: the hull is computed from the points.
    """
    lines, first = [], 1
    for number, points in enumerate(hulls):
        lines.append(f"o hull_{number}")
        lines += ["v " + _decimals(point) for point in points]
        lines += [f"f {first} {first + i} {first + i + 1}" for i in range(1, len(points) - 1)]
        first += len(points)
    return "\n".join(lines) + "\n"


def convex_mesh(points: list[Point], swatch: str = "metal") -> Mesh:
    """The convex hull of `points` as a mesh."""
    mesh = Mesh()
    array = np.array(points, dtype=np.float64)
    centre = array.mean(axis=0)
    seen = set()
    for i in range(len(array)):
        for j in range(i + 1, len(array)):
            for k in range(j + 1, len(array)):
                normal = np.cross(array[j] - array[i], array[k] - array[i])
                length = np.linalg.norm(normal)
                if length < 1e-9:
                    continue
                normal /= length
                if normal @ (array[i] - centre) < 0:
                    normal = -normal
                distance = (array - array[i]) @ normal
                on_face = tuple(np.flatnonzero(np.abs(distance) < 1e-6))
                if distance.max() > 1e-6 or on_face in seen:
                    continue
                seen.add(on_face)
                mesh.polygon(_ordered(array[list(on_face)], normal), swatch)
    return mesh


def _ordered(points: np.ndarray, normal: np.ndarray) -> list[Point]:
    """Corners of one face, counter-clockwise about its normal."""
    centre = points.mean(axis=0)
    first = points[0] - centre
    second = np.cross(normal, first)
    angle = [math.atan2(float((p - centre) @ second), float((p - centre) @ first)) for p in points]
    return [tuple(map(float, points[i])) for i in np.argsort(angle)]


def _around(radius: float, height: float, turn: float, axis: str, centre: Point) -> Point:
    a, b = radius * math.cos(2 * math.pi * turn), radius * math.sin(2 * math.pi * turn)
    offset = (a, b, height) if axis == "z" else (b, height, a)
    return tuple(c + o for c, o in zip(centre, offset, strict=True))


def _decimals(values) -> str:
    return " ".join(f"{round(value, 5) + 0.0:.5g}" if abs(value) >= 1e-9 else "0" for value in values)


def _triangulated(faces: list[str]) -> list[str]:
    lines = []
    for face in faces:
        corners = face.split()[1:]
        lines += [f"f {corners[0]} {corners[i]} {corners[i + 1]}" for i in range(1, len(corners) - 1)]
    return lines


def _cut(points: tuple[Point, ...], swatch: str, index: int) -> list[tuple[float, float]]:
    """Texture coordinates of a polygon: the grain runs along its longest side, each is another cut of the board."""
    array = np.array(points)
    along = array[1] - array[0]
    for start, end in zip(array, np.roll(array, -1, axis=0), strict=True):
        if np.linalg.norm(end - start) > np.linalg.norm(along) + 1e-9:
            along = end - start
    along = along / np.linalg.norm(along)
    normal = np.cross(array[1] - array[0], array[2] - array[0])
    across = np.cross(normal / np.linalg.norm(normal), along)
    u, v = array @ along, array @ across
    u, v = u - u.min(), v - v.min()
    first, rows = SWATCHES[swatch]
    pixels_per_m = ATLAS_WIDTH / ATLAS_WIDTH_M
    spare_u = max(0.0, ATLAS_WIDTH - 2 - u.max() * pixels_per_m)
    spare_v = max(0.0, rows - 2 - v.max() * pixels_per_m)
    column = 1 + u * min(pixels_per_m, (ATLAS_WIDTH - 2) / max(u.max(), 1e-9)) + spare_u * (index * 37 % 100) / 100
    row = first + 1 + v * min(pixels_per_m, (rows - 2) / max(v.max(), 1e-9)) + spare_v * (index * 61 % 100) / 100
    return [(float(c) / ATLAS_WIDTH, 1 - float(r) / ATLAS_HEIGHT) for c, r in zip(column, row, strict=True)]


# -- textures


def wood_atlas(ramps: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]], seed: int, rings: float) -> bytes:
    """A table's atlas as PNG. ramps: swatch → darkest and lightest RGB; rings: growth rings in a swatch of wood."""
    pixels = np.zeros((ATLAS_HEIGHT, ATLAS_WIDTH), dtype=np.uint8)
    palette = []
    for number, (swatch, (first, rows)) in enumerate(SWATCHES.items()):
        grain = (
            _grain(rows, seed * 16 + number, rings)
            if swatch in ("wood", "inside", "door")
            else np.full((rows, ATLAS_WIDTH), 0.5)
        )
        pixels[first : first + rows] = number * SHADES + np.minimum((grain * SHADES).astype(int), SHADES - 1)
        dark, light = ramps[swatch]
        palette += [
            tuple(d + (b - d) * i // (SHADES - 1) for d, b in zip(dark, light, strict=True)) for i in range(SHADES)
        ]
    return png(pixels, palette)


def _grain(rows: int, seed: int, rings: float) -> np.ndarray:
    """Wood in [0, 1): rings bent by slow noise, with short fibres along the rows."""
    y, x = np.mgrid[0:rows, 0:ATLAS_WIDTH].astype(float)
    phase = y * rings / 88 + 1.6 * _noise(x / 60, y / 24, seed) + 0.3 * _noise(x / 17, y / 9, seed + 1)
    saw = phase - np.floor(phase)
    ring = saw * saw * (3 - 2 * saw)
    fibre = _noise(x / 14, y / 1.4, seed + 2)
    return np.clip(0.55 * ring + 0.45 * fibre, 0, 0.999)


def _noise(x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """Value noise in [0, 1) on an integer lattice, hashed in integers so that it is the same on every machine."""
    x0, y0 = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    fx, fy = x - x0, y - y0
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    low = _hash(x0, y0, seed) * (1 - fx) + _hash(x0 + 1, y0, seed) * fx
    high = _hash(x0, y0 + 1, seed) * (1 - fx) + _hash(x0 + 1, y0 + 1, seed) * fx
    return low * (1 - fy) + high * fy


def _hash(x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    h = (x * 374761393 + y * 668265263 + seed * 2246822519) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    return ((h ^ (h >> 16)) & 0xFFFF) / 65536.0


def png(pixels: np.ndarray, palette: list[tuple[int, int, int]]) -> bytes:
    """An 8-bit palette PNG of uint8 (H, W), stored uncompressed: zlib implementations compress differently."""
    height, width = pixels.shape
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)
    blocks = [raw[i : i + 65535] for i in range(0, len(raw), 65535)]
    stored = b"".join(struct.pack("<BHH", b is blocks[-1], len(b), len(b) ^ 0xFFFF) + b for b in blocks)
    stream = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(raw))
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    colours = b"".join(bytes(colour) for colour in palette)
    chunks = [(b"IHDR", header), (b"PLTE", colours), (b"IDAT", stream), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


# -- URDF


def origin(xyz=(0, 0, 0), rpy=(0, 0, 0)) -> str:
    """An <origin> element (m, rad)."""
    return f'<origin xyz="{_numbers(xyz)}" rpy="{_numbers(rpy)}"/>'


def inertial(mass: float, xyz, inertia: tuple[float, ...]) -> str:
    """<inertial> from mass [kg], centre [m] and ixx, ixy, ixz, iyy, iyz, izz [kg m²]."""
    names = ("ixx", "ixy", "ixz", "iyy", "iyz", "izz")
    terms = " ".join(f'{name}="{value:.10g}"' for name, value in zip(names, inertia, strict=True))
    return f'<inertial>{origin(xyz)}<mass value="{mass:.10g}"/><inertia {terms}/></inertial>'


def mesh_shape(tag: str, file: str, xyz=(0, 0, 0), rpy=(0, 0, 0), rgba=None) -> str:
    """<visual> or <collision> of a mesh file."""
    return f'<{tag}>{origin(xyz, rpy)}<geometry><mesh filename="{file}"/></geometry>{_material(rgba)}</{tag}>'


def box_shape(tag: str, low: Point, high: Point, rgba=None) -> str:
    """<visual> or <collision> of the box between two corners."""
    size = [round(b - a, 6) for a, b in zip(low, high, strict=True)]
    centre = [round((a + b) / 2, 6) for a, b in zip(low, high, strict=True)]
    return f'<{tag}>{origin(centre)}<geometry><box size="{_numbers(size)}"/></geometry>{_material(rgba)}</{tag}>'


def _material(rgba) -> str:
    if rgba is None:
        return ""
    name = "colour_" + "_".join(f"{round(value * 100)}" for value in rgba)
    return f'<material name="{name}"><color rgba="{_numbers(rgba)}"/></material>'


def link(name: str, *parts: str) -> str:
    """<link> of the given parts, one a line."""
    return "\n    ".join([f'  <link name="{name}">', *parts]) + "\n  </link>"


def joint(
    name: str, kind: str, parent: str, child: str, xyz=(0, 0, 0), rpy=(0, 0, 0), axis=None, limit=None, extra: str = ""
) -> str:
    """<joint>; limit: (lower, upper, effort, velocity)."""
    parts = [f'<parent link="{parent}"/><child link="{child}"/>', origin(xyz, rpy)]
    if axis is not None:
        parts.append(f'<axis xyz="{_numbers(axis)}"/>')
    if limit is not None:
        parts.append('<limit lower="{:.10g}" upper="{:.10g}" effort="{:.10g}" velocity="{:.10g}"/>'.format(*limit))
    return (
        "\n    ".join([f'  <joint name="{name}" type="{kind}">', *parts, *([extra] if extra else [])]) + "\n  </joint>"
    )


def robot(name: str, *elements: str) -> str:
    """A whole URDF file."""
    return "\n".join(['<?xml version="1.0"?>', f'<robot name="{name}">', *elements, "</robot>"]) + "\n"


def _numbers(values) -> str:
    return " ".join(f"{value:.15g}" for value in values)
