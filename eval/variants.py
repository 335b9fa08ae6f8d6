"""Variants of the protocol, by name: harder or unfamiliar conditions under which the same chains are run.

What a variant draws depends on (seed, chain, position in the chain) alone, each variant from a stream of its own: adding one leaves the
others' draws as they were, and neither workers nor order nor restarts matter.
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.calvin.language import validation_wordings
from envs.calvin.layout import layout_of
from envs.spec import ACTION_DIM, GRIPPER_CLOSE, GRIPPER_OPEN, ROBOT_OBS
from eval.sequences import BLOCKS_AT, COLOURS, Condition

if TYPE_CHECKING:
    from envs.calvin import CalvinEnv

RESAMPLED_POSES, UNSEEN_WORDINGS, PUSHES, LATENCY, CAMERA_JITTER = NAMES = (
    "resampled_poses",
    "unseen_wordings",
    "pushes",
    "latency",
    "camera_jitter",
)
GROUPS = {"none": (), "disturbances": (PUSHES, LATENCY, CAMERA_JITTER)}

TABLE_MARGIN_M = 0.10  # a block can still be pushed by the ten centimetres that its task asks for
TABLE_Y_M = (-0.14, -0.06)
TABLE_APART_M = 0.12
CABINET_SHIFT_M = 0.03
YAW_RANGE_RAD = (3 / 8 * np.pi, 5 / 8 * np.pi)  # the benchmark's own
PUSH_DRIFT = np.array([1, 1, 0.7, 0.3, 0.3, 0.6])  # largest mean action of a push: x, y, z, rotations
PUSH_NOISE = 0.3


@dataclass(frozen=True, kw_only=True)
class DisturbanceOptions:
    """How strong the disturbances are. Each matters only where its variant is chosen."""

    push_probability: float = 0.5  # share of subtasks with one push
    push_steps: tuple[int, int] = (4, 12)  # shortest and longest push
    push_window: tuple[int, int] = (5, 60)  # first and last step of a subtask at which a push may begin
    observation_latency: int = 2  # control steps: the policy sees what was so long ago
    action_latency: int = 2  # control steps from the decision to the motion; the arm holds still until then
    camera_jitter: float = 1.0  # 1: the static camera up to 5 cm away, the wrist's 4 mm and 0.03 rad; at most 4

    def __post_init__(self):
        if not 0 < self.push_probability <= 1:
            raise ValueError(f"eval.disturbance.push_probability={self.push_probability} is outside (0, 1]")
        for name in ("push_steps", "push_window"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"eval.disturbance.{name}={[low, high]}, expected two ascending numbers from 1")
        if min(self.observation_latency, self.action_latency) < 0 or self.observation_latency + self.action_latency == 0:
            raise ValueError("eval.disturbance: latencies are at least 0, and at least one of them above it")
        if not 0 < self.camera_jitter <= 4:
            raise ValueError(f"eval.disturbance.camera_jitter={self.camera_jitter} is outside (0, 4]")


@dataclass(frozen=True, kw_only=True)
class Variants:
    """The variants of one evaluation; `Variants()` is the plain protocol. Raises ValueError for an unknown name."""

    names: tuple[str, ...] = ()
    disturbance: DisturbanceOptions = field(default_factory=DisturbanceOptions)

    def __post_init__(self):
        for name in self.names:
            _check_name(name, NAMES)

    @property
    def observation_latency(self) -> int:
        """Control steps."""
        return self.disturbance.observation_latency if LATENCY in self.names else 0

    @property
    def action_latency(self) -> int:
        """Control steps."""
        return self.disturbance.action_latency if LATENCY in self.names else 0

    @property
    def camera_jitter(self) -> float:
        """As envs.calvin.randomization.Randomization takes it."""
        return self.disturbance.camera_jitter if CAMERA_JITTER in self.names else 0.0

    def described(self) -> dict[str, str]:
        """Name → what it means here, in words, for results."""
        options = self.disturbance
        words = {
            RESAMPLED_POSES: "poses of the blocks drawn anew for each chain",
            UNSEEN_WORDINGS: "drawn from emu3-vla's validation wordings beyond the first of each task",
            PUSHES: f"in {options.push_probability:.0%} of subtasks {_span(options.push_steps)} random actions take the place of the "
            f"policy's, beginning within steps {_span(options.push_window)}",
            LATENCY: f"observations {options.observation_latency} and actions {options.action_latency} control steps late",
            CAMERA_JITTER: f"cameras displaced for each chain (scale {options.camera_jitter:g})",
        }
        return {name: words[name] for name in NAMES if name in self.names}

    def scene_obs(self, scene_obs: np.ndarray, condition: Condition, scene: str, seed: int, chain: int) -> np.ndarray:
        """The state (24,) that the chain begins in, instead of the official one."""
        if RESAMPLED_POSES not in self.names:
            return scene_obs
        return resample_blocks(scene_obs, condition, scene, _stream(RESAMPLED_POSES, seed, chain))

    def instruction(self, task: str, first: str, seed: int, chain: int, position: int) -> str:
        """What is said for `task`; `first` is what the protocol says."""
        if UNSEEN_WORDINGS not in self.names:
            return first
        wordings = validation_wordings()[task][1:]
        return wordings[_stream(UNSEEN_WORDINGS, seed, chain, position).integers(len(wordings))]

    def push(self, seed: int, chain: int, position: int) -> Push | None:
        """The push that comes in a subtask, if one does."""
        if PUSHES not in self.names:
            return None
        rng = _stream(PUSHES, seed, chain, position)
        return Push(rng, self.disturbance) if rng.random() < self.disturbance.push_probability else None

    def reset_seed(self, seed: int, chain: int) -> int | None:
        """What the environment's own random stream is seeded with; None leaves it, as nothing is drawn from it."""
        return int(_stream(CAMERA_JITTER, seed, chain).integers(2**31)) if self.camera_jitter else None


