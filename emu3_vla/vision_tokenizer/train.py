"""Train the light vision tokenizer on an episode store.

    emu3-vla train-tokenizer episodes=outputs/collect/first output_dir=outputs/tokenizer
    emu3-vla train-tokenizer preset=debug episodes=... output_dir=...

Every step takes a batch of each camera through one network. The first `quantise_from` steps are a plain autoencoder; then k-means over
its latents places the codes, and from there on everything passes through the codebook. What a step draws depends on (seed, step) alone,
so a run that was killed and started again ends with the same tokenizer as one that was not.

Leaves in output_dir: vision_tokenizer/ (the result), metrics.jsonl, pictures/ (original over reconstruction), state.safetensors,
shards.json (the shards it began with).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from emu3_vla.data.episodes import EpisodeStore, split_shards, write_text_atomic
from emu3_vla.vision_tokenizer.codebook import perplexity
from emu3_vla.vision_tokenizer.frames import draw, load_frames
from emu3_vla.vision_tokenizer.light import LightConfig, LightTokenizer, ResidualBlock
from emu3_vla.vision_tokenizer.losses import LossConfig, median_image, reconstruction_loss
from emu3_vla.vision_tokenizer.measure import Measurement, measure, save_pictures
from emu3_vla.vision_tokenizer.muon import Muon
from emu3_vla.vision_tokenizer.state import load_state, save_state

PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """Raises ValueError for values that cannot work."""

    episodes: str  # folder of an episode store
    output_dir: str = ""
    seed: int = 0
    steps: int = 6000
    batch_size: int = 8  # images of each camera a step
    learning_rate: float = 6e-3  # Adam's highest; warmed up, then a cosine down to a fiftieth
    muon_learning_rate: float = 0.02  # the same for Muon, which has the residual blocks' kernels
    warmup_steps: int = 100
    gradient_clip: float = 1.0
    quantise_from: int = 200  # steps as a plain autoencoder before k-means places the codes
    kmeans_images: int = 128  # of each camera, for that k-means
    codebook_decay: float = 0.99
    revive_every: int = 50  # steps between revivals of dead codes
    revive_threshold: float = 0.03  # dead: chosen less than this share of the average
    revive_until: float = 0.8  # share of the run after which the codebook is left to settle
    precision: str = "bf16"  # bf16: convolutions under autocast; fp32
    threads: int = 2
    max_frames: int = 30_000  # of each camera, held in memory resized (75 KB a frame of both)
    validation_fraction: float = 0.05  # of the shards
    validation_frames: int = 256  # of each camera
    validate_every: int = 500
    checkpoint_every: int = 250
    model: LightConfig = field(default_factory=LightConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self):
        positive = ("steps", "batch_size", "kmeans_images", "revive_every", "threads", "max_frames", "validation_frames")
        for name in (*positive, "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}, expected between 0 and 1")
        if not 0 <= self.quantise_from < self.steps:
            raise ValueError(f"quantise_from={self.quantise_from} must be below steps={self.steps}, or nothing is quantised")


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite."""


def main(config: TrainTokenizerConfig) -> None:
    """Train, or go on where an earlier call with the same output_dir was cut off. Prints the tokenizer's folder."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    console = Console()
    output = Path(config.output_dir)
    train_frames, held_out = _load(config, console)
    medians = {camera: median_image(frames[:: max(1, len(frames) // 500)]) for camera, frames in train_frames.items()}

    tokenizer = LightTokenizer(config.model)
    optimizers = build_optimizers(tokenizer, config)
    step = load_state(output / "state.safetensors", tokenizer, optimizers)
    metrics = _open_metrics(output / "metrics.jsonl", step)
    console.print(f"{sum(p.numel() for p in tokenizer.parameters()) / 1e6:.2f} M parameters, from step {step} to {config.steps}")

    with _progress(console) as progress:
        bar = progress.add_task("train", total=config.steps, completed=step, status="")
        began, first = time.monotonic(), step
        while step < config.steps:
            tokenizer.train()
            if step == config.quantise_from:
                _place_codes(tokenizer, train_frames, config)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * schedule(step, config)
            figures = _step(tokenizer, optimizers, train_frames, medians, step, config)
            step += 1

            rate = 2 * config.batch_size * (step - first) / (time.monotonic() - began)
            status = f"loss {figures['loss']:.4f}  {rate:.0f} images/s"
            progress.update(bar, completed=step, status=status)
            if step % 20 == 0:
                metrics({"step": step, "images_per_s": round(rate, 1), "schedule": schedule(step - 1, config)} | figures)
            if step % config.validate_every == 0 or step == config.steps:
                measured = _validate(tokenizer, held_out, medians, step, config, output)
                metrics({"step": step, "validation": {camera: vars(value) for camera, value in measured.items()}})
                console.print(f"step {step}: " + "; ".join(f"{camera} {value}" for camera, value in measured.items()), soft_wrap=True)
            if step % config.checkpoint_every == 0 or step == config.steps:
                save_state(output / "state.safetensors", tokenizer, optimizers, step)

    tokenizer.eval().save_pretrained(output / "vision_tokenizer")
    print(output / "vision_tokenizer")


def schedule(step: int, config: TrainTokenizerConfig) -> float:
    """Factor of both learning rates: linear warm-up, then a cosine down to a fiftieth at the end."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return warm * (0.02 + 0.98 * cosine)


def build_optimizers(tokenizer: LightTokenizer, config: TrainTokenizerConfig) -> list[torch.optim.Optimizer]:
    """Muon for the residual blocks' kernels, Adam for what is left: first and last layers, changes of resolution, biases."""
    kernels = [layer.weight for block in tokenizer.modules() if isinstance(block, ResidualBlock) for layer in block.children()]
    inside = {id(kernel) for kernel in kernels}
    rest = [parameter for parameter in tokenizer.parameters() if id(parameter) not in inside]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(rest, lr=config.learning_rate, betas=(0.9, 0.99))]
    if kernels:
        optimizers.append(Muon(kernels, lr=config.muon_learning_rate))
    return optimizers


