"""Answers about pictures, and descriptions of them, streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from emu3_vla.documents import Image, Prompts, Text, Video, forms
from emu3_vla.documents.forms import Look
from emu3_vla.generation.grammar import Grammar
from emu3_vla.generation.pieces import literal, sentence, sequence, text
from emu3_vla.generation.requests import Event, Request
from emu3_vla.pipelines.agreement import each_sample, most_agreed_answer
from emu3_vla.pipelines.base import Decoding, Pictures, PipelineBase, Written, checked_frames
from emu3_vla.pipelines.errors import PipelineError, WrongFrames, WrongPictures, WrongState
from emu3_vla.vocabulary import Emu3Vocabulary

LIKELIEST = Decoding()
LONGEST = 256
"""Text ids of an answer, at most."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream(Iterator[str]):
    """Pieces of a text as they are written. text: all so far. finish: None until the end; "length" where it was cut short."""

    def __init__(self, pipeline: PipelineBase, events: Iterator[Event]):
        self.text, self.finish = "", None
        self._pipeline, self._events = pipeline, events
        self._ids: list[int] = []

    def __next__(self) -> str:
        while self.finish is None:
            event = next(self._events)
            self.finish = event.finish
            self._ids += [index for index in event.items if index != self._pipeline.vocabulary.eos]
            whole = self._pipeline.text.decode(self._ids)
            if whole.endswith(REPLACEMENT) and self.finish is None:
                continue  # a character's bytes that the next id may complete
            piece, self.text = whole[len(self.text) :], whole
            if piece:
                return piece
        raise StopIteration

    def read(self) -> str:
        """All of the text, when it is written."""
        for _ in self:
            pass
        return self.text


def ask(
    pipeline: PipelineBase,
    question: str,
    pictures: Pictures | None = None,
    *,
    state: np.ndarray | None = None,
    frames: np.ndarray | None = None,
    longest: int = LONGEST,
    decoding: Decoding = LIKELIEST,
) -> TextStream:
    """Ask about pictures, or a video.

    pictures: uint8 (H, W, 3), see `Pictures`: one of each of the checkpoint's cameras, or any one for a checkpoint without cameras.
    state: robot_obs of the same moment, float (15,), [m, rad], for a checkpoint that is told it when it acts: it then knows from where it
    looks, and says to itself in numbers what it sees, before it answers. frames: uint8 (T, H, W, 3) instead of pictures, for Emu3's
    published weights. longest: text ids of the answer, at most. decoding: of several samples the answer nearest to all is kept, and comes
    as a whole.

    Returns an iterator over pieces of the answer. Raises WrongPictures, WrongState, WrongFrames, PromptTooLong, LacksPart, PipelineError.
    """
    texts = pipeline.texts(question, "question")
    if (pictures is None) == (frames is None):
        raise WrongPictures("a question is about pictures or about the frames of a video: give one of them")
    samples = each_sample(decoding)
    if not pipeline.published:
        if frames is not None:
            raise WrongFrames("this checkpoint is asked about the pictures of one moment, not about a video; give pictures")
        look = [*pipeline.look(pictures), *([] if state is None else [pipeline.felt(state)])]
        looks = looked_at(pipeline, [look] * len(samples), samples)
        requests = [ask_request(pipeline, texts, own, one, longest) for own, one in zip(looks, samples, strict=True)]
        return _agreed(pipeline, requests)
    if state is not None:
        raise WrongState("in the published form a question is about a picture or a video alone; ask without state")
    picture = _video(pipeline, frames) if frames is not None else _single(pipeline.look(pictures))
    prompts, grammar = Prompts(pipeline.text.encode), _until_end(pipeline)

    def prompt_of(text: list[Text]):
        # The question's words are encoded with the full stop that follows them, so the document is made of words, not of ids.
        return prompts.ask(question if text is texts else decoding.negative, picture)

    return _agreed(pipeline, [pipeline.request(prompt_of, texts, grammar, one, longest=_checked(longest)) for one in samples])


