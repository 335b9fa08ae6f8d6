"""Direct preference optimisation: what was preferred becomes likelier than what was not, against the weights that training started from.

    loss = -log σ(β ((log π(chosen) - log π₀(chosen)) - (log π(rejected) - log π₀(rejected)))) + w · cross-entropy of the chosen

A side's log-probability is the sum over all that the model wrote in its documents: ids, and every code of its pictures. Those of the
reference π₀ are computed once, before the first step, so only one model is ever held. Without the cross-entropy both sides may become
unlikely together; it keeps the chosen one in place, as Emu3 does.
Source: Rafailov et al., arXiv 2305.18290, equation 7; Emu3 (Nature 2026), cross-entropy beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from emu3_vla.data.episodes import split_shards
from emu3_vla.data.pairs import CHOSEN, REJECTED, Pair, PairStore
from emu3_vla.data.tokens import hashes
from emu3_vla.documents import IGNORE, KINDS, Batch, Segment, length_of, pack, plan_rows
from emu3_vla.model import BlockEmu3ForCausalLM, PlainEmu3ForCausalLM, block_losses, token_losses
from emu3_vla.training import processes
from emu3_vla.training.figures import HIT_KINDS, VISION, Figures
from emu3_vla.training.source import Source
from emu3_vla.training.stream import numbers_between
from emu3_vla.vocabulary import Vocabulary

if TYPE_CHECKING:
    from emu3_vla.training.loop import TrainConfig

Model = BlockEmu3ForCausalLM | PlainEmu3ForCausalLM
REFERENCE_PAIRS = 16
"""Pairs a batch, while the reference is measured."""


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Learning from pairs instead of from documents. pairs: folder of a pair store, such as `emu3-vla prefer` leaves; empty: none."""

    pairs: str = ""
    beta: float = 0.1  # how far the preferences may move the model: the larger, the less
    cross_entropy_weight: float = 1.0  # of the chosen documents' mean loss a token

    def __post_init__(self):
        if not 0 < self.beta < float("inf") or not 0 <= self.cross_entropy_weight < float("inf"):
            raise ValueError(
                f"preference.beta={self.beta} and preference.cross_entropy_weight={self.cross_entropy_weight}, "
                "expected above 0, and at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Documents of Q pairs, packed. side_of_D: int64, 2 · pair + side of each document. reference_Q2: float32, log π₀ of both sides.

    pairs: in the batches of all processes. chunks, positions: see Batch.
    """

    batch: Batch
    side_of_D: torch.Tensor
    reference_Q2: torch.Tensor
    pairs: int

    @property
    def chunks(self) -> int:
        return self.batch.chunks

    @property
    def positions(self) -> int:
        return self.batch.positions

    def to(self, device: torch.device | str) -> PairBatch:
        return replace(self, batch=self.batch.to(device), side_of_D=self.side_of_D.to(device), reference_Q2=self.reference_Q2.to(device))


class PairStream:
    """Pairs in shuffled epochs, a pure function of (seed, step). rows of `context` positions, as many as a step's documents need."""

    def __init__(self, pairs: Sequence[Pair], vocabulary: Vocabulary, *, context: int, batch_size: int, seed: int):
        self._sides = [[[part.document() for part in side] for side in (pair.chosen, pair.rejected)] for pair in pairs]
        self._vocabulary, self._context, self._batch_size, self._seed = vocabulary, context, batch_size, seed
        self.reference_Q2 = torch.full((len(pairs), 2), torch.nan)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._sides)

    def epochs(self, steps: int) -> float:
        """How often so many steps take each pair."""
        return steps * self._batch_size / len(self)

    def batch(self, step: int, rank: int = 0, processes: int = 1) -> PairBatch:
        """This process's pairs of the batch of `step`."""
        numbers = numbers_between(step * self._batch_size, (step + 1) * self._batch_size, len(self), (self._seed, 0))
        return self.of(numbers[rank::processes].tolist(), self._batch_size)

    def fixed(self, count: int) -> list[PairBatch]:
        """The first `count` pairs in batches; for validation."""
        numbers = list(range(min(count, len(self))))
        groups = [numbers[start : start + self._batch_size] for start in range(0, len(numbers), self._batch_size)]
        return [self.of(group, len(group)) for group in groups]

    def of(self, numbers: list[int], pairs: int) -> PairBatch:
        """A batch of these pairs. Raises DocumentError for a document longer than the context."""
        documents: list[list[Segment]] = []
        side_of = []
        for place, number in enumerate(numbers):
            for side in (CHOSEN, REJECTED):
                documents += self._sides[number][side]
                side_of += [2 * place + side] * len(self._sides[number][side])
        planned, _ = plan_rows([length_of(document, self._vocabulary) for document in documents], self._context)
        batch = pack([[documents[at] for at in row] for row in planned], self._vocabulary, self._context, trim=True)
        order = [at for row in planned for at in row]
        return PairBatch(
            batch=batch,
            side_of_D=torch.tensor([side_of[at] for at in order]),
            reference_Q2=self.reference_Q2[numbers],
            pairs=pairs,
        )


