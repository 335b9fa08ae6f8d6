"""Training on a tiny store: learns, resumes after SIGKILL to the same weights, says why it stops."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_tokens
import torch
from safetensors.torch import load_file

from emu3_vla import lora
from emu3_vla.checkpoint import load
from emu3_vla.data.tokens import TEXT
from emu3_vla.documents import IGNORE
from emu3_vla.text import TextTokenizer
from emu3_vla.training import loop, state
from emu3_vla.training.figures import LossConfig
from emu3_vla.training.loop import ModelSizes, TrainConfig
from emu3_vla.training.optimizer import FlatAdamW, OptimizerConfig
from emu3_vla.training.parallel import ParallelConfig, own_device
from emu3_vla.training.source import open_source

TIMINGS = ("chunks_per_s", "positions_per_s", "step_s", "data_wait", "of_peak", "memory_gb")


def _records(output: Path) -> list[dict]:
    """Lines of metrics.jsonl without what the clock decides."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def _weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "policy" / "model" / "model.safetensors")


def _assert_same(one: Path, other: Path) -> None:
    assert _records(one) == _records(other)
    left, right = _weights(one), _weights(other)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _train_in_child(tokens: Path, output: Path, options: dict) -> subprocess.Popen:
    here = Path(__file__).parents[1]
    path = os.pathsep.join([str(here.parent), str(here)])
    call = f"tiny_tokens.train(pathlib.Path({str(tokens)!r}), pathlib.Path({str(output)!r}), **{options!r})"
    code = f"import pathlib\nimport tiny_tokens\nif __name__ == '__main__':\n    {call}\n"
    script = output / "train_in_child.py"
    script.write_text(code)
    return subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})


