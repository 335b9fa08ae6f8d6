"""Codebooks, and how they learn.

`Codebook`, the light tokenizer's, lies on a sphere and learns by moving averages. Latents and codes are compared at unit length, so
the loss that ties them has a scale of its own and cannot be escaped by shrinking latents (ViT-VQGAN, arXiv 2110.04627). Codes follow the
mean of the latents that chose them (VQ-VAE, arXiv 1711.00937, appendix A.1).

`GradientCodebook`, for Emu3's tokenizer, is an embedding in plain Euclidean space whose codes are pulled to their latents by a loss of
their own (VQ-VAE, equation 3; so VQGAN, arXiv 2012.09841, and MoVQGAN, arXiv 2209.09002, have it).

In both a code that nobody chooses is put where a latent of the present batch is: a codebook otherwise dies from its edges.

Axes: N latents, K codes, D dimensions.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# Numbers of the distance matrix computed at once: 2048 × 1024 floats stay in the second-level cache.
BLOCK = 2048 * 1024


class Quantised(NamedTuple):
    """What `quantise` gives: vectors float32 (N, D), whose gradient goes straight to the latents; indices int64 (N,); two scalar losses."""

    vectors: torch.Tensor
    indices: torch.Tensor
    commitment: torch.Tensor  # pulls latents to their codes
    codebook: torch.Tensor  # pulls codes to their latents; zero where moving averages do that


class TrainingCodebook(Protocol):
    """What the training loop asks of a codebook. counts float32 (K,): moving average of how often a batch chose each code."""

    size: int
    counts: torch.Tensor

    def pass_through(self, latents_ND: torch.Tensor) -> torch.Tensor:
        """What the decoder gets before codes are placed."""

    def quantise(self, latents_ND: torch.Tensor) -> Quantised:
        """Straight-through quantisation of float32 latents."""

    def update(self, latents_ND: torch.Tensor, indices: torch.Tensor, decay: float) -> None:
        """After the optimiser's step: count what was chosen, and whatever else follows averages."""

    def start_from(self, latents_ND: torch.Tensor, random: np.random.Generator, iterations: int = 10) -> None:
        """Place the codes by k-means. Raises ValueError for fewer latents than codes."""

    def revive(self, latents_ND: torch.Tensor, random: np.random.Generator, threshold: float) -> int:
        """Move codes chosen less than `threshold` times the average onto latents of this batch. Returns how many moved."""

    def averages(self) -> dict[str, torch.Tensor]:
        """Tensors that a resumed run needs besides the tokenizer's weights."""


def _first_largest(scores_NK: torch.Tensor) -> torch.Tensor:
    """argmax over the last axis; on a CPU numpy's, which takes a tenth of torch's time."""
    if scores_NK.device.type == "cpu" and scores_NK.dtype == torch.float32:
        return torch.from_numpy(scores_NK.detach().numpy().argmax(1))
    return scores_NK.argmax(1)


