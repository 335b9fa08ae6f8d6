"""The codebook that learns by gradient: nearest codes, its two losses, placing and revival."""

import numpy as np
import pytest
import torch
from torch import nn

from emu3_vla.vision_tokenizer.codebook import GradientCodebook, nearest_euclidean


def rows(count: int, dimension: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


def test_nearest_is_nearest_in_parts_too(monkeypatch):
    latents, codes = rows(50, 4), rows(9, 4, seed=1)
    slow = torch.cdist(latents, codes).argmin(1)
    assert torch.equal(nearest_euclidean(latents, codes), slow)
    monkeypatch.setattr("emu3_vla.vision_tokenizer.codebook.BLOCK", 4)  # 7 rows a part
    assert torch.equal(nearest_euclidean(latents, codes), slow)


def test_losses_and_gradients_are_those_of_the_definition():
    embedding = nn.Embedding(5, 3)
    latents = rows(4, 3).requires_grad_()
    quantised = GradientCodebook(embedding).quantise(latents)
    chosen = embedding.weight[quantised.indices]
    assert torch.allclose(quantised.vectors, chosen)
    mean = (latents - chosen).square().mean()
    assert torch.isclose(quantised.commitment, mean) and torch.isclose(quantised.codebook, mean)
    commitment = torch.autograd.grad(quantised.commitment, (latents, embedding.weight), retain_graph=True, allow_unused=True)
    codebook = torch.autograd.grad(quantised.codebook, (latents, embedding.weight), retain_graph=True, allow_unused=True)
    assert commitment[1] is None and torch.allclose(commitment[0], 2 * (latents - chosen) / 12)
    assert codebook[0] is None and codebook[1].abs().sum() > 0
    straight = torch.autograd.grad(quantised.vectors.sum(), latents)[0]
    assert torch.equal(straight, torch.ones(4, 3))


def test_kmeans_finds_clusters_and_revival_moves_dead_codes():
    random = np.random.default_rng(0)
    centres = 3 * rows(4, 4, seed=1)
    latents = centres.repeat(60, 1) + 0.01 * rows(240, 4, seed=2)
    codebook = GradientCodebook(nn.Embedding(24, 4))
    with pytest.raises(ValueError, match="3 latents cannot place 24 codes"):
        codebook.start_from(latents[:3], random)
    codebook.start_from(latents, random, iterations=20)
    distances = torch.cdist(centres, codebook.embedding.weight.detach())
    assert distances.min(1).values.max() < 0.05
    codebook.embedding.weight.data[2] = 100.0
    indices = codebook.quantise(latents).indices
    for _ in range(300):
        codebook.update(latents, indices, decay=0.9)
    assert codebook.counts[2] < 1e-3 and codebook.revive(latents, random, threshold=0.03) == 1
    assert torch.cdist(codebook.embedding.weight[2:3].detach(), latents).min() == 0
