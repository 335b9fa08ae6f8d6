"""Hugging Face names: what the local cache holds is taken without the network; what is nowhere gives one clear line."""

import shutil

import huggingface_hub.constants
import pytest
import small_emu3
import torch

import emu3_vla
from emu3_vla.checkpoint import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A local cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def _cached(cache, repository: str):
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def test_cached_snapshot_loads_offline(cache):
    model = small_emu3.decoder()
    small_emu3.write_baai(_cached(cache, "someone/Emu3-small"), model)
    for name in ("someone/Emu3-small", "someone/Emu3-small@main"):
        assert torch.equal(small_emu3.logits(emu3_vla.load(name).model), small_emu3.logits(model))


def test_what_is_nowhere_or_in_part_is_one_line(cache):
    with pytest.raises(
        CheckpointError, match="someone/nothing is no folder here and not whole in the local.*downloading it failed"
    ) as caught:
        emu3_vla.load("someone/nothing")
    assert "\n" not in str(caught.value)
    folder = small_emu3.write_baai(_cached(cache, "someone/half"), small_emu3.decoder(), shard_bytes=30_000)
    sorted(folder.glob("*.safetensors"))[0].unlink()
    with pytest.raises(
        FileNotFoundError, match="someone--half.*is missing: 1 of the"
    ):  # what the cache has, since nothing else is to be had
        emu3_vla.load("someone/half")


def test_what_is_no_name_at_all(cache, tmp_path):
    shutil.rmtree(cache, ignore_errors=True)
    for path in ("/nowhere/at/all", "just-a-word", tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="is not a folder.*or a Hugging Face name"):
            emu3_vla.load(path)
