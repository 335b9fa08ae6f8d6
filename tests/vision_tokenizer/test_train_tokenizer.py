"""`train-tokenizer`: learns, and a killed run ends where an unbroken one does."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from emu3_vla import cli
from emu3_vla.data.episodes import EpisodeStore
from emu3_vla.muon import orthogonalise
from emu3_vla.vision_tokenizer import VisionTokenizer, VisionTokenizerError
from emu3_vla.vision_tokenizer import train as training
from emu3_vla.vision_tokenizer.discriminator import DiscriminatorConfig
from emu3_vla.vision_tokenizer.emu3 import Emu3Config
from emu3_vla.vision_tokenizer.light import LightConfig
from emu3_vla.vision_tokenizer.losses import LossConfig, foreground, psnr, reconstruction_loss
from emu3_vla.vision_tokenizer.train import TrainingDiverged, TrainTokenizerConfig, main
from envs.spec import Episode


def scene(random: np.random.Generator, size: int) -> np.ndarray:
    """A wooden table with a coloured block somewhere."""
    image = np.full((size, size, 3), (150, 110, 70), np.uint8)
    image[:, ::8] = (120, 90, 60)
    row, column = random.integers(0, size * 3 // 4, 2)
    image[row : row + size // 5, column : column + size // 5] = random.choice([(200, 30, 30), (30, 60, 200), (240, 130, 190)])
    return image


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    random = np.random.default_rng(0)
    store = EpisodeStore.create(tmp_path_factory.mktemp("train") / "episodes", {"wordings": {}})
    for shard in range(3):
        frames = 24
        episode = Episode(
            task="push",
            instruction="push",
            actions=np.zeros((frames, 7), np.float32),
            robot_obs=np.zeros((frames, 15)),
            scene_obs=np.zeros((frames, 24)),
            imitate=np.ones(frames, bool),
            frame_step=np.arange(frames),
            rgb_static=np.stack([scene(random, 200) for _ in range(frames)]),
            rgb_gripper=np.stack([scene(random, 84) for _ in range(frames)]),
        )
        store.write_shard(shard, [episode])
    return store.path


SMALL = LightConfig(
    codebook_size=32,
    channels=(16, 24),
    encoder_blocks=(0, 1),
    decoder_blocks=(0, 1),
    image_sizes={"rgb_static": 64, "rgb_gripper": 48},
)


def config_for(episodes, folder, **options) -> TrainTokenizerConfig:
    values = dict(steps=60, batch_size=4, warmup_steps=5, quantise_from=10, kmeans_images=8, revive_every=5, threads=1)
    values |= dict(max_frames=100, validation_frames=8, validate_every=20, checkpoint_every=7, learning_rate=4e-3, model=SMALL)
    stores = tuple(map(str, episodes)) if isinstance(episodes, tuple) else str(episodes)
    return TrainTokenizerConfig(episodes=stores, output_dir=str(folder), **values | options)


def run(config: TrainTokenizerConfig) -> None:
    os.makedirs(config.output_dir, exist_ok=True)
    threads = torch.get_num_threads()
    try:
        main(config)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unbroken(episodes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(config_for(episodes, folder))
    return folder


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_says_so(unbroken):
    records = lines(unbroken)
    validations = [record["validation"] for record in records if "validation" in record]
    assert len(validations) == 3
    for camera in ("rgb_static", "rgb_gripper"):
        assert validations[-1][camera]["psnr_db"] > validations[0][camera]["psnr_db"] + 0.5
        assert validations[-1][camera]["codes_used"] > 0.3 and validations[-1][camera]["perplexity"] > 3
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0]
    assert len(list((unbroken / "pictures").glob("rgb_*_*.png"))) == 6
    assert VisionTokenizer.from_pretrained(unbroken / "vision_tokenizer").image_sizes == SMALL.image_sizes


def test_a_killed_run_ends_where_an_unbroken_one_does(episodes, unbroken, tmp_path):
    folder = tmp_path / "killed"
    folder.mkdir()
    code = (
        "import importlib.util; "
        f"spec = importlib.util.spec_from_file_location('training_case', {__file__!r}); "
        "case = importlib.util.module_from_spec(spec); spec.loader.exec_module(case); "
        f"case.main(case.config_for({str(episodes)!r}, {str(folder)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 240
    while not (folder / "state.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "vision_tokenizer").exists()
    grown = tmp_path / "episodes"
    shutil.copytree(episodes, grown)
    shutil.copytree(EpisodeStore.open(grown).shard_path(0), EpisodeStore.open(grown).shard_path(9))
    episodes = grown
    run(config_for(episodes, folder))
    name = "vision_tokenizer/model.safetensors"
    assert (folder / name).read_bytes() == (unbroken / name).read_bytes()
    timeless = [{key: value for key, value in record.items() if key != "images_per_s"} for record in lines(folder)]
    assert timeless == [{key: value for key, value in record.items() if key != "images_per_s"} for record in lines(unbroken)]


EVERYTHING = dict(
    kind="emu3",
    steps=8,
    batch_size=8,
    clip_share=0.5,
    quantise_from=2,
    kmeans_images=4,
    revive_every=2,
    validate_every=8,
    checkpoint_every=3,
    learning_rate=1e-3,
    muon_learning_rate=0.0,
    emu3=Emu3Config(
        codebook_size=32,
        base_channels=32,
        channel_multiplier=(1, 1),
        residual_blocks=1,
        attention_levels=(1,),
        image_sizes={"rgb_static": 32},
    ),
    loss=LossConfig(perceptual=0.2, adversarial=0.5),
    discriminator=DiscriminatorConfig(channels=8, layers=2, begin=4),
)


@pytest.fixture(scope="module")
def everything(episodes, tmp_path_factory):
    """Emu3's network, images and clips of two stores, perceptual and adversarial losses."""
    folder = tmp_path_factory.mktemp("everything")
    run(config_for((episodes, episodes), folder, **EVERYTHING))
    return folder


