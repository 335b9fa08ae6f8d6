"""What a tokenizer costs and loses on given chunks: tokens, error in physical units, coverage, time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from action_tokenizer import dct
from action_tokenizer.base import ActionTokenizer
from action_tokenizer.errors import ActionTokenizerError
from action_tokenizer.fast import FastTokenizer
from action_tokenizer.normalizer import ActionNormalizer


@dataclass(frozen=True, kw_only=True)
class Unit:
    """How errors of one action dimension are told. factor: `symbol`s in one unit of the action."""

    name: str
    factor: float
    symbol: str


CALVIN_RELATIVE = (
    *(Unit(name=name, factor=20.0, symbol="mm") for name in ("dx", "dy", "dz")),
    *(Unit(name=name, factor=float(np.degrees(0.05)), symbol="°") for name in ("rx", "ry", "rz")),
    Unit(name="gripper", factor=1.0, symbol=""),
)
"""CALVIN's relative action, whose scales `envs.spec` states (a test holds the two together)."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Figures over `chunks` chunks.

    tokens_mean, tokens_p95, tokens_max: ids a chunk. values_per_token: T×A / tokens_mean. bits_per_value: at log2(V) bits an id.
    rmse, largest: error of the round trip per dimension, in the units given. encode_us, decode_us: microseconds a chunk, all in one call
    and one thread, best of the repeats. clipped: chunks that hold a coefficient or value that the vocabulary lacks.
    coefficients_seen: distinct coefficients in these chunks; coefficients_covered: how many of the span from the least to the
    greatest of them the vocabulary can write, and coefficients_span: how many there are. Zero for tokenizers without coefficients.
    """

    chunks: int
    vocab_size: int
    tokens_mean: float
    tokens_p95: float
    tokens_max: int
    values_per_token: float
    bits_per_value: float
    rmse: tuple[float, ...]
    largest: tuple[float, ...]
    encode_us: float
    decode_us: float
    clipped: int
    coefficients_seen: int
    coefficients_covered: int
    coefficients_span: int


def report(
    tokenizer: ActionTokenizer,
    chunks,
    *,
    normalizer: ActionNormalizer | None = None,
    units: Sequence[Unit] = CALVIN_RELATIVE,
    repeats: int = 3,
) -> Report:
    """Measure `tokenizer` on real chunks (N, T, A) that are in the actions' own units if there is a normaliser, else normalised.

    Raises BadActions, and ActionTokenizerError where `units` are not one a dimension.
    """
    actions_NTA = dct.check_chunks(chunks)
    count, horizon, action_dim = actions_NTA.shape
    if len(units) != action_dim:
        raise ActionTokenizerError(f"{len(units)} units for actions of {action_dim} dimensions")
    normalized = actions_NTA if normalizer is None else normalizer.normalize(actions_NTA)
    ids, encode_s = _timed(lambda: tokenizer.encode(normalized, clip=True), repeats)
    decoded, decode_s = _timed(lambda: tokenizer.decode(ids, horizon=horizon, action_dim=action_dim), repeats)
    error = (decoded if normalizer is None else normalizer.denormalize(decoded)) - actions_NTA
    factors = np.array([unit.factor for unit in units])
    lengths = np.array([len(row) for row in ids])
    return Report(
        chunks=count,
        vocab_size=tokenizer.vocab_size,
        tokens_mean=float(lengths.mean()),
        tokens_p95=float(np.quantile(lengths, 0.95)),
        tokens_max=int(lengths.max()),
        values_per_token=float(horizon * action_dim / lengths.mean()),
        bits_per_value=float(np.log2(tokenizer.vocab_size) * lengths.mean() / (horizon * action_dim)),
        rmse=tuple((np.sqrt((error**2).mean(axis=(0, 1))) * factors).tolist()),
        largest=tuple((np.abs(error).max(axis=(0, 1)) * factors).tolist()),
        encode_us=encode_s / count * 1e6,
        decode_us=decode_s / count * 1e6,
        clipped=int((~tokenizer.covers(normalized)).sum()),
        **_coverage(tokenizer, normalized),
    )


def _timed(call, repeats: int):
    """Result and the least seconds of `repeats` calls, after one that warms up."""
    result, best = call(), float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - started)
    return result, best


def _coverage(tokenizer: ActionTokenizer, normalized: np.ndarray) -> dict[str, int]:
    if not isinstance(tokenizer, FastTokenizer):
        return {"coefficients_seen": 0, "coefficients_covered": 0, "coefficients_span": 0}
    seen = np.unique(dct.quantize(normalized, tokenizer.scale))
    span = np.arange(seen[0], seen[-1] + 1)
    return {
        "coefficients_seen": len(seen),
        "coefficients_covered": int(tokenizer.has_coefficients(span).sum()),
        "coefficients_span": len(span),
    }
