"""What there is to see in a CALVIN scene, in numbers: where the fixtures and the blocks are, and which lamps are on.

    SceneNumbers("D").of(robot_obs, scene_obs)      # float64 (16,), in the order of SceneNumbers.limits

For `emu3-vla tokenize scene=envs.calvin.scene_numbers:SceneNumbers`: a policy that was trained with it says these numbers, which it reads
from its cameras, before it acts. Recordings alone know them; no policy is told.
"""

from __future__ import annotations

from math import pi

import numpy as np

from envs.calvin.expert.arm import Arm
from envs.calvin.tasks import COLORS, DRAWER_M, SLIDE_M
from envs.spec import ROBOT_OBS, SCENE_OBS

_REACH = {"x": (-0.5, 0.5), "y": (-0.5, 0.3), "z": (0.25, 0.85)}
"""World positions [m] at which blocks come to lie or are held."""


class SceneNumbers:
    """Of one scene. Raises ValueError for an unknown scene."""

    bins = 128
    limits = {"slide": (0.0, SLIDE_M), "drawer": (0.0, DRAWER_M), "bulb": (0.0, 1.0), "led": (0.0, 1.0)} | {
        f"{color}_{axis}": limits for color in COLORS for axis, limits in (_REACH | {"yaw": (0.0, pi)}).items()
    }
    """Range of each number: metres, radians, lamps 0 or 1."""

    def __init__(self, scene: str = "D"):
        self._arm = Arm(scene)

    def of(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> np.ndarray:
        """The numbers at a moment: float64 (16,). A block's yaw is its long side's, in [0, pi). robot_obs: (15,). scene_obs: (24,)."""
        arm = self._arm
        arm.forget()
        arm.sense({ROBOT_OBS: robot_obs, SCENE_OBS: scene_obs})
        blocks = [(*block.position, block.yaw % pi) for block in map(arm.block, COLORS)]
        return np.array([arm.slide, arm.drawer, scene_obs[4], scene_obs[5], *(value for block in blocks for value in block)])
