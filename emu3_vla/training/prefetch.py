"""The next step's batch is made while the device computes this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Made = TypeVar("Made")


def prefetched(make: Callable[[int], Made], first: int, last: int) -> Iterator[tuple[Made, float]]:
    """make(first), ..., make(last - 1), each with the seconds that were waited for it. Only one thread ever calls `make`.

    Raises what `make` raises, at its step.
    """
    if first >= last:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="next batch") as pool:
        following = pool.submit(make, first)
        for step in range(first, last):
            began = time.perf_counter()
            made = following.result()
            waited = time.perf_counter() - began
            if step + 1 < last:
                following = pool.submit(make, step + 1)
            yield made, waited