def looked_at(pipeline: PipelineBase, looks: Sequence[Look], decodings: Sequence[Decoding]) -> list[Look]:
    """Looks with what the model says that it sees behind them, where a look ends with the arm's state and the model was trained to. The
    same for every question about them. decodings: of each."""
    told = [bool(pipeline.seen) and isinstance(look[-1], Text) for look in looks]
    grammar = Grammar(sequence(*pipeline.seen)) if any(told) else None
    requests = [
        pipeline.request(lambda _, look=look: list(look), [], grammar, replace(one, guidance=1, negative=""), number=number)
        for number, (look, one, said) in enumerate(zip(looks, decodings, told, strict=True))
        if said
    ]
    written = iter(pipeline.run(requests) if requests else [])
    return [[*look, Text(next(written).items)] if said else list(look) for look, said in zip(looks, told, strict=True)]


def ask_request(
    pipeline: PipelineBase, question: list[Text], look: Look, decoding: Decoding, longest: int = LONGEST, number: int = 0
) -> Request:
    """To answer a question in the form of our training: the answer ends with its full stop. look: of `looked_at`."""
    grammar = Grammar(sentence(pipeline.vocabulary, _full_stops(pipeline.text), without=pipeline.number_ids))
    return pipeline.request(lambda text: forms.asked(look, text), question, grammar, decoding, number=number, longest=_checked(longest))


def describe(pipeline: PipelineBase, pictures: Pictures, *, longest: int = LONGEST, decoding: Decoding = LIKELIEST) -> TextStream:
    """Say what there is to see. Arguments, result and errors as of `ask`."""
    return _streamed(pipeline, describe_request(pipeline, pipeline.look(pictures), decoding, longest))


def describe_request(pipeline: PipelineBase, look: Sequence[Image], decoding: Decoding, longest: int = LONGEST) -> Request:
    """To write the caption of pictures and the end of the document."""
    grammar = _until_end(pipeline)
    if decoding.guidance != 1:
        raise PipelineError("a description has no text to be guided by; leave guidance at 1")
    return pipeline.request(lambda text: forms.described(look, text), [], grammar, decoding, longest=_checked(longest))


def _agreed(pipeline: PipelineBase, requests: Sequence[Request]) -> TextStream:
    """The answer that several requests agree on most; of a single one as it is written."""
    if len(requests) == 1:
        return _streamed(pipeline, requests[0])
    written = pipeline.run(requests)
    chosen = written[most_agreed_answer([words(pipeline, one) for one in written])]
    return TextStream(pipeline, iter([Event(0, chosen.items, chosen.finish)]))


def words(pipeline: PipelineBase, written: Written) -> str:
    """What was written, as text."""
    return pipeline.text.decode([item for item in written.items if item != pipeline.vocabulary.eos])


def _streamed(pipeline: PipelineBase, request: Request) -> TextStream:
    return TextStream(pipeline, pipeline.events([request]))


def _until_end(pipeline: PipelineBase) -> Grammar:
    """Words, and the end of the document."""
    return Grammar(sequence(text(pipeline.vocabulary, without=pipeline.number_ids), literal(pipeline.vocabulary.eos)))


def _checked(longest: int) -> int:
    if longest < 1:
        raise PipelineError(f"longest is {longest}, expected at least 1 text id")
    return longest


def _single(look: Sequence[Image]) -> Image:
    if len(look) != 1:
        raise WrongPictures(f"{len(look)} pictures were given; in the published form a question is about one picture, or about a video")
    return look[0]


def _video(pipeline: PipelineBase, frames: np.ndarray) -> Video:
    if not isinstance(pipeline.vocabulary, Emu3Vocabulary):
        raise WrongFrames("a compact vocabulary has no videos; give pictures")
    clips = pipeline.codes_clips
    frames = checked_frames(frames, pipeline.vision.frames_per_code if clips else 1)
    return Video(pipeline.code_frames(frames, pipeline.cameras[0].name if pipeline.cameras else "", clips=clips))


@lru_cache(maxsize=2)
def _full_stops(tokenizer) -> np.ndarray:
    """Ids whose text ends with a full stop."""
    return np.array([index for index in range(tokenizer.vocab_size) if tokenizer.decode([index]).endswith(".")])
