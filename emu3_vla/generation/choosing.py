"""From the trunk's states to the next items: logits over what the grammar allows, guidance, sampling.

Only the slice of the output head that holds the allowed ids is computed. Rows that ask for the same slice share one product, each with
its own mask.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F

from emu3_vla.documents import NOTHING, SAID, BlockContext
from emu3_vla.generation.cache import LEAST_ROWS, Product
from emu3_vla.generation.depth import DepthWriter
from emu3_vla.generation.grammar import Block, Choice, Item
from emu3_vla.generation.sampling import Sampling, choose
from emu3_vla.model import BlockEmu3ForCausalLM

PACKED_IDS = 65_536
"""Largest slice of the head that is laid out anew for the CPU; a larger one is read where it is, not to hold it twice."""


@dataclass(frozen=True)
class Seen:
    """What one request's items say of a block to come: codes of the last at its place, and the last SAID text ids at most, both as in
    documents.Layout; empty where there are none."""

    before: tuple[int, ...] = ()
    said: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Ask:
    """One item to be chosen. number: which of its request's. state, negative: (H,); negative: the null prompt's, for guidance. seen,
    negative_seen: of a block, in either's items."""

    choice: Choice
    sampling: Sampling
    number: int
    state: torch.Tensor
    negative: torch.Tensor | None = None
    scale: float = 1.0
    seen: Seen = Seen()
    negative_seen: Seen = Seen()


class Chooser:
    """Chooses items with one model's heads. packed: see Product. product: of states with a slice of the head."""

    def __init__(self, model: torch.nn.Module, *, packed: bool = True, product: Callable[[torch.Tensor], Any] = Product):
        self._head, self._packed, self._product = model.lm_head.weight.detach(), packed, product
        self._depth = DepthWriter(model.depth, packed=packed) if isinstance(model, BlockEmu3ForCausalLM) else None
        self._slices: dict[tuple[int, int], Callable[[torch.Tensor], torch.Tensor]] = {}
        self._refused: WeakKeyDictionary[Choice, torch.Tensor] = WeakKeyDictionary()

    @property
    def ids(self) -> int:
        """Number of ids that the output head writes."""
        return len(self._head)

    @property
    def writes_blocks(self) -> bool:
        return self._depth is not None

    @torch.inference_mode()
    def choose(self, asks: Sequence[Ask]) -> list[Item]:
        """One item for each. Raises DecodingFailed."""
        items: list[Item | None] = [ask.choice.only for ask in asks]
        groups: dict[tuple, list[int]] = defaultdict(list)
        for at, ask in enumerate(asks):
            if ask.choice.place is not None:
                groups["blocks"].append(at)
            elif ask.choice.only is None:
                groups[ask.choice.start, ask.choice.stop].append(at)
        for key, members in groups.items():
            own = [asks[at] for at in members]
            chosen = self._blocks(own) if key == "blocks" else self._ids(own, *key)
            for at, item in zip(members, chosen, strict=True):
                items[at] = item
        return items

    def logits(self, asks: Sequence[Ask]) -> torch.Tensor:
        """Logits over the slice that all of them allow, guided and masked: float32 (N, stop - start)."""
        head = self._slice(asks[0].choice.start, asks[0].choice.stop)
        logits = guided(lambda states: head(states).float(), asks)
        if any(ask.choice.mask is not None for ask in asks):
            logits = logits.masked_fill(torch.stack([self._refusal(ask.choice, logits) for ask in asks]), -torch.inf)
        return logits

    def _ids(self, asks: list[Ask], start: int, stop: int) -> list[int]:
        chosen = choose(self.logits(asks), [ask.sampling for ask in asks], [(ask.number, 0) for ask in asks])
        return [start + index for index in chosen]

    def _blocks(self, asks: list[Ask]) -> list[Block]:
        """With guidance, the codes chosen go to the conditional and to the negative block alike."""
        guided_at = [at for at, ask in enumerate(asks) if ask.negative is not None]
        states = torch.stack([*(ask.state for ask in asks), *(asks[at].negative for at in guided_at)])
        samplings = [ask.sampling for ask in asks]
        places = [ask.choice.place for ask in (*asks, *(asks[at] for at in guided_at))]
        context = self._block_context(places, [*(ask.seen for ask in asks), *(asks[at].negative_seen for at in guided_at)])

        def pick(logits_NK: torch.Tensor, number: int) -> torch.Tensor:
            own, negative = logits_NK[: len(asks)], logits_NK[len(asks) :]
            if guided_at:
                own = own.clone()
                own[guided_at] = _mixed(own[guided_at], negative, [asks[at].scale for at in guided_at])
            chosen = torch.tensor(choose(own, samplings, [(ask.number, number) for ask in asks]), device=own.device)
            return torch.cat([chosen, chosen[guided_at]])

        codes = self._depth.write(states, context, pick)[: len(asks)].tolist()
        return [Block(ask.choice.place, tuple(row)) for ask, row in zip(asks, codes, strict=True)]

    def _block_context(self, places: list[int], seen: list[Seen]) -> BlockContext:
        nothing = (NOTHING,) * self._depth.slots
        before, said = [own.before or nothing for own in seen], [(NOTHING,) * (SAID - len(own.said)) + own.said for own in seen]
        device = self._head.device
        return BlockContext(
            before_NC=torch.tensor(before, device=device),
            places_N=torch.tensor(places, device=device),
            said_NS=torch.tensor(said, device=device),
        )

    def _slice(self, start: int, stop: int) -> Callable[[torch.Tensor], torch.Tensor]:
        if (start, stop) not in self._slices:
            packed = self._packed and stop - start <= PACKED_IDS
            part = self._head[start:stop]
            product = self._product(part) if packed else (lambda states: F.linear(states, part))
            least = getattr(product, "least_rows", LEAST_ROWS)
            self._slices[start, stop] = lambda states: product(_padded(states, least))[: len(states)]
        return self._slices[start, stop]

    def _refusal(self, choice: Choice, logits: torch.Tensor) -> torch.Tensor:
        """The ids of the slice that the grammar refuses, on the device: bool (stop - start,)."""
        if choice not in self._refused:
            mask = np.ones(choice.stop - choice.start, bool) if choice.mask is None else choice.mask
            self._refused[choice] = torch.from_numpy(~mask).to(logits.device)
        return self._refused[choice]


def guided(head, asks: Sequence[Ask]) -> torch.Tensor:
    """Logits of all asks, those with a negative state moved away from what that gives. head: states -> logits."""
    at = [number for number, ask in enumerate(asks) if ask.negative is not None]
    both = head(torch.stack([*(ask.state for ask in asks), *(asks[number].negative for number in at)]))
    if not at:
        return both
    logits, negative = both[: len(asks)].clone(), both[len(asks) :]
    logits[at] = _mixed(logits[at], negative, [asks[number].scale for number in at])
    return logits


def _mixed(logits: torch.Tensor, negative: torch.Tensor, scales: list[float]) -> torch.Tensor:
    """Guidance. Without the log-softmax of both, which moves all logits of a row alike."""
    return negative + torch.tensor(scales, device=logits.device)[:, None] * (logits - negative)


def _padded(states: torch.Tensor, least: int) -> torch.Tensor:
    return states if len(states) >= least else F.pad(states, (0, 0, 0, least - len(states)))
