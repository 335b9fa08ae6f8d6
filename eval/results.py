"""results.json: what was measured, by which rules, with which software."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.environment import EnvConfig
from eval.protocol import deviations
from eval.provenance import git_commit, policy_provenance, versions
from eval.sequences import CHAIN_LENGTH
from eval.statistics import FEWEST_FOR_INTERVAL, summarise

RESULTS_FILE, REPORT_FILE = "results.json", "report.html"


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
    return {
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
        "chains": chains,
    }


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


def headline(results: dict[str, Any]) -> str:
    """One line: average length, interval, chains, simulator, and whether the protocol was followed."""
    if results["average_length"] is None:
        return f"no chain was scored: all {results['errors']} ended by an error"
    low, high = results["ci95"]["average_length"]
    few = results["scored"] < FEWEST_FOR_INTERVAL
    interval = "too few for an interval" if few else f"95 % interval {low:.3f} to {high:.3f}"
    chains = f"{results['scored']} chain{'s' if results['scored'] != 1 else ''}"
    text = f"average length {results['average_length']:.3f} ({chains}; {interval}; simulator {results['simulator']})"
    return text + (f"; deviates from {results['protocol']['name']}: {'; '.join(results['deviations'])}" if results["deviations"] else "")


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
