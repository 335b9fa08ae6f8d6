import json
import subprocess
import sys

import numpy as np
import pytest
from action_chunks import smooth_chunks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from action_tokenizer import (
    BadActions,
    CoefficientOutOfRange,
    FastTokenizer,
    MalformedActionTokens,
    TokenizerFilesError,
)
from action_tokenizer.bytelevel import byte_to_char
from action_tokenizer.dct import coefficient_bound, dequantize, quantize
from action_tokenizer.errors import ActionTokenizerError


def test_published_ids_and_actions_are_reproduced_exactly(published):
    tokenizer, vectors = published
    assert tokenizer.encode(vectors["actions"]) == vectors["ids"]
    decoded = tokenizer.decode(vectors["ids"], horizon=vectors["actions"].shape[1], action_dim=7)
    assert np.abs(decoded - vectors["decoded"]).max() < 1e-9


def test_one_chunk_and_many_take_different_roads_to_the_same_ids(published):
    tokenizer, vectors = published
    for row in range(0, 2000, 97):
        assert tokenizer.encode(vectors["actions"][row]) == [vectors["ids"][row]]


def test_published_files_survive_saving(published, tmp_path):
    tokenizer, vectors = published
    again = FastTokenizer.from_pretrained(tokenizer.save_pretrained(tmp_path / "copy"))
    assert again.config == tokenizer.config
    assert again.encode(vectors["actions"][:50]) == vectors["ids"][:50]


def test_fitted_round_trip_is_exact_on_coefficients_and_close_on_actions(fitted, chunks):
    held_out = smooth_chunks(200, seed=1)
    ids = fitted.encode(held_out)
    decoded = fitted.decode(ids)
    assert decoded.shape == held_out.shape and decoded.dtype == np.float64
    assert fitted.encode(decoded) == ids
    assert np.sqrt(np.mean((decoded - held_out) ** 2)) < 0.3 / fitted.scale
    assert np.mean([len(row) for row in ids]) < 35


def test_fit_is_deterministic_and_blind_to_order_and_parts(chunks, fitted):
    shuffled = chunks[np.random.default_rng(0).permutation(len(chunks))]
    again = FastTokenizer.fit((part for part in np.array_split(shuffled, 7)), scale=10, vocab_size=512)
    assert again._bpe.to_str() == fitted._bpe.to_str() and again.config == fitted.config


def test_every_chunk_within_the_limit_is_encodable_whatever_was_seen():
    tokenizer = FastTokenizer.fit(np.zeros((4, 10, 7), np.float32), scale=10, vocab_size=512)
    extremes = np.sign(np.random.default_rng(0).normal(size=(500, 10, 7)))
    extremes[0], extremes[1] = 1, -1
    decoded = tokenizer.decode(tokenizer.encode(extremes))
    np.testing.assert_array_equal(quantize(decoded, 10), quantize(extremes, 10))


def test_fit_covers_data_beyond_the_limit():
    chunks = np.zeros((3, 10, 7))
    chunks[1] = -5
    tokenizer = FastTokenizer.fit(chunks, scale=10, vocab_size=512)
    np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(chunks)), chunks, atol=0.05)


def test_a_coefficient_without_characters_is_refused_by_name(fitted):
    chunks = np.zeros((3, 10, 7))
    chunks[1, :, 4] = -2
    with pytest.raises(CoefficientOutOfRange, match=r"coefficient -63 \(chunk 1, frequency 0, dimension 4\).*covers -32 to 32") as caught:
        fitted.encode(chunks)
    assert (caught.value.chunk, caught.value.step, caught.value.dim, caught.value.value) == (1, 0, 4, -63)
    clipped = fitted.decode(fitted.encode(chunks, clip=True))
    assert clipped[1, :, 4] == pytest.approx(-32 / 10 / np.sqrt(10))


def test_a_published_vocabulary_with_gaps_refuses_what_it_would_drop(reference):
    """This one never saw some bytes: the library drops them without a word."""
    tokenizer = FastTokenizer.from_pretrained(reference / "fast" / "fast_bridge_t5_s50")
    chunk = np.zeros((1, 5, 7))
    chunk[0, :, 0] = 1e4
    with pytest.raises(CoefficientOutOfRange):
        tokenizer.encode(chunk)
    low, high = tokenizer.coefficient_range
    assert low == tokenizer.min_token
    coefficients = np.zeros((1, 5, 7), np.int64)
    coefficients[0, 0, 0] = high
    chunk = dequantize(coefficients, tokenizer.scale)
    np.testing.assert_allclose(tokenizer.decode(tokenizer.encode(chunk), horizon=5, action_dim=7), chunk, atol=1e-9)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.full((2, 10, 7), np.nan), "action nan in chunk 0, step 0, dimension 0"),
        (np.full((2, 10, 7), np.inf), "action inf"),
        (np.zeros((0, 10, 7)), "nothing to encode"),
        (np.zeros(7), r"shape \(7,\), expected \(N, T, A\)"),
        (np.zeros((1, 1, 1, 1)), "expected"),
        (np.array([["a"]]), "dtype <U1"),
    ],
)
def test_bad_actions_are_refused(fitted, actions, message):
    with pytest.raises(BadActions, match=message):
        fitted.encode(actions)


