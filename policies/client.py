"""A policy that runs elsewhere, as a policy: it needs numpy, msgpack and websockets alone.

    policy = RemotePolicy("ws://127.0.0.1:8000")          # or policies.load("ws://127.0.0.1:8000")
    policy.reset("open the drawer")
    actions = policy.infer(observation)["actions"]         # float32 (T, 7)

Nothing is repeated behind the caller's back. Where the connection is lost, `infer` raises ServerLost, and goes on doing so until `reset`,
which connects anew: the server forgot the past of the subtask, and a subtask that was begun with one does not go on without it.
"""

from __future__ import annotations

import os
import ssl
import time
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from envs.spec import OBSERVATION, SENSORS, ActionUnits
from policies import wire
from policies.codes import pack_codes

TOO_BIG = 1009
KNOWN = OBSERVATION.keys() | SENSORS.keys()


class ServerUnavailable(wire.ServingError, ValueError):
    """Nobody answers at that address, or what answers is no policy's server."""


class NotAuthorized(ServerUnavailable):
    """The server wants a token, and it was not given the right one."""


class ServerLost(wire.ServingError, ConnectionError):
    """The connection broke. `reset` connects again and begins the subtask anew."""


class AnswerTimeout(ServerLost, TimeoutError):
    """No answer within `timeout_s`. The connection was given up, as a late answer would be taken for the next one's."""


class CodesOf(Protocol):
    """A vision tokenizer on the client's side; policies.edge.EdgeTokenizer is one.

    fingerprint: what it is known by, see docs/serving.md. codebook_size: number of codes. cameras: observation keys that it reads.
    """

    fingerprint: str
    codebook_size: int
    cameras: frozenset[str]

    def encode(self, camera: str, image: np.ndarray) -> np.ndarray:
        """Code ids (rows, columns) of an image, uint8 (H, W, 3)."""
        ...


