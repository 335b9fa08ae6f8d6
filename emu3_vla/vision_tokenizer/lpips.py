"""LPIPS with VGG16, from a file of weights, and how to make that file.

    python -m emu3_vla.vision_tokenizer.lpips vgg16-397923af.pth vgg.pth lpips_vgg.safetensors

The first file is torchvision's VGG16 trained on ImageNet, the second the five linear heads that the LPIPS project publishes
(lpips/weights/v0.1/vgg.pth in its package). Both are read as plain tensors (`weights_only`); nothing is downloaded.

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv 1801.03924), version 0.1 of its
weights.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

# Channels of VGG16's thirteen convolutions; features are compared at the end of each of the five groups, before its pooling.
GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# ImageNet's statistics, restated for pixels in [-1, 1]; LPIPS's "scaling layer".
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10

USAGE = "usage: python -m emu3_vla.vision_tokenizer.lpips TORCHVISION_VGG16.pth LPIPS_VGG.pth OUT.safetensors"


class LpipsError(ValueError):
    """A file that does not hold the weights of LPIPS."""


class Lpips(nn.Module):
    """Perceptual distance of image pairs. Frozen: gradients go to the images alone."""

    def __init__(self):
        super().__init__()
        channels, groups = 3, []
        for widths in GROUPS:
            layers: list[nn.Module] = []
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            groups.append(nn.Sequential(*layers))
        self.groups = nn.ModuleList(groups)
        self.heads = nn.ParameterList(torch.ones(widths[-1]) for widths in GROUPS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | Path) -> Lpips:
        """Raises FileNotFoundError, and LpipsError for a file of something else."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"perceptual weights {path} do not exist; leave the option empty for the substitute, or make them. {USAGE}"
            )
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise LpipsError(f"{path} is damaged or no safetensors file: {error}; {USAGE}") from error
        lpips = cls()
        expected = {name: tuple(value.shape) for name, value in lpips.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if expected != found:
            wrong = sorted(set(expected.items()) ^ set(found.items()))[0][0]
            raise LpipsError(f"{path}: {wrong} is {found.get(wrong, 'absent')}, expected {expected.get(wrong, 'absent')}; {USAGE}")
        lpips.load_state_dict(state)
        return lpips

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Mean distance of pairs, a scalar; float (N, 3, H, W) in [-1, 1], sides of at least 16."""
        return self.distances(first, second).mean()

    def distances(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Distance of each pair: float (N,)."""
        hidden = (torch.cat((first, second)) - self.shift) / self.scale
        total = first.new_zeros(len(first))
        for number, (group, head) in enumerate(zip(self.groups, self.heads, strict=True)):
            hidden = group(nn.functional.max_pool2d(hidden, 2) if number else hidden)
            # The added square changes no value, but keeps the root's gradient finite where a position has no activation at all.
            unit = hidden / ((hidden.square().sum(1, keepdim=True) + EPSILON**2).sqrt() + EPSILON)
            left, right = unit.chunk(2)
            total = total + ((left - right).square() * head.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total


def convert(vgg16: Path, heads: Path, target: Path) -> None:
    """Write `target` from the two published files. Raises FileNotFoundError or LpipsError."""
    backbone, linear = _read(vgg16), _read(heads)
    lpips = Lpips()
    convolutions = [layer for group in lpips.groups for layer in group if isinstance(layer, nn.Conv2d)]
    numbers = sorted({int(name.split(".")[1]) for name in backbone if name.startswith("features.")})
    if len(numbers) != len(convolutions):
        raise LpipsError(f"{vgg16} holds {len(numbers)} convolutions under 'features.', expected the {len(convolutions)} of VGG16")
    for layer, number in zip(convolutions, numbers, strict=True):
        for part in ("weight", "bias"):
            _copy(getattr(layer, part), backbone, f"features.{number}.{part}", vgg16)
    for number, head in enumerate(lpips.heads):
        name = f"lin{number}.model.1.weight"
        _copy(head, linear | ({name: linear[name].flatten()} if name in linear else {}), name, heads)
    save_file(lpips.state_dict(), target, metadata={"format": "pt"})


def _copy(target: torch.Tensor, state: dict[str, torch.Tensor], name: str, path: Path) -> None:
    found = tuple(state[name].shape) if name in state else "absent"
    if found != tuple(target.shape):
        raise LpipsError(f"{path}: {name} is {found}, expected {tuple(target.shape)}")
    target.data.copy_(state[name])


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise LpipsError(f"{path} cannot be read as plain tensors: {error}") from error


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        convert(*map(Path, arguments))
    except (ValueError, FileNotFoundError) as error:
        print(f"lpips: {error}", file=sys.stderr)
        return 2
    print(arguments[2])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
