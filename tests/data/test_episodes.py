"""Episode store: exact round trips, atomic shards, and named errors for what is missing, foreign or damaged."""

import dataclasses
import json

import numpy as np
import pytest

from emu3_vla.data.episodes import EpisodeStore, EpisodeStoreError, split_shards
from envs.spec import Episode

ARRAYS = ("actions", "robot_obs", "scene_obs", "imitate", "frame_step", "rgb_static", "rgb_gripper")


def make_episode(seed: int, steps: int = 23, every: int = 5, **info) -> Episode:
    random = np.random.default_rng(seed)
    frame_step = np.arange(0, steps, every) if every else np.zeros(0, np.int64)
    return Episode(
        task=f"task_{seed % 3}",
        instruction=f"sentence {seed}",
        actions=random.uniform(-1, 1, (steps, 7)).astype(np.float32),
        robot_obs=random.normal(size=(steps, 15)),
        scene_obs=random.normal(size=(steps, 24)),
        imitate=random.random(steps) < 0.8,
        frame_step=frame_step,
        rgb_static=random.integers(0, 256, (len(frame_step), 200, 200, 3), dtype=np.uint8),
        rgb_gripper=random.integers(0, 256, (len(frame_step), 84, 84, 3), dtype=np.uint8),
        info={"seed": seed, **info},
    )


def assert_same(left: Episode, right: Episode):
    assert (left.task, left.instruction, left.info) == (right.task, right.instruction, right.info)
    for name in ARRAYS:
        expected, got = getattr(left, name), getattr(right, name)
        assert expected.dtype == got.dtype and np.array_equal(expected, got), name


@pytest.fixture
def store(tmp_path):
    store = EpisodeStore.create(tmp_path / "store", {"wordings": {"task_0": ["do it"]}, "seed": 0})
    store.write_shard(0, [make_episode(0, note="a"), make_episode(1, steps=40), make_episode(2, every=0)])
    store.write_shard(7, [make_episode(3)])
    return store


def test_round_trip_is_exact(store):
    store = EpisodeStore.open(store.path)
    assert store.metadata == {"wordings": {"task_0": ["do it"]}, "seed": 0}
    assert store.shard_indices() == [0, 7] and store.has_shard(7) and not store.has_shard(1)
    written = [make_episode(0, note="a"), make_episode(1, steps=40), make_episode(2, every=0)]
    for expected, got in zip(written, store.read_shard(0), strict=True):
        assert_same(expected, got)


def test_shard_of_zero_images_and_no_frames_round_trips(tmp_path):
    store = EpisodeStore.create(tmp_path, {})
    blank = make_episode(0)
    blank.rgb_static[:] = 0
    store.write_shard(0, [blank])
    assert_same(blank, store.read_shard(0)[0])
    store.write_shard(1, [make_episode(2, every=0)])
    assert store.read_shard(1)[0].rgb_static.shape == (0, 200, 200, 3)


def test_recordings_of_real_arms_lack_the_scene_and_bring_more(tmp_path):
    real = [
        dataclasses.replace(
            make_episode(seed), scene_obs=None, extra={"force": np.arange(23.0) + seed, "state": np.ones((23, 2), np.int32)}
        )
        for seed in range(2)
    ]
    store = EpisodeStore.create(tmp_path, {})
    store.write_shard(0, real)
    assert store.step_arrays(0) == (["actions", "robot_obs", "imitate"], ["force", "state"])
    for left, right in zip(real, store.read_shard(0), strict=True):
        assert right.scene_obs is None and list(right.extra) == ["force", "state"]
        assert all(np.array_equal(left.extra[name], right.extra[name]) for name in left.extra)
        assert right.extra["state"].dtype == np.int32 and np.array_equal(left.actions, right.actions)
    with pytest.raises(EpisodeStoreError, match="has no scene_obs: its recordings know nothing"):
        store.read_columns(0, ["scene_obs"])
    with pytest.raises(ValueError, match="not the same arrays .* write them into different stores"):
        store.write_shard(1, [real[0], make_episode(1)])
    with pytest.raises(ValueError, match="extra 'a/b': a name must not be empty or contain '/'"):
        store.write_shard(1, [dataclasses.replace(real[0], extra={"a/b": np.zeros(23)})])
    with pytest.raises(ValueError, match="extra 'force' is float64 with 22 rows, expected 23"):
        dataclasses.replace(real[0], extra={"force": np.zeros(22)})


def test_frames_may_come_in_blocks_and_lie_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("emu3_vla.data.episodes.FRAMES_PER_FILE", 16)
    episode = make_episode(0, steps=43, every=1)
    held, streamed = (EpisodeStore.create(tmp_path / name, {}) for name in ("held", "streamed"))
    held.write_shard(0, [episode])
    counted = dataclasses.replace(
        episode, **{name: np.broadcast_to(np.uint8(0), getattr(episode, name).shape) for name in ("rgb_static", "rgb_gripper")}
    )
    streamed.write_shard(
        0, [counted], frames={name: np.split(getattr(episode, name), [5, 5, 30]) for name in ("rgb_static", "rgb_gripper")}
    )
    assert_same(episode, streamed.read_shard(0)[0])
    files = [path.relative_to(held.path) for path in sorted(held.path.rglob("*")) if path.is_file()]
    assert len([file for file in files if "rgb_static/c" in str(file)]) == 3
    assert all((held.path / file).read_bytes() == (streamed.path / file).read_bytes() for file in files)
    assert np.array_equal(held.read_frames("rgb_static", 0, slice(30, 40)), episode.rgb_static[30:40])
    (held.shard_path(0) / "rgb_static/c/1/0/0/0").unlink()
    with pytest.raises(EpisodeStoreError, match="no data file 1 of rgb_static"):
        held.read_shard(0)
    with pytest.raises(ValueError, match="the blocks hold 42 rows, expected 43"):
        streamed.write_shard(1, [counted], frames={name: [getattr(episode, name)[:42]] for name in ("rgb_static", "rgb_gripper")})


