"""Train a vision tokenizer on episode stores.

    emu3-vla train-tokenizer episodes=outputs/collect/first output_dir=outputs/tokenizer
    emu3-vla train-tokenizer preset=debug episodes=... output_dir=...
    emu3-vla train-tokenizer start_from=policies/checkpoints/calvin-d/vision_tokenizer only_decoder=true episodes=... output_dir=...
    emu3-vla train-tokenizer kind=emu3 start_from=Emu3-VisionTokenizer 'episodes=[outputs/a,outputs/b]' output_dir=...

Every step takes images, and clips where asked, of each camera through one network. The first `quantise_from` steps are a plain
autoencoder; then k-means over its latents places the codes, and from there on everything passes through the codebook. What a step draws
depends on (seed, step) alone, so a run that was killed and started again ends with the same tokenizer as one that was not.

Leaves in output_dir: vision_tokenizer/ (the result), metrics.jsonl, pictures/ (original over reconstruction), state.safetensors,
shards.json (the shards it began with).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from emu3_vla.data.episodes import EpisodeStore, split_shards, write_text_atomic
from emu3_vla.muon import Muon
from emu3_vla.vision_tokenizer.base import KINDS, VisionTokenizer
from emu3_vla.vision_tokenizer.codebook import Quantised, TrainingCodebook, perplexity
from emu3_vla.vision_tokenizer.discriminator import Discriminator, DiscriminatorConfig, adaptive_weight, hinge_loss
from emu3_vla.vision_tokenizer.emu3 import Emu3Config, Emu3Tokenizer
from emu3_vla.vision_tokenizer.frames import Frames, Source, load_frames
from emu3_vla.vision_tokenizer.light import LightConfig, LightTokenizer
from emu3_vla.vision_tokenizer.losses import LossConfig, reconstruction_loss
from emu3_vla.vision_tokenizer.measure import Measurement, measure, save_pictures
from emu3_vla.vision_tokenizer.perceptual import Perceptual, build_perceptual
from emu3_vla.vision_tokenizer.state import TrainingState
from envs.spec import RGB_GRIPPER, RGB_STATIC

PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """Raises ValueError for values that cannot work."""

    episodes: str | tuple[str, ...]  # folder of an episode store, or a list of them
    output_dir: str = ""
    kind: str = "light"  # light | emu3
    start_from: str = ""  # folder of a tokenizer of that kind: its weights and shape; empty: random, of the shape in `model` or `emu3`
    only_decoder: bool = False  # with start_from: every picture keeps its codes, so a policy that was trained on them goes on working
    seed: int = 0
    steps: int = 6000
    batch_size: int = 8  # frames of each camera a step
    # of each camera's reconstruction beside the others'; a camera that is not named: 1
    camera_weight: dict[str, float] = field(default_factory=lambda: {RGB_STATIC: 1.0, RGB_GRIPPER: 1.0})
    clip_share: float = 0.0  # of these frames, how many come as clips of consecutive stored frames
    clip_length: int = 4  # frames of a clip
    learning_rate: float = 6e-3  # Adam's highest; warmed up, then a cosine down to a fiftieth
    muon_learning_rate: float = 0.02  # the same for Muon, which has the residual blocks' kernels; 0: Adam has them too
    adam_betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 100
    gradient_clip: float = 1.0
    quantise_from: int = 200  # steps as a plain autoencoder before k-means places the codes; not with start_from
    kmeans_images: int = 128  # of each camera, for that k-means
    codebook_decay: float = 0.99
    revive_every: int = 50  # steps between revivals of dead codes
    revive_threshold: float = 0.03  # dead: chosen less than this share of the average
    revive_until: float = 0.8  # share of the run after which the codebook is left to settle
    precision: str = "bf16"  # bf16: convolutions under autocast; fp32
    device: str = "cpu"  # cpu, cuda, cuda:1, ...
    threads: int = 2
    max_frames: int = 30_000  # of each camera, held in memory resized (75 KB a frame of both)
    validation_fraction: float = 0.05  # of the shards
    validation_frames: int = 256  # of each camera
    validate_every: int = 500
    checkpoint_every: int = 250
    model: LightConfig = field(default_factory=LightConfig)  # of kind light
    emu3: Emu3Config = field(default_factory=Emu3Config)  # of kind emu3
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self):
        positive = ("steps", "batch_size", "kmeans_images", "revive_every", "threads", "max_frames", "validation_frames")
        for name in (*positive, "validate_every", "checkpoint_every", "clip_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name, known in (("precision", PRECISIONS), ("kind", KINDS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if wrong := {camera: weight for camera, weight in self.camera_weight.items() if not weight > 0}:
            raise ValueError(f"camera_weight is {wrong}, expected positive numbers")
        if not self.stores:
            raise ValueError("episodes names no episode store")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}, expected between 0 and 1")
        if self.only_decoder and not self.start_from:
            raise ValueError("only_decoder=true keeps the codes of a tokenizer that is there: name its folder in start_from")
        if not 0 <= self.quantise_from < self.steps:
            raise ValueError(f"quantise_from={self.quantise_from} must be below steps={self.steps}, or nothing is quantised")
        if not 0 <= self.clip_share <= 1 or self.clips * self.clip_length > self.batch_size:
            raise ValueError(
                f"clip_share={self.clip_share} of batch_size={self.batch_size} makes {self.clips} clips of {self.clip_length} frames: "
                "expected a share between 0 and 1 and room for one clip"
            )

    @property
    def stores(self) -> tuple[str, ...]:
        return (self.episodes,) if isinstance(self.episodes, str) else tuple(self.episodes)

    @property
    def clips(self) -> int:
        """Clips of each camera a step."""
        return max(1, round(self.batch_size * self.clip_share / self.clip_length)) if self.clip_share else 0

    def camera_share(self, camera: str, cameras: Iterable[str]) -> float:
        """Of the reconstruction loss; those of all `cameras` add up to 1."""
        return self.camera_weight.get(camera, 1.0) / sum(self.camera_weight.get(other, 1.0) for other in cameras)

    @property
    def images(self) -> int:
        """Still images of each camera a step."""
        return self.batch_size - self.clips * self.clip_length


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one camera shows in a step: images (B, 3, H, W) or clips (B, T, 3, H, W), and the median image of each frame's scene.

    share: of the reconstruction loss.
    """

    camera: str
    pixels: torch.Tensor
    median: torch.Tensor
    share: float


