"""The command of docs/scaling.md through torchrun itself, on CPUs: two ranks learn what one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from emu3_vla import cli
from emu3_vla.training import loop

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"code_dim": 8, "depth_size": 16, "depth_layers": 1, "depth_heads": 2, "block_hidden": 16}
RUN = {"steps": 3, "batch_size": 4, "precision": "fp32", "validation_documents": 8, "validation_fraction": 0.25}
RUN |= {"validate_every": 3, "checkpoint_every": 3, "log_every": 1, "loss.vision_loss_fraction": 0.3}


def _records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_torchrun_learns_what_one_process_does(tiny_store, tmp_path):
    options = [f"{name}={value}" for name, value in (RUN | {f"model.{name}": size for name, size in SIZES.items()}).items()]
    options.append(f"tokens={tiny_store.path}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={_free_port()}"]
    command = [*torchrun, "-m", "emu3_vla.cli", "train", *options, f"output_dir={tmp_path / 'two'}", "parallel.fsdp=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(str(tmp_path / "two" / "policy")) == 1, "the leading rank alone says where it is"
    (tmp_path / "one").mkdir()
    loop.main(cli.compose("train", [*options, f"output_dir={tmp_path / 'one'}"]))
    one, two = (_records(tmp_path / name) for name in ("one", "two"))
    assert [record["step"] for record in two] == [1, 2, 3, 3]
    for left, right in zip(one, two, strict=True):
        left, right = (record.get("validation", record) for record in (left, right))
        losses = [key for key in left if key.startswith("loss")]
        assert len(losses) >= 3
        for key in losses:
            assert right[key] == pytest.approx(left[key], rel=1e-4, abs=2e-5), (key, left)
