"""A checkpoint's paths on the held-out frames of a token store: what it wrote beside what is true. Who counts is the caller.

Moments are one to an episode, so that they do not depend on each other. The truth of a picture is its stored codes, decoded: what the
vision tokenizer loses is no fault of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from emu3_vla.data.tokens import TokenizedEpisode
from emu3_vla.documents import ActionChunk, Image, Text
from emu3_vla.pipelines import asking, drawing, filming, imagining
from emu3_vla.pipelines.agreement import each_sample, most_agreed_answer
from emu3_vla.pipelines.base import Decoding, PipelineBase
from emu3_vla.pipelines.state_probe import Said, StateProbe
from emu3_vla.training.kinds import CAPTION
from emu3_vla.training.stream import documents_of, images_of, said
from envs.spec import RGB_STATIC

PROBE_FRAMES = 8000
"""Real pictures that a probe of drawings is trained on, at most."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A frame of an episode; with what comes after it, further ones."""

    episode: TokenizedEpisode
    frames: tuple[int, ...]

    @property
    def look(self) -> list[Image]:
        return images_of(self.episode, self.frames[0])

    def caption(self, pipeline: PipelineBase) -> str:
        """What is said of the first frame."""
        return pipeline.text.decode(self.episode.asked.pair(self.frames[0], CAPTION)[1].tolist())


@dataclass(frozen=True, kw_only=True)
class Answered:
    """finish: "length" where the answer did not end by itself."""

    question: str
    truth: str
    answer: str
    finish: str


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """A picture of one camera after the last that was shown. error, repeated_error: mean squared error, of pixels in [0, 1], of what was
    predicted, and of the last one again.

    ahead: how many pictures after the last. pictures: uint8 (H, W, 3), of the last that was shown, what was predicted, and the truth.
    """

    camera: str
    ahead: int
    error: float
    repeated_error: float
    pictures: tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """caption: what was to be drawn. images: what was. truth: pictures of which the caption was said."""

    caption: str
    images: list[Image]
    truth: list[Image]


def every_moment(episodes: Sequence[TokenizedEpisode], count: int) -> list[Moment]:
    """At most `count` of all moments, evenly spread over all frames."""
    return _spread([Moment(episode=episode, frames=(frame,)) for episode in episodes for frame in range(len(episode.frame_step))], count)


def state_probe(pipeline: PipelineBase, seen: Sequence[Moment], said: Callable[[str], Said]) -> StateProbe:
    """A probe that is trained on what these moments show. said: what a caption says, thing by thing."""
    return StateProbe(pipeline.vision, [moment.look for moment in seen], [said(moment.caption(pipeline)) for moment in seen])


def moments(episodes: Sequence[TokenizedEpisode], count: int, seed: int, *, run: int = 1) -> list[Moment]:
    """At most `count` moments of as many episodes, evenly spread over them; the frame within each by chance. run: frames in a row."""
    random, possible = np.random.default_rng(seed), [episode for episode in episodes if len(episode.frame_step) >= run]
    chosen = []
    for episode in _spread(possible, count):
        first = int(random.integers(len(episode.frame_step) - run + 1))
        chosen.append(Moment(episode=episode, frames=tuple(range(first, first + run))))
    return chosen


def consequences(episodes: Sequence[TokenizedEpisode], count: int, horizon: int, seed: int) -> list[Moment]:
    """Likewise, with the frame that comes a chunk of `horizon` control steps later."""
    random = np.random.default_rng(seed)
    pairs = [[pair for pair in documents_of(episode, 2, horizon, disturbed=True) if len(pair) == 2] for episode in episodes]
    possible = [(episode, own) for episode, own in zip(episodes, pairs, strict=True) if own]
    return [Moment(episode=episode, frames=own[random.integers(len(own))]) for episode, own in _spread(possible, count)]


def answers(
    pipeline: PipelineBase,
    asked: Sequence[Moment],
    longest: int = asking.LONGEST,
    decoding: Decoding = asking.LIKELIEST,
    *,
    state: bool = True,
) -> list[Answered]:
    """Every stored question about each moment, answered. state: asked with the arm's state, where the checkpoint and the store know it."""
    samples, decode = each_sample(decoding), pipeline.text.decode
    told = pipeline.state_words if state else None
    seen = [[*moment.look, *said(told, moment.episode.state_FS, moment.frames[0])] for moment in asked for _ in samples]
    looks = _batched(asking.looked_at(pipeline, seen, samples * len(asked)), len(samples))
    pairs = [
        (own, *moment.episode.asked.pair(moment.frames[0], question))
        for moment, own in zip(asked, looks, strict=True)
        for question in range(moment.episode.asked.lengths_FQ2.shape[1])
    ]
    requests = [
        asking.ask_request(pipeline, [Text(question)], look, one, longest, number)
        for number, (own, question, _) in enumerate(pairs)
        for look, one in zip(own, samples, strict=True)
    ]
    found = []
    for (_, question, truth), written in zip(pairs, _batched(pipeline.run(requests), len(samples)), strict=True):
        texts = [asking.words(pipeline, one) for one in written]
        chosen = most_agreed_answer(texts)
        asked_and_true = {"question": decode(question.tolist()), "truth": decode(truth.tolist())}
        found.append(Answered(**asked_and_true, answer=texts[chosen], finish=written[chosen].finish))
    return found


