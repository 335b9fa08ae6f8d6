"""`emu3-vla scaling-law`: how the loss falls with model and data, from a grid of small models; and what a larger one will reach.

    emu3-vla scaling-law tokens=outputs/tokens output_dir=outputs/scaling-law
    emu3-vla scaling-law preset=debug tokens=... output_dir=...

Every size of `widths` is trained for every length of `steps`, and the larger `held_out_width` for each of `held_out_steps`; each is an
ordinary training run with a schedule of its own length, in runs/<name>/. Then L(N, D) = E + A / N^alpha + B / D^beta is fitted to the
held-out losses of the grid, one law a kind of token (power_law.py), and compared with what the larger model came to.

N is the parameters without embedding tables, which are looked up and not computed with. D is trunk positions seen in training, for all
kinds of token alike. Killed and started again, it goes on with the runs that are not finished, each from its last state.

Leaves report.html, scaling_law.json, a surface-<kind>.svg each, and the runs. Source of the law for one model of all kinds of token:
Emu3 (Nature 2026, s41586-025-10041-x).
"""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from emu3_vla.data.episodes import write_text_atomic
from emu3_vla.training import loop, power_law
from emu3_vla.training.loop import ModelSizes, TrainConfig
from emu3_vla.training.power_law import Fit, Measured
from emu3_vla.training.source import open_source

KINDS = ("action", "vision", "text")
REPORT, RESULTS = "report.html", "scaling_law.json"
HEAD_WIDTH, WIDTH_OF_A_LAYER = 32, 48
TEMPLATE = "scaling_law.html.j2"


def _template() -> TrainConfig:
    return TrainConfig(tokens="", batch_size=16, validate_every=10**6, checkpoint_every=500, validation_documents=512)


@dataclass(frozen=True, kw_only=True)
class ScalingLawConfig:
    """The grid. Raises ValueError for one that no law can be fitted to."""

    tokens: str  # folder of a token store
    output_dir: str = ""
    widths: tuple[int, ...] = (64, 96, 128, 192)  # hidden sizes of the grid; depth and the rest follow, see `sizes_of`
    steps: tuple[int, ...] = (200, 400, 800, 1600)  # lengths of training
    held_out_width: int = 256  # of the larger model, which nothing is fitted to
    held_out_steps: tuple[int, ...] = (1600,)
    learning_rate_exponent: float = 0.5  # a model's highest rate is train.optimizer.learning_rate × (256 / width)^this
    workers: int = 2  # runs at once, one thread each
    resamples: int = 400  # bootstrap samples behind the intervals
    train: TrainConfig = field(default_factory=_template)  # all else of a run: batch_size, chunks, seed, loss, optimizer, ...

    def __post_init__(self):
        for name in ("widths", "steps"):
            values = getattr(self, name)
            if len(set(values)) < power_law.LEAST_SIZES or len(set(values)) != len(values):
                raise ValueError(f"{name}={list(values)}: expected at least {power_law.LEAST_SIZES} different ones, each once")
        if not self.held_out_steps:
            raise ValueError("held_out_steps is empty: name at least one length of training for the model that is predicted")
        for name in ("steps", "held_out_steps"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}={list(getattr(self, name))}: expected at least 1")
        for width in (*self.widths, self.held_out_width):
            if width < HEAD_WIDTH or width % HEAD_WIDTH:
                raise ValueError(f"width {width} is no multiple of {HEAD_WIDTH}, the width of a head")
        if self.held_out_width <= max(self.widths):
            raise ValueError(f"held_out_width={self.held_out_width} is not larger than all of widths={list(self.widths)}")
        if min(self.workers, self.resamples) < 1:
            raise ValueError(f"workers={self.workers} and resamples={self.resamples}: expected at least 1")
        if self.train.tokens or self.train.output_dir:
            raise ValueError("train.tokens and train.output_dir follow from tokens and output_dir: leave them empty")
        if self.train.processes > 1 or self.train.parallel.ranks > 1:
            raise ValueError("every run is one process: leave train.processes and train.parallel at 1; workers says how many run at once")


