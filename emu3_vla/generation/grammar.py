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
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


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
        require(not finals[begin], "the grammar allows nothing")
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
        require(len(labels) == 1, "a block may come where something else may come too; let an id say which it is")
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


def require(holds: bool, message: str) -> None:
    """Raise GrammarError with this message unless it holds."""
    if not holds:
        raise GrammarError(message)
