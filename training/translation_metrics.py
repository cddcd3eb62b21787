"""
PSNR, SSIM and NRMSE of slices of a translated contrast, with intervals.

SAM-I2I's paper does not define them, but its tables say something: PSNR + 20 log10(NRMSE) is the same in all rows of a
target contrast, to 0.1 dB, and is not 0. So NRMSE is the root mean squared error over a magnitude of the target, here
its root mean square as in scikit-image's default, and not over the range that PSNR has. Which SSIM it is, is not said:
this is that of Wang et al. (2004).
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from imedsam.training.intervals import Interval, mean_interval

TRANSLATION_METRICS = ("psnr", "ssim", "nrmse")
HIGHEST_PSNR = 100.0  # a perfect reconstruction's, so that means are finite
SSIM_WINDOW = 11


def slice_metrics(reconstruction: Tensor, labels: Tensor) -> dict[str, float]:
    """
    Of a slice and what it should be, both (H, W) in [0, 1].

    `psnr` is -10 log10 of the mean squared error, in dB, at most 100, which is what a perfect reconstruction has.

    `ssim` has Gaussian windows of 11 x 11 pixels and a standard deviation of 1.5, population covariances, K1 = 0.01,
    K2 = 0.03, and is the mean over the windows inside of the slice: `skimage.metrics.structural_similarity` with
    `data_range=1, gaussian_weights=True, use_sample_covariance=False`. It is nan for a slice smaller than a window.

    `nrmse` is the root mean squared error over the labels' root mean square, as is scikit-image's default; nan if the
    labels are all 0.

    Raises:
        ValueError: other shapes than one and the same (H, W).
    """
    if reconstruction.ndim != 2 or reconstruction.shape != labels.shape:
        raise ValueError(
            f"Expected two slices of one shape (height, width), got {tuple(reconstruction.shape)} and "
            f"{tuple(labels.shape)}: pass them one by one, without padding."
        )
    given, true = reconstruction.detach().cpu().double(), labels.cpu().double()
    error = (given - true).square().mean().item()
    power = true.square().mean().item()
    return {
        "psnr": min(-10 * math.log10(error), HIGHEST_PSNR) if error else HIGHEST_PSNR,
        "ssim": _ssim(given, true),
        "nrmse": math.sqrt(error / power) if power else math.nan,
    }


def mean_metrics(
    rows: Sequence[Mapping[str, float]], patients: Sequence[Hashable], *, seed: int = 0
) -> dict[str, Interval]:
    """
    The mean of each metric over all slices that have a value, with its 95 % interval.

    Args:
        rows: of `slice_metrics`.
        patients: whose each slice is: intervals resample whole patients.
        seed: of the resampling.
    """
    return {key: mean_interval([row[key] for row in rows], patients, seed=seed) for key in TRANSLATION_METRICS}


def _ssim(given: Tensor, true: Tensor) -> float:
    if min(true.shape) < SSIM_WINDOW:
        return math.nan

    from monai.metrics.regression import SSIMMetric  # takes seconds to load

    metric: Any = SSIMMetric(spatial_dims=2, data_range=1.0, win_size=SSIM_WINDOW)
    return metric(given[None, None], true[None, None]).item()
