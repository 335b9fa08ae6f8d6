"""Writes our own low-polygon CALVIN assets: `python -m envs.calvin.build_assets` rewrites `envs/calvin/assets/` byte for byte.

The folder has the layout of calvin_env's `data/`: same relative paths, joint and link names, joint indices, limits, masses and
inertias; geometry and textures are our own, made from dimensions. Lengths are metres before the scale of 0.8 with which tables and
blocks are loaded. Every link is one visual mesh, because PyBullet's CPU renderer charges for objects before it charges for polygons.

Source of the numbers: calvin_env `data/calvin_table_{A..D}/urdf/*.urdf` and `data/franka_panda/panda_longer_finger.urdf`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from envs.calvin.low_polygon import Mesh, box_shape, convex_mesh, hulls_obj, inertial, joint, link, mesh_shape, robot, wood_atlas
from envs.calvin.robot_urdf import ASSETS, PYBULLET_DATA
from envs.calvin.scenes import BLOCK_LENGTHS_M, GLOBAL_SCALING, OWN_ASSETS, PLANE_URDF, ROBOT_URDF

WHITE, BLACK, GRAY, UNSEEN = (1, 1, 1, 1), (0.04, 0.04, 0.04, 1), (0.4, 0.4, 0.4, 1), (1, 1, 1, 0)
UPRIGHT = (math.pi / 2, 0, 0)  # link frames stand: their y is the table's z, their z points towards the robot

# What the four tables share.
HALF_WIDTH, HALF_DEPTH, TOP, UNDERSIDE = 0.55, 0.225, 0.55, 0.5
CABINET_TOP, FOOT_Y, HEAD_Y = 0.809808, 0.025, 0.175  # the cabinet's front leans back by 30 degrees, from foot to head
CAVITY_FLOOR, CAVITY_TOP, CAVITY_BACK = 0.525, 0.784808, 0.2
CAVITY_LINTEL_Y = FOOT_Y + (CAVITY_TOP - TOP) * (HEAD_Y - FOOT_Y) / (CABINET_TOP - TOP)
HOUSING_BOTTOM, HOUSING_Y, HOUSING_X = 0.375, 0.2, 0.5
DRAWER_HALF, DRAWER_FLOOR, DRAWER_BACK = 0.25, 0.4, 0.075
BUTTON_Y, RING_RADIUS, RING_TOP = -0.15, 0.05, 0.575
LEGS = [(x, y) for x in (-0.55, 0.5) for y in (-0.225, 0.185)]
PANEL = [(FOOT_Y, UNDERSIDE), (HALF_DEPTH, UNDERSIDE), (HALF_DEPTH, CABINET_TOP), (HEAD_Y, CABINET_TOP), (FOOT_Y, TOP)]
LINTEL = [(CAVITY_LINTEL_Y, CAVITY_TOP), (CAVITY_BACK, CAVITY_TOP), (CAVITY_BACK, CABINET_TOP), (HEAD_Y, CABINET_TOP)]

BLOCK_RGBA = {"red": (1, 0, 0, 1), "blue": (0, 0, 1, 1), "pink": (1, 0, 1, 1)}
BLOCKS = ["red_small", "red_middle", "red_big", "blue_small", "blue_big", "pink_small", "pink_middle", "pink_big"]

Rgb = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Where one scene has its things (x in metres unless said otherwise), and how it looks."""

    number: int
    cavity: tuple[float, float]
    slide: float
    slide_limit: float
    slide_centre: float
    plank: float
    drawer: float
    button: float
    switch: float
    led: float
    light: tuple[float, float]  # x, y
    light_centre_z: float
    light_mass: float
    light_inertia: tuple[float, float, float]
    base_centre: float
    wood: tuple[Rgb, Rgb]  # darkest and lightest shade
    door: tuple[Rgb, Rgb]
    rings: float


_BIG_BULB = dict(light_centre_z=-0.035, light_mass=0.173918312098126, light_inertia=(8.23031895831843e-05, 8.738048875184e-05, 8.23031895831843e-05))
_BULB_B = dict(light_centre_z=-0.03, light_mass=0.115259640607692, light_inertia=(4.26168302144228e-05, 4.10781933228919e-05, 4.26168302144228e-05))
_LEFT_CABINET = dict(cavity=(-0.45, 0.2), slide=-0.125, slide_limit=0.35, slide_centre=-0.175, plank=-0.125)
_RIGHT_CABINET = dict(cavity=(-0.225, 0.425), slide_centre=0.175, plank=0.1)

