"""The model that training starts from: a new one, or a checkpoint's weights, if these belong to the token store."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml

from emu3_vla import attention, checkpoint
from emu3_vla.checkpoint.folder import read_config
from emu3_vla.checkpoint.hub import find_folder
from emu3_vla.data.tokens import VISION, content_hash, hashes
from emu3_vla.model import BlockEmu3ForCausalLM, PlainEmu3ForCausalLM, build_config, build_plain_config
from emu3_vla.number_words import SpelledNumbers
from emu3_vla.training.source import Source
from emu3_vla.vocabulary import CompactVocabulary, Emu3Vocabulary, load_vocabulary

if TYPE_CHECKING:
    from emu3_vla.training.loop import TrainConfig

PLACES, DEPTH_STATE, DEPTH_BEFORE = "blocks.places.weight", "depth.state.weight", "depth.before.weight"
FORETOLD, FORETOLD_PLACES, FORETOLD_SIZE = "depth.foretold.", "depth.foretold.places.weight", "foretold_size"
WAVES = 6
"""Lengths of the waves that embeddings of numbers begin as: from four times the range, halved each time."""
OF_TRAINING = ("dropout", "hide_codes", "depth_noise")  # among model.*: another run may choose others


class ForeignTokens(ValueError):
    """A token store whose ids mean something else than those that the checkpoint was trained on."""


def new_model(config: TrainConfig, source: Source) -> BlockEmu3ForCausalLM | PlainEmu3ForCausalLM:
    """The model before its first step, seeded. Raises ForeignTokens, and CheckpointError for weights of other sizes."""
    torch.manual_seed(config.seed)
    model = outline(config, source)
    if config.init_from:
        model.load_state_dict(_given_weights(find_folder(config.init_from), model, source))
    elif config.codes_from_tokenizer and isinstance(model, BlockEmu3ForCausalLM):
        vision = source.store.tokenizers().vision
        model.blocks.start_from_codebook(vision.vectors(torch.arange(vision.codebook_size)))
    if not config.init_from and isinstance(model, BlockEmu3ForCausalLM):
        _begin_foretold(model, source)
    for spelled in (source.states(), source.scenes()):
        if spelled and not config.init_from:
            start_numbers_smoothly(model.model.embed_tokens.weight, spelled)
    if isinstance(model, BlockEmu3ForCausalLM):
        model.blocks.codes.weight.requires_grad_(config.learn_codes)
    elif not config.learn_codes:
        raise ValueError("learn_codes=false keeps the embeddings of codes in blocks; Emu3's own vocabulary has none")
    for name in ("only_depth", "own_pictures"):
        if (value := getattr(config, name)) and not isinstance(model, BlockEmu3ForCausalLM):
            raise ValueError(f"{name}={value}, but Emu3's own vocabulary has no depth decoder: its codes are ids like any other")
    if config.only_depth:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("depth."))
    if config.context:
        attention.confine(model)
    return model


def as_init_from(config: TrainConfig) -> TrainConfig:
    """The configuration with what the checkpoint that training starts from brings: the model's sizes, and whether it foretells its
    pictures. As it is where that is none.

    Raises ValueError for a size that was asked for and that the checkpoint does not have, and what a damaged checkpoint raises.
    """
    if not config.init_from:
        return config
    folder = find_folder(config.init_from) / checkpoint.MODEL
    found, asked, usual = _sizes_in(folder), dataclasses.asdict(config.model), dataclasses.asdict(type(config.model)())
    for name, size in found.items():
        if asked[name] not in (size, usual[name]):
            raise ValueError(f"model.{name}={asked[name]}, but init_from={config.init_from} has {size}; leave model.{name} out")
    settings = find_folder(config.init_from) / checkpoint.POLICY
    foretells = settings.is_file() and checkpoint.read_policy(settings).scene_first
    # One that learns to act without its words falls silent altogether; see left_unsaid.
    scene_first = config.scene_first or (foretells and bool(config.scene_fraction or not _acts(config)))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **found), scene_first=scene_first)


def left_unsaid(config: TrainConfig) -> str:
    """A warning where the policy that training starts from says what it sees before it acts, and learns to act without; or nothing."""
    if not config.init_from or config.scene_fraction or config.only_depth or config.preference.pairs or not _acts(config):
        return ""
    settings = find_folder(config.init_from) / checkpoint.POLICY
    if not settings.is_file() or not checkpoint.read_policy(settings).scene:
        return ""
    return (
        f"warning: init_from={config.init_from} says what it sees before it acts, and with scene_fraction=0 it learns to act without and "
        "may forget what it could; tokenize with scene=checkpoint and give scene_fraction=0.85"
    )


def _acts(config: TrainConfig) -> bool:
    """Whether some of its documents act."""
    return not config.context or bool(config.mixture.act)


def _sizes_in(folder: Path) -> dict[str, Any]:
    """Those of loop.ModelSizes that the files of a model/ folder state."""
    from emu3_vla.training.loop import ModelSizes

    config = read_config(folder)  # as the model's class reads it: a file says nothing of sizes that came later
    others = {"rope_theta": config.rope_parameters["rope_theta"]}
    others |= {"block_size": getattr(load_vocabulary(folder / checkpoint.VOCABULARY), "block_size", 1)}
    of_none = set() if getattr(config, "foretold", ()) else {FORETOLD_SIZE}  # what reads foretold numbers may come later
    names = {field.name for field in dataclasses.fields(ModelSizes)} - {*OF_TRAINING, *of_none}
    return others | {name: getattr(config, name) for name in sorted(names) if hasattr(config, name)}


def outline(config: TrainConfig, source: Source) -> BlockEmu3ForCausalLM | PlainEmu3ForCausalLM:
    """The model that a run trains, before its weights."""
    if isinstance(source.vocabulary, Emu3Vocabulary):
        return PlainEmu3ForCausalLM(build_plain_config(source.vocabulary, **config.model.plain_arguments()))
    return BlockEmu3ForCausalLM(build_config(source.vocabulary, foretold=_foretold(config, source), **config.model.arguments()))


def _foretold(config: TrainConfig, source: Source) -> list[list[int]]:
    """What its depth decoder reads as numbers that a picture was foretold in (BlockEmu3Config): as in the checkpoint that training starts
    from, and where that does not, what a model that foretells its pictures says."""
    given = getattr(read_config(find_folder(config.init_from) / checkpoint.MODEL), "foretold", ()) if config.init_from else ()
    if given or not config.scene_first:
        return list(given)
    names: list[str] = []
    numbers: list[list[int]] = []
    for spelled in _said_before_pictures(source):
        ids_SB, words = spelled.single_ids(), spelled.words
        if ids_SB is None or (np.diff(ids_SB) != 1).any():
            return []  # words of several ids, or not one behind the other: the trunk alone reads those
        names += words.names
        for ids, to in zip(ids_SB.tolist(), words.relative or [""] * len(words.names), strict=True):
            numbers.append([ids[0], ids[-1] + 1, names.index(to) if to in names else -1])
    return numbers


def _said_before_pictures(source: Source) -> list[SpelledNumbers]:
    return [spelled for spelled in (source.states(), source.scenes()) if spelled]


def _begin_foretold(model: BlockEmu3ForCausalLM, source: Source) -> None:
    """New weights that read foretold numbers, where the model has some."""
    if model.depth.foretold is not None:
        words = [spelled.words for spelled in _said_before_pictures(source)]
        tables = [own.values(np.arange(own.bins)[:, None].repeat(len(own.names), 1)) for own in words]
        model.depth.foretold.begin([torch.from_numpy(column) for table in tables for column in table.T])


def _given_weights(folder: Path, model: BlockEmu3ForCausalLM | PlainEmu3ForCausalLM, source: Source) -> dict[str, torch.Tensor]:
    given = load_vocabulary(folder / checkpoint.MODEL / checkpoint.VOCABULARY)
    require_same_tokens(folder, given, source)
    _require_same_states(folder, source)
    if not isinstance(model, BlockEmu3ForCausalLM):
        return checkpoint.load_weights(folder / checkpoint.MODEL, model.config, type(model))
    others = copy.deepcopy(model.config)
    written = read_config(folder / checkpoint.MODEL)
    others.num_places, others.state_per_code, others.recall = given.num_places, written.state_per_code, written.recall
    others.foretold = written.foretold
    weights = checkpoint.load_weights(folder / checkpoint.MODEL, others, type(model))
    if not others.state_per_code:  # the same for every code, to begin with
        weights[DEPTH_STATE] = weights[DEPTH_STATE].repeat(others.codes_per_block, 1)
    if not others.recall:
        weights[DEPTH_BEFORE] = torch.zeros_like(model.depth.before.weight)
    of_places = [name for name in (PLACES, FORETOLD_PLACES) if name in weights]
    weights |= {name: stretched_places(weights[name], given, source.vocabulary) for name in of_places}
    if not others.foretold:
        _begin_foretold(model, source)
        weights |= {name: weight for name, weight in model.state_dict().items() if name.startswith(FORETOLD)}
    return weights


def require_same_tokens(folder: Path, given: CompactVocabulary | Emu3Vocabulary, source: Source) -> None:
    """Raise ForeignTokens where ids of the token store mean something else than in the checkpoint. Images may be larger or smaller."""
    if _without_sizes(given) != _without_sizes(source.vocabulary):
        raise ForeignTokens(
            f"init_from={folder} was trained with the vocabulary {given}, the token store {source.store} has {source.vocabulary}; "
            "start from a checkpoint of the same tokenizers, or tokenize with the checkpoint's"
        )
    acts = folder / checkpoint.POLICY
    if acts.is_file() and (units := checkpoint.read_policy(acts).actions) != source.units:
        raise ForeignTokens(
            f"the actions of init_from={folder} are {units}, those of the token store {source.store} {source.units}; convert the "
            f"recordings with position_unit_m={units.position_unit_m:g}, rotation_unit_rad={units.rotation_unit_rad:g}, "
            f"at {units.rate_hz:g} Hz"
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
        # Recordings need not know what there was to see: then the model acts without saying it.
        if _without_relations(given.get(name)) != _without_relations(wanted) and (name == "state" or (given.get(name) and wanted)):
            raise ForeignTokens(
                f"init_from={folder} says {what} as {given.get(name)}, the token store {source.store} as {wanted}; tokenize with the same"
            )


def _without_relations(fields: dict[str, Any] | None) -> dict[str, Any] | None:
    """What decides which words are said, which a number's relation to another does not."""
    return fields and {name: value for name, value in fields.items() if name != "relative"}


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
