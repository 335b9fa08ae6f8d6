"""What serving costs, what batching gains, and how many bytes an observation takes.

    python -m benchmarks.serving                                          all three
    python -m benchmarks.serving policy=calvin-d clients=8 decisions=20 rounds=3 threads=1 workers=2
    python -m benchmarks.serving only=batching                            what the policy itself gains by batches, without network and clock
    python -m benchmarks.serving only=throughput policy=benchmarks.serving:Light

Overhead: a client's round trip less the time that the policy itself took, on loopback, two images of 200×200 (bar: 3 ms at the median).
Throughput: answers a second of one client and of several, in turns (bar: 3 times as many with 8, of a light policy), about what the
simulator's cameras see. First they ask as fast as they are answered, then as arms do, which execute each chunk, 10 steps of 30 Hz, before
they ask again. By the clock, which means something on a machine at rest, and by the server's processor time. `Light` is a policy to which a
batch costs little more than one decision, so that it shows what the server makes of that.
Batching: processor time of a decision by stage, alone and in a batch of several, in turns, in this process.
Bytes: of a whole message with the cameras' own images of the simulator, as pixels, JPEG, code ids and packed ids; decisions from ids are
compared with those from pixels.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import policies
from envs.spec import CAMERAS, CONTROL_HZ, GRIPPER_OPEN
from eval.environment import EnvConfig
from policies import wire
from policies.client import RemotePolicy
from policies.codes import pack_codes
from policies.edge import EdgeTokenizer

OVERHEAD_BAR_MS, THROUGHPUT_BAR = 3.0, 3.0
JPEG_QUALITY = 90
CHUNK = 10  # actions
PROMPT = "open the drawer"


class Costless:
    """Sees both cameras and never moves."""

    name, requires = "costless", frozenset(CAMERAS)

    def reset(self, instruction, *, task=None, seed=None):
        pass

    def infer(self, observation):
        actions = np.zeros((CHUNK, 7), np.float32)
        actions[:, -1] = GRIPPER_OPEN
        return {"actions": actions}


class Light:
    """Both pictures, made smaller, through a perceptron of 20 M random weights: it reads them once for all that ask."""

    name, requires = "light", frozenset(CAMERAS)
    SIDE, WIDTH = 40, 2048

    def __init__(self):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        first, last = torch.nn.Linear(len(CAMERAS) * 3 * self.SIDE**2, self.WIDTH), torch.nn.Linear(self.WIDTH, CHUNK * 7)
        self.layers = torch.nn.Sequential(first, torch.nn.ReLU(), last, torch.nn.Tanh()).eval()

    def sessions(self, number: int) -> list[Light]:
        """It keeps no past, so one will do for all."""
        return [self] * number

    def reset(self, instruction, *, task=None, seed=None):
        pass

    def infer(self, observation):
        return self.infer_many([self], [observation])[0]

    @torch.inference_mode()
    def infer_many(self, sessions, observations):
        pixels = np.stack([[self._small(seen[camera]) for camera in CAMERAS] for seen in observations])
        actions = self.layers(torch.from_numpy(pixels).flatten(1).float() / 255).view(-1, CHUNK, 7).numpy()
        actions[..., -1] = GRIPPER_OPEN
        return [{"actions": chunk} for chunk in actions]

    def _small(self, image: np.ndarray) -> np.ndarray:
        """Every so many pixels of a square image."""
        at = np.arange(self.SIDE) * len(image) // self.SIDE
        return image[np.ix_(at, at)]


class Served:
    """`emu3-vla serve` as a process of its own."""

    def __init__(self, process: subprocess.Popen, address: str):
        self.process, self.address = process, address

    def cpu_s(self) -> float:
        """Processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serve(policy: str, *options: str):
    """A server of `policy`, on any free port."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "emu3_vla.cli", "serve", f"policy={policy}", "port=0", f"output_dir={folder}/run", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            found = re.search(r"at (ws://\S+) ", process.stdout.readline())
            if not found:
                raise RuntimeError(f"{' '.join(command)} did not start")
            yield Served(process, found[1])
        finally:
            process.kill()
            process.communicate()


def images(seed: int, side: int = 200) -> dict[str, np.ndarray]:
    """Two pictures of blotches."""
    random = np.random.default_rng(seed)
    small = {name: random.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8) for name in CAMERAS}
    return {name: np.kron(image, np.ones((4, 4, 1), np.uint8)) for name, image in small.items()}


def overhead(policy: str, requests: int) -> tuple[np.ndarray, float]:
    """Added milliseconds of each request; milliseconds of processor time of both sides, on average, the policy's own among them."""
    added, warming = [], 10
    with serve(policy) as served:
        remote = RemotePolicy(served.address)
        remote.reset(PROMPT)
        seen = [images(seed) for seed in range(7)]
        for number in range(requests + warming):
            if number == warming:
                began_cpu = served.cpu_s() + time.process_time()
            observation = seen[number % len(seen)]
            began = time.perf_counter()
            answer = remote.infer(observation)
            added.append(1e3 * (time.perf_counter() - began) - answer["server_timing"]["infer_ms"])
        cpu_s = served.cpu_s() + time.process_time() - began_cpu
        remote.close()
    return np.array(added[warming:]), 1e3 * cpu_s / requests


