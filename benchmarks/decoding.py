"""Speed of decoding against Transformers' generate(): same weights, one thread, ratios in one run.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py
    OMP_NUM_THREADS=1 python benchmarks/decoding.py --dtype bfloat16 --repeats 5

A random decoder of 15 M parameters, batch 1. Our ways must write the same ids, or the run fails; where Transformers writes others is
printed. Processor time; the ways take turns, and the least of each counts, so that other programs disturb little (what they take of the
memory's bandwidth, they take from all).

token      16 ids behind a prompt of 200, the prompt's own time taken off: milliseconds an id. "int8 draft": guessed by a copy of the trunk
           with int8 weights and verified, in float32 (Numba compiles it, once)
chunk      an action chunk of 16 ids behind a prompt of 200 whose last 8 ids are new since the chunk before, as a control step's are.
           Transformers computes all of it; ours keeps what did not change. "parallel": guesses from the chunks before, 8 verified a pass
image      256 codes and the ends of their rows, with guidance. Transformers runs the null prompt beside the prompt, ours both in one pass

How many guesses are right depends on the weights, and random ones repeat themselves more than a trained policy does: "passes" says how
many passes there were through the trunk, and "one at a time" is the time without guesses.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import Emu3ForCausalLM, Emu3TextConfig

from emu3_vla.generation.drafts import NGrams, above
from emu3_vla.generation.engine import Engine, EngineConfig
from emu3_vla.generation.grammar import Builder, Grammar, Ids
from emu3_vla.generation.pieces import free
from emu3_vla.generation.requests import INT8, Parallel, Request, Result
from emu3_vla.generation.sampling import Guidance
from emu3_vla.generation.transformers_engine import TransformersEngine

WINDOW, WINDOW_GUIDED = 15, 8  # guesses of the int8 draft; with guidance each of two rows has them
IDS, CODES, CAPACITY = 2048, Ids(1024, 2048), 768
PROMPT, CHUNK, NEW = 200, 16, 8
SIDE, END_OF_ROW = 16, 5


def decoder(dtype: torch.dtype) -> Emu3ForCausalLM:
    """A random decoder of 15.7 M parameters."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=6)
    ids = dict(vocab_size=IDS, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return Emu3ForCausalLM(Emu3TextConfig(**sizes, **ids)).eval().to(dtype)


def prompts(count: int) -> list[list[int]]:
    """Each as the one before, but for its last ids."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(3, IDS, (PROMPT - NEW + count * NEW,), generator=generator).tolist()
    return [drawn[: PROMPT - NEW] + drawn[PROMPT - NEW + at * NEW :][:NEW] for at in range(count)]


def picture(builder: Builder, state: int) -> int:
    """Rows of codes, each with its end."""
    for _ in range(SIDE):
        for _ in range(SIDE):
            state = builder.after(state, CODES)
        state = builder.after(state, Ids(END_OF_ROW, END_OF_ROW + 1))
    return state


class Ways:
    """Ways to answer the same requests. Each call returns the answer; `fresh` forgets what the engine holds."""

    def __init__(self, dtype: torch.dtype):
        model = decoder(dtype)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.reference = TransformersEngine(model, capacity=CAPACITY)
        self.ours = Engine(model, config=EngineConfig(rows=2, capacity=CAPACITY, int8_draft=dtype == torch.float32))
        # The ways that guess, by name. Only ids in float32 on a CPU are guessed by an int8 draft.
        self.drafted = {"int8 draft": Parallel(window=WINDOW, draft=INT8)} if dtype == torch.float32 else {}

    def theirs(self, **request) -> Result:
        return self.reference.generate([Request(**request)])[0]

    def own(self, fresh: bool = True, **request) -> Result:
        if fresh:
            for lane in self.ours._lanes:
                lane.keep(0)
        return self.ours.generate([Request(**request)])[0]


def in_turn(ways: dict[str, Callable[[], Result]], repeats: int) -> tuple[dict[str, float], dict[str, Result]]:
    """Least milliseconds of each way, and its answer."""
    answers = {name: way() for name, way in ways.items()}
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.process_time()
            answers[name] = way()
            least[name] = min(least[name], (time.process_time() - began) * 1e3)
    return least, answers


def token(ways: Ways, repeats: int) -> None:
    """An id behind a prompt, and the prompt itself."""
    prompt = prompts(1)[0]
    ids, one = dict(prompt=prompt, longest=CHUNK), dict(prompt=prompt, longest=1)
    calls = {
        "theirs": lambda: ways.theirs(**ids),
        "theirs 1": lambda: ways.theirs(**one),
        "ours": lambda: ways.own(**ids),
        "ours 1": lambda: ways.own(**one),
    }
    calls |= {name: lambda parallel=parallel: ways.own(**ids, parallel=parallel) for name, parallel in ways.drafted.items()}
    least, answers = in_turn(calls, repeats)
    note = agreement(*(answers[name] for name in ("theirs", "ours", *ways.drafted)))
    each = {name: (least[name] - least["ours 1"]) / (CHUNK - 1) for name in ("ours", *ways.drafted)}
    report("token", (least["theirs"] - least["theirs 1"]) / (CHUNK - 1), each, note)
    report("prompt", least["theirs 1"], {"ours": least["ours 1"]})


def chunk(ways: Ways, repeats: int) -> None:
    """Control steps in a row; the time of one is the least of the last, when chunks before are known."""
    steps, end = prompts(2 + repeats), Grammar(free(IDS))
    known = NGrams(2)
    calls = {"theirs": lambda prompt: ways.theirs(prompt=prompt, grammar=end, longest=CHUNK)}
    for name, parallel in {"one at a time": None, "parallel": Parallel(window=8, draft=known), **ways.drafted}.items():
        asked = dict(fresh=False, grammar=end, longest=CHUNK, parallel=parallel)
        calls[name] = lambda prompt, asked=asked: ways.own(prompt=prompt, **asked)
    least = dict.fromkeys(calls, float("inf"))
    for number, prompt in enumerate(steps):
        answers = {}
        for name, call in calls.items():
            # Each of our ways finds the cache as the step before has left it: the common beginning, and another end.
            ways.own(fresh=False, prompt=prompt[: PROMPT - NEW] + [3] * NEW, longest=1)
            began = time.process_time()
            answers[name] = call(prompt)
            if number > 1:
                least[name] = min(least[name], (time.process_time() - began) * 1e3)
        note = agreement(*answers.values())
        known.add(answers["theirs"].ids)
    report("chunk", least.pop("theirs"), least, passes_of(answers), note)


def image(ways: Ways, repeats: int) -> None:
    """An image of SIDE × SIDE codes with guidance, end to end."""
    prompt, grammar = prompts(1)[0][:24], Grammar(picture)
    request = dict(prompt=prompt, negative=prompt[:4], guidance=Guidance(scale=3.0), grammar=grammar)
    calls = {"theirs": lambda: ways.theirs(**request)}
    drafted = {name: replace(parallel, window=WINDOW_GUIDED) for name, parallel in ways.drafted.items()}
    for name, parallel in {"one at a time": None, "parallel": Parallel(window=16, draft=above(SIDE + 1)), **drafted}.items():
        calls[name] = lambda parallel=parallel: ways.own(**request, parallel=parallel)
    least, answers = in_turn(calls, repeats)
    report("image", least.pop("theirs"), least, passes_of(answers), agreement(*answers.values()))


def passes_of(answers: dict[str, Result]) -> str:
    """Passes through the trunk of the ways that guess."""
    guessed = [name for name in answers if name in ("parallel", "int8 draft")]
    passes = ", ".join(f"{name} {answers[name].forwards}" for name in guessed)
    return f"passes for {len(answers['theirs'].ids)} ids: {passes}"


def agreement(theirs: Result, *ours: Result) -> str:
    """How far the ids are the same. Ours must be, whatever the way; Transformers rounds otherwise, and in bfloat16 may choose otherwise."""
    assert all(answer.ids == ours[0].ids for answer in ours), "ours differ: parallel decoding is not lossless"
    pairs = list(zip(theirs.ids, ours[0].ids, strict=False))
    same = next((at for at, (left, right) in enumerate(pairs) if left != right), len(pairs))
    return "same ids" if theirs.ids == ours[0].ids else f"the first {same} ids are the same"


def report(what: str, theirs: float, ours: dict[str, float], *notes: str) -> None:
    """Print milliseconds, and ours as ratios to theirs."""
    each = [f"{name} {ms:8.2f} ms, {theirs / ms:5.1f}×" for name, ms in ours.items()]
    print(f"{what:8} transformers {theirs:9.2f} ms", *each, *notes, sep="   ", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = Ways(getattr(torch, arguments.dtype))
    print(f"{ways.parameters / 1e6:.1f} M parameters, {arguments.dtype}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    token(ways, arguments.repeats)
    chunk(ways, arguments.repeats)
    image(ways, max(1, arguments.repeats // 3))


if __name__ == "__main__":
    main()
