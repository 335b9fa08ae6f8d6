"""Snapshot and restore of the whole simulated state, exact to the last bit.

    snapshot = env.snapshot()
    ...
    observation, info = env.restore(snapshot)       # here, in another environment, or in another process

PyBullet's own saved states are not exact: they lack what is cached about contacts, so a restored world moves off at the first step, and
contact makes millimetres of it. But a reset gives the state of a fresh process, and from there the state is a function of the motor
commands. So a snapshot is where the episode began and the commands since. Restoring resets, plays them again without images, and
compares the state that results with the recorded one: where they differ, nothing is returned but an error.

Price: recording takes a microsecond and 64 bytes a step, of at most MAX_STEPS (6.4 MB, 55 minutes of an episode); a snapshot takes 0.15 ms.
Restoring takes a reset and nine tenths of what stepping without images took: on a busy machine 0.14 s of one core's time after 60 steps,
0.73 s after 360 and 3.2 s after 1800 with our own assets; 0.19, 1.1 and 4.1 s with the original ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pybullet as pb

from envs.calvin.scenes import Scene

if TYPE_CHECKING:
    from envs.calvin.simulation import Simulation

MAX_STEPS = 100_000
COMMAND_DIM = 8
FORMAT = 1


class SnapshotMismatch(ValueError):
    """A snapshot that does not belong here, or whose state could not be reached again. The environment has to be reset."""


class SnapshotUnavailable(ValueError):
    """The episode has become too long for a snapshot."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """One moment of an episode. Made by `CalvinEnv.snapshot()`; pickles, and goes through JSON without loss."""

    scene: str
    version: str  # calvin_env commit whose behaviour was followed
    assets_sha256: str  # of the scene's URDF files
    randomization: dict[str, Any] | None  # fields of the environment's Randomization
    robot_obs: np.ndarray | None  # float64 (15,), as given to reset
    scene_obs: np.ndarray | None  # float64 (24,), as given to reset
    rng_at_reset: dict[str, Any]  # state of np_random's bit generator before the reset drew from it
    rng: dict[str, Any]  # and now
    commands: np.ndarray  # float64 (T, 8): joint angle targets [rad], gripper (+1 open, -1 close), of every step since the reset
    target: np.ndarray  # float64 (6,): target pose of relative actions, position [m] and Euler angles [rad]
    state: np.ndarray  # what the replay is compared with; see state_vector

    def to_json(self) -> str:
        """This snapshot as JSON text; floats are written so that they are read back exactly."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({"format": FORMAT} | fields, default=_plain)

    @classmethod
    def from_json(cls, text: str) -> Snapshot:
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a snapshot: {error}") from error
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT or set(fields) != known:
            raise ValueError(f"not a snapshot of format {FORMAT}: expected a JSON object with format, {', '.join(sorted(known))}")
        for name in ("robot_obs", "scene_obs", "target", "state", "commands"):
            given = fields[name] is not None or name not in ("robot_obs", "scene_obs")
            fields[name] = np.array(fields[name], dtype=np.float64) if given else None
        fields["commands"] = fields["commands"].reshape(-1, COMMAND_DIM)
        return cls(**fields)


class History:
    """What an episode needs to be played again: how it began, and its motor commands, step by step."""

    def __init__(self, robot_obs: np.ndarray | None, scene_obs: np.ndarray | None, rng_state: dict[str, Any]):
        self.robot_obs, self.scene_obs, self.rng_state = robot_obs, scene_obs, rng_state
        self._commands = array("d")
        self.steps = 0

    def record(self, joints_rad: np.ndarray, gripper: int) -> None:
        """One control step. Past MAX_STEPS nothing more is kept."""
        if self.steps < MAX_STEPS:
            self._commands.extend(joints_rad)
            self._commands.append(gripper)
        self.steps += 1

    def commands(self) -> np.ndarray:
        """float64 (T, 8), a copy. Raises SnapshotUnavailable after more than MAX_STEPS."""
        if self.steps > MAX_STEPS:
            raise SnapshotUnavailable(
                f"the episode has {self.steps} steps and only {MAX_STEPS} are kept for a snapshot; reset more often, or start over from "
                "a state by reset(options=...)"
            )
        return np.array(self._commands, dtype=np.float64).reshape(-1, COMMAND_DIM)


def state_vector(simulation: Simulation) -> np.ndarray:
    """Everything that moves, as float64: joints of arm and table (position, velocity), blocks (pose, velocity), gripper, button, lights."""
    client = simulation.client
    values: list[float] = []
    for uid in (simulation.robot, simulation.table):
        joints = range(pb.getNumJoints(uid, physicsClientId=client))
        values += [number for state in pb.getJointStates(uid, joints, physicsClientId=client) for number in state[:2]]
    for uid in simulation.blocks.values():
        pose = pb.getBasePositionAndOrientation(uid, physicsClientId=client)
        values += [number for part in (*pose, *pb.getBaseVelocity(uid, physicsClientId=client)) for number in part]
    values += [simulation.gripper_command, simulation.button_on, simulation.button_was_pressed, simulation.switch_on]
    return np.array([*values, *simulation.lights.values()], dtype=np.float64)


def replay(simulation: Simulation, commands: np.ndarray, substeps: int) -> None:
    """Play motor commands (T, 8) again, `substeps` physics steps each, from where the simulation is."""
    for row in commands:
        simulation.command(row[:-1], int(row[-1]))
        simulation.substep(substeps)
        simulation.update_lights()


def check_same_state(simulation: Simulation, snapshot: Snapshot) -> None:
    """Raises SnapshotMismatch unless the simulation is in the snapshot's state, to the last bit."""
    now = state_vector(simulation)
    if now.shape == snapshot.state.shape and np.array_equal(now, snapshot.state):
        return
    where = "they have different lengths"
    if now.shape == snapshot.state.shape:
        where = f"the largest difference is {np.abs(now - snapshot.state).max():.2g}"
    raise SnapshotMismatch(
        f"replaying {len(snapshot.commands)} steps in scene {snapshot.scene} did not lead to the snapshot's state: {where}. Bodies were "
        "moved outside of step() and reset(), or the snapshot was taken with another PyBullet or processor. Reset the environment"
    )


def fingerprint(scene: Scene, folder: Path) -> str:
    """SHA-256 over the URDF files that `scene` loads from asset folder `folder`."""
    digest = hashlib.sha256()
    for name in scene.files:
        digest.update(name.encode() + b"\0" + (folder / name).read_bytes() + b"\0")
    return digest.hexdigest()


def generator_in(state: dict[str, Any]) -> np.random.Generator:
    """A NumPy generator in a recorded state. Raises SnapshotMismatch where NumPy has no such bit generator."""
    kind = getattr(np.random, str(state.get("bit_generator")), None)
    if not (isinstance(kind, type) and issubclass(kind, np.random.BitGenerator)):
        raise SnapshotMismatch(f"the snapshot's random stream is of kind {state.get('bit_generator')!r}, which NumPy does not know")
    bits = kind()
    bits.state = state
    return np.random.Generator(bits)


def _plain(value: Any) -> Any:
    """Arrays and NumPy numbers as JSON knows them."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"a snapshot cannot hold a {type(value).__name__}")