def throughput(
    served: Served, clients: int, decisions: int, acting_s: float, seen: list[dict[str, np.ndarray]]
) -> tuple[float, float, float]:
    """(answers/s by the clock, answers/s of the server's processor time, requests a batch). acting_s: between an answer and a question."""
    remotes = [RemotePolicy(served.address) for _ in range(clients)]
    batches: list[int] = []

    def drive(remote: RemotePolicy, number: int, count: int, keep: Callable[[int], None]) -> None:
        for step in range(count):
            keep(remote.infer(seen[(number + step) % len(seen)])["server_timing"]["batch"])
            time.sleep(acting_s)

    for number, remote in enumerate(remotes):  # past the point where the history is full: from there on all decisions cost the same
        remote.reset(PROMPT)
        drive(remote, number, 3, lambda size: None)
    threads = [threading.Thread(target=drive, args=(remote, number, decisions, batches.append)) for number, remote in enumerate(remotes)]
    began, began_cpu = time.perf_counter(), served.cpu_s()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, cpu_s = time.perf_counter() - began, served.cpu_s() - began_cpu
    for remote in remotes:
        remote.close()
    return clients * decisions / seconds, clients * decisions / cpu_s, float(np.mean(batches))


def batching(policy: str, together: int, rounds: int, seen: list[dict[str, np.ndarray]]) -> dict[int, dict[str, float]]:
    """Milliseconds of processor time of one decision by stage, and ids of a chunk: {sessions in the batch: {stage: ...}}."""
    from policies import emu3

    @contextmanager
    def timed(timing: dict[str, float], stage: str):
        began = time.process_time()
        yield
        timing[stage] = time.process_time() - began

    emu3._timed = timed  # by the clock of the process: others may be busy on this machine
    actor = policies.load(policy, threads=1)
    measured: dict[int, list[dict[str, float]]] = {1: [], together: []}
    sessions = {number: actor.sessions(together) for number in measured}
    for session in (session for group in sessions.values() for session in group):
        session.reset(PROMPT)
    for step in range(3 + rounds):  # the first three fill the history
        for number, group in sessions.items():  # the same sessions see the same and decide the same, one by one or together
            for first in range(0, together, number):
                observations = [seen[(first + k + step) % len(seen)] for k in range(number)]
                for answer in actor.infer_many(group[first : first + number], observations):
                    if step >= 3:
                        stages = {name: 1e3 * seconds for name, seconds in answer["timing_s"].items()}
                        measured[number].append(stages | {"ids": len(answer["token_ids"])})
    return {number: {name: float(np.mean([one[name] for one in rows])) for name in rows[0]} for number, rows in measured.items()}


def say_batching(policy: str, together: int, rounds: int, seen: list[dict[str, np.ndarray]]) -> None:
    """Print what `batching` gives, and the ratio."""
    measured = batching(policy, together, rounds, seen)
    totals = {number: sum(ms for name, ms in stages.items() if name != "ids") for number, stages in measured.items()}
    for number, stages in measured.items():
        parts = ", ".join(f"{name} {value:.1f}" for name, value in stages.items())
        print(f"a decision in a batch of {number}: {totals[number]:.1f} ms of processor time ({parts})")
    print(f"  {together} over one: {totals[1] / totals[together]:.2f} by processor time")


def demonstration() -> list[dict[str, np.ndarray]]:
    """What the cameras see every ten steps while the drawer is opened: a policy that was taught it writes chunks of the usual length."""
    from envs.calvin.expert.policy import ExpertPolicy

    env, expert, seen = EnvConfig().make(), ExpertPolicy("D", acceleration=0.2), []
    state, _ = env.reset(seed=0)
    expert.reset(PROMPT, task="open_drawer")
    for step in range(60):
        if step % CHUNK == 0:
            seen.append(dict(env.observe()))
        state = env.step(expert.infer(state)["actions"][0])[0]
    env.close()
    return seen


def frames(number: int) -> list[dict[str, np.ndarray]]:
    """What the simulator's cameras see, along a random motion."""
    env, random, seen = EnvConfig().make(), np.random.default_rng(0), []
    env.reset(seed=0)
    for _ in range(number):
        for _ in range(10):
            env.step(np.append(random.uniform(-1, 1, 6), GRIPPER_OPEN))
        seen.append(dict(env.observe()))
    env.close()
    return seen


