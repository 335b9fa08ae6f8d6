"""What may be written next: an automaton over the items of a stream, put together from pieces.

    picture = image_codes(vocabulary, 90, 68)                                     # after a prompt that ends in OpenImage
    steps = repeat(sequence(text(vocabulary, longest=64), image(vocabulary, 16, 16)), 1, 4)
    grammar = Grammar(sequence(steps, literal(vocabulary.eos)))
    state = grammar.start
    while not grammar.is_final(state):
        choice = grammar.choice(state)          # ids choice.start .. choice.stop, of which choice.mask; or a block at a place
        state = grammar.advance(state, id)

An item is what one position of the trunk holds: an id, or a Block of codes. Every path from the start to the final state is a well-formed
piece of stream, and from every state the final one can be reached, so whoever obeys writes nothing malformed. Where pieces meet, the next
id says which one goes on; pieces for which it would not are refused when the grammar is made.

The ids of a choice are a slice of the vocabulary, so only that slice of the output head needs computing: of Emu3's 184,622 ids, the
32,768 vision codes within an image's row, and one id, which needs no model at all, at its end.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from action_tokenizer import ActionGrammar
from emu3_vla.documents import Begin, OpenImage, OpenVideo, write
from emu3_vla.documents.stream import spell
from emu3_vla.vocabulary import CompactVocabulary, Emu3Vocabulary, Vocabulary

MOST_CODES = 2**20
"""Of one image or video in a grammar: eight contexts of Emu3's length. A state for each must be made."""


class GrammarError(ValueError):
    """Pieces that cannot be put together, or an item that may not come."""


@dataclass(frozen=True)
class Block:
    """A block of codes at a place, as one position of the trunk holds it. codes: row by row within the block."""

    place: int
    codes: tuple[int, ...]


Item = int | Block


@dataclass(frozen=True, eq=False)
class Ids:
    """A set of ids: those of [start, stop) where mask, bool (stop - start,), is true; None: all of them."""

    start: int
    stop: int
    mask: np.ndarray | None = None

    def __contains__(self, index: int) -> bool:
        return self.start <= index < self.stop and (self.mask is None or bool(self.mask[index - self.start]))


@dataclass(frozen=True)
class AnyBlock:
    """Any block of codes, at this place."""

    place: int


Label = Ids | AnyBlock


@dataclass(frozen=True, eq=False)
class Choice:
    """What may be written from a state.

    Ids of [start, stop) where mask, bool (stop - start,), is true, or all of them; or a block at `place`. only: the one id that may come,
    where it is one. number: of this choice in its grammar; states that allow the same share it.
    """

    number: int
    start: int = 0
    stop: int = 0
    mask: np.ndarray | None = None
    only: int | None = None
    place: int | None = None


class Builder:
    """States and edges of a grammar in the making. `links` are steps that write nothing."""

    def __init__(self):
        self.edges: list[list[tuple[Label, int]]] = []
        self.links: list[list[int]] = []

    def state(self) -> int:
        self.edges.append([])
        self.links.append([])
        return len(self.edges) - 1

    def after(self, state: int, label: Label) -> int:
        """A new state, reached from `state` by `label`."""
        target = self.state()
        self.edges[state].append((label, target))
        return target

    def edge(self, state: int, label: Label, target: int) -> None:
        self.edges[state].append((label, target))

    def link(self, state: int, target: int) -> None:
        self.links[state].append(target)


Piece = Callable[[Builder, int], int]
"""Adds a piece of stream behind a state and returns the state at its end."""


# -- pieces


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


