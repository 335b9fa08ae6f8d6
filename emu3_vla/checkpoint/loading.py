"""One call for every layout of a checkpoint: our folder, BAAI's repositories, Transformers' conversions, UniVLA's, and Llama exports.

    loaded = load("BAAI/Emu3-Gen", vision_tokenizer="BAAI/Emu3-VisionTokenizer", dtype=torch.bfloat16)
    loaded.model(input_ids).logits

Weights are mapped from their safetensors files, not copied, unless another type or device is asked for. No code of a checkpoint is run
and nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

import torch

from action_tokenizer import FastTokenizer
from emu3_vla.checkpoint import layouts
from emu3_vla.checkpoint.assemble import build_decoder, check_weights, decoder_kind, fill
from emu3_vla.checkpoint.errors import CheckpointError
from emu3_vla.checkpoint.folder import ACTION, VISION, Checkpoint, load_folder
from emu3_vla.checkpoint.hub import find_folder
from emu3_vla.checkpoint.layouts import CONFIG, OURS, TRANSFORMERS, Layout, SortedNames, read_json
from emu3_vla.checkpoint.weights import WeightFiles
from emu3_vla.vision_tokenizer import VisionTokenizer
from emu3_vla.vision_tokenizer.emu3 import Emu3Tokenizer

VISION_FOLDERS = (VISION, "Emu3-VisionTokenizer")
"""Names under which a vision tokenizer is looked for, inside a decoder's folder and beside it."""


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    vision_tokenizer: str | Path | None = None,
    action_tokenizer: str | Path | None = None,
) -> Checkpoint:
    """Read a checkpoint of any known layout: a folder, or a Hugging Face name ("organisation/name", "organisation/name@revision").

    dtype: of the decoder's parameters; default: as they are stored. The tokenizers keep their own.
    vision_tokenizer, action_tokenizer: folders (or Hugging Face names) of the parts that a foreign layout keeps apart. Without the first,
    the vision tokenizer inside the checkpoint is taken, or one that lies in it or beside it under a name of VISION_FOLDERS.
    The model is Transformers' `Emu3ForCausalLM` (for a checkpoint without output head, `Emu3TextModel`; for ours, its subclass with
    vision blocks). Raises FileNotFoundError for a missing file, CheckpointError (or the part's own named error) for one that is damaged,
    pickled, of an unknown layout or does not belong to the model; each names the file.
    """
    folder = find_folder(path)
    layout = layouts.recognise(folder)
    if layout is OURS:
        if vision_tokenizer or action_tokenizer:
            raise CheckpointError(f"{folder} carries its own tokenizers; vision_tokenizer= and action_tokenizer= are for other layouts")
        return load_folder(folder, device=device, dtype=dtype)
    files = WeightFiles.open(folder)
    names = known_names(files)
    vision = _vision_tokenizer(folder, layout, files, names, vision_tokenizer)
    config = layouts.decoder_config(layout, folder)
    kind, decoder_names = decoder_kind(names.decoder, config)
    model = build_decoder(kind, config, files, decoder_names, device=device, dtype=dtype)
    return Checkpoint(
        folder=folder,
        layout=layout.name,
        model=model,
        vocabulary=None,
        vision_tokenizer=None if vision is None else vision.to(device),
        text_tokenizer=None,
        action_tokenizer=_action_tokenizer(folder, action_tokenizer),
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


def find_vision_tokenizer(folder: Path) -> Path | None:
    """The folder of the vision tokenizer that lies in a decoder's folder or beside it, if there is one."""
    beside = folder.resolve().parent
    for candidate in [place / name for place in (folder, beside) for name in VISION_FOLDERS]:
        if (candidate / CONFIG).is_file():
            return candidate
    return None


def _vision_tokenizer(
    folder: Path, layout: Layout, files: WeightFiles, names: SortedNames, given: str | Path | None
) -> VisionTokenizer | None:
    if given is not None:
        return VisionTokenizer.from_pretrained(find_folder(given))
    if names.vision:
        return _inner_vision_tokenizer(folder, layout, files, names)
    found = find_vision_tokenizer(folder)
    return None if found is None else VisionTokenizer.from_pretrained(found)


def _inner_vision_tokenizer(folder: Path, layout: Layout, files: WeightFiles, names: SortedNames) -> Emu3Tokenizer:
    """The vision tokenizer among the weights of Transformers' Emu3ForConditionalGeneration."""
    where = folder / CONFIG
    values = read_json(where).get("vq_config")
    if layout is not TRANSFORMERS or not isinstance(values, dict):
        raise CheckpointError(
            f"{files.where(names.vision[next(iter(names.vision))])} holds a vision tokenizer, but {where} has no vq_config"
        )
    with torch.device("meta"):
        tokenizer = Emu3Tokenizer.from_config(values, where=str(where))
    expected = {name: tuple(tensor.shape) for name, tensor in tokenizer.vqvae.state_dict().items()}
    check_weights(files, names.vision, expected)
    fill(tokenizer.vqvae, files, names.vision)
    return tokenizer.eval()


def _action_tokenizer(folder: Path, given: str | Path | None) -> FastTokenizer | None:
    if given is not None:
        return FastTokenizer.from_pretrained(find_folder(given))
    return FastTokenizer.from_pretrained(folder / ACTION) if (folder / ACTION).is_dir() else None
