"""One model over several ranks: it learns what one rank does, and its states go from one number of ranks to another.

A rank costs seconds to start, so the ranks of a test play all of its scenes. The whole matrix is slow; two ranks are not.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rank_scenes
import tiny_tokens
import torch
from rank_scenes import contexts, over
from recorded import rows
from safetensors.torch import load_file

from emu3_vla import cli
from emu3_vla.data.pairs import Pair, PairStore, Written
from emu3_vla.data.tokens import hashes
from emu3_vla.documents import IGNORE, ActionChunk, Begin, Image, Text
from emu3_vla.training import loop, sharded_state, state, team
from emu3_vla.training.figures import LossConfig
from emu3_vla.training.loop import TrainConfig
from emu3_vla.training.optimizer import FlatAdamW, OptimizerConfig
from emu3_vla.training.parallel import ParallelConfig
from emu3_vla.training.preference import PreferenceConfig
from emu3_vla.training.source import open_source

TIMINGS = ("chunks_per_s", "positions_per_s", "step_s", "data_wait", "of_peak", "memory_gb")


def _config(store, folder: Path, **options) -> TrainConfig:
    folder.mkdir(exist_ok=True)
    values = {"precision": "fp32", "validate_every": 3, "checkpoint_every": 3, "loss": LossConfig(vision_loss_fraction=0.3)}
    return tiny_tokens.config(store.path, folder, **(values | options))


def _records(config: TrainConfig) -> list[dict]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def _assert_learned_alike(one: TrainConfig, other: TrainConfig) -> None:
    """Every loss, held-out ones too, to 1e-4."""
    for left, right in zip(_records(one), _records(other), strict=True):
        for key, value in left.get("validation", left).items():
            assert right.get("validation", right)[key] == pytest.approx(value, rel=1e-4, abs=2e-5), (key, left["step"])


def _newest(config: TrainConfig) -> state.Saved:
    return state.states_in(Path(config.output_dir) / "state")[-1]


def _shapes(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    model = loop.outline(config, open_source(config.tokens, config.model.block_size))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def runs(tiny_store, tmp_path_factory):
    """All that two ranks do in the fast tests, as they take seconds to start; and what one rank does beside them."""
    folder = tmp_path_factory.mktemp("two")
    options = {"steps": 6, "samples_every": 6, "samples": 1}
    one = _config(tiny_store, folder / "one", **options)
    two = over(_config(tiny_store, folder / "fsdp", **options), fsdp=2)
    loop.train(one)
    full = folder / "full"
    full.mkdir()
    taken_over = (rank_scenes.copy_state, over(one, fsdp=2), folder / "from one")
    whole = _runs_of_whole_models(tiny_store, folder, Path(one.output_dir) / "policy")
    copies = {name: over(dataclasses.replace(run, output_dir=f"{run.output_dir} twice"), dp=2) for name, run in whole.items()}
    processes = dataclasses.replace(one, processes=2, output_dir=str(folder / "processes"), samples_every=0)
    scenes = [(rank_scenes.train, run) for run in (two, processes, *copies.values())]
    rank_scenes.start(2, *scenes, (rank_scenes.full_disk, two, full), taken_over)
    for run in whole.values():
        loop.train(run)
    return folder, one, two, whole, copies


@pytest.fixture(scope="module")
def two_ranks(runs):
    """Runs of one rank and of two, and a disk that was full for one of two: folder, one rank's configuration, two ranks' ones."""
    return runs[:3]


WHOLE = ("muon", "adapters", "pairs")


def _runs_of_whole_models(store, folder: Path, policy: Path) -> dict[str, TrainConfig]:
    """Runs whose ranks must hold the whole model each, for one rank."""
    given = {"steps": 4, "init_from": str(policy)}
    options = {
        "muon": {"steps": 4, "optimizer": OptimizerConfig(warmup_steps=2, muon_learning_rate=0.02)},
        "adapters": {**given, "lora_rank": 4, "samples_every": 4, "samples": 1},
        "pairs": {**given, "context": 96, "preference": PreferenceConfig(pairs=str(_pairs(store, folder / "pair store")))},
    }
    return {name: _config(store, folder / name, **options[name]) for name in WHOLE}


def _pairs(store, folder: Path) -> Path:
    """Two chunks after one look each, one of them preferred."""
    vocabulary = open_source(str(store.path), 4).vocabulary
    random, pairs = np.random.default_rng(0), []
    for _ in range(12):
        images = [Image(grid.name, random.integers(0, 32, (grid.rows, grid.columns))) for grid in vocabulary.images]
        shown = [Begin(), Text(random.integers(0, 30, 3)), *images]
        chosen, rejected = ([Written(segments=[*shown, ActionChunk(ids)], given=len(shown))] for ids in ([1, 2, 3], [4, 5, 6]))
        pairs.append(Pair(chosen=chosen, rejected=rejected, scores=(1.0, 0.0)))
    PairStore.create(folder, vocabulary, hashes(store.path), {}).write_shard(0, pairs)
    return folder


def test_two_ranks_that_share_one_model_learn_what_one_does(two_ranks):
    _, one, two = two_ranks
    _assert_learned_alike(one, two)
    left, right = (load_file(Path(config.output_dir) / "policy" / "model" / "model.safetensors") for config in (one, two))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=1e-3, atol=1e-5)


def test_two_processes_that_hold_a_model_each_learn_what_one_does(two_ranks):
    """The same data and weighting, so the same losses up to the order of sums; in float32, where that order matters least."""
    folder, one, _ = two_ranks
    _assert_learned_alike(one, dataclasses.replace(one, output_dir=str(folder / "processes")))


def test_two_ranks_sample_the_whole_model(two_ranks):
    """The leading one writes what one rank alone does, with the averaged weights of both."""
    _, one, two = two_ranks
    left, right = (rows(Path(config.output_dir) / "samples" / "step-000006.rrd") for config in (one, two))
    assert left.keys() == right.keys() and "act/0/action/dx/predicted" in left
    for entity, ((step, value),) in left.items():
        if entity.endswith(("codes_right", "error")):
            assert right[entity][0] == (step, pytest.approx(value, abs=1e-6)), entity
        else:
            assert right[entity] == [(step, value)], entity


@pytest.mark.parametrize("name", WHOLE)
def test_two_copies_learn_what_one_does_where_each_is_whole(runs, name):
    """Muon, adapters and preference pairs over parallel.dp."""
    *_, whole, copies = runs
    one, two = whole[name], copies[name]
    _assert_learned_alike(one, two)
    left, right = (load_file(Path(config.output_dir) / "policy" / "model" / "model.safetensors") for config in (one, two))
    # Muon orthogonalises in bfloat16, where the last bit of a sum moves directions that hardly have a gradient.
    most = 3e-2 if name == "muon" else 1e-4
    for weight, tensor in left.items():
        assert torch.linalg.norm(right[weight] - tensor) < most * torch.linalg.norm(tensor), weight
    assert (Path(two.output_dir) / "adapter").exists() == (name == "adapters")


def test_one_rank_goes_on_where_two_copies_were(runs):
    *_, whole, copies = runs
    optimizer = rank_scenes._loaded(whole["muon"])[1]
    assert sharded_state.load(Path(copies["muon"].output_dir) / "state", optimizer) == 4
    assert optimizer.state()["muon.momentum"].abs().max() > 0 and optimizer.state()["adamw.0.step"].item() == 4


def test_one_rank_takes_over_from_two(two_ranks):
    """All four kinds of tensors, bit for bit, and the number of steps taken."""
    _, one, two = two_ranks
    ours, optimizer = rank_scenes._loaded(one)
    assert sharded_state.load(Path(two.output_dir) / "state", optimizer) == 6
    tensors = sharded_state.whole(_newest(two), _shapes(two))
    names = {"master": optimizer.master, "average": optimizer.average}
    for kind, flat in names.items():
        assert torch.equal(flat, torch.cat([tensors[f"{kind}.{name}"].flatten() for name in optimizer.names]))
    moments = optimizer.state()
    flat = torch.cat([moments["adamw.0.exp_avg_sq"], moments["adamw.1.exp_avg_sq"]])
    assert torch.equal(flat, torch.cat([tensors[f"exp_avg_sq.{name}"].flatten() for name in optimizer.names]))
    assert moments["adamw.1.step"].item() == 6
    assert isinstance(ours, team.Replicas)


def test_two_ranks_take_over_from_one(two_ranks):
    folder, one, _ = two_ranks
    optimizer = rank_scenes._loaded(one)[1]
    assert sharded_state.load(Path(one.output_dir) / "state", optimizer) == 6
    expected = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    assert sharded_state.load(folder / "from one", optimizer) == 6
    for name, tensor in optimizer.state().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_disk_that_is_full_for_one_rank_leaves_the_state_before_whole(two_ranks):
    folder, _, two = two_ranks
    for rank in range(2):
        told = (folder / "full" / f"told-{rank}").read_text()
        assert "rank 1: [Errno 28] No space left on device; the last whole one is" in told and "step-000001. Make room" in told
    assert (folder / "full" / "after").read_text() == "step-000001"
    assert [saved.step for saved in state.states_in(folder / "full" / "state")] == [3]


def test_a_damaged_state_is_refused(two_ranks, tmp_path):
    _, one, two = two_ranks
    damaged = _copy(_newest(two), tmp_path / "step-000006")
    part = sorted(damaged.folder.glob("shard-*"))[0]
    part.write_bytes(part.read_bytes()[:-4])
    optimizer = rank_scenes._loaded(one)[1]
    with pytest.raises(state.TrainingStateError, match=r"step-000006 is damaged: shard-.* bytes, expected \d+ bytes; delete"):
        sharded_state.load(tmp_path, optimizer)
    part.unlink()
    with pytest.raises(state.TrainingStateError, match="is missing, expected"):
        sharded_state.load(tmp_path, optimizer)
    other = FlatAdamW(torch.nn.Linear(3, 3), one.optimizer, torch.float32)
    with pytest.raises(state.TrainingStateError, match="saved by a run with another model"):
        sharded_state.load(tmp_path, other)


def _copy(saved: state.Saved, folder: Path) -> state.Saved:
    folder.mkdir()
    for path in saved.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return dataclasses.replace(saved, folder=folder)


def test_a_run_goes_on_over_another_mesh_but_not_with_other_options(tiny_store, tmp_path):
    config = _config(tiny_store, tmp_path / "run", steps=6)
    cli.claim_output_dir("train", config)
    cli.claim_output_dir("train", over(config, fsdp=2, tp=2))
    with pytest.raises(cli.UsageError, match="steps=6 there, 7 now"):
        cli.claim_output_dir("train", dataclasses.replace(config, steps=7))


def test_only_the_leading_rank_claims_the_folder(tiny_store, tmp_path, monkeypatch):
    """The others would find it half claimed."""
    config = dataclasses.replace(_config(tiny_store, tmp_path, steps=6), output_dir=str(tmp_path / "run"))
    monkeypatch.setenv("RANK", "1")
    assert cli.claim_output_dir("train", config) == tmp_path / "run"
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "0")
    assert (cli.claim_output_dir("train", config) / "run.json").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parallel": ParallelConfig(tp=3)}, "parallel.tp=3 does not divide model.num_attention_heads=4"),
        ({"parallel": ParallelConfig(dp=3, fsdp=2)}, "no multiple of parallel.dp × parallel.fsdp = 3 × 2"),
        ({"parallel": ParallelConfig(fsdp=2), "processes": 2}, "with parallel.* set parallel.dp instead"),
        (
            {"parallel": ParallelConfig(dp=2, cp=2), "lora_rank": 4, "init_from": "x"},
            r"lora_rank=4 with parallel.dp=2, parallel.cp=2: every rank must hold the whole model; use parallel.dp alone",
        ),
        (
            {"parallel": ParallelConfig(fsdp=2), "optimizer": OptimizerConfig(muon_learning_rate=0.01)},
            "optimizer.muon_learning_rate=0.01 with parallel.fsdp=2: every rank",
        ),
        (
            {"parallel": ParallelConfig(tp=2), "preference": PreferenceConfig(pairs="x"), "init_from": "y", "context": 64},
            "preference.pairs=x with parallel.tp=2: every rank",
        ),
    ],
)
def test_meshes_that_cannot_work_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(tokens="somewhere", **values)
    with pytest.raises(ValueError, match="parallel.cp is 0, expected at least 1"):
        ParallelConfig(cp=0)


@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_a_batch_are_the_batch(tiny_store, size):
    """Every position, seen block and predicted block is exactly one rank's, with its own codes and what it was before."""
    config = tiny_tokens.config(tiny_store.path, Path("nowhere"))
    source = open_source(config.tokens, config.model.block_size)
    batch = source.streams(config)[0].batch(0)
    rows, length = batch.ids_BL.shape
    chosen = torch.arange(0, len(batch.codes_NC), 3)
    parts = [context.part(batch, chosen, source.vocabulary.pad) for context in contexts(size)]
    assert sorted(torch.cat([part.positions for part in parts]).tolist()) == list(range(contexts(size)[0].padded(length)))
    for name, filled in (("ids_BL", source.vocabulary.pad), ("targets_BL", IGNORE)):
        found = torch.full((rows, contexts(size)[0].padded(length)), -1)
        for part in parts:
            found[:, part.positions] = getattr(part.seen, name)
        assert torch.equal(found[:, :length], getattr(batch, name)) and bool((found[:, length:] == filled).all())
    for which, expected, offset in (("seen", torch.arange(len(batch.codes_NC)), 0), ("predicted", chosen, 1)):
        found = {}
        for part in parts:
            blocks = getattr(part, which)
            width = len(part.positions)
            at = blocks.block_at_N - offset
            for index, row, column in zip(range(len(at)), at // width, at % width, strict=True):
                place = int(row) * length + int(part.positions[column]) + offset
                assert place not in found
                found[place] = (blocks.codes_NC[index].tolist(), int(blocks.places_N[index]), float(blocks.block_weights_N[index]))
        wanted = {
            int(batch.block_at_N[index]): (
                batch.codes_NC[index].tolist(),
                int(batch.places_N[index]),
                float(batch.block_weights_N[index]),
            )
            for index in expected
        }
        assert found == wanted


def test_ranks_that_share_positions_work_equally_much():
    for size in (1, 2, 4):
        looked = [int(context.own(16 * size).add(1).sum()) for context in contexts(size)]
        assert len(set(looked)) == 1


# What follows takes minutes.

TWO = [{"dp": 2}, {"fsdp": 2}, {"tp": 2}, {"cp": 2}]
FOUR = [{"fsdp": 2, "tp": 2}, {"cp": 2, "tp": 2}, {"dp": 2, "fsdp": 2}, {"fsdp": 2, "cp": 2}]


def _name(sizes: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in sizes.items())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("ranks", "meshes"), [(2, TWO), (4, FOUR)])
def test_every_mesh_learns_what_one_rank_does(tiny_store, tmp_path, ranks, meshes):
    """Twenty steps in float32, with held-out losses on the way."""
    options = {"steps": 20, "validate_every": 8, "checkpoint_every": 20}
    one = _config(tiny_store, tmp_path / "one", **options)
    loop.train(one)
    configs = [over(_config(tiny_store, tmp_path / _name(sizes), **options), **sizes) for sizes in meshes]
    rank_scenes.start(ranks, *((rank_scenes.train, config) for config in configs))
    for config in configs:
        _assert_learned_alike(one, config)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_bfloat16_and_recomputed_activations_go_over_a_mesh(tiny_store, tmp_path):
    """Roundings differ, so the losses agree to a hundredth alone."""
    options = {"steps": 6, "precision": "bf16", "recompute_activations": True}
    one = _config(tiny_store, tmp_path / "one", **options)
    meshes = [over(_config(tiny_store, tmp_path / axis, **options), **{axis: 2}) for axis in ("fsdp", "tp", "cp")]
    loop.train(one)
    rank_scenes.start(2, *((rank_scenes.train, config) for config in meshes))
    for config in meshes:
        for left, right in zip(_records(one), _records(config), strict=True):
            left, right = left.get("validation", left), right.get("validation", right)
            for key in ("loss_action", "loss_vision"):
                assert right[key] == pytest.approx(left[key], rel=1e-2), key


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_transformers_own_decoder_is_the_same_over_every_mesh(tmp_path):
    two = [(rank_scenes.plain_step, sizes, False, tmp_path) for sizes in TWO]
    rank_scenes.start(2, *two, (rank_scenes.plain_step, {"cp": 2}, True, tmp_path))
    rank_scenes.start(4, *((rank_scenes.plain_step, sizes, False, tmp_path) for sizes in [*FOUR, {"cp": 4}]))
    assert {path.name for path in tmp_path.iterdir()} == {_name(sizes) for sizes in [*TWO, *FOUR, {"cp": 4}]}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_goes_from_two_ranks_to_four_to_one(tiny_store, tmp_path):
    """Every hand-over is bit for bit, and the losses are those of a run that one rank did alone."""
    options = {"steps": 12, "checkpoint_every": 4, "validate_every": 6}
    one, moving = (_config(tiny_store, tmp_path / name, **options) for name in ("one", "moving"))
    loop.train(one)
    rank_scenes.start(2, (rank_scenes.train, over(moving, fsdp=2), 4))
    four = over(moving, fsdp=2, tp=2)
    copies = [tmp_path / "from two", tmp_path / "from four", tmp_path / "from one"]
    rank_scenes.start(4, (rank_scenes.copy_state, four, copies[0]))
    shapes = _shapes(moving)
    _assert_same_states(sharded_state.whole(_newest(moving), shapes), sharded_state.whole(state.states_in(copies[0])[-1], shapes))
    rank_scenes.start(4, (rank_scenes.train, four, 8))
    assert _newest(moving).step == 8
    rank_scenes.copy_state(moving, copies[1])
    rank_scenes.start(2, (rank_scenes.copy_state, dataclasses.replace(over(moving, cp=2), output_dir=str(_as_run(copies[1]))), copies[2]))
    _assert_same_states(sharded_state.whole(_newest(moving), shapes), sharded_state.whole(state.states_in(copies[2])[-1], shapes))
    rank_scenes.train(moving)
    _assert_learned_alike(one, moving)


