"""The four scenes, as data: what is loaded, in which order, where it may start, and where the cameras stand.

Numbers are calvin_env's `conf/scene/calvin_scene_{A..D}.yaml`, `conf/robot/panda_longer_finger.yaml` and `conf/cameras/*`. The same
description serves both asset sets: ours and calvin_env's `data/` folder hold the same relative paths, joint and link names.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path

OWN_ASSETS = Path(__file__).parent / "assets"
FETCHED_ASSETS = "calvin_env"
"""Short for the folder where `emu3-vla doctor --fetch-assets` puts calvin_env's assets; ./calvin_env is a folder of that name."""

GLOBAL_SCALING = 0.8
ROBOT_URDF = "franka_panda/panda_longer_finger.urdf"
PLANE_URDF = "plane/plane.urdf"
ROBOT_BASE_POSITION = (-0.34, -0.46, 0.24)
NEUTRAL_JOINTS_RAD = (-1.21779206, 1.03987646, 2.11978261, -2.34205014, -0.87015947, 1.64119353, 0.55344866)

SLIDE, DRAWER, BUTTON, SWITCH = "base__slide", "base__drawer", "base__button", "base__switch"
LIGHTBULB, LED = "lightbulb", "led"
LIGHT_LINKS = {LIGHTBULB: "light_link", LED: "led_link"}
LIGHT_ON_RGBA = {LIGHTBULB: (1, 1, 0, 1), LED: (0, 1, 0, 1)}
LIGHT_OFF_RGBA = (1, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera as PyBullet takes it: vertical field of view in degrees, clipping planes in metres."""

    width: int
    height: int
    fov_deg: float
    near_m: float
    far_m: float


@dataclass(frozen=True, kw_only=True)
class StaticCamera(Camera):
    """A camera fixed in the world frame [m]."""

    look_from: tuple[float, float, float]
    look_at: tuple[float, float, float]
    up: tuple[float, float, float]


STATIC_CAMERA = StaticCamera(
    width=200,
    height=200,
    fov_deg=10,
    near_m=0.01,
    far_m=10,
    look_from=(2.871459009488717, -2.166602199425597, 2.555159848480571),
    look_at=(-0.026242351159453392, -0.0302329882979393, 0.3920000493526459),
    up=(0.4041403970338857, 0.22629790978217404, 0.8862616969685161),
)
GRIPPER_CAMERA = Camera(width=84, height=84, fov_deg=75, near_m=0.01, far_m=2)

Box = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One CALVIN scene.

    blocks: name → URDF, in the order of scene_obs. surfaces: name → lowest and highest corner [m] for random block positions.
    """

    name: str
    blocks: dict[str, str]
    surfaces: dict[str, Box] = field(hash=False)

    @property
    def table_urdf(self) -> str:
        return f"calvin_table_{self.name}/urdf/calvin_table_{self.name}.urdf"

    @property
    def files(self) -> list[str]:
        """Every URDF that the scene loads, relative to the asset folder."""
        return [ROBOT_URDF, *self.blocks.values(), self.table_urdf, PLANE_URDF]


def _scene(name: str, blocks: tuple[str, ...], table: Box, slider_left: Box, slider_right: Box) -> Scene:
    return Scene(
        name=name,
        blocks={f"block_{block.split('_')[0]}": f"blocks/block_{block}.urdf" for block in blocks},
        surfaces={"table": table, "slider_left": slider_left, "slider_right": slider_right},
    )


_LEFT_AD = ((-0.32, 0.05, 0.46), (-0.16, 0.12, 0.46))
_RIGHT_AD = ((-0.05, 0.05, 0.46), (0.13, 0.12, 0.46))
_LEFT_BC = ((-0.12, 0.05, 0.46), (0.06, 0.12, 0.46))

SCENES: dict[str, Scene] = {
    scene.name: scene
    for scene in (
        _scene("A", ("pink_small", "blue_big", "red_middle"), ((-0.2, -0.15, 0.46), (0.35, -0.03, 0.46)), _LEFT_AD, _RIGHT_AD),
        _scene(
            "B",
            ("red_small", "blue_big", "pink_middle"),
            ((-0.35, -0.15, 0.46), (0.15, -0.03, 0.46)),
            _LEFT_BC,
            ((0.15, 0.05, 0.46), (0.33, 0.12, 0.46)),
        ),
        _scene(
            "C",
            ("blue_small", "red_big", "pink_middle"),
            ((0.0, -0.15, 0.46), (0.35, -0.03, 0.46)),
            _LEFT_BC,
            ((0.15, 0.05, 0.46), (0.3, 0.12, 0.46)),
        ),
        _scene("D", ("red_middle", "blue_small", "pink_big"), ((0.0, -0.15, 0.46), (0.35, -0.03, 0.46)), _LEFT_AD, _RIGHT_AD),
    )
}

BLOCK_LENGTHS_M = {"small": 0.05, "middle": 0.07, "big": 0.1}
"""Unscaled long side of the three block sizes."""


def scene_named(name: str) -> Scene:
    """The scene called `name`. Raises ValueError naming the nearest known scene."""
    if not isinstance(name, str) or name not in SCENES:
        close = difflib.get_close_matches(str(name).upper()[-1:], SCENES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown scene {name!r}: CALVIN has {', '.join(SCENES)}{hint}")
    return SCENES[name]


def fetched_assets() -> Path:
    """Where calvin_env's assets are fetched to unless told otherwise: below $EMU3_VLA_CACHE, or the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("EMU3_VLA_CACHE") or Path(caches) / "emu3-vla") / FETCHED_ASSETS


def asset_folder(scene: Scene, assets: str | Path | None) -> Path:
    """The folder to load `scene` from: `assets`, or our own where it is None, or the fetched one where it is "calvin_env".

    Raises FileNotFoundError naming what is missing, ValueError for anything but a path.
    """
    if assets is not None and not isinstance(assets, (str, os.PathLike)):
        raise ValueError(f"assets={assets!r} is no path; give calvin_env's data/ folder, or leave assets out for our own")
    if assets == FETCHED_ASSETS:
        folder = fetched_assets()
        if not folder.is_dir():
            raise FileNotFoundError(f"calvin_env's assets are not in {folder} yet; 'emu3-vla doctor --fetch-assets' downloads them")
    else:
        folder = OWN_ASSETS if assets is None else Path(assets)
    if not folder.is_dir():
        raise FileNotFoundError(f"asset folder {folder} does not exist; give calvin_env's data/ folder, or leave assets out for our own")
    missing = [name for name in scene.files if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"asset folder {folder} is incomplete for scene {scene.name}: no {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; expected the layout of calvin_env's data/"
            + (f": did you mean {folder / 'data'}?" if (folder / "data" / missing[0]).is_file() else "")
        )
    return folder
