"""Metrics and floors for binary masks: pure functions on boolean (H, W) arrays, and a table that collects them.

Metrics of overlap count pixels, those of surfaces measure distances between the masks' boundaries, in the unit of
`spacing`. Empty masks, where the usual formulas have no value:

| prediction, target | Dice, IoU, precision, recall | volume difference | HD, HD95, average distance | surface Dice |
|--------------------|------------------------------|-------------------|----------------------------|--------------|
| both empty         | 1                            | 0                 | 0                          | 1            |
| one of them empty  | 0                            | 1                 | the image's diagonal       | 0            |

The diagonal is more than any two pixels are apart. Probabilities and uncertainties: see `calibration`.

The floors are what a box alone is worth: the box filled, the ellipse inscribed in it, and Otsu's threshold inside it.
A box is (x0, y0, x1, y1) in pixel-edge coordinates: (0, 0) is the top-left corner of the image and (W, H) the
bottom-right one. A pixel belongs to a shape if its centre (column + 0.5, row + 0.5) does.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

OVERLAP_METRICS = ("dice", "iou", "precision", "recall", "volume_difference")
SURFACE_METRICS = ("hd", "hd95", "asd", "nsd")


def segmentation_metrics(
    prediction: np.ndarray,
    target: np.ndarray,
    spacing: tuple[float, float] = (1.0, 1.0),
    tolerance: float = 1.0,
) -> dict[str, float]:
    """All metrics of one mask: those of `overlap_metrics` and of `surface_metrics`."""
    return {**overlap_metrics(prediction, target), **surface_metrics(prediction, target, spacing, tolerance)}


def overlap_metrics(prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """
    Of prediction A and target B, both (H, W), boolean: `dice`, `iou`, `precision` = |A and B| / |A| and `recall` =
    |A and B| / |B| in [0, 1], and `volume_difference` = ||A| - |B|| / |B|.

    Raises:
        ValueError: if the shapes differ or are not (H, W).
        TypeError: if a mask is not boolean.
    """
    _check_masks(prediction, target)
    common, predicted, true = (int(np.count_nonzero(mask)) for mask in (prediction & target, prediction, target))
    empty = float(predicted == true)  # what a share of nothing counts
    return {
        "dice": dice(prediction, target),
        "iou": iou(prediction, target),
        "precision": common / predicted if predicted else empty,
        "recall": common / true if true else empty,
        "volume_difference": abs(predicted - true) / true if true else 1 - empty,
    }


def surface_metrics(
    prediction: np.ndarray,
    target: np.ndarray,
    spacing: tuple[float, float] = (1.0, 1.0),
    tolerance: float = 1.0,
) -> dict[str, float]:
    """
    Distances between the boundaries of two masks, in the unit of `spacing`.

    `hd` is Hausdorff's distance, the largest one from a boundary pixel of either mask to the nearest of the other,
    between their centres; `hd95` the larger one of the two directions' 95th percentiles; `asd` the mean over both
    directions. `nsd` is the surface Dice (Nikolov et al. 2018), the share of both boundaries' length that is within
    `tolerance` of the other; there a boundary runs between pixels, as in DeepMind's `surface-distance`.

    Args:
        prediction: (H, W), boolean.
        target: (H, W), boolean.
        spacing: height and width of a pixel, in array order (row, column): ones for pixels, else millimetres.
        tolerance: in the unit of `spacing`.

    Raises:
        ValueError: if the shapes differ or are not (H, W), a spacing is not positive or the tolerance negative.
        TypeError: if a mask is not boolean.
    """
    check_distances(spacing, tolerance)
    distances, _ = _surface_distances(prediction, target, spacing)
    if distances is None:
        worst = _distance_without_boundary(prediction, target, spacing)
        return {"hd": worst, "hd95": worst, "asd": worst, "nsd": float(worst == 0)}
    elements, lengths = _surface_distances(prediction, target, spacing, between_pixels=True)
    near = sum(length[distance <= tolerance].sum() for distance, length in zip(elements, lengths, strict=True))
    return {
        "hd": float(max(distance.max() for distance in distances)),
        "hd95": float(max(np.percentile(distance, 95) for distance in distances)),
        "asd": float(np.concatenate(distances).mean()),
        "nsd": float(near / sum(length.sum() for length in lengths)),
    }


def dice(prediction: np.ndarray, target: np.ndarray) -> float:
    """Dice = 2 |A and B| / (|A| + |B|)."""
    _check_masks(prediction, target)
    total = prediction.sum() + target.sum()
    return float(2 * (prediction & target).sum() / total) if total else 1.0


def iou(prediction: np.ndarray, target: np.ndarray) -> float:
    """Intersection over union = |A and B| / |A or B|."""
    _check_masks(prediction, target)
    union = (prediction | target).sum()
    return float((prediction & target).sum() / union) if union else 1.0


def hausdorff_distance(
    prediction: np.ndarray,
    target: np.ndarray,
    percentile: float | None = None,
    spacing: tuple[float, float] = (1.0, 1.0),
) -> float:
    """
    `hd` of `surface_metrics`, or another percentile of the distances from one boundary to the other, in [0, 100]; the
    larger of the two directions.
    """
    distances, _ = _surface_distances(prediction, target, spacing)
    if distances is None:
        return _distance_without_boundary(prediction, target, spacing)
    return float(max(np.percentile(distance, 100 if percentile is None else percentile) for distance in distances))


def filled_box(mask_shape: tuple[int, int], box: Sequence[float]) -> np.ndarray:
    """The box as a boolean mask of shape `mask_shape` (H, W)."""
    x, y = _box_frame(mask_shape, box)
    return (np.abs(x) <= 1) & (np.abs(y) <= 1)


def inscribed_ellipse(mask_shape: tuple[int, int], box: Sequence[float]) -> np.ndarray:
    """The ellipse that touches the box's four sides, as a boolean mask of shape `mask_shape` (H, W)."""
    x, y = _box_frame(mask_shape, box)
    return x**2 + y**2 <= 1


