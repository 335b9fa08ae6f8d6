"""What a checkpoint is, from its JSON files and the headers of its weights alone: no weight is read.

    description = describe(folder)          # plain data, ready for JSON
    print("\\n".join(lines(description)))

What is wrong with it is collected rather than raised: `missing` and `mismatched` name the files. Parts that a checkpoint may do without
are `absent`.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Emu3TextConfig, PreTrainedModel

from action_tokenizer import FastTokenizer
from emu3_vla.checkpoint import ACTION, CONFIG, MODEL, NORMALIZER, POLICY, PROVENANCE, TEXT, VISION, VOCABULARY, CheckpointError, layouts
from emu3_vla.checkpoint.assemble import HEAD, check_weights, decoder_kind
from emu3_vla.checkpoint.belonging import check_belonging, emu3_vocabulary
from emu3_vla.checkpoint.folder import FORMAT, KINDS
from emu3_vla.checkpoint.hub import find_folder
from emu3_vla.checkpoint.layouts import OURS, UNIVLA, read_json
from emu3_vla.checkpoint.loading import find_tokenizers
from emu3_vla.checkpoint.weights import TensorEntry, WeightFiles
from emu3_vla.emu3_text import Emu3TextTokenizer
from emu3_vla.text import TextTokenizer
from emu3_vla.vision_tokenizer import VisionTokenizer
from emu3_vla.vision_tokenizer.base import KINDS as VISION_KINDS
from emu3_vla.vision_tokenizer.base import MODEL_TYPES as VISION_TYPES
from emu3_vla.vocabulary import Emu3Vocabulary, Vocabulary, load_vocabulary

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PARTS = (  # prefix of a decoder's weight names → what it is part of
    ("embedding", "model.embed_tokens."),
    ("trunk", "model."),
    ("head", "lm_head."),
    ("block embedding", "blocks."),
    ("depth decoder", "depth."),
)
CACHE_POSITIONS = 1000


class _Findings:
    """What is missing and mismatched, gathered while looking."""

    def __init__(self):
        self.missing: list[str] = []
        self.mismatched: list[str] = []

    def attempt(self, look: Callable[[], Any], default: Any = None) -> Any:
        """What `look` returns, or `default` where it fails with one of the errors that name a file."""
        try:
            return look()
        except FileNotFoundError as error:
            self.missing.append(str(error))
        except ValueError as error:
            self.mismatched.append(str(error))
        return default


def describe(
    path: str | Path,
    *,
    vision_tokenizer: str | Path | None = None,
    text_tokenizer: str | Path | None = None,
    action_tokenizer: str | Path | None = None,
) -> dict[str, Any]:
    """A checkpoint of any layout, in words and numbers. The tokenizers are named as for `emu3_vla.load`.

    Keys: folder, layout, architecture, sizes (of the decoder), parts (parameters, bytes and types of each), vocabulary, tokenizers,
    memory (bytes of all parameters by type, and of the cache for 1000 positions in bfloat16), can (act, draw, film, answer: empty, or why
    not), absent, missing, mismatched. Raises FileNotFoundError or CheckpointError for what is no checkpoint at all.
    """
    folder = find_folder(path)
    layout = layouts.recognise(folder)
    found = _Findings()
    given = {"vision": vision_tokenizer, "text": text_tokenizer, "action": action_tokenizer}
    look = _ours if layout is OURS else _foreign
    facts = look(folder, layout, given, found)
    config, vocabulary, tensors = facts["config"], facts["vocabulary"], facts["tensors"]
    return {
        "folder": str(folder),
        "layout": layout.name,
        "layout_says": layout.says,
        "architecture": facts["kind"].__name__ if facts["kind"] else None,
        "sizes": _sizes(config) if config else {},
        "parts": {name: _part(entries) for name, entries in tensors.items() if entries},
        "vocabulary": _vocabulary(vocabulary),
        "tokenizers": facts["tokenizers"],
        "memory": _memory(tensors, config),
        "can": _abilities(facts, vocabulary, folder, layout),
        "absent": facts["absent"],
        "missing": found.missing,
        "mismatched": found.mismatched,
    }


def lines(description: dict[str, Any]) -> list[str]:
    """A description for reading."""
    said = [f"{description['folder']}: {description['layout_says']}"]
    sizes = ", ".join(f"{name} {value}" for name, value in description["sizes"].items())
    said += [f"  model        {description['architecture'] or 'unknown'}; {sizes}"]
    for name, part in description["parts"].items():
        said.append(f"  {name:<17} {part['parameters']:>14,} parameters {_size(part['bytes']):>9}  {', '.join(part['types'])}")
    vocabulary = description["vocabulary"]
    said.append("  vocabulary   " + (", ".join(f"{name} {value}" for name, value in vocabulary.items()) if vocabulary else "not known"))
    for name, tokenizer in description["tokenizers"].items():
        said.append(f"  {name:<17} {tokenizer['says']}: {tokenizer['path']}" if tokenizer else f"  {name:<17} none")
    said.append("  memory       " + ", ".join(f"{name} {_size(value)}" for name, value in description["memory"].items()))
    said += [f"  to {name:<9} {'no: ' + why if why else 'its parts allow it'}" for name, why in description["can"].items()]
    said += [f"  absent       {', '.join(description['absent'])}"] if description["absent"] else []
    said += [f"  missing      {text}" for text in description["missing"]]
    return said + [f"  mismatched   {text}" for text in description["mismatched"]]


# -- looking


def _ours(folder: Path, layout: layouts.Layout, given: dict[str, Any], found: _Findings) -> dict[str, Any]:
    model = folder / MODEL
    found.attempt(lambda: _check_listed_files(folder))
    vocabulary = found.attempt(lambda: load_vocabulary(model / VOCABULARY))
    values = found.attempt(lambda: read_json(model / CONFIG), {})
    config_class, kind = KINDS.get(values.get("model_type"), (None, None))
    if values and kind is None:
        found.mismatched.append(f"{model / CONFIG}: model_type is {values.get('model_type')!r}, expected {' or '.join(KINDS)}")
    config = found.attempt(lambda: config_class(**values)) if config_class else None
    files = found.attempt(lambda: WeightFiles.open(model))
    if files and config:
        names = {name: name for name in files.tensors}
        found.attempt(lambda: check_weights(files, names, _expected(kind, config)))
    if config and vocabulary and config.vocab_size != vocabulary.head_size:
        found.mismatched.append(f"{model / CONFIG}: vocab_size is {config.vocab_size}, but {VOCABULARY} needs {vocabulary.head_size}")
    where = {part: folder / part for part in (VISION, TEXT, ACTION) if (folder / part).is_dir()}
    absent = [part for part in (VISION, TEXT, ACTION, NORMALIZER, POLICY) if not (folder / part).exists()]
    text = Emu3TextTokenizer if isinstance(vocabulary, Emu3Vocabulary) else TextTokenizer
    tokenizers, entries = _tokenizers(folder, where, text, vocabulary, config, found)
    tensors = _by_part(files.tensors.items() if files else ()) | {VISION: entries}
    return {"config": config, "kind": kind, "vocabulary": vocabulary, "tokenizers": tokenizers, "tensors": tensors, "absent": absent}


def _foreign(folder: Path, layout: layouts.Layout, given: dict[str, Any], found: _Findings) -> dict[str, Any]:
    values = read_json(folder / CONFIG)
    config = found.attempt(lambda: layouts.decoder_config(layout, folder))
    files = found.attempt(lambda: WeightFiles.open(folder))
    names = layouts.sort_names(files.tensors if files else ())
    if names.unknown:
        found.mismatched.append(f"{files.where(names.unknown[0])} holds weights that no Emu3 decoder has: {', '.join(names.unknown[:3])}")
    kind = None
    if files and config:
        kind, decoder = decoder_kind(names.decoder, config)
        found.attempt(lambda: check_weights(files, decoder, _expected(kind, config, tied=config.tie_word_embeddings)))
        if HEAD not in names.decoder and not config.tie_word_embeddings:
            found.missing.append(f"{folder}: its weights have no output head")
    action = 0 if layout is not UNIVLA else Emu3Vocabulary().action_size
    where = found.attempt(lambda: find_tokenizers(folder, names, **given), {})
    if ACTION in where:
        tokenizer = found.attempt(lambda: FastTokenizer.from_pretrained(where[ACTION]))
        action = tokenizer.vocab_size if tokenizer else action
    vocabulary = found.attempt(lambda: emu3_vocabulary(values, config.vocab_size, action_size=action)) if config else None
    tokenizers, entries = _tokenizers(folder, where, Emu3TextTokenizer, vocabulary, config, found)
    absent = [part for part in (VISION, TEXT, ACTION) if part not in where] + [NORMALIZER, POLICY]
    inner = [files.tensors[name] for name in names.vision.values()] if files else []
    tensors = _by_part((ours, files.tensors[name]) for ours, name in names.decoder.items()) if files else {}
    tensors |= {VISION: inner or entries, "unused": [files.tensors[name] for name in names.unused] if files else []}
    return {"config": config, "kind": kind, "vocabulary": vocabulary, "tokenizers": tokenizers, "tensors": tensors, "absent": absent}


def _check_listed_files(folder: Path) -> None:
    """The files that were saved together, by hash but for the weights. Raises FileNotFoundError, CheckpointError."""
    provenance = read_json(folder / PROVENANCE)
    if provenance.get("format") != FORMAT or not isinstance(provenance.get("files"), dict):
        raise CheckpointError(f"{folder / PROVENANCE} is not that of a checkpoint of format {FORMAT}")
    for name, digest in provenance["files"].items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; copy the whole checkpoint folder again")
        if path.suffix != ".safetensors" and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise CheckpointError(f"{path} is not the file that was saved with this model")


def _tokenizers(
    folder: Path,
    where: dict[str, Path],
    text_class: type,
    vocabulary: Vocabulary | None,
    config: Emu3TextConfig | None,
    found: _Findings,
) -> tuple[dict[str, Any], list[TensorEntry]]:
    """What each tokenizer is, whether it belongs to the model, and the header of the vision tokenizer's own weights."""
    entries: list[TensorEntry] = []
    vision = text = action = None
    if VISION in where:
        inside = where[VISION] == folder / CONFIG
        values = found.attempt(lambda: read_json(where[VISION] if inside else where[VISION] / CONFIG), {})
        values = dict(values.get("vq_config") or {}) | {"model_type": "emu3_vqgan"} if inside else values
        vision = found.attempt(lambda: _vision_shell(values, where[VISION]))
        if not inside:
            files = found.attempt(lambda: WeightFiles.open(where[VISION]))
            entries = list(files.tensors.values()) if files else []
    if TEXT in where:
        text = found.attempt(lambda: text_class.from_pretrained(where[TEXT]))
    if ACTION in where:
        action = found.attempt(lambda: FastTokenizer.from_pretrained(where[ACTION]))
    if config:
        check = partial(check_belonging, folder, vocab_size=config.vocab_size, vocabulary=vocabulary, where=where)
        for part in ({"vision": vision}, {"text": text}, {"action": action}):  # each for itself: all that is wrong is to be told
            found.attempt(partial(check, **part))
    said = {
        VISION: f"{vision.kind}, {vision.codebook_size} codes, {vision.patch}×{vision.patch} pixels a code" if vision else None,
        TEXT: f"{text.vocab_size} ids" if text else None,
        ACTION: f"{action.vocab_size} ids" if action else None,
    }
    return {part: {"says": says, "path": str(where[part])} if says else None for part, says in said.items()}, entries


