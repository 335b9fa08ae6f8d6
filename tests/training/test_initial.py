"""Weights to start from: they must belong to the token store; larger images get stretched places; Emu3's own vocabulary trains too."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny_tokens
import torch
from block_models import block_context
from transformers import Emu3ForCausalLM

from emu3_vla import checkpoint
from emu3_vla.checkpoint import load
from emu3_vla.data.tokens import ACTION, NORMALIZER, TEXT, VISION, TokenStore
from emu3_vla.documents import IGNORE, NOTHING, SAID, Image, Text, pack
from emu3_vla.emu3_text import Emu3TextTokenizer
from emu3_vla.model import BlockEmu3ForCausalLM, PlainEmu3ForCausalLM, build_config
from emu3_vla.training import figures, initial
from emu3_vla.training.figures import LossConfig
from emu3_vla.training.initial import ForeignTokens, stretched_places
from emu3_vla.training.loop import ModelSizes, TrainConfig
from emu3_vla.training.mixture import MixtureConfig
from emu3_vla.training.prefetch import prefetched
from emu3_vla.training.source import open_source
from emu3_vla.vision_tokenizer.light import LightConfig, LightTokenizer
from emu3_vla.vocabulary import CompactVocabulary, Emu3Vocabulary, ImageGrid, VocabularyError
from envs.spec import RGB_GRIPPER, RGB_STATIC


def _store_with(store: TokenStore, folder, sizes: dict[str, int], seed: int = 0) -> TokenStore:
    """The manifest and tokenizers of a store of images of other sizes, without shards."""
    for name in (TEXT, ACTION):
        shutil.copytree(store.path / name, folder / name)
    shutil.copyfile(store.path / NORMALIZER, folder / NORMALIZER)
    torch.manual_seed(seed)
    config = LightConfig(codebook_size=32, channels=(8, 8), encoder_blocks=(0, 0), decoder_blocks=(0, 0), image_sizes=sizes)
    LightTokenizer(config).eval().save_pretrained(folder / VISION)
    grids = {camera: [size // 8, size // 8] for camera, size in sizes.items()}
    return TokenStore.create(folder, {name: value for name, value in store.metadata.items() if name != "hashes"} | {"grids": grids})


def test_another_tokenizers_store_is_refused(tiny_store, tiny_checkpoint, tmp_path):
    _store_with(tiny_store, tmp_path / "same", {RGB_STATIC: 128, RGB_GRIPPER: 96})
    config = tiny_tokens.config(tmp_path / "same", tmp_path / "run", init_from=str(tiny_checkpoint))
    initial.new_model(config, open_source(config.tokens, 4))  # the same weights of the vision tokenizer: it belongs
    _store_with(tiny_store, tmp_path / "other", {RGB_STATIC: 128, RGB_GRIPPER: 96}, seed=1)
    with pytest.raises(ForeignTokens, match="with another vision_tokenizer .* tokenize with the checkpoint's own: vision_tokenizer="):
        initial.new_model(config, open_source(str(tmp_path / "other"), 4))
    with pytest.raises(ForeignTokens, match="was trained with the vocabulary .*block_size=4.*, the token store .* has .*block_size=2"):
        initial.new_model(config, open_source(config.tokens, 2))


def test_a_policy_that_would_fall_silent_is_warned_of(tmp_path, tiny_checkpoint, capsys):
    store = tiny_tokens.tiny_store(tmp_path / "tokens", shards=2, episodes_per_shard=2, felt=True)
    saying = tiny_tokens.train(store.path, tmp_path / "run", steps=2, validation_fraction=0.5, scene_fraction=0.5)
    told = {"init_from": str(saying), "steps": 1, "validation_fraction": 0.5}
    tiny_tokens.train(store.path, tmp_path / "silent", **told)
    assert "says what it sees before it acts, and with scene_fraction=0 it learns to act without" in capsys.readouterr().out
    tiny_tokens.train(store.path, tmp_path / "further", **told, scene_fraction=0.5)
    assert "says what it sees" not in capsys.readouterr().out
    assert not initial.left_unsaid(tiny_tokens.config(store.path, tmp_path, init_from=str(tiny_checkpoint)))


def test_places_of_larger_images_are_stretched(tiny_store, tiny_checkpoint, tmp_path):
    store = _store_with(tiny_store, tmp_path / "larger", {RGB_STATIC: 256, RGB_GRIPPER: 96})
    config = tiny_tokens.config(store.path, tmp_path / "run", init_from=str(tiny_checkpoint))
    source = open_source(config.tokens, 4)
    model = initial.new_model(config, source)
    before = load(tiny_checkpoint).model.blocks.places.weight
    after, v = model.blocks.places.weight, source.vocabulary
    assert len(after) == 64 + 9 and torch.equal(after[list(v.places(RGB_GRIPPER))], before[16:])
    assert torch.allclose(after[0], before[0]) and torch.allclose(after[63], before[15]), "corners stay"


def test_the_models_sizes_come_with_the_checkpoint(tiny_store, tiny_checkpoint, tmp_path):
    usual = tiny_tokens.config(tiny_store.path, tmp_path, init_from=str(tiny_checkpoint))
    sized = initial.as_init_from(dataclasses.replace(usual, model=ModelSizes(dropout=0.1, hidden_size=64)))
    assert sized.model == dataclasses.replace(usual.model, dropout=0.1), "what only training has is the run's own"
    initial.new_model(sized, open_source(sized.tokens, sized.model.block_size))
    with pytest.raises(ValueError, match="model.hidden_size=96, but init_from=.* has 64; leave model.hidden_size out"):
        initial.as_init_from(dataclasses.replace(usual, model=ModelSizes(hidden_size=96, num_attention_heads=2)))
    unnamed = dataclasses.replace(usual, init_from="")
    assert initial.as_init_from(unnamed) is unnamed


def test_a_shipped_checkpoint_is_started_from_by_its_name(tmp_path):
    sized = initial.as_init_from(TrainConfig(tokens=str(tmp_path), init_from="calvin-d"))
    stated = load("calvin-d").model.config
    assert sized.model.block_hidden == stated.block_hidden and sized.model.hidden_size == stated.hidden_size
    with pytest.raises(FileNotFoundError, match="calvin-e is not a folder; .* the name of a shipped one"):
        initial.as_init_from(TrainConfig(tokens=str(tmp_path), init_from="calvin-e"))


@pytest.fixture(scope="module")
def felt_store(tmp_path_factory):
    """A store that knows the arm's state and what there is to see."""
    return tiny_tokens.tiny_store(tmp_path_factory.mktemp("felt"), asked=True, felt=True)


