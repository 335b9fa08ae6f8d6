"""Which simulator an evaluation runs in."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import policies
from envs.calvin.scenes import asset_folder, scene_named
from policies.base import Policy

if TYPE_CHECKING:
    from envs.calvin import CalvinEnv

OWN_ASSETS_NAME = "own low-polygon"


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """The simulator: checked when it is written down, not when the first worker starts."""

    scene: str = "D"  # A, B, C or D
    assets: str = ""  # calvin_env's data/ folder; empty: our own low-polygon scenes
    version: str = "1431a46"  # calvin_env commit whose behaviour is followed; or 797142c

    def __post_init__(self):
        asset_folder(scene_named(self.scene), self.assets or None)

    @property
    def assets_name(self) -> str:
        """What results call the assets."""
        return self.assets or OWN_ASSETS_NAME

    def make(self) -> CalvinEnv:
        """A simulator that renders only when asked to."""
        with _quiet_import():
            from envs.calvin.env import CalvinEnv

        return CalvinEnv(scene=self.scene, assets=self.assets or None, observe="on_demand", version=self.version)


def renderer() -> str:
    """What draws the simulator's images."""
    with _quiet_import():
        from envs.calvin.env import RENDERER

    return RENDERER


def load_policy(name: str, env: EnvConfig) -> Policy:
    """The policy called `name`; a policy with privileged knowledge of the scene is told which one it is."""
    options: dict[str, Any] = {"scene": env.scene} if name == "expert" else {}
    return policies.load(name, **options)


@contextmanager
def _quiet_import() -> Iterator[None]:
    """PyBullet prints its build time to standard error, from C, when it is imported, which breaks progress lines."""
    if "pybullet" in sys.modules:
        yield
        return
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
