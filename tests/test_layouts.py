"""Checkpoints of every layout load by one call, exactly; what is wrong with one is named."""

import json
import shutil

import numpy as np
import pytest
import small_emu3
import torch
from small_emu3 import logits

import emu3_vla
from emu3_vla.checkpoint import CheckpointError
from emu3_vla.checkpoint.weights import WeightFiles
from emu3_vla.emu3_text import Emu3TextTokenizer
from emu3_vla.text import TextTokenizerError
from emu3_vla.vision_tokenizer import VisionTokenizerError
from emu3_vla.vision_tokenizer.emu3 import Emu3Tokenizer
from emu3_vla.vocabulary import Emu3Vocabulary


@pytest.fixture(scope="module")
def model():
    return small_emu3.decoder()


@pytest.fixture
def baai(model, tmp_path):
    return small_emu3.write_baai(tmp_path / "baai", model)


@pytest.fixture
def sharded(model, tmp_path):
    return small_emu3.write_baai(tmp_path / "sharded", model, shard_bytes=30_000)


# -- layouts


def test_recorded_logits_of_the_original(reference):
    expected = np.load(reference / "emu3/baai_lm_tiny/expected.npz")
    loaded = emu3_vla.load(reference / "emu3/baai_lm_tiny", vision_tokenizer=reference / "emu3/baai_vq_tiny")
    found = logits(loaded.model, torch.from_numpy(expected["input_ids"]))
    torch.testing.assert_close(found, torch.from_numpy(expected["logits"]), atol=1e-4, rtol=0)
    assert loaded.layout == "baai" and loaded.vision_tokenizer.codebook_size == 512


def test_baai_and_univla(model, baai, tmp_path):
    assert torch.equal(logits(emu3_vla.load(baai).model), logits(model))
    loaded = emu3_vla.load(small_emu3.write_univla(tmp_path / "univla", model))
    assert loaded.layout == "univla" and not loaded.model.training
    assert torch.equal(logits(loaded.model), logits(model))


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 4.0}])
def test_rotary_scaling_of_older_configurations(model, tmp_path, scaling):
    folder = small_emu3.write_baai(tmp_path / "scaled", model, rope_scaling=scaling)
    config = emu3_vla.load(folder).model.config
    assert config.rope_parameters == {"rope_type": scaling["type"], "factor": scaling["factor"], "rope_theta": 1e6}


def test_action_head_of_univla_is_left_unused(model, tmp_path):
    folder = small_emu3.write_univla(tmp_path / "univla", model)
    small_emu3.rewrite_weights(folder / "model.safetensors", lambda weights: weights.update({"action_layers.0.norm.weight": torch.ones(3)}))
    assert emu3_vla.load(folder).unused_weights == ("action_layers.0.norm.weight",)


def test_transformers_with_its_vision_tokenizer(tmp_path):
    whole = small_emu3.write_whole(tmp_path / "whole")
    loaded = emu3_vla.load(tmp_path / "whole")
    assert loaded.layout == "transformers" and isinstance(loaded.vision_tokenizer, Emu3Tokenizer)
    assert torch.equal(logits(loaded.model), logits(whole))
    theirs = whole.model.vqmodel.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in loaded.vision_tokenizer.vqvae.state_dict().items())
    codes = torch.arange(64).view(1, 8, 8)
    assert loaded.vision_tokenizer.decode(codes).shape == (1, 3, 16, 16)


def test_transformers_names_of_modules_load_too(tmp_path):
    """What torch.save-like tools write: the names of the modules, not those that Transformers maps them to."""
    whole = small_emu3.write_whole(tmp_path / "whole")
    (tmp_path / "whole/model.safetensors").unlink()
    small_emu3.write_weights(tmp_path / "whole", dict(whole.state_dict()))
    assert torch.equal(logits(emu3_vla.load(tmp_path / "whole").model), logits(whole))


def test_bare_decoder_and_bare_trunk(tmp_path):
    written = small_emu3.write_text(tmp_path / "causal")
    assert torch.equal(logits(emu3_vla.load(tmp_path / "causal").model), logits(written))
    trunk = small_emu3.write_text(tmp_path / "trunk", head=False)
    loaded = emu3_vla.load(tmp_path / "trunk").model
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(ids).last_hidden_state, trunk(ids).last_hidden_state)


