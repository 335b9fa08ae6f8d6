"""The walk-through's table: the new task and the old ones, before and after, with 95 % Wilson intervals.

python -m examples.finetune.compare outputs/pointing
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from eval.results import read_results
from eval.statistics import wilson_interval

POLICIES = ("before", "lora", "full")


def rows(folder: Path) -> list[tuple[str, str, str]]:
    """(policy, new task, old tasks) for each policy that was evaluated on both. Raises FileNotFoundError where none was."""
    found = []
    for name in POLICIES:
        new, old = folder / "new_task" / name / "results.json", folder / "old_tasks" / name / "results.json"
        if new.is_file() and old.is_file():
            results, counts = json.loads(new.read_text()), _old(old)
            found.append((name, _said(results["successes"], results["n"]), _said(*counts)))
    if not found:
        raise FileNotFoundError(f"{folder} holds no new_task/<policy>/results.json beside old_tasks/<policy>/results.json")
    return found


def _old(path: Path) -> tuple[int, int]:
    """(successes, rollouts) over all of the old tasks."""
    tasks = read_results(path)["per_task"].values()
    return sum(row["successes"] for row in tasks), sum(row["attempts"] for row in tasks)


def _said(successes: int, trials: int) -> str:
    if not trials:
        return "none that did not break"
    low, high = wilson_interval(successes, trials)
    return f"{successes} of {trials}, {successes / trials:.0%} ({low:.0%} to {high:.0%})"


def main(folder: str) -> None:
    """Print the table."""
    print("| policy | new task | old tasks |\n|---|---|---|")
    for row in rows(Path(folder)):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
