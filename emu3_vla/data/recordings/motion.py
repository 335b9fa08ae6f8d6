"""Other arms' commands and states as CALVIN's: units, rotations, grippers, absolute poses as relative actions.

Axes: T steps. Positions in metres, angles in radians. Euler angles are x-y-z about fixed axes, as envs.spec has them; a relative action's
rotation is what is added to them. Rotations that are given otherwise are composed first: that needs the tool's orientation, and has
no answer where Euler angles have none (pitch of ±90°).
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from emu3_vla.data.recordings.recording import RecordingError
from envs.spec import GRIPPER_CLOSE, GRIPPER_OPEN

TO_METRES = {"m": 1.0, "cm": 0.01, "mm": 0.001}
TO_RADIANS = {"rad": 1.0, "deg": np.pi / 180}
UNITS = {**TO_METRES, **TO_RADIANS}

FORMS = {"euler_xyz": 3, "axis_angle": 3, "quaternion_xyzw": 4, "quaternion_wxyz": 4}
GIMBAL_MARGIN_RAD = 0.02


def rotation_of(values: np.ndarray, form: str, where: str) -> Rotation:
    """values: (T, 3 or 4) in `form`, angles in radians. Raises RecordingError for quaternions of no length."""
    if form == "euler_xyz":
        return Rotation.from_euler("xyz", values)
    if form == "axis_angle":
        return Rotation.from_rotvec(values)
    norms = np.linalg.norm(values, axis=1)
    if not (norms > 0.5).all():
        step = int(np.flatnonzero(~(norms > 0.5))[0])
        raise RecordingError(f"{where}: the quaternion of step {step} is {values[step].tolist()}, expected length 1")
    return Rotation.from_quat(values if form == "quaternion_xyzw" else np.roll(values, -1, axis=1))


def euler_of(rotation: Rotation, where: str) -> np.ndarray:
    """Euler angles (T, 3). Raises RecordingError where they are not defined."""
    pitch = np.arcsin(np.clip(-rotation.as_matrix()[:, 2, 0], -1, 1))
    locked = np.abs(pitch) > np.pi / 2 - GIMBAL_MARGIN_RAD
    if locked.any():
        step = int(np.flatnonzero(locked)[0])
        raise RecordingError(
            f"{where}: at step {step} the tool is pitched by {np.degrees(pitch[step]):.1f}°, where Euler angles are not defined; "
            "give the poses in a frame that is turned, or leave the episode out with skip=[…]"
        )
    return rotation.as_euler("xyz")


def difference(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Difference of angles, the short way round: in [-π, π)."""
    return (after - before + np.pi) % (2 * np.pi) - np.pi


def between(target: tuple[np.ndarray, Rotation], start: tuple[np.ndarray, Rotation], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Motion (T, 3) [m] and (T, 3) [rad] that leads from the poses `start` to the poses `target`."""
    turn = difference(euler_of(target[1], where), euler_of(start[1], where))
    return target[0] - start[0], turn


def composed(position: np.ndarray, turn: Rotation, orientation: Rotation, frame: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Motion as `between` gives it, of steps that are given in the world's or the tool's own frame.

    position: (T, 3) [m]. turn: composed with `orientation`, the tool's before the step.
    """
    after = orientation * turn if frame == "tool" else turn * orientation
    moved = orientation.apply(position) if frame == "tool" else position
    return moved, difference(euler_of(after, where), euler_of(orientation, where))


def following(position: np.ndarray, orientation: Rotation) -> tuple[np.ndarray, Rotation]:
    """The pose after each step; after the last one it stays."""
    index = np.minimum(np.arange(1, len(position) + 1), len(position) - 1)
    return position[index], orientation[index]


def preceding(position: np.ndarray, orientation: Rotation, first: tuple[np.ndarray, Rotation]) -> tuple[np.ndarray, Rotation]:
    """The pose commanded before each step; before the first one, `first` (1, 3)."""
    positions = np.concatenate([first[0], position[:-1]])
    return positions, Rotation.concatenate([first[1], orientation[:-1]])


def openness(values: np.ndarray, open: float, closed: float) -> np.ndarray:
    """How far a gripper is open, 0 to 1, from values that mean open and closed at these two."""
    return (values - closed) / (open - closed)


def gripper_command(openness: np.ndarray) -> np.ndarray:
    """+1 (open) or -1 (close): a relative action's last entry has no other values."""
    return np.where(openness >= 0.5, GRIPPER_OPEN, GRIPPER_CLOSE)
