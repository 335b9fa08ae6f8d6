"""Of several predictions of what will be seen, or answers, the one that is nearest to all of them.

One that is drawn, or the likeliest code by code, may show an unlikely whole: an arm where hardly any other would be. The one with the
least mean squared distance to the others has the least expected error of them, by the model's own lights (minimum Bayes risk decoding;
Kumar and Byrne 2004). What it shows is still one thing that the model wrote, and no mean of many.

So with answers (self-consistency, arXiv 2203.11171), by their numbers: the likeliest number need not be near where most of the likelihood
lies. Answers in other words are further from each other than any two in the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from emu3_vla.pipelines.base import Decoding, PipelineBase
from emu3_vla.pipelines.errors import PipelineError

NUMBER = re.compile(r"\d+")


def each_sample(decoding: Decoding) -> list[Decoding]:
    """How each of `decoding.samples` predictions is drawn. Raises PipelineError where all would be the same, or there is none."""
    if decoding.samples < 1:
        raise PipelineError(f"samples is {decoding.samples}, expected at least 1")
    if decoding.samples > 1 and not decoding.temperature:
        raise PipelineError(f"samples={decoding.samples} with temperature=0 are all the same; set temperature, such as 0.5")
    seeds = np.random.SeedSequence(decoding.seed).generate_state(decoding.samples).tolist()
    one = replace(decoding, samples=1)
    return [one] if decoding.samples == 1 else [replace(one, seed=seed) for seed in seeds]


def most_agreed(pipeline: PipelineBase, predictions: Sequence[Sequence[np.ndarray]], *, clips: bool = False) -> int:
    """Number of the prediction that is nearest to all. predictions: of each the codes of its pictures or films, (h, w) or (F, h, w)."""
    if len(predictions) == 1:
        return 0
    shown = np.stack([np.concatenate([_pixels(pipeline, codes, clips) for codes in prediction]) for prediction in predictions])
    return int(((shown[:, None] - shown[None]) ** 2).mean(2).sum(1).argmin())


def most_agreed_answer(answers: Sequence[str]) -> int:
    """Number of the answer that is nearest to all; the first of equals."""
    shapes = [NUMBER.sub("#", answer) for answer in answers]
    values = [[int(number) for number in NUMBER.findall(answer)] for answer in answers]
    furthest = 1 + max((abs(a - b) for own in values for others in values for a, b in zip(own, others, strict=False)), default=0)

    def apart(one: int, other: int) -> float:
        if shapes[one] != shapes[other]:
            return furthest**2
        return float(np.mean([(a - b) ** 2 for a, b in zip(values[one], values[other], strict=True)])) if values[one] else 0.0

    return min(range(len(answers)), key=lambda one: sum(apart(one, other) for other in range(len(answers))))


def _pixels(pipeline: PipelineBase, codes: np.ndarray, clips: bool) -> np.ndarray:
    """float32 (n,)."""
    return pipeline.pixels(codes if codes.ndim == 3 else codes[None], clips=clips).astype(np.float32).ravel()
