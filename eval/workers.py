"""Several processes that run chains: each has its own simulator and policy, and is handed one chain after another.

A worker that dies (a crash of the simulator's C++ code, the kernel out of memory, a kill) loses nothing but the chain it was in, which
is given to another worker once more; a chain that kills two workers is recorded as an error. Workers end when their parent does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from eval.chain import Attempt, ChainResult, Watcher, run_chain
from eval.environment import EnvConfig, load_policy
from eval.keeping import Keep, keeping_watcher
from eval.sequences import Chain

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
TICK_S = 0.5
ATTEMPTS_PER_CHAIN = 2
FAILED_STARTS = 2


class WorkerDied(RuntimeError):
    """Workers die before they run anything."""


class WorkerNotReady(ValueError):
    """A worker could not make its simulator or policy."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every chain of an evaluation has in common."""

    policy: str
    env: EnvConfig
    instructions: dict[str, str]
    max_steps: int
    seed: int
    keep: Keep | None = None


def run_chains(
    job: Job,
    chains: Sequence[tuple[int, Chain]],
    workers: int,
    finished: Callable[[dict[str, Any]], None],
    ticked: Callable[[int], None] = lambda steps: None,
) -> None:
    """Run `chains` in `workers` processes.

    finished: called with each chain's result (ChainResult.to_json) as it ends, in the order of ending. ticked: called with the number of
    control steps made since the last call, about twice a second per worker.
    Raises WorkerNotReady with the worker's own words, WorkerDied when workers die at their start.
    """
    if chains:
        _Pool(job, chains, workers, finished, ticked).run()


class _Pool:
    def __init__(self, job, chains, workers, finished, ticked):
        self.job, self.finished, self.ticked = job, finished, ticked
        self.waiting = deque(chains)
        self.size = min(workers, len(chains))
        self.busy: dict[Connection, tuple[int, Chain] | None] = {}
        self.processes: dict[Connection, multiprocessing.Process] = {}
        self.deaths: Counter[int] = Counter()
        self.failed_starts = 0

    def run(self) -> None:
        try:
            for _ in range(self.size):
                self._start()
            while self.waiting or any(self.busy.values()):
                for connection in wait(list(self.processes)):
                    self._listen(connection)
        finally:
            for connection, process in self.processes.items():
                connection.close()
                process.terminate()
                process.join()

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_work, args=(theirs, self.job), daemon=True)
        with _one_thread_each():
            process.start()
        theirs.close()
        self.processes[ours], self.busy[ours] = process, None

    def _listen(self, connection: Connection) -> None:
        try:
            kind, content = connection.recv()
        except (EOFError, ConnectionResetError):
            self._died(connection)
            return
        if kind == "ticked":
            self.ticked(content)
        elif kind == "not ready":
            raise WorkerNotReady(content)
        else:
            if kind == "finished":
                self.busy[connection] = None
                self.finished(content)
            self.failed_starts = 0
            self._assign(connection)

    def _assign(self, connection: Connection) -> None:
        if not self.waiting:
            return
        self.busy[connection] = self.waiting.popleft()
        try:
            connection.send(self.busy[connection])
        except (BrokenPipeError, ConnectionResetError):
            self._died(connection)

    def _died(self, connection: Connection) -> None:
        process, task = self.processes.pop(connection), self.busy.pop(connection)
        connection.close()
        process.join()
        if task is None:
            self.failed_starts += 1
            if self.failed_starts > FAILED_STARTS:
                raise WorkerDied(f"workers die at their start, last with exit code {process.exitcode}; try 'emu3-vla rollout' to see why")
        else:
            self.deaths[task[0]] += 1
            if self.deaths[task[0]] < ATTEMPTS_PER_CHAIN:
                self.waiting.appendleft(task)
            else:
                self.finished(_died_result(task, process.exitcode))
        if self.waiting or any(self.busy.values()):
            self._start()


def _died_result(task: tuple[int, Chain], exitcode: int | None) -> dict[str, Any]:
    index, (condition, subtasks) = task
    message = f"the worker process died {ATTEMPTS_PER_CHAIN} times in this chain, last with exit code {exitcode}"
    error = {"type": "WorkerDied", "message": message, "subtask": None, "step": None, "traceback": ""}
    return ChainResult(index=index, initial_state=condition, subtasks=subtasks, error=error).to_json()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Children started here read these before numpy or torch is imported; several processes with a thread pool each crawl."""
    saved = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Ticker(Watcher):
    def __init__(self, connection: Connection):
        self.connection, self.steps, self.last = connection, 0, time.monotonic()

    def stepped(self, env, action, before, attempt: Attempt) -> None:
        self.steps += 1
        now = time.monotonic()
        if now - self.last > TICK_S:
            self.flush()
            self.last = now

    def flush(self) -> None:
        self.connection.send(("ticked", self.steps))
        self.steps = 0

    def chain_ends(self, result: ChainResult) -> None:
        self.flush()


def _work(connection: Connection, job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers for the whole group
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        env, policy = job.env.make(), load_policy(job.policy, job.env)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        connection.send(("not ready", f"{error}"))
        return
    ticker = _Ticker(connection)
    watcher = keeping_watcher(job.keep, ticker)
    connection.send(("ready", None))
    while True:
        try:
            index, chain = connection.recv()
        except EOFError:
            return
        result = run_chain(env, policy, index, chain, job.instructions, max_steps=job.max_steps, seed=job.seed, watcher=watcher)
        connection.send(("finished", result.to_json()))


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
