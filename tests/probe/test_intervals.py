import numpy as np
import pytest
from scipy import stats

from polyvit_fast.probe.intervals import NORMAL, STUDENT, Estimate, bootstrap, mean_of_draws, wilson


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (1, 2), (45, 60), (999, 1000)])
def test_wilsons_interval_is_scipys(right, count):
    theirs = stats.binomtest(right, count).proportion_ci(0.95, "wilson")
    assert wilson(right, count) == pytest.approx((right / count, theirs.low, theirs.high), abs=1e-6)


def test_quantiles_are_scipys():
    assert pytest.approx(stats.norm.ppf(0.975), abs=1e-6) == NORMAL
    assert STUDENT[1:] == pytest.approx(stats.t.ppf(0.975, np.arange(1, 10)), abs=1e-3)


def test_the_mean_of_draws_has_students_interval():
    values = [0.5, 0.7, 0.4, 0.6]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert mean_of_draws(values) == pytest.approx((0.55, low, high), abs=1e-4)
    assert np.isnan(mean_of_draws([0.5]).low)


def test_resampling_an_accuracy_gives_about_wilsons_interval():
    right = np.arange(200) < 150
    found, exact = bootstrap(lambda chosen: right[chosen].mean(), 200, 0), wilson(150, 200)
    assert found.value == 0.75
    assert found == pytest.approx(exact, abs=0.02)
    assert found == bootstrap(lambda chosen: right[chosen].mean(), 200, 0)


def test_an_estimate_reads_well():
    assert str(Estimate(0.5, 0.25, 0.75)) == "0.5000 [0.2500, 0.7500]"
