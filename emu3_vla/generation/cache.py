"""The trunk with a key-value cache, written for one sequence and few positions at a time.

    cached = CachedTrunk(model, capacity=512)
    states = cached.extend(embeddings)      # prefill: many positions; decode: one
    cached.truncate(length)                 # forget what came after; a prefix that did not change is not computed again

The same arithmetic as Emu3ForCausalLM's, from its weights, with projections that share an input fused into one product and the cache
allocated once: a token costs a fifth of what `generate()` takes, most of which is bookkeeping.

Axes: n new positions, T cached positions, h heads, d head width, H width of the trunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from emu3_vla.model import BlockEmu3ForCausalLM


class CacheFull(ValueError):
    """More positions than the cache was made for."""


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer, input dimension first: a row times such a matrix takes half the time here of one laid out the other way.

    qkv: (H, h·d + 2·h_kv·d). out: (h·d, H). gate_up: (H, 2·intermediate). down: (intermediate, H).
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class CachedTrunk:
    """Keys and values of one sequence, and the trunk that extends it. Weights are copied: later changes to `model` are not seen."""

    def __init__(self, model: BlockEmu3ForCausalLM, capacity: int):
        config = model.config
        if config.rope_parameters["rope_type"] != "default" or config.attention_bias or config.mlp_bias:
            raise ValueError("CachedTrunk computes default rotary positions and projections without bias; this model has others")
        self.capacity, self.length = capacity, 0
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._eps, self._activation = config.rms_norm_eps, ACT2FN[config.hidden_act]
        self._layers = [_fuse(layer) for layer in model.model.layers]
        self._norm = model.model.norm.weight.detach()
        like = self._norm
        shape = (len(self._layers), self._kv_heads, capacity, self._head_size)
        self._keys, self._values = like.new_zeros(shape), like.new_zeros(shape)
        cos, sin = model.model.rotary_emb(like[None], torch.arange(capacity, device=like.device)[None])
        self._cos, self._sin = cos[0], sin[0]

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} positions of {self.length}")
        self.length = length

    @torch.inference_mode()
    def extend(self, embeddings_nH: torch.Tensor) -> torch.Tensor:
        """States after each of n further positions: (n, H), after the final norm. Raises CacheFull."""
        new, start = len(embeddings_nH), self.length
        end = start + new
        if end > self.capacity:
            raise CacheFull(f"{end} positions, but the cache holds {self.capacity}; make it larger or show less history")
        cos, sin = self._cos[start:end], self._sin[start:end]
        mask = None
        if new > 1:
            mask = torch.ones(new, end, dtype=torch.bool, device=embeddings_nH.device).tril_(start)
        hidden = embeddings_nH
        for number, layer in enumerate(self._layers):
            normed = _rms_norm(hidden, layer.input_norm, self._eps)
            hidden = hidden + self._attend(number, normed @ layer.qkv, cos, sin, mask) @ layer.out
            normed = _rms_norm(hidden, layer.mlp_norm, self._eps)
            gate, up = (normed @ layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + (self._activation(gate) * up) @ layer.down
        self.length = end
        return _rms_norm(hidden, self._norm, self._eps)

    def _attend(self, number: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of n new positions over all: (n, h·d). Writes their keys and values into the cache."""
        start, end = self.length, self.length + len(qkv)
        heads = qkv.view(len(qkv), -1, self._head_size).transpose(0, 1)
        rotary, value = heads[: self._heads + self._kv_heads], heads[self._heads + self._kv_heads :]
        rotated = rotary * cos + _rotate_half(rotary) * sin
        self._keys[number, :, start:end] = rotated[self._heads :]
        self._values[number, :, start:end] = value
        attended = F.scaled_dot_product_attention(
            rotated[None, : self._heads],
            self._keys[number, None, :, :end],
            self._values[number, None, :, :end],
            attn_mask=mask,
            enable_gqa=self._heads != self._kv_heads,
        )
        return attended[0].transpose(0, 1).reshape(len(qkv), -1)


def _fuse(layer: torch.nn.Module) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        input_norm=layer.input_layernorm.weight.detach().clone(),
        qkv=_input_first(attention.q_proj, attention.k_proj, attention.v_proj),
        out=_input_first(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach().clone(),
        gate_up=_input_first(mlp.gate_proj, mlp.up_proj),
        down=_input_first(mlp.down_proj),
    )


def _input_first(*linear: torch.nn.Linear) -> torch.Tensor:
    """Weights of linear layers that share an input, side by side: (inputs, outputs of all)."""
    return torch.cat([layer.weight.detach() for layer in linear]).T.contiguous()


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = hidden.float()  # as Emu3RMSNorm does; F.rms_norm takes four times as long for one row
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(hidden.dtype)


def _rotate_half(heads: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
