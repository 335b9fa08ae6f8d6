"""`emu3-vla eval-generation`: how well a checkpoint answers, describes, draws and foresees, on frames that it was not trained on.

    emu3-vla eval-generation checkpoint=outputs/train/policy tokens=outputs/tokens output_dir=outputs/eval-generation
    emu3-vla eval-generation checkpoint=... tokens=... 'measures=[film,world]'

The token store must be one of the checkpoint's tokenizers; its held-out episodes are those that training with the same validation_fraction
held out. Questions and captions are CALVIN's (envs.calvin.questions). Every episode is looked at once, so pictures and drawings are
independent; the questions about one frame are not, which their intervals do not know.

    ask         right answers by kind of question, numbers within RIGHT_MM and RIGHT_DEG of envs.calvin.questions; those that are right word
                for word; of distances also how far off
    describe    clauses of descriptions that are right, by thing
    draw        clauses of a caption that a probe reads out of its drawing; beside the probe's own right share on real pictures, and the
                share that is right of another drawing's caption, as a drawing that takes no notice of its caption would have
    film        squared error of frames that continue a video, as PSNR, beside repeating the last frame
    world       the same of what the cameras see after a chunk of actions

Leaves results.json and report.html.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import policies
from emu3_vla import pipelines
from emu3_vla.data.episodes import write_text_atomic
from emu3_vla.data.tokens import TokenizedEpisode, TokenStore, hashes
from emu3_vla.pipelines import Pipelines, asking, filming, scoring
from emu3_vla.pipelines.drawing import DRAWN
from envs.calvin.questions import RIGHT_DEG, RIGHT_MM, WAYS, clauses, is_number, is_right, kind_of, way_mm
from eval.provenance import git_commit
from eval.statistics import bootstrap_mean_interval, wilson_interval

MEASURES = ("ask", "describe", "draw", "film", "world")
NEED_QUESTIONS = {"ask", "describe", "draw"}
QUESTIONS = "envs.calvin.questions:Questions"
SHOWN = 8
"""Pictures of each measure on the page."""
PREDICTED, ANSWERED = 0.5, 1.0
"""Temperatures of predictions and of answers of which several are drawn: answers as likely as the model holds them to be."""


@dataclass(frozen=True, kw_only=True)
class EvalGenerationConfig:
    """Raises ValueError for values that cannot work."""

    tokens: str  # a token store of the checkpoint's tokenizers
    checkpoint: str = policies.SHIPPED  # a shipped name or a folder
    measures: tuple[str, ...] = MEASURES
    frames: int = 64  # held-out moments that are asked about and described, one an episode
    pictures: int = 48  # held-out moments that are drawn, filmed and foreseen, one an episode
    validation_fraction: float = 0.05  # of the shards, as in train
    window: int = filming.WINDOW  # frames of a film; the first `kept` are shown
    kept: int = filming.KEPT
    temperature: float = DRAWN.temperature  # of drawings; everything else is greedy
    state: bool = True  # questions come with the arm's state, as the policy is told it; false: with the pictures alone
    samples: int = 1  # answers at ANSWERED, films and consequences at PREDICTED; of each the one nearest to all counts. 1: greedy
    longest: int = asking.LONGEST  # text ids of an answer or a description, at most
    rows: int = 8  # requests at once
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    output_dir: str = ""

    def __post_init__(self):
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown or not self.measures:
            raise ValueError(f"measures={list(self.measures)}, expected some of {', '.join(MEASURES)}")
        for name in ("frames", "pictures", "samples", "longest", "rows", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 1 <= self.kept < self.window:
            raise ValueError(f"window={self.window} and kept={self.kept}, expected some frames kept, and some to predict")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}, expected between 0 and 1")


@dataclass(frozen=True)
class Found:
    """One measure: figures, and a picture of examples with what its rows are, where it is about pictures."""

    figures: dict[str, Any]
    sheet: np.ndarray | None = None
    rows: str = ""


def main(config: EvalGenerationConfig) -> None:
    """Measure, and write the results. Raises TokenStoreError for a store of other tokenizers, ValueError for one without questions."""
    torch.set_num_threads(config.threads)
    store = TokenStore.open(config.tokens)
    folder = pipelines.find(config.checkpoint)
    store.require_hashes(hashes(Path(folder)), f"the checkpoint {folder}")
    if NEED_QUESTIONS & set(config.measures) and store.metadata.get("questions") != QUESTIONS:
        raise ValueError(
            f"tokens={config.tokens} was asked by {store.metadata.get('questions') or 'nobody'}, expected {QUESTIONS}: tokenize with "
            "questions=" + QUESTIONS + ", or leave out the measures ask, describe and draw"
        )
    train, held_out = store.split(config.validation_fraction)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    found: dict[str, Found] = {}
    with Progress(*columns) as progress:
        model = pipelines.load(folder, device=config.device, rows=config.rows)
        for name in config.measures:
            task = progress.add_task(name, total=None)
            model.progress = lambda done, total, task=task: progress.update(task, completed=done, total=total)
            found[name] = _MEASURES[name](model, config, train, held_out, store)
            progress.update(task, total=1, completed=1)
    _write(config, model, found)


def _ask(model: Pipelines, config: EvalGenerationConfig, train, held_out: list[TokenizedEpisode], store: TokenStore) -> Found:
    told = _told(config, model)
    if told and store.state_words != model.state_words.words:
        raise ValueError(
            f"tokens={config.tokens} says the arm's state otherwise than {config.checkpoint} is told it, or not at all; tokenize with the "
            "checkpoint, or ask of the pictures alone with state=false"
        )
    shown = scoring.moments(held_out, config.frames, config.seed)
    answered = scoring.answers(model, shown, config.longest, _drawn(config, ANSWERED), state=told)
    by_kind: dict[str, list[scoring.Answered]] = defaultdict(list)
    for one in answered:
        by_kind[kind_of(one.question)].append(one)
    named = [one for kind, ones in by_kind.items() if not is_number(kind) for one in ones]
    figures = {"all": _answered(answered), "all but numbers": _answered(named)}
    for kind, ones in by_kind.items():
        figures[kind] = _answered(ones) | (_off_mm(ones, config.seed) if kind.startswith(WAYS) else {})
    return Found(figures)


def _told(config: EvalGenerationConfig, model: Pipelines) -> bool:
    """Whether questions come with the arm's state."""
    return config.state and model.state_words is not None