def _kill_after(child: subprocess.Popen, output: Path, lines: int) -> None:
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + 240
    while not metrics.exists() or len(metrics.read_text().splitlines()) < lines:
        assert child.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline, "training never came far enough to be killed"
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_killed_run_ends_where_an_unbroken_one_does(tiny_store, tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    options = {"steps": 40, "checkpoint_every": 3, "validate_every": 20}
    for folder in (unbroken, killed):
        folder.mkdir()
    child = _train_in_child(tiny_store.path, killed, options)
    _kill_after(child, killed, lines=9)
    assert not (killed / "policy").exists()
    resumed_from = state_step(killed)
    assert 0 < resumed_from < 40
    tiny_tokens.train(tiny_store.path, killed, **options)
    tiny_tokens.train(tiny_store.path, unbroken, **options)
    _assert_same(unbroken, killed)


def test_documents_made_in_processes_are_the_same(tiny_store, tmp_path):
    for workers in (0, 2):
        tiny_tokens.train(tiny_store.path, tmp_path / str(workers), steps=20, validate_every=20, data_workers=workers)
    _assert_same(tmp_path / "0", tmp_path / "2")


@pytest.mark.gpu
def test_a_gpu_learns_what_a_cpu_does(tiny_store, tmp_path):
    for device in ("cpu", "cuda"):
        tiny_tokens.train(tiny_store.path, tmp_path / device, steps=12, validate_every=12, log_every=1, precision="fp32", device=device)
    cpu, gpu = (_records(tmp_path / device) for device in ("cpu", "cuda"))
    for one, other in zip(cpu, gpu, strict=True):
        of_both = zip(one.get("validation", one).items(), other.get("validation", other).values(), strict=True)
        assert all(value == pytest.approx(twin, rel=1e-3) for (name, value), twin in of_both if name.startswith("loss"))


@pytest.mark.parametrize(("number", "name", "device"), [(0, "auto", "cuda:0"), (1, "cuda", "cuda:1"), (1, "cpu", "cpu")])
def test_every_process_computes_on_its_own_gpu(monkeypatch, number, name, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", str(number))
    assert own_device(name) == torch.device(device)


def test_a_process_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 1 of this machine needs a GPU of its own, and torch sees 1: .* use device=cpu"):
        own_device("auto")


def state_step(output: Path) -> int:
    return max(int(folder.name.removeprefix("step-")) for folder in (output / "state").glob("step-*"))


def test_as_many_processes_start_as_are_asked_for(tiny_store, tmp_path, monkeypatch):
    """That two learn what one does is seen in test_many_ranks."""
    started = []
    monkeypatch.setattr(loop.processes, "run", lambda worker, count, *arguments: started.append((worker, count, arguments)))
    for options in ({}, {"processes": 2}, {"parallel": ParallelConfig(dp=2, tp=2)}):
        config = tiny_tokens.config(tiny_store.path, tmp_path, **options)
        loop.main(config)
        assert started.pop() == (loop.train, {"processes": 2, "parallel": 4}.get(next(iter(options), ""), 1), (config,))


def test_learns_what_the_pictures_say(tiny_store, tmp_path):
    """Which of four speeds it is follows from the picture alone; whoever looks away loses at least ln 4 nats a chunk."""
    optimizer = OptimizerConfig(learning_rate=4e-3, warmup_steps=5, ema_decay=0.9)
    tiny_tokens.train(tiny_store.path, tmp_path, steps=100, validate_every=50, optimizer=optimizer)
    lengths = [len(ids) + 1 for episode in tiny_store.episodes() for ids in episode.action_ids]
    measured = [record["validation"] for record in _records(tmp_path) if "validation" in record]
    assert measured[-1]["loss_action"] < 0.75 * math.log(4) / np.mean(lengths)


def test_provenance_is_strict_json(tiny_checkpoint):
    """Every reader takes it, also those that know no Infinity: results of an evaluation hold it."""

    def refuse(constant):
        raise AssertionError(f"{constant} in provenance.json")

    json.loads((tiny_checkpoint / "provenance.json").read_text(), parse_constant=refuse)


def test_a_finished_run_is_left_alone(tiny_store, tmp_path, capsys):
    policy = tiny_tokens.train(tiny_store.path, tmp_path, steps=2)
    written = (policy / "provenance.json").read_bytes()
    assert tiny_tokens.train(tiny_store.path, tmp_path, steps=2) == policy
    assert (policy / "provenance.json").read_bytes() == written
    assert capsys.readouterr().out.strip().endswith(str(policy))


def test_init_from_starts_at_another_checkpoint(tiny_store, tiny_checkpoint, tmp_path):
    tiny_tokens.train(tiny_store.path, tmp_path, steps=1, init_from=str(tiny_checkpoint), optimizer=OptimizerConfig(learning_rate=1e-12))
    before, after = load_file(tiny_checkpoint / "model" / "model.safetensors"), _weights(tmp_path)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor)


def test_adapters_learn_and_are_merged(tiny_store, tiny_checkpoint, tmp_path):
    """The trunk's projections change by what the adapter says, and nothing else does."""
    options = {"init_from": str(tiny_checkpoint), "lora_rank": 4, "lora_alpha": 8.0}
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
    tiny_tokens.train(tiny_store.path, tmp_path, steps=8, optimizer=optimizer, **options)
    before, after = load_file(tiny_checkpoint / "model" / "model.safetensors"), _weights(tmp_path)
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor.float())}
    projections = {name for name in before if name.startswith("model.layers") and "norm" not in name}
    assert changed == projections
    adapted = lora.load_adapter(load(tiny_checkpoint, dtype=torch.float32).model, tmp_path / "adapter")
    merged = dict(lora.merge(adapted).named_parameters())
    for name in projections:
        torch.testing.assert_close(merged[name].detach(), after[name])
    measured = [record["validation"]["loss_action"] for record in _records(tmp_path) if "validation" in record]
    assert measured[-1] < measured[0]


def test_diverging_stops_with_a_name_and_no_policy(tiny_store, tmp_path, monkeypatch):
    monkeypatch.setattr(FlatAdamW, "step", lambda self, step, rate: math.nan if step == 1 else 1.0)
    with pytest.raises(loop.TrainingDiverged, match=r"step 2: the gradient's norm is nan.*learning_rate"):
        tiny_tokens.train(tiny_store.path, tmp_path, steps=3)
    assert not (tmp_path / "policy").exists()


def test_single_bad_steps_can_be_skipped(tiny_store, tmp_path, monkeypatch):
    """Gradients that are no numbers, or too long, change nothing and are named; too many of them in a row end the run."""
    gradient, norms = FlatAdamW.zero_gradient, {2: math.nan, 3: math.inf}
    taken = iter(range(100))
    for name in ("two", "long"):
        (tmp_path / name).mkdir()

    def poisoned(self):
        gradient(self)
        self.working_gradient += norms.get(next(taken), 0.0)

    monkeypatch.setattr(FlatAdamW, "zero_gradient", poisoned)
    optimizer = OptimizerConfig(warmup_steps=2, skip_most=2)
    tiny_tokens.train(tiny_store.path, tmp_path / "two", steps=6, optimizer=optimizer)
    events = [record for record in _records(tmp_path / "two") if "event" in record]
    assert [(event["step"], event["event"], event["gradient_norm"], event["in_a_row"]) for event in events] == [
        (3, "skipped", "nan", 1),
        (4, "skipped", "inf", 2),
    ]
    assert all(torch.isfinite(tensor).all() for tensor in _weights(tmp_path / "two").values())
    norms.clear()
    with pytest.raises(loop.TrainingDiverged, match="step 3: the gradient's norm is .* and neither in the 2 steps before"):
        tiny_tokens.train(tiny_store.path, tmp_path / "long", steps=6, optimizer=dataclasses.replace(optimizer, skip_above=1e-9))