def test_emu3_trains_by_the_same_loop_with_every_loss(everything):
    records = [record for record in lines(everything) if "loss" in record]
    judged = [record for record in records if "discriminator" in record]
    assert judged and all(record["step"] > EVERYTHING["discriminator"].begin for record in judged)
    assert {"perceptual", "adversarial", "adversarial_factor", "codebook", "commitment", "perplexity", "codes_used", "revived"} <= set(
        judged[-1]
    )
    validation = lines(everything)[-1]["validation"]
    assert set(validation) == {"rgb_static", "rgb_static_clips"}
    tokenizer = VisionTokenizer.from_pretrained(everything / "vision_tokenizer")
    assert tokenizer.kind == "emu3" and tokenizer.image_sizes == {"rgb_static": 32}
    assert tokenizer.reconstruct(torch.zeros(1, 5, 3, 30, 32)).shape == (1, 5, 3, 30, 32)


@pytest.mark.parametrize("killed_at", [3, 7])  # before and after the discriminator has begun
def test_a_cut_off_run_resumes_with_its_discriminator(episodes, everything, tmp_path, monkeypatch, killed_at):
    config = config_for((episodes, episodes), tmp_path, **EVERYTHING)

    original = training._step
    monkeypatch.setattr(training, "_step", lambda *arguments: original(*arguments) if arguments[3] != killed_at else cut_off())
    with pytest.raises(InterruptedError):
        run(config)
    monkeypatch.setattr(training, "_step", original)
    run(config)
    for name in ("vision_tokenizer/model.safetensors", "state.safetensors"):
        assert (tmp_path / name).read_bytes() == (everything / name).read_bytes(), name


def cut_off():
    raise InterruptedError


def test_training_goes_on_from_given_weights(episodes, everything, unbroken, tmp_path):
    options = EVERYTHING | dict(steps=1, quantise_from=0, learning_rate=1e-9, start_from=str(everything / "vision_tokenizer"))
    run(config_for(episodes, tmp_path, **options))
    before, after = (VisionTokenizer.from_pretrained(folder / "vision_tokenizer") for folder in (everything, tmp_path))
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weight, rtol=0, atol=1e-6)
    assert not torch.equal(after.last_layer(), before.last_layer())
    with pytest.raises(ValueError, match="is of kind light, expected kind=emu3"):
        training.build_tokenizer(config_for(episodes, tmp_path, **options | dict(start_from=str(unbroken / "vision_tokenizer"))))


@pytest.mark.parametrize("made_by", ["unbroken", "everything"])
def test_a_decoder_learns_alone(episodes, tmp_path, request, made_by):
    """Its reconstructions change; the code of every picture stays."""
    start = request.getfixturevalue(made_by) / "vision_tokenizer"
    before = VisionTokenizer.from_pretrained(start)
    options = {"kind": before.kind, "start_from": str(start), "steps": 12, "learning_rate": 1e-3}
    run(config_for(episodes, tmp_path, only_decoder=True, **options))
    after = VisionTokenizer.from_pretrained(tmp_path / "vision_tokenizer")
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    codes = before.encode(pixels)
    assert torch.equal(after.encode(pixels), codes)
    assert not torch.allclose(after.decode(codes), before.decode(codes), atol=1e-4)
    decoder = {id(parameter) for parameter in before.decoder_parameters()}
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert id(old) in decoder or torch.equal(old, new), name
    with pytest.raises(ValueError, match="only_decoder=true keeps the codes of a tokenizer that is there"):
        config_for(episodes, tmp_path, only_decoder=True)


