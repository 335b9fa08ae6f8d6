"""CALVIN's original simulator, the package calvin_env, behind the same contract as `envs.calvin.CalvinEnv`.

    env = OfficialCalvinEnv(scene="D", assets="calvin_env/data")
    observation, info = env.reset(seed=0)

The installed package runs as it is: its own classes load, step and draw. It gets its configuration from here, without Hydra's
configuration folder, and is kept from asking git for its commit, from printing and from replacing Python's exception hook.

Source: calvin_env 1431a46 and 797142c, `envs/play_table_env.py`, `conf/robot/panda_longer_finger.yaml`, `conf/scene/*`, `conf/cameras/*`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ClosedEnvironmentError, ResetNeeded

from envs.calvin import contract, scenes
from envs.calvin.contract import ACTION_SPACES, OBSERVE_MODES, check_action_in, check_seed, check_states, choose
from envs.calvin.scenes import FETCHED_ASSETS, Camera, Scene, asset_folder, scene_named
from envs.calvin.simulation import (
    ARM_FORCE_N,
    ARM_JOINTS,
    ARM_VELOCITY,
    FINGER_JOINTS,
    FINGER_OPEN_M,
    GRIPPER_CLOSE_FORCE_N,
    HEAD,
    JOINT_HIGH_RAD,
    JOINT_LOW_RAD,
    LOADING_SEED,
    PINNED,
    TCP_LINK,
)
from envs.spec import CONTROL_HZ, OBSERVATION, PHYSICS_HZ, RGB_GRIPPER, RGB_STATIC, ROBOT_OBS, SCENE_OBS, STATES

PACKAGE = "calvin_env"
RENDERER = "PyBullet TinyRenderer (CPU)"
INSTALL = "pip install 'emu3-vla[calvin]'"

MODULES = (
    "camera/camera.py",
    "camera/gripper_camera.py",
    "camera/static_camera.py",
    "envs/play_table_env.py",
    "robot/mixed_ik.py",
    "robot/robot.py",
    "scene/objects/base_object.py",
    "scene/objects/button.py",
    "scene/objects/door.py",
    "scene/objects/fixed_object.py",
    "scene/objects/light.py",
    "scene/objects/movable_object.py",
    "scene/objects/switch.py",
    "scene/play_table_scene.py",
    "utils/utils.py",
)
"""The part of the package that runs here; its content tells one version from another."""

VERSIONS = {
    "02034dfc5e8793710f8c9ca420dc1ae825ce1527ea2f52865cb5bc4126d13fbe": PINNED,
    "7666a2f6bbe23e89e2bcb60f0b343dbd0ab16704e886b89c89e9493349529484": HEAD,
}
"""SHA-256 of those modules → the commit that they are of. Commits after 797142c have not touched them."""


def package_folder() -> Path:
    """Where calvin_env is installed, found without importing it.

    Raises ImportError where it is not installed, or only in part: at 1431a46 most of its folders are no packages to setuptools, so an
    installation of that commit is complete only as an editable one.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise ImportError(f"the original simulator, the package {PACKAGE}, is not installed: {INSTALL}")
    if found.origin is None:
        hiding = ", ".join(found.submodule_search_locations)
        raise ImportError(f"Python takes the folder {hiding} for the package {PACKAGE}: work in another folder, and if need be {INSTALL}")
    folder = Path(found.origin).parent
    missing = [name for name in MODULES if not (folder / name).is_file()]
    if missing:
        raise ImportError(
            f"the package {PACKAGE} in {folder} is incomplete: no {missing[0]}. Commit {PINNED} installs completely only from a checkout, "
            f"by pip install -e; or install {HEAD}: {INSTALL}"
        )
    return folder


def installed_version() -> str:
    """Which calvin_env is installed, by its content: "1431a46", "797142c", or "unknown (sha256 …)". Raises ImportError as above."""
    folder, digest = package_folder(), hashlib.sha256()
    for name in MODULES:
        content = (folder / name).read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return VERSIONS.get(digest.hexdigest(), f"unknown (sha256 {digest.hexdigest()[:12]})")