def test_shared_embedding_is_the_head(tmp_path):
    written = small_emu3.write_text(tmp_path / "tied", tie_word_embeddings=True)
    written.tie_weights()
    written.save_pretrained(tmp_path / "tied")
    loaded = emu3_vla.load(tmp_path / "tied").model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(written))


def test_vision_tokenizer_inside_and_beside(model, tmp_path):
    folder = small_emu3.write_baai(tmp_path / "Emu3-Gen", model)
    assert emu3_vla.load(folder).vision_tokenizer is None
    small_emu3.write_vision(tmp_path / "Emu3-VisionTokenizer")
    assert emu3_vla.load(folder).vision_tokenizer.codebook_size == 64
    shutil.move(tmp_path / "Emu3-VisionTokenizer", folder / "vision_tokenizer")
    assert emu3_vla.load(folder).vision_tokenizer.codebook_size == 64


def test_published_vocabulary_and_text_tokenizer(tmp_path):
    folder = small_emu3.write_baai(tmp_path / "published", small_emu3.decoder(**small_emu3.PUBLISHED_IDS))
    small_emu3.write_tiktoken(folder)
    loaded = emu3_vla.load(folder)
    assert loaded.vocabulary == Emu3Vocabulary(action_size=0)
    assert isinstance(loaded.text_tokenizer, Emu3TextTokenizer) and loaded.text_tokenizer.vocab_size == 151_643
    with pytest.raises(CheckpointError, match="cannot act: vision_tokenizer, action_tokenizer, normalizer.json, policy.yaml missing"):
        loaded.require_policy()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"boi_token_id": 7}))
    with pytest.raises(CheckpointError, match="boi_token_id is 7, not 151852"):
        emu3_vla.load(folder)


# -- memory


def test_weights_are_mapped_not_copied(sharded):
    """Every parameter's memory lies in a mapping of one of the shards."""
    loaded = emu3_vla.load(sharded)
    maps = [line.split() for line in open("/proc/self/maps") if str(sharded.resolve()) in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for parameter in loaded.model.parameters():
        start = parameter.data_ptr()
        assert any(low <= start and start + parameter.nbytes <= high for low, high in spans)


def test_training_leaves_the_file_alone(baai):
    before = (baai / "model.safetensors").read_bytes()
    loaded = emu3_vla.load(baai)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(1)
    assert (baai / "model.safetensors").read_bytes() == before
    assert torch.equal(emu3_vla.load(baai).model.lm_head.weight + 1, loaded.model.lm_head.weight)


def test_another_type_is_copied_and_the_buffers_kept(baai):
    loaded = emu3_vla.load(baai, dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.model.rotary_emb.inv_freq, emu3_vla.load(baai).model.model.rotary_emb.inv_freq)


# -- what may be wrong


def test_missing_and_cut_shards_are_named(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    content = shards[1].read_bytes()
    for length in (len(content) // 2, 4):
        shards[1].write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=f"{shards[1].name} is damaged or cut short: {length} bytes"):
            emu3_vla.load(sharded)
    shards[1].write_bytes(content[:8] + b"#" + content[9:])
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is damaged: its header is not"):
        emu3_vla.load(sharded)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1].name} is missing: 1 of the {len(shards)} shards"):
        emu3_vla.load(sharded)


def test_index_that_lies(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, last = sorted(sharded.glob("*.safetensors"))[0].name, sorted(sharded.glob("*.safetensors"))[-1].name
    moved = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][moved] = last
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{last} does not hold {moved}"):
        emu3_vla.load(sharded)
    index["weight_map"][moved] = "../../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index.json is damaged or not an index.*no safetensors files beside it"):
        emu3_vla.load(sharded)


