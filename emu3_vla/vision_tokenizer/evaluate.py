"""Measure vision tokenizers on held-out episodes, one or several side by side.

    emu3-vla eval-tokenizer tokenizer=outputs/tokenizer/vision_tokenizer episodes=outputs/episodes output_dir=outputs/eval-tokenizer
    emu3-vla eval-tokenizer 'tokenizer=[a/vision_tokenizer,b/vision_tokenizer]' 'episodes=[outputs/a,outputs/b]' output_dir=...

Held out are the shards that train-tokenizer held out at the same validation_fraction. Every camera is read at the size that the tokenizer
was trained at and at `resolutions` besides. Leaves in output_dir: results.json, report.html (self-contained), pictures/.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image
from rich.console import Console

from emu3_vla.data.episodes import EpisodeStore, split_shards, write_text_atomic
from emu3_vla.data.tokens import content_hash
from emu3_vla.vision_tokenizer.base import VisionTokenizer
from emu3_vla.vision_tokenizer.frames import Frames, Source, load_frames
from emu3_vla.vision_tokenizer.lpips import Lpips
from emu3_vla.vision_tokenizer.measure import Reconstruction, all_rows, evenly, figures, picture_rows, reconstruct
from emu3_vla.vision_tokenizer.probe import ProbeConfig, ProbeData, keypoint_probe, lamps_in_sight, linear_probe, scene_states
from emu3_vla.vision_tokenizer.video_distance import ClipFeatures, LatentFeatures, TorchScriptFeatures, frechet_distance
from envs.spec import RGB_STATIC

PICTURES = 8
# SSIM and LPIPS of so many frames: their means move by less than their last printed digit beyond.
JUDGED_FRAMES = 256
TIMED_BATCH, TIMED_ROUNDS = 8, 7


@dataclass(frozen=True, kw_only=True)
class EvalTokenizerConfig:
    """Raises ValueError for values that cannot work."""

    tokenizer: str | tuple[str, ...]  # folder of a vision tokenizer, or a list of them
    episodes: str | tuple[str, ...]  # folder of an episode store, or a list of them
    output_dir: str = ""
    seed: int = 0
    validation_fraction: float = 0.05  # of the shards, as in train-tokenizer
    frames: int = 1024  # held-out frames of each camera
    resolutions: tuple[int, ...] = ()  # sides in pixels besides each camera's own; padded to multiples of the patch
    clip_length: int = 8  # frames of the clips that the Fréchet distance compares
    perceptual_weights: str = ""  # for LPIPS; see train-tokenizer's loss.perceptual_weights; empty: LPIPS is left out
    video_features: str = ""  # light tokenizer whose latents are the clips' features; empty: the shipped one
    i3d: str = ""  # TorchScript I3D in place of them. It is code that runs: give only a file that you trust
    foreground_distance: float = 0.25  # as in train-tokenizer's loss
    probe: bool = True  # where blocks and lights are, read out of the codes
    probes: ProbeConfig = field(default_factory=ProbeConfig)
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self):
        for name in ("frames", "clip_length", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}, expected between 0 and 1")
        if self.clip_length < 2:
            raise ValueError(f"clip_length is {self.clip_length}, expected at least 2: one frame does not move")
        if any(size < 1 for size in self.resolutions):
            raise ValueError(f"resolutions are {self.resolutions}, expected sides in pixels")
        if not _listed(self.tokenizer) or not _listed(self.episodes):
            raise ValueError("tokenizer and episodes must each name at least one folder")


@dataclass(frozen=True, kw_only=True)
class Judges:
    """What compares pictures besides squared errors; lpips is None where its weights are not given."""

    lpips: Lpips | None
    clip_features: ClipFeatures
    clip_features_name: str


def main(config: EvalTokenizerConfig) -> None:
    """Measure every tokenizer and write the report. Prints the folder."""
    torch.set_num_threads(config.threads)
    console, output = Console(), Path(config.output_dir)
    stores = [EpisodeStore.open(path) for path in _listed(config.episodes)]
    splits = [split_shards(store.shard_indices(), config.validation_fraction) for store in stores]
    judges = _judges(config)
    records, pictures = [], {}
    for number, folder in enumerate(_listed(config.tokenizer)):
        tokenizer = VisionTokenizer.from_pretrained(folder).to(config.device)
        record = _facts(tokenizer, folder)
        console.print(f"{folder}: {record['kind']}, {record['parameters'] / 1e6:.2f} M parameters", soft_wrap=True)
        record["cameras"] = {}
        for camera, own_size in tokenizer.image_sizes.items():
            sizes = (own_size, *(size for size in config.resolutions if size != own_size))
            for size in sizes:
                with console.status(f"{camera} at {size}×{size}"):
                    held_out = [(store, shards) for store, (_, shards) in zip(stores, splits, strict=True)]
                    frames = load_frames(held_out, camera, size, config.frames, config.clip_length)
                    figures_here, shown = _measure(tokenizer, frames, camera, config, judges, clips=size == own_size)
                record["cameras"].setdefault(camera, {})[str(size)] = figures_here
                pictures |= {f"{number}_{camera}_{size}_{name}": picture for name, picture in shown.items()}
                console.print(f"  {camera} {size}×{size}: {_line(figures_here)}", soft_wrap=True)
        if config.probe:
            with console.status("probes"):
                record["probe"] = _probe(tokenizer, stores, splits, config)
            for name, found in record["probe"].items():
                console.print(f"  {name} probe: {found}", soft_wrap=True)
        records.append(record)
    results = {"tokenizers": records, "config": json.loads(json.dumps(asdict(config))), "clip_features": judges.clip_features_name}
    results["lpips"] = "measured" if judges.lpips else "absent: perceptual_weights was not given"
    _write(results, pictures, output)
    print(output / "results.json")
    print(output / "report.html")


def _judges(config: EvalTokenizerConfig) -> Judges:
    features = TorchScriptFeatures(config.i3d) if config.i3d else LatentFeatures(config.video_features or None)
    name = (
        f"I3D in {config.i3d}"
        if config.i3d
        else f"latents of the light tokenizer in {features.folder}, {content_hash(features.folder)[:12]}"
    )
    lpips = Lpips.from_file(config.perceptual_weights) if config.perceptual_weights else None
    return Judges(lpips=lpips, clip_features=features, clip_features_name=name)


def _facts(tokenizer: VisionTokenizer, folder: str) -> dict[str, Any]:
    if not tokenizer.image_sizes:
        raise ValueError(
            f"{folder}/config.json states no image_sizes, so no camera can be read; add e.g. {{'rgb_static': 200, 'rgb_gripper': 80}}"
        )
    return {
        "folder": folder,
        "sha256": content_hash(Path(folder)),
        "kind": tokenizer.kind,
        "parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        "codebook_size": tokenizer.codebook_size,
        "patch": tokenizer.patch,
        "frames_per_code": tokenizer.frames_per_code,
    }


def _measure(
    tokenizer: VisionTokenizer, frames: Frames, camera: str, config: EvalTokenizerConfig, judges: Judges, *, clips: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Figures of one camera at one size, and pictures of originals over reconstructions."""
    medians = frames.medians()
    images = reconstruct(tokenizer, frames, all_rows(frames, clips=False))
    found = vars(figures(tokenizer, frames, medians, config.foreground_distance, images)) | _likeness(frames, images, judges)
    found |= {"codes": images.codes[0].numel()} | _times(tokenizer, frames)
    some = evenly(len(frames), PICTURES)
    shown = {"images": picture_rows(frames.pixels(some), images.decoded[some])}
    if clips:
        made = reconstruct(tokenizer, frames, all_rows(frames, clips=True))
        found["clips"] = vars(figures(tokenizer, frames, medians, config.foreground_distance, made)) | _likeness(frames, made, judges)
        found["clips"] |= {"clips": len(made.rows), "clip_length": config.clip_length, "codes": made.codes[0].numel()}
        real, decoded = (judges.clip_features(part, camera) for part in (frames.pixels(made.rows), made.decoded))
        found["clips"] |= {"frechet_distance": round(frechet_distance(real, decoded), 5), "features": real.shape[1]}
        middle = len(made.rows) // 2
        shown["clip"] = picture_rows(frames.pixels(made.rows[middle])[:PICTURES], made.decoded[middle][:PICTURES])
    return found, shown


