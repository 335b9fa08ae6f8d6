"""Which key of a dataset is what: cameras, actions, state, units, in one YAML file. Presets lie in configs/mappings.

    cameras:
      rgb_static: {key: observation.images.front, fit: crop}
      rgb_gripper: {key: observation.images.wrist}
    actions:
      kind: absolute
      position: {key: action, entries: [0, 1, 2], unit: mm}
      rotation: {key: action, entries: [3, 4, 5], unit: deg, form: euler_xyz}
      gripper: {key: action, entries: [6], open: 1, closed: 0}
    state: ...

A mapped dataset is one of our own episodes (envs.spec.Episode): the same columns, units and picture sizes, whatever it was.
"""

from __future__ import annotations

import difflib
import importlib.resources
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from emu3_vla.data.recordings import motion
from envs.spec import CAMERAS, MAX_RELATIVE_POSITION_M, MAX_RELATIVE_ROTATION_RAD


class MappingError(ValueError):
    """A mapping that does not make sense, or not for this dataset."""


@dataclass(frozen=True, kw_only=True)
class CameraMap:
    """Where a camera's frames come from, and how they come to the size that policies see."""

    key: str = ""  # a camera of the dataset
    blank: bool = False  # black frames in place of one: the arm has no such camera
    crop: tuple[int, int, int, int] | None = None  # left, top, width, height: taken first
    rotate: Literal[0, 90, 180, 270] = 0  # degrees, anticlockwise
    fit: Literal["crop", "stretch", "pad"] = "crop"  # of another aspect: lose the sides, distort, or add black bars

    def __post_init__(self):
        if bool(self.key) == self.blank:
            raise ValueError("give a camera's key, or blank: true")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Entries of a column, as metres or radians."""

    key: str
    entries: tuple[int, ...] | None = None  # None: all
    unit: str = ""  # m, cm, mm, rad, deg
    scale: float = 1.0  # what a value of 1 is, in that unit

    def __post_init__(self):
        if self.unit not in ("", *motion.UNITS):
            raise ValueError(f"unit {self.unit!r}, expected one of {', '.join(motion.UNITS)}")


@dataclass(frozen=True, kw_only=True)
class RotationPiece(Piece):
    """Entries that are a rotation. form: how it is written; quaternions name the order of their parts."""

    form: Literal["euler_xyz", "axis_angle", "quaternion_xyzw", "quaternion_wxyz"] = "euler_xyz"


@dataclass(frozen=True, kw_only=True)
class GripperPiece(Piece):
    """open, closed: the values that mean it, such as 1 and 0, or 0 and 1, or 1 and -1. width_m: between the fingers when open."""

    open: float
    closed: float
    width_m: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.open == self.closed:
            raise ValueError(f"open and closed are both {self.open}")


@dataclass(frozen=True, kw_only=True)
class ActionMap:
    """What the dataset's commands are.

    copy       the seven numbers of `key` are relative actions in our units
    relative   position and rotation are steps from the present pose, in the world's or the tool's frame
    absolute   they are poses to go to: the action is how far these are from the present pose, or from the last one commanded
    executed   there are no usable commands: the action is what the tool did until the next step (the state's pose)
    joints     angles to go to, of at most six joints: the action is how far, in units of rotation_unit_rad; no tool is involved
    """

    kind: Literal["copy", "relative", "absolute", "executed", "joints"]
    key: str = ""
    position: Piece | None = None
    rotation: RotationPiece | None = None
    joints: Piece | None = None
    gripper: GripperPiece | None = None
    frame: Literal["world", "tool"] = "world"
    relative_to: Literal["state", "previous"] = "state"
    position_unit_m: float = MAX_RELATIVE_POSITION_M  # what 1 means; others than the defaults are written into the store's metadata
    rotation_unit_rad: float = MAX_RELATIVE_ROTATION_RAD
    clip: bool = True  # steps beyond ±1 are cut to it, and counted among the losses; false: they are an error

    def __post_init__(self):
        needs = {"copy": ("key",), "executed": ("gripper",), "joints": ("joints", "gripper")}
        for name in needs.get(self.kind, ("position", "rotation", "gripper")):
            if not getattr(self, name):
                raise ValueError(f"kind {self.kind} needs {name}")
        if not self.position_unit_m > 0 or not self.rotation_unit_rad > 0:
            raise ValueError("position_unit_m and rotation_unit_rad must be above 0")


@dataclass(frozen=True, kw_only=True)
class StateMap:
    """robot_obs, from a column that has its 15 entries (key) or in pieces; NaN where there is none."""

    key: str = ""
    position: Piece | None = None
    rotation: RotationPiece | None = None
    gripper: GripperPiece | None = None
    joints: Piece | None = None


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """A mapping file."""

    about: str = ""
    cameras: dict[str, CameraMap]
    actions: ActionMap
    state: StateMap = field(default_factory=StateMap)
    scene_obs: str = ""  # column with CALVIN's 24 entries; empty: nobody knows the scene's state
    imitate: str = ""  # column that is false where a step is not to be imitated; empty: all are
    instruction: str = ""  # said of every episode, in place of what the dataset says
    tasks: dict[str, str] = field(default_factory=dict)  # instruction: name of its task, where several sentences mean the same
    frame_stride: int = 1  # keep every so many frames; a policy's chunk must be a multiple
    keep: Literal["all", "none"] | tuple[str, ...] = "none"  # columns that are carried beside, as source.<key>

    def __post_init__(self):
        if set(self.cameras) != set(CAMERAS):
            raise ValueError(f"cameras are {', '.join(self.cameras) or 'none'}, expected exactly {', '.join(CAMERAS)}")
        if self.frame_stride < 1:
            raise ValueError(f"frame_stride is {self.frame_stride}, expected at least 1")


def load_mapping(name: str) -> tuple[Mapping, str]:
    """A preset of configs/mappings by its name, or a YAML file; and its text. Raises MappingError, FileNotFoundError."""
    folder = importlib.resources.files("configs") / "mappings"
    presets = sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))
    if name in presets:
        text = (folder / f"{name}.yaml").read_text()
    elif Path(name).is_file():
        text = Path(name).read_text()
    else:
        close = difflib.get_close_matches(name, presets, n=1)
        raise FileNotFoundError(
            f"mapping={name} is no file and no preset; " + (f"did you mean {close[0]}?" if close else f"presets: {', '.join(presets)}")
        )
    return parse_mapping(text, name), text


def parse_mapping(text: str, name: str) -> Mapping:
    """The mapping in a YAML text. name: what errors call it. Raises MappingError."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MappingError(f"mapping {name} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise MappingError(f"mapping {name} is {type(values).__name__}, expected keys such as cameras and actions")
    _require_known(values, Mapping, name, "")
    try:
        return TypeAdapter(Mapping).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("literal", "tuple"))) or "it"
        raise MappingError(f"mapping {name}: {where}: {first['msg'].removeprefix('Value error, ')} (got {first['input']!r})") from error


NESTED: dict[tuple[type, str], type] = {
    (Mapping, "cameras"): dict,
    (Mapping, "actions"): ActionMap,
    (Mapping, "state"): StateMap,
    **{(kind, "position"): Piece for kind in (ActionMap, StateMap)},
    **{(kind, "joints"): Piece for kind in (ActionMap, StateMap)},
    **{(kind, "rotation"): RotationPiece for kind in (ActionMap, StateMap)},
    **{(kind, "gripper"): GripperPiece for kind in (ActionMap, StateMap)},
}


def _require_known(values: Any, kind: type, name: str, path: str) -> None:
    """Unknown keys are an error that names the nearest known one: pydantic would pass over them."""
    if not isinstance(values, dict) or not is_dataclass(kind):
        return
    known = [option.name for option in fields(kind)]
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise MappingError(f"mapping {name}: unknown key {f'{path}{key}'!r}; {hint}")
        nested = NESTED.get((kind, key))
        if nested is dict and isinstance(value, dict):
            for camera, inner in value.items():
                _require_known(inner, CameraMap, name, f"{path}{key}.{camera}.")
        elif nested:
            _require_known(value, nested, name, f"{path}{key}.")