def main(config: ScalingLawConfig) -> None:
    """Train what is not trained yet, fit, report. Prints the held-out error and the report's path."""
    source = open_source(config.tokens, config.train.model.block_size)  # a wrong path ends here, not in a worker
    output, runs = Path(config.output_dir), _runs(config)
    _train_missing(runs, config)
    length = source.streams(config.train)[0].mean_length
    points = [_point(run, length) for run in runs]
    results = _results(points, config)
    _write(results, points, config, output)
    console = Console(soft_wrap=True)
    for kind, law in results["laws"].items():
        errors = ", ".join(f"{100 * held_out['relative_error']:.2f} %" for held_out in law["held_out"])
        console.print(f"{kind}: held-out error {errors}; " + "  ".join(f"{name} {value:g}" for name, value in law["law"].items()))
    print(output / REPORT)


def sizes_of(width: int, model: ModelSizes) -> ModelSizes:
    """The model of a width: layers in proportion, heads of one width, and blocks of codes in proportion too."""
    heads = width // HEAD_WIDTH
    return dataclasses.replace(
        model,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=max(1, round(width / WIDTH_OF_A_LAYER)),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        block_hidden=2 * width,
        depth_size=width,
        depth_heads=heads,
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of the grid, or of the model that is predicted."""

    width: int
    held_out: bool
    config: TrainConfig

    @property
    def name(self) -> str:
        return Path(self.config.output_dir).name


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a run came to. tokens: trunk positions seen. losses: held-out nats a token of each kind."""

    run: Run
    parameters: int
    tokens: float
    losses: dict[str, float]


def _runs(config: ScalingLawConfig) -> list[Run]:
    """All of them, those that take longest first, so that no worker is left alone with one at the end."""
    wanted = [(width, steps, False) for width in config.widths for steps in config.steps]
    wanted += [(config.held_out_width, steps, True) for steps in config.held_out_steps]
    runs = []
    for width, steps, held_out in sorted(wanted, key=lambda run: -(run[0] ** 2) * run[1]):
        optimizer = config.train.optimizer
        rate = optimizer.learning_rate * (256 / width) ** config.learning_rate_exponent
        train = dataclasses.replace(
            config.train,
            tokens=config.tokens,
            output_dir=str(Path(config.output_dir) / "runs" / f"width-{width}-steps-{steps}"),
            steps=steps,
            model=sizes_of(width, config.train.model),
            optimizer=dataclasses.replace(optimizer, learning_rate=rate),
        )
        runs.append(Run(width=width, held_out=held_out, config=train))
    return runs


def _train_missing(runs: list[Run], config: ScalingLawConfig) -> None:
    """Runs without a policy, in worker processes, with a bar over the work in all of them."""
    work = {run.name: run.width**2 * run.config.steps for run in runs}
    missing = [run for run in runs if not (Path(run.config.output_dir) / "policy").exists()]
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(20), TimeElapsedColumn(), TimeRemainingColumn())
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # for the workers
    context = multiprocessing.get_context("spawn")
    with Progress(*columns) as progress:
        total, left = sum(work.values()), sum(work[run.name] for run in missing)
        bar = progress.add_task("runs, by work", total=total, completed=total - left)
        if not missing:
            return
        with context.Pool(min(config.workers, len(missing)), initializer=_end_with_parent) as pool:
            for name in pool.imap_unordered(_train, [run.config for run in missing], chunksize=1):
                progress.advance(bar, work[name])


def _end_with_parent() -> None:
    """A worker whose parent was killed would train on, beside the one that the next start makes."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _train(config: TrainConfig) -> str:
    """One run in a worker; what it says goes to its own log.txt. Returns its name."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        loop.main(config)
    return folder.name


def _point(run: Run, length: float) -> Point:
    """Read what a finished run left. length: positions of its documents, on average."""
    folder = Path(run.config.output_dir)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line["validation"] for line in lines if "validation" in line][-1]
    source = open_source(run.config.tokens, run.config.model.block_size)
    model = loop.outline(run.config, source)
    tables = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    return Point(
        run=run,
        parameters=sum(parameter.numel() for parameter in model.parameters()) - tables,
        tokens=run.config.steps * run.config.batch_size * length,
        losses={kind: last[f"loss_{kind}"] for kind in KINDS if f"loss_{kind}" in last},
    )


def _measured(points: list[Point], kind: str, held_out: bool) -> Measured:
    chosen = [point for point in points if point.run.held_out == held_out]
    columns = [(point.parameters, point.tokens, point.losses[kind]) for point in chosen]
    parameters, tokens, loss = np.array(columns, float).T
    return Measured(parameters=parameters, tokens=tokens, loss=loss, held_out=held_out)


