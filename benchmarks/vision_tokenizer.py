"""Speed of the vision tokenizers: ours over Transformers' `Emu3VQVAE` on the same weights, and the light one's time an image.

    OMP_NUM_THREADS=1 python benchmarks/vision_tokenizer.py                      # published size, random weights, 128×128: some minutes
    OMP_NUM_THREADS=1 python benchmarks/vision_tokenizer.py --base-channels 64 --side 200 --compile
    EMU3_VLA_REFERENCE=<folder> ... python benchmarks/vision_tokenizer.py        # the recorded tiny weights too

One thread, processor time; the two implementations take turns and the least time of each counts, so that other programs disturb little.
Codes must be equal and pixels within 1e-5 of the largest, or the run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Emu3VQVAE

from emu3_vla.vision_tokenizer import VisionTokenizer
from emu3_vla.vision_tokenizer.emu3 import Emu3Config, Emu3Tokenizer

SHIPPED = Path(__file__).parents[1] / "policies/checkpoints/calvin-d/vision_tokenizer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-channels", type=int, default=256, help="width; 256 is the published one")
    parser.add_argument("--side", type=int, default=128, help="pixels; a multiple of 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="time ours under torch.compile too")
    parser.add_argument("--skip-emu3", action="store_true", help="the light tokenizer alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, object] = {"torch": torch.__version__, "threads": 1}
    if reference := os.environ.get("EMU3_VLA_REFERENCE"):
        tiny = VisionTokenizer.from_pretrained(Path(reference) / "emu3" / "baai_vq_tiny")
        results["emu3, recorded tiny weights"] = against_transformers(tiny, 256, 5, compiled=False)
    if not options.skip_emu3:
        torch.manual_seed(0)
        tokenizer = Emu3Tokenizer.from_sizes(Emu3Config(base_channels=options.base_channels)).eval()
        name = f"emu3, {options.base_channels} channels, {options.side}×{options.side}"
        results[name] = against_transformers(tokenizer, options.side, options.rounds, compiled=options.compile)
    results["light, shipped weights"] = light(options.compile)
    print(json.dumps(results, indent=1, ensure_ascii=False))


@torch.inference_mode()
def against_transformers(tokenizer: VisionTokenizer, side: int, rounds: int, *, compiled: bool) -> dict[str, object]:
    """Seconds an image and ratios, after checking that both give the same."""
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    theirs: Emu3VQVAE = tokenizer.vqvae
    size = torch.tensor([[side, side]])
    codes = tokenizer.encode(image)
    published = torch.stack([*theirs.encode(image, size).image_tokens])
    _require((codes != published).float().mean().item() == 0, f"{(codes != published).sum()} codes differ")
    pixels = theirs.decode(codes)
    difference = ((tokenizer.decode(codes) - pixels).abs().max() / pixels.abs().max()).item()
    _require(difference < 1e-5, f"pixels differ by {difference:.1e} of the largest")
    works = {
        "encode": {"transformers": lambda: theirs.encode(image, size), "ours": lambda: tokenizer.encode(image)},
        "decode": {"transformers": lambda: theirs.decode(codes), "ours": lambda: tokenizer.decode(codes)},
    }
    found: dict[str, object] = {"parameters": sum(p.numel() for p in tokenizer.parameters()), "relative_difference": difference}
    for name, pair in works.items():
        seconds = least_seconds(pair, rounds)
        found[name] = {key: round(value, 4) for key, value in seconds.items()}
        found[name]["ratio"] = round(seconds["transformers"] / seconds["ours"], 2)
    if compiled:
        tokenizer.compile()
        tokenizer.decode(tokenizer.encode(image))
        seconds = least_seconds({"encode": lambda: tokenizer.encode(image), "decode": lambda: tokenizer.decode(codes)}, rounds)
        found["ours, compiled"] = {key: round(value, 4) for key, value in seconds.items()}
    return found


@torch.inference_mode()
def light(compiled: bool) -> dict[str, object]:
    """Milliseconds an image of each camera, one at a time as a policy that acts, and eight at once."""
    tokenizer = VisionTokenizer.from_pretrained(SHIPPED)
    found: dict[str, object] = {}
    for mode in ("plain", "compiled") if compiled else ("plain",):
        if mode == "compiled":
            tokenizer.compile()
        for camera, side in tokenizer.image_sizes.items():
            images = torch.rand(8, 3, side, side) * 2 - 1
            codes = tokenizer.encode(images)
            works = {
                "encode one": lambda images=images: tokenizer.encode(images[:1]),
                "encode": lambda images=images: tokenizer.encode(images),
                "decode": lambda codes=codes: tokenizer.decode(codes),
            }
            for work in works.values():
                work()
            seconds = least_seconds(works, 15)
            found[f"{camera} {side}×{side}, {mode}, ms"] = {
                name: round(1e3 * value / (1 if name == "encode one" else 8), 2) for name, value in seconds.items()
            }
    return found


def least_seconds(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least processor seconds of each, taking turns."""
    least = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            started = time.process_time()
            work()
            least[name] = min(least[name], time.process_time() - started)
    return least


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(f"not the same: {message}")


if __name__ == "__main__":
    main()
