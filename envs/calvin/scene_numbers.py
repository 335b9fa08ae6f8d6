"""What there is to see in a CALVIN scene, in numbers: door, drawer and lamps, and the way from the tool to each block.

    SceneNumbers("D").of(robot_obs, scene_obs)      # float64 (16,), in the order of SceneNumbers.limits

For `emu3-vla tokenize scene=envs.calvin.scene_numbers:SceneNumbers`: a policy that was trained with it says these numbers, which it reads
from its cameras, before it acts. Recordings alone know them; no policy is told.
"""

from __future__ import annotations

from math import pi
from typing import ClassVar

import numpy as np

from envs.calvin.expert.arm import Arm
from envs.calvin.tasks import COLORS
from envs.spec import ROBOT_OBS, SCENE_OBS

_WAY = {"right": (-1.0, 1.0), "forward": (-0.8, 0.8), "up": (-0.6, 0.6)}
"""From the tool to a block [m], along the world's x, y, z."""
_FINER_NEAR = 0.6
"""Power of the bins of a way: 3 mm wide at the fingers, 20 mm half a metre off."""


class SceneNumbers:
    """Of one scene. Raises ValueError for an unknown scene."""

    bins = 128
    limits: ClassVar[dict[str, tuple[float, float]]] = {
        "slide": (0.0, 0.35),
        "drawer": (0.0, 0.25),
        "bulb": (0.0, 1.0),
        "led": (0.0, 1.0),
    } | {f"{color}_{side}": limits for color in COLORS for side, limits in (_WAY | {"turn": (-pi / 2, pi / 2)}).items()}
    """Range of each number: metres, radians, lamps 0 or 1."""
    powers: ClassVar[dict[str, float]] = {f"{color}_{side}": _FINER_NEAR for color in COLORS for side in _WAY}
    relative: ClassVar[dict[str, str]] = {
        f"{color}_{side}": tool
        for color in COLORS
        for side, tool in {"right": "x", "forward": "y", "up": "z", "turn": "yaw"}.items()
    }
    """Which entry of the arm's state each way and turn begins at."""

    def __init__(self, scene: str = "D"):
        self._arm = Arm(scene)

    def of(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> np.ndarray:
        """The numbers at a moment: float64 (16,). A block's turn is its long side's heading, from the tool's.

        robot_obs: (15,). scene_obs: (24,).
        """
        arm = self._arm
        arm.forget()
        arm.sense({ROBOT_OBS: robot_obs, SCENE_OBS: scene_obs})
        blocks = [
            (*(block.position - robot_obs[:3]), (block.yaw - robot_obs[5] + pi / 2) % pi - pi / 2) for block in map(arm.block, COLORS)
        ]
        return np.array([arm.slide, arm.drawer, scene_obs[4], scene_obs[5], *(value for block in blocks for value in block)])
