"""How different two images look.

`lpips.Lpips` where its weights are given as a file. Else `structure_distance`, which needs none: it compares how luminance and colours vary
in small windows, at three resolutions. A blurred edge or a vanished small thing costs there what it does not cost in squared error. It is a
substitute and no estimate of LPIPS: it knows nothing of what networks see.

Axes: N images, C channels, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from emu3_vla.vision_tokenizer.lpips import Lpips

SCALES = 3
WINDOW, STRIDE = 7, 2
# SSIM's second constant (0.03 of the range, squared), for a range of 2.
STABILISER = 0.06**2
# Luminance (ITU-R BT.601), blue and red against it.
OPPONENT = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))

Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build_perceptual(weights: str) -> Perceptual:
    """LPIPS with the weights in the file `weights`, or the substitute if that is empty. Raises as `Lpips.from_file`."""
    return Lpips.from_file(weights) if weights else structure_distance


def structure_distance(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """One minus the contrast-and-structure part of SSIM, averaged over windows, channels and resolutions: a scalar, 0 for equal images.

    decoded, pixels: float (N, 3, H, W) in [-1, 1], sides of at least 28. Raises ValueError for smaller ones.
    Source: the factor c·s of Wang et al., "Multiscale structural similarity for image quality assessment" (2003), averaged instead of
    multiplied, in uniform windows.
    """
    smallest = WINDOW * 2 ** (SCALES - 1)
    if min(pixels.shape[-2:]) < smallest:
        raise ValueError(f"images of shape {tuple(pixels.shape)} are too small to compare at {SCALES} resolutions: at least {smallest}")
    first, second = _opponent(decoded), _opponent(pixels)
    total = first.new_zeros(())
    for scale in range(SCALES):
        if scale:
            first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
        total = total + 1 - _contrast_and_structure(first, second)
    return total / SCALES


def _opponent(pixels: torch.Tensor) -> torch.Tensor:
    kernel = torch.tensor(OPPONENT, dtype=pixels.dtype, device=pixels.device)[:, :, None, None]
    return F.conv2d(pixels, kernel)


def _contrast_and_structure(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    means = F.avg_pool2d(torch.cat((first, second, first * first, second * second, first * second)), WINDOW, STRIDE)
    mean_1, mean_2, square_1, square_2, product = means.chunk(5)
    spread = square_1 - mean_1 * mean_1 + square_2 - mean_2 * mean_2
    shared = 2 * (product - mean_1 * mean_2)
    return ((shared + STABILISER) / (spread + STABILISER)).mean()
