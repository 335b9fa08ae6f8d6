"""`emu3-vla eval`: score a policy on CALVIN's long-horizon chains, or on each task by itself.

    emu3-vla eval policy=expert eval.num_sequences=50
    emu3-vla eval policy=expert eval.protocol=mtlc eval.rollouts_per_task=10
    emu3-vla eval policy=expert 'eval.variant=[resampled_poses,pushes]' eval.num_sequences=50
    emu3-vla eval policy=outputs/train/3f2a91c0/policy eval.annotations=calvin/calvin_models/conf/annotations/new_playtable_validation.yaml

Every finished chain is a line of chains.jsonl at once; a run that was stopped or killed goes on from there, and its result is the same
as an uninterrupted one's. Chains that ended by an error are tried again when the command is repeated.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import policies
from envs.calvin.tasks import TASKS
from eval.chain import Rules
from eval.environment import EnvConfig, PolicyOptions, choose
from eval.keeping import RECORD_CHOICES, RECORD_NONE, Keep
from eval.lockstep import Job
from eval.progress import LiveLine, duration
from eval.protocol import (
    LH_MTLC,
    MAX_STEPS,
    PROTOCOLS,
    ROLLOUTS_PER_TASK,
    SINGLE_TASK_MAX_STEPS,
    load_instructions,
    select_chains,
    used_protocol,
    used_single_task_protocol,
)
from eval.provenance import policy_provenance
from eval.results import REPORT_FILE, RESULTS_FILE, assemble, error_message, headline, named_by, write_json
from eval.sequences import CHAIN_LENGTH, OFFICIAL_CHAINS, Chain
from eval.variants import UNSEEN_WORDINGS, DisturbanceOptions, Variants, chosen_variants
from eval.workers import run_chains
from policies.chunking import ChunkingOptions
from policies.safety import SafetyOptions

CHAINS_FILE = "chains.jsonl"


ENGINES = ("processes", "ray")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How much is evaluated, and by which rules."""

    protocol: str = LH_MTLC  # lh_mtlc: chains of five subtasks; mtlc: each task by itself
    num_sequences: int = OFFICIAL_CHAINS  # lh_mtlc: chains, from the first official one on
    rollouts_per_task: int = ROLLOUTS_PER_TASK  # mtlc: rollouts of each task
    workers: int = 2  # processes; no result depends on it
    simulators: int = 1  # in each process, sharing one policy that can decide for several at once; no result depends on it
    engine: str = ENGINES[0]  # processes of this machine, or ray: actors of a Ray cluster; no result depends on it
    ray_address: str = ""  # of the cluster: "auto" or host:port; empty: one on this machine, for this run
    max_steps: int | None = None  # control steps a subtask; null: the protocol's (360, or 240 for mtlc)
    annotations: str = ""  # CALVIN's new_playtable_validation.yaml; empty: our own validation sentences
    tasks: tuple[str, ...] = ()  # only these tasks, or chains whose five subtasks are all among these; empty: all 34
    # none, resampled_poses, unseen_wordings, pushes, latency, camera_jitter, disturbances (the last three), or a list of them
    variant: tuple[str, ...] | str = ()
    disturbance: DisturbanceOptions = field(default_factory=DisturbanceOptions)
    record: str = RECORD_NONE  # Rerun recordings: none, failures (of chains not solved to the end) or all

    def __post_init__(self):
        choose("eval.protocol", self.protocol, PROTOCOLS)
        choose("eval.record", self.record, RECORD_CHOICES)
        choose("eval.engine", self.engine, ENGINES)
        object.__setattr__(self, "variant", chosen_variants(self.variant))
        for name in ("num_sequences", "rollouts_per_task", "workers", "simulators", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"eval.{name}={value}, expected at least 1")
        self.select()
        load_instructions(self.annotations)
        if self.annotations and UNSEEN_WORDINGS in self.variant:
            raise ValueError("eval.variant=unseen_wordings speaks emu3-vla's own sentences; leave eval.annotations out, or the variant")

    @property
    def variants(self) -> Variants:
        """The variants with their strengths."""
        return Variants(names=self.variant, disturbance=self.disturbance)

    @property
    def steps(self) -> int:
        """Control steps a subtask."""
        protocol_steps = MAX_STEPS if self.protocol == LH_MTLC else SINGLE_TASK_MAX_STEPS
        return protocol_steps if self.max_steps is None else self.max_steps

    def select(self) -> list[tuple[int, Chain]]:
        """The chains or rollouts to run. Raises ValueError where there are not that many, or for an unknown task."""
        if self.protocol == LH_MTLC:
            return select_chains(self.num_sequences, self.tasks)
        from eval.single_task import select_rollouts

        return select_rollouts(self.rollouts_per_task, self.tasks)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Options of `emu3-vla eval`. Wrong ones are refused here, before a folder is made or a worker started."""

    policy: str = policies.SHIPPED  # expert, zero, random, a shipped name, or a checkpoint folder
    policy_options: PolicyOptions = field(default_factory=PolicyOptions)
    env: EnvConfig = field(default_factory=EnvConfig)
    eval: EvalOptions = field(default_factory=EvalOptions)
    safety: SafetyOptions = field(default_factory=SafetyOptions)
    chunking: ChunkingOptions = field(default_factory=ChunkingOptions)
    seed: int = 0  # of what the policy and the variants draw at random, and of the bootstrap interval
    output_dir: str = ""

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}, expected zero or more")
        self.env.check_variants(self.eval.variants.camera_jitter)
        policy_provenance(self.policy)  # names an unknown policy or a damaged checkpoint now, not after hours
        if self.eval.engine == "ray":
            from eval.ray_engine import require_ray

            require_ray()


def main(config: EvalConfig) -> None:
    """Run what is still to run, then write results.json and report.html. Exits with 1 where chains ended by an error."""
    from eval.report import write_report

    folder, options = Path(config.output_dir), config.eval
    began = time.perf_counter()
    outcomes = _run_all(config, folder)
    results = assemble(
        outcomes,
        policy=config.policy,
        env=config.env,
        used=_protocol_of(config, outcomes),
        seed=config.seed,
        config=asdict(config),
        wall_s=time.perf_counter() - began,
        length=CHAIN_LENGTH if options.protocol == LH_MTLC else 1,
    )
    write_json(folder / RESULTS_FILE, results)
    write_report(results, folder / REPORT_FILE)
    print(headline(results))
    for name in (RESULTS_FILE, REPORT_FILE):
        print(folder / name)
    if results["errors"]:
        raise SystemExit(error_message(results) + " (the same command tries them again)")


def _run_all(config: EvalConfig, folder: Path) -> list[dict[str, Any]]:
    """Every chain's record, in order: those that are on disk already, and those that ran now."""
    chains = config.eval.select()
    with ChainLog(folder / CHAINS_FILE) as log, LiveLine() as line:
        what = ("chains", "average length") if config.eval.protocol == LH_MTLC else ("rollouts", "success rate")
        meter = _Meter(line, *what, total=len(chains), done=[log.done[index] for index, _ in chains if index in log.done])
        remaining = [(index, chain) for index, chain in chains if index not in log.done]

        def finished(result: dict[str, Any]) -> None:
            log.append(result)
            meter.finished(result)

        _engine(config.eval)(_job(config), remaining, config.eval.workers, finished, meter.ticked)
        return [log.latest[index] for index, _ in chains]


