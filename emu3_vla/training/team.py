"""Which ranks train together and what each of them does: `Replicas`, where every process holds the whole model, or a `Mesh` that shares it.

The loop asks its team for all that differs: which documents are this rank's, how the model is built, its losses, optimiser and states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import Emu3ForCausalLM

from emu3_vla import lora
from emu3_vla.documents import IGNORE, Batch
from emu3_vla.lora import LoraSettings
from emu3_vla.model import BlockEmu3ForCausalLM
from emu3_vla.training import figures as figures_of
from emu3_vla.training import processes, sharded_state
from emu3_vla.training.context import ContextParallel
from emu3_vla.training.figures import VISION, Figures
from emu3_vla.training.keeping import Keeper
from emu3_vla.training.optimizer import FlatAdamW, OptimizerConfig
from emu3_vla.training.parallel import ParallelConfig, Ranks, own_device
from emu3_vla.training.sharded import ShardedAdamW, distribute
from emu3_vla.training.sharded_state import ShardedSaver
from emu3_vla.training.state import Saved, Saver
from emu3_vla.vocabulary import CompactVocabulary

if TYPE_CHECKING:
    from peft import PeftModel


def form(config: ParallelConfig, *, whole: bool = False, device: str = "auto") -> Replicas | Mesh:
    """The team that this process belongs to. whole: every process must hold the whole model. device: of a process that does, see
    own_device; ranks that share a model take a GPU each where there are some.

    Raises ValueError where the processes are not as many as the mesh's ranks, or they share models that must be whole.
    """
    if config.ranks == 1:
        return Replicas(own_device(device))
    if not whole:
        return Mesh(config)
    if not config.copies_alone:
        raise ValueError(f"{config} shares models over ranks, where each rank must hold a whole one: use parallel.dp alone")
    config.check_started()
    return Replicas(own_device(device))


class Replicas:
    """Processes that hold the whole model each, and sum their gradients; or one process alone.

    data_rank, data_count: which documents are this process's. sharing: how many ranks compute the same document. seed: of this rank's
    random numbers, within a step.
    """

    sharing = 1
    _adapted: PeftModel | None = None
    _keeper: Keeper | None = None

    def __init__(self, device: torch.device):
        self.device = device
        self.data_rank, self.data_count = processes.rank(), processes.count()
        self.seed = self.data_rank

    def share(self, batches: list[Batch]) -> list[Batch]:
        """This rank's part of a list of batches."""
        return batches[self.data_rank :: self.data_count]

    def build(
        self,
        make: Callable[[], BlockEmu3ForCausalLM],
        outline: Callable[[], BlockEmu3ForCausalLM],  # noqa: ARG002 - only a mesh builds a model before its weights
        vocabulary: CompactVocabulary,
        dtype: torch.dtype,  # noqa: ARG002 - FlatAdamW's to set
    ) -> BlockEmu3ForCausalLM:
        """The model. make: builds it with its weights. outline: builds it without. dtype: that it computes in."""
        self._model, self._vocabulary = make().to(self.device), vocabulary
        if self.device.type == "cuda" and self._model.config._attn_implementation == "eager":
            self._model.set_attn_implementation("sdpa")  # on GPUs the fused kernels are the fast ones
        return self._model

    def adapt(self, settings: LoraSettings) -> None:
        """Let adapters of the model learn in its place."""
        self._adapted = lora.attach(self._model, settings)

    def keep(self, kinds: Sequence[int], dtype: torch.dtype) -> None:
        """Hold states of the model where they are now, and what writes from them. See keeping.Keeper."""
        self._keeper = Keeper(self._model, kinds, self._vocabulary, dtype)

    def kept(self, batch: Batch) -> float:
        """Positions that are held in the whole batch of all ranks."""
        return processes.summed(torch.tensor([float(len(self._keeper.positions(batch)))])).item() if self._keeper else 0.0

    def losses(
        self, batch: Batch, chosen: torch.Tensor, smoothing: float = 0.0, read: Batch | None = None
    ) -> tuple[list[torch.Tensor], Figures]:
        """Summed loss of each kind, with gradient, and the same as figures, of this rank's part. See figures.losses."""
        return figures_of.losses(self._model, batch, chosen, smoothing, read, self._keeper)

    def tokens(self, batch: Batch, chosen: torch.Tensor) -> torch.Tensor:
        """Supervised tokens of each kind in the whole batch of all ranks: float64 (4,). See figures.count_tokens."""
        return processes.summed(figures_of.count_tokens(batch, chosen)) / self.sharing

    def optimizer(self, config: OptimizerConfig, dtype: torch.dtype) -> FlatAdamW | ShardedAdamW:
        return FlatAdamW(self._model, config, dtype)

    @contextmanager
    def averaged_model(self, optimizer: FlatAdamW | ShardedAdamW) -> Iterator[BlockEmu3ForCausalLM | None]:
        """Within, on the leading rank: the whole model with the averaged weights, adapters merged. None on the others. All ranks call."""
        if processes.rank():
            yield None
            return
        with optimizer.averaged():
            # Merged in a copy: sums are rounded, so taking an adapter out again would not give back the same weights.
            yield lora.merge(copy.deepcopy(self._adapted)) if self._adapted else self._model

    def saver(self, folder: Path, keep: int) -> Saver | ShardedSaver | None:
        """What writes this rank's states; None where others do."""
        return Saver(folder, keep=keep) if processes.rank() == 0 else None

    def averaged_weights(self, saved: Saved, optimizer: FlatAdamW | ShardedAdamW) -> dict[str, torch.Tensor]:
        """Averaged weights of a saved state by name, float32, whole, on the CPU; of the leading rank alone."""
        sharded_state.restore(saved, optimizer)
        return optimizer.averaged_state()