@dataclass(frozen=True, kw_only=True)
class Learner:
    """All that learns, and what judges it. adversary is None where the adversarial loss is off."""

    tokenizer: VisionTokenizer
    codebook: TrainingCodebook
    optimizers: list[torch.optim.Optimizer]
    perceptual: Perceptual
    adversary: Discriminator | None
    adversary_optimizer: torch.optim.Optimizer | None
    quantise_from: int
    only_decoder: bool

    def state(self) -> TrainingState:
        modules = {"model": self.tokenizer} | ({"discriminator": self.adversary} if self.adversary else {})
        optimizers = self.optimizers + ([self.adversary_optimizer] if self.adversary_optimizer else [])
        return TrainingState(modules=modules, averages=self.codebook.averages(), optimizers=optimizers)


def main(config: TrainTokenizerConfig) -> None:
    """Train, or go on where an earlier call with the same output_dir was cut off. Prints the tokenizer's folder."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    console = Console()
    output = Path(config.output_dir)
    learner = build_learner(config)
    tokenizer = learner.tokenizer
    train_frames, held_out = _load(config, tokenizer, console)
    medians = {camera: frames.medians() for camera, frames in train_frames.items()}

    state = learner.state()
    step = state.load(output / "state.safetensors")
    metrics = _open_metrics(output / "metrics.jsonl", step)
    console.print(f"{sum(p.numel() for p in tokenizer.parameters()) / 1e6:.2f} M parameters, from step {step} to {config.steps}")

    with _progress(console) as progress:
        bar = progress.add_task("train", total=config.steps, completed=step, status="")
        began, first = time.monotonic(), step
        while step < config.steps:
            tokenizer.train()
            if step == learner.quantise_from and not config.start_from:
                _place_codes(learner, train_frames, config)
            for optimizer in state.optimizers:
                optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * schedule(step, config)
            figures = _step(learner, train_frames, medians, step, config)
            step += 1

            rate = len(train_frames) * config.batch_size * (step - first) / (time.monotonic() - began)
            status = f"loss {figures['loss']:.4f}  {rate:.0f} images/s"
            progress.update(bar, completed=step, status=status)
            if step % 20 == 0 or "revived" in figures:
                metrics({"step": step, "images_per_s": round(rate, 1), "schedule": schedule(step - 1, config)} | figures)
            if step % config.validate_every == 0 or step == config.steps:
                measured = _validate(tokenizer, held_out, medians, step, config, output)
                metrics({"step": step, "validation": {camera: vars(value) for camera, value in measured.items()}})
                console.print(f"step {step}: " + "; ".join(f"{camera} {value}" for camera, value in measured.items()), soft_wrap=True)
            if step % config.checkpoint_every == 0 or step == config.steps:
                state.save(output / "state.safetensors", step)

    tokenizer.eval().save_pretrained(output / "vision_tokenizer")
    print(output / "vision_tokenizer")


def schedule(step: int, config: TrainTokenizerConfig) -> float:
    """Factor of all learning rates: linear warm-up, then a cosine down to a fiftieth at the end."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return warm * (0.02 + 0.98 * cosine)


