"""The state of a training run on disk: one folder per saved step, there whole or not at all.

state/step-000500/state.safetensors holds weights, average and moments; step.json the step, which weights they are, and what was measured
on held-out documents at that step. What a step draws depends on the seed and the step alone, so no random state needs keeping.

States are written in the background while training goes on. The newest ones stay, and the best one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from emu3_vla.training.optimizer import FlatAdamW

if TYPE_CHECKING:
    from emu3_vla.training.sharded import ShardedAdamW

STATE_FILE, STEP_FILE = "state.safetensors", "step.json"
BEST_BY = ("loss_preference", "loss_action", "loss")
"""Of the held-out figures: the state with the least of the first that was measured is the best."""


class TrainingStateError(ValueError):
    """A saved state that is damaged or of another model."""


class NotSaved(RuntimeError):
    """A state could not be written, for want of space most likely. Those before it are whole."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A state on disk. held_out: figures measured at that step; empty where none were."""

    folder: Path
    step: int
    weights: str
    held_out: dict[str, float]


class Saver:
    """Writes states into `folder`, one at a time; one process's alone. keep: how many of the newest stay, beside the best."""

    def __init__(self, folder: Path, *, keep: int = 1):
        self.folder, self.keep = folder, keep
        remove_leftovers(folder)
        self._writing: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(self, step: int, optimizer: FlatAdamW, held_out: dict[str, float] | None = None) -> None:
        """Copy the state after `step` steps and write the copy while the caller goes on; first waits for the one before.

        Raises NotSaved where the one before could not be written.
        """
        self.wait()
        tensors = {name: tensor.clone() for name, tensor in optimizer.state().items()}
        record = {"step": step, "weights": weights_hash(optimizer), "held_out": held_out or {}}
        self._writing = threading.Thread(target=self._write, args=(tensors, record), name="training state")
        self._writing.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises NotSaved, and whatever else went wrong while it was written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            if not isinstance(failure, (OSError, SafetensorError)):
                raise failure
            raise not_saved(failure, self.folder) from failure

    def best(self) -> Saved | None:
        """The state with the best held-out figures, if any was measured."""
        self.wait()
        return best_of(states_in(self.folder))

    def newest(self) -> Saved:
        """The state that was saved last. There must be one."""
        self.wait()
        return states_in(self.folder)[-1]

    def _write(self, tensors: dict[str, torch.Tensor], record: dict) -> None:
        target = self.folder / f"step-{record['step']:06d}"
        temporary = self.folder / f".{target.name}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(tensors, temporary / STATE_FILE)
            (temporary / STEP_FILE).write_text(json.dumps(record))
            publish(temporary, target)
            prune(self.folder, self.keep)
        except Exception as error:  # noqa: BLE001 - nobody sees what a thread raises: `wait` raises it
            shutil.rmtree(temporary, ignore_errors=True)
            self._failure = error


def remove_leftovers(folder: Path) -> None:
    """Of a run that was killed while it wrote."""
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)


def publish(temporary: Path, target: Path) -> None:
    """Give a written state its name, once the disk has all of it."""
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    if target.exists():  # of a run that was cut off after it; what this step's figures say may be new
        shutil.rmtree(target)
    temporary.rename(target)
    _sync(target.parent)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` states and the best."""
    states = states_in(folder)
    best = best_of(states)
    for state in states[:-keep]:
        if state != best:
            shutil.rmtree(state.folder)


def not_saved(failure: object, folder: Path) -> NotSaved:
    """What to raise where a state could not be written."""
    whole = states_in(folder)
    last = f"the last whole one is {whole[-1].folder}" if whole else "there is none from before"
    return NotSaved(f"a training state was not saved: {failure}; {last}. Make room and give the same command again")


def states_in(folder: Path) -> list[Saved]:
    """The states that are there, oldest first. Raises TrainingStateError for one that is damaged."""
    states = []
    for path in sorted(folder.glob("step-*")):
        try:
            record = json.loads((path / STEP_FILE).read_text())
            states.append(Saved(folder=path, step=record["step"], weights=record["weights"], held_out=record.get("held_out", {})))
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise TrainingStateError(f"{path} is damaged: {error}; {_advice(folder)}") from error
    return states


def best_of(states: list[Saved]) -> Saved | None:
    """The earliest of the states with the least held-out loss; None where nothing was measured."""
    for name in BEST_BY:
        if measured := [state for state in states if name in state.held_out]:
            return min(measured, key=lambda state: state.held_out[name])
    return None


def load(folder: Path, optimizer: FlatAdamW) -> int:
    """Restore the newest state in `folder` and return its step; 0, touching nothing, if there is none. Raises TrainingStateError."""
    states = states_in(folder)
    if not states:
        return 0
    restore(states[-1], optimizer)
    return states[-1].step


def restore(saved: Saved, optimizer: FlatAdamW) -> None:
    """Give the optimiser this state. Raises TrainingStateError."""
    try:
        tensors = load_file(saved.folder / STATE_FILE)
    except (OSError, SafetensorError) as error:
        raise damaged(saved, error) from error
    check_model(saved, optimizer)
    optimizer.load_state(tensors)


def damaged(saved: Saved, why: object) -> TrainingStateError:
    """What to raise where a state cannot be read."""
    return TrainingStateError(f"{saved.folder} is damaged: {why}; {_advice(saved.folder.parent)}")


def check_model(saved: Saved, optimizer: FlatAdamW | ShardedAdamW) -> None:
    """Raises TrainingStateError where a state holds other weights than this optimiser's."""
    if saved.weights != weights_hash(optimizer):
        raise TrainingStateError(f"{saved.folder} was saved by a run with another model; {_advice(saved.folder.parent)}")


def _advice(folder: Path) -> str:
    return f"delete {folder} to start this run afresh"


def _sync(path: Path) -> None:
    """Wait until the disk has it, so that a name never stands for less than its content, whatever fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def weights_hash(optimizer: FlatAdamW | ShardedAdamW) -> str:
    """Names and shapes of all weights, in order, as one number."""
    return hashlib.sha256(json.dumps([optimizer.names, optimizer.shapes]).encode()).hexdigest()
