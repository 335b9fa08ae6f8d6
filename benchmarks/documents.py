"""Speed of documents: ids of a picture, back again, and batches for training.

    OMP_NUM_THREADS=1 python benchmarks/documents.py
    ... --tokenizer <checkpoint folder or *.tiktoken>      # the text tokenizer too

One thread, processor time, median and least of many calls. The first document is Emu3's for a 512×512 picture: 64×64 codes with their lines
and marks. "formatted" is what the published processor does with the same picture up to its text tokenizer: it writes every code as
"<|visual token 001234|>" and joins them; splitting that string into ids again comes on top, and is measured here with one pass of `re`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from emu3_vla.documents import ActionChunk, Begin, End, Image, Text, Video, collate, lay_out, parse, write
from emu3_vla.vocabulary import CompactVocabulary, Emu3Vocabulary, ImageGrid

CAMERAS = (ImageGrid(name="static", rows=16, columns=16), ImageGrid(name="gripper", rows=12, columns=12))
COMPACT = CompactVocabulary(text_size=512, action_size=1024, codebook_size=1024, images=CAMERAS, block_size=4)


def time_us(call: Callable[[], object], repeats: int = 300) -> tuple[float, float]:
    """Median and least processor time of a call, in microseconds."""
    times = []
    for _ in range(repeats):
        started = time.process_time_ns()
        call()
        times.append((time.process_time_ns() - started) / 1e3)
    return statistics.median(times), min(times)


def formatted(codes: np.ndarray) -> list[int]:
    """A picture's ids by way of a string."""
    text = "<eol>".join("".join(f"<|visual token {code:06d}|>" for code in row) for row in codes.tolist())
    return [151846 if token == "<eol>" else 151854 + int(token[15:21]) for token in re.findall(r"<eol>|<\|visual token \d{6}\|>", text)]


def episode(random: np.random.Generator, chunks: int) -> list:
    """What the shipped policy is trained on: an instruction, then two images and about fifteen action ids a chunk."""
    document: list = [Text(random.integers(0, 512, 6))]
    for _ in range(chunks):
        document += [Image(grid.name, random.integers(0, 1024, (grid.rows, grid.columns), dtype=np.uint16)) for grid in CAMERAS]
        document.append(ActionChunk(random.integers(0, 1024, 15)))
    return document


def measure() -> dict[str, tuple[float, float]]:
    random = np.random.default_rng(0)
    codes = random.integers(0, 32_768, (64, 64))
    figures = {}
    for block_size in (1, 4):
        vocabulary = Emu3Vocabulary(block_size=block_size)
        picture = [Begin(), Text([64, 557, 34938]), Image("", codes), End()]
        film = [Begin(), Text([64, 557, 34938]), Video(codes.reshape(4, 32, 32)), End()]
        for name, document in (("picture", picture), ("film of 4 frames", film)):
            ids = write(document, vocabulary)
            assert parse(ids, vocabulary) == document
            figures[f"write, {name}, 4096 codes, m={block_size}"] = time_us(lambda d=document, v=vocabulary: write(d, v))
            figures[f"parse, {name}, 4096 codes, m={block_size}"] = time_us(lambda i=ids, v=vocabulary: parse(i, v))
    assert formatted(codes) == write([Image("", codes)], Emu3Vocabulary())[7:-3].tolist()
    figures["formatted and split, 4096 codes"] = time_us(lambda: formatted(codes), 100)
    documents = [episode(random, 3) for _ in range(32)]
    figures["lay out one document of 3 chunks, compact"] = time_us(lambda: lay_out(documents[0], COMPACT))
    figures["collate a batch of 32 of them"] = time_us(lambda: collate(documents, COMPACT))
    return figures


def measure_text(path: str) -> dict[str, tuple[float, float]]:
    from emu3_vla.emu3_text import Emu3TextTokenizer

    started = time.process_time()
    tokenizer = Emu3TextTokenizer.from_pretrained(path)
    read = time.process_time()
    tokenizer.encode("open the drawer")
    built = time.process_time()
    sentence = "move the red block to the left, and then put it into the drawer"
    ids = tokenizer.encode(sentence)
    figures = {"text tokenizer: read the file": (1e6 * (read - started),) * 2, "text tokenizer: build the BPE": (1e6 * (built - read),) * 2}
    return figures | {
        "encode a sentence of 15 words": time_us(lambda: tokenizer.encode(sentence)),
        "decode it": time_us(lambda: tokenizer.decode(ids)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", help="checkpoint folder or file of Emu3's text tokenizer")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    figures = measure() | (measure_text(arguments.tokenizer) if arguments.tokenizer else {})
    print(f"{'microseconds':<48}{'median':>12}{'least':>12}")
    for name, (median, least) in figures.items():
        print(f"{name:<48}{median:12.1f}{least:12.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
