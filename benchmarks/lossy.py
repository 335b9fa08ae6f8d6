"""Lossy parallel decoding of pictures: what it saves, and what it costs in what a drawing shows.

    OMP_NUM_THREADS=1 python -m benchmarks.lossy outputs/tokens
    OMP_NUM_THREADS=1 python -m benchmarks.lossy outputs/tokens --pictures 192 --window 25

The token store must be of the checkpoint's tokenizers and have questions=envs.calvin.questions:Questions.

Drawings of held-out captions by the shipped checkpoint, at the same seeds, one at a time on one thread: exactly, and with `lossy=1`, `2`
and `3` (emu3_vla.generation.requests.Parallel). "passes" are of the trunk. "clauses" are those of the captions that a probe reads out of
what was drawn (docs/pipelines.md). Of actions: `benchmarks/decision.py --lossy 1`, and `emu3-vla eval policy_options.lossy=1`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
import torch

from emu3_vla import pipelines
from emu3_vla.data.tokens import TokenStore
from emu3_vla.generation.engine import Engine, EngineConfig
from emu3_vla.pipelines import drawing, scoring
from emu3_vla.pipelines.base import Written
from envs.calvin.questions import clauses
from policies import SHIPPED

HELD_OUT = 0.05
"""Of the shards, as in eval-generation."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", help="folder of a token store")
    parser.add_argument("--checkpoint", default=SHIPPED)
    parser.add_argument("--pictures", type=int, default=64, help="drawings of each way")
    parser.add_argument("--window", type=int, default=8, help="guesses at once")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = pipelines.load(pipelines.find(arguments.checkpoint), rows=1)
    train, held_out = TokenStore.open(arguments.tokens).split(HELD_OUT)
    probe = scoring.state_probe(model, scoring.every_moment(train, scoring.PROBE_FRAMES), clauses)
    captions = [moment.caption(model) for moment in scoring.moments(held_out, arguments.pictures, 0)]

    engine, grids = Engine.of(model.checkpoint, EngineConfig(rows=1, capacity=512)), drawing.drawn_grids(model)
    guessed = replace(drawing.DRAWN, parallel=arguments.window)
    ways = {"one at a time": drawing.DRAWN, "exact": guessed} | {f"lossy={rounds}": replace(guessed, lossy=rounds) for rounds in (3, 2, 1)}
    print(f"{arguments.checkpoint}, {len(captions)} drawings, window {arguments.window}, one thread")
    print(f"{'':16}{'passes':>8}{'ms a drawing':>14}{'clauses right':>15}")
    for name, decoding in ways.items():
        requests = [drawing.draw_request(model, model.texts(caption), grids, decoding, number) for number, caption in enumerate(captions)]
        engine.generate(requests[:1])
        began = time.process_time()
        results = [engine.generate([request])[0] for request in requests]
        spent = (time.process_time() - began) / len(results)
        read = probe.read([drawing.images_of(model, Written(result.items, result.finish), grids) for result in results])
        right = [said[thing] == state for said, caption in zip(read, captions, strict=True) for thing, state in clauses(caption).items()]
        passes = np.mean([result.forwards for result in results])
        print(f"{name:16}{passes:8.1f}{1e3 * spent:14.0f}{100 * np.mean(right):14.1f}%", flush=True)


if __name__ == "__main__":
    main()