def otsu_in_box(image: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """Otsu's threshold of the grey values inside the box; the foreground is the side less like the surroundings.

    The surroundings are the ring between the box and the box grown by 20 % of its width and height (at least by the
    next pixel on every side), clipped to the image. Where nothing of a ring is left, they are the pixels along the
    box's own sides. A box of one grey value is all foreground.

    Args:
        image: (H, W) grey or (H, W, C), whose channels are averaged.
        box: (x0, y0, x1, y1) in pixel-edge coordinates.

    Returns:
        (H, W), boolean, false outside the box.
    """
    if image.ndim not in (2, 3):
        raise ValueError(f"`image` must have shape (H, W) or (H, W, C), got {image.shape}.")
    grey = image.astype(np.float64)
    grey = grey.mean(axis=-1) if grey.ndim == 3 else grey

    inside = filled_box(grey.shape, box)
    if not inside.any():
        raise ValueError(f"`box` {tuple(box)} contains no pixel of an image of (height, width) {grey.shape}.")
    if np.ptp(grey[inside]) == 0:
        return inside
    above = inside & (grey >= _otsu_threshold(grey[inside]))
    below = inside & ~above

    surroundings = grey[_ring(inside, box)].mean()
    contrast_above = abs(grey[above].mean() - surroundings)
    contrast_below = abs(grey[below].mean() - surroundings)
    return above if contrast_above >= contrast_below else below


def box_from_mask(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The tightest box around a mask: (xmin, ymin, xmax + 1, ymax + 1), the outer edges of its extreme pixels."""
    _check_masks(mask, mask)
    rows, columns = np.nonzero(mask)
    if not rows.size:
        raise ValueError("An empty mask has no box: check `mask.any()` first.")
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


class MetricTable:
    """Collects the metrics of many masks.

    Every entry of `rows` is a dictionary with the mask's `name` and its metrics, as they were added. A metric without
    a value is nan, and left out of means and deviations; they are nan if no row has a value.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, metrics: Mapping[str, float]) -> None:
        """Append a row; every row must have the same metrics as the first."""
        if self.rows and set(metrics) != set(self._keys()):
            raise ValueError(f"{name!r} has the metrics {sorted(metrics)}, the rows so far {sorted(self._keys())}.")
        self.rows.append({"name": name, **metrics})

    def mean(self) -> dict[str, float]:
        return self._reduce(np.mean)

    def std(self) -> dict[str, float]:
        """Standard deviation over the rows (divided by their number, not by one less)."""
        return self._reduce(np.std)

    def count(self) -> dict[str, int]:
        """How many rows have a value."""
        return {key: len(self._values(key)) for key in self._keys()}

    def column(self, key: str) -> np.ndarray:
        """A metric of all rows, (N,), nan where it has no value."""
        return np.array([row[key] for row in self.rows], dtype=float)

    def _reduce(self, function) -> dict[str, float]:
        values = {key: self._values(key) for key in self._keys()}
        return {key: float(function(value)) if len(value) else math.nan for key, value in values.items()}

    def _keys(self) -> list[str]:
        return [key for key in self.rows[0] if key != "name"] if self.rows else []

    def _values(self, key: str) -> np.ndarray:
        column = self.column(key)
        return column[~np.isnan(column)]


def _surface_distances(prediction, target, spacing, between_pixels=False):
    """
    The distances from the prediction's boundary to the target's and from there back, (N,) and (M,), None if a mask is
    empty; and, where boundaries run between pixels, the length that each of their elements stands for.
    """
    _check_masks(prediction, target)
    check_distances(spacing)
    if not (prediction.any() and target.any()):
        return None, None

    import torch
    from monai.metrics.utils import get_edge_surface_distance  # takes seconds to load

    with warnings.catch_warnings():
        # MONAI 1.6 warns of a deprecated argument that it passes itself.
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        edges, distances, areas = get_edge_surface_distance(
            torch.from_numpy(np.ascontiguousarray(prediction)),
            torch.from_numpy(np.ascontiguousarray(target)),
            spacing=[float(length) for length in spacing],
            use_subvoxels=between_pixels,
            symmetric=True,
        )
    lengths = [area[edge].numpy() for area, edge in zip(areas, edges, strict=True)] if between_pixels else None
    return [distance.numpy() for distance in distances], lengths


def _distance_without_boundary(prediction, target, spacing):
    return float(np.hypot(*np.multiply(target.shape, spacing))) if prediction.any() or target.any() else 0.0


def check_distances(spacing: Sequence[float], tolerance: float = 0.0) -> None:
    """
    Raises:
        ValueError: a spacing (height, width) that is not positive, or a negative tolerance.
    """
    if len(spacing) != 2 or not all(length > 0 for length in spacing):
        got = tuple(float(length) for length in spacing)
        raise ValueError(f"`spacing` must be two positive numbers (height, width), got {got}.")
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` must be a distance from 0 on, got {tolerance}.")


def _check_masks(prediction: np.ndarray, target: np.ndarray) -> None:
    if prediction.shape != target.shape or prediction.ndim != 2:
        raise ValueError(
            f"`prediction` and `target` must have one shape (H, W), got {prediction.shape} and {target.shape}."
        )
    for mask in (prediction, target):
        if mask.dtype != bool:
            raise TypeError(f"Masks must be boolean, got {mask.dtype}: threshold first, as in `probabilities > 0.5`.")


def _box_frame(mask_shape: tuple[int, ...], box: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The pixel centres' x (1, W) and y (H, 1) in the box's own frame, where its sides are at -1 and 1."""
    x0, y0, x1, y1 = (float(edge) for edge in box)
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"`box` must be (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {(x0, y0, x1, y1)}.")
    height, width = mask_shape
    x = (np.arange(width) + 0.5 - (x0 + x1) / 2) / ((x1 - x0) / 2)
    y = (np.arange(height) + 0.5 - (y0 + y1) / 2) / ((y1 - y0) / 2)
    return x[None, :], y[:, None]


def _ring(inside: np.ndarray, box: Sequence[float]) -> np.ndarray:
    x0, y0, x1, y1 = box
    margin_x, margin_y = max(0.1 * (x1 - x0), 1.0), max(0.1 * (y1 - y0), 1.0)
    ring = filled_box(inside.shape, (x0 - margin_x, y0 - margin_y, x1 + margin_x, y1 + margin_y)) & ~inside
    if ring.any():
        return ring
    rows, columns = np.nonzero(inside)
    sides = np.zeros_like(inside)
    sides[[rows.min(), rows.max()], :] = True
    sides[:, [columns.min(), columns.max()]] = True
    return sides & inside


def _otsu_threshold(values: np.ndarray, bins: int = 256) -> float:
    """The grey value that separates two classes with the largest variance between them (Otsu 1979, equation 18)."""
    counts, edges = np.histogram(values, bins=bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts)[:-1], counts.sum() - np.cumsum(counts)[:-1]
    sums = np.cumsum(counts * centres)
    mean_below = sums[:-1] / np.maximum(below, 1)
    mean_above = (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(edges[1 + np.argmax(below * above * (mean_above - mean_below) ** 2)])