def test_the_best_weights_become_the_policy_where_asked(tiny_store, tmp_path, monkeypatch):
    measured = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(loop, "_validate", lambda *arguments: {"loss_action": next(measured)})
    tiny_tokens.train(tiny_store.path, tmp_path, steps=6, validate_every=2, checkpoint_every=1, export="best")
    assert sorted(folder.name for folder in (tmp_path / "state").iterdir()) == ["step-000004", "step-000006"]
    provenance = json.loads((tmp_path / "policy" / "provenance.json").read_text())
    assert (provenance["step"], provenance["held_out"]) == (4, {"loss_action": 1.0})
    best = load_file(tmp_path / "state" / "step-000004" / state.STATE_FILE)["average"]
    assert sum(tensor.sum().item() for tensor in _weights(tmp_path).values()) == pytest.approx(best.sum().item(), rel=1e-4)


def test_a_full_disk_leaves_the_states_before_it_whole(tmp_path, monkeypatch):
    optimizer = FlatAdamW(torch.nn.Linear(3, 3), OptimizerConfig(), torch.float32)
    saver = state.Saver(tmp_path)
    saver.save(1, optimizer)
    saver.wait()
    write = state.save_file

    def full(tensors, path):
        write({name: tensor[:1] for name, tensor in tensors.items()}, path)  # a part of it arrives
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    saver.save(2, optimizer)
    with pytest.raises(state.NotSaved, match="No space left on device; the last whole one is .*step-000001. Make room"):
        saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert state.load(tmp_path, optimizer) == 1


def test_no_error_is_lost_in_the_background(tmp_path, monkeypatch):
    optimizer = FlatAdamW(torch.nn.Linear(3, 3), OptimizerConfig(), torch.float32)
    saver = state.Saver(tmp_path)
    monkeypatch.setattr(state, "save_file", lambda *arguments: 1 / 0)
    saver.save(1, optimizer)
    with pytest.raises(ZeroDivisionError):
        saver.save(2, optimizer)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    optimizer = FlatAdamW(torch.nn.Linear(3, 3), OptimizerConfig(), torch.float32)
    (tmp_path / ".step-000007.tmp").mkdir()
    (tmp_path / ".step-000007.tmp" / state.STATE_FILE).write_bytes(b"half")
    assert state.load(tmp_path, optimizer) == 0
    saver = state.Saver(tmp_path, keep=2)
    for step in (1, 2, 3):
        saver.save(step, optimizer)
    assert saver.newest().step == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_state_of_another_model_is_refused(tiny_store, tmp_path):
    tiny_tokens.train(tiny_store.path, tmp_path, steps=2)
    optimizer = FlatAdamW(torch.nn.Linear(3, 3), OptimizerConfig(), torch.float32)
    with pytest.raises(state.TrainingStateError, match="another model"):
        state.load(tmp_path / "state", optimizer)
    (tmp_path / "state" / "step-000002" / state.STATE_FILE).write_bytes(b"short")
    with pytest.raises(state.TrainingStateError, match="step-000002 is damaged"):
        state.load(tmp_path / "state", optimizer)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"device": "tpu"}, "device is .tpu., expected one of auto, cpu, cuda"),
        ({"data_workers": -1}, "data_workers is -1"),
        ({"log_to": ("tensorbord",)}, "log_to names 'tensorbord', expected some of tensorboard, wandb"),
        ({"lora_rank": 4}, "lora_rank=4 adapts given weights"),
        ({"lora_rank": -1, "init_from": "x"}, "rank -1"),
        ({"export": "first"}, "export is 'first', expected one of last, best"),
        ({"precision": "fp8"}, "precision is 'fp8', expected one of bf16, fp32"),
        ({"history": 3}, "history is 3, expected -1 to 2 with chunks=3"),
        ({"batch_size": 9, "processes": 2}, "no multiple of processes=2"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
    ],
)
def test_options_that_cannot_work_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(tokens="somewhere", **values)


