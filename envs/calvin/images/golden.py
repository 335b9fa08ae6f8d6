"""Golden states and frames: what every scene gave where this package was made, to compare an installation with.

    python -m envs.calvin.images.golden                                    # records our own scenes anew
    python -m envs.calvin.images.golden path/to/calvin_env/data            # and those with calvin_env's assets

Each scene starts from one fixed state. `FREE` moves the arm through air: nothing is amplified, so the states of a sound installation
agree. `CONTACT` ploughs through the blocks, where a difference in the last bit grows to decimetres: it says whether physics is equal
bit for bit, and is no test. Frames are both cameras at the start. Of calvin_env's assets only means over blocks of pixels are kept,
because its images are not ours to give away.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from envs.calvin.scenes import NEUTRAL_JOINTS_RAD, SCENES
from envs.spec import CAMERAS, ROBOT_OBS, SCENE_OBS

FOLDER = Path(__file__).parent / "goldens"
STATES_FILE, MEANS_FILE = FOLDER / "states.json", FOLDER / "calvin_env_means.json"
OWN, CALVIN_ENV = "own", "calvin_env"

FREE_TOLERANCE_M, FREE_TOLERANCE_RAD = 0.5e-3, 10e-3
"""Measured: starts that differ by 1e-15 to 1e-6 end up to 0.19 mm and 4.5 mrad apart (blocks settling on the table; the arm 0.02 mm)."""
PIXEL_TOLERANCE, PIXELS_OFF_TOLERANCE = 2, 0.01
MEAN_PIXELS = {"rgb_static": 10, "rgb_gripper": 4}
"""Side of the square over which pixels are averaged: 20 × 20 means of the static camera, 21 × 21 of the wrist camera."""

Segments = tuple[tuple[int, tuple[float, ...]], ...]
FREE: Segments = (
    (10, (0.6, 0.4, 0.5, 0, 0, 0, 1)),
    (10, (-0.8, 0.3, 0.2, 0.5, -0.3, 0.4, -1)),
    (10, (0.3, -0.5, 0.4, -0.5, 0.5, -0.6, 1)),
    (10, (0, 0, -0.3, 0, 0.3, 0.2, -1)),
)
"""(steps, relative action) one after another; the state is kept after each."""
CONTACT: Segments = (
    (4, (0, 0.75, 0, 0, 0, 0, -1)),
    (7, (0, 0, -0.75, 0, 0, 0, -1)),
    (16, (0, 0.75, 0, 0, 0, 0, -1)),
    (16, (0.75, 0.1, 0, 0, 0, 0, -1)),
    (16, (-0.75, -0.3, 0, 0, 0, 0, -1)),
)
_STATE_UNITS = ["m"] * 3 + ["rad"] * 3 + ["m"] + ["rad"] * 7 + ["flag"] + ["m"] * 4 + ["flag"] * 2 + (["m"] * 3 + ["rad"] * 3) * 3


@dataclass(frozen=True, kw_only=True)
class Observed:
    """One scene as it behaves here.

    free, contact: float64 (1 + segments, 39), robot_obs and scene_obs at the start and after each segment. frames: camera → uint8 RGB.
    """

    free: np.ndarray
    contact: np.ndarray
    frames: dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest differences between two lists of states: lengths [m], angles [rad], and whether a flag (light, gripper) differs."""

    length_m: float
    angle_rad: float
    flags: bool
    equal: bool

    @property
    def within_tolerance(self) -> bool:
        """Whether states of the free sequence may differ by so much."""
        return self.length_m <= FREE_TOLERANCE_M and self.angle_rad <= FREE_TOLERANCE_RAD and not self.flags


def start_state() -> dict[str, np.ndarray]:
    """The state from which every scene starts: neutral arm, slider and drawer ajar, lights on, three blocks on the table."""
    robot_obs, scene_obs = np.zeros(15), np.zeros(24)
    robot_obs[6], robot_obs[7:14] = 0.08, NEUTRAL_JOINTS_RAD
    scene_obs[:6] = 0.12, 0.1, 0, 0, 1, 1
    scene_obs[6:] = (0.03, -0.11, 0.46, 0, 0, 0.3, 0.13, -0.05, 0.46, 0, 0, 1.2, 0.0, -0.03, 0.46, 0, 0, -0.2)
    return {ROBOT_OBS: robot_obs, SCENE_OBS: scene_obs}


def observe(scene: str, assets: str | Path | None = None) -> Observed:
    """Run both sequences in a new simulator of `scene` and look at its start. Raises what CalvinEnv raises."""
    from envs.calvin.env import CalvinEnv

    env = CalvinEnv(scene, assets=assets, observe="on_demand")
    try:
        free = _states(env, FREE)
        contact = _states(env, CONTACT)
        env.reset(options=start_state())
        frames = {camera: env.observe()[camera] for camera in CAMERAS}
    finally:
        env.close()
    return Observed(free=free, contact=contact, frames=frames)


def _states(env, segments: Segments) -> np.ndarray:
    observation, _ = env.reset(options=start_state())
    states = [_vector(observation)]
    for steps, action in segments:
        for _ in range(steps):
            observation = env.step(np.array(action))[0]
        states.append(_vector(observation))
    return np.array(states)


