"""Next-token prediction on a token store.

    emu3-vla train tokens=outputs/tokenize/first output_dir=outputs/train/first
    emu3-vla train preset=debug tokens=... output_dir=...
    emu3-vla train preset=stage/vla tokens=... output_dir=...     # one of the stages of docs/training.md

Every step: a batch that depends on (seed, step) alone → summed losses per kind of token → their weighted means over all processes →
one clipped AdamW step → the weights' moving average. A run that was killed and started again ends with the same losses and weights as
one that was not. Runs in `processes` processes of one thread each, or in those that torchrun started.

Leaves in output_dir: policy/ (the checkpoint folder, averaged weights), metrics.jsonl, state/ (to resume), samples/ where asked for, and
adapter/ where adapters learnt.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from emu3_vla import checkpoint, lora
from emu3_vla.checkpoint.hub import find_folder
from emu3_vla.documents import KINDS, Batch
from emu3_vla.lora import LoraSettings
from emu3_vla.model import BlockEmu3ForCausalLM
from emu3_vla.training import depth_only, own_pictures, preference, processes, sharded_state, state, team
from emu3_vla.training import figures as figures_of
from emu3_vla.training.figures import Figures, LossConfig
from emu3_vla.training.initial import as_init_from, left_unsaid, outline
from emu3_vla.training.initial import new_model as _new_model
from emu3_vla.training.mixture import MixtureConfig
from emu3_vla.training.optimizer import FlatAdamW, OptimizerConfig
from emu3_vla.training.parallel import DEVICES, ParallelConfig
from emu3_vla.training.preference import PairBatch, PreferenceConfig
from emu3_vla.training.prefetch import prefetched
from emu3_vla.training.sharded import ShardedAdamW
from emu3_vla.training.source import Source, Stream, open_source
from emu3_vla.training.telemetry import EXTRAS, Metrics, Pace, live_line, measured_peak, training_flops

if TYPE_CHECKING:
    from emu3_vla.training.samples import Sampler

EXPORTS = ("last", "best")
WHITENED_OVER = 8
"""Batches that say what the states are like which a depth decoder reads that learns alone."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of the decoder; the names are Emu3TextConfig's and BlockEmu3Config's."""

    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    hidden_act: str = "relu2"
    dropout: float = 0.0  # of attention weights and of what each layer adds
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 2048
    block_size: int = 4  # a trunk position carries block_size² vision codes
    code_dim: int = 64
    block_hidden: int = 512
    hide_codes: float = 0.0
    depth_size: int = 128
    depth_layers: int = 2
    depth_heads: int = 4
    depth_noise: float = 0.0
    foretold_size: int = 512  # of what reads the words that foretell a picture, where scene_first has some

    def __post_init__(self):
        for heads, size in (("num_attention_heads", "hidden_size"), ("depth_heads", "depth_size")):
            if getattr(self, size) % getattr(self, heads):
                raise ValueError(f"model.{size}={getattr(self, size)} is no multiple of model.{heads}={getattr(self, heads)}")
        if self.foretold_size < 1:
            raise ValueError(f"model.foretold_size is {self.foretold_size}, expected at least 1")
        for name in ("dropout", "hide_codes", "depth_noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}, expected at least 0 and below 1")

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of model.build_config."""
        values = dataclasses.asdict(self)
        rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
        values.pop("block_size")  # the vocabulary's
        return values | {"attention_dropout": values.pop("dropout"), "rope_parameters": rope}

    def plain_arguments(self) -> dict[str, Any]:
        """As keyword arguments of model.build_plain_config: without what blocks need."""
        of_blocks = ("block_", "code_", "hide_", "depth_", "foretold_")
        return {name: value for name, value in self.arguments().items() if not name.startswith(of_blocks)}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Raises ValueError for values that cannot work."""

    tokens: str  # folder of a token store
    output_dir: str = ""
    seed: int = 0
    steps: int = 2000
    batch_size: int = 64  # documents a step, over all processes; rows where there is a context, pairs where there are preferences
    context: int = 0  # positions of a row that documents of the mixture are packed into; 0: a document a row, padded
    chunks: int = 3  # most chunks of a document, so up to chunks - 1 past ones
    asked_fraction: float = 0.0  # of the documents, that are two images and questions about them instead of acting
    questions: int = 6  # of such a document
    scene_fraction: float = 0.0  # of the acting documents, that say what there is to see before each chunk; above 0 the policy does
    scene_first: bool = False  # say before drawn, filmed and foreseen pictures what they will show; init_from brings it
    history: int = -1  # past chunks that the policy shows when acting; -1: chunks - 1
    temperature: float = 0.0  # of the policy's action ids when acting; 0: the likeliest
    processes: int = 1  # one thread each
    device: str = "auto"  # cuda, a GPU a process; cpu; auto: GPUs where there are some
    data_workers: int = 0  # processes that make batches, of each training process; 0: one thread, enough beside a CPU
    precision: str = "bf16"  # of weights in use, activations and gradients; masters, moments and average are float32 always
    recompute_activations: bool = False  # in the backward pass, layer by layer, instead of keeping them: less memory, a third more work
    compile: bool = False  # needs a C++ compiler; about 15 s once, then faster steps
    codes_from_tokenizer: bool = True  # new embeddings of codes begin as the vision tokenizer's code vectors, projected
    learn_codes: bool = True  # false: they stay so
    init_from: str = ""  # a checkpoint whose weights to start from, a folder or a shipped name; it brings its model.* sizes
    own_pictures: float = 0.0  # of the supervised pictures, whose blocks before the trunk reads as the model itself would write them
    only_depth: bool = False  # the depth decoder of init_from alone learns: pictures change, and acting and answers stay what they are
    lora_rank: int = 0  # of adapters that learn in place of the weights of init_from; 0: all weights learn
    lora_alpha: float = 32.0  # an adapter's output is scaled by lora_alpha / lora_rank
    validation_fraction: float = 0.05  # of the shards
    validation_documents: int = 256
    validate_every: int = 500
    checkpoint_every: int = 200
    keep_states: int = 1  # of the newest, beside the best: that with the least held-out loss of actions
    export: str = "last"  # which weights become the policy: last, or best
    samples_every: int = 0  # steps, after which the averaged weights write into held-out documents, in samples/; 0: never
    samples: int = 4  # such documents, of each kind that is trained on
    log_every: int = 10
    log_to: tuple[str, ...] = ()  # beside metrics.jsonl: tensorboard, wandb
    model: ModelSizes = field(default_factory=ModelSizes)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # ranks that share one model; see docs/scaling.md

    RESUMES_WITH: ClassVar[tuple[str, ...]] = ("parallel", "samples_every", "samples", "device", "data_workers")
    """Options that may be others when a run goes on."""

    def __post_init__(self):
        positive = ("steps", "batch_size", "chunks", "questions", "processes", "validation_documents", "samples")
        for name in (*positive, "validate_every", "checkpoint_every", "log_every", "keep_states"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.data_workers < 0:
            raise ValueError(f"data_workers is {self.data_workers}, expected processes, or 0 for a thread")
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}, expected one of {', '.join(DEVICES)}")
        if self.samples_every < 0:
            raise ValueError(f"samples_every is {self.samples_every}, expected steps, or 0 for no samples")
        if self.samples_every and self.preference.pairs:
            raise ValueError(f"samples_every={self.samples_every} writes into held-out documents, and preference.pairs has pairs instead")
        if self.precision not in DTYPES:
            raise ValueError(f"precision is {self.precision!r}, expected one of {', '.join(DTYPES)}")
        if self.only_depth and not (self.init_from and self.loss.vision_weight and not self.lora_rank):
            raise ValueError(
                "only_depth=true learns to write the pictures of a checkpoint: name it in init_from, with loss.vision_weight above 0, "
                "without lora_rank"
            )
        if self.loss.keep and (not self.init_from or self.only_depth or self.preference.pairs):
            raise ValueError(
                f"loss.keep={self.loss.keep} holds what a model does while its trunk learns from documents: name it in init_from, without "
                "only_depth and preference.pairs"
            )
        if self.loss.keep and (self.lora_rank or self.optimizer.weight_decay):
            raise ValueError(
                f"loss.keep={self.loss.keep} leaves alone what writes the kinds that are not learnt: it needs optimizer.weight_decay=0 and "
                f"lora_rank=0, not {self.optimizer.weight_decay} and {self.lora_rank}"
            )
        if self.lora_rank and not self.init_from:
            raise ValueError(f"lora_rank={self.lora_rank} adapts given weights: name a checkpoint folder in init_from")
        if self.lora_rank:
            self.lora  # noqa: B018 - refuses what cannot be
        for name in self.log_to:
            if name not in EXTRAS:
                raise ValueError(f"log_to names {name!r}, expected some of {', '.join(EXTRAS)}")
        if self.export not in EXPORTS:
            raise ValueError(f"export is {self.export!r}, expected one of {', '.join(EXPORTS)}")
        if not -1 <= self.history < self.chunks:
            raise ValueError(f"history is {self.history}, expected -1 to {self.chunks - 1} with chunks={self.chunks}")
        if self.batch_size % self.processes:
            raise ValueError(f"batch_size={self.batch_size} is no multiple of processes={self.processes}")
        if not 0 <= self.asked_fraction < 1:
            raise ValueError(f"asked_fraction is {self.asked_fraction}, expected at least 0 and below 1")
        for name in ("scene_fraction", "own_pictures"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected within [0, 1]")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}, expected between 0 and 1")
        self._check_stage()
        self._check_parallel()

    def _check_stage(self) -> None:
        mixed, preferred = bool(self.mixture.shares()), bool(self.preference.pairs)
        if self.context and not mixed and not preferred:
            raise ValueError(f"context={self.context} packs documents of a mixture or pairs: give mixture.act=1, say, or preference.pairs")
        if (mixed or preferred) and not self.context:
            raise ValueError("documents of a mixture and of pairs are packed into rows: give context, the positions of a row")
        if preferred and self.own_pictures:
            raise ValueError(f"own_pictures={self.own_pictures} is of documents that are learnt, not of preference.pairs")
        if mixed and preferred:
            raise ValueError("preference.pairs and a mixture are two kinds of training; give one of them")
        if mixed and self.asked_fraction:
            raise ValueError(f"asked_fraction={self.asked_fraction} is of the acting stream; in a mixture it is mixture.ask")
        if self.scene_fraction and (preferred or (mixed and not self.mixture.act)):
            raise ValueError(f"scene_fraction={self.scene_fraction} is of documents that act, and there are none: give mixture.act, or 0")
        if self.scene_first and self.mixture.act and not self.scene_fraction:
            raise ValueError("scene_first=true: a model that foretells pictures also says what it sees when it acts; give scene_fraction")
        if preferred and not self.init_from:
            raise ValueError("preferences are learnt against the weights that training starts from: name a checkpoint folder in init_from")
        if not 0 <= self.context <= self.model.max_position_embeddings:
            raise ValueError(f"context={self.context}, expected 0 to model.max_position_embeddings={self.model.max_position_embeddings}")

    def _check_parallel(self) -> None:
        parallel = self.parallel
        if parallel.ranks == 1:
            return
        if self.processes > 1:
            raise ValueError(f"processes={self.processes} hold the whole model each; with parallel.* set parallel.dp instead")
        for name, value in self.needs_whole_models().items():
            if not parallel.copies_alone:
                raise ValueError(f"{name}={value} with {parallel}: every rank must hold the whole model; use parallel.dp alone")
        if self.context and parallel.cp > 1:
            raise ValueError(f"context={self.context} with parallel.cp={parallel.cp}: rows of several documents are not shared by position")
        if self.batch_size % (parallel.dp * parallel.fsdp):
            raise ValueError(
                f"batch_size={self.batch_size} is no multiple of parallel.dp × parallel.fsdp = {parallel.dp} × {parallel.fsdp}"
            )
        parallel.check_model(self.model.num_attention_heads, self.model.num_key_value_heads, self.model.intermediate_size)

    def needs_whole_models(self) -> dict[str, Any]:
        """Options that are set and for which every process holds the whole model, by name."""
        options = {
            "lora_rank": self.lora_rank,
            "only_depth": self.only_depth,
            "own_pictures": self.own_pictures,
            "loss.keep": self.loss.keep,
            "preference.pairs": self.preference.pairs,
            "optimizer.muon_learning_rate": self.optimizer.muon_learning_rate,
        }
        return {name: value for name, value in options.items() if value}

    @property
    def lora(self) -> LoraSettings:
        """Of the adapters, where lora_rank asks for some."""
        return LoraSettings(rank=self.lora_rank, alpha=self.lora_alpha)


