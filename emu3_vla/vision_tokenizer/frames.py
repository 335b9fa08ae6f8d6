"""Frames of episode stores, resized once and held in memory as bytes: to train a tokenizer on, and to measure one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from emu3_vla.data.episodes import FRAMES_PER_CHUNK, EpisodeStore
from emu3_vla.vision_tokenizer.images import from_bytes, resize
from emu3_vla.vision_tokenizer.losses import median_image

# A median is as good from this many frames as from all.
MEDIAN_FRAMES = 500

Source = tuple[EpisodeStore, Sequence[int]]  # a store and which of its shards


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Frames of one camera, episode after episode.

    images  uint8 (N, 3, size, size), channels last in memory
    store   int64 (N,): from which of the sources a frame is
    clips   int64 (M,): rows at which `clip_length` consecutive stored frames of one episode begin
    rows    int64 (N,): number of the frame among all frames of its source's shards
    """

    images: torch.Tensor
    store: torch.Tensor
    clips: torch.Tensor
    clip_length: int
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def medians(self) -> torch.Tensor:
        """Median image of each source: float32 (sources, 3, size, size) in [-1, 1]. Scenes differ, so their medians do."""
        parts = [self.images[self.store == number] for number in range(int(self.store.max()) + 1)]
        return torch.stack([median_image(part[:: max(1, len(part) // MEDIAN_FRAMES)]) for part in parts])

    def draw(self, count: int, random: np.random.Generator) -> torch.Tensor:
        """Rows (count,) drawn with replacement."""
        return torch.from_numpy(random.integers(len(self.images), size=count))

    def draw_clips(self, count: int, random: np.random.Generator) -> torch.Tensor:
        """Rows (count, clip_length) of clips drawn with replacement."""
        return self.clip_rows(torch.from_numpy(random.integers(len(self.clips), size=count)))

    def clip_rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Rows (n, clip_length) of the clips `numbers` (n,)."""
        return self.clips[numbers][:, None] + torch.arange(self.clip_length)

    def pixels(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 (..., 3, size, size) in [-1, 1] of the frames `rows` (...)."""
        return from_bytes(self.images[rows])


def load_frames(sources: Sequence[Source], camera: str, size: int, limit: int, clip_length: int = 1) -> Frames:
    """Frames of `camera`, evenly thinned to at most `limit`; by whole clips where clip_length is above 1.

    Raises ValueError if the shards hold no frame, or none of their episodes is as long as a clip.
    """
    counts = [[record["frames"] for record in store.records(shard)] for store, shards in sources for shard in shards]
    lengths = np.array([length for shard in counts for length in shard], int)
    if not lengths.sum():
        raise ValueError(f"{_named(sources)} hold no frame; collect episodes with images first")
    episode = np.repeat(np.arange(len(lengths)), lengths)
    chosen = _thinned(lengths, limit, clip_length)
    last = chosen[clip_length - 1 :]
    first = chosen[: len(last)]  # of every run of clip_length frames that were kept
    clips = np.flatnonzero((last - first == clip_length - 1) & (episode[first] == episode[last]))
    if not len(clips):
        raise ValueError(f"{_named(sources)} hold no episode of {clip_length} frames; record more often, or shorten the clips")
    per_source = [sum(sum(records) for records in counts[start:end]) for start, end in _spans([len(shards) for _, shards in sources])]
    starts = np.concatenate([[0], np.cumsum(per_source)])
    source = np.searchsorted(starts, chosen, side="right") - 1
    if without := [str(store.path) for number, (store, _) in enumerate(sources) if number not in source]:
        raise ValueError(f"of {limit} frames none is of {', '.join(without)}; ask for more, or leave that store out")
    return Frames(
        images=_read(sources, counts, camera, size, chosen),
        store=torch.from_numpy(source),
        clips=torch.from_numpy(clips),
        clip_length=clip_length,
        rows=chosen - starts[source],
    )


def _thinned(lengths: np.ndarray, limit: int, clip_length: int) -> np.ndarray:
    """Numbers of the frames that are kept, ascending. Episodes are cut into windows of clip_length, of which every so many stay whole."""
    total = int(lengths.sum())
    if total <= limit:
        return np.arange(total)
    if clip_length == 1:
        return np.unique(np.linspace(0, total - 1, limit).round().astype(int))
    within = np.concatenate([np.arange(length) for length in lengths])
    whole = np.repeat(lengths - lengths % clip_length, lengths) > within  # an episode's last frames may not fill a window
    window = np.cumsum(within % clip_length == 0) - 1
    windows = np.unique(window[whole])
    if not len(windows):
        return np.arange(0)
    keep = windows[np.linspace(0, len(windows) - 1, max(1, limit // clip_length)).round().astype(int)]
    return np.flatnonzero(np.isin(window, keep) & whole)


def _read(sources: Sequence[Source], counts: list[list[int]], camera: str, size: int, chosen: np.ndarray) -> torch.Tensor:
    images = torch.empty(len(chosen), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    start, filled = 0, 0
    shards = [(store, shard) for store, shards in sources for shard in shards]
    for (store, shard), count in zip(shards, map(sum, counts), strict=True):
        local = chosen[(chosen >= start) & (chosen < start + count)] - start
        start += count
        if len(local):
            images[filled : filled + len(local)] = resize(read_rows(store, camera, shard, local, count), size)
            filled += len(local)
    return images


def read_rows(store: EpisodeStore, camera: str, shard: int, rows: np.ndarray, count: int) -> np.ndarray:
    """Frames `rows` (ascending) of a shard that holds `count`: uint8 (len(rows), H, W, 3). Reads no more of it than it must."""
    if len(rows) * FRAMES_PER_CHUNK > count:
        return store.read_frames(camera, shard)[rows]
    return np.concatenate([store.read_frames(camera, shard, slice(int(row), int(row) + 1)) for row in rows])


def _spans(counts: Sequence[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(counts)
    return [(int(end - count), int(end)) for count, end in zip(counts, ends, strict=True)]


def _named(sources: Sequence[Source]) -> str:
    return "; ".join(f"{store.path}: shards {list(shards)}" for store, shards in sources)
