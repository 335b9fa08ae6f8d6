"""Every prompt that the original software was recorded with: the same ids, and the same segments back."""

import json

import numpy as np
import pytest

from emu3_vla.documents import (
    Begin,
    Image,
    OpenAction,
    OpenImage,
    OpenVideo,
    Prompts,
    Text,
    Video,
    generation_grid,
    parse,
    write,
)
from emu3_vla.emu3_text import Emu3TextTokenizer
from emu3_vla.vocabulary import SPECIALS, Emu3Vocabulary

V = Emu3Vocabulary()


@pytest.fixture(scope="module")
def recorded(reference):
    return json.loads((reference / "emu3" / "prompts.json").read_text())


@pytest.fixture(scope="module")
def qwen(qwen_file):
    return Emu3TextTokenizer.from_pretrained(qwen_file)


def _pictures(case) -> list:
    """A case's pictures, in stream order."""
    if "codes" in case:
        return [Image("", np.array(case["codes"]))]
    return [Video(np.array(case[name])) for name in ("static", "gripper", "video") if name in case]


def _built(case, prompts: Prompts) -> list:
    """The case's document. UniVLA's cases speak of videos and Emu3's own of images, under the same letters."""
    text, mode, pictures = case["text"], case["mode"], _pictures(case)
    if mode in ("U", "U_video"):
        return prompts.ask(text, pictures[0])
    if mode == "VLA":
        return prompts.act(text, pictures)
    if mode == "VLA_Video":
        return prompts.look(pictures)
    if mode == "IG":
        return prompts.shown(text, pictures[0].codes, frames=1)
    if "source" in case:
        return prompts.film(text, pictures[0].codes[:0], frames=1)
    return prompts.draw(text, *generation_grid(case["ratio"], case["image_area"]))


def test_special_ids(recorded):
    ours = {
        "bos_token": V.bos,
        "eos_token": V.eos,
        "pad_token": V.pad,
        "img_token": V.begin_codes,
        "boi_token": V.begin_image(),
        "eoi_token": V.end_of_image,
        "eol_token": V.end_of_line,
        "eof_token": V.end_of_frame,
        "boa_token": V.begin_action,
        "eoa_token": V.end_of_chunk,
        "bot_token": V.begin_reasoning,
        "eot_token": V.end_of_reasoning,
        "visual_token_0": V.vision_start,
        "visual_token_32767": V.vision_start + V.codebook_size - 1,
        "vocab": V.size,
    }
    assert ours == recorded["special_ids"]
    assert V.size == V.text_size + len(SPECIALS) + V.codebook_size


def test_every_recorded_prompt_with_the_original_text_tokenizer(recorded, qwen):
    prompts = Prompts(qwen.encode)
    for case in recorded["prompts"]:
        assert write(_built(case, prompts), V).tolist() == case["input_ids"], case["mode"]
    assert len(recorded["prompts"]) == 46


def test_recorded_prompts_whose_texts_are_recorded(recorded):
    """The same without the tokenizer's file, for the prompts that add no words of their own."""
    ids_of = {case["text"]: case["ids"] for case in recorded["text"]}
    cases = [case for case in recorded["prompts"] if case["text"] in ids_of and not case["mode"].startswith("U")]
    for case in cases:
        assert write(_built(case, Prompts(ids_of.__getitem__)), V).tolist() == case["input_ids"], case["mode"]
    assert {case["mode"] for case in cases} == {"G", "VLA", "VLA_Video", "IG"} and len(cases) == 34


def test_every_recorded_prompt_parses_back(recorded):
    for case in recorded["prompts"]:
        document = parse(case["input_ids"], V, prompt=True)
        assert write(document, V).tolist() == case["input_ids"]
        shown = [segment for segment in document if isinstance(segment, Image | Video)]
        assert shown == _pictures(case)[: {"G": 0, "IG": 1, "U": 1}.get(case["mode"])], case[
            "mode"
        ]  # the gripper camera's is not shown there
        kinds = [type(segment) for segment in document if not isinstance(segment, Image | Video)]
        assert kinds == _kinds(case)
        if case["mode"] == "G":
            assert document[-1] == (OpenVideo(1, np.zeros((0, 5, 5))) if "source" in case else OpenImage("", *case["size"]))


def _kinds(case) -> list[type]:
    """What stands around the pictures of a case."""
    if case["mode"] == "VLA_Video":
        return [OpenAction]
    kinds = [Begin] + [Text] * ((2 if case["mode"].startswith("U") else 1) if case["text"] else 0)
    ends = {"VLA": [OpenAction], "G": [OpenVideo if "source" in case else OpenImage]}
    return kinds + ends.get(case["mode"], [])


def test_recorded_generation_sizes(recorded):
    cases = [case for case in recorded["prompts"] if "ratio" in case]
    assert len(cases) == 30
    for case in cases:
        assert list(generation_grid(case["ratio"], case["image_area"])) == case["size"]


def test_recorded_texts(recorded, qwen):
    for case in recorded["text"]:
        assert qwen.encode(case["text"]) == case["ids"]
        assert qwen.decode(case["ids"]) == case["text"]
    assert len(recorded["text"]) == 9
