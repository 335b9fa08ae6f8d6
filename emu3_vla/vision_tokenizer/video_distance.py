"""Fréchet distance between sets of clips: how far reconstructions are from recordings as a whole, motion included.

Features of clips are taken as two normal distributions, whose Fréchet distance is the figure (arXiv 1812.01717). Published figures use an
I3D network trained on Kinetics. It may be given as a TorchScript file, which is code that the user trusts. What ships instead are the
latents of a light tokenizer's encoder and how they change from frame to frame: they know these tables, blocks and arms, need nothing else,
and are ours alone, so their distances compare with each other and with no published FVD.

Axes: M clips, T frames, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F

from emu3_vla.vision_tokenizer.base import VisionTokenizer
from emu3_vla.vision_tokenizer.light import LightTokenizer

SHIPPED = "checkpoints/calvin-d/vision_tokenizer"  # in the package `policies`
POOLED = 2  # rows and columns into which an image is pooled
BATCH = 8
I3D_SIZE, I3D_FRAMES = 224, 10

ClipFeatures = Callable[[torch.Tensor, str], torch.Tensor]  # clips (M, T, 3, H, W) in [-1, 1] and their camera -> (M, F)


class LatentFeatures:
    """Pooled unit latents of a light tokenizer and their changes: float (M, 2 * POOLED² * D + D)."""

    def __init__(self, folder: str | Path | None = None):
        """folder: of a light tokenizer; by default the shipped one. Raises ValueError for one of another kind or with codes in time."""
        self.folder = Path(str(folder or resources.files("policies") / SHIPPED))
        self.tokenizer = VisionTokenizer.from_pretrained(self.folder)
        if not isinstance(self.tokenizer, LightTokenizer) or self.tokenizer.frames_per_code > 1:
            raise ValueError(f"{self.folder} cannot be the clips' features: expected a light tokenizer that codes every frame alone")

    @torch.inference_mode()
    def __call__(self, clips: torch.Tensor, camera: str) -> torch.Tensor:
        size = self.tokenizer.image_size(camera)
        return torch.cat([self._features(_resized(part, size)) for part in clips.split(BATCH)])

    def _features(self, clips: torch.Tensor) -> torch.Tensor:
        latents = F.normalize(self.tokenizer.latents(clips.clamp(-1, 1)), dim=-1).movedim(-1, 2)  # (M, T, D, h, w)
        changes = (latents[:, 1:] - latents[:, :-1]).abs()
        still, moving = (F.adaptive_avg_pool2d(part.flatten(0, 1), POOLED).unflatten(0, part.shape[:2]) for part in (latents, changes))
        return torch.cat([still.mean(1).flatten(1), moving.mean(1).flatten(1), latents.std((3, 4)).mean(1)], 1)


class TorchScriptFeatures:
    """I3D as `i3d_torchscript.pt` of StyleGAN-V's evaluation and its copies: module(clips (M, 3, T, 224, 224) in [-1, 1],
    rescale=False, resize=False, return_features=True) -> (M, 400). Loading such a file runs its code."""

    def __init__(self, path: str | Path):
        """Raises FileNotFoundError, and ValueError for a file that is no TorchScript."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"i3d={path} does not exist; leave it empty for the features that ship")
        try:
            self.module = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(f"i3d={path} cannot be loaded as TorchScript: {error}") from error

    @torch.inference_mode()
    def __call__(self, clips: torch.Tensor, camera: str) -> torch.Tensor:
        if clips.shape[1] < I3D_FRAMES:
            raise ValueError(f"clips of {clips.shape[1]} frames, expected at least {I3D_FRAMES} for I3D; set clip_length=16")
        parts = [_resized(part.clamp(-1, 1), I3D_SIZE).transpose(1, 2) for part in clips.split(BATCH)]
        return torch.cat([self.module(part, rescale=False, resize=False, return_features=True) for part in parts])


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Between normal distributions fitted to features (M, F): |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½).

    Covariances are of M samples: below several times F clips the distance is biased upwards. Raises ValueError for fewer than two clips.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"{len(first)} and {len(second)} clips have no covariance; expected at least two of each")
    first, second = first.double(), second.double()
    means, covariances = [x.mean(0) for x in (first, second)], [torch.atleast_2d(torch.cov(x.T)) for x in (first, second)]
    # The trace of (S1 S2)^½ is that of the symmetric (S1^½ S2 S1^½)^½, whose eigenvalues are real.
    root = _square_root(covariances[0])
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    distance = (means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * shared
    return max(0.0, distance.item())


def _square_root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _resized(clips: torch.Tensor, size: int) -> torch.Tensor:
    if tuple(clips.shape[-2:]) == (size, size):
        return clips
    frames = F.interpolate(clips.flatten(0, 1), size=(size, size), mode="bilinear", antialias=True)
    return frames.unflatten(0, clips.shape[:2])
