"""Pictures and videos in files, and moments in episode stores: read as arrays, written whole or not at all.

Axes: T frames, H W rows and columns of pixels. All arrays are uint8 RGB, row 0 at the top.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from emu3_vla.data.episodes import EpisodeStore
from emu3_vla.data.recordings.video import VideoConfig, write_video
from emu3_vla.pipelines.errors import UnreadableMedia, WrongFrames, WrongSize
from envs.spec import CAMERAS

MOST_PIXELS = 2**26
"""Of a picture that is read. Emu3 looks at 2**20 of them at most; what has many more is no picture, or a mistake."""


def read_picture(path: str | Path) -> np.ndarray:
    """A picture file (PNG, JPEG, ...) as (H, W, 3), turned as its camera says. Raises UnreadableMedia, WrongSize."""
    return np.array(_opened(path).convert("RGB"))


def read_mask(path: str | Path) -> np.ndarray:
    """A picture file as bool (H, W): true where it is brighter than half. Raises UnreadableMedia, WrongSize."""
    return np.asarray(_opened(path).convert("L")) > 127


def read_frames(path: str | Path, *, first: int = 0, count: int = 0, every: int = 1) -> np.ndarray:
    """Frames of a video file: (T, H, W, 3). first: number of the first. count: of frames; 0: all from there. every: one of so many.

    Raises UnreadableMedia, WrongFrames where the video has not as many.
    """
    if first < 0 or count < 0 or every < 1:
        raise WrongFrames(f"first={first}, count={count}, every={every}: expected at least 0, 0 and 1")
    path, frames, number = _existing(path), [], 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnreadableMedia(f"{path} has no video in it")
            for number, frame in enumerate(container.decode(video=0), start=1):
                if number > first and (number - 1 - first) % every == 0:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if count and len(frames) == count:
                    break
    except av.FFmpegError as error:
        raise UnreadableMedia(f"{path} cannot be read as a video ({error})") from error
    if not frames or len(frames) < count:
        raise WrongFrames(f"{path} has {number} frames: {count or 'any'} from number {first} on, one of {every}, are not there")
    return np.stack(frames)


def read_moments(store: str | Path, episode: int, frames: Sequence[int]) -> dict[str, np.ndarray]:
    """Stored frames of an episode store: camera → (T, H, W, 3). episode: counted over all shards in their order.

    Raises UnreadableMedia naming how many there are, FileNotFoundError and EpisodeStoreError for a store that cannot be opened.
    """
    opened, before = EpisodeStore.open(store), 0
    for shard in opened.shard_indices():
        records = opened.records(shard)
        if 0 <= episode - before < len(records):
            lengths = [record["frames"] for record in records[: episode - before + 1]]
            wrong = [frame for frame in frames if not 0 <= frame < lengths[-1]]
            if wrong:
                raise UnreadableMedia(f"episode {episode} of {store} has {lengths[-1]} frames, so none with number {wrong[0]}")
            start = sum(lengths[:-1])
            # Few of a shard's frames: each is read by itself.
            rows = [slice(start + frame, start + frame + 1) for frame in frames]
            return {camera: np.concatenate([opened.read_frames(camera, shard, row) for row in rows]) for camera in CAMERAS}
        before += len(records)
    raise UnreadableMedia(f"{store} has {before} episodes, so none with number {episode}")


def write_picture(path: Path, picture: np.ndarray) -> Path:
    """Write (H, W, 3) as a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    Image.fromarray(picture).save(temporary, "png")
    os.replace(temporary, path)
    return path


def write_film(path: Path, frames: np.ndarray, rate_hz: float) -> Path:
    """Write (T, H, W, 3) as an MP4, whole or not at all."""
    if not 0 < rate_hz < float("inf"):
        raise WrongFrames(f"the frame rate is {rate_hz}, expected more than 0 a second")
    # Half the colours' resolution is what every player shows, but it needs even sides.
    odd = frames.shape[1] % 2 or frames.shape[2] % 2
    write_video(path, [frames], rate_hz, VideoConfig(pixel_format="yuv444p" if odd else "yuv420p"))
    return path


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise UnreadableMedia(f"{path} does not exist, or is no file")
    return Path(path)


def _opened(path: str | Path) -> Image.Image:
    path = _existing(path)
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise WrongSize(f"{path} has {picture.width}×{picture.height} pixels, expected at most {MOST_PIXELS}; make it smaller")
            picture.load()
            return ImageOps.exif_transpose(picture)
    except UnidentifiedImageError as error:
        raise UnreadableMedia(f"{path} is no picture that can be read (PNG, JPEG and their like can)") from error
    except Image.DecompressionBombError as error:
        raise WrongSize(f"{path} is too large ({error}); expected at most {MOST_PIXELS} pixels") from error
    except (OSError, SyntaxError) as error:  # what Pillow raises for files that are cut short or broken
        raise UnreadableMedia(f"{path} is damaged or cut short: {error}") from error
