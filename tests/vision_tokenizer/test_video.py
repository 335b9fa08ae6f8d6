"""The light tokenizer with codes in time, and with larger patches."""

import pytest
import torch

from emu3_vla.vision_tokenizer import VisionTokenizer, VisionTokenizerError
from emu3_vla.vision_tokenizer.light import LightConfig, LightTokenizer

SIZES = {"rgb_static": 64, "rgb_gripper": 32}


def made(**options) -> LightTokenizer:
    torch.manual_seed(0)
    shape = dict(codebook_size=64, channels=(16, 24), encoder_blocks=(0, 1), decoder_blocks=(0, 1), image_sizes=SIZES)
    tokenizer = LightTokenizer(LightConfig(**shape | options)).eval()
    for parameter in tokenizer.parameters():  # also those that start at zero, or blocks would do nothing
        if not parameter.abs().sum():
            torch.nn.init.normal_(parameter, std=0.05)
    return tokenizer


@pytest.fixture(scope="module")
def video_tokenizer() -> LightTokenizer:
    return made(frames_per_code=4, temporal_channels=8)


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_four_frames_share_their_codes(video_tokenizer):
    video = pixels(2, 8, 3, 32, 48)
    codes = video_tokenizer.encode(video)
    assert codes.shape == (2, 2, 4, 6) and len(codes.unique()) > 1
    decoded = video_tokenizer.decode(codes)
    assert decoded.shape == video.shape and torch.isfinite(decoded).all()
    assert not torch.equal(decoded[:, 0], decoded[:, 3])
    with pytest.raises(VisionTokenizerError, match=r"expected a multiple of 4 frames; use pad\(\)"):
        video_tokenizer.encode(video[:, :7])


def test_a_code_depends_on_no_later_frame(video_tokenizer):
    video, other = pixels(1, 8, 3, 32, 32), pixels(1, 8, 3, 32, 32, seed=1)
    changed = torch.cat((video[:, :4], other[:, 4:]), 1)
    codes, later = video_tokenizer.encode(video), video_tokenizer.encode(changed)
    assert torch.equal(codes[:, 0], later[:, 0]) and not torch.equal(codes[:, 1], later[:, 1])


def test_a_still_image_is_a_clip_that_stands(video_tokenizer):
    image = pixels(3, 3, 32, 32)
    codes = video_tokenizer.encode(image)
    assert codes.shape == (3, 4, 4)
    assert torch.equal(codes, video_tokenizer.encode(image[:, None].expand(-1, 4, -1, -1, -1))[:, 0])
    torch.testing.assert_close(video_tokenizer.decode(codes), video_tokenizer.decode(codes[:, None])[:, 0])


def test_only_one_frame_goes_through_the_2d_network_for_an_image(video_tokenizer):
    seen = []
    hooks = [
        part.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        for part in (video_tokenizer.encoder, video_tokenizer.decoder)
    ]
    video_tokenizer.decode(video_tokenizer.encode(pixels(5, 3, 32, 32)))
    for hook in hooks:
        hook.remove()
    assert seen == [5, 5]


def test_a_clip_does_not_depend_on_its_batch_even_in_training(video_tokenizer):
    clips = pixels(3, 4, 3, 32, 32)
    codes = video_tokenizer.encode(clips)
    assert torch.equal(video_tokenizer.encode(clips[1:2])[0], codes[1])
    video_tokenizer.train()
    assert torch.equal(video_tokenizer.encode(clips), codes)
    video_tokenizer.eval()


@pytest.mark.parametrize("frames", [1, 3, 4, 6])
def test_any_length_comes_back(video_tokenizer, frames):
    assert video_tokenizer.reconstruct(pixels(1, frames, 3, 30, 40)).shape == (1, frames, 3, 30, 40)


def test_gradients_reach_every_weight(video_tokenizer):
    clips = pixels(1, 4, 3, 32, 32)
    video_tokenizer.zero_grad()
    video_tokenizer.pixels(video_tokenizer.latents(clips)).square().mean().backward()
    without = [name for name, parameter in video_tokenizer.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum()]
    assert not without
    video_tokenizer.zero_grad()


def test_save_and_load(video_tokenizer, tmp_path):
    video_tokenizer.save_pretrained(tmp_path)
    loaded = VisionTokenizer.from_pretrained(tmp_path)
    assert loaded.config == video_tokenizer.config and loaded.frames_per_code == 4
    clip = pixels(1, 4, 3, 32, 32)
    assert torch.equal(loaded.encode(clip), video_tokenizer.encode(clip))


def test_a_third_level_makes_patches_of_sixteen():
    tokenizer = made(channels=(16, 24, 24), encoder_blocks=(0, 1, 1), decoder_blocks=(0, 1, 1))
    assert tokenizer.patch == 16 and tokenizer.grid("rgb_static") == (4, 4)
    codes = tokenizer.encode(pixels(2, 3, 64, 32))
    assert codes.shape == (2, 4, 2) and tokenizer.decode(codes).shape == (2, 3, 64, 32)
    with pytest.raises(ValueError, match="positive multiple of 16"):
        LightConfig(channels=(8, 8, 8), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0), image_sizes={"rgb_static": 72})


def test_shapes_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="frames_per_code is 3, expected a power of two"):
        LightConfig(frames_per_code=3)
    with pytest.raises(ValueError, match="encoder_blocks is .*, expected one number each"):
        LightConfig(channels=(8, 8, 8))


def test_compiled_networks_give_the_same():
    tokenizer = made()
    images = pixels(2, 3, 32, 32)
    codes, decoded = tokenizer.encode(images), tokenizer.decode(tokenizer.encode(images))
    tokenizer.compile(backend="eager")  # the road through torch.compile, without waiting for a C++ compiler
    assert torch.equal(tokenizer.encode(images), codes)
    torch.testing.assert_close(tokenizer.decode(codes), decoded, rtol=0, atol=1e-5)
