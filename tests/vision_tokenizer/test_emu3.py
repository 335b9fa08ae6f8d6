"""Emu3's tokenizer: equal to the recorded outputs of the original, and to Transformers' own passes over the same weights."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from emu3_vla.vision_tokenizer import VisionTokenizer, VisionTokenizerError
from emu3_vla.vision_tokenizer.emu3 import Emu3Tokenizer
from emu3_vla.vision_tokenizer.tiling import decode_tiled, encode_tiled

TINY = dict(base_channels=32, channel_multiplier=[1, 1, 2, 2], hidden_size=64, num_res_blocks=1, codebook_size=64, attn_resolutions=[3])


@pytest.fixture(scope="module")
def published(reference):
    folder = reference / "emu3" / "baai_vq_tiny"
    return folder, VisionTokenizer.from_pretrained(folder), dict(np.load(folder / "expected.npz"))


@pytest.fixture(scope="module")
def tiny() -> Emu3Tokenizer:
    torch.manual_seed(0)
    made = Emu3Tokenizer(Emu3VQVAEConfig(**TINY)).eval()
    torch.nn.init.normal_(made.vqvae.quantize.embedding.weight)
    return made


def _pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", ["image", "video"])
def test_codes_and_reconstructions_are_those_recorded(published, kind):
    _, tokenizer, expected = published
    np.testing.assert_array_equal(tokenizer.encode(torch.tensor(expected[kind])), expected[f"{kind}_codes"])
    decoded = tokenizer.decode(torch.tensor(expected[f"{kind}_codes"]))
    np.testing.assert_allclose(decoded, expected[f"{kind}_recon"], atol=1e-4)


def test_the_three_layouts_hold_the_same_tokenizer(published, tmp_path):
    _, tokenizer, expected = published
    image = torch.tensor(expected["image"])
    tokenizer.save_pretrained(tmp_path / "ours")
    Emu3VQVAE.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "transformers")
    for folder in ("ours", "transformers"):
        np.testing.assert_array_equal(VisionTokenizer.from_pretrained(tmp_path / folder).encode(image), expected["image_codes"])


@pytest.mark.parametrize("shape", [(2, 3, 32, 48), (1, 8, 3, 32, 32)])
def test_passes_equal_those_of_transformers(tiny, shape):
    pixels = _pixels(*shape)
    sizes = torch.tensor([shape[-2:]] * shape[0])
    with torch.inference_mode():
        theirs = tiny.vqvae.encode(pixels, sizes)
        codes = tiny.encode(pixels)
        tokens = torch.stack([*theirs.image_tokens])
        torch.testing.assert_close(codes.view_as(tokens), tokens, rtol=0, atol=0)
        pixels_back = tiny.vqvae.decode(codes)
    ours = tiny.decode(codes)
    # Random weights overshoot [-1, 1], so the tolerance is relative to the largest value.
    torch.testing.assert_close(ours, pixels_back.view_as(ours), rtol=0, atol=1e-5 * ours.abs().max().item())


@pytest.mark.parametrize("shape", [(2, 3, 37, 51), (1, 1, 3, 40, 40), (1, 6, 3, 33, 48), (2, 9, 3, 8, 8)])
def test_any_size_and_length_comes_back_in_shape(tiny, shape):
    assert tiny.reconstruct(_pixels(*shape)).shape == shape


def test_padding_repeats_the_edge_and_is_undone_exactly(tiny):
    pixels = _pixels(1, 5, 3, 13, 20)
    padded, padding = tiny.pad(pixels)
    assert padded.shape == (1, 8, 3, 16, 24)
    assert torch.equal(padded[:, 7, :, :13, 23], pixels[:, 4, :, :, 19])
    assert torch.equal(padding.undo(padded), pixels)
    with pytest.raises(ValueError, match="were not padded from"):
        padding.undo(pixels[..., :10])


def test_tiles_that_hold_the_whole_image_change_nothing(tiny):
    pixels = _pixels(1, 3, 48, 64)
    codes = tiny.encode(pixels)
    assert torch.equal(encode_tiled(tiny, pixels, tile=64, overlap=16), codes)
    torch.testing.assert_close(decode_tiled(tiny, codes, tile=64, overlap=16), tiny.decode(codes))


def test_tiles_cover_a_larger_image_and_blend(tiny):
    codes = encode_tiled(tiny, _pixels(1, 3, 72, 104), tile=48, overlap=16)
    assert codes.shape == (1, 9, 13)
    constant = decode_tiled(_Constant(tiny), codes, tile=48, overlap=16)
    torch.testing.assert_close(constant, torch.full((1, 3, 72, 104), 0.25))
    with pytest.raises(VisionTokenizerError, match="multiples of 8"):
        encode_tiled(tiny, _pixels(1, 3, 72, 104), tile=50, overlap=16)


class _Constant:
    """A tokenizer that decodes everything to one grey, so that weights of a blend must add up."""

    def __init__(self, like):
        self.patch = like.patch

    def decode(self, codes):
        return torch.full((len(codes), 3, codes.shape[-2] * 8, codes.shape[-1] * 8), 0.25)


def test_bfloat16_decodes_nearly_the_same(tiny):
    pixels = _pixels(1, 3, 32, 32)
    codes, exact = tiny.encode(pixels), tiny.decode(tiny.encode(pixels))
    half = Emu3Tokenizer(tiny.config)
    half.load_weights(tiny.weights())
    half = half.eval().to(torch.bfloat16)
    assert half.encode(pixels).shape == codes.shape
    assert half.decode(codes).dtype == torch.float32
    assert (half.decode(codes) - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize(
    "pixels,message",
    [
        (torch.zeros(1, 4, 16, 16), r"expected images \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "expected floating point"),
        (torch.full((1, 3, 16, 16), float("nan")), "no NaN"),
        (torch.zeros(1, 0, 3, 16, 16), "at least one image"),
        (torch.zeros(1, 3, 3, 16, 16), r"multiple of 4 frames; use pad\(\)"),
        (torch.zeros(1, 3, 17, 16), r"multiples of 8; resize it or use pad\(\)"),
    ],
)
def test_bad_pixels_are_named(tiny, pixels, message):
    with pytest.raises(VisionTokenizerError, match=message):
        tiny.encode(pixels)


def test_codes_out_of_range_are_named(tiny):
    with pytest.raises(VisionTokenizerError, match=r"codes lie in \[0, 64\], expected \[0, 64\)"):
        tiny.decode(torch.tensor([[[0, 64]]]))


def test_damaged_and_foreign_folders_are_named(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VisionTokenizerError, match="damaged or cut short"):
        VisionTokenizer.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    state = load_file(weights)
    del state["quant_conv.conv.bias"]
    save_file(state, weights)
    with pytest.raises(VisionTokenizerError, match="quant_conv.conv.bias is absent"):
        VisionTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "Emu3VisionVQ", "ch": 32}))
    with pytest.raises(VisionTokenizerError, match="lacks ch_mult"):
        VisionTokenizer.from_pretrained(tmp_path)
