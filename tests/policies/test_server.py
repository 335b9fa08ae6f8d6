"""The server and our client: who is let in, whose session is whose, what is decided together, and what is said when something is wrong."""

import asyncio
import http.client
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from served import Recording, seen, serving
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import policies
from envs.spec import ROBOT_OBS
from policies import wire
from policies.base import Policy
from policies.client import AnswerTimeout, NotAuthorized, RemotePolicy, ServerLost, ServerUnavailable
from policies.server import ServerOptions, safe_words
from policies.simple import RandomPolicy

ROOT = Path(__file__).parents[2]


def answer_of(decision):
    """(client's number, decisions since the reset, what it saw)"""
    return tuple(decision["actions"][0, :3].tolist())


def ask(connection, **content):
    """One exchange without our client: a decision, or the error's words."""
    connection.send(wire.pack(content))
    answer = connection.recv(timeout=20)
    return answer if isinstance(answer, str) else wire.unpack(answer)


def opened(server, **options):
    """A bare connection that has read the metadata."""
    connection = connect(server.address, compression=None, proxy=None, **options).__enter__()
    return connection, wire.unpack(connection.recv(timeout=20))


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.005)


def test_handshake_says_what_the_policy_is():
    with serving(Recording(), max_message_bytes=5000, keys=(f"observation/state:{ROBOT_OBS}",)) as server:
        connection, metadata = opened(server)
        connection.close()
    assert metadata["policy"] == "recording" and metadata["requires"] == [ROBOT_OBS]
    assert metadata["observation"] == {ROBOT_OBS: {"shape": [15], "dtype": "float64"}}
    assert (metadata["protocol"], metadata["max_message_bytes"], metadata["control_hz"]) == ("emu3-vla/1", 5000, 30)
    assert metadata["keys"] == {"observation/state": ROBOT_OBS}


