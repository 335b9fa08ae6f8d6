"""The shipped policy's way, step by step as docs/training.md has it, with debug presets: from nothing to a policy that was at the wheel and
does the rest too."""

import json

import pytest

from emu3_vla import cli

SAID = ("scene=envs.calvin.scene_numbers:SceneNumbers", "questions=envs.calvin.questions:Questions")
TAUGHT = (
    *("asked_fraction=0.1", "questions=4", "scene_fraction=0.85"),
    *("learn_codes=false", "model.code_dim=8", "model.hide_codes=0.1", "model.dropout=0.1"),
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def command(name: str, *options: str) -> None:
        assert cli.main([name, "preset=debug", *options]) == 0

    return command


def test_a_policy_is_made_as_the_shipped_one_was(run, tmp_path):
    for scene in "AD":
        run("collect", f"output_dir=seen_{scene}", f"env.scene={scene}", "shards=2", "chains_per_shard=1")
    run("train-tokenizer", "output_dir=tokenizer", "episodes=[seen_D,seen_A]")
    run("tokenize", "output_dir=tokens", "episodes=seen_D", "vision_tokenizer=tokenizer/vision_tokenizer", "state=[x,y,z,yaw,width]", *SAID)
    run("train", "output_dir=first", "tokens=tokens", "optimizer.muon_learning_rate=0.01", *TAUGHT)

    wheel = ("driver=first/policy", "demonstration.driven_probability=1", "demonstration.driven_steps=[5,10]")
    run("collect", "output_dir=driven", "seed=8", "shards=2", "chains_per_shard=1", "balanced=true", "chain_length=1", *wheel)
    run("tokenize", "output_dir=all_tokens", "episodes=[seen_D,driven]", "checkpoint=first/policy", *SAID)
    run("train", "output_dir=second", "tokens=all_tokens", "init_from=first/policy", "optimizer.muon_learning_rate=0.005", *TAUGHT)
    sizes = ("model.code_dim=8", "model.block_hidden=512")  # the first training's
    joint = ("preset=stage/joint,stage/debug", "tokens=all_tokens", "init_from=second/policy", *sizes)
    assert cli.main(["train", "output_dir=joint", *joint]) == 0
    depth = ("preset=stage/depth,stage/debug", "tokens=all_tokens", "init_from=joint/policy", *sizes)
    assert cli.main(["train", "output_dir=depth", *depth]) == 0
    answers = ("preset=stage/answers,stage/debug", "tokens=all_tokens", "init_from=depth/policy", "processes=1", *sizes)
    assert cli.main(["train", "output_dir=answers", *answers]) == 0
    run("eval", "output_dir=results", "policy=answers/policy", "eval.num_sequences=1", "eval.max_steps=20", "eval.workers=1")

    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["errors"] == 0 and results["num_sequences"] == 1
    last = json.loads((tmp_path / "answers" / "policy" / "provenance.json").read_text())
    told = last["started_from"]
    provenance = told["started_from"]
    began = [each["config"]["init_from"] for each in (last, told, provenance, provenance["started_from"])]
    assert (tmp_path / "depth/policy/policy.yaml").read_text() == (tmp_path / "joint/policy/policy.yaml").read_text()
    assert began == ["depth/policy", "joint/policy", "second/policy", "first/policy"]
    assert provenance["command"] == "train" and provenance["config"]["init_from"] == "second/policy"
    demonstrated, driven = provenance["token_store"]["episodes"]
    assert (demonstrated["store"], demonstrated["seed"], demonstrated["shards"]) == ("seen_D", 0, 2)
    assert (driven["seed"], driven["driver"], driven["balanced"]) == (8, "first/policy", True)
