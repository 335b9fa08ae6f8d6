"""What a document can ask of a model: parts of it are left out, and the model writes them from what stands before.

Of a document that a stream gives, whatever its kind:

    next images   the last ones, where they are to be predicted and something stands before them; a film's last frame
    chunk         the last action chunk that was demonstrated, of those before these images
    answers       every text that is to be predicted, but one that begins the document
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from action_tokenizer import ActionGrammar
from emu3_vla.documents import ActionChunk, Begin, End, Image, OpenAction, OpenImage, OpenVideo, Segment, Text, Video, from_blocks
from emu3_vla.emu3_text import Emu3TextTokenizer
from emu3_vla.generation.grammar import Block, Grammar, Item
from emu3_vla.generation.pieces import Piece, action_ids, image, image_codes, literal, sentence, sequence, text, video_codes
from emu3_vla.text import TextTokenizer
from emu3_vla.vocabulary import Vocabulary

FILM = "film"
"""Name of a video's frames, which have none in the stream."""
LONGEST_ANSWER = 96
"""Text ids, after which an answer that does not end is cut."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Gap:
    """Left out of a document: `true`. prompt: what stands before. grammar: of what is to be written. longest: items at most, if set."""

    prompt: list[Segment]
    true: list[Segment]
    grammar: Grammar
    longest: int | None = None

    @property
    def question(self) -> Text | None:
        """The text that stands right before."""
        return self.prompt[-1] if isinstance(self.prompt[-1], Text) else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Gaps:
    """Those of one document. said: the text that it begins with. now: the images that are seen last before what is left out."""

    said: Text | None = None
    now: list[Image] = field(default_factory=list)
    images: Gap | None = None
    chunk: Gap | None = None
    answers: list[Gap] = field(default_factory=list)

    def all(self) -> list[Gap]:
        """Every one, in the order of the fields."""
        return [gap for gap in (self.images, self.chunk, *self.answers) if gap is not None]


class Gapper:
    """Makes gaps in documents of one vocabulary. actions: grammar of its chunks. tokenizer: of its text."""

    def __init__(self, vocabulary: Vocabulary, actions: ActionGrammar, tokenizer: TextTokenizer | Emu3TextTokenizer):
        self._vocabulary, self._actions, self._tokenizer = vocabulary, actions, tokenizer

    def gaps(self, document: Sequence[Segment]) -> Gaps:
        """What this document asks."""
        document = [segment for segment in document if not isinstance(segment, Begin)]
        said = document[0] if isinstance(document[0], Text) else None
        answers = [
            self._answer(document, at) for at, segment in enumerate(document) if at and isinstance(segment, Text) and segment.supervised
        ]
        if any(isinstance(segment, Video) for segment in document):
            return self._film(document, said, answers)
        moments = _moments(document)
        chunks = [at for at, segment in enumerate(document) if isinstance(segment, ActionChunk)]
        # Of a document that acts, the images of the only moment are what it sees, not what comes next.
        last = moments[-1] if moments and (len(moments) > 1 or not chunks) else None
        if last and (last[0] == 0 or not document[last[0]].supervised):
            last = None
        seen = moments[:-1] if last else moments
        demonstrated = [at for at in chunks if document[at].supervised and not (last and at > last[0])]
        return Gaps(
            said=said,
            now=[document[at] for at in seen[-1]] if seen else [],
            images=self._images(document, last) if last else None,
            chunk=self._chunk(document, demonstrated[-1]) if demonstrated else None,
            answers=answers,
        )

    def codes(self, gap: Gap, items: Sequence[Item]) -> list[np.ndarray]:
        """The images that were written into a gap of images: int64 (rows, columns) each."""
        vocabulary = self._vocabulary
        codes: list[int] = []
        for item in items:
            if isinstance(item, Block):
                codes += item.codes
            elif item >= vocabulary.vision_start:
                codes.append(item - vocabulary.vision_start)
        sizes = [np.shape(image.codes) for image in gap.true]
        parts = np.split(np.array(codes), np.cumsum([rows * columns for rows, columns in sizes])[:-1])
        shape = (-1, vocabulary.codes_per_block)
        return [from_blocks(part.reshape(shape), *size) for part, size in zip(parts, sizes, strict=True)]

    def action_tokens(self, items: Sequence[int]) -> list[int]:
        """Ids of the action tokenizer of a whole chunk that was written into a gap."""
        return self._vocabulary.to_actions(np.array(items[:-1], np.int64)).tolist()

    def text(self, ids: Sequence[int]) -> str:
        """Of text ids; what ended an answer, if it was no text, is left out."""
        return self._tokenizer.decode([int(index) for index in ids if self._vocabulary.is_text(np.array(index))])

    def _images(self, document: list[Segment], at: list[int]) -> Gap:
        """Images of one moment, written one after another without another look at the true ones."""
        true = [document[index] for index in at]
        sizes = [(*np.shape(one.codes), one.name) for one in true]
        pieces = [image_codes(self._vocabulary, *sizes[0]), *(image(self._vocabulary, *size) for size in sizes[1:])]
        rows, columns, name = sizes[0]
        return Gap(prompt=[*document[: at[0]], OpenImage(name, rows, columns)], true=true, grammar=Grammar(sequence(*pieces)))

    def _film(self, document: list[Segment], said: Text | None, answers: list[Gap]) -> Gaps:
        """The last frame of the last video, given those before it."""
        at = max(at for at, segment in enumerate(document) if isinstance(segment, Video))
        film = document[at]
        rows, columns = film.codes.shape[1:]
        gap = Gap(
            prompt=[*document[:at], OpenVideo(len(film.codes), film.codes[:-1])],
            true=[Image(FILM, film.codes[-1])],
            grammar=Grammar(video_codes(self._vocabulary, 1, rows, columns)),
        )
        return Gaps(said=said, now=[Image(FILM, codes) for codes in film.codes[-2:-1]], images=gap, answers=answers)

    def _chunk(self, document: list[Segment], at: int) -> Gap:
        return Gap(prompt=[*document[:at], OpenAction()], true=[document[at]], grammar=self._chunk_grammar)

    @cached_property
    def _chunk_grammar(self) -> Grammar:
        return Grammar(action_ids(self._vocabulary, self._actions))

    def _answer(self, document: list[Segment], at: int) -> Gap:
        after = document[at + 1] if at + 1 < len(document) else None
        grammar = Grammar(self._until(after))
        return Gap(prompt=document[:at], true=[document[at]], grammar=grammar, longest=LONGEST_ANSWER)

    def _until(self, after: Segment | None) -> Piece:
        """Text up to what comes after it, or to its full stop where that is more text, or nothing."""
        vocabulary = self._vocabulary
        match after:
            case End():
                return sequence(text(vocabulary), literal(vocabulary.eos))
            case Image():
                return sequence(text(vocabulary), literal(vocabulary.begin_image(after.name)))
        return sentence(vocabulary, self._full_stops)

    @cached_property
    def _full_stops(self) -> np.ndarray:
        """Ids whose text ends with a full stop."""
        return np.array([index for index in range(self._tokenizer.vocab_size) if self._tokenizer.decode([index]).endswith(".")])


def _moments(document: list[Segment]) -> list[list[int]]:
    """Places of the images of each moment: those that follow each other, of different cameras."""
    moments: list[list[int]] = []
    for at, segment in enumerate(document):
        if not isinstance(segment, Image):
            continue
        goes_on = moments and moments[-1][-1] == at - 1 and segment.name not in [document[index].name for index in moments[-1]]
        moments[-1].append(at) if goes_on else moments.append([at])
    return moments