def _save(folder, model, source, store):
    checkpoint.save(
        folder,
        config=model.config,
        weights=model.state_dict(),
        vocabulary=source.vocabulary,
        tokenizers=store.path,
        policy=checkpoint.PolicySettings(
            history=0, trained_history=0, horizon=10, action_dim=7, state=store.metadata.get("state"), scene=store.metadata.get("scene")
        ),
        provenance={},
    )


def test_an_older_depth_decoder_is_widened_and_writes_the_same(tiny_store, tmp_path):
    """Checkpoints of before each code read its own part of the state, and saw what was there before: parts begin as the one that there was,
    and what was there counts for nothing."""
    config = tiny_tokens.config(tiny_store.path, tmp_path / "run", init_from=str(tmp_path / "older"))
    source = open_source(config.tokens, 4)
    torch.manual_seed(5)
    older = BlockEmu3ForCausalLM(build_config(source.vocabulary, state_per_code=False, recall=False, **config.model.arguments()))
    _save(tmp_path / "older", older, source, tiny_store)
    model = initial.new_model(config, source)
    states, codes = torch.randn(5, model.config.hidden_size), torch.randint(0, 32, (5, 16))
    known = block_context(torch.randint(NOTHING, 32, (5, 16)))
    assert model.depth.state.weight.shape[0] == 16 * older.depth.state.weight.shape[0]
    torch.testing.assert_close(model.depth(states, codes, known), older.depth(states, codes, known))
    loaded = load(tmp_path / "older").model
    assert torch.equal(loaded.depth(states, codes, known), older.depth(states, codes, known)), "and reads as it is"


