"""Pictures of failures: a strip of the last moments of each subtask that ran out of steps, a small JPEG file each.

    failures/chain0017_3_open_drawer.jpg        chain 17, third subtask; oldest frame at the left

An attempt that runs to its limit is known a moment ahead, so nothing is rendered for attempts that are solved before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from envs.spec import CONTROL_HZ
from eval.chain import Attempt, Watcher

if TYPE_CHECKING:
    from envs.calvin import CalvinEnv

FAILURES_FOLDER = "failures"
FRAMES, FRAMES_APART = 3, CONTROL_HZ  # two seconds before the end, one second before it, the end
FRAME_SIZE = 160  # side of one frame [pixels]
JPEG_QUALITY = 75
_NAME = re.compile(r"chain(\d+)_(\d+)_(\w+)\.jpg")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One strip: the chain's index, the subtask's position in it (from 0), its task, the JPEG file."""

    chain: int
    position: int
    task: str
    path: Path


class FailurePictures(Watcher):
    """Leaves a strip in `folder` for each subtask that is not solved in `max_steps` steps.

    A chain that runs again replaces its strips. Files appear whole.
    """

    def __init__(self, folder: Path, *, max_steps: int):
        self.folder, self.max_steps = folder, max_steps
        self.moments = {max_steps - FRAMES_APART * back for back in range(FRAMES)}

    def chain_begins(self, env: CalvinEnv, index: int, subtasks: tuple[str, ...]) -> None:
        self.chain, self.frames = index, []
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(f"chain{index:04d}_*.jpg"):
            old.unlink()

    def subtask_begins(self, position: int, attempt: Attempt) -> None:
        self.frames = []

    def stepped(self, env: CalvinEnv, action: np.ndarray, before: np.ndarray, attempt: Attempt) -> None:
        if attempt.steps in self.moments and not attempt.success:
            frame = env.render()
            if frame is not None:  # an arm need not have the camera
                self.frames.append(frame)

    def subtask_ends(self, position: int, attempt: Attempt) -> None:
        if not attempt.success and self.frames:
            path = self.folder / f"chain{self.chain:04d}_{position + 1}_{attempt.task}.jpg"
            temporary = path.with_suffix(".part")
            strip(self.frames).save(temporary, "JPEG", quality=JPEG_QUALITY, optimize=True)
            temporary.replace(path)


def strip(frames: list[np.ndarray]) -> Image.Image:
    """Frames, uint8 (H, W, 3) each, made small and put side by side."""
    whole = Image.new("RGB", (FRAME_SIZE * len(frames), FRAME_SIZE))
    for column, frame in enumerate(frames):
        small = Image.fromarray(frame).resize((FRAME_SIZE, FRAME_SIZE), Image.Resampling.LANCZOS)
        whole.paste(small, (FRAME_SIZE * column, 0))
    return whole


def failures_in(folder: Path) -> list[Failure]:
    """The strips in a folder, by chain and position; none where there is no such folder. Other files are left out."""
    found = []
    for path in folder.glob("chain*.jpg"):
        if match := _NAME.fullmatch(path.name):
            found.append(Failure(chain=int(match[1]), position=int(match[2]) - 1, task=match[3], path=path))
    return sorted(found, key=lambda failure: (failure.chain, failure.position))
