"""Metrics on masks small enough to count by hand, and against independent implementations."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import surface_distance
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_confusion_matrix_metric, compute_dice, compute_iou, get_confusion_matrix
from PIL import Image
from scipy import ndimage

from imedsam.training.metrics import (
    MetricTable,
    box_from_mask,
    dice,
    filled_box,
    hausdorff_distance,
    inscribed_ellipse,
    iou,
    otsu_in_box,
    overlap_metrics,
    segmentation_metrics,
    surface_metrics,
)


def rectangle(shape, rows, columns):
    mask = np.zeros(shape, dtype=bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def random_blobs(seed, shape=(40, 56)):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma=3)
    return noise > np.quantile(noise, 0.7)


def boundary(mask):
    """Foreground pixels with a neighbour, or the image's border, outside the mask."""
    return mask & ~ndimage.binary_erosion(mask)


def distances_between_boundaries(source, target, spacing):
    return ndimage.distance_transform_edt(~boundary(target), sampling=spacing)[boundary(source)]


SQUARE = rectangle((6, 8), (1, 3), (1, 3))  # 4 pixels
SHIFTED = rectangle((6, 8), (1, 3), (2, 5))  # 6 pixels, 2 of them in SQUARE
EMPTY = np.zeros((6, 8), dtype=bool)


def test_hand_counted_overlap():
    assert dice(SQUARE, SHIFTED) == pytest.approx(2 * 2 / (4 + 6))
    assert iou(SQUARE, SHIFTED) == pytest.approx(2 / 8)
    assert dice(SQUARE, SQUARE) == iou(SQUARE, SQUARE) == 1


def test_hand_counted_distances():
    assert hausdorff_distance(SQUARE, SHIFTED) == 2  # SHIFTED's last column is two columns right of SQUARE
    assert hausdorff_distance(SQUARE, SHIFTED, spacing=(5.0, 0.25)) == 0.5
    # From SQUARE 1, 1, 0, 0; from SHIFTED 0, 0, 1, 1, 2, 2: the larger median is 1.
    assert hausdorff_distance(SQUARE, SHIFTED, percentile=50) == 1
    assert hausdorff_distance(SQUARE, SQUARE) == 0


def test_hand_counted_metrics():
    metrics = segmentation_metrics(SQUARE, SHIFTED)
    assert (metrics["precision"], metrics["recall"]) == (2 / 4, 2 / 6)
    assert metrics["volume_difference"] == pytest.approx(2 / 6)
    # From SQUARE 1, 1, 0, 0; from SHIFTED 0, 0, 1, 1, 2, 2, over ten boundary pixels.
    assert metrics["asd"] == pytest.approx(8 / 10)
    assert (metrics["hd"], metrics["hd95"]) == (2, 2)
    assert segmentation_metrics(SQUARE, SHIFTED, spacing=(1.0, 0.5))["asd"] == pytest.approx(4 / 10)
    assert segmentation_metrics(SHIFTED, SQUARE)["volume_difference"] == pytest.approx(2 / 4)


def test_hand_counted_surface_dice():
    """A boundary's elements lie at the corners that four pixels share, one of them at least on either side."""
    one, other = rectangle((9, 12), (2, 6), (2, 6)), rectangle((9, 12), (2, 6), (4, 8))
    # Either square has 12 elements of length 1 along its sides, and 4 of 1 / sqrt(2) at its corners. On both
    # boundaries lie, above and below, three places: a corner of the one, one between, and a corner of the other.
    whole, shared = 12 + 4 / np.sqrt(2), 2 * (1 + 1 + 1 / np.sqrt(2))
    nsd = [surface_metrics(one, other, tolerance=tolerance)["nsd"] for tolerance in (0, 1, 2)]
    assert nsd[0] == pytest.approx(shared / whole, rel=1e-5)
    assert nsd[0] < nsd[1] < nsd[2] == 1
    assert surface_metrics(one, one, tolerance=0)["nsd"] == 1
    assert surface_metrics(one, other, spacing=(1.0, 0.25), tolerance=0.5)["nsd"] == 1


