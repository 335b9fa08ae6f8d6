"""Steps of few positions through torch.compile, over the whole static cache at once: CUDA graphs on a GPU, fused kernels on a CPU.

Every row of the cache takes part in every step, idle ones for nothing, so that the shapes stay the same: (rows, n, H) with n a power of
two. What is written behind a row's length is never seen, and overwritten by the row's next positions; the cache has slack for it behind
its last position. Longer extensions, of prompts, are not compiled.

Axes as in emu3_vla.generation.cache, and R rows of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from emu3_vla.generation.cache import CachedSequence, CachedTrunk, StaticCache

LONGEST = 16
"""Most positions a row in a compiled step, and the slack that the cache needs."""

SPAN_MULTIPLE = 256
"""On a CPU, attention reads the cache up to the longest row, rounded up to this; on a GPU all of it, since its graphs have one shape."""


class CompiledSteps:
    """`extend_each` of a trunk for the rows of one cache, made with slack=LONGEST. The first step of each n compiles: a minute."""

    def __init__(self, cache: StaticCache):
        self._cache, self._trunk = cache, cache.trunk
        self._graphs = cache.keys[0].device.type == "cuda"
        if self._graphs:
            for tensor in (*cache.keys, *cache.values):
                torch._dynamo.mark_static_address(tensor)  # or a graph would not dare to write into them
        self._step = _compiled(_Step(cache.trunk), self._graphs)

    @torch.inference_mode()
    def extend_each(self, parts: Sequence[tuple[CachedSequence, torch.Tensor]]) -> list[torch.Tensor]:
        """As CachedTrunk.extend_each."""
        longest = max(len(embeddings) for _, embeddings in parts)
        if longest > LONGEST:
            return self._trunk.extend_each(parts)
        for sequence, embeddings in parts:
            sequence.require_room(len(embeddings))
        width = 1 << (longest - 1).bit_length()
        hidden = self._trunk.empty(self._cache.rows, width, self._trunk.config.hidden_size)
        starts = torch.tensor([sequence.length for sequence in self._cache.sequences])
        for sequence, embeddings in parts:
            hidden[sequence.row, : len(embeddings)] = embeddings
        states = self._step(hidden, starts.to(hidden.device), self._cache.keys, self._cache.values, self._span(int(starts.max()) + width))
        for sequence, embeddings in parts:
            sequence.length += len(embeddings)
        return [states[sequence.row, : len(embeddings)].clone() for sequence, embeddings in parts]

    def _span(self, end: int) -> torch.Tensor:
        """Positions of the cache that attention reads: integers (span,)."""
        positions = self._cache.keys[0].shape[2]
        span = positions if self._graphs else min(positions, -(-end // SPAN_MULTIPLE) * SPAN_MULTIPLE)
        return torch.arange(span, device=self._cache.keys[0].device)


class _Step(nn.Module):
    """The trunk's layers over (R, n) positions, with attention over (R, span) of the cache."""

    def __init__(self, trunk: CachedTrunk):
        super().__init__()
        self._trunk = trunk
        for number, layer in enumerate(trunk.layers):
            for name in ("qkv", "out", "gate_up", "down"):
                # Parameters of a module, and linear layers, are what the compiler lays out anew for a CPU's kernels.
                weight = nn.Parameter(getattr(layer, name).matrix.T, requires_grad=False)
                self.register_parameter(f"{name}_{number}", weight)

    def forward(
        self, hidden: torch.Tensor, starts: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], span: torch.Tensor
    ) -> torch.Tensor:
        trunk, (rows, width, _) = self._trunk, hidden.shape
        positions = starts[:, None] + torch.arange(width, device=hidden.device)
        cos, sin = trunk.rotary(positions)
        may_see = (span <= positions[..., None])[:, None]
        row = torch.arange(rows, device=hidden.device)[:, None]
        for number, layer in enumerate(trunk.layers):
            qkv, out, gate_up, down = (getattr(self, f"{name}_{number}") for name in ("qkv", "out", "gate_up", "down"))
            query_key, value = trunk.rotated(F.linear(trunk.rms_norm(hidden, layer.input_norm), qkv), cos[:, None], sin[:, None])
            # Advanced indices around a slice: (R, n, h_kv, d).
            keys[number][row, :, positions] = query_key[:, trunk.heads :].transpose(1, 2)
            values[number][row, :, positions] = value.transpose(1, 2)
            seen = keys[number][:, :, : len(span)], values[number][:, :, : len(span)]
            attended = F.scaled_dot_product_attention(query_key[:, : trunk.heads], *seen, attn_mask=may_see, enable_gqa=True)
            hidden = hidden + F.linear(attended.transpose(1, 2).flatten(2), out)
            gate, up = F.linear(trunk.rms_norm(hidden, layer.mlp_norm), gate_up).chunk(2, dim=-1)
            hidden = hidden + F.linear(trunk.activation(gate) * up, down)
        return trunk.rms_norm(hidden, trunk.norm)


def _compiled(step: nn.Module, graphs: bool):
    if graphs:
        return torch.compile(step, mode="reduce-overhead", dynamic=False)
    return torch.compile(step)
