"""`emu3-vla serve`: a policy over the network, for arms and simulators elsewhere. See docs/serving.md.

    emu3-vla serve                                                      the shipped policy, for programs of this machine
    emu3-vla serve policy=outputs/train/3f2a91c0/policy port=8000
    EMU3_VLA_TOKEN=... emu3-vla serve host=0.0.0.0 tls_certificate=cert.pem tls_key=key.pem
    emu3-vla serve preset=openpi_libero                                 cameras under the names of openpi's LIBERO example

Runs until it is interrupted. Leaves serving.jsonl, a line for each time that it ran, and errors.log with what went wrong in the policy.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import policies
from eval.environment import EnvConfig, PolicyOptions, loaded
from eval.progress import LiveLine, duration
from eval.provenance import policy_provenance
from policies import wire
from policies.server import LOOPBACK, Figures, PolicyServer, ServerOptions

ERRORS_FILE, RUNS_FILE = "errors.log", "serving.jsonl"
MAX_LOGGED = 1000  # errors in full; a policy that is broken fails at every request
SHOW_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ServerOptions):
    """Options of `emu3-vla serve`."""

    policy: str = policies.SHIPPED  # expert, zero, random, a shipped name, or a checkpoint folder
    policy_options: PolicyOptions = field(default_factory=PolicyOptions)
    threads: int | None = None  # of a checkpoint's arithmetic; as many as there are cores that nobody else uses
    workers: int | None = None  # groups into which a checkpoint parts a batch, decided side by side, each with those threads
    env: EnvConfig = field(default_factory=EnvConfig)  # the expert wants to know the scene
    token_file: str = ""  # holds what clients must show; empty: that in EMU3_VLA_TOKEN, and none without it
    seconds: float = 0.0  # serve so long; 0: until interrupted
    output_dir: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.seconds < 0:
            raise ValueError(f"seconds={self.seconds}, expected at least 0")
        self.check_open(self.token())
        policy_provenance(self.policy)  # names an unknown policy or a damaged checkpoint now
        if policies.is_address(self.policy):
            raise ValueError(f"policy={self.policy} is served already; let the clients connect there")

    def token(self) -> str:
        """What clients must show; "" for nothing. Raises ValueError for a file without one."""
        if not self.token_file:
            return os.environ.get(wire.TOKEN_VARIABLE, "")
        token = Path(self.token_file).read_text().strip()
        if not token:
            raise ValueError(f"token_file={self.token_file} is empty; write the token into it, or leave the option out")
        return token

    def make_policy(self) -> policies.Policy:
        """The policy, anew."""
        asked = {name: getattr(self, name) for name in ("threads", "workers") if getattr(self, name) is not None}
        if not asked:
            return loaded(self.policy, self.env, self.policy_options)
        return policies.load(self.policy, **self.policy_options.given(), **asked)


def main(config: ServeConfig) -> None:
    """Serve until interrupted or told to end; print the address, and at the end where the figures are."""
    folder = Path(config.output_dir)
    log = ErrorLog(folder / ERRORS_FILE)
    server = PolicyServer(config.make_policy(), config, token=config.token(), make=config.make_policy, failed=log.write)
    began, started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    try:
        with LiveLine() as line:
            asyncio.run(_serve(server, config, line))
    except OSError as error:
        raise ValueError(f"host={config.host} port={config.port} cannot be listened on: {error.strerror or error}") from error
    figures, seconds = server.figures, time.monotonic() - began
    record = {"started": started, "seconds": round(seconds, 1), "policy": config.policy, **_summary(figures)}
    with (folder / RUNS_FILE).open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"served {figures.answers} answers to {figures.connections} clients in {duration(seconds)}")
    print(folder / RUNS_FILE)
    if log.written:
        print(f"{folder / ERRORS_FILE}   ({log.written} errors in full)")


async def _serve(server: PolicyServer, config: ServeConfig, line: LiveLine) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one ends a policy that hangs
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        line.show("stopping: the decision under way is finished first")
        server.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    if config.seconds:
        loop.call_later(config.seconds, server.stop)
    live = asyncio.create_task(_live(server, line))
    try:
        await server.run(lambda server: print(_welcome(server, config), flush=True))
    finally:
        live.cancel()


def _welcome(server: PolicyServer, config: ServeConfig) -> str:
    guarded = "clients show the token" if config.token() else "no token"
    plain = config.host not in LOOPBACK and not config.tls_certificate
    lines = [f"policy {server.metadata['policy']} at {server.address} · {guarded} · Ctrl-C ends it"]
    if plain:
        lines.append("the network sees pictures and token in the clear: give tls_certificate= and tls_key= for wss://")
    return "\n".join(lines)


async def _live(server: PolicyServer, line: LiveLine) -> None:
    while True:
        before = server.figures.answers
        await asyncio.sleep(SHOW_EVERY_S)
        line.show(live_text(server.figures, (server.figures.answers - before) / SHOW_EVERY_S))


def live_text(figures: Figures, answers_per_s: float) -> str:
    """What the live line says."""
    text = f"{figures.clients} clients · {figures.answers} answers"
    if figures.answers:
        text += f" · {answers_per_s:.0f}/s · p50 {figures.latency_ms(50):.0f} ms, p99 {figures.latency_ms(99):.0f} ms"
        text += f" · {figures.requests_per_batch:.1f} a batch"
    errors = sum(figures.errors.values())
    return text + (f" · {errors} errors, {figures.errors.most_common(1)[0][0]} most" if errors else "")


def _summary(figures: Figures) -> dict[str, Any]:
    timed = {"p50_ms": round(figures.latency_ms(50), 2), "p99_ms": round(figures.latency_ms(99), 2)} if figures.answers else {}
    return {"clients": figures.connections, "answers": figures.answers, "batches": figures.batches, "errors": dict(figures.errors)} | timed


class ErrorLog:
    """Appends errors in full to a file, the first of them. written: how many."""

    def __init__(self, path: Path):
        self.path, self.written = path, 0

    def write(self, error: BaseException) -> None:
        """Called from any thread."""
        if self.written == MAX_LOGGED:
            return
        self.written += 1
        with self.path.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n{''.join(traceback.format_exception(error))}\n")