def descriptions(pipeline: PipelineBase, shown: Sequence[Moment], longest: int = asking.LONGEST) -> list[Answered]:
    """What each moment shows, greedily described."""
    requests = [asking.describe_request(pipeline, moment.look, asking.LIKELIEST, longest) for moment in shown]
    return [
        Answered(question="", truth=moment.caption(pipeline), answer=asking.words(pipeline, written), finish=written.finish)
        for moment, written in zip(shown, pipeline.run(requests), strict=True)
    ]


def drawings(pipeline: PipelineBase, shown: Sequence[Moment], decoding: Decoding = drawing.DRAWN) -> list[Drawn]:
    """What is said of each moment, drawn."""
    captions = [moment.caption(pipeline) for moment in shown]
    grids = drawing.drawn_grids(pipeline)
    requests = [drawing.draw_request(pipeline, pipeline.texts(caption), grids, decoding, number) for number, caption in enumerate(captions)]
    return [
        Drawn(caption=caption, images=drawing.images_of(pipeline, written, grids), truth=moment.look)
        for caption, moment, written in zip(captions, shown, pipeline.run(requests), strict=True)
    ]


def filmed(
    pipeline: PipelineBase, shown: Sequence[Moment], kept: int = filming.KEPT, decoding: Decoding = filming.CONTINUED
) -> list[Foreseen]:
    """Moments continued in one window: `kept` frames are shown, the others are predicted."""
    samples = each_sample(decoding)
    requests = [
        filming.film_request(pipeline, pipeline.texts(moment.episode.instruction), _static(moment)[:kept], len(moment.frames) - kept, one)
        for moment in shown
        for one in samples
    ]
    found = []
    for moment, written in zip(shown, _batched(pipeline.run(requests), len(samples)), strict=True):
        codes = _static(moment)
        predicted = filming.agreed_codes(pipeline, codes[:kept], len(codes) - kept, written)
        for ahead, (own, truth) in enumerate(zip(predicted, codes[kept:], strict=True), start=1):
            found.append(_foreseen(pipeline, RGB_STATIC, ahead, codes[kept - 1], own, truth))
    return found


def foreseen(pipeline: PipelineBase, shown: Sequence[Moment], decoding: Decoding = imagining.FORESEEN) -> list[Foreseen]:
    """What both cameras see a chunk later, given its actions."""
    samples = each_sample(decoding)
    requests = [
        imagining.world_request(
            pipeline,
            pipeline.texts(moment.episode.instruction),
            [moment.look],
            [ActionChunk(moment.episode.action_ids[moment.frames[0]])],
            one,
        )
        for moment in shown
        for one in samples
    ]
    found = []
    for moment, written in zip(shown, _batched(pipeline.run(requests), len(samples)), strict=True):
        after = images_of(moment.episode, moment.frames[1])
        predicted = imagining.pictures_in(imagining.agreed_look(pipeline, written))
        for before, own, truth in zip(moment.look, predicted, after, strict=True):
            found.append(_foreseen(pipeline, truth.name, 1, before.codes, own.codes, truth.codes))
    return found


def _batched(items: Sequence, count: int) -> list[Sequence]:
    """Parts of `count` each."""
    return [items[start : start + count] for start in range(0, len(items), count)]


def _static(moment: Moment) -> np.ndarray:
    return moment.episode.static_codes[list(moment.frames)].astype(np.int64)


def _foreseen(pipeline: PipelineBase, camera: str, ahead: int, last: np.ndarray, own: np.ndarray, truth: np.ndarray) -> Foreseen:
    pictures = pipeline.pixels(np.stack([last, own, truth]))
    errors = np.square((pictures[:2].astype(np.float64) - pictures[2]) / 255).mean((1, 2, 3))
    return Foreseen(camera=camera, ahead=ahead, repeated_error=errors[0], error=errors[1], pictures=tuple(pictures))


def _spread(items: Sequence, count: int) -> list:
    places = np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)) if items else []
    return [items[place] for place in places]
