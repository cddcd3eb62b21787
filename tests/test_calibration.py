"""Probabilities and uncertainties on few enough pixels to count by hand, and against scipy and MONAI."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_roc_auc
from monai.metrics.calibration import CalibrationErrorMetric
from scipy.stats import mannwhitneyu

from imedsam.training.calibration import (
    RETENTION_LEVELS,
    calibration_metrics,
    error_auroc,
    error_retention_curve,
    expected_calibration_error,
    region_around,
    reliability_bins,
)


def box_mask(shape, rows, columns):
    mask = np.zeros(shape, dtype=bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def test_hand_counted_calibration():
    # In the bin around 0.9, 3 of 4 pixels are foreground; in that around 0.1 none of 2; in that around 0.5 all of 2.
    probability = np.array([0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.5, 0.5])
    target = np.array([1, 1, 1, 0, 0, 0, 1, 1], dtype=bool)
    expected = (4 * abs(0.9 - 3 / 4) + 2 * 0.1 + 2 * 0.5) / 8
    assert expected_calibration_error(probability, target) == pytest.approx(expected)
    predicted, observed, counts = reliability_bins(probability, target)
    assert counts[[1, 7, 13]].tolist() == [2, 2, 4] and counts.sum() == 8
    np.testing.assert_allclose(observed[[1, 7, 13]], [0, 1, 0.75])
    np.testing.assert_allclose(predicted[[1, 7, 13]], [0.1, 0.5, 0.9], rtol=1e-6)
    assert np.isnan(predicted[0])


def test_probabilities_that_are_frequencies_are_calibrated():
    rng = np.random.default_rng(0)
    probability = rng.random(100_000)
    target = rng.random(100_000) < probability
    assert expected_calibration_error(probability, target) < 0.01
    assert expected_calibration_error(probability**3, target) > 0.1
    metric = CalibrationErrorMetric(num_bins=15)
    metric(torch.from_numpy(probability**3).float()[None, None], torch.from_numpy(target).float()[None, None])
    assert expected_calibration_error(probability**3, target) == pytest.approx(metric.aggregate().item(), rel=1e-4)


def test_the_region_is_the_box_grown_by_a_quarter():
    target = box_mask((40, 60), (10, 18), (20, 40))
    assert region_around(target) == (slice(8, 20), slice(15, 45))
    assert region_around(box_mask((40, 60), (0, 2), (0, 2))) == (slice(0, 3), slice(0, 3))  # a pixel at least
    assert target[region_around(box_mask((40, 60), (39, 40), (50, 60)))].shape == (2, 12)  # within the image
    assert target[region_around(np.zeros((40, 60), bool))].shape == (40, 60)


def test_only_the_region_counts():
    target = box_mask((40, 60), (10, 18), (20, 40))
    probability, uncertainty = np.full((40, 60), 0.2), np.zeros((40, 60))
    probability[target] = 0.9
    metrics = calibration_metrics(probability, target, uncertainty)
    outside = np.ones_like(target)
    outside[region_around(target)] = False
    probability[outside], uncertainty[outside] = 0.7, 3.0
    assert calibration_metrics(probability, target, uncertainty) == pytest.approx(metrics, nan_ok=True)
    share = 160 / 360
    assert metrics["brier"] == pytest.approx(share * 0.01 + (1 - share) * 0.04)
    assert metrics["ece"] == pytest.approx(share * 0.1 + (1 - share) * 0.2)


def test_hand_counted_ranking():
    uncertainty = np.array([0.0, 1.0, 2.0, 2.0])
    errors = np.array([False, True, False, True])
    # Of the four pairs of an error with a right pixel: 1 > 0, 2 > 0 and 2 = 2 is a half; 1 < 2.
    assert error_auroc(uncertainty, errors) == 2.5 / 4
    curve = error_retention_curve(uncertainty, errors)
    # Half of the two at 2.0 are wrong: their errors come evenly.
    np.testing.assert_allclose(curve[[0, 25, 50, 75, 100]], [0, 0, 0.25, 0.375, 0.5], atol=1e-12)
    assert math.isnan(error_auroc(uncertainty, np.zeros(4, bool)))
    assert math.isnan(error_auroc(uncertainty, np.ones(4, bool)))


@pytest.mark.parametrize("decimals", [1, 12])  # with many ties, and with none
def test_ranking_agrees_with_mann_whitney_and_monai(decimals):
    rng = np.random.default_rng(0)
    errors = rng.random(500) < 0.2
    uncertainty = (rng.random(500) + 0.3 * errors).round(decimals)
    auroc = error_auroc(uncertainty, errors)
    assert 0.6 < auroc < 0.9
    statistic = mannwhitneyu(uncertainty[errors], uncertainty[~errors]).statistic
    assert auroc == pytest.approx(statistic / (errors.sum() * (~errors).sum()))
    assert auroc == pytest.approx(compute_roc_auc(torch.from_numpy(uncertainty), torch.from_numpy(errors).long()))
    assert error_auroc(-uncertainty, errors) == pytest.approx(1 - auroc)


def test_retention_between_the_best_order_and_chance():
    rng = np.random.default_rng(0)
    errors = rng.random(2000) < 0.1
    rate = errors.mean()
    best, worst = error_retention_curve(errors * 1.0, errors), error_retention_curve(~errors * 1.0, errors)
    np.testing.assert_allclose(best, np.maximum(0, RETENTION_LEVELS - (1 - rate)), atol=0.01 * rate + 1e-3)
    np.testing.assert_allclose(worst, np.minimum(RETENTION_LEVELS, rate), atol=1e-3)
    same = error_retention_curve(np.zeros(2000), errors)
    np.testing.assert_allclose(same, RETENTION_LEVELS * rate, atol=1e-12)
    order = rng.permutation(2000)
    np.testing.assert_array_equal(error_retention_curve(np.zeros(2000), errors[order]), same)


def test_what_the_metrics_rank():
    rng = np.random.default_rng(0)
    target = box_mask((20, 20), (5, 15), (5, 15))
    probability = np.clip(np.where(target, 0.7, 0.3) + rng.normal(0, 0.2, target.shape), 0, 1)
    errors = (probability > 0.5) != target
    metrics = calibration_metrics(probability, target, errors + 0.5)
    assert metrics["uncertainty_auroc"] == 1 and 0.5 < metrics["confidence_auroc"] < 1
    by_confidence = calibration_metrics(probability, target, probability * (1 - probability))
    assert by_confidence["uncertainty_auroc"] == pytest.approx(by_confidence["confidence_auroc"])
    assert metrics["retention_auc"] < by_confidence["retention_auc"]


PROBABILITY, TARGET = np.array([[0.9, 0.2], [0.1, 0.4]]), np.array([[True, False], [False, False]])


@pytest.mark.parametrize(
    ("probability", "uncertainty", "message"),
    [
        (PROBABILITY[:1], None, r"`probability` and `target` must have one shape \(H, W\), got \(1, 2\) and \(2, 2\)"),
        (PROBABILITY, PROBABILITY.ravel(), r"`uncertainty` and `target` must .*, got \(4,\) and \(2, 2\)"),
        (100 * PROBABILITY, None, r"in \[0, 1\], got values from 10 to 90: .* a hundredth of percentages"),
        (PROBABILITY - 0.5, None, r"in \[0, 1\], got values from -0.4 to 0.4: take the sigmoid of logits"),
        (np.where(TARGET, np.nan, PROBABILITY), None, r"in \[0, 1\], got values from nan to nan"),
        (PROBABILITY, np.where(TARGET, np.nan, PROBABILITY), "`uncertainty` must .*, got nan at 1 of 4 pixels: leave"),
    ],
)
def test_what_cannot_be_judged_is_refused(probability, uncertainty, message):
    with pytest.raises(ValueError, match=message):
        calibration_metrics(probability, TARGET, uncertainty)
    assert calibration_metrics(PROBABILITY, TARGET, PROBABILITY)["brier"] == pytest.approx(0.22 / 4)


def test_without_uncertainty_errors_or_target():
    target = box_mask((20, 20), (5, 15), (5, 15))
    ranked = ("uncertainty_auroc", "confidence_auroc", "retention_auc")
    perfect = calibration_metrics(target * 1.0, target, np.zeros(target.shape))
    assert perfect["ece"] == perfect["brier"] == 0 and all(math.isnan(perfect[key]) for key in ranked)
    assert all(math.isnan(calibration_metrics(0.3 * target, target)[key]) for key in ranked)
    nothing = np.zeros((20, 20), dtype=bool)
    assert calibration_metrics(0.1 * target, nothing, target * 1.0)["brier"] == pytest.approx(0.25 * 0.01)
