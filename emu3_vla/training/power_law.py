"""How a loss falls with the size of the model and of its data: L(N, D) = E + A / N^alpha + B / D^beta.

Fitted as in approach 3 of Hoffmann et al. (arXiv 2203.15556): the logarithm of the law, a log-sum-exp, meets the logarithm of the measured
losses under a Huber loss; L-BFGS from many starts, the best end wins. N parameters, D tokens, L nats a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass

import numpy as np
from scipy.optimize import minimize

HUBER = 1e-3  # of log losses, as Hoffmann et al.: residuals beyond a thousandth count linearly
LEAST_SIZES = 3  # distinct N, and distinct D: two cannot tell an exponent from the floor
STEEPEST = 3.0  # exponents are sought within [0, this]
START_EXPONENTS = (0.1, 0.3, 0.6, 1.0)
START_SHARES = (0.25, 0.75)
"""Starts: both exponents; the floor's share of the least loss; the model's share of the rest."""
SCREENED, POLISHED = 40, 600  # iterations of every start, and of those that came far
FINALISTS = 5


class PowerLawError(ValueError):
    """Measurements that no law can be fitted to."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Runs: float64 (R,) each. parameters, tokens: above 0. loss: nats a token, above 0. held_out: to compare with, not to fit.

    Raises PowerLawError for other numbers, and for too few different ones to fit.
    """

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    held_out: bool = False

    def __post_init__(self):
        for name in ("parameters", "tokens", "loss"):
            values = getattr(self, name)
            if values.shape != self.loss.shape or not (np.isfinite(values).all() and (values > 0).all()):
                expected = f"expected one finite number above 0 for each of {len(self.loss)}"
                raise PowerLawError(f"{name} of the runs are {values.tolist()}, {expected}")
        for name in () if self.held_out else ("parameters", "tokens"):
            if (found := len(np.unique(getattr(self, name)))) < LEAST_SIZES:
                raise PowerLawError(f"the runs have {found} different numbers of {name}; a law needs at least {LEAST_SIZES}")

    def take(self, rows: np.ndarray) -> Measured:
        return Measured(parameters=self.parameters[rows], tokens=self.tokens[rows], loss=self.loss[rows])


@dataclass(frozen=True)
class Law:
    """E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Nats a token."""
        return self.E + self.A / np.asarray(parameters, float) ** self.alpha + self.B / np.asarray(tokens, float) ** self.beta

    @property
    def size_exponent(self) -> float:
        """a of N ∝ C^a, the best size for C operations, where C ∝ N·D (Hoffmann et al., equation 4)."""
        return self.beta / (self.alpha + self.beta) if self.alpha + self.beta else float("nan")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law and how sure it is. resampled: the laws of bootstrap samples of the runs."""

    law: Law
    resampled: tuple[Law, ...]

    def interval(self, of: Callable[[Law], float], level: float = 0.95) -> tuple[float, float]:
        """Where the middle `level` of the resampled laws' values lie."""
        tails = 50 * (1 - level)
        low, high = np.percentile([of(law) for law in self.resampled], [tails, 100 - tails])
        return float(low), float(high)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of each coefficient."""
        return {name: self.interval(lambda law, name=name: getattr(law, name)) for name in asdict(self.law)}


def fit(measured: Measured, *, resamples: int = 200, seed: int = 0) -> Fit:
    """The law of some runs, with `resamples` bootstrap samples of them. Raises PowerLawError."""
    problem = _Problem(measured)
    screened = sorted((problem.solve(start, SCREENED) for start in problem.starts()), key=lambda end: end[0])
    ends = sorted((problem.solve(point, POLISHED) for _, point in screened[:FINALISTS]), key=lambda end: end[0])
    best, kept = ends[0][1], [ends[0][1], screened[len(screened) // 2][1]]  # a sample's fit begins at the best law, and far from it
    random, resampled = np.random.default_rng(seed), []
    while len(resampled) < resamples:
        rows = random.integers(0, len(measured.loss), len(measured.loss))
        try:
            sample = problem.of(measured.take(rows))
        except PowerLawError:  # by chance too few different sizes: no sample of runs that anyone would have made
            continue
        resampled.append(problem.law(min((sample.solve(start, POLISHED // 4) for start in kept), key=lambda end: end[0])[1]))
    return Fit(law=problem.law(best), resampled=tuple(resampled))


class _Problem:
    """The fit in coordinates of like size: N and D over their geometric means, and logarithms of the three terms there.

    A point is (e, a, b, alpha, beta): L = exp(e) + exp(a) / n^alpha + exp(b) / d^beta.
    """

    def __init__(self, measured: Measured, centre: tuple[float, float] | None = None):
        log_n, log_d = np.log(measured.parameters), np.log(measured.tokens)
        self._centre = centre or (float(log_n.mean()), float(log_d.mean()))
        self._log_n, self._log_d = log_n - self._centre[0], log_d - self._centre[1]
        self._log_loss = np.log(measured.loss)

    def of(self, sample: Measured) -> _Problem:
        """The same coordinates, of other runs."""
        return _Problem(sample, self._centre)

    def starts(self) -> list[np.ndarray]:
        least, middle = np.exp(self._log_loss.min()), np.exp(np.median(self._log_loss))
        starts = []
        for alpha, beta, floor, part in itertools.product(START_EXPONENTS, START_EXPONENTS, START_SHARES, START_SHARES):
            rest = middle - floor * least
            starts.append(np.array([np.log(floor * least), np.log(part * rest), np.log((1 - part) * rest), alpha, beta]))
        return starts

    def solve(self, start: np.ndarray, iterations: int) -> tuple[float, np.ndarray]:
        """Where L-BFGS ends after so many iterations at most: the objective, and the point."""
        bounds = [(-20.0, None)] * 3 + [(0.0, STEEPEST)] * 2
        options = {"maxiter": iterations, "ftol": 1e-13, "gtol": 1e-7}
        end = minimize(self._objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return float(end.fun), end.x

    def law(self, point: np.ndarray) -> Law:
        e, a, b, alpha, beta = (float(value) for value in point)
        a, b = a + alpha * self._centre[0], b + beta * self._centre[1]
        return Law(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), alpha, beta)

    def _objective(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        e, a, b, alpha, beta = point
        terms = np.array([np.full_like(self._log_n, e), a - alpha * self._log_n, b - beta * self._log_d])
        most = terms.max(axis=0)
        shares = np.exp(terms - most)
        total = shares.sum(axis=0)
        residual = most + np.log(total) - self._log_loss
        near = np.abs(residual) <= HUBER
        loss = np.where(near, residual**2 / 2, HUBER * (np.abs(residual) - HUBER / 2)).mean()
        slope = np.where(near, residual, HUBER * np.sign(residual)) / len(residual)
        share = shares * (slope / total)
        gradient = np.array([*share.sum(axis=1), -(share[1] * self._log_n).sum(), -(share[2] * self._log_d).sum()])
        return loss / HUBER**2, gradient / HUBER**2  # of the size that L-BFGS's tolerances are made for


def relative_error(law: Law, measured: Measured) -> np.ndarray:
    """|predicted - measured| / measured, a run."""
    return np.abs(law(measured.parameters, measured.tokens) - measured.loss) / measured.loss


def rounded(law: Law) -> dict[str, float]:
    """Coefficients to four digits."""
    return {name: float(f"{value:.4g}") for name, value in zip(asdict(law), astuple(law), strict=True)}
