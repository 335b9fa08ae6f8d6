"""The Panda of our own assets: calvin_env's joints, limits and masses, borrowed link meshes, and our own long fingers.

Source of the numbers: calvin_env `data/franka_panda/panda_longer_finger.urdf` and the extents of its finger meshes.
"""

from __future__ import annotations

import math

from envs.calvin.build.low_polygon import convex_mesh, hulls_obj, inertial, joint, link, mesh_shape, robot
from envs.calvin.loading.robot_urdf import ASSETS, PYBULLET_DATA

WHITE = (1, 1, 1, 1)

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
ARM_RGBA, WRIST_RGBA, HAND_RGBA, FINGER_RGBA = (
    (0.96, 0.97, 0.98, 1),
    (0.6, 0.63, 0.68, 1),
    (0.78, 0.8, 0.83, 1),
    (0.9, 0.91, 0.93, 1),
)
# Per arm link: mass [kg], centre [m], then its joint's origin xyz, roll, and (lower, upper, effort, velocity).
ARM = [
    (2.7, (0, -0.04, -0.05), (0, 0, 0.333), 0, (-2.9671, 2.9671, 87, 2.175)),
    (2.73, (0, -0.04, 0.06), (0, 0, 0), -1, (-1.8326, 1.8326, 87, 2.175)),
    (2.04, (0.01, 0.01, -0.05), (0, -0.316, 0), 1, (-2.9671, 2.9671, 87, 2.175)),
    (2.08, (-0.03, 0.03, 0.02), (0.0825, 0, 0), 1, (-3.1416, 0, 87, 2.175)),
    (3, (0, 0.04, -0.12), (-0.0825, 0.384, 0), -1, (-2.9671, 2.9671, 12, 2.61)),
    (1.3, (0.04, 0, 0), (0, 0, 0), 1, (-0.0873, 3.8223, 12, 2.61)),
    (0.2, (0, 0, 0.08), (0.088, 0, 0), 1, (-2.9671, 2.9671, 12, 2.61)),
]


def finger_meshes() -> dict[str, str]:
    """OBJ texts of a finger and its pad: what is seen, and the convex hulls that touch."""
    seen = [point for point in PAD if point[0] != 0.0195]  # fewer corners than touch
    hulls = {"finger_hull.obj": hulls_obj([FINGER]), "pad_hull.obj": hulls_obj([PAD])}
    return {"finger.obj": convex_mesh(FINGER).obj(), "pad.obj": convex_mesh(seen).obj()} | hulls


def panda() -> str:
    """The arm's URDF, with placeholders where meshes lie; see robot_urdf."""
    borrowed = f"{PYBULLET_DATA}/franka_panda/meshes/collision"
    parts = [link("panda_link0", inertial(2.9, (0, 0, 0.05), EVEN), *_both(f"{borrowed}/link0.obj", ARM_RGBA))]
    for number, (mass, centre, xyz, roll, limit) in enumerate(ARM, start=1):
        rgba = WRIST_RGBA if number == 7 else ARM_RGBA
        parts.append(
            link(f"panda_link{number}", inertial(mass, centre, EVEN), *_both(f"{borrowed}/link{number}.obj", rgba))
        )
        rpy = (roll * 1.57079632679, 0, 0)
        parts.append(
            joint(
                f"panda_joint{number}",
                "revolute",
                f"panda_link{number - 1}",
                f"panda_link{number}",
                xyz,
                rpy,
                (0, 0, 1),
                limit,
            )
        )
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
        ends, motion = ("panda_hand", f"panda_{side}finger"), {"axis": (0, sign, 0), "limit": (0, 0.04, 20, 0.2)}
        parts.append(joint(f"panda_finger_joint{number}", "prismatic", *ends, (0, 0, 0.0584), **motion))
    return parts


def _tips() -> list[str]:
    x, y, z = PAD_ORIGIN
    folder = f"{ASSETS}/franka_panda/meshes"
    shapes = mesh_shape("visual", f"{folder}/pad.obj", rgba=WHITE), mesh_shape("collision", f"{folder}/pad_hull.obj")
    parts = []
    for side, sign in (("left", 1), ("right", -1)):
        parts.append(link(f"finger_{side}_tip", TIP_CONTACT, inertial(0.0001, (0, 0, 0), (1, 0, 0, 1, 0, 1)), *shapes))
        ends, place = (f"panda_{side}finger", f"finger_{side}_tip"), ((sign * x, sign * y, z), (0, 0, -sign * PAD_TURN))
        parts.append(joint(f"joint_finger_tip_{side}", "fixed", *ends, *place, axis=(1, 0, 0)))
    return parts
