"""What a finished model already does stays, while something else is learnt: its states are held where they were.

An action and a block of codes are written from the trunk's state before them, by a head and a depth decoder that see nothing else of the
trunk. Where a kind is not learnt (loss.action_weight=0, loss.vision_weight=0), what writes it does not learn either, and those states of
the learning model are pulled to those of the model that training started from, on the same documents:

    keep · mean over these positions of  |state - state of before|² / |state of before|²

So it needs documents that act and that draw, but not that what happens in them is right. Nothing pulls at the beginning, and the more, the
further the model moves. Sources: learning without forgetting (arXiv 1606.09282), by states in place of outputs (arXiv 1412.6550).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch

from emu3_vla.documents import KINDS, Batch
from emu3_vla.model import BlockEmu3ForCausalLM, PlainEmu3ForCausalLM
from emu3_vla.vocabulary import Vocabulary

ACTION, VISION = KINDS.index("action"), KINDS.index("vision")


class Keeper:
    """Remembers a model as it is now, in the dtype that it will be computed with, and freezes what writes these kinds of ids.

    kinds: whose states are held, indices into KINDS.
    """

    def __init__(
        self,
        model: BlockEmu3ForCausalLM | PlainEmu3ForCausalLM,
        kinds: Sequence[int],
        vocabulary: Vocabulary,
        dtype: torch.dtype,
    ):
        self._before, self._kinds = copy.deepcopy(model).eval(), list(kinds)
        for parameter in self._before.parameters():  # not by .to(dtype), which would round the rotary frequencies too
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)
        written = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        if ACTION in kinds:
            written[vocabulary.from_actions(np.arange(vocabulary.action_size)).tolist()] = True
            written[vocabulary.end_of_chunk] = True
        if VISION in kinds:
            written[vocabulary.vision_start :] = True  # none, where a depth decoder writes them
            if isinstance(model, BlockEmu3ForCausalLM):
                model.depth.requires_grad_(False)
        # Other ids are learnt against these, and the optimiser makes a whole step of the smallest gradient.
        others = (~written)[:, None].to(model.device)
        model.lm_head.weight.register_hook(lambda gradient: gradient * others)

    def positions(self, batch: Batch) -> torch.Tensor:
        """Those that are held, into the flattened B×L: int64."""
        kinds_P = batch.kinds_BL.flatten()
        return sum(kinds_P == kind for kind in self._kinds).nonzero().squeeze(1)

    def moved(self, states_PH: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int]:
        """Squared distance of these states from those of before, relative to their size, summed over the positions that are held: float32,
        with gradient; and the number of these. batch: what the trunk read."""
        at = self.positions(batch)
        with torch.no_grad():
            before = self._before.states(batch)[at].float()
        return ((states_PH[at].float() - before).square().sum(1) / before.square().sum(1)).sum(), len(at)
