"""Emu3's text tokenizer: the same ids as a plain BPE by ranks and as tiktoken, from each file layout; specials only if asked."""

import base64
import json
import random
import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from emu3_vla import emu3_text
from emu3_vla.emu3_text import Emu3TextTokenizer, find_file
from emu3_vla.text import TextTokenizerError
from emu3_vla.vocabulary import SPECIALS

SENTENCES = [
    f"{verb} the {colour} block, don't stop at 12.5 cm;  naïve 方块 推到左边\n\n" for verb in ("push", "lift") for colour in ("red", "pink")
]


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    """A small vocabulary, ranked as its merges were learned."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    byte_of = {char: byte for byte, char in emu3_text._byte_chars().items()}
    by_rank = sorted(bpe.get_vocab().items(), key=lambda entry: entry[1])
    return [bytes(byte_of[char] for char in token) for token, _ in by_rank]


@pytest.fixture(scope="module")
def tokenizer(tokens):
    return Emu3TextTokenizer(tokens)


def _plain(text: str, tokens: list[bytes]) -> list[int]:
    """BPE written out. A piece that is a token is taken whole; of any other, join the leftmost of the neighbours whose union has the
    lowest rank, until none has one."""
    ranks, ids = {token: rank for rank, token in enumerate(tokens)}, []
    for piece in regex.findall(emu3_text._SPLIT, unicodedata.normalize("NFC", text)):
        whole = piece.encode()
        parts = [whole] if whole in ranks else [bytes([byte]) for byte in whole]
        while pairs := [ranks[union] for left, right in zip(parts, parts[1:], strict=False) if (union := left + right) in ranks]:
            unions = [left + right for left, right in zip(parts, parts[1:], strict=False)]
            at = unions.index(tokens[min(pairs)])
            parts[at : at + 2] = [unions[at]]
        ids += [ranks[part] for part in parts]
    return ids


WORDS = st.sampled_from(
    ["the", " the", "block", "red", "'s", "'LL", "don't", "12", " ", "   ", "\n", "\t", "\u00e9", "e\u0301", "方块", "👍🏽", "İ", "ſ", "."]
)
TEXTS = st.one_of(st.text(max_size=30), st.lists(WORDS, max_size=12).map("".join))


@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_ids_are_those_of_plain_bpe(tokenizer, tokens, text):
    ids = tokenizer.encode(text)
    assert ids == _plain(text, tokens)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_small_vocabulary_joins_bytes(tokenizer):
    assert len(tokenizer.encode(SENTENCES[0])) < 45 < len(SENTENCES[0].encode()) < tokenizer.vocab_size
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_a_piece_that_is_a_token_is_taken_whole():
    """Even one that no joining of two tokens makes; within a longer piece it cannot come about."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"abc"]
    assert Emu3TextTokenizer(tokens).encode("abc 1") == _plain("abc 1", tokens) == [256, 32, 49]
    assert Emu3TextTokenizer(tokens).encode("abcd") == _plain("abcd", tokens) == [97, 98, 99, 100]


def test_specials_are_text_unless_asked(tokenizer):
    text = "red<|image start|>2*3<|visual token 000012|> <|extra_9|>"
    plain = tokenizer.encode(text)
    assert max(plain) < tokenizer.vocab_size and tokenizer.decode(plain) == text
    ids = tokenizer.encode(text, specials=True)
    start, code, extra = SPECIALS["<|image start|>"], 151_854 + 12, SPECIALS["<|extra_9|>"]
    assert ids == [*tokenizer.encode("red"), start, *tokenizer.encode("2*3"), code, *tokenizer.encode(" "), extra]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_specials=True) == "red2*3 "


def test_codes_that_do_not_exist_are_text(tokenizer):
    text = "<|visual token 032768|>"
    assert tokenizer.encode(text, specials=True) == tokenizer.encode(text)
    assert tokenizer.encode("<|visual token 032767|>", specials=True) == [184_621]


