"""AdamW over flat buffers: float32 master weights, gradients, moments and an average, each one long tensor.

The model computes in its own dtype (bfloat16 here) and its parameters and gradients are views of flat buffers too. So casting,
all-reducing, clipping, stepping and averaging are a handful of calls over one tensor, instead of one per parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import nn

from emu3_vla.muon import orthogonalise

HEADS = ("lm_head", "head")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule, and the exponential moving average of the weights that validation and the policy use."""

    learning_rate: float = 1.5e-3  # highest
    muon_learning_rate: float | None = None  # highest, of the layers' matrices, which then learn by Muon; none: by AdamW as all else
    warmup_steps: int = 100
    schedule: str = "cosine"  # cosine or linear, from the warm-up to the end; or constant, and linear over the last `cooldown` of the run
    cooldown: float = 0.2  # of the run, with schedule=constant
    final_fraction: float = 0.02  # of the highest rate, at the end
    beta1: float = 0.9
    beta2: float = 0.97
    weight_decay: float = 0.05  # of matrices; vectors and embeddings have none
    gradient_clip: float = 1.0  # of the global norm
    skip_above: float | None = None  # a step whose gradient's norm is above this changes nothing; nor does one that is not finite, ever
    skip_most: int = 0  # such steps in a row; one more ends the run
    ema_decay: float = 0.998  # 0: no averaging

    def __post_init__(self):
        for name in ("learning_rate", "muon_learning_rate", "gradient_clip", "skip_above"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"optimizer.{name} is {value}, expected a number above 0")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optimizer.schedule is {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        if not 0 < self.cooldown <= 1:
            raise ValueError(f"optimizer.cooldown is {self.cooldown}, expected above 0 and at most 1")
        for name in ("final_fraction", "beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}, expected at least 0 and below 1")
        if min(self.warmup_steps, self.weight_decay, self.skip_most) < 0:
            raise ValueError("optimizer.warmup_steps, optimizer.weight_decay and optimizer.skip_most must not be negative")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of a run of `steps`: linear warm-up, then the schedule down to `final_fraction`."""
        gone = step / steps
        left = {
            "cosine": 0.5 * (1 + math.cos(math.pi * gone)),
            "linear": 1 - gone,
            "constant": min(1.0, (1 - gone) / self.cooldown),
        }[self.schedule]
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.learning_rate * warm * (self.final_fraction + (1 - self.final_fraction) * left)

    def average_decay(self, step: int) -> float:
        """Of the moving average at step `step` (from 0)."""
        # Early weights are far from the end's, so the average starts short and grows to its full length.
        return min(self.ema_decay, (1 + step) / (10 + step)) if self.ema_decay else 0.0

    def accepts(self, norm: float) -> bool:
        """Whether a gradient of this norm is a step."""
        return math.isfinite(norm) and (self.skip_above is None or norm <= self.skip_above)


class FlatAdamW:
    """Owns a model's weights. P parameters in all; every flat tensor is (P,) and orders them as `names` does. Parameters that need no
    gradient (beneath adapters) are left out, but computed with in the same dtype.

    master, average, gradient: float32. working, working_gradient: in the dtype that the model computes in.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, dtype: torch.dtype):
        self.config = config
        decayed, others = split_decayed(model)
        in_layers = _in_layers(model, decayed) if config.muon_learning_rate else {}
        decayed = in_layers | decayed  # those first
        self._parameters = [*decayed.values(), *others.values()]
        self.names = [*decayed, *others]
        self.shapes = [tuple(parameter.shape) for parameter in self._parameters]
        self.master = torch.cat([parameter.detach().float().flatten() for parameter in self._parameters])
        self.average = self.master.clone()
        self.gradient = torch.zeros_like(self.master)
        self.working = self.master.to(dtype, copy=True)
        self.working_gradient = torch.zeros_like(self.working)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        # The parameters alone: model.to(dtype) would round the rotary frequencies too.
        for parameter, weights, gradient in zip(
            self._parameters, self._views(self.working), self._views(self.working_gradient), strict=True
        ):
            parameter.data, parameter.grad = weights, gradient
        first = sum(parameter.numel() for parameter in in_layers.values())
        border = sum(parameter.numel() for parameter in decayed.values())
        self._muon = Muon(self.master[:first], self.gradient[:first], list(in_layers.values()), config) if in_layers else None
        groups = []
        for part, decay in ((slice(first, border), config.weight_decay), (slice(border, None), 0.0)):
            tensor = nn.Parameter(self.master[part])  # shares memory with master
            tensor.grad = self.gradient[part]
            groups.append({"params": [tensor], "weight_decay": decay})
        self._adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)

    @property
    def size(self) -> int:
        """Parameters that learn."""
        return len(self.master)

    def zero_gradient(self) -> None:
        self.working_gradient.zero_()

    def step(self, step: int, learning_rate: float) -> float:
        """Sum the gradients over all processes, clip, update. `step` counts from 0. Returns the gradient's norm before clipping.

        A norm that `config.accepts` not changes nothing; the caller must look.
        """
        self.gradient.copy_(self.working_gradient)
        if dist.is_initialized():
            dist.all_reduce(self.gradient)
        norm = self.gradient.norm().item()
        if not self.config.accepts(norm):
            return norm
        self.gradient.mul_(min(1.0, self.config.gradient_clip / (norm + 1e-6)))
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        if self._muon:
            self._muon.step(learning_rate / self.config.learning_rate)
        self.average.lerp_(self.master, 1 - self.config.average_decay(step))
        self.working.copy_(self.master)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model computes with the averaged weights."""
        self.working.copy_(self.average)
        try:
            yield
        finally:
            self.working.copy_(self.master)

    def averaged_state(self) -> dict[str, torch.Tensor]:
        """Averaged weights by name, float32, on the CPU."""
        return {name: view.clone().cpu() for name, view in zip(self.names, self._views(self.average), strict=True)}

    def state(self) -> dict[str, torch.Tensor]:
        """All that a resumed run needs, as named tensors."""
        tensors = {"master": self.master, "average": self.average}
        if self._muon:
            tensors["muon.momentum"] = self._muon.momentum
        for number, group in enumerate(self._adamw.param_groups):
            tensors |= {f"adamw.{number}.{key}": value for key, value in self._adamw.state[group["params"][0]].items()}
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `state` gave. Raises ValueError where the tensors are another model's."""
        if tensors["master"].shape != self.master.shape:
            raise ValueError(f"saved state has {len(tensors['master'])} weights, this model has {len(self.master)}")
        self.master.copy_(tensors["master"])
        self.average.copy_(tensors["average"])
        self.working.copy_(self.master)
        if self._muon:
            self._muon.momentum.copy_(tensors["muon.momentum"])
        for number, group in enumerate(self._adamw.param_groups):
            prefix = f"adamw.{number}."
            moments = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            self._adamw.state[group["params"][0]] = {name: value.to(self.master.device) for name, value in moments.items()}

    def load_named(self, tensors: dict[str, list[torch.Tensor]], taken: int) -> None:
        """Restore master, average, exp_avg and exp_avg_sq, each a tensor a parameter in the order of `names`, after so many steps."""
        flat = {kind: torch.cat([part.flatten() for part in parts]) for kind, parts in tensors.items()}
        state = {"master": flat["master"], "average": flat["average"]}
        first = 0
        for number, group in enumerate(self._adamw.param_groups):
            last = first + group["params"][0].numel()
            state[f"adamw.{number}.step"] = torch.tensor(float(taken))
            state |= {f"adamw.{number}.{kind}": flat[kind][first:last].clone() for kind in ("exp_avg", "exp_avg_sq")}
            first = last
        self.load_state(state)

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        sizes = [parameter.numel() for parameter in self._parameters]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]


