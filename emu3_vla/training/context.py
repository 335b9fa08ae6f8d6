"""Context parallelism: the positions of a document over several ranks.

    L positions → 2·cp chunks of w; rank r has chunks r and 2·cp - 1 - r → every rank attends to equally many positions
    queries stay; keys and values of all ranks are gathered, layer by layer → each chunk attends to the prefix that ends with it

Keys and values are few with grouped queries, so gathering them costs less than it hides: the gathered ones of one layer are all that a
rank holds of the others' positions. Source: the all-gather form of Llama 3 (arXiv 2407.21783, section 3.3.2).

Axes: B documents, L all positions, l = 2w this rank's, h heads, k key-value heads, d width of a head, N blocks, C codes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, Emu3ForCausalLM

from emu3_vla.documents import IGNORE, Batch

ATTENTION = "emu3_vla_context_parallel"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A rank's part of a batch. seen: its positions and the blocks at them. predicted: the same positions, with the blocks that its
    states predict in place of those; `Batch.block_at_N - 1` is within them, and all its blocks are chosen."""

    seen: Batch
    predicted: Batch
    positions: torch.Tensor  # int64 (l,), of each in the document


class ContextParallel:
    """One rank's share of every sequence. mesh: the cp axis."""

    def __init__(self, mesh: DeviceMesh):
        self.mesh, self.size, self.rank = mesh, mesh.size(), mesh.get_local_rank()
        self.positions: torch.Tensor | None = None  # of the batch at hand
        self.documents_BL: torch.Tensor | None = None

    def attach(self, model: Emu3ForCausalLM) -> None:
        """Make the trunk of `model` attend over all ranks' positions. It is fed this rank's alone."""
        model.config._attn_implementation = ATTENTION
        for layer in model.model.layers:
            layer.self_attn.context_parallel = self
        model.model.register_forward_pre_hook(self._give_positions, with_kwargs=True)

    def stand_at(self, positions: torch.Tensor, documents_BL: torch.Tensor | None = None) -> None:
        """From now on the trunk's inputs stand at these positions; also while layers are computed again in the backward pass.

        documents_BL: int (B, L), which document each of all positions belongs to, where a row packs several: they attend within their own.
        """
        self.positions, self.documents_BL = positions, documents_BL

    def padded(self, length: int) -> int:
        """The length that a batch of this one is padded to: a multiple of twice the ranks."""
        return -(-length // (2 * self.size)) * 2 * self.size

    def own(self, length: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """This rank's positions of so many, ascending: int64 (2w,)."""
        chunks = torch.arange(self.padded(length), device=device).chunk(2 * self.size)
        return torch.cat([chunks[self.rank], chunks[2 * self.size - 1 - self.rank]])

    def part(self, batch: Batch, chosen: torch.Tensor, pad: int) -> Part:
        """This rank's part of a batch. chosen: which of the N blocks are predicted, by any rank. pad: id of padding."""
        rows, length = batch.ids_BL.shape
        positions = self.own(length, batch.ids_BL.device)
        place = torch.full((self.padded(length),), -1, device=positions.device)  # of each position among this rank's, or -1
        place[positions] = torch.arange(len(positions), device=positions.device)
        cut = {}
        for field in fields(batch):
            value = getattr(batch, field.name)
            if field.name.endswith("_BL"):
                fill = {"ids_BL": pad, "targets_BL": IGNORE}.get(field.name, 0)
                cut[field.name] = F.pad(value, (0, self.padded(length) - length), value=fill)[:, positions]

        def blocks(candidates: torch.Tensor, offset: int) -> dict[str, torch.Tensor]:
            """Of those blocks, the ones whose position + offset is this rank's."""
            row, column = batch.block_at_N[candidates] // length, batch.block_at_N[candidates] % length
            here = (at := place[column + offset]) >= 0
            values = {name: getattr(batch, name)[candidates[here]] for name in _block_fields(batch)}
            return values | {"block_at_N": row[here] * len(positions) + at[here] - offset}

        every = torch.arange(len(batch.block_at_N), device=positions.device)
        local = replace(batch, **cut)
        return Part(seen=replace(local, **blocks(every, 0)), predicted=replace(local, **blocks(chosen, -1)), positions=positions)

    def gather(self, local_BkldS: torch.Tensor) -> torch.Tensor:
        """Every rank's positions of a tensor (..., l, d), in their natural order: (..., L, d). Gradients are summed back."""
        moved = local_BkldS.movedim(-2, 0).contiguous()
        parts = all_gather_tensor_autograd(moved, gather_dim=0, group=self.mesh).chunk(2 * self.size)
        heads, tails = parts[::2], parts[1::2][::-1]
        return torch.cat([*heads, *tails]).movedim(0, -2)

    def attend(
        self, query_Bhld: torch.Tensor, key_Bkld: torch.Tensor, value_Bkld: torch.Tensor, dropout: float, scale: float
    ) -> torch.Tensor:
        """Causal attention of this rank's positions to all before them: (B, l, h, d)."""
        keys_BkLd, values_BkLd = self.gather(torch.stack([key_Bkld, value_Bkld])).unbind()
        width = query_Bhld.shape[2] // 2
        attended = []
        for queries, chunk in zip(query_Bhld.split(width, dim=2), (self.rank, 2 * self.size - 1 - self.rank), strict=True):
            end = (chunk + 1) * width
            mask = self._mask(width, end, query_Bhld.device)
            keys, values = keys_BkLd[:, :, :end], values_BkLd[:, :, :end]
            attended.append(
                F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=True)
            )
        return torch.cat(attended, dim=2).transpose(1, 2)

    def _mask(self, width: int, end: int, device: torch.device) -> torch.Tensor:
        """Of the queries at end - width .. end - 1 to the keys before `end`."""
        if self.documents_BL is None:
            return causal_lower_right(width, end)  # never exists as a matrix where the kernel knows it
        causal = torch.ones(width, end, dtype=torch.bool, device=device).tril(end - width)
        same = self.documents_BL[:, end - width : end, None] == self.documents_BL[:, None, :end]
        return (same & causal)[:, None]

    def _give_positions(self, module: nn.Module, arguments: tuple, options: dict) -> tuple[tuple, dict]:
        if options.get("position_ids") is None:
            options["position_ids"] = self.positions[None]
        return arguments, options


def _block_fields(batch: Batch) -> list[str]:
    return [field.name for field in fields(batch) if field.name.endswith(("_N", "_NC", "_NS")) and field.name != "block_at_N"]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,  # noqa: ARG001 - Transformers makes none for a function that it does not know
    scaling: float,
    dropout: float = 0.0,
    **_,
) -> tuple[torch.Tensor, None]:
    """In the form that Transformers calls."""
    return module.context_parallel.attend(query, key, value, dropout, scaling), None


AttentionInterface.register(ATTENTION, _attention)
