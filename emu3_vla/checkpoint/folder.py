"""Our own checkpoint folder: a policy is one folder, and nothing in it unpickles.

    model/               config.json, model.safetensors (Hugging Face layout), vocabulary.json
    vision_tokenizer/  text_tokenizer/  action_tokenizer/  normalizer.json
    policy.yaml          how to act with it (may be edited)
    provenance.json      where it came from, and the SHA-256 of every file but these two

`load_folder` refuses a folder whose files are not the ones that were saved together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Emu3ForCausalLM, Emu3TextConfig, Emu3TextModel

from action_tokenizer import FastTokenizer
from action_tokenizer.normalizer import ActionNormalizer
from emu3_vla.checkpoint.assemble import HEAD, build_decoder, read_weights
from emu3_vla.checkpoint.belonging import check_belonging
from emu3_vla.checkpoint.errors import CheckpointError
from emu3_vla.checkpoint.layouts import CONFIG, OURS, read_json
from emu3_vla.checkpoint.weights import WeightFiles, write_weights
from emu3_vla.emu3_text import Emu3TextTokenizer
from emu3_vla.model import BlockEmu3Config, BlockEmu3ForCausalLM
from emu3_vla.number_words import NumberWords, StateWords
from emu3_vla.text import TextTokenizer
from emu3_vla.vision_tokenizer import VisionTokenizer
from emu3_vla.vocabulary import Emu3Vocabulary, Vocabulary, load_vocabulary
from envs.spec import ActionUnits

FORMAT = 1
MODEL, VISION, TEXT, ACTION = "model", "vision_tokenizer", "text_tokenizer", "action_tokenizer"
NORMALIZER, POLICY, PROVENANCE = "normalizer.json", "policy.yaml", "provenance.json"
VOCABULARY = "vocabulary.json"
TOKENIZER_PARTS = (VISION, TEXT, ACTION, NORMALIZER)

KINDS = {
    BlockEmu3Config.model_type: (BlockEmu3Config, BlockEmu3ForCausalLM),
    Emu3TextConfig.model_type: (Emu3TextConfig, Emu3ForCausalLM),
}
"""Models that model/ may hold, by the model_type in its config.json: ours with vision blocks, and Emu3 itself."""


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """policy.yaml: how the model acts.

    history: past chunks shown when acting, at most those it was trained with. temperature: of the action ids; 0 takes the likeliest.
    state: fields of StateWords where the arm's state is said before its actions, as in training; else none.
    scene: fields of NumberWords where the model says what there is to see before its actions; else none.
    scene_first: whether it also says, before it draws, films or foresees pictures, in these words and those of the state, what they show.
    actions: what an action of 1 is.
    """

    history: int
    trained_history: int
    horizon: int  # control steps of one chunk
    action_dim: int
    temperature: float = 0.0
    actions: ActionUnits = field(default_factory=ActionUnits)
    state: dict[str, Any] | None = None
    scene: dict[str, Any] | None = None
    scene_first: bool = False

    def __post_init__(self):
        if self.scene_first and self.scene is None:
            raise CheckpointError("scene_first is true, and scene does not say in which words")
        if self.state is not None:
            StateWords.of(self.state)
        if self.scene is not None:
            NumberWords.of(self.scene)
        if not 0 <= self.temperature < float("inf"):
            raise CheckpointError(f"temperature is {self.temperature}, expected at least 0")
        if not 0 <= self.history <= self.trained_history:
            raise CheckpointError(f"history is {self.history}, expected 0 to {self.trained_history}, which it was trained with")
        if self.horizon < 1 or self.action_dim < 1:
            raise CheckpointError(f"horizon {self.horizon} and action_dim {self.action_dim} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds; None for parts that it lacks. `model` is in evaluation mode.

    layout: the name of one of `layouts.LAYOUTS`. unused_weights: names of weights in the files that this program has no use for.
    """

    folder: Path
    model: BlockEmu3ForCausalLM | Emu3ForCausalLM | Emu3TextModel
    vocabulary: Vocabulary | None
    vision_tokenizer: VisionTokenizer | None
    text_tokenizer: TextTokenizer | Emu3TextTokenizer | None
    action_tokenizer: FastTokenizer | None
    normalizer: ActionNormalizer | None
    policy: PolicySettings | None
    provenance: dict[str, Any]
    layout: str = OURS.name
    unused_weights: tuple[str, ...] = ()

    def require_policy(self) -> Checkpoint:
        """Itself, if it has all that acting needs. Raises CheckpointError naming what is missing."""
        parts = {VISION: self.vision_tokenizer, TEXT: self.text_tokenizer, ACTION: self.action_tokenizer}
        parts |= {NORMALIZER: self.normalizer, POLICY: self.policy}
        missing = [name for name, part in parts.items() if part is None]
        if missing:
            raise CheckpointError(f"{self.folder} cannot act: {', '.join(missing)} missing")
        return self


