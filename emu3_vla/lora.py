"""LoRA adapters on any loaded decoder, through PEFT: attach, train, save, load, merge.

    adapted = attach(loaded.model, LoraSettings(rank=16))      # only the adapter's weights are trainable now
    ...                                                        # train loaded.model as before
    save_adapter(adapted, "adapter")                           # adapter_config.json, adapter_model.safetensors; opens in PEFT too
    adapted = load_adapter(emu3_vla.load(folder).model, "adapter")
    merge(adapted)                                             # loaded.model is a plain decoder again, with the adapter in its weights
    checkpoint.save_loaded(loaded, "merged")

The layers are changed in place: `loaded.model` is the same object before and after, so models with vision blocks go on working through
their own methods (`embed`, `states`, `depth`). Their adapters sit in the trunk; the depth decoder is small and stays as it is.
Source: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from emu3_vla.checkpoint.weights import PICKLES

if TYPE_CHECKING:
    from peft import PeftModel

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class LoraError(ValueError):
    """An adapter that cannot be attached, read or merged."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Which adapters to attach."""

    rank: int = 16
    alpha: float = 32.0  # the adapter's output is scaled by alpha / rank
    dropout: float = 0.0  # of the adapter's input, while training
    targets: tuple[str, ...] = PROJECTIONS  # linear layers of each decoder layer

    def __post_init__(self):
        unknown = set(self.targets) - set(PROJECTIONS)
        if unknown or not self.targets:
            raise LoraError(f"targets are {list(self.targets)}, expected some of {', '.join(PROJECTIONS)}")
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise LoraError(
                f"rank {self.rank}, alpha {self.alpha} and dropout {self.dropout}: expected at least 1, above 0, and 0 to below 1"
            )


def attach(model: PreTrainedModel, settings: LoraSettings | None = None) -> PeftModel:
    """Put new adapters into the decoder's layers and freeze all else. A new adapter changes nothing: its second matrix is zero.

    The adapters are float32 whatever the model's type, because small updates vanish in bfloat16.
    Returns PEFT's view of `model`, for saving and merging. Raises LoraError if it has adapters already or is quantised.
    """
    peft = _peft()
    _refuse(model)
    settings = settings or LoraSettings()
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        # The trunk's layers alone, by their full names: the depth decoder and the vision tokenizer have layers of similar names.
        target_modules=rf"(model\.)?layers\.\d+\.(self_attn|mlp)\.({'|'.join(settings.targets)})",
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=True)


def save_adapter(adapted: PeftModel, folder: str | Path) -> None:
    """Write the adapter alone, as PEFT lays it out, in safetensors. Raises FileExistsError rather than overwrite one."""
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG).exists():
        raise FileExistsError(f"{folder / ADAPTER_CONFIG} is there already; nothing was overwritten")
    adapted.save_pretrained(folder, safe_serialization=True)


def load_adapter(model: PreTrainedModel, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter into `model`. trainable: to go on training it.

    Raises FileNotFoundError, and LoraError for a pickled, damaged or foreign adapter, naming the file.
    """
    peft = _peft()
    _refuse(model)
    folder = Path(folder)
    pickles = [path.name for path in folder.glob("adapter_model.*") if path.suffix in PICKLES]
    if pickles and not (folder / ADAPTER_WEIGHTS).is_file():
        raise LoraError(f"{folder / pickles[0]} is a pickle, which can run any code when it is read; take the adapter in safetensors")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; an adapter is a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    adapted = None
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        if config.peft_type != peft.PeftType.LORA:
            raise LoraError(f"{folder / ADAPTER_CONFIG} is an adapter of type {config.peft_type}, expected LORA")
        adapted = peft.PeftModel(model, config)
        weights = peft.load_peft_weights(str(folder), device="cpu")
        _check_adapter(adapted, weights, folder / ADAPTER_WEIGHTS)
        peft.set_peft_model_state_dict(adapted, weights)
    except Exception as error:  # PEFT and safetensors raise errors of many kinds for a file that does not fit
        if adapted is not None:
            adapted.unload()  # the model was changed in place
        if isinstance(error, LoraError):
            raise
        raise LoraError(f"the adapter in {folder} is damaged or not for this model: {' '.join(str(error).split())[:300]}") from error
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(trainable and "lora_" in name)
    return adapted


def merge(adapted: PeftModel) -> PreTrainedModel:
    """Add the adapter to the weights that it adapts, and take it out: the plain decoder, the same object that was adapted.

    The sums are rounded to the weights' type: merge in float32 where the last digit matters. Raises LoraError where one is not finite.
    """
    try:
        model = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise LoraError(f"the adapter cannot be merged: {error}") from error
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def _check_adapter(adapted: PeftModel, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Names and shapes of an adapter's weights against the layers that it was put on."""
    expected = {name: tuple(tensor.shape) for name, tensor in _peft().get_peft_model_state_dict(adapted).items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        name = sorted(set(expected.items()) ^ set(found.items()))[0][0]
        raise LoraError(f"{path} is not for this model: {name} is {found.get(name, 'absent')}, expected {expected.get(name, 'absent')}")


def _refuse(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            raise LoraError(f"this model carries an adapter already ({name}); merge it first")
        if type(parameter.data) is not torch.Tensor:
            raise LoraError(f"{name} is quantised ({type(parameter.data).__name__}); put the adapter on the model as it was, then quantise")


def _peft():
    try:
        import peft
    except ModuleNotFoundError as error:
        raise LoraError("adapters need the package peft: pip install 'emu3-vla[lora]'") from error
    return peft
