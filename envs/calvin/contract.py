"""What every CALVIN environment here accepts and declares: options, spaces, actions, reset states and seeds, checked by name.

`envs.calvin.CalvinEnv` and the adapter for the original calvin_env share it, so that a policy meets the same spaces and errors in both.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.spec import (
    GRIPPER_CLOSE,
    GRIPPER_OPEN,
    OBSERVATION,
    ROBOT_OBS,
    SCENE_OBS,
    SENSORS,
    InvalidAction,
    check_action,
    real_array,
)

OBSERVE_MODES = ("always", "on_demand")
ACTION_SPACES = ("relative", "absolute", "joint")
LIGHTS = slice(4, 6)
LARGEST = 1e3
"""No state or goal has an entry beyond this (metres, radians). PyBullet never comes back from numbers near the largest float."""
ACTION_SIZES = {"relative": 7, "absolute": 7, "joint": 8}


def choose(option: str, value: Any, known: tuple[str, ...]) -> str:
    """`value` if it is one of `known`. Raises ValueError naming the nearest known one."""
    if value not in known:
        close = difflib.get_close_matches(str(value), known, n=1)
        raise ValueError(f"{option}={value!r} is not one of {', '.join(known)}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return value


def check_flag(option: str, value: Any) -> bool:
    """`value` if it is a bool. Raises ValueError for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"{option}={value!r} is not a bool; give True or False")
    return value


def check_seed(seed: Any) -> int | None:
    """A non-negative integer or None. Raises ValueError for anything else."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed is {seed!r}, expected a non-negative integer, or None to go on with the present random stream")
    return int(seed)


def observation_space(keys: Iterable[str]) -> spaces.Dict:
    """Gymnasium's space of the named arrays of `envs.spec.OBSERVATION` and `SENSORS`."""
    return spaces.Dict({key: _array_space(key) for key in keys})


def _array_space(key: str) -> spaces.Box:
    spec = OBSERVATION[key] if key in OBSERVATION else SENSORS[key]
    if spec.dtype == "uint8":
        return spaces.Box(0, 255, spec.shape, np.uint8)
    low = 0 if key in SENSORS else -np.inf  # depths are not negative
    return spaces.Box(low, np.inf, spec.shape, np.dtype(spec.dtype))


def action_space(mode: str) -> spaces.Box:
    """Gymnasium's space of an action mode; only relative actions are bounded."""
    size = ACTION_SIZES[mode]
    if mode == "relative":
        return spaces.Box(-1.0, 1.0, (size,), np.float32)
    bound = np.full(size, np.inf)
    bound[-1] = GRIPPER_OPEN
    return spaces.Box(-bound, bound, (size,), np.float64)


def check_action_in(mode: str, action: Any) -> np.ndarray:
    """The action as float64 (7,), or (8,) for joints. Raises InvalidAction saying what is wrong with it."""
    if mode == "relative":
        return check_action(action)
    array = real_array(action, (ACTION_SIZES[mode],))
    if np.abs(array).max() > LARGEST:
        raise InvalidAction(f"action {array.tolist()} has an entry beyond {LARGEST:g}; expected metres and radians")
    if array[-1] not in (GRIPPER_CLOSE, GRIPPER_OPEN):
        raise InvalidAction(f"gripper command is {array[-1]}, expected exactly -1 (close) or +1 (open)")
    return array


def check_states(options: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """robot_obs (15,) and scene_obs (24,) of reset's options as float64; None where not given.

    Raises ValueError for options that are not a dict, for an unknown key, and for a state that is not numeric, not finite, of another
    shape or beyond LARGEST.
    """
    if options is None:
        return None, None
    if not isinstance(options, Mapping):
        raise ValueError(f"reset options are a {type(options).__name__}, expected a dict with {ROBOT_OBS} and {SCENE_OBS}, or None")
    for key in options:
        if key not in (ROBOT_OBS, SCENE_OBS):
            raise ValueError(f"unknown reset option {key!r}; known: {ROBOT_OBS}, {SCENE_OBS}")
    robot_obs, scene_obs = _state(options, ROBOT_OBS), _state(options, SCENE_OBS)
    if scene_obs is not None and not np.isin(scene_obs[LIGHTS], (0, 1)).all():
        raise ValueError(f"reset option {SCENE_OBS} has bulb and LED at {scene_obs[LIGHTS].tolist()}, expected 0 or 1")
    return robot_obs, scene_obs


def _state(options: Mapping, key: str) -> np.ndarray | None:
    value = options.get(key)
    if value is None:
        return None
    try:
        state = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reset option {key} is no array of numbers: {error}") from error
    expected = OBSERVATION[key].shape
    if state.shape != expected:
        raise ValueError(f"reset option {key} has shape {state.shape}, expected {expected}: {OBSERVATION[key].meaning}")
    if not np.isfinite(state).all():
        raise ValueError(f"reset option {key} has a NaN or infinite entry: {state.tolist()}")
    if np.abs(state).max() > LARGEST:
        raise ValueError(f"reset option {key} has an entry beyond {LARGEST:g}: {state.tolist()}; expected {OBSERVATION[key].meaning}")
    return state
