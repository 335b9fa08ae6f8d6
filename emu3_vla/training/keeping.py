"""What a finished model already does stays, while something else is learnt: its states are held where they were.

An action and a block of codes are written from the trunk's state before them, by a head and a depth decoder that see nothing else of the
trunk. Where neither kind is learnt (loss.action_weight=0, loss.vision_weight=0), those states of the learning model are pulled to those of
the model that training started from, on the same documents:

    keep · mean over these positions of  |state - state of before|² / |state of before|²

So it needs documents that act and that draw, but not that what happens in them is right. Nothing pulls at the beginning, and the more, the
further the model moves. Sources: learning without forgetting (arXiv 1606.09282), by states in place of outputs (arXiv 1412.6550).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from emu3_vla.documents import Batch
from emu3_vla.model import BlockEmu3ForCausalLM, PlainEmu3ForCausalLM


class Keeper:
    """Remembers a model as it is now, in the dtype that it will be computed with. kinds: which ids' states are held, indices into KINDS."""

    def __init__(self, model: BlockEmu3ForCausalLM | PlainEmu3ForCausalLM, kinds: Sequence[int], dtype: torch.dtype):
        self._before, self._kinds = copy.deepcopy(model).eval(), list(kinds)
        for parameter in self._before.parameters():  # not by .to(dtype), which would round the rotary frequencies too
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)

    def positions(self, batch: Batch) -> torch.Tensor:
        """Those that are held, into the flattened B×L: int64."""
        kinds_P = batch.kinds_BL.flatten()
        return sum(kinds_P == kind for kind in self._kinds).nonzero().squeeze(1)

    def moved(self, states_PH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Squared distance of these states from those of before, relative to their size, summed over the positions that are held: float32,
        with gradient. batch: what the trunk read."""
        at = self.positions(batch)
        with torch.no_grad():
            before = self._before.states(batch)[at].float()
        return ((states_PH[at].float() - before).square().sum(1) / before.square().sum(1)).sum()
