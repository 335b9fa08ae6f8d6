"""LeRobot itself reads what we write, and we read what it writes. Opt-in: it needs an interpreter with LeRobot, of its own environment.

python3 -m venv v21 && v21/bin/pip install lerobot==0.3.3      # reads v2.1
python3 -m venv v30 && v30/bin/pip install lerobot==0.4.4      # reads v3.0
EMU3_VLA_LEROBOT_V21=v21/bin/python EMU3_VLA_LEROBOT_V30=v30/bin/python python -m pytest tests/data/test_lerobot_itself.py
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from arm_recordings import FRONT, QUICK, WRIST, ForeignArm, all_episodes, own_episode, own_store

from emu3_vla.data.recordings.convert import ConvertConfig, main
from emu3_vla.data.recordings.formats import open_dataset

SCRIPTS = Path(__file__).parent


def interpreter(version: str) -> str:
    name = f"EMU3_VLA_LEROBOT_{version.upper().replace('.', '')}"
    if not os.environ.get(name):
        pytest.skip(f"{name} names no interpreter with a LeRobot that reads {version}")
    return os.environ[name]


def run(version: str, script: str, *arguments: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [interpreter(version), str(SCRIPTS / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]


def decibels(left: np.ndarray, right: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((left.astype(float) - right) ** 2))


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot_reads_our_episodes(tmp_path, version):
    interpreter(version)
    store = own_store(tmp_path / "store", [own_episode(0), own_episode(1, steps=31), own_episode(2, every=5)])
    (tmp_path / "out").mkdir()
    main(ConvertConfig(source=str(store.path), target_format=f"lerobot_{version}", output_dir=str(tmp_path / "out"), steps_per_part=50))
    run(version, "lerobot_reader.py", tmp_path / "out", tmp_path / "read.npz")
    read, episodes = np.load(tmp_path / "read.npz"), all_episodes(store.path)
    actions = np.concatenate([episode.actions for episode in episodes])
    assert np.array_equal(read["action"], actions) and read["action"].dtype == np.float32
    assert np.array_equal(read["observation.state"], np.concatenate([episode.robot_obs for episode in episodes]).astype(np.float32))
    assert read["task"].tolist() == [episode.instruction for episode in episodes for _ in episode.actions]
    assert np.allclose(read["mean/action"], actions.mean(axis=0)) and read["episodes"] == 3
    shown = np.concatenate(
        [episode.rgb_static[np.searchsorted(episode.frame_step, np.arange(len(episode.actions)), "right") - 1] for episode in episodes]
    )
    assert decibels(read["observation.images.rgb_static"], shown) > 32
    assert np.allclose(read["mean/observation.images.rgb_static"].ravel(), shown.mean(axis=(0, 1, 2)) / 255, atol=0.01)


@pytest.mark.parametrize("version,other", [("v2.1", "v3.0"), ("v3.0", "v2.1")])
def test_lerobot_reads_a_foreign_dataset_from_the_other_version(tmp_path, version, other):
    interpreter(version)
    arm = ForeignArm()
    arm.write(tmp_path / "other", other)
    (tmp_path / "out").mkdir()
    main(ConvertConfig(source=str(tmp_path / "other"), target_format=f"lerobot_{version}", output_dir=str(tmp_path / "out"), video=QUICK))
    run(version, "lerobot_reader.py", tmp_path / "out", tmp_path / "read.npz")
    read = np.load(tmp_path / "read.npz")
    for key in ("action", "observation.state", "grid", "next.done"):
        assert np.array_equal(read[key], np.concatenate([arm.read(number).columns[key] for number in range(3)])), key
    assert read["task"][20] == "pick it up" and read["task"][52] == "put it down" and read["fps"] == 15
    assert decibels(read[WRIST], np.concatenate([arm.pictures(WRIST, number) for number in range(3)])) > 27  # compressed twice


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_we_read_what_lerobot_writes(tmp_path, version):
    run(version, "lerobot_writer.py", tmp_path / "theirs", tmp_path / "given.npz")
    given, source = np.load(tmp_path / "given.npz"), open_dataset(tmp_path / "theirs")
    assert source.format == f"lerobot_{version}" and source.lengths == [12, 17] and source.told == [("open it",), ("close it",)]
    start = 0
    for number, length in enumerate(source.lengths):
        recording, rows = source.read(number), slice(start, start + length)
        assert np.array_equal(recording.columns["action"], given["action"][rows])
        assert np.array_equal(recording.columns["observation.state"], given["observation.state"][rows])
        assert decibels(np.concatenate(list(recording.frames(FRONT))), given[FRONT][rows]) > 28
        assert np.array_equal(np.concatenate(list(recording.frames("observation.images.still"))), given["observation.images.still"][rows])
        start += length
