"""
Metrics of probabilities and uncertainties: are the probabilities as right as they say, does the uncertainty rank the
errors? Pure functions on arrays of pixels.

Over a whole image nearly every pixel is background that nobody could get wrong, and its share would decide the value.
So what counts are the pixels of the target's box with its sides a quarter longer at either end, the same ones for
every method and prompt, and the whole image if the target is empty.

A mask without errors, or without a right pixel, leaves the uncertainty nothing to rank: the areas under its curves are
then nan, as they are without an uncertainty. Calibration error and Brier score always have a value.
"""

import math

import numpy as np

from imedsam.training.metrics import box_from_mask

CALIBRATION_METRICS = ("ece", "brier", "uncertainty_auroc", "confidence_auroc", "retention_auc")
NUM_BINS = 15
# The box's sides grow by this share of their length at either end, and by a pixel at least.
REGION_MARGIN = 0.25
RETENTION_LEVELS = np.linspace(0, 1, 101)


def calibration_metrics(
    probability: np.ndarray, target: np.ndarray, uncertainty: np.ndarray | None = None
) -> dict[str, float]:
    """
    Metrics of one mask's probabilities, within the region around the target.

    `ece` is the expected calibration error, the mean over pixels of |mean probability - share of foreground| in the
    pixel's bin of 15 (Naeini et al. 2015), `brier` the mean squared difference between probability and target.
    `uncertainty_auroc` is the probability that a wrong pixel is more uncertain than a right one (0.5 by chance),
    `confidence_auroc` the same of the ranking that the probability gives by itself, by its nearness to 0.5, and
    `retention_auc` the area under the error-retention curve of the uncertainty: smaller with fewer errors and with a
    better ranking.

    Args:
        probability: (H, W), of the foreground; the mask is where it is above 0.5.
        target: (H, W), boolean.
        uncertainty: (H, W), of any unit.

    Raises:
        ValueError: if the shapes differ, a probability is not in [0, 1] or an uncertainty is nan.
    """
    _check_maps(probability, target, uncertainty)
    region = region_around(target)
    probability, target = probability[region].ravel().astype(np.float64), target[region].ravel()
    errors = (probability > 0.5) != target
    metrics = {
        "ece": expected_calibration_error(probability, target),
        "brier": float(np.mean((probability - target) ** 2)),
        "uncertainty_auroc": math.nan,
        "confidence_auroc": math.nan,
        "retention_auc": math.nan,
    }
    if uncertainty is not None:
        counts = _count_from_the_most_certain(uncertainty[region].ravel(), errors)
        metrics["uncertainty_auroc"] = _auroc(*counts)
        metrics["confidence_auroc"] = error_auroc(-np.abs(probability - 0.5), errors)
        if not math.isnan(metrics["uncertainty_auroc"]):
            metrics["retention_auc"] = float(np.trapezoid(_retention(*counts), RETENTION_LEVELS))
    return metrics


def region_around(target: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns that are judged: the target's box grown by a quarter at each side; all if it is empty."""
    if not target.any():
        return slice(None), slice(None)
    x0, y0, x1, y1 = box_from_mask(target)
    margin_x, margin_y = (max(1, round(REGION_MARGIN * side)) for side in (x1 - x0, y1 - y0))
    return (
        slice(max(0, int(y0) - margin_y), int(y1) + margin_y),
        slice(max(0, int(x0) - margin_x), int(x1) + margin_x),
    )


def expected_calibration_error(probability: np.ndarray, target: np.ndarray) -> float:
    """ECE = sum_bins (pixels in the bin / pixels) |mean probability - share of foreground|."""
    predicted, observed, counts = reliability_bins(probability, target)
    filled = counts > 0
    return float(np.sum(counts[filled] * np.abs(predicted[filled] - observed[filled])) / counts.sum())


def reliability_bins(probability: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Mean probability, share of foreground and number of pixels in each of 15 equal bins of the probability, (15,) each;
    nan in empty bins.

    Args:
        probability: (N,), in [0, 1].
        target: (N,), boolean.
    """
    import torch
    from monai.metrics.calibration import calibration_binning  # takes seconds to load

    bins = calibration_binning(
        torch.from_numpy(np.asarray(probability, dtype=np.float32))[None, None],
        torch.from_numpy(np.asarray(target, dtype=np.float32))[None, None],
        num_bins=NUM_BINS,
    )
    predicted, observed, counts = (values[0, 0].double().numpy() for values in bins)
    return predicted, observed, counts


def error_auroc(uncertainty: np.ndarray, errors: np.ndarray) -> float:
    """
    The probability that an error is more uncertain than a right pixel, ties counting half: the area under the ROC
    curve of finding errors by uncertainty.

    Args:
        uncertainty: (N,).
        errors: (N,), boolean.
    """
    return _auroc(*_count_from_the_most_certain(uncertainty, errors))


def error_retention_curve(uncertainty: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """
    The share of pixels that are wrong if only the most certain ones are kept, and an expert corrects the others
    (Malinin et al. 2021): from 0 with none kept to the error rate with all. Ties are kept in random order, on average.

    Args:
        uncertainty: (N,).
        errors: (N,), boolean.

    Returns:
        (101,), for the shares 0, 0.01, ..., 1 that are kept.
    """
    return _retention(*_count_from_the_most_certain(uncertainty, errors))


def _check_maps(probability: np.ndarray, target: np.ndarray, uncertainty: np.ndarray | None) -> None:
    for name, values in {"probability": probability, "uncertainty": uncertainty}.items():
        if values is not None and values.shape != target.shape:
            raise ValueError(
                f"`{name}` and `target` must have one shape (H, W), got {values.shape} and {target.shape}."
            )
    if not ((probability >= 0) & (probability <= 1)).all():  # nor is nan
        raise ValueError(
            f"`probability` must be in [0, 1], got values from {probability.min():g} to {probability.max():g}: "
            "take the sigmoid of logits, and a hundredth of percentages."
        )
    if uncertainty is not None and np.isnan(uncertainty).any():
        raise ValueError(
            f"`uncertainty` must be a number everywhere, got nan at {np.isnan(uncertainty).sum()} of "
            f"{uncertainty.size} pixels: leave it out if there is none."
        )


def _count_from_the_most_certain(uncertainty, errors):
    """How many pixels, and how many wrong ones, are at most as uncertain as each value that occurs; from 0 on."""
    order = np.argsort(uncertainty)
    ends = np.flatnonzero(np.diff(uncertainty[order], append=np.inf)) + 1  # of each group of ties
    return np.append(0, ends), np.append(0, np.cumsum(errors[order])[ends - 1])


def _auroc(kept, wrong):
    pairs = wrong[-1] * (kept[-1] - wrong[-1])
    return float(1 - np.trapezoid(wrong, kept - wrong) / pairs) if pairs else math.nan


def _retention(kept, wrong):
    return np.interp(RETENTION_LEVELS, kept / kept[-1], wrong / kept[-1])
