"""What a reconstruction is judged by, in training and in figures.

A tabletop is mostly wood that never changes, and an error there costs as much in PSNR as a lost block. So pixels far from the camera's
median image (arm, blocks, lights, an open drawer) count more. Image gradients are compared too: they keep small edges from being blurred
away. The perceptual part (perceptual.py) and the adversarial one (discriminator.py) are off by default: Emu3's sizes have them in the
preset movqgan.

Axes: B batch, C channels, H W rows and columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from emu3_vla.vision_tokenizer.images import from_bytes


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the parts. Raises ValueError for a negative one or no pixel loss."""

    absolute: float = 1.0  # |error|
    squared: float = 1.0  # error squared
    gradient: float = 0.5  # |error| of horizontal and vertical differences
    perceptual: float = 0.0  # LPIPS, or its substitute where no weights are given
    perceptual_weights: str = ""  # file that `python -m emu3_vla.vision_tokenizer.lpips` writes; empty: the substitute
    commitment: float = 0.25  # squared distance of latents from their codes
    codebook: float = 1.0  # the same pulling the codes, where the codebook learns by gradient (kind emu3)
    adversarial: float = 0.0  # times the factor that balances it with the rest; see discriminator.adaptive_weight
    foreground: float = 4.0  # added weight of a pixel that is far from the median image; 0: all pixels alike
    foreground_distance: float = 0.25  # what is far: mean over channels of |pixel - median|, pixels in [-1, 1]

    def __post_init__(self):
        negative = {name: value for name, value in vars(self).items() if not isinstance(value, str) and value < 0}
        if negative:
            raise ValueError(f"loss weights must not be negative, got {negative}")
        if self.absolute + self.squared == 0 or self.foreground_distance == 0:
            raise ValueError("at least one of absolute and squared, and foreground_distance, must be above 0")


def foreground(pixels: torch.Tensor, median: torch.Tensor, distance: float) -> torch.Tensor:
    """How far each pixel is from the median image, 0 (equal) to 1 (`distance` or more): float (B, 1, H, W)."""
    return ((pixels - median).abs().mean(1, keepdim=True) / distance).clamp_(max=1)


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor, median: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """Weighted mean error of decoded (B, 3, H, W) against pixels, both in [-1, 1]; median (3, H, W), or one for each. Returns a scalar."""
    weight = 1 + config.foreground * foreground(pixels, median, config.foreground_distance)
    weight = weight / weight.mean()
    error = decoded - pixels
    per_pixel = config.absolute * error.abs() + config.squared * error.square()
    loss = (weight * per_pixel).mean()
    if config.gradient:
        rows = (error[:, :, 1:] - error[:, :, :-1]).abs() * weight[:, :, 1:]
        columns = (error[:, :, :, 1:] - error[:, :, :, :-1]).abs() * weight[:, :, :, 1:]
        loss = loss + config.gradient * 0.5 * (rows.mean() + columns.mean())
    return loss


def psnr(decoded: torch.Tensor, pixels: torch.Tensor, weight: torch.Tensor | None = None) -> float:
    """Peak signal-to-noise ratio [dB] over all the pixels given, both in [-1, 1]; decoded is clipped to that first.

    weight (B, 1, H, W): counts pixels unequally, e.g. the foreground alone.
    """
    error = (decoded.clamp(-1, 1) - pixels).square().mean(1, keepdim=True) / 4
    mean = error.mean() if weight is None else (error * weight).sum() / weight.sum().clamp_min(1e-6)
    return -10 * math.log10(max(mean.item(), 1e-10))


def median_image(images: torch.Tensor) -> torch.Tensor:
    """Per-pixel median of uint8 images (N, 3, H, W): float32 (3, H, W) in [-1, 1]."""
    return from_bytes(images.median(dim=0).values)
