"""Videos from a text, and videos continued, past the context by a sliding window.

A window is a document of a few frames. The last of those that are there are shown, the model writes the others, and the window moves on; so
a video may be of any length, and nothing older than the window is remembered.

Axes: T frames, F frames of codes (of Emu3's published weights each stands for four frames in time), h w rows and columns of codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emu3_vla.documents import Begin, Image, Text, Video, forms, parse, write
from emu3_vla.generation.grammar import Grammar
from emu3_vla.generation.pieces import image, sequence, video_codes
from emu3_vla.generation.requests import Request
from emu3_vla.pipelines.agreement import each_sample, most_agreed
from emu3_vla.pipelines.base import Decoding, PipelineBase, Written, checked_frames
from emu3_vla.pipelines.drawing import drawn_grids
from emu3_vla.pipelines.errors import WrongFrames, WrongSize
from emu3_vla.vocabulary import Emu3Vocabulary

FILMED = Decoding(temperature=1.0, top_k=2048)
CONTINUED = Decoding()
WINDOW, KEPT = 4, 2
"""Frames of codes in a document, as training's mixture.moments, and of them shown where there are as many."""


def film(
    pipeline: PipelineBase,
    text: str,
    *,
    frames: int,
    ratio: str = "",
    area: int = 0,
    window: int = WINDOW,
    kept: int = KEPT,
    decoding: Decoding = FILMED,
) -> np.ndarray:
    """Film what a text says happens, through the checkpoint's first camera.

    frames: how many, and for Emu3's published weights a multiple of four. ratio, area: as in `draw`. window, kept: frames of codes in a
    document, and how many of the last ones are shown to the next.

    Returns uint8 (frames, H, W, 3). Raises WrongFrames, WrongSize, PromptTooLong, LacksPart, PipelineError.
    """
    texts = pipeline.texts(text, "text of what is to be filmed")
    grid = drawn_grids(pipeline, ratio, area)[0]
    total = coded_count(pipeline, frames)
    codes = continued(pipeline, texts, np.zeros((0, grid.rows, grid.columns), np.int64), total, window, kept, decoding)
    return pipeline.pixels(codes, clips=pipeline.codes_clips)


def extend(
    pipeline: PipelineBase,
    shown: np.ndarray,
    *,
    frames: int,
    text: str = "",
    window: int = WINDOW,
    kept: int = KEPT,
    decoding: Decoding = CONTINUED,
) -> np.ndarray:
    """Continue a video of the checkpoint's first camera.

    shown: uint8 (T, H, W, 3), of which the last frames that the window has room for are looked at. frames: how many to add. text: what
    happens, such as the instruction. window, kept: see `film`.

    Returns what was added: uint8 (frames, H, W, 3) at the size at which the checkpoint reads it. Raises what `film` raises.
    """
    clips = pipeline.codes_clips
    shown = checked_frames(shown, pipeline.vision.frames_per_code if clips else 1)
    total, camera = coded_count(pipeline, frames), camera_of(pipeline)
    _check_window(window, kept)
    last = kept * (pipeline.vision.frames_per_code if clips else 1)
    codes = pipeline.code_frames(shown[-last:], camera, clips=clips)
    whole = continued(pipeline, pipeline.texts(text), codes, len(codes) + total, window, kept, decoding)
    return pipeline.pixels(whole[len(codes) :], clips=clips)


def camera_of(pipeline: PipelineBase) -> str:
    """The camera whose frames films are of; "" for a checkpoint without."""
    return pipeline.cameras[0].name if pipeline.cameras else ""


def coded_count(pipeline: PipelineBase, frames: int) -> int:
    """How many frames of codes so many frames are. Raises WrongFrames."""
    each = pipeline.vision.frames_per_code if pipeline.codes_clips else 1
    if frames < 1 or frames % each:
        raise WrongFrames(
            f"frames={frames}, expected at least 1" + (f" and a multiple of {each}, which are coded together" if each > 1 else "")
        )
    return frames // each


def continued(
    pipeline: PipelineBase, text: list[Text], codes: np.ndarray, total: int, window: int, kept: int, decoding: Decoding
) -> np.ndarray:
    """Codes (shown, h, w) and what follows them, `total` frames in all: int64 (total, h, w)."""
    _check_window(window, kept)
    done, expected, samples = 0, None, each_sample(decoding)
    for number in range(total):
        if len(codes) >= total:
            break
        shown = codes[max(0, len(codes) - kept) :]
        new = min(window - len(shown), total - len(codes))
        requests = [film_request(pipeline, text, shown, new, one, number) for one in samples]
        # Of the windows to come nobody knows the exact length before they come; their frames are alike.
        expected = expected or requests[0].grammar.longest * len(samples) * (total - len(codes)) // new
        written = pipeline.run(requests, done=done, total=expected)
        done += sum(len(one.items) for one in written)
        codes = np.concatenate([codes, agreed_codes(pipeline, shown, new, written)])
    return codes


def film_request(pipeline: PipelineBase, text: list[Text], shown: np.ndarray, new: int, decoding: Decoding, number: int = 0) -> Request:
    """To write `new` frames behind a text and the first frames, codes (shown, h, w)."""
    vocabulary, camera = pipeline.vocabulary, camera_of(pipeline)
    frames, (rows, columns) = len(shown) + new, shown.shape[1:]
    if frames * rows * columns > pipeline.context * vocabulary.codes_per_block:
        raise WrongSize(
            f"{frames} frames of {rows}×{columns} codes are more than this checkpoint's context of {pipeline.context} positions; "
            "choose a smaller window or area"
        )
    if isinstance(vocabulary, Emu3Vocabulary):
        piece = video_codes(vocabulary, new, rows, columns)
    else:
        piece = sequence(*[*pipeline.foretold, image(vocabulary, rows, columns, camera)] * new)
    return pipeline.request(
        lambda text: forms.open_film(text, shown, frames, vocabulary, camera), text, Grammar(piece), decoding, number=number
    )


def agreed_codes(pipeline: PipelineBase, shown: np.ndarray, new: int, written: Sequence[Written]) -> np.ndarray:
    """Of the frames that several requests for the same wrote, those nearest to all: int64 (new, h, w)."""
    filmed = [filmed_codes(pipeline, shown, new, one) for one in written]
    return filmed[most_agreed(pipeline, [[codes] for codes in filmed], clips=pipeline.codes_clips)]


def filmed_codes(pipeline: PipelineBase, shown: np.ndarray, new: int, written: Written) -> np.ndarray:
    """The frames that a request wrote: int64 (new, h, w)."""
    vocabulary, ids = pipeline.vocabulary, pipeline.stream_ids(written)
    if not isinstance(vocabulary, Emu3Vocabulary):
        return np.stack([part.codes for part in parse(ids, vocabulary) if isinstance(part, Image)])
    opened = write([Begin(), *forms.open_film([], shown, len(shown) + new, vocabulary, "")], vocabulary)
    (whole,) = [part for part in parse([*opened, *ids], vocabulary) if isinstance(part, Video)]
    return whole.codes[len(shown) :]


def _check_window(window: int, kept: int) -> None:
    if not 1 <= kept < window:
        raise WrongFrames(f"window={window} and kept={kept}, expected 1 to {max(1, window - 1)} frames kept of a window of at least 2")
