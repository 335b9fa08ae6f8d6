"""Steps in words, each with its picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from emu3_vla.documents import forms, parse
from emu3_vla.generation.grammar import Grammar, Item
from emu3_vla.generation.items import ids_of
from emu3_vla.generation.pieces import image, literal, repeat, sequence, text
from emu3_vla.generation.requests import Request
from emu3_vla.pipelines.base import Decoding, Picture, PipelineBase
from emu3_vla.pipelines.drawing import DRAWN, drawn_grids
from emu3_vla.pipelines.errors import WrongFrames
from emu3_vla.vocabulary import ImageGrid

STEPS, STEP_TEXT = 4, 96
"""At most: moments of a document, as training's mixture.moments, and text ids of each."""


@dataclass(frozen=True)
class Step:
    """text: what there is to see. picture: uint8 (H, W, 3)."""

    text: str
    picture: Picture


def interleave(
    pipeline: PipelineBase,
    instruction: str,
    *,
    steps: int = STEPS,
    step_text: int = STEP_TEXT,
    ratio: str = "",
    area: int = 0,
    decoding: Decoding = DRAWN,
) -> Iterator[Step]:
    """Tell and show how something is done, step by step, through the checkpoint's first camera.

    instruction: what is to be done. steps: at most; the model may stop before. step_text: text ids of a step, at most. ratio, area: as in
    `draw`.

    Yields steps as they are done. Raises WrongFrames, WrongSize, PromptTooLong, LacksPart, PipelineError before the first.
    """
    if steps < 1 or step_text < 1:
        raise WrongFrames(f"steps={steps} and step_text={step_text}, expected at least 1")
    texts = pipeline.texts(instruction, "instruction")
    grid = drawn_grids(pipeline, ratio, area)[0]
    vocabulary = pipeline.vocabulary
    said = text(vocabulary, longest=step_text, without=pipeline.number_ids)
    moment = sequence(said, *pipeline.foretold, image(vocabulary, grid.rows, grid.columns, grid.name))
    grammar = Grammar(sequence(repeat(moment, 1, steps), literal(vocabulary.eos)))
    return _steps(pipeline, pipeline.request(forms.interleaved, texts, grammar, decoding), grid)


def _steps(pipeline: PipelineBase, request: Request, grid: ImageGrid) -> Iterator[Step]:
    vocabulary = pipeline.vocabulary
    length = Grammar(image(vocabulary, grid.rows, grid.columns, grid.name)).longest
    begin, numbers, waiting, done = vocabulary.begin_image(grid.name), set(pipeline.number_ids), [], 0
    for event in pipeline.events([request]):
        done += len(event.items)
        pipeline.progress(done, request.grammar.longest)
        waiting += event.items
        while (at := _found(waiting, begin)) is not None and len(waiting) >= at + length:
            (picture,) = parse(ids_of(waiting[at : at + length], vocabulary), vocabulary)
            words = [index for index in waiting[:at] if index not in numbers]
            yield Step(pipeline.text.decode(words), pipeline.pixels(picture.codes[None])[0])
            del waiting[: at + length]


def _found(items: list[Item], index: int) -> int | None:
    return items.index(index) if index in items else None
