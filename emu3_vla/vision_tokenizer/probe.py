"""Where the blocks are and which lights are on, read out of codes alone: what a policy can know at best.

Two probes, trained on some episodes and tested on others. The *linear* one is ridge regression from the code vectors at all positions of
both cameras. It answers for lights; for blocks it is weak whatever the tokenizer, because one weight a position must say both what is
there and where. The *keypoint* one shares its weights over positions: two 3×3 convolutions over the static camera's code vectors, a heat
map for each block, the mean position under it (a soft arg max) and, linear in that position and in the features found there, the block's
place in the world. Heat maps can settle on the wrong thing: several compete for each block, the worse half is drawn anew from time to time,
and the one that explains the training frames best counts.

A block behind the door, in the drawer or behind the arm is in no code, and neither is a lamp behind the arm; figures are given over all
frames and over those that show it.

Axes: N frames, h w rows and columns of codes, D code dimensions, K heat maps, C features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from emu3_vla.data.episodes import EpisodeStore
from emu3_vla.vision_tokenizer.base import VisionTokenizer
from emu3_vla.vision_tokenizer.frames import MEDIAN_FRAMES, Frames, read_rows
from envs.spec import RGB_STATIC, SCENE_OBS

COLOURS = ("red", "blue", "pink")
# In which order scene_obs gives the blocks, and where: CALVIN's dataset description.
BLOCK_ORDER = {"A": ("pink", "blue", "red"), "B": ("red", "blue", "pink"), "C": ("blue", "red", "pink"), "D": COLOURS}
LIGHTS, LIGHT_COLUMNS, FIRST_BLOCK, BLOCK_COLUMNS = ("bulb", "led"), slice(4, 6), 6, 6
# A block is in sight if this many pixels of the static image (200×200) have its colour: a tenth of what an unhidden one covers.
PIXELS_IN_SIGHT = 20
# A lamp is in sight if this share of its pixels looks as it does in the median image of its state, to this many of 255.
LAMP_SHARE, LAMP_TOLERANCE = 0.5, 40
LAMP_TELLS = 0.75  # share of frames in which a pixel must be nearer to its lamp's state than to the other, to be one of the lamp's
RIDGE = 1e-3  # of the mean square of a feature
# So often in a run, and until this share of it, the worse half of each block's heat maps is drawn anew.
ROUNDS, RESTARTS_UNTIL = 10, 0.55
MM = 1000.0


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Raises ValueError for values that cannot work."""

    frames: int = 8000  # to train the probes on; the held-out shards' frames are the test
    steps: int = 8000  # of the keypoint probe; 0: the linear probe alone
    batch_size: int = 32
    channels: int = 32
    restarts: int = 4  # heat maps for each block
    learning_rate: float = 6e-3
    dropout: float = 0.1  # share of positions whose code is hidden while the keypoint probe learns

    def __post_init__(self):
        if min(self.frames, self.batch_size, self.channels, self.restarts) < 1 or self.steps < 0:
            raise ValueError(f"{self}: frames, batch_size, channels and restarts must be at least 1, steps at least 0")


@dataclass(frozen=True, kw_only=True)
class ProbeData:
    """codes: camera → int64 (N, h, w); positions_mm float32 (N, 3, 3) of the red, blue and pink block in the world; lights bool (N, 2):
    bulb, LED; in_sight bool (N, 3): the blocks; lamps_in_sight bool (N, 2)."""

    codes: dict[str, torch.Tensor]
    positions_mm: torch.Tensor
    lights: torch.Tensor
    in_sight: torch.Tensor
    lamps_in_sight: torch.Tensor

    def __len__(self) -> int:
        return len(self.lights)


@dataclass(frozen=True, kw_only=True)
class Localisation:
    """Distances of blocks from where the probe places them, over test frames and blocks; accuracy over test frames."""

    median_mm: float
    ninety_percent_mm: float
    in_sight_median_mm: float
    in_sight_ninety_percent_mm: float
    in_sight_median_mm_of: dict[str, float]  # by colour
    light_accuracy: dict[str, float]
    in_sight_light_accuracy: dict[str, float]


