"""Camera images ↔ the pixels that a vision tokenizer reads. Training, tokenizing and acting all come through here.

A different resize or scaling at any of the three gives other codes for the same picture, so there is one of each.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def to_pixels(images: np.ndarray | torch.Tensor, size: int) -> torch.Tensor:
    """Resize and scale camera images.

    images: uint8 (B, H, W, 3), RGB, row 0 at the top. size: side of the result.
    Returns float32 (B, 3, size, size) in [-1, 1] on the CPU, channels last in memory. Bilinear with antialiasing, computed on bytes.
    Raises ValueError for another dtype or shape, or a size below 1.
    """
    return from_bytes(resize(images, size))


def resize(images: np.ndarray | torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """The first half of `to_pixels`: uint8 (B, H, W, 3) -> uint8 (B, 3, size, size), channels last in memory. size: or rows and columns."""
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}, expected uint8 (B, H, W, 3) as the cameras give them")
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size is {size}, expected at least 1 pixel")
    images = images.permute(0, 3, 1, 2)
    if not len(images):
        return images.new_empty(0, 3, height, width)
    if tuple(images.shape[-2:]) == (height, width):
        return images
    return F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)


def from_bytes(images: torch.Tensor) -> torch.Tensor:
    """The second half of `to_pixels`: uint8, any shape -> float32 in [-1, 1]."""
    return images.float().mul_(1 / 127.5).sub_(1)


def to_images(pixels: torch.Tensor, size: int | None = None) -> np.ndarray:
    """The inverse of `to_pixels`: float (B, 3, h, w) in [-1, 1] -> uint8 (B, size, size, 3), by default at its own size.

    Values outside [-1, 1] are clipped: a decoder may overshoot a little. Raises ValueError for another shape or NaN.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ValueError(f"pixels are {pixels.dtype} of shape {tuple(pixels.shape)}, expected float (B, 3, H, W) in [-1, 1]")
    pixels = pixels.detach().float().cpu()
    if not torch.isfinite(pixels).all():
        raise ValueError("pixels hold NaN or infinity; no image was made of them")
    images = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    if size is not None and tuple(images.shape[-2:]) != (size, size):
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return images.permute(0, 2, 3, 1).contiguous().numpy()