def test_spacing_is_in_array_order():
    one, other = rectangle((9, 9), (1, 2), (1, 2)), rectangle((9, 9), (4, 5), (5, 6))  # 3 rows and 4 columns apart
    assert hausdorff_distance(one, other) == 5
    assert hausdorff_distance(one, other, spacing=(4.0, 1.25)) == 13


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.3)])
@pytest.mark.parametrize("percentile", [None, 95])
@pytest.mark.parametrize("seed", range(4))
def test_hausdorff_agrees_with_distance_transforms(seed, percentile, spacing):
    one, other = random_blobs(seed), random_blobs(seed + 100)
    expected = max(
        np.percentile(distances_between_boundaries(one, other, spacing), percentile or 100),
        np.percentile(distances_between_boundaries(other, one, spacing), percentile or 100),
    )
    assert hausdorff_distance(one, other, percentile, spacing) == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings(
    "ignore:Please import .* from the .scipy.ndimage:DeprecationWarning"
)  # in surface_distance
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.3)])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_agree_with_surface_distance(seed, spacing):
    # Its surface runs between pixels, half a pixel from ours on either mask, and it weights by surface length.
    one, other = random_blobs(seed), random_blobs(seed + 100)
    metrics = segmentation_metrics(one, other, spacing)
    surfaces = surface_distance.compute_surface_distances(other, one, spacing)
    pixel = np.hypot(*spacing)
    assert metrics["dice"] == pytest.approx(surface_distance.compute_dice_coefficient(other, one))
    assert metrics["hd"] == pytest.approx(surface_distance.compute_robust_hausdorff(surfaces, 100), abs=pixel)
    assert metrics["hd95"] == pytest.approx(surface_distance.compute_robust_hausdorff(surfaces, 95), abs=pixel)
    assert metrics["hd95"] < metrics["hd"]
    average = np.mean(surface_distance.compute_average_surface_distance(surfaces))
    assert metrics["asd"] == pytest.approx(average, abs=pixel / 2)


@pytest.mark.filterwarnings("ignore:Please import .* from the .scipy.ndimage:DeprecationWarning")
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.3)])
@pytest.mark.parametrize("seed", range(4))
def test_surface_dice_is_that_of_surface_distance(seed, spacing):
    one, other = random_blobs(seed), random_blobs(seed + 100)
    assert one[[0, -1]].any() and one[:, [0, -1]].any()  # boundaries along the image's
    surfaces = surface_distance.compute_surface_distances(other, one, spacing)
    values = []
    for tolerance in (0.0, 0.5, 1.0, 2.0, 5.0):
        values.append(surface_metrics(one, other, spacing, tolerance)["nsd"])
        expected = surface_distance.compute_surface_dice_at_tolerance(surfaces, tolerance)
        assert values[-1] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert values == sorted(values) and values[0] < values[-1] < 1


