"""The published openpi-client, in an environment of its own, drives subtasks against our server.

    python -m venv /tmp/openpi && /tmp/openpi/bin/pip install openpi-client==0.1.2 typing_extensions
    EMU3_VLA_OPENPI_PYTHON=/tmp/openpi/bin/python pytest tests/policies/test_openpi_client.py

(openpi-client 0.1.2 imports typing_extensions without asking for it.)
"""

import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
from served import serving

import policies
from envs.calvin.expert.policy import ExpertPolicy
from eval.chain import run_chain
from eval.environment import EnvConfig
from eval.protocol import MAX_STEPS, load_instructions
from eval.rollout import chain_of

PYTHON = os.environ.get("EMU3_VLA_OPENPI_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="EMU3_VLA_OPENPI_PYTHON names no interpreter that has openpi-client")
LIBERO = {"observation/image": "rgb_static", "observation/wrist_image": "rgb_gripper", "observation/state": "robot_obs"}


class OpenpiClient:
    """openpi-client in another process, as a Policy of one action a decision. keys: its name of what our observation has."""

    name = "openpi-client"

    def __init__(self, address, keys, token="", horizon=1):
        script = Path(__file__).with_name("openpi_drive.py")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [PYTHON, str(script), address, token, str(horizon)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.metadata = pickle.load(self.process.stdout)
        self.keys, self.requires = keys, frozenset(keys.values())

    def reset(self, instruction, *, task=None, seed=None):
        self.prompt = instruction

    def infer(self, observation):
        seen = {theirs: np.asarray(observation[ours]) for theirs, ours in self.keys.items()}
        pickle.dump(seen | {"prompt": self.prompt}, self.process.stdin, protocol=4)
        self.process.stdin.flush()
        return {"actions": np.array([pickle.load(self.process.stdout)], np.float32)}

    def end(self):
        self.process.stdin.close()
        assert self.process.wait(20) == 0


def drive(policy, task):
    """The one attempt at `task`."""
    env = EnvConfig().make()
    index, chain = chain_of([task])
    result = run_chain(env, policy, index, chain, load_instructions(), max_steps=MAX_STEPS, seed=0)
    env.close()
    assert result.error is None, result.error
    return result.attempts[0]


def test_the_expert_solves_a_subtask_through_it():
    with serving(ExpertPolicy(), token="secret") as server:
        client = OpenpiClient(server.address, {"robot_obs": "robot_obs", "scene_obs": "scene_obs"}, token="secret")
        attempt = drive(client, "open_drawer")
        client.end()
    assert client.metadata["policy"] == "expert" and attempt.success
    assert attempt.steps == drive(ExpertPolicy(), "open_drawer").steps, "as many as without a network between"
    print(f"openpi-client and the expert: open_drawer in {attempt.steps} steps")


def test_the_shipped_policy_solves_a_subtask_through_it():
    """Its pictures under openpi's names, its chunks through openpi's own broker."""
    with serving(policies.load("calvin-d"), keys=tuple(f"{theirs}:{ours}" for theirs, ours in LIBERO.items())) as server:
        client = OpenpiClient(server.address, LIBERO, horizon=10)
        attempt = drive(client, "turn_on_led")
        client.end()
    alone = drive(policies.load("calvin-d"), "turn_on_led")
    assert (attempt.success, attempt.steps) == (alone.success, alone.steps)
    print(f"openpi-client and calvin-d: turn_on_led {'solved' if attempt.success else 'not solved'} after {attempt.steps} steps")
    assert attempt.success


def test_refusals_reach_it_and_it_goes_on():
    """An error of ours is the RuntimeError that its users know, and the connection stays."""
    code = (
        "import numpy as np, sys\n"
        "from openpi_client.websocket_client_policy import WebsocketClientPolicy\n"
        "client = WebsocketClientPolicy(host=sys.argv[1], port=None)\n"
        "try: client.infer({})\n"
        "except RuntimeError as error: print(error)\n"
        "print(client.infer({'prompt': 'go'})['actions'].shape)\n"
    )
    with serving(policies.load("random")) as server:
        done = subprocess.run([PYTHON, "-c", code, server.address], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "Error in inference server:",
        "InvalidRequest: no 'prompt': the first request of a connection says what is to be done, in a sentence",
        "(10, 7)",
    ], done.stderr