def build_learner(config: TrainTokenizerConfig) -> Learner:
    """Raises FileNotFoundError and ValueError for start_from or perceptual weights that cannot be used."""
    tokenizer = build_tokenizer(config).to(config.device)
    if config.only_decoder:
        tokenizer.requires_grad_(False)
        for parameter in tokenizer.decoder_parameters():
            parameter.requires_grad_(True)
    perceptual = build_perceptual(config.loss.perceptual_weights)
    adversary = optimizer = None
    if config.loss.adversarial:
        adversary = Discriminator(config.discriminator).to(config.device)
        optimizer = torch.optim.Adam(adversary.parameters(), lr=config.discriminator.learning_rate, betas=(0.5, 0.9))
    return Learner(
        tokenizer=tokenizer,
        codebook=tokenizer.training_codebook(),
        optimizers=build_optimizers(tokenizer, config),
        perceptual=perceptual.to(config.device) if isinstance(perceptual, nn.Module) else perceptual,
        adversary=adversary,
        adversary_optimizer=optimizer,
        quantise_from=0 if config.start_from else config.quantise_from,
        only_decoder=config.only_decoder,
    )


def build_tokenizer(config: TrainTokenizerConfig) -> VisionTokenizer:
    """A random one of the configured shape, or the one in `start_from`. Raises ValueError for one of another kind, or shape of clips."""
    if config.start_from:
        tokenizer = VisionTokenizer.from_pretrained(config.start_from)
        if tokenizer.kind != config.kind:
            raise ValueError(f"start_from={config.start_from} is of kind {tokenizer.kind}, expected kind={config.kind}")
        # A published tokenizer says nothing of our cameras.
        tokenizer.image_sizes = tokenizer.image_sizes or dict(config.emu3.image_sizes)
    else:
        tokenizer = LightTokenizer(config.model) if config.kind == "light" else Emu3Tokenizer.from_sizes(config.emu3)
    if config.clip_share and config.clip_length % tokenizer.frames_per_code:
        raise ValueError(f"clip_length is {config.clip_length}, expected a multiple of {tokenizer.frames_per_code}, the frames per code")
    if not config.clip_share and not config.start_from and tokenizer.frames_per_code > 1:
        raise ValueError(f"a tokenizer of {tokenizer.frames_per_code} frames per code needs clips to learn from; set clip_share=0.5")
    return tokenizer


def build_optimizers(tokenizer: VisionTokenizer, config: TrainTokenizerConfig) -> list[torch.optim.Optimizer]:
    """Muon for the residual blocks' kernels, Adam for what is left: first and last layers, changes of resolution, biases."""
    kernels = [kernel for kernel in tokenizer.residual_kernels() if kernel.requires_grad] if config.muon_learning_rate else []
    inside = {id(kernel) for kernel in kernels}
    rest = [parameter for parameter in tokenizer.parameters() if parameter.requires_grad and id(parameter) not in inside]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(rest, lr=config.learning_rate, betas=config.adam_betas)]
    if kernels:
        optimizers.append(Muon(kernels, lr=config.muon_learning_rate))
    return optimizers