def test_health_is_told_to_anyone_and_other_paths_are_not():
    with serving(Recording(), token="secret") as server:
        for path, status, words in (("/healthz", 200, b"OK\n"), ("/etc/passwd", 404, b"policies are at /"), ("/", 401, b"token")):
            plain = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=10)
            upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
            plain.request("GET", path, headers=upgrade | {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="})
            answer = plain.getresponse()
            assert (answer.status, words in answer.read()) == (status, True)


def test_remote_policy_is_a_policy_and_begins_where_it_is_told():
    policy = Recording()
    with serving(policy) as server:
        remote = policies.load(server.address)
        assert isinstance(remote, Policy) and remote.requires == {ROBOT_OBS} and remote.name == f"recording at {server.address}"
        with pytest.raises(RuntimeError, match="before reset"):
            remote.infer(seen())
        with pytest.raises(ValueError, match="instruction is empty"):
            remote.reset("  ")
        remote.begin_chain()
        remote.reset("open the drawer", task="open_drawer", seed=7)
        assert answer_of(remote.infer(seen(0.5) | {"scene_obs": np.zeros(24)})) == (0, 1, 0.5)
        remote.executed(np.arange(7.0))
        decision = remote.infer(seen(0.25))
        assert answer_of(decision) == (0, 2, 0.25) and decision["actions"].dtype == np.float32
        assert decision["server_timing"].keys() == {"infer_ms", "batch", "total_ms"}
        remote.reset("open the drawer")
        assert answer_of(remote.infer(seen())) == (0, 1, 0.5)
        remote.close()
    told = policy.told
    assert told[0] == (0, "begin_chain") and told[1] == (0, "open the drawer", "open_drawer", 7)
    assert told[2:] == [(0, "executed", list(range(7))), (0, "open the drawer", None, None)]


def test_prompts_as_openpis_users_send_them():
    """A prompt with every observation; a new one begins anew, the same one does not, a flag does."""
    policy = Recording()
    with serving(policy, default_prompt="wait") as server:
        connection, _ = opened(server)
        steps = [
            ({}, 1),
            ({"prompt": "open it"}, 1),
            ({"prompt": "open it"}, 2),
            ({}, 3),
            ({"prompt": "close it"}, 1),
            ({"reset": False}, 2),
            ({"reset": True}, 1),
            ({"reset": True, "prompt": "close it", "seed": 3}, 1),
            ({}, 2),
        ]
        for content, asked in steps:
            assert answer_of(ask(connection, **content, **seen()))[1] == asked, content
        connection.close()
    said = [told[1] for told in policy.told if told[1] != "begin_chain"]
    assert said == ["wait", "open it", "close it", "close it", "close it"] and policy.told[-1][3] == 3


def test_keys_of_others_are_translated_where_told():
    with serving(Recording(), keys=(f"observation/state:{ROBOT_OBS}",)) as server:
        connection, _ = opened(server)
        assert answer_of(ask(connection, prompt="go", **{"observation/state": np.full(15, 0.25, np.float32)}))[2] == 0.25
        assert answer_of(ask(connection, prompt="go", **seen(0.5)))[2] == 0.5
        assert ask(connection, prompt="go") == (
            "InvalidRequest: the observation has no 'robot_obs' (here also called 'observation/state'), which this policy requires"
        )
        assert "came twice" in ask(connection, **seen(), **{"observation/state": np.zeros(15)})
        connection.close()


def test_wrong_requests_are_named_and_change_nothing():
    image = np.zeros((8, 8, 3), np.uint8)
    wrong = [
        (b"\xc1", "not a whole msgpack message"),
        ("text", "this was text"),
        (wire.pack([1, 2]), "a request is a map from names to values, not list"),
        (wire.pack({"prompt": 3, **seen()}), "'prompt' is int '3', expected a short string"),
        (wire.pack({"prompt": "x" * 3000, **seen()}), "'prompt' is str 'xxxx"),
        (wire.pack({"prompt": " ", **seen()}), "no 'prompt'"),
        (wire.pack({"reset": 1, **seen()}), "'reset' is int '1', expected true or false"),
        (wire.pack({"seed": -1, **seen()}), "'seed' is int '-1', expected an integer of 0 or more"),
        (wire.pack({"deadline_ms": 0, **seen()}), "'deadline_ms' is int '0'"),
        (wire.pack({"executed": np.zeros(7), **seen()}), "'executed' is float64 of shape (7,)"),
        (wire.pack({"executed": [[0.0]], **seen()}), "'executed' is list"),
        (wire.pack({ROBOT_OBS: np.zeros(14)}), "'robot_obs' is float64 of shape (14,), expected finite numbers of shape (15,)"),
        (wire.pack({ROBOT_OBS: np.full(15, np.nan)}), "expected finite numbers"),
        (wire.pack({ROBOT_OBS: [0.0] * 15}), "'robot_obs' is list"),
        (wire.pack({"rgb_static": image.astype(np.float32), **seen()}), "'rgb_static' is float32 of shape (8, 8, 3), expected an image"),
        (wire.pack({"rgb_static": image.transpose(2, 0, 1), **seen()}), "expected an image, uint8 (H, W, 3), RGB"),
        (wire.pack({"codes": {"rgb_static": image}, **seen()}), "this policy has no vision tokenizer; send images"),
        (wire.pack({"prompt": "refuse", **seen()}), "the file <path> has no such sentence"),
    ]
    policy = Recording()
    with serving(policy) as server:
        connection, _ = opened(server)
        assert "no 'prompt'" in ask(connection, **seen())
        assert answer_of(ask(connection, prompt="go", **seen()))[1] == 1
        for message, words in wrong:
            connection.send(message)
            answer = connection.recv(timeout=20)
            assert isinstance(answer, str) and answer.startswith("InvalidRequest: ") and words in answer, answer
        assert answer_of(ask(connection, prompt="refused no more", **seen()))[1] == 1
        connection.close()
        assert server.figures.errors == {"InvalidRequest": len(wrong) + 1} and not server.failures


def test_what_breaks_in_the_policy_is_not_told():
    policy = Recording()
    secret = "/home/someone/model.safetensors: Traceback (most recent call last)"
    with serving(policy) as server:
        connection, _ = opened(server)
        ask(connection, prompt="go", **seen())
        policy.broken[0] = RuntimeError(secret)
        assert ask(connection, **seen()) == "PolicyFailed: RuntimeError in the policy; the server's log says more"
        policy.broken[0] = UnicodeDecodeError("utf-8", b"x", 0, 1, secret)
        answer = ask(connection, **seen())
        assert answer.startswith("PolicyFailed: UnicodeDecodeError: ") and "someone" not in answer
        policy.broken.clear()
        assert answer_of(ask(connection, **seen()))[1] == 2
        connection.close()
    assert [str(error) for error in server.failures][0] == secret and len(server.failures) == 2


@pytest.mark.parametrize("actions", [np.full((2, 7), np.nan), np.zeros(7), np.zeros((0, 7)), np.array([["a"]])])
def test_what_is_no_action_does_not_leave_the_server(actions):
    class Broken(RandomPolicy):
        def infer(self, observation):
            return {"actions": actions}

    with serving(Broken()) as server:
        connection, _ = opened(server)
        assert ask(connection, prompt="go") == "PolicyFailed: RuntimeError in the policy; the server's log says more"
        connection.close()
    assert "nothing was sent" in str(server.failures[0])


@pytest.mark.parametrize(
    "text,safe",
    [
        ("/home/me/x.npz: gone", "<path> gone"),
        ("no C:\\models\\a here", "no <path> here"),
        ("outputs/train/policy is cut", "<path> is cut"),
        ("first\nFile x, line 3", "first"),
        ("", "no reason was given"),
        ("plain words, 3 of [1, 2]", "plain words, 3 of [1, 2]"),
    ],
)
def test_words_are_made_safe(text, safe):
    assert safe_words(text) == safe


# -- several clients


def test_each_client_has_its_own_session_and_leaves_nothing_to_the_next():
    policy = Recording()
    with serving(policy) as server:
        first, second = (opened(server)[0] for _ in range(2))
        for step in range(3):
            assert answer_of(ask(first, prompt="open it", **seen()))[1] == step + 1
            if step < 2:
                assert answer_of(ask(second, prompt="close it", **seen()))[1] == step + 1
        first.close()
        until(lambda: server.figures.clients == 1)
        third, _ = opened(server)
        assert answer_of(ask(third, prompt="open it", **seen()))[:2] == (0, 1), "the session of the one who left, begun anew"
        assert policy.made == 2
        assert [told for told in policy.told if told[0] == 0].count((0, "begin_chain")) == 2
        for connection in (second, third):
            connection.close()


def test_a_policy_that_cannot_share_is_made_for_each_client():
    made = []

    def make():
        made.append(RandomPolicy())
        return made[-1]

    with serving(RandomPolicy(), make=make) as server:
        remotes = [RemotePolicy(server.address) for _ in range(3)]
        for number, remote in enumerate(remotes):
            remote.reset("go", seed=number)
        together = [remote.infer({})["actions"] for remote in remotes for _ in range(2)]
        for remote in remotes:
            remote.close()
    assert len(made) == 2
    for number in range(3):
        alone = RandomPolicy()
        alone.reset("go", seed=number)
        for step in range(2):
            np.testing.assert_array_equal(together[2 * number + step], alone.infer({})["actions"])


def test_one_at_a_time_says_so():
    with serving(RandomPolicy()) as server:
        first, _ = opened(server)
        second = connect(server.address, proxy=None).__enter__()
        with pytest.raises(ConnectionClosed, match="one client at a time"):
            second.recv(timeout=20)
        assert isinstance(ask(first, prompt="go"), dict)
        first.close()


def in_threads(work, number):
    """What work(k) gives for each, all at once."""
    results, threads = [None] * number, []
    for k in range(number):
        threads.append(threading.Thread(target=lambda k=k: results.__setitem__(k, work(k))))
        threads[-1].start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def answered_together(policy: Recording, server, clients: int, meanwhile: Callable[[], object] = lambda: None) -> list:
    """Answers to clients that ask while the policy is busy with another one's request. meanwhile: is done before they ask."""
    connections = [opened(server)[0] for _ in range(clients + 1)]
    for connection in connections:
        ask(connection, prompt="go", **seen())
    policy.go.clear()
    policy.entered.clear()
    blocker = threading.Thread(target=ask, args=(connections[0],), kwargs=seen())
    blocker.start()
    assert policy.entered.wait(10)
    meanwhile()
    policy.batches.clear()
    threading.Timer(0.2, policy.go.set).start()
    answers = in_threads(lambda k: ask(connections[k + 1], **seen()), clients)
    blocker.join(10)
    for connection in connections:
        connection.close()
    return answers


def test_simultaneous_requests_are_one_batch_and_one_that_breaks_is_alone():
    policy = Recording()
    with serving(policy) as server:
        answers = answered_together(policy, server, 3, lambda: policy.broken.update({2: RuntimeError("the third")}))
    assert 3 in policy.batches or 4 in policy.batches
    # Recording's batch is not undone when it breaks, as a real one's is: the first of it was asked twice.
    assert answers[1].startswith("PolicyFailed: RuntimeError") and all(isinstance(answers[k], dict) for k in (0, 2))


def test_a_checkpoint_answers_all_clients_as_each_alone(tiny_checkpoint):
    """Batches of whatever size, from the first decision to past the history's end."""
    policy = policies.load(tiny_checkpoint)

    def observation(client, step):
        random = np.random.default_rng([client, step])
        return {name: random.integers(0, 256, (60, 60, 3), dtype=np.uint8) for name in ("rgb_static", "rgb_gripper")}

    with serving(policy, gather_ms=20) as server:
        remotes = [RemotePolicy(server.address) for _ in range(5)]

        def drive(client):
            remotes[client].reset("go left" if client % 2 else "go right", seed=client)
            return [remotes[client].infer(observation(client, step)) for step in range(4)]

        together = in_threads(drive, 5)
        for remote in remotes:
            remote.close()
    assert max(decision["server_timing"]["batch"] for decisions in together for decision in decisions) > 1
    for client, session in enumerate(policy.sessions(5)):
        session.reset("go left" if client % 2 else "go right", seed=client)
        for step, decision in enumerate(together[client]):
            alone = session.infer(observation(client, step))
            assert decision["token_ids"] == alone["token_ids"]
            np.testing.assert_array_equal(decision["actions"], alone["actions"])


# -- limits


class Prepared(Recording):
    """Its sessions can compute ahead; one of them breaks where it does."""

    def __init__(self):
        super().__init__()
        self.prepared = []

    def sessions(self, number):
        made = super().sessions(number)
        for session in made:
            session.prepare = lambda session=session: self._prepare(session)
        return made

    def _prepare(self, session):
        self.prepared.append((session.number, session.asked))
        if session.instruction == "break":
            raise RuntimeError("no")


def test_sessions_compute_ahead_while_nobody_asks():
    policy = Prepared()
    with serving(policy, gather_ms=1.0) as server:
        remote = RemotePolicy(server.address)
        for instruction, asked in (("go", 1), ("break", 1)):
            remote.reset(instruction)
            assert answer_of(remote.infer(seen()))[1] == asked
            until(lambda: policy.prepared)
            assert policy.prepared == [(0, asked)]
            policy.prepared.clear()
        assert answer_of(remote.infer(seen()))[1] == 2, "it goes on"
        remote.close()


def test_deadlines_name_what_became_of_the_subtask():
    policy = Recording()
    with serving(policy) as server:
        slow, waiting = RemotePolicy(server.address, deadline_ms=200), RemotePolicy(server.address, deadline_ms=100)
        for remote in (slow, waiting):
            remote.reset("go")
            remote.infer(seen())
        policy.go.clear()
        policy.entered.clear()
        said = []

        def late(remote):
            with pytest.raises(wire.DeadlineExceeded) as caught:
                remote.infer(seen())
            said.append(str(caught.value))

        first = threading.Thread(target=late, args=(slow,))
        first.start()
        assert policy.entered.wait(10)
        late(waiting)
        first.join(10)
        policy.go.set()
        assert "nothing was decided" in said[0] and "past is forgotten" in said[1]
        assert answer_of(waiting.infer(seen()))[1] == 2, "nothing was asked of the policy, so it goes on"
        assert answer_of(slow.infer(seen()))[1] == 1, "its decision was made and not executed, so it begins anew"
        assert policy.told.count((0, "begin_chain")) == 2 and policy.told.count((1, "begin_chain")) == 1, "its arm is elsewhere, too"
        assert server.figures.errors == {"DeadlineExceeded": 2}
        slow.close(), waiting.close()


def test_a_full_queue_is_said():
    policy = Recording()
    with serving(policy, max_waiting=1) as server:
        connections = [opened(server)[0] for _ in range(3)]
        for connection in connections:
            ask(connection, prompt="go", **seen())
        policy.go.clear()
        policy.entered.clear()
        for connection in connections[:2]:
            connection.send(wire.pack(seen()))
            assert policy.entered.wait(10)
        until(lambda: len(server._waiting) == 1)
        assert ask(connections[2], **seen()) == "ServerBusy: 1 requests wait already; ask again later"
        policy.go.set()
        assert all(isinstance(connection.recv(timeout=10), bytes) for connection in connections[:2])
        for connection in connections:
            connection.close()


def test_too_big_is_refused_on_both_sides():
    with serving(Recording(), max_message_bytes=2000) as server:
        remote = RemotePolicy(server.address)
        remote.reset("go")
        remote.requires |= {"rgb_static"}
        with pytest.raises(wire.InvalidRequest, match=r"takes \d+ bytes, this server reads 2000"):
            remote.infer(seen() | {"rgb_static": np.zeros((50, 50, 3), np.uint8)})
        assert answer_of(remote.infer(seen()))[1] == 1
        remote.metadata["max_message_bytes"] = 10**9
        with pytest.raises(wire.InvalidRequest, match="is too big for ws://127.0.0.1"):
            remote.infer(seen() | {"rgb_static": np.zeros((50, 50, 3), np.uint8)})
        with pytest.raises(ServerLost, match=r"was lost; reset\(\) connects again"):
            remote.infer(seen())
        remote.reset("go")
        assert answer_of(remote.infer(seen()))[1] == 1
        remote.close()
        assert server.figures.errors == {"too big": 1}


def test_only_so_many_clients():
    with serving(Recording(), max_connections=2) as server:
        held = [opened(server)[0] for _ in range(2)]
        with pytest.raises(ServerUnavailable, match="503.*2 clients are here already"):
            RemotePolicy(server.address)
        held.pop().close()
        until(lambda: server.figures.clients == 1)
        opened(server)[0].close()
        held.pop().close()


def test_tokens():
    with serving(Recording(), token="secret") as server:
        for shown in (None, "Api-Key wrong", "Api-Key", "secret", "Basic secret", "Api-Key secretsecret"):
            with pytest.raises(InvalidStatus) as refused:
                opened(server, additional_headers={"Authorization": shown} if shown else None)
            assert refused.value.response.status_code == 401 and b"secret" not in refused.value.response.body
        for shown in ("Api-Key secret", "Bearer secret", "api-key secret"):
            opened(server, additional_headers={"Authorization": shown})[0].close()
        with pytest.raises(NotAuthorized, match="a token is needed"):
            RemotePolicy(server.address, token="wrong")
        RemotePolicy(server.address, token="secret").close()


def test_token_of_the_environment(monkeypatch):
    monkeypatch.setenv("EMU3_VLA_TOKEN", "secret")
    with serving(Recording(), token="secret") as server:
        RemotePolicy(server.address).close()
        monkeypatch.setenv("EMU3_VLA_TOKEN", "another")
        with pytest.raises(NotAuthorized):
            RemotePolicy(server.address)


def test_pages_in_a_browser_are_kept_out():
    with serving(Recording()) as server:
        with pytest.raises(InvalidStatus) as refused:
            opened(server, origin="http://evil.example")
        assert refused.value.response.status_code == 403


@pytest.mark.parametrize(
    "options,said",
    [
        ({"host": "0.0.0.0"}, "host=0.0.0.0 lets other machines in, and there is no token: set one in EMU3_VLA_TOKEN"),
        ({"host": "::"}, "lets other machines in"),
        ({"port": 70000}, "port=70000, expected 0 to 65535"),
        ({"max_batch": 0}, "max_batch=0, expected at least 1"),
        ({"deadline_ms": 0.0}, "deadline_ms=0.0 above it"),
        ({"tls_key": "key.pem"}, "belong together"),
        ({"tls_key": "none.pem", "tls_certificate": "none.pem"}, "tls_certificate=none.pem and tls_key=none.pem: "),
        ({"keys": ("image:rgb_statik",)}, "keys: 'image:rgb_statik', expected <their name>:<ours>, which is one of rgb_static"),
        ({"keys": ("prompt:rgb_static",)}, "renames 'prompt', which has a meaning of its own"),
    ],
)
def test_options_that_cannot_be(options, said):
    from policies.server import PolicyServer

    with pytest.raises(ValueError) as refused:
        PolicyServer(Recording(), ServerOptions(**options))
    assert said in str(refused.value)


def test_others_may_be_let_in_by_saying_so():
    ServerOptions(host="0.0.0.0", allow_anyone=True).check_open("")
    ServerOptions(host="0.0.0.0").check_open("secret")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls(tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*made, *names], check=True, capture_output=True)
    with serving(Recording(), tls_certificate=str(certificate), tls_key=str(key), token="secret") as server:
        assert server.address.startswith("wss://")
        remote = RemotePolicy(server.address, ca=str(certificate), token="secret")
        remote.reset("go")
        assert answer_of(remote.infer(seen()))[1] == 1
        remote.close()
        with pytest.raises(ServerUnavailable, match="certificate verify failed"):
            RemotePolicy(server.address, token="secret")
        with pytest.raises(ServerUnavailable):
            RemotePolicy(server.address.replace("wss", "ws"), token="secret", connect_s=0)
        with pytest.raises(ssl.SSLError):
            opened(server)


# -- the client when the server goes


def test_nobody_there_is_said():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ServerUnavailable, match="no server answers at ws://127.0.0.1.*emu3-vla serve"):
            RemotePolicy(f"ws://127.0.0.1:{bound.getsockname()[1]}", connect_s=0.1)
    for wrong in ("ws://", "wss://:0/", "ws://host:port"):
        with pytest.raises(ValueError, match="is no address of a server, expected ws://host:port"):
            RemotePolicy(wrong, connect_s=0.0)
    with pytest.raises(ValueError, match="its options: token, ca, connect_s"):
        policies.load("ws://127.0.0.1:1", speed=2)
    with pytest.raises(ValueError, match="timeout_s=0"):
        RemotePolicy("ws://127.0.0.1:1", timeout_s=0)


