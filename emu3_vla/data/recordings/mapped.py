"""A dataset seen through a mapping: our own episodes, made while they are read."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emu3_vla.data.recordings import motion
from emu3_vla.data.recordings.mapping import ActionMap, CameraMap, GripperPiece, Mapping, MappingError, Piece, RotationPiece, StateMap
from emu3_vla.data.recordings.recording import (
    FRAMES_PER_BLOCK,
    Column,
    Picture,
    Recording,
    RecordingError,
    Schema,
    Source,
    is_action,
    require_finite,
)
from envs.spec import CAMERAS, OBSERVATION

KEPT = "source."  # before the names of columns that are kept as they were
STATE_SIZE = 15
JOINTS = slice(7, 14)
# Rounding must not count as clipping.
ROUNDING = 1e-6


class MappedSource:
    """A dataset as our own episodes."""

    def __init__(self, source: Source, mapping: Mapping, name: str):
        """Raises MappingError where the mapping names what the dataset does not have."""
        self.source, self.mapping = source, mapping
        self.format, self.path, self.lengths = source.format, source.path, source.lengths
        self.told = [(mapping.instruction,)] * len(self.lengths) if mapping.instruction else source.told
        self._require_keys(name)
        self.kept = self._kept()
        self.schema = self._schema()
        self.losses = [*source.losses, *self._losses()]

    def _require_keys(self, name: str) -> None:
        mapping, schema = self.mapping, self.source.schema
        for camera, chosen in mapping.cameras.items():
            if chosen.key and chosen.key not in schema.cameras:
                raise MappingError(_unknown(name, f"cameras.{camera}.key", chosen.key, schema.cameras, "camera", self.path))
        keys = {
            "actions.key": mapping.actions.key,
            "state.key": mapping.state.key,
            "scene_obs": mapping.scene_obs,
            "imitate": mapping.imitate,
        }
        keys |= {f"keep[{number}]": key for number, key in enumerate(mapping.keep if isinstance(mapping.keep, tuple) else ())}
        for owner in ("actions", "state"):
            for part in ("position", "rotation", "joints", "gripper"):
                if piece := getattr(getattr(mapping, owner), part):
                    keys[f"{owner}.{part}.key"] = piece.key
        for place, key in keys.items():
            if key and key not in schema.columns:
                raise MappingError(_unknown(name, place, key, schema.columns, "column", self.path))

    def _kept(self) -> tuple[str, ...]:
        if self.mapping.keep == "none":
            return ()
        return tuple(self.source.schema.columns) if self.mapping.keep == "all" else self.mapping.keep

    def _schema(self) -> Schema:
        columns = {
            "actions": Column(dtype="float32", shape=(7,)),
            "robot_obs": Column(dtype="float64", shape=(STATE_SIZE,)),
            "imitate": Column(dtype="bool"),
        }
        if self.mapping.scene_obs:
            columns["scene_obs"] = Column(dtype="float64", shape=(24,))
        columns |= {KEPT + key: self.source.schema.columns[key] for key in self.kept}
        cameras = {camera: Picture(height=OBSERVATION[camera].shape[0], width=OBSERVATION[camera].shape[1]) for camera in CAMERAS}
        return replace(
            self.source.schema,
            columns=columns,
            cameras=cameras,
            every_step=self.source.schema.every_step and self.mapping.frame_stride == 1,
            canonical=True,
            about=self.source.schema.about | _units(self.mapping.actions),
        )

    def _losses(self) -> Iterator[str]:
        mapping, schema = self.mapping, self.source.schema
        used = {chosen.key for chosen in mapping.cameras.values()}
        for key, picture in schema.cameras.items():
            if key not in used:
                yield f"{key}: a camera of {picture} that the mapping does not use"
        for camera, chosen in mapping.cameras.items():
            size = self.schema.cameras[camera]
            if chosen.blank:
                yield f"{camera}: the arm has no such camera; its frames are black"
            elif changed := _changed(chosen, schema.cameras[chosen.key], size):
                yield f"{camera}: {chosen.key} of {schema.cameras[chosen.key]} becomes {size} ({changed})"
        if mapping.frame_stride > 1:
            yield f"{mapping.frame_stride - 1} of {mapping.frame_stride} frames of each camera (frame_stride)"
        taken = {mapping.scene_obs, mapping.imitate, *self.kept}
        taken |= {mapping.actions.key} if schema.columns.get(mapping.actions.key, Column(dtype="")).dtype == "float32" else set()
        taken |= {mapping.state.key} if schema.columns.get(mapping.state.key, Column(dtype="")).dtype in ("float32", "float64") else set()
        for key in schema.columns:
            if key not in taken:
                yield f"{key}: {'what it becomes is kept, itself it is not' if self._reads(key) else 'not kept'} (keep)"
        if mapping.actions.kind != "copy":
            yield "actions: the gripper's command is open or close, parted half way"

    def _reads(self, key: str) -> bool:
        parts = [
            getattr(owner, part)
            for owner in (self.mapping.actions, self.mapping.state)
            for part in ("position", "rotation", "joints", "gripper")
        ]
        return key in (self.mapping.actions.key, self.mapping.state.key) or any(part and part.key == key for part in parts)

    def read(self, number: int) -> Recording:
        return self._mapped(self.source.read(number))[0]

    def read_uncut(self, number: int) -> tuple[Recording, np.ndarray]:
        """The same, and how far its actions were beyond ±1 before they were cut: (T, 6), at least 0."""
        return self._mapped(self.source.read(number))

    def _mapped(self, recording: Recording) -> tuple[Recording, np.ndarray]:
        mapping, given = self.mapping, recording.columns
        require_finite(recording, [name for name in given if is_action(name)])
        state = _state(mapping.state, recording)
        actions, beyond = _actions(mapping.actions, state, recording)
        columns = {
            "actions": actions.astype(np.float32),
            "robot_obs": state,
            "imitate": given[mapping.imitate].astype(bool) if mapping.imitate else np.ones(len(recording), bool),
        }
        if mapping.scene_obs:
            columns["scene_obs"] = given[mapping.scene_obs].astype(np.float64)
        columns |= {KEPT + key: given[key] for key in self.kept}
        instructions = (mapping.instruction,) if mapping.instruction else recording.instructions
        stride = mapping.frame_stride
        mapped = replace(
            recording,
            columns=columns,
            instructions=instructions,
            instruction_of=np.zeros(len(recording), np.int64) if mapping.instruction else recording.instruction_of,
            task=mapping.tasks.get(instructions[0], recording.task),
            frame_step=recording.frame_step[::stride],
            frames=lambda camera: self._frames(camera, recording),
        )
        return mapped, beyond

    def _frames(self, camera: str, recording: Recording) -> Iterator[np.ndarray]:
        chosen, size, stride, start = self.mapping.cameras[camera], self.schema.cameras[camera], self.mapping.frame_stride, 0
        if chosen.blank:
            for first in range(0, len(recording.frame_step[::stride]), FRAMES_PER_BLOCK):
                yield np.zeros(
                    (len(recording.frame_step[::stride][first : first + FRAMES_PER_BLOCK]), size.height, size.width, 3), np.uint8
                )
            return
        for block in recording.frames(chosen.key):
            local = block[-start % stride :: stride]
            start += len(block)
            if len(local):
                yield fitted(local, chosen, size)


def _units(actions: ActionMap) -> dict[str, Any]:
    """What a dataset says of itself where its actions are not the simulator's."""
    usual = ActionMap(kind="copy", key="actions")
    names = ("position_unit_m", "rotation_unit_rad")
    units = {name: getattr(actions, name) for name in names}
    if actions.kind != "joints" and units == {name: getattr(usual, name) for name in names}:
        return {}
    return {"actions": {"kind": "joints" if actions.kind == "joints" else "tool", **units}}


