"""The trunk with a static key-value cache, written for few positions at a time.

    trunk = CachedTrunk(model)
    sequence = trunk.sequence(capacity=512)
    states = sequence.extend(embeddings)          # prefill: many positions; decode: one
    sequence.truncate(length)                     # forget what came after; a prefix that did not change is not computed again
    states = trunk.extend_each([(sequence, embeddings), (other, embeddings)])      # unequal numbers of positions of several sequences

    cache = trunk.cache(rows=8, capacity=4096)    # one allocation for all; cache.sequences are its rows

The same arithmetic as Emu3ForCausalLM's, from its weights, with projections that share an input fused into one product and the cache
allocated once. Beside the cache nothing grows with the capacity: rotary angles are computed for the positions at hand, and attention
works on few enough queries at once to stay within a fixed workspace.

On a CPU a row's result does not depend on the other rows of a forward: products that are packed for it round alike for any number of
rows, plain ones for four and more, so at least that many are computed. Attention sees one sequence at a time.

Axes: n new positions, T cached positions, N rows of a product, h heads, g heads that share a key head, d head width, H width of the trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Emu3ForCausalLM, Emu3TextConfig
from transformers.activations import ACT2FN

LEAST_ROWS = 4
"""From so many rows on, a CPU's plain products give each row the same sum however many others there are."""

ATTENTION_CELLS = 2**22
"""Largest number of attention scores in memory at once: 16 MiB of float32."""


class CacheFull(ValueError):
    """More positions than the cache was made for."""


def head_size(config: Emu3TextConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_bytes(config: Emu3TextConfig, *, rows: int, capacity: int, dtype: torch.dtype) -> int:
    """Memory of a cache: keys and values of every layer and key head, and nothing else."""
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config) * dtype.itemsize
    return rows * capacity * per_position


class Product:
    """x (N, inputs) @ weight: linear layers that share an input, side by side. The weights are copied.

    On CPUs the copy is laid out once for oneDNN's kernels: twice as fast as a plain product for a prefill, and each row has the same sum
    however many others there are. packed=False keeps a plain matrix, which torch.compile can read.
    """

    def __init__(self, *weights: torch.Tensor, packed: bool = True):
        weight = torch.cat([weight.detach() for weight in weights])
        self._packed = _pack(weight) if packed and _can_pack(weight) else None
        # Input dimension first: a row times such a matrix takes half the time on a CPU of one laid out the other way.
        self.matrix = weight.T.contiguous() if self._packed is None else None

    @property
    def least_rows(self) -> int:
        """So many rows at least give each the same sum however many there are."""
        return LEAST_ROWS if self._packed is None else 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            return x @ self.matrix
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _pack(weight: torch.Tensor) -> torch.Tensor:
    # The operators that torch.compile's own freezing uses; torch has no public name for a linear layer packed ahead.
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), LEAST_ROWS)


@dataclass(frozen=True)
class Layer:
    """Weights of one layer. qkv: H to h·d + 2·h_kv·d. out: h·d to H. gate_up: H to 2·intermediate. down: intermediate to H."""

    input_norm: torch.Tensor
    qkv: Product
    out: Product
    mlp_norm: torch.Tensor
    gate_up: Product
    down: Product