def _vision_shell(values: dict[str, Any], where: Path) -> VisionTokenizer:
    """A vision tokenizer without its weights, by its config.json. Raises CheckpointError, VisionTokenizerError."""
    kind = values.get("kind") or VISION_TYPES.get(values.get("model_type"))
    if kind not in VISION_KINDS:
        raise CheckpointError(f"{where} is no vision tokenizer of a known kind ({kind!r}); known: {', '.join(VISION_KINDS)}")
    module, name = VISION_KINDS[kind]
    with torch.device("meta"):
        values = {key: value for key, value in values.items() if key != "kind"}
        return getattr(importlib.import_module(module), name).from_config(values, where=str(where))


def _expected(kind: type[PreTrainedModel], config: Emu3TextConfig, tied: bool = False) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in kind(config).state_dict().items()}
    return {name: shape for name, shape in shapes.items() if not (tied and name == HEAD)}


# -- counting


def _by_part(named: Iterable[tuple[str, TensorEntry]]) -> dict[str, list[TensorEntry]]:
    parts: dict[str, list[TensorEntry]] = {name: [] for name, _ in PARTS}
    for name, entry in named:
        parts[next((part for part, prefix in PARTS if name.startswith(prefix)), "trunk")].append(entry)
    return parts


def _part(entries: list[TensorEntry]) -> dict[str, Any]:
    return {
        "parameters": sum(entry.count for entry in entries),
        "bytes": sum(entry.nbytes for entry in entries),
        "types": sorted({entry.dtype for entry in entries}),
    }


