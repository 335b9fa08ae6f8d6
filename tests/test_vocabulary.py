"""Ids of both vocabularies: disjoint, complete, and the same after a round trip through their files."""

import json

import numpy as np
import pytest

from emu3_vla.vocabulary import SPECIALS, CompactVocabulary, Emu3Vocabulary, ImageGrid, VocabularyError, load_vocabulary

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


def test_emu3_ids_cover_the_vocabulary_once():
    v = Emu3Vocabulary()
    ids = [*range(v.text_size), *SPECIALS.values(), *range(v.vision_start, v.vision_start + v.codebook_size)]
    assert ids == list(range(v.size)) and v.size == v.head_size == 184_622
    used = [v.pad, v.bos, v.eos, v.begin_action, v.end_of_chunk, v.begin_reasoning, v.end_of_reasoning, v.end_of_line, v.end_of_frame]
    used += [v.begin_codes, v.begin_image(), v.end_of_image]
    assert len(set(used)) == 12
    every = np.arange(-2, v.size + 2)
    assert set(every[v.is_text(every)]) == set(range(v.text_size)) | set(SPECIALS.values()) - set(used)


@pytest.mark.parametrize("v", [Emu3Vocabulary(action_size=1024), _vocabulary()], ids=["emu3", "compact"])
def test_action_ids_come_back(v):
    tokens = np.arange(v.action_size)
    ids = v.from_actions(tokens)
    np.testing.assert_array_equal(v.to_actions(ids), tokens)
    every = np.arange(-2, v.size + 2)
    assert sorted(every[v.is_action(every)]) == sorted(ids)


def test_emu3_action_ids_count_down():
    assert Emu3Vocabulary().from_actions(np.array([0, 1, 2047])).tolist() == [151_642, 151_641, 149_595]


def test_blocks_leave_emu3s_head():
    v = Emu3Vocabulary(block_size=4)
    assert (v.head_size, v.codes_per_block, v.num_places, v.vision_in_head) == (151_854, 16, 1, False)


@pytest.mark.parametrize("v", [Emu3Vocabulary(action_size=1024, block_size=4), Emu3Vocabulary(), _vocabulary()])
def test_files_say_which_vocabulary_it_is(v, tmp_path):
    path = tmp_path / "vocabulary.json"
    v.save(path)
    assert load_vocabulary(path) == type(v).load(path) == v
    other = CompactVocabulary if isinstance(v, Emu3Vocabulary) else Emu3Vocabulary
    with pytest.raises(VocabularyError, match="vocabulary.json is not a vocabulary of the expected kind: its format is"):
        other.load(path)
    path.write_text(path.read_text().replace("block_size", "block"))
    with pytest.raises(VocabularyError, match="vocabulary.json is damaged or cut short: TypeError"):
        load_vocabulary(path)


@pytest.mark.parametrize(("change", "message"), [({"action_size": -1}, "action_size is -1"), ({"block_size": 0}, "block_size is 0")])
def test_emu3_refusals(change, message):
    with pytest.raises(VocabularyError, match=message):
        Emu3Vocabulary(**change)


@pytest.mark.parametrize(
    ("v", "index", "words"),
    [
        (Emu3Vocabulary(), 151_846, "151846 (<end of line>)"),
        (Emu3Vocabulary(), 151_646, "151646 (<|extra_0|>)"),
        (Emu3Vocabulary(), 151_852, "151852 (<begin image>)"),
        (Emu3Vocabulary(), 151_855, "151855 (vision code 1)"),
        (Emu3Vocabulary(), 7, "7 (text)"),
        (_vocabulary(), 299, "299 (text)"),
        (_vocabulary(), 301, "301 (action id 1)"),
        (_vocabulary(), 800, "800 (<end of chunk>)"),
        (_vocabulary(), 806, "806 (<begin image rgb_gripper>)"),
        (_vocabulary(), 807, "807 (vision code 0)"),
        (_vocabulary(), 1831, "1831 (no id of this vocabulary, which has 1831)"),
    ],
)
def test_ids_in_words(v, index, words):
    assert v.describe(index) == words
