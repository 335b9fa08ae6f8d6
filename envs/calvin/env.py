"""CALVIN's tabletop as a Gymnasium environment.

    env = CalvinEnv(scene="D")
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(np.array([0, 0, 1, 0, 0, 0, 1], np.float32))

30 Hz control over 240 Hz physics. There is no reward and no end: tasks are judged by `envs.calvin.tasks.completed_tasks`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ClosedEnvironmentError, ResetNeeded

from envs.calvin import contract
from envs.calvin.contract import ACTION_SPACES, OBSERVE_MODES
from envs.calvin.images.cameras import RENDERERS
from envs.calvin.randomization import Randomization
from envs.calvin.scenes import NEUTRAL_JOINTS_RAD, asset_folder, scene_named
from envs.calvin.simulation import FINGER_OPEN_M, HEAD, LOADING_SEED, PINNED, Simulation
from envs.calvin.snapshot import (
    History,
    Snapshot,
    SnapshotMismatch,
    check_same_state,
    fingerprint,
    generator_in,
    replay,
    state_vector,
)
from envs.calvin.tactile import TactileSensors
from envs.spec import (
    CONTROL_HZ,
    DEPTH_GRIPPER,
    DEPTH_STATIC,
    DEPTH_TACTILE,
    OBSERVATION,
    PHYSICS_HZ,
    RGB_GRIPPER,
    RGB_STATIC,
    RGB_TACTILE,
    ROBOT_OBS,
    SCENE_OBS,
    STATES,
)

VERSIONS = (PINNED, HEAD)
SUBSTEPS = PHYSICS_HZ // CONTROL_HZ


class CalvinEnv(gymnasium.Env):
    """One CALVIN scene.

    scene: "A", "B", "C" or "D". assets: None for our own low-polygon scenes, or calvin_env's `data/` folder.
    observe: "always" puts all sensors into every observation; "on_demand" leaves images out until `observe()` is called.
    action_space: "relative" Box(-1, 1, (7,)) in units of 0.02 m and 0.05 rad, added to a persistent target pose; "absolute" (7,):
    position [m], Euler angles [rad], gripper; "joint" (8,): seven angles [rad], gripper. The gripper is exactly +1 (open) or -1 (close).
    version: the calvin_env commit whose behaviour is followed: "1431a46" (pinned by CALVIN: the LED's button is logically off after
    a reset) or "797142c" (it takes the light's state). seed: of the first `reset()` that is given none.
    depth: adds `depth_static` and `depth_gripper`. tactile: adds `rgb_tactile` and `depth_tactile` (see `envs.calvin.tactile`).
    renderer: "tiny" (PyBullet's own, on the CPU) or "egl" (GPU); never replaced by another one.
    randomization: what is drawn anew at each reset, from the environment's own random stream: same seed, same images and blocks. With
    one, blocks stand in one fixed arrangement unless it says `block_poses`; without one, they are drawn from the seed, as in CALVIN. A
    scene_obs that is given to `reset` is restored as it is, blocks included, whatever `block_poses` says.

    Raises ValueError for an unknown option, FileNotFoundError for missing assets, `cameras.RendererUnavailable` where the renderer
    cannot run. After `close()` everything raises gymnasium.error.ClosedEnvironmentError, before the first reset ResetNeeded.
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
        *,
        depth: bool = False,
        tactile: bool = False,
        renderer: str = "tiny",
        randomization: Randomization | None = None,
        render_mode: str = "rgb_array",
    ):
        self.simulation: Simulation | None = None
        self._history: History | None = None
        self.observe_mode = contract.choose("observe", observe, OBSERVE_MODES)
        self.action_mode = contract.choose("action_space", action_space, ACTION_SPACES)
        self.version = contract.choose("version", version, VERSIONS)
        self.render_mode = contract.choose("render_mode", render_mode, tuple(self.metadata["render_modes"]))
        contract.choose("renderer", renderer, RENDERERS)
        if randomization is not None and not isinstance(randomization, Randomization):
            raise ValueError(f"randomization is {randomization!r}, expected an envs.calvin.randomization.Randomization, or None")
        self.scene = scene_named(scene)
        self.assets = assets
        self.depth, self.tactile = contract.check_flag("depth", depth), contract.check_flag("tactile", tactile)
        self.randomization = randomization
        self._seed = contract.check_seed(seed)
        self.observation_space = contract.observation_space(self.sensors if observe == "always" else STATES)
        self.action_space = contract.action_space(action_space)
        self._folder = asset_folder(self.scene, assets)
        self.simulation = Simulation(self.scene, self._folder, version, renderer)
        self._touch = TactileSensors(self.simulation) if tactile else None

    @property
    def renderer(self) -> str:
        """What draws the images, vendor included, for results."""
        return self.simulation.renderer

    @property
    def sensors(self) -> tuple[str, ...]:
        """Keys of what `observe()` returns."""
        depth = (DEPTH_STATIC, DEPTH_GRIPPER) if self.depth else ()
        return (*OBSERVATION, *depth, *((RGB_TACTILE, DEPTH_TACTILE) if self.tactile else ()))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Start over, in the state of a fresh process whatever was simulated before.

        options: {"robot_obs": (15,), "scene_obs": (24,)} restores a recorded state (joints, finger width, fixtures, lights, blocks); a
        missing one is the neutral pose, or fixtures at zero with blocks at random places drawn from `seed`.
        """
        self._check_open()
        states = contract.check_states(options)
        seed = contract.check_seed(seed)
        if seed is None:
            seed, self._seed = self._seed, None
        super().reset(seed=seed)
        self._history = self._begin(*states)
        return self._observation(), self.info()

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """One control step of 1/30 s. Raises InvalidAction, moving nothing, for an action that is not finite, in range and in shape."""
        history = self._running()
        simulation = self.simulation
        joints_rad, gripper = self._joint_targets(contract.check_action_in(self.action_mode, action))
        simulation.command(joints_rad, gripper)
        simulation.substep(SUBSTEPS)
        simulation.update_lights()
        history.record(joints_rad, gripper)
        return self._observation(), 0.0, False, False, self.info()

    def observe(self) -> dict[str, np.ndarray]:
        """The full observation now, with all sensors read."""
        observation = self.state()
        observation[RGB_STATIC], depth_static = self.simulation.render_static()
        observation[RGB_GRIPPER], depth_gripper = self.simulation.render_gripper()
        if self.depth:
            observation[DEPTH_STATIC] = depth_static.astype(np.float32)
            observation[DEPTH_GRIPPER] = depth_gripper.astype(np.float32)
        if self._touch is not None:
            observation[RGB_TACTILE], observation[DEPTH_TACTILE] = self._touch.sense()
        return observation

    def state(self) -> dict[str, np.ndarray]:
        """robot_obs and scene_obs now; nothing is rendered."""
        self._running()
        return {ROBOT_OBS: self.simulation.robot_obs(), SCENE_OBS: self.simulation.scene_obs()}

    def info(self) -> dict[str, Any]:
        """calvin_env's info: "robot_info" and "scene_info" with contacts, as the task oracle reads them."""
        self._running()
        return {"robot_info": self.simulation.robot_info(), "scene_info": self.simulation.scene_info()}

    def render(self) -> np.ndarray:
        """uint8 (200, 200, 3) from the static camera."""
        self._running()
        return self.simulation.render_static()[0]

    def close(self) -> None:
        """Release the simulator. Harmless when done twice."""
        if self.simulation is not None:
            self.simulation.close()

    def __del__(self):
        if getattr(self, "simulation", None) is not None:
            self.close()

    # -- snapshots

    def snapshot(self) -> Snapshot:
        """The whole state now, for `restore`; see `envs.calvin.snapshot`.

        Raises SnapshotUnavailable after more than `snapshot.MAX_STEPS` steps without a reset.
        """
        history = self._running()
        simulation = self.simulation
        return Snapshot(
            **self._identity(),
            robot_obs=history.robot_obs,
            scene_obs=history.scene_obs,
            rng_at_reset=history.rng_state,
            rng=self.np_random.bit_generator.state,
            commands=history.commands(),
            target=np.r_[simulation.target_position, simulation.target_euler],
            state=state_vector(simulation),
        )

    def restore(self, snapshot: Snapshot) -> tuple[dict, dict]:
        """Go on from a snapshot, exactly as the environment that it was taken from: observation and info of that moment.

        Plays its episode's commands again without images: 1 to 2 ms a step. The action space may be another than the snapshot's.
        Raises SnapshotMismatch for a snapshot of another scene, version, randomisation or other assets, or when its state was not
        reached again; then the environment has to be reset.
        """
        self._check_open()
        if not isinstance(snapshot, Snapshot):
            raise SnapshotMismatch(f"restore was given a {type(snapshot).__name__}, expected what snapshot() returned")
        for name, here in self._identity().items():
            if getattr(snapshot, name) != here:
                raise SnapshotMismatch(f"the snapshot has {name} {getattr(snapshot, name)!r}, this environment {here!r}")
        self.np_random = generator_in(snapshot.rng_at_reset)
        history = self._begin(snapshot.robot_obs, snapshot.scene_obs)
        for command in snapshot.commands:
            history.record(command[:-1], command[-1])
        replay(self.simulation, snapshot.commands, SUBSTEPS)
        check_same_state(self.simulation, snapshot)
        self.simulation.target_position, self.simulation.target_euler = snapshot.target[:3].copy(), snapshot.target[3:].copy()
        self.np_random.bit_generator.state = snapshot.rng
        self._history = history
        return self._observation(), self.info()

    def _identity(self) -> dict[str, Any]:
        """What has to agree between a snapshot and the environment that restores it."""
        return {
            "scene": self.scene.name,
            "version": self.version,
            "assets_sha256": fingerprint(self.scene, self._folder),
            "randomization": None if self.randomization is None else dataclasses.asdict(self.randomization),
        }

    # --

    def _begin(self, robot_obs: np.ndarray | None, scene_obs: np.ndarray | None) -> History:
        """A fresh world in the given states; what is not given is drawn from np_random: first the blocks, then the look.

        Until the caller takes the history that this returns, there is no episode to go on with.
        """
        self._history = None
        simulation, rng = self.simulation, self.np_random
        history = History(robot_obs, scene_obs, rng.bit_generator.state)
        simulation.fresh()
        if scene_obs is None:
            fixed = self.randomization is not None and not self.randomization.block_poses
            simulation.reset_scene_randomly(np.random.default_rng(LOADING_SEED) if fixed else rng)
        else:
            simulation.reset_scene(scene_obs)
        if robot_obs is None:
            simulation.reset_robot(np.array(NEUTRAL_JOINTS_RAD), 2 * FINGER_OPEN_M)
        else:
            simulation.reset_robot(robot_obs[7:14], robot_obs[6])
        simulation.substep()
        if self.randomization is not None:
            simulation.set_look(self.randomization.draw(rng))
        return history

    def _check_open(self) -> None:
        if self.simulation is None or self.simulation.client < 0:
            raise ClosedEnvironmentError("this CalvinEnv has been closed; make a new one")

    def _running(self) -> History:
        self._check_open()
        if self._history is None:
            raise ResetNeeded("no episode has been started (or a snapshot could not be restored); call reset() first")
        return self._history

    def _observation(self) -> dict[str, np.ndarray]:
        return self.observe() if self.observe_mode == "always" else self.state()

    def _joint_targets(self, action: np.ndarray) -> tuple[np.ndarray, int]:
        """Seven joint angles [rad] and the gripper's command, of a checked action."""
        simulation, gripper = self.simulation, int(action[-1])
        if self.action_mode == "relative":
            return simulation.inverse_kinematics(*simulation.relative_target(action)), gripper
        if self.action_mode == "absolute":
            return simulation.inverse_kinematics(action[:3], action[3:6]), gripper
        return action[:7], gripper
