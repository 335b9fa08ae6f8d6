"""The decoding engine: every path of Emu3, for several unequal requests at once.

    engine = Engine.of(emu3_vla.load(folder))
    request = Request(prompt=prompts.draw("a shiba inu", 90, 68), grammar=Grammar(image_codes(vocabulary, 90, 68)),
                      sampling=Sampling(temperature=1, top_k=2048, seed=7), guidance=Guidance(scale=3), negative=without_text(prompt))
    (result,) = engine.generate([request])
    for event in engine.stream([request, other]): ...       # items as they come

One step of the engine is one pass through the trunk: every request under way puts in what its cache lacks, be it a piece of a new prompt
or the item that was just chosen, with guesses behind it where it decodes in parallel. A request with guidance has two rows of the cache,
and both go through the same pass. Ids that the grammar leaves no choice about are not asked for.

Rows of the cache remember what they hold. A new request gets the row that shares the longest beginning with its prompt, and computes only
the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import torch

from emu3_vla.documents import SAID
from emu3_vla.generation.cache import CachedSequence, CachedTrunk
from emu3_vla.generation.choosing import Ask, Chooser, Seen
from emu3_vla.generation.compiled import LONGEST, CompiledSteps
from emu3_vla.generation.grammar import Block, Grammar, Item
from emu3_vla.generation.items import Embedder, Prompt, items_of
from emu3_vla.generation.pieces import free
from emu3_vla.generation.requests import END, INT8, LENGTH, STOP, Event, Request, RequestError, Result
from emu3_vla.vocabulary import Vocabulary


class PromptTooLong(RequestError):
    """A prompt, or a prompt with what the grammar writes behind it, that the cache cannot hold."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """rows: sequences at once; a request with guidance takes two. capacity: positions of each, prompt and answer.

    prefill: most positions of a prompt in one pass, which bounds how long others wait for their next item. compile: steps of few positions
    through torch.compile (CUDA graphs on a GPU); the first of each shape takes a minute. int8_draft: hold a copy of the trunk with int8
    weights too, for guesses (Parallel(draft=INT8)); for CPUs, where reading the weights takes the time.
    """

    rows: int = 4
    capacity: int = 2048
    prefill: int = 512
    compile: bool = False
    int8_draft: bool = False

    def __post_init__(self):
        for name in ("rows", "capacity", "prefill"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


class Lane:
    """One row of the cache. held: the items in it. pending: items that must go in before the next can be asked for."""

    def __init__(self, sequence: CachedSequence, vocabulary: Vocabulary | None):
        self.sequence, self.held, self.pending, self._vocabulary = sequence, [], [], vocabulary
        self.busy = False

    def common(self, prompt: Sequence[Item]) -> int:
        """How many of its items begin the prompt; the last of the prompt is always computed, for the state after it."""
        most = min(len(self.held), len(prompt) - 1)
        return next((at for at in range(most) if self.held[at] != prompt[at]), most)

    def open(self, prompt: list[Item], length: int) -> None:
        """Serve a prompt of which the first `length` items are held."""
        self.keep(length)
        self.pending, self.busy = prompt[length:], True

    def seen(self, place: int, without: int) -> Seen:
        """What is known of a block to come at a place, the last `without` items left out."""
        held = self.held[: len(self.held) - without]
        before = next((item.codes for item in reversed(held) if isinstance(item, Block) and item.place == place), ())
        since_actions = takewhile(lambda item: item != self._vocabulary.end_of_chunk, reversed(held))
        texts = (item for item in since_actions if not isinstance(item, Block) and self._vocabulary.is_text(item))
        return Seen(before, tuple(islice(texts, SAID))[::-1])

    def keep(self, length: int) -> None:
        self.sequence.truncate(length)
        del self.held[length:]


class Run:
    """A request under way."""

    def __init__(self, number: int, request: Request, grammar: Grammar, lanes: list[Lane], prompt: list[Item], longest: int):
        self.number, self.request, self.grammar, self.lanes, self.longest = number, request, grammar, lanes, longest
        self.written: list[Item] = list(prompt)
        self.begin = len(prompt)
        self.state = grammar.start
        self.guesses: list[Item] = []
        self.rounds = self.forwards = 0
        self.finish: str | None = None

    @property
    def items(self) -> list[Item]:
        return self.written[self.begin :]

    @property
    def most_guesses(self) -> int:
        """As many as its window holds, but not beyond the longest answer."""
        return min(self.request.parallel.window, self.longest - (len(self.written) - self.begin) - 1)

    def windows(self, prefill: int) -> list[list[Item]]:
        """What each lane puts into the next pass. Guesses come only once the prompts are in, and all lanes end together."""
        passes = max(-(-len(lane.pending) // prefill) for lane in self.lanes)
        if passes > 1:
            self.guesses = []
            return [lane.pending[: max(0, len(lane.pending) - prefill * (passes - 1))] for lane in self.lanes]
        return [lane.pending + self.guesses for lane in self.lanes]

    def asks(self, states: list[torch.Tensor | None]) -> list[Ask]:
        """The items to choose after a pass: behind what was pending, and behind every guess. states: (n, H) of each lane."""
        if any(lane.pending for lane in self.lanes):
            return []
        state, asked = self.state, []
        for at in range(len(self.guesses) + 1):
            own = [lane_states[at - len(self.guesses) - 1] for lane_states in states]
            asked.append(self.ask(state, at, own))
            if at < len(self.guesses):
                state = self.grammar.advance(state, self.guesses[at])
        return asked

    def accept(self, chosen: list[Item]) -> list[Item]:
        """Take what was chosen as far as the guesses before it were right; guess anew behind that. Returns the new items."""
        began, right, exact = len(self.written), 0, True
        lossy = self.request.parallel and self.request.parallel.lossy
        for at, item in enumerate(chosen):
            if not exact and not self.grammar.allows(self.state, item):
                break
            self._write(item)
            if self.finish or at == len(self.guesses):
                break
            if item != self.guesses[at]:
                if lossy is None or self.rounds + 1 < lossy:
                    break
                exact = False
            right += exact
        for lane in self.lanes:
            lane.keep(len(lane.held) - len(self.guesses) + right)
            lane.pending = self.written[began + right :]
        self._write_forced()
        self._guess(chosen[len(self.written) - began :])  # what was computed behind the ids that have just been forced, too
        return self.written[began:]

    def ask(self, state: int, at: int, states: list[torch.Tensor]) -> Ask:
        choice, guidance = self.grammar.choice(state), self.request.guidance
        guided = {"negative": states[1], "scale": guidance.scale} if guidance else {}
        seen = {}
        if choice.place is not None:
            names = ("seen", "negative_seen")[: len(self.lanes)]
            seen = {name: lane.seen(choice.place, len(self.guesses) - at) for name, lane in zip(names, self.lanes, strict=True)}
        return Ask(choice, self.request.sampling, len(self.written) - self.begin + at, states[0], **guided, **seen)

    def _write(self, item: Item) -> None:
        self.state = self.grammar.advance(self.state, item)
        self.written.append(item)
        count = len(self.written) - self.begin
        if any(count >= len(stop) and tuple(self.written[-len(stop) :]) == stop for stop in self.request.stop):
            self.finish = STOP
        elif self.grammar.is_final(self.state):
            self.finish = END
        elif count == self.longest:
            self.finish = LENGTH

    def _write_forced(self) -> None:
        """Ids that nothing else may stand for need no model."""
        while not self.finish and (only := self.grammar.choice(self.state).only) is not None:
            self._write(only)
            for lane in self.lanes:
                lane.pending.append(only)

    def _guess(self, computed: list[Item]) -> None:
        """Guesses for the next pass: what was computed behind wrong guesses, then the draft; cut to what the grammar allows."""
        parallel, before = self.request.parallel, len(self.guesses)
        self.guesses = []
        if self.finish or parallel is None or parallel.draft == INT8:
            return
        self.rounds = self.rounds + 1 if before and computed else 0
        state = self._extend(self.state, computed)
        missing = parallel.window - len(self.guesses)
        if missing > 0 and parallel.draft is not None and state is not None:
            self._extend(state, parallel.draft(self.written + self.guesses, missing))

    def _extend(self, state: int, source: list[Item]) -> int | None:
        """Append guesses from `source`. Returns the state behind them, or None where the guesses come to the end of the grammar."""
        waiting = deque(source)
        while len(self.guesses) < self.most_guesses and waiting:
            only = self.grammar.choice(state).only
            item = waiting[0] if only is None else only
            if item == waiting[0]:
                waiting.popleft()
            if not self.grammar.allows(state, item):
                return state
            state = self.grammar.advance(state, item)
            if self.grammar.is_final(state):
                return None
            self.guesses.append(item)
        return state


class Engine:
    """See the head of this file. model: Emu3ForCausalLM, or with vision blocks BlockEmu3ForCausalLM. Its weights are copied.

    vocabulary: for prompts of segments and for blocks; a plain decoder takes ids without.
    """

    name = "ours"

    def __init__(self, model: torch.nn.Module, vocabulary: Vocabulary | None = None, config: EngineConfig | None = None):
        config = config or EngineConfig()
        limit = model.config.max_position_embeddings
        if config.capacity > limit:
            raise ValueError(f"capacity is {config.capacity}, but the model was made for contexts of {limit} positions")
        self.vocabulary, self.config = vocabulary, config
        self.trunk = CachedTrunk(model, packed=not config.compile)
        self.cache = self.trunk.cache(config.rows, config.capacity, slack=LONGEST if config.compile else 0)
        self._draft, self._guesser = None, None
        if config.int8_draft:
            from emu3_vla.generation.int8_draft import Int8Product, Int8Trunk  # Numba takes a while to import

            self._draft, self._guesser = Int8Trunk(model), Chooser(model, product=Int8Product)
        self._chooser, self._embed = Chooser(model, packed=not config.compile), Embedder(model)
        self._forward = self.trunk.extend_each
        if config.compile:
            self._forward = CompiledSteps(self.cache).extend_each
        self._lanes = [Lane(sequence, vocabulary) for sequence in self.cache.sequences]
        self._waiting: deque[tuple] = deque()  # (number, request, grammar, prompts, longest)
        self._running: list[Run] = []
        self._results: dict[int, Result] = {}
        self._submitted = 0
        self._free = Grammar(free(self._chooser.ids))

    @classmethod
    def of(cls, checkpoint, config: EngineConfig | None = None) -> Engine:
        """For a loaded checkpoint (emu3_vla.load)."""
        return cls(checkpoint.model, checkpoint.vocabulary, config)

    # -- all at once

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Answer all of them. Raises RequestError and what prompts raise before anything is computed, DecodingFailed."""
        numbers = self._submit_all(requests)
        try:
            while any(number not in self._results for number in numbers):
                self.step()
            return [self._results.pop(number) for number in numbers]
        finally:
            for number in numbers:
                self.cancel(number)

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Items as they come; an event's number is the index in `requests`. What is not consumed is given up when the iterator closes."""
        numbers = {number: index for index, number in enumerate(self._submit_all(requests))}
        try:
            while any(number not in self._results for number in numbers):
                for event in self.step():
                    if event.number in numbers:
                        yield Event(numbers[event.number], event.items, event.finish)
        finally:
            for number in numbers:
                self.cancel(number)

    # -- step by step, for servers

    def submit(self, request: Request) -> int:
        """Queue a request and return its number. Raises RequestError and what prompts raise."""
        prompts = [self._items(request.prompt)]
        if request.guidance:
            prompts.append(self._items(request.negative))
        grammar = request.grammar or self._free
        if len(prompts) > len(self._lanes):
            raise RequestError(f"guidance takes two rows of the cache, which has {len(self._lanes)}; make the engine with rows=2 or more")
        if request.parallel and request.parallel.draft == INT8 and self._draft is None:
            raise RequestError(f"the request asks for {INT8} guesses; make the engine with int8_draft=True")
        if any(choice.place is not None for choice in grammar.choices) and not self._chooser.writes_blocks:
            raise RequestError("the grammar writes blocks of codes, but this model has no depth decoder")
        longest = self._longest(request, grammar, max(map(len, prompts)))
        self._waiting.append((self._submitted, request, grammar, prompts, longest))
        self._submitted += 1
        return self._submitted - 1

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One pass through the trunk for all that is under way. Raises DecodingFailed; then the requests under way are given up."""
        self._admit()
        if not self._running:
            return []
        try:
            return self._pass()
        except Exception:
            for run in list(self._running):
                self._release(run)
            raise

    def result(self, number: int) -> Result | None:
        """The answer to a submitted request, once; None while it is under way."""
        return self._results.pop(number, None)

    def cancel(self, number: int) -> None:
        """Give up a request, or forget its answer."""
        self._results.pop(number, None)
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0] != number)
        for run in [run for run in self._running if run.number == number]:
            self._release(run)

    def _submit_all(self, requests: Sequence[Request]) -> list[int]:
        numbers: list[int] = []
        try:
            for request in requests:
                numbers.append(self.submit(request))
        except Exception:
            for number in numbers:
                self.cancel(number)
            raise
        return numbers

    def _items(self, prompt: Prompt) -> list[Item]:
        items = items_of(prompt, self.vocabulary, self._chooser.ids)
        if not self._chooser.writes_blocks and any(isinstance(item, Block) for item in items):
            raise RequestError("the prompt holds blocks of codes, but this model has no place for them")
        return items

    def _longest(self, request: Request, grammar: Grammar, prompt: int) -> int:
        """Most items that the request may write. Raises PromptTooLong."""
        # The last item is chosen, but never put into the cache.
        room = self.config.capacity - prompt + 1
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {prompt} positions, but the engine was made for {self.config.capacity}: show less, or raise capacity"
            )
        needed = min((limit for limit in (grammar.longest, request.longest) if limit is not None), default=None)
        if needed is not None and needed > room:
            raise PromptTooLong(
                f"a prompt of {prompt} positions and up to {needed} to be written behind it do not fit the {self.config.capacity} that "
                "the engine was made for: show less, ask for less, or raise capacity"
            )
        return room if needed is None else needed

    def _admit(self) -> None:
        """Give waiting requests rows of the cache, in the order of their coming."""
        while self._waiting:
            number, request, grammar, prompts, longest = self._waiting[0]
            if sum(not lane.busy for lane in self._lanes) < len(prompts):
                return
            self._waiting.popleft()
            lanes = [self._open(prompt) for prompt in prompts]
            self._running.append(Run(number, request, grammar, lanes, prompts[0], longest))

    def _open(self, prompt: list[Item]) -> Lane:
        """A row for this prompt, with as much of it as any row holds."""
        idle = [lane for lane in self._lanes if not lane.busy]
        best = max(self._lanes, key=lambda lane: lane.common(prompt))
        shared = best.common(prompt)
        # Of idle rows with equally much in common, the one that holds least: the others may serve a later prompt.
        own = max(idle, key=lambda lane: (lane.common(prompt), -len(lane.held)))
        if own.common(prompt) < shared:
            own.sequence.copy_from(best.sequence, shared)
            own.held = best.held[:shared]
        own.open(prompt, shared)
        return own

    def _pass(self) -> list[Event]:
        windows = [(run, run.windows(self.config.prefill)) for run in self._running]
        lanes = [(lane, window) for run, own in windows for lane, window in zip(run.lanes, own, strict=True) if window]
        embedded = self._embed([item for _, window in lanes for item in window]).split([len(window) for _, window in lanes])
        states = self._forward([(lane.sequence, part) for (lane, _), part in zip(lanes, embedded, strict=True)])
        after = {id(lane): state for (lane, _), state in zip(lanes, states, strict=True)}
        for lane, window in lanes:
            lane.held += window
            lane.pending = lane.pending[len(window) :]
        asks = [run.asks([after.get(id(lane)) for lane in run.lanes]) for run in self._running]
        chosen = iter(self._chooser.choose([ask for own in asks for ask in own]))
        events = []
        for run, own in zip(list(self._running), asks, strict=True):
            run.forwards += 1
            if own:
                items = run.accept([next(chosen) for _ in own])
                events.append(Event(run.number, items, run.finish))
            if own and not run.finish and run.request.parallel and run.request.parallel.draft == INT8:
                self._guess_by_draft(run)
            if run.finish:
                self._results[run.number] = Result(run.items, run.finish, run.forwards, self.vocabulary)
                self._release(run)
        return events

    def _guess_by_draft(self, run: Run) -> None:
        """Guesses of the trunk in int8, each behind those before it, as far as ids go: the codes of a block would cost as much again."""
        starts, state = [lane.sequence.length for lane in run.lanes], run.state
        coming, read = list(run.lanes[0].pending), 0  # of all lanes alike
        chooser = self._chooser if run.request.guidance else self._guesser  # guidance magnifies its errors
        while len(run.guesses) < run.most_guesses:
            choice = run.grammar.choice(state)
            if choice.place is not None:
                return
            item = choice.only
            if item is None:
                new = self._embed(coming[read:])
                states = self._draft.extend([lane.sequence for lane in run.lanes], starts, new)
                starts, read = [start + len(new) for start in starts], len(coming)
                (item,) = chooser.choose([run.ask(state, len(run.guesses), states)])
            state = run.grammar.advance(state, item)
            if run.grammar.is_final(state):
                return
            run.guesses.append(item)
            coming.append(item)

    def _release(self, run: Run) -> None:
        self._running.remove(run)
        for lane in run.lanes:
            lane.busy, lane.pending = False, []