class RemotePolicy:
    """A policy served at `url` (ws:// or wss://), as a Policy; see policies.base.Policy and the head of this file.

    token: shown to the server; by default that in EMU3_VLA_TOKEN. ca: PEM file of the authority that signed a wss:// server's certificate,
    where this machine does not know it. connect_s: how long a server that does not listen yet is tried. timeout_s: how long an answer is
    waited for. deadline_ms: asked of the server for each decision; None: the server's own. tokenizer: a vision tokenizer (CodesOf) or the
    folder of one: code ids travel instead of pixels. packed: as few bits an id as will do, instead of 16.
    Raises ServerUnavailable, NotAuthorized, wire.TokenizerMismatch, ValueError for options that cannot be.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        ca: str = "",
        connect_s: float = 10.0,
        timeout_s: float = 60.0,
        deadline_ms: float | None = None,
        tokenizer: CodesOf | str | Path | None = None,
        packed: bool = False,
    ):
        if connect_s < 0 or timeout_s <= 0 or (deadline_ms is not None and deadline_ms <= 0):
            raise ValueError(f"connect_s={connect_s} must be at least 0, timeout_s={timeout_s} and deadline_ms={deadline_ms} above it")
        self.url, self._token, self._ca = url, os.environ.get(wire.TOKEN_VARIABLE, "") if token is None else token, ca
        self._connect_s, self._timeout_s, self._deadline_ms = connect_s, timeout_s, deadline_ms
        _check_address(url)
        self._tokenizer, self._packed = _tokenizer(tokenizer), packed
        self._pending: dict[str, Any] = {}
        self._prompt = ""
        self._connection: ClientConnection | None = None
        self.metadata: dict[str, Any] = {}
        self.bytes_sent = 0
        self._connect()
        self.name = f"{self.metadata['policy']} at {url}"
        self.requires = frozenset(self.metadata["requires"])
        self.action_units = ActionUnits(**self.metadata.get("actions", {}))  # a server that does not say means ours

    def begin_chain(self) -> None:
        """See policies.base.Policy; travels with the next observation."""
        self._pending[wire.BEGIN_CHAIN] = True

    def reset(self, instruction: str, *, task: str | None = None, seed: int | None = None) -> None:
        """Start a subtask; the server hears of it with the next observation. Connects where the connection was lost.

        Raises ValueError for an empty instruction, and what the constructor raises.
        """
        if not instruction or not instruction.strip():
            raise ValueError("the instruction is empty; a policy needs a sentence")
        if self._connection is not None and self._connection.close_code is not None:  # the server went while nothing was asked
            self._drop()
        if self._connection is None:
            self._connect()
        self._prompt = instruction
        self._pending |= {wire.RESET: True, wire.SEED: seed}
        self._pending.pop(wire.TASK, None)
        if task is not None:
            self._pending[wire.TASK] = task

    def executed(self, action: np.ndarray) -> None:
        """An action (7,) was executed that the policy did not choose; travels with the next observation."""
        self._pending.setdefault(wire.EXECUTED, []).append(np.asarray(action, dtype=np.float64))

    def infer(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        """The server's decision, and "server_timing": {"infer_ms", "batch", "total_ms"} of the server.

        Raises RuntimeError before the first reset; what the server answered instead (wire.InvalidRequest, wire.TokenizerMismatch,
        wire.DeadlineExceeded, wire.ServerBusy, wire.PolicyFailed); ServerLost and AnswerTimeout.
        """
        if not self._prompt:
            raise RuntimeError("the remote policy was asked for an action before reset(instruction)")
        message = wire.pack(self._request(observation))
        if len(message) > self.metadata["max_message_bytes"]:
            raise wire.InvalidRequest(f"the observation takes {len(message)} bytes, this server reads {self.metadata['max_message_bytes']}")
        answer = self._exchange(message)
        if isinstance(answer, str):
            raise wire.error_of(answer)
        self._pending = {}
        self.bytes_sent += len(message)
        return wire.unpack(answer)

    def close(self) -> None:
        """Say goodbye."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _request(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        """The instruction, what happened since the last answer, and the observation without cameras and states that nobody asked for."""
        request = {wire.PROMPT: self._prompt, **self._pending}
        if wire.EXECUTED in request:
            request[wire.EXECUTED] = np.array(request[wire.EXECUTED])
        if self._deadline_ms is not None:
            request[wire.DEADLINE_MS] = self._deadline_ms
        for name in sorted(observation.keys() - (KNOWN - self.requires)):
            if self._tokenizer is None or name not in self._tokenizer.cameras:
                request[name] = observation[name]
                continue
            codes = np.asarray(self._tokenizer.encode(name, observation[name]))
            size = self._tokenizer.codebook_size
            small = np.uint16 if size <= 2**16 else np.uint32
            request.setdefault(wire.CODES, {})[name] = pack_codes(codes, size) if self._packed else codes.astype(small)
            request[wire.TOKENIZER] = self._tokenizer.fingerprint
        return request

    def _exchange(self, message: bytes) -> bytes | str:
        if self._connection is None:
            raise ServerLost(f"the connection to {self.url} was lost; reset() connects again and begins the subtask anew")
        try:
            self._connection.send(message)
            return self._connection.recv(timeout=self._timeout_s)
        except TimeoutError as error:
            self._drop()
            raise AnswerTimeout(f"{self.url} did not answer within {self._timeout_s:g} s; the connection was given up") from error
        except ConnectionClosed as error:
            self._drop()
            reason = f": {error.rcvd.reason}" if error.rcvd and error.rcvd.reason else ""
            if error.rcvd and error.rcvd.code == TOO_BIG:
                raise wire.InvalidRequest(f"the observation of {len(message)} bytes is too big for {self.url}{reason}") from error
            raise ServerLost(f"{self.url} closed the connection{reason}; reset() connects again and begins the subtask anew") from error
        except BaseException:  # interrupted between question and answer
            self._drop()
            raise

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        connection.socket.close()  # at once: the closing handshake would wait for a server that may hang

    def _connect(self) -> None:
        """Connect and read the metadata, trying until `connect_s` are over."""
        end = time.monotonic() + self._connect_s
        while True:
            try:
                metadata = self._open(max(1.0, end - time.monotonic()))
                break
            except OSError as error:
                if isinstance(error, ssl.SSLError) or time.monotonic() >= end:
                    raise ServerUnavailable(f"no server answers at {self.url} ({error}); start one with 'emu3-vla serve'") from error
                time.sleep(min(0.2, max(0.0, end - time.monotonic())))
        known = {key: self.metadata.get(key) for key in ("policy", "requires", "vision_tokenizer", "actions")}
        if self.metadata and known != {key: metadata.get(key) for key in known}:
            self.close()
            raise ServerUnavailable(f"another policy is at {self.url} now: {metadata.get('policy')}, it was {known['policy']}")
        self.metadata = metadata
        self._check_tokenizer()

    def _open(self, open_s: float) -> dict[str, Any]:
        tls = ssl.create_default_context(cafile=self._ca or None) if self.url.startswith("wss://") else None
        headers = {"Authorization": f"Api-Key {self._token}"} if self._token else None
        try:
            # proxy: a robot's server is on its own network, and a proxy of the environment would be asked for loopback too.
            connection = connect(
                self.url, ssl=tls, additional_headers=headers, compression=None, max_size=None, open_timeout=open_s, proxy=None
            ).__enter__()
        except InvalidStatus as error:
            said = (error.response.body or b"").decode(errors="replace").strip()
            kind = NotAuthorized if error.response.status_code == 401 else ServerUnavailable
            raise kind(f"{self.url} refused the connection ({error.response.status_code}): {said or 'without a word'}") from error
        except InvalidHandshake as error:
            raise ServerUnavailable(f"{self.url} speaks no websockets ({error})") from error
        try:
            metadata = wire.unpack(connection.recv(timeout=self._timeout_s))
            if not isinstance(metadata, dict) or not {"policy", "requires", "max_message_bytes"} <= metadata.keys():
                raise wire.WireError("its first message has no policy, requires and max_message_bytes")
        except (ConnectionClosed, TimeoutError, wire.WireError, TypeError) as error:
            connection.socket.close()
            raise ServerUnavailable(f"what listens at {self.url} is no server of this kind: {error}") from error
        self._connection = connection
        return metadata

    def _check_tokenizer(self) -> None:
        if self._tokenizer is None:
            return
        theirs = (self.metadata.get("vision_tokenizer") or {}).get("fingerprint")
        if theirs != self._tokenizer.fingerprint:
            self.close()
            raise wire.TokenizerMismatch(
                f"tokenizer {self._tokenizer.fingerprint!r} is given here, the policy at {self.url} reads {theirs!r}; "
                "take the vision_tokenizer/ folder of that policy's checkpoint"
            )


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    try:
        right = parts.scheme in ("ws", "wss") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        right = False
    if not right:
        raise ValueError(f"{url!r} is no address of a server, expected ws://host:port or wss://host:port")


def _tokenizer(given: CodesOf | str | Path | None) -> CodesOf | None:
    if not isinstance(given, str | Path):
        return given
    from policies.edge import EdgeTokenizer  # needs torch, as no other client does

    return EdgeTokenizer(given)
