"""Perceptual and adversarial parts of the loss: hand-worked values, gradients, named errors."""

import pytest
import torch
from torch import nn

from emu3_vla.vision_tokenizer.discriminator import Discriminator, DiscriminatorConfig, adaptive_weight, hinge_loss
from emu3_vla.vision_tokenizer.losses import LossConfig
from emu3_vla.vision_tokenizer.lpips import GROUPS, Lpips, LpipsError, main
from emu3_vla.vision_tokenizer.perceptual import build_perceptual, structure_distance


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def checks(size: int = 64) -> torch.Tensor:
    return ((torch.arange(size)[:, None] // 8 + torch.arange(size)[None] // 8) % 2).float().expand(1, 3, size, size) - 0.5


def test_structure_distance_sees_lost_structure_and_not_brightness():
    image = checks()
    flat = torch.zeros_like(image)
    blurred = nn.functional.avg_pool2d(nn.functional.pad(image, (4, 4, 4, 4), mode="replicate"), 9, 1)
    assert structure_distance(image, image) == 0
    assert structure_distance(image + 0.2, image) < 1e-4  # brighter, same structure
    assert 0.01 < structure_distance(blurred, image) < structure_distance(flat, image)
    grey = torch.full_like(image, 0.3)
    assert structure_distance(grey, flat) < 1e-4  # neither varies


def test_structure_distance_of_a_known_pair():
    """Windows of ±a against ±b, no covariance lost: 1 - (2ab + c) / (a² + b² + c) of the standard deviations, in luminance alone."""
    # Stripes one pixel wide average out in every pooled image, so only the first of three resolutions and one of three channels differ.
    stripes = (torch.arange(64) % 2 * 2.0 - 1).expand(1, 3, 64, 64)
    variance = 1 - (1 / 7) ** 2  # seven pixels: four of one sign, three of the other
    a, b = 0.2, 0.1
    expected = 1 - (2 * a * b * variance + 0.0036) / ((a * a + b * b) * variance + 0.0036)
    assert structure_distance(a * stripes, b * stripes).item() == pytest.approx(expected / 9, rel=1e-2)
    with pytest.raises(ValueError, match="too small to compare at 3 resolutions: at least 28"):
        structure_distance(stripes[..., :24], stripes[..., :24])


def test_hinge_loss_of_known_scores():
    real, decoded = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])
    assert hinge_loss(real, decoded) == 0.5 * (0.5 + 1.0)


def test_adaptive_weight_makes_the_last_layer_feel_both_alike():
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction, adversarial = (layer * 3).sum(), (layer * 0.5).sum()
    assert adaptive_weight(reconstruction, adversarial, layer).item() == pytest.approx(6.0, rel=1e-3)
    assert adaptive_weight(reconstruction, (layer * 0).sum(), layer).item() == 1e4


def test_the_discriminator_scores_patches_and_learns_to_tell():
    torch.manual_seed(0)
    network = Discriminator(DiscriminatorConfig(channels=8, layers=2))
    assert network(noise(2, 3, 32, 32)).shape == (2, 1, 6, 6)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    before = None
    for step in range(25):
        loss = hinge_loss(network(noise(4, 3, 32, 32, seed=step)), network(torch.zeros(4, 3, 32, 32)))
        before = before or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * before
    with pytest.raises(ValueError, match="at least 1"):
        DiscriminatorConfig(layers=0)
    with pytest.raises(ValueError, match="must not be negative"):
        LossConfig(adversarial=-1.0)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Files as torchvision and the LPIPS project lay them out, with random numbers in them."""
    folder, generator = tmp_path_factory.mktemp("lpips"), torch.Generator().manual_seed(0)
    backbone, number, channels = {"classifier.0.weight": torch.zeros(2, 2)}, 0, 3
    for widths in GROUPS:
        for width in widths:
            backbone[f"features.{number}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * (2 / 9 / channels) ** 0.5
            backbone[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=generator)
            number, channels = number + 2, width
        number += 1  # pooling
    heads = {f"lin{n}.model.1.weight": torch.rand(1, widths[-1], 1, 1, generator=generator) for n, widths in enumerate(GROUPS)}
    torch.save(backbone, folder / "vgg16.pth")
    torch.save(heads, folder / "vgg.pth")
    assert main([str(folder / "vgg16.pth"), str(folder / "vgg.pth"), str(folder / "lpips.safetensors")]) == 0
    return folder, backbone, heads


def test_lpips_is_its_definition(published):
    folder, backbone, heads = published
    first, second = noise(2, 3, 32, 32), noise(2, 3, 32, 32, seed=1)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    left, right, expected = (first - shift) / scale, (second - shift) / scale, torch.zeros(2)
    numbers = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]
    for group, layers in enumerate(numbers):
        if group:
            left, right = nn.functional.max_pool2d(left, 2), nn.functional.max_pool2d(right, 2)
        for layer in layers:
            weights = backbone[f"features.{layer}.weight"], backbone[f"features.{layer}.bias"]
            left, right = (nn.functional.relu(nn.functional.conv2d(side, *weights, padding=1)) for side in (left, right))
        difference = left / (left.norm(dim=1, keepdim=True) + 1e-10) - right / (right.norm(dim=1, keepdim=True) + 1e-10)
        expected += nn.functional.conv2d(difference.square(), heads[f"lin{group}.model.1.weight"]).mean((1, 2, 3))
    lpips = build_perceptual(str(folder / "lpips.safetensors"))
    torch.testing.assert_close(lpips.distances(first, second), expected, rtol=1e-4, atol=1e-6)
    assert lpips(first, first) == 0
    moved = torch.zeros(1, 3, 32, 32, requires_grad=True)  # a flat image has positions without any activation
    lpips(moved, first[:1]).backward()
    assert torch.isfinite(moved.grad).all() and moved.grad.abs().sum() > 0


def test_lpips_errors_are_named(published, tmp_path, capsys):
    folder, backbone, _ = published
    with pytest.raises(FileNotFoundError, match="perceptual weights .*absent.safetensors do not exist; leave the option empty"):
        build_perceptual(str(tmp_path / "absent.safetensors"))
    (tmp_path / "half.safetensors").write_bytes((folder / "lpips.safetensors").read_bytes()[:1000])
    with pytest.raises(LpipsError, match="damaged or no safetensors file"):
        Lpips.from_file(tmp_path / "half.safetensors")
    assert main(["one"]) == 2 and "usage:" in capsys.readouterr().err
    torch.save({name: value for name, value in backbone.items() if "28" not in name}, tmp_path / "short.pth")
    assert main([str(tmp_path / "short.pth"), str(folder / "vgg.pth"), str(tmp_path / "out")]) == 2
    assert "holds 12 convolutions under 'features.', expected the 13" in capsys.readouterr().err
    (tmp_path / "text.pth").write_text("no tensors")
    assert main([str(tmp_path / "text.pth"), str(folder / "vgg.pth"), str(tmp_path / "out")]) == 2
    assert "cannot be read as plain tensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
