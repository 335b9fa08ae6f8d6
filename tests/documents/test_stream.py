"""Documents as ids: `parse` undoes `write`, whatever is accepted is written again as it was, and errors say where."""

import numpy as np
import pytest
from drawn import VOCABULARIES, compact, documents
from hypothesis import given, settings
from hypothesis import strategies as st

from emu3_vla.documents import (
    ActionChunk,
    Begin,
    DocumentError,
    End,
    Image,
    MalformedDocument,
    OpenAction,
    OpenImage,
    OpenReasoning,
    OpenVideo,
    Reasoning,
    Text,
    Video,
    parse,
    write,
)
from emu3_vla.vocabulary import Emu3Vocabulary

EMU3 = Emu3Vocabulary()
CODES = np.array([[1, 2, 3], [4, 5, 6]])
each_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)


def _refusal(ids, vocabulary, **options) -> MalformedDocument:
    with pytest.raises(MalformedDocument) as caught:
        parse(ids, vocabulary, **options)
    return caught.value


def test_emu3_ids_of_every_kind_of_segment():
    v, begin = EMU3, EMU3.begin_image()
    document = [Begin(), Text([7, 8]), Image("", CODES), Video(CODES[None] + 10, 12), Reasoning([5]), ActionChunk([0, 3]), End()]
    size = [17, 9, 18]  # 2*3
    image = [begin, *size, 151851, *(151854 + CODES[0]), 151846, *(151854 + CODES[1]), 151846, 151847, 151853]
    video = [begin, 16, 17, 9, *size, 151851, *(151864 + CODES.ravel()), 151847, 151853]
    ids = write(document, v)
    assert ids.dtype == np.int64
    assert ids.tolist() == [v.bos, 7, 8, *image, *video, 151842, 5, 151843, 151844, 151642, 151639, 151845, v.eos]
    assert parse(ids, v) == document


def test_compact_ids_are_blocks_in_raster_order():
    v, codes = compact(4), np.arange(32).reshape(8, 4)
    ids = write([Image("static", codes)], v)
    assert ids.tolist() == [v.begin_image("static"), *(v.vision_start + np.arange(32))]
    wide = write([Image("", np.arange(32).reshape(4, 8))], Emu3Vocabulary(block_size=4))
    assert (wide[5:13] - EMU3.vision_start).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


@each_vocabulary
@given(data=st.data())
@settings(deadline=None)
def test_parse_undoes_write(vocabulary, data):
    document = data.draw(documents(vocabulary))
    ids = write(document, vocabulary)
    assert parse(ids, vocabulary) == document
    assert parse(ids.astype(np.int32), vocabulary) == document


@each_vocabulary
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_stream_cut_anywhere_ends_there(vocabulary, data):
    """Cut within a segment: refused at the cut. Cut between two, or within text: the shorter document."""
    ids = write(data.draw(documents(vocabulary)), vocabulary)
    for cut in range(len(ids)):
        try:
            assert np.array_equal(write(parse(ids[:cut], vocabulary), vocabulary), ids[:cut])
        except MalformedDocument as error:
            assert (error.position, error.found) == (cut, None)


@each_vocabulary
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_wrong_id_is_found_where_all_before_it_can_still_be(vocabulary, data):
    ids = write(data.draw(documents(vocabulary)), vocabulary)
    interesting = [
        vocabulary.bos,
        vocabulary.eos,
        vocabulary.pad,
        vocabulary.begin_action,
        vocabulary.end_of_chunk,
        vocabulary.vision_start,
    ]
    interesting += [-1, 0, 9, 15, 16, vocabulary.size - 1, vocabulary.size, *range(vocabulary.vision_start - 12, vocabulary.vision_start)]
    edits = data.draw(st.lists(st.tuples(st.integers(0, len(ids)), st.sampled_from(interesting), st.booleans()), min_size=1, max_size=3))
    for at, index, inserts in edits:
        ids = np.concatenate([ids[:at], [index], ids[at + (not inserts) :]]).astype(np.int64)
    for prompt in (False, True):
        try:
            assert np.array_equal(write(parse(ids, vocabulary, prompt=prompt), vocabulary), ids)
        except MalformedDocument as error:
            assert 0 <= error.position <= len(ids)
            assert error.found == (int(ids[error.position]) if error.position < len(ids) else None)
            _can_begin_a_document(ids[: error.position], vocabulary)


def _can_begin_a_document(prefix, vocabulary):
    try:
        parse(prefix, vocabulary)
    except MalformedDocument as error:
        assert (error.position, error.found) == (len(prefix), None), "an earlier id is refused once the later ones are gone"


