"""What a step learned, by kind of token: losses and hits to add up, and the training loss made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from emu3_vla.documents import IGNORE, Batch
from emu3_vla.model import BlockEmu3ForCausalLM, block_losses, token_losses
from emu3_vla.training import processes
from emu3_vla.vocabulary import CompactVocabulary

KINDS = ("action", "text", "special", "vision")
"""`text`: answers to questions. End of chunk is counted as action; `special` is what says that an image or actions begin."""
VISION = KINDS.index("vision")
HIT_KINDS = ("action", "text")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weight of each kind's mean loss (nats a token), and how much of the pictures is predicted."""

    action_weight: float = 1.0
    text_weight: float = 0.3  # answers; instructions and questions are given
    special_weight: float = 0.02
    vision_weight: float = 0.1
    vision_loss_fraction: float = 0.05  # of the blocks of a batch, drawn at random: the depth decoder costs as much as the trunk
    label_smoothing: float = 0.0  # of text and action targets

    def __post_init__(self):
        for kind in KINDS:
            if self.weight(kind) < 0:
                raise ValueError(f"loss.{kind}_weight is {self.weight(kind)}, expected at least 0")
        if not 0 <= self.vision_loss_fraction <= 1:
            raise ValueError(f"loss.vision_loss_fraction is {self.vision_loss_fraction}, expected within [0, 1]")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing is {self.label_smoothing}, expected at least 0 and below 1")

    def weight(self, kind: str) -> float:
        return getattr(self, f"{kind}_weight")


@dataclass
class Figures:
    """Sums over tokens, per kind in the order of KINDS: float64 (4,) each. Add them up over steps or processes, then take means."""

    loss: torch.Tensor
    hits: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def zero(cls) -> Figures:
        return cls(*torch.zeros(3, len(KINDS), dtype=torch.float64))

    def add(self, other: Figures) -> None:
        self.loss, self.hits, self.tokens = self.loss + other.loss, self.hits + other.hits, self.tokens + other.tokens

    def over_processes(self) -> Figures:
        return Figures(*processes.summed(torch.stack([self.loss, self.hits, self.tokens])))

    def means(self) -> dict[str, float]:
        """Mean loss of each kind that occurred, and the share of action and of text tokens whose likeliest id was right."""
        means = {f"loss_{kind}": (self.loss[index] / self.tokens[index]).item() for index, kind in enumerate(KINDS) if self.tokens[index]}
        for kind in HIT_KINDS:
            if self.tokens[index := KINDS.index(kind)]:
                means[f"{kind}_accuracy"] = (self.hits[index] / self.tokens[index]).item()
        return means


def choose_blocks(batch: Batch, fraction: float, seeds: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Which blocks of a batch to predict, each supervised one with probability `fraction`: int64, ascending.

    seeds: one a document, so that a document's choice depends neither on its neighbours nor on the process that it is in.
    """
    row_of_block = batch.block_at_N.cpu().numpy() // batch.ids_BL.shape[1]
    counts = np.bincount(row_of_block, minlength=len(batch.ids_BL))
    draws = [np.random.default_rng(seed).random(count) for seed, count in zip(seeds, counts, strict=True)]
    wanted = (np.concatenate(draws) < fraction) & (batch.block_weights_N.cpu().numpy() > 0)
    return torch.from_numpy(np.flatnonzero(wanted)).to(batch.codes_NC.device)


def count_tokens(batch: Batch, chosen: torch.Tensor, vocabulary: CompactVocabulary) -> torch.Tensor:
    """Supervised tokens of each kind: float64 (4,)."""
    kinds = _kinds(batch.targets_BL[batch.targets_BL != IGNORE], vocabulary)
    return torch.tensor([*(kind.sum().item() for kind in kinds), chosen.numel() * batch.codes_NC.shape[1]], dtype=torch.float64)


def losses(
    model: BlockEmu3ForCausalLM, batch: Batch, chosen: torch.Tensor, vocabulary: CompactVocabulary, smoothing: float = 0.0
) -> tuple[list[torch.Tensor], Figures]:
    """Summed loss of each kind, with gradient, in the order of KINDS; and the same as figures."""
    states_PH = model.states(batch)
    token_losses_M, targets_M, right_M = token_losses(model, states_PH, batch.targets_BL.flatten(), smoothing)
    kinds = _kinds(targets_M, vocabulary)
    sums = [*(token_losses_M[kind].sum() for kind in kinds), torch.zeros((), device=states_PH.device)]
    if chosen.numel():
        sums[VISION] = block_losses(model, states_PH, batch, chosen).sum()
    figures = Figures(
        loss=torch.stack([part.detach() for part in sums]).double().cpu(),
        hits=torch.tensor([*(right_M[kind].sum() for kind in kinds), 0], dtype=torch.float64),
        tokens=count_tokens(batch, chosen, vocabulary),
    )
    return sums, figures


def total(sums: list[torch.Tensor], tokens: torch.Tensor, config: LossConfig) -> torch.Tensor:
    """The loss to minimise: each kind's sum over the number of its tokens in all processes' batches, weighted."""
    parts = [
        config.weight(kind) * part / tokens[index].item()
        for index, (kind, part) in enumerate(zip(KINDS, sums, strict=True))
        if tokens[index] and config.weight(kind)
    ]
    return torch.stack(parts).sum()


def _kinds(targets: torch.Tensor, vocabulary: CompactVocabulary) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which targets are of each kind but vision, in the order of KINDS: bool, of the shape of `targets`."""
    is_text, is_special = targets < vocabulary.text_size, targets > vocabulary.end_of_chunk
    return ~is_text & ~is_special, is_text, is_special