def streams(config: TrainConfig, source: Source) -> tuple[PairStream, PairStream]:
    """Pairs to train on, and held-out ones. Raises PairStoreError for pairs of another vocabulary or other tokenizers."""
    store = PairStore.open(config.preference.pairs)
    store.require(source.vocabulary, hashes(source.folder), f"the token store {source.store}")
    pairs = store.pairs()
    train, held_out = (
        PairStream(
            [pairs[number] for number in numbers],
            source.vocabulary,
            context=config.context,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        for numbers in split_shards(range(len(pairs)), config.validation_fraction)
    )
    return train, held_out


@torch.no_grad()
def measure_reference(model: Model, *pair_streams: PairStream) -> None:
    """Let the model as it is now be the reference of these pairs. Each process computes its part."""
    was_training = model.training
    model.eval()
    for stream in pair_streams:
        reference = torch.zeros(len(stream), 2)
        numbers = list(range(processes.rank(), len(stream), processes.count()))
        for start in range(0, len(numbers), REFERENCE_PAIRS):
            part = numbers[start : start + REFERENCE_PAIRS]
            reference[part] = _written(model, stream.of(part, len(part)).to(model.device))[0].cpu()
        stream.reference_Q2 = processes.summed(reference)
    model.train(was_training)


def losses(model: Model, pairs: PairBatch, config: PreferenceConfig) -> tuple[torch.Tensor, Figures]:
    """The loss of this process's pairs as a part of all processes', with gradient; and figures of it. All processes call it together."""
    logs_Q2, preference, figures = _preferred(model, pairs, config)
    chosen_tokens = processes.summed(figures.tokens.sum()[None].clone()).item()
    return preference.sum() / pairs.pairs - config.cross_entropy_weight * logs_Q2[:, CHOSEN].sum() / chosen_tokens, figures


def measured(model: Model, pairs: PairBatch, config: PreferenceConfig) -> Figures:
    """Figures of these pairs, of this process alone."""
    return _preferred(model, pairs, config)[2]


def _preferred(model: Model, pairs: PairBatch, config: PreferenceConfig) -> tuple[torch.Tensor, torch.Tensor, Figures]:
    """log π of both sides, (Q, 2), and the loss of each pair, (Q,), with gradient; and figures."""
    logs_Q2, figures = _written(model, pairs)
    gains_Q2 = logs_Q2 - pairs.reference_Q2
    margins_Q = config.beta * (gains_Q2[:, CHOSEN] - gains_Q2[:, REJECTED])
    preference = -F.logsigmoid(margins_Q)
    sums = [preference.sum(), (margins_Q > 0).sum(), margins_Q.sum(), torch.tensor(len(margins_Q))]
    figures.pairs = torch.stack([part.detach().double().cpu() for part in sums])
    return logs_Q2, preference, figures


def _written(model: Model, pairs: PairBatch) -> tuple[torch.Tensor, Figures]:
    """log π of both sides of each pair, float32 (Q, 2), with gradient; and figures of the chosen documents' tokens."""
    batch = pairs.batch
    states_PH = model.states(batch)
    targets = batch.targets_BL.flatten()
    at = (targets != IGNORE).nonzero().squeeze(1)
    token_losses_M, _, right_M = token_losses(model, states_PH, targets)
    kinds_M = batch.kinds_BL.flatten()[at].long()
    sides_M = pairs.side_of_D[batch.document_at(at.cpu().numpy())]
    logs = torch.zeros(2 * len(pairs.reference_Q2), device=states_PH.device).index_add(0, sides_M, -token_losses_M)
    figures = Figures.zero()  # on the CPU
    chosen = sides_M % 2 == CHOSEN
    kinds, losses, right = (part[chosen].detach().cpu() for part in (kinds_M, token_losses_M, right_M))
    figures.tokens += torch.bincount(kinds, minlength=len(KINDS)).double()
    figures.loss.index_add_(0, kinds, losses.double())
    figures.hits.index_add_(0, kinds, right.double())
    figures.hits[[kind not in HIT_KINDS for kind in KINDS]] = 0
    written = (batch.block_weights_N > 0).nonzero().squeeze(1)
    if len(written):
        block_losses_N = block_losses(model, states_PH, batch, written).sum(1)
        sides_N = pairs.side_of_D[batch.document_at(batch.block_at_N[written].cpu().numpy())]
        logs = logs.index_add(0, sides_N, -block_losses_N)
        of_chosen = sides_N % 2 == CHOSEN
        figures.loss[VISION] += block_losses_N.detach()[of_chosen].sum().double().cpu()
        figures.tokens[VISION] += of_chosen.sum().cpu() * batch.codes_NC.shape[1]
    return logs.view(-1, 2), figures
