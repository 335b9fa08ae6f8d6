"""The four tables of our own assets: geometry, looks and URDF, from dimensions.

Lengths are metres before the scale of 0.8. Link frames stand: their y is the table's z, their z
points towards the robot.

Source of the numbers: calvin_env `data/calvin_table_{A..D}/urdf/*.urdf`, and the extents of the meshes named there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from envs.calvin.build.low_polygon import (
    Mesh,
    box_shape,
    hulls_obj,
    inertial,
    joint,
    link,
    mesh_shape,
    robot,
    wood_atlas,
)
from envs.calvin.scenes import GLOBAL_SCALING

WHITE, BLACK, GRAY = (1, 1, 1, 1), (0.04, 0.04, 0.04, 1), (0.4, 0.4, 0.4, 1)
METAL = (58, 60, 64)
UPRIGHT = (math.pi / 2, 0, 0)

# What the four tables share.
HALF_WIDTH, HALF_DEPTH, TOP, UNDERSIDE = 0.55, 0.225, 0.55, 0.5
CABINET_TOP, FOOT_Y, HEAD_Y = 0.809808, 0.025, 0.175  # the cabinet's front leans back by 30 degrees, from foot to head
CAVITY_FLOOR, CAVITY_TOP, CAVITY_BACK = 0.525, 0.784808, 0.2
CAVITY_LINTEL_Y = FOOT_Y + (CAVITY_TOP - TOP) * (HEAD_Y - FOOT_Y) / (CABINET_TOP - TOP)
HOUSING_BOTTOM, HOUSING_Y, HOUSING_X = 0.375, 0.2, 0.5
DRAWER_HALF, DRAWER_FLOOR, DRAWER_BACK, DRAWER_TRAVEL = 0.25, 0.4, 0.075, 0.275
BUTTON_Y, RING_RADIUS, RING_TOP = -0.15, 0.05, 0.575
LEGS = [(x, y) for x in (-0.55, 0.5) for y in (-0.225, 0.185)]
PANEL = [(FOOT_Y, UNDERSIDE), (HALF_DEPTH, UNDERSIDE), (HALF_DEPTH, CABINET_TOP), (HEAD_Y, CABINET_TOP), (FOOT_Y, TOP)]
LINTEL = [(CAVITY_LINTEL_Y, CAVITY_TOP), (CAVITY_BACK, CAVITY_TOP), (CAVITY_BACK, CABINET_TOP), (HEAD_Y, CABINET_TOP)]

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
    light_centre_y: float
    light_centre_z: float
    light_mass: float
    light_inertia: tuple[float, ...]
    base_centre: float
    wood: tuple[Rgb, Rgb]  # darkest and lightest shade
    door: tuple[Rgb, Rgb]
    rings: float


_BIG_BULB = dict(
    light_centre_y=0.0280266379242365,
    light_centre_z=-0.035,
    light_mass=0.173918312098126,
    light_inertia=(8.23031895831843e-05, 0, 0, 8.738048875184e-05, 0, 8.23031895831843e-05),
)
_BULB_B = dict(
    light_centre_y=0.0299036530848263,
    light_centre_z=-0.03,
    light_mass=0.115259640607692,
    light_inertia=(4.26168302144228e-05, 0, 0, 4.10781933228919e-05, 0, 4.26168302144228e-05),
)
_LEFT_CABINET = dict(cavity=(-0.45, 0.2), slide=-0.125, slide_limit=0.35, slide_centre=-0.175, plank=-0.125)
_RIGHT_CABINET = dict(cavity=(-0.225, 0.425), slide_centre=0.175, plank=0.1)

TABLES = {
    "A": Table(
        **_LEFT_CABINET, **_BIG_BULB, number=7, base_centre=0.00745063057322709,
        drawer=0.125, button=-0.35, switch=0.375, led=-0.35, light=(0.375, 0.165),
        wood=((72, 30, 22), (122, 58, 42)), door=((94, 40, 30), (150, 76, 56)), rings=3.0,
    ),
    "B": Table(
        **_RIGHT_CABINET, **_BULB_B, number=5, base_centre=-0.0591017040800947, slide=0.11, slide_limit=0.38,
        drawer=0.225, button=0.35, switch=-0.4, led=0.35, light=(-0.4, 0.17),
        wood=((205, 164, 112), (242, 212, 164)), door=((184, 138, 84), (222, 182, 128)), rings=7.0,
    ),
    "C": Table(
        **_RIGHT_CABINET, **_BIG_BULB, number=6, base_centre=-0.0432138999361933, slide=0.075, slide_limit=0.3,
        drawer=0.125, button=-0.15, switch=-0.4, led=-0.15, light=(-0.4, 0.165),
        wood=((138, 86, 40), (184, 124, 66)), door=((78, 34, 24), (116, 56, 40)), rings=5.0,
    ),
    "D": Table(
        **_LEFT_CABINET, **_BIG_BULB, number=8, base_centre=-0.00874455174683536,
        drawer=0.225, button=-0.15, switch=0.375, led=-0.15, light=(0.375, 0.165),
        wood=((98, 76, 50), (150, 122, 86)), door=((144, 116, 80), (200, 170, 128)), rings=6.0,
    ),
}  # fmt: skip


def table_files(name: str, table: Table) -> dict[str, str | bytes]:
    """Every file of one table's folder: path in it → content."""
    ramps = wood_ramps(table.wood, table.door)
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