def test_half_characters_decode_to_the_replacement(tokenizer):
    ids = tokenizer.encode("𝄞")
    assert len(ids) == 4 and tokenizer.decode(ids[:2]) == "\ufffd"


def _tiktoken(tokens) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def _transformers(tokens) -> dict:
    """A tokenizer.json as Transformers' conversion of Emu3 has it: bytes as characters, specials in the vocabulary and beside it."""
    chars = emu3_text._byte_chars()
    vocabulary = {"".join(chars[byte] for byte in token): rank for rank, token in enumerate(tokens)}
    specials = SPECIALS | {"<image>": SPECIALS["<|extra_0|>"]}
    del specials["<|extra_0|>"]
    added = [{"id": index, "content": name, "special": True} for name, index in specials.items()]
    return {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": vocabulary | specials, "merges": []}}


@pytest.mark.parametrize("place", ["emu3.tiktoken", "qwen.tiktoken", "other.tiktoken", "text_tokenizer/emu3.tiktoken", "tokenizer.json"])
def test_found_in_a_checkpoint_folder(tokenizer, tokens, tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(json.dumps(_transformers(tokens)).encode() if path.suffix == ".json" else _tiktoken(tokens))
    for source in (tmp_path, path):
        loaded = Emu3TextTokenizer.from_pretrained(source)
        assert loaded.vocab_size == len(tokens)
        assert loaded.encode(SENTENCES[1]) == tokenizer.encode(SENTENCES[1])


def test_save_and_load(tokenizer, tokens, tmp_path):
    tokenizer.save_pretrained(tmp_path / "text")
    assert (tmp_path / "text/emu3.tiktoken").read_bytes() == _tiktoken(tokens)
    assert Emu3TextTokenizer.from_pretrained(tmp_path / "text").encode("the red") == tokenizer.encode("the red")


def test_missing_and_ambiguous_files(tokens, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no text tokenizer: expected emu3.tiktoken, qwen.tiktoken or tokenizer.json"):
        Emu3TextTokenizer.from_pretrained(tmp_path)
    (tmp_path / "a.tiktoken").write_bytes(_tiktoken(tokens))
    (tmp_path / "b.tiktoken").write_bytes(_tiktoken(tokens))
    with pytest.raises(TextTokenizerError, match="holds a.tiktoken, b.tiktoken; name the one to read"):
        Emu3TextTokenizer.from_pretrained(tmp_path)
    (tmp_path / "emu3.tiktoken").write_bytes(_tiktoken(tokens))
    assert find_file(tmp_path).name == "emu3.tiktoken"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nIg==", r"line 2 is b'Ig==', expected '<base64> <rank>'"),
        (b"IQ== 0\n!!== 1", "line 2 is b'!!== 1'"),
        (b"IQ== 0\nIg== 2", "line 2 has rank 2, expected 1"),
        (b"IQ== 0\nIQ== 1", "1 tokens occur twice"),
        (b"IQ== 0\n\nIg== 1\n", "254 of the 256 single bytes are missing"),
        (b"", "256 of the 256 single bytes are missing"),
    ],
)
def test_damaged_tiktoken_files(tmp_path, content, message):
    path = tmp_path / "emu3.tiktoken"
    path.write_bytes(content)
    with pytest.raises(TextTokenizerError, match=f"emu3.tiktoken is damaged or not Emu3's text tokenizer: {message}"):
        Emu3TextTokenizer.from_pretrained(tmp_path)


def test_damaged_tokenizer_json(tokens, tmp_path):
    path, good = tmp_path / "tokenizer.json", _transformers(tokens)

    def refused(content, message):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(TextTokenizerError, match=f"tokenizer.json is damaged or not Emu3's text tokenizer: {message}"):
            Emu3TextTokenizer.from_pretrained(tmp_path)

    refused('{"model": ', "JSONDecodeError")
    refused({"model": {}}, "KeyError: 'vocab'")
    added = [{"id": 5, "content": "<|image start|>"}]
    refused(good | {"added_tokens": added}, r"<\|image start\|> has id 5, but Emu3's is 151852")
    refused(good | {"added_tokens": []}, "the ids of its .* tokens do not count from 0")
    vocabulary = {token: rank for token, rank in good["model"]["vocab"].items() if rank < len(tokens)}
    refused(good | {"model": {"vocab": vocabulary | {"▁the": len(tokens)}}}, "its tokens hold '▁', which stands for no byte")


def test_inputs_that_are_no_text(tokenizer):
    with pytest.raises(TextTokenizerError, match="text is NoneType, expected str"):
        tokenizer.encode(None)
    for text in ("\ud83d", "red \ude00", "a\udc00b"):
        with pytest.raises(TextTokenizerError, match="half a surrogate pair"):
            tokenizer.encode(text)
    for index in (tokenizer.vocab_size, -1, 184_622):
        with pytest.raises(TextTokenizerError, match=f"text id {index} is outside .* and no special"):
            tokenizer.decode([index])


POOLS = {
    "ascii": [chr(code) for code in range(32, 127)],
    "spaces": list(" \t\n\r\x0b\u00a0\u2003\u3000"),
    "chinese": [chr(code) for code in range(0x4E00, 0x9FFF)],
    "emoji": [*(chr(code) for code in range(0x1F300, 0x1FAFF)), "\u200d", "\ufe0f"],
    "marks": [*(chr(code) for code in range(0x300, 0x370)), *"aeiou"],
    "arabic": [chr(code) for code in range(0x600, 0x700)],
    "korean": [chr(code) for code in range(0xAC00, 0xD7A4)],
    "contractions": list("'sStTrReEvVmMlLdD \u017f"),
    "repeats": list("aab  ==\n\n"),
    "any": [chr(code) for code in range(1, 0x3000)],
}


@pytest.fixture(scope="module")
def qwen(qwen_file):
    return Emu3TextTokenizer.from_pretrained(qwen_file)


def test_equal_to_tiktoken(qwen):
    """On random texts of every kind, each of the tokens by itself, and long repeats."""
    tiktoken = pytest.importorskip("tiktoken", reason="compares with the tiktoken package: pip install 'emu3-vla[qwen]'")
    ranks = {token: rank for rank, token in enumerate(qwen._tokens)}
    original = tiktoken.Encoding("qwen", pat_str=emu3_text._SPLIT, mergeable_ranks=ranks, special_tokens={})
    draw = random.Random(0)
    words = [token.decode("utf-8", "ignore") for token in qwen._tokens]
    texts = [*words[::10], *(char * count for char in "a =-\n好" for count in range(1, 200, 7))]
    for _ in range(10_000):
        pools = draw.choices([*POOLS.values(), words, words], k=draw.randint(1, 4))
        texts.append("".join(draw.choice(draw.choice(pools)) for _ in range(draw.randint(1, 50))))
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    wrong = [text for text in texts if qwen.encode(text) != original.encode_ordinary(text)]
    assert not wrong, wrong[:5]


def test_reads_specials_as_the_original_does(qwen):
    tiktoken = pytest.importorskip("tiktoken", reason="compares with the tiktoken package: pip install 'emu3-vla[qwen]'")
    ranks = {token: rank for rank, token in enumerate(qwen._tokens)}
    names = SPECIALS | {f"<|visual token {code:06d}|>": 151_854 + code for code in range(32_768)}
    original = tiktoken.Encoding("qwen", pat_str=emu3_text._SPLIT, mergeable_ranks=ranks, special_tokens=names)
    text = "<|extra_203|>a dog <|image start|>90*90<|image token|><|visual token 000007|><|visual token 99|><|extra_20|> <|extra_2"
    assert qwen.encode(text, specials=True) == original.encode(text, allowed_special="all")
    assert qwen.encode(text) == original.encode(text, allowed_special=set(), disallowed_special=())
    assert qwen.decode(qwen.encode(text, specials=True)) == text
