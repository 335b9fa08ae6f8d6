"""`emu3-vla eval`: score a policy on CALVIN's long-horizon chains.

    emu3-vla eval policy=expert eval.num_sequences=50
    emu3-vla eval policy=outputs/train/3f2a91c0/policy eval.annotations=calvin/calvin_models/conf/annotations/new_playtable_validation.yaml

Every finished chain is a line of chains.jsonl at once; a run that was stopped or killed goes on from there, and its result is the same
as an uninterrupted one's. Chains that ended by an error are tried again when the command is repeated.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import policies
from envs.calvin.tasks import TASKS
from eval.environment import EnvConfig, renderer
from eval.progress import LiveLine, duration
from eval.protocol import MAX_STEPS, deviations, load_instructions, select_chains, used_protocol
from eval.provenance import git_commit, policy_provenance, versions
from eval.sequences import CHAIN_LENGTH, OFFICIAL_CHAINS
from eval.statistics import summarise
from eval.workers import Job, run_chains

CHAINS_FILE, RESULTS_FILE, REPORT_FILE = "chains.jsonl", "results.json", "report.html"


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How much is evaluated, and by which rules."""

    num_sequences: int = OFFICIAL_CHAINS  # chains, from the first official one on
    workers: int = 2  # processes; no result depends on it
    max_steps: int = MAX_STEPS  # control steps a subtask
    annotations: str = ""  # CALVIN's new_playtable_validation.yaml; empty: our own validation sentences
    tasks: tuple[str, ...] = ()  # only chains whose five subtasks are all among these; empty: all 34

    def __post_init__(self):
        for name, least in (("num_sequences", 1), ("workers", 1), ("max_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"eval.{name}={getattr(self, name)}, expected at least {least}")
        select_chains(self.num_sequences, self.tasks)
        load_instructions(self.annotations)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Options of `emu3-vla eval`. Wrong ones are refused here, before a folder is made or a worker started."""

    policy: str = policies.SHIPPED  # expert, zero, random, a shipped name, or a checkpoint folder
    env: EnvConfig = field(default_factory=EnvConfig)
    eval: EvalOptions = field(default_factory=EvalOptions)
    seed: int = 0  # of what the policy draws at random, and of the bootstrap interval
    output_dir: str = ""

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}, expected zero or more")
        policies.checkpoint_folder(self.policy)


def main(config: EvalConfig) -> None:
    """Run what is still to run, then write results.json and report.html. Exits with 1 where chains ended by an error."""
    from eval.report import write_report

    folder = Path(config.output_dir)
    instructions = load_instructions(config.eval.annotations)
    chains = select_chains(config.eval.num_sequences, config.eval.tasks)
    job = Job(
        policy=config.policy, env=config.env, instructions=instructions, max_steps=config.eval.max_steps, seed=config.seed
    )
    began = time.perf_counter()
    with ChainLog(folder / CHAINS_FILE) as log, LiveLine() as line:
        meter = _Meter(line, total=len(chains), done=[log.done[index] for index, _ in chains if index in log.done])
        remaining = [(index, chain) for index, chain in chains if index not in log.done]

        def finished(result: dict[str, Any]) -> None:
            log.append(result)
            meter.finished(result)

        run_chains(job, remaining, config.eval.workers, finished, meter.ticked)
        outcomes = [log.latest[index] for index, _ in chains]
    results = assemble(config, outcomes, wall_s=time.perf_counter() - began)
    write_json(folder / RESULTS_FILE, results)
    write_report(results, folder / REPORT_FILE)
    print(headline(results))
    for name in (RESULTS_FILE, REPORT_FILE):
        print(folder / name)
    if results["errors"]:
        raise SystemExit(_error_message(results))


def assemble(config: EvalConfig, chains: list[dict[str, Any]], wall_s: float) -> dict[str, Any]:
    """results.json as a dictionary. chains: in the order of the protocol. wall_s: this invocation's duration."""
    used = used_protocol(
        chains=config.eval.num_sequences,
        max_steps=config.eval.max_steps,
        tasks=len(set(config.eval.tasks)) or len(TASKS),
        scene=config.env.scene,
        own_assets=not config.env.assets,
        version=config.env.version,
        own_sentences=not config.eval.annotations,
    )
    summary = summarise(chains, config.seed, CHAIN_LENGTH)
    return {
        "policy": config.policy,
        "num_sequences": len(chains),
        **summary,
        "protocol": used,
        "deviations": deviations(used, summary["errors"]),
        "seed": config.seed,
        "scene": config.env.scene,
        "assets": config.env.assets_name,
        "calvin_env": config.env.version,
        **facts(config.policy),
        "config": asdict(config) | {"output_dir": ""},
        "timing": timing(chains, wall_s),
        "chains": chains,
    }


def facts(policy: str) -> dict[str, Any]:
    """What a result says of the software that made it."""
    return {
        "renderer": renderer(),
        "git_commit": git_commit(),
        "versions": versions(),
        "policy_provenance": policy_provenance(policy),
    }


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
    """One line: average length, interval, chains, and whether the protocol was followed."""
    if results["average_length"] is None:
        return f"no chain was scored: all {results['errors']} ended by an error"
    low, high = results["ci95"]["average_length"]
    text = f"average length {results['average_length']:.3f} (95 % interval {low:.3f} to {high:.3f}, {results['scored']} chains)"
    return text + (f"; deviates from {results['protocol']['name']}: {'; '.join(results['deviations'])}" if results["deviations"] else "")


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


class ChainLog:
    """chains.jsonl: a line a finished chain, on disk before the next one starts. One process at a time.

    done: chains that need not run again (index → record). latest: also those that ended by an error.
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> ChainLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise ValueError(f"another process is writing {self.path}; wait for it, or choose another output_dir=") from None
        self.latest = {record["index"]: record for record in self._read()}
        return self

    @property
    def done(self) -> dict[int, dict[str, Any]]:
        return {index: record for index, record in self.latest.items() if record["error"] is None}

    def append(self, record: dict[str, Any]) -> None:
        """Write one chain's record and wait until the disk has it."""
        self.file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.latest[record["index"]] = record

    def _read(self) -> Iterator[dict[str, Any]]:
        self.file.seek(0)
        content = self.file.read()
        whole = content.rfind(b"\n") + 1
        self.file.truncate(whole)  # a line cut short by a kill; its chain runs again
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.path}, line {number}: not a chain's record ({error}); delete that line to run it again") from error

    def __exit__(self, *_: object) -> None:
        self.file.close()


class _Meter:
    """Feeds the live line: chains done, average length so far, steps a second, time left."""

    def __init__(self, line: LiveLine, total: int, done: list[dict[str, Any]]):
        self.line, self.total = line, total
        self.solved = [record["num_solved"] for record in done]
        self.resumed, self.errors, self.steps = len(done), 0, 0
        self.began = time.monotonic()
        self._show()

    def ticked(self, steps: int) -> None:
        self.steps += steps
        self._show()

    def finished(self, record: dict[str, Any]) -> None:
        if record["error"] is None:
            self.solved.append(record["num_solved"])
        else:
            self.errors += 1
        self._show()

    def _show(self) -> None:
        seconds = time.monotonic() - self.began
        done = len(self.solved) + self.errors
        average = f"{sum(self.solved) / len(self.solved):.2f}" if self.solved else "–"
        ran = done - self.resumed
        left = duration(seconds / ran * (self.total - done)) if ran else "–"
        errors = f" · {self.errors} errors" if self.errors else ""
        rate = self.steps / seconds if seconds > 1 else 0
        self.line.show(f"chains {done}/{self.total} · average length {average} · {rate:.0f} steps/s · {left} left{errors}")


def _error_message(results: dict[str, Any]) -> str:
    broken = [chain for chain in results["chains"] if chain["error"]]
    first = broken[0]["error"]
    return (
        f"emu3-vla: {len(broken)} of {results['num_sequences']} chains ended by an error and are not scored; "
        f"chain {broken[0]['index']}: {first['type']}: {first['message']} (the same command tries them again)"
    )
