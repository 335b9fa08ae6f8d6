"""How good a vision tokenizer is on held-out frames: reconstruction error, use of its codebook, pictures to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from emu3_vla.vision_tokenizer.base import VisionTokenizer
from emu3_vla.vision_tokenizer.codebook import perplexity
from emu3_vla.vision_tokenizer.images import from_bytes, to_images
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


@torch.inference_mode()
def measure(tokenizer: VisionTokenizer, images: torch.Tensor, median: torch.Tensor, distance: float) -> Measurement:
    """Measure on uint8 images (N, 3, H, W); median (3, H, W) in [-1, 1] and `distance` as in losses.foreground."""
    counts = torch.zeros(tokenizer.codebook_size)
    decoded = []
    for batch in images.split(BATCH):
        codes = tokenizer.encode(from_bytes(batch))
        counts += torch.bincount(codes.flatten(), minlength=tokenizer.codebook_size)
        decoded.append(tokenizer.decode(codes))
    pixels, decoded = from_bytes(images), torch.cat(decoded)
    return Measurement(
        frames=len(images),
        psnr_db=round(psnr(decoded, pixels), 3),
        foreground_psnr_db=round(psnr(decoded, pixels, foreground(pixels, median, distance)), 3),
        codes_used=round((counts > 0).float().mean().item(), 4),
        perplexity=round(perplexity(counts), 1),
    )


def save_pictures(tokenizer: VisionTokenizer, images: torch.Tensor, path: Path) -> None:
    """Write a PNG of some frames, evenly chosen: originals in the upper row, reconstructions below."""
    chosen = images[np.linspace(0, len(images) - 1, min(PICTURES, len(images))).round().astype(int)]
    pixels = from_bytes(chosen)
    rows = [np.concatenate(list(to_images(row)), axis=1) for row in (pixels, tokenizer.decode(tokenizer.encode(pixels)))]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)