class TrainingDiverged(RuntimeError):
    """A loss or the gradient became NaN or infinite."""


def main(config: TrainConfig) -> None:
    """Train, or go on where an earlier call with the same output_dir was cut off. Prints the checkpoint folder."""
    if config.compile and not (shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")):
        raise ValueError("compile=true needs a C++ compiler, and none of g++, clang++, c++ is on the path; use compile=false")
    config = as_init_from(config)
    if lost := left_unsaid(config):
        print(lost)
    source = open_source(config.tokens, config.model.block_size)  # a wrong path ends here, not in a child process
    ranks = max(config.processes, config.parallel.ranks)
    if ranks > 1:
        del source
    policy = Path(config.output_dir) / "policy"
    if not policy.exists():
        processes.run(train, ranks, config)
    if processes.rank() == 0:
        print(policy)


def train(config: TrainConfig) -> None:
    """The loop itself, in every process."""
    torch.set_num_threads(1)
    commit = _git_commit()  # of the code that is loaded now; the folder may change while it runs
    output, leads = Path(config.output_dir), processes.rank() == 0
    console = Console(quiet=not leads)
    ours = team.form(config.parallel, whole=bool(config.needs_whole_models()), device=config.device)
    source = open_source(config.tokens, config.model.block_size)
    stream, held_out = preference.streams(config, source) if config.preference.pairs else source.streams(config)

    dtype = DTYPES[config.precision]
    model = ours.build(lambda: _new_model(config, source), lambda: outline(config, source), source.vocabulary, dtype)
    if config.lora_rank:
        ours.adapt(config.lora)
    if config.loss.keep:
        ours.keep(config.loss.kept_kinds, dtype)
    if config.only_depth:
        depth_only.whiten(model, (stream.batch(step) for step in range(WHITENED_OVER)))
    optimizer = ours.optimizer(config.optimizer, dtype)
    if config.preference.pairs:
        preference.measure_reference(model, stream, held_out)  # before a saved state replaces the weights that training started from
    validation = ours.share(held_out.fixed(config.validation_documents))
    step = sharded_state.load(output / "state", optimizer)
    saver = ours.saver(output / "state", config.keep_states)
    output.mkdir(parents=True, exist_ok=True)
    sampler = _sampler(config, held_out, source) if config.samples_every and leads else None
    metrics = Metrics(output, step, leads=leads, extras=config.log_to, config=dataclasses.asdict(config))
    pace = Pace(ours.data_count, measured_peak(dtype, ours.device))
    if config.recompute_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        for layer in model.model.layers:  # layer by layer: one graph serves all, and compiles in seconds
            layer.compile(dynamic=True)
    console.print(
        f"{optimizer.size / 1e6:.2f} M parameters; {len(stream)} documents an epoch, "
        f"{stream.epochs(config.steps):.1f} epochs; from step {step} to {config.steps}"
    )
    with _progress(console, disable=not leads) as progress:
        bar = progress.add_task("train", total=config.steps, completed=step, status="")
        running, skipped = Figures.zero(), 0
        batches = _batches(stream, ours, step, config)
        pace.start()
        while step < config.steps:
            model.train()
            batch, waited_s = next(batches)
            rate = config.optimizer.rate(step, config.steps)
            learned, norm, flops = _step(model, optimizer, batch, ours, step, rate, config)
            step += 1
            skipped = 0 if config.optimizer.accepts(norm) else skipped + 1
            if skipped:
                metrics({"step": step, "event": "skipped", "gradient_norm": str(norm), "in_a_row": skipped})
                console.print(f"step {step} is skipped: the gradient's norm is {norm:g}")
                _check_skipped(skipped, step, norm, learned, config)
            else:
                running.add(learned)
            pace.count(batch, flops, waited_s)

            if step % config.log_every == 0 or step == config.steps:
                record = {"step": step} | _rounded(running.over_processes().means())
                record |= {"gradient_norm": round(norm, 4) if math.isfinite(norm) else str(norm), "lr": rate}
                record |= pace.rates()
                metrics(record)
                progress.update(bar, completed=step, status=live_line(record))
                running = Figures.zero()
                pace.start()
            measured: dict[str, float] = {}
            if step % config.validate_every == 0 or step == config.steps:
                measured = _validate(model, optimizer, validation, ours, config)
                metrics({"step": step, "validation": measured})
                console.print(f"step {step} held out: {live_line(measured)}", soft_wrap=True)
                pace.start()
            if config.samples_every and (step % config.samples_every == 0 or step == config.steps):
                # Before this step's state is saved: whoever goes on from it has its samples already.
                with ours.averaged_model(optimizer) as averaged:
                    if sampler:
                        console.print(f"step {step} samples: {sampler.write(step, averaged.eval())}", soft_wrap=True)
                pace.start()
            if saver and (measured or step % config.checkpoint_every == 0):
                saver.save(step, optimizer, measured)
    metrics.close()
    if saver:
        chosen = saver.best() if config.export == "best" else saver.newest()
        if leads:
            _export(output / "policy", config, model, optimizer, source, chosen, commit, ours.averaged_weights(chosen, optimizer))


def _batches(stream: Stream | preference.PairStream, ours: team.Replicas, step: int, config: TrainConfig) -> Iterator[tuple]:
    """This process's batches from `step` on, each with the seconds that were waited for it."""
    make = partial(stream.batch, rank=ours.data_rank, processes=ours.data_count)
    return prefetched(make, step, config.steps, workers=config.data_workers, pinned=ours.device.type == "cuda")


def _step(
    model: BlockEmu3ForCausalLM,
    optimizer: FlatAdamW | ShardedAdamW,
    batch: Batch | PairBatch,
    ours: team.Replicas,
    step: int,
    rate: float,
    config: TrainConfig,
) -> tuple[Figures, float, float]:
    """One optimiser step. Returns this process's figures, the gradient's norm (see OptimizerConfig.accepts), and the operations it took."""
    torch.manual_seed((config.seed * 1_000_003 + step) * 4_099 + ours.seed)  # dropout
    if isinstance(batch, PairBatch):
        batch = batch.to(ours.device)
        optimizer.zero_gradient()
        loss, learned = preference.losses(model, batch, config.preference)
        loss.backward()
        return learned, optimizer.step(step, rate), training_flops(model, batch.batch, len(batch.batch.codes_NC))
    seeds = figures_of.document_seeds(batch, config.seed, step, ours.data_rank, ours.data_count)
    chosen = figures_of.choose_blocks(batch, config.loss.vision_loss_fraction, seeds)
    batch = figures_of.thin_codes(batch, config.loss.vision_loss_fraction, seeds)
    # Counted before the loss, so that each process weighs its sums as if it saw the whole batch.
    tokens = ours.tokens(batch, chosen)
    kept = ours.kept(batch)
    flops = training_flops(model, batch, len(chosen)) / ours.sharing
    optimizer.zero_gradient()
    # Up to here all is counted on the CPU; a GPU would have to be waited for at each number.
    batch, others = batch.to(ours.device), {}
    if config.own_pictures:
        rounds = own_pictures.rounds_of(config.seed, step)
        others["read"] = own_pictures.with_own(model, batch, config.own_pictures, rounds, seeds)
    sums, learned = ours.losses(batch, chosen.to(ours.device), config.loss.label_smoothing, **others)
    loss = figures_of.total(sums[: len(KINDS)], tokens, config.loss)
    if kept:
        loss = loss + config.loss.keep / kept * sums[-1]
    if chosen.numel() or not config.only_depth:  # of an empty row, nothing reaches a depth decoder that learns alone
        loss.backward()
    return learned, optimizer.step(step, rate), flops


def _check_skipped(skipped: int, step: int, norm: float, learned: Figures, config: TrainConfig) -> None:
    """Raises TrainingDiverged where too many steps in a row were skipped."""
    if skipped > config.optimizer.skip_most:
        raise TrainingDiverged(
            f"step {step}: the gradient's norm is {norm}, mean losses {learned.means()}; nothing was updated"
            + (f", and neither in the {skipped - 1} steps before" if skipped > 1 else "")
            + f". Lower optimizer.learning_rate={config.optimizer.learning_rate} or use precision=fp32, with a new output_dir"
        )


@torch.no_grad()
def _validate(
    model: BlockEmu3ForCausalLM,
    optimizer: FlatAdamW | ShardedAdamW,
    batches: list[Batch] | list[PairBatch],
    ours: team.Replicas,
    config: TrainConfig,
) -> dict[str, float]:
    """Means over held-out documents, all their blocks included, with the averaged weights."""
    model.eval()
    sums = Figures.zero()
    with optimizer.averaged():
        for batch in batches:
            batch = batch.to(ours.device)
            if isinstance(batch, PairBatch):
                part = preference.measured(model, batch, config.preference)
            else:
                _, part = ours.losses(batch, torch.arange(len(batch.codes_NC), device=ours.device))
            sums.add(part)
    sums = sums.over_processes()
    return _rounded(sums.means() | {"loss": sums.total(config.loss)})


def _sampler(config: TrainConfig, held_out: Stream, source: Source) -> Sampler:
    from emu3_vla.training.samples import Sampler  # Rerun takes a while to import

    return Sampler(Path(config.output_dir) / "samples", held_out.shown(config.samples), source)


def _export(
    folder: Path,
    config: TrainConfig,
    model: BlockEmu3ForCausalLM,
    optimizer: FlatAdamW | ShardedAdamW,
    source: Source,
    chosen: state.Saved,
    commit: str,
    averaged: dict[str, torch.Tensor],
) -> None:
    history = config.chunks - 1 if config.history < 0 else config.history
    policy = checkpoint.PolicySettings(
        history=history,
        trained_history=config.chunks - 1,
        horizon=source.horizon,
        action_dim=source.action_dim,
        temperature=config.temperature,
        state=source.store.metadata.get("state"),
        scene=source.store.metadata.get("scene") if config.scene_fraction or config.scene_first else None,
        scene_first=config.scene_first,
        actions=source.units,
    )
    if config.only_depth:
        averaged = depth_only.folded(model, averaged)
    if config.init_from and (config.only_depth or config.preference.pairs):  # how it acts is not what is learnt
        policy = checkpoint.read_policy(find_folder(config.init_from) / checkpoint.POLICY)
    settings = dataclasses.asdict(config)
    settings.pop("output_dir")
    provenance = {
        "command": "train",
        "config": settings,
        "seed": config.seed,
        "git_commit": commit,
        "token_store": source.manifest(),
        "parameters": optimizer.size,
        "step": chosen.step,
        "held_out": chosen.held_out,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }
    if config.init_from:
        provenance["started_from"] = checkpoint.came_from(find_folder(config.init_from))
    checkpoint.save(
        folder,
        config=model.config,
        weights=_merged(averaged, folder.parent, config, source),
        vocabulary=source.vocabulary,
        tokenizers=source.folder,
        policy=policy,
        provenance=provenance,
    )


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in values.items()}


def _progress(console: Console, disable: bool) -> Progress:
    columns = (MofNCompleteColumn(), BarColumn(20), TextColumn("{task.fields[status]}"), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=disable)


def _merged(averaged: dict[str, torch.Tensor], output: Path, config: TrainConfig, source: Source) -> dict[str, torch.Tensor]:
    """What the policy gets, float32. Adapters are merged into the weights that they adapt, and kept in adapter/ too."""
    if not config.lora_rank and config.learn_codes and not config.only_depth and not config.loss.keep:
        return averaged
    model = _new_model(config, source)  # the weights in use were rounded
    if not config.lora_rank:
        return model.state_dict() | averaged
    adapted = lora.attach(model, config.lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in averaged:
                parameter.copy_(averaged[name])
    temporary = output / ".adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    lora.save_adapter(adapted, temporary)
    shutil.rmtree(output / "adapter", ignore_errors=True)
    temporary.rename(output / "adapter")
    lora.merge(adapted)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _git_commit() -> str:
    """Commit of the code that ran, '+changes' if it was edited since; 'unknown' outside a git checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed.strip() else "")
