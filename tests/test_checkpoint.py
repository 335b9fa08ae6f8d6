"""Checkpoint folders: what is saved comes back; what is missing, cut short or foreign is named."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

import emu3_vla
from emu3_vla.checkpoint import CheckpointError, load


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy that may be spoilt."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "policy")


def test_comes_back_whole(tiny_checkpoint, tiny_store):
    loaded = emu3_vla.load(tiny_checkpoint).require_policy()
    weights = load_file(tiny_checkpoint / "model" / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.model.state_dict().items())
    assert not loaded.model.training
    assert loaded.vocabulary.action_size == loaded.action_tokenizer.vocab_size == tiny_store.metadata["action_vocab_size"]
    assert (loaded.policy.history, loaded.policy.horizon, loaded.policy.action_dim) == (2, 10, 7)
    assert loaded.provenance["config"]["steps"] == 6
    assert loaded.provenance["token_store"]["tokenizers"] == tiny_store.metadata["hashes"]
    assert 0 <= loaded.provenance["held_out"]["action_accuracy"] <= 1


def test_nothing_in_it_unpickles(tiny_checkpoint):
    endings = {path.suffix for path in tiny_checkpoint.rglob("*") if path.is_file()}
    assert endings <= {".safetensors", ".json", ".yaml"}


def test_dtype_leaves_rotary_frequencies_alone(tiny_checkpoint):
    one, other = (emu3_vla.load(tiny_checkpoint, dtype=dtype).model for dtype in (torch.float32, torch.bfloat16))
    assert other.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(one.model.rotary_emb.inv_freq, other.model.rotary_emb.inv_freq, atol=0, rtol=0)


def test_transformers_reads_the_model(tiny_checkpoint):
    from emu3_vla.model import BlockEmu3ForCausalLM

    again = BlockEmu3ForCausalLM.from_pretrained(tiny_checkpoint / "model")
    ours = load(tiny_checkpoint).model.state_dict()
    assert all(torch.equal(tensor.float(), ours[name].float()) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize(
    "name", ["model/model.safetensors", "model/vocabulary.json", "model/config.json", "normalizer.json", "vision_tokenizer/config.json"]
)
def test_missing_and_cut_files_are_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=rf"{name} is not the file that was saved.*cut short \({len(content) // 2} bytes\)"):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        load(folder)


def test_another_models_tokenizer_is_refused(folder):
    (folder / "text_tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="text_tokenizer/tokenizer.json is not the file that was saved with this model"):
        load(folder)


def test_tokenizer_of_another_size_is_refused_without_hashes(folder):
    """A folder put together by hand, with hashes to match, still has to fit."""
    from emu3_vla.text import TextTokenizer

    TextTokenizer.fit(["left and right", "right and left"], vocab_size=258).save_pretrained(folder / "text_tokenizer")
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["files"] = {name: digest for name, digest in provenance["files"].items() if "text" not in name}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(CheckpointError, match="text_tokenizer does not belong to this model: ids 258"):
        load(folder)


def test_parts_that_are_not_there(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere")
    (folder / "policy.yaml").unlink()
    with pytest.raises(CheckpointError, match="cannot act: policy.yaml missing"):
        load(folder).require_policy()
    (folder / "provenance.json").unlink()
    with pytest.raises(FileNotFoundError, match="provenance.json is missing"):
        load(folder)


def test_policy_settings_are_checked(folder):
    path = folder / "policy.yaml"
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(values | {"history": 1, "temperature": 0.5}))
    assert (load(folder).policy.history, load(folder).policy.temperature) == (1, 0.5)
    path.write_text(yaml.safe_dump(values | {"temperature": -1}))
    with pytest.raises(CheckpointError, match="temperature is -1"):
        load(folder)
    path.write_text(yaml.safe_dump(values | {"history": 5}))
    with pytest.raises(CheckpointError, match="policy.yaml cannot be used.*history is 5, expected 0 to 2"):
        load(folder)
    path.write_text(yaml.safe_dump(values | {"hystory": 1}))
    with pytest.raises(CheckpointError, match="hystory"):
        load(folder)
