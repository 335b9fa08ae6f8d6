"""`emu3-vla compare`: two evaluations of the same chains, side by side, paired chain by chain.

    emu3-vla compare outputs/eval/3f2a91c0 outputs/eval/77c01b2e

Writes comparison.json and prints a table. Results that were not made by the same rules are refused. Chains that only one of the two has
scored are left out, and counted.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eval.paired import holm, paired_bootstrap, sign_test
from eval.results import read_results, write_json
from eval.statistics import FEWEST_FOR_INTERVAL

COMPARISON_FILE = "comparison.json"
TABLE_WIDTH = 140
SAME = ("simulator", "scene", "calvin_env", "renderer")
SELECTION = ("chains", "rollouts_per_task", "tasks")
"""Fields of the protocol that say which chains were run, not how: the common ones are compared."""


class NotComparable(ValueError):
    """Two results that were not made by the same rules, or have no chain in common."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Options of `emu3-vla compare`."""

    a: str  # results.json, or the folder that holds it
    b: str  # the other; differences are b - a
    seed: int = 0  # of the bootstrap interval
    output_dir: str = ""


def main(config: CompareConfig) -> None:
    """Write comparison.json and print the table."""
    comparison = compare(read_results(config.a), read_results(config.b), seed=config.seed) | {"files": {"a": config.a, "b": config.b}}
    path = Path(config.output_dir) / COMPARISON_FILE
    write_json(path, comparison)
    print_table(comparison)
    print(path)


def compare(a: dict[str, Any], b: dict[str, Any], *, seed: int = 0) -> dict[str, Any]:
    """The paired comparison of two results (as `read_results` gives them); differences are b - a.

    Returns what both share (protocol, scene, simulator, renderer), `policies`, `pairs` and how many chains either has alone;
    average_length {"a", "b", "difference", "ci95", "wins", "losses", "p"}; per_position and per_task, whose p-values are McNemar's exact
    ones, `p_holm` adjusted for the number of rows. A task's rates are over the pairs in which both policies came to attempt it.
    Raises NotComparable naming the field that differs.
    """
    check_comparable(a, b)
    pairs = pair_chains(a, b)
    solved = [(left["num_solved"], right["num_solved"]) for left, right in pairs]
    length = max(len(left["subtasks"]) for left, _ in pairs)
    return {
        "policies": {"a": a["policy"], "b": b["policy"]},
        "git_commits": {"a": a.get("git_commit"), "b": b.get("git_commit")},
        **{key: a.get(key) for key in SAME},
        "protocol": {key: value for key, value in a["protocol"].items() if key not in SELECTION},
        "deviations": {"a": a.get("deviations", []), "b": b.get("deviations", [])},
        "seed": seed,
        "pairs": len(pairs),
        "only": {"a": a["scored"] - len(pairs), "b": b["scored"] - len(pairs)},
        "errors": {"a": a["errors"], "b": b["errors"]},
        "average_length": _average(solved, seed),
        "per_position": _adjusted({str(k): _mcnemar([(left >= k, right >= k) for left, right in solved]) for k in range(1, length + 1)}),
        "per_task": _adjusted({task: _mcnemar(outcomes) for task, outcomes in sorted(_attempted_by_both(pairs).items())}),
    }


