"""The light tokenizer's contract: shapes, determinism, folders, and named errors."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from emu3_vla.vision_tokenizer import VisionTokenizer, VisionTokenizerError, to_pixels
from emu3_vla.vision_tokenizer.codebook import Codebook, perplexity
from emu3_vla.vision_tokenizer.light import LightConfig, LightTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    config = LightConfig(codebook_size=64, channels=(16, 24), encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    return LightTokenizer(config).eval()


def pixels(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("height, width", [(128, 128), (96, 96), (8, 24)])
def test_images_to_one_grid_of_codes_and_back(tokenizer, height, width):
    codes = tokenizer.encode(pixels(2, 3, height, width))
    assert codes.shape == (2, height // 8, width // 8) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < 64 and len(codes.unique()) > 1
    decoded = tokenizer.decode(codes)
    assert decoded.shape == (2, 3, height, width) and decoded.dtype == torch.float32 and torch.isfinite(decoded).all()


def test_video_is_its_frames(tokenizer):
    video = pixels(2, 3, 3, 32, 32)
    codes = tokenizer.encode(video)
    assert codes.shape == (2, 3, 4, 4)
    assert torch.equal(codes[1], tokenizer.encode(video[1]))
    assert torch.equal(tokenizer.decode(codes)[1], tokenizer.decode(codes[1]))


def test_an_image_does_not_depend_on_its_batch(tokenizer):
    batch = pixels(5, 3, 64, 64)
    assert torch.equal(tokenizer.encode(batch)[3], tokenizer.encode(batch[3:4])[0])


def test_codes_are_local(tokenizer):
    one = pixels(1, 3, 128, 128)
    other = one.clone()
    other[..., :16, :16] = -other[..., :16, :16]
    changed = (tokenizer.encode(one) != tokenizer.encode(other))[0]
    assert changed[:2, :2].any() and not changed[10:, 10:].any()


def test_camera_images_go_through_to_pixels(tokenizer):
    images = np.random.default_rng(0).integers(0, 256, (2, 84, 84, 3), dtype=np.uint8)
    assert torch.equal(tokenizer.encode_camera("rgb_gripper", images), tokenizer.encode(to_pixels(images, 96)))
    assert tokenizer.grid("rgb_static") == (16, 16) and tokenizer.grid("rgb_gripper") == (12, 12)
    with pytest.raises(VisionTokenizerError, match="no camera 'rgb_left'; it was trained on rgb_gripper, rgb_static"):
        tokenizer.encode_camera("rgb_left", images)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = VisionTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, LightTokenizer) and loaded.config == tokenizer.config and not loaded.training
    codes = tokenizer.encode(pixels(1, 3, 64, 64))
    assert torch.equal(loaded.encode(pixels(1, 3, 64, 64)), codes)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "expected floating point in .*to_pixels"),
        (torch.zeros(3, 16, 16), r"expected images \(B, 3, H, W\)"),
        (torch.zeros(1, 16, 16, 3), r"expected images \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 12, 16), "multiples of 8"),
        (torch.zeros(0, 3, 16, 16), "at least one image"),
        (torch.full((1, 3, 16, 16), 255.0), r"lie in \[255, 255\], expected \[-1, 1\]"),
        (torch.full((1, 3, 16, 16), torch.nan), "nan"),
    ],
)
def test_wrong_pixels_are_named(tokenizer, wrong, message):
    with pytest.raises(VisionTokenizerError, match=message):
        tokenizer.encode(wrong)


def test_wrong_codes_are_named(tokenizer):
    with pytest.raises(VisionTokenizerError, match=r"lie in \[64, 64\], expected \[0, 64\)"):
        tokenizer.decode(torch.full((1, 2, 2), 64))
    with pytest.raises(VisionTokenizerError, match="expected at least one grid of integers"):
        tokenizer.decode(torch.zeros(2, 2, dtype=torch.int64))


def test_folders_that_do_not_fit_are_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        VisionTokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good, content = json.loads(config.read_text()), weights.read_bytes()
    config.write_text(json.dumps(good | {"kind": "lite"}))
    with pytest.raises(VisionTokenizerError, match="unknown kind 'lite' .* did you mean 'light'"):
        VisionTokenizer.from_pretrained(tmp_path)
    config.write_text(json.dumps(good | {"depth": 3}))
    with pytest.raises(VisionTokenizerError, match="config.json: .*depth"):
        VisionTokenizer.from_pretrained(tmp_path)
    config.write_text(json.dumps(good | {"codebook_size": 128}))
    with pytest.raises(VisionTokenizerError, match=r"codebook.codes is \(64, 8\), expected \(128, 8\)|does not fit"):
        VisionTokenizer.from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(VisionTokenizerError, match="damaged or cut short"):
        VisionTokenizer.from_pretrained(tmp_path)
    config.write_text(json.dumps(good))
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(VisionTokenizerError, match="model.safetensors is damaged or cut short"):
        VisionTokenizer.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        VisionTokenizer.from_pretrained(tmp_path)


def test_not_a_number_in_the_weights_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["encoder.1.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(VisionTokenizerError, match="encoder.1.weight holds NaN"):
        VisionTokenizer.from_pretrained(tmp_path)


def test_config_says_what_cannot_be():
    with pytest.raises(ValueError, match="positive multiple of 8"):
        LightConfig(image_sizes={"rgb_static": 100})
    with pytest.raises(ValueError, match="expected one number each"):
        LightConfig(channels=(64,))


def test_codebook_finds_the_nearest_and_passes_gradients_straight():
    codebook = Codebook(16, 4)
    latents = (codebook.codes[[3, 7]] * 5 + 0.01).requires_grad_()
    quantised, indices, commitment, codes_loss = codebook.quantise(latents)
    assert indices.tolist() == [3, 7] and torch.allclose(quantised, codebook.codes[[3, 7]], atol=1e-6)
    slow = ((torch.nn.functional.normalize(latents, dim=1) - codebook.codes[[3, 7]]) ** 2).sum(1).mean()
    assert torch.isclose(commitment, slow)
    quantised.sum().backward()
    assert latents.grad.abs().sum() > 0


def test_kmeans_finds_clusters_and_revival_moves_dead_codes():
    random = np.random.default_rng(0)
    centres = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    latents = centres.repeat(50, 1) + 0.01 * torch.randn(400, 4, generator=torch.Generator().manual_seed(2))
    codebook = Codebook(8, 4)
    with pytest.raises(ValueError, match="3 latents cannot place 8 codes"):
        codebook.start_from(latents[:3], random)
    codebook.start_from(latents, random, iterations=20)
    assert (codebook.codes @ centres.T).max(0).values.min() > 0.8
    codebook.counts[:] = 10.0
    codebook.counts[2], codebook.sums[2] = 0.0, -codebook.sums[2]
    assert codebook.revive(latents, random, threshold=0.1) == 1
    assert (codebook.codes[2] @ centres.T).max() > 0.99


def test_codes_follow_the_latents_that_choose_them():
    codebook = Codebook(4, 3)
    target = torch.nn.functional.normalize(codebook.codes[1] + 0.3, dim=0)
    for _ in range(200):
        codebook.update(target.repeat(10, 1), torch.ones(10, dtype=torch.int64), decay=0.9)
    assert torch.allclose(codebook.codes[1], target, atol=1e-4)


def test_perplexity_bounds():
    assert perplexity(torch.ones(16)) == pytest.approx(16) and perplexity(torch.tensor([5.0, 0, 0])) == pytest.approx(1)