IMAGE = write([Begin(), Image("", CODES), End()], EMU3)  # <bos> <begin> 2 * 3 <codes> 3 codes <eol> 3 codes <eol> <eof> <end> <eos>
CHUNK = write([ActionChunk([1, 2])], EMU3)
FILM = write([Video(np.stack([CODES] * 2))], EMU3)  # <begin> 2 * 2 * 3 <codes> 6 codes <eof> 6 codes <eof> <end>


def _replaced(ids, at, *new):
    return np.concatenate([ids[:at], np.array(new, np.int64), ids[at + 1 :]])


@pytest.mark.parametrize(
    ("ids", "position", "message"),
    [
        (_replaced(IMAGE, 8), 8, r"found 151846 \(<end of line>\), expected a vision code \(row 1 of 2 has 2 of 3 codes so far\)"),
        (_replaced(IMAGE, 9), 9, r"found 151858 \(vision code 4\), expected 151846 \(<end of line>\) \(row 1 of 2 has 3 of 3"),
        (_replaced(IMAGE, 8, 151857, 151857), 9, r"found 151857 .*, expected 151846 \(<end of line>\)"),
        (_replaced(IMAGE, 8, 7), 8, r"found 7 \(text\), expected a vision code"),
        (IMAGE[:15], 15, r"the stream ends, expected 151853 \(<end of image>\)"),
        (IMAGE[:12], 12, r"the stream ends, expected a vision code \(row 2 of 2 has 2 of 3"),
        (_replaced(IMAGE, 14), 14, r"found 151853 \(<end of image>\), expected 151847 \(<end of frame>\)"),
        (_replaced(IMAGE, 2, 15), 2, r"found 15 \(text\), expected a digit from 1 to 9"),
        (_replaced(IMAGE, 3, 9, 9), 4, r"found 9 \(text\), expected a digit from 1 to 9"),
        (_replaced(IMAGE, 4, *[18] * 7), 10, r"found 18 \(text\), expected '\*' or <begin codes> in the size"),
        (_replaced(IMAGE, 5), 5, r"found 151855 .*, expected a digit or '\*' or <begin codes> in the size"),
        (_replaced(IMAGE, 4), 4, r"found 151851 \(<begin codes>\), expected a digit from 1 to 9"),
        (_replaced(IMAGE, 0, EMU3.pad), 0, r"found 151643 \(<pad>\), expected text, or an id that begins a segment"),
        (_replaced(IMAGE, 16, EMU3.eos, 5), 17, r"found 5 \(text\), expected 151849 \(<bos>\) after the end of a document"),
        (_replaced(IMAGE, 16, EMU3.bos), 16, r"found 151849 \(<bos>\), expected text, or an id that begins"),
        (CHUNK[:-1], 3, r"the stream ends, expected an action id or 151845 \(<end of chunk>\)"),
        (_replaced(CHUNK, 1, 5), 1, r"found 5 \(text\), expected an action id$"),
        (_replaced(CHUNK, 2, EMU3.vision_start), 2, r"vision code 0.*, expected an action id or"),
        (_replaced(FILM, 0), 5, r"found 151851 \(<begin codes>\), expected text, or an id that begins"),
        (_replaced(FILM, 1, 16), 14, r"found 151855 .*, expected 151853 \(<end of image>\)"),
        (_replaced(FILM, 13), 13, r"found 151855 .*, expected 151847 \(<end of frame>\) \(row 1 of 2 has 6"),
        (_replaced(FILM, 9, 151853), 9, r"found 151853 \(<end of image>\), expected a vision code"),
        (_replaced(FILM, 6, 9, 16, 151851), 6, r"found 9 \(text\), expected a digit or <begin codes> in the size"),
        (FILM[:-1], 21, r"the stream ends, expected 151853 \(<end of image>\)"),
        (np.concatenate([FILM[:7], FILM[-1:]]), 7, r"found 151853 .*, expected a vision code of the first frame"),
        (np.array([5, 184_622]), 1, r"found 184622 \(no id of this vocabulary, which has 184622\)"),
        (np.array([5, -1]), 1, r"found -1 \(no id of this vocabulary"),
    ],
)
def test_refusals_say_where(ids, position, message):
    with pytest.raises(MalformedDocument, match=f"^malformed document at position {position}: .*{message}") as caught:
        parse(ids, EMU3)
    assert caught.value.position == position


def test_compact_refusals_say_where():
    v = compact(4)
    ids = write([Image("gripper", np.zeros((4, 4), int)), ActionChunk([1])], v)
    with pytest.raises(
        MalformedDocument, match=rf"position 16: found {v.begin_action} \(<begin action>\), expected a vision code .*15 of 16"
    ):
        parse(np.delete(ids, 5), v)
    with pytest.raises(MalformedDocument, match=r"position 17: found 57 .*, expected text, or an id that begins a segment"):
        parse(np.insert(ids, 5, v.vision_start), v)
    with pytest.raises(MalformedDocument, match=r"position 9: found 56 \(<begin image gripper>\), expected a vision code"):
        parse(np.concatenate([ids[:9], ids]), v)


