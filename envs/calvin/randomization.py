"""Domain randomisation: how a scene may look, and the drawing of it from a seed.

    look = Randomization(textures=True, lights=True, camera_jitter=1).draw(np.random.default_rng(0))
    simulation.set_look(look)

A look changes images alone, never the physics.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np

from envs.calvin.build.low_polygon import wood_atlas
from envs.calvin.build.tables import wood_ramps

Vector = tuple[float, float, float]
Shade = tuple[int, int, int]

MAX_CAMERA_JITTER = 4.0
STATIC_SHIFT_M, TARGET_SHIFT_M = 0.05, 0.02
GRIPPER_SHIFT_M, GRIPPER_TURN_RAD = 0.004, 0.03
"""At most so far along each axis for a `camera_jitter` of 1. The static camera stands 4.2 m away and sees 0.7 m."""
WOODS = {"red": (112, 52, 36), "pale": (226, 190, 140), "brown": (160, 104, 52), "grey": (128, 100, 70), "dark": (74, 46, 30)}
"""Middle shades [0, 255] that a table's wood is drawn around."""


@dataclass(frozen=True, kw_only=True)
class Light:
    """The one lamp of a scene. The defaults are those of PyBullet's TinyRenderer; its OpenGL renderer heeds the direction alone."""

    direction: Vector = (-50.0, 30.0, 100.0)  # world frame, towards the lamp; OpenGL takes it for the lamp's place [m]
    color: Vector = (1.0, 1.0, 1.0)  # of diffuse and specular light
    ambient: float = 0.6  # these three: shares of a surface's own colour
    diffuse: float = 0.35
    specular: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Wood:
    """A table's wood, drawn anew into the atlas of our own tables: shades are (darkest, lightest) RGB in [0, 255]."""

    seed: int
    rings: float  # growth rings across the table top
    table: tuple[Shade, Shade]
    door: tuple[Shade, Shade]

    def atlas(self) -> bytes:
        """The texture as PNG, in the layout of our own tables' `textures/table.png`. Handles stay as they are: they are what is grasped."""
        return wood_atlas(wood_ramps(self.table, self.door), seed=self.seed, rings=self.rings)


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a scene is seen. `Look()` is the scene as it is made, bit for bit.

    Tints multiply RGB. Lamps (LED, bulb) are never tinted: their colour is a state. `wood` and `backdrop` need our own assets: the
    original tables are tinted only, because their textures are photographs cut for their own meshes.
    """

    static_shift_m: Vector = (0.0, 0.0, 0.0)  # of the static camera, world frame
    static_target_shift_m: Vector = (0.0, 0.0, 0.0)  # of the point that it looks at, world frame
    gripper_shift_m: Vector = (0.0, 0.0, 0.0)  # of the wrist camera, in its link's frame
    gripper_turn_rad: Vector = (0.0, 0.0, 0.0)  # Euler angles in its link's frame
    light: Light = field(default_factory=Light)
    wood: Wood | None = None  # None: the table's own
    backdrop: Shade | None = None  # RGB where nothing is; None: the usual one
    table_tint: Vector = (1.0, 1.0, 1.0)
    robot_tint: Vector = (1.0, 1.0, 1.0)
    block_tint: Vector = (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Randomization:
    """What is drawn anew for each episode. Each kind has a stream of its own: switching one on leaves the others' draws alone.

    Raises ValueError for an option that is not a bool, or a jitter outside [0, 4].
    """

    block_poses: bool = False  # blocks on random surfaces (the environment does it: it is not a look)
    textures: bool = False  # our own assets: wood, backdrop, tints; original assets: tints
    lights: bool = False  # direction, colour and shares of the light
    camera_jitter: float = 0.0  # 1: up to 5 cm and 2 cm for the static camera and its target, 4 mm and 0.03 rad for the wrist's

    def __post_init__(self):
        for option in fields(self)[:3]:
            value = getattr(self, option.name)
            if not isinstance(value, bool):
                raise ValueError(f"randomization {option.name}={value!r} is not a bool; give True or False")
        jitter = self.camera_jitter
        if isinstance(jitter, bool) or not isinstance(jitter, (int, float)) or not 0 <= jitter <= MAX_CAMERA_JITTER:
            raise ValueError(f"randomization camera_jitter={jitter!r} is not a number in [0, {MAX_CAMERA_JITTER:g}]; 0 is none")

    def draw(self, rng: np.random.Generator) -> Look:
        """A look. Takes the same amount from `rng` whatever is switched on."""
        cameras, lights, textures = (np.random.default_rng(seed) for seed in rng.integers(2**63, size=3))
        drawn = _jitter(cameras, self.camera_jitter) if self.camera_jitter else {}
        if self.lights:
            drawn["light"] = _light(lights)
        if self.textures:
            drawn |= _textures(textures)
        return Look(**drawn)


def _jitter(rng: np.random.Generator, scale: float) -> dict:
    return {
        "static_shift_m": _within(rng, scale * STATIC_SHIFT_M),
        "static_target_shift_m": _within(rng, scale * TARGET_SHIFT_M),
        "gripper_shift_m": _within(rng, scale * GRIPPER_SHIFT_M),
        "gripper_turn_rad": _within(rng, scale * GRIPPER_TURN_RAD),
    }


def _within(rng: np.random.Generator, bound: float) -> Vector:
    return tuple(rng.uniform(-bound, bound, 3).tolist())


def _light(rng: np.random.Generator) -> Light:
    """From above, anywhere but behind the cabinet's back; neither so dark nor so tinted that red, pink and blue could be mistaken."""
    turn, height = rng.uniform(-0.9 * np.pi, 0.4 * np.pi), rng.uniform(0.6, 2.0)
    return Light(
        direction=tuple((100 * np.array((np.cos(turn), np.sin(turn), height))).tolist()),
        color=tuple(rng.uniform(0.8, 1.0, 3).tolist()),
        ambient=float(rng.uniform(0.45, 0.7)),
        diffuse=float(rng.uniform(0.2, 0.5)),
        specular=float(rng.uniform(0.0, 0.15)),
    )


def _textures(rng: np.random.Generator) -> dict:
    names = list(WOODS)
    wood = Wood(
        seed=int(rng.integers(1000)),
        rings=float(rng.uniform(2.5, 8.0)),
        table=_ramp(rng, WOODS[names[rng.integers(len(names))]]),
        door=_ramp(rng, WOODS[names[rng.integers(len(names))]]),
    )
    return {
        "wood": wood,
        "backdrop": tuple(int(grey) for grey in rng.uniform(160, 240) + rng.uniform(-12, 12, 3)),
        "table_tint": tuple(rng.uniform(0.8, 1.0, 3).tolist()),
        "robot_tint": tuple(rng.uniform(0.7, 1.0, 3).tolist()),
        "block_tint": (float(rng.uniform(0.7, 1.0)),) * 3,  # grey: a block's hue is its name
    }


def _ramp(rng: np.random.Generator, middle: Shade) -> tuple[Shade, Shade]:
    shade = np.array(middle) * rng.uniform(0.85, 1.15, 3)
    spread = rng.uniform(0.12, 0.3)
    return tuple(tuple(np.clip(shade * factor, 0, 255).astype(int).tolist()) for factor in (1 - spread, 1 + spread))
