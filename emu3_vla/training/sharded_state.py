"""The state of a run over many ranks on disk: written by all of them at once, read by any other number of them, or by one alone.

state/step-000500/shard-*.safetensors hold what each rank has of the weights, the average and the moments, as torch.distributed.checkpoint
lays them out in safetensors (nothing that unpickles); step.json the step, what was measured, and every file with its size. As with the
states of one rank (state.py), a state is there whole or not at all, is written in the background, and needs no random state.
"""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from emu3_vla.training import state
from emu3_vla.training.optimizer import FlatAdamW
from emu3_vla.training.sharded import ShardedAdamW
from emu3_vla.training.state import STATE_FILE, STEP_FILE, Saved

KINDS = ("master", "average", "exp_avg", "exp_avg_sq")


class ShardedSaver:
    """Writes states of all ranks into `folder`, one at a time; one per rank, and all ranks call the same methods in the same order.

    keep: how many of the newest stay, beside the best.
    """

    def __init__(self, folder: Path, *, keep: int = 1):
        self.folder, self.keep = folder, keep
        self._leads = dist.get_rank() == 0
        if self._leads:
            state.remove_leftovers(folder)
        # Of its own, as the background must not speak between the sums of training; and over gloo, as it speaks of files.
        self._group = dist.new_group(backend="gloo")
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, optimizer: ShardedAdamW, held_out: dict[str, float] | None = None) -> None:
        """Copy the state after `step` steps and write the copy while the caller goes on; first waits for the one before.

        Raises NotSaved, on every rank, where the one before could not be written by one of them.
        """
        self.wait()
        record = {"step": step, "weights": state.weights_hash(optimizer), "held_out": held_out or {}, "taken": optimizer.taken}
        temporary = self.folder / f".step-{step:06d}.tmp"
        if self._leads:
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier(self._group)
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        written = dcp.async_save(optimizer.state(), storage_writer=writer, process_group=self._group)
        self._writing = threading.Thread(target=self._finish, args=(written, temporary, record), name="training state")
        self._writing.start()

    def wait(self) -> None:
        """Until no rank is writing. Raises NotSaved, on every rank, and whatever else went wrong while it was written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        failure, self._failure = self._failure, None
        told: list[str] = [""] * dist.get_world_size(self._group)
        dist.all_gather_object(told, reason(failure) if failure else "", group=self._group)
        if failure and not _expected(failure):
            raise failure
        if any(told):
            raise state.not_saved(next(text for text in told if text), self.folder) from failure

    def best(self) -> Saved | None:
        """The state with the best held-out figures, if any was measured."""
        self.wait()
        return state.best_of(state.states_in(self.folder))

    def newest(self) -> Saved:
        """The state that was saved last. There must be one."""
        self.wait()
        return state.states_in(self.folder)[-1]

    def _finish(self, written: Future, temporary: Path, record: dict) -> None:
        """Wait for this rank's part; the leading rank, whose part ends after all others', gives the whole its name."""
        try:
            written.result()
            if self._leads:
                record["files"] = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
                (temporary / STEP_FILE).write_text(json.dumps(record))
                state.publish(temporary, self.folder / temporary.name.removeprefix(".").removesuffix(".tmp"))
                state.prune(self.folder, self.keep)
        except (Exception, CheckpointException) as error:  # noqa: BLE001 - nobody sees what a thread raises: `wait` raises it
            self._failure = error
            if self._leads:
                shutil.rmtree(temporary, ignore_errors=True)


def restore(saved: Saved, optimizer: FlatAdamW | ShardedAdamW) -> None:
    """Give the optimiser this state, which as many or as few ranks may have written as there like. All ranks must call.

    Raises TrainingStateError.
    """
    sharded = not (saved.folder / STATE_FILE).exists()
    if isinstance(optimizer, FlatAdamW) and not sharded:
        state.restore(saved, optimizer)
        return
    state.check_model(saved, optimizer)
    if isinstance(optimizer, FlatAdamW):
        tensors = whole(saved, dict(zip(optimizer.names, optimizer.shapes, strict=True)))
        optimizer.load_named({kind: [tensors[f"{kind}.{name}"] for name in optimizer.names] for kind in KINDS}, _record(saved)["taken"])
    elif sharded:
        _read(saved, optimizer.state(), alone=False)
        optimizer.resume(_record(saved)["taken"])
    else:
        _cut(saved, optimizer)


def load(folder: Path, optimizer: FlatAdamW | ShardedAdamW) -> int:
    """Restore the newest state in `folder` and return its step; 0, touching nothing, if there is none. Raises TrainingStateError."""
    states = state.states_in(folder)
    if not states:
        return 0
    restore(states[-1], optimizer)
    return states[-1].step


def whole(saved: Saved, shapes: dict[str, tuple[int, ...]], kinds: tuple[str, ...] = KINDS) -> dict[str, torch.Tensor]:
    """Whole tensors of a state that many ranks wrote, by "kind.name", float32, on the CPU. Needs no other rank."""
    tensors = {f"{kind}.{name}": torch.empty(shape) for kind in kinds for name, shape in shapes.items()}
    _read(saved, tensors, alone=True)
    return tensors


def _read(saved: Saved, tensors: dict[str, torch.Tensor], *, alone: bool) -> None:
    """Fill tensors from the ranks' files. Raises TrainingStateError where one of those is missing or short."""
    for name, size in _record(saved)["files"].items():
        path = saved.folder / name
        if not path.exists() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes" if path.exists() else "missing"
            raise state.damaged(saved, f"{name} is {found}, expected {size} bytes")
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(saved.folder)), no_dist=alone)
    except (OSError, SafetensorError, CheckpointException) as error:
        raise state.damaged(saved, reason(error)) from error


def _cut(saved: Saved, optimizer: ShardedAdamW) -> None:
    """Take this rank's parts out of a state that one rank wrote."""
    try:
        with safe_open(saved.folder / STATE_FILE, "pt") as file:
            border = file.get_slice("adamw.0.exp_avg").get_shape()[0]
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict

            def flat(kind: str, first: int, last: int) -> torch.Tensor:
                if kind in ("master", "average"):
                    return slices[kind][first:last]
                number, offset = (0, 0) if first < border else (1, border)
                return slices[f"adamw.{number}.{kind}"][first - offset : last - offset]

            first, parts = 0, optimizer.state()
            for name, shape in zip(optimizer.names, optimizer.shapes, strict=True):
                last = first + torch.Size(shape).numel()
                for kind in KINDS:
                    part = parts[f"{kind}.{name}"]
                    local, offset = compute_local_shape_and_global_offset(part.shape, part.device_mesh, part.placements)
                    where = tuple(slice(start, start + size) for start, size in zip(offset, local, strict=True))
                    part.to_local().copy_(flat(kind, first, last).view(shape)[where])
                first = last
            optimizer.resume(int(file.get_tensor("adamw.0.step").item()))
    except (OSError, SafetensorError) as error:
        raise state.damaged(saved, error) from error


def _record(saved: Saved) -> dict:
    return json.loads((saved.folder / STEP_FILE).read_text())


def reason(error: BaseException) -> str:
    """What went wrong on which ranks, in one line."""
    if not isinstance(error, CheckpointException):
        return str(error)
    return "; ".join(f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items())


def _expected(error: BaseException) -> bool:
    """Whether the disk is to blame."""
    failures = [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return all(isinstance(failure, (OSError, SafetensorError)) for failure in failures)