def official_assets(assets: str | Path | None, scene: Scene) -> Path:
    """calvin_env's `data/` folder: `assets`, or the one beside the package where it is installed from a checkout, or the fetched one.

    Raises FileNotFoundError naming what is missing.
    """
    if assets:
        return asset_folder(scene, assets).resolve()
    beside = package_folder().parent / "data"
    return asset_folder(scene, beside if beside.is_dir() else FETCHED_ASSETS).resolve()


class OfficialCalvinEnv(gymnasium.Env):
    """One CALVIN scene in the original simulator.

    scene: "A", "B", "C" or "D". assets: calvin_env's `data/` folder; None takes the one beside a package installed from a checkout, or the
    fetched one. observe: "always" puts both images into every observation, at the published loop's price; "on_demand" leaves them out
    until `observe()` is called. action_space: "relative" Box(-1, 1, (7,)) in units of 0.02 m and 0.05 rad, added to a persistent target
    pose; "absolute" (7,): position [m], Euler angles [rad], gripper; "joint" (8,): seven angles [rad], gripper (not in 1431a46). The
    gripper is exactly +1 (open) or -1 (close). seed: of the first `reset()` that is given none.

    Of the original, and left as it is: a reset is not a new beginning. The first one of an environment gives the states that CalvinEnv
    gives, bit for bit. A later one inherits PyBullet's contact caches (blocks some 0.1 mm apart, a jammed arm up to 4 cm after 120
    steps), the last gripper action, and whether the button was pressed; so what an episode does depends on the episodes before it.

    Raises ImportError where calvin_env is not installed or cannot be imported, ValueError for an unknown option, FileNotFoundError for
    missing assets. After `close()` everything raises gymnasium.error.ClosedEnvironmentError, before the first reset ResetNeeded.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}

    def __init__(
        self,
        scene: str = "D",
        assets: str | Path | None = None,
        observe: str = "always",
        action_space: str = "relative",
        seed: int | None = None,
        *,
        render_mode: str = "rgb_array",
    ):
        self.simulator: Any = None
        self._started = False
        self.observe_mode = choose("observe", observe, OBSERVE_MODES)
        self.action_mode = choose("action_space", action_space, ACTION_SPACES)
        self.render_mode = choose("render_mode", render_mode, tuple(self.metadata["render_modes"]))
        self.scene = scene_named(scene)
        self.version = installed_version()
        self.assets = official_assets(assets, self.scene)
        self.observation_space = contract.observation_space(OBSERVATION if observe == "always" else STATES)
        self.action_space = contract.action_space(action_space)
        self._seed = check_seed(seed)
        self.simulator = _simulator(self.scene, self.assets, self.version, renders=observe == "always")
        if action_space == "joint" and not hasattr(self.simulator.robot, "control_motors"):
            self.close()
            raise ValueError(f"action_space='joint' needs calvin_env {HEAD}; the installed one, {self.version}, has no joint control")

    @property
    def renderer(self) -> str:
        """What draws the images, for results: without a window and without its EGL plugin PyBullet has one renderer."""
        return RENDERER

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """calvin_env's reset, which keeps traces of what went before (see the class).

        options: {"robot_obs": (15,), "scene_obs": (24,)} restores a recorded state (joints, finger width, fixtures, lights, blocks); a
        missing one is the neutral pose, or fixtures at zero with blocks at random places drawn from `seed`, the same as CalvinEnv's.
        """
        self._check_open()
        robot_obs, scene_obs = check_states(options)
        seed = check_seed(seed)
        if seed is None:
            seed, self._seed = self._seed, None
        super().reset(seed=seed)
        scene = self.simulator.scene
        for placed in (scene, *scene.movable_objects):
            placed.np_random = self.np_random
        observation = self.simulator.reset(robot_obs, scene_obs)
        self._started = True
        return _flat(observation), self.info()

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """One control step of 1/30 s. Raises InvalidAction, moving nothing, for an action that is not finite, in range and in shape."""
        observation, _, _, info = self._running().step(self._command(action))
        return _flat(observation), 0.0, False, False, info

    def observe(self) -> dict[str, np.ndarray]:
        """The full observation now, both images rendered."""
        simulator = self._running()
        return _flat({"rgb_obs": simulator.get_camera_obs()[0], **simulator.get_state_obs()})

    def state(self) -> dict[str, np.ndarray]:
        """robot_obs and scene_obs now; nothing is rendered."""
        return _flat(self._running().get_state_obs())

    def info(self) -> dict[str, Any]:
        """calvin_env's info: "robot_info" and "scene_info" with contacts, as the task oracle reads them."""
        return self._running().get_info()

    def render(self) -> np.ndarray:
        """uint8 (200, 200, 3) from the static camera."""
        static = next(camera for camera in self._running().cameras if camera.name == "static")
        return np.ascontiguousarray(static.render()[0])

    def close(self) -> None:
        """Release the simulator. Harmless when done twice."""
        if self.simulator is not None:
            self.simulator.close()

    def _check_open(self) -> None:
        if self.simulator is None or self.simulator.cid < 0:
            raise ClosedEnvironmentError("this OfficialCalvinEnv has been closed; make a new one")

    def _running(self) -> Any:
        self._check_open()
        if not self._started:
            raise ResetNeeded("no episode has been started; call reset() first")
        return self.simulator

    def _command(self, action: np.ndarray) -> Any:
        """The action in the form in which both versions take it: never the caller's own array, which 1431a46 would scale in place."""
        action = np.array(check_action_in(self.action_mode, action))
        if self.action_mode == "relative":
            return action
        if self.action_mode == "absolute":
            return action[:3], action[3:6], int(action[-1])
        return {"type": "joint_abs", "action": action}


