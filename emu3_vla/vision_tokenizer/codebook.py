"""One codebook on a sphere, learned by moving averages.

Latents and codes are compared at unit length, so the loss that ties them has a scale of its own and cannot be escaped by shrinking
latents (ViT-VQGAN, arXiv 2110.04627). Codes follow the mean of the latents that chose them (VQ-VAE, arXiv 1711.00937, appendix A.1);
a code that nobody chooses is put where a latent of the present batch is.

Axes: N latents, K codes, D dimensions.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# Rows of the distance matrix computed at once: 2048 x 1024 floats stay in the second-level cache.
ROWS = 2048


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
        return torch.cat([(rows @ self.codes.T).argmax(1) for rows in latents_ND.split(ROWS)])

    def quantise(self, latents_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Straight-through quantisation of float32 latents.

        Returns (quantised (N, D) at unit length whose gradient is the unit-length latents', indices int64 (N,),
        commitment loss: mean squared distance of the unit-length latents from their codes).
        """
        unit_ND = F.normalize(latents_ND, dim=1)
        indices = self.nearest(latents_ND.detach())
        chosen_ND = self.codes[indices]
        commitment = (unit_ND - chosen_ND).square().sum(1).mean()
        return unit_ND + (chosen_ND - unit_ND).detach(), indices, commitment

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
        """Place the codes by spherical k-means over `latents_ND`. Raises ValueError for fewer latents than codes."""
        if len(latents_ND) < self.size:
            raise ValueError(f"k-means over {len(latents_ND)} latents cannot place {self.size} codes; give it more images")
        unit_ND = F.normalize(latents_ND.float(), dim=1)
        self.codes.copy_(unit_ND[torch.from_numpy(random.permutation(len(unit_ND))[: self.size])])
        for _ in range(iterations):
            indices = self.nearest(unit_ND)
            self.counts.copy_(torch.bincount(indices, minlength=self.size))
            self.sums.zero_().index_add_(0, indices, unit_ND)
            self._revive(self.counts < 1, unit_ND, random, count=1.0)
            self.codes.copy_(F.normalize(self.sums, dim=1))

    @torch.no_grad()
    def revive(self, latents_ND: torch.Tensor, random: np.random.Generator, threshold: float) -> int:
        """Move codes chosen less than `threshold` times the average onto latents of this batch. Returns how many moved."""
        average = self.counts.mean().item()
        dead = self.counts < threshold * average
        self._revive(dead, F.normalize(latents_ND.detach().float(), dim=1), random, count=average)
        self.codes.copy_(F.normalize(self.sums, dim=1))
        return int(dead.sum())

    def _revive(self, dead: torch.Tensor, unit_ND: torch.Tensor, random: np.random.Generator, count: float) -> None:
        chosen = torch.from_numpy(random.integers(len(unit_ND), size=int(dead.sum())))
        self.counts[dead] = count
        self.sums[dead] = unit_ND[chosen] * count


def perplexity(counts: torch.Tensor) -> float:
    """exp of the entropy of code frequencies: `size` if all are used alike, 1 if one is used alone."""
    probabilities = counts.double() / counts.sum()
    return float(torch.exp(-(probabilities * probabilities.clamp_min(1e-12).log()).sum()))
