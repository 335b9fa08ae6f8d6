"""MP4 by PyAV: frames in, frames out, and what a file says of itself without decoding it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from emu3_vla.data.recordings.recording import RecordingError, blocks_of

ENCODERS = {"h264": "libx264", "av1": "libsvtav1"}
LOSSLESS_ENCODER = "libx264rgb"


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """How frames are compressed."""

    codec: str = "h264"  # or av1: smaller, and older programs cannot play it
    crf: int = 18  # of that codec: lower is better and larger
    preset: str = ""  # of that codec; empty: veryfast for h264, 10 for av1
    keyframe_interval: int = 2  # frames from one that stands alone to the next: small is quick to read at random, and larger
    pixel_format: str = "yuv420p"  # yuv444p keeps colours at full resolution; h264 alone
    lossless: bool = False  # every pixel as it was: h264 in RGB, some ten times larger and slower to read

    def __post_init__(self):
        if self.codec not in ENCODERS:
            raise ValueError(f"video.codec={self.codec!r}, expected one of {', '.join(ENCODERS)}")
        if self.lossless and self.codec != "h264":
            raise ValueError(f"video.lossless=true needs video.codec=h264, not {self.codec}")
        if not 0 <= self.crf <= (51 if self.codec == "h264" else 63):
            raise ValueError(f"video.crf={self.crf} is outside what {self.codec} knows (0 to {51 if self.codec == 'h264' else 63})")
        if self.keyframe_interval < 1:
            raise ValueError(f"video.keyframe_interval={self.keyframe_interval}, expected at least 1")
        if self.pixel_format not in ("yuv420p", "yuv444p") or (self.codec == "av1" and self.pixel_format != "yuv420p"):
            raise ValueError(f"video.pixel_format={self.pixel_format!r}: expected yuv420p, or with codec h264 yuv444p")

    @property
    def encoder(self) -> str:
        return LOSSLESS_ENCODER if self.lossless else ENCODERS[self.codec]

    @property
    def written_format(self) -> str:
        return "rgb24" if self.lossless else self.pixel_format

    def options(self) -> dict[str, str]:
        if self.lossless:
            return {"qp": "0", "preset": self.preset or "ultrafast"}
        return {"crf": str(self.crf), "preset": self.preset or {"h264": "veryfast", "av1": "10"}[self.codec]}

    def says(self) -> str:
        """One phrase for a list of losses; empty where nothing is lost."""
        return "" if self.lossless else f"{self.codec}, crf {self.crf}, {self.pixel_format}"


def rate(rate_hz: float) -> Fraction:
    """A frame rate as containers hold it."""
    return Fraction(rate_hz).limit_denominator(1001)


def write_video(path: Path, blocks: Iterable[np.ndarray], rate_hz: float, config: VideoConfig) -> int:
    """Write uint8 (n, H, W, 3) blocks as one MP4, whole or not at all, in one thread; the same frames give the same bytes. Returns
    the number of frames.

    Raises ValueError where this PyAV lacks the encoder, or the format the size.
    """
    if config.encoder not in av.codecs_available:
        raise ValueError(
            f"this PyAV ({av.__version__}) has no encoder {config.encoder}; choose another video.codec, or install PyAV's wheel"
        )
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with av.open(str(temporary), "w") as container:
        stream = container.add_stream(config.encoder, rate=rate(rate_hz), options=config.options())
        stream.gop_size, stream.thread_count, stream.pix_fmt = config.keyframe_interval, 1, config.written_format
        for block in blocks:
            if not count:
                stream.height, stream.width = block.shape[1:3]
                require_size(block.shape[2], block.shape[1], config, str(path))
            for image in block:
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = count, 1 / rate(rate_hz)
                count += 1
                container.mux(stream.encode(frame))
        if not count:
            raise ValueError(f"{path} would have no frame")
        container.mux(stream.encode(None))
    temporary.replace(path)
    return count


def require_size(width: int, height: int, config: VideoConfig, whose: str) -> None:
    """Raise ValueError for odd sizes, which 4:2:0 formats do not have."""
    if config.written_format == "yuv420p" and (width % 2 or height % 2):
        raise ValueError(
            f"{whose}: frames of {width}×{height} have an odd side, which yuv420p cannot hold; set video.pixel_format=yuv444p, "
            "video.lossless=true, or another size in the mapping"
        )


def read_video(path: Path, first: int, count: int, rate_hz: float, where: str) -> Iterator[np.ndarray]:
    """Frames first … first + count - 1 by their times, in blocks uint8 (n, H, W, 3).

    where: what errors call the episode. Raises RecordingError for a file that is missing, damaged or lacks one of them.
    """
    yield from blocks_of(_frames(path, first, count, rate_hz, where))


def _frames(path: Path, first: int, count: int, rate_hz: float, where: str) -> Iterator[np.ndarray]:
    if not path.is_file():
        raise RecordingError(f"{where}: its video {path} is missing")
    wanted = first
    try:
        with av.open(str(path)) as container:
            stream = _stream(container, path, where)
            if first:
                container.seek(int(first / rate_hz / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                number = float(frame.pts * stream.time_base) * rate_hz
                if number < wanted - 0.5:
                    continue
                if number > wanted + 0.5:
                    raise RecordingError(f"{where}: {path} has no frame for step {wanted - first}, at {wanted / rate_hz:.3f} s")
                yield frame.to_ndarray(format="rgb24")
                wanted += 1
                if wanted == first + count:
                    return
    except av.FFmpegError as error:
        raise RecordingError(f"{where}: {path} cannot be decoded ({error}) at step {wanted - first}") from error
    raise RecordingError(f"{where}: {path} ends after {wanted - first} of its {count} frames")


def _stream(container, path: Path, where: str):
    if not container.streams.video:
        raise RecordingError(f"{where}: {path} has no video in it")
    stream = container.streams.video[0]
    stream.thread_count = 1  # a process a core is quicker than frames shared among threads
    return stream


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What a file says without being decoded. times_s: float64, of its frames, ascending."""

    times_s: np.ndarray
    codec: str
    width: int
    height: int


def video_facts(path: Path, where: str) -> VideoFacts:
    """Raises RecordingError for a file that is missing or damaged."""
    if not path.is_file():
        raise RecordingError(f"{where}: its video {path} is missing")
    try:
        with av.open(str(path)) as container:
            stream = _stream(container, path, where)
            times = [float(packet.pts * stream.time_base) for packet in container.demux(stream) if packet.pts is not None]
            return VideoFacts(times_s=np.sort(times), codec=stream.codec_context.name, width=stream.width, height=stream.height)
    except av.FFmpegError as error:
        raise RecordingError(f"{where}: {path} cannot be read ({error})") from error
