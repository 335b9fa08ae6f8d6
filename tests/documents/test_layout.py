"""Layout of documents over positions: the same ids, one position a block, exact targets."""

import numpy as np
import pytest
from drawn import VOCABULARIES, documents
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_vla.documents import (
    IGNORE,
    LENGTH_MULTIPLE,
    NOTHING,
    SAID,
    ActionChunk,
    Begin,
    DocumentError,
    Image,
    Text,
    collate,
    from_blocks,
    lay_out,
    length_of,
    to_blocks,
    write,
)
from emu3_vla.vocabulary import CompactVocabulary, Emu3Vocabulary, ImageGrid

V = CompactVocabulary(
    text_size=10,
    action_size=20,
    codebook_size=64,
    images=(ImageGrid(name="a", rows=4, columns=4), ImageGrid(name="b", rows=2, columns=4)),
    block_size=2,
)
A_CODES, B_CODES = np.arange(16).reshape(4, 4), np.arange(40, 48).reshape(2, 4)
DOCUMENT = [Text([3, 4]), Image("a", A_CODES), Image("b", B_CODES), ActionChunk([5, 6]), ActionChunk([7], supervised=False)]


def test_positions_and_targets_to_the_last_one():
    layout, pad, act = lay_out(DOCUMENT, V), V.pad, V.action_start
    ids = [V.bos, 3, 4, V.begin_image("a"), pad, pad, pad, pad, V.begin_image("b"), pad, pad]
    ids += [V.begin_action, act + 5, act + 6, V.end_of_chunk, V.begin_action, act + 7, V.end_of_chunk]
    assert layout.ids.tolist() == ids
    targets = [3, 4, V.begin_image("a"), *[IGNORE] * 4, V.begin_image("b"), *[IGNORE] * 2, V.begin_action]
    targets += [act + 5, act + 6, V.end_of_chunk, V.begin_action, IGNORE, IGNORE, IGNORE]
    assert layout.targets.tolist() == targets
    assert layout.block_at.tolist() == [4, 5, 6, 7, 9, 10]
    assert layout.places.tolist() == [0, 1, 2, 3, 4, 5]
    assert layout.codes[0].tolist() == [0, 1, 4, 5]
    assert layout.codes[5].tolist() == [42, 43, 46, 47]
    assert length_of(DOCUMENT, V) == len(ids)


def test_what_stood_at_a_place_before():
    """By the picture's name, whatever the order that it is written in, in this document alone."""
    second = np.array([[3, 2, 1, 0], [0, 0, 0, 0]])
    order = np.array([1, 0])
    document = [*DOCUMENT, Image("b", second, order=order), Text([1]), Image("b", B_CODES)]
    nothing = [NOTHING] * 4
    first, in_b, third = lay_out(document, V).before[:6], lay_out(document, V).before[6:8], lay_out(document, V).before[8:]
    assert first.tolist() == [nothing] * 6
    assert in_b.tolist() == [[42, 43, 46, 47], [40, 41, 44, 45]]
    assert third.tolist() == [[3, 2, 0, 0], [1, 0, 0, 0]]
    together = collate([document, document], V).before_NC
    assert together[:10].tolist() == together[10:].tolist() == lay_out(document, V).before.tolist()


def test_what_was_said_before_a_block():
    """The last text ids, in this document and after its last actions alone; the ids of pictures between do not count."""
    document = [*DOCUMENT, Text([7]), Image("b", B_CODES), Text(range(10)), Text(range(10)), Text(range(10)), Image("b", B_CODES)]
    said = lay_out(document, V).said
    assert said.shape == (10, SAID)
    assert said[:6].tolist() == [[NOTHING] * (SAID - 2) + [3, 4]] * 6
    assert said[6:8].tolist() == [[NOTHING] * (SAID - 1) + [7]] * 2
    assert said[8:].tolist() == [[NOTHING, 7, *range(10), *range(10), *range(10)]] * 2
    longer = lay_out([*document, Text(range(10)), Image("b", B_CODES)], V).said[-2:]
    assert longer.tolist() == [[8, 9, *range(10), *range(10), *range(10)]] * 2
    after = [*DOCUMENT, Image("b", B_CODES)]
    assert collate([document, after], V).said_NS[10:].tolist() == lay_out(after, V).said.tolist()