def _unknown(name: str, place: str, key: str, known: dict, what: str, path: Path) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"mapping {name}: {place} is {key!r}, which is no {what} of {path}; {hint}it has {', '.join(known) or 'none'}"


def _changed(chosen: CameraMap, given: Picture, size: Picture) -> str:
    """What happens to a picture; empty where nothing does."""
    words = [f"{chosen.crop[2]}×{chosen.crop[3]} of it"] if chosen.crop else []
    words += [f"turned by {chosen.rotate}°"] if chosen.rotate else []
    width, height = (chosen.crop[2], chosen.crop[3]) if chosen.crop else (given.width, given.height)
    if chosen.rotate in (90, 270):
        width, height = height, width
    if width * size.height != height * size.width:
        words.append({"crop": "the sides cut off", "stretch": "distorted", "pad": "black bars added"}[chosen.fit])
    if (width, height) != (size.width, size.height):
        words.append("resampled")
    return ", ".join(words)


def fitted(block: np.ndarray, chosen: CameraMap, size: Picture) -> np.ndarray:
    """Frames (n, H, W, 3) cropped, turned and resampled to `size`. What has that size already stays as it is, byte for byte."""
    if chosen.crop:
        left, top, width, height = chosen.crop
        if left < 0 or top < 0 or left + width > block.shape[2] or top + height > block.shape[1]:
            raise MappingError(f"crop {list(chosen.crop)} leaves the picture of {block.shape[2]}×{block.shape[1]}")
        block = block[:, top : top + height, left : left + width]
    block = np.rot90(block, chosen.rotate // 90, axes=(1, 2))
    if block.shape[1:3] == (size.height, size.width):
        return np.ascontiguousarray(block)
    return np.stack([_resampled(np.ascontiguousarray(image), chosen.fit, size) for image in block])


def _resampled(image: np.ndarray, fit: str, size: Picture) -> np.ndarray:
    height, width = image.shape[:2]
    picture, box, inner = Image.fromarray(image), None, (size.width, size.height)
    scale = (max if fit == "crop" else min)(size.width / width, size.height / height)
    if fit == "crop":
        across, down = size.width / scale, size.height / scale
        box = ((width - across) / 2, (height - down) / 2, (width + across) / 2, (height + down) / 2)
    elif fit == "pad":
        inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Bicubic with support for reduction: antialiased. Three times faster than Lanczos, and as sharp for all that a policy sees.
    resized = picture.resize(inner, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    if inner == (size.width, size.height):
        return np.asarray(resized)
    padded = np.zeros((size.height, size.width, 3), np.uint8)
    top, left = (size.height - inner[1]) // 2, (size.width - inner[0]) // 2
    padded[top : top + inner[1], left : left + inner[0]] = np.asarray(resized)
    return padded


# -- numbers


def _values(piece: Piece, recording: Recording, count: int | None, what: str) -> np.ndarray:
    """(T, count) in metres or radians; count None: any."""
    values = recording.columns[piece.key].reshape(len(recording), -1)
    if values.dtype.kind not in "biuf":
        raise MappingError(f"{recording.where}: {what} is read from {piece.key!r}, which holds {values.dtype}, expected numbers")
    if piece.entries is not None:
        if max(piece.entries, default=0) >= values.shape[1]:
            raise MappingError(
                f"{recording.where}: {what}: {piece.key!r} has {values.shape[1]} entries, the mapping takes {list(piece.entries)}"
            )
        values = values[:, list(piece.entries)]
    if count is not None and values.shape[1] != count:
        raise MappingError(f"{recording.where}: {what} takes {values.shape[1]} entries of {piece.key!r}, expected {count}")
    factor = piece.scale * motion.UNITS.get(piece.unit, 1.0)
    return values.astype(np.float64) * factor


def _rotation(piece: RotationPiece, recording: Recording, what: str):
    return motion.rotation_of(_values(piece, recording, motion.FORMS[piece.form], what), piece.form, recording.where)


def _openness(piece: GripperPiece, recording: Recording, what: str) -> np.ndarray:
    """(T,) Several fingers count as their mean."""
    return motion.openness(_values(piece, recording, None, what).mean(axis=1), piece.open, piece.closed)


def _state(state: StateMap, recording: Recording) -> np.ndarray:
    """robot_obs (T, 15)."""
    if state.key:
        return _values(Piece(key=state.key), recording, STATE_SIZE, "state")
    values = np.full((len(recording), STATE_SIZE), np.nan)
    if state.position:
        values[:, :3] = _values(state.position, recording, 3, "state.position")
    if state.rotation:
        given = _values(state.rotation, recording, motion.FORMS[state.rotation.form], "state.rotation")
        turned = motion.rotation_of(given, state.rotation.form, recording.where)
        values[:, 3:6] = given if state.rotation.form == "euler_xyz" else motion.euler_of(turned, recording.where)
    if state.gripper and state.gripper.width_m is not None:
        values[:, 6] = _openness(state.gripper, recording, "state.gripper") * state.gripper.width_m
    if state.joints:
        joints = _values(state.joints, recording, None, "state.joints")
        if joints.shape[1] > 7:
            raise MappingError(f"{recording.where}: state.joints takes {joints.shape[1]} entries, expected at most 7")
        values[:, JOINTS.start : JOINTS.start + joints.shape[1]] = joints
    return values


def _actions(actions: ActionMap, state: np.ndarray, recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """Actions (T, 7), and how far their first six entries were beyond ±1 (T, 6)."""
    if actions.kind == "copy":
        values = recording.columns[actions.key]
        if values.shape != (len(recording), 7):
            raise MappingError(f"{recording.where}: {actions.key!r} has {values.shape[1:]} entries a step; kind copy needs 7")
        return values, np.zeros((len(recording), 6))
    moved = _joints(actions, state, recording) if actions.kind == "joints" else _tool(actions, state, recording)
    gripper = motion.gripper_command(_openness(actions.gripper, recording, "actions.gripper"))
    beyond = np.maximum(np.abs(moved) - 1, 0)
    if not actions.clip and (beyond > ROUNDING).any():
        step, entry = (int(index) for index in np.argwhere(beyond > ROUNDING)[0])
        raise RecordingError(
            f"{recording.where}: entry {entry} of the action is {moved[step, entry]:.3f} at step {step}, outside [-1, 1]; raise "
            "position_unit_m or rotation_unit_rad in the mapping, or set clip: true"
        )
    return np.concatenate([np.clip(moved, -1, 1), gripper[:, None]], axis=1), np.where(beyond > ROUNDING, beyond, 0)


def _joints(actions: ActionMap, state: np.ndarray, recording: Recording) -> np.ndarray:
    targets = _values(actions.joints, recording, None, "actions.joints")
    count = targets.shape[1]
    present = state[:, JOINTS.start : JOINTS.start + count]
    if count > 6:
        raise MappingError(f"{recording.where}: actions.joints takes {count} entries; an action has room for six joints and a gripper")
    if np.isnan(present).any():
        raise MappingError(f"{recording.where}: kind joints needs state.joints, as many as actions.joints")
    return np.pad((targets - present) / actions.rotation_unit_rad, ((0, 0), (0, 6 - count)))


def _tool(actions: ActionMap, state: np.ndarray, recording: Recording) -> np.ndarray:
    """Motion of the tool (T, 6) in units of the mapping."""
    where = recording.where
    pose = (state[:, :3], state[:, 3:6])
    if actions.kind == "executed":
        start = _present(pose, "executed", where)
        moved, turned = motion.between(motion.following(*start), start, where)
    elif actions.kind == "absolute":
        target = (_values(actions.position, recording, 3, "actions.position"), _rotation(actions.rotation, recording, "actions.rotation"))
        start = _present(pose, "absolute", where)
        if actions.relative_to == "previous":
            start = motion.preceding(*target, (start[0][:1], start[1][:1]))
        moved, turned = motion.between(target, start, where)
    else:
        moved = _values(actions.position, recording, 3, "actions.position")
        if actions.rotation.form == "euler_xyz" and actions.frame == "world":
            turned = _values(actions.rotation, recording, 3, "actions.rotation")
        else:
            orientation = _present(pose, f"relative, {actions.rotation.form} in the {actions.frame}'s frame", where, position=False)[1]
            moved, turned = motion.composed(
                moved, _rotation(actions.rotation, recording, "actions.rotation"), orientation, actions.frame, where
            )
    return np.concatenate([moved / actions.position_unit_m, turned / actions.rotation_unit_rad], axis=1)


def _present(pose: tuple[np.ndarray, np.ndarray], kind: str, where: str, position: bool = True):
    """The tool's pose before each step. Raises MappingError where the state lacks it."""
    if np.isnan(pose[1]).any() or (position and np.isnan(pose[0]).any()):
        raise MappingError(f"{where}: actions of kind {kind} need the tool's pose before the step: map state.position and state.rotation")
    return pose[0], motion.rotation_of(pose[1], "euler_xyz", where)
