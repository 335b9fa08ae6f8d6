"""Frames of an episode store for training a tokenizer: resized once, held in memory as bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from emu3_vla.data.episodes import EpisodeStore
from emu3_vla.vision_tokenizer.images import from_bytes, resize


def load_frames(store: EpisodeStore, shards: Sequence[int], camera: str, size: int, limit: int) -> torch.Tensor:
    """Frames of `camera`, evenly thinned to at most `limit`: uint8 (N, 3, size, size), channels last in memory.

    Raises ValueError if those shards hold no frame.
    """
    counts = [sum(record["frames"] for record in store.records(shard)) for shard in shards]
    total = sum(counts)
    if not total:
        raise ValueError(f"{store.path}: shards {list(shards)} hold no frame; collect episodes with images first")
    chosen = np.unique(np.linspace(0, total - 1, min(limit, total)).round().astype(int))
    frames = torch.empty(len(chosen), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    start, filled = 0, 0
    for shard, count in zip(shards, counts, strict=True):
        local = chosen[(chosen >= start) & (chosen < start + count)] - start
        start += count
        if len(local):
            frames[filled : filled + len(local)] = resize(store.read_frames(camera, shard)[local], size)
            filled += len(local)
    return frames


def draw(frames: torch.Tensor, batch_size: int, random: np.random.Generator) -> torch.Tensor:
    """A batch drawn with replacement: float32 (batch_size, 3, size, size) in [-1, 1], channels last."""
    return from_bytes(frames[torch.from_numpy(random.integers(len(frames), size=batch_size))])
