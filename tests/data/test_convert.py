"""`convert`: there and back without loss of numbers, resumed runs with the same bytes, losses listed before they happen."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from arm_recordings import FRONT, MAPPING, QUICK, ForeignArm, all_episodes, own_episode, own_store

from emu3_vla.data.episodes import EpisodeStore
from emu3_vla.data.recordings.convert import ConvertConfig, main
from emu3_vla.data.recordings.formats import open_dataset
from emu3_vla.data.recordings.recording import RecordingError, every_step, parts_of
from emu3_vla.data.recordings.video import VideoConfig

LEROBOT = ("lerobot_v2.1", "lerobot_v3.0")


def convert(source, target_format, folder, **options):
    options = {"video": QUICK} | options
    folder.mkdir(exist_ok=True)
    config = ConvertConfig(source=str(source), target_format=target_format, output_dir=str(folder), **options)
    main(config)
    return folder


def decibels(left: np.ndarray, right: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((left.astype(float) - right) ** 2))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Four of our own episodes in two shards, the last one with a frame every five steps."""
    episodes = [own_episode(0), own_episode(1, steps=31), own_episode(2, steps=17), own_episode(3, steps=28, every=5)]
    return own_store(tmp_path_factory.mktemp("own") / "store", episodes)


@pytest.mark.parametrize("format", LEROBOT)
def test_our_episodes_survive_lerobot_and_back(store, tmp_path, format):
    convert(store.path, format, tmp_path / "there", steps_per_part=40)
    convert(tmp_path / "there", "zarr", tmp_path / "back", steps_per_part=40)
    for left, right in zip(all_episodes(store.path), all_episodes(tmp_path / "back"), strict=True):
        assert (left.task, left.instruction, left.info) == (right.task, right.instruction, right.info)
        for name in ("actions", "robot_obs", "scene_obs", "imitate", "frame_step"):
            assert np.array_equal(getattr(left, name), getattr(right, name)) and getattr(left, name).dtype == getattr(right, name).dtype, (
                name
            )
        assert decibels(left.rgb_static, right.rgb_static) > 32 and decibels(left.rgb_gripper, right.rgb_gripper) > 30
    assert EpisodeStore.open(tmp_path / "back").metadata == {"scene": "D", "seed": 0, "rate_hz": 30.0}


def test_lossless_video_keeps_every_pixel(store, tmp_path, capsys):
    convert(store.path, "lerobot_v3.0", tmp_path / "there", video=VideoConfig(lossless=True))
    assert "compressed" not in capsys.readouterr().out
    convert(tmp_path / "there", "zarr", tmp_path / "back")
    assert "nothing is lost in zarr" in capsys.readouterr().out
    for left, right in zip(all_episodes(store.path), all_episodes(tmp_path / "back"), strict=True):
        assert np.array_equal(left.rgb_static, right.rgb_static) and np.array_equal(left.rgb_gripper, right.rgb_gripper)


@pytest.mark.parametrize("first,second", [LEROBOT, LEROBOT[::-1]])
def test_foreign_datasets_pass_between_versions_unchanged(tmp_path, first, second):
    arm = ForeignArm()
    arm.write(tmp_path / "first", first.removeprefix("lerobot_"))
    convert(tmp_path / "first", second, tmp_path / "second", steps_per_part=30)
    convert(tmp_path / "second", first, tmp_path / "third", steps_per_part=30)
    features = [json.loads((tmp_path / name / "meta/info.json").read_text())["features"] for name in ("first", "second", "third")]
    assert features[0] == features[1] == features[2]
    for name in ("second", "third"):
        source = open_dataset(tmp_path / name)
        assert (
            source.lengths == arm.lengths and source.told == arm.told and source.schema.rate_hz == 15 and source.schema.robot == "foreign"
        )
        for number in range(3):
            given, found = arm.read(number), source.read(number)
            assert found.instructions == given.instructions and np.array_equal(found.instruction_of, given.instruction_of)
            for key, values in given.columns.items():
                assert np.array_equal(found.columns[key], values) and found.columns[key].dtype == values.dtype, key
            frames = np.concatenate(list(found.frames(FRONT)))
            assert decibels(frames, arm.pictures(FRONT, number)) > 32


