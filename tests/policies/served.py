"""A policy's server in a thread of the test's own process."""

import asyncio
import contextlib
import threading

import numpy as np

from envs.spec import ROBOT_OBS
from policies.server import PolicyServer, ServerOptions


class Recording:
    """Answers at once, and keeps what it was told. Shares itself: `sessions` and `infer_many`. broken: raised by the next decisions."""

    name, requires = "recording", frozenset({ROBOT_OBS})

    def __init__(self, told=None, number=0):
        self.told = [] if told is None else told
        self.number, self.made, self.batches, self.broken = number, 0, [], {}
        self.entered, self.go = threading.Event(), threading.Event()
        self.go.set()

    def sessions(self, number):
        self.made += number
        return [Session(self, self.made - number + k) for k in range(number)]

    def infer_many(self, sessions, observations):
        self.batches.append(len(sessions))
        return [session.infer(observation) for session, observation in zip(sessions, observations, strict=True)]


class Session:
    """One client's. Its action says who it is, how often it was asked since its reset, and what it saw."""

    name, requires = Recording.name, Recording.requires

    def __init__(self, policy, number):
        self.policy, self.number, self.asked, self.instruction = policy, number, 0, None

    def reset(self, instruction, *, task=None, seed=None):
        if instruction == "refuse":
            raise ValueError("the file /home/someone/secret.txt has no such sentence")
        self.policy.told.append((self.number, instruction, task, seed))
        self.instruction, self.asked = instruction, 0

    def begin_chain(self):
        self.policy.told.append((self.number, "begin_chain"))

    def executed(self, action):
        self.policy.told.append((self.number, "executed", action.tolist()))

    def infer(self, observation):
        self.policy.entered.set()
        assert self.policy.go.wait(20)
        if self.number in self.policy.broken:
            raise self.policy.broken[self.number]
        self.asked += 1
        actions = np.zeros((2, 7), np.float32)
        actions[:, :3] = self.number, self.asked, observation[ROBOT_OBS][0]
        return {"actions": actions, "instruction": self.instruction}


class Steady:
    """Moves slowly upwards for ever; light enough for a process of its own."""

    name, requires = "steady", frozenset({ROBOT_OBS})

    def reset(self, instruction, *, task=None, seed=None):
        pass

    def infer(self, observation):
        return {"actions": np.tile(np.array([0, 0, 0.15, 0, 0, 0, 1], np.float32), (10, 1))}


def seen(value=0.5):
    """An observation that Recording can read."""
    return {ROBOT_OBS: np.full(15, value)}


@contextlib.contextmanager
def serving(policy, *, token="", make=None, failed=None, **options):
    """The running server; `.address` is where it listens. Errors that it does not tell its clients are collected in `.failures`."""
    failures = []
    server = PolicyServer(policy, ServerOptions(port=0, **options), token=token, make=make, failed=failed or failures.append)
    server.failures = failures
    listening, loop = threading.Event(), asyncio.new_event_loop()
    running = threading.Thread(target=loop.run_until_complete, args=(server.run(lambda _: listening.set()),), daemon=True)
    running.start()
    assert listening.wait(20)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(server.stop)
        running.join(20)
        assert not running.is_alive(), "the server did not end"
        loop.close()