def test_what_listens_is_something_else():
    from websockets.sync.server import serve

    with serve(lambda connection: connection.send(b"\xc1"), "127.0.0.1", 0) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(ServerUnavailable, match="is no server of this kind: not a whole msgpack message"):
            RemotePolicy(f"ws://127.0.0.1:{other.socket.getsockname()[1]}")
        other.shutdown()


def test_a_server_that_comes_late_is_waited_for_and_one_that_goes_is_lost():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    url = f"ws://127.0.0.1:{port}"
    remotes = []
    early = threading.Thread(target=lambda: remotes.append(RemotePolicy(url, connect_s=20)))
    early.start()
    time.sleep(0.3)
    from policies.server import PolicyServer

    def start(policy):
        server, listening = PolicyServer(policy, ServerOptions(port=port)), threading.Event()
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_until_complete, args=(server.run(lambda _: listening.set()),))
        thread.start()
        assert listening.wait(10)
        return lambda: (loop.call_soon_threadsafe(server.stop), thread.join(10), loop.close())

    stop = start(Recording())
    early.join(20)
    (remote,) = remotes
    remote.reset("go")
    assert answer_of(remote.infer(seen()))[1] == 1
    stop()
    for said in ("closed the connection", "was lost"):
        with pytest.raises(ServerLost, match=said):
            remote.infer(seen())
    stop = start(Recording())
    with pytest.raises(ServerLost, match=r"reset\(\) connects again"):
        remote.infer(seen())
    remote.reset("go on")
    assert answer_of(remote.infer(seen()))[1] == 1
    stop()
    stop = start(RandomPolicy())
    until(lambda: remote._connection.close_code is not None)
    with pytest.raises(ServerUnavailable, match="another policy is at ws://127.0.0.1.* now: random, it was recording"):
        remote.reset("go on")
    stop()