TABLES = {
    "A": Table(
        **_LEFT_CABINET, **_BIG_BULB,
        number=7, drawer=0.125, button=-0.35, switch=0.375, led=-0.35, light=(0.375, 0.165), base_centre=0.00745063057322709,
        wood=((72, 30, 22), (122, 58, 42)), door=((94, 40, 30), (150, 76, 56)), rings=3.0,
    ),
    "B": Table(
        **_RIGHT_CABINET, **_BULB_B,
        number=5, slide=0.11, slide_limit=0.38, drawer=0.225, button=0.35, switch=-0.4, led=0.35, light=(-0.4, 0.17),
        base_centre=-0.0591017040800947, wood=((205, 164, 112), (242, 212, 164)), door=((184, 138, 84), (222, 182, 128)), rings=7.0,
    ),
    "C": Table(
        **_RIGHT_CABINET, **_BIG_BULB,
        number=6, slide=0.075, slide_limit=0.3, drawer=0.125, button=-0.15, switch=-0.4, led=-0.15, light=(-0.4, 0.165),
        base_centre=-0.0432138999361933, wood=((138, 86, 40), (184, 124, 66)), door=((78, 34, 24), (116, 56, 40)), rings=5.0,
    ),
    "D": Table(
        **_LEFT_CABINET, **_BIG_BULB,
        number=8, drawer=0.225, button=-0.15, switch=0.375, led=-0.15, light=(0.375, 0.165), base_centre=-0.00874455174683536,
        wood=((98, 76, 50), (150, 122, 86)), door=((144, 116, 80), (200, 170, 128)), rings=6.0,
    ),
}  # fmt: skip


def build() -> dict[str, bytes]:
    """Every file of the asset folder: relative path → content."""
    files: dict[str, str | bytes] = {ROBOT_URDF: _panda(), PLANE_URDF: _plane()}
    files |= {f"franka_panda/meshes/{name}": text for name, text in _finger_meshes().items()}
    files |= {f"blocks/block_{block}.urdf": _block(block) for block in BLOCKS}
    for name, table in TABLES.items():
        files |= {f"calvin_table_{name}/{path}": content for path, content in _table(name, table).items()}
    return {path: content.encode() if isinstance(content, str) else content for path, content in sorted(files.items())}


def main(folder: Path = OWN_ASSETS) -> None:
    """Rewrite `folder` and print where it is."""
    files = build()
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    print(f"{len(files)} files, {sum(map(len, files.values())) / 1e3:.0f} kB: {folder}")


# -- blocks and floor


def _block(block: str) -> str:
    colour, size = block.split("_")
    half = BLOCK_LENGTHS_M[size] / 2
    low, high = (-half, -0.025, -0.025), (half, 0.025, 0.025)
    contact = '<contact><lateral_friction value="0.7"/><spinning_friction value="0.001"/></contact>'
    body = inertial(1, (0, 0, 0), (1, 0, 0, 1, 0, 1))
    shapes = box_shape("visual", low, high, BLOCK_RGBA[colour]), box_shape("collision", low, high)
    return robot(f"block_{colour}", link("base_link", contact, body, *shapes))


def _plane() -> str:
    """A floor to touch, not to see: covering most of an image, it would be the dearest thing to draw. Cameras fill in a backdrop."""
    contact = '<contact><lateral_friction value="1"/></contact>'
    body = inertial(0, (0, 0, 0), (0, 0, 0, 0, 0, 0))
    low, high = (-100, -100, -10), (100, 100, 0)
    return robot("plane", link("planeLink", contact, body, box_shape("visual", low, high, UNSEEN), box_shape("collision", low, high)))


# -- tables


