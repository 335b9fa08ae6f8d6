"""results.json: what was measured, by which rules, with which software."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from eval.environment import EnvConfig
from eval.protocol import OFFICIAL_SINGLE_TASK, deviations
from eval.provenance import git_commit, policy_provenance, versions
from eval.sequences import CHAIN_LENGTH
from eval.statistics import FEWEST_FOR_INTERVAL, summarise

RESULTS_FILE, REPORT_FILE = "results.json", "report.html"
NEEDED = (
    "policy",
    "num_sequences",
    "scored",
    "errors",
    "average_length",
    "success_rate",
    "protocol",
    "scene",
    "simulator",
    "chains",
    "seed",
)


class UnreadableResults(ValueError):
    """A file that does not hold the results of an evaluation, or whose figures do not add up."""


def assemble(
    chains: list[dict[str, Any]],
    *,
    policy: str,
    env: EnvConfig,
    used: dict[str, Any],
    seed: int,
    config: dict[str, Any],
    wall_s: float,
    length: int = CHAIN_LENGTH,
) -> dict[str, Any]:
    """results.json as a dictionary.

    chains: as ChainResult.to_json gives them, in the order that they are to be listed in. used: protocol.used_protocol(...). config: the
    command's options. wall_s: duration of this invocation. length: subtasks in the longest chain.
    """
    summary = summarise(chains, seed, length)
    results = {
        "policy": policy,
        "num_sequences": len(chains),
        **summary,
        "protocol": used,
        "deviations": deviations(used, summary["errors"]),
        "seed": seed,
        "simulator": env.simulator,
        "scene": env.scene,
        "assets": env.assets_name,
        "calvin_env": named_by(chains, "calvin_env"),
        "renderer": named_by(chains, "renderer"),
        **facts(policy),
        "config": config | {"output_dir": ""},
        "timing": timing(chains, wall_s),
        "safety": interventions(chains),
        "chains": chains,
    }
    check_sums(results)
    return results


def facts(policy: str) -> dict[str, Any]:
    """What a result says of the software that made it."""
    return {
        "git_commit": git_commit(),
        "versions": versions(),
        "policy_provenance": policy_provenance(policy),
    }


def named_by(chains: list[dict[str, Any]], key: str) -> str:
    """What the simulators that ran `chains` say of themselves under `key`: "calvin_env" (version) or "renderer"."""
    return " and ".join(sorted({chain[key] for chain in chains if chain[key]})) or "unknown, as no chain began"


def timing(chains: list[dict[str, Any]], wall_s: float) -> dict[str, float | int | None]:
    """Steps, seconds and rates over all attempts. Seconds of chains are their own; `wall_s` is the last invocation's."""
    attempts = [attempt for chain in chains for attempt in chain["attempts"]]
    decisions, policy_s = sum(a["decisions"] for a in attempts), sum(a["policy_seconds"] for a in attempts)
    steps, seconds = sum(chain["steps"] for chain in chains), sum(chain["seconds"] for chain in chains)
    return {
        "steps": steps,
        "decisions": decisions,
        "chain_s": seconds,
        "policy_s": policy_s,
        "wall_s": wall_s,
        "steps_per_s_and_worker": steps / seconds if seconds else None,
        "decision_ms": 1000 * policy_s / decisions if decisions else None,
    }


def interventions(chains: list[dict[str, Any]]) -> dict[str, int]:
    """How often the safety guard changed an action, by kind."""
    return dict(Counter(event["kind"] for chain in chains for event in chain.get("safety", [])))


def headline(results: dict[str, Any]) -> str:
    """One line: average length (or success rate), interval, chains, simulator, and whether the protocol was followed."""
    single = results["protocol"]["name"] == OFFICIAL_SINGLE_TASK["name"]
    kind = "rollout" if single else "chain"
    if results["average_length"] is None:
        return f"no {kind} was scored: all {results['errors']} ended by an error"
    low, high = results["ci95"]["success_rate"][0] if single else results["ci95"]["average_length"]
    few = results["scored"] < FEWEST_FOR_INTERVAL
    interval = "too few for an interval" if few else f"95 % interval {low:.3f} to {high:.3f}"
    number = f"{results['scored']} {kind}{'s' if results['scored'] != 1 else ''}"
    of = f" of {len(results['per_task'])} tasks" if single else ""
    figure = f"{'success rate' if single else 'average length'} {results['average_length']:.3f}"
    text = f"{figure} ({number}{of}; {interval}; simulator {results['simulator']})"
    return text + (f"; deviates from {results['protocol']['name']}: {'; '.join(results['deviations'])}" if results["deviations"] else "")


def read_results(path: str | Path) -> dict[str, Any]:
    """A results.json, or the folder that holds one. Its figures are checked against its chains.

    Raises FileNotFoundError, UnreadableResults naming what is wrong.
    """
    path = Path(path)
    path = path / RESULTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no results {path}; give a results.json, or the folder that 'emu3-vla eval' wrote")
    try:
        results = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnreadableResults(f"{path} is not JSON: {error}") from error
    missing = [key for key in NEEDED if not isinstance(results, dict) or key not in results]
    if missing:
        raise UnreadableResults(f"{path} holds no results of an evaluation: {missing[0]!r} is missing")
    try:
        check_sums(results)
    except (KeyError, TypeError, AttributeError) as error:
        raise UnreadableResults(f"{path}: its chains are not those of an evaluation ({type(error).__name__}: {error})") from error
    except UnreadableResults as error:
        raise UnreadableResults(f"{path}: {error}") from error
    return results


def check_sums(results: dict[str, Any]) -> None:
    """Raises UnreadableResults where figures do not add up: steps and successes of a chain's attempts, the average over chains, and the
    success rates, whose sum is the average length."""
    for chain in results["chains"]:
        for key, total in (
            ("steps", sum(attempt["steps"] for attempt in chain["attempts"])),
            ("num_solved", sum(attempt["success"] for attempt in chain["attempts"])),
        ):
            if chain[key] != total:
                raise UnreadableResults(f"chain {chain['index']} states {key} {chain[key]}, but its attempts make {total}")
    solved = [chain["num_solved"] for chain in results["chains"] if chain["error"] is None]
    if results["num_sequences"] != len(results["chains"]) or results["scored"] != len(solved):
        stated = f"{results['num_sequences']} chains, {results['scored']} scored"
        raise UnreadableResults(f"it states {stated}, but lists {len(results['chains'])}, {len(solved)} of them scored")
    if not solved:
        return
    for name, figure in (("average_length", results["average_length"]), ("sum of success_rate", sum(results["success_rate"]))):
        if not math.isclose(figure, sum(solved) / len(solved), abs_tol=1e-9):
            raise UnreadableResults(f"its {name} is {figure}, but its chains make {sum(solved) / len(solved)}")


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def error_message(results: dict[str, Any]) -> str:
    """What to say on standard error where chains ended by an error."""
    broken = [chain for chain in results["chains"] if chain["error"]]
    first = broken[0]["error"]
    return (
        f"emu3-vla: {len(broken)} of {results['num_sequences']} chains ended by an error and are not scored; "
        f"chain {broken[0]['index']}: {first['type']}: {first['message']}"
    )