def _step(
    learner: Learner, frames: dict[str, Frames], medians: dict[str, torch.Tensor], step: int, config: TrainTokenizerConfig
) -> dict[str, float]:
    """One step of every optimiser and one codebook update. Returns the figures to log. Raises TrainingDiverged."""
    random = np.random.default_rng((config.seed, step))
    parts = _draw(frames, medians, config.images, config.clips, random, config)
    tokenizer, codebook, quantising = learner.tokenizer, learner.codebook, step >= learner.quantise_from
    with _autocast(config):
        latents = [tokenizer.latents(part.pixels) for part in parts]
        rows_ND = torch.cat([part.flatten(0, -2) for part in latents])
        quantised = codebook.quantise(rows_ND) if quantising else _unquantised(codebook, rows_ND)
        vectors = quantised.vectors.split([part[..., 0].numel() for part in latents])
        decoded = [tokenizer.pixels(part.view(shape.shape)).float() for part, shape in zip(vectors, latents, strict=True)]
    pairs = [(shown.flatten(0, -4), part.pixels.flatten(0, -4)) for shown, part in zip(decoded, parts, strict=True)]

    losses = _reconstruction(learner, pairs, parts, config)
    reconstruction = sum(losses.values())
    loss = reconstruction + config.loss.commitment * quantised.commitment + config.loss.codebook * quantised.codebook
    alone = {f"loss_{camera}": config.camera_share(camera, frames) for camera in frames}
    figures = {name: value / alone.get(name, 1) for name, value in losses.items()}
    figures |= {"commitment": quantised.commitment, "codebook": quantised.codebook}
    judged = learner.adversary is not None and step >= config.discriminator.begin
    if judged:
        learner.adversary.requires_grad_(False)
        with _autocast(config):
            fooled = sum(-part.share * learner.adversary(shown).float().mean() for (shown, _), part in zip(pairs, parts, strict=True))
        factor = adaptive_weight(reconstruction, fooled, tokenizer.last_layer())
        loss = loss + config.loss.adversarial * factor * fooled
        figures |= {"adversarial": fooled, "adversarial_factor": factor}
    if not torch.isfinite(loss):
        raise TrainingDiverged(f"loss is {loss.item()} at step {step}; lower learning_rate={config.learning_rate} and start afresh")
    tokenizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(tokenizer.parameters(), config.gradient_clip)
    for optimizer in learner.optimizers:
        optimizer.step()
    if judged:
        figures["discriminator"] = _train_adversary(learner, pairs, parts, config)

    figures = {"loss": loss, "gradient_norm": norm} | figures
    figures = {name: round(value.item(), 5) for name, value in figures.items()}
    if quantising and not learner.only_decoder:
        codebook.update(rows_ND, quantised.indices, config.codebook_decay)
        used = codebook.counts >= config.revive_threshold * codebook.counts.mean()
        figures |= {"perplexity": round(perplexity(codebook.counts), 3), "codes_used": round(used.float().mean().item(), 4)}
        if step % config.revive_every == 0 and step < config.revive_until * config.steps:
            figures["revived"] = codebook.revive(rows_ND, random, config.revive_threshold)
    return figures


def _reconstruction(
    learner: Learner, pairs: list[tuple[torch.Tensor, torch.Tensor]], parts: list[Part], config: TrainTokenizerConfig
) -> dict[str, torch.Tensor]:
    """The reconstruction loss of each camera, and the perceptual one if it counts, by their share and weight."""
    losses: dict[str, torch.Tensor] = {}
    for (shown, pixels), part in zip(pairs, parts, strict=True):
        name = f"loss_{part.camera}"
        losses[name] = losses.get(name, 0) + part.share * reconstruction_loss(shown, pixels, part.median, config.loss)
        if config.loss.perceptual:
            with _autocast(config):
                distance = learner.perceptual(shown, pixels).float()
            losses["perceptual"] = losses.get("perceptual", 0) + part.share * config.loss.perceptual * distance
    return losses


def _train_adversary(
    learner: Learner, pairs: list[tuple[torch.Tensor, torch.Tensor]], parts: list[Part], config: TrainTokenizerConfig
) -> torch.Tensor:
    """One step of the discriminator on the same frames. Returns its loss."""
    learner.adversary.requires_grad_(True)
    with _autocast(config):
        scores = [(learner.adversary(pixels).float(), learner.adversary(shown.detach()).float()) for shown, pixels in pairs]
    loss = sum(part.share * hinge_loss(real, shown) for (real, shown), part in zip(scores, parts, strict=True))
    learner.adversary_optimizer.zero_grad(set_to_none=True)
    loss.backward()
    learner.adversary_optimizer.step()
    return loss


def _unquantised(codebook: TrainingCodebook, rows_ND: torch.Tensor) -> Quantised:
    zero = rows_ND.new_zeros(())
    return Quantised(codebook.pass_through(rows_ND), torch.zeros(len(rows_ND), dtype=torch.int64), zero, zero)


