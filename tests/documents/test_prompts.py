"""Documents for each use: what they hold, what of them is supervised, and what is refused."""

import numpy as np
import pytest
from drawn import compact

from emu3_vla.documents import (
    ActionChunk,
    Begin,
    DocumentError,
    End,
    Image,
    OpenAction,
    OpenImage,
    OpenReasoning,
    OpenVideo,
    Prompts,
    Text,
    Video,
    generation_grid,
    parse,
    without_text,
    write,
)
from emu3_vla.vocabulary import Emu3Vocabulary

PROMPTS = Prompts(lambda text: list(text.encode()))
CODES = np.arange(6).reshape(2, 3)
IMAGE, CAMERA = Image("", CODES), Video(CODES[None])


def _text(words: str) -> Text:
    return Text(list(words.encode()))


@pytest.mark.parametrize(
    ("ratio", "area", "grid"),
    [("1:1", 518400, (90, 90)), ("16:9", 518400, (68, 120)), ("9:16", 262144, (85, 48)), ("3:4", 262144, (74, 55)), ("1:1", 64, (1, 1))],
)
def test_grid_of_an_image_to_draw(ratio, area, grid):
    assert generation_grid(ratio, area) == grid


@pytest.mark.parametrize("ratio", ["", "1", "1:0", "1:1:1", "-1:1", "1.5:1", "a:b", "²:1"])
def test_ratios_that_are_none(ratio):
    with pytest.raises(ValueError, match="expected width:height in whole numbers"):
        generation_grid(ratio, 518400)


@pytest.mark.parametrize(("ratio", "area"), [("1:1", 0), ("1:1", -5), ("1000:1", 4096)])
def test_grids_without_codes(ratio, area):
    with pytest.raises(ValueError, match="expected at least one each way"):
        generation_grid(ratio, area)


def test_what_prompts_hold():
    assert PROMPTS.draw("dog", 2, 3) == [Begin(), _text("dog"), OpenImage("", 2, 3)]
    assert PROMPTS.film("dog", CODES[None], 4) == [Begin(), _text("dog"), OpenVideo(4, CODES[None])]
    assert PROMPTS.interleave("dog", CODES[None], 4) == [
        Begin(),
        _text("dog"),
        Video(CODES[None], 4),
        OpenVideo(4, np.zeros((0, 2, 3))),
    ]
    assert PROMPTS.act("go", [CAMERA]) == [Begin(), _text("go"), CAMERA, OpenAction()]
    assert PROMPTS.reason("go", [CAMERA]) == [Begin(), _text("go"), CAMERA, OpenReasoning()]


def test_acting_prompt_continues_a_demonstration():
    """What a policy is shown is a beginning of what it was trained on, word for word."""
    chunks = [([CAMERA, CAMERA], ActionChunk([1])), ([CAMERA], ActionChunk([2]))]
    trained = write(PROMPTS.demonstration("go", chunks), Emu3Vocabulary())
    shown = write(PROMPTS.act("go", [CAMERA], past=[[CAMERA, CAMERA, ActionChunk([1])]]), Emu3Vocabulary())
    assert shown.tolist() == trained[: len(shown)].tolist()
    pieces = [PROMPTS.act("go", [CAMERA, CAMERA])[:-1], [ActionChunk([1])], PROMPTS.look([CAMERA])]
    assert write([part for piece in pieces for part in piece], Emu3Vocabulary()).tolist() == shown.tolist()


def test_null_prompt_is_the_prompt_without_its_text():
    assert PROMPTS.draw("", 2, 3) == without_text(PROMPTS.draw("dog", 2, 3)) == [Begin(), OpenImage("", 2, 3)]
    assert PROMPTS.caption_before("", IMAGE) == without_text(PROMPTS.caption_before("dog", IMAGE))


def test_orders_of_caption_and_picture():
    assert PROMPTS.caption_before("dog", IMAGE) == [Begin(), _text("dog"), IMAGE, End()]
    assert PROMPTS.caption_after("dog", IMAGE) == [Begin(), IMAGE, _text("dog"), End()]


@pytest.mark.parametrize("picture", [IMAGE, CAMERA])
def test_only_the_answer_is_supervised(picture):
    document = PROMPTS.answered("what", picture, " dog")
    assert [segment.supervised for segment in document[1:]] == [False, False, False, True, True]
    assert document[4:] == [_text(" dog"), End()]
    whole = parse(write(document, Emu3Vocabulary(block_size=1)), Emu3Vocabulary())
    assert [type(segment) for segment in whole] == [Begin, Text, type(picture), Text, End]
    assert bytes(whole[3].ids.tolist()).decode() == "what. ASSISTANT: dog"


def test_instructions_of_demonstrations_are_not_supervised():
    document = PROMPTS.demonstration("go", [([CAMERA], ActionChunk([1], supervised=False))])
    assert [segment.supervised for segment in document[1:]] == [False, True, False]


def test_compact_prompts():
    """The same builders serve compact models, whose images have names."""
    v, small = compact(4), Prompts(lambda text: [1, 2])
    views = [Image("static", np.zeros((8, 4), int)), Image("gripper", np.zeros((4, 4), int))]
    for document in (small.draw("dog", 4, 4, "gripper"), small.act("go", views, [[*views, ActionChunk([3])]]), small.ask("what", views[0])):
        ids = write(document, v)
        assert write(parse(ids, v, prompt=True), v).tolist() == ids.tolist()


def test_empty_texts_and_views_are_refused():
    with pytest.raises(DocumentError, match="the instruction is empty"):
        PROMPTS.act("  ", [CAMERA])
    with pytest.raises(DocumentError, match="there are no views"):
        PROMPTS.act("go", [])
    with pytest.raises(DocumentError, match="the answer is empty"):
        PROMPTS.answered("what", IMAGE, "")
    with pytest.raises(DocumentError, match="the caption is empty"):
        PROMPTS.caption_after("", IMAGE)
