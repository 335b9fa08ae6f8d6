"""The adversary: a network that tells patches of reconstructions from patches of frames.

Source: PatchGAN (Isola et al., arXiv 1611.07004), its use and the balance of the losses from VQGAN (arXiv 2012.09841, equations 6 and 7).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

BALANCE_EPSILON, BALANCE_LIMIT = 1e-4, 1e4


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Raises ValueError for values that cannot work."""

    channels: int = 64  # of the first layer; doubled up to eightfold
    layers: int = 3  # halvings of the resolution; a patch is then 70 pixels wide
    learning_rate: float = 2e-4
    begin: int = 2000  # step from which it learns and its judgement counts: reconstructions must be worth judging first

    def __post_init__(self):
        if min(self.channels, self.layers) < 1 or self.begin < 0 or self.learning_rate <= 0:
            raise ValueError(f"{self}: channels and layers must be at least 1, begin at least 0, learning_rate above 0")


class Discriminator(nn.Module):
    """Pixels (N, 3, H, W) -> one score a patch (N, 1, h, w): high for frames, low for reconstructions."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        widths = [config.channels * min(2**level, 8) for level in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, config.layers + 1):
            stride = 2 if level < config.layers else 1
            layers.append(nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=False))
            layers += [nn.BatchNorm2d(widths[level]), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialise)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels)


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)


def hinge_loss(real_scores: torch.Tensor, decoded_scores: torch.Tensor) -> torch.Tensor:
    """What the discriminator minimises: frames above 1, reconstructions below -1."""
    return 0.5 * (F.relu(1 - real_scores).mean() + F.relu(1 + decoded_scores).mean())


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: nn.Parameter) -> torch.Tensor:
    """The factor at which the adversarial loss pulls the last layer as hard as the reconstruction loss does; carries no gradient."""
    pull = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    push = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    return (pull / (push + BALANCE_EPSILON)).clamp(0, BALANCE_LIMIT).detach()
