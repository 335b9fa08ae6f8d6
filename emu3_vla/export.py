"""Export of a checkpoint to the layouts that other programs open; and back, since `emu3_vla.load` reads them all.

    export(emu3_vla.load(folder), "out", layout="transformers")        # Emu3ForConditionalGeneration: decoder and vision tokenizer
    export(emu3_vla.load(folder), "out", layout="transformers_text")   # Emu3ForCausalLM: the decoder alone
    export(emu3_vla.load(folder), "out", layout="llama")               # LlamaForCausalLM, for vLLM: Emu3's decoder is Llama in all but name

The weights are the same numbers under other names, so a round trip is exact. Models with vision blocks cannot be exported: those layouts
have one token per position, and no depth decoder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Emu3Config, Emu3ForCausalLM, Emu3TextConfig, Emu3TextModel, LlamaConfig

from emu3_vla import checkpoint as checkpoints
from emu3_vla.checkpoint import Checkpoint, CheckpointError
from emu3_vla.checkpoint.folder import plain_weights
from emu3_vla.checkpoint.layouts import CONFIG, LLAMA, TRANSFORMERS, TRANSFORMERS_TEXT, read_json
from emu3_vla.checkpoint.weights import SHARD_BYTES, write_weights
from emu3_vla.model import BlockEmu3ForCausalLM
from emu3_vla.vision_tokenizer.emu3 import Emu3Tokenizer
from emu3_vla.vocabulary import SPECIALS, Emu3Vocabulary

LAYOUTS = (TRANSFORMERS.name, TRANSFORMERS_TEXT.name, LLAMA.name)
DTYPES = {"": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ExportError(CheckpointError):
    """A checkpoint that the layout asked for cannot hold."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of `emu3-vla export`."""

    checkpoint: str  # folder or Hugging Face name, of any layout
    layout: str = TRANSFORMERS.name  # transformers, transformers_text or llama
    vision_tokenizer: str = ""  # folder or name of the vision tokenizer, where the checkpoint keeps it apart
    dtype: str = ""  # float32, bfloat16 or float16; empty: as stored
    output_dir: str = ""

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r}, expected one of {', '.join(LAYOUTS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}, expected {', '.join(filter(None, DTYPES))}, or nothing for what is stored")


def main(config: ExportConfig) -> None:
    """Load, export into output_dir, and say what was written."""
    folder = Path(config.output_dir)
    if (folder / CONFIG).exists():
        print(f"{folder} holds this export already")
        return
    loaded = checkpoints.load(config.checkpoint, dtype=DTYPES[config.dtype], vision_tokenizer=config.vision_tokenizer or None)
    architecture = export(loaded, folder, layout=config.layout)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{architecture}, {size / 1e9:.3g} GB of weights: {folder}")


def export(checkpoint: Checkpoint, folder: str | Path, *, layout: str, shard_bytes: int = SHARD_BYTES) -> str:
    """Write the model as it is now (with what was trained or merged into it), and its text tokenizer, and return the architecture's name.

    config.json comes last, so a folder that has one is whole. Raises ExportError for what the layout cannot hold, FileExistsError for a
    folder that holds a model already.
    """
    folder, model = Path(folder), checkpoint.model
    if layout not in LAYOUTS:
        raise ExportError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if isinstance(model, BlockEmu3ForCausalLM):
        raise ExportError(
            f"{checkpoint.folder}: a model with vision blocks ({model.config.codes_per_block} codes to a position) cannot be exported to "
            f"{layout!r}: that layout has one token to a position and no decoder of blocks. Serve it from its own folder"
        )
    if isinstance(model, Emu3TextModel):
        raise ExportError(f"{checkpoint.folder} has no output head, which {layout!r} needs")
    if (folder / CONFIG).exists():
        raise FileExistsError(f"{folder / CONFIG} is there already; nothing was overwritten")
    weights = plain_weights(model)
    values, extra = {TRANSFORMERS.name: _whole, TRANSFORMERS_TEXT.name: _text, LLAMA.name: _llama}[layout](checkpoint)
    if layout == TRANSFORMERS.name:
        weights = {f"text_model.{name}": tensor for name, tensor in weights.items()} | extra
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, weights, shard_bytes=shard_bytes)
    if checkpoint.text_tokenizer is not None:
        checkpoint.text_tokenizer.save_pretrained(folder)
    (folder / CONFIG).write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
    return values["architectures"][0]


