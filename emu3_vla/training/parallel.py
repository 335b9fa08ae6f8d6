"""Who computes what when several ranks share one model: a mesh of copies × shards × parts of a sequence × parts of a matrix.

    dp     copies of the model, each with its own documents                      gradients are summed
    fsdp   ranks that hold one copy's weights together, each its own documents   FSDP2: a layer's weights are gathered while it computes
    cp     ranks that share the positions of a document                          keys and values are gathered (context.py)
    tp     ranks that share every matrix of the trunk                            sums of partial products

The innermost axis, tp, talks most and lies within a machine; dp talks least. Weights are sharded over fsdp × cp.
Source: FSDP2 and DeviceMesh of PyTorch; the order of the axes as in torchtitan (arXiv 2410.06511).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DEVICES = ("auto", "cpu", "cuda")
AXES = ("dp", "fsdp", "cp", "tp")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh's axes. All 1: every process holds the whole model, see TrainConfig.processes."""

    dp: int = 1  # copies of the model; more of them see more documents a second
    fsdp: int = 1  # ranks that hold one copy's weights, moments and average together
    cp: int = 1  # ranks that share the positions of each document, for contexts too long for one
    tp: int = 1  # ranks that share each matrix of the trunk, for layers too large for one

    def __post_init__(self):
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ValueError(f"parallel.{axis} is {getattr(self, axis)}, expected at least 1")

    @property
    def ranks(self) -> int:
        """How many there must be."""
        return math.prod(getattr(self, axis) for axis in AXES)

    def __str__(self) -> str:
        """The axes of more than one rank, as options."""
        return ", ".join(f"parallel.{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1)

    @property
    def copies_alone(self) -> bool:
        """Whether no rank shares its model with another."""
        return self.ranks == self.dp

    def check_started(self) -> None:
        """Raises ValueError where other than so many processes were started."""
        if dist.get_world_size() != self.ranks:
            sizes = ", ".join(f"parallel.{axis}={getattr(self, axis)}" for axis in AXES)
            raise ValueError(
                f"{dist.get_world_size()} processes were started, but {sizes} are {self.ranks} ranks; "
                f"start torchrun with {self.ranks} processes in all, or change a size"
            )

    def check_model(self, heads: int, key_value_heads: int, intermediate_size: int) -> None:
        """Raises ValueError where tp does not divide the trunk's layers."""
        sizes = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "intermediate_size": intermediate_size}
        for name, size in sizes.items():
            if size % self.tp:
                raise ValueError(f"parallel.tp={self.tp} does not divide model.{name}={size}; every rank takes an equal part of it")


class Ranks:
    """This rank's place in the mesh, and the meshes that each part of the work is done over. One per process, all at once."""

    def __init__(self, config: ParallelConfig):
        config.check_started()
        self.config, self.world = config, config.ranks
        self.device = own_device()
        sizes = [getattr(config, axis) for axis in AXES]
        self.mesh = init_device_mesh(self.device.type, tuple(sizes), mesh_dim_names=AXES)
        # The same ranks in the same order, with the two axes that weights are sharded over as one.
        folded = (config.dp, config.fsdp * config.cp, config.tp)
        weights = init_device_mesh(self.device.type, folded, mesh_dim_names=("dp", "shards", "tp"))
        self.shards: DeviceMesh = weights["dp", "shards"] if config.dp > 1 else weights["shards"]
        self.matrices: DeviceMesh = weights["tp"]

    def at(self, axis: str) -> int:
        """This rank's number along an axis."""
        return self.mesh.get_local_rank(axis)

    @property
    def data_rank(self) -> int:
        """Which documents this rank computes, among data_count: those of its number. Shared along cp and tp."""
        return self.at("dp") * self.config.fsdp + self.at("fsdp")

    @property
    def data_count(self) -> int:
        return self.config.dp * self.config.fsdp


def own_device(name: str = "auto") -> torch.device:
    """Where this process computes: by `auto` on the GPU that is its own, where there is one; by `cpu` and `cuda` there.

    Raises ValueError for another name, or a GPU that is not there.
    """
    if name not in DEVICES:
        raise ValueError(f"device is {name!r}, expected one of {', '.join(DEVICES)}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise ValueError(
            f"process {number} of this machine needs a GPU of its own, and torch sees {there}: start as many processes as there are GPUs, "
            "or use device=cpu"
        )
    return torch.device("cuda", number)