def test_fit_refuses_what_it_cannot_serve():
    with pytest.raises(BadActions, match="no chunks"):
        FastTokenizer.fit(iter([]))
    with pytest.raises(BadActions, match=r"part 1 has chunks of shape \(5, 7\), those before \(10, 7\)"):
        FastTokenizer.fit([np.zeros((1, 10, 7)), np.zeros((1, 5, 7))])
    with pytest.raises(BadActions, match="vocab_size is 40, but coefficients -32 to 32 need 65 bytes"):
        FastTokenizer.fit(np.zeros((1, 10, 7)), scale=10, vocab_size=40)
    with pytest.raises(BadActions, match="lower the scale"):
        FastTokenizer.fit(np.ones((1, 10, 7)), scale=1e5, vocab_size=4096)


def malformed_cases(ids):
    return [
        ([ids[0], ids[1][:-1]], 1, len(ids[1]) - 1, "too early"),
        ([ids[0] + ids[1]], 0, len(ids[0]), r"coefficients where 0 are owed"),
        ([[]], 0, 0, "ends 70 coefficients too early"),
        ([ids[0], [512]], 1, 0, "id 512 is not in the vocabulary of 512"),
        ([[-1]], 0, 0, "id -1 is not"),
    ]


@pytest.mark.parametrize("case", range(5))
def test_malformed_lists_raise_and_say_where(fitted, chunks, case):
    ids, chunk, position, message = malformed_cases(fitted.encode(chunks[:2]))[case]
    with pytest.raises(MalformedActionTokens, match=message) as caught:
        fitted.decode(ids)
    assert (caught.value.chunk, caught.value.position, caught.value.expected) == (chunk, position, 70)


def test_half_characters_do_not_join_across_chunks(fitted_two_bytes):
    """Both lists are broken, yet their bytes one after another are two well-formed chunks."""
    table = {fitted_two_bytes._bpe.id_to_token(index): index for index in range(fitted_two_bytes.vocab_size)}
    two = [table[byte_to_char()[byte]] for byte in "é".encode()]
    good = two * 70
    fitted_two_bytes.decode([good, good])
    with pytest.raises(MalformedActionTokens, match="chunk 0, position 139: the list ends within a character"):
        fitted_two_bytes.decode([good[:-1], good[-1:] + good])


def test_lenient_decoding_mends_and_counts(fitted, chunks):
    ids = fitted.encode(chunks[:4])
    good = fitted.decode(ids)
    actions, repairs = fitted.decode_lenient([ids[0], ids[1][:-1], ids[2] + ids[3], [-1, 9999] + ids[3]])
    np.testing.assert_allclose(actions[[0, 2, 3]], good[[0, 2, 3]])
    assert (repairs.chunks, repairs.malformed, repairs.cut, repairs.unreadable, repairs.unknown) == (4, 3, 70, 0, 2)
    assert repairs.padded > 0
    _, none = fitted.decode_lenient(ids)
    assert (none.malformed, none.padded, none.cut) == (0, 0, 0)


def test_lenient_decoding_counts_unreadable_bytes(fitted_two_bytes):
    ids = fitted_two_bytes.encode(smooth_chunks(1))
    alphabet = [index for index, text in enumerate(fitted_two_bytes._token_bytes) if len(text) == 1 and text[0] >= 0x80]
    _, repairs = fitted_two_bytes.decode_lenient([[alphabet[0]] + ids[0]])
    assert (repairs.malformed, repairs.unreadable, repairs.padded) == (1, 1, 0)


def test_decode_wants_lists_of_lists(fitted):
    with pytest.raises(ActionTokenizerError, match="list of lists"):
        fitted.decode([1, 2, 3])
    with pytest.raises(ActionTokenizerError, match="empty batches"):
        fitted.decode([])


