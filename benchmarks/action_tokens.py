"""Speed of the action tokenizer against the published processor's algorithm, written plainly.

    OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1 python benchmarks/action_tokens.py
    EMU3_VLA_REFERENCE=<folder> ... python benchmarks/action_tokens.py      # the published tokenizers too

Batches of 1000 chunks, one thread, processor time, the best batch. No batch is encoded twice by the same code, because the `tokenizers`
library remembers the words that it met. "plain" is the published code's steps one chunk at a time with that library; "wrapped" the same
through Transformers' PreTrainedTokenizerFast, which the published code calls. "first" is our first batch after loading, which builds the
table of tokens that may stand side by side; "ours" any later one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy.fft import dct, idct
from scipy.ndimage import gaussian_filter1d

from action_tokenizer import FastTokenizer

CHUNKS, HORIZON, ACTION_DIM = 1000, 10, 7
PUBLISHED = ("fast", "fast_bridge_t5_s50", "fast_calvin_norm_a10_s50")


class Plain:
    """The published processor's algorithm: one chunk, one string, one call of the BPE at a time."""

    def __init__(self, tokenizer: FastTokenizer, to_ids: Callable, to_text: Callable):
        self.scale, self.min_token, self.to_ids, self.to_text = tokenizer.scale, tokenizer.min_token, to_ids, to_text

    def encode(self, chunks: np.ndarray) -> list[list[int]]:
        coefficients = np.around(dct(chunks, axis=1, norm="ortho") * self.scale)
        return [self.to_ids("".join(map(chr, np.maximum(chunk.flatten() - self.min_token, 0).astype(int)))) for chunk in coefficients]

    def decode(self, ids: list[list[int]], shape: tuple[int, int]) -> np.ndarray:
        actions = []
        for row in ids:
            coefficients = np.array(list(map(ord, self.to_text(row)))) + self.min_token
            actions.append(idct(coefficients.reshape(shape) / self.scale, axis=0, norm="ortho"))
        return np.stack(actions)


def best_us(call: Callable, batches: Sequence) -> float:
    """Least microseconds an item of `call`, over several batches."""
    figures = []
    for batch in batches:
        started = time.process_time()
        call(batch)
        figures.append((time.process_time() - started) / len(batch))
    return min(figures) * 1e6


def in_turn(kind: str, calls: dict[str, Callable], batches: Sequence) -> dict[str, float]:
    """`best_us` of each call. They take turns, batch by batch, so that what disturbs the machine meets all of them."""
    figures: dict[str, list[float]] = {name: [] for name in calls}
    for batch in batches:
        for name, call in calls.items():
            figures[name].append(best_us(call, [batch]))
    return {f"{name} {kind}": min(values) for name, values in figures.items()}


def plains(tokenizer: FastTokenizer) -> dict[str, Plain]:
    """The published algorithm on a tokenizer's own files: on the bare library, and as the published code calls it."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        wrapped = PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"), clean_up_tokenization_spaces=False)
    bare = wrapped.backend_tokenizer
    return {
        "plain": Plain(tokenizer, lambda text: bare.encode(text).ids, bare.decode),
        "wrapped": Plain(tokenizer, lambda text: wrapped(text)["input_ids"], wrapped.decode),
    }


def measure(load: Callable[[], FastTokenizer], batches: list[np.ndarray]) -> dict[str, float]:
    """Microseconds a chunk of each way, and of a grammar step. Every way must give the same ids and actions."""
    tokenizer, (horizon, action_dim) = load(), batches[0].shape[1:]
    decode = partial(tokenizer.decode, horizon=horizon, action_dim=action_dim)
    ways = plains(tokenizer)
    plain_decoders = {name: partial(plain.decode, shape=(horizon, action_dim)) for name, plain in ways.items()}
    figures = {"first encode": best_us(tokenizer.encode, batches[:1])}
    figures |= in_turn("encode", {"ours": tokenizer.encode, **{name: plain.encode for name, plain in ways.items()}}, batches)
    ids = [tokenizer.encode(batch) for batch in batches]
    figures |= in_turn("decode", {"ours": decode, **plain_decoders}, ids * 4)
    for name, plain in ways.items():
        assert plain.encode(batches[0]) == ids[0], f"{name} gives other ids"
        np.testing.assert_allclose(plain_decoders[name](ids[0]), decode(ids[0]), atol=1e-9)
    figures["one chunk encode"] = best_us(lambda batch: [tokenizer.encode(chunk) for chunk in batch], batches)
    figures["one chunk decode"] = best_us(lambda batch: [decode([row]) for row in batch], ids)
    return figures | grammar_figures(tokenizer, ids[0], (horizon, action_dim))


def grammar_figures(tokenizer: FastTokenizer, ids: list[list[int]], shape: tuple[int, int]) -> dict[str, float]:
    """Microseconds of a mask and a step along valid chunks, of a mask in a batch, and milliseconds to build the automaton."""
    started = time.process_time()
    grammar = tokenizer.grammar(*shape)
    built = time.process_time() - started

    def walk(tokens):
        for row in ids:
            state = grammar.start()
            for index in row:
                grammar.mask(state)
                state = grammar.advance(state, index)

    states = np.random.default_rng(0).integers(0, grammar.num_states, 256)
    return {
        "grammar step": best_us(walk, [range(sum(map(len, ids)))] * 5),
        "grammar mask in a batch of 256": best_us(grammar.masks, [states] * 5),
        "grammar built, ms": built * 1e3,
    }


def smooth(count: int, seed: int) -> np.ndarray:
    """Smooth random chunks within [-1, 1]: float32 (count, HORIZON, ACTION_DIM)."""
    noise = np.random.default_rng(seed).normal(size=(count, HORIZON, ACTION_DIM))
    return np.clip(2 * gaussian_filter1d(noise, 2.0, axis=1, mode="nearest"), -1, 1).astype(np.float32)


def cases() -> Iterator[tuple[str, Callable[[], FastTokenizer], list[np.ndarray]]]:
    """(name, loader, batches): one fitted on made-up chunks, and the published ones where EMU3_VLA_REFERENCE names their folder."""
    with tempfile.TemporaryDirectory() as folder:
        FastTokenizer.fit(smooth(5000, 1), scale=10, vocab_size=2048).save_pretrained(folder)
        yield "fitted, 2048 ids", lambda: FastTokenizer.from_pretrained(folder), [smooth(CHUNKS, seed) for seed in range(2, 14)]
    reference = os.environ.get("EMU3_VLA_REFERENCE")
    for name in PUBLISHED if reference else ():
        with np.load(Path(reference) / "fast" / f"{name}_vectors.npz") as vectors:
            chunks = vectors["actions"]
        batches = np.split(chunks[: len(chunks) // CHUNKS * CHUNKS], len(chunks) // CHUNKS)
        yield name, lambda name=name: FastTokenizer.from_pretrained(Path(reference) / "fast" / name), batches


def main() -> None:
    """Measure every case and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    results = {}
    for name, load, batches in cases():
        figures = results[name] = measure(load, batches)
        print(f"\n{name}: chunks of {batches[0].shape[1]}×{batches[0].shape[2]}, microseconds a chunk")
        for label, value in figures.items():
            print(f"  {label:<32}{value:9.2f}")
        for kind in ("encode", "decode"):
            ratios = (f"{figures[f'{way} {kind}'] / figures[f'ours {kind}']:.1f}x {way}" for way in ("plain", "wrapped"))
            print(f"  {kind} speed-up: {', '.join(ratios)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
