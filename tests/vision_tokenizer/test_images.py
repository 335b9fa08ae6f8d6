"""Camera images to pixels and back: range, resize against a slow reference, named errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from emu3_vla.vision_tokenizer.images import to_images, to_pixels


def smooth(size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / size
    channels = (np.sin(7 * x) * np.cos(5 * y), x * y, np.cos(9 * x * y))
    return (127.5 + 127 * np.stack(channels, -1)).astype(np.uint8)[None]


@pytest.mark.parametrize("size, target", [(200, 128), (84, 96), (128, 128)])
def test_resize_agrees_with_pillow(size, target):
    image = smooth(size)
    pixels = to_pixels(image, target)
    assert pixels.shape == (1, 3, target, target) and pixels.dtype == torch.float32
    slow = np.asarray(Image.fromarray(image[0]).resize((target, target), Image.Resampling.BILINEAR), np.float32)
    assert np.abs((pixels[0].permute(1, 2, 0).numpy() + 1) * 127.5 - slow).max() < 1.01


def test_bytes_come_back_exactly():
    image = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    image[0, 0, 0] = (0, 255, 128)
    pixels = to_pixels(image, 40)
    assert pixels.min() == -1 and pixels.max() == 1
    assert np.array_equal(to_images(pixels), image)


def test_to_images_resizes_clips_and_refuses_nan():
    assert to_images(torch.zeros(2, 3, 96, 96), 84).shape == (2, 84, 84, 3)
    assert to_images(torch.full((1, 3, 8, 8), 1.5)).max() == 255
    with pytest.raises(ValueError, match="NaN or infinity"):
        to_images(torch.full((1, 3, 8, 8), torch.nan))
    with pytest.raises(ValueError, match=r"expected float \(B, 3, H, W\)"):
        to_images(torch.zeros(8, 8, 3))


@pytest.mark.parametrize("wrong", [np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3)), np.zeros((1, 3, 8, 8), np.uint8)])
def test_wrong_images_are_named(wrong):
    with pytest.raises(ValueError, match=r"expected uint8 \(B, H, W, 3\)"):
        to_pixels(wrong, 8)


def test_no_images_and_no_size():
    assert to_pixels(np.zeros((0, 200, 200, 3), np.uint8), 128).shape == (0, 3, 128, 128)
    with pytest.raises(ValueError, match="size is 0"):
        to_pixels(smooth(8), 0)
