"""Speculative decoding with the model as its own draft: a copy of the trunk with int8 weights, for guesses.

    draft = Int8Trunk(model)
    (state_H,) = draft.extend([sequence], [sequence.length], embeddings_nH)

One position costs a CPU what it costs to read the weights, and these are a quarter of the others. A guess need not be right, as the trunk
itself verifies several of them in one pass: nothing that is written depends on the rounding.

It goes on from the keys and values that the trunk computed, and leaves its own behind them, where the trunk's next pass writes its own.
Each row of a matrix is rounded to 255 steps of one size, and what it is multiplied by more finely; all else is float32. Numba compiles it
where one is made for the first time, which takes ten seconds, and keeps it on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import Emu3ForCausalLM

from emu3_vla.generation.cache import CachedSequence, head_size

try:
    from numba import njit
except ImportError as error:
    raise ValueError("int8 drafts need Numba: pip install 'emu3-vla[int8]'") from error

SILU, SQUARED_RELU = 0, 1
ACTIVATIONS = {"silu": SILU, "relu2": SQUARED_RELU}


class Int8Trunk:
    """The trunk of a decoder in float32 on a CPU. Its weights are copied. Raises ValueError for another."""

    def __init__(self, model: Emu3ForCausalLM):
        config, trunk = model.config, model.model
        kind = trunk.norm.weight
        if kind.device.type != "cpu" or kind.dtype != torch.float32:
            raise ValueError(f"the decoder is {kind.dtype} on {kind.device}; an int8 draft is for float32 on a CPU")
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {config.hidden_act}, an int8 draft computes {' or '.join(ACTIVATIONS)}")
        attentions, mlps = [layer.self_attn for layer in trunk.layers], [layer.mlp for layer in trunk.layers]
        self._weights = (
            *_quantized([[each.q_proj.weight, each.k_proj.weight, each.v_proj.weight] for each in attentions]),
            *_quantized([[each.o_proj.weight] for each in attentions]),
            *_quantized([[each.gate_proj.weight, each.up_proj.weight] for each in mlps]),
            *_quantized([[each.down_proj.weight] for each in mlps]),
            _stacked([layer.input_layernorm.weight for layer in trunk.layers]),
            _stacked([layer.post_attention_layernorm.weight for layer in trunk.layers]),
            _stacked([trunk.norm.weight])[0],
        )
        self._frequencies = trunk.rotary_emb.inv_freq.detach().float().numpy()
        self._shape = config.num_attention_heads, head_size(config), np.float32(config.rms_norm_eps), ACTIVATIONS[config.hidden_act]
        # Once for nothing, so that it is compiled now and not in the first decision.
        empty = tuple(np.zeros((1, config.num_key_value_heads, 1, head_size(config)), np.float32) for _ in trunk.layers)
        self._over(np.zeros((1, config.hidden_size), np.float32), np.zeros(1, int), np.zeros(1, int), empty, empty)

    @torch.inference_mode()
    def extend(self, sequences: Sequence[CachedSequence], starts: Sequence[int], embeddings_nH: torch.Tensor) -> list[torch.Tensor]:
        """Put the same n positions behind the first `start` of each sequence, all rows of one cache: the state after the last of them,
        after the final norm, (H,) each. The sequences' lengths stay."""
        rows = np.array([sequence.row for sequence in sequences])
        keys, values = sequences[0].cache.as_numpy()
        hidden = np.empty((len(rows), embeddings_nH.shape[1]), np.float32)
        for number, embedded_H in enumerate(embeddings_nH.numpy()):
            hidden[:] = embedded_H
            self._over(hidden, rows, np.array(starts) + number, keys, values)
        return list(torch.from_numpy(hidden))

    def _over(self, hidden: np.ndarray, rows: np.ndarray, ats: np.ndarray, keys: tuple[np.ndarray, ...], values: tuple[np.ndarray, ...]):
        _position(hidden, rows, ats, keys, values, self._frequencies, *self._shape, *self._weights)


