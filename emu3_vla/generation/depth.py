"""Blocks written by the depth decoder, with a cache: each code costs one position of it, not all before it again.

Axes: N blocks written side by side, C codes of a block, K codebook, D width, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from emu3_vla.documents import NOTHING, BlockContext
from emu3_vla.generation.cache import LEAST_ROWS, Product
from emu3_vla.model import DepthDecoder, DepthLayer, Foretold, Matrix


class DepthWriter:
    """The depth decoder's weights as `write` uses them. They are copied."""

    def __init__(self, depth: DepthDecoder, *, packed: bool = True):
        # While it learns alone it reads whitened states (training.depth_only), by a layer of its own.
        plain = type(depth.state) is nn.Linear
        self._state, self._states = Product(depth.state.weight, packed=packed) if plain else depth.state, depth.states
        self._codes, self._slots = depth.codes.weight.detach(), depth.slots.weight.detach()
        self._before = None if depth.before is None else depth.before.weight.detach()
        self._foretold = None if depth.foretold is None else _Foretold(depth.foretold, packed)
        self._layers = [_Layer(layer, packed) for layer in depth.layers]
        self._norm, self._head = depth.norm, Product(depth.head.weight, packed=packed)

    @property
    def slots(self) -> int:
        """Codes of a block."""
        return len(self._slots)

    @torch.inference_mode()
    def write(self, states_NH: torch.Tensor, context: BlockContext, choose: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
        """Write blocks, one code after another: int64 (N, C). choose: logits float32 (N, K), number of the code -> codes (N,)."""
        blocks = len(states_NH)
        slots = self.slots
        states = self._state(F.pad(states_NH, (0, 0, 0, max(0, LEAST_ROWS - blocks))))
        given_NCD = states.unflatten(-1, (self._states, -1)) + self._slots
        if self._before is not None:
            given_NCD[:blocks] += self._before[context.before_NC - NOTHING]
        if self._foretold is not None:
            given_NCD[:blocks] += self._foretold(context)
        last_ND = torch.zeros_like(given_NCD[:, 0])
        caches = [layer.cache(last_ND, slots) for layer in self._layers]
        written = torch.empty(blocks, slots, dtype=torch.long, device=states_NH.device)
        for number in range(slots):
            hidden = last_ND + given_NCD[:, number]
            for layer, cache in zip(self._layers, caches, strict=True):
                hidden = layer.step(hidden, cache, number)
            chosen = choose(self._head(self._norm(hidden))[:blocks].float(), number)
            written[:, number] = chosen
            last_ND = F.pad(self._codes[chosen], (0, 0, 0, len(last_ND) - blocks))
        return written


class _Foretold:
    def __init__(self, foretold: Foretold, packed: bool):
        self._of = foretold.of
        self._matrices = [self._padded(Product(layer.weight, packed=packed)) for layer in (foretold.up, foretold.across, foretold.down)]

    def __call__(self, context: BlockContext) -> torch.Tensor:
        return self._of(context, *self._matrices)

    @staticmethod
    def _padded(product: Product) -> Matrix:
        return lambda rows: product(F.pad(rows, (0, 0, 0, max(0, product.least_rows - len(rows)))))[: len(rows)]


class _Layer:
    def __init__(self, layer: DepthLayer, packed: bool):
        self._attention_norm, self._mlp_norm, self._heads = layer.attention_norm, layer.mlp_norm, layer.heads
        self._qkv, self._out = Product(layer.qkv.weight, packed=packed), Product(layer.out.weight, packed=packed)
        self._up, self._down = Product(layer.up.weight, packed=packed), Product(layer.down.weight, packed=packed)

    def cache(self, like_ND: torch.Tensor, slots: int) -> torch.Tensor:
        """Room for keys and values: (2, N, h, C, d)."""
        rows, size = like_ND.shape
        return like_ND.new_zeros(2, rows, self._heads, slots, size // self._heads)

    def step(self, hidden_ND: torch.Tensor, cache: torch.Tensor, number: int) -> torch.Tensor:
        """The state after code `number`, (N, D), given the keys and values of those before it."""
        rows = len(hidden_ND)
        query, key_value = self._qkv(self._attention_norm(hidden_ND)).view(rows, 3, self._heads, -1).split([1, 2], dim=1)
        cache[:, :, :, number] = key_value.transpose(0, 1)
        keys, values = cache[:, :, :, : number + 1]
        scores = query.transpose(1, 2) @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        attended = scores.softmax(-1) @ values
        hidden_ND = hidden_ND + self._out(attended.flatten(1))
        return hidden_ND + self._down(F.relu(self._up(self._mlp_norm(hidden_ND))).square_())
