"""The next steps' batches are made while the device computes this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch.utils.data import DataLoader, Dataset

Made = TypeVar("Made")

AHEAD = 4
"""Batches that each process makes ahead."""


def prefetched(
    make: Callable[[int], Made], first: int, last: int, *, workers: int = 0, pinned: bool = False
) -> Iterator[tuple[Made, float]]:
    """make(first), ..., make(last - 1), each with the seconds that were waited for it.

    workers: 0 for one thread, the only one that ever calls `make`, always one batch ahead; else forked processes that share the steps
    among themselves, for devices that are faster than one thread makes batches. pinned: each through its own pin_memory(), from processes.
    Raises what `make` raises, at its step.
    """
    if first >= last:
        return
    made_in_order = _from_processes(make, first, last, workers, pinned) if workers else _from_thread(make, first, last)
    began = time.perf_counter()
    for made in made_in_order:
        yield made, time.perf_counter() - began
        began = time.perf_counter()


def _from_thread(make: Callable[[int], Made], first: int, last: int) -> Iterator[Made]:
    with ThreadPoolExecutor(1, thread_name_prefix="next batch") as pool:
        following = pool.submit(make, first)
        for step in range(first, last):
            made = following.result()
            if step + 1 < last:
                following = pool.submit(make, step + 1)
            yield made


class _Steps(Dataset):
    def __init__(self, make: Callable[[int], Made]):
        self._make = make

    def __getitem__(self, step: int) -> Made:
        return self._make(step)


def _from_processes(make: Callable[[int], Made], first: int, last: int, workers: int, pinned: bool) -> Iterator[Made]:
    loader = DataLoader(
        _Steps(make),
        batch_size=None,  # a step's batch is made whole
        sampler=range(first, last),
        num_workers=workers,
        prefetch_factor=AHEAD,
        pin_memory=pinned,
        multiprocessing_context="fork",  # documents are in memory once, and `make` may be a closure
    )
    return iter(loader)
