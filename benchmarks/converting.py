"""Frames a second of `emu3-vla convert` in each direction, on one thread, and the memory that it needs.

    OMP_NUM_THREADS=1 python benchmarks/converting.py                       # 1,200 steps, both cameras
    OMP_NUM_THREADS=1 python benchmarks/converting.py --steps 4800           # the memory must not follow

Each direction runs in a process of its own, from a dataset that an earlier one wrote: 200×200 and 84×84 frames of our own simulator, the
scripted expert at work, repeated to the length asked for. Frames a second are frames of the 200×200 camera by processor time; the 84×84
camera and all numbers are converted with them. Memory is the peak of resident bytes over what the process held after its imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from emu3_vla.data.episodes import EpisodeStore
from emu3_vla.data.recordings.convert import ConvertConfig, main
from emu3_vla.data.recordings.video import VideoConfig
from envs.spec import ACTION_DIM, Episode

EPISODE = 300
DIRECTIONS = [
    # source, target, options
    ("zarr", "lerobot_v2.1", {}),
    ("zarr", "lerobot_v3.0", {}),
    ("zarr", "lerobot_v3.0", {"codec": "av1", "crf": 30}),
    ("zarr", "lerobot_v3.0", {"lossless": True}),
    ("zarr", "calvin", {}),
    ("zarr", "zarr", {}),
    ("lerobot_v2.1", "lerobot_v3.0", {}),
    ("lerobot_v2.1", "zarr", {}),
    ("lerobot_v3.0", "lerobot_v2.1", {}),
    ("lerobot_v3.0", "zarr", {}),
    ("lerobot_v3.0", "calvin", {}),
    ("calvin", "lerobot_v2.1", {}),
    ("calvin", "lerobot_v3.0", {}),
    ("calvin", "zarr", {}),
]


def measure_all() -> None:
    """Write the first dataset, run every direction, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--child", nargs=4, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        steps = write_store(folder / "zarr", arguments.steps)
        print(f"{steps} steps\n{'from':<13} {'to':<13} {'video':<22} {'frames/s':>9} {'memory':>8} {'kB/step':>8}")
        for number, (source, target, video) in enumerate(DIRECTIONS):
            out = folder / (target if not (folder / target).exists() else f"{number}")
            command = [sys.executable, __file__, "--child", str(folder / source), target, str(out), json.dumps(video)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            figures = json.loads(result.stdout.splitlines()[-1])
            size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / steps / 1000
            words = ", ".join(f"{name} {value}" for name, value in video.items())
            print(
                f"{source:<13} {target:<13} {words:<22} {steps / figures['cpu_s']:>9.0f} {figures['memory'] / 1e6:>5.0f} MB {size:>8.1f}",
                flush=True,
            )


def measure(source: str, target: str, out: str, video: str) -> dict[str, float]:
    """In this process: processor seconds, and peak bytes over those after the imports."""
    import av  # noqa: F401  so that it is not counted
    import pyarrow.parquet  # noqa: F401

    base = _resident("VmRSS")
    Path(out).mkdir()
    began = time.process_time()
    main(ConvertConfig(source=source, target_format=target, output_dir=out, video=VideoConfig(**json.loads(video))))
    return {"cpu_s": time.process_time() - began, "memory": _resident("VmHWM") - base}


def _resident(field: str) -> int:
    """Bytes; VmRSS is now, VmHWM the peak since the process began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def write_store(folder: Path, steps: int) -> int:
    """An episode store of about so many steps with a frame each; returns how many."""
    from envs.calvin import CalvinEnv
    from envs.calvin.expert.policy import ExpertPolicy

    env = CalvinEnv(scene="D", observe="always")
    expert = ExpertPolicy("D")
    observation, _ = env.reset(seed=0)
    expert.begin_chain()
    expert.reset("open the drawer", task="open_drawer")
    rows: dict[str, list] = {name: [] for name in ("actions", "robot_obs", "scene_obs", "rgb_static", "rgb_gripper")}
    for _ in range(EPISODE):
        action = expert.infer(observation)["actions"][0]
        for name in rows:
            rows[name].append(action if name == "actions" else observation[name])
        observation, *_ = env.step(action)
    env.close()
    columns = {name: np.array(values) for name, values in rows.items()} | {"actions": np.array(rows["actions"], np.float32)}
    assert columns["actions"].shape == (EPISODE, ACTION_DIM)
    store = EpisodeStore.create(folder, {"scene": "D"})
    marks = {"imitate": np.ones(EPISODE, bool), "frame_step": np.arange(EPISODE)}
    count = max(1, steps // EPISODE)
    for shard in range(count):
        store.write_shard(shard, [Episode(task="open_drawer", instruction=f"open the drawer, {shard}", **columns, **marks)])
    return count * EPISODE


if __name__ == "__main__":
    measure_all()
