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
    query_Phd, key_Pgd, value_Pgd = (part.transpose(1, 2).flatten(0, 1) for part in parts)
    out_Phd = torch.zeros_like(query_Phd)
    for group in spans.groups:
        shown = (part[group.index_NL].transpose(1, 2) for part in (query_Phd, key_Pgd, value_Pgd))
        attended = _causal(*shown, scaling, dropout).transpose(1, 2).flatten(0, 1)
        out_Phd = out_Phd.index_copy(0, group.at_K, attended[group.kept_K])
    return out_Phd.unflatten(0, (len(query_BhLd), -1)), None


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