def test_a_checkpoint_that_foretells_gets_what_reads_its_words(felt_store, tmp_path):
    """Ids of each number, state and scene; it begins by counting for nothing, and stays where a later run foretells nothing."""
    whole = tiny_tokens.config(felt_store.path, tmp_path / "run", scene_first=True, context=448, mixture=MixtureConfig(film=1))
    source = open_source(whole.tokens, 4)
    older = BlockEmu3ForCausalLM(build_config(source.vocabulary, **whole.model.arguments()))
    _save(tmp_path / "older", older, source, felt_store)
    config = dataclasses.replace(whole, init_from=str(tmp_path / "older"))
    model = initial.new_model(config, source)
    bins = [tiny_tokens.STATE.bins] * len(tiny_tokens.STATE.names) + [tiny_tokens.SCENE.bins] * len(tiny_tokens.SCENE.names)
    assert [stop - first for first, stop, _ in model.config.foretold] == bins
    said = torch.tensor([[first for first, _, _ in model.config.foretold]] * 5)
    said = torch.nn.functional.pad(said, (SAID - len(bins), 0), value=NOTHING)
    known = dataclasses.replace(block_context(torch.randint(NOTHING, 32, (5, 16))), said_NS=said)
    states, codes = torch.randn(5, model.config.hidden_size), torch.randint(0, 32, (5, 16))
    assert torch.equal(model.depth(states, codes, known), older.depth(states, codes, known))

    torch.nn.init.normal_(model.depth.foretold.down.weight)
    _save(tmp_path / "newer", model, source, felt_store)
    acts = dataclasses.replace(config, init_from=str(tmp_path / "newer"), scene_first=False, context=0, mixture=MixtureConfig())
    again = initial.new_model(acts, source)
    assert torch.equal(again.depth(states, codes, known), model.depth(states, codes, known))


def test_stretching_is_linear():
    given, wanted = (
        CompactVocabulary(text_size=3, action_size=3, codebook_size=3, images=(ImageGrid(name="a", rows=n, columns=4),), block_size=2)
        for n in (4, 8)
    )
    ramp = torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None]
    stretched = stretched_places(ramp, given, wanted)
    assert stretched[:, 0].tolist() == [0, 0, 0.25, 0.25, 0.75, 0.75, 1, 1]


def test_emu3s_own_vocabulary_trains_through_the_same_loop(tmp_path):
    store = tiny_tokens.emu3_store(tmp_path)
    assert isinstance(store.tokenizers().text, Emu3TextTokenizer)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    loss = LossConfig(mean_over="token", vision_weight=0.5, text_weight=1, special_weight=1, vision_loss_fraction=0.5)
    policy = tiny_tokens.train(
        store.path,
        tmp_path / "run",
        steps=1,
        batch_size=1,
        context=192,
        validation_fraction=0.5,
        validation_documents=1,
        mixture=MixtureConfig(act=1, film=1),
        model=ModelSizes(block_size=1, max_position_embeddings=256, **sizes),
        loss=loss,
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_action", "loss_vision", "loss_special"} <= set(records[0])
    assert {"loss_action", "loss_vision", "loss_text", "loss_special"} <= set(records[-1]["validation"])
    loaded = load(policy)
    assert isinstance(loaded.model, Emu3ForCausalLM) and isinstance(loaded.vocabulary, Emu3Vocabulary)
    assert not isinstance(loaded.model, PlainEmu3ForCausalLM) and (policy / checkpoint.MODEL).is_dir()


def test_codes_of_the_head_are_thinned(tmp_path):
    v = Emu3Vocabulary()
    documents = [[Text([1, 2]), Image("", np.arange(400).reshape(20, 20) + number)] for number in range(2)]
    batch = pack([documents], v, 1024)
    seeds = figures.document_seeds(batch, 0, 0, 0, 1)
    thinned = figures.thin_codes(batch, 0.25, seeds)
    before, after = (((part.kinds_BL == figures.VISION) & (part.targets_BL != IGNORE)).sum().item() for part in (batch, thinned))
    assert before == 800 and 150 < after < 250
    others = batch.kinds_BL != figures.VISION
    assert torch.equal(batch.targets_BL[others], thinned.targets_BL[others])
    assert figures.thin_codes(batch, 1.0, seeds) is batch


def test_emu3s_text_with_other_codes_is_refused(tmp_path):
    store = tiny_tokens.emu3_store(tmp_path, codebook_size=64)
    with pytest.raises(VocabularyError, match="Emu3's text tokenizer, 64 codes, and model.block_size=4; Emu3's vocabulary has 32768"):
        open_source(str(store.path), 4)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order_and_errors_at_their_step(workers):
    def make(step):
        if step == 5:
            raise ValueError("no step 5")
        return step * step

    batches = prefetched(make, 2, 9, workers=workers)
    assert [next(batches)[0] for _ in range(3)] == [4, 9, 16]
    with pytest.raises(ValueError, match="no step 5"):
        next(batches)
    assert list(prefetched(make, 3, 3, workers=workers)) == []
