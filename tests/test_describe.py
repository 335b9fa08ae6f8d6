"""Descriptions tell what a checkpoint is from headers alone, and everything that is wrong with it."""

import json
import shutil

import pytest
import safetensors
import small_emu3
import torch

import emu3_vla
from emu3_vla.checkpoint import CheckpointError
from emu3_vla.cli import main
from emu3_vla.describe import describe, lines


@pytest.fixture
def baai(tmp_path):
    return small_emu3.write_baai(tmp_path / "baai", small_emu3.decoder(), shard_bytes=30_000)


@pytest.fixture
def published(tmp_path):
    """A decoder with Emu3's ids, its text tokenizer inside and its vision tokenizer beside it."""
    folder = small_emu3.write_baai(tmp_path / "published" / "Emu3-Gen", small_emu3.decoder(**small_emu3.PUBLISHED_IDS))
    small_emu3.write_tiktoken(folder)
    small_emu3.write_vision(folder.parent / "Emu3-VisionTokenizer", codebook_size=32_768)
    return folder


@pytest.fixture
def no_weights_read(monkeypatch):
    """Reading a weight fails."""

    def refuse(*_, **__):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr("emu3_vla.checkpoint.weights.safe_open", refuse)
    monkeypatch.setattr("emu3_vla.vision_tokenizer.base.load_file", refuse)


def test_counts_are_those_of_the_loaded_model(tiny_checkpoint, baai, published):
    for folder in (tiny_checkpoint, baai, published):
        loaded, described = emu3_vla.load(folder), describe(folder)
        decoder = [part for name, part in described["parts"].items() if name != "vision_tokenizer"]
        assert sum(part["parameters"] for part in decoder) == sum(parameter.numel() for parameter in loaded.model.parameters())
        assert described["architecture"] == type(loaded.model).__name__ and described["layout"] == loaded.layout
        stored = sum(parameter.nbytes for parameter in loaded.model.parameters())
        if loaded.vision_tokenizer is not None:
            stored += sum(tensor.nbytes for tensor in loaded.vision_tokenizer.weights().values())
        assert described["memory"]["as stored"] == stored
        assert described["missing"] == described["mismatched"] == []


def test_quantised_sizes_are_those_measured(tmp_path):
    pytest.importorskip("torchao", reason="needs the extra quantization")
    from emu3_vla.quantization import quantize

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    folder = small_emu3.write_baai(tmp_path / "wide", small_emu3.decoder(**sizes))
    memory = describe(folder)["memory"]
    for kind in ("int8", "int4"):
        assert quantize(emu3_vla.load(folder, dtype=torch.bfloat16).model, kind).bytes_after == pytest.approx(memory[kind], rel=0.01)


def test_what_it_can_do(tiny_checkpoint, published, baai, no_weights_read):
    assert describe(tiny_checkpoint)["can"] == {"act": "", "draw": "", "film": "", "answer": ""}
    described = describe(published)
    assert described["vocabulary"]["kind"] == "Emu3" and described["vocabulary"]["ids"] == 184_622
    assert described["can"] == {"act": "its vocabulary has no actions", "draw": "", "film": "", "answer": ""}
    assert described["tokenizers"]["text_tokenizer"]["says"] == "151643 ids"
    assert "32768 codes" in described["tokenizers"]["vision_tokenizer"]["says"]
    shutil.rmtree(published.parent / "Emu3-VisionTokenizer")
    assert describe(published)["can"]["draw"] == "no vision_tokenizer"
    assert set(describe(baai)["can"].values()) == {"its vocabulary is not known"}


def test_univla_acts_with_the_parts_that_it_lacks(published, tiny_checkpoint):
    values = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(values | {"architectures": ["Emu3MoE"]}))
    described = describe(published)
    assert described["layout"] == "univla" and described["vocabulary"]["action"] == 2048
    assert described["can"]["act"] == "no action_tokenizer, normalizer.json, policy.yaml"
    described = describe(published, action_tokenizer=tiny_checkpoint / "action_tokenizer")
    assert described["vocabulary"]["action"] == emu3_vla.load(tiny_checkpoint).vocabulary.action_size != 2048
    assert described["can"]["act"] == "no normalizer.json, policy.yaml"


def test_transformers_layouts(tmp_path, no_weights_read):
    small_emu3.write_text(tmp_path / "trunk", head=False)
    described = describe(tmp_path / "trunk")
    assert described["architecture"] == "Emu3TextModel" and "no output head" in described["missing"][0]
    assert described["can"]["draw"].startswith("no whole decoder")


def test_everything_wrong_is_told_at_once(published, no_weights_read):
    weights = published / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    values = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(values | {"eoi_token_id": 5}))
    (published.parent / "Emu3-VisionTokenizer" / "config.json").write_text("{}")
    small_emu3.write_tiktoken(published, size=500_000)
    wrong = "\n".join(describe(published)["mismatched"])
    for said in (
        f"model.safetensors is damaged or cut short: {len(content) - 10} bytes",
        "eoi_token_id is 5, not 151853",
        "no vision tokenizer of a known kind",
        "emu3.tiktoken does not belong to this model: ids 500000",
    ):
        assert said in wrong
    weights.unlink()
    assert any("holds no weights" in text for text in describe(published)["missing"])


def test_wrong_shapes_and_missing_shards(baai, no_weights_read):
    values = json.loads((baai / "config.json").read_text())
    (baai / "config.json").write_text(json.dumps(values | {"vocab_size": 301}))
    assert any("lm_head.weight is (300, 32), expected (301, 32)" in text for text in describe(baai)["mismatched"])
    sorted(baai.glob("*.safetensors"))[1].unlink()
    assert any("is missing: 1 of the" in text for text in describe(baai)["missing"])


def test_our_folder_with_parts_gone_and_changed(tiny_checkpoint, tmp_path, no_weights_read):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "policy")
    (folder / "policy.yaml").unlink()
    described = describe(folder)
    assert described["absent"] == ["policy.yaml"] and described["can"]["act"] == "no policy.yaml" and not described["missing"]
    (folder / "normalizer.json").write_text("{}")
    assert any("normalizer.json is not the file that was saved" in text for text in describe(folder)["mismatched"])
    (folder / "text_tokenizer" / "tokenizer.json").unlink()
    assert any("tokenizer.json is missing" in text for text in describe(folder)["missing"])


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no checkpoint.*known:"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="unknown layout, model_type 'bert'"):
        describe(tmp_path)


def test_doctor_prints_it(published, tmp_path, capsys):
    assert main(["doctor", str(published), f"output_dir={tmp_path / 'one'}"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines() == lines(describe(published))
    for word in ("BAAI's original", "ids 184622", "bfloat16", "to draw", "its parts allow it", "absent"):
        assert word in printed
    assert json.loads((tmp_path / "one" / "doctor.json").read_text()) == json.loads(json.dumps(describe(published)))
    (published / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["doctor", f"checkpoint={published}", f"output_dir={tmp_path / 'two'}"])
    assert ended.value.code == 1 and "holds no weights" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "nowhere"), f"output_dir={tmp_path / 'three'}"]) == 2
    assert "is not a folder" in capsys.readouterr().err