def _as_run(states: Path) -> Path:
    """A run's folder that has these states."""
    run = states.with_name(f"run {states.name}")
    run.mkdir()
    (run / "state").symlink_to(states)
    return run


def _assert_same_states(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_ranks_killed_at_any_moment_end_where_unbroken_ones_do(tiny_store, tmp_path):
    options = {"steps": 24, "checkpoint_every": 1, "validate_every": 12}
    unbroken, killed = (over(_config(tiny_store, tmp_path / name, **options), fsdp=2) for name in ("unbroken", "killed"))
    rank_scenes.start(2, (rank_scenes.train, unbroken))
    script = tmp_path / "train.py"
    script.write_text(
        "import pathlib, tiny_tokens, rank_scenes\n"
        "from emu3_vla.training.figures import LossConfig\n"
        "if __name__ == '__main__':\n"
        f"    config = tiny_tokens.config(pathlib.Path({str(tiny_store.path)!r}), pathlib.Path({killed.output_dir!r}), precision='fp32',\n"
        f"        loss=LossConfig(vision_loss_fraction=0.3), **{options!r})\n"
        "    rank_scenes.start(2, (rank_scenes.train, rank_scenes.over(config, fsdp=2)))\n"
    )
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests, tests / "training")))}
    moments, seen = random.Random(0), 0
    for _ in range(4):
        child = subprocess.Popen([sys.executable, script], env=environment)
        states, deadline = Path(killed.output_dir) / "state", time.monotonic() + 600
        while len(list(states.glob("step-*"))) == 0 or state.states_in(states)[-1].step <= seen:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(moments.random())
        child.send_signal(signal.SIGKILL)
        child.wait()
        time.sleep(1)  # its ranks end when it does
        seen = state.states_in(states)[-1].step
    assert 0 < seen < 24
    rank_scenes.start(2, (rank_scenes.train, killed))
    assert _records(killed) == _records(unbroken)
    shapes = _shapes(killed)
    _assert_same_states(*(sharded_state.whole(_newest(config), shapes) for config in (unbroken, killed)))
