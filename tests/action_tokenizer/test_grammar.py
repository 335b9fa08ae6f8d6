import time

import numpy as np
import pytest
from action_chunks import smooth_chunks

from action_tokenizer import MalformedActionTokens
from action_tokenizer.bytelevel import MAX_CODE_POINT
from action_tokenizer.errors import ActionTokenizerError
from action_tokenizer.grammar import ActionGrammar, Transitions, byte_transitions

SHAPES = [(1, 1), (5, 7), (10, 7), (16, 8), (2, 32)]


def random_walks(grammar, count, rng) -> list[list[int]]:
    """Sequences that choose uniformly among what the grammar permits, until it permits only the end."""
    states = np.full(count, grammar.start())
    rows = [[] for _ in range(count)]
    while True:
        masks = grammar.masks(states)
        assert masks.any(axis=1).all(), "painted into a corner"
        choices = np.where(masks, rng.random(masks.shape), -1).argmax(axis=1)
        if (choices == grammar.end_id).all():
            return rows
        for row, choice in zip(rows, choices, strict=True):
            if choice != grammar.end_id:
                row.append(int(choice))
        states = grammar.advance_many(states, choices)


def check_walks(tokenizer, horizon, action_dim, count, limit=None):
    grammar = tokenizer.grammar(horizon, action_dim, limit=limit)
    rows = random_walks(grammar, count, np.random.default_rng(horizon * action_dim))
    actions = tokenizer.decode(rows, horizon=horizon, action_dim=action_dim)
    assert actions.shape == (count, horizon, action_dim)
    return actions


@pytest.mark.parametrize(("horizon", "action_dim"), SHAPES)
def test_ten_thousand_random_walks_through_published_vocabularies_decode(published, horizon, action_dim):
    check_walks(published[0], horizon, action_dim, 2000)


@pytest.mark.parametrize(("horizon", "action_dim"), SHAPES)
def test_ten_thousand_random_walks_through_fitted_vocabularies_decode(fitted, fitted_two_bytes, horizon, action_dim):
    check_walks(fitted, horizon, action_dim, 2000)
    check_walks(fitted_two_bytes, horizon, action_dim, 2000)


def test_a_limit_bounds_what_can_be_written(published):
    tokenizer, vectors = published
    horizon = vectors["actions"].shape[1]
    free = check_walks(tokenizer, horizon, 7, 200)
    bounded = check_walks(tokenizer, horizon, 7, 200, limit=1.0)
    # Every coefficient is within scale * sqrt(T), so no action can leave the sum of T of them.
    assert np.abs(bounded).max() <= horizon * np.sqrt(2) + 1 < np.abs(free).max()


def test_everything_encoded_is_permitted_and_ends_when_whole(published):
    tokenizer, vectors = published
    for limit in (None, 1.0):
        grammar = tokenizer.grammar(vectors["actions"].shape[1], 7, limit=limit)
        for row in vectors["ids"][:300]:
            state = grammar.start()
            for index in row:
                assert grammar.mask(state)[index] and not grammar.mask(state)[grammar.end_id]
                state = grammar.advance(state, index)
            assert np.flatnonzero(grammar.mask(state)).tolist() == [grammar.end_id]
            assert grammar.is_finished(state) and grammar.owed(state) == 0


def test_the_grammar_permits_exactly_the_prefixes_that_have_a_completion(fitted_two_bytes):
    """Against a brute-force search over all id sequences of a small vocabulary and chunk."""
    token_bytes = [b"A", b"\xc3", b"\xa9", b"A\xc3", b"\xa9A", "éé".encode(), b"\xe0\xa0\x80", b"\xff", b""]
    grammar = ActionGrammar(byte_transitions(token_bytes, 0, MAX_CODE_POINT), horizon=3, action_dim=1)
    whole, prefixes = set(), set()

    def search(prefix):
        text = b"".join(token_bytes[index] for index in prefix)
        try:
            if len(text.decode()) == 3:
                whole.add(prefix)
        except UnicodeDecodeError:
            pass
        if len(text) <= 9:
            for index in range(len(token_bytes) - 1):  # the empty token would go on for ever
                if len(prefix) < 6:
                    search((*prefix, index))

    search(())
    for row in whole:
        prefixes |= {row[:length] for length in range(len(row) + 1)}
    for prefix in prefixes:
        followers = {row[len(prefix)] for row in prefixes if len(row) == len(prefix) + 1 and row[: len(prefix)] == prefix}
        mask = grammar.allowed(prefix)
        assert set(np.flatnonzero(mask[:-1]).tolist()) == followers
        assert mask[-1] == (prefix in whole)