def test_video_tokenizers_learn_from_clips(episodes, tmp_path):
    model = dataclasses.replace(SMALL, frames_per_code=4, temporal_channels=8)
    run(config_for(episodes, tmp_path, model=model, clip_share=0.5, batch_size=8, steps=40, validate_every=10))
    validations = [record["validation"] for record in lines(tmp_path) if "validation" in record]
    for name in ("rgb_static", "rgb_static_clips", "rgb_gripper", "rgb_gripper_clips"):
        assert validations[-1][name]["psnr_db"] > validations[0][name]["psnr_db"]
    with pytest.raises(ValueError, match="a tokenizer of 4 frames per code needs clips to learn from; set clip_share=0.5"):
        training.build_tokenizer(config_for(episodes, tmp_path, model=model))
    with pytest.raises(ValueError, match="clip_length is 6, expected a multiple of 4"):
        training.build_tokenizer(config_for(episodes, tmp_path, model=model, clip_share=1.0, clip_length=6, batch_size=6))


def test_errors_are_named(episodes, tmp_path):
    with pytest.raises(ValueError, match="kind is 'vqgan', expected one of light, emu3"):
        config_for(episodes, tmp_path, kind="vqgan")
    with pytest.raises(ValueError, match="makes 1 clips of 8 frames: expected a share between 0 and 1 and room for one clip"):
        config_for(episodes, tmp_path, clip_share=0.1, clip_length=8)
    with pytest.raises(ValueError, match="names no episode store"):
        config_for((), tmp_path)
    with pytest.raises(FileNotFoundError, match="perceptual weights .*absent do not exist"):
        run(config_for(episodes, tmp_path, loss=LossConfig(perceptual=1.0, perceptual_weights=str(tmp_path / "absent"))))
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        run(config_for(episodes, tmp_path, start_from=str(tmp_path)))
    with pytest.raises(ValueError, match="base_channels is 48, expected a multiple of 32"):
        Emu3Config(base_channels=48)
    with pytest.raises(ValueError, match="quantise_from=60 must be below steps=60"):
        config_for(episodes, tmp_path, quantise_from=60)
    with pytest.raises(ValueError, match="precision is 'fp16'"):
        config_for(episodes, tmp_path, precision="fp16")
    with pytest.raises(ValueError, match="threads is 0"):
        config_for(episodes, tmp_path, threads=0)
    (tmp_path / "shards.json").write_text("[[0, 1, 7]]")
    with pytest.raises(ValueError, match=r"lacks shards \[7\] that this run began with"):
        run(config_for(episodes, tmp_path))
    (tmp_path / "shards.json").unlink()
    (tmp_path / "state.safetensors").write_bytes(b"half")
    with pytest.raises(VisionTokenizerError, match="state.safetensors is damaged .* delete it to start afresh"):
        run(config_for(episodes, tmp_path))


def test_cameras_can_weigh_unequally(episodes, tmp_path):
    config = cli.compose("train-tokenizer", [f"episodes={episodes}", "camera_weight.rgb_gripper=3"])
    assert [config.camera_share(camera, ("rgb_static", "rgb_gripper")) for camera in ("rgb_static", "rgb_gripper")] == [0.25, 0.75]
    with pytest.raises(ValueError, match=r"camera_weight is {'rgb_static': 0.0}, expected positive"):
        config_for(episodes, tmp_path, camera_weight={"rgb_static": 0.0})


def test_divergence_stops_the_run(episodes, tmp_path):
    config = config_for(episodes, tmp_path, learning_rate=1e30, muon_learning_rate=1e30, warmup_steps=0, precision="fp32")
    with pytest.raises(TrainingDiverged, match="lower learning_rate=1e[+]30"):
        run(config)
    assert not (tmp_path / "vision_tokenizer").exists()


def test_foreground_counts_more():
    median = torch.zeros(3, 8, 8)
    pixels = torch.zeros(1, 3, 8, 8)
    pixels[..., :4] = 0.8
    near, far = pixels.clone(), pixels.clone()
    near[..., 7] += 0.1
    far[..., 0] += 0.1
    even, uneven = LossConfig(foreground=0.0, gradient=0.0), LossConfig(gradient=0.0)
    assert torch.isclose(reconstruction_loss(near, pixels, median, even), reconstruction_loss(far, pixels, median, even))
    assert reconstruction_loss(far, pixels, median, uneven) > 4 * reconstruction_loss(near, pixels, median, uneven)
    assert foreground(pixels, median, 0.25)[0, 0, 0].tolist() == [1.0] * 4 + [0.0] * 4
    with pytest.raises(ValueError, match="must not be negative"):
        dataclasses.replace(even, commitment=-1.0)


def test_psnr_of_a_known_error():
    pixels = torch.zeros(1, 3, 4, 4)
    assert psnr(pixels + 0.2, pixels) == pytest.approx(20.0, abs=1e-4)  # 0.1 of the range [0, 1]


@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (16, 16), (3, 16, 24)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert 0.5 < values.min() and values.max() < 1.3
    assert torch.equal(orthogonalise(torch.zeros(shape)), torch.zeros(shape))
