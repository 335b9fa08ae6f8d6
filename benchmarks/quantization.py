"""What rounding the weights costs and saves: the logits of a policy's action ids against those in float32.

    pip install 'emu3-vla[quantization]'
    OMP_NUM_THREADS=1 python benchmarks/quantization.py                          # the shipped policy
    OMP_NUM_THREADS=1 python benchmarks/quantization.py --policy <folder> --looks 100

The policy looks at the reset states of the first official chains and writes one chunk for each in float32; every variant then reads the
same documents. "memory" is the decoder's parameters as they are stored. "error" is the relative error of the logits over the action ids
(root mean square, mean taken off, as a softmax does), "same" the share of ids that would be chosen alike. "ms" is the least time of one
document through the decoder, with one thread.
"""

from __future__ import annotations

import argparse
import time

import torch

import policies
from emu3_vla import checkpoint
from emu3_vla.documents import ActionChunk, Batch, Image, Text, collate
from emu3_vla.quantization import nbytes, quantize
from envs.calvin import CalvinEnv
from envs.calvin.language import validation_instruction
from eval.sequences import initial_state, long_horizon_sequences

VARIANTS = (  # what it is called, dtype, kind, group size
    ("float32", torch.float32, None, 0),
    ("bfloat16", torch.bfloat16, None, 0),
    ("int8, float32", torch.float32, "int8", 0),
    ("int8, bfloat16", torch.bfloat16, "int8", 0),
    ("int4 by 128, float32", torch.float32, "int4", 128),
    ("int4 by 128, bfloat16", torch.bfloat16, "int4", 128),
    ("int4 by 32, bfloat16", torch.bfloat16, "int4", 32),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", default=policies.SHIPPED, help="a shipped name or a checkpoint folder")
    parser.add_argument("--looks", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = policies.checkpoint_folder(arguments.policy)
    batches = documents(folder, arguments.looks)
    reference = None
    print(f"{'decoder':<22} {'memory':>9} {'error':>8} {'same':>7} {'ms':>7}")
    for name, dtype, kind, group_size in VARIANTS:
        model = checkpoint.load(folder, dtype=dtype).model
        if kind:
            quantize(model, kind, group_size=group_size)
        logits, seconds = read(model, checkpoint.load(folder).vocabulary, batches)
        reference = logits if reference is None else reference
        error = (logits - reference).norm() / reference.norm()
        same = (logits.argmax(1) == reference.argmax(1)).float().mean()
        print(f"{name:<22} {nbytes(model) / 1e6:>6.1f} MB {error:>8.4f} {same:>7.3f} {seconds * 1e3:>7.1f}", flush=True)


def documents(folder, looks: int) -> list[Batch]:
    """The policy's first decision of each of the first chains, as documents of one chunk."""
    policy, env = policies.load(str(folder)), CalvinEnv(scene="D", observe="on_demand")
    parts, batches = policy.checkpoint, []
    for condition, tasks in long_horizon_sequences()[:looks]:
        robot_obs, scene_obs = initial_state(condition)
        env.reset(options={"robot_obs": robot_obs, "scene_obs": scene_obs})
        observation = env.observe()
        policy.reset(validation_instruction(tasks[0]))
        ids = policy.infer(observation)["token_ids"]
        images = [
            Image(grid.name, parts.vision_tokenizer.encode_camera(grid.name, observation[grid.name][None])[0].numpy())
            for grid in parts.vocabulary.images
        ]
        text = Text(parts.text_tokenizer.encode(validation_instruction(tasks[0])))
        batches.append(collate([[text, *images, ActionChunk(ids)]], parts.vocabulary))
    env.close()
    return batches


@torch.inference_mode()
def read(model, vocabulary, batches: list[Batch]) -> tuple[torch.Tensor, float]:
    """Logits (ids, action_size + 1) before every action id and the end of chunk, centred; and the least seconds of a document."""
    start, end = vocabulary.action_start, vocabulary.end_of_chunk + 1
    rows, seconds = [], []
    for batch in batches:
        began = time.perf_counter()
        logits = model(inputs_embeds=model.embed(batch), use_cache=False).logits[0]
        seconds.append(time.perf_counter() - began)
        targets = batch.targets_BL[0]
        rows.append(logits[(targets >= start) & (targets < end), start:end].float())
    logits = torch.cat(rows)
    return logits - logits.mean(1, keepdim=True), min(seconds)


if __name__ == "__main__":
    main()
