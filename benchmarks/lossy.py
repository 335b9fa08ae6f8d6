"""Lossy parallel decoding of pictures: what it saves, and what it costs in what a drawing shows.

    OMP_NUM_THREADS=1 python -m benchmarks.lossy tokens=outputs/tokens
    OMP_NUM_THREADS=1 python -m benchmarks.lossy tokens=outputs/tokens pictures=192 window=25

Drawings of held-out captions by the shipped checkpoint, at the same seeds, one at a time on one thread: exactly, and with `lossy=1`, `2`
and `3` (emu3_vla.generation.requests.Parallel). "passes" are of the trunk. "clauses" are those of the captions that a probe reads out of
what was drawn (docs/pipelines.md). Of actions: `benchmarks/decision.py --lossy 1`, and `emu3-vla eval policy_options.lossy=1`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np
import torch

from emu3_vla import pipelines
from emu3_vla.data.tokens import TokenStore
from emu3_vla.generation.engine import Engine, EngineConfig
from emu3_vla.pipelines import drawing, scoring
from emu3_vla.pipelines.base import Written
from emu3_vla.pipelines.state_probe import StateProbe
from envs.calvin.questions import clauses
from policies import SHIPPED

PROBE_FRAMES, HELD_OUT = 8000, 0.05


def main() -> None:
    """Measure and print."""
    options = {"tokens": "", "checkpoint": SHIPPED, "pictures": "64", "window": "8"} | dict(part.split("=", 1) for part in sys.argv[1:])
    if not options["tokens"]:
        raise SystemExit("give tokens=, a token store of the checkpoint's tokenizers with questions=envs.calvin.questions:Questions")
    torch.set_num_threads(1)
    model = pipelines.load(pipelines.find(options["checkpoint"]), rows=1)
    train, held_out = TokenStore.open(options["tokens"]).split(HELD_OUT)
    seen = [scoring.Moment(episode=episode, frames=(frame,)) for episode in train for frame in range(len(episode.frame_step))]
    seen = [seen[place] for place in np.linspace(0, len(seen) - 1, min(PROBE_FRAMES, len(seen))).round().astype(int)]
    probe = StateProbe(model.vision, [moment.look for moment in seen], [clauses(moment.caption(model)) for moment in seen])
    captions = [moment.caption(model) for moment in scoring.moments(held_out, int(options["pictures"]), 0)]

    engine, grids = Engine.of(model.checkpoint, EngineConfig(rows=1, capacity=512)), drawing.drawn_grids(model)
    window = int(options["window"])
    ways = {"one at a time": drawing.DRAWN, "exact": replace(drawing.DRAWN, parallel=window)}
    ways |= {f"lossy={rounds}": replace(drawing.DRAWN, parallel=window, lossy=rounds) for rounds in (3, 2, 1)}
    print(f"{options['checkpoint']}, {len(captions)} drawings, window {window}, one thread")
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
