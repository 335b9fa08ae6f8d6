"""What a run says of itself."""

import importlib.util
import json

import pytest
import tiny_tokens
import torch

from emu3_vla.documents import collate
from emu3_vla.model import BlockEmu3ForCausalLM, build_config
from emu3_vla.training import telemetry
from emu3_vla.training.source import open_source


def test_flops_are_those_that_torch_counts(tiny_store):
    """Against torch's own counter, over forward and backward of what a training step computes."""
    from torch.utils.flop_counter import FlopCounterMode

    from emu3_vla.training import figures

    source = open_source(str(tiny_store.path), 4)
    config = tiny_tokens.config(tiny_store.path, "unused")
    model = BlockEmu3ForCausalLM(build_config(source.vocabulary, **config.model.arguments()))
    batch = source.streams(config)[0].batch(0)
    chosen = torch.arange(len(batch.codes_NC) // 2)
    with FlopCounterMode(display=False) as counter:
        sums, _ = figures.losses(model, batch, chosen)
        torch.stack(sums).sum().backward()
    # Attention within blocks is left out, and the first layer has no gradient to pass further down.
    assert telemetry.training_flops(model, batch, len(chosen)) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_pace_is_what_passed_over_the_time_it_took(tiny_store, monkeypatch):
    source = open_source(str(tiny_store.path), 4)
    batch = source.streams(tiny_tokens.config(tiny_store.path, "unused"))[0].batch(0)
    now = iter([100.0, 102.0])
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: next(now))
    pace = telemetry.Pace(processes=2, peak=50.0)
    for _ in range(4):
        pace.count(batch, flops=10.0)
    rates = pace.rates()
    assert rates["positions_per_s"] == pytest.approx(2 * 4 * batch.positions / 2, rel=1e-3)
    assert (rates["step_s"], rates["of_peak"]) == (0.5, 0.4)
    assert 0.01 < rates["memory_gb"] < 1000


def test_lines_of_steps_that_are_taken_again_are_dropped(tmp_path):
    metrics = telemetry.Metrics(tmp_path, 0, leads=True)
    for step in (1, 2, 3):
        metrics({"step": step, "loss_action": float(step)})
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 4, "lo')  # cut off
    telemetry.Metrics(tmp_path, 2, leads=True)({"step": 3, "loss_action": 9.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss_action"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    telemetry.Metrics(tmp_path / "other", 0, leads=False)({"step": 1})
    assert not (tmp_path / "other").exists()


def test_sinks_get_numbers_by_name(tmp_path, monkeypatch):
    class Kept:
        def __init__(self, output, config):
            self.written, self.closed = [], False
            sinks.append(self)

        def write(self, step, figures):
            self.written.append((step, figures))

        def close(self):
            self.closed = True

    sinks = []
    monkeypatch.setitem(telemetry._SINKS, "wandb", Kept)
    metrics = telemetry.Metrics(tmp_path, 0, leads=True, extras=("wandb",))
    metrics({"step": 1, "loss_action": 2.0, "event": "skipped"})
    metrics({"step": 2, "validation": {"loss_action": 3.0}})
    metrics.close()
    assert sinks[0].written == [(1, {"train/loss_action": 2.0}), (2, {"validation/loss_action": 3.0})] and sinks[0].closed


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_reads_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = telemetry.Metrics(tmp_path, 0, leads=True, extras=("tensorboard",), config={"seed": 1})
    metrics({"step": 7, "loss_action": 2.5})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss_action")] == [(7, 2.5)]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="TensorBoard is installed")
def test_a_missing_package_names_its_command(tmp_path):
    with pytest.raises(ValueError, match="log_to=tensorboard: the package tensorboard is not installed: pip install 'emu3-vla"):
        telemetry.Metrics(tmp_path, 0, leads=True, extras=("tensorboard",))


def test_a_product_has_a_speed():
    assert telemetry.measured_peak(torch.float32, torch.device("cpu")) > 1e8


def test_a_batch_without_blocks_counts_nothing_of_theirs(tiny_store):
    from emu3_vla.documents import Text

    source = open_source(str(tiny_store.path), 4)
    model = BlockEmu3ForCausalLM(build_config(source.vocabulary, **tiny_tokens.config(tiny_store.path, "unused").model.arguments()))
    batch = collate([[Text([1, 2, 3])]], source.vocabulary)
    rows, length = batch.ids_BL.shape
    weights = sum(part.weight.numel() for part in model.model.layers.modules() if isinstance(part, torch.nn.Linear))
    attention = 4 * rows * length * length * model.config.hidden_size * model.config.num_hidden_layers
    head = 2 * 3 * model.lm_head.weight.numel()
    assert telemetry.training_flops(model, batch, 0) == 3 * (2 * rows * length * weights + attention + head)
