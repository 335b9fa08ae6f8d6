"""Policies without a model: the floor that any result is compared with, and replays."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from envs.spec import ACTION_DIM, GRIPPER_CLOSE, GRIPPER_OPEN, check_action


class ReplayEnded(RuntimeError):
    """A replay was asked for an action after its last one."""


def require_instruction(instruction: str) -> str:
    """`instruction`, or ValueError where it is empty."""
    if not instruction or not instruction.strip():
        raise ValueError("the instruction is empty; a policy needs a sentence")
    return instruction


class ZeroPolicy:
    """Never moves and keeps the gripper open: what an evaluation must score 0.0."""

    name = "zero"
    requires: frozenset[str] = frozenset()

    def reset(self, instruction: str, *, task: str | None = None, seed: int | None = None) -> None:
        """See policies.base.Policy."""
        require_instruction(instruction)

    def infer(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        """One action (1, 7): no motion, gripper open."""
        actions = np.zeros((1, ACTION_DIM), dtype=np.float32)
        actions[:, -1] = GRIPPER_OPEN
        return {"actions": actions}


class RandomPolicy:
    """Uniform motions in [-1, 1], a gripper command a chunk. chunk: actions a decision."""

    name = "random"
    requires: frozenset[str] = frozenset()

    def __init__(self, chunk: int = 10):
        if chunk < 1:
            raise ValueError(f"chunk={chunk}, expected at least one action a decision")
        self.chunk = chunk
        self.random: np.random.Generator | None = None

    def reset(self, instruction: str, *, task: str | None = None, seed: int | None = None) -> None:
        """See policies.base.Policy; without a seed the actions differ from run to run."""
        require_instruction(instruction)
        self.random = np.random.default_rng(seed)

    def infer(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        """`chunk` random actions (T, 7)."""
        if self.random is None:
            raise RuntimeError("the random policy was asked for an action before reset(instruction)")
        actions = self.random.uniform(-1, 1, (self.chunk, ACTION_DIM)).astype(np.float32)
        actions[:, -1] = self.random.choice((GRIPPER_CLOSE, GRIPPER_OPEN))
        return {"actions": actions}


class ReplayPolicy:
    """Recorded actions, whatever is seen.

    path: an .npz of arrays (T, 7), each named after the task it solves; an array named "actions" serves every other task. Each reset
    starts the array of its task again. Raises ValueError for a file without usable arrays.
    """

    name = "replay"
    requires: frozenset[str] = frozenset()

    def __init__(self, path: str | Path):
        self.recordings = _read(Path(path))
        self.path = path
        self.actions: np.ndarray | None = None

    def reset(self, instruction: str, *, task: str | None = None, seed: int | None = None) -> None:
        """See policies.base.Policy. Raises ValueError where the file has neither the task nor "actions"."""
        require_instruction(instruction)
        name = task if task in self.recordings else "actions"
        if name not in self.recordings:
            raise ValueError(f"{self.path} has no recording of {task!r} and no 'actions'; it has {', '.join(self.recordings)}")
        self.actions, self.position = self.recordings[name], 0

    def infer(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        """The next recorded action (1, 7). Raises ReplayEnded after the last."""
        if self.actions is None:
            raise RuntimeError("the replay was asked for an action before reset(instruction)")
        if self.position >= len(self.actions):
            raise ReplayEnded(f"{self.path}: all {len(self.actions)} recorded actions were executed and the subtask is not solved")
        self.position += 1
        return {"actions": self.actions[self.position - 1 : self.position]}


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"no file {path} to replay")
    try:
        with np.load(path, allow_pickle=False) as file:
            recordings = {name: np.asarray(file[name], dtype=np.float32) for name in file.files}
    except (zipfile.BadZipFile, EOFError, AttributeError, ValueError) as error:
        # A bare .npy gives an array, which has neither files nor an end.
        raise ValueError(f"{path} is not a whole .npz file of numbers: {error}") from error
    if not recordings:
        raise ValueError(f"{path} holds no arrays; expected arrays (T, {ACTION_DIM}) named after tasks, or one named 'actions'")
    for name, actions in recordings.items():
        if actions.ndim != 2 or not len(actions):
            raise ValueError(f"{path}: array {name!r} has shape {actions.shape}, expected (T, {ACTION_DIM})")
        for action in actions:
            check_action(action)
    return recordings
