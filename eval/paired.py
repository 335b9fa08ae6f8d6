"""Statistics of two policies that ran the same chains: what differs within a chain, not between averages.

Every test here is exact or seeded; none assumes a distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from eval.statistics import BOOTSTRAP_RESAMPLES, bootstrap_mean_interval


def paired_bootstrap(a: Sequence[int], b: Sequence[int], seed: int, resamples: int = BOOTSTRAP_RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap interval of mean(b - a), pairs drawn with replacement. Raises ValueError for unequal or empty lists."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}: pairs are needed")
    return bootstrap_mean_interval(np.subtract(b, a), seed, resamples)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of `wins` against `losses` under even odds; ties are left out beforehand. 1 where there are neither.

    Over the pairs in which exactly one policy succeeded this is McNemar's exact test.
    Source: Q. McNemar, Psychometrika 12 (1947); W. J. Dixon and A. M. Mood, The statistical sign test, JASA 41 (1946).
    """
    if min(wins, losses) < 0:
        raise ValueError(f"{wins} wins and {losses} losses; counts are at least 0")
    number, fewer = wins + losses, min(wins, losses)
    tail = sum(math.comb(number, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**number)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the order given.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statistics 6 (1979).
    """
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted
