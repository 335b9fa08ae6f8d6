"""What several ranks do in the tests of many ranks. In a module of its own, as every rank imports it; one start of ranks plays several."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import Emu3ForCausalLM, Emu3TextConfig

from emu3_vla.training import loop, processes, sharded_state, team
from emu3_vla.training.context import ContextParallel
from emu3_vla.training.loop import TrainConfig
from emu3_vla.training.optimizer import OptimizerConfig
from emu3_vla.training.parallel import ParallelConfig, Ranks
from emu3_vla.training.sharded import ShardedAdamW, distribute
from emu3_vla.training.sharded_state import ShardedSaver
from emu3_vla.training.source import open_source
from emu3_vla.training.state import NotSaved


class Enough(Exception):
    """This rank has done what the scene asks for."""


def play(scenes: list[tuple]) -> None:
    """One scene after another: (function, *arguments)."""
    torch.set_num_threads(1)
    for scene, *arguments in scenes:
        scene(*arguments)
        if dist.is_initialized():
            dist.barrier()


def train(config: TrainConfig, until: int = 0) -> None:
    """Train; until: a step with a state, after which the run is left as if it had been killed."""
    save = ShardedSaver.save

    def leave_after(saver: ShardedSaver, step: int, *arguments) -> None:
        save(saver, step, *arguments)
        if step == until:
            saver.wait()
            raise Enough

    ShardedSaver.save = leave_after
    try:
        loop.train(config)
    except Enough:
        pass
    finally:
        ShardedSaver.save = save


def copy_state(config: TrainConfig, folder: Path) -> None:
    """Load the newest state of a run on these ranks and write it into `folder`."""
    ours, optimizer = _loaded(config)
    saver = ours.saver(folder, 1)
    if saver:
        saver.save(sharded_state.load(Path(config.output_dir) / "state", optimizer), optimizer)
        saver.wait()


def full_disk(config: TrainConfig, folder: Path) -> None:
    """Write one state; a second one, for which the last rank has no room; and a third. Each rank notes what it was told."""
    _, optimizer = _loaded(config)
    saver = ShardedSaver(folder / "state")
    saver.save(1, optimizer)
    saver.wait()
    write = sharded_state.dcp.HuggingFaceStorageWriter.write_data

    def full(writer, plan, planner):
        write(writer, plan, planner).wait()  # a part of it arrives
        raise OSError(28, "No space left on device")

    if dist.get_rank() == dist.get_world_size() - 1:
        sharded_state.dcp.HuggingFaceStorageWriter.write_data = full
    saver.save(2, optimizer)
    try:
        saver.wait()
    except NotSaved as error:
        (folder / f"told-{dist.get_rank()}").write_text(str(error))
    finally:
        sharded_state.dcp.HuggingFaceStorageWriter.write_data = write
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "after").write_text(" ".join(sorted(path.name for path in (folder / "state").iterdir())))
    saver.save(3, optimizer)
    saver.wait()


def _loaded(config: TrainConfig) -> tuple[team.Replicas, object]:
    source = open_source(config.tokens, config.model.block_size)
    ours = team.form(config.parallel)
    dtype = loop.DTYPES[config.precision]
    ours.build(lambda: loop._new_model(config, source), lambda: loop.outline(config, source), source.vocabulary, dtype)
    return ours, ours.optimizer(config.optimizer, dtype)


PLAIN = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}


def plain_model() -> Emu3ForCausalLM:
    return Emu3ForCausalLM(Emu3TextConfig(**PLAIN))


def seeded_model() -> Emu3ForCausalLM:
    torch.manual_seed(0)
    return plain_model()


class _Logits(nn.Module):
    def __init__(self, model: Emu3ForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        return self.model(ids_BL, use_cache=False).logits


def plain_step(sizes: dict[str, int], documents: bool, folder: Path) -> None:
    """Logits, and weights after one step, of Transformers' own decoder over these ranks, against one rank's: their largest distances.

    documents: pack two documents into every row; with cp alone.
    """
    ranks = Ranks(ParallelConfig(**sizes))
    whole, model, context = distribute(_Logits, seeded_model, plain_model, ranks, torch.float32)
    optimizer = ShardedAdamW(model, OptimizerConfig(learning_rate=1e-2, warmup_steps=1), ranks)
    torch.manual_seed(5)
    ids_BL, targets_BL = torch.randint(3, 101, (2, 2, 24))
    here = torch.arange(24)
    if context:
        here = context.own(24)
        context.stand_at(here, (torch.arange(24) >= 11).long().expand(2, 24) if documents else None)
    logits = whole(ids_BL[:, here])
    _loss(logits, targets_BL[:, here]).div(ranks.data_count).backward()
    norm = optimizer.step(0, 1e-2)

    alone = seeded_model()
    expected = torch.cat([alone(ids_BL[:, :11]).logits, _after(alone, ids_BL, 11)], dim=1) if documents else alone(ids_BL).logits
    _loss(expected, targets_BL).backward()
    expected_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in alone.parameters()]).item()
    torch.testing.assert_close(logits, expected[:, here], rtol=1e-4, atol=1e-5)
    assert abs(norm - expected_norm) < 1e-4 * expected_norm
    for name, parameter in alone.named_parameters():
        gradient = dict(model.named_parameters())[name].grad.full_tensor() / min(1.0, 1.0 / norm)
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    if dist.get_rank() == 0:
        (folder / "-".join(f"{axis}{size}" for axis, size in sizes.items())).touch()


def _after(model: Emu3ForCausalLM, ids_BL: torch.Tensor, start: int) -> torch.Tensor:
    """Logits of the positions from `start`, which see no other, at their own places."""
    places = torch.arange(start, ids_BL.shape[1])[None]
    return model(ids_BL[:, start:], position_ids=places, use_cache=False).logits


def _loss(logits_BLV: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten(), reduction="sum") / 48


class Line:
    """A mesh axis without processes, for ContextParallel's arithmetic of positions."""

    def __init__(self, size: int, rank: int):
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def get_local_rank(self) -> int:
        return self._rank


def contexts(size: int) -> list[ContextParallel]:
    return [ContextParallel(Line(size, rank)) for rank in range(size)]


def start(ranks: int, *scenes: tuple) -> None:
    """Play scenes on so many ranks of this machine."""
    processes.run(play, ranks, list(scenes))


def over(config: TrainConfig, **sizes: int) -> TrainConfig:
    """The same run over a mesh."""
    return dataclasses.replace(config, parallel=ParallelConfig(**sizes))
