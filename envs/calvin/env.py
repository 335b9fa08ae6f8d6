"""CALVIN's tabletop as a Gymnasium environment.

    env = CalvinEnv(scene="D")
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(np.array([0, 0, 1, 0, 0, 0, 1], np.float32))

30 Hz control over 240 Hz physics. There is no reward and no end: tasks are judged by `envs.calvin.tasks.completed_tasks`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.calvin.scenes import NEUTRAL_JOINTS_RAD, asset_folder, scene_named
from envs.calvin.simulation import FINGER_OPEN_M, HEAD, PINNED, Simulation
from envs.spec import (
    CONTROL_HZ,
    GRIPPER_CLOSE,
    GRIPPER_OPEN,
    OBSERVATION,
    PHYSICS_HZ,
    RGB_GRIPPER,
    RGB_STATIC,
    ROBOT_OBS,
    SCENE_OBS,
    InvalidAction,
    check_action,
)

OBSERVE_MODES = ("always", "on_demand")
ACTION_SPACES = ("relative", "absolute", "joint")
VERSIONS = (PINNED, HEAD)
SUBSTEPS = PHYSICS_HZ // CONTROL_HZ
RENDERER = "PyBullet TinyRenderer (CPU)"


class CalvinEnv(gymnasium.Env):
    """One CALVIN scene.

    scene: "A", "B", "C" or "D". assets: None for our own low-polygon scenes, or calvin_env's `data/` folder.
    observe: "always" puts both images into every observation; "on_demand" leaves them out until `observe()` is called.
    action_space: "relative" Box(-1, 1, (7,)) in units of 0.02 m and 0.05 rad, added to a persistent target pose; "absolute" (7,):
    position [m], Euler angles [rad], gripper; "joint" (8,): seven angles [rad], gripper. The gripper is exactly +1 (open) or -1 (close).
    version: the calvin_env commit whose behaviour is followed: "1431a46" (pinned by CALVIN: the LED's button is logically off after
    a reset) or "797142c" (it takes the light's state). seed: of the first `reset()` that is given none.

    Raises ValueError for an unknown option and FileNotFoundError for missing assets.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}

    def __init__(
        self,
        scene: str = "D",
        assets: str | Path | None = None,
        observe: str = "always",
        action_space: str = "relative",
        version: str = PINNED,
        seed: int | None = None,
    ):
        _choose("observe", observe, OBSERVE_MODES)
        _choose("action_space", action_space, ACTION_SPACES)
        _choose("version", version, VERSIONS)
        self.scene = scene_named(scene)
        self.assets = assets
        self.version = version
        self.observe_mode = observe
        self.action_mode = action_space
        self.render_mode = "rgb_array"
        folder = asset_folder(self.scene, assets)
        keys = OBSERVATION if observe == "always" else (ROBOT_OBS, SCENE_OBS)
        self.observation_space = spaces.Dict({key: _space(key) for key in keys})
        self.action_space = _action_space(action_space)
        self._seed = seed
        self.simulation: Simulation | None = None
        self.simulation = Simulation(self.scene, folder, version)

    @property
    def renderer(self) -> str:
        """What draws the images, for results."""
        return RENDERER

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Start over, in the state of a fresh process whatever was simulated before.

        options: {"robot_obs": (15,), "scene_obs": (24,)} restores a recorded state (joints, finger width, fixtures, lights, blocks); a
        missing one is the neutral pose, or fixtures at zero with blocks at random places drawn from `seed`.
        """
        if seed is None:
            seed, self._seed = self._seed, None
        super().reset(seed=seed)
        robot_obs, scene_obs = _states(options or {})
        simulation = self.simulation
        simulation.fresh()
        if scene_obs is None:
            simulation.reset_scene_randomly(self.np_random)
        else:
            simulation.reset_scene(scene_obs)
        if robot_obs is None:
            simulation.reset_robot(np.array(NEUTRAL_JOINTS_RAD), 2 * FINGER_OPEN_M)
        else:
            simulation.reset_robot(robot_obs[7:14], robot_obs[6])
        simulation.substep()
        return self._observation(), self.info()

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """One control step of 1/30 s. Raises InvalidAction, moving nothing, for an action that is not finite, in range and in shape."""
        simulation = self.simulation
        joints_rad, gripper = self._joint_targets(action)
        simulation.command(joints_rad, gripper)
        simulation.substep(SUBSTEPS)
        simulation.update_lights()
        return self._observation(), 0.0, False, False, self.info()

    def observe(self) -> dict[str, np.ndarray]:
        """The full observation now, both images rendered."""
        return self.state() | {
            RGB_STATIC: self.simulation.render_static()[0],
            RGB_GRIPPER: self.simulation.render_gripper()[0],
        }

    def state(self) -> dict[str, np.ndarray]:
        """robot_obs and scene_obs now; nothing is rendered."""
        return {ROBOT_OBS: self.simulation.robot_obs(), SCENE_OBS: self.simulation.scene_obs()}

    def info(self) -> dict[str, Any]:
        """calvin_env's info: "robot_info" and "scene_info" with contacts, as the task oracle reads them."""
        return {"robot_info": self.simulation.robot_info(), "scene_info": self.simulation.scene_info()}

    def render(self) -> np.ndarray:
        """uint8 (200, 200, 3) from the static camera."""
        return self.simulation.render_static()[0]

    def close(self) -> None:
        """Release the simulator. Harmless when done twice."""
        if self.simulation is not None:
            self.simulation.close()

    def __del__(self):
        if getattr(self, "simulation", None) is not None:
            self.close()

    def _observation(self) -> dict[str, np.ndarray]:
        return self.observe() if self.observe_mode == "always" else self.state()

    def _joint_targets(self, action: np.ndarray) -> tuple[np.ndarray, int]:
        simulation = self.simulation
        if self.action_mode == "relative":
            action = check_action(action)
            return simulation.inverse_kinematics(*simulation.relative_target(action)), int(action[-1])
        action = _check_unbounded(action, self.action_space.shape)
        if self.action_mode == "absolute":
            return simulation.inverse_kinematics(action[:3], action[3:6]), int(action[-1])
        return action[:7], int(action[-1])