def test_an_answer_that_does_not_come():
    policy = Recording()
    with serving(policy) as server:
        remote = RemotePolicy(server.address, timeout_s=0.2)
        remote.reset("go")
        policy.go.clear()
        with pytest.raises(AnswerTimeout, match="did not answer within 0.2 s"):
            remote.infer(seen())
        policy.go.set()
        remote.reset("go")
        assert answer_of(remote.infer(seen()))[1] == 1
        remote.close()


def test_the_client_needs_three_packages():
    """Nothing but numpy, msgpack, websockets and the standard library is loaded by connecting and asking."""
    with serving(Recording()) as server:
        code = (
            "import sys\n"
            "import numpy, msgpack, websockets, websockets.sync.client\n"
            "class Refuse:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        top = name.split('.')[0]\n"
            "        if top not in sys.stdlib_module_names and top not in {'numpy', 'msgpack', 'websockets', 'policies', 'envs'}:\n"
            "            raise ImportError(f'{name} is imported')\n"
            "sys.meta_path.insert(0, Refuse())\n"
            "import policies\n"
            f"remote = policies.load({server.address!r})\n"
            "remote.reset('go')\n"
            "print(remote.infer({'robot_obs': numpy.zeros(15)})['actions'].shape)\n"
            "remote.close()\n"
            "print(sorted({name for name in sys.modules if name.split('.')[0] in ('policies', 'envs', 'emu3_vla')}))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines() == [
        "(2, 7)",
        "['envs', 'envs.spec', 'policies', 'policies.base', 'policies.client', 'policies.codes', 'policies.wire']",
    ], done.stderr


def test_a_batch_that_fails_without_a_request_at_fault_is_in_the_log():
    """Each is answered, alone; and somebody learns that deciding together is broken."""
    policy = Recording()
    policy.infer_many = lambda sessions, observations: (_ for _ in ()).throw(RuntimeError("together"))
    with serving(policy) as server:
        answers = answered_together(policy, server, 2)
    assert all("actions" in answer for answer in answers)
    assert [str(error) for error in server.failures] == ["together"]
