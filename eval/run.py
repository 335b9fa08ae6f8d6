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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import policies
from envs.calvin.tasks import TASKS
from eval.environment import EnvConfig
from eval.keeping import RECORD_NONE, Keep, check_record
from eval.progress import LiveLine, duration
from eval.protocol import MAX_STEPS, load_instructions, select_chains, used_protocol
from eval.provenance import policy_provenance
from eval.results import REPORT_FILE, RESULTS_FILE, assemble, error_message, headline, named_by, write_json
from eval.sequences import OFFICIAL_CHAINS
from eval.workers import Job, run_chains

CHAINS_FILE = "chains.jsonl"


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How much is evaluated, and by which rules."""

    num_sequences: int = OFFICIAL_CHAINS  # chains, from the first official one on
    workers: int = 2  # processes; no result depends on it
    max_steps: int = MAX_STEPS  # control steps a subtask
    annotations: str = ""  # CALVIN's new_playtable_validation.yaml; empty: our own validation sentences
    tasks: tuple[str, ...] = ()  # only chains whose five subtasks are all among these; empty: all 34
    record: str = RECORD_NONE  # Rerun recordings: none, failures (of chains not solved to the end) or all

    def __post_init__(self):
        for name, least in (("num_sequences", 1), ("workers", 1), ("max_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"eval.{name}={getattr(self, name)}, expected at least {least}")
        check_record(self.record)
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
        policy_provenance(self.policy)  # names an unknown policy or a damaged checkpoint now, not after hours


def main(config: EvalConfig) -> None:
    """Run what is still to run, then write results.json and report.html. Exits with 1 where chains ended by an error."""
    from eval.report import write_report

    folder = Path(config.output_dir)
    instructions = load_instructions(config.eval.annotations)
    chains = select_chains(config.eval.num_sequences, config.eval.tasks)
    job = Job(
        policy=config.policy,
        env=config.env,
        instructions=instructions,
        max_steps=config.eval.max_steps,
        seed=config.seed,
        keep=Keep(folder=str(folder), max_steps=config.eval.max_steps, record=config.eval.record, title=f"policy {config.policy}"),
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
    used = used_protocol(
        chains=len(chains),
        max_steps=config.eval.max_steps,
        tasks=len(set(config.eval.tasks)) or len(TASKS),
        scene=config.env.scene,
        own_assets=config.env.own_assets,
        version=named_by(outcomes, "calvin_env"),
        own_sentences=not config.eval.annotations,
    )
    results = assemble(
        outcomes,
        policy=config.policy,
        env=config.env,
        used=used,
        seed=config.seed,
        config=asdict(config),
        wall_s=time.perf_counter() - began,
    )
    write_json(folder / RESULTS_FILE, results)
    write_report(results, folder / REPORT_FILE)
    print(headline(results))
    for name in (RESULTS_FILE, REPORT_FILE):
        print(folder / name)
    if results["errors"]:
        raise SystemExit(error_message(results) + " (the same command tries them again)")


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
