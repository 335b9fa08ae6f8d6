"""Causal attention that keeps to documents, for Transformers' attention interface.

    confine(model)                                                # once; then, for a packed batch,
    model.model(inputs_embeds=..., position_ids=spans.positions_BL, spans=spans)

Without `spans` each row is one document. The same code runs on a CPU and on a GPU.

Axes: B rows, L positions, P = B×L, h heads, g key-value heads, d width of a head, N documents of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from emu3_vla.documents import Spans

NAME = "emu3_vla_documents"

PLAIN_UP_TO = 512
"""Longest document whose attention is two plain products on a CPU: there the fused kernel's backward is slower on short ones, but it
alone never holds a document's whole square."""


def confine(model: PreTrainedModel) -> None:
    """Let this model's trunk attend by documents."""
    model.config._attn_implementation = NAME
    # It plans 9 ms for every new shape on the CPU, and groups of documents have new shapes in every batch.
    torch.backends.cuda.enable_cudnn_sdp(False)


def document_attention(
    module: nn.Module,
    query_BhLd: torch.Tensor,
    key_BgLd: torch.Tensor,
    value_BgLd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    spans: Spans | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Attended values (B, L, h, d), 0 where there is padding between documents. Raises ValueError for a mask, which it would ignore."""
    if attention_mask is not None:
        raise ValueError(f"the attention {NAME!r} takes no attention_mask, only spans; it is causal within each document")
    if spans is None:
        return _causal(query_BhLd, key_BgLd, value_BgLd, scaling, dropout).transpose(1, 2), None
    parts = (query_BhLd, key_BgLd, value_BgLd)
    by_group = zip(*(_Gathered.apply(part.transpose(1, 2).flatten(0, 1), spans) for part in parts), strict=True)
    out_Phd = query_BhLd.new_zeros(query_BhLd.shape[0] * query_BhLd.shape[2], *query_BhLd.shape[1::2])
    if spans.groups:
        attended = [_causal(*(part.transpose(1, 2) for part in shown), scaling, dropout).transpose(1, 2) for shown in by_group]
        kept = [part.flatten(0, 1).index_select(0, group.kept_K) for part, group in zip(attended, spans.groups, strict=True)]
        out_Phd = out_Phd.index_copy(0, torch.cat([group.at_K for group in spans.groups]), torch.cat(kept))
    return out_Phd.unflatten(0, (len(query_BhLd), -1)), None


class _Gathered(torch.autograd.Function):
    """What stands at the positions of each group: (P, ...) -> (N, L, ...) for each of `spans.groups`.

    Indexing would do, but its backward sums over repeated positions: forward and backward of the attention take half as long again then.
    Repeats only fill up shorter documents: nothing that is kept attends to them, so their gradients are zero.
    """

    @staticmethod
    def forward(ctx, values_P: torch.Tensor, spans: Spans) -> tuple[torch.Tensor, ...]:
        ctx.spans, ctx.positions = spans, len(values_P)
        return tuple(values_P[group.index_NL] for group in spans.groups)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed_P = gradients[0].new_zeros(ctx.positions, *gradients[0].shape[2:])
        for gradient, group in zip(gradients, ctx.spans.groups, strict=True):
            summed_P.index_copy_(0, group.at_K, gradient.flatten(0, 1).index_select(0, group.kept_K))
        return summed_P, None


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float) -> torch.Tensor:
    """(N, h, L, d) and (N, g, L, d) twice -> (N, h, L, d)."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    if query.is_cuda or length > PLAIN_UP_TO:
        grouped = {"enable_gqa": True} if groups > 1 else {}
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, **grouped)
    key, value = (part.repeat_interleave(groups, dim=1) if groups > 1 else part for part in (key, value))
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu_(1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill_(future, -torch.inf)
    shares = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return shares @ value


# The loops over groups differ from batch to batch: compiled around, not into.
AttentionInterface.register(NAME, torch.compiler.disable(document_attention))
