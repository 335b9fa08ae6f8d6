"""A committed prefix weighs ids by Bayes' rule: against brute force, and in what comes out."""

import numpy as np
import pytest

from action_tokenizer import BadActions, FastTokenizer
from action_tokenizer.dct import basis

T, A = 10, 3


@pytest.fixture(scope="module")
def tokenizer() -> FastTokenizer:
    random = np.random.default_rng(0)
    chunks = random.normal(0, 0.15, (600, T, A)).cumsum(axis=1).clip(-1, 1)
    return FastTokenizer.fit(chunks, scale=10, vocab_size=200)


def chunk(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.15, (T, A)).cumsum(axis=0).clip(-1, 1)


def brute_force(coefficients_FA: np.ndarray, count: int, committed_nA: np.ndarray, scale: float, correlation: float) -> float:
    """log p(committed | the first `count` coefficients), from the joint Gaussian of everything, dimension by dimension."""
    n, basis_TF = len(committed_nA), basis(T)
    steps, rounding = np.arange(T), 1 / (scale * np.sqrt(12))
    weights = np.vstack([np.eye(T), basis_TF[:n]])  # frequencies, then committed steps
    process = basis_TF.T @ (correlation ** np.abs(steps[:, None] - steps)) @ basis_TF + rounding**2 * np.eye(T)
    joint = weights @ process @ weights.T
    joint[T:, T:] += rounding**2 * np.eye(n)
    total = 0.0
    for dim in range(committed_nA.shape[1]):
        k = len(range(dim, count, committed_nA.shape[1]))
        seen = joint[:k, :k]
        regression = joint[T:, :k] @ np.linalg.inv(seen) if k else np.zeros((n, 0))
        mean = regression @ coefficients_FA[:k, dim]
        covariance = joint[T:, T:] - regression @ joint[:k, T:]
        off = committed_nA[:, dim] - mean
        total -= 0.5 * (off @ np.linalg.solve(covariance, off) + np.linalg.slogdet(covariance)[1])
    return total


def test_scores_are_the_gaussian_likelihood(tokenizer):
    written = chunk(1)
    committed = chunk(2)[:3]
    (ids,) = tokenizer.encode(written)
    coefficients = np.around(basis(T).T @ written * tokenizer.scale) / tokenizer.scale
    prefix, count = tokenizer.committed(committed, correlation=0.8), 0
    for index in ids:
        # Ids that stand for the wrong number of coefficients at the end are the grammar's to refuse.
        length = len(tokenizer._token_bytes[index])
        (score,) = prefix.scores([index])
        count += length
        assert score == pytest.approx(brute_force(coefficients, count, committed, tokenizer.scale, 0.8), abs=1e-6)
        prefix.write(index)
    assert count == T * A


@pytest.mark.parametrize("n", [1, 3, 6])
def test_a_writer_without_a_preference_of_its_own_writes_the_prefix(tokenizer, n):
    """All permitted ids are alike to the model, so the prefix alone decides: the chunk begins with it, up to rounding."""
    committed = chunk(3)[:n]
    grammar, prefix = tokenizer.grammar(T, A), tokenizer.committed(committed, correlation=0.8)
    state, ids = grammar.start(), []
    while not grammar.is_finished(state):
        candidates = [int(index) for index in np.flatnonzero(grammar.mask(state)) if index < tokenizer.vocab_size]
        best = candidates[int(prefix.scores(candidates).argmax())]
        prefix.write(best)
        ids.append(best)
        state = grammar.advance(state, best)
    decoded = tokenizer.decode([ids])[0]
    off = np.abs(decoded[:n] - committed).max()
    assert off < 0.2, off


def test_scores_prefer_the_chunk_that_begins_so(tokenizer):
    chunks = [chunk(seed) for seed in range(4, 12)]
    for wanted in range(len(chunks)):
        totals = []
        for other in chunks:
            prefix = tokenizer.committed(chunks[wanted][:4], correlation=0.8)
            for index in tokenizer.encode(other)[0]:
                (total,) = prefix.scores([index])
                prefix.write(index)
            totals.append(total)
        assert int(np.argmax(totals)) == wanted


def test_wrong_prefixes_are_refused(tokenizer):
    for wrong in (np.zeros((T, A)), np.zeros((0, A)), np.zeros(A), np.full((2, A), np.nan)):
        with pytest.raises(BadActions, match=r"expected finite \(n, A\) with 1 <= n < 10"):
            tokenizer.committed(wrong, correlation=0.8)
    with pytest.raises(ValueError, match="expected above 0 and below 1"):
        tokenizer.committed(np.zeros((1, A)), correlation=1.0)