def test_collate_pads_and_shifts():
    short = [Text([1]), Image("b", B_CODES)]
    batch = collate([DOCUMENT, short], V)
    width = batch.ids_BL.shape[1]
    assert width % LENGTH_MULTIPLE == 0 and width >= length_of(DOCUMENT, V)
    assert batch.block_at_N.tolist() == [4, 5, 6, 7, 9, 10, width + 3, width + 4]
    assert (batch.targets_BL[1, 3:] == IGNORE).all() and (batch.ids_BL[1, 5:] == V.pad).all()
    assert (batch.chunks, batch.positions) == (1, length_of(DOCUMENT, V) + length_of(short, V))


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@given(data=st.data())
@settings(deadline=None)
def test_layout_holds_the_stream(vocabulary, data):
    """Each block's codes put back where the block stands give the stream, and every target is the id after it."""
    document = data.draw(documents(vocabulary))
    layout, has_begin = lay_out(document, vocabulary), bool(document) and isinstance(document[0], Begin)
    pieces = [[index] for index in layout.ids.tolist()]
    for at, codes in zip(layout.block_at, layout.codes, strict=True):
        assert pieces[at] == [vocabulary.pad]
        pieces[at] = (codes + vocabulary.vision_start).tolist()
    stream = write(document if has_begin else [Begin(), *document], vocabulary)
    assert [index for piece in pieces for index in piece] == stream.tolist()
    assert len(layout.ids) == len(layout.targets) == length_of(document, vocabulary)
    targets = [*layout.ids[1:], IGNORE]
    for at in layout.block_at:
        targets[at - 1] = IGNORE
    assert layout.targets.tolist() == targets
    assert len(layout.block_at) == (
        0 if vocabulary.vision_in_head else (stream >= vocabulary.vision_start).sum() / vocabulary.codes_per_block
    )


def test_emu3_images_with_blocks():
    v, codes = Emu3Vocabulary(block_size=2), np.arange(8).reshape(2, 4)
    layout = lay_out([Image("", codes)], v)
    size = [17, v.times, 19, v.begin_codes]  # 2*4
    assert layout.ids.tolist() == [v.bos, v.begin_image(), *size, v.pad, v.pad, v.end_of_line, v.end_of_frame, v.end_of_image]
    assert layout.codes.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert layout.places.tolist() == [0, 0]
    assert max(layout.ids) < v.head_size == v.vision_start


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_blocks_round_trip(block, rows, columns, lead):
    codes = np.random.default_rng(0).integers(0, 99, (2,) * lead + (rows * block, columns * block))
    blocks = to_blocks(codes, block)
    assert blocks.shape[lead:] == (rows * columns, block * block)
    np.testing.assert_array_equal(from_blocks(blocks, rows * block, columns * block), codes)


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Text([10]), r"text ids lie in \[10, 10\], expected \[0, 10\): they come from another text tokenizer"),
        (Text([]), "at least one id"),
        (ActionChunk([20]), "another action tokenizer"),
        (Image("a", B_CODES), r"image 'a' has codes of shape \(2, 4\), expected \(4, 4\)"),
        (Image("b", B_CODES + 60), "another vision tokenizer"),
        (Image("c", B_CODES), "no image 'c'"),
    ],
)
def test_segments_that_do_not_fit_are_refused(segment, message):
    with pytest.raises(ValueError, match=message):
        lay_out([segment], V)


def test_foreign_segment_is_a_document_error():
    with pytest.raises(DocumentError):
        lay_out([ActionChunk([-1])], V)
