"""`eval-tokenizer`: figures against hand-worked values, probes on codes that say where things are, the report, named errors."""

import json

import numpy as np
import pytest
import torch

from emu3_vla.cli import compose
from emu3_vla.data.episodes import EpisodeStore
from emu3_vla.vision_tokenizer.evaluate import EvalTokenizerConfig, main
from emu3_vla.vision_tokenizer.light import LightConfig, LightTokenizer
from emu3_vla.vision_tokenizer.lpips import Lpips
from emu3_vla.vision_tokenizer.probe import (
    ProbeConfig,
    ProbeData,
    blocks_in_sight,
    keypoint_probe,
    lamps_in_sight,
    linear_probe,
    localisation,
)
from emu3_vla.vision_tokenizer.video_distance import LatentFeatures, TorchScriptFeatures, frechet_distance
from envs.spec import Episode

SIZES = {"rgb_static": 64, "rgb_gripper": 48}
COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220), "pink": (220, 20, 220)}


def episode(random: np.random.Generator, frames: int, order: tuple[str, ...]) -> Episode:
    """Three blocks on a brown table, drifting; scene_obs says where they are (metres: a hundredth of a pixel)."""
    static = np.full((frames, 200, 200, 3), (120, 90, 60), np.uint8)
    states = np.zeros((frames, 24))
    for number, colour in enumerate(order):
        row, column = random.integers(10, 150, 2)
        for frame in range(frames):
            static[frame, row : row + 30, column + frame : column + frame + 30] = COLOURS[colour]
            states[frame, 6 + 6 * number : 9 + 6 * number] = (column + frame) / 100, row / 100, 0.46
    states[:, 4] = random.integers(2)
    return Episode(
        task="push",
        instruction="push",
        actions=np.zeros((frames, 7), np.float32),
        robot_obs=np.zeros((frames, 15)),
        scene_obs=states,
        imitate=np.ones(frames, bool),
        frame_step=np.arange(frames),
        rgb_static=static,
        rgb_gripper=static[:, 50:134, 50:134].copy(),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two stores of two shards of two episodes each, in scenes that list their blocks in another order; two untrained tokenizers."""
    folder, random = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    for scene, order in (("D", ("red", "blue", "pink")), ("C", ("blue", "red", "pink"))):
        store = EpisodeStore.create(folder / scene, {"scene": scene})
        for shard in range(2):
            store.write_shard(shard, [episode(random, 6, order) for _ in range(2)])
    shape = dict(codebook_size=32, channels=(8, 8), encoder_blocks=(0, 0), decoder_blocks=(0, 0), image_sizes=SIZES)
    torch.manual_seed(0)
    LightTokenizer(LightConfig(**shape)).save_pretrained(folder / "image")
    LightTokenizer(LightConfig(**shape, frames_per_code=4, temporal_channels=8)).save_pretrained(folder / "video")
    return folder


def config_for(folder, output, **options) -> EvalTokenizerConfig:
    values = dict(tokenizer=str(folder / "image"), episodes=str(folder / "D"), output_dir=str(output), validation_fraction=0.4)
    values |= dict(frames=12, clip_length=4, probes=ProbeConfig(frames=12, steps=5, channels=4, restarts=2))
    return EvalTokenizerConfig(**values | options)


def test_two_tokenizers_side_by_side_on_two_stores(folder, tmp_path):
    tokenizers = (str(folder / "image"), str(folder / "video"))
    main(config_for(folder, tmp_path, tokenizer=tokenizers, episodes=(str(folder / "D"), str(folder / "C")), resolutions=(40, 64)))
    results = json.loads((tmp_path / "results.json").read_text())
    image, video = results["tokenizers"]
    assert (image["frames_per_code"], video["frames_per_code"]) == (1, 4) and image["sha256"] != video["sha256"]
    assert set(image["cameras"]["rgb_static"]) == {"64", "40"} and set(image["cameras"]["rgb_gripper"]) == {"48", "40", "64"}
    found = image["cameras"]["rgb_static"]["64"]
    assert found["codes"] == 64 and found["lpips"] is None and results["lpips"].startswith("absent")
    assert 0 < found["ssim"] < 1 and found["encode_ms"] > 0 and found["codes_used"] <= 1 and found["frames"] > 8
    assert image["cameras"]["rgb_static"]["40"]["codes"] == 25
    clips = [tokenizer["cameras"]["rgb_static"]["64"]["clips"] for tokenizer in (image, video)]
    assert [found["codes"] for found in clips] == [4 * 64, 64]  # four frames share their codes
    assert all(found["frechet_distance"] > 0 and found["clip_length"] == 4 for found in clips)
    assert set(image["probe"]) == {"linear", "keypoint"} and image["probe"]["linear"]["in_sight"] > 0.9
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list((tmp_path / "pictures").glob("*.png"))) == 14
    assert "http://" not in page and "https://" not in page


def test_lpips_is_measured_where_its_weights_are(folder, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(Lpips().state_dict(), tmp_path / "lpips.safetensors")
    (tmp_path / "out").mkdir()
    main(config_for(folder, tmp_path / "out", perceptual_weights=str(tmp_path / "lpips.safetensors"), probe=False, frames=8))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["lpips"] == "measured" and results["tokenizers"][0]["cameras"]["rgb_static"]["64"]["lpips"] > 0
    assert "probe" not in results["tokenizers"][0]


def test_blocks_in_sight_are_counted_by_colour(folder):
    images = np.concatenate([part.rgb_static for part in EpisodeStore.open(folder / "D").read_shard(0)])
    assert blocks_in_sight(images).mean() > 0.9
    images[0][images[0, ..., 0] > 200] = (120, 90, 60)  # no red, no pink
    assert blocks_in_sight(images)[0].tolist() == [False, True, False]


def test_lamps_behind_the_arm_are_out_of_sight():
    """A lamp of four pixels that is red or grey, behind a white arm in some frames; the other never changes."""
    lights = torch.tensor([[True, True], [False, True]]).repeat(10, 1)
    images = torch.full((20, 3, 8, 8), 90, dtype=torch.uint8)
    images[:, :, 2:4, 2:4] = torch.where(lights[:, 0, None], torch.tensor([220, 30, 30]), torch.tensor([120, 120, 120])).to(torch.uint8)[
        :, :, None, None
    ]
    images[4, :, 2:4, 2:4] = images[7, :, 2:4, 2] = images[7, :, 2:4, 3] = 250
    images[9, :, 2, 2] = 250  # three of four pixels show
    seen = lamps_in_sight(images, lights)
    assert (~seen[:, 0]).nonzero().flatten().tolist() == [4, 7] and seen[:, 1].all()


def places(count: int, seed: int) -> ProbeData:
    """Codes 1, 2, 3 at a cell of a 12×12 grid each, which is where that block is, among random others; elsewhere a code for each light."""
    random = np.random.default_rng(seed)
    cells = random.permuted(np.tile(np.arange(144), (count, 1)), axis=1)[:, :3]
    codes = random.integers(4, 8, (count, 144))
    for block in range(3):
        codes[np.arange(count), cells[:, block]] = 1 + block
    lights = random.integers(0, 2, (count, 2)).astype(bool)
    other = np.stack([4 * lights[:, 1], 5 * lights[:, 0]], 1)[:, None].astype(np.int64)
    positions = np.stack([cells % 12 * 50.0, cells // 12 * 50.0, np.full_like(cells, 460.0)], 2)
    grids = {"rgb_static": torch.from_numpy(codes).view(count, 12, 12), "rgb_gripper": torch.from_numpy(other)}
    return ProbeData(
        codes=grids,
        positions_mm=torch.from_numpy(positions).float(),
        lights=torch.from_numpy(lights),
        in_sight=torch.ones(count, 3, dtype=torch.bool),
        lamps_in_sight=torch.ones(count, 2, dtype=torch.bool),
    )


def test_the_keypoint_probe_finds_what_the_linear_one_cannot():
    tokenizer = LightTokenizer(LightConfig(codebook_size=8, channels=(8, 8), encoder_blocks=(0, 0), decoder_blocks=(0, 0))).eval()
    train, test = places(600, 0), places(200, 1)
    linear = linear_probe(tokenizer, train, test)
    assert linear.light_accuracy == {"bulb": 1.0, "led": 1.0}
    keypoint = keypoint_probe(tokenizer, train, test, ProbeConfig(steps=900, channels=16, dropout=0.0), seed=0)
    assert max(keypoint.in_sight_median_mm_of.values()) < 25 and linear.median_mm > 200  # a cell is 50 mm wide
    torch.manual_seed(1)
    blind = {camera: torch.zeros_like(codes) for camera, codes in train.codes.items()}
    nothing = linear_probe(
        tokenizer, ProbeData(**vars(train) | {"codes": blind}), ProbeData(**vars(test) | {"codes": {k: v[:200] for k, v in blind.items()}})
    )
    assert nothing.median_mm > 150 and max(nothing.light_accuracy.values()) < 0.7


def test_localisation_of_known_errors():
    truth = ProbeData(
        codes={},
        positions_mm=torch.zeros(2, 3, 3),
        lights=torch.tensor([[True, False], [True, True]]),
        in_sight=torch.tensor([[True, True, True], [False, False, False]]),
        lamps_in_sight=torch.tensor([[True, False], [True, True]]),
    )
    guesses = torch.zeros(2, 3, 3)
    guesses[0, :, 0], guesses[1, :, 1] = torch.tensor([3.0, 4.0, 5.0]), 100.0
    found = localisation(guesses, torch.tensor([[True, True], [True, True]]), truth)
    assert found.in_sight_median_mm == 4 and found.median_mm == 52.5
    assert found.light_accuracy == {"bulb": 1.0, "led": 0.5} and found.in_sight_light_accuracy == {"bulb": 1.0, "led": 1.0}


def test_frechet_distance_of_known_distributions():
    random = torch.Generator().manual_seed(0)
    first = torch.randn(4000, 2, generator=random, dtype=torch.float64)
    first = (first - first.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(first.T))).T  # exactly standard normal
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(first, first + torch.tensor([3.0, 4.0])) == pytest.approx(25)
    assert frechet_distance(first, 3 * first) == pytest.approx(2 * (3 - 1) ** 2)
    with pytest.raises(ValueError, match="1 and 4000 clips have no covariance"):
        frechet_distance(first[:1], first)


def test_latent_features_notice_blur_and_stillness(folder):
    features = LatentFeatures()  # the shipped tokenizer
    episodes = [part for shard in (0, 1) for name in ("D", "C") for part in EpisodeStore.open(folder / name).read_shard(shard)]
    clips = torch.stack([torch.from_numpy(part.rgb_static).permute(0, 3, 1, 2) for part in episodes]).float() / 127.5 - 1
    real = features(clips, "rgb_static")
    assert real.shape == (8, 2 * 4 * 8 + 8)
    still = features(clips[:, :1].expand(-1, 6, -1, -1, -1), "rgb_static")
    assert still[:, 32:64].abs().max() < 1e-5 < real[:, 32:64].abs().max()
    blurred = features(torch.nn.functional.avg_pool2d(clips.flatten(0, 1), 9, 1, 4).unflatten(0, (8, 6)), "rgb_static")
    slightly = features((clips + 0.01).clamp(-1, 1), "rgb_static")
    assert frechet_distance(real, slightly) < frechet_distance(real, still) and frechet_distance(real, slightly) < frechet_distance(
        real, blurred
    )


class _Toy(torch.nn.Module):
    def forward(self, clips, rescale: bool, resize: bool, return_features: bool):
        assert clips.shape[1] == 3 and clips.shape[3] == 224
        return clips.mean((3, 4)).flatten(1)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_given_torchscript_network_takes_its_place(tmp_path):
    torch.jit.script(_Toy()).save(str(tmp_path / "toy.pt"))
    features = TorchScriptFeatures(tmp_path / "toy.pt")
    clips = torch.rand(2, 10, 3, 32, 32) * 2 - 1
    assert features(clips, "rgb_static").shape == (2, 30)
    with pytest.raises(ValueError, match="clips of 4 frames, expected at least 10 for I3D; set clip_length=16"):
        features(clips[:, :4], "rgb_static")
    with pytest.raises(FileNotFoundError, match="i3d=.*absent.pt does not exist"):
        TorchScriptFeatures(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match="cannot be loaded as TorchScript"):
        TorchScriptFeatures(tmp_path / "text.pt")


def test_errors_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="clip_length is 1, expected at least 2"):
        config_for(folder, tmp_path, clip_length=1)
    with pytest.raises(ValueError, match="must each name at least one folder"):
        config_for(folder, tmp_path, tokenizer=())
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        main(config_for(folder, tmp_path, tokenizer=str(folder)))
    with pytest.raises(ValueError, match="video cannot be the clips' features: expected a light tokenizer that codes every frame alone"):
        main(config_for(folder, tmp_path, video_features=str(folder / "video")))
    nameless = EpisodeStore.create(tmp_path / "nameless", {})
    for shard in range(2):
        nameless.write_shard(shard, [episode(np.random.default_rng(shard), 6, ("red", "blue", "pink"))])
    with pytest.raises(ValueError, match="says scene=None; the probe knows the blocks of scenes A, B, C, D: set probe=false"):
        main(config_for(folder, tmp_path, episodes=str(nameless.path), clip_length=2))


def test_the_command_takes_one_folder_or_a_list():
    one = compose("eval-tokenizer", ["preset=debug", "tokenizer=a", "episodes=[b,c]"])
    assert one.tokenizer == "a" and one.episodes == ("b", "c") and one.probes.steps == 20
    for preset in ("debug", "debug_emu3", "movqgan", "video", "image16"):
        assert compose("train-tokenizer", [f"preset={preset}", "episodes=[b,c]"]).stores == ("b", "c")
