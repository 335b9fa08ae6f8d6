"""Pieces of grammars: what the streams of both vocabularies are made of.

    Grammar(image_codes(vocabulary, 90, 68))
    Grammar(sequence(repeat(sequence(text(vocabulary, longest=64), image(vocabulary, 16, 16)), 1, 4), literal(vocabulary.eos)))

Pieces of one kind of content take the vocabulary; `literal` and `free` take ids; `sequence`, `either` and `repeat` join pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from action_tokenizer import ActionGrammar
from emu3_vla.documents import Begin, OpenImage, OpenVideo, write
from emu3_vla.documents.stream import spell
from emu3_vla.generation.grammar import AnyBlock, Builder, GrammarError, Ids, Piece, require
from emu3_vla.vocabulary import CompactVocabulary, Emu3Vocabulary, Vocabulary

MOST_CODES = 2**20
"""Of one image or video in a grammar: eight contexts of Emu3's length. A state for each must be made."""


def literal(*ids: int) -> Piece:
    """These ids, one after another."""

    def build(builder: Builder, state: int) -> int:
        for index in ids:
            state = builder.after(state, Ids(index, index + 1))
        return state

    return build


def free(size: int, *ends: int) -> Piece:
    """Any ids below `size` until one of `ends`, which is written too; without ends for ever."""
    mask = np.ones(size, bool)
    mask[list(ends)] = False
    going = Ids(0, size, mask if ends else None)

    def build(builder: Builder, state: int) -> int:
        loop, end = builder.state(), builder.state()
        builder.link(state, loop)
        builder.edge(loop, going, loop)
        for index in sorted(set(ends)):
            builder.edge(loop, Ids(index, index + 1), end)
        return end

    return build


def text(vocabulary: Vocabulary, *, least: int = 1, longest: int | None = None, without: Sequence[int] = ()) -> Piece:
    """Text ids, at least `least` and at most `longest`; None: as many as the model likes. What comes after says where it ends.

    without: ids that may not come.
    """
    require(0 <= least and (longest is None or max(least, 1) <= longest), f"text of {least} to {longest} ids cannot be")
    label = _text_ids(vocabulary, tuple(without))

    def build(builder: Builder, state: int) -> int:
        end = builder.state()
        for count in range(least if longest is None else longest):
            if count >= least:
                builder.link(state, end)
            state = builder.after(state, label)
        if longest is None:
            loop = builder.state()
            builder.link(state, loop)
            builder.edge(loop, label, loop)
            state = loop
        builder.link(state, end)
        return end

    return build


def numbers(vocabulary: Vocabulary, ids_SB: np.ndarray) -> Piece:
    """Number words (emu3_vla.number_words): of each row of ids, int (S, bins), one."""
    labels = []
    for ids in ids_SB:
        require(bool(vocabulary.is_text(ids).all()), "number words are text ids, and some of these are none")
        start, stop = int(ids.min()), int(ids.max()) + 1
        labels.append(Ids(start, stop, np.isin(np.arange(start, stop), ids)))

    def build(builder: Builder, state: int) -> int:
        for label in labels:
            state = builder.after(state, label)
        return state

    return build


def sentence(vocabulary: Vocabulary, ends: np.ndarray, *, without: Sequence[int] = ()) -> Piece:
    """Text ids until one of `ends`, int (n,), which is written too: an answer that ends with its only full stop. without: as of `text`."""
    label = _text_ids(vocabulary, tuple(without))
    allowed = np.ones(label.stop - label.start, bool) if label.mask is None else label.mask
    is_end = np.isin(np.arange(label.start, label.stop), ends) & allowed
    require(is_end.any(), "a sentence ends with one of some text ids, and none was given")
    going, ending = (Ids(label.start, label.stop, mask) for mask in (allowed & ~is_end, is_end))

    def build(builder: Builder, state: int) -> int:
        loop = builder.state()
        builder.link(state, loop)
        builder.edge(loop, going, loop)
        return builder.after(loop, ending)

    return build


