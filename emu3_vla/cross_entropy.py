"""Cross-entropy over a large vocabulary without ever holding all logits: a slice of the vocabulary at a time, forward and backward.

The backward pass computes each slice's logits again, which costs a third more of the head's arithmetic and saves M×V numbers three times
over. Rows of the head's weight are read a slice at a time too, so their gradients are each one sum, in full precision.

Axes: M supervised positions, H width of the trunk, V ids, S ids of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

SLICE_LOGITS = 2**24
"""Most logits at a time: 64 MB in float32."""
SMALLEST_SLICE = 512


def sliced_cross_entropy(
    states_MH: torch.Tensor, weight_VH: torch.Tensor, targets_M: torch.Tensor, smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of targets, int64 (M,), under logits states @ weightᵀ, with gradients for both.

    Returns losses float32 (M,), as torch.nn.functional.cross_entropy(..., reduction="none", label_smoothing=smoothing) has them, and
    whether the likeliest id was right, bool (M,). Raises ValueError for a target outside the vocabulary.
    """
    check_targets(targets_M, len(weight_VH))
    losses, right = _SlicedCrossEntropy.apply(states_MH, weight_VH, targets_M, smoothing)
    return losses, right


def check_targets(targets_M: torch.Tensor, vocab_size: int) -> None:
    """Raises ValueError naming the first target that the head does not write."""
    wrong = ((targets_M < 0) | (targets_M >= vocab_size)).nonzero()
    if len(wrong):
        raise ValueError(
            f"target {wrong[0].item()} of {len(targets_M)} is id {targets_M[wrong[0]].item()}, expected one in [0, {vocab_size}): "
            "the documents were written with another vocabulary than the model's"
        )


class _SlicedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states_MH, weight_VH, targets_M, smoothing):
        count = len(targets_M)
        log_sum, best, chosen, total = states_MH.new_full((4, count), -torch.inf, dtype=torch.float32).unbind()
        total.zero_()
        for start, logits_MS in _slices(states_MH, weight_VH):
            inside = ((targets_M >= start) & (targets_M < start + logits_MS.shape[1])).nonzero().squeeze(1)
            chosen[inside] = logits_MS[inside, targets_M[inside] - start]
            torch.maximum(best, logits_MS.amax(1), out=best)
            if smoothing:
                total += logits_MS.sum(1)
            torch.logaddexp(log_sum, logits_MS.logsumexp(1), out=log_sum)
        ctx.save_for_backward(states_MH, weight_VH, targets_M, log_sum)
        ctx.smoothing = smoothing
        right = chosen >= best
        ctx.mark_non_differentiable(right)
        return log_sum - (1 - smoothing) * chosen - (smoothing / len(weight_VH)) * total, right

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_M, _):
        states_MH, weight_VH, targets_M, log_sum_M = ctx.saved_tensors
        smoothing, rows = ctx.smoothing, torch.arange(len(targets_M), device=targets_M.device)
        grad_states = torch.zeros_like(states_MH, dtype=torch.float32)
        grad_weight = torch.empty_like(weight_VH) if ctx.needs_input_grad[1] else None
        for start, logits_MS in _slices(states_MH, weight_VH):
            end = start + logits_MS.shape[1]
            slope_MS = logits_MS.sub_(log_sum_M[:, None]).exp_()
            if smoothing:
                slope_MS -= smoothing / len(weight_VH)
            inside = (targets_M >= start) & (targets_M < end)
            slope_MS[rows[inside], targets_M[inside] - start] -= 1 - smoothing
            slope_MS = (slope_MS.mul_(grad_M[:, None])).to(states_MH.dtype)
            grad_states += slope_MS @ weight_VH[start:end]
            if grad_weight is not None:
                torch.mm(slope_MS.T, states_MH, out=grad_weight[start:end])
        return grad_states.to(states_MH.dtype), grad_weight, None, None


def _slices(states_MH: torch.Tensor, weight_VH: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """First id of each slice of the vocabulary and its logits, float32 (M, S), which the caller may overwrite."""
    width = max(SMALLEST_SLICE, SLICE_LOGITS // max(1, len(states_MH)))
    for start in range(0, len(weight_VH), width):
        yield start, (states_MH @ weight_VH[start : start + width].T).float()