def _job(config: EvalConfig) -> Job:
    options = config.eval
    rules = Rules(
        instructions=load_instructions(options.annotations),
        max_steps=options.steps,
        seed=config.seed,
        variants=options.variants,
        safety=config.safety,
    )
    return Job(
        policy=config.policy,
        policy_options=config.policy_options,
        chunking=config.chunking,
        env=config.env,
        rules=rules,
        protocol=options.protocol,
        simulators=options.simulators,
        keep=Keep(
            folder=str(Path(config.output_dir).resolve()),
            max_steps=options.steps,
            record=options.record,
            title=f"policy {config.policy}",
        ),
    )


def _engine(options: EvalOptions) -> Callable[..., None]:
    if options.engine == "processes":
        return run_chains
    from eval.ray_engine import run_chains_on_ray

    return partial(run_chains_on_ray, address=options.ray_address)


def _protocol_of(config: EvalConfig, outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    options = config.eval
    shared = {
        "max_steps": options.steps,
        "tasks": len(set(options.tasks)) or len(TASKS),
        "scene": config.env.scene,
        "own_assets": config.env.own_assets,
        "version": named_by(outcomes, "calvin_env"),
        "own_sentences": not options.annotations,
        "variants": options.variants.described() | config.safety.described() | config.chunking.described(),
    }
    if options.protocol == LH_MTLC:
        return used_protocol(chains=len(outcomes), **shared)
    return used_single_task_protocol(rollouts_per_task=options.rollouts_per_task, **shared)


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
    """Feeds the live line: chains done, average length so far, steps a second, time left. units, figure: what to call the first two."""

    def __init__(self, line: LiveLine, units: str, figure: str, *, total: int, done: list[dict[str, Any]]):
        self.line, self.units, self.figure, self.total = line, units, figure, total
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
        self.line.show(f"{self.units} {done}/{self.total} · {self.figure} {average} · {rate:.0f} steps/s · {left} left{errors}")
