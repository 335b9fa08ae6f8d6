"""The law is found again where it is known, and its intervals hold it."""

import numpy as np
import pytest

from emu3_vla.training.power_law import Law, Measured, PowerLawError, fit, relative_error

KNOWN = Law(1.69, 406.4, 410.7, 0.34, 0.28)  # of Hoffmann et al.
SIZES, TOKENS = np.geomspace(4e7, 1e9, 5), np.geomspace(1e9, 4e10, 5)


def _measured(law: Law, noise: float = 0.0, sizes=SIZES, tokens=TOKENS, seed: int = 0) -> Measured:
    parameters, seen = (grid.ravel() for grid in np.meshgrid(sizes, tokens))
    loss = law(parameters, seen) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(parameters)))
    return Measured(parameters=parameters, tokens=seen, loss=loss)


@pytest.mark.parametrize("known", [KNOWN, Law(0.4, 30.0, 900.0, 0.5, 0.55), Law(2.0, 5.0, 8000.0, 0.15, 0.7)])
def test_a_known_law_is_found_again(known):
    found = fit(_measured(known), resamples=1).law
    for name in ("E", "alpha", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(known, name), rel=0.02), name
    tokens = np.array([1e10, 1e11, 1e12])
    held_out = Measured(parameters=np.full(3, 8e9), tokens=tokens, loss=known(8e9, tokens), held_out=True)
    assert relative_error(found, held_out).max() < 2e-3


def test_intervals_hold_the_law_and_what_it_predicts():
    """Half a per cent of noise; small models of the 7 billion that is predicted."""
    found = fit(_measured(KNOWN, noise=0.005), resamples=100, seed=1)
    for name, (low, high) in found.intervals().items():
        assert low <= getattr(KNOWN, name) <= high, name
    low, high = found.interval(lambda law: float(law(7e9, 4e11)))
    assert low <= KNOWN(7e9, 4e11) <= high
    assert high / low < 1.1
    assert found.law.size_exponent == pytest.approx(KNOWN.size_exponent, abs=0.12)


def test_a_run_gone_wrong_moves_the_law_little():
    """Huber: one loss half as large again among 25."""
    measured = _measured(KNOWN)
    measured.loss[7] *= 1.5
    found = fit(measured, resamples=1).law
    assert found(7e9, 4e11) == pytest.approx(KNOWN(7e9, 4e11), rel=0.01)


def test_the_gradient_is_the_objectives():
    from scipy.optimize import check_grad

    from emu3_vla.training.power_law import _Problem

    problem = _Problem(_measured(KNOWN, noise=0.01))
    point = np.array([0.1, 0.2, -0.3, 0.4, 0.25])
    scale = np.linalg.norm(problem._objective(point)[1])
    assert check_grad(lambda at: problem._objective(at)[0], lambda at: problem._objective(at)[1], point) < 1e-4 * scale


def test_the_same_seed_gives_the_same_intervals():
    measured = _measured(KNOWN, noise=0.01)
    assert fit(measured, resamples=5, seed=3) == fit(measured, resamples=5, seed=3)


def test_measurements_that_tell_nothing_are_refused():
    with pytest.raises(PowerLawError, match="have 2 different numbers of tokens; a law needs at least 3"):
        _measured(KNOWN, tokens=TOKENS[:2])
    with pytest.raises(PowerLawError, match="loss of the runs are .*nan.*, expected one finite number above 0 for each of 25"):
        _measured(KNOWN, noise=np.nan)