def test_totals_and_frames_without_episodes(store):
    totals = store.totals()
    assert (totals.shards, totals.episodes, totals.steps, totals.frames) == (2, 4, 23 + 40 + 23 + 23, 5 + 8 + 0 + 5)
    assert totals.tasks == {"task_0": 2, "task_1": 1, "task_2": 1} and len(store) == 4
    frames = store.read_frames("rgb_gripper", 0)
    assert np.array_equal(frames[5:], make_episode(1, steps=40).rgb_gripper)
    assert np.array_equal(store.read_frames("rgb_static", 0, slice(3, 6))[2], make_episode(1, steps=40).rgb_static[0])


def test_same_episodes_give_the_same_bytes(store, tmp_path):
    again = EpisodeStore.create(tmp_path / "again", store.metadata)
    again.write_shard(7, [make_episode(3)])
    files = [path for path in sorted(store.shard_path(7).rglob("*")) if path.is_file()]
    for path in files:
        assert path.read_bytes() == (again.shard_path(7) / path.relative_to(store.shard_path(7))).read_bytes()
    assert len(files) <= 16


def test_an_unfinished_shard_is_not_there_and_is_replaced(store):
    leftover = store.path / "shards" / ".00003.zarr.tmp"
    leftover.mkdir()
    (leftover / "junk").write_text("half")
    assert store.shard_indices() == [0, 7]
    store.write_shard(3, [make_episode(4)])
    assert store.shard_indices() == [0, 3, 7] and not leftover.exists()
    assert not (store.shard_path(3) / "junk").exists()


def test_shards_are_never_overwritten(store):
    with pytest.raises(EpisodeStoreError, match="never overwritten"):
        store.write_shard(0, [make_episode(0)])
    with pytest.raises(ValueError, match="no episode"):
        store.write_shard(1, [])


def test_create_resumes_the_same_store_and_refuses_another(store):
    assert EpisodeStore.create(store.path, store.metadata).shard_indices() == [0, 7]
    with pytest.raises(EpisodeStoreError, match="other metadata"):
        EpisodeStore.create(store.path, {"seed": 1})


def test_open_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        EpisodeStore.open(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no store.json"):
        EpisodeStore.open(tmp_path)
    (tmp_path / "store.json").write_text('{"format": "emu')
    with pytest.raises(EpisodeStoreError, match="damaged or cut short"):
        EpisodeStore.open(tmp_path)
    (tmp_path / "store.json").write_text('{"format": "lerobot"}')
    with pytest.raises(EpisodeStoreError, match="not the manifest of an episode store"):
        EpisodeStore.open(tmp_path)
    (tmp_path / "store.json").write_text(json.dumps({"format": "emu3-vla-episodes", "schema": 99, "metadata": {}}))
    with pytest.raises(EpisodeStoreError, match="schema 99"):
        EpisodeStore.open(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damaged_frames_are_an_error_not_zeros(store, damage):
    file = store.shard_path(7).joinpath("rgb_static", "c", "0", "0", "0", "0")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    with pytest.raises(EpisodeStoreError, match="'rgb_static' is damaged"):
        store.read_shard(7)


def test_wrong_input_is_named(store):
    with pytest.raises(ValueError, match="unknown camera 'rgb_left'"):
        store.read_frames("rgb_left", 0)
    with pytest.raises(EpisodeStoreError, match="no shard 5"):
        store.read_shard(5)
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        store.write_shard(9, [make_episode(0, score=float("nan"))])
    wide = make_episode(0)
    object.__setattr__(wide, "actions", wide.actions.astype(np.float64))
    with pytest.raises(ValueError, match="actions is float64, expected float32"):
        store.write_shard(9, [wide])
    assert not store.has_shard(9)


def test_split_is_even_deterministic_and_never_empty():
    train, held_out = split_shards(range(20), 0.1)
    assert held_out == [5, 14] and sorted(train + held_out) == list(range(20))
    assert split_shards([3, 9], 0.1) == ([9], [3]) or split_shards([3, 9], 0.1) == ([3], [9])
    assert split_shards([3, 9], 0) == ([3, 9], [])
    for count in range(2, 40):
        train, held_out = split_shards(range(count), 0.3)
        assert len(set(held_out)) == len(held_out) == -(-3 * count // 10) and train
    with pytest.raises(ValueError, match="leave none to train on"):
        split_shards([0], 0.1)
    with pytest.raises(ValueError, match="validation_fraction is 1"):
        split_shards([0, 1], 1)