def test_calvin_there_and_back_to_the_last_bit(store, tmp_path):
    convert(store.path, "calvin", tmp_path / "calvin", steps_per_part=40)
    convert(tmp_path / "calvin", "lerobot_v3.0", tmp_path / "lerobot")
    convert(tmp_path / "lerobot", "calvin", tmp_path / "again", video=QUICK)
    convert(tmp_path / "again", "zarr", tmp_path / "zarr")
    for left, right in zip(all_episodes(store.path), all_episodes(tmp_path / "zarr"), strict=True):
        assert (left.task, left.instruction) == (right.task, right.instruction)
        for name in ("actions", "robot_obs", "scene_obs", "imitate", "frame_step"):
            assert np.array_equal(getattr(left, name), getattr(right, name)), name
    first, again = (np.load(tmp_path / name / "episode_0000040.npz") for name in ("calvin", "again"))
    for key in ("actions", "rel_actions", "robot_obs", "scene_obs"):
        assert np.array_equal(first[key], again[key]) and first[key].dtype == again[key].dtype == np.float64


def test_calvins_files_are_what_calvin_reads(store, tmp_path):
    folder = convert(store.path, "calvin", tmp_path / "calvin")
    spans = np.load(folder / "ep_start_end_ids.npy")
    assert spans.tolist() == [[0, 23], [24, 54], [55, 71], [72, 99]] and np.load(folder / "ep_lens.npy").tolist() == [24, 31, 17, 28]
    language = np.load(folder / "lang_annotations/auto_lang_ann.npy", allow_pickle=True).item()
    assert language["language"]["ann"][1] == "do thing 1" and language["language"]["task"][1] == "task_1"
    assert language["info"]["indx"] == [tuple(span) for span in spans.tolist()]
    step, episode = np.load(folder / "episode_0000030.npz"), all_episodes(store.path)[1]
    assert step["rgb_static"].dtype == np.uint8 and np.array_equal(step["rgb_static"], episode.rgb_static[6])
    assert np.array_equal(step["rel_actions"].astype(np.float32), episode.actions[6])
    # CALVIN's own way back from absolute to relative actions.
    back = (step["actions"][:3] - step["robot_obs"][:3]) / 0.02
    assert np.allclose(back, step["rel_actions"][:3], atol=1e-9)
    import yaml

    statistics = yaml.safe_load((folder / "statistics.yaml").read_text())
    states = np.concatenate([part.robot_obs for part in all_episodes(store.path)])
    assert np.allclose(statistics["robot_obs"][0]["mean"], states.mean(axis=0)) and "act_max_bound" in statistics
    assert yaml.safe_load((folder / ".hydra/merged_config.yaml").read_text())["scene"] == "calvin_scene_D"


