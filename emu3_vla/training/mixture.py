"""Documents of several kinds, packed into rows of one length: a pure function of (seed, step), so a resumed run sees the same data.

A *pool* is the documents of several steps: so many of each kind, the next ones of that kind's shuffled anchors, planned into rows so that
hardly a position is left empty. The last few that find no place are left out until their anchors' turn comes again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from emu3_vla.documents import Batch, Segment, length_of, pack, plan_rows
from emu3_vla.training.kinds import KINDS, Anchor, Material, anchors_of, write
from emu3_vla.training.stream import numbers_between, of_all_tasks

POOL_STEPS, POOL_DOCUMENTS = 16, 4096
"""A pool is so many steps, or as few as hold so many documents."""
FILL = 0.985
"""Of a pool's positions, so many are drawn documents for: a little less than there are, because these come in whole documents."""
MEASURED = 512
"""Documents of each kind whose mean length stands for all."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Share of the documents of each kind, on any scale; see emu3_vla/training/kinds.py. All 0: the acting stream, a document a row."""

    text: float = 0.0
    draw: float = 0.0
    describe: float = 0.0
    film: float = 0.0
    world: float = 0.0
    ask: float = 0.0
    act: float = 0.0
    interleave: float = 0.0
    moments: int = 4  # most frames of a film, and most pictures of an interleaved document

    def __post_init__(self):
        for name in KINDS:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"mixture.{name} is {getattr(self, name)}, expected a number from 0 on")
        if self.moments < 2:
            raise ValueError(f"mixture.moments is {self.moments}, expected at least 2")

    def shares(self) -> dict[str, float]:
        """Of the kinds that occur, summing to 1; empty where none does."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name in KINDS}
        total = sum(given.values())
        return {name: share / total for name, share in given.items() if share}


class MixtureStream:
    """Packed documents of a set of episodes.

    shares: of each kind, summing to 1. context: positions of a row. rows: of a step, over all processes. Raises ValueError where the
    episodes cannot give a kind of document, DocumentError (from `batch` and `fixed`) for a document longer than the context.
    """

    def __init__(self, material: Material, shares: dict[str, float], *, context: int, rows: int, seed: int):
        self._material, self._shares = material, shares
        self._context, self._rows, self._seed = context, rows, seed
        self._anchors = {name: anchors_of(name, material) for name in shares}
        lengths = {name: self._mean_length(name) for name in shares}
        a_step = FILL * rows * context / sum(share * lengths[name] for name, share in shares.items())
        self._steps = min(POOL_STEPS, math.ceil(POOL_DOCUMENTS / a_step))
        self._drawn = {name: max(1, round(share * a_step * self._steps)) for name, share in shares.items()}
        self._pool: tuple[int, list[list[list[Segment]]]] = (-1, [])

    def __len__(self) -> int:
        """Different anchors of all kinds."""
        return sum(map(len, self._anchors.values()))

    def epochs(self, steps: int) -> float:
        """How often so many steps go through the kind that they go through most often."""
        return max(self._drawn[name] * steps / self._steps / len(anchors) for name, anchors in self._anchors.items())

    def batch(self, step: int, rank: int = 0, processes: int = 1) -> Batch:
        """This process's rows of the batch of `step`."""
        return pack(self.rows(step)[rank::processes], self._material.vocabulary, self._context)

    def rows(self, step: int) -> list[list[list[Segment]]]:
        """Documents of every row of the batch of `step`."""
        pool, slot = divmod(step, self._steps)
        if self._pool[0] != pool:
            self._pool = (pool, self._planned(pool))
        return self._pool[1][slot * self._rows : (slot + 1) * self._rows]

    def fixed(self, count: int) -> list[Batch]:
        """About `count` documents of all kinds, spread over the episodes, in batches; for validation."""
        random, documents = np.random.default_rng((self._seed, 2)), []
        for name, share in self._shares.items():
            documents += self._some(name, max(1, round(share * count)), random)
        rows, _ = self._packed(documents)
        groups = [rows[start : start + self._rows] for start in range(0, len(rows), self._rows)]
        return [pack(group, self._material.vocabulary, self._context, trim=True) for group in groups]

    def shown(self, count: int) -> dict[str, list[Segment]]:
        """Up to `count` documents of each kind, by name, of all tasks in turn, always the same: for people to look at."""
        documents, episodes = {}, self._material.episodes
        for kind, anchors in self._anchors.items():
            random = np.random.default_rng((self._seed, 4, list(KINDS).index(kind)))
            chosen = of_all_tasks([(episodes[anchor.episode], anchor.frames) for anchor in anchors], count, self._seed)
            written = [write(kind, self._material, anchors[number], random) for number in chosen]
            documents |= {f"{kind}/{number}": document for number, document in enumerate(written)}
        return documents

    def _planned(self, pool: int) -> list[list[list[Segment]]]:
        """Rows of documents of all steps of a pool."""
        random = np.random.default_rng((self._seed, 1, pool))
        documents = []
        for name, drawn in self._drawn.items():
            anchors = self._anchors[name]
            key = (self._seed, 0, list(KINDS).index(name))
            numbers = numbers_between(pool * drawn, (pool + 1) * drawn, len(anchors), key)
            documents += [write(name, self._material, anchors[number], random) for number in numbers]
        rows, _ = self._packed([documents[number] for number in random.permutation(len(documents))], self._steps * self._rows)
        return [rows[number] for number in random.permutation(len(rows))]

    def _packed(self, documents: Sequence[list[Segment]], rows: int | None = None) -> tuple[list[list[list[Segment]]], list[int]]:
        lengths = [length_of(document, self._material.vocabulary) for document in documents]
        planned, left_out = plan_rows(lengths, self._context, rows)
        return [[documents[number] for number in row] for row in planned], left_out

    def _mean_length(self, name: str) -> float:
        documents = self._some(name, MEASURED, np.random.default_rng((self._seed, 3)))
        return float(np.mean([length_of(document, self._material.vocabulary) for document in documents]))

    def _some(self, name: str, count: int, random: np.random.Generator) -> list[list[Segment]]:
        """Up to `count` documents of a kind, spread over the episodes."""
        anchors: list[Anchor] = self._anchors[name]
        chosen = np.unique(np.linspace(0, len(anchors) - 1, min(count, len(anchors))).round().astype(int))
        return [write(name, self._material, anchors[number], random) for number in chosen]
