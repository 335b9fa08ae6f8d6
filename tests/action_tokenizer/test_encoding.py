import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from action_tokenizer.encoding import MANY_CHUNKS, ChunkEncoder
from action_tokenizer.merging import Merger, UnsuitableMerges
from action_tokenizer.words import WordSplitter

REGEX = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
# Letters (one and two bytes), digits, blanks of several kinds, other characters, and all that contractions are made of.
AWKWARD = "aZé1²  \t\n\u00a0\u0085\u2003'''stremvld!.-\u0300ߐ"


def library_words(text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in REGEX.pre_tokenize_str(text)]


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 12), st.text(alphabet=AWKWARD, min_size=1, max_size=60))
def test_words_are_the_librarys(length, text):
    chunks = [text[start : start + length] for start in range(0, len(text) - length + 1, length)]
    if not chunks:
        return
    joined = "".join(chunks)
    starts = WordSplitter(REGEX).starts(np.array([ord(char) for char in joined]), length)
    cuts = [*np.flatnonzero(starts).tolist(), len(joined)]
    assert [joined[a:b] for a, b in zip(cuts, cuts[1:], strict=False)] == [word for chunk in chunks for word in library_words(chunk)]


def random_bpe(seed: int, regex: bool, alphabet: str) -> Tokenizer:
    """A vocabulary full of runs and repeats, where greedy choices go wrong most."""
    rng = np.random.default_rng(seed)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    bpe.decoder = decoders.ByteLevel()
    words = ["".join(rng.choice(list(alphabet), size=rng.integers(1, 12))) for _ in range(25)]
    texts = ["".join(rng.choice(words, size=15)) for _ in range(60)]
    trainer = trainers.BpeTrainer(
        vocab_size=int(rng.integers(280, 700)),
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    return bpe


@pytest.mark.parametrize("regex", [False, True])
@pytest.mark.parametrize("alphabet", ["ab", "aé ", AWKWARD, "abcdefgh'st 12"])
@pytest.mark.parametrize("seed", range(4))
def test_lockstep_gives_the_librarys_ids(seed, alphabet, regex):
    bpe = random_bpe(seed, regex, alphabet)
    rng = np.random.default_rng(seed + 100)
    symbols = [ord(char) for char in alphabet]
    for length in (1, 2, 17, 90):
        points = rng.choice(symbols, size=(max(MANY_CHUNKS, 300), length), p=rng.dirichlet(np.ones(len(symbols))))
        points = np.repeat(points, 3, axis=1)[:, :length] if length > 10 and seed % 2 else points
        encoder = ChunkEncoder(bpe)
        assert encoder._merger is not None
        expected = [bpe.encode("".join(map(chr, row)), add_special_tokens=False).ids for row in points]
        assert encoder.encode(points) == expected
        assert encoder.encode(points) == expected, "a second pass reads what the first one learnt"


def test_merges_that_come_before_their_parts_go_through_the_library():
    """Here "ab"+"c" is listed before "a"+"b", which the proof excludes; both roads must still agree."""
    alphabet = {char: index for index, char in enumerate("abc")}
    vocabulary = alphabet | {"abc": 3, "ab": 4}
    merges = [("ab", "c"), ("a", "b")]
    with pytest.raises(UnsuitableMerges, match="only a later merge makes"):
        Merger({0: b"a", 1: b"b", 2: b"c", 3: b"abc", 4: b"ab"}, [(4, 2, 3), (0, 1, 4)], 5)
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    points = np.tile([97, 98, 99, 97, 98], (MANY_CHUNKS, 1))
    assert ChunkEncoder(bpe).encode(points) == [bpe.encode("abcab").ids] * MANY_CHUNKS


def test_two_merges_that_make_the_same_text():
    vocabulary = {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4, "abc": 5}
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    points = np.random.default_rng(0).choice([97, 98, 99], size=(500, 12))
    assert json.loads(bpe.to_str())["model"]["merges"] == [list(pair) for pair in merges]
    assert ChunkEncoder(bpe).encode(points) == [bpe.encode("".join(map(chr, row))).ids for row in points]


def test_published_vocabularies_qualify_for_lockstep(published):
    tokenizer, vectors = published
    assert tokenizer._encoder._merger is not None
    rng = np.random.default_rng(0)
    noise = rng.uniform(-1, 1, size=(500, *vectors["actions"].shape[1:])).astype(np.float32)
    many = tokenizer.encode(noise)
    assert many == [tokenizer.encode(chunk)[0] for chunk in noise]