def _likeness(frames: Frames, made: Reconstruction, judges: Judges) -> dict[str, float | None]:
    """Mean SSIM, and LPIPS where it can be had, over frames evenly chosen."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # seconds to import, and nothing else needs it

    chosen = evenly(made.rows.numel(), JUDGED_FRAMES)
    pixels, decoded = frames.pixels(made.rows.flatten()[chosen]), made.decoded.flatten(0, -4)[chosen].clamp(-1, 1)
    ssim = [
        structural_similarity_index_measure(one, other, data_range=2.0, reduction="none")
        for one, other in zip(decoded.split(TIMED_BATCH), pixels.split(TIMED_BATCH), strict=True)
    ]
    lpips = None
    if judges.lpips:
        with torch.inference_mode():
            distances = [judges.lpips.distances(*pair) for pair in zip(decoded.split(TIMED_BATCH), pixels.split(TIMED_BATCH), strict=True)]
        lpips = round(torch.cat(distances).mean().item(), 5)
    return {"ssim": round(torch.cat([value.reshape(-1) for value in ssim]).mean().item(), 5), "lpips": lpips}


def _times(tokenizer: VisionTokenizer, frames: Frames) -> dict[str, float]:
    """Milliseconds an image, the least of several rounds: of one image, as an acting policy encodes, and in a batch."""
    batch, _ = tokenizer.pad(frames.pixels(torch.arange(min(TIMED_BATCH, len(frames)))).to(tokenizer.device))
    codes = tokenizer.encode(batch)
    # One thread's processor time does not count what other programs take; with more threads or a GPU only the wall clock means anything.
    clock = time.process_time if tokenizer.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    timed = {
        "encode_one_ms": _least_ms(lambda: tokenizer.encode(batch[:1]), clock),
        "encode_ms": _least_ms(lambda: tokenizer.encode(batch), clock) / len(batch),
        "decode_ms": _least_ms(lambda: tokenizer.decode(codes), clock) / len(batch),
    }
    return {name: round(value, 3) for name, value in timed.items()}


def _least_ms(work: Callable[[], torch.Tensor], clock: Callable[[], float]) -> float:
    least = float("inf")
    for _ in range(TIMED_ROUNDS):
        started = clock()
        work().flatten()[0].item()  # waits for a device that works on its own
        least = min(least, clock() - started)
    return 1e3 * least


def _probe(
    tokenizer: VisionTokenizer, stores: Sequence[EpisodeStore], splits: Sequence[tuple[list[int], list[int]]], config: EvalTokenizerConfig
) -> dict[str, dict[str, Any]]:
    train = _probe_data(tokenizer, stores, [shards for shards, _ in splits], config.probes.frames)
    test = _probe_data(tokenizer, stores, [shards for _, shards in splits], config.frames)
    found = {"linear": asdict(linear_probe(tokenizer, train, test))}
    if config.probes.steps:
        found["keypoint"] = asdict(keypoint_probe(tokenizer, train, test, config.probes, config.seed))
    counts = {"training_frames": len(train), "test_frames": len(test), "in_sight": round(test.in_sight.float().mean().item(), 4)}
    counts |= {"lamps_in_sight": [round(share, 4) for share in test.lamps_in_sight.float().mean(0).tolist()]}
    return {name: figures_here | counts for name, figures_here in found.items()}


def _probe_data(tokenizer: VisionTokenizer, stores: Sequence[EpisodeStore], shards: Sequence[Sequence[int]], limit: int) -> ProbeData:
    sources: list[Source] = list(zip(stores, shards, strict=True))
    codes = {}
    for camera, size in tokenizer.image_sizes.items():
        frames = load_frames(sources, camera, size, limit)
        parts = torch.arange(len(frames)).split(TIMED_BATCH)
        codes[camera] = torch.cat([tokenizer.encode(frames.pixels(rows).to(tokenizer.device)).cpu() for rows in parts])
        if camera == RGB_STATIC:
            static = frames
    states = scene_states(stores, shards, static)
    lamps = torch.ones_like(states["lights"])
    for scene in static.store.unique():
        own = static.store == scene
        lamps[own] = lamps_in_sight(static.images[own], states["lights"][own])
    return ProbeData(codes=codes, lamps_in_sight=lamps, **states)


def _line(found: dict[str, Any]) -> str:
    clips = f"; clips {found['clips']['psnr_db']:.2f} dB, Fréchet {found['clips']['frechet_distance']:.4f}" if "clips" in found else ""
    return (
        f"PSNR {found['psnr_db']:.2f} dB (foreground {found['foreground_psnr_db']:.2f}), SSIM {found['ssim']:.4f}, "
        f"{found['codes_used']:.0%} of codes, perplexity {found['perplexity']:.0f}, encode {found['encode_one_ms']:.1f} ms{clips}"
    )


def _write(results: dict[str, Any], pictures: dict[str, np.ndarray], output: Path) -> None:
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    encoded = {}
    for name, picture in pictures.items():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "png")
        (output / "pictures" / f"{name}.png").write_bytes(buffer.getvalue())
        encoded[name] = base64.b64encode(buffer.getvalue()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(results=results, pictures=encoded)
    write_text_atomic(output / "report.html", page)
    write_text_atomic(output / "results.json", json.dumps(results, indent=1) + "\n")


def _listed(paths: str | Sequence[str]) -> tuple[str, ...]:
    return ((paths,) if paths else ()) if isinstance(paths, str) else tuple(paths)