def test_grids_must_hold_whole_blocks():
    ids = write([Image("", np.zeros((4, 6), int))], EMU3)
    with pytest.raises(MalformedDocument, match=r"position 1: .*multiples of block_size=4, not 4×6"):
        parse(ids, Emu3Vocabulary(block_size=4))


@pytest.mark.parametrize(
    "end",
    [
        OpenImage("", 90, 90),
        OpenVideo(3, CODES[None][:0]),
        OpenVideo(3, np.stack([CODES] * 2)),
        OpenAction(),
        OpenReasoning(),
    ],
)
def test_prompts_may_end_open_if_asked(end):
    document = [Begin(), Text([4, 5]), end]
    ids = write(document, EMU3)
    assert parse(ids, EMU3, prompt=True) == document
    error = _refusal(ids, EMU3)
    assert (error.position, error.found) == (len(ids), None)
    _refusal(write([Begin(), Image("", CODES)], EMU3)[:9], EMU3, prompt=True)  # within a picture no prompt may end


def test_compact_prompts_may_end_open():
    document = [Begin(), Text([4]), OpenImage("gripper", 4, 4)]
    assert parse(write(document, compact(4)), compact(4), prompt=True) == document
    document = [Begin(), Text([4]), OpenAction()]
    assert parse(write(document, compact(1)), compact(1), prompt=True) == document


def test_two_texts_come_back_as_one():
    assert parse(write([Text([1]), Text([2, 3])], EMU3), EMU3) == [Text([1, 2, 3])]
    assert parse([], EMU3) == [] and write([], EMU3).dtype == np.int64


def test_qwens_chat_marks_are_text_but_structure_is_not():
    assert parse(write([Text([151_644, 872, 151_645])], EMU3), EMU3) == [Text([151_644, 872, 151_645])]
    with pytest.raises(DocumentError, match=r"hold 151852 \(<begin image>\), which is no text"):
        write([Text([5, 151_852])], EMU3)


@pytest.mark.parametrize(
    ("document", "vocabulary", "message"),
    [
        ([Text([1]), Begin()], EMU3, "segment 1 is Begin, which stands first or right after End, not after Text"),
        ([End(), Text([1])], EMU3, "segment 1 is Text, but after End only Begin may come"),
        ([OpenAction(), Text([1])], EMU3, "segment 0 is OpenAction, which only the end of a prompt may be"),
        ([Image("", CODES + 32_768)], EMU3, r"image has codes in \[32769, 32774\], expected \[0, 32768\)"),
        ([Image("", CODES / 2)], EMU3, "codes of type float64, expected integers"),
        ([Image("", CODES[0])], EMU3, r"image has codes of shape \(3,\), expected 2 axes"),
        ([Image("", CODES)], Emu3Vocabulary(block_size=2), "image has 2×3 codes, expected at least 1, and multiples of block_size=2"),
        ([OpenImage("", 0, 5)], EMU3, "image has 0×5 codes"),
        ([OpenImage("", 10**6, 5)], EMU3, r"sizes 1000000\*5, expected each from 1 to 999999"),
        ([Video(CODES[None][:0])], EMU3, "a video of 0 frames shows 0"),
        ([Video(np.stack([CODES] * 2), 1)], EMU3, "a video of 1 frames shows 2, expected 1 to 1"),
        ([ActionChunk([2048])], EMU3, r"action ids lie in \[2048, 2048\], expected \[0, 2048\)"),
        ([ActionChunk([0])], Emu3Vocabulary(action_size=0), r"expected \[0, 0\)"),
        ([Text([1.5])], EMU3, "type float64, expected at least one id"),
        ([Video(CODES[None])], compact(4), "a compact vocabulary writes no Video; write the frames of a video as images"),
        ([Reasoning([1])], compact(4), "a compact vocabulary writes no Reasoning"),
        ([OpenImage("static", 4, 4)], compact(4), "image 'static' is 8×4, not 4×4"),
    ],
)
def test_documents_that_do_not_fit_are_refused(document, vocabulary, message):
    with pytest.raises(DocumentError, match=message):
        write(document, vocabulary)


def test_ids_must_be_integers_in_a_row():
    with pytest.raises(DocumentError, match=r"shape \(1, 2\) and type int64, expected integers in a row"):
        parse(np.array([[1, 2]]), EMU3)
    with pytest.raises(DocumentError, match="type float64"):
        parse([1.0], EMU3)