def _memory(tensors: dict[str, list[TensorEntry]], config: Emu3TextConfig | None) -> dict[str, int]:
    """Bytes in memory: as stored, by type of the decoder (the vision tokenizer keeps its own), rounded, and of the cache."""
    decoder = [entry for name, entries in tensors.items() if name not in (VISION, "unused") for entry in entries]
    vision = sum(entry.nbytes for entry in tensors.get(VISION, ()))
    count = sum(entry.count for entry in decoder)
    memory = {"as stored": sum(entry.nbytes for entry in decoder) + vision}
    memory |= {name: count * size + vision for name, size in BYTES.items()}
    linear = [entry for entry in tensors.get("trunk", ()) if len(entry.shape) == 2]
    head = list(tensors.get("head", ()))
    # What quantization.quantize rounds, with a bfloat16 scale a row (int8), or scale and zero a group of 128 (int4).
    saved8 = sum(entry.count - 2 * entry.shape[0] for entry in linear + head)
    saved4 = sum(int(entry.count * (2 - 0.5 - 4 / 128)) for entry in linear)
    memory |= {"int8": memory["bfloat16"] - saved8, "int4": memory["bfloat16"] - saved4}
    if config:
        width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        memory[f"cache of {CACHE_POSITIONS} positions"] = 2 * 2 * CACHE_POSITIONS * width * config.num_hidden_layers
    return memory


