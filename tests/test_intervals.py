import math

import numpy as np
import pytest
from scipy import stats

from imedsam.training.intervals import mean_interval, paired_bootstrap


def test_against_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    interval = mean_interval(values)
    expected = stats.t.interval(0.95, df=399, loc=values.mean(), scale=stats.sem(values))
    assert interval.mean == pytest.approx(values.mean()) and interval.count == 400
    np.testing.assert_allclose((interval.low, interval.high), expected, atol=0.02)
    assert mean_interval(values) == interval != mean_interval(values, seed=1)


def test_pairs_are_resampled_together():
    rng = np.random.default_rng(0)
    easy = rng.normal(0.8, 0.2, size=100)  # how easy an image is moves both methods
    a, b = easy + rng.normal(0.02, 0.02, size=100), easy
    interval = paired_bootstrap(a, b)
    assert interval.mean == pytest.approx((a - b).mean())
    assert 0.01 < interval.low < interval.mean < interval.high < 0.03
    other_way = paired_bootstrap(b, a)
    np.testing.assert_allclose((-other_way.high, -other_way.low), (interval.low, interval.high), atol=5e-4)
    with pytest.raises(ValueError, match="Expected values of the same objects, got 100 and 99 of them"):
        paired_bootstrap(a, b[:-1])


def test_intervals_hold_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(size=40)) for _ in range(60)]
    assert 52 <= sum(interval.low < 0 < interval.high for interval in intervals) <= 60


def test_whole_clusters_are_resampled():
    rng = np.random.default_rng(0)
    values = rng.normal(size=20).repeat(10)  # ten frames of each sequence, all alike
    names = np.array([f"sequence {index:02}" for index in range(20)]).repeat(10)
    clustered, alone = mean_interval(values, names), mean_interval(values)
    assert clustered.mean == alone.mean and clustered.count == 200
    of_sequences = mean_interval(values[::10])
    np.testing.assert_allclose((clustered.low, clustered.high), (of_sequences.low, of_sequences.high), atol=1e-9)
    assert clustered.high - clustered.low > 2.5 * (alone.high - alone.low)
    # Sequences of different lengths: the mean stays that of the frames.
    uneven = mean_interval([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"])
    assert (uneven.mean, uneven.low, uneven.high) == (2, 1, 5)
    with pytest.raises(ValueError, match="Expected a cluster for each of 3 values, got 2"):
        mean_interval([1, 2, 3], ["a", "b"])


def test_values_that_are_not_there_are_left_out():
    a, b = [1.0, math.nan, 2.0, 4.0, 7.0], [0.0, 1.0, math.nan, 1.0, 2.0]
    assert paired_bootstrap(a, b) == paired_bootstrap([1.0, 4.0, 7.0], [0.0, 1.0, 2.0])
    assert paired_bootstrap(a, b).mean == 3 and paired_bootstrap(a, b).count == 3
    clusters = ["x", "y", "z", "x", "z"]
    assert paired_bootstrap(a, b, clusters) == paired_bootstrap([1, 4, 7], [0, 1, 2], ["x", "x", "z"])


def test_too_little_for_an_interval():
    nothing, one = mean_interval([math.nan]), mean_interval([2.0])
    assert math.isnan(nothing.mean) and nothing.count == 0
    assert one.mean == 2 and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(mean_interval([1.0, 3.0], ["a", "a"]).low)
    same = mean_interval([0.1, 0.1, 0.1])
    assert (same.mean, same.low, same.high) == pytest.approx((0.1, 0.1, 0.1))
