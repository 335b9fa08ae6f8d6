"""How an item is chosen from logits: a function of the logits and of noise that is fixed beforehand.

The noise of a request's item number i follows from its seed and i alone: the id is argmax(log p + Gumbel noise), which is a draw from p.
So what a request draws depends neither on the requests beside it nor on how many items are verified at once: parallel decoding guesses
items, computes what one-at-a-time decoding would have drawn behind them, and keeps those guesses that were right. Greedy decoding is the
same without noise.

Source: Gumbel-max sampling; its use to make an autoregressive draw a fixed point to be solved for: Wiggers and Hoogeboom, Predictive
Sampling, arXiv 2002.09928.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


class DecodingFailed(ValueError):
    """The model's logits are not numbers, so there is nothing to choose from."""


class SamplingError(ValueError):
    """A way to sample that cannot be."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature 0 takes the likeliest. top_k, top_p: only of the k likeliest; only of the fewest with probability p together.

    Applied in this order, as Transformers does. Raises SamplingError.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: of all
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise SamplingError(f"temperature is {self.temperature}, expected a number from 0 on")
        if self.top_k < 0:
            raise SamplingError(f"top_k is {self.top_k}, expected at least 1, or 0 for no limit")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p is {self.top_p}, expected above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise SamplingError(f"seed is {self.seed}, expected 0 to 2**63 - 1")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance: logits = negative + scale × (conditional - negative), after a log-softmax of both; scale 1 is none.

    As Emu3 draws its pictures, with scale 3. Raises SamplingError.
    """

    scale: float

    def __post_init__(self):
        if not 0 <= self.scale < float("inf"):
            raise SamplingError(f"guidance scale is {self.scale}, expected a number from 0 on; 1 is no guidance")


def choose(logits_NV: torch.Tensor, samplings: list[Sampling], numbers: list[tuple[int, int]]) -> list[int]:
    """One index into V per row. Refused ids have -inf. numbers: (item, code within it) of each row, which the noise follows from.

    Raises DecodingFailed.
    """
    best = logits_NV.max(dim=-1)
    # A row's greatest logit is -inf where nothing is left; NaN and +inf carry through a maximum too.
    if not torch.isfinite(best.values).all():
        raise DecodingFailed("the model's logits hold NaN or infinity; its weights or its input are broken, and nothing was written")
    chosen = best.indices.tolist()
    for row, (sampling, number) in enumerate(zip(samplings, numbers, strict=True)):
        if sampling.temperature > 0:
            scores = filtered(logits_NV[row], sampling)
            chosen[row] = int((scores - _log_exponential(sampling.seed, number, scores)).argmax())
    return chosen


def filtered(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits over the temperature, -inf outside of top_k and top_p."""
    scores = logits_V / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ordered, at = scores.sort(descending=True)
        probabilities = ordered.softmax(0)
        is_beyond = probabilities.cumsum(0) - probabilities >= sampling.top_p  # the likeliest never is
        scores = scores.masked_fill(torch.zeros_like(is_beyond).scatter_(0, at, is_beyond), -torch.inf)
    return scores


def _log_exponential(seed: int, number: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """log E of exponential noise E; -log E is Gumbel noise."""
    generator = torch.Generator(like.device).manual_seed(_mixed(seed, *number))
    return torch.empty_like(like).exponential_(generator=generator).log_()


def _mixed(*numbers: int) -> int:
    """One seed of several numbers: neighbours give unrelated seeds. Source: splitmix64's finaliser (Steele et al., 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
