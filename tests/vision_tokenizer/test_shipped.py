"""The tokenizer of the shipped policy: its codes must never change, or the policy sees another world."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from emu3_vla.vision_tokenizer import VisionTokenizer, to_pixels

SHIPPED = Path(__file__).parents[2] / "policies/checkpoints/calvin-d/vision_tokenizer"
# On these images every latent prefers its code by at least 0.07 (squared distance), which rounding on another machine does not reach.
SEED, SIZE = 5, 200
CODES = "8b735a85e39e078cb5104101512c27ab1f451aa2fc84f75509209cb4caedfd31"


def waves_and_blocks() -> np.ndarray:
    """One picture of smooth colours with six plain squares: uint8 (1, 200, 200, 3)."""
    random = np.random.default_rng(SEED)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    frequencies = random.uniform(2, 9, (3, 2))
    image = np.stack([127.5 + 110 * np.sin(a * x + b * y * y) for a, b in frequencies], -1)
    for _ in range(6):
        row, column = random.integers(0, 170, 2)
        image[row : row + 25, column : column + 25] = random.integers(0, 256, 3)
    return image.round().astype(np.uint8)[None]


def test_codes_of_a_fixed_image_are_those_of_the_day_it_was_shipped():
    tokenizer = VisionTokenizer.from_pretrained(SHIPPED)
    codes = tokenizer.encode(to_pixels(waves_and_blocks(), 128))
    assert codes.shape == (1, 16, 16) and codes.dtype == torch.int64
    assert hashlib.sha256(codes.numpy().astype("<i8").tobytes()).hexdigest() == CODES