def _choose(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        close = difflib.get_close_matches(str(value), known, n=1)
        raise ValueError(f"{option}={value!r} is not one of {', '.join(known)}" + (f"; did you mean {close[0]!r}?" if close else ""))


def _space(key: str) -> spaces.Box:
    spec = OBSERVATION[key]
    if spec.dtype == "uint8":
        return spaces.Box(0, 255, spec.shape, np.uint8)
    return spaces.Box(-np.inf, np.inf, spec.shape, np.dtype(spec.dtype))


def _action_space(mode: str) -> spaces.Box:
    if mode == "relative":
        return spaces.Box(-1.0, 1.0, (7,), np.float32)
    size = 7 if mode == "absolute" else 8
    bound = np.full(size, np.inf)
    bound[-1] = GRIPPER_OPEN
    return spaces.Box(-bound, bound, (size,), np.float64)


def _check_unbounded(action: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(action, dtype=np.float64)
    if array.shape != shape:
        raise InvalidAction(f"action has shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        raise InvalidAction(f"action has a NaN or infinite entry: {array.tolist()}; nothing was sent to the arm")
    if array[-1] not in (GRIPPER_CLOSE, GRIPPER_OPEN):
        raise InvalidAction(f"gripper command is {array[-1]}, expected exactly -1 (close) or +1 (open)")
    return array


def _states(options: dict[str, Any]) -> tuple[np.ndarray | None, np.ndarray | None]:
    for key in options:
        if key not in (ROBOT_OBS, SCENE_OBS):
            raise ValueError(f"unknown reset option {key!r}; known: {ROBOT_OBS}, {SCENE_OBS}")
    states = []
    for key in (ROBOT_OBS, SCENE_OBS):
        value = options.get(key)
        if value is not None:
            value = np.asarray(value, dtype=np.float64)
            if value.shape != OBSERVATION[key].shape:
                raise ValueError(f"reset option {key} has shape {value.shape}, expected {OBSERVATION[key].shape}")
            if not np.isfinite(value).all():
                raise ValueError(f"reset option {key} has a NaN or infinite entry")
        states.append(value)
    return states[0], states[1]
