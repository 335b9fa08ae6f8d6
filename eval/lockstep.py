"""One policy, one or several simulators: chains advance decision by decision, and a policy that can decides for all of them at once.

A policy that can has `sessions` and `infer_many` (BatchedPolicy). Any other policy serves one simulator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from eval.chain import ChainResult, Decisions, Observation, Rules, Watcher, chain_steps, official_start
from eval.environment import EnvConfig, PolicyOptions, load_policy
from eval.keeping import Keep, keeping_watcher
from eval.protocol import LH_MTLC, MTLC
from eval.sequences import Chain
from policies.base import Policy
from policies.chunking import ChunkingOptions

if TYPE_CHECKING:
    from envs.calvin import CalvinEnv


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a process needs to know to run any chain of an evaluation."""

    policy: str
    env: EnvConfig
    rules: Rules
    protocol: str = LH_MTLC
    policy_options: PolicyOptions = field(default_factory=PolicyOptions)
    chunking: ChunkingOptions = field(default_factory=ChunkingOptions)
    simulators: int = 1  # in one process, sharing its policy
    keep: Keep | None = None  # beside the numbers


@runtime_checkable
class BatchedPolicy(Protocol):
    """A policy that decides for several simulators in one go."""

    name: str
    requires: frozenset[str]

    def sessions(self, number: int) -> Sequence[Policy]:
        """`number` policies that share this one's weights, each with an instruction, a past and a random stream of its own."""
        ...

    def infer_many(self, sessions: Sequence[Policy], observations: Sequence[Observation]) -> Sequence[dict[str, Any]]:
        """What `session.infer(observation)` would answer for each pair, whoever else is in the batch.

        Where it raises, no session has changed: each is then asked alone, so that one bad observation is one chain's error.
        """
        ...


class NotBatched(ValueError):
    """Several simulators were to share a policy that decides for one."""


@dataclass
class _Running:
    steps: Decisions
    session: Policy
    env: CalvinEnv
    observation: Observation | None = None
    result: ChainResult | None = None

    def go_on(self, how: Callable[..., Observation], *arguments: Any) -> None:
        try:
            self.observation = how(*arguments)
        except StopIteration as ended:
            self.result = ended.value


class LockStep:
    """The simulators and the policy of one process.

    Raises NotBatched, and what the simulator and `policies.load` raise.
    """

    def __init__(self, job: Job, watcher: Watcher | None = None):
        self.job, self.watcher = job, watcher
        self.policy = load_policy(job.policy, job.env, job.policy_options, job.chunking)
        self.batched = job.simulators > 1
        if self.batched and not isinstance(self.policy, BatchedPolicy):
            raise NotBatched(
                f"eval.simulators={job.simulators}: policy {job.policy!r} decides for one simulator at a time (it has no sessions() and "
                "infer_many()); leave eval.simulators at 1 and raise eval.workers instead"
            )
        sessions = self.policy.sessions(job.simulators) if self.batched else (self.policy,)
        self.free = [(job.env.make(job.rules.variants.camera_jitter), session) for session in sessions]
        self.start_of = _start(job)
        self.running: list[_Running] = []

    def begin(self, index: int, chain: Chain) -> None:
        """Start a chain in a free simulator, up to its first decision."""
        env, session = self.free.pop()
        watcher = keeping_watcher(self.job.keep, *([self.watcher] if self.watcher else []))  # one a chain: several run at once
        steps = chain_steps(env, session, index, chain, self.job.rules, watcher=watcher, start=self.start_of)
        chain_running = _Running(steps, session, env)
        chain_running.go_on(next, steps)
        self.running.append(chain_running)

    def advance(self) -> list[ChainResult]:
        """Decide once for every running chain, move on to their next decisions, and return the chains that ended."""
        asking = [chain for chain in self.running if chain.result is None]
        if asking:
            self._decide(asking)
        ended = [chain for chain in self.running if chain.result is not None]
        for chain in ended:
            self.running.remove(chain)
            self.free.append((chain.env, chain.session))
        return [chain.result for chain in ended]

    def run(self, chains: Sequence[tuple[int, Chain]]) -> list[ChainResult]:
        """Run `chains`, as many at once as there are simulators."""
        waiting, results = list(reversed(chains)), []
        while waiting or self.running:
            while waiting and self.free:
                self.begin(*waiting.pop())
            results += self.advance()
        return results

    def _decide(self, asking: list[_Running]) -> None:
        if len(asking) > 1:
            began = time.perf_counter()
            try:
                answers = self.policy.infer_many([chain.session for chain in asking], [chain.observation for chain in asking])
            except Exception:  # noqa: BLE001 - each is asked alone below, where whoever is at fault raises again
                pass
            else:
                share = (time.perf_counter() - began) / len(asking)
                for chain, answer in zip(asking, answers, strict=True):
                    chain.go_on(chain.steps.send, (answer, share))
                return
        for chain in asking:
            self._decide_alone(chain)

    def _decide_alone(self, chain: _Running) -> None:
        began = time.perf_counter()
        try:
            answer = chain.session.infer(chain.observation)
        except Exception as error:  # noqa: BLE001 - the chain records it
            chain.go_on(chain.steps.throw, error)
        else:
            chain.go_on(chain.steps.send, (answer, time.perf_counter() - began))


def _start(job: Job):
    if job.protocol != MTLC:
        return official_start
    from eval.single_task import ReachedStart

    return ReachedStart(job.env.scene)
