"""The model that training starts from: a new one, or a checkpoint's weights, if these belong to the token store."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import yaml

from emu3_vla import attention, checkpoint
from emu3_vla.data.tokens import VISION, content_hash, hashes
from emu3_vla.model import BlockEmu3ForCausalLM, PlainEmu3ForCausalLM, build_config, build_plain_config
from emu3_vla.number_words import SpelledNumbers
from emu3_vla.training.source import Source
from emu3_vla.vocabulary import CompactVocabulary, Emu3Vocabulary, load_vocabulary

if TYPE_CHECKING:
    from emu3_vla.training.loop import TrainConfig

PLACES = "blocks.places.weight"
WAVES = 6
"""Lengths of the waves that embeddings of numbers begin as: from four times the range, halved each time."""


class ForeignTokens(ValueError):
    """A token store whose ids mean something else than those that the checkpoint was trained on."""


def new_model(config: TrainConfig, source: Source) -> BlockEmu3ForCausalLM | PlainEmu3ForCausalLM:
    """The model before its first step, seeded. Raises ForeignTokens, and CheckpointError for weights of other sizes."""
    torch.manual_seed(config.seed)
    model = outline(config, source)
    if config.init_from:
        model.load_state_dict(_given_weights(Path(config.init_from), model, source))
    elif config.codes_from_tokenizer and isinstance(model, BlockEmu3ForCausalLM):
        vision = source.store.tokenizers().vision
        model.blocks.start_from_codebook(vision.vectors(torch.arange(vision.codebook_size)))
    for spelled in (source.states(), source.scenes()):
        if spelled and not config.init_from:
            start_numbers_smoothly(model.model.embed_tokens.weight, spelled)
    if isinstance(model, BlockEmu3ForCausalLM):
        model.blocks.codes.weight.requires_grad_(config.learn_codes)
    elif not config.learn_codes:
        raise ValueError("learn_codes=false keeps the embeddings of codes in blocks; Emu3's own vocabulary has none")
    if config.context:
        attention.confine(model)
    return model


def outline(config: TrainConfig, source: Source) -> BlockEmu3ForCausalLM | PlainEmu3ForCausalLM:
    """The model that a run trains, before its weights."""
    if isinstance(source.vocabulary, Emu3Vocabulary):
        return PlainEmu3ForCausalLM(build_plain_config(source.vocabulary, **config.model.plain_arguments()))
    return BlockEmu3ForCausalLM(build_config(source.vocabulary, **config.model.arguments()))


def _given_weights(folder: Path, model: BlockEmu3ForCausalLM | PlainEmu3ForCausalLM, source: Source) -> dict[str, torch.Tensor]:
    given = load_vocabulary(folder / checkpoint.MODEL / checkpoint.VOCABULARY)
    require_same_tokens(folder, given, source)
    _require_same_states(folder, source)
    if given == source.vocabulary:
        return checkpoint.load_weights(folder / checkpoint.MODEL, model.config, type(model))
    other_places = copy.deepcopy(model.config)
    other_places.num_places = given.num_places
    weights = checkpoint.load_weights(folder / checkpoint.MODEL, other_places, type(model))
    return weights | {PLACES: stretched_places(weights[PLACES], given, source.vocabulary)}


def require_same_tokens(folder: Path, given: CompactVocabulary | Emu3Vocabulary, source: Source) -> None:
    """Raise ForeignTokens where ids of the token store mean something else than in the checkpoint. Images may be larger or smaller."""
    if _without_sizes(given) != _without_sizes(source.vocabulary):
        raise ForeignTokens(
            f"init_from={folder} was trained with the vocabulary {given}, the token store {source.store} has {source.vocabulary}; "
            "start from a checkpoint of the same tokenizers, or tokenize with the checkpoint's"
        )
    found = hashes(folder)
    for name, digest in hashes(source.folder).items():
        if given != source.vocabulary and name == VISION:  # its configuration states the sizes; its weights must be the same
            digest, found[name] = _weights_hash(source.folder / VISION), _weights_hash(folder / VISION)
        if found[name] != digest:
            raise ForeignTokens(
                f"init_from={folder} was trained with another {name} (SHA-256 {found[name][:12]}…) than the token store {source.store} was "
                f"written with ({digest[:12]}…); tokenize with the checkpoint's own: {name.removesuffix('.json')}={folder / name}"
            )


@torch.no_grad()
def start_numbers_smoothly(weight_VH: torch.Tensor, spelled: SpelledNumbers) -> None:
    """Give neighbouring bins of a number embeddings that are alike, so that what is learnt of one holds near it.

    They are waves of a few lengths over the number's range, mixed at random. Where words take several ids, these stay as they are.
    """
    ids = spelled.single_ids()
    if ids is None:
        return
    scale, width = weight_VH.std(), weight_VH.shape[1]
    for row in torch.from_numpy(ids):
        phases = torch.linspace(0, torch.pi, len(row))[:, None] * 2.0 ** torch.arange(-1, WAVES - 1)
        waves = torch.cat([phases.sin(), phases.cos()], dim=1)
        weight_VH[row] = scale * (waves @ torch.randn(waves.shape[1], width) / WAVES**0.5).to(weight_VH.dtype)


def _require_same_states(folder: Path, source: Source) -> None:
    settings = folder / checkpoint.POLICY
    given = yaml.safe_load(settings.read_text()) if settings.exists() else {}
    for name, what in (("state", "the arm's state"), ("scene", "what there is to see")):
        wanted = source.store.metadata.get(name)
        if given.get(name) != wanted and (given.get(name) or name == "state"):
            raise ForeignTokens(
                f"init_from={folder} says {what} as {given.get(name)}, the token store {source.store} as {wanted}; tokenize with the same"
            )


def stretched_places(weight_PH: torch.Tensor, given: CompactVocabulary, wanted: CompactVocabulary) -> torch.Tensor:
    """Embeddings of block places for images of other sizes, interpolated over each image's rows and columns: (places, H)."""
    parts = []
    for grid in wanted.images:
        old, side = given.grid(grid.name), wanted.block_size
        image = weight_PH[list(given.places(grid.name))].unflatten(0, (old.rows // side, old.columns // side))
        size = (grid.rows // side, grid.columns // side)
        stretched = F.interpolate(image.movedim(-1, 0)[None].float(), size=size, mode="bilinear", align_corners=False)
        parts.append(stretched[0].flatten(1).T.to(weight_PH.dtype))
    return torch.cat(parts)


def _without_sizes(vocabulary: CompactVocabulary | Emu3Vocabulary) -> CompactVocabulary | Emu3Vocabulary | tuple:
    if isinstance(vocabulary, Emu3Vocabulary):
        return vocabulary
    names = tuple(grid.name for grid in vocabulary.images)
    return (vocabulary.text_size, vocabulary.action_size, vocabulary.codebook_size, vocabulary.block_size, names)


def _weights_hash(folder: Path) -> str:
    return content_hash(folder / "model.safetensors")
