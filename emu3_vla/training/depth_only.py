"""The depth decoder of a finished model learns alone: from states that were never made for it.

What a caption says moves the states before blocks by a hundredth of their size, and what moves them most is where a block is. A matrix that
reads them as they are learns the large directions first and the small ones hardly. So while the depth decoder learns, its states are
whitened: centred, and every direction of the same size. Afterwards centre and scale are put into its own weights; nothing else knows of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from emu3_vla.documents import Batch
from emu3_vla.model import BlockEmu3ForCausalLM

STATE, SLOTS = "depth.state.weight", "depth.slots.weight"
LEAST_VARIANCE = 1e-4
"""Of a direction, absolute: below it there is the rounding of bfloat16 states (of size 1) alone."""


class Whitened(nn.Linear):
    """The linear layer `given`, as a function of whitened inputs: `weight` learns in their place. mean (H,), whiten (H, H): float32."""

    def __init__(self, given: nn.Linear, mean: torch.Tensor, whiten: torch.Tensor, unwhiten: torch.Tensor):
        super().__init__(given.in_features, given.out_features, bias=False)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("whiten", whiten, persistent=False)
        self.register_buffer("constant", given.weight.detach().float() @ mean, persistent=False)
        with torch.no_grad():
            self.weight.copy_(given.weight.float() @ unwhiten)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        whitened = ((inputs.float() - self.mean) @ self.whiten).to(self.weight.dtype)
        return F.linear(whitened, self.weight) + self.constant.to(self.weight.dtype)

    def folded(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a learnt `weight`: that of a plain layer, and the constant that this gives besides: (out, H), (out,)."""
        plain = weight.float() @ self.whiten.T
        return plain, self.constant - plain @ self.mean


@torch.no_grad()
def whiten(model: BlockEmu3ForCausalLM, batches: Iterable[Batch]) -> None:
    """Let the depth decoder see whitened states: white before the supervised blocks of these batches. It computes the same as before."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    found = []
    for batch in batches:
        at = batch.block_at_N[batch.block_weights_N > 0] - 1
        found.append(model.states(batch.to(device))[at.to(device)].double())
    model.train(training)
    states = torch.cat(found)
    mean = states.mean(0)
    variance, axes = torch.linalg.eigh((states - mean).T @ (states - mean) / len(states))
    scale = variance.clamp(min=LEAST_VARIANCE).sqrt()
    turned = (axes / scale).float(), (axes * scale).float()
    model.depth.state = Whitened(model.depth.state, mean.float(), *turned).to(device)


def folded(model: BlockEmu3ForCausalLM, averaged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Averaged weights of a model that saw whitened states as those of one that does not."""
    plain, constant = model.depth.state.folded(averaged[STATE].to(model.depth.state.whiten.device))
    slots = averaged[SLOTS]
    return averaged | {STATE: plain.to(slots), SLOTS: slots + constant.to(slots).view_as(slots)}
