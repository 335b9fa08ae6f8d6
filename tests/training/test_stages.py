"""Every stage is a preset of the one loop: each runs, reads what it should, and counts what it should in the loss."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_tokens
import torch

from emu3_vla import cli
from emu3_vla.checkpoint import load
from emu3_vla.documents import IGNORE, KINDS
from emu3_vla.model import BlockEmu3Config, DepthDecoder
from emu3_vla.training import depth_only, initial, loop, team
from emu3_vla.training.keeping import Keeper
from emu3_vla.training.mixture import MixtureConfig
from emu3_vla.training.source import open_source
from emu3_vla.training.stream import FELT
from envs.spec import RGB_GRIPPER, RGB_STATIC

PRESETS = Path(cli.__file__).parents[1] / "configs" / "train"
STAGES = sorted(path.stem for path in (PRESETS / "stage").glob("*.yaml") if path.stem not in ("debug", "small"))
NEEDS_PAIRS = "dpo"
NEED_A_POLICY = ("depth", "answers")
TEXT_BEFORE_IMAGES = {"draw", "film", "world", "act", "interleave"}


@pytest.fixture(scope="module")
def asked_store(tmp_path_factory):
    """A store whose frames are described: the answer to the one question says what there is to see."""
    return tiny_tokens.tiny_store(tmp_path_factory.mktemp("asked"), shards=4, episodes_per_shard=3, asked=True)


@pytest.fixture(scope="module")
def felt_store(tmp_path_factory):
    """A store that knows the arm's state and what there is to see, too."""
    return tiny_tokens.tiny_store(tmp_path_factory.mktemp("felt"), shards=4, episodes_per_shard=3, asked=True, felt=True)


def _compose(preset: str, **options) -> loop.TrainConfig:
    return cli.compose("train", [f"preset={preset}", *(f"{name}={value}" for name, value in options.items())])


def _run(preset: str, tokens: Path, output: Path, **options) -> list[dict]:
    loop.main(_compose(preset, tokens=tokens, output_dir=output, validation_fraction=0.25, **options))
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def _stream(store, output="unused", **options):
    config = tiny_tokens.config(store.path, output, context=256, batch_size=3, chunks=2, questions=1, **options)
    source = open_source(config.tokens, config.model.block_size)
    return source, source.streams(config)[0]


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in (NEEDS_PAIRS, *NEED_A_POLICY)])
def test_debug_twin_of_every_stage_trains(stage, asked_store, felt_store, tmp_path):
    store = felt_store if _compose(f"stage/{stage}", tokens="x").scene_first else asked_store
    records = _run(f"stage/{stage},stage/debug", store.path, tmp_path, steps=2)
    assert (tmp_path / "policy" / "model" / "model.safetensors").exists()
    losses = {name for record in records for name in record.get("validation", {}) if name.startswith("loss")}
    expected = {"vla": "loss_action", "understand_describe": "loss_text", "understand_instruct": "loss_text"}
    assert expected.get(stage, "loss_vision") in losses and "loss" in losses


