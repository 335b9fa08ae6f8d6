"""Layouts of an Emu3 checkpoint: how each is recognised, configured and named, all in terms of Transformers' `Emu3ForCausalLM`.

    layout = recognise(folder)
    config = decoder_config(layout, folder)
    parts = sort_names(files.tensors)       # the decoder's weights, the vision tokenizer's, and what is neither

Sources: config.json and model.safetensors.index.json of BAAI/Emu3-*, Transformers' models/emu3, UniVLA's configs/moe_fast_video.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Emu3TextConfig

from emu3_vla.checkpoint.errors import CheckpointError

CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to lay out a checkpoint. `architecture`: the class that config.json names, where model_type alone does not decide."""

    name: str
    says: str
    model_type: str
    architecture: str | None = None


OURS = Layout(name="emu3_vla", says="emu3-vla's folder: model/, provenance.json and tokenizers", model_type="emu3_vla_blocks")
BAAI = Layout(name="baai", says="BAAI's original (model_type 'Emu3')", model_type="Emu3")
UNIVLA = Layout(name="univla", says="UniVLA's (model_type 'Emu3', architecture 'Emu3MoE')", model_type="Emu3", architecture="Emu3MoE")
TRANSFORMERS = Layout(name="transformers", says="Transformers' Emu3ForConditionalGeneration (model_type 'emu3')", model_type="emu3")
TRANSFORMERS_TEXT = Layout(
    name="transformers_text",
    says="Transformers' Emu3ForCausalLM or Emu3TextModel (model_type 'emu3_text_model')",
    model_type="emu3_text_model",
)
LLAMA = Layout(name="llama", says="LlamaForCausalLM (model_type 'llama'), as the export writes it", model_type="llama")
LAYOUTS = (OURS, UNIVLA, BAAI, TRANSFORMERS, TRANSFORMERS_TEXT, LLAMA)

_VISION_TYPES = ("Emu3VisionVQ", "emu3_vqgan")
_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "use_cache",
    "attention_bias",
    "mlp_bias",
    "head_dim",
)
# BAAI's configuration class states these where config.json does not.
_BAAI_DEFAULTS = {"rope_theta": 1_000_000.0, "attention_dropout": 0.1}
_LLAMA_DEFAULTS = {"rope_theta": 10_000.0, "attention_dropout": 0.0, "rms_norm_eps": 1e-6}

_NAMES = (  # pattern in a file's names → the name in Emu3ForCausalLM, the first that matches
    (r"^text_model\.lm_head\.", "lm_head."),  # as Transformers writes it
    (r"^text_model\.model\.", "model."),
    (r"^model\.text_model\.", "model."),  # as its modules are named
    (r"^(embed_tokens|layers|norm)\.", r"model.\1."),  # a bare Emu3TextModel
)
_DECODER = re.compile(r"^(lm_head|model\.(embed_tokens|layers|norm))\.")
_VISION = re.compile(r"^(model\.)?vqmodel\.")
_DERIVED = re.compile(r"\brotary_emb\.inv_freq$")  # follows from the configuration
# UniVLA's head for continuous actions, which its published models have switched off; the decoder does without.
_UNUSED = re.compile(r"^(action_projector|action_layers|action_decoder|tau_emb)\.")


@dataclass(frozen=True, kw_only=True)
class SortedNames:
    """decoder: name in Emu3ForCausalLM → name in the file. vision: name in Emu3VQVAE → name in the file.

    unused: parts that this program has no use for, by design. unknown: names that belong to no Emu3 checkpoint.
    """

    decoder: dict[str, str] = field(default_factory=dict)
    vision: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def recognise(folder: Path) -> Layout:
    """Which layout `folder` has. Raises FileNotFoundError or CheckpointError, the latter with the list of known ones."""
    if (folder / "provenance.json").is_file() or (folder / "model" / CONFIG).is_file():
        return OURS
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it holds neither {CONFIG} nor model/ and provenance.json; known: {known()}")
    values = read_json(folder / CONFIG)
    kind, architectures = values.get("model_type"), values.get("architectures") or []
    for layout in LAYOUTS:
        if kind == layout.model_type and (layout.architecture is None or layout.architecture in architectures):
            if layout is OURS:
                raise CheckpointError(f"{folder} is the model/ folder of a checkpoint of this program; name the folder above it")
            return layout
    if kind in _VISION_TYPES or "kind" in values:
        raise CheckpointError(
            f"{folder / CONFIG} is that of a vision tokenizer ({kind or values['kind']}), not of a decoder; "
            "give it as vision_tokenizer= beside a decoder, or open it with VisionTokenizer.from_pretrained"
        )
    raise CheckpointError(f"{folder / CONFIG}: unknown layout, model_type {kind!r}, architectures {architectures}; known: {known()}")


def known() -> str:
    """The known layouts, for an error's text."""
    return "; ".join(layout.says for layout in LAYOUTS)


def decoder_config(layout: Layout, folder: Path) -> Emu3TextConfig:
    """The decoder's configuration in Transformers' terms. Raises CheckpointError naming config.json."""
    path = folder / CONFIG
    values = read_json(path)
    if layout is TRANSFORMERS:
        values = values.get("text_config")
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} has no text_config, which holds the decoder's sizes in this layout")
    if values.get("qkv_bias"):
        raise CheckpointError(f"{path}: qkv_bias is true; Emu3's decoder in Transformers has no biases of queries, keys and values alone")
    if layout in (BAAI, UNIVLA):
        values = _BAAI_DEFAULTS | values
    elif layout is LLAMA:
        values = _LLAMA_DEFAULTS | values
    missing = [name for name in _TEXT_FIELDS[:5] if name not in values]
    if missing and layout is not TRANSFORMERS:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    chosen = {name: values[name] for name in _TEXT_FIELDS if values.get(name) is not None}
    try:
        return Emu3TextConfig(**chosen, rope_parameters=_rope(values))
    except Exception as error:  # the configuration classes raise errors of their own that share no base but this
        raise CheckpointError(f"{path} describes no Emu3 decoder: {' '.join(str(error).split())}") from error


def sort_names(names: Iterable[str]) -> SortedNames:
    """Whose weight each name in a checkpoint's files is."""
    parts = SortedNames()
    for name in names:
        if _VISION.match(name):
            parts.vision[_VISION.sub("", name)] = name
        elif _UNUSED.match(name):
            parts.unused.append(name)
        elif not _DERIVED.search(name):
            ours = _decoder_name(name)
            if _DECODER.match(ours):
                parts.decoder[ours] = name
            else:
                parts.unknown.append(name)
    return parts


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, CheckpointError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, expected a JSON object")
    return values


def _decoder_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        renamed, found = re.subn(pattern, replacement, name)
        if found:
            return renamed
    return name


def _rope(values: dict[str, Any]) -> dict[str, Any] | None:
    """Rotary parameters in Transformers' present form; older configurations spread them over rope_theta and rope_scaling."""
    if values.get("rope_parameters"):
        return dict(values["rope_parameters"])
    scaling = dict(values.get("rope_scaling") or {})
    kind = scaling.pop("type", None)
    scaling.setdefault("rope_type", kind or "default")
    return scaling | ({"rope_theta": values["rope_theta"]} if "rope_theta" in values else {})
