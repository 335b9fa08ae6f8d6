"""Fitting FAST's vocabulary: byte-level BPE over the characters of coefficients.

Two things differ from the published fit, inside the published layout. The alphabet holds every byte that a coefficient within `limit`
can need, seen in the data or not, so nothing is ever dropped (the published one leaves out bytes that the data lacked). And a chunk is
one word: GPT-2's splitting at letters and digits, which means nothing for coefficients, would only forbid merges.

Source: FAST (arXiv 2501.09747) and its published processor (`fit`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from action_tokenizer import bytelevel, dct, files
from action_tokenizer.errors import BadActions


def fit(
    chunks: np.ndarray | Iterable[np.ndarray], *, scale: float, vocab_size: int, limit: float
) -> tuple[Tokenizer, files.ProcessorConfig]:
    """Fit a vocabulary.

    chunks: (N, T, A), or an iterable of such arrays, read once, of which only coefficients are kept (as int16 or int32). Normalised.
    scale: factor on the coefficients; the round-trip error is about 0.29 / scale a coefficient. vocab_size: most ids that the
    vocabulary may have; fewer if the data repeat too little. limit: every chunk within [-limit, limit] must be encodable, and what the
    data hold beyond it too.
    Deterministic: the order of chunks does not matter. Raises BadActions.
    """
    coefficients = _coefficients(chunks, scale)
    horizon, action_dim = coefficients[0].shape[1:]
    bound = dct.coefficient_bound(horizon, scale, limit)
    low = min(-bound, min(int(part.min()) for part in coefficients))
    high = max(bound, max(int(part.max()) for part in coefficients))
    alphabet = _alphabet(low, high, vocab_size)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=alphabet,
        max_token_length=10000,
    )
    bpe.train_from_iterator(_texts(coefficients, low), trainer=trainer)
    return bpe, files.ProcessorConfig(scale=scale, min_token=low, horizon=horizon, action_dim=action_dim)


def _coefficients(chunks: np.ndarray | Iterable[np.ndarray], scale: float) -> list[np.ndarray]:
    """Coefficients of all parts, each (N, T, A), in the smallest integers that hold them."""
    parts = []
    for part in [chunks] if isinstance(chunks, np.ndarray) else chunks:
        coefficients = dct.quantize(dct.check_chunks(part), scale)
        if parts and coefficients.shape[1:] != parts[0].shape[1:]:
            raise BadActions(f"part {len(parts)} has chunks of shape {coefficients.shape[1:]}, those before {parts[0].shape[1:]}")
        small = np.abs(coefficients).max() < 2**15
        parts.append(coefficients.astype(np.int16 if small else np.int32))
    if not parts:
        raise BadActions("no chunks to fit on")
    return parts


def _alphabet(low: int, high: int, vocab_size: int) -> list[str]:
    """The byte characters that coefficients low .. high need, ascending by byte."""
    if high - low >= bytelevel.SURROGATES.start:
        raise BadActions(
            f"coefficients span {low} to {high}, more than {bytelevel.SURROGATES.start} characters; "
            "normalise the actions or lower the scale"
        )
    used = sorted({byte for point in range(high - low + 1) for byte in chr(point).encode()})
    if vocab_size < len(used):
        raise BadActions(
            f"vocab_size is {vocab_size}, but coefficients {low} to {high} need {len(used)} bytes; raise it or lower the scale"
        )
    return [bytelevel.byte_to_char()[byte] for byte in used]


def _texts(coefficients: list[np.ndarray], low: int) -> Iterator[str]:
    for part in coefficients:
        length = part[0].size
        text = (part.astype(np.int64) - low).astype("<u4").tobytes().decode("utf-32-le")
        yield from (text[start : start + length] for start in range(0, len(text), length))