def check_comparable(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Raises NotComparable naming the first field in which the rules differ."""
    for key in SAME:
        _require_same(key, a.get(key), b.get(key))
    ours, theirs = a["protocol"], b["protocol"]
    _require_same("protocol.name", ours.get("name"), theirs.get("name"))
    for key in sorted((set(ours) | set(theirs)) - set(SELECTION)):
        absent = {} if key == "variants" else None  # results from before there were variants
        _require_same(f"protocol.{key}", ours.get(key, absent), theirs.get(key, absent))
    if ours.get("variants"):  # what they draw depends on it
        _require_same("seed", a["seed"], b["seed"])


def pair_chains(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The chains that both have scored, in order of their index. Raises NotComparable where there are none, or one is not the same."""
    left, right = ({chain["index"]: chain for chain in results["chains"] if chain["error"] is None} for results in (a, b))
    common = sorted(left.keys() & right.keys())
    if not common:
        raise NotComparable(f"no chain was scored in both: {len(left)} in a, {len(right)} in b, none of the same index")
    for index in common:
        for key in ("initial_state", "subtasks"):
            _require_same(f"chains, number {index}: {key}", left[index][key], right[index][key])
    return [(left[index], right[index]) for index in common]


def print_table(comparison: dict[str, Any]) -> None:
    """The comparison on standard output."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:  # a file or a pipe has no width to fit into
        console.width = TABLE_WIDTH
    average, names = comparison["average_length"], comparison["policies"]
    only, protocol = comparison["only"], comparison["protocol"]
    console.print(f"a: {names['a']}\nb: {names['b']}")
    variants = f", variants {', '.join(protocol['variants'])}" if protocol.get("variants") else ""
    console.print(
        f"{comparison['pairs']} chains of {protocol['name']} in both ({only['a']} only in a, {only['b']} only in b are left out), "
        f"scene {comparison['scene']}, simulator {comparison['simulator']}{variants}"
    )
    interval = "too few chains for an interval" if average["ci95"] is None else "95 % interval {:+.3f} to {:+.3f}".format(*average["ci95"])
    console.print(
        f"average length {average['a']:.3f} → {average['b']:.3f}: {average['difference']:+.3f} ({interval}); "
        f"b further in {average['wins']}, a in {average['losses']} chains, sign test p = {average['p']:.3g}"
    )
    for title, rows in (("solved in a row", comparison["per_position"]), ("task", comparison["per_task"])):
        console.print(_rows_table(title, rows))


def _rows_table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=None, box=None, pad_edge=False)
    for number, heading in enumerate((title, "pairs", "a", "b", "b - a", "only a", "only b", "p", "p (Holm)")):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for name, row in rows.items():
        shares = f"{row['a']:.3f}", f"{row['b']:.3f}", f"{row['difference']:+.3f}"
        table.add_row(name, str(row["pairs"]), *shares, str(row["only_a"]), str(row["only_b"]), f"{row['p']:.3g}", f"{row['p_holm']:.3g}")
    return table


def _average(solved: list[tuple[int, int]], seed: int) -> dict[str, Any]:
    a, b = zip(*solved, strict=True)
    wins, losses = sum(y > x for x, y in solved), sum(y < x for x, y in solved)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return {
        "a": mean_a,
        "b": mean_b,
        "difference": mean_b - mean_a,
        "ci95": list(paired_bootstrap(a, b, seed)) if len(a) >= FEWEST_FOR_INTERVAL else None,
        "wins": wins,
        "losses": losses,
        "p": sign_test(wins, losses),
    }


def _mcnemar(outcomes: list[tuple[bool, bool]]) -> dict[str, Any]:
    only_a, only_b = sum(x and not y for x, y in outcomes), sum(y and not x for x, y in outcomes)
    rate_a, rate_b = (sum(side) / len(outcomes) for side in zip(*outcomes, strict=True))
    difference = (only_b - only_a) / len(outcomes)
    counts = {"pairs": len(outcomes), "only_a": only_a, "only_b": only_b}
    return counts | {"a": rate_a, "b": rate_b, "difference": difference, "p": sign_test(only_a, only_b)}


def _adjusted(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    adjusted = holm([row["p"] for row in rows.values()])
    return {name: row | {"p_holm": p} for (name, row), p in zip(rows.items(), adjusted, strict=True)}


def _attempted_by_both(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, list[tuple[bool, bool]]]:
    """Task → (success of a, success of b) wherever both attempted it at the same place of the same chain."""
    outcomes: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for left, right in pairs:
        for x, y in zip(left["attempts"], right["attempts"], strict=False):  # the one that failed earlier has fewer
            outcomes[x["task"]].append((x["success"], y["success"]))
    return outcomes


def _require_same(field: str, a: Any, b: Any) -> None:
    if a != b:
        raise NotComparable(f"not comparable: {field} is {a!r} in a and {b!r} in b; evaluate both by the same rules")
