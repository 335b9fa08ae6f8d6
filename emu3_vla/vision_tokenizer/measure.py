"""How good a vision tokenizer is on held-out frames: reconstruction error, use of its codebook, pictures to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from emu3_vla.vision_tokenizer.base import VisionTokenizer
from emu3_vla.vision_tokenizer.codebook import perplexity
from emu3_vla.vision_tokenizer.frames import Frames
from emu3_vla.vision_tokenizer.images import to_images
from emu3_vla.vision_tokenizer.losses import foreground, psnr

BATCH = 32
PICTURES = 8


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Figures over one camera's frames.

    psnr_db: over all pixels. foreground_psnr_db: pixels weighted by their distance from the median image, so that wood that never
    changes does not count. codes_used: share of the codebook that occurs. perplexity: see codebook.perplexity.
    """

    frames: int
    psnr_db: float
    foreground_psnr_db: float
    codes_used: float
    perplexity: float

    def __str__(self) -> str:
        return (
            f"PSNR {self.psnr_db:.2f} dB (foreground {self.foreground_psnr_db:.2f}), "
            f"{self.codes_used:.0%} of codes, perplexity {self.perplexity:.0f}"
        )


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Frames through the codes and back. rows int64 (N,) or (M, T): which frames; decoded float32 (..., 3, size, size); codes int64."""

    rows: torch.Tensor
    codes: torch.Tensor
    decoded: torch.Tensor


@torch.inference_mode()
def reconstruct(tokenizer: VisionTokenizer, frames: Frames, rows: torch.Tensor) -> Reconstruction:
    """Images `rows` (N,), or clips (M, T); a clip whose length is no multiple of frames_per_code is padded and cut back."""
    codes, decoded = [], []
    for part in rows.split(max(1, BATCH // rows[0].numel())):
        padded, padding = tokenizer.pad(frames.pixels(part).to(tokenizer.device))
        codes.append(tokenizer.encode(padded))
        decoded.append(padding.undo(tokenizer.decode(codes[-1])).cpu())
    return Reconstruction(rows=rows, codes=torch.cat(codes).cpu(), decoded=torch.cat(decoded))


def measure(tokenizer: VisionTokenizer, frames: Frames, medians: torch.Tensor, distance: float, *, clips: bool = False) -> Measurement:
    """Measure on all frames as images, or on all clips that do not overlap.

    medians (sources, 3, size, size) in [-1, 1]; `distance` as in losses.foreground.
    """
    return figures(tokenizer, frames, medians, distance, reconstruct(tokenizer, frames, all_rows(frames, clips=clips)))


def all_rows(frames: Frames, *, clips: bool) -> torch.Tensor:
    """Rows (N,) of all frames, or (M, clip_length) of all clips that do not overlap."""
    if not clips:
        return torch.arange(len(frames))
    apart, end = [], 0
    for number, start in enumerate(frames.clips.tolist()):
        if start >= end:
            apart.append(number)
            end = start + frames.clip_length
    return frames.clip_rows(torch.tensor(apart))


def figures(tokenizer: VisionTokenizer, frames: Frames, medians: torch.Tensor, distance: float, made: Reconstruction) -> Measurement:
    rows = made.rows.flatten()
    pixels, decoded = frames.pixels(rows), made.decoded.flatten(0, -4)
    counts = torch.bincount(made.codes.flatten(), minlength=tokenizer.codebook_size)
    weight = torch.cat(
        [foreground(p, medians[frames.store[r]], distance) for p, r in zip(pixels.split(BATCH), rows.split(BATCH), strict=True)]
    )
    return Measurement(
        frames=len(rows),
        psnr_db=round(psnr(decoded, pixels), 3),
        foreground_psnr_db=round(psnr(decoded, pixels, weight), 3),
        codes_used=round((counts > 0).float().mean().item(), 4),
        perplexity=round(perplexity(counts), 1),
    )


def save_pictures(tokenizer: VisionTokenizer, frames: Frames, path: Path) -> None:
    """Write a PNG of some frames, evenly chosen: originals in the upper row, reconstructions below."""
    made = reconstruct(tokenizer, frames, evenly(len(frames), PICTURES))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture_rows(frames.pixels(made.rows), made.decoded)).save(path)


def picture_rows(*rows: torch.Tensor) -> np.ndarray:
    """Pictures (n, 3, size, size) of each argument side by side, the arguments below one another: uint8 (H, W, 3)."""
    return np.concatenate([np.concatenate(list(to_images(row)), axis=1) for row in rows])


def evenly(length: int, count: int) -> torch.Tensor:
    """At most `count` of the numbers below `length`, first and last among them: int64."""
    return torch.from_numpy(np.linspace(0, length - 1, min(count, length)).round().astype(int))