@pytest.mark.parametrize("seed", range(4))
def test_average_distance_agrees_with_distance_transforms(seed):
    one, other, spacing = random_blobs(seed), random_blobs(seed + 100), (0.7, 1.3)
    distances = [distances_between_boundaries(*pair, spacing) for pair in ((one, other), (other, one))]
    expected = np.concatenate(distances).mean()
    assert surface_metrics(one, other, spacing)["asd"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_overlap_agrees_with_monai(seed):
    one, other = random_blobs(seed), random_blobs(seed + 100) | random_blobs(seed + 200)
    metrics = overlap_metrics(one, other)
    predicted, true = (torch.from_numpy(mask)[None, None].float() for mask in (one, other))
    matrix = get_confusion_matrix(predicted, true)
    for key in ("precision", "recall"):
        assert metrics[key] == pytest.approx(compute_confusion_matrix_metric(key, matrix).item())
    assert metrics["dice"] == pytest.approx(compute_dice(predicted, true).item())
    assert metrics["iou"] == pytest.approx(compute_iou(predicted, true).item())
    assert len({round(value, 6) for value in metrics.values()}) == 5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_metrics_are_symmetric_and_consistent(seed, other_seed):
    one, other = random_blobs(seed, (12, 17)), random_blobs(other_seed, (12, 17))
    metrics = segmentation_metrics(one, other)
    other_way = segmentation_metrics(other, one)
    assert (metrics.pop("precision"), metrics.pop("recall")) == (other_way.pop("recall"), other_way.pop("precision"))
    assert metrics.pop("volume_difference") == other_way.pop("volume_difference") == 0  # both have 30 % of the pixels
    assert metrics == pytest.approx(other_way)
    assert metrics["dice"] == pytest.approx(2 * metrics["iou"] / (1 + metrics["iou"]))
    assert 0 <= metrics["asd"] <= metrics["hd95"] <= metrics["hd"] < np.hypot(12, 17)
    assert 0 <= metrics["nsd"] <= 1


@pytest.mark.parametrize("spacing, diagonal", [((1.0, 1.0), 10.0), ((2.0, 0.625), 13.0)])
def test_empty_masks(spacing, diagonal):
    shares, distances = ("dice", "iou", "precision", "recall", "nsd"), ("hd", "hd95", "asd")
    best = {**dict.fromkeys(shares, 1.0), **dict.fromkeys(distances, 0.0), "volume_difference": 0.0}
    worst = {**dict.fromkeys(shares, 0.0), **dict.fromkeys(distances, diagonal), "volume_difference": 1.0}
    assert segmentation_metrics(EMPTY, EMPTY, spacing) == best
    assert segmentation_metrics(EMPTY, SQUARE, spacing) == worst
    assert segmentation_metrics(SQUARE, EMPTY, spacing) == worst


@pytest.mark.parametrize("metric", [dice, iou, hausdorff_distance, overlap_metrics, surface_metrics])
def test_wrong_masks_are_refused(metric):
    with pytest.raises(ValueError, match=r"one shape \(H, W\), got \(6, 8\) and \(6, 7\)"):
        metric(SQUARE, SQUARE[:, :-1])
    with pytest.raises(ValueError, match=r"one shape \(H, W\), got \(1, 6, 8\)"):
        metric(SQUARE[None], SQUARE[None])
    with pytest.raises(TypeError, match="must be boolean, got float64: threshold first"):
        metric(SQUARE.astype(float), SQUARE)


@pytest.mark.parametrize("spacing", [(1.0, 0.0), (1.0, 1.0, 1.0)])
def test_wrong_spacing_is_refused(spacing):
    with pytest.raises(ValueError, match="two positive numbers"):
        hausdorff_distance(SQUARE, EMPTY, spacing=spacing)
    with pytest.raises(ValueError, match="`tolerance` must be a distance from 0 on, got -1"):
        surface_metrics(SQUARE, SHIFTED, tolerance=-1)


def test_filled_box_takes_pixels_whose_centre_is_inside():
    assert np.array_equal(filled_box((6, 8), (1, 1, 3, 3)), SQUARE)
    assert np.array_equal(filled_box((6, 8), (0.6, 0.6, 3.4, 3.4)), SQUARE)
    assert filled_box((6, 8), (0, 0, 8, 6)).all()
    assert filled_box((6, 8), (-5, -5, 20, 20)).all()
    assert not filled_box((6, 8), (20, 20, 25, 25)).any()


def test_inscribed_ellipse():
    # Half-axes 2 and 1.5 around (2, 1.5): the corner pixels' centres lie outside.
    expected = np.array([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=bool)
    assert np.array_equal(inscribed_ellipse((4, 5), (0, 0, 4, 3)), expected)
    large = inscribed_ellipse((400, 600), (100, 50, 500, 350))
    assert large.sum() == pytest.approx(np.pi / 4 * 400 * 300, rel=1e-3)
    assert box_from_mask(large) == (100, 50, 500, 350)


@pytest.mark.parametrize("box", [(3, 1, 3, 2), (1, 2, 3, 1), (0, 0, float("nan"), 1)])
def test_box_without_extent_is_refused(box):
    for shape in (filled_box, inscribed_ellipse):
        with pytest.raises(ValueError, match="x0 < x1 and y0 < y1"):
            shape((6, 8), box)


def test_box_from_mask_is_the_inverse_of_filled_box():
    box = box_from_mask(SHIFTED)
    assert box == (2.0, 1.0, 5.0, 3.0) and all(isinstance(edge, float) for edge in box)
    assert np.array_equal(filled_box(SHIFTED.shape, box), SHIFTED)
    with pytest.raises(ValueError, match="An empty mask has no box"):
        box_from_mask(EMPTY)


@pytest.mark.parametrize("foreground, background", [(200, 50), (50, 200)])
@pytest.mark.parametrize("channels", [None, 3])
def test_otsu_finds_the_side_unlike_the_surroundings(foreground, background, channels):
    lesion = inscribed_ellipse((40, 60), (15, 10, 45, 30))
    noise = np.random.default_rng(0).normal(scale=10, size=lesion.shape)
    grey = (np.where(lesion, foreground, background) + noise).astype(np.uint8)
    image = grey if channels is None else np.repeat(grey[..., None], channels, axis=-1)
    box = (12, 8, 48, 32)
    assert dice(otsu_in_box(image, box), lesion) > 0.99
    assert not (otsu_in_box(image, box) & ~filled_box(lesion.shape, box)).any()


def test_otsu_separates_the_classes_of_largest_variance_between_them():
    values = np.sort(np.random.default_rng(1).integers(0, 256, size=64))
    image = values.reshape(8, 8).astype(np.uint8)
    found = otsu_in_box(image, (0, 0, 8, 8)).ravel()
    size = min(range(1, 64), key=lambda k: values[:k].var() * k + values[k:].var() * (64 - k))
    assert found.sum() in (size, 64 - size) and found[:size].all() != found[size:].all()


def test_otsu_without_contrast_or_surroundings():
    assert np.array_equal(otsu_in_box(np.full((6, 8), 7, np.uint8), (1, 1, 3, 3)), SQUARE)
    image = np.where(rectangle((6, 8), (2, 4), (2, 6)), 0.9, 0.1)  # the box is the image: its border is the background
    assert np.array_equal(otsu_in_box(image, (0, 0, 8, 6)), image > 0.5)
    with pytest.raises(ValueError, match="contains no pixel"):
        otsu_in_box(image, (20, 20, 25, 25))
    with pytest.raises(ValueError, match=r"\(H, W\) or \(H, W, C\), got \(8,\)"):
        otsu_in_box(image[0], (0, 0, 8, 6))


def test_metric_table():
    table = MetricTable()
    assert table.mean() == table.std() == {}
    table.add("a", {"dice": 0.5, "hd": 3.0})
    table.add("b", {"dice": 1.0, "hd": 0.0})
    assert table.rows[1] == {"name": "b", "dice": 1.0, "hd": 0.0}
    assert table.mean() == {"dice": 0.75, "hd": 1.5}
    assert table.std() == {"dice": 0.25, "hd": 1.5}
    assert table.count() == {"dice": 2, "hd": 2}
    with pytest.raises(ValueError, match=r"'c' has the metrics \['dice'\], the rows so far \['dice', 'hd'\]"):
        table.add("c", {"dice": 1.0})


def test_a_metric_without_a_value_is_left_out_of_means():
    table = MetricTable()
    for name, auroc in (("a", math.nan), ("b", 0.5), ("c", 0.75)):
        table.add(name, {"auroc": auroc, "never": math.nan})
    assert table.mean()["auroc"] == 0.625 and table.std()["auroc"] == 0.125
    assert math.isnan(table.mean()["never"]) and math.isnan(table.std()["never"])
    assert table.count() == {"auroc": 2, "never": 0}
    np.testing.assert_array_equal(table.column("auroc"), [math.nan, 0.5, 0.75])


def test_floors_on_kvasir_sessile():
    """Of 196 polyps: a box filled scores 79.0 % Dice, the ellipse inscribed in it 84.6 %."""
    if "IMEDSAM_DATA" not in os.environ:
        pytest.skip("IMEDSAM_DATA is not set: it names the folder that holds data/kvasir_sessile")
    folder = Path(os.environ["IMEDSAM_DATA"], "data", "kvasir_sessile", "masks")
    if not folder.is_dir():
        pytest.skip(f"IMEDSAM_DATA is set, but there is no folder {folder}")
    masks = [np.asarray(Image.open(path).convert("L")) > 127 for path in sorted(folder.glob("*.png"))]
    assert len(masks) == 196
    filled = [dice(filled_box(mask.shape, box_from_mask(mask)), mask) for mask in masks]
    ellipse = [dice(inscribed_ellipse(mask.shape, box_from_mask(mask)), mask) for mask in masks]
    assert 100 * np.mean(filled) == pytest.approx(79.0, abs=0.05)
    assert 100 * np.mean(ellipse) == pytest.approx(84.6, abs=0.05)
