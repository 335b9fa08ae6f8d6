"""The state of a training run on disk: one folder per saved step, there whole or not at all; only the newest is kept.

state/step-000500/state.safetensors holds weights, average and moments; step.json the step and which weights they are. What a step
draws depends on the seed and the step alone, so no random state needs keeping.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from emu3_vla.training.optimizer import FlatAdamW

STATE_FILE, STEP_FILE = "state.safetensors", "step.json"


class TrainingStateError(ValueError):
    """A saved state that is damaged or of another model."""


def save(folder: Path, step: int, optimizer: FlatAdamW) -> None:
    """Save the state after `step` steps in `folder`, then delete older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:06d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(optimizer.state(), temporary / STATE_FILE)
    (temporary / STEP_FILE).write_text(json.dumps({"step": step, "weights": _weights_hash(optimizer)}))
    if not target.exists():
        temporary.rename(target)
    for other in folder.iterdir():
        if other != target:
            shutil.rmtree(other)


def load(folder: Path, optimizer: FlatAdamW) -> int:
    """Restore the newest state in `folder` and return its step; 0, touching nothing, if there is none. Raises TrainingStateError."""
    saved = sorted(folder.glob("step-*"))
    if not saved:
        return 0
    newest = saved[-1]
    advice = f"delete {folder} to start this run afresh"
    try:
        record = json.loads((newest / STEP_FILE).read_text())
        tensors = load_file(newest / STATE_FILE)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise TrainingStateError(f"{newest} is damaged: {error}; {advice}") from error
    if record["weights"] != _weights_hash(optimizer):
        raise TrainingStateError(f"{newest} was saved by a run with another model; {advice}")
    optimizer.load_state(tensors)
    return record["step"]


def _weights_hash(optimizer: FlatAdamW) -> str:
    """Names and shapes of all weights, in order, as one number."""
    return hashlib.sha256(json.dumps([optimizer.names, optimizer.shapes]).encode()).hexdigest()
