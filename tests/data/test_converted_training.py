"""A foreign arm's recordings, converted, go through `tokenize` and `train`: what half of the users do with this program."""

from pathlib import Path

import numpy as np
import tiny_tokens
import torch
from arm_recordings import MAPPING, ForeignArm

from emu3_vla import cli
from emu3_vla.data.tokens import TokenStore
from emu3_vla.vision_tokenizer.light import LightTokenizer


def test_recordings_of_a_foreign_arm_become_a_policy(tmp_path: Path):
    ForeignArm(lengths=[30, 24, 26, 22]).write(tmp_path / "arm")
    (tmp_path / "mapping.yaml").write_text(MAPPING + "frame_stride: 5\ntasks: {pick it up: lift}\n")
    torch.manual_seed(0)
    LightTokenizer(tiny_tokens.LIGHT).eval().save_pretrained(tmp_path / "vision")
    convert = [f"source={tmp_path / 'arm'}", "target_format=zarr", f"mapping={tmp_path / 'mapping.yaml'}", "preset=debug"]
    assert cli.main(["convert", *convert, "steps_per_part=40", f"output_dir={tmp_path / 'store'}"]) == 0
    tokenize = [f"episodes={tmp_path / 'store'}", f"vision_tokenizer={tmp_path / 'vision'}", "preset=debug"]
    assert cli.main(["tokenize", *tokenize, f"output_dir={tmp_path / 'tokens'}"]) == 0
    tokens = TokenStore.open(tmp_path / "tokens")
    assert tokens.metadata["wordings"] == {"lift": ["pick it up"]} and tokens.metadata["shards"] == [0, 1]
    assert [len(episode.frame_step) for episode in tokens.episodes()] == [6, 5, 6, 5]
    policy = tiny_tokens.train(tokens.path, tmp_path / "train", steps=2, validation_fraction=0.5, chunks=1)
    import policies

    acting = policies.load(str(policy))
    acting.reset("pick it up")
    picture = {"rgb_static": np.zeros((200, 200, 3), np.uint8), "rgb_gripper": np.zeros((84, 84, 3), np.uint8), "robot_obs": np.zeros(15)}
    assert acting.infer(picture)["actions"].shape == (10, 7)