def chosen_variants(names: str | Sequence[str]) -> tuple[str, ...]:
    """The names that an option gives, groups written out, in the order of NAMES. Raises ValueError for an unknown name."""
    given = (names,) if isinstance(names, str) else tuple(names)
    chosen: set[str] = set()
    for name in given:
        _check_name(name, (*NAMES, *GROUPS))
        chosen.update(GROUPS.get(name, (name,)))
    return tuple(name for name in NAMES if name in chosen)


def resample_blocks(scene_obs: np.ndarray, condition: Condition, scene: str, rng: np.random.Generator) -> np.ndarray:
    """scene_obs (24,) with other block poses in which the same tasks are possible: blocks of the table anywhere on it where they can be
    pushed either way, at least TABLE_APART_M from each other; those of the cabinet shifted along it; every yaw drawn anew."""
    layout = layout_of(scene)
    slots = list(layout.block_lengths)
    scene_obs = scene_obs.copy()
    blocks = scene_obs[BLOCKS_AT:].reshape(3, 6)
    low, high = layout.free_table_x()
    on_table = [slots.index(colour) for colour in COLOURS if condition[f"{colour}_block"] == "table"]
    while True:
        places = np.c_[
            rng.uniform(low + TABLE_MARGIN_M, high - TABLE_MARGIN_M, len(on_table)),
            rng.uniform(*TABLE_Y_M, len(on_table)),
        ]
        if len(places) < 2 or np.linalg.norm(places[0] - places[1]) > TABLE_APART_M:
            break
    blocks[on_table, :2] = places
    in_cabinet = [slot for slot in range(3) if slot not in on_table]
    blocks[in_cabinet, 0] += rng.uniform(-CABINET_SHIFT_M, CABINET_SHIFT_M, len(in_cabinet))
    blocks[:, 5] = rng.uniform(*YAW_RANGE_RAD, 3)
    return scene_obs


class Push:
    """A burst of random actions that takes the place of the policy's: a drift in a random direction with noise on top."""

    def __init__(self, rng: np.random.Generator, options: DisturbanceOptions):
        self.rng = rng
        self.start = int(rng.integers(*options.push_window, endpoint=True))
        self.end = self.start + int(rng.integers(*options.push_steps, endpoint=True))
        self.drift = rng.uniform(-1, 1, ACTION_DIM - 1) * PUSH_DRIFT

    def covers(self, step: int) -> bool:
        """Whether step number `step` of the subtask belongs to it."""
        return self.start <= step < self.end

    def action(self, gripper: float) -> np.ndarray:
        """float64 (7,): the motion, and the gripper left as it was commanded."""
        motion = np.clip(self.drift + self.rng.normal(0, PUSH_NOISE, ACTION_DIM - 1), -1, 1)
        return np.r_[motion, gripper]


class LateEyes:
    """What a policy sees that is shown everything `latency` control steps late, and before that the subtask's first moment.

    Images are rendered only at moments that a decision may ask for.
    """

    def __init__(self, env: CalvinEnv, sees: bool, latency: int):
        self.env, self.sees, self.latency = env, sees, latency
        self.moments: deque[tuple[int, dict[str, Any]]] = deque()

    def look(self, step: int, pending: int, state: dict[str, np.ndarray]) -> None:
        """Called ahead of each step. pending: decided actions that are still to be executed; with more of them than the latency no
        decision can ask for this moment."""
        if pending > self.latency:
            return
        self.moments.append((step, self.env.observe() if self.sees else state))
        while len(self.moments) > 1 and self.moments[1][0] <= step - self.latency:
            self.moments.popleft()

    def seen(self) -> dict[str, Any]:
        """The observation that a decision now is made on."""
        return self.moments[0][1]


class LateHands:
    """Actions on their way to an arm that executes them `latency` control steps late, and holds still until the first arrives."""

    def __init__(self, latency: int):
        self.latency = latency
        self.line: deque[np.ndarray] | None = None

    def executes(self, action: np.ndarray | None, state: dict[str, np.ndarray]) -> np.ndarray:
        """The action that reaches the arm while `action` (None: nothing was decided) sets out. float64 (7,)."""
        still = hold(state)
        if self.line is None:
            self.line = deque([still] * self.latency)
        self.line.append(still if action is None else action)
        return self.line.popleft()


def hold(state: dict[str, np.ndarray]) -> np.ndarray:
    """The action (7,) that keeps the arm where it was sent and its gripper as it was commanded."""
    gripper = GRIPPER_OPEN if state[ROBOT_OBS][-1] > 0 else GRIPPER_CLOSE
    return np.r_[np.zeros(ACTION_DIM - 1), gripper]


def _stream(name: str, *key: int) -> np.random.Generator:
    return np.random.default_rng([NAMES.index(name), *key])


def _span(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]} to {bounds[1]}"


def _check_name(name: str, known: Sequence[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        raise ValueError(f"eval.variant={name} is not one of {', '.join(known)}" + (f"; did you mean {close[0]!r}?" if close else ""))
