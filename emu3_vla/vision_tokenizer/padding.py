"""Any size and length to what a tokenizer takes, and back: padded by repeating the edge, undone by cutting it off again.

padded, padding = tokenizer.pad(pixels)
pixels = padding.undo(tokenizer.decode(tokenizer.encode(padded)))      # the size and length of the original
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True)
class Padding:
    """What was there before padding: rows, columns, and frames (None for images). The padding lies below, to the right, and behind."""

    height: int
    width: int
    frames: int | None = None

    def undo(self, pixels: torch.Tensor) -> torch.Tensor:
        """Cut (B, 3, H, W) or (B, T, 3, H, W) back to the original size. Raises ValueError for pixels smaller than that."""
        is_video = self.frames is not None
        if pixels.ndim != 4 + is_video or pixels.shape[-2] < self.height or pixels.shape[-1] < self.width:
            raise ValueError(f"pixels of shape {tuple(pixels.shape)} were not padded from {self}")
        pixels = pixels[..., : self.height, : self.width]
        return pixels[:, : self.frames] if is_video else pixels


def pad_to_multiple(pixels: torch.Tensor, patch: int, frames_per_code: int) -> tuple[torch.Tensor, Padding]:
    """Pad images (B, 3, H, W) or video (B, T, 3, H, W) to multiples of `patch` pixels and `frames_per_code` frames."""
    height, width = pixels.shape[-2:]
    frames = pixels.shape[1] if pixels.ndim == 5 else None
    padding = Padding(height=height, width=width, frames=frames)
    below, right = -height % patch, -width % patch
    if below or right:
        flat = F.pad(pixels.flatten(0, -4), (0, right, 0, below), mode="replicate")
        pixels = flat.unflatten(0, pixels.shape[:-3])
    if frames is not None and frames % frames_per_code:
        last = pixels[:, -1:].expand(-1, -frames % frames_per_code, -1, -1, -1)
        pixels = torch.cat((pixels, last), dim=1)
    return pixels, padding