def _table(name: str, table: Table) -> dict[str, str | bytes]:
    dark, light = table.wood
    inside = tuple(tuple(value * 7 // 10 for value in shade) for shade in table.wood)
    metal, groove = ((58, 60, 64), (58, 60, 64)), (tuple(value // 3 for value in dark), tuple(value // 3 for value in dark))
    ramps = {"wood": table.wood, "inside": inside, "door": table.door, "metal": metal, "groove": groove}
    meshes = {"base": _base_mesh(table), "drawer": _drawer_mesh(), "slide": _slide_mesh(), "plank": _plank_mesh()}
    plain = {"button": _button_mesh(), "switch": _switch_mesh(), "led": _led_mesh(), "light": _light_mesh(table)}
    return (
        {f"meshes/{part}_link.obj": mesh.obj("table.mtl") for part, mesh in meshes.items()}
        | {f"meshes/{part}_link.obj": mesh.obj() for part, mesh in plain.items()}
        | {
            "meshes/table.mtl": "newmtl table\nmap_Kd ../textures/table.png\n",
            "meshes/base_hulls.obj": hulls_obj(_base_hulls(table)),
            "textures/table.png": wood_atlas(ramps, seed=table.number, rings=table.rings),
            f"urdf/calvin_table_{name}.urdf": _table_urdf(table),
        }
    )


def _table_urdf(table: Table) -> str:
    led_z = CABINET_TOP
    return robot(
        f"playtable_{table.number}",
        # A mass of zero fixes the base; its inertia has no effect.
        link("base_link", inertial(0, (table.base_centre, 0.501032855485917, -0.0450543406685957), (1, 0, 0, 1, 0, 1)),
             mesh_shape("visual", "../meshes/base_link.obj", rgba=WHITE), *_boxes(_base_boxes(table)),
             mesh_shape("collision", "../meshes/base_hulls.obj")),
        link("button_link", inertial(0.153812376319756, (0, 0.015, 0), (7.30608787518843e-05, 0, 0, 0.000123049901055805, 0, 7.30608787518843e-05)),
             mesh_shape("visual", "../meshes/button_link.obj", rgba=BLACK), mesh_shape("collision", "../meshes/button_link.obj")),
        joint("base__button", "prismatic", "base_link", "button_link", (table.button, BUTTON_Y, RING_TOP), UPRIGHT, (0, -1, 0), (0, 0.025, 0, 0)),
        link("switch_link", inertial(0.238786703751891, (0, 0.0501954388893268, -0.01),
                                     (0.000149903694690068, 0, 0, 0.000673716537106872, 0, 0.000767827685519096)),
             mesh_shape("visual", "../meshes/switch_link.obj", rgba=GRAY), *_boxes(SWITCH_BOXES)),
        joint("base__switch", "prismatic", "base_link", "switch_link", (table.switch, 0.07616025, 0.61861216), (math.radians(150), 0, 0),
              (0, 0, -1), (0, 0.11, 0, 0)),
        link("slide_link", inertial(1.54349139995684, (table.slide_centre, 0, 0.0204147302446787),
                                    (0.0102407243866408, 0, 0, 0.0146074020666347, 0, 0.0232176606837711)),
             mesh_shape("visual", "../meshes/slide_link.obj", rgba=WHITE), *_boxes(SLIDE_BOXES)),
        joint("base__slide", "prismatic", "base_link", "slide_link", (table.slide, 0.09375, 0.66908), (math.radians(60), 0, 0),
              (-1, 0, 0), (0, table.slide_limit, 0, 0)),
        link("drawer_link", inertial(4.23128077824699, (0, 0.033198054271063, 0.0988554042464424),
                                     (0.0592167745250431, 0, 0, 0.16375258619816, -4.16732706455145e-05, 0.11199026473436)),
             mesh_shape("visual", "../meshes/drawer_link.obj", rgba=WHITE), *_boxes(DRAWER_BOXES)),
        joint("base__drawer", "prismatic", "base_link", "drawer_link", (table.drawer, 0, DRAWER_FLOOR), UPRIGHT, (0, 0, 1), (0, 0.275, 0, 0)),
        link("led_link", inertial(0.204, (0, 0.01, 0), (4.93e-05, 0, 0, 0.0007225, 0, 0.0006868)),
             mesh_shape("visual", "../meshes/led_link.obj", rgba=WHITE), *_boxes([LED_BOX])),
        joint("base__led", "fixed", "base_link", "led_link", (table.led, 0.2, led_z), UPRIGHT),
        link("light_link", inertial(table.light_mass, (0, 0.0280266379242365 if table.light_centre_z < -0.03 else 0.0299036530848263, table.light_centre_z),
                                    (table.light_inertia[0], 0, 0, table.light_inertia[1], 0, table.light_inertia[2])),
             mesh_shape("visual", "../meshes/light_link.obj", rgba=WHITE), mesh_shape("collision", "../meshes/light_link.obj")),
        joint("base__light", "fixed", "base_link", "light_link", (*table.light, 0.80981), UPRIGHT),
        # A link of its own because the tasks ask what lies on it. (PyBullet draws the collision shape of a link that has no visual.)
        link("plank_link", inertial(2.84375, (0, 0.0125, 0), (0.00740559895833334, 0, 0, 0.107381184895833, 0, 0.100271809895833)),
             mesh_shape("visual", "../meshes/plank_link.obj", rgba=WHITE), *_boxes([PLANK_SOLID])),
        joint("base__plank", "fixed", "base_link", "plank_link", (table.plank, 0.1125, CAVITY_FLOOR), UPRIGHT),
    )  # fmt: skip


def _boxes(boxes) -> list[str]:
    return [box_shape("collision", low, high) for low, high in boxes]


# Solids of the moving links, in their own frames.
DRAWER_BOXES = [
    ((-0.25, 0, -0.075), (0.25, 0.025, 0.2)),
    ((-0.25, 0.025, -0.075), (-0.225, 0.1, 0.2)),
    ((0.225, 0.025, -0.075), (0.25, 0.1, 0.2)),
    ((-0.225, 0.025, -0.075), (0.225, 0.1, -0.05)),
    ((-0.275, -0.025, 0.2), (0.275, 0.1, 0.225)),
    ((-0.15, 0.025, 0.225), (-0.125, 0.075, 0.325)),
    ((0.125, 0.025, 0.225), (0.15, 0.075, 0.325)),
    ((-0.125, 0.025, 0.3), (0.125, 0.075, 0.325)),
]
SLIDE_BOXES = [
    ((0, -0.15, 0), (0.35, 0.15, 0.025)),
    ((0.15, -0.1, 0.025), (0.2, -0.075, 0.1)),
    ((0.15, 0.075, 0.025), (0.2, 0.1, 0.1)),
    ((0.15, -0.075, 0.075), (0.2, 0.075, 0.1)),
]
SWITCH_BOXES = [
    ((-0.075, 0, -0.03), (-0.05, 0.08, 0.01)),
    ((0.05, 0, -0.03), (0.075, 0.08, 0.01)),
    ((-0.05, 0.055, -0.03), (0.05, 0.08, 0.01)),
]
PLANK_BOX = ((-0.325, 0, -0.0875), (0.325, 0.025, 0.0875))
# The benchmark's chains put blocks 0.8 mm above the shelf and ask at once what they touch: the original's shelf is a mesh, whose collision
# margin of 1 mm reaches up to them.
PLANK_SOLID = (PLANK_BOX[0], (0.325, 0.025 + 0.001 / GLOBAL_SCALING, 0.0875))
LED_BOX = ((-0.1, 0, -0.025), (0.1, 0.02, 0.025))


def _base_boxes(table: Table) -> list:
    """The base as solid boxes; what leans is in `_base_hulls`."""
    left, right = table.cavity
    hole_left, hole_right = table.drawer - DRAWER_HALF, table.drawer + DRAWER_HALF
    return [
        ((-HALF_WIDTH, -HALF_DEPTH, UNDERSIDE), (HALF_WIDTH, FOOT_Y, TOP)),
        ((left, FOOT_Y, UNDERSIDE), (right, HALF_DEPTH, CAVITY_FLOOR)),
        ((left, CAVITY_BACK, CAVITY_FLOOR), (right, HALF_DEPTH, CABINET_TOP)),
        ((-HOUSING_X - 0.025, -HOUSING_Y, HOUSING_BOTTOM), (HOUSING_X + 0.025, HOUSING_Y, DRAWER_FLOOR)),
        ((-HOUSING_X - 0.025, -HOUSING_Y, DRAWER_FLOOR), (hole_left, HOUSING_Y, UNDERSIDE)),
        ((hole_right, -HOUSING_Y, DRAWER_FLOOR), (HOUSING_X + 0.025, HOUSING_Y, UNDERSIDE)),
        ((hole_left, DRAWER_BACK, DRAWER_FLOOR), (hole_right, HOUSING_Y, UNDERSIDE)),
        *[((x, y, 0), (x + 0.05, y + 0.04, UNDERSIDE)) for x, y in LEGS],
    ]


def _base_hulls(table: Table) -> list:
    left, right = table.cavity
    prisms = [(PANEL, -HALF_WIDTH, left), (PANEL, right, HALF_WIDTH), (LINTEL, left, right)]
    ring = _ring(table)
    return [[(x, y, z) for x in (low, high) for y, z in outline] for outline, low, high in prisms] + [
        [(x, y, z) for z in (TOP, RING_TOP) for x, y in ring]
    ]


def _ring(table: Table) -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 12 for i in range(12)]
    return [(table.button + RING_RADIUS * math.cos(t), BUTTON_Y + RING_RADIUS * math.sin(t)) for t in turns]


def _base_mesh(table: Table) -> Mesh:
    """What can be seen of the base: no underside, nothing that another part hides."""
    mesh = Mesh()
    left, right = table.cavity
    w, d = HALF_WIDTH, HALF_DEPTH
    mesh.polygon([(-w, -d, TOP), (w, -d, TOP), (w, FOOT_Y, TOP), (-w, FOOT_Y, TOP)])
    mesh.polygon([(-w, -d, UNDERSIDE), (w, -d, UNDERSIDE), (w, -d, TOP), (-w, -d, TOP)])
    mesh.polygon([(w, -d, UNDERSIDE), (w, d, UNDERSIDE), (w, d, CABINET_TOP), (w, HEAD_Y, CABINET_TOP), (w, FOOT_Y, TOP), (w, -d, TOP)])
    mesh.polygon([(-w, -d, UNDERSIDE), (-w, -d, TOP), (-w, FOOT_Y, TOP), (-w, HEAD_Y, CABINET_TOP), (-w, d, CABINET_TOP), (-w, d, UNDERSIDE)])
    mesh.polygon([(w, d, UNDERSIDE), (-w, d, UNDERSIDE), (-w, d, CABINET_TOP), (w, d, CABINET_TOP)])
    mesh.polygon([(-w, HEAD_Y, CABINET_TOP), (w, HEAD_Y, CABINET_TOP), (w, d, CABINET_TOP), (-w, d, CABINET_TOP)])
    _cabinet_front(mesh, left, right)
    _cabinet_inside(mesh, left, right)
    _housing(mesh, table.drawer - DRAWER_HALF, table.drawer + DRAWER_HALF)
    for x, y in LEGS:
        mesh.box((x, y, 0), (x + 0.05, y + 0.04, UNDERSIDE), faces="-x +x -y +y")
    ring = _ring(table)
    mesh.polygon([(x, y, RING_TOP) for x, y in ring], "door")
    for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True):
        mesh.polygon([(x0, y0, TOP), (x1, y1, TOP), (x1, y1, RING_TOP), (x0, y0, RING_TOP)], "door")
    _grooves(mesh, table.switch)
    return mesh


def _on_slope(share: float, lift: float = 0.0) -> tuple[float, float]:
    """(y, z) at a share of the way up the cabinet's front, lifted off it by `lift` metres."""
    y, z = FOOT_Y + share * (HEAD_Y - FOOT_Y), TOP + share * (CABINET_TOP - TOP)
    return y - lift * math.cos(math.radians(30)), z + lift * 0.5


def _cabinet_front(mesh: Mesh, left: float, right: float) -> None:
    foot, head = _on_slope(0), _on_slope(1)
    lintel = (CAVITY_LINTEL_Y, CAVITY_TOP)
    lap = 0.002  # a joint that ends in the middle of an edge lets single pixels through; lapped ones do not
    strips = (-HALF_WIDTH, left, foot, head), (right, HALF_WIDTH, foot, head), (left - lap, right + lap, lintel, head)
    for low, high, (y0, z0), (y1, z1) in strips:
        mesh.polygon([(low, y0, z0), (high, y0, z0), (high, y1, z1), (low, y1, z1)])


def _cabinet_inside(mesh: Mesh, left: float, right: float) -> None:
    side = [(FOOT_Y, TOP), (CAVITY_LINTEL_Y, CAVITY_TOP), (CAVITY_BACK, CAVITY_TOP), (CAVITY_BACK, TOP)]
    back, top = CAVITY_BACK, CAVITY_TOP
    mesh.polygon([(left, back, TOP), (right, back, TOP), (right, back, top), (left, back, top)], "inside")
    mesh.polygon([(left, y, z) for y, z in side[::-1]], "inside")
    mesh.polygon([(right, y, z) for y, z in side], "inside")


def _housing(mesh: Mesh, hole_left: float, hole_right: float) -> None:
    """The case below the table top, with the hole that the drawer runs in."""
    x, y, low, high, floor = HOUSING_X, HOUSING_Y, HOUSING_BOTTOM, UNDERSIDE, DRAWER_FLOOR
    for a, b, bottom, top in ((-x, hole_left, low, high), (hole_right, x, low, high), (hole_left, hole_right, low, floor)):
        mesh.polygon([(a, -y, bottom), (b, -y, bottom), (b, -y, top), (a, -y, top)])
    mesh.box((-x, -y, low), (x, y, high), faces="-x +x +y")
    mesh.polygon([(hole_left, -y, floor), (hole_right, -y, floor), (hole_right, DRAWER_BACK, floor), (hole_left, DRAWER_BACK, floor)], "groove")
    mesh.polygon([(hole_left, DRAWER_BACK, floor), (hole_right, DRAWER_BACK, floor), (hole_right, DRAWER_BACK, high), (hole_left, DRAWER_BACK, high)], "groove")
    mesh.polygon([(hole_left, -y, floor), (hole_left, DRAWER_BACK, floor), (hole_left, DRAWER_BACK, high), (hole_left, -y, high)], "groove")
    mesh.polygon([(hole_right, -y, floor), (hole_right, -y, high), (hole_right, DRAWER_BACK, high), (hole_right, DRAWER_BACK, floor)], "groove")


def _grooves(mesh: Mesh, switch: float) -> None:
    """The two slots that the switch runs in, drawn on the cabinet's front."""
    (y0, z0), (y1, z1) = _on_slope(0.25, lift=0.001), _on_slope(0.75, lift=0.001)
    for x in (switch - 0.075, switch + 0.05):
        mesh.polygon([(x, y0, z0), (x + 0.025, y0, z0), (x + 0.025, y1, z1), (x, y1, z1)], "groove")


def _drawer_mesh() -> Mesh:
    mesh = Mesh()
    floor, left, right, back, front, *handle = DRAWER_BOXES
    mesh.box(*floor, swatch="door", faces="+y -y")
    mesh.box(*left, swatch="inside", faces="-x +x +y")
    mesh.box(*right, swatch="inside", faces="-x +x +y")
    mesh.box(*back, swatch="inside", faces="+z +y")
    mesh.box(*front, swatch="door", faces="-x +x -y +y -z +z")
    _handle(mesh, *handle, along="x")
    return mesh


def _slide_mesh() -> Mesh:
    mesh = Mesh()
    (low_x, _, low_z), (high_x, _, high_z) = SLIDE_BOXES[0]
    mesh.box((low_x, -0.1375, low_z), (high_x, 0.1375, high_z), "door")
    _handle(mesh, *SLIDE_BOXES[1:], along="y")
    return mesh


def _handle(mesh: Mesh, first, second, bar, along: str) -> None:
    """Two posts and the bar between them; the sides that touch are left out."""
    across = "y" if along == "x" else "x"
    for post in (first, second):
        mesh.box(*post, swatch="metal", faces=f"-{along} +{along} -{across} +{across} +z")
    mesh.box(*bar, swatch="metal", faces=f"-{across} +{across} -z +z")


def _plank_mesh() -> Mesh:
    mesh = Mesh()
    mesh.box(*PLANK_BOX, faces="+y")
    return mesh


def _button_mesh() -> Mesh:
    mesh = Mesh()
    mesh.turned([(0.04, 0), (0.04, 0.03)], sides=16, axis="y", centre=(0, 0, 0))
    return mesh


def _switch_mesh() -> Mesh:
    mesh = Mesh()
    left, right, bar = SWITCH_BOXES
    for post in (left, right):
        mesh.box(*post, faces="-x +x +y -z +z")
    mesh.box(*bar, faces="-y +y -z +z")
    return mesh


def _led_mesh() -> Mesh:
    mesh = Mesh()
    mesh.box(*LED_BOX, faces="-x +x +y -z +z")
    return mesh


def _light_mesh(table: Table) -> Mesh:
    mesh = Mesh()
    profile = [(0.0251, 0), (0.0335, 0.0165), (0.0343, 0.034), (0.0267, 0.0496), (0.0127, 0.0596), (0.004, 0.062)]
    mesh.turned(profile, sides=10, axis="y", centre=(0, 0, table.light_centre_z))
    return mesh


# -- robot

# Outer corners of the long fingers that CALVIN fits, (x, y, z) with x mirrored: a wedge that narrows to a thin tip.
FINGER = [(s * x, y, z) for s in (-1, 1) for x, y, z in (
    (0.0104, 0.0062, 0.0003), (0.0104, 0.0269, 0.0003), (0.0104, 0.0216, 0.0342), (0.0087, 0.004, 0.065),
    (0.0087, 0.004, 0.0905), (0.0087, 0.0065, 0.0912), (0.0057, 0.004, 0.096), (0.0055, 0.0068, 0.0963),
)]  # fmt: skip
# The soft pad on the tip, a shallow dome: (height x, half-width y, z), bottom plate to crown.
PAD = [(x, s * y, z) for s in (-1, 1) for x, y, z in (
    (0.01607, 0.0092, 0.0047), (0.01607, 0.0092, 0.0255), (0.01607, 0.0065, 0.0297),
    (0.0184, 0.0086, 0.008), (0.0184, 0.0086, 0.0225), (0.0184, 0.006, 0.0055), (0.0184, 0.0055, 0.0285),
    (0.0195, 0.005, 0.012), (0.0195, 0.005, 0.022), (0.0195, 0.002, 0.008), (0.0195, 0.002, 0.0262),
    (0.02014, 0.0015, 0.013), (0.02014, 0.0015, 0.021),
)]  # fmt: skip
PAD_ORIGIN, PAD_TURN = (0.0009, 0.021, 0.066), 1.57
FINGER_CONTACT = (
    '<contact><friction_anchor/><stiffness value="30000.0"/><damping value="1000.0"/>'
    '<spinning_friction value="0.1"/><lateral_friction value="1.0"/></contact>'
)
TIP_CONTACT = '<contact><lateral_friction value="1"/><spinning_friction value="0.001"/></contact>'
EVEN = (0.1, 0, 0, 0.1, 0, 0.1)
ARM_RGBA, WRIST_RGBA, HAND_RGBA, FINGER_RGBA = (0.96, 0.97, 0.98, 1), (0.6, 0.63, 0.68, 1), (0.78, 0.8, 0.83, 1), (0.9, 0.91, 0.93, 1)
# Per arm link: mass [kg], centre [m], then its joint's origin xyz, roll, and limits (lower, upper, effort, velocity).
ARM = [
    (2.7, (0, -0.04, -0.05), (0, 0, 0.333), 0, (-2.9671, 2.9671, 87, 2.175)),
    (2.73, (0, -0.04, 0.06), (0, 0, 0), -1, (-1.8326, 1.8326, 87, 2.175)),
    (2.04, (0.01, 0.01, -0.05), (0, -0.316, 0), 1, (-2.9671, 2.9671, 87, 2.175)),
    (2.08, (-0.03, 0.03, 0.02), (0.0825, 0, 0), 1, (-3.1416, 0, 87, 2.175)),
    (3, (0, 0.04, -0.12), (-0.0825, 0.384, 0), -1, (-2.9671, 2.9671, 12, 2.61)),
    (1.3, (0.04, 0, 0), (0, 0, 0), 1, (-0.0873, 3.8223, 12, 2.61)),
    (0.2, (0, 0, 0.08), (0.088, 0, 0), 1, (-2.9671, 2.9671, 12, 2.61)),
]


def _finger_meshes() -> dict[str, str]:
    seen = [point for point in PAD if point[0] != 0.0195]  # fewer corners than touch
    hulls = {"finger_hull.obj": hulls_obj([FINGER]), "pad_hull.obj": hulls_obj([PAD])}
    return {"finger.obj": convex_mesh(FINGER).obj(), "pad.obj": convex_mesh(seen).obj()} | hulls


def _panda() -> str:
    borrowed = f"{PYBULLET_DATA}/franka_panda/meshes/collision"
    parts = [link("panda_link0", inertial(2.9, (0, 0, 0.05), EVEN), *_both(f"{borrowed}/link0.obj", ARM_RGBA))]
    for number, (mass, centre, xyz, roll, limit) in enumerate(ARM, start=1):
        rgba = WRIST_RGBA if number == 7 else ARM_RGBA
        parts.append(link(f"panda_link{number}", inertial(mass, centre, EVEN), *_both(f"{borrowed}/link{number}.obj", rgba)))
        rpy = (roll * 1.57079632679, 0, 0)
        parts.append(joint(f"panda_joint{number}", "revolute", f"panda_link{number - 1}", f"panda_link{number}", xyz, rpy, (0, 0, 1), limit))
    nothing = inertial(0, (0, 0, 0), EVEN)
    parts += [
        link("panda_link8", nothing),
        joint("panda_joint8", "fixed", "panda_link7", "panda_link8", (0, 0, 0.107), axis=(0, 0, 0)),
        link("panda_hand", inertial(0.81, (0, 0, 0.04), EVEN), *_both(f"{borrowed}/hand.obj", HAND_RGBA)),
        joint("panda_hand_joint", "fixed", "panda_link8", "panda_hand", rpy=(0, 0, -0.785398163397)),
        *_fingers(),
        link("panda_grasptarget", nothing),
        joint("panda_grasptarget_hand", "fixed", "panda_hand", "panda_grasptarget", (0, 0, 0.105), axis=(0, 0, 0)),
        link("gripper_cam", inertial(0.2, (0, 0, 0), EVEN)),
        joint("camera_joint", "fixed", "panda_hand", "gripper_cam", (-0.1, 0, 0), (1.3, 0, -1.57)),
        link("tcp", inertial(0.00001, (0, 0, 0), EVEN)),
        joint("tcp_joint", "fixed", "panda_hand", "tcp", (0, 0, 0.14)),
        *_tips(),
    ]
    return robot("panda", *parts)


def _both(mesh: str, rgba, rpy=(0, 0, 0)) -> tuple[str, str]:
    return mesh_shape("visual", mesh, rpy=rpy, rgba=rgba), mesh_shape("collision", mesh, rpy=rpy)


def _fingers() -> list[str]:
    folder = f"{ASSETS}/franka_panda/meshes"
    parts = []
    for number, (side, sign, turn) in enumerate((("left", 1, 0), ("right", -1, math.pi)), start=1):
        shapes = (
            mesh_shape("visual", f"{folder}/finger.obj", rpy=(0, 0, turn), rgba=FINGER_RGBA),
            mesh_shape("collision", f"{folder}/finger_hull.obj", rpy=(0, 0, turn)),
        )
        parts.append(link(f"panda_{side}finger", FINGER_CONTACT, inertial(0.1, (0, sign * 0.01, 0.02), EVEN), *shapes))
        parts.append(
            joint(f"panda_finger_joint{number}", "prismatic", "panda_hand", f"panda_{side}finger", (0, 0, 0.0584), axis=(0, sign, 0),
                  limit=(0, 0.04, 20, 0.2))
        )  # fmt: skip
    return parts


def _tips() -> list[str]:
    x, y, z = PAD_ORIGIN
    folder = f"{ASSETS}/franka_panda/meshes"
    shapes = mesh_shape("visual", f"{folder}/pad.obj", rgba=WHITE), mesh_shape("collision", f"{folder}/pad_hull.obj")
    parts = []
    for side, sign in (("left", 1), ("right", -1)):
        parts.append(link(f"finger_{side}_tip", TIP_CONTACT, inertial(0.0001, (0, 0, 0), (1, 0, 0, 1, 0, 1)), *shapes))
        place = (sign * x, sign * y, z), (0, 0, -sign * PAD_TURN)
        parts.append(joint(f"joint_finger_tip_{side}", "fixed", f"panda_{side}finger", f"finger_{side}_tip", *place, axis=(1, 0, 0)))
    return parts


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OWN_ASSETS)