def text(vocabulary: Vocabulary, *, least: int = 1, longest: int | None = None) -> Piece:
    """Text ids, at least `least` and at most `longest`; None: as many as the model likes. What comes after says where it ends."""
    _require(0 <= least and (longest is None or max(least, 1) <= longest), f"text of {least} to {longest} ids cannot be")
    label = _text_ids(vocabulary)

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
        _require(vocabulary.vision_in_head, "codes can be given where a position holds one code, not a block")
        raise GrammarError(f"given codes have shape {given.shape}, expected ({rows}, {columns})")
    if isinstance(vocabulary, CompactVocabulary):
        return _blocks(list(vocabulary.places(name)) if places is None else places)
    _require(places is None, "blocks are told apart by their place in a compact vocabulary only")
    size, ends = vocabulary.block_size, literal(vocabulary.end_of_frame, vocabulary.end_of_image)
    lines = []
    for row in range(rows // size):
        lines += [_codes(vocabulary, columns // size, None if given is None else given[row]), literal(vocabulary.end_of_line)]
    return sequence(*lines, ends)


def video_codes(vocabulary: Emu3Vocabulary, frames: int, rows: int, columns: int) -> Piece:
    """What follows OpenVideo: so many frames, each with its end, and the end of the video. Emu3's vocabulary only."""
    _require(isinstance(vocabulary, Emu3Vocabulary), "a compact vocabulary writes no videos; write their frames as images")
    _require(frames >= 1, f"a video of {frames} frames, expected at least 1")
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
    _require(grammar.vocab_size == count, f"the action tokenizer has {grammar.vocab_size} ids, but the vocabulary {count} for actions")
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
    _require(0 <= least and (most is None or max(least, 1) <= most), f"{least} to {most} times cannot be")

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


# -- the automaton


class Grammar:
    """The automaton of a piece. Immutable. States are integers.

    start: the state before the first item. choices: all distinct choices. longest: number of items on the longest path, None without end.
    """

    def __init__(self, piece: Piece):
        builder = Builder()
        begin = builder.state()
        end = piece(builder, begin)
        edges, finals = [], []
        for state in range(len(builder.links)):
            closure = _closure(builder.links, state)
            edges.append(tuple(edge for member in closure for edge in builder.edges[member]))
            finals.append(end in closure)
            if finals[-1] and edges[-1]:
                raise GrammarError("the grammar can go on where it can also end; let an id such as <eos> say that it ends")
        _require(not finals[begin], "the grammar allows nothing")
        self._set(begin, edges, finals)

    def _set(self, start: int, edges: list[tuple[tuple[Label, int], ...]], finals: list[bool]) -> None:
        self.start, self._edges = start, edges
        self.choices: list[Choice] = []
        known: dict[tuple, int] = {}
        self._choice_of = [-1 if final else self._number(own, known) for own, final in zip(edges, finals, strict=True)]
        self.longest = self._longest()

    def ending_ids(self) -> list[int]:
        """Ids after which all is written, wherever they come."""
        edges = {(label, self.is_final(target)) for own in self._edges for label, target in own if isinstance(label, Ids)}
        ending = {label.start for label, ends in edges if ends and label.stop == label.start + 1}
        return sorted(index for index in ending if not any(index in label for label, ends in edges if not ends))

    def to_dict(self) -> dict:
        """The automaton in numbers and strings, for another process."""
        labels: dict[tuple, list] = {}
        rows = []
        for own in self._edges:
            for label, _ in own:
                labels.setdefault(_identity(label), [len(labels), _spelled_label(label)])
            rows.append([number for label, target in own for number in (labels[_identity(label)][0], target)])
        finals = [state for state, choice in enumerate(self._choice_of) if choice < 0]
        return {"start": self.start, "labels": [label for _, label in labels.values()], "edges": rows, "finals": finals}

    @classmethod
    def from_dict(cls, values: dict) -> Grammar:
        """The inverse of `to_dict`. Raises GrammarError for what that did not write."""
        try:
            labels = [_read_label(label) for label in values["labels"]]
            pairs = [list(zip(row[::2], row[1::2], strict=True)) for row in values["edges"]]
            edges = [tuple((labels[number], int(target)) for number, target in row) for row in pairs]
            finals = np.isin(np.arange(len(edges)), values["finals"]).tolist()
            grammar = cls.__new__(cls)
            grammar._set(int(values["start"]), edges, finals)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise GrammarError(f"this is no grammar that to_dict wrote: {type(error).__name__}: {error}") from error
        return grammar

    def choice(self, state: int) -> Choice:
        """What may be written from `state`, which is not final."""
        return self.choices[self._choice_of[state]]

    def is_final(self, state: int) -> bool:
        """Whether all is written."""
        return self._choice_of[state] < 0

    def allows(self, state: int, item: Item) -> bool:
        """Whether `item` may come next."""
        return self._target(state, item) is not None

    def advance(self, state: int, item: Item) -> int:
        """The state after `item`. Raises GrammarError if it may not come next."""
        target = self._target(state, item)
        if target is None:
            raise GrammarError(f"{item} may not come next")
        return target

    def mask(self, state: int, size: int) -> np.ndarray:
        """What may be written as bool (size,) over the ids of the head; none of them where a block must come or all is written."""
        allowed = np.zeros(size, bool)
        if not self.is_final(state) and (choice := self.choice(state)).place is None:
            allowed[choice.start : choice.stop] = True if choice.mask is None else choice.mask
        return allowed

    def _target(self, state: int, item: Item) -> int | None:
        for label, target in self._edges[state]:
            if isinstance(item, Block):
                if isinstance(label, AnyBlock) and label.place == item.place:
                    return target
            elif isinstance(label, Ids) and item in label:
                return target
        return None

    def _number(self, edges: tuple[tuple[Label, int], ...], known: dict[tuple, int]) -> int:
        """The number of the choice that these edges leave."""
        key = tuple(_identity(label) for label, _ in edges)
        if key not in known:
            known[key] = len(self.choices)
            self.choices.append(_choice([label for label, _ in edges], len(self.choices)))
        return known[key]

    def _longest(self) -> int | None:
        """Longest path from the start, by taking states in an order in which all edges go forward; None where there is no such order."""
        reached, waiting, entering = {self.start}, [self.start], {}
        while waiting:
            for _, target in self._edges[waiting.pop()]:
                entering[target] = entering.get(target, 0) + 1
                if target not in reached:
                    reached.add(target)
                    waiting.append(target)
        lengths, ready = {self.start: 0}, [self.start] if self.start not in entering else []
        done = 0
        while ready:
            state, done = ready.pop(), done + 1
            for _, target in self._edges[state]:
                lengths[target] = max(lengths.get(target, 0), lengths[state] + 1)
                entering[target] -= 1
                if not entering[target]:
                    ready.append(target)
        return max(lengths.values()) if done == len(reached) else None


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
def _text_ids(vocabulary: Vocabulary) -> Ids:
    if isinstance(vocabulary, CompactVocabulary):
        return Ids(0, vocabulary.text_size)
    return Ids(0, vocabulary.vision_start, vocabulary.is_text(np.arange(vocabulary.vision_start)))


def _closure(links: list[list[int]], state: int) -> list[int]:
    """States reached from `state` without writing anything, itself first."""
    if not links[state]:
        return [state]
    found = [state]
    for member in found:  # grows while it is walked
        found += [target for target in dict.fromkeys(links[member]) if target not in found]
    return found


def _identity(label: Label) -> tuple:
    if isinstance(label, AnyBlock):
        return ("block", label.place)
    return (label.start, label.stop, id(label.mask) if label.mask is not None else None)


def _spelled_label(label: Label) -> list:
    if isinstance(label, AnyBlock):
        return [label.place]
    return [label.start, label.stop, "" if label.mask is None else base64.b64encode(np.packbits(label.mask)).decode()]


def _read_label(spelled: list) -> Label:
    if len(spelled) == 1:
        return AnyBlock(int(spelled[0]))
    start, stop, packed = spelled
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8), count=stop - start).astype(bool) if packed else None
    return Ids(start, stop, bits)


def _choice(labels: list[Label], number: int) -> Choice:
    """The union of labels, which must not overlap."""
    if not labels:
        return Choice(number)
    if any(isinstance(label, AnyBlock) for label in labels):
        _require(len(labels) == 1, "a block may come where something else may come too; let an id say which it is")
        return Choice(number, place=labels[0].place)
    start, stop = min(label.start for label in labels), max(label.stop for label in labels)
    count = np.zeros(stop - start, np.int32)
    for label in labels:
        count[label.start - start : label.stop - start] += 1 if label.mask is None else label.mask
    if count.max() > 1:
        raise GrammarError(f"two pieces may begin with id {start + int(count.argmax())}, so it would not say which of them goes on")
    allowed = count.astype(bool)
    only = start + int(allowed.argmax()) if allowed.sum() == 1 else None
    return Choice(number, start, stop, None if allowed.all() else allowed, only)


def _check_count(*sizes: int) -> None:
    count = math.prod(sizes)
    _require(count <= MOST_CODES, f"a picture of {'×'.join(map(str, sizes))} = {count} codes, more than {MOST_CODES}, fits no context")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise GrammarError(message)