def test_wrong_shape_and_wrong_names(baai):
    path = baai / "model.safetensors"
    small_emu3.rewrite_weights(path, lambda weights: weights.update({"lm_head.weight": torch.zeros(299, 32)}))
    with pytest.raises(CheckpointError, match=r"model.safetensors does not fit.*lm_head.weight is \(299, 32\), expected \(300, 32\)"):
        emu3_vla.load(baai)
    small_emu3.rewrite_weights(path, lambda weights: weights.update({"lm_head.weight": torch.zeros(300, 32, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match="lm_head.weight is of type I8"):
        emu3_vla.load(baai)
    small_emu3.rewrite_weights(path, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="model.norm.weight is absent"):
        emu3_vla.load(baai)
    small_emu3.rewrite_weights(path, lambda weights: weights.update({"transformer.h.0.attn": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="model.safetensors holds transformer.h.0.attn.*no Emu3 decoder has"):
        emu3_vla.load(baai)


def test_pickles_are_refused_by_name(baai):
    (baai / "model.safetensors").rename(baai / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pickle.*save_pretrained"):
        emu3_vla.load(baai)
    (baai / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        emu3_vla.load(baai)


def test_code_in_a_checkpoint_is_not_run(baai, monkeypatch):
    values = json.loads((baai / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "configuration_emu3.Emu3Config", "AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM"}
    (baai / "config.json").write_text(json.dumps(values))
    for name in ("configuration_emu3.py", "modeling_emu3.py"):
        (baai / name).write_text("raise SystemExit('this code was run')")
    monkeypatch.syspath_prepend(str(baai))
    assert emu3_vla.load(baai).layout == "baai"


def test_unknown_layouts_are_listed(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no checkpoint.*UniVLA's.*BAAI's original.*LlamaForCausalLM"):
        emu3_vla.load(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(CheckpointError, match="config.json: unknown layout, model_type 'gpt2'.*known: .*Emu3ForConditionalGeneration"):
        emu3_vla.load(tmp_path)
    config.write_text(json.dumps({"model_type": "Emu3VisionVQ"}))
    with pytest.raises(CheckpointError, match="is that of a vision tokenizer"):
        emu3_vla.load(tmp_path)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="config.json is damaged or cut short"):
        emu3_vla.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "large"}, "config.json describes no Emu3 decoder"),
        ({"qkv_bias": True}, "qkv_bias is true"),
        ({"pad_token_id": 1000}, "config.json describes no decoder that can be built"),
        ({"num_attention_heads": 0}, "config.json describes no decoder that can be built"),
        ({"hidden_act": "nonsense"}, "config.json describes no decoder that can be built"),
    ],
)
def test_impossible_configurations(model, tmp_path, change, said):
    with pytest.raises(CheckpointError, match=said):
        emu3_vla.load(small_emu3.write_baai(tmp_path / "spoilt", model, **change))


def test_missing_sizes_are_named(baai):
    values = json.loads((baai / "config.json").read_text())
    del values["hidden_size"]
    (baai / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="config.json lacks hidden_size"):
        emu3_vla.load(baai)


def test_tokenizers_of_other_models(baai, tmp_path, tiny_checkpoint):
    small_emu3.write_tiktoken(baai, size=400)
    with pytest.raises(CheckpointError, match="emu3.tiktoken does not belong to this model: ids 400, but .*config.json has 300 in all"):
        emu3_vla.load(baai)
    (baai / "emu3.tiktoken").write_text("no vocabulary")
    with pytest.raises(TextTokenizerError, match="emu3.tiktoken is damaged"):
        emu3_vla.load(baai)
    folder = small_emu3.write_baai(tmp_path / "published", small_emu3.decoder(**small_emu3.PUBLISHED_IDS))
    with pytest.raises(CheckpointError, match="vision_tokenizer does not belong to this model: codes 32, the model's vocabulary has 32768"):
        emu3_vla.load(folder, vision_tokenizer=tiny_checkpoint / "vision_tokenizer")
    with pytest.raises(VisionTokenizerError, match="unknown kind"):
        emu3_vla.load(folder, vision_tokenizer=folder)


def test_our_own_folder_takes_no_other_tokenizers(tiny_checkpoint):
    with pytest.raises(CheckpointError, match="carries its own tokenizers"):
        emu3_vla.load(tiny_checkpoint, vision_tokenizer=tiny_checkpoint / "vision_tokenizer")
    with pytest.raises(CheckpointError, match="is the model/ folder of a checkpoint"):
        emu3_vla.load(tiny_checkpoint / "model")


def test_headers_tell_all_sizes(sharded, model):
    files = WeightFiles.open(sharded)
    weights = model.state_dict()
    assert {name: entry.shape for name, entry in files.tensors.items()} == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert files.nbytes == sum(tensor.nbytes for tensor in weights.values())