def test_the_depth_decoder_learns_alone(felt_store, tmp_path):
    """Pictures are written otherwise afterwards; whatever acts and answers is the same to the last bit."""
    _run("stage/joint,stage/debug", felt_store.path, tmp_path / "joint", steps=2)
    given = str(tmp_path / "joint" / "policy")
    _run("stage/depth,stage/debug", felt_store.path, tmp_path / "depth", init_from=given)
    before, after = (load(tmp_path / name / "policy").model.state_dict() for name in ("joint", "depth"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("depth.") for name in changed)


def test_whitening_changes_nothing_but_how_it_learns(asked_store):
    """The depth decoder computes the same from whitened states, and again once they are put into its own weights."""
    source, stream = _stream(asked_store, mixture=MixtureConfig(film=1, draw=1))
    model = initial.new_model(tiny_tokens.config(asked_store.path, "unused", context=256, mixture=MixtureConfig(film=1)), source).eval()
    batch = stream.batch(3)
    states = model.states(batch)[batch.block_at_N - 1].detach()
    expected = model.depth(states, batch.codes_NC, batch.block_context())
    depth_only.whiten(model, [stream.batch(0), stream.batch(1)])
    torch.testing.assert_close(model.depth(states, batch.codes_NC, batch.block_context()), expected, atol=1e-4, rtol=1e-4)

    seen = torch.cat([model.states(own)[own.block_at_N[own.block_weights_N > 0] - 1] for own in (stream.batch(0), stream.batch(1))])
    spread = ((seen - model.depth.state.mean) @ model.depth.state.whiten).var(0)
    assert spread.max().item() == pytest.approx(1, abs=0.05), "the largest directions are as large as any"
    weights = depth_only.folded(model, model.state_dict())
    plain = initial.new_model(tiny_tokens.config(asked_store.path, "unused", context=256, mixture=MixtureConfig(film=1)), source).eval()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    torch.testing.assert_close(plain.depth(states, batch.codes_NC, batch.block_context()), expected, atol=1e-4, rtol=1e-4)


def test_noise_is_met_in_training_alone():
    """Some of the codes before are then others, up to the share that was asked for; what is to be written, and how it is judged, stays."""
    torch.manual_seed(0)
    depth = DepthDecoder(BlockEmu3Config(hidden_size=8, codebook_size=64, depth_size=8, depth_heads=1, depth_noise=0.5))
    codes = torch.randint(64, (500, 16))
    wrong = (depth.train()._misread(codes) != codes).float().mean(1)
    assert wrong.mean().item() == pytest.approx(0.25, abs=0.05)
    assert (wrong == 0).any() and (wrong > 0.3).any(), "of each block another share"
    assert torch.equal(depth.eval()._misread(codes), codes)


def test_what_learns_alone_must_be_there():
    with pytest.raises(ValueError, match="only_depth=true learns to write the pictures of a checkpoint: name it in init_from"):
        _compose("stage/depth", tokens="x")


def test_a_process_without_a_drawn_block_waits_for_the_others(felt_store, tmp_path, monkeypatch):
    """Of its rows the depth decoder that learns alone then has no gradient, though the step has one elsewhere."""
    _run("stage/joint,stage/debug", felt_store.path, tmp_path / "joint", steps=2)
    given = str(tmp_path / "joint" / "policy")
    monkeypatch.setattr(team.Replicas, "tokens", lambda _self, _batch, _chosen: torch.tensor([0.0, 0.0, 0.0, 160.0]).double())
    options = {"init_from": given, "steps": 2, "loss.vision_loss_fraction": 0.0, "validate_every": 2}
    records = _run("stage/depth,stage/debug", felt_store.path, tmp_path / "depth", **options)
    assert [record["step"] for record in records if "validation" in record] == [2]


def test_what_is_kept_is_the_states_before_actions_and_blocks(felt_store):
    options = {"mixture": MixtureConfig(act=1, ask=1, draw=1), "scene_fraction": 1.0, "scene_first": True}
    source, stream = _stream(felt_store, **options)
    model = initial.new_model(tiny_tokens.config(felt_store.path, "unused", context=256, **options), source).eval()
    batch, v = stream.batch(1), source.vocabulary
    following = batch.ids_BL.flatten().roll(-1)
    following[batch.block_at_N - 1] = -2
    actions = set(v.from_actions(np.arange(v.action_size)).tolist()) | {v.end_of_chunk}
    expected = [at for at, index in enumerate(following.tolist()) if index == -2 or index in actions]
    both = Keeper(model, [KINDS.index("action"), KINDS.index("vision")], v, torch.float32)
    assert both.positions(batch).tolist() == expected
    blocks = Keeper(model, [KINDS.index("vision")], v, torch.float32)
    assert blocks.positions(batch).tolist() == sorted((batch.block_at_N - 1).tolist())

    states = model.states(batch).detach()
    assert both.moved(states, batch) == (0, len(expected))
    moved = states.clone().requires_grad_()
    with torch.no_grad():
        moved[expected[0]] *= 1.5
    loss, _ = both.moved(moved, batch)
    loss.backward()
    assert loss.item() == pytest.approx(0.25, rel=1e-5) and moved.grad.any(1).nonzero().flatten().tolist() == expected[:1]


def test_answers_are_learnt_where_acting_stays(felt_store, tmp_path):
    """The same steps with and without what holds the states: answers change, and actions and pictures hardly."""
    _run("stage/joint,stage/debug", felt_store.path, tmp_path / "joint", steps=2)
    given, moved = str(tmp_path / "joint" / "policy"), {}
    for keep in (1e-9, 30.0):
        output = tmp_path / f"answers_{keep}"
        options = {"init_from": given, "steps": 12, "validate_every": 12, "loss.keep": keep, "optimizer.learning_rate": 3e-3}
        records = _run("stage/answers,stage/debug", felt_store.path, output, **options)
        validation = next(record["validation"] for record in records if "validation" in record)
        moved[keep] = validation["moved"]
        kept = 0.02 * validation["loss_special"] + validation["loss_text"] + keep * validation["moved"]
        assert validation["loss"] == pytest.approx(kept, abs=1e-3)  # figures are rounded
    assert 0 < moved[30.0] < 0.2 * moved[1e-9]
    policy, before = load(output / "policy"), load(given)
    after, given = policy.model.state_dict(), before.model.state_dict()
    same = {name for name in after if torch.equal(after[name], given[name])}
    assert {name for name in after if name.startswith("depth.")} <= same, "what writes pictures does not learn"
    actions = policy.vocabulary.from_actions(np.arange(policy.vocabulary.action_size)).tolist()
    changed = (after["lm_head.weight"] != given["lm_head.weight"]).any(1).nonzero().flatten().tolist()
    assert changed and not set(changed) & {*actions, policy.vocabulary.end_of_chunk}, "nor does what writes actions"
    assert policy.policy.scene == before.policy.scene and policy.policy.scene_first


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init_from": '""'}, "loss.keep=30.0 holds what a model does while its trunk learns from documents: name it in init_from"),
        ({"loss.action_weight": 1, "loss.vision_weight": 1}, "holds what is written of kinds that are not learnt"),
        ({"optimizer.weight_decay": 0.1}, "it needs optimizer.weight_decay=0 and lora_rank=0, not 0.1 and 0"),
        ({"lora_rank": 8}, "it needs optimizer.weight_decay=0 and lora_rank=0, not 0.0 and 8"),
        ({"loss.keep": -1}, "loss.keep is -1.0, expected a number from 0 on"),
        ({"parallel.fsdp": 2, "processes": 1, "optimizer.muon_learning_rate": "null"}, "loss.keep=30.0 with"),
    ],
)
def test_what_cannot_be_kept(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _compose("stage/answers", tokens="x", **{"init_from": "policy"} | options)


def test_stages_learn_what_they_should():
    """By their presets: of what, over how long rows, down to which rate."""
    configs = {stage: _compose(f"stage/{stage}", tokens="x", **_needed(stage)) for stage in STAGES}
    assert (configs["pretrain_images"].context, configs["pretrain_video"].context) == (5120, 131072)
    assert set(configs["pretrain_images"].mixture.shares()) == {"text", "draw", "describe"}
    assert "film" in configs["pretrain_video"].mixture.shares()
    for stage in ("pretrain_images", "pretrain_video", "interleave"):
        assert (configs[stage].loss.mean_over, configs[stage].loss.vision_weight, configs[stage].loss.text_weight) == ("token", 0.5, 1.0)
    for stage in ("world_model", "quality"):
        assert [configs[stage].loss.weight(kind) for kind in KINDS] == [0, 0, 0, 1], "pictures alone"
    for stage in ("understand_describe", "understand_instruct"):
        assert [configs[stage].loss.weight(kind) for kind in KINDS] == [0, 1, 0, 0], "text alone"
    assert configs["vla"].loss.vision_weight == 0 < configs["vla_all"].loss.vision_weight
    quality = configs["quality"]
    assert quality.optimizer.schedule == "linear" and quality.optimizer.rate(quality.steps, quality.steps) == 0, "down to nothing"
    assert configs["pretrain_images"].model.dropout == 0.1


def _needed(stage: str) -> dict:
    if stage in NEED_A_POLICY:
        return {"init_from": "policy"}
    return {"preference.pairs": "pairs", "init_from": "policy"} if stage == NEEDS_PAIRS else {}


def test_ablations_change_one_thing():
    base = _compose("stage/pretrain_images", tokens="x")
    changes = {
        "no_dropout": {"model": dataclasses.replace(base.model, dropout=0.0)},
        "vision_weight_1": {"loss": dataclasses.replace(base.loss, vision_weight=1.0)},
        "from_scratch": {"codes_from_tokenizer": False},
        "initialised": {},
    }
    assert set(changes) == {path.stem for path in (PRESETS / "ablation").glob("*.yaml")}
    for name, change in changes.items():
        assert _compose(f"stage/pretrain_images,ablation/{name}", tokens="x") == dataclasses.replace(base, **change)


def test_presets_apply_in_order():
    assert _compose("stage/vla,stage/debug", tokens="x").context == 448
    assert _compose("stage/debug,stage/vla", tokens="x").context == 2048
    assert _compose("stage/vla,stage/debug", tokens="x", context=512).context == 512
    with pytest.raises(cli.UsageError, match="unknown preset 'stage/vlaa' of 'emu3-vla train'; did you mean 'stage/vla'"):
        _compose("stage/debug,stage/vlaa", tokens="x")


def _documents(batch):
    """Ids and targets of each document of a packed batch."""
    for start, length in zip(batch.spans.starts_D, batch.spans.lengths_D, strict=True):
        own = slice(start, start + length)
        yield batch.ids_BL.flatten()[own], batch.targets_BL.flatten()[own], batch.kinds_BL.flatten()[own], own


@pytest.mark.parametrize("kind", [name for name in vars(MixtureConfig()) if name != "moments"])
def test_kinds_of_documents(kind, asked_store):
    """What is in a document of each kind, in which order, and what of it is learnt."""
    source, stream = _stream(asked_store, mixture=MixtureConfig(**{kind: 1.0}, moments=3))
    v, batch = source.vocabulary, stream.batch(0)
    block_at, weights = batch.block_at_N.numpy(), batch.block_weights_N.numpy()
    for ids, targets, kinds, own in _documents(batch):
        images, chunks = int((ids == v.begin_image(RGB_STATIC)).sum()), int((ids == v.begin_action).sum())
        learnt = {KINDS[number] for number in kinds[targets != IGNORE].unique()}
        predicted = weights[(block_at >= own.start) & (block_at < own.stop)] > 0
        first = int(ids[1])
        assert ids[0] == v.bos and (first < v.text_size) == (kind in {"text", *TEXT_BEFORE_IMAGES})
        assert (ids[-1] == v.eos) == (kind not in {"ask", "act"})
        if kind == "text":
            assert not images and not chunks and learnt == {"text"}
        if kind in ("draw", "describe"):
            assert images == 1 and predicted.all() and learnt == {"text", "special"}
            assert (int(ids[-2]) < v.text_size) == (kind == "describe")
        if kind == "film":
            assert 2 <= images <= 3 and not chunks and predicted.all() and (ids != v.begin_image(RGB_GRIPPER)).all()
        if kind == "world":
            assert images == chunks + 1 >= 2 and "action" not in learnt
            assert not predicted[:25].any() and predicted[25:].all(), "the first images are given, those after actions are not"
        if kind == "ask":
            assert images == 1 and not predicted.any() and learnt <= {"text", "special"} and "text" in learnt
        if kind == "act":
            assert 1 <= images == chunks <= 2 and "action" in learnt and "text" not in learnt
        if kind == "interleave":
            assert 2 <= images <= 3 and not chunks and learnt == {"text", "special"}


def test_acting_in_a_mixture_says_what_there_is_to_see(tmp_path):
    """In the asked share of the documents, behind the images and the arm's state, as a target; questions feel the arm in
    FELT of them, and then always say it too."""
    store = tiny_tokens.tiny_store(tmp_path / "felt", shards=2, asked=True, felt=True)
    source, stream = _stream(store, mixture=MixtureConfig(act=1, ask=1), scene_fraction=0.5, validation_fraction=0.5)
    v, scene, state = source.vocabulary, source.scenes().single_ids().flatten(), source.states().single_ids().flatten()
    said, felt = Counter(), Counter()
    for step in range(20):
        for ids, targets, _, _ in _documents(stream.batch(step)):
            acts, spoken = bool((ids == v.begin_action).any()), np.isin(ids, scene)
            said[acts, bool(spoken.any())] += 1
            felt[acts, bool(np.isin(ids, state).any())] += 1
            assert not np.isin(targets, state).any(), "the arm's state is given"
            if spoken.any():
                moments = (ids == v.begin_action).sum() if acts else 1
                assert spoken.sum() == 3 * moments == np.isin(targets, scene).sum()
    assert 0.4 < said[True, True] / (said[True, True] + said[True, False]) < 0.6
    assert not felt[True, False] and abs(felt[False, True] / (felt[False, True] + felt[False, False]) - FELT) < 0.1
    assert said[False, True] == felt[False, True]


def test_a_mixture_cannot_say_what_the_store_does_not(asked_store):
    with pytest.raises(ValueError, match="the token store does not say what there is to see"):
        _stream(asked_store, mixture=MixtureConfig(act=1), scene_fraction=0.5)
    with pytest.raises(ValueError, match="there are none: give mixture.act"):
        _stream(asked_store, mixture=MixtureConfig(ask=1), scene_fraction=0.5)


def test_mixture_keeps_its_shares_and_fills_its_rows(asked_store):
    _, stream = _stream(asked_store, mixture=MixtureConfig(act=1, draw=3))
    begins = np.zeros(2)
    used = []
    v = open_source(str(asked_store.path), 4).vocabulary
    for step in range(16):
        batch = stream.batch(step)
        used.append(batch.positions / batch.ids_BL.numel())
        acts = [bool((ids == v.begin_action).any()) for ids, *_ in _documents(batch)]
        begins += [sum(acts), len(acts) - sum(acts)]
    assert begins[1] / begins[0] == pytest.approx(3, rel=0.1)
    assert np.mean(used) > 0.93, "little of the rows is padding"


def test_all_documents_come_equally_often(asked_store):
    """Up to the few that find no place in their pool's rows."""
    _, stream = _stream(asked_store, mixture=MixtureConfig(describe=1))
    seen = Counter(tuple(ids.tolist() + codes) for step in range(16) for ids, codes in _with_codes(stream.batch(step)))
    assert len(seen) == len(stream) and stream.epochs(16) > 2
    assert max(seen.values()) <= np.ceil(stream.epochs(16)) and min(seen.values()) >= np.floor(stream.epochs(16)) - 2


def _with_codes(batch):
    for ids, _, _, own in _documents(batch):
        here = (batch.block_at_N >= own.start) & (batch.block_at_N < own.stop)
        yield ids, batch.codes_NC[here].flatten().tolist()


def test_a_step_depends_on_its_number_alone(asked_store):
    mixture = MixtureConfig(act=1, ask=1, film=1)
    _, stream = _stream(asked_store, mixture=mixture)
    _, again = _stream(asked_store, mixture=mixture)
    last = again.batch(17)
    assert torch.equal(stream.batch(17).ids_BL, last.ids_BL) and torch.equal(stream.batch(17).codes_NC, last.codes_NC)
    parts = [stream.batch(17, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([part.ids_BL for part in parts]), last.ids_BL)
    assert not torch.equal(stream.batch(16).ids_BL, last.ids_BL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 256}, "context=256 packs documents of a mixture or pairs: give mixture.act=1"),
        ({"mixture": MixtureConfig(act=1)}, "give context, the positions of a row"),
        ({"context": 256, "mixture": MixtureConfig(act=1), "asked_fraction": 0.1}, "in a mixture it is mixture.ask"),
        ({"context": 9999, "mixture": MixtureConfig(act=1)}, "context=9999, expected 0 to model.max_position_embeddings=2048"),
    ],
)
def test_stages_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        loop.TrainConfig(tokens="somewhere", **options)


def test_what_a_store_lacks_is_named(tiny_store, tmp_path):
    with pytest.raises(ValueError, match="mixture.draw needs questions about the frames, and the token store holds none"):
        _stream(tiny_store, mixture=MixtureConfig(draw=1))
    _, stream = _stream(tiny_store, mixture=MixtureConfig(act=1))
    stream._context = 40
    with pytest.raises(ValueError, match=r"a document has \d+ positions, expected at most context=40: documents are never cut"):
        stream.batch(0)
    with pytest.raises(ValueError, match="mixture.film is -1"):
        MixtureConfig(film=-1)


def test_a_loss_that_counts_nothing_is_named(tiny_store, tmp_path):
    loss = loop.LossConfig(action_weight=0, special_weight=0, vision_weight=0, text_weight=1)
    with pytest.raises(ValueError, match="a batch has nothing to learn: its targets are .* action, 0 text"):
        tiny_tokens.train(tiny_store.path, tmp_path, steps=1, context=256, mixture=MixtureConfig(act=1), loss=loss)