def vocabulary_map(checkpoint: Checkpoint) -> dict[str, int]:
    """Names of tokens → ids, by which Transformers' Emu3Model finds image tokens. Raises ExportError where they are not known."""
    if checkpoint.layout == TRANSFORMERS.name:
        return read_json(checkpoint.folder / CONFIG)["vocabulary_map"]
    if not isinstance(checkpoint.vocabulary, Emu3Vocabulary):
        raise ExportError(
            f"{checkpoint.folder}: its {checkpoint.model.config.vocab_size} ids are not Emu3's, so it is not known which of them are image "
            f"tokens; export the decoder alone, with layout {TRANSFORMERS_TEXT.name!r}"
        )
    start, size = checkpoint.vocabulary.vision_start, checkpoint.vocabulary.codebook_size
    # Transformers' conversion of the published weights gives the first spare special to its placeholder for images.
    names = {("<image>" if name == "<|extra_0|>" else name): index for name, index in SPECIALS.items()}
    return names | {f"<|visual token {code:06d}|>": start + code for code in range(size)}


def _whole(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json of Emu3ForConditionalGeneration, and the vision tokenizer's weights."""
    vision = checkpoint.vision_tokenizer
    if not isinstance(vision, Emu3Tokenizer):
        found = "has none" if vision is None else f"has one of kind {vision.kind!r}"
        raise ExportError(
            f"{checkpoint.folder} {found}, but layout {TRANSFORMERS.name!r} holds Emu3's own vision tokenizer with the decoder; name it "
            f"with vision_tokenizer=, or export the decoder alone, with layout {TRANSFORMERS_TEXT.name!r}"
        )
    text, names = checkpoint.model.config, vocabulary_map(checkpoint)
    whole = Emu3Config(text_config=text.to_dict(), vq_config=vision.config.to_dict(), vocabulary_map=names)
    values = whole.to_dict() | _named("Emu3ForConditionalGeneration", checkpoint.model)
    values["tie_word_embeddings"] = text.tie_word_embeddings
    values["text_config"] |= _older_names(text)
    return values, {f"vqmodel.{name}": tensor for name, tensor in vision.vqvae.state_dict().items()}


def _text(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = checkpoint.model.config
    return config.to_dict() | _named(Emu3ForCausalLM.__name__, checkpoint.model) | _older_names(config), {}


def _llama(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json of LlamaForCausalLM; its modules, their names and their arithmetic are those of Emu3's decoder."""
    config: Emu3TextConfig = checkpoint.model.config
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act rms_norm_eps "
        "max_position_embeddings initializer_range use_cache pad_token_id bos_token_id eos_token_id tie_word_embeddings rope_parameters "
        "attention_bias attention_dropout mlp_bias"
    ).split()
    llama = LlamaConfig(**{name: getattr(config, name) for name in same}, head_dim=getattr(config, "head_dim", None))
    return llama.to_dict() | _named("LlamaForCausalLM", checkpoint.model) | _older_names(config), {}


def _named(architecture: str, model: Emu3ForCausalLM) -> dict[str, Any]:
    dtype = str(model.dtype).removeprefix("torch.")
    return {"architectures": [architecture], "dtype": dtype, "torch_dtype": dtype}


def _older_names(config: Emu3TextConfig) -> dict[str, Any]:
    """What programs of before Transformers 5 look for; without it they would take Llama's rotary base for Emu3's."""
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope}
