"""Pictures as the model itself would have begun them: parallel scheduled sampling (arXiv 1906.04331) for vision blocks.

Trained behind true blocks alone, a model trusts the blocks before in a picture more than what was said of it; when it writes, one block
that went wrong then leads to the next. So in some supervised pictures the trunk is shown blocks that the model wrote, and what is to be
learnt behind them are still the true ones. All blocks of a picture are written at once, each behind those that are shown; after k rounds
the first k are what it would write one after another, and those behind them near it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from emu3_vla.documents import Batch
from emu3_vla.generation.depth import DepthWriter
from emu3_vla.model import BlockEmu3ForCausalLM
from emu3_vla.training.figures import drawn_at

ROUNDS = 3
"""At most."""
PICTURES, HOW_OFTEN = 1, 2
"""What a seed is for."""


def rounds_of(seed: int, step: int) -> int:
    """How many rounds there are in a step, the same in every process: 1 to ROUNDS."""
    return int(np.random.default_rng((seed, step, HOW_OFTEN)).integers(1, ROUNDS, endpoint=True))


@torch.no_grad()
def with_own(model: BlockEmu3ForCausalLM, batch: Batch, share: float, rounds: int, seeds: Sequence[tuple[int, ...]]) -> Batch:
    """The batch as the trunk is to read it: of its supervised pictures this share as the model likeliest writes them, in so many rounds.

    batch: on the model's device. seeds: one a document (figures.document_seeds).
    """
    at = own_blocks(batch, share, seeds)
    if not len(at):
        return batch
    writer = DepthWriter(model.depth, packed=False)
    for _ in range(rounds):
        states = model.states(batch)[batch.block_at_N[at] - 1]
        written = writer.write(states, batch.block_context(at), lambda logits, _: logits.argmax(-1))
        codes = batch.codes_NC.clone()
        codes[at] = written
        batch = replace(batch, codes_NC=codes)
    return batch


def own_blocks(batch: Batch, share: float, seeds: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Blocks of the supervised pictures that a draw takes: int64, ascending."""
    positions = batch.block_at_N.cpu().numpy()
    begins = np.diff(positions, prepend=-2) != 1  # blocks of one picture follow each other, and something stands before each picture
    own = drawn_at(batch, batch.block_at_N.cpu()[torch.from_numpy(begins)], share, [(*seed, PICTURES) for seed in seeds])
    supervised = batch.block_weights_N.cpu().numpy() > 0
    chosen = own[np.cumsum(begins) - 1] & supervised if len(positions) else supervised
    return torch.from_numpy(np.flatnonzero(chosen)).to(batch.codes_NC.device)
