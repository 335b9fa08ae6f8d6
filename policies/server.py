"""A policy served over websockets, speaking openpi's protocol: see docs/serving.md. `emu3-vla serve` runs it.

    server = PolicyServer(policies.load("calvin-d"), ServerOptions(port=8000))
    asyncio.run(server.run())

A client connects and is sent the server's metadata; then each of its messages is an observation, answered by a decision or by an error
in words, in turn. A connection has an instruction and a past of its own (a session). What several clients ask at the same time is decided
in one batch where the policy can (`sessions` and `infer_many`); one thread decides, the event loop does all else.
"""

from __future__ import annotations

import asyncio
import hmac
import http
import logging
import re
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from envs.spec import OBSERVATION
from policies import wire
from policies.base import Policy
from policies.requests import CONTROL_KEYS, MAX_TEXT, read_request
from policies.units import units_of
from policies.wire import DeadlineExceeded, InvalidRequest, PolicyFailed, ServerBusy, ServingError

PROTOCOL = "emu3-vla/1"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_ERROR_TEXT = 300
TOO_BIG, INTERNAL_ERROR, TRY_AGAIN_LATER = 1009, 1011, 1013  # RFC 6455's close codes

# The library logs every broken handshake with its traceback; whoever sends rubbish would fill the log.
SILENT = logging.Logger("websockets", level=logging.CRITICAL + 1)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where a server listens and what it bears. Raises ValueError for what cannot or should not be."""

    host: str = "127.0.0.1"  # this machine alone; another address needs a token
    port: int = 8000  # 0: any free one
    allow_anyone: bool = False  # listen on another address than loopback without a token
    tls_certificate: str = ""  # PEM file, its chain included; with tls_key: wss:// instead of ws://
    tls_key: str = ""  # PEM file
    max_connections: int = 32  # clients at a time; each has a session of the policy
    max_message_bytes: int = wire.MAX_MESSAGE_BYTES  # of one observation
    max_waiting: int = 64  # requests that wait for the policy
    max_batch: int = 16  # requests that are decided together
    gather_ms: float = 5.0  # a client that was answered so recently is waited for before the next batch begins
    deadline_ms: float = 10_000.0  # from a request's arrival to its answer; a request may ask for less
    default_prompt: str = ""  # instruction of clients that send none
    keys: tuple[str, ...] = ()  # what clients call a camera or state: "observation/image:rgb_static", their name and our observation key

    def __post_init__(self):
        for name in ("max_connections", "max_message_bytes", "max_waiting", "max_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port}, expected 0 to 65535")
        if self.gather_ms < 0 or self.deadline_ms <= 0:
            raise ValueError(f"gather_ms={self.gather_ms} must be at least 0, and deadline_ms={self.deadline_ms} above it")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("tls_certificate and tls_key belong together: give both, or neither")
        if len(self.default_prompt) > MAX_TEXT:
            raise ValueError(f"default_prompt has {len(self.default_prompt)} characters, expected at most {MAX_TEXT}")
        for pair in self.keys:
            theirs, _, ours = pair.rpartition(":")
            if ours not in OBSERVATION:
                raise ValueError(f"keys: {pair!r}, expected <their name>:<ours>, which is one of {', '.join(OBSERVATION)}")
            if not theirs or theirs in CONTROL_KEYS:
                raise ValueError(f"keys: {pair!r} renames {theirs!r}, which has a meaning of its own in a request")

    @property
    def renamed(self) -> dict[str, str]:
        """Our observation key of each name in `keys`."""
        return {theirs: ours for theirs, _, ours in (pair.rpartition(":") for pair in self.keys)}

    def check_open(self, token: str) -> None:
        """Raises ValueError where anyone who reaches this machine could drive the arm, and nobody said that they may."""
        if self.host not in LOOPBACK and not token and not self.allow_anyone:
            raise ValueError(
                f"host={self.host} lets other machines in, and there is no token: set one in {wire.TOKEN_VARIABLE} or token_file=, "
                "or say allow_anyone=true"
            )


@dataclass
class Figures:
    """What a server has done so far. latencies_s: of the last answers, from a request's arrival to its answer."""

    clients: int = 0
    connections: int = 0
    answers: int = 0
    decided: int = 0
    batches: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=1000))

    @property
    def requests_per_batch(self) -> float:
        """How many requests were decided at once, on average."""
        return self.decided / max(1, self.batches)

    def latency_ms(self, percentile: float) -> float:
        """A percentile of the last answers' latencies; NaN before the first."""
        return 1e3 * float(np.percentile(self.latencies_s, percentile)) if self.latencies_s else float("nan")