def _sizes(config: Emu3TextConfig) -> dict[str, int]:
    named = {"layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads", "key heads": "num_key_value_heads"}
    named |= {"ids": "vocab_size", "positions": "max_position_embeddings"}
    return {name: getattr(config, field) for name, field in named.items()}


def _vocabulary(vocabulary: Vocabulary | None) -> dict[str, Any] | None:
    if vocabulary is None:
        return None
    kind = "Emu3" if isinstance(vocabulary, Emu3Vocabulary) else "compact"
    named = {"ids": "size", "text": "text_size", "action": "action_size", "codes": "codebook_size", "codes a position": "codes_per_block"}
    return {"kind": kind} | {name: getattr(vocabulary, field) for name, field in named.items()}


def _abilities(facts: dict[str, Any], vocabulary: Vocabulary | None, folder: Path, layout: layouts.Layout) -> dict[str, str]:
    """What its parts allow, whatever it was trained for: empty, or why not."""
    tokenizers, absent = facts["tokenizers"], facts["absent"]
    writes = (
        "no whole decoder with an output head" if facts["kind"] is None or not facts["tensors"].get("head") and not _tied(facts) else ""
    )
    known = "" if vocabulary else "its vocabulary is not known"
    text = "" if tokenizers[TEXT] else f"no {TEXT}"
    pictures = "" if tokenizers[VISION] else f"no {VISION}"
    actions = "" if vocabulary and vocabulary.action_size else "its vocabulary has no actions"
    parts = f"no {', '.join(absent)}" if absent else ""
    return {
        "act": writes or known or actions or parts,
        "draw": writes or known or text or pictures,
        "film": writes or known or text or pictures,
        "answer": writes or known or text or pictures,
    }


def _tied(facts: dict[str, Any]) -> bool:
    return bool(facts["config"] and facts["config"].tie_word_embeddings)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