def _flat(observation: dict[str, Any]) -> dict[str, np.ndarray]:
    """CalvinEnv's keys for what calvin_env observed."""
    images = observation.get("rgb_obs", {})
    return {key: np.ascontiguousarray(images[key]) for key in (RGB_STATIC, RGB_GRIPPER) if key in images} | {
        key: np.asarray(observation[key], dtype=np.float64) for key in (ROBOT_OBS, SCENE_OBS)
    }


# -- the package


def _simulator(scene: Scene, assets: Path, version: str, *, renders: bool) -> Any:
    """calvin_env's PlayTableSimEnv with `scene` loaded, headless. renders: whether resets and steps draw the images, as published."""
    from omegaconf import OmegaConf

    module = _imported()
    with _replaced(module, "get_git_commit_hash", lambda path: version):  # asked for a log line, and fails outside a git checkout
        return _quieter(module)(
            renders,
            robot_cfg=OmegaConf.create(_robot(assets)),
            scene_cfg=OmegaConf.create(_scene(scene, assets)),
            cameras=OmegaConf.create({"static": _static_camera(), "gripper": _gripper_camera()}),
            seed=LOADING_SEED,
            bullet_time_step=float(PHYSICS_HZ),
            control_freq=CONTROL_HZ,
            use_vr=False,
            show_gui=False,
            use_egl=False,
            use_scene_info=True,
        )