class Int8Product:
    """x (N, inputs) @ weight (outputs, inputs), in int8; in the place of emu3_vla.generation.cache.Product."""

    least_rows = 1

    def __init__(self, weight: torch.Tensor):
        matrices, steps = _quantized([[weight]])
        self._matrix, self._steps = matrices[0], steps[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result = np.empty((len(x), len(self._matrix)), np.float32)
        _product(self._matrix, self._steps, x.numpy(), result)
        return torch.from_numpy(result)


def _stacked(weights: list[torch.Tensor]) -> np.ndarray:
    return np.stack([weight.detach().numpy() for weight in weights])


def _quantized(layers: list[list[torch.Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Of each layer the matrices that share an input, below each other: int8 (layers, outputs, inputs), and the step of each row."""
    matrices = np.stack([torch.cat([weight.detach() for weight in weights]).numpy() for weights in layers])
    steps = np.maximum(np.abs(matrices).max(axis=2), np.finfo(np.float32).tiny) / 127
    return np.rint(matrices / steps[..., None]).astype(np.int8), steps.astype(np.float32)


@njit(fastmath=True, cache=True)
def _position(
    hidden, rows, ats, keys, values, frequencies, heads, size, eps, activation,
    qkv, qkv_s, out, out_s, gate, gate_s, down, down_s, norm_1, norm_2, norm,
):  # fmt: skip
    """All layers and the final norm over one position of each of some rows, in place. hidden: (rows, H). keys, values: of each layer, (all
    rows, key heads, capacity, head size)."""
    count, kv_heads = len(rows), keys[0].shape[1]
    shared, half, inner = heads // kv_heads, size // 2, gate.shape[1] // 2
    mixed, attended = np.empty((count, qkv.shape[1]), np.float32), np.empty((count, heads * size), np.float32)
    both, gated = np.empty((count, gate.shape[1]), np.float32), np.empty((count, inner), np.float32)
    normed, change, weights = np.empty_like(hidden), np.empty_like(hidden), np.empty(ats.max() + 1, np.float32)
    for layer in range(len(keys)):
        for own in range(count):
            _norm(hidden[own], norm_1[layer], eps, normed[own])
        _product(qkv[layer], qkv_s[layer], normed, mixed)
        for own in range(count):
            row, at, new = rows[own], ats[own], mixed[own]
            for place in range(half):
                angle = at * frequencies[place]
                cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
                for head in range(heads + kv_heads):
                    one, other = new[head * size + place], new[head * size + half + place]
                    new[head * size + place] = one * cos - other * sin
                    new[head * size + half + place] = other * cos + one * sin
            for head in range(kv_heads):
                keys[layer][row, head, at] = new[(heads + head) * size : (heads + head + 1) * size]
                values[layer][row, head, at] = new[(heads + kv_heads + head) * size : (heads + kv_heads + head + 1) * size]
            for head in range(heads):
                part, seen = slice(head * size, (head + 1) * size), weights[: at + 1]
                _attend(new[part], keys[layer][row, head // shared], values[layer][row, head // shared], seen, attended[own, part])
        _product(out[layer], out_s[layer], attended, change)
        hidden += change
        for own in range(count):
            _norm(hidden[own], norm_2[layer], eps, normed[own])
        _product(gate[layer], gate_s[layer], normed, both)
        for own in range(count):
            for place in range(inner):
                x = both[own, place]
                opened = x / (1 + _exp(-x)) if activation == SILU else max(x, np.float32(0)) ** 2
                gated[own, place] = opened * both[own, inner + place]
        _product(down[layer], down_s[layer], gated, change)
        hidden += change
    for own in range(count):
        _norm(hidden[own], norm, eps, hidden[own])


@njit(fastmath=True, cache=True)
def _product(matrix, steps, x, result):
    """x (rows, inputs) times the matrix (outputs, inputs), which is read once. x is rounded too, so finely that sums fit 32 bits: products
    of whole numbers take a CPU half as long."""
    outputs, inputs = matrix.shape
    most = min(np.int64(2**15 - 1), np.int64(2**31 - 1) // (127 * inputs))
    rounded, scales = np.empty(x.shape, np.int16), np.empty(len(x), np.float32)
    for row in range(len(x)):
        largest = np.float32(1e-30)
        for column in range(inputs):
            largest = max(largest, abs(x[row, column]))
        scales[row] = largest / most
        for column in range(inputs):
            rounded[row, column] = np.int16(np.rint(x[row, column] / scales[row]))
    for output in range(outputs):
        for row in range(len(x)):
            total = np.int32(0)
            for column in range(inputs):  # Numba would widen each sum to 64 bits
                total = np.int32(total + np.int32(np.int32(matrix[output, column]) * np.int32(rounded[row, column])))
            result[row, output] = total * steps[output] * scales[row]


@njit(fastmath=True, cache=True)
def _norm(x, weight, eps, result):
    total = np.float32(0)
    for place in range(len(x)):
        total += x[place] * x[place]
    scale = np.float32(1 / np.sqrt(total / len(x) + eps))
    for place in range(len(x)):
        result[place] = x[place] * scale * weight[place]


@njit(fastmath=True, cache=True)
def _exp(x):
    """As (1 + x / 4096) ** 4096, which a CPU computes for many numbers at once: to a thousandth from -4 to 4."""
    power = max(1 + x * np.float32(1 / 4096), np.float32(0))
    for _ in range(12):
        power *= power
    return power


@njit(fastmath=True, cache=True)
def _attend(query, keys, values, weights, result):
    """Softmax attention of one head over the first len(weights) positions."""
    scale, highest = np.float32(1 / np.sqrt(len(query))), np.float32(-np.inf)
    for at in range(len(weights)):
        score = np.float32(0)
        for place in range(len(query)):
            score += query[place] * keys[at, place]
        weights[at] = score * scale
        highest = max(highest, weights[at])
    total = np.float32(0)
    for at in range(len(weights)):
        weights[at] = _exp(weights[at] - highest)
        total += weights[at]
    result[:] = 0
    for at in range(len(weights)):
        share = weights[at] / total
        for place in range(len(result)):
            result[place] += share * values[at, place]