class CachedTrunk:
    """The trunk's weights as `extend_each` uses them. They are copied: later changes to `model` are not seen. packed: see Product."""

    def __init__(self, model: Emu3ForCausalLM, *, packed: bool = True):
        config = model.config
        if config.rope_parameters["rope_type"] != "default" or config.attention_bias or config.mlp_bias:
            raise ValueError("CachedTrunk computes default rotary positions and projections without bias; this model has others")
        self.config = config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = head_size(config)
        self.activation = _activation(config.hidden_act)
        self.layers = [_fuse(layer, packed) for layer in model.model.layers]
        self.norm = model.model.norm.weight.detach()
        self.least_rows = self.layers[0].qkv.least_rows
        self._eps = torch.tensor(config.rms_norm_eps, device=self.norm.device)
        self._frequencies = model.model.rotary_emb.inv_freq.detach().float()

    def cache(self, rows: int, capacity: int, slack: int = 0) -> StaticCache:
        """Room for `rows` sequences of at most `capacity` positions. slack: see StaticCache."""
        return StaticCache(self, rows, capacity, slack)

    def sequence(self, capacity: int) -> CachedSequence:
        """An empty sequence of at most `capacity` positions, with a cache of its own."""
        return self.cache(1, capacity).sequences[0]

    @torch.inference_mode()
    def extend_each(self, parts: Sequence[tuple[CachedSequence, torch.Tensor]]) -> list[torch.Tensor]:
        """Extend each sequence by its embeddings (n, H), n at least 1: states after the final norm, (n, H) each.

        The weights are read once for all. Raises CacheFull before anything changed.
        """
        for sequence, embeddings in parts:
            sequence.require_room(len(embeddings))
        sizes = [len(embeddings) for _, embeddings in parts]
        padding = max(0, self.least_rows - sum(sizes))
        hidden = _joined([embeddings for _, embeddings in parts], padding)
        starts = [sequence.length for sequence, _ in parts]
        positions = torch.cat([torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)])
        cos, sin = self.rotary(F.pad(positions, (0, padding)).to(hidden.device))
        masks = [_causal(size, start, hidden) for start, size in zip(starts, sizes, strict=True)]

        def attend(number: int, qkv: torch.Tensor) -> torch.Tensor:
            query_key, values = self.rotated(qkv, cos, sin)
            attended, at = [], 0
            for (sequence, _), size, mask in zip(parts, sizes, masks, strict=True):
                own = slice(at, at := at + size)
                attended.append(sequence.attend(number, query_key[:, own], values[:, own], mask))
            return _joined(attended, padding)

        states = self.layers_over(hidden, attend)
        for (sequence, _), size in zip(parts, sizes, strict=True):
            sequence.length += size
        return list(states[: sum(sizes)].split(sizes))

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines of integers (...), and sines with the sign that the half to be subtracted needs, each (..., d)."""
        angles = positions[..., None].float() * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1).to(self.norm.dtype), torch.cat([-sin, sin], -1).to(self.norm.dtype)

    def rotated(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated queries and keys (h + h_kv, N, d), and values (h_kv, N, d). cos, sin: (N, d)."""
        heads = qkv.unflatten(-1, (-1, self.head_size)).transpose(-3, -2)
        query_key, values = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=-3)
        half_turned = query_key.roll(self.head_size // 2, -1)  # the other half of each head; `sin` has the sign
        return torch.addcmul(query_key * cos, half_turned, sin), values

    def empty(self, *shape: int) -> torch.Tensor:
        """Zeros of the weights' type, on their device."""
        return self.norm.new_zeros(shape)

    def layers_over(self, hidden: torch.Tensor, attend: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """All layers and the final norm: (N, H) to (N, H). attend: (number of the layer, its qkv of each row) -> (N, h·d)."""
        for number, layer in enumerate(self.layers):
            normed = self.rms_norm(hidden, layer.input_norm)
            hidden = hidden + layer.out(attend(number, layer.qkv(normed)))
            normed = self.rms_norm(hidden, layer.mlp_norm)
            gate, up = layer.gate_up(normed).chunk(2, dim=-1)
            hidden = hidden + layer.down(self.activation(gate).mul_(up))
        return self.rms_norm(hidden, self.norm)

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As Emu3RMSNorm: in float32. Through one norm, since F.rms_norm takes twice as long for a few rows."""
        wide = hidden.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, length, length, value=1 / hidden.shape[-1]).rsqrt_()
        return weight * (wide * scale).to(hidden.dtype)


class StaticCache:
    """Keys and values of several sequences, allocated once: (rows, h_kv, capacity + slack, d) of each layer.

    sequences: the rows, each a CachedSequence. slack: positions behind the last, for what compiled steps write behind a row's end.
    """

    def __init__(self, trunk: CachedTrunk, rows: int, capacity: int, slack: int = 0):
        if rows < 1 or capacity < 1:
            raise ValueError(f"a cache of {rows} rows and {capacity} positions, expected at least one each")
        self.trunk, self.rows, self.capacity = trunk, rows, capacity
        shape = (rows, trunk.kv_heads, capacity + slack, trunk.head_size)
        self.keys, self.values = ([trunk.empty(*shape) for _ in trunk.layers] for _ in range(2))
        self.sequences = [CachedSequence(self, row) for row in range(rows)]
        self._arrays: tuple[tuple[np.ndarray, ...], ...] | None = None

    def as_numpy(self) -> tuple[tuple[np.ndarray, ...], ...]:
        """Keys and values of each layer, in the same memory; of a cache on a CPU."""
        if self._arrays is None:
            self._arrays = tuple(tuple(layer.numpy() for layer in side) for side in (self.keys, self.values))
        return self._arrays

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


class CachedSequence:
    """One row of a cache. length: positions that it holds."""

    def __init__(self, cache: StaticCache, row: int):
        self.cache, self.trunk, self.capacity, self.row, self.length = cache, cache.trunk, cache.capacity, row, 0
        self._keys, self._values = ([layer[row] for layer in side] for side in (cache.keys, cache.values))

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} positions of {self.length}")
        self.length = length

    def copy_from(self, other: CachedSequence, length: int) -> None:
        """Hold the first `length` positions of another sequence instead of one's own."""
        if not 0 <= length <= min(other.length, self.capacity):
            raise ValueError(f"cannot copy {length} positions of {other.length} into {self.capacity}")
        for own, theirs in zip((*self._keys, *self._values), (*other._keys, *other._values), strict=True):
            own[:, :length] = theirs[:, :length]
        self.length = length

    def extend(self, embeddings_nH: torch.Tensor) -> torch.Tensor:
        """States after each of n further positions: (n, H), after the final norm. Raises CacheFull."""
        return self.trunk.extend_each([(self, embeddings_nH)])[0]

    def require_room(self, new: int) -> None:
        """Raises CacheFull where `new` further positions would not fit."""
        if self.length + new > self.capacity:
            raise CacheFull(f"{self.length + new} positions, but the cache holds {self.capacity}; make it larger or show less history")

    def attend(self, number: int, query_key: torch.Tensor, values: torch.Tensor, mask: Mask | None) -> torch.Tensor:
        """Attention of n new positions over all, in layer `number`: (n, h·d). Writes their keys and values behind `length`."""
        heads, end = self.trunk.heads, self.length + query_key.shape[1]
        keys, all_values = self._keys[number], self._values[number]
        keys[:, self.length : end] = query_key[heads:]
        all_values[:, self.length : end] = values
        attended = _attention(query_key[:heads], keys[:, :end], all_values[:, :end], mask)
        return attended.transpose(0, 1).flatten(1)


def _joined(parts: list[torch.Tensor], padding: int) -> torch.Tensor:
    """Rows of all parts, and so many rows of zeros."""
    if len(parts) == 1 and not padding:
        return parts[0]
    return F.pad(torch.cat(parts), (0, 0, 0, padding))


Mask = Callable[[slice], torch.Tensor]
"""Gives the additive mask, (queries, T), of a slice of the new positions."""


def _causal(new: int, start: int, like: torch.Tensor) -> Mask | None:
    """What each of `new` positions behind `start` may see: itself and all before it. None where that is everything."""
    if new == 1:
        return None
    end = start + new

    def of(queries: slice) -> torch.Tensor:
        hidden = torch.ones(queries.stop - queries.start, end, dtype=torch.bool, device=like.device).triu_(start + queries.start + 1)
        return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)

    whole = of(slice(0, new)) if new * end <= ATTENTION_CELLS else None  # once for all layers, where it is small
    return of if whole is None else lambda queries: whole[queries]


def _attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Mask | None) -> torch.Tensor:
    """Softmax attention: (h, n, d) over (h_kv, T, d), for few enough queries at once: (h, n, d)."""
    heads, new, _ = queries.shape
    at_once = max(1, ATTENTION_CELLS // (heads * keys.shape[1]))
    if new <= at_once:
        return _attention_at_once(queries, keys, values, None if mask is None else mask(slice(0, new)))
    parts = [slice(at, min(at + at_once, new)) for at in range(0, new, at_once)]
    return torch.cat([_attention_at_once(queries[:, part], keys, values, mask(part)) for part in parts], dim=1)


def _attention_at_once(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if queries.device.type != "cpu":
        added = None if mask is None else mask[None]
        return F.scaled_dot_product_attention(queries[None], keys[None], values[None], attn_mask=added, enable_gqa=True)[0]
    # Plain products: for few queries they take less time on a CPU than the fused kernel, whose mask has to be expanded first.
    heads, new, size = queries.shape
    grouped = queries.reshape(len(keys), -1, size)  # heads that share a key head follow each other: (h_kv, g·n, d)
    scores = torch.bmm(grouped * size**-0.5, keys.transpose(1, 2))
    if mask is not None:
        scores.view(len(keys), -1, *mask.shape).add_(mask)
    weights = scores.float().softmax(-1).to(values.dtype)
    return torch.bmm(weights, values).view(heads, new, size)


def _fuse(layer: torch.nn.Module, packed: bool) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        input_norm=layer.input_layernorm.weight.detach().clone(),
        qkv=Product(attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, packed=packed),
        out=Product(attention.o_proj.weight, packed=packed),
        mlp_norm=layer.post_attention_layernorm.weight.detach().clone(),
        gate_up=Product(mlp.gate_proj.weight, mlp.up_proj.weight, packed=packed),
        down=Product(mlp.down_proj.weight, packed=packed),
    )


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of the gate; a fresh tensor, which may be written to."""
    fresh = {"silu": F.silu, "relu2": lambda gate: F.relu(gate).square_()}
    return fresh.get(name) or (lambda gate: ACT2FN[name](gate).clone())
