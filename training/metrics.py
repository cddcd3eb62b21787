"""Metrics and floors for binary masks: pure functions on boolean (H, W) arrays, and a table that collects them.

Empty masks, where the usual formulas have no value:

| prediction, target | Dice, IoU | Hausdorff distances                                      |
|--------------------|-----------|----------------------------------------------------------|
| both empty         | 1         | 0                                                        |
| one of them empty  | 0         | the image's diagonal, more than any two pixels are apart |

The floors are what a box alone is worth: the box filled, the ellipse inscribed in it, and Otsu's threshold inside it.
A box is (x0, y0, x1, y1) in pixel-edge coordinates: (0, 0) is the top-left corner of the image and (W, H) the
bottom-right one. A pixel belongs to a shape if its centre (column + 0.5, row + 0.5) does.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def segmentation_metrics(
    prediction: np.ndarray, target: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)
) -> dict[str, float]:
    """All metrics of one mask: `dice` and `iou` in [0, 1], `hd` and `hd95` in the unit of `spacing`."""
    return {
        "dice": dice(prediction, target),
        "iou": iou(prediction, target),
        "hd": hausdorff_distance(prediction, target, spacing=spacing),
        "hd95": hausdorff_distance(prediction, target, percentile=95, spacing=spacing),
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
    """Distance between the boundaries of two masks, measured between the centres of their boundary pixels.

    Args:
        prediction: (H, W), boolean.
        target: (H, W), boolean.
        percentile: of the distances from one boundary to the other, in [0, 100]; the larger of the two directions is
            returned. `None` is the maximum, Hausdorff's own distance; 95 is HD95.
        spacing: height and width of a pixel, in array order (row, column): ones for pixels, else millimetres.

    Raises:
        ValueError: if the shapes differ or are not (H, W), or if a spacing is not positive.
        TypeError: if a mask is not boolean.
    """
    _check_masks(prediction, target)
    if len(spacing) != 2 or not min(spacing) > 0:
        raise ValueError(f"`spacing` must be two positive numbers (row, column), got {spacing}.")
    if not (prediction.any() and target.any()):
        worst = float(np.hypot(*np.multiply(target.shape, spacing)))
        return worst if prediction.any() or target.any() else 0.0

    from monai.metrics import compute_hausdorff_distance  # takes seconds to load

    with warnings.catch_warnings():
        # MONAI 1.6 warns of a deprecated argument that it passes itself.
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        distance = compute_hausdorff_distance(
            prediction[None, None], target[None, None], include_background=True, percentile=percentile, spacing=spacing
        )
    return float(distance)


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

    Every entry of `rows` is a dictionary with the mask's `name` and its metrics, as they were added.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, metrics: Mapping[str, float]) -> None:
        """Append a row; every row must have the same metrics as the first."""
        if self.rows and set(metrics) != set(self._keys()):
            raise ValueError(f"{name!r} has the metrics {sorted(metrics)}, the rows so far {sorted(self._keys())}.")
        self.rows.append({"name": name, **metrics})

    def mean(self) -> dict[str, float]:
        return {key: float(np.mean(self._column(key))) for key in self._keys()}

    def std(self) -> dict[str, float]:
        """Standard deviation over the rows (divided by their number, not by one less)."""
        return {key: float(np.std(self._column(key))) for key in self._keys()}

    def _keys(self) -> list[str]:
        return [key for key in self.rows[0] if key != "name"] if self.rows else []

    def _column(self, key: str) -> list[float]:
        return [row[key] for row in self.rows]


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
