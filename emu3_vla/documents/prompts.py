"""Documents for each thing that a model does: what it is shown when it works, and what it is trained on.

    prompts = Prompts(text_tokenizer.encode)
    ids = write(prompts.draw("a shiba inu", *generation_grid("16:9", 518400)), vocabulary)

Both vocabularies take all of these, but for videos and reasoning, which only Emu3's has. Where the published formats call a mode by a
letter, the method says which. Source: baaivision/Emu3 and baaivision/UniVLA, emu3/mllm/processing_emu3.py and train/datasets.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from emu3_vla.documents.segments import (
    ActionChunk,
    Begin,
    DocumentError,
    End,
    Image,
    OpenAction,
    OpenImage,
    OpenReasoning,
    OpenVideo,
    Segment,
    Text,
    Video,
)

PIXELS_PER_CODE = 8

_BEFORE_PICTURE = "You are a helpful assistant. USER: "
_AFTER_QUESTION = ". ASSISTANT:"

Picture = Image | Video


def generation_grid(ratio: str, area: int, pixels_per_code: int = PIXELS_PER_CODE) -> tuple[int, int]:
    """Rows and columns of codes of an image to draw: ratio "width:height", area in pixels.

    Published: 518400 (720²) and 262144 (512²). Raises ValueError for a ratio or an area that is none, or too small for one code.
    """
    parts = ratio.split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise ValueError(f"ratio is {ratio!r}, expected width:height in whole numbers, such as '16:9'")
    width, height = map(int, parts)
    # Rounded in this order, as the original does: another order of the same arithmetic gives other grids at ties.
    scale = (area / (height * width)) ** 0.5 if area > 0 else 0.0
    rows, columns = round(height * scale / pixels_per_code), round(width * scale / pixels_per_code)
    if min(rows, columns) < 1:
        raise ValueError(f"an image of ratio {ratio} and area {area} has {rows}×{columns} codes, expected at least one each way")
    return rows, columns


def without_text(document: Sequence[Segment]) -> list[Segment]:
    """The null prompt of classifier-free guidance: the same document without its texts. For documents that text does not structure."""
    return [segment for segment in document if not isinstance(segment, Text)]


class Prompts:
    """Builds documents. encode: a text tokenizer's, text to ids. An empty text is left out, which makes a null prompt."""

    def __init__(self, encode: Callable[[str], Sequence[int]]):
        self._encode = encode

    def draw(self, caption: str, rows: int, columns: int, name: str = "") -> list[Segment]:
        """Prompt to draw an image of rows × columns codes (mode G). name: of a compact vocabulary's image."""
        return [Begin(), *self._text(caption), OpenImage(name, rows, columns)]

    def film(self, caption: str, codes: np.ndarray, frames: int) -> list[Segment]:
        """Prompt to film a video of `frames` frames, of which codes (shown, rows, columns) are given, or none (UniVLA's G)."""
        return [Begin(), *self._text(caption), OpenVideo(frames, np.asarray(codes))]

    def shown(self, caption: str, codes: np.ndarray, frames: int) -> list[Segment]:
        """Caption and the first frames, codes (shown, rows, columns), of a video said to have `frames` (UniVLA's IG)."""
        return [Begin(), *self._text(caption), Video(codes, frames)]

    def interleave(self, caption: str, codes: np.ndarray, frames: int) -> list[Segment]:
        """As `shown`, and then a prompt for another video of that size (UniVLA's INTERLEAVE)."""
        return [*self.shown(caption, codes, frames), OpenVideo(frames, np.asarray(codes)[:0])]

    def ask(self, question: str, picture: Picture) -> list[Segment]:
        """Prompt to answer a question about an image or a video (mode U). None of it is supervised."""
        before, after = self._encode(_BEFORE_PICTURE), self._encode(question + _AFTER_QUESTION)
        return [Begin(), Text(before, supervised=False), _unsupervised(picture), Text(after, supervised=False)]

    def answered(self, question: str, picture: Picture, answer: str) -> list[Segment]:
        """For training on questions: the prompt, unsupervised, then the answer and the end."""
        return [*self.ask(question, picture), *self._needed(answer, "answer"), End()]

    def act(self, instruction: str, views: Sequence[Picture], past: Sequence[Sequence[Segment]] = ()) -> list[Segment]:
        """Prompt to act on what the cameras see (UniVLA's VLA). past: views and ActionChunk of each chunk before, oldest first."""
        return [Begin(), *self._needed(instruction, "instruction"), *(part for chunk in past for part in chunk), *self.look(views)]

    def look(self, views: Sequence[Picture]) -> list[Segment]:
        """What one more look adds to a prompt that has text and past already (UniVLA's VLA_Video)."""
        if not views:
            raise DocumentError("there are no views; expected at least one image or video to act on")
        return [*views, OpenAction()]

    def reason(self, instruction: str, views: Sequence[Picture]) -> list[Segment]:
        """Prompt to think before acting (UniVLA's VLA_COT)."""
        return [*self.act(instruction, views)[:-1], OpenReasoning()]

    def demonstration(self, instruction: str, chunks: Sequence[tuple[Sequence[Picture], ActionChunk]]) -> list[Segment]:
        """For training to act: the instruction, unsupervised, then views and actions of each chunk."""
        text = [Text(part.ids, supervised=False) for part in self._needed(instruction, "instruction")]
        return [Begin(), *text, *(part for views, chunk in chunks for part in (*views, chunk))]

    def caption_before(self, caption: str, picture: Picture) -> list[Segment]:
        """For training to draw: caption, then picture. An empty caption makes the null prompt that guidance needs in training."""
        return [Begin(), *self._text(caption), picture, End()]

    def caption_after(self, caption: str, picture: Picture) -> list[Segment]:
        """For training to describe: picture, then caption."""
        return [Begin(), picture, *self._needed(caption, "caption"), End()]

    def _text(self, text: str) -> list[Text]:
        ids = self._encode(text)
        return [Text(ids)] if len(ids) else []

    def _needed(self, text: str, what: str) -> list[Text]:
        if not text.strip():
            raise DocumentError(f"the {what} is empty; expected a text")
        return self._text(text)


def _unsupervised(picture: Picture) -> Picture:
    return replace(picture, supervised=False)