@pytest.mark.parametrize("format", [*LEROBOT, "zarr", "calvin"])
def test_a_killed_run_resumes_to_the_same_bytes(store, tmp_path, format):
    episodes = [own_episode(seed, steps=12 + seed) for seed in range(6)]
    source = own_store(tmp_path / "source", episodes, per_shard=6)
    whole = convert(source.path, format, tmp_path / "whole", steps_per_part=24)
    folder = tmp_path / "killed"
    process = multiprocessing.get_context("fork").Process(target=convert, args=(source.path, format, folder), kwargs={"steps_per_part": 24})
    process.start()
    while process.is_alive() and not list(folder.glob(".parts/*.json")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and not json.loads((folder / "conversion.json").read_text())["finished"]
    with pytest.raises((RecordingError, FileNotFoundError)):
        open_dataset(folder)  # half of a dataset is none
    first = min(path for path in folder.rglob("*") if path.is_file() and "conversion" not in path.name and "/." not in str(path))
    when = first.stat().st_mtime_ns
    convert(source.path, format, folder, steps_per_part=24)
    assert first.stat().st_mtime_ns == when, "a part that was there was written again"
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert all((whole / name).read_bytes() == (folder / name).read_bytes() for name in names if name.name != "conversion.json")


def test_losses_are_listed_before_anything_is_written(tmp_path, capsys, monkeypatch):
    ForeignArm().write(tmp_path / "arm")
    (tmp_path / "mapping.yaml").write_text(MAPPING + "frame_stride: 5\n")

    def refuse(self, part, recordings):
        raise RecordingError("the disk is full")

    monkeypatch.setattr("emu3_vla.data.recordings.zarr_store.Target.write_part", refuse)
    with pytest.raises(RecordingError, match="disk is full"):
        convert(tmp_path / "arm", "zarr", tmp_path / "out", mapping=str(tmp_path / "mapping.yaml"))
    said, record = capsys.readouterr().out, json.loads((tmp_path / "out/conversion.json").read_text())
    assert not record["finished"] and [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] == ["conversion.json"]
    for loss in (
        "rgb_static: observation.images.front of 128×96 becomes 200×200 (the sides cut off, resampled)",
        "4 of 5 frames of each camera (frame_stride)",
        "action: what it becomes is kept, itself it is not (keep)",
        "remark: not kept (keep)",
        "1 episodes change their instruction on the way; the first one is kept for all their steps",
    ):
        assert loss in record["losses"] and loss in said


def test_a_mapped_arm_becomes_our_episodes(tmp_path):
    arm = ForeignArm()
    arm.write(tmp_path / "arm", "v3.0")
    (tmp_path / "mapping.yaml").write_text(MAPPING + "keep: [action, grid]\n")
    convert(tmp_path / "arm", "zarr", tmp_path / "out", mapping=str(tmp_path / "mapping.yaml"), skip=(2,))
    episodes = all_episodes(tmp_path / "out")
    assert [len(episode.actions) for episode in episodes] == arm.lengths[:2]
    for number, episode in enumerate(episodes):
        expected = arm.motion(number, arm.lengths[number]) / np.array([0.02] * 3 + [0.05] * 3)
        assert np.abs(episode.actions[:, :6] - expected).max() < 2e-3  # the recording has millimetres in float32
        assert np.array_equal(episode.actions[:, 6], np.where(arm.read(number).columns["action"][:, 6] > 0.5, 1, -1))
        assert np.allclose(episode.robot_obs[0, :4], [0.3, 0.0, 0.4, np.pi - 0.05], atol=1e-6) and episode.robot_obs[0, 6] == 0.08
        assert np.isnan(episode.robot_obs[:, 7:]).all() and episode.scene_obs is None and episode.imitate.all()
        assert episode.task == episode.instruction == "pick it up" and np.array_equal(episode.frame_step, np.arange(arm.lengths[number]))
        assert np.array_equal(episode.extra["source.action"], arm.read(number).columns["action"]) and episode.extra["source.grid"].shape[
            1:
        ] == (2, 3)
    convert(tmp_path / "out", "lerobot_v2.1", tmp_path / "there")
    convert(tmp_path / "there", "zarr", tmp_path / "back")
    for left, right in zip(episodes, all_episodes(tmp_path / "back"), strict=True):
        assert right.scene_obs is None and np.array_equal(left.actions, right.actions)
        assert np.array_equal(left.robot_obs, right.robot_obs, equal_nan=True)
        assert all(np.array_equal(left.extra[name], right.extra[name]) for name in left.extra)


def test_what_is_finished_is_left_alone_and_what_changed_is_refused(store, tmp_path, capsys):
    folder = convert(store.path, "zarr", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    convert(store.path, "zarr", folder)
    assert "finished already" in capsys.readouterr().out and before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    grown = own_store(tmp_path / "grown", [own_episode(0)])
    unfinished = json.loads((folder / "conversion.json").read_text()) | {"finished": False}
    (folder / "conversion.json").write_text(json.dumps(unfinished))
    with pytest.raises(RecordingError, match="begun with another source than there is now"):
        convert(grown.path, "zarr", folder)


@pytest.mark.slow
def test_two_workers_write_the_same_bytes(store, tmp_path):
    one = convert(store.path, "lerobot_v2.1", tmp_path / "one")
    two = convert(store.path, "lerobot_v2.1", tmp_path / "two", workers=2)
    for path in one.rglob("*"):
        if path.is_file() and path.name != "conversion.json":
            assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()


def test_parts_are_cut_by_lengths_alone():
    parts = parts_of([5, 5, 12, 1, 3], 10)
    assert [(part.first_episode, part.first_step, part.lengths) for part in parts] == [(0, 0, (5, 5)), (2, 10, (12,)), (3, 22, (1, 3))]


def test_frames_are_held_between_looks(store):
    recording = open_dataset(store.path).read(3)
    blocks = np.concatenate(list(every_step(recording, "rgb_static")))
    kept = all_episodes(store.path)[3]
    assert len(blocks) == 28 and np.array_equal(blocks[4], kept.rgb_static[0]) and np.array_equal(blocks[5], kept.rgb_static[1])
    late = dataclasses.replace(recording, frame_step=recording.frame_step + 1)
    blocks = np.concatenate(list(every_step(late, "rgb_static")))
    assert len(blocks) == 28 and np.array_equal(blocks[0], kept.rgb_static[0]) and np.array_equal(blocks[6], kept.rgb_static[1])
