"""Pictures from a caption, and pictures completed where a mask hides them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from emu3_vla.documents import Image, Text, forms, generation_grid, parse
from emu3_vla.generation.completion import Completion
from emu3_vla.generation.grammar import Grammar
from emu3_vla.generation.pieces import image, sequence
from emu3_vla.generation.requests import Request
from emu3_vla.pipelines.base import Decoding, Picture, PipelineBase, Written, checked_picture
from emu3_vla.pipelines.errors import WrongMask, WrongPictures, WrongSize
from emu3_vla.vocabulary import CompactVocabulary, ImageGrid

DRAWN = Decoding(temperature=1.0, top_k=2048)
"""As Emu3 draws, but without its guidance of 3, which a model must have seen empty captions for."""
RATIO, AREA = "1:1", 518400
"""Of a picture where nobody says. Source: Emu3's published 720² pixels."""


def draw(
    pipeline: PipelineBase, caption: str, *, count: int = 1, ratio: str = "", area: int = 0, decoding: Decoding = DRAWN
) -> list[dict[str, Picture]]:
    """Draw pictures of what a caption says.

    caption: what there is to see. An empty one is allowed: what the model draws of its own accord. count: drawings, from one seed each.
    ratio, area: "width:height" and about how many pixels, where the vocabulary allows any size; by default the cameras' own pictures, and
    for a checkpoint without cameras RATIO and AREA.

    Returns of each drawing uint8 (H, W, 3) by camera, or under "image". Raises WrongSize, PromptTooLong, LacksPart, PipelineError.
    """
    if count < 1:
        raise WrongSize(f"count is {count}, expected at least 1 drawing")
    grids = drawn_grids(pipeline, ratio, area)
    requests = [draw_request(pipeline, pipeline.texts(caption), grids, decoding, number) for number in range(count)]
    return [pipeline.shown(images_of(pipeline, written, grids)) for written in pipeline.run(requests)]


def drawn_grids(pipeline: PipelineBase, ratio: str = "", area: int = 0) -> tuple[ImageGrid, ...]:
    """Names and sizes, in codes, of the pictures of one drawing. Raises WrongSize."""
    given = bool(ratio or area)
    if isinstance(pipeline.vocabulary, CompactVocabulary) and given:
        patch = pipeline.vision.patch
        sizes = ", ".join(f"{grid.name} {grid.columns * patch}×{grid.rows * patch}" for grid in pipeline.cameras)
        raise WrongSize(f"this checkpoint's vocabulary has pictures of its own sizes alone ({sizes}): leave out ratio and area")
    if pipeline.cameras and not given:
        return pipeline.cameras
    try:
        rows, columns = generation_grid(ratio or RATIO, area or AREA, pipeline.vision.patch)
    except ValueError as error:
        raise WrongSize(str(error)) from error
    if rows * columns > pipeline.context:
        raise WrongSize(
            f"a picture of ratio {ratio or RATIO} and area {area or AREA} has {rows}×{columns} codes, more than this checkpoint's context "
            f"of {pipeline.context} positions; choose a smaller area"
        )
    return (ImageGrid(name="", rows=rows, columns=columns),)


def draw_request(pipeline: PipelineBase, caption: list[Text], grids: Sequence[ImageGrid], decoding: Decoding, number: int = 0) -> Request:
    """To write pictures of these grids behind a caption."""
    pictures = (image(pipeline.vocabulary, grid.rows, grid.columns, grid.name) for grid in grids)
    grammar = Grammar(sequence(*pipeline.foretold, *pictures))
    return pipeline.request(forms.captioned, caption, grammar, decoding, number=number)


def foretold_ids(pipeline: PipelineBase, caption: list[Text], decoding: Decoding) -> list[int]:
    """What the model says behind a caption of what its pictures will show; nothing where it was not trained to."""
    if not pipeline.foretold:
        return []
    request = pipeline.request(forms.captioned, caption, Grammar(sequence(*pipeline.foretold)), decoding)
    return pipeline.run([request])[0].items


def images_of(pipeline: PipelineBase, written: Written, grids: Sequence[ImageGrid]) -> list[Image]:
    """The images that a request wrote, whole, by their names, which Emu3's stream does not hold."""
    images = [part for part in parse(pipeline.stream_ids(written), pipeline.vocabulary) if isinstance(part, Image)]
    return [replace(image, name=grid.name) for image, grid in zip(images, grids, strict=True)]


def complete(
    pipeline: PipelineBase, picture: Picture, mask: np.ndarray, *, caption: str = "", camera: str = "", decoding: Decoding = DRAWN
) -> Picture:
    """Draw anew what a mask hides of a picture; the rest stays, as far as the vision tokenizer can show it.

    picture: uint8 (H, W, 3). mask: bool (H, W), true where to draw; a code is drawn if any of its pixels is. camera: which one's picture it
    is, by default the checkpoint's first. The model should have been trained on this order: see emu3_vla.generation.completion.

    Returns uint8 (h, w, 3) at the size at which the checkpoint reads it. Raises WrongMask, WrongPictures, WrongSize, GrammarError.
    """
    picture, mask = checked_picture(picture), np.asarray(mask)
    if mask.dtype != bool or mask.shape != picture.shape[:2]:
        raise WrongMask(f"the mask is {mask.dtype} of shape {mask.shape}, expected bool {picture.shape[:2]}, as the picture has it")
    if not mask.any():
        raise WrongMask("the mask hides nothing, so there is nothing to draw")
    names = [grid.name for grid in pipeline.cameras]
    if camera and camera not in names:
        raise WrongPictures(f"camera={camera!r}, expected one of {', '.join(names) or 'none: this checkpoint has no cameras'}")
    name = camera or (names[0] if names else "")
    codes = pipeline.code(picture, name)
    hidden = F.adaptive_max_pool2d(torch.from_numpy(mask).float()[None], codes.shape)[0] > 0
    job = Completion(pipeline.vocabulary, Image(name, codes), hidden.numpy())
    request = pipeline.request(lambda text: job.prompt(forms.captioned(text)), pipeline.texts(caption), job.grammar, decoding)
    (written,) = pipeline.run([request])
    return pipeline.pixels(job.codes(written.items)[None])[0]