def test_refusals_say_what_is_owed(fitted, chunks):
    grammar = fitted.grammar()
    ids = fitted.encode(chunks[:1])[0]
    with pytest.raises(MalformedActionTokens, match="end of chunk may not come where 70 of 70"):
        grammar.advance(grammar.start(), grammar.end_id)
    with pytest.raises(MalformedActionTokens, match=f"position {len(ids)}: id 0 may not come where 0 of 70") as caught:
        grammar.allowed([*ids, 0])
    assert caught.value.position == len(ids) and caught.value.actual == 70
    for index in (-1, 10**6):
        with pytest.raises(MalformedActionTokens, match=f"id {index} may not come"):
            grammar.advance(grammar.start(), index)
        with pytest.raises(MalformedActionTokens, match="sequence 1"):
            grammar.advance_many(np.full(2, grammar.start()), np.array([ids[0], index]))


def test_finished_sequences_wait_for_the_others(fitted, chunks):
    grammar = fitted.grammar()
    state = grammar.start()
    for index in fitted.encode(chunks[:1])[0]:
        state = grammar.advance(state, index)
    ended = grammar.advance(state, grammar.end_id)
    assert grammar.advance(ended, grammar.end_id) == ended
    assert grammar.advance_many(np.array([ended]), np.array([grammar.end_id])).tolist() == [ended]
    assert np.flatnonzero(grammar.mask(ended)).tolist() == [grammar.end_id] and grammar.owed(ended) == 0


def test_masks_cannot_be_changed_by_a_caller(fitted):
    with pytest.raises(ValueError, match="read-only"):
        fitted.grammar().mask(0)[0] = True


def test_many_at_once_equal_one_by_one(fitted_two_bytes):
    grammar = fitted_two_bytes.grammar()
    rows = random_walks(grammar, 20, np.random.default_rng(5))
    for row in rows:
        states = [grammar.start()]
        for index in row:
            states.append(grammar.advance(states[-1], index))
        np.testing.assert_array_equal(grammar.masks(np.array(states)), [grammar.mask(state) for state in states])
        np.testing.assert_array_equal(grammar.advance_many(np.array(states[:-1]), np.array(row)), states[1:])


def test_a_vocabulary_that_cannot_write_the_chunk_is_refused():
    pairs_only = Transitions(np.full((1, 3), 2, np.int32), np.zeros((1, 3), np.int32), np.zeros(1, np.int32))
    with pytest.raises(ActionTokenizerError, match="exactly 1×3 coefficients"):
        ActionGrammar(pairs_only, horizon=1, action_dim=3)


def test_a_limit_must_be_positive(fitted):
    for limit in (0, -1.0, float("nan")):
        with pytest.raises(ActionTokenizerError, match="expected a positive number"):
            fitted.grammar(limit=limit)


def test_long_chunks_share_masks(fitted):
    grammar = fitted.grammar(100, 32)
    assert grammar.num_states == 3202 and len(grammar.mask_rows) < 200


def test_a_step_costs_microseconds(fitted):
    """The bar is 20 µs a step at 2048 ids; the mask is a view, so the vocabulary's size does not enter.

    Processor time, since other processes may keep the machine busy.
    """
    grammar, ids = fitted.grammar(), fitted.encode(smooth_chunks(50))
    best = min(_seconds_a_step(grammar, ids) for _ in range(5))
    assert best < 20e-6


def _seconds_a_step(grammar, ids) -> float:
    started = time.process_time()
    for row in ids:
        state = grammar.start()
        for index in row:
            grammar.mask(state)
            state = grammar.advance(state, index)
    return (time.process_time() - started) / sum(map(len, ids))