@functools.cache
def _imported() -> ModuleType:
    """The module calvin_env.envs.play_table_env. Raises ImportError saying which of its dependencies is missing."""
    folder = package_folder()
    hook, git_check = sys.excepthook, os.environ.get("GIT_PYTHON_REFRESH")
    os.environ["GIT_PYTHON_REFRESH"] = "quiet"  # GitPython would not be imported on a machine without git
    try:
        with _silence(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gym's about its age, and others that a user of ours can do nothing about
            return importlib.import_module(f"{PACKAGE}.envs.play_table_env")
    except ImportError as error:
        helps = f"{INSTALL} brings what it needs, opencv-python-headless spares libGL"
        raise ImportError(f"the package {PACKAGE} in {folder} cannot be imported: {error}; {helps}") from error
    finally:
        sys.excepthook = hook  # 1431a46 has Rich print every later traceback, local variables included
        if git_check is None:
            del os.environ["GIT_PYTHON_REFRESH"]
        else:
            os.environ["GIT_PYTHON_REFRESH"] = git_check


@functools.cache
def _quieter(module: ModuleType) -> type:
    """PlayTableSimEnv without its prints, able to leave out the images, and at home in any physics client."""

    class QuietSimulator(module.PlayTableSimEnv):
        def __init__(self, renders: bool, **options: Any):
            self.renders = renders
            super().__init__(**options)

        def initialize_bullet(self, *arguments: Any) -> int:
            with _silence():
                return super().initialize_bullet(*arguments)

        def load(self) -> None:
            # The robot's pedestal would go to PyBullet's client 0, into the world of whatever other simulator came first in this process.
            with _replaced(importlib.import_module(f"{PACKAGE}.robot.robot"), "p", self.p):
                super().load()

        def get_obs(self) -> dict[str, Any]:
            return super().get_obs() if self.renders else self.get_state_obs()

        def close(self) -> None:
            if getattr(self, "cid", -1) >= 0:
                self.p.disconnect()
                self.cid = -1

    return QuietSimulator


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing reaches standard output or standard error, from C neither (PyBullet prints when it connects)."""
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    saved, nowhere = [os.dup(number) for number in (1, 2)], os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # what C has buffered would come out afterwards
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
        for number in (*saved, nowhere):
            os.close(number)


# -- its configuration, in the words of its constructors


def _robot(assets: Path) -> dict[str, Any]:
    return {
        "_target_": f"{PACKAGE}.robot.robot.Robot",
        "filename": str(assets / scenes.ROBOT_URDF),
        "base_position": list(scenes.ROBOT_BASE_POSITION),
        "base_orientation": [0, 0, 0],
        "initial_joint_positions": list(scenes.NEUTRAL_JOINTS_RAD),
        "max_joint_force": ARM_FORCE_N,
        "gripper_force": GRIPPER_CLOSE_FORCE_N,
        "arm_joint_ids": list(ARM_JOINTS),
        "lower_joint_limits": JOINT_LOW_RAD.tolist(),
        "upper_joint_limits": JOINT_HIGH_RAD.tolist(),
        "gripper_joint_ids": list(FINGER_JOINTS),
        "gripper_joint_limits": [0, FINGER_OPEN_M],
        "tcp_link_id": TCP_LINK,
        "end_effector_link_id": len(ARM_JOINTS),
        "use_nullspace": True,
        "max_velocity": ARM_VELOCITY,
        "use_ik_fast": False,
        "euler_obs": True,
        "use_target_pose": True,
    }


def _scene(scene: Scene, assets: Path) -> dict[str, Any]:
    effects = {scenes.BUTTON: scenes.LED, scenes.SWITCH: scenes.LIGHTBULB}
    table = {
        "file": scene.table_urdf,
        "initial_pos": [0, 0, 0],
        "initial_orn": [0, 0, 0],
        "joints": {joint: {"initial_state": 0} for joint in (scenes.SLIDE, scenes.DRAWER)},
        "buttons": {scenes.BUTTON: {"initial_state": 0, "effect": effects[scenes.BUTTON]}},
        "switches": {scenes.SWITCH: {"initial_state": 0, "effect": effects[scenes.SWITCH]}},
        "lights": {light: {"link": link, "color": list(scenes.LIGHT_ON_RGBA[light])} for light, link in scenes.LIGHT_LINKS.items()},
    }
    return {
        "_target_": f"{PACKAGE}.scene.play_table_scene.PlayTableScene",
        "_recursive_": False,
        "data_path": str(assets),
        "global_scaling": scenes.GLOBAL_SCALING,
        "euler_obs": True,
        "surfaces": {name: [list(low), list(high)] for name, (low, high) in scene.surfaces.items()},
        "objects": {
            "fixed_objects": {"table": table},
            "movable_objects": {name: {"file": urdf, "initial_pos": "any", "initial_orn": "any"} for name, urdf in scene.blocks.items()},
        },
    }


def _camera(name: str, camera: Camera) -> dict[str, Any]:
    return {
        "_target_": f"{PACKAGE}.camera.{name}_camera.{name.capitalize()}Camera",
        "name": name,
        "fov": camera.fov_deg,
        "aspect": camera.width / camera.height,
        "nearval": camera.near_m,
        "farval": camera.far_m,
        "width": camera.width,
        "height": camera.height,
    }


def _static_camera() -> dict[str, Any]:
    camera = scenes.STATIC_CAMERA
    placed = {"look_at": camera.look_at, "look_from": camera.look_from, "up_vector": camera.up}
    return _camera("static", camera) | {key: list(value) for key, value in placed.items()}


def _gripper_camera() -> dict[str, Any]:
    return _camera("gripper", scenes.GRIPPER_CAMERA)
