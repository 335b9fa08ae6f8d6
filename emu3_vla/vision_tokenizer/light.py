"""The light vision tokenizer: small enough to train on a laptop's CPU.

pixels → unshuffle 4 → convolutions at 1/4 → stride 2 → convolutions at 1/8 → 8 numbers a position → nearest of 1,024 codes; and back.

Nearly all the arithmetic is 3×3 convolutions at 1/4 and 1/8 of the resolution, the layout that CPUs do at full speed in bfloat16. There
is no normalisation layer: GroupNorm was the dearest thing in the network, and residual branches that start at zero train without it.

With `frames_per_code=4` Emu3's temporal blocks stand between the 2-D network and the codes. A still image then goes as in Emu3: its
features, repeated in time, give one code a position; of the four frames decoded in time only the first goes through the 2-D decoder.

Axes: B batch, T frames, t codes in time, C channels, D code dimensions, H W pixels, h w codes, N rows (positions of all grids).
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
from emu3_vla.vision_tokenizer.temporal import TemporalDecoder, TemporalEncoder, freeze_batch_norms
from envs.spec import RGB_GRIPPER, RGB_STATIC

STEM = 4
PIXEL_CHANNELS = 3 * STEM * STEM


@dataclass(frozen=True, kw_only=True)
class LightConfig:
    """Shape of the light tokenizer. Raises ValueError for sizes that cannot be."""

    codebook_size: int = 1024
    code_dimension: int = 8
    channels: tuple[int, ...] = (64, 128)  # at 1/4, at 1/8; a third number, at 1/16, makes a code of 16×16 pixels
    encoder_blocks: tuple[int, ...] = (1, 1)  # residual blocks at each of these; encoding is on the way of every decision, decoding is not
    decoder_blocks: tuple[int, ...] = (1, 3)
    frames_per_code: int = 1  # 1: every frame alone; 4: Emu3's two halvings in time; any power of two
    temporal_channels: int = 32  # of the features that are mixed in time
    temporal_blocks: int = 1
    image_sizes: dict[str, int] = field(default_factory=lambda: {RGB_STATIC: 128, RGB_GRIPPER: 96})

    def __post_init__(self):
        for name in ("channels", "encoder_blocks", "decoder_blocks"):
            value = tuple(getattr(self, name))
            if len(value) != len(self.channels) or len(value) < 2 or min(value) < (1 if name == "channels" else 0):
                raise ValueError(f"{name} is {value}, expected one number each for 1/4, 1/8, ... of the resolution, as many as channels")
            object.__setattr__(self, name, value)
        if self.codebook_size < 2 or self.code_dimension < 2:
            raise ValueError(f"codebook of {self.codebook_size} codes of {self.code_dimension}: both must be at least 2")
        if self.frames_per_code < 1 or self.frames_per_code & (self.frames_per_code - 1):
            raise ValueError(f"frames_per_code is {self.frames_per_code}, expected a power of two: 1, 2, 4, ...")
        if self.temporal_channels < 1 or self.temporal_blocks < 0:
            raise ValueError(f"temporal_channels={self.temporal_channels}, temporal_blocks={self.temporal_blocks}: too few")
        wrong = {camera: size for camera, size in self.image_sizes.items() if size < self.patch or size % self.patch}
        if wrong or not self.image_sizes:
            raise ValueError(f"image_sizes {self.image_sizes}: every side must be a positive multiple of {self.patch}")

    @property
    def patch(self) -> int:
        """Pixels per code along a side."""
        return STEM * 2 ** (len(self.channels) - 1)

    @property
    def feature_channels(self) -> int:
        """What the 2-D network ends in: the latents themselves, or what is mixed in time first."""
        return self.code_dimension if self.frames_per_code == 1 else self.temporal_channels


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
    layers = [nn.PixelUnshuffle(STEM), nn.Conv2d(PIXEL_CHANNELS, config.channels[0], 3, padding=1)]
    for level, (channels, blocks) in enumerate(zip(config.channels, config.encoder_blocks, strict=True)):
        if level:
            layers.append(nn.Conv2d(config.channels[level - 1], channels, 2, stride=2))
        layers += _blocks(channels, blocks)
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(config.channels[-1], config.feature_channels, 1))


def _decoder(config: LightConfig) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(config.feature_channels, config.channels[-1], 3, padding=1)]
    for level in reversed(range(len(config.channels))):
        layers += _blocks(config.channels[level], config.decoder_blocks[level])
        if level:
            layers.append(nn.ConvTranspose2d(config.channels[level], config.channels[level - 1], 2, stride=2))
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(config.channels[0], PIXEL_CHANNELS, 3, padding=1), nn.PixelShuffle(STEM))


class LightTokenizer(VisionTokenizer):
    """See the head of this file. Frames of any size that is a multiple of `patch`.

    encoder: float (B, 3, H, W) -> features (B, C, h, w). decoder: the same back. temporal_encoder, temporal_decoder: None where
    every frame has its own codes (then C = D), else between features and codes.
    """

    kind = "light"

    def __init__(self, config: LightConfig):
        super().__init__()
        self.config = config
        self.codebook_size = config.codebook_size
        self.patch, self.frames_per_code = config.patch, config.frames_per_code
        self.image_sizes = dict(config.image_sizes)
        self.encoder = _encoder(config)
        self.codebook = Codebook(config.codebook_size, config.code_dimension)
        self.decoder = _decoder(config)
        self.temporal_encoder = self.temporal_decoder = None
        if config.frames_per_code > 1:
            halvings = config.frames_per_code.bit_length() - 1
            shape = (config.temporal_channels, config.code_dimension, halvings, config.temporal_blocks)
            self.temporal_encoder, self.temporal_decoder = TemporalEncoder(*shape), TemporalDecoder(*shape)
        self.encoder.to(memory_format=torch.channels_last)
        self.decoder.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, config: dict[str, Any], *, where: str) -> LightTokenizer:
        try:
            return cls(LightConfig(**config))
        except (TypeError, ValueError) as error:
            raise VisionTokenizerError(f"{where}: {error}") from error

    def config_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)

    def train(self, mode: bool = True) -> LightTokenizer:
        """As every module's, but the batch norms in time stay as they are; see temporal.py."""
        super().train(mode)
        freeze_batch_norms(self)
        return self

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.ndim == 4:
            features = self.frame_features(pixels)
            if self.temporal_encoder is not None:
                still = features[:, None].expand(-1, self.frames_per_code, -1, -1, -1)
                features = self.temporal_encoder(still)[:, 0]
            return features.permute(0, 2, 3, 1).float()
        features = self.frame_features(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        if self.temporal_encoder is not None:
            features = self.temporal_encoder(features)
        return features.permute(0, 1, 3, 4, 2).float()

    def frame_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The 2-D half of the encoder, each frame alone: (N, 3, H, W) -> (N, C, h, w)."""
        return self.encoder(pixels.contiguous(memory_format=torch.channels_last))

    def nearest(self, latents_ND: torch.Tensor) -> torch.Tensor:
        return self.codebook.nearest(latents_ND)

    def vectors(self, codes: torch.Tensor) -> torch.Tensor:
        return self.codebook.codes[codes]

    def pixels(self, vectors: torch.Tensor) -> torch.Tensor:
        # Numbers of unit variance suit the first convolution; unit vectors have variance 1 / D.
        vectors = (vectors * math.sqrt(self.config.code_dimension)).movedim(-1, -3)
        if vectors.ndim == 4:
            features = vectors if self.temporal_decoder is None else self.temporal_decoder(vectors[:, None])[:, 0]
            return self.frame_pixels(features)
        features = vectors if self.temporal_decoder is None else self.temporal_decoder(vectors)
        return self.frame_pixels(features.flatten(0, 1)).unflatten(0, features.shape[:2])

    def frame_pixels(self, features: torch.Tensor) -> torch.Tensor:
        """The 2-D half of the decoder, each frame alone: (N, C, h, w) -> float32 (N, 3, H, W)."""
        return self.decoder(features).float()

    def residual_kernels(self) -> list[nn.Parameter]:
        return [layer.weight for block in self.modules() if isinstance(block, ResidualBlock) for layer in block.children()]

    def decoder_parameters(self) -> list[nn.Parameter]:
        parts = [self.decoder] + ([self.temporal_decoder] if self.temporal_decoder is not None else [])
        return [parameter for part in parts for parameter in part.parameters()]

    def last_layer(self) -> nn.Parameter:
        return self.decoder[-2].weight

    def training_codebook(self) -> Codebook:
        return self.codebook
