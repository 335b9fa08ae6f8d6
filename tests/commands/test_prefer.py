"""Pairs of a policy's own answers: what it saw and wrote is kept chunk by chunk, and the same command gives the same pairs."""

import numpy as np
import pytest
import tiny_tokens

from emu3_vla.commands import prefer
from emu3_vla.commands.prefer import PreferConfig
from emu3_vla.data.pairs import PairStore
from emu3_vla.documents import ActionChunk, Begin, Image, Text


def test_rollouts_are_kept_as_the_policy_saw_them(tiny_checkpoint, tmp_path):
    config = PreferConfig(policy=str(tiny_checkpoint), situations_per_shard=1, max_steps=20, output_dir=str(tmp_path))
    (answers,) = prefer._rollouts(config, np.random.default_rng(0))
    assert len(answers) == 2 and {answer.about["instruction"] for answer in answers} == {answers[0].about["instruction"]}
    for answer in answers:
        assert answer.about["steps"] == 20 and not answer.about["success"] and answer.score == 0
        kinds = [[type(part) for part in written.segments] for written in answer.written]
        chunk = [Image, Image, ActionChunk]
        assert kinds == [[Begin, Text, *chunk], [Begin, Text, *chunk, *chunk]], "two chunks of ten steps"
        assert all(written.given == len(written.segments) - 1 for written in answer.written)
    first, other = (answer.written[0].segments for answer in answers)
    assert first[:4] == other[:4], "both see the same at first"
    assert first[4] != other[4], "and answer differently"


def test_what_the_policy_says_that_it_sees_is_kept_too(tmp_path):
    store = tiny_tokens.tiny_store(tmp_path / "tokens", shards=2, episodes_per_shard=2, felt=True)
    policy = tiny_tokens.train(store.path, tmp_path / "run", steps=2, validation_fraction=0.5, scene_fraction=0.5)
    config = PreferConfig(policy=str(policy), situations_per_shard=1, max_steps=10, output_dir=str(tmp_path))
    (answers,) = prefer._rollouts(config, np.random.default_rng(0))
    (written,) = answers[0].written
    assert [type(part) for part in written.segments] == [Begin, Text, Image, Image, Text, Text, ActionChunk]


def test_pictures_for_captions(tiny_checkpoint, tmp_path, monkeypatch):
    """The command, in this process: pairs of pictures of the store's captions, once and the same again."""
    store = tiny_tokens.tiny_store(tmp_path / "asked", shards=1, episodes_per_shard=2, asked=True)
    monkeypatch.setattr(prefer, "_rollouts", None)

    class InThisProcess:
        def Pool(self, *_, **__):
            return self

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def imap_unordered(self, function, jobs):
            return map(function, jobs)

    monkeypatch.setattr(prefer.multiprocessing, "get_context", lambda _: InThisProcess())
    monkeypatch.setattr("emu3_vla.data.tokens.TokenStore.require_hashes", lambda *_: None)  # of another fit, alike in size
    options = {"policy": str(tiny_checkpoint), "kind": "images", "tokens": str(store.path), "shards": 1, "situations_per_shard": 3}
    stores = []
    for name in ("one", "two"):
        prefer.main(PreferConfig(**options, samples=3, margin=1e-6, output_dir=str(tmp_path / name)))
        stores.append(PairStore.open(tmp_path / name))
    assert len(stores[0]) == len(stores[1]) <= 3
    if len(stores[0]):
        one, two = (store.pairs() for store in stores)
        assert [pair.scores for pair in one] == [pair.scores for pair in two]
        assert one[0].chosen[0].segments[:2] == one[0].rejected[0].segments[:2] and one[0].chosen[0].given == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "films"}, "kind is 'films', expected one of rollouts, images"),
        ({"samples": 1}, "samples is 1, expected at least 2"),
        ({"policy": "expert"}, "policy is 'expert', expected a checkpoint"),
        ({"kind": "images"}, "tokens= is the token store whose captions are drawn"),
        ({"margin": 0}, "equal answers make no pair"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PreferConfig(**options)
