"""Several processes that run chains: each has its own policy and simulators, and is handed one chain after another.

A worker that dies (a crash of the simulator's C++ code, the kernel out of memory, a kill) loses nothing but the chains it was in. Each is
given to another worker once more, this time alone in it, so that only the chain that kills can be blamed: one that kills two workers is
recorded as an error. Workers end when their parent does.
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
from multiprocessing.connection import Connection, wait
from typing import Any

from eval.chain import Attempt, ChainResult, Watcher
from eval.lockstep import Job, LockStep
from eval.sequences import Chain

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
TICK_S = 0.5
ATTEMPTS_PER_CHAIN = 2
FAILED_STARTS = 2
NOT_READY = (ValueError, OSError, RuntimeError, ImportError)
"""What making a simulator or a policy raises where the user's choice is at fault."""

Task = tuple[int, Chain]


class WorkerDied(RuntimeError):
    """Workers die before they run anything."""


class WorkerNotReady(ValueError):
    """A worker could not make its simulator or policy."""


class Waiting:
    """The chains that nobody runs yet, and how often each has taken a worker with it."""

    def __init__(self, chains: Sequence[Task]):
        self.fresh: deque[Task] = deque(chains)
        self.suspects: deque[Task] = deque()
        self.deaths: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.fresh) + len(self.suspects)

    def take(self, in_flight: int, room: int) -> list[Task]:
        """Chains for a worker that runs `in_flight` of them already and has room for `room` in all. A suspect runs alone."""
        if self.suspects and not in_flight:
            return [self.suspects.popleft()]
        return [self.fresh.popleft() for _ in range(min(room - in_flight, len(self.fresh)))]

    def is_suspect(self, task: Task) -> bool:
        """Whether a worker died that was running it."""
        return self.deaths[task[0]] > 0

    def give_back(self, tasks: Sequence[Task], how: str) -> list[dict[str, Any]]:
        """A worker died with these. Returns the results of those that are not tried again. how: what is known of its end."""
        given_up = []
        for task in tasks:
            self.deaths[task[0]] += 1
            if self.deaths[task[0]] < ATTEMPTS_PER_CHAIN:
                self.suspects.append(task)
            else:
                given_up.append(_died_result(task, how))
        return given_up


def run_chains(
    job: Job,
    chains: Sequence[Task],
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
        self.waiting = Waiting(chains)
        self.size = min(workers, len(chains))
        self.ready: set[Connection] = set()
        self.busy: dict[Connection, dict[int, Task]] = {}
        self.processes: dict[Connection, multiprocessing.Process] = {}
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
        self.processes[ours], self.busy[ours] = process, {}

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
                del self.busy[connection][content["index"]]
                self.finished(content)
            self.ready.add(connection)
            self.failed_starts = 0
            self._assign(connection)

    def _assign(self, connection: Connection) -> None:
        running = self.busy[connection]
        if any(self.waiting.is_suspect(task) for task in running.values()):
            return
        for task in self.waiting.take(len(running), self.job.simulators):
            running[task[0]] = task
            try:
                connection.send(task)
            except (BrokenPipeError, ConnectionResetError):
                continue  # dead: its connection says so when it is listened to

    def _died(self, connection: Connection) -> None:
        process, tasks = self.processes.pop(connection), self.busy.pop(connection)
        connection.close()
        process.join()
        if connection not in self.ready:
            self.failed_starts += 1
            if self.failed_starts > FAILED_STARTS:
                raise WorkerDied(f"workers die at their start, last with exit code {process.exitcode}; try 'emu3-vla rollout' to see why")
        for result in self.waiting.give_back(list(tasks.values()), f"exit code {process.exitcode}"):
            self.finished(result)
        if self.waiting:
            self._start()


def _died_result(task: Task, how: str) -> dict[str, Any]:
    index, (condition, subtasks) = task
    message = f"the worker process died {ATTEMPTS_PER_CHAIN} times in this chain, last with {how}"
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
    ticker = _Ticker(connection)
    try:
        simulators = LockStep(job, ticker)
    except NOT_READY as error:
        connection.send(("not ready", f"{error}"))
        return
    connection.send(("ready", None))
    while True:
        try:
            while not simulators.running or (simulators.free and connection.poll()):
                simulators.begin(*connection.recv())
        except EOFError:
            return
        for result in simulators.advance():
            connection.send(("finished", result.to_json()))


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