def _draw(
    frames: dict[str, Frames],
    medians: dict[str, torch.Tensor],
    images: int,
    clips: int,
    random: np.random.Generator,
    config: TrainTokenizerConfig,
) -> list[Part]:
    """So many images and clips of each camera."""
    parts = []
    for camera, stored in frames.items():
        drawn = ([stored.draw(images, random)] if images else []) + ([stored.draw_clips(clips, random)] if clips else [])
        total = sum(rows.numel() for rows in drawn)
        for rows in drawn:
            every = medians[camera]
            median = every if len(every) == 1 else every[stored.store[rows.flatten()]]
            share = rows.numel() / total * config.camera_share(camera, frames)
            pixels = stored.pixels(rows).to(config.device)
            parts.append(Part(camera=camera, pixels=pixels, median=median.to(config.device), share=share))
    return parts


@torch.no_grad()
def _place_codes(learner: Learner, frames: dict[str, Frames], config: TrainTokenizerConfig) -> None:
    """k-means over latents of `kmeans_images` images of each camera, and of as many frames in clips where clips are shown."""
    random = np.random.default_rng((config.seed, config.quantise_from, 1))
    clips = -(-config.kmeans_images // config.clip_length) if config.clips else 0
    medians = {camera: torch.zeros(1) for camera in frames}  # nothing is weighed here
    parts = _draw(frames, medians, config.kmeans_images, clips, random, config)
    with _autocast(config):
        latents = [learner.tokenizer.latents(some) for part in parts for some in part.pixels.split(config.batch_size)]
    learner.codebook.start_from(torch.cat([part.flatten(0, -2) for part in latents]), random)


def _autocast(config: TrainTokenizerConfig) -> torch.autocast:
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.precision == "bf16")


def _load(config: TrainTokenizerConfig, tokenizer: VisionTokenizer, console: Console) -> tuple[dict[str, Frames], dict[str, Frames]]:
    """Frames to train on and frames held out, per camera."""
    stores = [EpisodeStore.open(path) for path in config.stores]
    pinned = _pinned_shards(stores, Path(config.output_dir), console)
    splits = [split_shards(shards, config.validation_fraction) for shards in pinned]
    train: list[Source] = [(store, shards) for store, (shards, _) in zip(stores, splits, strict=True)]
    held_out: list[Source] = [(store, shards) for store, (_, shards) in zip(stores, splits, strict=True)]
    length = config.clip_length if config.clips else 1
    sizes = tokenizer.image_sizes
    with console.status(f"reading frames of {sum(map(len, pinned))} shards"):
        frames = {camera: load_frames(train, camera, size, config.max_frames, length) for camera, size in sizes.items()}
        kept = {camera: load_frames(held_out, camera, size, config.validation_frames, length) for camera, size in sizes.items()}
    counts = ", ".join(f"{camera} {len(frames[camera])} + {len(kept[camera])}" for camera in sizes)
    console.print(f"frames, to train on + held out: {counts}")
    return frames, kept


def _pinned_shards(stores: list[EpisodeStore], output: Path, console: Console) -> list[list[int]]:
    """The shards that this run began with, so that a resumed run draws the same frames although a store has grown meanwhile."""
    record = output / "shards.json"
    there = [store.shard_indices() for store in stores]
    if not record.exists():
        write_text_atomic(record, json.dumps(there))
    pinned = json.loads(record.read_text())
    for store, before, now in zip(stores, pinned, there, strict=True):
        if lost := sorted(set(before) - set(now)):
            raise ValueError(f"{store.path} lacks shards {lost} that this run began with ({record}); restore them or start afresh")
        if len(now) > len(before):
            console.print(f"{store.path} has grown to {len(now)} shards; this run goes on with the {len(before)} it began with")
    return pinned


def _validate(
    tokenizer: VisionTokenizer,
    held_out: dict[str, Frames],
    medians: dict[str, torch.Tensor],
    step: int,
    config: TrainTokenizerConfig,
    output: Path,
) -> dict[str, Measurement]:
    """By camera, and by camera and "clips" where clips are shown."""
    tokenizer.eval()
    measured = {}
    for camera, frames in held_out.items():
        measured[camera] = measure(tokenizer, frames, medians[camera], config.loss.foreground_distance)
        if config.clips:
            measured[f"{camera}_clips"] = measure(tokenizer, frames, medians[camera], config.loss.foreground_distance, clips=True)
        save_pictures(tokenizer, frames, output / "pictures" / f"{camera}_{step:06d}.png")
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
