"""One call for every layout of a checkpoint: our folder, BAAI's repositories, Transformers' conversions, UniVLA's, and Llama exports.

    loaded = load("BAAI/Emu3-Gen", vision_tokenizer="BAAI/Emu3-VisionTokenizer", dtype=torch.bfloat16)
    loaded.model(input_ids).logits

Weights are mapped from their safetensors files, not copied, unless another type or device is asked for. No code of a checkpoint is run
and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from action_tokenizer import FastTokenizer
from emu3_vla import emu3_text
from emu3_vla.checkpoint import layouts
from emu3_vla.checkpoint.assemble import build_decoder, check_weights, decoder_kind, fill
from emu3_vla.checkpoint.belonging import check_belonging, emu3_vocabulary
from emu3_vla.checkpoint.errors import CheckpointError
from emu3_vla.checkpoint.folder import ACTION, TEXT, VISION, Checkpoint, load_folder
from emu3_vla.checkpoint.hub import find_folder
from emu3_vla.checkpoint.layouts import CONFIG, OURS, UNIVLA, Layout, SortedNames, read_json
from emu3_vla.checkpoint.weights import WeightFiles
from emu3_vla.emu3_text import Emu3TextTokenizer
from emu3_vla.vision_tokenizer import VisionTokenizer
from emu3_vla.vision_tokenizer.emu3 import Emu3Tokenizer
from emu3_vla.vocabulary import Emu3Vocabulary

VISION_FOLDERS = (VISION, "Emu3-VisionTokenizer")
"""Names under which a vision tokenizer is looked for, inside a decoder's folder and beside it."""


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    vision_tokenizer: str | Path | None = None,
    text_tokenizer: str | Path | None = None,
    action_tokenizer: str | Path | None = None,
) -> Checkpoint:
    """Read a checkpoint of any known layout: a folder, or a Hugging Face name ("organisation/name", "organisation/name@revision").

    dtype: of the decoder's parameters; default: as they are stored. The tokenizers keep their own.
    vision_tokenizer, action_tokenizer: folders (or Hugging Face names), and text_tokenizer: a folder or a *.tiktoken file, of the parts
    that a foreign layout keeps apart. Without them, what lies inside the checkpoint is taken, and a vision tokenizer also from beside it,
    under a name of VISION_FOLDERS.
    The model is Transformers' `Emu3ForCausalLM` (for a checkpoint without output head, `Emu3TextModel`; for ours, its subclass with
    vision blocks). Raises FileNotFoundError for a missing file, CheckpointError (or the part's own named error) for one that is damaged,
    pickled, of an unknown layout or does not belong to the model; each names the file.
    """
    folder = find_folder(path)
    layout = layouts.recognise(folder)
    if layout is OURS:
        if vision_tokenizer or text_tokenizer or action_tokenizer:
            raise CheckpointError(f"{folder} carries its own tokenizers; other ones can be named for checkpoints of other layouts alone")
        return load_folder(folder, device=device, dtype=dtype)
    files = WeightFiles.open(folder)
    names = known_names(files)
    config = layouts.decoder_config(layout, folder)
    where = find_tokenizers(folder, names, vision=vision_tokenizer, text=text_tokenizer, action=action_tokenizer)
    action = FastTokenizer.from_pretrained(where[ACTION]) if ACTION in where else None
    vocabulary = emu3_vocabulary(read_json(folder / CONFIG), config.vocab_size, action_size=_action_size(layout, action))
    vision = _vision_tokenizer(folder, files, names, where)
    text = Emu3TextTokenizer.from_pretrained(where[TEXT]) if TEXT in where else None
    sizes = {"vocab_size": config.vocab_size, "vocabulary": vocabulary}
    check_belonging(folder, **sizes, vision=vision, text=text, action=action, where=where)
    kind, decoder_names = decoder_kind(names.decoder, config)
    return Checkpoint(
        folder=folder,
        layout=layout.name,
        model=build_decoder(kind, config, files, decoder_names, device=device, dtype=dtype),
        vocabulary=vocabulary,
        vision_tokenizer=None if vision is None else vision.to(device),
        text_tokenizer=text,
        action_tokenizer=action,
        normalizer=None,
        policy=None,
        provenance={},
        unused_weights=tuple(names.unused),
    )


def known_names(files: WeightFiles) -> SortedNames:
    """The checkpoint's names, sorted. Raises CheckpointError where one belongs to no Emu3 checkpoint."""
    names = layouts.sort_names(files.tensors)
    if names.unknown:
        raise CheckpointError(
            f"{files.where(names.unknown[0])} holds {names.unknown[0]} and {len(names.unknown) - 1} more weights that no Emu3 decoder has; "
            f"is it another architecture's? Known layouts: {layouts.known()}"
        )
    return names


def find_tokenizers(
    folder: Path,
    names: SortedNames,
    *,
    vision: str | Path | None = None,
    text: str | Path | None = None,
    action: str | Path | None = None,
) -> dict[str, Path]:
    """Where each tokenizer of a foreign checkpoint lies: those given, else those that are found. A part that is nowhere has no entry."""
    where: dict[str, Path] = {}
    if vision is not None:
        where[VISION] = find_folder(vision)
    elif names.vision:
        where[VISION] = folder / CONFIG
    else:
        candidates = [place / name for place in (folder, folder.resolve().parent) for name in VISION_FOLDERS]
        found = [path for path in candidates if (path / CONFIG).is_file()]
        if found:
            where[VISION] = found[0]
    if text is not None:
        where[TEXT] = emu3_text.find_file(Path(text))
    else:
        with contextlib.suppress(FileNotFoundError):
            where[TEXT] = emu3_text.find_file(folder)
    if action is not None:
        where[ACTION] = find_folder(action)
    elif (folder / ACTION).is_dir():
        where[ACTION] = folder / ACTION
    return where


def _action_size(layout: Layout, action: FastTokenizer | None) -> int:
    """How many ids mean actions: as the tokenizer has, or as UniVLA's models were trained with, or none."""
    if action is not None:
        return action.vocab_size
    return Emu3Vocabulary().action_size if layout is UNIVLA else 0


def _vision_tokenizer(folder: Path, files: WeightFiles, names: SortedNames, where: dict[str, Path]) -> VisionTokenizer | None:
    if where.get(VISION) == folder / CONFIG:
        return _inner_vision_tokenizer(folder, files, names)
    return VisionTokenizer.from_pretrained(where[VISION]) if VISION in where else None


def _inner_vision_tokenizer(folder: Path, files: WeightFiles, names: SortedNames) -> Emu3Tokenizer:
    """The vision tokenizer among the weights of Transformers' Emu3ForConditionalGeneration."""
    path = folder / CONFIG
    values = read_json(path).get("vq_config")
    if not isinstance(values, dict):
        raise CheckpointError(f"{files.where(next(iter(names.vision.values())))} holds a vision tokenizer, but {path} has no vq_config")
    with torch.device("meta"):
        tokenizer = Emu3Tokenizer.from_config(values, where=str(path))
    check_weights(files, names.vision, {name: tuple(tensor.shape) for name, tensor in tokenizer.vqvae.state_dict().items()})
    fill(tokenizer.vqvae, files, names.vision)
    return tokenizer.eval()