def say_throughput(policy: str, clients: int, decisions: int, rounds: int, seen: list[dict[str, np.ndarray]], *options: str) -> None:
    """Print answers a second of one client and of several, and the ratios."""
    with serve(policy, *options, "deadline_ms=120000") as served:
        for said, acting_s in (("asking at once", 0.0), ("acting between", CHUNK / CONTROL_HZ)):
            one, many = [], []
            for _ in range(rounds):
                one.append(throughput(served, 1, decisions, acting_s, seen))
                many.append(throughput(served, clients, decisions, acting_s, seen))
            for number, measured in ((1, one), (clients, many)):
                clock, cpu, batch = np.median(measured, axis=0)
                print(f"{number} clients, {said}: {clock:.2f} answers/s by the clock, {cpu:.2f} of processor time, {batch:.1f} a batch")
            ratios = np.median(many, axis=0) / np.median(one, axis=0)
            print(f"  {clients} over one: {ratios[0]:.2f} by the clock, {ratios[1]:.2f} by processor time (bar {THROUGHPUT_BAR})")


def bytes_of(observations: list[dict[str, np.ndarray]], tokenizer: EdgeTokenizer) -> dict[str, float]:
    """Bytes of a whole message, on average."""

    def jpeg(image: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY)
        return file.getvalue()

    def message(**content) -> int:
        return len(wire.pack({wire.PROMPT: PROMPT} | content))

    sizes: dict[str, list[int]] = {}
    for observation in observations:
        cameras = {name: observation[name] for name in CAMERAS}
        ids = {name: tokenizer.encode(name, image) for name, image in cameras.items()}
        packed = {name: pack_codes(codes, tokenizer.codebook_size) for name, codes in ids.items()}
        said = {wire.TOKENIZER: tokenizer.fingerprint}
        for kind, size in {
            "pixels": message(**cameras),
            f"JPEG, quality {JPEG_QUALITY}": message(**{name: jpeg(image) for name, image in cameras.items()}),
            "ids, 16 bits": message(codes={name: codes.astype(np.uint16) for name, codes in ids.items()}, **said),
            "ids, packed": message(codes=packed, **said),
        }.items():
            sizes.setdefault(kind, []).append(size)
    return {kind: float(np.mean(values)) for kind, values in sizes.items()}


def same_decisions(policy: str, observations: list[dict[str, np.ndarray]], tokenizer: EdgeTokenizer) -> tuple[int, int]:
    """How many decisions from ids are those from pixels, and of how many."""
    same = 0
    with serve(policy, "deadline_ms=120000") as served:
        pixels, ids = RemotePolicy(served.address), RemotePolicy(served.address, tokenizer=tokenizer, packed=True)
        for remote in (pixels, ids):
            remote.reset(PROMPT)
        for observation in observations:
            same += np.array_equal(pixels.infer(observation)["actions"], ids.infer(observation)["actions"])
        pixels.close()
        ids.close()
    return same, len(observations)


def main(
    policy: str = policies.SHIPPED,
    clients: int = 8,
    decisions: int = 20,
    rounds: int = 3,
    threads: int = 1,
    workers: int = 1,
    requests: int = 300,
    only: str = "",
):
    """Print all of it, or `only` batching or throughput."""
    seen = demonstration()
    if only in ("", "batching"):
        say_batching(policy, clients, rounds, seen)
    if only in ("", "throughput"):
        options = [] if ":" in policy else [f"threads={threads}", f"workers={workers}"]  # a class has its own
        say_throughput(policy, clients, decisions, rounds, seen, *options)
    if only:
        return
    added, cpu_ms = overhead("benchmarks.serving:Costless", requests)
    print(
        f"serving adds {np.percentile(added, 50):.2f} ms at the median, {np.percentile(added, 99):.2f} at p99, {added.min():.2f} at least "
        f"(bar {OVERHEAD_BAR_MS} ms); {cpu_ms:.2f} ms of processor time on both sides"
    )
    folder = policies.checkpoint_folder(policy)
    tokenizer, seen = EdgeTokenizer(folder / "vision_tokenizer"), frames(12)
    sizes = bytes_of(seen, tokenizer)
    for kind, size in sizes.items():
        print(f"{kind:18} {size:10,.0f} bytes an observation, {sizes['pixels'] / size:6.1f} times fewer than pixels")
    print("decisions from ids that are those from pixels: {} of {}".format(*same_decisions(policy, seen, tokenizer)))


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main(**{name: value if name in ("policy", "only") else int(value) for name, value in given.items()})