def load_folder(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Checkpoint:
    """Read a checkpoint folder of ours.

    dtype: of the model; default: as it was saved. Raises FileNotFoundError for a missing file, CheckpointError (or the part's own
    named error) for one that is damaged or does not belong to the model, each naming the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; a checkpoint is a folder with {MODEL}/ and {PROVENANCE} in it")
    provenance = read_json(folder / PROVENANCE)
    _check_files(folder, provenance)
    vocabulary = load_vocabulary(folder / MODEL / VOCABULARY)
    model = _load_model(folder / MODEL, vocabulary, device, dtype)
    vision = VisionTokenizer.from_pretrained(folder / VISION).to(device) if (folder / VISION).exists() else None
    text = Emu3TextTokenizer if isinstance(vocabulary, Emu3Vocabulary) else TextTokenizer
    checkpoint = Checkpoint(
        folder=folder,
        model=model,
        vocabulary=vocabulary,
        vision_tokenizer=vision,
        text_tokenizer=text.from_pretrained(folder / TEXT) if (folder / TEXT).exists() else None,
        action_tokenizer=FastTokenizer.from_pretrained(folder / ACTION) if (folder / ACTION).exists() else None,
        normalizer=ActionNormalizer.load(folder / NORMALIZER) if (folder / NORMALIZER).exists() else None,
        policy=read_policy(folder / POLICY) if (folder / POLICY).exists() else None,
        provenance=provenance,
    )
    _check_belonging(checkpoint)
    return checkpoint


def save(
    folder: Path,
    *,
    config: BlockEmu3Config | Emu3TextConfig,
    weights: dict[str, torch.Tensor],
    vocabulary: Vocabulary,
    tokenizers: Path,
    policy: PolicySettings,
    provenance: dict[str, Any],
) -> None:
    """Write a checkpoint folder, whole or not at all.

    weights: by parameter name. tokenizers: a folder that holds vision_tokenizer/, text_tokenizer/, action_tokenizer/ and
    normalizer.json, such as a token store. Raises FileExistsError if `folder` is there, FileNotFoundError if a tokenizer is not.
    """
    with _written(folder, policy, provenance) as temporary:
        _write_model(temporary / MODEL, config, weights, vocabulary)
        for part in TOKENIZER_PARTS:
            if not (tokenizers / part).exists():
                raise FileNotFoundError(f"{tokenizers / part} is missing, so no checkpoint was written")
            copy = shutil.copytree if (tokenizers / part).is_dir() else shutil.copyfile
            copy(tokenizers / part, temporary / part)


def save_loaded(checkpoint: Checkpoint, folder: str | Path, *, provenance: dict[str, Any] | None = None) -> None:
    """Write a checkpoint that was loaded, from whatever layout, as a folder of ours with the parts that it has, whole or not at all.

    The model is written as it is now, so one that was changed (an adapter merged, trained further) is saved changed.
    provenance: entries to add to those that it came with. Raises FileExistsError, and CheckpointError for a model that has no output head
    or no known vocabulary (without which nobody knows what its ids mean) or whose weights are quantised.
    """
    folder, model = Path(folder), checkpoint.model
    kind, _ = KINDS.get(model.config.model_type, (None, None))
    if checkpoint.vocabulary is None or kind is None or isinstance(model, Emu3TextModel):
        lacks = "a known vocabulary" if checkpoint.vocabulary is None else "an output head"
        raise CheckpointError(f"{checkpoint.folder} has not {lacks}, so it cannot be saved as a folder of this program; export it instead")
    came_with = _story(checkpoint.provenance)
    with _written(folder, checkpoint.policy, came_with | (provenance or {})) as temporary:
        _write_model(temporary / MODEL, model.config, plain_weights(model), checkpoint.vocabulary)
        for name, part in ((VISION, checkpoint.vision_tokenizer), (TEXT, checkpoint.text_tokenizer), (ACTION, checkpoint.action_tokenizer)):
            if part is not None:
                part.save_pretrained(temporary / name)
        if checkpoint.normalizer is not None:
            checkpoint.normalizer.save(temporary / NORMALIZER)


def plain_weights(model: Emu3ForCausalLM | Emu3TextModel) -> dict[str, torch.Tensor]:
    """What the files of a model hold: its weights by name, a head that is the embedding left out.

    Raises CheckpointError for adapters that are not merged and for quantised weights, which these files cannot hold.
    """
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights.pop(HEAD, None)
    for name, tensor in weights.items():
        if ".lora_" in name or ".base_layer." in name:
            raise CheckpointError(
                f"this model carries an adapter ({name}); merge it first (emu3_vla.lora.merge), or save the adapter alone"
            )
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise CheckpointError(f"{name} is quantised ({type(tensor).__name__}); save or export the model as it was before")
    return weights


def load_weights(
    folder: Path, config: BlockEmu3Config | Emu3TextConfig, kind: type[Emu3ForCausalLM] = BlockEmu3ForCausalLM
) -> dict[str, torch.Tensor]:
    """Weights of a model/ folder, checked against what a model of this kind and `config` has. Raises FileNotFoundError, CheckpointError."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in kind(config).state_dict().items()}
    return read_weights(folder, expected)


def read_config(folder: Path) -> BlockEmu3Config | Emu3TextConfig:
    """The configuration in a model/ folder. Raises what reading JSON raises, and CheckpointError for another kind of model."""
    values = read_json(folder / CONFIG)
    kind = values.get("model_type")
    if kind not in KINDS:
        raise CheckpointError(f"{folder / CONFIG}: model_type is {kind!r}, expected {' or '.join(map(repr, KINDS))}")
    return KINDS[kind][0](**values)


def _load_model(
    folder: Path, vocabulary: Vocabulary, device: str | torch.device, dtype: torch.dtype | None
) -> BlockEmu3ForCausalLM | Emu3ForCausalLM:
    config = read_config(folder)
    config_class, model_class = KINDS[config.model_type]
    sizes = {"vocab_size": vocabulary.head_size}
    if config_class is BlockEmu3Config:
        sizes |= {name: getattr(vocabulary, name) for name in ("codebook_size", "codes_per_block", "num_places")}
        config._attn_implementation = "eager"
    for name, size in sizes.items():
        if getattr(config, name) != size:
            raise CheckpointError(f"{folder / CONFIG}: {name} is {getattr(config, name)}, but {VOCABULARY} needs {size}")
    files = WeightFiles.open(folder)
    return build_decoder(model_class, config, files, {name: name for name in files.tensors}, device=device, dtype=dtype)


def came_from(folder: Path) -> dict[str, Any]:
    """What a checkpoint's provenance tells: all of it but its format and the hashes of its files. Raises FileNotFoundError."""
    return _story(read_json(folder / PROVENANCE))


def _story(provenance: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in provenance.items() if name not in ("format", "files")}


@contextlib.contextmanager
def _written(folder: Path, policy: PolicySettings | None, provenance: dict[str, Any]) -> Iterator[Path]:
    """A temporary folder to write the parts into, which becomes `folder` with their hashes when all of them are there."""
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; nothing was overwritten")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / MODEL).mkdir(parents=True)
    yield temporary
    files = {str(path.relative_to(temporary)): _sha256(path) for path in sorted(temporary.rglob("*")) if path.is_file()}
    if policy is not None:
        (temporary / POLICY).write_text(yaml.safe_dump({"format": FORMAT} | dataclasses.asdict(policy), sort_keys=False))
    record = {"format": FORMAT} | provenance | {"files": files}
    (temporary / PROVENANCE).write_text(json.dumps(record, indent=1, default=str, allow_nan=False) + "\n")  # infinity is no JSON
    os.rename(temporary, folder)


def _write_model(folder: Path, config: Emu3TextConfig, weights: dict[str, torch.Tensor], vocabulary: Vocabulary) -> None:
    config.save_pretrained(folder)
    name_architecture(folder / CONFIG, KINDS[config.model_type][1], next(iter(weights.values())).dtype)
    write_weights(folder, weights)
    vocabulary.save(folder / VOCABULARY)


def _check_files(folder: Path, provenance: dict[str, Any]) -> None:
    """Every file is the one that was saved: so the tokenizers are this model's, and nothing is cut short."""
    files = provenance.get("files")
    if provenance.get("format") != FORMAT or not isinstance(files, dict):
        raise CheckpointError(f"{folder / PROVENANCE} is not that of a checkpoint of format {FORMAT}")
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; copy the whole checkpoint folder again")
        if _sha256(path) != digest:
            raise CheckpointError(
                f"{path} is not the file that was saved with this model: it is damaged, cut short ({path.stat().st_size} bytes) "
                "or another checkpoint's; copy the whole checkpoint folder again"
            )


def _check_belonging(checkpoint: Checkpoint) -> None:
    """Sizes of the tokenizers against the vocabulary. The hashes say the same of a folder that `save` wrote; this says it by size."""
    check_belonging(
        checkpoint.folder,
        vocab_size=checkpoint.vocabulary.size,
        vocabulary=checkpoint.vocabulary,
        vision=checkpoint.vision_tokenizer,
        text=checkpoint.text_tokenizer,
        action=checkpoint.action_tokenizer,
    )
    normalizer, policy = checkpoint.normalizer, checkpoint.policy
    if normalizer is not None and policy is not None and normalizer.action_dim != policy.action_dim:
        raise CheckpointError(
            f"{checkpoint.folder / NORMALIZER} does not belong to this model: action dimensions {normalizer.action_dim}, "
            f"{POLICY} has {policy.action_dim}"
        )


def read_policy(path: Path) -> PolicySettings:
    """The settings in a policy.yaml. Raises FileNotFoundError, CheckpointError."""
    try:
        values = yaml.safe_load(path.read_text())
        if values.pop("format") != FORMAT:
            raise CheckpointError(f"{path} is not of format {FORMAT}")
        return PolicySettings(**values | {"actions": ActionUnits(**values.get("actions", {}))})
    except FileNotFoundError:
        raise
    except (yaml.YAMLError, TypeError, AttributeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be used: {type(error).__name__}: {error}") from error


def name_architecture(path: Path, kind: type, dtype: torch.dtype) -> None:
    """config.json as `PreTrainedModel.save_pretrained` would have it: a bare configuration does not know its model's class."""
    values = json.loads(path.read_text())
    values |= {"architectures": [kind.__name__], "dtype": str(dtype).removeprefix("torch.")}
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
