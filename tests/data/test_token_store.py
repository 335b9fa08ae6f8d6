"""Token stores that are wrong are named, and a store behind a URL is read like one in a folder."""

import dataclasses
import json

import fsspec
import numpy as np
import pytest
import tiny_tokens

from emu3_vla.data import remote
from emu3_vla.data.tokens import MANIFEST, Asked, TokenStore, TokenStoreError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_tokens.tiny_store(tmp_path_factory.mktemp("tokens"), shards=2, episodes_per_shard=1, asked=True)


@pytest.mark.parametrize(
    ("array", "size", "message"),
    [
        ("static_codes", "codebook_size", r"static_codes has ids in .*, expected \[0, 5\), as tokens.json states \(codebook_size\)"),
        ("action_ids", "action_vocab_size", r"action_ids has ids in .* expected \[0, 5\).*another tokenizer; delete that shard"),
        ("asked_ids", "text_vocab_size", r"asked_ids has ids in .* expected \[0, 5\)"),
    ],
)
def test_ids_outside_the_vocabulary_are_named(store, array, size, message):
    smaller = TokenStore(store.path, store.metadata | {size: 5})
    with pytest.raises(TokenStoreError, match=f"00000.zarr: {message}"):
        smaller.episodes()


def test_an_empty_shard_is_named(store, tmp_path):
    empty = TokenStore(tmp_path, store.metadata)
    (tmp_path / "shards").mkdir()
    episode = store.read_shard(0)[0]
    nothing = {name: getattr(episode, name)[:0] for name in ("static_codes", "gripper_codes", "frame_step", "action_ids", "chunk_imitate")}
    asked = Asked(np.zeros(0, np.uint16), np.zeros((0, 1, 2), np.uint16))
    empty.write_shard(0, [dataclasses.replace(episode, **nothing, asked=asked)])
    with pytest.raises(TokenStoreError, match="00000.zarr is empty: none of its episodes has a frame; delete that shard"):
        empty.read_shard(0)


def test_large_text_ids_are_kept():
    asked = Asked.of([[([70_000, 1], [151_642])]])
    question, answer = asked.pair(0, 0)
    assert question.tolist() == [70_000, 1] and answer.tolist() == [151_642]
    assert Asked.of([[([1], [2])]]).ids.dtype == np.uint16


def test_a_store_behind_a_url(store, tmp_path, monkeypatch):
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    memory, url = fsspec.filesystem("memory"), "memory://bucket/tokens"
    memory.put(str(store.path), "/bucket/tokens", recursive=True)
    try:
        opened = TokenStore.open(url)
        assert str(opened) == url and opened.shard_indices() == [0, 1] and not opened.missing_shards()
        for one, other in zip(opened.episodes(), store.episodes(), strict=True):
            assert np.array_equal(one.static_codes, other.static_codes) and one.action_ids == other.action_ids
        assert opened.tokenizers().text.encode("go") == store.tokenizers().text.encode("go")
        memory.rm("/bucket/tokens/shards/00001.zarr/static_codes/c", recursive=True)
        with pytest.raises(ValueError, match="memory://bucket/tokens/shards/00001.zarr: array 'static_codes' is damaged"):
            opened.episodes()
        memory.rm("/bucket/tokens/shards/00001.zarr", recursive=True)
        with pytest.raises(TokenStoreError, match="memory://bucket/tokens is unfinished: 1 of 2 shards are missing"):
            opened.episodes()
        memory.rm(f"/bucket/tokens/{MANIFEST}")
        with pytest.raises(FileNotFoundError, match="memory://bucket/tokens holds no tokens.json"):
            TokenStore.open(url)
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_tokenizer_that_was_swapped_is_named(store, tmp_path):
    import shutil

    shutil.copytree(store.path, tmp_path / "copy")
    path = tmp_path / "copy" / "normalizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(TokenStoreError, match="was written by another normalizer.json"):
        TokenStore.open(tmp_path / "copy")
