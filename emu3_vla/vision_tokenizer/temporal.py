"""Frames to codes in time for the light tokenizer, by the blocks of Emu3's own tokenizer.

Every halving in time reads two frames before its own and none behind, so a code depends on its frames and on earlier ones alone. The
blocks' batch norms never gather averages: they keep those that they start with (mean 0, variance 1, or Emu3's own), so a clip's codes do
not depend on what else is in its batch, and training and use compute the same thing.

Axes: B batch, T frames, t codes in time, C channels, D code dimensions, h w codes.
Source: Transformers' `Emu3VQVAE` (Emu3VQVAETemporalDownsample, Emu3VQVAETemporalResnetBlock, Emu3VQVAETemporalUpsample, Emu3VQVAEConv3d).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.emu3.modeling_emu3 import (
    Emu3VQVAEConv3d,
    Emu3VQVAETemporalDownsample,
    Emu3VQVAETemporalResnetBlock,
    Emu3VQVAETemporalUpsample,
)

CODE_KERNEL = (3, 1, 1)  # between features and codes, as Emu3's quant_conv and post_quant_conv


class TemporalEncoder(nn.Module):
    """Features of frames (B, T, C, h, w) -> latents (B, T / 2^halvings, D, h, w)."""

    def __init__(self, channels: int, code_dimension: int, halvings: int, blocks: int):
        super().__init__()
        self.halvings = nn.ModuleList(Emu3VQVAETemporalDownsample(channels, channels) for _ in range(halvings))
        self.blocks = _residual_blocks(channels, blocks)
        self.to_codes = Emu3VQVAEConv3d(channels, code_dimension, CODE_KERNEL, (1, 1, 1))
        _initialise(self)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = features.transpose(1, 2)
        for halving in self.halvings:
            hidden = F.silu(halving(hidden))
        return self.to_codes(_through(self.blocks, hidden)).transpose(1, 2)


class TemporalDecoder(nn.Module):
    """Code vectors (B, t, D, h, w) -> features of frames (B, t * 2^doublings, C, h, w)."""

    def __init__(self, channels: int, code_dimension: int, doublings: int, blocks: int):
        super().__init__()
        self.from_codes = Emu3VQVAEConv3d(code_dimension, channels, CODE_KERNEL, (1, 1, 1))
        self.blocks = _residual_blocks(channels, blocks)
        self.doublings = nn.ModuleList(Emu3VQVAETemporalUpsample(channels, channels) for _ in range(doublings))
        _initialise(self)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        hidden = _through(self.blocks, self.from_codes(vectors.transpose(1, 2)))
        for doubling in self.doublings:
            hidden = F.silu(doubling(hidden))
        return hidden.transpose(1, 2)


def freeze_batch_norms(module: nn.Module) -> None:
    """Put every batch norm into evaluation mode; to be called after `train()`."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()


def _residual_blocks(channels: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(Emu3VQVAETemporalResnetBlock(channels, channels) for _ in range(count))


def _initialise(module: nn.Module) -> None:
    """Kernels that keep a signal's size, no biases, and residual blocks that start as the identity, as the 2-D ones do."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    for block in module.blocks:
        nn.init.zeros_(block.conv2.conv.weight)


def _through(blocks: nn.ModuleList, hidden: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        hidden = block(hidden)
    return hidden
