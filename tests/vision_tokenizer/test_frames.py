"""Frames and clips out of episode stores: clips stay within an episode, thinning is even, every scene has its own median."""

import numpy as np
import pytest
import torch

from emu3_vla.data.episodes import EpisodeStore
from emu3_vla.vision_tokenizer.frames import load_frames, read_rows
from envs.spec import Episode


def numbered(first: int, frames: int) -> Episode:
    """An episode whose frame i is of the plain grey value first + i."""
    grey = (first + np.arange(frames)).astype(np.uint8)[:, None, None, None]
    return Episode(
        task="push",
        instruction="push",
        actions=np.zeros((frames, 7), np.float32),
        robot_obs=np.zeros((frames, 15)),
        scene_obs=np.zeros((frames, 24)),
        imitate=np.ones(frames, bool),
        frame_step=np.arange(frames),
        rgb_static=np.broadcast_to(grey, (frames, 200, 200, 3)).copy(),
        rgb_gripper=np.broadcast_to(grey, (frames, 84, 84, 3)).copy(),
    )


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The first: episodes of 5, 3 and 9 frames (values from 0, 20 and 40) in two shards; the second: one of 6 frames (from 100)."""
    folder = tmp_path_factory.mktemp("frames")
    first = EpisodeStore.create(folder / "first", {"scene": "D"})
    first.write_shard(0, [numbered(0, 5), numbered(20, 3)])
    first.write_shard(1, [numbered(40, 9)])
    second = EpisodeStore.create(folder / "second", {"scene": "A"})
    second.write_shard(0, [numbered(100, 6)])
    return first, second


def values(images: torch.Tensor) -> list:
    return images[..., 0, 0, 0].tolist()


def test_all_frames_and_the_clips_among_them(stores):
    frames = load_frames([(stores[0], [0, 1]), (stores[1], [0])], "rgb_static", 16, limit=1000, clip_length=4)
    assert values(frames.images) == [*range(5), 20, 21, 22, *range(40, 49), *range(100, 106)]
    clips = frames.images[frames.clip_rows(torch.arange(len(frames.clips)))]
    assert clips.shape == (2 + 6 + 3, 4, 3, 16, 16)
    assert values(clips[:, 0]) == [0, 1, *range(40, 46), 100, 101, 102]
    assert all(np.array_equal(np.diff(row), [1, 1, 1]) for row in values(clips))
    assert frames.store.tolist() == [0] * 17 + [1] * 6 and frames.rows.tolist() == [*range(17), *range(6)]


def test_thinning_keeps_whole_clips_or_every_so_many_frames(stores):
    sources = [(stores[0], [0, 1])]
    assert values(load_frames(sources, "rgb_static", 8, limit=5).images) == [0, 4, 40, 44, 48]
    clips = load_frames(sources, "rgb_static", 8, limit=8, clip_length=4)
    assert values(clips.images) == [0, 1, 2, 3, 44, 45, 46, 47] and clips.clips.tolist() == [0, 4]


def test_few_rows_are_read_as_many_are(stores):
    many, few = np.arange(9), np.array([7])
    assert np.array_equal(read_rows(stores[0], "rgb_static", 1, few, 9), read_rows(stores[0], "rgb_static", 1, many, 9)[few])


def test_medians_are_of_each_store(stores):
    frames = load_frames([(stores[0], [1]), (stores[1], [0])], "rgb_gripper", 8, limit=100)
    medians = (frames.medians() + 1) * 127.5
    assert medians.shape == (2, 3, 8, 8)
    assert medians[:, 0, 0, 0].round().tolist() == [44, 102]


def test_draws_are_of_the_right_frames(stores):
    frames = load_frames([(stores[0], [0, 1])], "rgb_static", 8, limit=100, clip_length=3)
    rows = frames.draw_clips(50, np.random.default_rng(0))
    pixels = (frames.pixels(rows) + 1) * 127.5
    assert pixels.shape == (50, 3, 3, 8, 8)
    assert torch.allclose(pixels[:, 1:, 0, 0, 0] - pixels[:, :-1, 0, 0, 0], torch.ones(50, 2), atol=1e-3)
    assert frames.draw(20, np.random.default_rng(0)).max() < len(frames)


def test_what_is_too_short_is_named(stores, tmp_path):
    with pytest.raises(ValueError, match=r"second: shards \[0\] hold no episode of 7 frames; record more often, or shorten the clips"):
        load_frames([(stores[1], [0])], "rgb_static", 8, limit=100, clip_length=7)
    with pytest.raises(ValueError, match="hold no frame; collect episodes with images first"):
        load_frames([(stores[1], [])], "rgb_static", 8, limit=100)
    with pytest.raises(ValueError, match="of 1 frames none is of .*second; ask for more"):
        load_frames([(stores[0], [0, 1]), (stores[1], [0])], "rgb_static", 8, limit=1)
