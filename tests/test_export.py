"""Exports open in stock Transformers with the same logits, and come back bit for bit."""

import json

import pytest
import small_emu3
import torch
from small_emu3 import logits
from transformers import AutoConfig, Emu3ForCausalLM, Emu3ForConditionalGeneration, LlamaForCausalLM

import emu3_vla
from emu3_vla.checkpoint import CheckpointError, save_loaded
from emu3_vla.cli import main
from emu3_vla.export import ExportError, export
from emu3_vla.vocabulary import Emu3Vocabulary


def _same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture
def baai(tmp_path):
    return small_emu3.write_baai(tmp_path / "baai", small_emu3.decoder(), rope_theta=5e5)


@pytest.mark.parametrize(("layout", "stock"), [("transformers_text", Emu3ForCausalLM), ("llama", LlamaForCausalLM)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_decoder_alone(baai, tmp_path, layout, stock, dtype):
    loaded = emu3_vla.load(baai, dtype=dtype)
    assert export(loaded, tmp_path / "out", layout=layout) == stock.__name__
    opened = stock.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert opened.dtype == loaded.model.dtype and opened.config.rope_parameters["rope_theta"] == 5e5
    assert torch.equal(logits(opened), logits(loaded.model))
    again = emu3_vla.load(tmp_path / "out")
    assert again.layout == layout and _same_weights(again.model, loaded.model)
    assert torch.equal(logits(again.model), logits(loaded.model))


def test_recorded_model_of_the_original_as_llama(reference, tmp_path):
    loaded = emu3_vla.load(reference / "emu3/baai_lm_tiny")
    export(loaded, tmp_path / "out", layout="llama")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(loaded.model))


def test_shards_and_shared_embedding(tmp_path):
    written = small_emu3.write_text(tmp_path / "tied", tie_word_embeddings=True)
    loaded = emu3_vla.load(tmp_path / "tied")
    export(loaded, tmp_path / "out", layout="llama", shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(written))
    assert torch.equal(logits(emu3_vla.load(tmp_path / "out").model), logits(written))


def test_programs_before_transformers_5_find_the_rotary_base(baai, tmp_path):
    export(emu3_vla.load(baai), tmp_path / "out", layout="llama")
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert (values["rope_theta"], values["rope_scaling"], values["torch_dtype"]) == (5e5, None, "float32")
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


def test_whole_model_there_and_back(tmp_path):
    small_emu3.write_whole(tmp_path / "whole")
    loaded = emu3_vla.load(tmp_path / "whole")
    export(loaded, tmp_path / "out", layout="transformers")
    opened = Emu3ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(opened), logits(loaded.model))
    assert _same_weights(opened.model.vqmodel, loaded.vision_tokenizer.vqvae)
    again = emu3_vla.load(tmp_path / "out")
    assert _same_weights(again.model, loaded.model) and _same_weights(again.vision_tokenizer, loaded.vision_tokenizer)


def test_published_parts_become_one_model(tmp_path):
    """BAAI's decoder and its separate vision tokenizer as Emu3ForConditionalGeneration, which then finds the image tokens itself."""
    folder = small_emu3.write_baai(tmp_path / "Emu3-Gen", small_emu3.decoder(**small_emu3.PUBLISHED_IDS))
    small_emu3.write_vision(tmp_path / "Emu3-VisionTokenizer", codebook_size=Emu3Vocabulary.codebook_size)
    small_emu3.write_tiktoken(folder)
    loaded = emu3_vla.load(folder)
    assert export(loaded, tmp_path / "out", layout="transformers") == "Emu3ForConditionalGeneration"
    opened = Emu3ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(opened), logits(loaded.model))
    pixels = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = opened.model.get_image_tokens(pixels, torch.tensor([[16, 24]])).view(8, 13)
    assert torch.equal(tokens[:, :-1], loaded.vision_tokenizer.encode(pixels)[0] + Emu3Vocabulary.vision_start)
    assert (tokens[:, -1] == Emu3Vocabulary.end_of_line).all()
    again = emu3_vla.load(tmp_path / "out")
    assert again.text_tokenizer.vocab_size == 151_643 and isinstance(again.vocabulary, Emu3Vocabulary)