def _results(points: list[Point], config: ScalingLawConfig) -> dict[str, Any]:
    laws = {}
    for kind in [kind for kind in KINDS if all(kind in point.losses for point in points)]:
        grid, predicted = _measured(points, kind, held_out=False), _measured(points, kind, held_out=True)
        found = power_law.fit(grid, resamples=config.resamples, seed=config.train.seed)
        laws[kind] = {
            "law": power_law.rounded(found.law),
            "interval": {name: [float(f"{edge:.4g}") for edge in edges] for name, edges in found.intervals().items()},
            "size_exponent": round(found.law.size_exponent, 4),
            "mean_error_of_the_grid": round(float(power_law.relative_error(found.law, grid).mean()), 5),
            "held_out": _predictions(found, predicted),
        }
    settings = dataclasses.asdict(config)
    settings.pop("output_dir")
    runs = [
        {
            "name": point.run.name,
            "held_out": point.run.held_out,
            "width": point.run.width,
            "layers": point.run.config.model.num_hidden_layers,
            "steps": point.run.config.steps,
            "parameters": point.parameters,
            "tokens": round(point.tokens),
            "losses": point.losses,
        }
        for point in sorted(points, key=lambda point: (point.parameters, point.tokens))
    ]
    return {"config": settings, "runs": runs, "laws": laws}


def _predictions(found: Fit, predicted: Measured) -> list[dict[str, Any]]:
    rows = []
    errors = power_law.relative_error(found.law, predicted)
    for parameters, tokens, loss, error in zip(predicted.parameters, predicted.tokens, predicted.loss, errors, strict=True):
        low, high = found.interval(lambda law, at=(parameters, tokens): float(law(*at)))
        value = float(found.law(parameters, tokens))
        rows.append(
            {
                "parameters": int(parameters),
                "tokens": round(tokens),
                "measured": round(float(loss), 5),
                "predicted": round(value, 5),
                "interval": [round(low, 5), round(high, 5)],
                "relative_error": round(float(error), 5),
            }
        )
    return rows


def _write(results: dict[str, Any], points: list[Point], config: ScalingLawConfig, output: Path) -> None:
    drawings = {}
    for kind, law in results["laws"].items():
        drawings[kind] = _surface(kind, power_law.Law(**law["law"]), points)
        write_text_atomic(output / f"surface-{kind}.svg", drawings[kind])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template(TEMPLATE).render(results=results, drawings=drawings, made=time.strftime("%Y-%m-%d"))
    write_text_atomic(output / REPORT, page)
    write_text_atomic(output / RESULTS, json.dumps(results, indent=1) + "\n")


def _surface(kind: str, law: power_law.Law, points: list[Point]) -> str:
    """The law over N and D with the runs in it, and what it predicts against what was measured, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    grid, held_out = _measured(points, kind, held_out=False), _measured(points, kind, held_out=True)
    every_n, every_d = (np.concatenate([getattr(grid, name), getattr(held_out, name)]) for name in ("parameters", "tokens"))
    n, d = (np.geomspace(values.min() / 1.3, values.max() * 1.3, 80) for values in (every_n, every_d))
    figure, (surface, line) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    filled = surface.contourf(n, d, law(n[None], d[:, None]), levels=16, cmap="viridis")
    surface.scatter(grid.parameters, grid.tokens, c="white", edgecolors="black", s=24, label="fitted")
    surface.scatter(held_out.parameters, held_out.tokens, c="red", marker="*", s=90, label="held out")
    surface.set(xscale="log", yscale="log", xlabel="N: parameters", ylabel="D: positions seen", title=f"{kind}: nats a token")
    figure.colorbar(filled, ax=surface)
    surface.legend(loc="lower right", fontsize=8)
    line.scatter(law(grid.parameters, grid.tokens), grid.loss, c="black", s=18, label="fitted")
    line.scatter(law(held_out.parameters, held_out.tokens), held_out.loss, c="red", marker="*", s=90, label="held out")
    ends = [min(grid.loss.min(), held_out.loss.min()), grid.loss.max()]
    line.plot(ends, ends, color="gray", linewidth=0.8)
    line.set(xlabel="predicted", ylabel="measured", title="nats a token")
    line.legend(fontsize=8)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]
