"""Numbers from finished chains: success per position, average length, per-task rates, each with its interval.

Chains that ended by an error count nowhere: they say nothing about the policy, and are reported apart.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

Z_95 = 1.959963984540054
BOOTSTRAP_RESAMPLES = 10_000
FEWEST_FOR_INTERVAL = 10
"""Below this many chains a bootstrap interval of their mean says next to nothing (of one chain it has no width), so it is not shown."""


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion. Raises ValueError without trials.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials; expected 0 <= successes <= trials and at least one trial")
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    # At 0 and at 1 the bound is exact; rounding must not put it on the other side of the share.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


def bootstrap_mean_interval(values: Sequence[int], seed: int, resamples: int = BOOTSTRAP_RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of whole numbers, from a generator of its own. Raises ValueError without values."""
    if not len(values):
        raise ValueError("no values to take an interval of")
    levels, counts = np.unique(np.asarray(values), return_counts=True)
    # Drawing n values with replacement is drawing how often each level comes up.
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    low, high = np.percentile(drawn @ levels / len(values), (2.5, 97.5))
    return float(low), float(high)


def summarise(chains: Sequence[dict[str, Any]], seed: int, length: int = 5) -> dict[str, Any]:
    """Summary of finished chains (as `ChainResult.to_json` gives them).

    Returns scored, errors (numbers of chains); average_length; success_rate (`length` shares: the first k subtasks solved);
    ci95 {"average_length": [low, high], "success_rate": [[low, high], ...]}; per_task. With no scored chain the figures are None.
    """
    scored = [chain for chain in chains if chain["error"] is None]
    summary: dict[str, Any] = {"scored": len(scored), "errors": len(chains) - len(scored), "per_task": per_task(scored)}
    if not scored:
        return summary | {"average_length": None, "success_rate": None, "ci95": None}
    solved = [chain["num_solved"] for chain in scored]
    reached = [sum(number >= position for number in solved) for position in range(1, length + 1)]
    average = sum(solved) / len(solved)
    if not math.isclose(sum(reached) / len(solved), average, abs_tol=1e-9):
        raise ValueError(f"success per position {reached} of {len(solved)} does not add up to average length {average}")
    return summary | {
        "average_length": average,
        "success_rate": [number / len(solved) for number in reached],
        "ci95": {
            "average_length": list(bootstrap_mean_interval(solved, seed)),
            "success_rate": [list(wilson_interval(number, len(solved))) for number in reached],
        },
    }


def per_task(chains: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per attempted task: attempts, successes, rate, ci95, mean steps of the successes, and what happened instead on failures."""
    attempts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for chain in chains:
        for attempt in chain["attempts"]:
            attempts[attempt["task"]].append(attempt)
    return {task: _task_row(attempts[task]) for task in sorted(attempts)}


def _task_row(attempts: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [attempt["steps"] for attempt in attempts if attempt["success"]]
    instead: dict[str, int] = defaultdict(int)
    for attempt in attempts:
        for task in attempt["happened"]:
            instead[task] += 1
    return {
        "attempts": len(attempts),
        "successes": len(steps),
        "rate": len(steps) / len(attempts),
        "ci95": list(wilson_interval(len(steps), len(attempts))),
        "mean_steps": sum(steps) / len(steps) if steps else None,
        "happened_instead": dict(sorted(instead.items(), key=lambda item: -item[1])),
    }
