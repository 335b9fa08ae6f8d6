"""Preferences: the loss is DPO's, against weights that stay as they were; pairs on disk come back; the chosen side gains."""

import json
import math

import numpy as np
import pytest
import tiny_tokens
import torch
import torch.nn.functional as F

from emu3_vla import attention
from emu3_vla.commands.prefer import Answer, best_and_worst, rollout_score
from emu3_vla.data.pairs import Pair, PairStore, PairStoreError, Written
from emu3_vla.data.tokens import hashes
from emu3_vla.documents import IGNORE, ActionChunk, Begin, End, Image, Text, collate
from emu3_vla.model import BlockEmu3ForCausalLM, block_losses, build_config, token_losses
from emu3_vla.training import preference
from emu3_vla.training.drawing import NearestPictures, draw
from emu3_vla.training.preference import PairStream, PreferenceConfig
from emu3_vla.training.source import open_source
from emu3_vla.vocabulary import CompactVocabulary, ImageGrid
from envs.spec import RGB_GRIPPER, RGB_STATIC

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
V = CompactVocabulary(
    text_size=30,
    action_size=20,
    codebook_size=32,
    images=(ImageGrid(name=RGB_STATIC, rows=8, columns=8), ImageGrid(name=RGB_GRIPPER, rows=4, columns=4)),
    block_size=4,
)


def _model(seed=0):
    torch.manual_seed(seed)
    model = BlockEmu3ForCausalLM(build_config(V, **SIZES, code_dim=8, depth_size=16, depth_heads=2, initializer_range=0.2))
    attention.confine(model)
    return model.eval()


def _images(vocabulary, random):
    return [Image(grid.name, random.integers(0, 32, (grid.rows, grid.columns))) for grid in vocabulary.images]


def _rollout(vocabulary, random, chunks):
    """As many documents as chunks, each given one more."""
    shown = [Begin(), Text(random.integers(0, 30, 3))]
    documents = []
    for _ in range(chunks):
        shown = [*shown, *_images(vocabulary, random), ActionChunk(random.integers(0, 20, 4))]
        documents.append(Written(segments=shown, given=len(shown) - 1))
    return documents


def _drawing(vocabulary, random):
    return [Written(segments=[Begin(), Text([1, 2]), *_images(vocabulary, random), End()], given=2)]


def _pairs(vocabulary, count=6):
    random = np.random.default_rng(0)
    pairs = []
    for number in range(count):
        if number % 2:
            sides = (_rollout(vocabulary, random, 1), _rollout(vocabulary, random, 3))
        else:
            sides = (_drawing(vocabulary, random), _drawing(vocabulary, random))
        pairs.append(Pair(chosen=sides[0], rejected=sides[1], scores=(2.0, 1.0), about={"number": number}))
    return pairs


def _slow_log(model, side):
    """log π of a side, document by document, and its number of tokens."""
    total, tokens = torch.zeros(()), 0
    for part in side:
        batch = collate([part.document()], V)
        states = model.states(batch)
        targets = batch.targets_BL.flatten()
        losses, *_ = token_losses(model, states, targets)
        written = (batch.block_weights_N > 0).nonzero().squeeze(1)
        blocks = block_losses(model, states, batch, written)
        total, tokens = total - losses.sum() - blocks.sum(), tokens + len(losses) + blocks.numel()
        assert (targets != IGNORE).sum() == len(losses)
    return total, tokens


