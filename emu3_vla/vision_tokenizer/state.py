"""Training state in one safetensors file: weights, codebook averages, optimiser moments, step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from emu3_vla.vision_tokenizer.base import VisionTokenizerError


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """All that changes while a tokenizer is trained. modules: by name; averages: what the codebook keeps beside the weights."""

    modules: dict[str, nn.Module]
    averages: dict[str, torch.Tensor]
    optimizers: list[torch.optim.Optimizer]

    def parameter_names(self) -> dict[int, str]:
        """id of each parameter → its name, unique over the modules."""
        return {id(p): f"{key}.{name}" for key, module in self.modules.items() for name, p in module.named_parameters()}

    def save(self, path: Path, step: int) -> None:
        """Write the state after `step` steps beside `path`, then rename it into place."""
        tensors = {f"{key}.{name}": tensor for key, module in self.modules.items() for name, tensor in module.state_dict().items()}
        tensors |= {f"codebook.{name}": tensor for name, tensor in self.averages.items()}
        names = self.parameter_names()
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                tensors |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in state.items()}
        temporary = path.with_name(f".{path.name}.tmp")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata={"step": str(step)})
        temporary.replace(path)

    def load(self, path: Path) -> int:
        """Restore what `save` wrote and return its step; 0, touching nothing, if there is no such file.

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
        for key, module in self.modules.items():
            module.load_state_dict(_below(tensors, f"{key}."))
        for name, average in self.averages.items():
            average.copy_(tensors[f"codebook.{name}"])
        names = self.parameter_names()
        for optimizer in self.optimizers:
            for parameter in optimizer.param_groups[0]["params"]:
                state = _below(tensors, f"optimizer.{names[id(parameter)]}.")
                if state:  # the discriminator has none before its first step
                    optimizer.state[parameter] = {key: _laid_out_as(parameter, value) for key, value in state.items()}
        return step


def _laid_out_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A moment must lie in memory as its parameter does, or the update rounds differently; a scalar (the step) has no layout."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
