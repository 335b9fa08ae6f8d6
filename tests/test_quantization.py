"""Weights in 8 and 4 bits: smaller, near the original, and refused by name where they cannot be."""

import pytest
import small_emu3
import torch
from block_models import block_context
from small_emu3 import logits

import emu3_vla
from emu3_vla.checkpoint import CheckpointError
from emu3_vla.documents import NOTHING
from emu3_vla.export import export
from emu3_vla.lora import LoraError, attach
from emu3_vla.quantization import QuantizationError, is_quantized, nbytes, quantize

pytest.importorskip("torchao", reason="needs the extra quantization")

# Sizes that the 4-bit kernel takes.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def _error(changed: torch.Tensor, original: torch.Tensor) -> float:
    return ((changed.float() - original.float()).norm() / original.float().norm()).item()


@pytest.fixture
def folder(tmp_path):
    return small_emu3.write_baai(tmp_path / "wide", small_emu3.decoder(**WIDE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "bound", "bits"), [("int8", 0.03, 8), ("int4", 0.3, 4)])
def test_close_and_small(folder, kind, dtype, bound, bits):
    loaded = emu3_vla.load(folder, dtype=dtype)
    trunk = sum(parameter.numel() for name, parameter in loaded.model.named_parameters() if "_proj" in name)
    before = logits(loaded.model)
    report = quantize(loaded.model, kind, group_size=32)
    error = _error(logits(loaded.model), before)
    assert 1e-4 < error < bound  # rounded, and not by much
    assert report.bytes_after == nbytes(loaded.model) < report.bytes_before
    expected_kept = () if kind == "int8" else ("lm_head",)
    assert report.kept == expected_kept and len(report.quantized) == 14 + (kind == "int8")
    whole = [p for name, p in loaded.model.named_parameters() if "_proj" not in name and (kind == "int4" or name != "lm_head.weight")]
    head = loaded.model.lm_head.weight.numel() if kind == "int8" else 0
    stored = (report.bytes_after - sum(parameter.nbytes for parameter in whole)) / (trunk + head)
    assert bits / 8 < stored < bits / 8 * 1.6  # and the scales
    assert is_quantized(loaded.model)


def test_more_bits_and_smaller_groups_are_nearer(folder):
    before = logits(emu3_vla.load(folder).model)
    errors = {}
    for kind, size in (("int8", 128), ("int4", 32), ("int4", 128)):
        loaded = emu3_vla.load(folder)
        quantize(loaded.model, kind, group_size=size)
        errors[kind, size] = _error(logits(loaded.model), before)
    assert errors["int8", 128] < errors["int4", 32] < errors["int4", 128]


def test_vision_blocks_and_depth_decoder_are_kept(tiny_checkpoint):
    loaded = emu3_vla.load(tiny_checkpoint)
    report = quantize(loaded.model, "int8")
    assert all(name.startswith(("model.layers.", "lm_head")) for name in report.quantized)
    assert "depth.head" in report.kept and "blocks.merge" in report.kept
    codes = loaded.model.depth.write(torch.zeros(1, 64), block_context(torch.full((1, 16), NOTHING)), lambda scores: scores.argmax(1))
    assert codes.shape == (1, loaded.vocabulary.codes_per_block)


def test_generates(folder):
    model = emu3_vla.load(folder).model
    quantize(model, "int8")
    written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert written.shape == (1, 7)


def test_what_is_not_supported_is_refused_before_anything_changes(folder, tmp_path):
    model = emu3_vla.load(folder).model
    before = logits(model)
    with pytest.raises(QuantizationError, match="quantisation 'int3' is unknown; known: int8, int4"):
        quantize(model, "int3")
    with pytest.raises(QuantizationError, match="group_size is 48, expected one of 32, 64, 128"):
        quantize(model, "int4", group_size=48)
    odd = small_emu3.decoder(intermediate_size=200, **{name: size for name, size in WIDE.items() if name != "intermediate_size"})
    with pytest.raises(QuantizationError, match="gate_proj has 200 rows of 128 weights"):
        quantize(odd, "int4", group_size=32)
    narrow = small_emu3.decoder(**WIDE | {"hidden_size": 64})
    with pytest.raises(QuantizationError, match="rows that group_size 128 divides; try group_size=32"):
        quantize(narrow, "int4")
    with pytest.raises(QuantizationError, match="int4 is done on the CPU alone, and .* is on meta"):
        quantize(small_emu3.decoder(**WIDE).to("meta"), "int4")
    assert torch.equal(logits(model), before) and not is_quantized(model)


def test_quantised_models_are_not_quantised_saved_or_exported_again(folder, tmp_path):
    loaded = emu3_vla.load(folder)
    quantize(loaded.model, "int8")
    with pytest.raises(QuantizationError, match="quantised already"):
        quantize(loaded.model, "int8")
    with pytest.raises(CheckpointError, match="is quantised"):
        export(loaded, tmp_path / "out", layout="llama")
    pytest.importorskip("peft", reason="needs the extra lora")
    with pytest.raises(LoraError, match="is quantised"):
        attach(loaded.model)
