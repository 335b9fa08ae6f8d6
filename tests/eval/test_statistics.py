"""Intervals against scipy and hand-worked cases; summaries that add up."""

import numpy as np
import pytest
from scipy import stats

from eval.statistics import bootstrap_mean_interval, per_task, summarise, wilson_interval


def chain(solved, error=None, failed_task="open_drawer", happened=()):
    attempts = [{"task": "lift", "success": True, "steps": 10 * (i + 1), "happened": []} for i in range(solved)]
    if solved < 5:
        attempts.append({"task": failed_task, "success": False, "steps": 360, "happened": list(happened)})
    return {"num_solved": solved, "error": error, "attempts": attempts}


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (1, 1), (3, 10), (73, 100), (1000, 1000), (499, 1000)])
def test_wilson_agrees_with_scipy(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson_interval(successes, trials), (expected.low, expected.high), atol=1e-12)


def test_wilson_by_hand():
    # 1 of 4: centre (0.25 + 3.8415/8) / (1 + 3.8415/4), half sqrt(0.25*0.75/4 + 3.8415/64) * 1.96 / (1 + 3.8415/4).
    np.testing.assert_allclose(wilson_interval(1, 4), (0.0456, 0.6994), atol=1e-4)


def test_wilson_refuses_nonsense():
    with pytest.raises(ValueError, match="0 successes of 0 trials"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="5 successes of 4 trials"):
        wilson_interval(5, 4)


def test_bootstrap_agrees_with_resampling_by_hand_and_is_seeded():
    values = np.random.default_rng(0).integers(0, 6, 200)
    random = np.random.default_rng(1)
    means = [random.choice(values, len(values)).mean() for _ in range(4000)]
    np.testing.assert_allclose(bootstrap_mean_interval(values, seed=3), np.percentile(means, (2.5, 97.5)), atol=0.03)
    assert bootstrap_mean_interval(values, seed=3) == bootstrap_mean_interval(values, seed=3)
    assert bootstrap_mean_interval([2, 2, 2], seed=0) == (2.0, 2.0)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean_interval([], seed=0)


def test_summary_by_hand():
    summary = summarise([chain(n) for n in (0, 1, 1, 3, 5)], seed=0)
    assert summary["average_length"] == 2.0
    assert summary["success_rate"] == [0.8, 0.4, 0.4, 0.2, 0.2]
    assert sum(summary["success_rate"]) == pytest.approx(summary["average_length"])
    low, high = summary["ci95"]["average_length"]
    assert low < 2 < high
    assert len(summary["ci95"]["success_rate"]) == 5


def test_errors_are_no_failures():
    summary = summarise([chain(5), chain(0, error={"type": "RuntimeError"})], seed=0)
    assert (summary["scored"], summary["errors"], summary["average_length"]) == (1, 1, 5.0)
    assert "open_drawer" not in summary["per_task"]
    nothing = summarise([chain(0, error={})], seed=0)
    assert (nothing["scored"], nothing["average_length"], nothing["success_rate"], nothing["ci95"]) == (0, None, None, None)


def test_per_task_counts_and_what_happened_instead():
    table = per_task([chain(2), chain(0, happened=["move_slider_left"]), chain(5)])
    assert (table["open_drawer"]["attempts"], table["open_drawer"]["successes"], table["open_drawer"]["mean_steps"]) == (2, 0, None)
    assert table["open_drawer"]["happened_instead"] == {"move_slider_left": 1}
    assert (table["lift"]["attempts"], table["lift"]["rate"]) == (7, 1.0)
    assert table["lift"]["mean_steps"] == pytest.approx((10 + 20 + 10 + 20 + 30 + 40 + 50) / 7)


def test_chains_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="does not add up"):
        summarise([chain(5) | {"num_solved": 6}], seed=0)