def test_loaded_checkpoint_becomes_a_folder_of_ours(tmp_path):
    folder = small_emu3.write_baai(tmp_path / "Emu3-Gen", small_emu3.decoder(**small_emu3.PUBLISHED_IDS))
    small_emu3.write_tiktoken(folder)
    loaded = emu3_vla.load(folder)
    save_loaded(loaded, tmp_path / "ours", provenance={"source": "Emu3-Gen"})
    again = emu3_vla.load(tmp_path / "ours")
    assert again.layout == "emu3_vla" and again.vocabulary == loaded.vocabulary and again.provenance["source"] == "Emu3-Gen"
    assert _same_weights(again.model, loaded.model) and torch.equal(logits(again.model), logits(loaded.model))
    assert again.text_tokenizer.vocab_size == 151_643
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        save_loaded(loaded, tmp_path / "ours")


def test_our_own_folder_is_copied_whole(tiny_checkpoint, tmp_path):
    loaded = emu3_vla.load(tiny_checkpoint)
    save_loaded(loaded, tmp_path / "copy")
    again = emu3_vla.load(tmp_path / "copy").require_policy()
    assert _same_weights(again.model, loaded.model) and again.policy == loaded.policy
    for part in ("config", "seed", "token_store"):
        assert again.provenance[part] == loaded.provenance[part]


def test_what_cannot_be_exported_is_said(tiny_checkpoint, baai, tmp_path):
    blocks = emu3_vla.load(tiny_checkpoint)
    for layout in ("transformers", "transformers_text", "llama"):
        with pytest.raises(ExportError, match=r"vision blocks \(16 codes to a position\) cannot be exported"):
            export(blocks, tmp_path / "out", layout=layout)
    decoder = emu3_vla.load(baai)
    with pytest.raises(ExportError, match="has none, but layout 'transformers' holds.*transformers_text"):
        export(decoder, tmp_path / "out", layout="transformers")
    with pytest.raises(ExportError, match="has one of kind 'light'"):
        export(emu3_vla.load(baai, vision_tokenizer=tiny_checkpoint / "vision_tokenizer"), tmp_path / "out", layout="transformers")
    with pytest.raises(ExportError, match="layout is 'gguf', expected one of"):
        export(decoder, tmp_path / "out", layout="gguf")
    with pytest.raises(CheckpointError, match="has not a known vocabulary"):
        save_loaded(decoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    small_emu3.write_text(tmp_path / "trunk", head=False)
    with pytest.raises(ExportError, match="has no output head"):
        export(emu3_vla.load(tmp_path / "trunk"), tmp_path / "out", layout="llama")
    export(decoder, tmp_path / "out", layout="llama")
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        export(decoder, tmp_path / "out", layout="llama")


def test_unknown_ids_keep_the_vision_tokenizer_out(baai, tmp_path):
    small_emu3.write_vision(tmp_path / "vision")
    with pytest.raises(ExportError, match="its 300 ids are not Emu3's"):
        export(emu3_vla.load(baai, vision_tokenizer=tmp_path / "vision"), tmp_path / "out", layout="transformers")


def test_command(baai, tmp_path, capsys, tiny_checkpoint):
    command = ["export", f"checkpoint={baai}", "layout=llama", "dtype=bfloat16", f"output_dir={tmp_path / 'out'}"]
    assert main(command) == 0 and "LlamaForCausalLM" in capsys.readouterr().out
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert main(command) == 0 and "holds this export already" in capsys.readouterr().out
    assert main(["export", f"checkpoint={tiny_checkpoint}", f"output_dir={tmp_path / 'no'}"]) == 2
    assert "vision blocks" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert main(["export", f"checkpoint={baai}", "layout=gguf", f"output_dir={tmp_path / 'no'}"]) == 2
    assert "expected one of transformers, transformers_text, llama" in capsys.readouterr().err