@dataclass(eq=False)
class _Request:
    """One observation on its way to a decision. arrived_s, due_s: time.perf_counter. dropped: nobody waits for its answer any more."""

    client: _Client
    control: dict[str, Any]
    observation: dict[str, Any]
    arrived_s: float
    due_s: float
    answer: asyncio.Future
    dropped: bool = False


class _Client:
    """One connection's session and what it was told.

    said: the last prompt that came; prompt: that which the session was reset with. forget: the session's past is not what its arm did;
    adrift: nor is the arm where the session believes it to be.
    """

    def __init__(self, session: Policy):
        self.session = session
        self.said = self.prompt = self.task = ""
        self.seed: int | None = None
        self.adrift = self.forget = True
        self.answered_s = float("-inf")

    def decide_on(self, control: dict[str, Any]) -> None:
        """Bring the session to where this request expects it. Runs in the deciding thread; raises what the policy raises."""
        if (self.adrift or control.get(wire.BEGIN_CHAIN)) and hasattr(self.session, "begin_chain"):
            self.session.begin_chain()
        self.adrift = False
        prompt = control.get(wire.PROMPT, self.prompt)
        if self.forget or control.get(wire.RESET) or prompt != self.prompt:
            self.forget = True  # until the reset went well
            asked_anew = control.get(wire.RESET) or prompt != self.prompt
            self.task = control.get(wire.TASK, "" if asked_anew else self.task)
            self.seed = control.get(wire.SEED, None if asked_anew else self.seed)
            self.prompt = prompt
            self.session.reset(prompt, task=self.task or None, seed=self.seed)
            self.forget = False
        if hasattr(self.session, "executed"):
            for action in control.get(wire.EXECUTED, ()):
                self.session.executed(action)


