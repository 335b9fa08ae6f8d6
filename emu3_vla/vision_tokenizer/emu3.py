"""Emu3's own vision tokenizer: 8×8 pixels in space and 4 frames in time to one of 32,768 codes.

The modules are Transformers' `Emu3VQVAE`, so published weights load unchanged. What is ours is the order of work. The published code
repeats a still image four times and sends all four through the 2-D network, and decodes four frames to keep the first. The 2-D network
looks at each frame alone, so here an image goes through it once: its features are repeated in front of the temporal layers, and of the
four frames decoded in time only the first goes on.

Axes: B batch, T frames, t codes in time, C channels, H W pixels, h w codes.
Source: Emu3 (Nature 2026, s41586-025-10041-x), the layouts of BAAI/Emu3-VisionTokenizer and of Transformers' `Emu3VQVAE`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Emu3VQVAE, Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAEResnetBlock

from emu3_vla.vision_tokenizer.base import VisionTokenizer, VisionTokenizerError
from emu3_vla.vision_tokenizer.codebook import GradientCodebook, nearest_euclidean
from emu3_vla.vision_tokenizer.temporal import freeze_batch_norms
from envs.spec import RGB_GRIPPER, RGB_STATIC

BAAI_MODEL_TYPE, TRANSFORMERS_MODEL_TYPE = "Emu3VisionVQ", "emu3_vqgan"

_BAAI_CONFIG = {  # BAAI's name → Transformers'
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "z_channels": "latent_channels",
    "double_z": "double_latent",
} | {
    name: name
    for name in (
        "attn_resolutions",
        "codebook_size",
        "embed_dim",
        "in_channels",
        "num_res_blocks",
        "out_channels",
        "temporal_downsample_factor",
    )
}
_BAAI_WEIGHTS = (  # pattern in BAAI's names → Transformers', in this order
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"\.(down|up)\.", r".\1_block.\1."),
    (r"\.mid\.attn_1\.norm\.", ".middle_block.attn_norm."),
    (r"\.mid\.", ".middle_block."),
    (r"\.(attn\.\d+|attn_1)\.([qkv])\.", r".\1.\2_proj."),
    (r"\.(attn\.\d+|attn_1)\.proj_out\.", r".\1.out_proj."),
)


@dataclass(frozen=True, kw_only=True)
class Emu3Config:
    """Sizes of an Emu3 tokenizer to be trained from random weights; the defaults are the published ones. Raises ValueError."""

    codebook_size: int = 32_768
    code_dimension: int = 4
    base_channels: int = 256
    channel_multiplier: tuple[int, ...] = (1, 2, 2, 4)  # at full, half, ... resolution; a code is 2^(levels - 1) pixels wide
    residual_blocks: int = 2  # at each resolution, and in time
    attention_levels: tuple[int, ...] = (3,)  # levels, counted from 0, with attention over the whole image
    latent_channels: int = 4  # of the features that are mixed in time
    frames_per_code: int = 4
    image_sizes: dict[str, int] = field(default_factory=lambda: {RGB_STATIC: 200, RGB_GRIPPER: 80})

    def __post_init__(self):
        if self.base_channels < 32 or self.base_channels % 32:
            raise ValueError(f"base_channels is {self.base_channels}, expected a multiple of 32, the number of groups of its norms")
        if len(self.channel_multiplier) < 2 or min(self.channel_multiplier) < 1:
            raise ValueError(f"channel_multiplier is {self.channel_multiplier}, expected two or more numbers of at least 1")
        if self.frames_per_code < 1 or self.frames_per_code & (self.frames_per_code - 1):
            raise ValueError(f"frames_per_code is {self.frames_per_code}, expected a power of two")
        patch = 2 ** (len(self.channel_multiplier) - 1)
        if not self.image_sizes or any(size < patch or size % patch for size in self.image_sizes.values()):
            raise ValueError(f"image_sizes {self.image_sizes}: every side must be a positive multiple of {patch}")


class Emu3Tokenizer(VisionTokenizer):
    """Emu3's tokenizer over Transformers' modules. `vqvae` is the module itself, for training, export and quantisation."""

    kind = "emu3"

    def __init__(self, config: Emu3VQVAEConfig, image_sizes: dict[str, int] | None = None):
        super().__init__()
        self.vqvae = Emu3VQVAE(config)
        self.config = config
        self.image_sizes = dict(image_sizes or {})
        self.codebook_size = config.codebook_size
        self.patch = 2 ** (len(config.channel_multiplier) - 1)
        self.frames_per_code = config.temporal_downsample_factor

    @classmethod
    def from_sizes(cls, sizes: Emu3Config) -> Emu3Tokenizer:
        """One with random weights."""
        config = Emu3VQVAEConfig(
            codebook_size=sizes.codebook_size,
            embed_dim=sizes.code_dimension,
            latent_channels=sizes.latent_channels,
            base_channels=sizes.base_channels,
            channel_multiplier=list(sizes.channel_multiplier),
            num_res_blocks=sizes.residual_blocks,
            attn_resolutions=list(sizes.attention_levels),
            hidden_size=sizes.base_channels * sizes.channel_multiplier[-1],
            temporal_downsample_factor=sizes.frames_per_code,
        )
        return cls(config, sizes.image_sizes)

    # -- folders

    @classmethod
    def from_config(cls, config: dict[str, Any], *, where: str) -> Emu3Tokenizer:
        values = dict(config)
        image_sizes = values.pop("image_sizes", None)
        if values.get("model_type") == BAAI_MODEL_TYPE:
            values = _from_baai_config(values, where)
        try:
            return cls(Emu3VQVAEConfig(**values), image_sizes)
        except (TypeError, ValueError) as error:
            raise VisionTokenizerError(f"{where} describes no Emu3 vision tokenizer: {error}") from error

    def config_dict(self) -> dict[str, Any]:
        return self.config.to_diff_dict() | {"image_sizes": self.image_sizes}

    def weights(self) -> dict[str, torch.Tensor]:
        """Named as Transformers names them, so that a folder of ours opens in `Emu3VQVAE.from_pretrained` too."""
        return self.vqvae.state_dict()

    def adapt_weights(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """BAAI's names and shapes to Transformers', where they are BAAI's."""
        if not any(name.startswith("encoder.down.") for name in state):
            return state
        return {_from_baai_name(name): _from_baai_tensor(name, tensor) for name, tensor in state.items()}

    def load_weights(self, state: dict[str, torch.Tensor]) -> None:
        self.vqvae.load_state_dict(state)

    def train(self, mode: bool = True) -> Emu3Tokenizer:
        """As every module's, but the batch norms in time keep the averages that they have; see temporal.py."""
        super().train(mode)
        freeze_batch_norms(self)
        return self

    # -- pixels to codes

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.ndim == 4:
            still = self.frame_features(pixels)[:, None].expand(-1, self.frames_per_code, -1, -1, -1)
            return self.temporal_latents(still)[:, 0].permute(0, 2, 3, 1).float()
        features = self.frame_features(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        return self.temporal_latents(features).permute(0, 1, 3, 4, 2).float()

    def frame_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The 2-D half of the encoder, each frame alone: float (N, 3, H, W) -> (N, C, h, w)."""
        encoder = self.vqvae.encoder
        hidden = encoder.conv_in(pixels.to(self.vqvae.dtype))
        hidden = encoder.middle_block(encoder.down_block(hidden))
        return encoder.conv_out(nn.functional.silu(encoder.norm_out(hidden)))

    def temporal_latents(self, features: torch.Tensor) -> torch.Tensor:
        """The half that mixes frames: (B, T, C, h, w) -> latents before the codebook (B, t, D, h, w)."""
        encoder, hidden = self.vqvae.encoder, features.transpose(1, 2)
        for layer in encoder.time_conv:
            hidden = nn.functional.silu(layer(hidden))
        for layer in encoder.time_res_stack:
            hidden = layer(hidden)
        return self.vqvae.quant_conv(hidden).transpose(1, 2)

    def nearest(self, latents_ND: torch.Tensor) -> torch.Tensor:
        """The nearest code of each latent, in the published code's arithmetic."""
        return nearest_euclidean(latents_ND, self.vqvae.quantize.embedding.weight)

    # -- codes to pixels

    def vectors(self, codes: torch.Tensor) -> torch.Tensor:
        return self.vqvae.quantize.embedding(codes)

    def pixels(self, vectors: torch.Tensor) -> torch.Tensor:
        if vectors.ndim == 4:
            latents, quantised = self.temporal_features(vectors[:, None])
            return self.frame_pixels(latents[:, 0], quantised[:, 0])
        latents, quantised = self.temporal_features(vectors)
        return self.frame_pixels(latents.flatten(0, 1), quantised.flatten(0, 1)).unflatten(0, latents.shape[:2])

    def temporal_features(self, embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Code vectors (B, t, h, w, D) -> what the 2-D half decodes and what its norms are steered by, each (B, T, C, h, w)."""
        decoder = self.vqvae.decoder
        quantised = embedded.permute(0, 4, 1, 2, 3)
        hidden = torch.cat((self.vqvae.post_quant_conv(quantised), quantised))
        for layer in decoder.time_res_stack:
            hidden = layer(hidden)
        for layer in decoder.time_conv:
            hidden = nn.functional.silu(layer(hidden))
        latents, quantised = hidden.transpose(1, 2).chunk(2)
        return latents, quantised

    def frame_pixels(self, latents: torch.Tensor, quantised: torch.Tensor) -> torch.Tensor:
        """The 2-D half of the decoder, each frame alone: (N, C, h, w) twice -> (N, 3, H, W)."""
        decoder = self.vqvae.decoder
        hidden = decoder.middle_block(decoder.conv_in(latents), quantised)
        hidden = decoder.up_block(hidden, quantised)
        return decoder.conv_out(nn.functional.silu(decoder.norm_out(hidden, quantised)))

    # -- for training

    def training_codebook(self) -> GradientCodebook:
        return GradientCodebook(self.vqvae.quantize.embedding)

    def residual_kernels(self) -> list[nn.Parameter]:
        blocks = [module for module in self.modules() if isinstance(module, Emu3VQVAEResnetBlock)]
        return [layer.weight for block in blocks for layer in (block.conv1, block.conv2)]

    def decoder_parameters(self) -> list[nn.Parameter]:
        return [*self.vqvae.decoder.parameters(), *self.vqvae.post_quant_conv.parameters()]

    def last_layer(self) -> nn.Parameter:
        return self.vqvae.decoder.conv_out.weight


def _from_baai_config(values: dict[str, Any], where: str) -> dict[str, Any]:
    missing = [name for name in _BAAI_CONFIG if name not in values]
    if missing:
        raise VisionTokenizerError(f"{where} lacks {', '.join(missing)}, which Emu3's vision tokenizer states")
    config = {ours: values[theirs] for theirs, ours in _BAAI_CONFIG.items()}
    # Transformers asks for the attention's width, which BAAI's code takes from where the attention stands.
    return config | {"hidden_size": values["ch"] * values["ch_mult"][-1]}


def _from_baai_name(name: str) -> str:
    for pattern, replacement in _BAAI_WEIGHTS:
        name = re.sub(pattern, replacement, name)
    return name


def _from_baai_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """BAAI's attention has 1×1 convolutions where Transformers has linear layers."""
    is_projection = re.search(r"\.(attn\.\d+|attn_1)\.(q|k|v|proj_out)\.weight$", name)
    return tensor[:, :, 0, 0] if is_projection else tensor