def scene_states(stores: Sequence[EpisodeStore], shards: Sequence[Sequence[int]], frames: Frames) -> dict[str, torch.Tensor]:
    """positions_mm, lights and in_sight of `frames` (see ProbeData), which were loaded from these shards.

    Raises ValueError for a store whose metadata does not say which scene it shows.
    """
    parts = []
    for number, (store, indices) in enumerate(zip(stores, shards, strict=True)):
        rows = frames.rows[frames.store.numpy() == number]
        scene = store.metadata.get("scene")
        if scene not in BLOCK_ORDER:
            raise ValueError(
                f"{store.path} says scene={scene!r}; the probe knows the blocks of scenes {', '.join(BLOCK_ORDER)}: set probe=false"
            )
        states, sight = _read_states(store, indices, rows)
        order = [BLOCK_ORDER[scene].index(colour) for colour in COLOURS]
        blocks = states[:, FIRST_BLOCK:].reshape(len(rows), len(COLOURS), BLOCK_COLUMNS)[:, order, :3]
        parts.append((blocks * MM, states[:, LIGHT_COLUMNS] > 0.5, sight))
    names = ("positions_mm", "lights", "in_sight")
    joined = {name: torch.from_numpy(np.concatenate(part)) for name, part in zip(names, zip(*parts, strict=True), strict=True)}
    return joined | {"positions_mm": joined["positions_mm"].float()}


