"""Ids of the compact vocabulary: disjoint, complete, and the same after a round trip through its file."""

import json

import pytest

from emu3_vla.vocabulary import CompactVocabulary, ImageGrid, VocabularyError

IMAGES = (ImageGrid(name="rgb_static", rows=16, columns=16), ImageGrid(name="rgb_gripper", rows=12, columns=12))


def _vocabulary(**changes) -> CompactVocabulary:
    return CompactVocabulary(**({"text_size": 300, "action_size": 500, "codebook_size": 1024, "images": IMAGES, "block_size": 4} | changes))


def test_every_id_has_one_meaning():
    v = _vocabulary()
    single = [v.end_of_chunk, v.pad, v.bos, v.eos, v.begin_action, v.begin_image("rgb_static"), v.begin_image("rgb_gripper")]
    ids = [*range(v.text_size), *range(v.action_start, v.action_start + v.action_size), *single]
    ids += range(v.vision_start, v.vision_start + v.codebook_size)
    assert sorted(ids) == list(range(v.size))
    assert max(single) == v.head_size - 1


def test_end_of_chunk_follows_the_action_ids():
    v = _vocabulary()
    assert v.end_of_chunk == v.action_start + v.action_size


def test_blocks_and_places():
    v = _vocabulary()
    assert (v.blocks("rgb_static"), v.blocks("rgb_gripper"), v.num_places) == (16, 9, 25)
    assert [*v.places("rgb_static"), *v.places("rgb_gripper")] == list(range(25))
    assert _vocabulary(block_size=1).blocks("rgb_static") == 256


def test_file_round_trip(tmp_path):
    _vocabulary().save(tmp_path / "vocabulary.json")
    assert CompactVocabulary.load(tmp_path / "vocabulary.json") == _vocabulary()


@pytest.mark.parametrize("block_size", [3, 5, 16])
def test_blocks_must_divide_the_grids(block_size):
    with pytest.raises(VocabularyError, match=f"multiples of block_size={block_size}"):
        _vocabulary(block_size=block_size)


def test_refusals_say_what_is_wrong(tmp_path):
    with pytest.raises(VocabularyError, match="text_size is 0"):
        _vocabulary(text_size=0)
    with pytest.raises(VocabularyError, match="no image 'rgb_wrist'; it has rgb_static, rgb_gripper"):
        _vocabulary().blocks("rgb_wrist")
    path = tmp_path / "vocabulary.json"
    with pytest.raises(FileNotFoundError, match="vocabulary.json is missing"):
        CompactVocabulary.load(path)
    _vocabulary().save(path)
    text = path.read_text()
    path.write_text(text[:60])
    with pytest.raises(VocabularyError, match="vocabulary.json is damaged or cut short"):
        CompactVocabulary.load(path)
    path.write_text(json.dumps({"format": "another"}))
    with pytest.raises(VocabularyError, match="not a vocabulary of the expected kind: its format is .another."):
        CompactVocabulary.load(path)
