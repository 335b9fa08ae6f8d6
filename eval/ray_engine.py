"""`eval.engine=ray`: chains spread over the actors of a Ray cluster, one of this machine or an existing one.

Each actor is what a worker process is: a policy and its simulators, one thread, one chain after another. On an existing cluster every node
needs this package installed, and the same checkpoint and assets under the same paths. An actor that dies loses nothing but the chains
that it was in; they are given to another one once more.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from eval.lockstep import Job, LockStep
from eval.workers import FAILED_STARTS, NOT_READY, THREAD_VARIABLES, Task, Waiting, WorkerDied, WorkerNotReady

INSTALL = "pip install 'emu3-vla[ray]'"


class RayMissing(ValueError):
    """Ray is not installed."""


class ClusterUnreachable(ValueError):
    """There is no Ray cluster at the address."""


def require_ray() -> None:
    """Raises RayMissing with the command that installs it."""
    if importlib.util.find_spec("ray") is None:
        raise RayMissing(f"eval.engine=ray needs the package ray, which is not installed: {INSTALL}")


def run_chains_on_ray(
    job: Job,
    chains: Sequence[Task],
    workers: int,
    finished: Callable[[dict[str, Any]], None],
    ticked: Callable[[int], None] = lambda steps: None,
    *,
    address: str = "",
) -> None:
    """Run `chains` in `workers` Ray actors; arguments and errors as eval.workers.run_chains has them.

    address: of an existing cluster ("auto", host:port, ray://host:port); empty starts one on this machine for as long as this takes.
    Raises RayMissing, ClusterUnreachable.
    """
    require_ray()
    if not chains:
        return
    with _connected(address, workers) as ray:
        _Actors(ray, job, chains, workers, finished, ticked).run()


class ChainRunner:
    """What an actor is made of. Nothing is loaded until `prepare`, so that what fails there can be said."""

    def prepare(self, job: Job) -> str:
        """Make policy and simulators. Returns what is wrong, or an empty string."""
        try:
            self.simulators = LockStep(job)
        except NOT_READY as error:
            return str(error)
        return ""

    def run(self, tasks: list[Task]) -> list[dict[str, Any]]:
        """Results of those chains."""
        return [result.to_json() for result in self.simulators.run(tasks)]


class _Actors:
    def __init__(self, ray, job, chains, workers, finished, ticked):
        self.ray, self.job, self.finished, self.ticked = ray, job, finished, ticked
        self.waiting = Waiting(chains)
        self.size = min(workers, len(chains))
        self.actor_class = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(ChainRunner)
        self.asked: dict[Any, tuple[Any, list[Task]]] = {}  # future → actor, and the chains it was given (none: it prepares itself)
        self.failed_starts = 0

    def run(self) -> None:
        for _ in range(self.size):
            self._start()
        while self.asked:
            (answered, *_), _ = self.ray.wait(list(self.asked))
            self._hear(answered)

    def _start(self) -> None:
        actor = self.actor_class.remote()
        self.asked[actor.prepare.remote(self.job)] = (actor, [])

    def _hear(self, future: Any) -> None:
        actor, tasks = self.asked.pop(future)
        try:
            answer = self.ray.get(future)
        except self.ray.exceptions.RayActorError as error:
            self._died(tasks, error)
            return
        if not tasks and answer:
            raise WorkerNotReady(answer)
        for result in answer or ():
            self.ticked(result["steps"])
            self.finished(result)
        self.failed_starts = 0
        given = self.waiting.take(0, self.job.simulators)
        if given:
            self.asked[actor.run.remote(given)] = (actor, given)

    def _died(self, tasks: list[Task], error: Exception) -> None:
        how = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if not tasks:
            self.failed_starts += 1
            if self.failed_starts > FAILED_STARTS:
                raise WorkerDied(f"Ray actors die at their start, last with {how}")
        for result in self.waiting.give_back(tasks, how):
            self.finished(result)
        if self.waiting:
            self._start()


@contextmanager
def _connected(address: str, workers: int) -> Iterator[Any]:
    import ray

    if ray.is_initialized():  # the caller's own connection, and the caller's to close
        yield ray
        return
    environment = {"env_vars": dict.fromkeys(THREAD_VARIABLES, "1")}
    shared = {"runtime_env": environment, "log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    if address:
        shared.pop("include_dashboard")
        try:
            ray.init(address=address, **shared)
        except (ConnectionError, RuntimeError) as error:
            raise ClusterUnreachable(
                f"eval.ray_address={address}: {str(error).splitlines()[0]}; is the cluster up ('ray status')?"
            ) from error
    else:
        ray.init(address="local", num_cpus=workers, **shared)
    try:
        yield ray
    finally:
        ray.shutdown()