def _answered(answered: Sequence[scoring.Answered]) -> dict[str, Any]:
    """How many are right; how many word for word; how many were cut short."""
    right = _share(is_right(one.question, one.answer, one.truth) for one in answered)
    return right | {"word_for_word": _share(one.answer == one.truth for one in answered)["share"], "cut_short": _cut_short(answered)}


def _cut_short(answered: Sequence[scoring.Answered]) -> int:
    return sum(one.finish == "length" for one in answered)


def _off_mm(answered: Sequence[scoring.Answered], seed: int) -> dict[str, Any]:
    """How far from the true place the answered one is; answers that are no distance are counted apart."""
    off, unreadable = [], 0
    for one in answered:
        try:
            off.append(float(np.linalg.norm(way_mm(one.answer) - way_mm(one.truth))))
        except ValueError:
            unreadable += 1
    if not off:
        return {"no_distance": unreadable}
    return {
        "no_distance": unreadable,
        "mean_mm": round(float(np.mean(off)), 1),
        "mean_mm_ci95": [round(bound, 1) for bound in bootstrap_mean_interval(off, seed)],
        "median_mm": round(float(np.median(off)), 1),
    }


def _describe(model: Pipelines, config: EvalGenerationConfig, train, held_out: list[TokenizedEpisode], store: TokenStore) -> Found:
    told = scoring.descriptions(model, scoring.moments(held_out, config.frames, config.seed), config.longest)
    pairs = [(clauses(one.answer), clauses(one.truth)) for one in told]
    whole = _share(one.answer == one.truth for one in told) | {"cut_short": _cut_short(told)}
    return Found({"whole": whole} | _by_thing(pairs))


def _draw(model: Pipelines, config: EvalGenerationConfig, train: list[TokenizedEpisode], held_out, store: TokenStore) -> Found:
    seen = scoring.every_moment(train, scoring.PROBE_FRAMES)
    probe = scoring.state_probe(model, seen, clauses)
    decoding = pipelines.Decoding(temperature=config.temperature, top_k=DRAWN.top_k, seed=config.seed)
    drawn = scoring.drawings(model, scoring.moments(held_out, config.pictures, config.seed), decoding)
    captions = [clauses(one.caption) for one in drawn]
    read, real = probe.read([one.images for one in drawn]), probe.read([one.truth for one in drawn])
    figures = {
        "drawn": _by_thing(list(zip(read, captions, strict=True))),
        "real_pictures": _by_thing(list(zip(real, captions, strict=True))),
        "another_caption": _by_thing(list(zip(read, captions[1:] + captions[:1], strict=True))),
        "probe_frames": len(seen),
    }
    some = drawn[:SHOWN]
    sheet = _sheet([[model.shown(one.images[:1]) for one in some], [model.shown(one.truth[:1]) for one in some]])
    return Found(figures, sheet, "drawn from the caption; a real picture of which the caption was said")


def _film(model: Pipelines, config: EvalGenerationConfig, train, held_out: list[TokenizedEpisode], store: TokenStore) -> Found:
    runs = scoring.moments(held_out, config.pictures, config.seed, run=config.window)
    return _compared(scoring.filmed(model, runs, config.kept, _drawn(config, PREDICTED)), config.seed, "frame")


def _world(model: Pipelines, config: EvalGenerationConfig, train, held_out: list[TokenizedEpisode], store: TokenStore) -> Found:
    pairs = scoring.consequences(held_out, config.pictures, store.metadata["horizon"], config.seed)
    return _compared(scoring.foreseen(model, pairs, _drawn(config, PREDICTED)), config.seed, "chunk")


