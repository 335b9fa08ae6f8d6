"""Text tokenizer: exact round trips of anything, determinism, named errors."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu3_vla.text import TextTokenizer, TextTokenizerError

SENTENCES = [f"{verb} the {colour} block" for verb in ("push", "lift", "rotate") for colour in ("red", "blue", "pink")]


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.fit(SENTENCES, vocab_size=300)


@given(text=st.text(max_size=40))
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_have_one_spelling_and_merges_shorten(tokenizer):
    assert tokenizer.encode("red block") == tokenizer.encode("push the red block")[-len(tokenizer.encode("red block")) :]
    assert len(tokenizer.encode(SENTENCES[0])) < 8
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_fit_ignores_order_and_repetition(tokenizer, tmp_path):
    again = TextTokenizer.fit(SENTENCES[::-1] + SENTENCES, vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "text")
    loaded = TextTokenizer.from_pretrained(tmp_path / "text")
    assert loaded.vocab_size == tokenizer.vocab_size <= 300
    assert loaded.encode("lift the pink block") == tokenizer.encode("lift the pink block")


def test_errors_are_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing"):
        TextTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TextTokenizerError, match="damaged or not a tokenizer"):
        TextTokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"] |= {"vocab": {"a": 0}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TextTokenizerError, match="lacks 255 of the 256 bytes"):
        TextTokenizer.from_pretrained(tmp_path)
    with pytest.raises(TextTokenizerError, match="no sentences|fit on 0 sentences"):
        TextTokenizer.fit([])
    with pytest.raises(TextTokenizerError, match=f"text id {tokenizer.vocab_size} is outside"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(TextTokenizerError, match="text is NoneType"):
        tokenizer.encode(None)
