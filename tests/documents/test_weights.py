"""Loss weights: by hand on small documents, the presets, and what is left out."""

import numpy as np
import pytest
from drawn import compact

from emu3_vla.documents import (
    IGNORE,
    PRESETS,
    ActionChunk,
    Begin,
    End,
    Image,
    LossWeights,
    Reasoning,
    Text,
    Video,
    collate,
    lay_out,
    write,
)
from emu3_vla.vocabulary import Emu3Vocabulary

EMU3 = Emu3Vocabulary()
MARKS = LossWeights(text=2, vision=3, action=5, special=7)
CODES = np.array([[1, 2]])
DOCUMENT = [Begin(), Text([4, 5]), Image("", CODES), Video(CODES[None]), Reasoning([6]), ActionChunk([8, 9]), End()]

# Of the ids after <bos>: two words; <begin> 1 * 2 <codes> 2 codes <eol> <eof> <end>; <begin> 1 * 1 * 2 <codes> 2 codes <eof> <end>;
# begin, word and end of reasoning; begin, two ids and end of the chunk; <eos>.
IMAGE_WEIGHTS, VIDEO_WEIGHTS = [7] * 5 + [3, 3] + [7] * 3, [7] * 7 + [3, 3] + [7] * 2
WEIGHTS = [2, 2, *IMAGE_WEIGHTS, *VIDEO_WEIGHTS, 2, 2, 2, 5, 5, 5, 5, 2]


def test_each_kind_has_its_weight():
    layout, ids = lay_out(DOCUMENT, EMU3, MARKS), write(DOCUMENT, EMU3)
    assert layout.ids.tolist() == ids.tolist()
    assert layout.targets.tolist() == [*ids[1:], IGNORE]
    assert layout.weights.tolist() == [*WEIGHTS, 0]
    assert layout.codes.shape == (0, 1) and layout.block_at.shape == layout.block_weights.shape == layout.places.shape == (0,)


def test_codes_count_half_by_default():
    layout = lay_out([Image("", CODES)], EMU3)
    assert layout.weights.tolist() == [1, 1, 1, 1, 1, 0.5, 0.5, 1, 1, 1, 0]
    assert layout.weights.dtype == np.float32


@pytest.mark.parametrize(("preset", "kept"), [("all", {2, 3, 5, 7}), ("only-vision", {3}), ("only-action", {5}), ("only-text", {2})])
def test_presets(preset, kept):
    layout, ids = lay_out(DOCUMENT, EMU3, LossWeights.named(preset)), write(DOCUMENT, EMU3)
    is_kept = np.isin([*WEIGHTS, 0], list(kept))
    np.testing.assert_array_equal(layout.targets, np.where(is_kept, [*ids[1:], 0], IGNORE))
    np.testing.assert_array_equal(layout.weights > 0, is_kept)
    assert set(layout.weights[is_kept]) == ({1, 0.5} if preset == "all" else {1})


def test_unsupervised_segments_are_no_targets():
    document = [
        Text([4, 5], supervised=False),
        Image("", CODES, supervised=False),
        Video(CODES[None], supervised=False),
        Reasoning([6], supervised=False),
        ActionChunk([8, 9], supervised=False),
        End(supervised=False),
    ]
    layout = lay_out(document, EMU3, MARKS)
    is_begin_action = layout.ids[1:] == EMU3.begin_action  # stays: that actions come is the demonstrator's choice
    np.testing.assert_array_equal(layout.weights[:-1], np.where(is_begin_action, 5, 0))
    np.testing.assert_array_equal(layout.targets[:-1], np.where(is_begin_action, EMU3.begin_action, IGNORE))


def test_instruction_tuning_learns_the_answer_alone():
    layout = lay_out([Begin(), Text([4], supervised=False), Text([5, 6]), End()], EMU3)
    assert layout.targets.tolist() == [IGNORE, 5, 6, EMU3.eos, IGNORE]


def test_blocks_have_weights_of_their_own():
    v = compact(4)
    static, gripper = np.zeros((8, 4), int), np.zeros((4, 4), int)
    document = [Text([1]), Image("static", static), Image("gripper", gripper, supervised=False), ActionChunk([3])]
    layout = lay_out(document, v, MARKS)
    assert layout.block_weights.tolist() == [3, 3, 0]
    assert layout.weights.tolist() == [2, 7, 0, 0, 0, 0, 5, 5, 5, 0]
    assert layout.targets.tolist() == [
        1,
        v.begin_image("static"),
        *[IGNORE] * 4,
        v.begin_action,
        v.action_start + 3,
        v.end_of_chunk,
        IGNORE,
    ]
    only_action = lay_out(document, v, PRESETS["only-action"])
    assert only_action.block_weights.tolist() == [0, 0, 0]
    assert (only_action.targets != IGNORE).sum() == 3


def test_batches_carry_the_weights():
    v = compact(4)
    long, short = [Text([1, 2, 3]), Image("gripper", np.zeros((4, 4), int))], [Text([1])]
    batch = collate([long, short], v, MARKS)
    assert batch.weights_BL.tolist() == [[2, 2, 2, 7, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.block_weights_N.tolist() == [3]
    assert batch.to("cpu").weights_BL.dtype == batch.block_weights_N.dtype


def test_refusals():
    with pytest.raises(ValueError, match="loss weight of vision is -1, expected a number from 0 on"):
        LossWeights(vision=-1)
    with pytest.raises(ValueError, match="loss weight of text is nan"):
        LossWeights(text=float("nan"))
    with pytest.raises(ValueError, match="there are no loss weights 'none', only all, only-vision, only-action, only-text"):
        LossWeights.named("none")
