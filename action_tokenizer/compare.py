"""Compare action tokenizers on the same chunks.

    emu3-vla compare-action-tokenizers data=outputs/collect/first
    emu3-vla compare-action-tokenizers data=actions.npz tokenizers=[checkpoint/action_tokenizer] horizon=10

Fits FAST and the binning baselines on most of the episodes and measures them, and any tokenizers given, on the rest: tokens a chunk,
error in millimetres and degrees, time. Writes comparison.json, comparison.jsonl (a line a tokenizer), comparison.svg, the fitted
tokenizer (fast/) and the normaliser (normalizer.json).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from action_tokenizer import files
from action_tokenizer.base import ActionTokenizer
from action_tokenizer.bins import BinTokenizer
from action_tokenizer.chunks import chunks_of
from action_tokenizer.errors import ActionTokenizerError, BadActions
from action_tokenizer.fast import FastTokenizer
from action_tokenizer.normalizer import MODES, ActionNormalizer
from action_tokenizer.plot import scatter_svg
from action_tokenizer.report import CALVIN_RELATIVE, Report, report

EPISODE_STORE = "emu3_vla.data.episodes:EpisodeStore"
"""What reads a folder with a store.json, named rather than imported: this package knows no storage."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Options of the comparison."""

    # An episode store, or an .npy or .npz file of actions: arrays (steps, 7) are episodes, (N, T, 7) are N of T steps. In an npz,
    # arrays called "actions" or ".../actions".
    data: str
    # Where the results go.
    output_dir: str = ""
    # Folders of further FAST tokenizers to measure beside those fitted here.
    tokenizers: tuple[str, ...] = ()
    # Steps of a chunk, and from one chunk's start to the next.
    horizon: int = 10
    stride: int = 1
    # FAST: factor on the coefficients, and most ids.
    scale: float = 10.0
    vocab_size: int = 1024
    # Number of bins of the baselines.
    bins: int = 256
    # "none", or a mode of the normaliser; the last dimension, the gripper, is kept apart. What leaves [-1, 1] is clipped.
    normalize: str = "none"
    # Part of the episodes that nothing is fitted on.
    held_out: float = 0.2
    # Most held-out chunks to measure on.
    most_chunks: int = 20_000
    # Draws the held-out episodes.
    seed: int = 0

    def __post_init__(self):
        if self.normalize not in ("none", *MODES):
            raise ActionTokenizerError(f"normalize={self.normalize!r}, expected none, {', '.join(MODES)}")
        if not 0 < self.held_out < 1:
            raise ActionTokenizerError(f"held_out={self.held_out}, expected a part between 0 and 1")
        if min(self.horizon, self.stride, self.most_chunks) < 1:
            raise ActionTokenizerError("horizon, stride and most_chunks must be at least 1")


def main(config: CompareConfig) -> None:
    """Run the comparison and print its table and the paths of what it wrote."""
    output = Path(config.output_dir)
    train, test = _split(list(read_actions(config.data)), config)
    normalizer = None
    if config.normalize != "none":
        normalizer = ActionNormalizer.fit(np.concatenate(train), mode=config.normalize)
        normalizer.save(output / "normalizer.json")
    train_NTA, test_NTA = _windows(train, config), _windows(test, config)
    held_out = np.random.default_rng(config.seed).permutation(len(test_NTA))[: config.most_chunks]
    test_NTA = test_NTA[np.sort(held_out)]
    normalized_NTA = train_NTA if normalizer is None else normalizer.normalize(train_NTA, clip=True)
    reports = {}
    with (output / "comparison.jsonl.tmp").open("w") as log:
        for name, tokenizer in _tokenizers(normalized_NTA, config):
            reports[name] = report(tokenizer, test_NTA, normalizer=normalizer)
            log.write(json.dumps({"tokenizer": name} | asdict(reports[name])) + "\n")
            log.flush()
    (output / "comparison.jsonl.tmp").replace(output / "comparison.jsonl")
    _write(output, config, reports)
    print(table(reports))
    for name in ("comparison.json", "comparison.svg", "fast"):
        print(output / name)


