"""Speed and memory of training, as ratios within one run.

    OMP_NUM_THREADS=1 python -m benchmarks.training                # all four
    OMP_NUM_THREADS=1 python -m benchmarks.training --only packing --steps 8

packing   real positions a second, against Transformers' Trainer with the same model, loss, bfloat16 and number of documents a step, padded
          to the longest of a batch instead of packed; the documents are the same mixture of all kinds
peak      share of this machine's own bfloat16 matrix products that a step of a 25 M-parameter model comes to
memory    peak of a step of the head over Emu3's 184,622 ids: all logits at once against a slice of the vocabulary at a time
loading   making a batch, against the step that learns from it

One thread. Rates are per second of processor time, so that other programs beside this one change them little; the load is printed. Matrix
products are measured likewise. Weights and documents are random: neither changes the arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

from emu3_vla import attention
from emu3_vla.cross_entropy import sliced_cross_entropy
from emu3_vla.data.tokens import Asked, TokenizedEpisode
from emu3_vla.documents import Batch, collate
from emu3_vla.model import BlockEmu3ForCausalLM, build_config
from emu3_vla.training import figures
from emu3_vla.training.figures import LossConfig
from emu3_vla.training.kinds import KINDS, Material
from emu3_vla.training.mixture import POOL_STEPS, MixtureStream
from emu3_vla.training.optimizer import FlatAdamW, OptimizerConfig
from emu3_vla.training.telemetry import PEAK_S, PEAK_SIDE, training_flops
from emu3_vla.vocabulary import CompactVocabulary, Emu3Vocabulary, ImageGrid
from envs.spec import RGB_GRIPPER, RGB_STATIC

PARTS = ("packing", "peak", "memory", "loading")
CONTEXT, ROWS = 1024, 8
VOCABULARY = CompactVocabulary(
    text_size=1024,
    action_size=1024,
    codebook_size=1024,
    images=(ImageGrid(name=RGB_STATIC, rows=16, columns=16), ImageGrid(name=RGB_GRIPPER, rows=12, columns=12)),
    block_size=4,
)
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "hidden_act": "relu2",
    "max_position_embeddings": 2048,
}
"""25 M parameters with the embeddings, heads and depth decoder."""
LOSS = LossConfig(mean_over="token", text_weight=1, special_weight=1, vision_weight=0.5, vision_loss_fraction=0.05)
MEMORY_POSITIONS, MEMORY_WIDTH = 1024, 256


def main() -> None:
    """Measure what was asked for and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--child", choices=["sliced", "whole"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        print(json.dumps(head_memory(arguments.child == "sliced")))
        return
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; torch {torch.__version__}")
    if "memory" in arguments.only:
        compare_memory()
    if set(arguments.only) - {"memory"}:
        compare_speed(arguments.only, arguments.steps)


def compare_speed(parts: list[str], steps: int) -> None:
    """Packed training beside a Trainer, beside the machine's own matrix products, and how long it waits for batches."""
    stream = mixture()
    ours = train_packed(stream, steps)
    if "packing" in parts:
        theirs = train_with_trainer(stream, steps)
        print(
            f"packing: {ours['positions_per_s']:.0f} positions/s packed, {theirs['positions_per_s']:.0f} with Trainer "
            f"({theirs['padding']:.0%} padding): {ours['positions_per_s'] / theirs['positions_per_s']:.2f}×"
        )
    if "peak" in parts:
        peak = product_rate()
        print(f"peak: {ours['flops'] / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s: {ours['flops'] / peak:.1%} ({ours['parameters'] / 1e6:.1f} M)")
    if "loading" in parts:
        print(f"loading: {ours['batch_s'] * 1e3:.1f} ms a batch, {ours['step_s']:.2f} s a step: {ours['batch_s'] / ours['step_s']:.2%}")


def train_packed(stream: MixtureStream, steps: int) -> dict[str, float]:
    """Our step, as the training loop takes it. The first is not counted."""
    model = new_model()
    attention.confine(model)
    optimizer = FlatAdamW(model, OptimizerConfig(), torch.bfloat16)
    model.train()
    positions = flops = step_s = 0.0
    batch_s = seconds_a_batch(stream)
    for step in range(steps + 1):
        batch = stream.batch(step)
        began = time.process_time()
        optimizer.zero_gradient()
        loss, chosen = loss_of(model, batch, step)
        loss.backward()
        optimizer.step(step, 1e-4)
        ended = time.process_time()
        if step:
            positions += batch.positions
            flops += training_flops(model, batch, chosen)
            step_s += ended - began
    return {
        "positions_per_s": positions / (steps * batch_s + step_s),
        "flops": flops / step_s,
        "batch_s": batch_s,
        "step_s": step_s / steps,
        "parameters": len(optimizer.master),
    }


def seconds_a_batch(stream: MixtureStream) -> float:
    """Over a whole pool, since its documents are planned together."""
    began = time.process_time()
    for step in range(POOL_STEPS, 2 * POOL_STEPS):
        stream.batch(step)
    return (time.process_time() - began) / POOL_STEPS


