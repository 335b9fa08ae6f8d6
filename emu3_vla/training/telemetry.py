"""What a run says of itself: one live line, metrics.jsonl, and TensorBoard or Weights & Biases where asked.

`Pace` turns what passes into rates: chunks and positions a second, seconds a step, the share of the machine's own matrix products that
the arithmetic comes to, and memory.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from emu3_vla.documents import IGNORE, Batch
from emu3_vla.model import BlockEmu3ForCausalLM

if TYPE_CHECKING:
    from emu3_vla.training.preference import PairBatch

EXTRAS = ("tensorboard", "wandb")
PEAK_SIDE, PEAK_S = 1024, 0.5  # long enough that a moment without other programs is among it
SHOWN = {
    "loss_action": "action",
    "action_accuracy": "accuracy",
    "loss_vision": "vision",
    "loss_text": "text",
    "text_accuracy": "right",
    "loss_preference": "preference",
    "preferred": "preferred",
    "lr": "lr",
    "chunks_per_s": "chunks/s",
    "positions_per_s": "tokens/s",
    "of_peak": "of peak",
    "memory_gb": "GB",
}
"""What the live line shows, and what it calls it."""


class Sink(Protocol):
    """Somewhere that figures go to."""

    def write(self, step: int, figures: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """metrics.jsonl and the sinks asked for, of the leading process; of any other, nothing.

    Lines of steps that are about to be taken again are dropped. Raises ValueError for a sink whose package is not installed.
    """

    def __init__(self, output: Path, step: int, *, leads: bool, extras: tuple[str, ...] = (), config: dict[str, Any] | None = None):
        self.path, self._leads = output / "metrics.jsonl", leads
        self._sinks = [_SINKS[name](output, config or {}) for name in extras] if leads else []
        if leads:
            self._drop_after(step)

    def __call__(self, record: dict[str, Any]) -> None:
        """Write one record; it has a "step". Figures under "validation" go to the sinks as validation/name."""
        if not self._leads:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        flat = {f"validation/{name}": value for name, value in record.get("validation", {}).items()}
        flat |= {f"train/{name}": value for name, value in record.items() if name not in ("step", "validation")}
        numbers = {name: value for name, value in flat.items() if isinstance(value, (int, float))}
        for sink in self._sinks:
            sink.write(record["step"], numbers)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def _drop_after(self, step: int) -> None:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(self.path)


class _TensorBoard:
    def __init__(self, output: Path, config: dict[str, Any]):
        _require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output / "tensorboard"))
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```")

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """Weights & Biases, one run an output folder; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, output: Path, config: dict[str, Any]):
        _require("wandb")
        import wandb

        identity = output.resolve().name
        self._run = wandb.init(project="emu3-vla", id=identity, name=identity, resume="allow", dir=str(output), config=config)

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


_SINKS = {"tensorboard": _TensorBoard, "wandb": _WandB}


def _require(package: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"log_to={package}: the package {package} is not installed: pip install 'emu3-vla[{package}]'") from error


class Pace:
    """Counts what passes and says how fast, over all processes (each gets an equal part of a batch).

    peak: floating-point operations a second of one process's matrix products; see `measured_peak`.
    """

    def __init__(self, processes: int, peak: float):
        self._processes, self._peak = processes, peak
        self.start()

    def start(self) -> None:
        """Forget what was counted."""
        self._began, self._chunks, self._positions, self._steps, self._flops = time.monotonic(), 0, 0, 0, 0.0
        self._waited_s = 0.0

    def count(self, batch: Batch | PairBatch, flops: float, waited_s: float = 0.0) -> None:
        """One step of this process: its batch, the floating-point operations that it took, and how long it waited for the batch."""
        self._chunks += batch.chunks * self._processes
        self._positions += batch.positions * self._processes
        self._flops += flops
        self._steps += 1
        self._waited_s += waited_s

    def rates(self) -> dict[str, float]:
        """Since the start, and the most memory that this process ever held."""
        seconds = time.monotonic() - self._began
        figures = {
            "chunks_per_s": self._chunks / seconds,
            "positions_per_s": self._positions / seconds,
            "step_s": seconds / max(1, self._steps),
            "data_wait": self._waited_s / seconds,
            "of_peak": self._flops / seconds / self._peak,
            "memory_gb": peak_memory_bytes() / 2**30,
        }
        return {name: round(value, 3) for name, value in figures.items()}


def training_flops(model: BlockEmu3ForCausalLM, batch: Batch, chosen_blocks: int) -> float:
    """Floating-point operations of the matrix products of one step, forward and backward (twice the forward).

    Counts positions that are padding too, as they are computed; not embeddings, norms and activations, and no logits computed again.
    """
    rows, length = batch.ids_BL.shape
    positions, layers = rows * length, model.config.num_hidden_layers
    squares = positions * length if batch.spans is None else batch.spans.squares
    attention = 2 * 2 * squares * model.config.hidden_size * layers  # scores, and values by them
    trunk = 2 * positions * _matrix_weights(model.model.layers)
    head = 2 * int((batch.targets_BL != IGNORE).sum()) * _matrix_weights(model.lm_head)
    if not isinstance(model, BlockEmu3ForCausalLM):
        return 3.0 * (attention + trunk + head)
    blocks = 2 * len(batch.codes_NC) * _matrix_weights(model.blocks)
    once = sum(_matrix_weights(part) for part in (model.depth.state, model.depth.foretold) if part is not None)  # of a block
    depth = 2 * chosen_blocks * (once + batch.codes_NC.shape[1] * (_matrix_weights(model.depth) - once))
    return 3.0 * (attention + trunk + head + blocks + depth)


def measured_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product, here and now, by this process: the best within half a second."""
    left = torch.randn(PEAK_SIDE, PEAK_SIDE, device=device).to(dtype)
    best, until = 0.0, time.perf_counter() + PEAK_S
    while time.perf_counter() < until:
        began = time.perf_counter()
        (left @ left).sum().item()
        best = max(best, 2 * PEAK_SIDE**3 / (time.perf_counter() - began))
    return best


def peak_memory_bytes() -> float:
    """Most memory that this process has held: of the GPU where it uses one, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def live_line(record: dict[str, Any]) -> str:
    """The figures of a record that are worth a look, in one line."""
    return "  ".join(f"{name} {record[key]:.4g}" for key, name in SHOWN.items() if key in record)


def _matrix_weights(module: torch.nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, torch.nn.Linear))