class Mesh(Replicas):
    """Ranks that share one model, as ParallelConfig says. See parallel.py."""

    def __init__(self, config: ParallelConfig):
        self.ranks = Ranks(config)
        self.device = self.ranks.device
        self.data_rank, self.data_count = self.ranks.data_rank, self.ranks.data_count
        self.sharing = config.cp * config.tp
        # Ranks along tp compute the same activations, so they drop the same ones; those along cp have other positions.
        self.seed = self.data_rank * config.cp + self.ranks.at("cp")

    def share(self, batches: list[Batch]) -> list[Batch]:
        """As many on every rank, as all gather weights together: where they do not divide, the last one is without targets."""
        most = -(-len(batches) // self.data_count)
        own = super().share(batches)
        return own + [_without_targets(batches[0])] * (most - len(own))

    def build(self, make, outline, vocabulary, dtype) -> BlockEmu3ForCausalLM:
        self._objective, self._model, context = distribute(lambda model: Objective(model, vocabulary), make, outline, self.ranks, dtype)
        self._objective.context = context
        self._vocabulary, self._outline = vocabulary, outline
        return self._model

    @contextmanager
    def averaged_model(self, optimizer: ShardedAdamW) -> Iterator[BlockEmu3ForCausalLM | None]:
        """On the CPU, in float32."""
        weights = optimizer.whole_average(keep=processes.rank() == 0)
        if processes.rank():
            yield None
            return
        model = self._outline()
        model.load_state_dict(weights)
        yield model

    def losses(self, batch: Batch, chosen: torch.Tensor, smoothing: float = 0.0) -> tuple[list[torch.Tensor], Figures]:
        return self._objective(batch, chosen, smoothing)

    def optimizer(self, config: OptimizerConfig, dtype: torch.dtype) -> ShardedAdamW:  # noqa: ARG002 - FSDP2's to cast
        return ShardedAdamW(self._model, config, self.ranks)

    def saver(self, folder: Path, keep: int) -> ShardedSaver:
        return ShardedSaver(folder, keep=keep)

    def averaged_weights(self, saved: Saved, optimizer: ShardedAdamW) -> dict[str, torch.Tensor]:
        shapes = dict(zip(optimizer.names, optimizer.shapes, strict=True))
        average = sharded_state.whole(saved, shapes, kinds=("average",))
        return {name: average[f"average.{name}"] for name in optimizer.names}


class Objective(nn.Module):
    """The losses as one module, so that FSDP2 sees one forward pass from ids to losses. context: where cp shares the positions."""

    def __init__(self, model: Emu3ForCausalLM, vocabulary: CompactVocabulary):
        super().__init__()
        self.model, self._vocabulary = model, vocabulary
        self.context: ContextParallel | None = None

    def forward(self, batch: Batch, chosen: torch.Tensor, smoothing: float) -> tuple[list[torch.Tensor], Figures]:
        """As figures.losses, of this rank's positions."""
        if self.context is None:
            states_PH = self.model.states(batch)
        else:
            part = self.context.part(batch, chosen, self._vocabulary.pad)
            self.context.stand_at(part.positions)
            states_PH = self.model.states(part.seen)
            batch, chosen = part.predicted, torch.arange(len(part.predicted.block_at_N), device=chosen.device)
        sums, figures = figures_of.losses(_Stated(self.model, states_PH), batch, chosen, smoothing)
        if not chosen.numel():  # other ranks may have some, and all gather the depth decoder's weights together
            sums[VISION] = sums[VISION] + self.model.depth(states_PH[:0], batch.codes_NC[:0], batch.block_context(slice(0))).sum()
        return sums, figures


class _Stated:
    """A model whose states are known, for figures.losses: the batch that it is given there may be another than was seen."""

    def __init__(self, model: Emu3ForCausalLM, states_PH: torch.Tensor):
        self.config, self.lm_head, self.depth, self._states_PH = model.config, model.lm_head, model.depth, states_PH

    def states(self, batch: Batch) -> torch.Tensor:  # noqa: ARG002
        return self._states_PH


def _without_targets(batch: Batch) -> Batch:
    none = {field.name: getattr(batch, field.name)[:0] for field in fields(batch) if field.name.endswith(("_N", "_NC", "_NS"))}
    return replace(batch, targets_BL=torch.full_like(batch.targets_BL, IGNORE), **none)