def _read_states(store: EpisodeStore, shards: Sequence[int], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """scene_obs (F, 24) at the frames `rows` of all the shards' frames, ascending, and which blocks they show (F, 3)."""
    states, sight, start = [], [], 0
    for shard in shards:
        every = np.concatenate(
            [episode[SCENE_OBS][episode["frame_step"]] for episode in store.read_columns(shard, (SCENE_OBS, "frame_step"))]
        )
        local = rows[(rows >= start) & (rows < start + len(every))] - start
        start += len(every)
        if len(local):
            states.append(every[local])
            sight.append(blocks_in_sight(read_rows(store, RGB_STATIC, shard, local, len(every))))
    return np.concatenate(states), np.concatenate(sight)


def blocks_in_sight(images: np.ndarray) -> np.ndarray:
    """Whether the red, blue and pink block show: uint8 (N, H, W, 3) -> bool (N, 3). Saturated colours that nothing else in CALVIN has."""
    red, green, blue = (images[..., channel] for channel in range(3))
    masks = (
        (red > 110) & (green < 60) & (blue < 60),
        (red < 70) & (green < 90) & (blue > 110),
        (red > 110) & (green < 70) & (blue > 110),
    )
    return np.stack([mask.sum((1, 2)) >= PIXELS_IN_SIGHT for mask in masks], axis=1)


def lamps_in_sight(images: torch.Tensor, lights: torch.Tensor) -> torch.Tensor:
    """Whether the bulb and the LED show: uint8 (N, 3, H, W) of one scene's static camera, bool (N, 2) -> bool (N, 2).

    A lamp's pixels are those that tell its two states apart in most frames: other things move, but not with the lamp. A lamp that has
    none, because it never changes here or is too small, is taken for seen.
    """
    seen = torch.ones_like(lights)
    for lamp, on in enumerate(lights.T):
        if on.all() or not on.any():
            continue
        median = {state: _thin(images[on == state]).median(dim=0).values.int() for state in (False, True)}
        tells = [_nearer(_thin(images[on == state]), median[state], median[not state]) for state in median]
        pixels = torch.stack(tells).mean(0) > LAMP_TELLS
        pixels &= (median[True] - median[False]).abs().amax(0) > LAMP_TOLERANCE
        if not pixels.any():
            continue
        expected = torch.stack([median[False][:, pixels], median[True][:, pixels]])[on.int()]
        alike = (images[:, :, pixels].int() - expected).abs().amax(1) <= LAMP_TOLERANCE
        seen[:, lamp] = alike.float().mean(1) >= LAMP_SHARE
    return seen


def _nearer(images: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Share of the images (N, 3, H, W) in which a pixel is nearer to that of `one` (3, H, W) than to that of `other`: (H, W)."""
    return ((images.int() - one).abs().sum(1) < (images.int() - other).abs().sum(1)).float().mean(0)


def _thin(images: torch.Tensor) -> torch.Tensor:
    return images[:: max(1, len(images) // MEDIAN_FRAMES)]


def linear_probe(tokenizer: VisionTokenizer, train: ProbeData, test: ProbeData) -> Localisation:
    """Ridge regression from all code vectors; lights by its sign."""
    features, unseen = _vectors(tokenizer, train), _vectors(tokenizer, test)
    signs = train.lights.float() * 2 - 1
    targets = torch.cat([train.positions_mm.flatten(1), signs], 1)
    mean, centre = features.mean(0), targets.mean(0)
    features = features - mean
    gram = features.T @ features
    gram.diagonal().add_(RIDGE * features.square().mean() * len(features))
    weights = torch.linalg.solve(gram.double(), (features.T @ (targets - centre)).double()).float()
    predicted = (unseen - mean) @ weights + centre
    return localisation(predicted[:, : -len(LIGHTS)].view(-1, len(COLOURS), 3), predicted[:, -len(LIGHTS) :] > 0, test)


def keypoint_probe(tokenizer: VisionTokenizer, train: ProbeData, test: ProbeData, config: ProbeConfig, seed: int) -> Localisation:
    """The probe with shared weights, trained on `train`."""
    torch.manual_seed(seed)
    grid = tuple(train.codes[RGB_STATIC].shape[1:])
    vectors = tokenizer.vectors(torch.arange(tokenizer.codebook_size, device=tokenizer.device)).detach().float().cpu()
    probe = _KeypointProbe(vectors, grid, config)
    scale = train.positions_mm.std(0)
    centre = train.positions_mm.mean(0)
    best = _train_keypoints(probe, train, (train.positions_mm - centre) / scale.mean(), config, seed)
    probe.eval()
    with torch.inference_mode():
        outputs = [probe(codes) for codes in test.codes[RGB_STATIC].split(256)]
    places = torch.cat([output[0] for output in outputs])[:, best, torch.arange(len(COLOURS))] * scale.mean() + centre
    return localisation(places, torch.cat([output[2] for output in outputs]) > 0, test)


def localisation(places_mm: torch.Tensor, lights: torch.Tensor, test: ProbeData) -> Localisation:
    """Figures of places (N, 3, 3) and lights bool (N, 2) against the truth."""
    distance = (places_mm - test.positions_mm).norm(dim=2)
    seen = distance[test.in_sight] if test.in_sight.any() else distance.new_full((1,), torch.nan)
    right = lights == test.lights
    return Localisation(
        median_mm=round(distance.quantile(0.5).item(), 2),
        ninety_percent_mm=round(distance.quantile(0.9).item(), 2),
        in_sight_median_mm=round(seen.quantile(0.5).item(), 2),
        in_sight_ninety_percent_mm=round(seen.quantile(0.9).item(), 2),
        in_sight_median_mm_of={
            colour: round(distance[:, block][test.in_sight[:, block]].nanmedian().item(), 2) for block, colour in enumerate(COLOURS)
        },
        light_accuracy=_shares(right, torch.ones_like(right)),
        in_sight_light_accuracy=_shares(right, test.lamps_in_sight),
    )


def _shares(right: torch.Tensor, counted: torch.Tensor) -> dict[str, float]:
    """Of the frames that count, the share that is right, for each lamp; NaN where none counts."""
    shares = (right & counted).sum(0) / counted.sum(0)
    return {name: round(value, 4) for name, value in zip(LIGHTS, shares.tolist(), strict=True)}


def _vectors(tokenizer: VisionTokenizer, data: ProbeData) -> torch.Tensor:
    """Code vectors of all cameras and positions: float32 (N, positions * D)."""
    with torch.inference_mode():
        parts = [tokenizer.vectors(codes.to(tokenizer.device)).float().cpu().flatten(1) for codes in data.codes.values()]
    return torch.cat(parts, 1).clone()


class _KeypointProbe(nn.Module):
    """int64 codes (N, h, w) -> places (N, restarts, 3, 3), log scale of their error (N, restarts, 3), light logits (N, 2)."""

    def __init__(self, vectors_KD: torch.Tensor, grid: tuple[int, int], config: ProbeConfig):
        super().__init__()
        maps, channels = config.restarts * len(COLOURS), config.channels
        self.restarts, self.dropout = config.restarts, config.dropout
        self.register_buffer("vectors", vectors_KD / vectors_KD.std())
        rows, columns = (torch.linspace(-1, 1, count) for count in grid)
        self.register_buffer("places", torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1))
        self.cell = 2 / max(grid)
        self.first = nn.Conv2d(vectors_KD.shape[1], channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.heat, self.offset = nn.Conv2d(channels, maps, 1), nn.Conv2d(channels, 2 * maps, 1)
        # Perspective bends straight lines a little: squares and the product of row and column as well.
        self.from_place, self.from_features = nn.Parameter(torch.empty(maps, 5, 3)), nn.Parameter(torch.empty(maps, channels, 3))
        self.to_scale, self.bias = nn.Parameter(torch.empty(maps, channels)), nn.Parameter(torch.empty(maps, 3))
        self.scale_bias = nn.Parameter(torch.empty(maps))
        self.start_again(torch.arange(maps))
        self.lights = nn.Linear(vectors_KD.shape[1] * grid[0] * grid[1], len(LIGHTS))

    @torch.no_grad()
    def start_again(self, maps: torch.Tensor) -> None:
        """Draw the heat maps `maps` anew, and what is read under them."""
        channels = self.heat.in_channels
        self.heat.weight[maps] = torch.randn(len(maps), channels, 1, 1) / channels**0.5
        self.offset.weight.unflatten(0, (-1, 2))[maps] = 0
        self.from_place[maps] = 0.3 * torch.randn(len(maps), 5, 3)
        for zeroed in (self.heat.bias, self.from_features, self.to_scale, self.bias, self.scale_bias):
            zeroed[maps] = 0

    def forward(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = self.vectors[codes].permute(0, 3, 1, 2)
        if self.training and self.dropout:
            inputs = inputs * (torch.rand(len(codes), 1, *codes.shape[1:]) > self.dropout)
        hidden = F.relu(self.first(inputs))
        hidden = hidden + F.relu(self.second(hidden))
        heat = self.heat(hidden).flatten(2).mul(3).softmax(-1)
        offset = self.offset(hidden).flatten(2).unflatten(1, (-1, 2)) * self.cell
        place = ((self.places + offset) * heat[:, :, None]).sum(-1)
        terms = torch.cat([place, place.square(), place.prod(-1, keepdim=True)], -1)
        features = torch.einsum("nkp,ncp->nkc", heat, hidden.flatten(2))
        world = torch.einsum("nkq,kqj->nkj", terms, self.from_place) + torch.einsum("nkc,kcj->nkj", features, self.from_features)
        log_scale = (features * self.to_scale).sum(-1) + self.scale_bias
        shape = (self.restarts, len(COLOURS))
        return (world + self.bias).unflatten(1, shape), log_scale.unflatten(1, shape), self.lights(inputs.flatten(1))


def _train_keypoints(probe: _KeypointProbe, train: ProbeData, targets: torch.Tensor, config: ProbeConfig, seed: int) -> torch.Tensor:
    """Train in place. Returns for each block which of its heat maps explains the training frames best: int64 (3,).

    The loss is a Laplace likelihood whose scale the probe states, so that hidden blocks do not pull at the others.
    """
    random = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=config.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps)
    running = torch.zeros(config.restarts, len(COLOURS))
    for step in range(config.steps):
        if step and step % max(1, config.steps // ROUNDS) == 0 and step < RESTARTS_UNTIL * config.steps:
            worse = running.argsort(0)[config.restarts // 2 + config.restarts % 2 :]  # by now the convolutions see more than at the start
            probe.start_again((worse * len(COLOURS) + torch.arange(len(COLOURS))).flatten())
        rows = torch.from_numpy(random.integers(len(train), size=config.batch_size))
        places, log_scale, logits = probe(train.codes[RGB_STATIC][rows])
        distance = (places - targets[rows][:, None]).norm(dim=-1)
        surprise = (distance * torch.exp(-log_scale) + log_scale).mean(0)
        loss = surprise.mean() + F.binary_cross_entropy_with_logits(logits, train.lights[rows].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        running.lerp_(surprise.detach(), 0.02)
    return running.argmin(0)
