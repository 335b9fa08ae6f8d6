"""Decoding at Emu3's own shape on a GPU against Transformers' generate(): 8 B random weights in bfloat16, batch 1, ratios in one run.

    python -m benchmarks.gpu_decoding
    python -m benchmarks.gpu_decoding --layers 4 --ids 16

id       codes of a picture behind a prompt of 64 ids: milliseconds each, the prompt's own time taken off
guided   the same with guidance of 3, whose null prompt goes beside the prompt
floor    the weights that an id needs, read once at the rate at which this GPU copies memory: nothing is faster

"ours" runs layer by layer, "compiled" as CUDA graphs; compiling takes its own time, which is printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from operator import itemgetter

import torch
from transformers import Emu3ForCausalLM, Emu3TextConfig

from emu3_vla.generation.engine import Engine, EngineConfig
from emu3_vla.generation.grammar import Grammar
from emu3_vla.generation.pieces import Ids, sequence
from emu3_vla.generation.requests import Request, Result
from emu3_vla.generation.sampling import Guidance
from emu3_vla.generation.transformers_engine import TransformersEngine
from emu3_vla.vocabulary import CODEBOOK_SIZE, Emu3Vocabulary

PROMPT, CAPACITY = 64, 1024


def decoder(layers: int) -> Emu3ForCausalLM:
    """Emu3's shape, with random weights, on the GPU."""
    sizes = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=layers)
    vocabulary = Emu3Vocabulary()
    ids = dict(vocab_size=vocabulary.head_size, pad_token_id=vocabulary.pad, bos_token_id=vocabulary.bos, eos_token_id=vocabulary.eos)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Emu3ForCausalLM(Emu3TextConfig(max_position_embeddings=131072, **sizes, **ids)).eval()
    torch.set_default_dtype(torch.float32)
    return model


def codes(count: int) -> Grammar:
    """So many vision codes."""
    start = Emu3Vocabulary().vision_start

    def piece(builder, state):
        return builder.after(state, Ids(start, start + CODEBOOK_SIZE))

    return Grammar(sequence(*[piece] * count))


def milliseconds(call: Callable[[], Result]) -> tuple[float, Result]:
    """Wall time of a call, and what it gave."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3, result


def each_id(engine: Engine | TransformersEngine, count: int, **request) -> tuple[float, Result]:
    """Milliseconds an id behind the first, and the answer."""
    calls = (milliseconds(lambda: engine.generate([Request(grammar=codes(count), **request)])[0]) for _ in range(2))
    whole, result = min(calls, key=itemgetter(0))
    one = min(milliseconds(lambda: engine.generate([Request(grammar=codes(1), **request)])[0])[0] for _ in range(2))
    return (whole - one) / (count - 1), result


def copied_bytes_per_s() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    taken = min(milliseconds(lambda: target.copy_(source))[0] for _ in range(5))
    return 2 * source.numel() * source.element_size() / taken * 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ids", type=int, default=64)
    arguments = parser.parse_args()
    rate = copied_bytes_per_s()
    model = decoder(arguments.layers)
    trunk = sum(parameter.numel() for parameter in model.model.layers.parameters())
    read = 2 * (trunk + CODEBOOK_SIZE * model.config.hidden_size)
    billions = sum(map(torch.numel, model.parameters())) / 1e9
    print(f"{torch.cuda.get_device_name()}, {billions:.2f} B parameters, copies {rate / 1e12:.2f} TB/s")
    print(f"floor     {read / rate * 1e3:8.2f} ms an id", flush=True)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 100_000, (PROMPT,), generator=generator).tolist()
    plain = dict(prompt=prompt)
    guided = dict(prompt=prompt, negative=prompt[:4], guidance=Guidance(scale=3.0))
    ways = {
        "transformers": lambda: TransformersEngine(model, capacity=CAPACITY),
        "ours": lambda: Engine(model, config=EngineConfig(rows=2, capacity=CAPACITY)),
        "compiled": lambda: Engine(model, config=EngineConfig(rows=2, capacity=CAPACITY, compile=True)),
    }
    theirs: dict[str, tuple[float, Result]] = {}
    for name, make in ways.items():
        engine = make()
        compiling = milliseconds(lambda engine=engine: engine.generate([Request(grammar=codes(4), **guided)]))[0]
        for what, request in {"id": plain, "guided": guided}.items():
            taken, result = each_id(engine, arguments.ids, **request)
            reference, expected = theirs.setdefault(what, (taken, result))
            same = sum(left == right for left, right in zip(result.ids, expected.ids, strict=True))
            said = f"{what:9} {name:13} {taken:8.2f} ms   {reference / taken:5.2f}×"
            print(f"{said}   {same} of {len(expected.ids)} ids the same", flush=True)
        most = torch.cuda.max_memory_allocated() / 1e9
        print(f"          {name:13} first call {compiling / 1e3:.1f} s, {most:.1f} GB at most", flush=True)
        del engine
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
