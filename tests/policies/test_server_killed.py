"""The policy's server dies while it drives an arm: the arm's own watchdog stops it in the first control period without a command."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import policies
from envs.robot import PERIOD_S, RobotEnv, SimulatedArmOptions
from envs.simulated_arm import MOST_QUEUED, SimulatedArm
from eval.chain import Watcher, run_chain
from eval.protocol import load_instructions
from eval.sequences import long_horizon_sequences
from policies.chunking import ChunkedPolicy, ChunkingOptions

ROOT = Path(__file__).parents[2]
KILLED_AT = 26  # control step; in the middle of the third chunk


@pytest.fixture(scope="module")
def arm():
    arm = SimulatedArm(SimulatedArmOptions(realtime=True))
    yield arm
    arm.close()


@pytest.fixture
def server(tmp_path):
    """`emu3-vla serve` of a policy that never stops moving, as a process of its own: (process, address)."""
    command = [sys.executable, "-m", "emu3_vla.cli", "serve", "policy=served:Steady", "port=0", f"output_dir={tmp_path / 'run'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    first = process.stdout.readline()
    found = re.search(r"at (ws://\S+) ", first)
    yield process, found and found[1]
    process.kill()
    said = process.communicate()[1]
    assert found, first + said


class Careless(RobotEnv):
    """Does not stop the arm when a chain ends: here the arm's watchdog is all that does."""

    def halt(self):
        pass


class Kills(Watcher):
    """Sends the server a signal at a control step, from another thread: the loop that drives the arm knows nothing of it."""

    def __init__(self, process, arm, number):
        self.process, self.arm, self.number, self.steps, self.sent_s = process, arm, number, 0, None

    def stepped(self, env, action, before, attempt):
        self.steps += 1
        if self.steps == KILLED_AT:
            threading.Thread(target=self._kill).start()

    def _kill(self):
        os.kill(self.process.pid, self.number)
        self.sent_s = self.arm._now()


@pytest.mark.parametrize("number,error", [(signal.SIGKILL, "ServerLost"), (signal.SIGSTOP, "AnswerTimeout")], ids=["killed", "hangs"])
def test_the_arm_stops_within_one_period_when_the_server_dies_in_mid_rollout(arm, server, number, error):
    process, address = server
    remote = policies.load(address, timeout_s=0.6)
    policy = ChunkedPolicy(remote, ChunkingOptions(ahead=3, late="wait"), realtime=True)
    kills = Kills(process, arm, number)
    result = run_chain(Careless(arm), policy, 0, long_horizon_sequences(1)[0], load_instructions(), max_steps=300, seed=0, watcher=kills)
    assert result.error["type"] == error, result.error
    time.sleep(0.4)  # the arm's own time goes on
    with arm._lock:
        log = list(arm.log)
    last = max(row for row, period in enumerate(log) if period.commanded)
    assert log[last].sent[2] > log[last - 3].sent[2], "it was moving"
    assert log[last].time_s > kills.sent_s, "what had been decided already was carried out"
    # The first control period without a command is the one that stops it, and it is sent nowhere else from there on.
    after = log[last + 1 :]
    assert after[0].time_s - log[last].time_s <= PERIOD_S * 1.01
    for period in after:
        assert not period.commanded
        np.testing.assert_array_equal(period.sent, after[0].sent)
    assert np.abs(after[0].sent[:3] - log[last].tool[:3]).max() < 0.02, "it holds where it is"
    # No more than the chunk that was decided, and the commands on their way, was carried out after the kill.
    assert sum(period.commanded for period in log if period.time_s > kills.sent_s) <= 10 + MOST_QUEUED
    assert len(after) > 6 and arm.sent()[1], "it still holds"
