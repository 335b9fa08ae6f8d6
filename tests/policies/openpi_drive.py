"""Run by the interpreter of openpi-client's own environment: drives a simulator elsewhere through pipes, asking the policy server.

Reads observations from standard input (pickled arrays) and writes actions to standard output, as a robot's program would.
"""

import pickle
import sys

import numpy as np
from openpi_client import action_chunk_broker, websocket_client_policy


def main(address: str, token: str, horizon: int) -> None:
    client = websocket_client_policy.WebsocketClientPolicy(host=address, port=None, api_key=token or None)
    pickle.dump(client.get_server_metadata(), sys.stdout.buffer)
    broker = action_chunk_broker.ActionChunkBroker(client, action_horizon=horizon)
    sys.stdout.buffer.flush()
    while True:
        try:
            observation = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        action = np.asarray(broker.infer(observation)["actions"])  # (7,): the next of the chunk
        pickle.dump(action.tolist(), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