def _vector(observation: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([observation[ROBOT_OBS], observation[SCENE_OBS]])


# -- comparing


@cache
def recorded_states() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """{"own" or "calvin_env": {scene: {"free" or "contact": float64 (1 + segments, 39)}}}."""
    return {
        kind: {scene: {name: np.array(rows) for name, rows in sequences.items()} for scene, sequences in by_scene.items()}
        for kind, by_scene in json.loads(STATES_FILE.read_text()).items()
    }


def recorded_frame(scene: str, camera: str) -> np.ndarray:
    """uint8 RGB of our own `scene` at the start."""
    with Image.open(FOLDER / f"own_{scene}_{camera}.png") as image:
        return np.asarray(image.convert("RGB"))


def recorded_means(scene: str, camera: str) -> np.ndarray:
    """uint8 (20, 20, 3) or (21, 21, 3): means of the frame of `scene` with calvin_env's assets."""
    rows = json.loads(MEANS_FILE.read_text())[scene][camera]
    return np.array([list(bytes.fromhex(row)) for row in rows], np.uint8).reshape(len(rows), -1, 3)


def difference(states: np.ndarray, recorded: np.ndarray) -> Difference:
    """Compare states (N, 39) with recorded ones. Raises ValueError for another number of them."""
    if states.shape != recorded.shape:
        raise ValueError(f"{states.shape} states and {recorded.shape} recorded ones; record anew: python -m envs.calvin.images.golden")
    units = np.array(_STATE_UNITS)
    apart = np.abs(states - recorded)
    angles = apart[:, units == "rad"]
    return Difference(
        length_m=float(apart[:, units == "m"].max()),
        angle_rad=float(np.minimum(angles, np.abs(2 * np.pi - angles)).max()),
        flags=bool(apart[:, units == "flag"].any()),
        equal=bool((states == recorded).all()),
    )


def block_means(frame: np.ndarray, side: int) -> np.ndarray:
    """Means over squares of `side` pixels: uint8 (H, W, 3) → uint8 (H / side, W / side, 3)."""
    height, width, channels = frame.shape
    blocks = frame.reshape(height // side, side, width // side, side, channels)
    return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


def share_off(frame: np.ndarray, recorded: np.ndarray) -> float:
    """Share of pixels of which a channel differs by more than PIXEL_TOLERANCE of 255."""
    return float((_apart(frame, recorded) > PIXEL_TOLERANCE).any(axis=-1).mean())


def difference_image(frame: np.ndarray, recorded: np.ndarray) -> Image.Image:
    """Recorded, observed, and eight times their difference, side by side; small ones are enlarged to be seen."""
    panels = np.concatenate([recorded, frame, np.minimum(8 * _apart(frame, recorded), 255).astype(np.uint8)], axis=1)
    scale = max(1, 200 // frame.shape[0])
    return Image.fromarray(panels.repeat(scale, axis=0).repeat(scale, axis=1))


def _apart(frame: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    return np.abs(frame.astype(int) - recorded.astype(int))


def comparable_frames(scene: str, observed: Observed, kind: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(camera, observed, recorded) of what is kept of `kind`: frames of our own assets, means of calvin_env's."""
    for camera, frame in observed.frames.items():
        if kind == OWN:
            yield camera, frame, recorded_frame(scene, camera)
        else:
            yield camera, block_means(frame, MEAN_PIXELS[camera]), recorded_means(scene, camera)


# -- recording


def record(assets: Path | None = None, folder: Path = FOLDER) -> None:
    """Write the goldens of our own scenes, and of calvin_env's where `assets` is its data folder, into `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / STATES_FILE.name
    states = json.loads(path.read_text()) if path.is_file() else {}
    states[OWN] = {}
    for scene in SCENES:
        observed = observe(scene)
        states[OWN][scene] = _as_lists(observed)
        for camera, frame in observed.frames.items():
            Image.fromarray(frame).save(folder / f"own_{scene}_{camera}.png", optimize=True)
    if assets is not None:
        seen = {scene: observe(scene, assets) for scene in SCENES}
        states[CALVIN_ENV] = {scene: _as_lists(observed) for scene, observed in seen.items()}
        means = {scene: {camera: _hex_rows(frame, camera) for camera, frame in one.frames.items()} for scene, one in seen.items()}
        (folder / MEANS_FILE.name).write_text(json.dumps(means, indent=1) + "\n")
    path.write_text(_row_a_line(states))


def _as_lists(observed: Observed) -> dict[str, list]:
    return {"free": observed.free.tolist(), "contact": observed.contact.tolist()}


def _hex_rows(frame: np.ndarray, camera: str) -> list[str]:
    return [row.tobytes().hex() for row in block_means(frame, MEAN_PIXELS[camera])]


def _row_a_line(states: dict) -> str:
    """JSON that differs in one line where one state differs."""
    blocks = []
    for kind, by_scene in states.items():
        scenes = []
        for scene, sequences in by_scene.items():
            lines = [f'   "{name}": [\n    ' + ",\n    ".join(map(json.dumps, rows)) + "\n   ]" for name, rows in sequences.items()]
            scenes.append(f'  "{scene}": {{\n' + ",\n".join(lines) + "\n  }")
        blocks.append(f' "{kind}": {{\n' + ",\n".join(scenes) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main(arguments: list[str]) -> None:
    """Record, and print what is in the folder then."""
    record(Path(arguments[0]) if arguments else None)
    files = sorted(FOLDER.iterdir())
    print(f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e3:.0f} kB: {FOLDER}")


if __name__ == "__main__":
    main(sys.argv[1:])