def test_decode_wants_a_shape_where_the_files_give_none(published):
    tokenizer, vectors = published
    with pytest.raises(ActionTokenizerError, match="pass both"):
        tokenizer.decode(vectors["ids"][:1])


def test_decode_takes_numpy_ids(fitted, chunks):
    ids = fitted.encode(chunks[:3])
    np.testing.assert_array_equal(fitted.decode([np.array(row) for row in ids]), fitted.decode(ids))


@settings(max_examples=25, deadline=None)
@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 3), st.integers(1, 100), st.integers(1, 32)),
        elements=st.sampled_from([-1.0, -0.5, 0.0, 1e-9, 0.03, 1.0]) | st.floats(-1, 1),
    )
)
def test_any_shape_comes_back(chunks):
    tokenizer = FastTokenizer.fit(chunks, scale=10, vocab_size=512)
    ids = tokenizer.encode(chunks)
    decoded = tokenizer.decode(ids)
    np.testing.assert_array_equal(quantize(decoded, 10), quantize(chunks, 10))
    # Each of T coefficients is off by at most half a step, and the transform keeps lengths.
    assert np.sqrt(((decoded - chunks) ** 2).sum(axis=1)).max() <= 0.5 / 10 * np.sqrt(chunks.shape[1]) + 1e-9
    grammar = tokenizer.grammar()
    assert all(grammar.allowed(row)[grammar.end_id] for row in ids)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 100), st.floats(0.1, 3), st.integers(0, 2**32 - 1))
def test_no_chunk_within_the_limit_leaves_the_bound(horizon, limit, seed):
    rng = np.random.default_rng(seed)
    chunks = rng.choice([-limit, limit, 0.0], size=(20, horizon, 3))
    assert np.abs(quantize(chunks, 10)).max() <= coefficient_bound(horizon, 10, limit)


def test_dequantize_is_scipys_inverse():
    from scipy.fft import idct

    coefficients = np.random.default_rng(0).integers(-50, 50, (4, 13, 5))
    np.testing.assert_allclose(dequantize(coefficients, 7), idct(coefficients / 7, axis=1, norm="ortho"), atol=1e-12)


def broken(folder, name, change):
    path = folder / name
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text()[:500]), "is not JSON.*cut off"),
        (lambda f: (f / "processor_config.json").write_text("[]"), "holds a JSON list"),
        (lambda f: broken(f, "processor_config.json", lambda v: v.pop("scale")), "lacks scale"),
        (lambda f: broken(f, "processor_config.json", lambda v: v.update(scale=-1)), "scale is -1"),
        (lambda f: broken(f, "processor_config.json", lambda v: v.update(time_horizon=0)), "horizon is 0"),
        (lambda f: broken(f, "processor_config.json", lambda v: v.update(min_token="x")), "min_token is 'x'"),
        (lambda f: broken(f, "tokenizer.json", lambda v: v["model"].update(type="WordPiece")), "its model is 'WordPiece'"),
        (lambda f: broken(f, "tokenizer.json", lambda v: v.update(normalizer={"type": "NFC"})), "would change coefficients"),
        (lambda f: broken(f, "tokenizer.json", lambda v: v.update(pre_tokenizer=None)), "pre-tokenizer is None"),
        (lambda f: broken(f, "tokenizer.json", lambda v: v["pre_tokenizer"].update(add_prefix_space=True)), "adds a space"),
        (lambda f: broken(f, "tokenizer.json", lambda v: v["model"].update(dropout=0.1)), "dropout"),
        (lambda f: broken(f, "tokenizer.json", lambda v: v["model"].update(merges=[["no", "such"]])), "cannot|can read"),
        (lambda f: broken(f, "tokenizer.json", lambda v: v["model"]["vocab"].update(extra=9999)), "not 0 .. n-1"),
    ],
)
def test_damaged_and_foreign_files_are_refused(fitted, tmp_path, damage, message):
    folder = fitted.save_pretrained(tmp_path / "t")
    damage(folder)
    with pytest.raises(TokenizerFilesError, match=message):
        FastTokenizer.from_pretrained(folder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(TokenizerFilesError, match="is not a folder"):
        FastTokenizer.from_pretrained(tmp_path / "nowhere")


def test_importing_is_quick_and_brings_no_torch():
    """Processor time, since other processes may keep the machine busy."""
    code = (
        "import sys, time; started = time.process_time(); import action_tokenizer\n"
        "print(time.process_time() - started, 'torch' in sys.modules, 'scipy' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    assert min(float(run[0]) for run in runs) < 0.3
    assert runs[0][1:] == ["False", "False"]