def wood_ramps(wood: tuple[Rgb, Rgb], door: tuple[Rgb, Rgb]) -> dict[str, tuple[Rgb, Rgb]]:
    """(darkest, lightest) shade of each swatch of a table's atlas, from those of its wood and its doors."""
    inside = tuple(tuple(value * 7 // 10 for value in shade) for shade in wood)
    groove = tuple(value // 3 for value in wood[0])
    return {"wood": wood, "inside": inside, "door": door, "metal": (METAL, METAL), "groove": (groove, groove)}


def _table_urdf(table: Table) -> str:
    origins = {
        "button": ((table.button, BUTTON_Y, RING_TOP), UPRIGHT),
        "switch": ((table.switch, 0.07616025, 0.61861216), (math.radians(150), 0, 0)),
        "slide": ((table.slide, 0.09375, 0.66908), (math.radians(60), 0, 0)),
        "drawer": ((table.drawer, 0, DRAWER_FLOOR), UPRIGHT),
        "led": ((table.led, 0.2, CABINET_TOP), UPRIGHT),
        "light": ((*table.light, 0.80981), UPRIGHT),
        "plank": ((table.plank, 0.1125, CAVITY_FLOOR), UPRIGHT),
    }
    motions = {
        "button": ((0, -1, 0), (0, 0.025, 0, 0)),
        "switch": ((0, 0, -1), (0, 0.11, 0, 0)),
        "slide": ((-1, 0, 0), (0, table.slide_limit, 0, 0)),
        "drawer": ((0, 0, 1), (0, DRAWER_TRAVEL, 0, 0)),
    }
    bodies = BODIES | {
        "slide": (1.54349139995684, (table.slide_centre, 0, 0.0204147302446787), SLIDE_INERTIA),
        "light": (table.light_mass, (0, table.light_centre_y, table.light_centre_z), table.light_inertia),
    }
    # A mass of zero fixes the base; its inertia has no effect.
    base = inertial(0, (table.base_centre, 0.501032855485917, -0.0450543406685957), (1, 0, 0, 1, 0, 1))
    hulls = mesh_shape("collision", "../meshes/base_hulls.obj")
    elements = [link("base_link", base, _visual("base", WHITE), *_boxes(_base_boxes(table)), hulls)]
    for part, origin in origins.items():
        shapes = _visual(part, COLORS.get(part, WHITE)), *_collision(part)
        elements.append(link(f"{part}_link", inertial(*bodies[part]), *shapes))
        kind = "prismatic" if part in motions else "fixed"
        ends = "base_link", f"{part}_link"
        elements.append(joint(f"base__{part}", kind, *ends, *origin, *motions.get(part, ())))
    return robot(f"playtable_{table.number}", *elements)


def _visual(part: str, rgba) -> str:
    return mesh_shape("visual", f"../meshes/{part}_link.obj", rgba=rgba)


def _collision(part: str) -> list[str]:
    if part in SOLIDS:
        return _boxes(SOLIDS[part])
    return [mesh_shape("collision", f"../meshes/{part}_link.obj")]


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
# The benchmark's chains put blocks 0.8 mm above the shelf and ask at once what they touch: the original's shelf is a
# mesh, whose collision margin of 1 mm reaches up to them. A link of its own because the tasks ask what lies on it.
PLANK_SOLID = (PLANK_BOX[0], (0.325, 0.025 + 0.001 / GLOBAL_SCALING, 0.0875))
LED_BOX = ((-0.1, 0, -0.025), (0.1, 0.02, 0.025))
# Button and bulb are not here: they touch as the convex hulls of what is seen.
SOLIDS = {
    "switch": SWITCH_BOXES,
    "slide": SLIDE_BOXES,
    "drawer": DRAWER_BOXES,
    "led": [LED_BOX],
    "plank": [PLANK_SOLID],
}
COLORS = {"button": BLACK, "switch": GRAY}
# Mass [kg], centre [m] and inertia [kg m²] of the links that are the same on every table.
SLIDE_INERTIA = (0.0102407243866408, 0, 0, 0.0146074020666347, 0, 0.0232176606837711)
BODIES = {
    "button": (
        0.153812376319756,
        (0, 0.015, 0),
        (7.30608787518843e-05, 0, 0, 0.000123049901055805, 0, 7.30608787518843e-05),
    ),
    "switch": (
        0.238786703751891,
        (0, 0.0501954388893268, -0.01),
        (0.000149903694690068, 0, 0, 0.000673716537106872, 0, 0.000767827685519096),
    ),
    "drawer": (
        4.23128077824699,
        (0, 0.033198054271063, 0.0988554042464424),
        (0.0592167745250431, 0, 0, 0.16375258619816, -4.16732706455145e-05, 0.11199026473436),
    ),
    "led": (0.204, (0, 0.01, 0), (4.93e-05, 0, 0, 0.0007225, 0, 0.0006868)),
    "plank": (2.84375, (0, 0.0125, 0), (0.00740559895833334, 0, 0, 0.107381184895833, 0, 0.100271809895833)),
}


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
    mesh.polygon(
        [
            (w, -d, UNDERSIDE),
            (w, d, UNDERSIDE),
            (w, d, CABINET_TOP),
            (w, HEAD_Y, CABINET_TOP),
            (w, FOOT_Y, TOP),
            (w, -d, TOP),
        ]
    )
    mesh.polygon(
        [
            (-w, -d, UNDERSIDE),
            (-w, -d, TOP),
            (-w, FOOT_Y, TOP),
            (-w, HEAD_Y, CABINET_TOP),
            (-w, d, CABINET_TOP),
            (-w, d, UNDERSIDE),
        ]
    )
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
    for a, b, bottom, top in (
        (-x, hole_left, low, high),
        (hole_right, x, low, high),
        (hole_left, hole_right, low, floor),
    ):
        mesh.polygon([(a, -y, bottom), (b, -y, bottom), (b, -y, top), (a, -y, top)])
    mesh.box((-x, -y, low), (x, y, high), faces="-x +x +y")
    mesh.polygon(
        [
            (hole_left, -y, floor),
            (hole_right, -y, floor),
            (hole_right, DRAWER_BACK, floor),
            (hole_left, DRAWER_BACK, floor),
        ],
        "groove",
    )
    mesh.polygon(
        [
            (hole_left, DRAWER_BACK, floor),
            (hole_right, DRAWER_BACK, floor),
            (hole_right, DRAWER_BACK, high),
            (hole_left, DRAWER_BACK, high),
        ],
        "groove",
    )
    mesh.polygon(
        [
            (hole_left, -y, floor),
            (hole_left, DRAWER_BACK, floor),
            (hole_left, DRAWER_BACK, high),
            (hole_left, -y, high),
        ],
        "groove",
    )
    mesh.polygon(
        [
            (hole_right, -y, floor),
            (hole_right, -y, high),
            (hole_right, DRAWER_BACK, high),
            (hole_right, DRAWER_BACK, floor),
        ],
        "groove",
    )


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