class Codebook(nn.Module):
    """K codes of D dimensions, unit length. Buffers only: the optimiser never sees them.

    codes float32 (K, D); counts float32 (K,): moving average of how many latents of a batch chose each code; sums float32 (K, D):
    moving average of the sum of those latents.
    """

    def __init__(self, size: int, dimension: int):
        super().__init__()
        self.size, self.dimension = size, dimension
        generator = torch.Generator().manual_seed(0)
        codes = F.normalize(torch.randn(size, dimension, generator=generator), dim=1)
        self.register_buffer("codes", codes)
        self.register_buffer("counts", torch.ones(size), persistent=False)
        self.register_buffer("sums", codes.clone(), persistent=False)

    def nearest(self, latents_ND: torch.Tensor) -> torch.Tensor:
        """Index of the nearest code of each latent, int64 (N,). Latents are taken at unit length; ties go to the lower index."""
        latents_ND = F.normalize(latents_ND.float(), dim=1)
        return torch.cat([_first_largest(rows @ self.codes.T) for rows in latents_ND.split(max(1, BLOCK // self.size))])

    def pass_through(self, latents_ND: torch.Tensor) -> torch.Tensor:
        return F.normalize(latents_ND, dim=1)

    def quantise(self, latents_ND: torch.Tensor) -> Quantised:
        """commitment: mean squared distance of the unit-length latents from their codes."""
        unit_ND = F.normalize(latents_ND, dim=1)
        indices = self.nearest(latents_ND.detach())
        chosen_ND = self.codes[indices]
        commitment = (unit_ND - chosen_ND).square().sum(1).mean()
        return Quantised(unit_ND + (chosen_ND - unit_ND).detach(), indices, commitment, commitment.new_zeros(()))

    @torch.no_grad()
    def update(self, latents_ND: torch.Tensor, indices: torch.Tensor, decay: float) -> None:
        """Move every code towards the mean of the latents that chose it."""
        unit_ND = F.normalize(latents_ND.detach().float(), dim=1)
        counts = torch.bincount(indices, minlength=self.size).float()
        sums = torch.zeros_like(self.sums).index_add_(0, indices, unit_ND)
        self.counts.lerp_(counts, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        self.codes.copy_(F.normalize(self.sums, dim=1))

    @torch.no_grad()
    def start_from(self, latents_ND: torch.Tensor, random: np.random.Generator, iterations: int = 10) -> None:
        """Spherical k-means."""
        _require_enough(latents_ND, self.size)
        unit_ND = F.normalize(latents_ND.float(), dim=1)
        self.codes.copy_(unit_ND[_places(random.permutation(len(unit_ND))[: self.size], unit_ND)])
        for _ in range(iterations):
            indices = self.nearest(unit_ND)
            self.counts.copy_(torch.bincount(indices, minlength=self.size))
            self.sums.zero_().index_add_(0, indices, unit_ND)
            self._revive(self.counts < 1, unit_ND, random, count=1.0)
            self.codes.copy_(F.normalize(self.sums, dim=1))

    @torch.no_grad()
    def revive(self, latents_ND: torch.Tensor, random: np.random.Generator, threshold: float) -> int:
        average = self.counts.mean().item()
        dead = self.counts < threshold * average
        self._revive(dead, F.normalize(latents_ND.detach().float(), dim=1), random, count=average)
        self.codes.copy_(F.normalize(self.sums, dim=1))
        return int(dead.sum())

    def averages(self) -> dict[str, torch.Tensor]:
        return {"counts": self.counts, "sums": self.sums}

    def _revive(self, dead: torch.Tensor, unit_ND: torch.Tensor, random: np.random.Generator, count: float) -> None:
        chosen = _places(random.integers(len(unit_ND), size=int(dead.sum())), unit_ND)
        self.counts[dead] = count
        self.sums[dead] = unit_ND[chosen] * count


class GradientCodebook:
    """The codes of `embedding` (K, D), learned by the optimiser through a loss."""

    def __init__(self, embedding: nn.Embedding):
        self.embedding = embedding
        self.size, self.dimension = embedding.weight.shape
        self.counts = torch.ones(self.size, device=embedding.weight.device)

    def pass_through(self, latents_ND: torch.Tensor) -> torch.Tensor:
        return latents_ND

    def quantise(self, latents_ND: torch.Tensor) -> Quantised:
        """Both losses are mean squared differences over all numbers, as in VQGAN's code."""
        indices = nearest_euclidean(latents_ND.detach(), self.embedding.weight.detach())
        chosen_ND = self.embedding(indices)
        commitment = (latents_ND - chosen_ND.detach()).square().mean()
        codebook = (latents_ND.detach() - chosen_ND).square().mean()
        return Quantised(latents_ND + (chosen_ND - latents_ND).detach(), indices, commitment, codebook)

    @torch.no_grad()
    def update(self, latents_ND: torch.Tensor, indices: torch.Tensor, decay: float) -> None:
        """Counts alone: the codes have followed their gradient."""
        self.counts.lerp_(torch.bincount(indices, minlength=self.size).float(), 1 - decay)

    @torch.no_grad()
    def start_from(self, latents_ND: torch.Tensor, random: np.random.Generator, iterations: int = 10) -> None:
        _require_enough(latents_ND, self.size)
        codes, latents_ND = self.embedding.weight, latents_ND.float()
        codes.copy_(latents_ND[_places(random.permutation(len(latents_ND))[: self.size], latents_ND)])
        for _ in range(iterations):
            indices = nearest_euclidean(latents_ND, codes)
            self.counts.copy_(torch.bincount(indices, minlength=self.size))
            sums = torch.zeros_like(codes).index_add_(0, indices, latents_ND)
            codes.copy_(sums / self.counts[:, None].clamp_min(1))
            self._revive(self.counts < 1, latents_ND, random, count=1.0)

    @torch.no_grad()
    def revive(self, latents_ND: torch.Tensor, random: np.random.Generator, threshold: float) -> int:
        average = self.counts.mean().item()
        dead = self.counts < threshold * average
        self._revive(dead, latents_ND.detach().float(), random, count=average)
        return int(dead.sum())

    def averages(self) -> dict[str, torch.Tensor]:
        return {"counts": self.counts}

    def _revive(self, dead: torch.Tensor, latents_ND: torch.Tensor, random: np.random.Generator, count: float) -> None:
        chosen = _places(random.integers(len(latents_ND), size=int(dead.sum())), latents_ND)
        self.counts[dead] = count
        self.embedding.weight[dead] = latents_ND[chosen]


def nearest_euclidean(latents_ND: torch.Tensor, codes_KD: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code of each latent, int64 (N,), by |z|² + |e|² - 2 z·e in float32, a part of the rows at a time.

    Source: the arithmetic of Emu3's `Emu3VQVAEVectorQuantizer`, so that ties break alike.
    """
    latents_ND, codes_KD = latents_ND.float(), codes_KD.float()
    squares = codes_KD.square().sum(1)
    rows = latents_ND.split(max(1, 16 * BLOCK // len(codes_KD)))  # 128 MB: at 32,768 codes no cache holds more than a few rows anyway
    return torch.cat([(part.square().sum(1, keepdim=True) + squares - 2 * part @ codes_KD.T).argmin(1) for part in rows])


def _require_enough(latents_ND: torch.Tensor, size: int) -> None:
    if len(latents_ND) < size:
        raise ValueError(f"k-means over {len(latents_ND)} latents cannot place {size} codes; give it more images")


def _places(rows: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(rows).to(like.device)


def perplexity(counts: torch.Tensor) -> float:
    """exp of the entropy of code frequencies: `size` if all are used alike, 1 if one is used alone."""
    probabilities = counts.double() / counts.sum()
    return float(torch.exp(-(probabilities * probabilities.clamp_min(1e-12).log()).sum()))