def test_nested_options_are_checked():
    for make, message in (
        (lambda: OptimizerConfig(learning_rate=0), "optimizer.learning_rate is 0"),
        (lambda: OptimizerConfig(skip_above=math.inf), "optimizer.skip_above is inf, expected a number above 0"),
        (lambda: OptimizerConfig(ema_decay=1), "optimizer.ema_decay is 1"),
        (lambda: LossConfig(vision_loss_fraction=2), "loss.vision_loss_fraction is 2"),
        (lambda: LossConfig(text_weight=-1), "loss.text_weight is -1"),
        (lambda: ModelSizes(hidden_size=100, num_attention_heads=3), "no multiple of model.num_attention_heads=3"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_missing_store_is_named(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        loop.main(TrainConfig(tokens=str(tmp_path / "nowhere"), output_dir=str(tmp_path), processes=2))


def test_recomputed_activations_change_nothing(tiny_store, tmp_path, monkeypatch):
    make, calls = loop._new_model, []

    def counted(*arguments):
        model = make(*arguments)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda module, *_: calls.append(module.training))
        return model

    monkeypatch.setattr(loop, "_new_model", counted)
    for recompute in (False, True):
        output = tmp_path / str(recompute)
        calls.clear()
        tiny_tokens.train(tiny_store.path, output, steps=3, precision="fp32", recompute_activations=recompute)
        assert sum(calls) == 3 * (1 + recompute)
    kept, recomputed = _weights(tmp_path / "False"), _weights(tmp_path / "True")
    for name, tensor in kept.items():
        torch.testing.assert_close(recomputed[name], tensor)


def test_learning_rates_warm_up_and_fall():
    def rates(**options):
        config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1, **options)
        return [config.rate(step, 100) for step in range(100)]

    cosine, linear, constant = rates(), rates(schedule="linear"), rates(schedule="constant", cooldown=0.25)
    for values in (cosine, linear, constant):
        assert values[0] == pytest.approx(0.1, rel=0.01)
        assert values[-1] == pytest.approx(0.1, abs=0.05)
        assert values[10:] == sorted(values[10:], reverse=True)
    assert max(cosine) == pytest.approx(1, rel=0.03) and cosine.index(max(cosine)) in (9, 10)
    assert linear[50] == pytest.approx(0.55) and set(constant[9:75]) == {1.0} and constant[80] < 0.9
    with pytest.raises(ValueError, match="optimizer.schedule is 'step', expected one of cosine"):
        OptimizerConfig(schedule="step")
    with pytest.raises(ValueError, match="cooldown is 0"):
        OptimizerConfig(cooldown=0)


def test_questions_are_learnt_in_the_same_stream(tmp_path):
    store = tiny_tokens.tiny_store(tmp_path / "asked", asked=True)
    options = {"asked_fraction": 0.5, "questions": 1, "optimizer": OptimizerConfig(learning_rate=4e-3, warmup_steps=5, ema_decay=0.95)}
    tiny_tokens.train(store.path, tmp_path / "run", steps=120, validate_every=60, **options)
    first, *_, last = [record for record in _records(tmp_path / "run") if "loss_text" in record]
    assert last["loss_text"] < 0.5 * first["loss_text"], "answers are learnt"
    held_out = [record["validation"] for record in _records(tmp_path / "run") if "validation" in record][-1]
    assert held_out["text_accuracy"] > 0.6 and "action_accuracy" in held_out


def test_only_answers_are_targets_of_a_document_that_is_asked(tmp_path):
    store = tiny_tokens.tiny_store(tmp_path / "asked", asked=True)
    config = tiny_tokens.config(store.path, tmp_path / "run", asked_fraction=0.999, questions=1)
    source = open_source(config.tokens, config.model.block_size)
    batch = source.streams(config)[0].batch(0)
    text = TextTokenizer.from_pretrained(store.path / TEXT)
    answers = {tuple(text.encode(answer)) for answer in tiny_tokens.SPEEDS}
    for targets, ids in zip(batch.targets_BL, batch.ids_BL, strict=True):
        spoken = targets[(targets != IGNORE) & (targets < source.vocabulary.text_size)]
        assert tuple(spoken.tolist()) in answers
        assert (ids != source.vocabulary.begin_action).all()
    assert not batch.block_weights_N.any(), "the images are given"


def test_questions_that_are_not_there_are_refused(tiny_store, tmp_path):
    with pytest.raises(ValueError, match="asked_fraction=0.2, but the token store holds no questions; tokenize with questions="):
        tiny_tokens.train(tiny_store.path, tmp_path / "run", steps=2, asked_fraction=0.2)
