"""Memory and time of loading a checkpoint, in every layout.

    OMP_NUM_THREADS=1 python benchmarks/loading.py                         # 1.0 B parameters, bfloat16, shards of 512 MB
    OMP_NUM_THREADS=1 python benchmarks/loading.py --layouts baai --stored float32 --dtype float32

Writes a random checkpoint into a temporary folder, loads it in a fresh process, and runs a few tokens through it, so that every weight but
the embedding's unused rows is touched; these are read too. All memory is resident memory over the size of the weights in the type asked
for: "load" the peak of the whole process until `load` has returned; "peak" until everything was touched, less what the process held
after its imports; "whole" the same with the interpreter and the libraries in it. Mapped pages count as resident although the system may
take them back at any time. Times depend on whether the files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Emu3Config, Emu3ForCausalLM, Emu3TextConfig, Emu3VQVAE, Emu3VQVAEConfig, PreTrainedModel

from emu3_vla.checkpoint.layouts import BAAI, LLAMA, OURS, TRANSFORMERS, TRANSFORMERS_TEXT, UNIVLA
from emu3_vla.checkpoint.weights import write_weights
from emu3_vla.model import BlockEmu3ForCausalLM, build_config
from emu3_vla.vocabulary import CompactVocabulary, ImageGrid

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 13,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
VOCABULARY = 98_304  # of the decoder; Emu3's 184,622 would be two thirds of a model of this size
LAYOUTS = (BAAI, UNIVLA, TRANSFORMERS, TRANSFORMERS_TEXT, LLAMA, OURS)
TOKENS = 8


def main() -> None:
    """Write, load and measure every layout asked for, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layouts", nargs="+", default=[layout.name for layout in LAYOUTS], choices=[layout.name for layout in LAYOUTS])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="type to load in")
    parser.add_argument("--stored", default="bfloat16", choices=["bfloat16", "float32"], help="type that the files hold")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--folder", default=None, help="where to write the checkpoints; default: a temporary folder")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, getattr(torch, arguments.dtype))))
        return
    print(f"{'layout':<18} {'parameters':>11} {'weights':>9} {'load':>7} {'peak':>7} {'whole':>7} {'load':>8} {'forward':>8}")
    for name in arguments.layouts:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            write_checkpoint(Path(folder), name, SHAPE | {"num_hidden_layers": arguments.layers}, getattr(torch, arguments.stored))
            command = [sys.executable, __file__, "--child", folder, "--dtype", arguments.dtype]
            figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        size = figures["weights"]
        memory = (figures["loaded"], figures["peak"] - figures["base"], figures["peak"])
        print(
            f"{name:<18} {figures['parameters'] / 1e6:>9.0f} M {size / 1e6:>6.0f} MB "
            + " ".join(f"{part / size:>7.3f}" for part in memory)
            + f" {figures['load_s']:>6.2f} s {figures['forward_s']:>6.2f} s",
            flush=True,
        )


def measure(folder: str, dtype: torch.dtype) -> dict[str, float]:
    """In this process: bytes resident before loading and at most, bytes of the weights, seconds."""
    import emu3_vla
    from emu3_vla.checkpoint import loading  # noqa: F401  so that the imports are not counted as the checkpoint's

    base = _resident("VmRSS")
    began = time.perf_counter()
    loaded = emu3_vla.load(folder, dtype=dtype)
    load_s, loaded_bytes = time.perf_counter() - began, _resident("VmHWM")
    modules = [loaded.model] + ([loaded.vision_tokenizer] if loaded.vision_tokenizer is not None else [])
    weights = {id(tensor): tensor for module in modules for tensor in module.parameters()}
    with torch.inference_mode():
        began = time.perf_counter()
        loaded.model(torch.arange(TOKENS)[None], use_cache=False)
        forward_s = time.perf_counter() - began
        for tensor in weights.values():
            tensor.amax()  # the embedding's rows, and what a text forward does not use
    return {
        "base": base,
        "loaded": loaded_bytes,
        "peak": _resident("VmHWM"),
        "weights": sum(tensor.nbytes for tensor in weights.values()),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "load_s": load_s,
        "forward_s": forward_s,
    }


def write_checkpoint(folder: Path, layout: str, shape: dict[str, int], stored: torch.dtype) -> None:
    """A random checkpoint in this layout, sharded."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = Emu3TextConfig(vocab_size=VOCABULARY, max_position_embeddings=5120, **shape, **special)
    if layout == OURS.name:
        _write_ours(folder, shape, stored)
        return
    weights = random_weights(Emu3ForCausalLM, config, stored)
    values = config.to_dict()
    if layout in (BAAI.name, UNIVLA.name):
        values |= {"model_type": "Emu3", "architectures": ["Emu3MoE" if layout == UNIVLA.name else "Emu3ForCausalLM"]}
        values |= {"rope_theta": 1e6, "rope_scaling": None}
        values.pop("rope_parameters")
    elif layout == LLAMA.name:
        values |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    elif layout == TRANSFORMERS.name:
        vision = Emu3VQVAEConfig()
        values = Emu3Config(text_config=config, vq_config=vision, vocabulary_map={"<image>": 3}).to_dict()
        weights = {f"text_model.{name}": tensor for name, tensor in weights.items()}
        weights |= {f"vqmodel.{name}": tensor for name, tensor in random_weights(Emu3VQVAE, vision, stored).items()}
    (folder / "config.json").write_text(json.dumps(values, default=str))
    write_weights(folder, weights, shard_bytes=512 * 2**20)


def _write_ours(folder: Path, shape: dict[str, int], stored: torch.dtype) -> None:
    grids = (ImageGrid(name="rgb_static", rows=16, columns=16), ImageGrid(name="rgb_gripper", rows=12, columns=12))
    vocabulary = CompactVocabulary(text_size=VOCABULARY // 2, action_size=VOCABULARY // 2, codebook_size=1024, images=grids, block_size=4)
    config = build_config(vocabulary, max_position_embeddings=5120, **shape)
    (folder / "model").mkdir()
    config.save_pretrained(folder / "model")
    vocabulary.save(folder / "model" / "vocabulary.json")
    write_weights(folder / "model", random_weights(BlockEmu3ForCausalLM, config, stored), shard_bytes=512 * 2**20)
    (folder / "provenance.json").write_text(json.dumps({"format": 1, "files": {}}))


def random_weights(kind: type[PreTrainedModel], config, stored: torch.dtype) -> dict[str, torch.Tensor]:
    """Normal weights of the sizes that this module has; they need not make sense."""
    with torch.device("meta"):
        expected = kind(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.empty(tensor.shape, dtype=stored).normal_(0, 0.02, generator=generator)
        if tensor.is_floating_point()
        else torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, tensor in expected.items()
    }


def _resident(field: str) -> int:
    """Bytes; VmRSS is now, VmHWM the peak since the process began."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


if __name__ == "__main__":
    main()
