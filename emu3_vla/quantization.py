"""Weights in 8 or 4 bits for inference, through torchao: less memory, the same calls.

    loaded = emu3_vla.load(folder, dtype=torch.bfloat16)
    report = quantize(loaded.model, "int8")       # in place; report.bytes_before, report.bytes_after, report.kept

Only the weights are rounded; activations keep their type ("weight-only"). Quantised are the linear layers of the decoder's trunk, and
with int8 the output head. Embeddings, norms, vision blocks and the depth decoder stay as they are, and with int4 the head too: its number
of ids is no multiple of 16 in Emu3's vocabulary, and a head is what 4 bits harm most.

    bits   how                                                        where
    int8   symmetric, one scale for each row                          any device
    int4   asymmetric, a scale and a zero for each group of a row     CPU

What cannot be done is refused by name: nothing is left unquantised without being listed in `report.kept`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

KINDS = ("int8", "int4")
GROUP_SIZES = (32, 64, 128)
ROWS_MULTIPLE = 16  # of the CPU's 4-bit kernel


class QuantizationError(ValueError):
    """A model, a device or a group size that the kind of quantisation asked for does not support."""


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What was done. quantized, kept: names of linear layers. Bytes are those of all parameters of the model."""

    kind: str
    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    bytes_before: int
    bytes_after: int


def quantize(model: PreTrainedModel, kind: str, *, group_size: int = 128) -> QuantizationReport:
    """Round the weights of a decoder's linear layers in place. group_size: of int4, weights that share a scale (32, 64 or 128).

    Raises QuantizationError before anything is changed.
    """
    if kind not in KINDS:
        raise QuantizationError(f"quantisation {kind!r} is unknown; known: {', '.join(KINDS)}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    chosen = {name: layer for name, layer in layers.items() if _is_trunk(name) or (kind == "int8" and name == "lm_head")}
    _check(model, kind, chosen, group_size)
    before = nbytes(model)
    quantize_, config = _torchao(kind, group_size)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ids = {id(layer) for layer in chosen.values()}
    quantize_(model, config, filter_fn=lambda layer, _: id(layer) in ids)
    left = [name for name, layer in chosen.items() if type(layer.weight.data) is torch.Tensor]
    if left:
        raise QuantizationError(f"torchao left {left[0]} and {len(left) - 1} more layers unquantised")
    kept = tuple(name for name in layers if name not in chosen)
    return QuantizationReport(kind=kind, quantized=tuple(chosen), kept=kept, bytes_before=before, bytes_after=nbytes(model))


def nbytes(module: nn.Module) -> int:
    """Bytes of the parameters of a module, those of quantised ones as they are stored; a shared one counts once."""
    return sum(_stored(parameter.data) for parameter in module.parameters())


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight is stored in another form than a plain tensor."""
    return any(type(parameter.data) is not torch.Tensor for parameter in model.parameters())


def _stored(tensor: torch.Tensor) -> int:
    if type(tensor) is torch.Tensor:
        return tensor.nbytes
    parts, _ = tensor.__tensor_flatten__()
    return sum(_stored(getattr(tensor, name)) for name in parts)


def _is_trunk(name: str) -> bool:
    """A layer of the trunk, in Emu3ForCausalLM or Emu3TextModel; the depth decoder's are named depth.layers."""
    return name.startswith(("model.layers.", "layers."))


def _check(model: PreTrainedModel, kind: str, chosen: dict[str, nn.Linear], group_size: int) -> None:
    if is_quantized(model):
        raise QuantizationError("this model is quantised already; load it afresh to quantise it otherwise")
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise QuantizationError("this model carries an adapter; merge it first (emu3_vla.lora.merge)")
    if kind == "int8":
        return
    if group_size not in GROUP_SIZES:
        raise QuantizationError(f"group_size is {group_size}, expected one of {', '.join(map(str, GROUP_SIZES))}")
    for name, layer in chosen.items():
        if layer.weight.device.type != "cpu":
            raise QuantizationError(
                f"int4 is done on the CPU alone, and {name} is on {layer.weight.device}; use int8 there, or export to llama for vLLM"
            )
        if layer.in_features % group_size or layer.out_features % ROWS_MULTIPLE:
            raise QuantizationError(
                f"{name} has {layer.out_features} rows of {layer.in_features} weights; int4 needs a multiple of {ROWS_MULTIPLE} rows, "
                f"and rows that group_size {group_size} divides"
                + (f"; try group_size={GROUP_SIZES[0]}" if group_size > GROUP_SIZES[0] else "")
            )


def _torchao(kind: str, group_size: int):
    """torchao's function and its configuration for this kind."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its optional kernels for other hardware
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ModuleNotFoundError as error:
        raise QuantizationError(
            f"quantisation needs the package torchao ({error.name} is missing): pip install 'emu3-vla[quantization]'"
        ) from error
    if kind == "int8":
        return quantize_, Int8WeightOnlyConfig(set_inductor_config=False)
    return quantize_, PrototypeInt4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)
