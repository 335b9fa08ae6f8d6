"""Pictures, videos and stored moments: read as they were written, and what cannot be read is named."""

import numpy as np
import pytest
from PIL import Image

from emu3_vla.data.episodes import EpisodeStore
from emu3_vla.pipelines import UnreadableMedia, WrongFrames, WrongSize, media
from envs.spec import RGB_GRIPPER, RGB_STATIC, Episode


def _frames(count=6, height=32, width=48):
    """Smooth pictures, which compression keeps: brighter frame by frame."""
    return np.stack([np.full((height, width, 3), 20 * number + 10, np.uint8) for number in range(count)])


def test_pictures_come_back(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    path = media.write_picture(tmp_path / "new" / "picture.png", picture)
    np.testing.assert_array_equal(media.read_picture(path), picture)
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"], "nothing temporary is left"


def test_grey_and_transparent_pictures_are_read_as_colours(tmp_path):
    Image.new("L", (3, 2), 77).save(tmp_path / "grey.png")
    Image.new("RGBA", (3, 2), (1, 2, 3, 0)).save(tmp_path / "clear.png")
    assert (media.read_picture(tmp_path / "grey.png") == 77).all()
    assert (media.read_picture(tmp_path / "clear.png") == [1, 2, 3]).all()


def test_a_camera_says_which_way_is_up(tmp_path):
    picture = Image.new("RGB", (4, 2))
    picture.getexif()[274] = 6  # turn by a quarter to be upright
    exif = picture.getexif()
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert media.read_picture(tmp_path / "turned.jpg").shape == (4, 2, 3)


def test_masks(tmp_path):
    mask = np.random.default_rng(0).random((5, 7)) > 0.5
    Image.fromarray((mask * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(media.read_mask(tmp_path / "mask.png"), mask)


def test_pictures_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "words.png").write_text("no picture")
    whole = media.write_picture(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 256, (50, 50, 3)).astype(np.uint8))
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:900])
    for name, message in (("none.png", "does not exist"), ("words.png", "is no picture"), ("cut.png", "damaged or cut short")):
        with pytest.raises(UnreadableMedia, match=f"{name} .*{message}|{name} {message}"):
            media.read_picture(tmp_path / name)
    monkeypatch.setattr(media, "MOST_PIXELS", 2499)
    with pytest.raises(WrongSize, match="50×50 pixels, expected at most 2499"):
        media.read_picture(whole)


@pytest.mark.parametrize("size", [(32, 48), (31, 47)])
def test_videos_come_back(tmp_path, size):
    frames = _frames(6, *size)
    path = media.write_film(tmp_path / "film.mp4", frames, 6.0)
    found = media.read_frames(path)
    assert found.shape == frames.shape
    assert np.abs(found.astype(int) - frames).max() <= 3
    some = media.read_frames(path, first=1, count=2, every=2)
    assert np.abs(some.astype(int) - frames[[1, 3]]).max() <= 3
    assert [file.name for file in tmp_path.iterdir()] == ["film.mp4"]


def test_videos_that_cannot_be_read(tmp_path):
    path = media.write_film(tmp_path / "film.mp4", _frames(3), 6.0)
    with pytest.raises(WrongFrames, match="film.mp4 has 3 frames: 4 from number 0 on"):
        media.read_frames(path, count=4)
    with pytest.raises(WrongFrames, match="3 frames: any from number 3 on"):
        media.read_frames(path, first=3)
    with pytest.raises(WrongFrames, match="every=0"):
        media.read_frames(path, every=0)
    (tmp_path / "words.mp4").write_text("no video")
    with pytest.raises(UnreadableMedia, match="words.mp4 cannot be read as a video"):
        media.read_frames(tmp_path / "words.mp4")
    with pytest.raises(WrongFrames, match="frame rate is 0"):
        media.write_film(tmp_path / "other.mp4", _frames(3), 0)


@pytest.fixture
def store(tmp_path):
    """Two shards, of episodes whose frames say which they are."""
    store = EpisodeStore.create(tmp_path / "episodes", {})
    for shard in range(2):
        store.write_shard(shard, [_episode(10 * shard + number) for number in range(2)])
    return store.path


def _episode(number: int) -> Episode:
    static = np.zeros((3, 200, 200, 3), np.uint8)
    static[:, 0, 0, 0], static[:, 0, 0, 1] = number, range(3)
    return Episode(
        task="open_drawer",
        instruction="open the drawer",
        actions=np.full((11, 7), -1, np.float32),
        robot_obs=np.zeros((11, 15)),
        scene_obs=np.zeros((11, 24)),
        imitate=np.ones(11, bool),
        frame_step=np.array([0, 5, 10]),
        rgb_static=static,
        rgb_gripper=np.zeros((3, 84, 84, 3), np.uint8),
        info={},
    )


def test_stored_moments(store):
    found = media.read_moments(store, 3, [2, 0])
    assert found[RGB_STATIC][:, 0, 0, :2].tolist() == [[11, 2], [11, 0]] and found[RGB_GRIPPER].shape == (2, 84, 84, 3)
    with pytest.raises(UnreadableMedia, match="has 4 episodes, so none with number 4"):
        media.read_moments(store, 4, [0])
    with pytest.raises(UnreadableMedia, match="has 4 episodes, so none with number -1"):
        media.read_moments(store, -1, [0])
    with pytest.raises(UnreadableMedia, match="episode 1 of .* has 3 frames, so none with number 3"):
        media.read_moments(store, 1, [3])
