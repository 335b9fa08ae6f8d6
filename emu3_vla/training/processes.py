"""Several training processes on one machine, or those that torchrun started."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(worker: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Call worker(*arguments) in `processes` processes; in this one alone if 1, or in those of torchrun if it started us. They are joined
    by gloo, and by nccl for tensors on GPUs.

    Children end when this process does, also by SIGKILL. Raises what a child raised, as torch.multiprocessing.ProcessRaisedException.
    """
    if "RANK" in os.environ:
        dist.init_process_group(_backend())
        try:
            worker(*arguments)
        finally:
            dist.destroy_process_group()
    elif processes == 1:
        worker(*arguments)
    else:
        mp.spawn(_child, args=(processes, _free_port(), worker, arguments), nprocs=processes)


def rank() -> int:
    """This process's number, from 0, also before and after they are joined; 0 where there is one process alone."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes of a tensor, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def _child(rank: int, processes: int, port: int, worker: Callable[..., None], arguments: tuple) -> None:
    # torch's spawn has the kernel send this when the parent dies; a shell starts background jobs with it ignored, and so would we.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    method = f"tcp://127.0.0.1:{port}"
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(_backend(), init_method=method, rank=rank, world_size=processes)
    try:
        worker(*arguments)
    finally:
        dist.destroy_process_group()


def _backend() -> str:
    """Tensors of the CPU, counts of tokens among them, go over gloo, whatever the weights are on."""
    number = int(os.environ["LOCAL_RANK"])
    if number >= torch.cuda.device_count():
        return "gloo"
    torch.cuda.set_device(number)
    return "cpu:gloo,cuda:nccl"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
