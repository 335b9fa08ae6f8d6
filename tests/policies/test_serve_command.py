"""`emu3-vla serve` as a process: what it prints and leaves, how it ends, and that nothing that is sent to it brings it down."""

import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import msgpack
import numpy as np
import pytest
from served import seen
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import connect

import policies
from emu3_vla import cli
from emu3_vla.commands.serve import ErrorLog, live_text
from policies import wire
from policies.client import RemotePolicy
from policies.server import Figures
from policies.wire import ServingError

ROOT = Path(__file__).parents[2]


RUNNING: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _nothing_is_left_running():
    yield
    for process in RUNNING:
        process.kill()
        process.wait()
    RUNNING.clear()


class Served:
    """A server's process. lines: what it printed."""

    def __init__(self, folder, *options, env=None):
        command = [sys.executable, "-m", "emu3_vla.cli", "serve", "port=0", f"output_dir={folder}", *options]
        threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | threads | (env or {})
        )
        first = self.process.stdout.readline()
        found = re.search(r"at (wss?://\S+) ", first)
        if not found:
            self.process.kill()
            raise AssertionError(first + self.process.stderr.read())
        self.address = found[1]
        RUNNING.append(self.process)

    def rss_mb(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def files(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serves_until_it_is_told_to_end(tmp_path, number):
    server = Served(tmp_path / "run", "policy=random")
    remote = RemotePolicy(server.address)
    remote.reset("go", seed=3)
    here = policies.load("random")
    here.reset("go", seed=3)
    for _ in range(3):
        np.testing.assert_array_equal(remote.infer({})["actions"], here.infer({})["actions"])
    code, out, err = server.end(number)
    assert code == 0 and "served 3 answers to 1 clients" in out and "Traceback" not in err
    assert "stopping: the decision under way is finished first" in err
    (record,) = map(json.loads, (tmp_path / "run" / "serving.jsonl").read_text().splitlines())
    assert (record["policy"], record["answers"], record["clients"], record["errors"]) == ("random", 3, 1, {})
    assert record["p50_ms"] > 0


def test_a_token_is_never_written_down(tmp_path):
    server = Served(tmp_path / "run", "policy=zero", env={"EMU3_VLA_TOKEN": "hush-hush"})
    RemotePolicy(server.address, token="hush-hush").close()
    _, out, err = server.end()
    assert "hush" not in out + err
    assert not any("hush" in path.read_text() for path in (tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    "options,said",
    [
        (["host=0.0.0.0"], "host=0.0.0.0 lets other machines in, and there is no token"),
        (["policy=exprt"], "did you mean 'expert'?"),
        (["policy=ws://127.0.0.1:8000"], "is served already"),
        (["seconds=-1"], "seconds=-1.0, expected at least 0"),
        (["keys=[image:rgb]"], "keys: 'image:rgb', expected <their name>:<ours>"),
        (["policy=zero", "tls_certificate=none.pem", "tls_key=none.pem"], "tls_certificate=none.pem"),
        (["policy=zero", "policy_options.history=1"], "its options: none"),
        (["policy=expert", "threads=2"], "unexpected keyword argument 'threads'; its options: scene"),
    ],
)
def test_wrong_options_are_one_line(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("EMU3_VLA_TOKEN", raising=False)
    assert cli.main(["serve", *options, f"output_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_an_empty_token_file_is_no_token(tmp_path, capsys):
    (tmp_path / "token").write_text("\n")
    assert cli.main(["serve", f"token_file={tmp_path / 'token'}", f"output_dir={tmp_path / 'run'}"]) == 2
    assert "is empty; write the token into it" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", "policy=zero", f"port={port}", f"output_dir={tmp_path / 'run'}"]) == 2
    assert f"host=127.0.0.1 port={port} cannot be listened on" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["openpi_libero", "openpi_droid"])
def test_presets_know_openpis_names(preset):
    config = cli.compose("serve", [f"preset={preset}"])
    assert sorted(config.renamed.values()) == ["rgb_gripper", "rgb_static"]
    assert all(name.startswith("observation/") for name in config.renamed)


def test_the_live_line():
    figures = Figures(clients=2, answers=3, decided=3, batches=2)
    figures.latencies_s.extend([0.01, 0.01, 0.03])
    figures.errors.update({"InvalidRequest": 2, "ServerBusy": 1})
    assert live_text(figures, 6.0) == ("2 clients · 3 answers · 6/s · p50 10 ms, p99 30 ms · 1.5 a batch · 3 errors, InvalidRequest most")
    assert live_text(Figures(), 0.0) == "0 clients · 0 answers"


def test_the_error_log_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("emu3_vla.commands.serve.MAX_LOGGED", 2)
    log = ErrorLog(tmp_path / "errors.log")
    for number in range(4):
        log.write(RuntimeError(f"number {number}"))
    text = (tmp_path / "errors.log").read_text()
    assert log.written == 2 and "number 1" in text and "number 2" not in text


# -- hostile clients

SECRETS = ("Traceback", 'File "', "site-packages", "/", "\\", ".py")


def messages(number, seed):
    """Malformed, truncated, flipped and hostile messages."""
    chance = random.Random(seed)
    good = wire.pack(
        {"prompt": "go", "reset": True, "seed": 3, "rgb_static": np.zeros((8, 8, 3), np.uint8), **seen(), "more": [1, {"a": 2.5}]}
    )
    scalar = {b"__npgeneric__": True, b"dtype": "<f8", b"data": 1.0}
    array = {b"__ndarray__": True, b"dtype": "<f8", b"shape": [15], b"data": bytes(120)}
    values = [
        "<f8",
        "|O",
        "<U99",
        "O",
        "i4,i4",
        None,
        -1,
        2**63,
        [15],
        [-1],
        [2**40, 2**40],
        [[]],
        b"",
        bytes(120),
        bytes(10**5),
        {},
        "x" * 99,
        1e308,
    ]
    bombs = [b"\x91" * 20_000, b"\x81\xa1a" * 5_000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
    bombs += [
        msgpack.packb([{}] * 60_000),
        msgpack.packb([[]] * 60_000),
        msgpack.packb({str(k): k for k in range(30_000)}),
        b"\xc9\xff\xff\xff\xff\x01",
    ]
    names = ["prompt", "reset", "seed", "task", "deadline_ms", "codes", "tokenizer", "executed", "begin_chain", "robot_obs", "rgb_static"]

    def changed(content):
        return content | {chance.choice(list(content)): chance.choice(values)}

    for _ in range(number):
        kind = chance.choice((0, 0, 1, 1, 2, 2, 4, 4, 5, 5, 6, 6, 7, 7, 3))
        if kind == 0:
            yield chance.randbytes(chance.randrange(300))
        elif kind == 1:
            yield good[: chance.randrange(len(good))]
        elif kind == 2:
            flipped = bytearray(good)
            for _ in range(chance.randint(1, 8)):
                flipped[chance.randrange(len(flipped))] = chance.randrange(256)
            yield bytes(flipped)
        elif kind == 3:
            yield chance.choice(bombs)
        elif kind == 4:
            yield msgpack.packb({chance.choice(names): changed(chance.choice([array, scalar])), "prompt": "go"})
        elif kind == 5:
            yield msgpack.packb({chance.choice(names): chance.choice(values), "prompt": "go"}, default=str)
        elif kind == 6:
            yield chance.choice(["", "text", "é" * 50, "{}"])
        else:
            yield msgpack.packb(
                {"codes": {chance.choice(["rgb_static", "x"]): changed(array)}, "tokenizer": chance.choice(values), "prompt": "go"}
            )


def exchange(address, sent):
    """Send each message; returns the texts that were answered."""
    texts = []
    with connect(address, compression=None, proxy=None) as connection:
        connection.recv(timeout=20)
        for message in sent:
            connection.send(message)
            answer = connection.recv(timeout=20)
            if isinstance(answer, str):
                texts.append(answer)
            else:
                assert "actions" in wire.unpack(answer)
    return texts


def rude(address, seed):
    """What no websocket client does: broken handshakes, frames that never end, connections cut in the middle of a message."""
    chance, host = random.Random(seed), urlsplit(address)
    handshake = (
        f"GET / HTTP/1.1\r\nHost: {host.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()
    mask = b"\x01\x02\x03\x04"
    frames = [
        b"\x82\xff" + struct.pack(">Q", 2**62) + mask,  # claims more than there is memory
        b"\x82\xff" + struct.pack(">Q", 4 * 2**20) + mask + b"x" * 1000,  # and is killed in the middle
        b"\x82\x85" + mask + b"xx",
        b"\x02\x81" + mask + b"x",  # a fragment whose rest never comes
        b"\x82\x05hello",  # not masked
        b"\xf2\x81" + mask + b"x",  # reserved bits
        b"\x81\x82" + mask + b"\xfe\xff",  # text that is no UTF-8
        chance.randbytes(200),
    ]
    starts = [b"", b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", chance.randbytes(500), b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 500, handshake]
    start = chance.choice([*starts, handshake, handshake, handshake])
    with socket.create_connection((host.hostname, host.port), timeout=10) as raw:
        try:
            raw.sendall(start)
            if start is handshake:
                raw.recv(4096)
                raw.sendall(chance.choice(frames))
            if chance.random() < 0.5:  # a reset instead of a goodbye
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass  # it was thrown out while it spoke


def test_ten_thousand_hostile_messages(tmp_path):
    """It keeps serving others meanwhile, tells nobody where it lives, and holds no more memory and files than before."""
    server = Served(tmp_path / "run", "policy=random", "max_message_bytes=300000", "max_connections=8")
    polite = RemotePolicy(server.address)
    polite.reset("go", seed=3)
    texts = exchange(server.address, messages(500, seed=0))
    before_mb, before_files = server.rss_mb(), server.files()
    worst_mb = [before_mb]

    def attack(seed):
        texts.extend(exchange(server.address, messages(3200, seed)))
        for number in range(60):
            rude(server.address, 1000 * seed + number)
        for _ in range(10):
            with pytest.raises(ConnectionClosed), connect(server.address, compression=None, proxy=None) as connection:
                connection.recv(timeout=20)
                connection.send(bytes(300_001))
                connection.recv(timeout=20)
        worst_mb.append(server.rss_mb())

    attackers = [threading.Thread(target=attack, args=(seed,)) for seed in (1, 2, 3)]
    for attacker in attackers:
        attacker.start()
    answered = 0
    while any(attacker.is_alive() for attacker in attackers):
        assert polite.infer({})["actions"].shape == (10, 7)
        answered += 1
        attackers[0].join(0.05)
    assert answered > 3
    names = {text.partition(":")[0] for text in texts}
    assert names <= {"InvalidRequest", "DeadlineExceeded"} and len(texts) > 7000
    unquoted = {re.sub(r"str (['\"]).*\1", "", text) for text in texts}  # without what the client itself had said
    told = [text for text in unquoted if any(secret in text for secret in SECRETS)]
    assert not told, told[:3]
    assert max(worst_mb) < before_mb + 60, "memory is bounded"
    polite.reset("go", seed=3)
    here = policies.load("random")
    here.reset("go", seed=3)
    np.testing.assert_array_equal(polite.infer({})["actions"], here.infer({})["actions"])
    for _ in range(100):
        if server.files() <= before_files:
            break
        attackers[0].join()
        signal.sigtimedwait([], 0.1)
    assert server.files() <= before_files, "no connection is left open"
    polite.close()
    code, out, err = server.end()
    assert code == 0 and "Traceback" not in err
    assert not (tmp_path / "run" / "errors.log").exists(), "nothing of it reached the policy or broke the server"


def test_a_client_that_dies_between_question_and_answer(tmp_path):
    server = Served(tmp_path / "run", "policy=random")
    code = (
        "import os, policies, threading\n"
        f"remote = policies.load({server.address!r})\n"
        "remote.reset('go'); remote.infer({})\n"
        "remote._connection.socket.sendall(b'\\x82\\xff' + (10**6).to_bytes(8, 'big') + bytes(4) + b'half')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    died = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert died.returncode == -signal.SIGKILL
    remote = RemotePolicy(server.address)
    remote.reset("go")
    assert remote.infer({})["actions"].shape == (10, 7)
    remote.close()
    assert server.end()[0] == 0


def test_a_server_that_is_killed_is_said(tmp_path):
    server = Served(tmp_path / "run", "policy=random")
    remote = RemotePolicy(server.address, connect_s=0)
    remote.reset("go")
    remote.infer({})
    server.process.kill()
    server.process.communicate()
    with pytest.raises(ServingError, match="closed the connection"):
        remote.infer({})
    with pytest.raises(ServingError, match="no server answers"):
        remote.reset("go")
    with pytest.raises((WebSocketException, OSError)):
        connect(server.address, proxy=None).__enter__()


def test_evaluations_of_a_served_policy_are_those_of_the_policy(tmp_path):
    """`emu3-vla eval policy=ws://...`: privileged policies are told the task, and know of every action that they did not choose."""
    server = Served(tmp_path / "served", "policy=expert")
    options = ["eval.num_sequences=1", "eval.max_steps=90", "eval.workers=1", "eval.variant=[pushes]"]
    results = []
    for policy in (server.address, "expert"):
        folder = tmp_path / policy.rpartition(":")[2]
        assert cli.main(["eval", f"policy={policy}", *options, f"output_dir={folder}"]) in (0, None)
        found = json.loads((folder / "results.json").read_text())
        results.append([(chain["num_solved"], chain["steps"], chain["error"]) for chain in found["chains"]])
    assert results[0] == results[1] and sum(solved for solved, _, _ in results[0]) > 0
    assert server.end()[0] == 0


def test_a_served_policy_that_is_gone_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(RemotePolicy.__init__.__kwdefaults__, "connect_s", 0.0)
    assert cli.main(["rollout", "policy=ws://127.0.0.1:9", f"output_dir={tmp_path / 'run'}"]) == 2
    assert "no server answers at ws://127.0.0.1:9" in capsys.readouterr().err