class PolicyServer:
    """Serves one policy. `run` does until `stop`; the address is in `address` once it listens.

    make: gives a further policy of this kind, for one that has no `sessions`: each client then has its own. token: what clients must show.
    failed: told of every exception that a client is not told about. Raises ValueError for options that leave the server open.
    """

    def __init__(
        self,
        policy: Policy,
        options: ServerOptions | None = None,
        *,
        token: str = "",
        make: Callable[[], Policy] | None = None,
        failed: Callable[[BaseException], None] = lambda error: None,
    ):
        self.options = options or ServerOptions()
        self.options.check_open(token)
        self.policy, self.figures, self.address = policy, Figures(), ""
        self.metadata = describe(policy, self.options)
        self._token, self._failed, self._tls = token, failed, _tls(self.options)
        self._renamed = self.options.renamed
        self._batched = hasattr(policy, "sessions") and hasattr(policy, "infer_many")
        self._make = make
        self._free: list[Policy] = [] if self._batched else [policy]
        self._clients: set[_Client] = set()
        self._waiting: deque[_Request] = deque()
        self._came, self._stopping = asyncio.Event(), asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    # -- running

    async def run(self, listening: Callable[[PolicyServer], None] = lambda server: None) -> None:
        """Serve until `stop`. listening: called once connections are accepted. Raises OSError where the port is taken."""
        options = self.options
        deciding = asyncio.create_task(self._decide_forever())
        try:
            async with serve(
                self._serve_client,
                options.host,
                options.port,
                process_request=self._admit,
                origins=[None],  # a page in a browser says where it comes from; no robot does
                ssl=self._tls,
                compression=None,  # pixels do not shrink, and a small message cannot grow into a large one
                max_size=options.max_message_bytes,
                max_queue=1,
                open_timeout=10,
                close_timeout=2,
                server_header=None,
                logger=SILENT,
            ) as server:
                self.address = _address(server, options)
                listening(self)
                stopping = asyncio.create_task(self._stopping.wait())
                await asyncio.wait([stopping, deciding], return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
                server.close()
        finally:
            deciding.cancel()
            self._thread.shutdown(wait=False, cancel_futures=True)
        if deciding.done() and not deciding.cancelled() and deciding.exception():
            raise deciding.exception()

    def stop(self) -> None:
        """Let `run` end: clients are told goodbye. Called in the event loop's thread."""
        self._stopping.set()

    # -- connections

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer health checks, and refuse who may not come in."""
        path = request.path.partition("?")[0]
        if path == wire.HEALTH_PATH:
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if path != "/":
            return connection.respond(http.HTTPStatus.NOT_FOUND, f"policies are at /, health at {wire.HEALTH_PATH}\n")
        if self._token and not _authorized(request.headers.get_all("Authorization"), self._token):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "a token is needed: Authorization: Api-Key <token>\n")
        if self.figures.clients >= self.options.max_connections:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{self.options.max_connections} clients are here already\n")
        return None

    async def _serve_client(self, connection: ServerConnection) -> None:
        if self.figures.clients >= self.options.max_connections:  # several were admitted in one moment
            await connection.close(TRY_AGAIN_LATER, "too many clients")
            return
        self.figures.clients += 1
        self.figures.connections += 1
        client = None
        try:
            client = _Client(await self._off_loop(self._new_session))
            self._clients.add(client)
            await self._send(connection, wire.pack(self.metadata))
            async for message in connection:
                await self._send(connection, await self._answer(client, message))
        except ConnectionClosed as closed:
            if closed.sent and closed.sent.code == TOO_BIG:
                self.figures.errors["too big"] += 1
        except TimeoutError:
            self.figures.errors["reads no answers"] += 1
            connection.transport.abort()
        except ServingError as error:
            await connection.close(TRY_AGAIN_LATER, str(error))
        except Exception as error:  # noqa: BLE001 - one client's end is not the server's
            self._failed(error)
            await connection.close(INTERNAL_ERROR, "the server failed; its log says more")
        finally:
            self.figures.clients -= 1
            if client is not None:
                self._clients.discard(client)
                self._free.append(client.session)

    async def _send(self, connection: ServerConnection, message: bytes | str) -> None:
        async with asyncio.timeout(self.options.deadline_ms / 1e3):
            await connection.send(message)

    async def _answer(self, client: _Client, message: bytes | str) -> bytes | str:
        """The message that answers one; an error becomes its words."""
        arrived_s = time.perf_counter()
        try:
            request = self._read(client, message, arrived_s)
            answer = await self._decided(request)
            answer["server_timing"]["total_ms"] = 1e3 * (time.perf_counter() - arrived_s)
            packed = wire.pack(answer)
        except ServingError as error:
            self.figures.errors[type(error).__name__] += 1
            return wire.error_text(error)
        except wire.WireError as error:
            self._failed(error)
            self.figures.errors[PolicyFailed.__name__] += 1
            return wire.error_text(PolicyFailed("the policy's answer has no form in a message"))
        self.figures.answers += 1
        self.figures.latencies_s.append(time.perf_counter() - arrived_s)
        return packed

    def _read(self, client: _Client, message: bytes | str, arrived_s: float) -> _Request:
        """The request in a message. Raises InvalidRequest; then nothing has changed."""
        control, observation = read_request(
            message,
            requires=self.policy.requires,
            keys=self._renamed,
            tokenizer=self.metadata.get("vision_tokenizer"),
            deadline_ms=self.options.deadline_ms,
        )
        control.setdefault(wire.PROMPT, client.said or self.options.default_prompt)
        if not control[wire.PROMPT].strip():
            raise InvalidRequest(f"no {wire.PROMPT!r}: the first request of a connection says what is to be done, in a sentence")
        client.said = control[wire.PROMPT]
        due_s = arrived_s + control.pop(wire.DEADLINE_MS) / 1e3
        return _Request(client, control, observation, arrived_s, due_s, asyncio.get_running_loop().create_future())

    # -- decisions

    async def _decided(self, request: _Request) -> dict[str, Any]:
        """Queue the request and wait for its decision, until it is due."""
        if len(self._waiting) >= self.options.max_waiting:
            raise ServerBusy(f"{self.options.max_waiting} requests wait already; ask again later")
        self._waiting.append(request)
        self._came.set()
        try:
            async with asyncio.timeout(request.due_s - time.perf_counter()):
                return await asyncio.shield(request.answer)
        except TimeoutError:
            request.dropped = True  # a thread cannot be stopped in what it computes
        if request in self._waiting:
            self._waiting.remove(request)
            raise DeadlineExceeded("the policy was busy with others until then; nothing was decided, ask again")
        late_ms = (time.perf_counter() - request.arrived_s) * 1e3
        raise DeadlineExceeded(
            f"no decision within {late_ms:.0f} ms; the subtask's past is forgotten, as its actions never reached the arm"
        )

    async def _decide_forever(self) -> None:
        while True:
            await self._came.wait()
            await self._gather()
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self.options.max_batch))]
            if not self._waiting:
                self._came.clear()
            if batch:
                self._settle(batch, *await self._off_loop(self._decide, batch))
                await self._prepare([request.client for request in batch])

    async def _prepare(self, answered: Sequence[_Client]) -> None:
        """Let sessions compute ahead for their next decision, one by one, while nobody asks for one."""
        for client in answered:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), self.options.gather_ms / 1e3)
            if self._came.is_set():
                return
            if client in self._clients and not client.forget and hasattr(client.session, "prepare"):
                await self._off_loop(self._prepare_session, client.session)

    def _prepare_session(self, session: Policy) -> None:
        try:
            session.prepare()
        except Exception as error:  # noqa: BLE001 - the decision itself will meet it, and tell
            self._failed(error)

    async def _gather(self) -> None:
        """Wait for clients that were answered just now, `gather_ms` at most: they are about to ask again, for one batch of all."""
        gather_s, began = self.options.gather_ms / 1e3, time.perf_counter()
        while (now := time.perf_counter()) - began < gather_s and len(self._waiting) < self.options.max_batch:
            asking = {request.client for request in self._waiting}
            if not any(now - client.answered_s < gather_s for client in self._clients - asking):
                return
            await asyncio.sleep(2e-4)

    def _settle(self, batch: Sequence[_Request], outcomes: Sequence[dict[str, Any] | ServingError], seconds: float) -> None:
        """Hand the outcomes of a batch to those who wait for them."""
        self.figures.batches += 1
        self.figures.decided += len(batch)
        now = time.perf_counter()
        for request, outcome in zip(batch, outcomes, strict=True):
            request.client.answered_s = now
            if request.dropped:
                request.client.adrift = request.client.forget = True
            elif request.answer.cancelled():  # the server is being stopped
                continue
            elif isinstance(outcome, ServingError):
                request.answer.set_exception(outcome)
            else:
                request.answer.set_result(outcome | {"server_timing": {"infer_ms": 1e3 * seconds, "batch": len(batch)}})

    def _decide(self, batch: Sequence[_Request]) -> tuple[list[dict[str, Any] | ServingError], float]:
        """An answer or an error for each, and seconds. Runs in the deciding thread; nothing that a policy does ends it."""
        began = time.perf_counter()
        outcomes: dict[int, Any] = {}
        for number, request in enumerate(batch):
            try:
                request.client.decide_on(request.control)
            except Exception as error:  # noqa: BLE001 - the client is told, in safe words, and our own log in full
                outcomes[number] = self._told(error)
        ready = [number for number in range(len(batch)) if number not in outcomes]
        together = self._together([batch[number] for number in ready]) if self._batched and len(ready) > 1 else None
        for place, number in enumerate(ready):
            outcomes[number] = together[place] if isinstance(together, list) else self._alone(batch[number])
        if isinstance(together, Exception) and not any(isinstance(outcomes[number], ServingError) for number in ready):
            self._failed(together)  # no request was at fault, so deciding together is
        return [outcomes[number] for number in range(len(batch))], time.perf_counter() - began

    def _together(self, batch: Sequence[_Request]) -> list[Any] | Exception:
        """Answers of one batch; or why it failed, which has changed no session: then each is asked alone."""
        try:
            answers = self.policy.infer_many([request.client.session for request in batch], [request.observation for request in batch])
            return [self._checked(answer) for answer in answers]
        except Exception as error:  # noqa: BLE001 - whoever is at fault raises again when asked alone
            return error

    def _alone(self, request: _Request) -> Any:
        try:
            return self._checked(request.client.session.infer(request.observation))
        except Exception as error:  # noqa: BLE001 - as above
            return self._told(error)

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        actions = np.asarray(answer["actions"])
        if actions.ndim != 2 or not len(actions) or actions.dtype.kind not in "fiu" or not np.isfinite(actions).all():
            raise RuntimeError(f"the policy's actions are {actions.dtype} of shape {actions.shape} or not finite; nothing was sent")
        return dict(answer)

    def _told(self, error: Exception) -> ServingError:
        """What the client is told of an exception: a refusal of its input in words without paths, of anything else the kind alone."""
        if isinstance(error, ServingError):
            return error
        if type(error) is ValueError:
            return InvalidRequest(safe_words(str(error)))
        self._failed(error)
        if isinstance(error, ValueError):
            return PolicyFailed(f"{type(error).__name__}: {safe_words(str(error))}")
        return PolicyFailed(f"{type(error).__name__} in the policy; the server's log says more")

    def _new_session(self) -> Policy:
        if self._free:
            return self._free.pop()
        if self._batched:
            return self.policy.sessions(1)[0]
        if self._make is None:
            raise ServerBusy("this policy serves one client at a time")
        return self._make()

    async def _off_loop(self, what: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, what, *arguments)


def describe(policy: Policy, options: ServerOptions) -> dict[str, Any]:
    """What a client is told first: plain values alone."""
    told = {
        "protocol": PROTOCOL,
        "policy": policy.name,
        "requires": sorted(policy.requires),
        "observation": {
            name: {"shape": list(OBSERVATION[name].shape), "dtype": OBSERVATION[name].dtype}
            for name in sorted(policy.requires)
            if name in OBSERVATION
        },
        "keys": options.renamed,
        "control_hz": units_of(policy).rate_hz,
        "actions": asdict(units_of(policy)),
        "max_message_bytes": options.max_message_bytes,
        "deadline_ms": options.deadline_ms,
    }
    tokenizer = getattr(policy, "vision_tokenizer", None)
    return told | ({"vision_tokenizer": tokenizer} if tokenizer else {})


def safe_words(message: str) -> str:
    """The first line of an error, with whatever looks like a path taken out."""
    line = message.strip().splitlines()[0] if message.strip() else "no reason was given"
    return re.sub(r"\S*[/\\]\S*", "<path>", line)[:MAX_ERROR_TEXT]


# -- small parts


def _authorized(headers: list[str], token: str) -> bool:
    """One header, "Api-Key <token>" as openpi's client sends it or "Bearer <token>"; compared in constant time."""
    if len(headers) != 1:
        return False
    scheme, _, shown = headers[0].partition(" ")
    return scheme.lower() in ("api-key", "bearer") and hmac.compare_digest(shown.strip().encode(), token.encode())


def _tls(options: ServerOptions) -> ssl.SSLContext | None:
    if not options.tls_certificate:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(options.tls_certificate, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"tls_certificate={options.tls_certificate} and tls_key={options.tls_key}: {error}") from error
    return context


def _address(server: Server, options: ServerOptions) -> str:
    host, port = next(iter(server.sockets)).getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"{'wss' if options.tls_certificate else 'ws'}://{host}:{port}"
