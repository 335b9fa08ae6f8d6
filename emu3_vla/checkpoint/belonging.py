"""Do a checkpoint's tokenizers belong to its model? By size, for every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emu3_vla.checkpoint.errors import CheckpointError
from emu3_vla.vocabulary import SPECIALS, CompactVocabulary, Emu3Vocabulary, Vocabulary

# What configurations in BAAI's layout state, and which of Emu3's specials that is.
STATED_IDS = {
    "img_token_id": "<|image token|>",
    "boi_token_id": "<|image start|>",
    "eoi_token_id": "<|image end|>",
    "eol_token_id": "<|extra_200|>",
    "eof_token_id": "<|extra_201|>",
}


def emu3_vocabulary(values: dict[str, Any], vocab_size: int, *, action_size: int) -> Emu3Vocabulary | None:
    """Emu3's vocabulary if a model of this config.json has it, which its size tells; else None.

    Raises CheckpointError where the size is Emu3's and the specials are not.
    """
    if vocab_size != Emu3Vocabulary.size:
        return None
    wrong = mismatched_ids(values)
    if wrong:
        raise CheckpointError(f"config.json has Emu3's {vocab_size} ids, but {wrong[0]}")
    return Emu3Vocabulary(action_size=action_size)


def mismatched_ids(values: dict[str, Any]) -> list[str]:
    """Special ids in config.json that are not Emu3's, in words."""
    stated = {name: values[name] for name in STATED_IDS if values.get(name) is not None}
    return [f"{name} is {index}, not {SPECIALS[STATED_IDS[name]]}" for name, index in stated.items() if index != SPECIALS[STATED_IDS[name]]]


def check_belonging(
    folder: Path,
    *,
    vocab_size: int,
    vocabulary: Vocabulary | None,
    vision: Any = None,
    text: Any = None,
    action: Any = None,
    where: dict[str, Path] | None = None,
) -> None:
    """Sizes of the tokenizers against the vocabulary, or against the model's number of ids where its vocabulary is not known.

    where: files or folders to name in errors, by part; default: the folder in `folder` of that name. Raises CheckpointError.
    """
    where = where or {}
    sizes = [("vision_tokenizer", "codes", vision.codebook_size)] if vision is not None else []
    sizes += [("text_tokenizer", "ids", text.vocab_size)] if text is not None else []
    sizes += [("action_tokenizer", "ids", action.vocab_size)] if action is not None else []
    for part, what, found in sizes:
        place = where.get(part, folder / part)
        if vocabulary is None and found > vocab_size:
            raise CheckpointError(
                f"{place} does not belong to this model: {what} {found}, but {folder / 'config.json'} has {vocab_size} in all"
            )
        if vocabulary is not None:
            expected = {"vision_tokenizer": vocabulary.codebook_size, "text_tokenizer": vocabulary.text_size}.get(
                part, vocabulary.action_size
            )
            if found != expected:
                raise CheckpointError(f"{place} does not belong to this model: {what} {found}, the model's vocabulary has {expected}")
    if vision is not None and isinstance(vocabulary, CompactVocabulary):
        for grid in vocabulary.images:
            if vision.grid(grid.name) != (grid.rows, grid.columns):
                raise CheckpointError(
                    f"{where.get('vision_tokenizer', folder / 'vision_tokenizer')} does not belong to this model: grid of {grid.name} "
                    f"{vision.grid(grid.name)}, the model's vocabulary has {(grid.rows, grid.columns)}"
                )
