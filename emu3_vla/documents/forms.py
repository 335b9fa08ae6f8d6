"""The forms of documents: which segments follow each other in each kind, as far as they are given.

A training document is a form with all its parts and often an End (emu3_vla.training.kinds, stream). A prompt is the same form without the
parts that the model is to write (emu3_vla.pipelines). So what a model is asked is what it was trained on.

Segments come in and go out; whether they are supervised is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import numpy as np

from emu3_vla.documents.segments import ActionChunk, Image, OpenVideo, Segment, Text, Video
from emu3_vla.vocabulary import Emu3Vocabulary, Vocabulary

Look = Sequence[Segment]
"""What all cameras show at one moment, in the order of the stream, and behind it what is said of that moment."""


def captioned(caption: Sequence[Text], look: Look = ()) -> list[Segment]:
    """What there is to see, then the pictures: caption → image. caption: one text, or none for the null prompt of guidance. The look may
    begin with what is foretold of it."""
    return [*caption, *look]


def described(look: Look, caption: Sequence[Text] = ()) -> list[Segment]:
    """The pictures, then what there is to see: image → caption."""
    return [*look, *caption]


def asked(look: Look, texts: Iterable[Text]) -> list[Segment]:
    """The pictures, then questions, each with its answer; the last may be without."""
    return [*look, *texts]


def filmed(
    text: Sequence[Text], codes_FHW: np.ndarray, vocabulary: Vocabulary, camera: str, foretold: Iterable[Sequence[Text]] = ()
) -> list[Segment]:
    """A text, then one camera's frames in time: a video where the vocabulary has some, else one image after another.

    foretold: of each image what is said before it, where that is done.
    """
    if isinstance(vocabulary, Emu3Vocabulary):
        return [*text, Video(codes_FHW)]
    frames = zip_longest(foretold, codes_FHW, fillvalue=())
    return [*text, *(part for said, codes in frames for part in (*said, Image(camera, codes)))]


def open_film(text: Sequence[Text], codes_FHW: np.ndarray, frames: int, vocabulary: Vocabulary, camera: str) -> list[Segment]:
    """`filmed` as far as the first frames, codes (shown, rows, columns), of `frames` in all; shown may be 0."""
    if isinstance(vocabulary, Emu3Vocabulary):
        return [*text, OpenVideo(frames, codes_FHW)]
    return [*text, *(Image(camera, codes) for codes in codes_FHW)]


def acted(instruction: Sequence[Text], looks: Sequence[Look], chunks: Sequence[ActionChunk]) -> list[Segment]:
    """An instruction, pictures, actions, the pictures after them, actions, ...; as many chunks as looks, or one fewer. A look that is to
    be predicted may begin with what is foretold of it."""
    document: list[Segment] = [*instruction]
    for look, chunk in zip_longest(looks, chunks):
        document += [*look, *([chunk] if chunk is not None else [])]
    return document


def interleaved(instruction: Sequence[Text], moments: Iterable[Sequence[Segment]] = ()) -> list[Segment]:
    """An instruction, then moments in order: what there is to see, what is foretold of its picture where that is done, and the picture."""
    return [*instruction, *(part for moment in moments for part in moment)]
