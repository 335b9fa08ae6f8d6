"""The trunk with a key-value cache, written for few positions at a time.

    trunk = CachedTrunk(model)
    sequence = trunk.sequence(capacity=512)
    states = sequence.extend(embeddings)          # prefill: many positions; decode: one
    sequence.truncate(length)                     # forget what came after; a prefix that did not change is not computed again
    states = trunk.step(embeddings, sequences)    # one position of each of several sequences

The same arithmetic as Emu3ForCausalLM's, from its weights, with projections that share an input fused into one product and the cache
allocated once: a token costs a fifth of what `generate()` takes, most of which is bookkeeping.

Axes: n new positions, T cached positions, S sequences, h heads, d head width, H width of the trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """The trunk's weights as `extend` and `step` use them. They are copied: later changes to `model` are not seen."""

    def __init__(self, model: BlockEmu3ForCausalLM):
        config = model.config
        if config.rope_parameters["rope_type"] != "default" or config.attention_bias or config.mlp_bias:
            raise ValueError("CachedTrunk computes default rotary positions and projections without bias; this model has others")
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_layers = config.num_hidden_layers
        self._eps, self._activation = config.rms_norm_eps, ACT2FN[config.hidden_act]
        self._layers = [_fuse(layer) for layer in model.model.layers]
        self._norm = model.model.norm.weight.detach()
        self._rotary = model.model.rotary_emb

    def sequence(self, capacity: int) -> CachedSequence:
        """An empty sequence of at most `capacity` positions."""
        return CachedSequence(self, capacity)

    @torch.inference_mode()
    def step(self, embeddings_SH: torch.Tensor, sequences: Sequence[CachedSequence | None]) -> torch.Tensor:
        """Extend each sequence by its row: (S, H), the states after the final norm. A row without a sequence is computed for nothing.

        The weights are read once for all. Raises CacheFull before anything changed.
        """
        present = [(row, sequence) for row, sequence in enumerate(sequences) if sequence is not None]
        for _, sequence in present:
            sequence.require_room(1)

        def attend(number: int, qkv: torch.Tensor) -> torch.Tensor:
            attended = qkv.new_zeros(len(qkv), self.heads * self.head_size)
            for row, sequence in present:
                attended[row] = sequence.attend(number, qkv[row : row + 1])[0]
            return attended

        states_SH = self._layers_over(embeddings_SH, attend)
        for _, sequence in present:
            sequence.length += 1
        return states_SH

    def rotary(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the first positions, each (capacity, d)."""
        cos, sin = self._rotary(self._norm[None], torch.arange(capacity, device=self._norm.device)[None])
        return cos[0], sin[0]

    def empty(self, *shape: int) -> torch.Tensor:
        """Zeros of the weights' type, on their device."""
        return self._norm.new_zeros(shape)

    def _layers_over(self, hidden: torch.Tensor, attend: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """All layers and the final norm: (n, H) to (n, H). attend: (number of the layer, its qkv of each row) -> (n, h·d)."""
        for number, layer in enumerate(self._layers):
            normed = _rms_norm(hidden, layer.input_norm, self._eps)
            hidden = hidden + attend(number, normed @ layer.qkv) @ layer.out
            normed = _rms_norm(hidden, layer.mlp_norm, self._eps)
            gate, up = (normed @ layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + (self._activation(gate) * up) @ layer.down
        return _rms_norm(hidden, self._norm, self._eps)


class CachedSequence:
    """Keys and values of one sequence; `CachedTrunk.sequence` makes it. length: positions that it holds."""

    def __init__(self, trunk: CachedTrunk, capacity: int):
        self.trunk, self.capacity, self.length = trunk, capacity, 0
        shape = (trunk.num_layers, trunk.kv_heads, capacity, trunk.head_size)
        self._keys, self._values = trunk.empty(*shape), trunk.empty(*shape)
        self._cos, self._sin = trunk.rotary(capacity)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} positions of {self.length}")
        self.length = length

    @torch.inference_mode()
    def extend(self, embeddings_nH: torch.Tensor) -> torch.Tensor:
        """States after each of n further positions: (n, H), after the final norm. Raises CacheFull."""
        new, start = len(embeddings_nH), self.length
        self.require_room(new)
        mask = torch.ones(new, start + new, dtype=torch.bool, device=embeddings_nH.device).tril_(start) if new > 1 else None
        states_nH = self.trunk._layers_over(embeddings_nH, lambda number, qkv: self.attend(number, qkv, mask))
        self.length += new
        return states_nH

    def require_room(self, new: int) -> None:
        """Raises CacheFull where `new` further positions would not fit."""
        if self.length + new > self.capacity:
            raise CacheFull(f"{self.length + new} positions, but the cache holds {self.capacity}; make it larger or show less history")

    def attend(self, number: int, qkv: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of n new positions over all, in layer `number`: (n, h·d). Writes their keys and values behind `length`."""
        trunk, start, end = self.trunk, self.length, self.length + len(qkv)
        cos, sin = self._cos[start:end], self._sin[start:end]
        heads = qkv.view(len(qkv), -1, trunk.head_size).transpose(0, 1)
        rotary, value = heads[: trunk.heads + trunk.kv_heads], heads[trunk.heads + trunk.kv_heads :]
        rotated = rotary * cos + _rotate_half(rotary) * sin
        self._keys[number, :, start:end] = rotated[trunk.heads :]
        self._values[number, :, start:end] = value
        attended = F.scaled_dot_product_attention(
            rotated[None, : trunk.heads],
            self._keys[number, None, :, :end],
            self._values[number, None, :, :end],
            attn_mask=mask,
            enable_gqa=trunk.heads != trunk.kv_heads,
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