def image(vocabulary: Vocabulary, rows: int, columns: int, name: str = "") -> Piece:
    """A whole image, from its begin token on. name: of a compact vocabulary's image."""
    return sequence(literal(*spell(OpenImage(name, rows, columns), vocabulary).tolist()), image_codes(vocabulary, rows, columns, name))


def image_codes(
    vocabulary: Vocabulary,
    rows: int,
    columns: int,
    name: str = "",
    *,
    given: np.ndarray | None = None,
    places: Sequence[int] | None = None,
) -> Piece:
    """What follows OpenImage: codes, with the ends of lines and frame and image that Emu3's form has.

    given: int (rows, columns), codes that must be written where it is not negative; one code a position only. places: of the blocks of a
    compact vocabulary's image in the order of writing, instead of its raster (see emu3_vla.documents.orders).
    """
    spell(OpenImage(name, rows, columns), vocabulary)  # raises for sizes that cannot be
    _check_count(rows, columns)
    if given is not None and (given.shape != (rows, columns) or not vocabulary.vision_in_head):
        require(vocabulary.vision_in_head, "codes can be given where a position holds one code, not a block")
        raise GrammarError(f"given codes have shape {given.shape}, expected ({rows}, {columns})")
    if isinstance(vocabulary, CompactVocabulary):
        return _blocks(list(vocabulary.places(name)) if places is None else places)
    require(places is None, "blocks are told apart by their place in a compact vocabulary only")
    size, ends = vocabulary.block_size, literal(vocabulary.end_of_frame, vocabulary.end_of_image)
    lines = []
    for row in range(rows // size):
        lines += [_codes(vocabulary, columns // size, None if given is None else given[row]), literal(vocabulary.end_of_line)]
    return sequence(*lines, ends)


def video_codes(vocabulary: Emu3Vocabulary, frames: int, rows: int, columns: int) -> Piece:
    """What follows OpenVideo: so many frames, each with its end, and the end of the video. Emu3's vocabulary only."""
    require(isinstance(vocabulary, Emu3Vocabulary), "a compact vocabulary writes no videos; write their frames as images")
    require(frames >= 1, f"a video of {frames} frames, expected at least 1")
    spell(OpenVideo(frames, np.zeros((0, rows, columns), np.int64)), vocabulary)  # raises for sizes that cannot be
    _check_count(frames, rows, columns)
    frame = sequence(_codes(vocabulary, rows * columns // vocabulary.codes_per_block), literal(vocabulary.end_of_frame))
    return sequence(*[frame] * frames, literal(vocabulary.end_of_image))


def video(vocabulary: Emu3Vocabulary, frames: int, rows: int, columns: int) -> Piece:
    """A whole video, from its begin token on."""
    header = write([Begin(), OpenVideo(frames, np.zeros((0, rows, columns), np.int64))], vocabulary)[1:]
    return sequence(literal(*header.tolist()), video_codes(vocabulary, frames, rows, columns))


def action_ids(vocabulary: Vocabulary, grammar: ActionGrammar) -> Piece:
    """What follows OpenAction: the ids of one chunk and end of chunk."""
    count = vocabulary.action_size
    require(grammar.vocab_size == count, f"the action tokenizer has {grammar.vocab_size} ids, but the vocabulary {count} for actions")
    labels = _ActionLabels(vocabulary, grammar)

    def build(builder: Builder, state: int) -> int:
        numbers, waiting = {grammar.start(): builder.state()}, [grammar.start()]
        builder.link(state, numbers[grammar.start()])
        end = builder.state()
        for own in waiting:  # grows while it is walked
            if grammar.is_finished(own):
                builder.edge(numbers[own], Ids(vocabulary.end_of_chunk, vocabulary.end_of_chunk + 1), end)
                continue
            for label, target in labels.of(own):
                if target not in numbers:
                    numbers[target] = builder.state()
                    waiting.append(target)
                builder.edge(numbers[own], label, numbers[target])
        return end

    return build


def actions(vocabulary: Vocabulary, grammar: ActionGrammar) -> Piece:
    """A whole action chunk, from its begin token on."""
    return sequence(literal(vocabulary.begin_action), action_ids(vocabulary, grammar))


def sequence(*pieces: Piece) -> Piece:
    """One after another."""

    def build(builder: Builder, state: int) -> int:
        for piece in pieces:
            state = piece(builder, state)
        return state

    return build


def either(*pieces: Piece) -> Piece:
    """One of them; the first id says which."""

    def build(builder: Builder, state: int) -> int:
        end = builder.state()
        for piece in pieces:
            begin = builder.state()
            builder.link(state, begin)
            builder.link(piece(builder, begin), end)
        return end

    return build


def repeat(piece: Piece, least: int = 0, most: int | None = None) -> Piece:
    """The piece so many times; most=None: as often as the model likes."""
    require(0 <= least and (most is None or max(least, 1) <= most), f"{least} to {most} times cannot be")

    def build(builder: Builder, state: int) -> int:
        end = builder.state()
        for count in range(least if most is None else most):
            if count >= least:
                builder.link(state, end)
            state = piece(builder, state)
        if most is None:
            loop = builder.state()
            builder.link(state, loop)
            builder.link(piece(builder, loop), loop)
            state = loop
        builder.link(state, end)
        return end

    return build


class _ActionLabels:
    """Edges of an action grammar: ids that lead to the same state are one set of ids of the vocabulary."""

    def __init__(self, vocabulary: Vocabulary, grammar: ActionGrammar):
        self._grammar = grammar
        first, last = (int(vocabulary.from_actions(np.array(index))) for index in (0, grammar.vocab_size - 1))
        self._start, self._stop, self._turned = min(first, last), max(first, last) + 1, last < first
        self._known: dict[bytes, Ids] = {}

    def of(self, state: int) -> list[tuple[Ids, int]]:
        allowed = np.flatnonzero(self._grammar.mask(state)[:-1])
        targets = self._grammar.advance_many(np.full(len(allowed), state), allowed)
        return [(self._ids(allowed[targets == target]), int(target)) for target in np.unique(targets)]

    def _ids(self, tokens: np.ndarray) -> Ids:
        mask = np.zeros(self._stop - self._start, bool)
        mask[tokens] = True
        if self._turned:
            mask = mask[::-1].copy()
        return self._known.setdefault(mask.tobytes(), Ids(self._start, self._stop, mask))


def _blocks(places: Sequence[int]) -> Piece:
    def build(builder: Builder, state: int) -> int:
        for place in places:
            state = builder.after(state, AnyBlock(int(place)))
        return state

    return build


def _codes(vocabulary: Emu3Vocabulary, count: int, given: np.ndarray | None = None) -> Piece:
    """So many codes, or blocks of them where a position holds a block. given: see image_codes."""
    if not vocabulary.vision_in_head:
        return _blocks([0] * count)
    any_code = Ids(vocabulary.vision_start, vocabulary.size)

    def build(builder: Builder, state: int) -> int:
        for number in range(count):
            fixed = -1 if given is None else int(given[number])
            index = vocabulary.vision_start + fixed
            state = builder.after(state, any_code if fixed < 0 else Ids(index, index + 1))
        return state

    return build


@lru_cache(maxsize=8)
def _text_ids(vocabulary: Vocabulary, without: tuple[int, ...]) -> Ids:
    if isinstance(vocabulary, CompactVocabulary):
        stop, mask = vocabulary.text_size, np.ones(vocabulary.text_size, bool)
    else:
        stop, mask = vocabulary.vision_start, vocabulary.is_text(np.arange(vocabulary.vision_start))
    mask[list(without)] = False
    return Ids(0, stop, None if mask.all() else mask)


def _check_count(*sizes: int) -> None:
    count = math.prod(sizes)
    require(count <= MOST_CODES, f"a picture of {'×'.join(map(str, sizes))} = {count} codes, more than {MOST_CODES}, fits no context")