def train_with_trainer(stream: MixtureStream, steps: int) -> dict[str, float]:
    """Transformers' Trainer on the very documents of our steps, as many a step, in the order in which they were drawn."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    documents = [[document for row in stream.rows(step) for document in row] for step in range(steps + 1)]
    # Trainer takes as many documents every step; ours differ by a few.
    each = min(map(len, documents))
    shuffled = np.random.default_rng(0)
    documents = [step[number] for step in documents for number in shuffled.permutation(len(step))[:each]]
    counted = {"positions": 0, "padded": 0, "began": 0.0, "steps": 0}

    class Learner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = new_model()

        def forward(self, batch: list[Batch]) -> dict[str, torch.Tensor]:
            if counted["steps"]:
                counted["positions"] += batch[0].positions
                counted["padded"] += batch[0].ids_BL.numel()
            return {"loss": loss_of(self.model, batch[0], counted["steps"])[0]}

    class Clock(TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            counted["steps"] += 1
            if counted["steps"] == 1:
                counted["began"] = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=each,
            max_steps=steps + 1,
            learning_rate=1e-4,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=Learner(),
            args=options,
            train_dataset=documents,
            data_collator=lambda part: {"batch": [collate(part, VOCABULARY)]},
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = time.process_time() - counted["began"]
    return {"positions_per_s": counted["positions"] / seconds, "padding": 1 - counted["positions"] / counted["padded"]}


def loss_of(model: BlockEmu3ForCausalLM, batch: Batch, step: int) -> tuple[torch.Tensor, int]:
    """The loss of a batch, and how many blocks it predicts."""
    chosen = figures.choose_blocks(batch, LOSS.vision_loss_fraction, figures.document_seeds(batch, 0, step, 0, 1))
    sums, _ = figures.losses(model, batch, chosen)
    return figures.total(sums, figures.count_tokens(batch, chosen), LOSS), len(chosen)


def compare_memory() -> None:
    """The head with all logits and by slices of the vocabulary, each in a process of its own."""
    found = {}
    for name in ("whole", "sliced"):
        command = [sys.executable, "-m", "benchmarks.training", "--child", name]
        found[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    whole, sliced = (found[name]["peak"] / 2**20 for name in ("whole", "sliced"))
    print(
        f"memory: {MEMORY_POSITIONS} positions, {Emu3Vocabulary.size} ids, width {MEMORY_WIDTH}: {whole:.0f} MB with all logits, "
        f"{sliced:.0f} MB by slices, the weights' gradient included: {whole / sliced:.1f}×"
    )


def head_memory(by_slices: bool) -> dict[str, float]:
    """Bytes that forward and backward of the head need at most, beyond states and weights."""
    torch.manual_seed(0)
    weight = torch.randn(Emu3Vocabulary.size, MEMORY_WIDTH).bfloat16().requires_grad_()
    states = torch.randn(MEMORY_POSITIONS, MEMORY_WIDTH).bfloat16().requires_grad_()
    targets = torch.randint(0, Emu3Vocabulary.size, (MEMORY_POSITIONS,))
    (states[:4] @ weight[:4].T).sum().item()  # what the first product of a process allocates
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if by_slices:
        losses, _ = sliced_cross_entropy(states, weight, targets)
        losses.mean().backward()
    else:
        torch.nn.functional.cross_entropy((states @ weight.T).float(), targets).backward()
    return {"peak": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024}


def product_rate() -> float:
    """Floating-point operations a second of processor time of large bfloat16 products: the best."""
    left = torch.randn(PEAK_SIDE, PEAK_SIDE).bfloat16()
    best, until = 0.0, time.process_time() + 4 * PEAK_S
    while time.process_time() < until:
        began = time.process_time()
        left @ left
        best = max(best, 2 * PEAK_SIDE**3 / (time.process_time() - began))
    return best


def new_model() -> BlockEmu3ForCausalLM:
    """The model that is measured, from a fixed seed."""
    torch.manual_seed(0)
    return BlockEmu3ForCausalLM(build_config(VOCABULARY, **SIZES, block_hidden=512))


def mixture() -> MixtureStream:
    """Equally many documents of every kind, of episodes as the simulator gives them: sixty steps, a frame every five, 21 questions."""
    random = np.random.default_rng(0)
    episodes = [_episode(random) for _ in range(64)]
    texts = {"task": [random.integers(0, 1024, 7).tolist()]}
    material = Material(episodes=episodes, texts=texts, vocabulary=VOCABULARY, horizon=10, chunks=3, moments=4, questions=6)
    return MixtureStream(material, {name: 1 / len(KINDS) for name in KINDS}, context=CONTEXT, rows=ROWS, seed=0)


def _episode(random: np.random.Generator) -> TokenizedEpisode:
    frames = 12
    answers = [28, *([6] * 20)]  # the description is long, the other answers are short
    asked = [[(random.integers(0, 1024, 8).tolist(), random.integers(0, 1024, count).tolist()) for count in answers] for _ in range(frames)]
    return TokenizedEpisode(
        task="task",
        instruction="",
        shard=0,
        static_codes=random.integers(0, 1024, (frames, 16, 16)).astype(np.uint16),
        gripper_codes=random.integers(0, 1024, (frames, 12, 12)).astype(np.uint16),
        frame_step=np.arange(frames) * 5,
        action_ids=[random.integers(0, 1024, int(count)).tolist() for count in random.integers(6, 14, frames)],
        chunk_imitate=np.ones(frames, bool),
        asked=Asked.of(asked),
    )


if __name__ == "__main__":
    main()
