"""The light vision tokenizer: small enough to train on a laptop's CPU.

pixels → unshuffle 4 → convolutions at 1/4 → stride 2 → convolutions at 1/8 → 8 numbers a position → nearest of 1,024 codes; and back.

Nearly all the arithmetic is 3×3 convolutions at 1/4 and 1/8 of the resolution, the layout that CPUs do at full speed in bfloat16. There
is no normalisation layer: GroupNorm was the dearest thing in the network, and residual branches that start at zero train without it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from emu3_vla.vision_tokenizer.base import VisionTokenizer, VisionTokenizerError
from emu3_vla.vision_tokenizer.codebook import Codebook
from envs.spec import RGB_GRIPPER, RGB_STATIC

STEM = 4
PATCH = 2 * STEM
PIXEL_CHANNELS = 3 * STEM * STEM


@dataclass(frozen=True, kw_only=True)
class LightConfig:
    """Shape of the light tokenizer. Raises ValueError for sizes that cannot be."""

    codebook_size: int = 1024
    code_dimension: int = 8
    channels: tuple[int, int] = (64, 128)  # at 1/4 and at 1/8 of the resolution
    encoder_blocks: tuple[int, int] = (1, 2)  # residual blocks at 1/4 and at 1/8
    decoder_blocks: tuple[int, int] = (1, 3)
    image_sizes: dict[str, int] = field(default_factory=lambda: {RGB_STATIC: 128, RGB_GRIPPER: 96})

    def __post_init__(self):
        for name in ("channels", "encoder_blocks", "decoder_blocks"):
            value = tuple(getattr(self, name))
            if len(value) != 2 or min(value) < (1 if name == "channels" else 0):
                raise ValueError(f"{name} is {value}, expected two numbers: at 1/4 and at 1/8 of the resolution")
            object.__setattr__(self, name, value)
        if self.codebook_size < 2 or self.code_dimension < 2:
            raise ValueError(f"codebook of {self.codebook_size} codes of {self.code_dimension}: both must be at least 2")
        wrong = {camera: size for camera, size in self.image_sizes.items() if size < PATCH or size % PATCH}
        if wrong or not self.image_sizes:
            raise ValueError(f"image_sizes {self.image_sizes}: every side must be a positive multiple of {PATCH}")


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), the last convolution starting at zero."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.kaiming_normal_(self.first.weight, nonlinearity="relu")
        nn.init.zeros_(self.second.weight)
        for layer in (self.first, self.second):
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


def _blocks(channels: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(channels) for _ in range(count)]


def _encoder(config: LightConfig) -> nn.Sequential:
    fine, coarse = config.channels
    return nn.Sequential(
        nn.PixelUnshuffle(STEM),
        nn.Conv2d(PIXEL_CHANNELS, fine, 3, padding=1),
        *_blocks(fine, config.encoder_blocks[0]),
        nn.Conv2d(fine, coarse, 2, stride=2),
        *_blocks(coarse, config.encoder_blocks[1]),
        nn.ReLU(),
        nn.Conv2d(coarse, config.code_dimension, 1),
    )


def _decoder(config: LightConfig) -> nn.Sequential:
    fine, coarse = config.channels
    return nn.Sequential(
        nn.Conv2d(config.code_dimension, coarse, 3, padding=1),
        *_blocks(coarse, config.decoder_blocks[1]),
        nn.ConvTranspose2d(coarse, fine, 2, stride=2),
        *_blocks(fine, config.decoder_blocks[0]),
        nn.ReLU(),
        nn.Conv2d(fine, PIXEL_CHANNELS, 3, padding=1),
        nn.PixelShuffle(STEM),
    )


class LightTokenizer(VisionTokenizer):
    """See the head of this file. Frames of any size that is a multiple of 8; video frame by frame.

    encoder: float (B, 3, H, W) -> latents (B, D, h, w). decoder: unit-length codes × sqrt(D) (B, D, h, w) -> pixels (B, 3, H, W).
    """

    kind = "light"
    patch = PATCH

    def __init__(self, config: LightConfig):
        super().__init__()
        self.config = config
        self.codebook_size = config.codebook_size
        self.image_sizes = dict(config.image_sizes)
        self.encoder = _encoder(config)
        self.codebook = Codebook(config.codebook_size, config.code_dimension)
        self.decoder = _decoder(config)
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, config: dict[str, Any], *, where: str) -> LightTokenizer:
        try:
            return cls(LightConfig(**config))
        except (TypeError, ValueError) as error:
            raise VisionTokenizerError(f"{where}: {error}") from error

    def config_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents of pixels (B, 3, H, W), before quantisation: float32 (B * h * w, D), row-major over the grid."""
        latents = self.encoder(pixels.contiguous(memory_format=torch.channels_last))
        return latents.permute(0, 2, 3, 1).flatten(0, 2).float()

    def pixels(self, units_ND: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        """Pixels float32 (B, 3, H, W) of unit-length codes (B * h * w, D); grid: (B, h, w)."""
        # Numbers of unit variance suit the first convolution; unit vectors have variance 1 / D.
        codes = (units_ND * math.sqrt(self.config.code_dimension)).unflatten(0, grid).permute(0, 3, 1, 2)
        return self.decoder(codes).float()

    def _encode_frames(self, pixels: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = pixels.shape
        return self.codebook.nearest(self.latents(pixels)).view(batch, height // PATCH, width // PATCH)

    def _decode_frames(self, codes: torch.Tensor) -> torch.Tensor:
        return self.pixels(self.codebook.codes[codes.flatten()], tuple(codes.shape))
