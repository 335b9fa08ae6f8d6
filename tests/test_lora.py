"""Adapters attach to any decoder, learn, come back from their folder, and merge into the same function."""

import json

import pytest
import small_emu3
import torch
from small_emu3 import logits
from torch.nn.functional import cross_entropy

import emu3_vla
from emu3_vla.checkpoint import CheckpointError, save_loaded
from emu3_vla.export import export
from emu3_vla.lora import LoraError, LoraSettings, attach, load_adapter, merge, save_adapter

pytest.importorskip("peft", reason="needs the extra lora")
IDS = torch.arange(3, 19)[None]


def _train(model: torch.nn.Module, steps: int = 20) -> list[float]:
    """Losses of a few steps of next-token prediction on one sequence."""
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = cross_entropy(model(IDS).logits[0, :-1].float(), IDS[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.fixture
def baai(tmp_path):
    return small_emu3.write_baai(tmp_path / "baai", small_emu3.decoder())


@pytest.mark.parametrize("which", ["baai", "ours"])
def test_learns_is_saved_loaded_and_merged(which, baai, tiny_checkpoint, tmp_path):
    folder = baai if which == "baai" else tiny_checkpoint
    loaded = emu3_vla.load(folder, dtype=torch.float32)
    before = logits(loaded.model, IDS)
    frozen = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    adapted = attach(loaded.model, LoraSettings(rank=4, alpha=8))
    assert torch.equal(logits(loaded.model, IDS), before)  # a new adapter changes nothing
    losses = _train(loaded.model)
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in loaded.model.named_parameters():  # and nothing else was trained
        if ".lora_" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")])
    trained = logits(loaded.model, IDS)
    save_adapter(adapted, tmp_path / "adapter")
    assert {path.suffix for path in (tmp_path / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}

    fresh = emu3_vla.load(folder, dtype=torch.float32)
    again = load_adapter(fresh.model, tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh.model, IDS), trained, atol=1e-6, rtol=0)
    assert not any(parameter.requires_grad for parameter in fresh.model.parameters())
    assert merge(again) is fresh.model and type(fresh.model) is type(loaded.model)
    torch.testing.assert_close(logits(fresh.model, IDS), trained, atol=1e-5, rtol=0)
    assert {name for name, _ in fresh.model.named_parameters()} == frozen.keys()


def test_merged_policy_is_a_checkpoint_again(tiny_checkpoint, tmp_path):
    loaded = emu3_vla.load(tiny_checkpoint)
    adapted = attach(loaded.model, LoraSettings(rank=2))
    _train(loaded.model, 3)
    merge(adapted)
    save_loaded(loaded, tmp_path / "merged", provenance={"adapter": {"rank": 2}})
    again = emu3_vla.load(tmp_path / "merged").require_policy()
    assert torch.equal(logits(again.model, IDS), logits(loaded.model, IDS))
    assert not torch.equal(logits(again.model, IDS), logits(emu3_vla.load(tiny_checkpoint).model, IDS))
    assert again.provenance["adapter"] == {"rank": 2} and again.provenance["config"]["steps"] == 6


def test_merged_emu3_is_a_folder_of_ours_and_an_export(tmp_path):
    folder = small_emu3.write_baai(tmp_path / "published", small_emu3.decoder(**small_emu3.PUBLISHED_IDS))
    loaded = emu3_vla.load(folder)
    adapted = attach(loaded.model, LoraSettings(rank=2))
    _train(loaded.model, 2)
    merge(adapted)
    save_loaded(loaded, tmp_path / "ours")
    export(loaded, tmp_path / "llama", layout="llama")
    for name in ("ours", "llama"):
        assert torch.equal(logits(emu3_vla.load(tmp_path / name).model, IDS), logits(loaded.model, IDS))


def test_training_goes_on_from_a_saved_adapter(baai, tmp_path):
    adapted = attach(emu3_vla.load(baai).model, LoraSettings(rank=4))
    save_adapter(adapted, tmp_path / "adapter")
    model = emu3_vla.load(baai).model
    load_adapter(model, tmp_path / "adapter", trainable=True)
    losses = _train(model)
    assert losses[-1] < losses[0]


def test_adapters_of_a_bfloat16_model_are_float32(baai):
    model = emu3_vla.load(baai, dtype=torch.bfloat16).model
    adapted = attach(model)
    assert {parameter.dtype for name, parameter in adapted.named_parameters() if "lora_" in name} == {torch.float32}
    losses = _train(model)
    assert losses[-1] < losses[0] and merge(adapted).lm_head.weight.dtype == torch.bfloat16


def test_unmerged_models_are_neither_saved_nor_exported(baai, tmp_path):
    loaded = emu3_vla.load(baai)
    attach(loaded.model)
    with pytest.raises(CheckpointError, match="carries an adapter.*merge it first"):
        export(loaded, tmp_path / "out", layout="llama")
    with pytest.raises(LoraError, match="carries an adapter already"):
        attach(loaded.model)


def test_bad_adapters_are_named_and_leave_the_model_as_it_was(baai, tmp_path):
    model = emu3_vla.load(baai).model
    save_adapter(attach(small_emu3.decoder(num_hidden_layers=1), LoraSettings(rank=2)), tmp_path / "other")
    before = logits(model)
    with pytest.raises(LoraError, match="adapter_model.safetensors is not for this model: .*layers.1.*is absent"):
        load_adapter(model, tmp_path / "other")
    weights = tmp_path / "other" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(LoraError, match="the adapter in .*other is damaged"):
        load_adapter(model, tmp_path / "other")
    config = tmp_path / "other" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "IA3"}))
    with pytest.raises(LoraError, match="adapter_config.json is an adapter of type.*IA3"):
        load_adapter(model, tmp_path / "other")
    weights.rename(tmp_path / "other" / "adapter_model.bin")
    with pytest.raises(LoraError, match="adapter_model.bin is a pickle"):
        load_adapter(model, tmp_path / "other")
    (tmp_path / "other" / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing"):
        load_adapter(model, tmp_path / "other")
    assert torch.equal(logits(model), before)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"targets": ("lm_head",)}, {"targets": ()}])
def test_settings_are_checked(wrong):
    with pytest.raises(LoraError, match="expected"):
        LoraSettings(**wrong)