def read_actions(path: str | Path) -> Iterator[np.ndarray]:
    """Actions (steps, A) of each episode of an episode store, or of an .npy or .npz file. Raises BadActions."""
    path = Path(path)
    if (path / "store.json").is_file():
        module, name = EPISODE_STORE.split(":")
        store = getattr(importlib.import_module(module), name).open(path)
        yield from (episode.actions for shard in store.shard_indices() for episode in store.read_shard(shard))
    elif path.suffix in (".npy", ".npz") and path.is_file():
        for array in _arrays(path):
            if array.ndim not in (2, 3):
                raise BadActions(f"{path} holds actions of shape {array.shape}, expected (steps, A) or (N, T, A)")
            yield from ([array] if array.ndim == 2 else array)
    else:
        raise BadActions(f"data={path} is neither an episode store (a folder with store.json) nor an .npy or .npz file")


def table(reports: dict[str, Report]) -> str:
    """The reports as text, a line each."""
    width = max(map(len, ("tokenizer", *reports))) + 2
    head = f"{'tokenizer':<{width}}{'ids':>6}{'tokens/chunk':>14}{'p95':>6}{'bits/value':>12}{'rmse mm':>9}{'rmse °':>9}"
    lines = [head + f"{'encode µs':>11}{'decode µs':>11}{'clipped':>9}"]
    for name, r in reports.items():
        position, rotation = errors(r)
        lines.append(
            f"{name:<{width}}{r.vocab_size:>6}{r.tokens_mean:>14.2f}{r.tokens_p95:>6.0f}{r.bits_per_value:>12.2f}{position:>9.3f}"
            f"{rotation:>9.3f}{r.encode_us:>11.2f}{r.decode_us:>11.2f}{r.clipped:>9}"
        )
    return "\n".join(lines)


def errors(measured: Report) -> tuple[float, float]:
    """Root mean square error over the three positions [mm] and the three rotations [degrees] of CALVIN's relative action."""
    squares = np.square(measured.rmse)
    symbols = np.array([unit.symbol for unit in CALVIN_RELATIVE])
    return tuple(float(np.sqrt(squares[symbols == symbol].mean())) for symbol in ("mm", "°"))


def _arrays(path: Path) -> list[np.ndarray]:
    stored = np.load(path, allow_pickle=False)
    if isinstance(stored, np.ndarray):
        return [stored]
    with stored:
        names = [name for name in stored.files if name.split("/")[-1] == "actions"]
        if not names:
            raise BadActions(f"{path} holds {', '.join(stored.files)}, and none of them is called actions")
        return [stored[name] for name in names]


def _split(episodes: list[np.ndarray], config: CompareConfig) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Episodes to fit on, and held-out ones. Whole episodes, since neighbouring chunks share steps."""
    long_enough = [episode for episode in episodes if len(episode) >= config.horizon]
    count = round(len(long_enough) * config.held_out)
    if not 0 < count < len(long_enough):
        raise BadActions(
            f"{config.data} holds {len(long_enough)} episodes of at least {config.horizon} steps, "
            f"of which held_out={config.held_out} leaves {count} to measure on; give more episodes or another part"
        )
    order = np.random.default_rng(config.seed).permutation(len(long_enough))
    return [long_enough[i] for i in order[count:]], [long_enough[i] for i in order[:count]]


def _windows(episodes: list[np.ndarray], config: CompareConfig) -> np.ndarray:
    return np.concatenate(list(chunks_of(episodes, horizon=config.horizon, stride=config.stride)))


def _tokenizers(normalized_NTA: np.ndarray, config: CompareConfig) -> Iterator[tuple[str, ActionTokenizer]]:
    fast = FastTokenizer.fit(normalized_NTA, scale=config.scale, vocab_size=config.vocab_size)
    fast.save_pretrained(Path(config.output_dir) / "fast")
    yield "FAST, fitted here", fast
    for folder in config.tokenizers:
        yield f"FAST, {Path(folder).name}", FastTokenizer.from_pretrained(folder)
    yield f"{config.bins} uniform bins", BinTokenizer.uniform(action_dim=normalized_NTA.shape[2], bins=config.bins)
    yield f"{config.bins} quantile bins", BinTokenizer.fit_quantiles(normalized_NTA, bins=config.bins)


def _write(output: Path, config: CompareConfig, reports: dict[str, Report]) -> None:
    values = {"config": asdict(config), "reports": {name: asdict(measured) for name, measured in reports.items()}}
    files.write_text(output / "comparison.json", json.dumps(values, indent=1))
    points = [(name, measured.tokens_mean, errors(measured)[0]) for name, measured in reports.items()]
    files.write_text(
        output / "comparison.svg",
        scatter_svg(points, x_label="tokens a chunk", y_label="position error, rms [mm]", title="Action tokenizers"),
    )
