"""What a step learned, by kind of token: losses and hits to add up, and the training loss made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from emu3_vla.documents import IGNORE, KINDS, Batch
from emu3_vla.model import BlockEmu3ForCausalLM, PlainEmu3ForCausalLM, block_losses, token_losses
from emu3_vla.training import processes
from emu3_vla.training.keeping import Keeper

VISION = KINDS.index("vision")
HIT_KINDS = ("action", "text")
KEPT_KINDS = ("action", "vision")
MEANS = ("kind", "token")
PAIR_FIGURES = ("loss_preference", "preferred", "margin")
"""Of a pair: its loss, whether the chosen side gained more than the rejected one, and by how many nats times beta."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How much each kind of token counts, and how much of the pictures is predicted."""

    action_weight: float = 1.0
    mean_over: str = "kind"  # weights are of each kind's mean loss (nats a token); or "token": of each token in one mean, as Emu3 trains
    text_weight: float = 0.3  # answers; instructions and questions are given
    special_weight: float = 0.02
    vision_weight: float = 0.1
    vision_loss_fraction: float = 0.05  # of the blocks of a batch, drawn at random: the depth decoder costs as much as the trunk
    label_smoothing: float = 0.0  # of text and action targets
    keep: float = 0.0  # of what moves the states before actions and vision codes, where these weigh 0, from those of init_from

    def __post_init__(self):
        if self.mean_over not in MEANS:
            raise ValueError(f"loss.mean_over is {self.mean_over!r}, expected one of {', '.join(MEANS)}")
        for kind in KINDS:
            if self.weight(kind) < 0:
                raise ValueError(f"loss.{kind}_weight is {self.weight(kind)}, expected at least 0")
        if not 0 <= self.vision_loss_fraction <= 1:
            raise ValueError(f"loss.vision_loss_fraction is {self.vision_loss_fraction}, expected within [0, 1]")
        if not 0 <= self.keep < math.inf:
            raise ValueError(f"loss.keep is {self.keep}, expected a number from 0 on")
        if self.keep and not self.kept_kinds:
            raise ValueError(
                f"loss.keep={self.keep} holds what is written of kinds that are not learnt: give loss.action_weight=0 or "
                "loss.vision_weight=0, or both"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing is {self.label_smoothing}, expected at least 0 and below 1")

    def weight(self, kind: str) -> float:
        return getattr(self, f"{kind}_weight")

    @property
    def kept_kinds(self) -> list[int]:
        """Of the kinds that `keep` is about, those that are not learnt; indices into KINDS."""
        return [KINDS.index(kind) for kind in KEPT_KINDS if not self.weight(kind)]


@dataclass
class Figures:
    """Sums over tokens, per kind in the order of KINDS: float64 (4,) each. Add them up over steps or processes, then take means.

    pairs: float64 (4,), sums over pairs in the order of PAIR_FIGURES, and their number; where preferences are learnt. moved: float64 (2,),
    how far states that are kept have moved, summed, and their number.
    """

    loss: torch.Tensor
    hits: torch.Tensor
    tokens: torch.Tensor
    pairs: torch.Tensor = field(default_factory=lambda: torch.zeros(1 + len(PAIR_FIGURES), dtype=torch.float64))
    moved: torch.Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    @classmethod
    def zero(cls) -> Figures:
        return cls(*torch.zeros(3, len(KINDS), dtype=torch.float64))

    def add(self, other: Figures) -> None:
        self.loss, self.hits, self.tokens = self.loss + other.loss, self.hits + other.hits, self.tokens + other.tokens
        self.pairs, self.moved = self.pairs + other.pairs, self.moved + other.moved

    def over_processes(self) -> Figures:
        parts = [self.loss, self.hits, self.tokens, self.pairs, self.moved]
        return Figures(*processes.summed(torch.cat(parts)).split([len(part) for part in parts]))

    def total(self, config: LossConfig) -> float:
        """The loss that `total` makes of the same tokens; of pairs, theirs."""
        if self.pairs[-1]:
            return (self.pairs[0] / self.pairs[-1]).item()
        kept = config.keep * self.moved[0] / self.moved[1].clamp(min=1)
        return (total(list(self.loss), self.tokens, config) + kept).item()

    def means(self) -> dict[str, float]:
        """Mean loss of each kind that occurred, and the share of action and of text tokens whose likeliest id was right."""
        means = {f"loss_{kind}": (self.loss[index] / self.tokens[index]).item() for index, kind in enumerate(KINDS) if self.tokens[index]}
        for kind in HIT_KINDS:
            if self.tokens[index := KINDS.index(kind)]:
                means[f"{kind}_accuracy"] = (self.hits[index] / self.tokens[index]).item()
        if self.pairs[-1]:
            means |= dict(zip(PAIR_FIGURES, (self.pairs[:-1] / self.pairs[-1]).tolist(), strict=True))
        if self.moved[1]:
            means["moved"] = (self.moved[0] / self.moved[1]).item()
        return means


def document_seeds(batch: Batch, seed: int, step: int, rank: int, count: int) -> list[tuple[int, ...]]:
    """One for each document of this process's part of a batch, whatever the number of processes: rows go to them in turn."""
    if batch.spans is None:
        return [(seed, step, number) for number in range(rank, rank + count * batch.documents, count)]
    rows, places = np.divmod(batch.spans.starts_D, batch.ids_BL.shape[1])
    return [(seed, step, rank + count * row, place) for row, place in zip(rows.tolist(), places.tolist(), strict=True)]


def choose_blocks(batch: Batch, fraction: float, seeds: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Which blocks of a batch to predict, each supervised one with probability `fraction`: int64, ascending.

    seeds: one a document, so that a document's choice depends neither on its neighbours nor on the process that it is in.
    """
    chosen = drawn_at(batch, batch.block_at_N, fraction, seeds) & (batch.block_weights_N.cpu().numpy() > 0)
    return torch.from_numpy(np.flatnonzero(chosen)).to(batch.codes_NC.device)


def thin_codes(batch: Batch, fraction: float, seeds: Sequence[tuple[int, ...]]) -> Batch:
    """The batch with each code that the output head writes a target with probability `fraction` alone; blocks are not touched."""
    targets = batch.targets_BL.flatten().clone()
    codes = (batch.kinds_BL.flatten() == VISION).nonzero().squeeze(1)
    if fraction == 1 or not len(codes):
        return batch
    targets[codes[torch.from_numpy(~drawn_at(batch, codes, fraction, seeds)).to(codes.device)]] = IGNORE
    return replace(batch, targets_BL=targets.view_as(batch.targets_BL))


def drawn_at(batch: Batch, positions: torch.Tensor, fraction: float, seeds: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Which of these ascending positions a draw takes, document by document: bool."""
    counts = np.bincount(batch.document_at(positions.cpu().numpy()), minlength=batch.documents)
    draws = [np.random.default_rng(seed).random(count) for seed, count in zip(seeds, counts, strict=True)]
    return np.concatenate([np.zeros(0), *draws]) < fraction


def count_tokens(batch: Batch, chosen: torch.Tensor) -> torch.Tensor:
    """Supervised tokens of each kind: float64 (4,)."""
    tokens = torch.bincount(batch.kinds_BL[batch.targets_BL != IGNORE].int(), minlength=len(KINDS)).double().cpu()
    tokens[VISION] += chosen.numel() * batch.codes_NC.shape[1]
    return tokens


def losses(
    model: BlockEmu3ForCausalLM | PlainEmu3ForCausalLM,
    batch: Batch,
    chosen: torch.Tensor,
    smoothing: float = 0.0,
    read: Batch | None = None,
    keeper: Keeper | None = None,
) -> tuple[list[torch.Tensor], Figures]:
    """Summed loss of each kind, with gradient, in the order of KINDS, and behind them what `keeper` sums; and the same as figures.

    read: what the trunk reads in the place of the batch, see own_pictures.
    """
    read = batch if read is None else read
    states_PH = model.states(read)
    token_losses_M, _, right_M = token_losses(model, states_PH, batch.targets_BL.flatten(), smoothing)
    kinds_M = batch.kinds_BL[batch.targets_BL != IGNORE]
    are_KM = torch.arange(len(KINDS), device=kinds_M.device)[:, None] == kinds_M
    sums = list(token_losses_M.where(are_KM, 0).sum(1))  # by where, not by picking: a GPU would be waited for at each
    if chosen.numel():
        sums[VISION] = sums[VISION] + block_losses(model, states_PH, batch, chosen).sum()
    figures = Figures(
        loss=torch.stack([part.detach() for part in sums]).double().cpu(),
        hits=(right_M & are_KM).sum(1).double().cpu(),
        tokens=count_tokens(batch, chosen),
    )
    if keeper:
        moved, count = keeper.moved(states_PH, read)
        sums.append(moved)
        figures.moved = torch.tensor([moved.item(), count], dtype=torch.float64)
    return sums, figures


def total(sums: list[torch.Tensor], tokens: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """The loss to minimise: each kind's sum, weighted, over the number of its tokens (or the weighted number of all) in all processes'
    batches."""
    weights = torch.tensor([config.weight(kind) for kind in KINDS], dtype=torch.float64)
    over = tokens if config.mean_over == "kind" else (weights * tokens).sum().expand(len(KINDS))
    shares = (weights / over.clamp(min=1e-300)).where((tokens > 0) & (weights > 0), 0.0).tolist()
    if not any(shares):
        counted = ", ".join(f"{int(count)} {kind}" for kind, count in zip(KINDS, tokens, strict=True))
        raise ValueError(f"a batch has nothing to learn: its targets are {counted}, and the loss weighs none of these; see loss.*_weight")
    return torch.stack([share * part for share, part in zip(shares, sums, strict=True) if share]).sum()
