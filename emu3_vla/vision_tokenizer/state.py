"""Training state of the light tokenizer in one safetensors file: weights, codebook averages, optimiser moments, step."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from emu3_vla.vision_tokenizer.base import VisionTokenizerError
from emu3_vla.vision_tokenizer.light import LightTokenizer

AVERAGES = ("counts", "sums")


def save_state(path: Path, tokenizer: LightTokenizer, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Write the state after `step` steps beside `path`, then rename it into place."""
    tensors = {f"model.{name}": tensor for name, tensor in tokenizer.state_dict().items()}
    tensors |= {f"codebook.{name}": getattr(tokenizer.codebook, name) for name in AVERAGES}
    names = {id(parameter): name for name, parameter in tokenizer.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in state.items()}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata={"step": str(step)})
    temporary.replace(path)


def load_state(path: Path, tokenizer: LightTokenizer, optimizers: list[torch.optim.Optimizer]) -> int:
    """Restore what `save_state` wrote and return its step; 0, touching nothing, if there is no such file.

    Raises VisionTokenizerError for a damaged file.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            step = int(file.metadata()["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise VisionTokenizerError(f"{path} is damaged or cut short: {error}; delete it to start afresh") from error
    tokenizer.load_state_dict(_below(tensors, "model."))
    for name in AVERAGES:
        getattr(tokenizer.codebook, name).copy_(tensors[f"codebook.{name}"])
    names = {id(parameter): name for name, parameter in tokenizer.named_parameters()}
    for optimizer in optimizers:
        for parameter in optimizer.param_groups[0]["params"]:
            state = _below(tensors, f"optimizer.{names[id(parameter)]}.")
            optimizer.state[parameter] = {key: _laid_out_as(parameter, value) for key, value in state.items()}
    return step


def _laid_out_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A moment must lie in memory as its parameter does, or the update rounds differently; a scalar (the step) has no layout."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
