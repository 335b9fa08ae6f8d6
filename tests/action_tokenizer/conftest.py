"""Chunks and tokenizers that several tests share."""

import numpy as np
import pytest
from action_chunks import smooth_chunks

from action_tokenizer import FastTokenizer

PUBLISHED = ("fast", "fast_bridge_t5_s50", "fast_calvin_norm_a10_s50")


@pytest.fixture(scope="session")
def chunks() -> np.ndarray:
    return smooth_chunks(600)


@pytest.fixture(scope="session")
def fitted(chunks) -> FastTokenizer:
    """One byte a character: scale 10 over ten steps needs 65 coefficients."""
    return FastTokenizer.fit(chunks, scale=10, vocab_size=512)


@pytest.fixture(scope="session")
def fitted_two_bytes() -> FastTokenizer:
    """Scale 60 needs 381 coefficients, most of them two bytes long, so ids hold half characters."""
    return FastTokenizer.fit(smooth_chunks(200, seed=3), scale=60, vocab_size=400)


@pytest.fixture(scope="session", params=PUBLISHED)
def published(request, reference) -> tuple[FastTokenizer, dict]:
    """A published tokenizer and its recorded vectors: actions (N, T, A), ids (N lists), decoded (N, T, A)."""
    folder = reference / "fast"
    with np.load(folder / f"{request.param}_vectors.npz") as stored:
        vectors = dict(stored)
    vectors["ids"] = [row.tolist() for row in np.split(vectors["token_ids"], np.cumsum(vectors["lengths"])[:-1])]
    return FastTokenizer.from_pretrained(folder / request.param), vectors
