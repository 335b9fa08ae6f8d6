"""The arm's state in words: bins, errors, ids, and what a policy shows of it."""

from math import pi

import numpy as np
import pytest
import torch

from emu3_vla.number_words import NumberWordsError, StateWords
from emu3_vla.text import TextTokenizer
from emu3_vla.training.initial import start_numbers_smoothly

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
    ("names", "said"), [(("x", "elbow"), "has no 'elbow', only x"), ((), "are none"), (("x", "x"), "x, x, expected some, each once")]
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
