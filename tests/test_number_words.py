"""Numbers as words: bins, errors, ids, how their embeddings begin, and how they are written."""

from math import pi

import numpy as np
import pytest
import torch

from emu3_vla.generation.cache import CachedTrunk
from emu3_vla.generation.words import WordWriter
from emu3_vla.model import BlockEmu3ForCausalLM, build_config
from emu3_vla.number_words import NumberWords, NumberWordsError, StateWords
from emu3_vla.text import TextTokenizer
from emu3_vla.training.initial import start_numbers_smoothly
from emu3_vla.vocabulary import CompactVocabulary, ImageGrid

NAMES = ("x", "yaw", "width")


def states(count: int = 100) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, (count, 15))


def test_bins_divide_what_was_seen_and_hold_what_lies_beyond():
    words = StateWords(("x", "width"), (-0.5, 0.0), (0.5, 0.08), bins=10)
    observed = np.zeros((5, 15))
    observed[:, 0] = [-0.5, -0.41, 0.0, 0.499, 7.0]
    observed[:, 6] = [0.0, 0.007, 0.0081, 0.08, -1.0]
    assert words.numbers(observed).tolist() == [[0, 0], [0, 0], [5, 1], [9, 9], [9, 0]]


def test_angles_go_round():
    words = StateWords.fit(states(), NAMES)
    turned = np.zeros((2, 15))
    turned[:, 5] = [0.3, 0.3 + 2 * pi]
    numbers = words.numbers(turned)[:, 1]
    assert numbers[0] == numbers[1]
    assert (words.low[1], words.high[1]) == (-pi, pi)


def test_every_word_is_one_id_and_comes_back():
    words = StateWords.fit(states(), NAMES)
    text = TextTokenizer.fit(["open the drawer"], vocab_size=300, words=words.words)
    spelled = words.spelled(text.encode)
    numbers = words.numbers(states(1)[0])
    ids = spelled.ids(numbers)
    assert len(ids) == spelled.most_ids == len(NAMES)
    assert text.decode(ids) == words.sentence(numbers)
    assert len(set(spelled.single_ids().ravel().tolist())) == len(NAMES) * words.bins
    assert text.encode("open the drawer") == TextTokenizer.fit(["open the drawer"], vocab_size=300).encode("open the drawer")


def test_a_tokenizer_without_the_words_spells_them():
    words = StateWords.fit(states(), NAMES)
    text = TextTokenizer.fit(["open the drawer"], vocab_size=256)
    spelled = words.spelled(text.encode)
    numbers = words.numbers(states(1)[0])
    assert spelled.single_ids() is None
    assert text.decode(spelled.ids(numbers)).replace(" <", "<") == words.sentence(numbers)


def test_neighbouring_numbers_begin_alike():
    words = StateWords.fit(states(), NAMES)
    text = TextTokenizer.fit(["open the drawer"], vocab_size=300, words=words.words)
    spelled = words.spelled(text.encode)
    torch.manual_seed(0)
    weight = torch.randn(text.vocab_size, 64) * 0.02
    others = weight[:256].clone()
    start_numbers_smoothly(weight, spelled)
    row = weight[torch.from_numpy(spelled.single_ids()[0])]
    near, far = (torch.nn.functional.cosine_similarity(row[:-distance], row[distance:]).mean() for distance in (1, 100))
    assert near > 0.95 > 0.6 > far
    assert 0.3 < row.std() / 0.02 < 3
    assert torch.equal(weight[:256], others)


@pytest.mark.parametrize(
    ("names", "said"), [(("x", "elbow"), "has no 'elbow', only x"), ((), "are none"), (("x", "x"), "x, x, expected each once")]
)
def test_names_that_are_no_entries(names, said):
    with pytest.raises(NumberWordsError, match=said):
        StateWords.fit(states(), names)


def test_states_that_say_nothing():
    still, missing = states(), states()
    still[:, 6], missing[3, 6] = 0.08, np.nan
    with pytest.raises(NumberWordsError, match="width of the arm's state is 0.08 in all of 100 steps"):
        StateWords.fit(still, NAMES)
    with pytest.raises(NumberWordsError, match="width of the arm's state is missing in 1 of 100 steps"):
        StateWords.fit(missing, NAMES)
    words = StateWords.fit(states(), NAMES)
    with pytest.raises(NumberWordsError, match="not finite"):
        words.numbers(missing[3])
    with pytest.raises(NumberWordsError, match=r"shape \(7,\), expected"):
        words.numbers(np.zeros(7))


def test_fields_come_back():
    words = StateWords.fit(states(), NAMES)
    assert StateWords.of(words.fields()) == words
    with pytest.raises(NumberWordsError, match="does not say how"):
        StateWords.of({"names": ["x"]})


