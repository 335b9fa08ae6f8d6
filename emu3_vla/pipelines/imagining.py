"""What the cameras will see if the arm does this: the checkpoint as a world model.

Axes: N chunks, T control steps of a chunk (its horizon), A action dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emu3_vla.documents import ActionChunk, Image, Text, forms, parse
from emu3_vla.documents.forms import Look
from emu3_vla.generation.grammar import Grammar
from emu3_vla.generation.pieces import image, sequence
from emu3_vla.generation.requests import Request
from emu3_vla.pipelines.agreement import each_sample, most_agreed
from emu3_vla.pipelines.base import Decoding, Picture, Pictures, PipelineBase, Written
from emu3_vla.pipelines.drawing import images_of
from emu3_vla.pipelines.errors import LacksPart, WrongActions

FORESEEN = Decoding()


def imagine(
    pipeline: PipelineBase, instruction: str, pictures: Pictures, actions: np.ndarray, *, decoding: Decoding = FORESEEN
) -> list[dict[str, Picture]]:
    """Predict what the cameras see after each chunk of candidate actions.

    instruction: what the arm is about. pictures: of now, one of each camera, uint8 (H, W, 3). actions: float (T, A), or (N, T, A) for
    chunks one after another, in the units of envs.spec.ACTION, T and A as the checkpoint's policy.yaml says. Of more chunks than the model
    was trained to remember, the oldest are forgotten.

    Returns N times uint8 (H, W, 3) by camera, at the size at which the checkpoint reads it. Raises WrongActions, WrongPictures,
    PromptTooLong, LacksPart, PipelineError.
    """
    chunks = [ActionChunk(ids) for ids in action_ids(pipeline, actions)]
    texts, look = pipeline.texts(instruction, "instruction"), pipeline.look(pictures)
    if not pipeline.cameras:
        raise LacksPart(f"{pipeline.checkpoint.folder} names no cameras, so it was not trained to act on their pictures")
    looks: list[Look] = [look]
    remembered, samples = max(1, pipeline.checkpoint.policy.trained_history), each_sample(decoding)
    done = 0
    for number in range(len(chunks)):
        first = max(0, number + 1 - remembered)
        seen = [pictures_in(looks[first]), *looks[first + 1 :]]  # of the first, nothing was foretold in training
        requests = [world_request(pipeline, texts, seen, chunks[first : number + 1], one, number) for one in samples]
        written = pipeline.run(requests, done=done, total=requests[0].grammar.longest * len(samples) * len(chunks))
        done += sum(len(one.items) for one in written)
        looks.append(agreed_look(pipeline, written))
    return [pipeline.shown(pictures_in(look)) for look in looks[1:]]


def agreed_look(pipeline: PipelineBase, written: Sequence[Written]) -> Look:
    """Of what several requests for the same wrote, the look nearest to all."""
    looks = [foreseen_look(pipeline, one) for one in written]
    return looks[most_agreed(pipeline, [[image.codes for image in pictures_in(look)] for look in looks])]


def foreseen_look(pipeline: PipelineBase, written: Written) -> Look:
    """What a request of `world_request` wrote: images, and before them what was foretold of them."""
    said = [part for part in parse(pipeline.stream_ids(written), pipeline.vocabulary) if isinstance(part, Text)]
    return [*said, *images_of(pipeline, written, pipeline.cameras)]


def pictures_in(look: Look) -> list[Image]:
    """Its images."""
    return [part for part in look if isinstance(part, Image)]


def action_ids(pipeline: PipelineBase, actions: np.ndarray) -> list[list[int]]:
    """Ids of the action tokenizer of each chunk (T, A) or (N, T, A). Raises WrongActions, LacksPart."""
    tokenizer, normalizer, policy = pipeline.actions
    try:
        actions = np.asarray(actions, np.float64)
    except (TypeError, ValueError) as error:
        raise WrongActions(f"actions are no array of numbers: {error}") from error
    expected = (policy.horizon, policy.action_dim)
    chunks = actions[None] if actions.ndim == 2 else actions
    if chunks.ndim != 3 or not len(chunks) or chunks.shape[1:] != expected:
        raise WrongActions(f"actions have shape {actions.shape}, expected {expected} for a chunk of this checkpoint, or several of them")
    if not np.isfinite(chunks).all():
        raise WrongActions("actions hold NaN or infinity, expected numbers")
    return tokenizer.encode(normalizer.normalize(chunks))


def world_request(
    pipeline: PipelineBase,
    instruction: list[Text],
    looks: Sequence[Look],
    chunks: Sequence[ActionChunk],
    decoding: Decoding,
    number: int = 0,
) -> Request:
    """To write what all cameras see after the last chunk: as many looks as chunks."""
    pictures = (image(pipeline.vocabulary, *one.codes.shape, one.name) for one in pictures_in(looks[-1]))
    grammar = Grammar(sequence(*pipeline.foretold, *pictures))
    return pipeline.request(lambda text: forms.acted(text, looks, chunks), instruction, grammar, decoding, number=number)
