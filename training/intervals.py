"""Bootstrap confidence intervals of means, and of the difference between two methods on the same objects."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """
    A mean with its confidence interval.

    Args:
        mean: nan if there is no value.
        low, high: nan if there are too few values, or clusters, for an interval.
        count: of the values.
    """

    mean: float
    low: float
    high: float
    count: int


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, clusters: Sequence[Hashable] | None = None, *, seed: int = 0
) -> Interval:
    """
    The mean of a - b with its 95 % interval: two methods on the same objects, resampled together.

    Args:
        a: (N,), a metric of one method.
        b: (N,), of the other, in the same order. Pairs of which one has no value (nan) are left out.
        clusters: (N,), what belongs together, as in `mean_interval`.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if len(a) != len(b):
        raise ValueError(
            f"Expected values of the same objects, got {len(a)} and {len(b)} of them: match them by name."
        )
    return mean_interval(a - b, clusters, seed=seed)


def mean_interval(values: ArrayLike, clusters: Sequence[Hashable] | None = None, *, seed: int = 0) -> Interval:
    """
    The mean with its 95 % interval, by the bias-corrected and accelerated bootstrap (Efron 1987) of scipy.

    Args:
        values: (N,); nan where there is none, which is left out.
        clusters: (N,), such as patients or sequences: whole clusters are resampled, as what belongs together is not
            independent and would feign precision. Every value by itself by default.
        seed: of the resampling.
    """
    given = np.asarray(values, dtype=float)
    if clusters is not None and len(clusters) != len(given):
        raise ValueError(f"Expected a cluster for each of {len(given)} values, got {len(clusters)}.")
    has_value = ~np.isnan(given)
    names = np.arange(len(given)) if clusters is None else np.unique(np.array(clusters), return_inverse=True)[1]
    _, cluster = np.unique(names[has_value], return_inverse=True)
    known = given[has_value]
    sums, counts = np.bincount(cluster, known), np.bincount(cluster)
    mean = float(known.mean()) if len(known) else math.nan
    if len(sums) < 2:
        return Interval(mean, math.nan, math.nan, len(known))
    if np.allclose(sums / counts, mean, rtol=1e-12, atol=1e-12):  # every resample has the same mean
        return Interval(mean, mean, mean, len(known))

    from scipy.stats import bootstrap

    interval = bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        n_resamples=RESAMPLES,
        batch=max(1, 2**17 // len(sums)),  # whose values fit into a cache
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(interval.low), float(interval.high), len(known))
