"""A model over many ranks, and the AdamW that updates each rank's part of it.

    model on the meta device → tensor parallel matrices → FSDP2 shards → weights from the leading rank
    gradients summed over the shards by FSDP2 → one norm over all ranks → clipped AdamW of the local parts → average of the local parts

Weights, moments and average are float32 and exist once over fsdp × cp × tp; FSDP2 gathers a layer's weights in the dtype that the model
computes in. Works for every decoder of this project: BlockEmu3ForCausalLM and Transformers' Emu3ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from transformers import Emu3ForCausalLM

from emu3_vla.training.context import ContextParallel
from emu3_vla.training.optimizer import OptimizerConfig, split_decayed
from emu3_vla.training.parallel import Ranks

MATRICES = {
    # The hidden states enter as one replicated tensor, so that their gradients from several matrices are summed once, not thrice.
    "model.layers.*.self_attn": PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Replicate()}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
    ),
    "model.layers.*.self_attn.q_proj": ColwiseParallel(),
    "model.layers.*.self_attn.k_proj": ColwiseParallel(),
    "model.layers.*.self_attn.v_proj": ColwiseParallel(),
    "model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "model.layers.*.mlp": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "model.layers.*.mlp.up_proj": ColwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
}
"""How tensor parallelism cuts the trunk and the head. Embeddings, norms, blocks and the depth decoder are the same on every tp rank."""


def distribute(
    wrap: Callable[[Emu3ForCausalLM], nn.Module],
    make: Callable[[], Emu3ForCausalLM],
    outline: Callable[[], Emu3ForCausalLM],
    ranks: Ranks,
    dtype: torch.dtype,
) -> tuple[nn.Module, Emu3ForCausalLM, ContextParallel | None]:
    """Spread a model over the ranks: what `wrap` made of it, the model itself, and its context parallelism where cp asks for it.

    wrap: puts the model into the module whose forward is called, and nothing of the model outside it. make: builds it with its weights;
    called on the leading rank alone, so they exist once on their way. outline: builds it without. dtype: that it computes in.
    """
    leads = dist.get_rank() == 0
    weights = make().state_dict() if leads else {}
    with torch.device("meta"):
        model = outline()
    config = model.config
    ranks.config.check_model(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    if ranks.config.tp > 1:
        parallelize_module(model, ranks.matrices, MATRICES)
    context = None
    if ranks.config.cp > 1:
        context = ContextParallel(ranks.mesh["cp"])
        context.attach(model)
    whole = wrap(model)
    _shard(whole, model, ranks, dtype)
    model.to_empty(device=ranks.device)
    # Frequencies belong to no state_dict; they follow from the configuration.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(ranks.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    return whole, model, context


def _shard(whole: nn.Module, model: Emu3ForCausalLM, ranks: Ranks, dtype: torch.dtype) -> None:
    # Gathered weights are let go after every forward pass: those of one with the averaged weights must not stay for the next.
    options: dict[str, Any] = {"mesh": ranks.shards, "reshard_after_forward": True}
    if dtype != torch.float32:  # sums of gradients stay float32, as FlatAdamW's do
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    parts = [model.model.embed_tokens, *model.model.layers, model.lm_head]
    parts += [getattr(model, name) for name in ("blocks", "depth") if hasattr(model, name)]
    for part in parts:
        fully_shard(part, **options)
    fully_shard(whole, **options)
    for module in whole.modules():
        if isinstance(module, FSDPModule):  # the losses are divided by the tokens of all ranks already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


class ShardedAdamW:
    """AdamW of this rank's parts of a distributed model; to the training loop what FlatAdamW is. One per rank, all at once.

    names, shapes: of whole parameters, in FlatAdamW's order. Every tensor is float32.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, ranks: Ranks):
        self.config, self._ranks, self._model = config, ranks, model
        decayed, others = split_decayed(model)
        self._parameters: list[DTensor] = [*decayed.values(), *others.values()]
        self.names = [*decayed, *others]
        self.shapes = [tuple(parameter.shape) for parameter in self._parameters]
        self._master = [nn.Parameter(_local(parameter.detach())) for parameter in self._parameters]  # share memory with the model
        self._average = [local.detach().clone() for local in self._master]
        groups = [
            {"params": self._master[: len(decayed)], "weight_decay": config.weight_decay},
            {"params": self._master[len(decayed) :], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
        self.taken = 0  # steps that changed the weights

    @property
    def size(self) -> int:
        """Parameters of the whole model."""
        return sum(parameter.numel() for parameter in self._parameters)

    def zero_gradient(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def step(self, step: int, learning_rate: float) -> float:
        """Clip, update, average. `step` counts from 0. Returns the gradient's norm over the whole model, before clipping.

        A norm that `config.accepts` not changes nothing; the caller must look.
        """
        for parameter, local in zip(self._parameters, self._master, strict=True):
            local.grad = torch.zeros_like(local) if parameter.grad is None else _local(parameter.grad)
        self._agree_on_copies()
        norm = self._norm()
        if not self.config.accepts(norm):
            return norm
        scale = min(1.0, self.config.gradient_clip / (norm + 1e-6))
        torch._foreach_mul_([local.grad for local in self._master], scale)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.taken += 1
        decay = self.config.average_decay(step)
        torch._foreach_lerp_(self._average, [local.detach() for local in self._master], 1 - decay)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the model computes with the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def whole_average(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """Averaged weights of the whole model by name, float32, on the CPU, where `keep` is set; frozen ones as is. All ranks call."""
        average = dict(zip(map(id, self._parameters), self._average, strict=True))
        whole = {}
        for name, parameter in self._model.named_parameters():
            learnt = average.get(id(parameter))
            gathered = (parameter.detach() if learnt is None else _like(parameter, learnt)).full_tensor()
            if keep:
                whole[name] = gathered.cpu()
        return whole

    def state(self) -> dict[str, torch.Tensor]:
        """All that a resumed run needs beside `taken`, by "kind.name": distributed tensors that share memory with this optimiser's."""
        tensors = {}
        for name, parameter, master, average in zip(self.names, self._parameters, self._master, self._average, strict=True):
            moments = self._adamw.state[master]
            if not moments:  # before the first step
                moments |= {"step": torch.zeros((), device=master.device)}
                moments |= {kind: torch.zeros_like(master) for kind in ("exp_avg", "exp_avg_sq")}
            kinds = {"master": master.detach(), "average": average, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
            tensors |= {f"{kind}.{name}": _like(parameter, local) for kind, local in kinds.items()}
        return tensors

    def resume(self, taken: int) -> None:
        """After the tensors of `state` were filled: go on as after so many steps."""
        self.taken = taken
        for master in self._master:
            self._adamw.state[master]["step"].fill_(taken)

    def _swap(self) -> None:
        for master, average in zip(self._master, self._average, strict=True):
            kept = average.clone()
            average.copy_(master.detach())
            master.detach().copy_(kept)

    def _agree_on_copies(self) -> None:
        """The mean over tp of gradients whose parameter is the same on all of its ranks: no rounding may set the copies apart."""
        if self._ranks.config.tp == 1:
            return
        copies = [local.grad for parameter, local in zip(self._parameters, self._master, strict=True) if not _cut_by_tp(parameter)]
        flat = torch.cat([copy.flatten() for copy in copies])
        dist.all_reduce(flat, group=self._ranks.matrices.get_group())
        flat /= self._ranks.config.tp
        for copy, mean in zip(copies, flat.split([copy.numel() for copy in copies]), strict=True):
            copy.copy_(mean.view_as(copy))

    def _norm(self) -> float:
        squares = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        for parameter, local in zip(self._parameters, self._master, strict=True):
            squares += local.grad.norm().double().square() / self._copies(parameter)
        dist.all_reduce(squares)
        return squares.sqrt().item()

    def _copies(self, parameter: DTensor) -> float:
        """How many ranks hold each element of a parameter."""
        parts = 1
        for placement, size in zip(parameter.placements, parameter.device_mesh.shape, strict=True):
            parts *= 1 if placement.is_replicate() else size  # is_shard() is false of what fsdp and tp both cut
        return self._ranks.world / parts


def _cut_by_tp(parameter: DTensor) -> bool:
    return "tp" in (parameter.device_mesh.mesh_dim_names or ())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a distributed tensor that is here, sharing its memory."""
    return tensor.to_local()


def _like(parameter: DTensor, local: torch.Tensor) -> DTensor:
    """A local part as the distributed tensor that is laid out as a parameter is; shares its memory."""
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
