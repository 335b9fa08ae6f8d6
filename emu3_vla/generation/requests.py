"""What an engine is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from emu3_vla.documents import Segment, parse
from emu3_vla.generation.drafts import Draft, repeat_last
from emu3_vla.generation.grammar import Grammar, Item
from emu3_vla.generation.items import Prompt, ids_of
from emu3_vla.generation.sampling import Guidance, Sampling
from emu3_vla.vocabulary import Vocabulary

INT8 = "int8"


class RequestError(ValueError):
    """A request that the engine cannot serve."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Parallel:
    """Several items a forward: guesses are verified together, and those that were right are kept.

    window: most guesses verified at once. draft: where they come from; see emu3_vla.generation.drafts. INT8: from the engine's copy of
    the trunk with int8 weights, one after another (EngineConfig.int8_draft).
    lossy: None gives exactly what one-at-a-time decoding gives. A number: guesses that were computed anew so often, each from the guesses
    before it, count as right. Faster, and another distribution; what is written is still well-formed. 1 with a window of a whole chunk
    writes its ids in parallel.
    """

    window: int = 8
    draft: Draft | str | None = repeat_last
    lossy: int | None = None

    def __post_init__(self):
        if self.window < 1:
            raise RequestError(f"parallel.window is {self.window}, expected at least 1")
        if self.lossy is not None and self.lossy < 1:
            raise RequestError(f"parallel.lossy is {self.lossy}, expected at least 1 round, or None for exact results")
        if isinstance(self.draft, str) and (self.draft != INT8 or self.lossy):
            raise RequestError(f"parallel.draft is {self.draft!r}, expected a function, None, or {INT8!r} and then lossy=None")


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """prompt: segments, or ids of a stream. grammar: what may follow; None: any id until `stop` or `longest`.

    negative: the prompt that guidance moves away from, "the null prompt" or one of things not wanted. longest: items at most; None: as
    many as the grammar or the cache allows. stop: id sequences after which to end, each written too.
    """

    prompt: Prompt
    grammar: Grammar | None = None
    sampling: Sampling = field(default_factory=Sampling)
    guidance: Guidance | None = None
    negative: Prompt | None = None
    parallel: Parallel | None = None
    longest: int | None = None
    stop: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        if (self.guidance is None) != (self.negative is None):
            raise RequestError("guidance and negative belong together: a scale, and the prompt to move away from")
        if self.longest is not None and self.longest < 1:
            raise RequestError(f"longest is {self.longest}, expected at least 1")
        if not all(self.stop):
            raise RequestError("a stop sequence is empty; expected at least one id")


END, STOP, LENGTH = "end", "stop", "length"


@dataclass(frozen=True, eq=False)
class Event:
    """New items of request `number`, in the order of their writing. finish: "end" of the grammar, "stop", "length", or None: more comes."""

    number: int
    items: list[Item]
    finish: str | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """items: what was written. finish: see Event. forwards: passes through the trunk that it took, prefill among them."""

    items: list[Item]
    finish: str
    forwards: int
    vocabulary: Vocabulary | None = None

    @property
    def ids(self) -> list[int]:
        """As ids of a stream; a block's codes follow each other."""
        return ids_of(self.items, self.vocabulary)

    def segments(self, prompt: list[int]) -> list[Segment]:
        """The document: stream ids of the prompt and what was written behind it. Raises MalformedDocument if it is none (cut short)."""
        return parse([*prompt, *self.ids], self.vocabulary)