class Muon:
    """Muon over a flat buffer of matrices: momentum whose singular values are all made one, so that every direction learns equally fast.

    weights, gradient: float32 (p,), views of those of all parameters. Each process orthogonalises a share of the matrices.
    Source: see emu3_vla.muon.
    """

    MOMENTUM = 0.95

    def __init__(self, weights: torch.Tensor, gradient: torch.Tensor, matrices: list[nn.Parameter], config: OptimizerConfig):
        self._weights, self._gradient, self._config = weights, gradient, config
        self._shapes = [tuple(matrix.shape) for matrix in matrices]
        # A GPU is faster at all matrices of one shape in one product than at launching one after another; a CPU is not.
        alike = itemgetter(1) if weights.is_cuda else itemgetter(0)
        numbered = sorted(enumerate(self._shapes), key=alike)
        self._together = [[number for number, _ in group] for _, group in groupby(numbered, key=alike)]
        self.momentum = torch.zeros_like(weights)

    def step(self, fraction: float) -> None:
        """One update at this fraction of the highest rate; the same in every process."""
        self.momentum.lerp_(self._gradient, 1 - self.MOMENTUM)
        direction = self._gradient.lerp(self.momentum, self.MOMENTUM)
        update = torch.zeros_like(direction)
        together, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        sizes = [math.prod(shape) for shape in self._shapes]
        matrices, outs = direction.split(sizes), update.split(sizes)
        for turn, numbers in enumerate(self._together):
            if turn % together == rank:
                shape = self._shapes[numbers[0]]
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                made = orthogonalise(torch.stack([matrices[number].view(shape) for number in numbers]).bfloat16())
                for number, matrix in zip(numbers, made, strict=True):
                    outs[number].view(shape).copy_(matrix).mul_(scale)
        if together > 1:
            dist.all_reduce(update)
        rate = self._config.muon_learning_rate * fraction
        self._weights.mul_(1 - rate * self._config.weight_decay).add_(update, alpha=-rate)


def _in_layers(model: nn.Module, decayed: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The matrices between a hidden state and a hidden state: those of layers and of what merges blocks, not of heads."""
    heads = {id(module.weight) for name, module in model.named_modules() if name.rpartition(".")[2] in HEADS}
    return {name: parameter for name, parameter in decayed.items() if parameter.ndim == 2 and id(parameter) not in heads}


def split_decayed(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Parameters that decay (matrices of linear layers) and the others, by name."""
    matrices = {f"{prefix}.weight" if prefix else "weight" for prefix, module in model.named_modules() if isinstance(module, nn.Linear)}
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = {name: parameter for name, parameter in named.items() if name in matrices}
    return decayed, {name: parameter for name, parameter in named.items() if name not in matrices}