def _step(
    tokenizer: LightTokenizer,
    optimizers: list[torch.optim.Optimizer],
    frames: dict[str, torch.Tensor],
    medians: dict[str, torch.Tensor],
    step: int,
    config: TrainTokenizerConfig,
) -> dict[str, float]:
    """One optimiser step and one codebook update. Returns the figures to log. Raises TrainingDiverged."""
    random = np.random.default_rng((config.seed, step))
    batches = {camera: draw(images, config.batch_size, random) for camera, images in frames.items()}
    codebook = tokenizer.codebook
    quantising = step >= config.quantise_from
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        latents = {camera: tokenizer.latents(pixels) for camera, pixels in batches.items()}
        all_latents = torch.cat(list(latents.values()))
        if quantising:
            units, indices, commitment = codebook.quantise(all_latents)
        else:
            units, commitment = nn.functional.normalize(all_latents, dim=1), torch.zeros(())
        parts = units.split([len(part) for part in latents.values()])
        decoded = {camera: tokenizer.pixels(part, _grid(batches[camera])) for camera, part in zip(batches, parts, strict=True)}
    losses = {camera: reconstruction_loss(decoded[camera], batches[camera], medians[camera], config.loss) for camera in batches}
    loss = sum(losses.values()) / len(losses) + config.loss.commitment * commitment
    if not torch.isfinite(loss):
        raise TrainingDiverged(f"loss is {loss.item()} at step {step}; lower learning_rate={config.learning_rate} and start afresh")
    tokenizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(tokenizer.parameters(), config.gradient_clip)
    for optimizer in optimizers:
        optimizer.step()

    figures = {"loss": loss.item(), "commitment": commitment.item(), "gradient_norm": norm.item()}
    figures |= {f"loss_{camera}": value.item() for camera, value in losses.items()}
    if quantising:
        codebook.update(all_latents, indices, config.codebook_decay)
        figures["perplexity"] = perplexity(codebook.counts)
        if step % config.revive_every == 0 and step < config.revive_until * config.steps:
            figures["revived"] = codebook.revive(all_latents, random, config.revive_threshold)
    return {name: round(value, 5) for name, value in figures.items()}


def _grid(pixels: torch.Tensor) -> tuple[int, int, int]:
    return len(pixels), pixels.shape[2] // LightTokenizer.patch, pixels.shape[3] // LightTokenizer.patch


@torch.no_grad()
def _place_codes(tokenizer: LightTokenizer, frames: dict[str, torch.Tensor], config: TrainTokenizerConfig) -> None:
    """k-means over latents of `kmeans_images` frames of each camera."""
    random = np.random.default_rng((config.seed, config.quantise_from, 1))
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        latents = [
            tokenizer.latents(part)
            for images in frames.values()
            for part in draw(images, config.kmeans_images, random).split(config.batch_size)
        ]
    tokenizer.codebook.start_from(torch.cat(latents), random)


def _load(config: TrainTokenizerConfig, console: Console) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Frames to train on and frames held out, per camera: uint8 (N, 3, size, size)."""
    store = EpisodeStore.open(config.episodes)
    train, held_out = split_shards(_pinned_shards(store, Path(config.output_dir), console), config.validation_fraction)
    sizes = config.model.image_sizes
    with console.status(f"reading frames of {len(train) + len(held_out)} shards"):
        frames = {camera: load_frames(store, train, camera, size, config.max_frames) for camera, size in sizes.items()}
        kept = {camera: load_frames(store, held_out, camera, size, config.validation_frames) for camera, size in sizes.items()}
    counts = ", ".join(f"{camera} {len(frames[camera])} + {len(kept[camera])}" for camera in sizes)
    console.print(f"frames, to train on + held out: {counts}")
    return frames, kept


def _pinned_shards(store: EpisodeStore, output: Path, console: Console) -> list[int]:
    """The shards that this run began with, so that a resumed run draws the same frames although the store has grown meanwhile."""
    record = output / "shards.json"
    there = store.shard_indices()
    if not record.exists():
        write_text_atomic(record, json.dumps(there))
    pinned = json.loads(record.read_text())
    if lost := sorted(set(pinned) - set(there)):
        raise ValueError(f"{store.path} lacks shards {lost} that this run began with ({record}); restore them or start afresh")
    if len(there) > len(pinned):
        console.print(f"{store.path} has grown to {len(there)} shards; this run goes on with the {len(pinned)} it began with")
    return pinned


def _validate(
    tokenizer: LightTokenizer,
    held_out: dict[str, torch.Tensor],
    medians: dict[str, torch.Tensor],
    step: int,
    config: TrainTokenizerConfig,
    output: Path,
) -> dict[str, Measurement]:
    tokenizer.eval()
    measured = {}
    for camera, images in held_out.items():
        measured[camera] = measure(tokenizer, images, medians[camera], config.loss.foreground_distance)
        save_pictures(tokenizer, images, output / "pictures" / f"{camera}_{step:06d}.png")
    return measured


def _progress(console: Console) -> Progress:
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _open_metrics(path: Path, step: int) -> Callable[[dict], None]:
    """Append lines of JSON to `path`, after dropping those of steps that are about to be taken again."""
    lines = path.read_text().splitlines() if path.exists() else []
    whole = [line for line in lines if line.endswith("}")]
    write_text_atomic(path, "".join(line + "\n" for line in whole if json.loads(line)["step"] <= step))

    def write(record: dict) -> None:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    return write