def test_values_are_the_middles_of_their_bins():
    words = NumberWords.within({"slide": (0.0, 0.15), "bulb": (0.0, 1.0)}, bins=10)
    numbers = words.numbers([[0.05, 1.0]])
    np.testing.assert_allclose(words.values(numbers), [[0.0525, 0.95]])
    with pytest.raises(NumberWordsError, match=r"shape \(3,\), expected \(..., 2\): slide, bulb"):
        words.numbers([0.0, 0.0, 0.0])


@pytest.fixture(scope="module")
def writer():
    words = NumberWords.within({name: (0.0, 1.0) for name in "abcdef"}, bins=6)
    text = TextTokenizer.fit(["go"], vocab_size=256, words=words.words)
    vocabulary = CompactVocabulary(
        text_size=text.vocab_size, action_size=8, codebook_size=8, images=(ImageGrid(name="view", rows=4, columns=4),), block_size=4
    )
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = BlockEmu3ForCausalLM(build_config(vocabulary, **sizes, hidden_act="relu2", code_dim=4, depth_size=16, depth_heads=2)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)  # so that what was said decides what is said next
        model.lm_head.weight.mul_(50)
    return WordWriter(model, words.spelled(text.encode)), CachedTrunk(model), model


def _written(writer, guess):
    words, trunk, model = writer
    sequence, sentence, passes = trunk.sequence(64), words.begin(guess), []
    prompt = model.model.embed_tokens.weight[[65, 66, 67]].detach()
    states = sequence.extend(torch.cat([prompt, words.ahead(sentence)]))[2:]
    extend = trunk.extend_each
    trunk.extend_each = lambda parts: passes.append(parts) or extend(parts)
    (bins,) = words.write_each([sequence], [sentence], [states])
    trunk.extend_each = extend
    return bins, len(passes), sequence


def test_words_are_the_likeliest_one_after_another(writer):
    """Against the model itself, with the whole document anew for each word."""
    bins, passes, sequence = _written(writer, None)
    words, _, model = writer
    ids, said = [65, 66, 67], []
    for entry in range(6):
        with torch.no_grad():
            hidden = model.model(inputs_embeds=model.model.embed_tokens.weight[ids][None]).last_hidden_state[0, -1]
            of_entry = words._ids_SB[entry]
            said.append(int((model.lm_head(hidden))[of_entry].argmax()))
        ids.append(int(of_entry[said[-1]]))
    assert bins.tolist() == said and len(set(said)) > 1
    assert passes <= 5 and sequence.length == 8


@pytest.mark.parametrize("wrong", [(), (0,), (2,), (4,), (5,), (1, 3), (0, 1, 2, 3, 4, 5)])
def test_guesses_change_no_word(writer, wrong):
    bins, passes, sequence = _written(writer, None)
    guess = bins.astype(int)
    guess[list(wrong)] = (guess[list(wrong)] + 1) % 6
    again, fewer, same = _written(writer, guess)
    assert again.tolist() == bins.tolist() and same.length == sequence.length
    # Guesses are read with the prompt; the last is of no use, nothing stands behind it.
    assert fewer == 0 if set(wrong) <= {5} else 1 <= fewer <= 5
    following = writer[2].model.embed_tokens.weight[[70]].detach()
    torch.testing.assert_close(same.extend(following), sequence.extend(following), atol=1e-4, rtol=1e-4)


def test_bins_can_be_finer_near_zero():
    words = NumberWords.within({"right": (-1.0, 1.0), "lamp": (0.0, 1.0)}, bins=100, powers={"right": 0.5})
    near, far = (words.values(words.numbers([[at, 0], [at + 0.03, 0]]))[:, 0] for at in (0.01, 0.8))
    assert near[1] - near[0] > 0.02 and words.numbers([0.011, 0])[0] > words.numbers([0.005, 0])[0]
    assert words.numbers([-0.2, 0])[0] == 99 - words.numbers([0.2, 0])[0]
    assert abs(far - [0.8, 0.83]).max() < 0.02
    assert NumberWords.of(words.fields()) == words
    with pytest.raises(NumberWordsError, match="powers are"):
        NumberWords(("a",), (0.0,), (1.0,), 4, (2.0,))


def test_numbers_say_which_others_they_are_relative_to():
    limits = {"height": (0.0, 1.0), "block_right": (-1.0, 1.0)}
    words = NumberWords.within(limits, relative={"block_right": "x"})
    assert words.relative == ("", "x")
    assert NumberWords.of(words.fields()) == words
    assert "relative" not in NumberWords.within(limits).fields()
    with pytest.raises(NumberWordsError, match="relative names 'tool', expected one of height, block_right, x, y"):
        NumberWords.within(limits, relative={"block_right": "tool"})
    with pytest.raises(NumberWordsError, match=r"relative is \('x',\), expected 2 names, or none"):
        NumberWords(("a", "b"), (0.0, 0.0), (1.0, 1.0), relative=("x",))