def _drawn(config: EvalGenerationConfig, temperature: float) -> pipelines.Decoding:
    return pipelines.Decoding(temperature=temperature if config.samples > 1 else 0.0, samples=config.samples, seed=config.seed)


def _compared(found: Sequence[scoring.Foreseen], seed: int, unit: str) -> Found:
    """Figures of each camera and time ahead, and the pictures of the furthest."""
    if not found:
        raise ValueError("no held-out episode is long enough to foresee anything; choose a smaller window, or another store")
    groups: dict[tuple[str, int], list[scoring.Foreseen]] = defaultdict(list)
    for one in found:
        groups[one.camera, one.ahead].append(one)
    figures = {f"{camera}, {ahead} {unit}{'s' if ahead > 1 else ''} ahead": _errors(ones, seed) for (camera, ahead), ones in groups.items()}
    furthest = groups[found[0].camera, max(ahead for _, ahead in groups)][:SHOWN]
    sheet = _sheet([[{"": one.pictures[row]} for one in furthest] for row in range(3)])
    return Found(figures, sheet, "the last picture that was shown; what was predicted; the truth")


def _errors(ones: Sequence[scoring.Foreseen], seed: int) -> dict[str, Any]:
    """PSNR of mean errors (the mean of PSNRs would be infinite where a camera sees nothing move), and how sure the difference is."""
    own, repeated = np.array([one.error for one in ones]), np.array([one.repeated_error for one in ones])
    low, high = bootstrap_mean_interval(own, seed)
    gained = bootstrap_mean_interval(repeated - own, seed)
    return {
        "n": len(ones),
        "psnr_db": _db(own.mean()),
        "psnr_db_ci95": [_db(high), _db(low)],
        "repeated_psnr_db": _db(repeated.mean()),
        "error_saved": float((repeated - own).mean()),
        "error_saved_ci95": list(gained),
        "nearer_than_repeating": _share(bool(value) for value in own < repeated),
    }


def _db(error: float) -> float | None:
    """PSNR, or None where there is no error."""
    return round(-10 * math.log10(error), 2) if error > 0 else None


def _by_thing(pairs: Sequence[tuple[dict[str, str], dict[str, str]]]) -> dict[str, Any]:
    """Right share of each thing that the truth names. pairs: what was said, and the truth."""
    things = list(dict.fromkeys(thing for _, truth in pairs for thing in truth))
    shares = {thing: _share(said.get(thing) == truth[thing] for said, truth in pairs if thing in truth) for thing in things}
    return {"all": _share(said.get(thing) == state for said, truth in pairs for thing, state in truth.items())} | shares


def _share(right: Iterable[bool]) -> dict[str, Any]:
    """n, share and its interval."""
    right = list(right)
    if not right:
        return {"n": 0, "share": None, "ci95": None}
    return {
        "n": len(right),
        "share": round(sum(right) / len(right), 4),
        "ci95": [round(bound, 4) for bound in wilson_interval(sum(right), len(right))],
    }


def _sheet(rows: Sequence[Sequence[dict[str, np.ndarray]]]) -> np.ndarray:
    """Pictures of one size, row by row."""
    return np.concatenate([np.concatenate([picture for one in row for picture in one.values()], axis=1) for row in rows])


_MEASURES: dict[str, Callable[..., Found]] = {"ask": _ask, "describe": _describe, "draw": _draw, "film": _film, "world": _world}


def _write(config: EvalGenerationConfig, model: Pipelines, found: dict[str, Found]) -> None:
    output = Path(config.output_dir)
    results = {
        "checkpoint": config.checkpoint,
        "step": model.checkpoint.provenance.get("step"),
        "truth_of_pictures": "stored codes, decoded",
        "asked_with_state": _told(config, model),
        "right_within": {"mm": RIGHT_MM, "degrees": RIGHT_DEG},
        "measures": {name: one.figures for name, one in found.items()},
        "config": json.loads(json.dumps(asdict(config))),
        "git_commit": git_commit(),
    }
    pictures = {name: _encoded(one.sheet) for name, one in found.items() if one.sheet is not None}
    rows = {name: one.rows for name, one in found.items()}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("eval_generation.html.j2").render(results=results, pictures=pictures, rows=rows)
    write_text_atomic(output / "report.html", page)
    write_text_atomic(output / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    for name, one in found.items():
        print(f"{name}: {_headline(name, one.figures)}")
    print(output / "results.json")
    print(output / "report.html")


def _headline(name: str, figures: dict[str, Any]) -> str:
    if name in ("film", "world"):
        return "; ".join(f"{what} {one['psnr_db']} dB, repeating {one['repeated_psnr_db']} dB" for what, one in figures.items())
    shares = figures["drawn"] if name == "draw" else figures
    return ", ".join(f"{what} {one['share']:.1%}" for what, one in shares.items() if one["n"])


def _encoded(sheet: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()