def test_the_loss_is_dpos_with_cross_entropy_beside_it():
    reference, model, pairs = _model(0), _model(1), _pairs(V)
    stream = PairStream(pairs, V, context=160, batch_size=4, seed=0)
    preference.measure_reference(reference, stream)
    numbers, config = [0, 3, 5, 2], PreferenceConfig(pairs="x", beta=0.3, cross_entropy_weight=0.7)
    loss, figures = preference.losses(model, stream.of(numbers, 4), config)
    expected, cross_entropy, tokens = [], torch.zeros(()), 0
    for number in numbers:
        chosen, rejected = pairs[number].chosen, pairs[number].rejected
        (now, count), (before, _) = _slow_log(model, chosen), _slow_log(reference, chosen)
        other_now, other_before = _slow_log(model, rejected)[0], _slow_log(reference, rejected)[0]
        expected.append(-F.logsigmoid(0.3 * ((now - before) - (other_now - other_before))))
        cross_entropy, tokens = cross_entropy - now, tokens + count
    torch.testing.assert_close(loss, torch.stack(expected).mean() + 0.7 * cross_entropy / tokens, atol=1e-4, rtol=1e-4)
    assert figures.tokens.sum() == tokens and figures.pairs[-1] == 4
    slow = torch.autograd.grad(torch.stack(expected).mean() + 0.7 * cross_entropy / tokens, list(model.parameters()))
    for one, other in zip(torch.autograd.grad(loss, list(model.parameters())), slow, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_at_the_start_neither_side_has_gained():
    model = _model()
    stream = PairStream(_pairs(V), V, context=160, batch_size=2, seed=0)
    preference.measure_reference(model, stream)
    assert torch.isfinite(stream.reference_Q2).all() and (stream.reference_Q2 < 0).all()
    _, figures = preference.losses(model, stream.batch(0), PreferenceConfig(pairs="x"))
    assert figures.means()["loss_preference"] == pytest.approx(math.log(2), abs=1e-4)
    parts = [stream.batch(1, rank, 2) for rank in range(2)]
    assert sum(len(part.reference_Q2) for part in parts) == parts[0].pairs == 2


def test_pairs_come_back_from_disk(tmp_path):
    pairs = _pairs(V)
    store = PairStore.create(tmp_path / "pairs", V, {"text_tokenizer": "1"}, {"seed": 0})
    store.write_shard(0, pairs[:4])
    store.write_shard(1, [])
    store.write_shard(2, pairs[4:])
    found = PairStore.open(tmp_path / "pairs")
    assert len(found) == 6 and found.has_shard(1) and not found.has_shard(3)
    for one, other in zip(found.pairs(), pairs, strict=True):
        assert (one.scores, one.about) == (other.scores, other.about)
        for side in ("chosen", "rejected"):
            for got, expected in zip(getattr(one, side), getattr(other, side), strict=True):
                assert list(got.segments) == list(expected.segments) and got.given == expected.given


def test_texts_behind_each_other_come_back_as_one_and_what_was_given_with_them(tmp_path):
    """As of a policy that is told its arm's state in words, and says in words what it sees."""
    image = Image(RGB_GRIPPER, np.zeros((4, 4), np.int64))
    shown = [Begin(), Text([1]), image, Text([2]), Text([3]), ActionChunk([1]), image, Text([4]), Text([5])]
    sides = [[Written(segments=[*shown, ActionChunk(ids)], given=len(shown))] for ids in ([1, 2], [3, 4])]
    store = PairStore.create(tmp_path / "pairs", V, {}, {})
    store.write_shard(0, [Pair(chosen=sides[0], rejected=sides[1], scores=(1.0, 0.0))])
    (pair,) = PairStore.open(tmp_path / "pairs").pairs()
    supervised = [part.supervised for part in pair.chosen[0].document() if isinstance(part, ActionChunk)]
    assert supervised == [False, True] and pair.chosen[0].given == len(pair.chosen[0].segments) - 1


def test_pairs_of_others_are_refused(tmp_path):
    store = PairStore.create(tmp_path / "pairs", V, {"text_tokenizer": "1"}, {"seed": 0})
    with pytest.raises(PairStoreError, match="made otherwise; choose another folder"):
        PairStore.create(tmp_path / "pairs", V, {"text_tokenizer": "1"}, {"seed": 1})
    with pytest.raises(PairStoreError, match="was written with another text_tokenizer than the token store"):
        store.require(V, {"text_tokenizer": "2"}, "the token store")
    other = CompactVocabulary(text_size=31, action_size=20, codebook_size=32, images=V.images, block_size=4)
    with pytest.raises(PairStoreError, match="has the vocabulary .*text_size=30.*, the token store has .*text_size=31"):
        store.require(other, {"text_tokenizer": "1"}, "the token store")
    with pytest.raises(PairStoreError, match="holds no pair"):
        store.pairs()
    with pytest.raises(ValueError, match="the chosen side scores 1, the rejected one 1; expected more"):
        Pair(chosen=_drawing(V, np.random.default_rng(0)), rejected=_drawing(V, np.random.default_rng(1)), scores=(1, 1))
    with pytest.raises(ValueError, match="3 of 3 segments were given"):
        Written(segments=[Begin(), Text([1]), End()], given=3)
    with pytest.raises(ValueError, match="a text that was given stands before one that was written"):
        Written(segments=[Begin(), Text([1]), Text([2])], given=2)
    with pytest.raises(ValueError, match="preference.beta=0"):
        PreferenceConfig(beta=0)


def test_stage_dpo_learns_the_preference(tmp_path):
    """By its preset, from a policy that the vla stage's debug twin trained."""
    from emu3_vla import cli
    from emu3_vla.training import loop

    tokens = tiny_tokens.tiny_store(tmp_path / "tokens", shards=2, episodes_per_shard=2)
    given = [f"tokens={tokens.path}", "validation_fraction=0.5"]
    loop.main(cli.compose("train", ["preset=stage/vla,stage/debug", "steps=1", f"output_dir={tmp_path / 'vla'}", *given]))
    vocabulary, policy = open_source(str(tokens.path), 4).vocabulary, tmp_path / "vla" / "policy"
    random, pairs = np.random.default_rng(0), []
    for _ in range(6):  # what is preferred is what to learn: one chunk rather than another, whatever is seen
        shown = [Begin(), Text(random.integers(0, 30, 3)), *_images(vocabulary, random)]
        sides = [[Written(segments=[*shown, ActionChunk(ids)], given=len(shown))] for ids in ([1, 2, 3], [4, 5, 6])]
        pairs.append(Pair(chosen=sides[0], rejected=sides[1], scores=(1.0, 0.0)))
    store = PairStore.create(tmp_path / "pairs", vocabulary, hashes(policy), {})
    store.write_shard(0, pairs)
    given += [f"init_from={policy}", f"preference.pairs={store.path}", "optimizer.learning_rate=3e-3", "optimizer.ema_decay=0.0"]
    output = tmp_path / "dpo"
    loop.main(cli.compose("train", ["preset=stage/dpo,stage/debug", "steps=8", "validate_every=8", f"output_dir={output}", *given]))
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss_preference"] == pytest.approx(math.log(2), abs=2e-2)
    held_out = records[-1]["validation"]
    assert held_out["preferred"] == 1 and held_out["margin"] > 0.1 and held_out["loss"] < 0.66
    assert records[-2]["loss_action"] < records[0]["loss_action"], "the chosen side stays likely"
    with pytest.raises(ValueError, match="name a checkpoint folder in init_from"):
        loop.TrainConfig(tokens="x", context=64, preference=PreferenceConfig(pairs="y"))


def test_the_best_and_the_worst_answer_make_a_pair():
    written = _drawing(V, np.random.default_rng(0))
    answers = [Answer(written=written, score=score, about={"score": score}) for score in (1.2, 0.0, 1.9)]
    pair = best_and_worst(answers, 0.1)
    assert pair.scores == (1.9, 0.0) and pair.about == {"chosen": {"score": 1.9}, "rejected": {"score": 0.0}}
    assert best_and_worst([answers[1], answers[1]], 0.1) is None
    assert rollout_score(True, 40, 180) > rollout_score(True, 90, 180) > 1 > rollout_score(False, 10, 180) == 0


def test_drawn_pictures_are_seeded_and_follow_the_caption():
    model = _model()
    model.config._attn_implementation = "eager"
    one, again, other = (draw(model, V, [[1, 2], [3]], 1.0, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert [image.name for image in one[0]] == [RGB_STATIC, RGB_GRIPPER] and one[0][0].codes.shape == (8, 8)
    assert one == again and one != other
    colder = draw(model, V, [[1, 2], [1, 2]], 1e-6, torch.Generator().manual_seed(0))
    assert colder[0] == colder[1]
    # What was drawn is what the model finds likely at its place: the coldest drawing repeats itself when it is scored.
    batch = collate([[Begin(), Text([1, 2]), *colder[0]]], V)
    states = model.states(batch)
    logits = model.depth(states[batch.block_at_N - 1], batch.codes_NC, batch.block_context())
    assert torch.equal(logits.argmax(-1), batch.codes_NC)


def test_pictures_are_judged_by_their_neighbours():
    codes = np.repeat(np.array([0, 1]), 8)[:, None, None] * np.ones((1, 4, 4), np.int64)
    captions = ["the door is left, the lamp is on."] * 8 + ["the door is right, the lamp is on."] * 8
    judge = NearestPictures(codes, captions, torch.eye(2))
    assert judge.score(codes[0], "the door is left, the lamp is on.") == 1.0
    assert judge.score(codes[-1], "the door is left, the lamp is on.") == 0.5
