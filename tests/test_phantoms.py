import hashlib

import numpy as np
import pytest
from PIL import Image

from imedsam.training.phantoms import (
    PHANTOM_KINDS,
    PHANTOM_SPLIT_SEEDS,
    Phantom,
    Shape,
    draw_phantom,
    phantoms_dataset,
)


@pytest.fixture(scope="module")
def test_split():
    """The first 60 phantoms of the test split."""
    return [draw_phantom((PHANTOM_SPLIT_SEEDS["test"], 0, index)) for index in range(60)]


def test_mask_of_a_seed_is_golden():
    mask = draw_phantom(3).mask(64, 64)
    assert mask.shape == (64, 64) and mask.dtype == np.uint8
    assert hashlib.sha256(mask.tobytes()).hexdigest()[:16] == "547307b7138f649e"
    assert np.bincount(mask.ravel()).tolist() == [2661, 128, 1307]


def test_a_seed_decides_scene_and_image():
    assert draw_phantom(7) == draw_phantom(7) == draw_phantom((7,))
    np.testing.assert_array_equal(draw_phantom(7).image(48, 48), draw_phantom(7).image(48, 48))
    assert draw_phantom(7).shapes != draw_phantom(8).shapes
    assert (draw_phantom(7).image(48, 48) != draw_phantom(8).image(48, 48)).any()


def test_circle_is_where_it_was_put():
    circle = Shape(label=1, centre=(0.25, 0.5), radius=0.2, harmonics=(0j,))
    mask = Phantom("tomography", (circle,), (0,)).mask(200, 100)
    y, x = np.nonzero(mask)
    assert (x.mean() + 0.5) / 100 == pytest.approx(0.25) and (y.mean() + 0.5) / 200 == pytest.approx(0.5)
    assert mask.mean() == pytest.approx(np.pi * 0.2**2, abs=1e-3)


def test_outline_turns_from_x_towards_y():
    # log r = log 0.2 + 0.5 cos(theta - 90 degrees): reaches 0.2 e^0.5 = 0.33 below the centre and 0.12 above it.
    pear = Phantom("tomography", (Shape(1, (0.5, 0.5), 0.2, (-0.5j,)),), (0,))
    assert pear.label_at(0.5, [0.5 + 0.32, 0.5 + 0.34, 0.5 - 0.11, 0.5 - 0.13]).tolist() == [1, 0, 1, 0]


def test_front_label_wins_and_distractors_hide_nothing():
    layers = [Shape(label, (0.5, 0.5), radius, (0j,)) for label, radius in ((2, 0.4), (0, 0.3), (1, 0.2), (0, 0.1))]
    phantom = Phantom("tomography", tuple(layers), (0,))
    assert phantom.label_at(0.5 + np.array([0.0, 0.15, 0.25, 0.35, 0.45]), 0.5).tolist() == [1, 1, 2, 2, 0]


@pytest.mark.parametrize("seed", range(4))
def test_mask_is_exact_at_every_resolution(seed):
    phantom = draw_phantom(seed)
    np.testing.assert_array_equal(phantom.mask(64, 64), phantom.mask(192, 192)[1::3, 1::3])
    np.testing.assert_array_equal(phantom.mask(40, 64), phantom.mask(120, 192)[1::3, 1::3])
    coarse, fine = ((phantom.mask(size, size) == 1).mean() for size in (128, 1024))
    assert coarse == pytest.approx(fine, abs=1e-3)


def test_label_at_agrees_with_mask():
    phantom = draw_phantom(0)
    mask = phantom.mask(30, 50)
    assert set(np.unique(mask)) == {0, 1, 2}
    for row, column in np.random.default_rng(0).integers((30, 50), size=(40, 2)):
        assert phantom.label_at((column + 0.5) / 50, (row + 0.5) / 30) == mask[row, column]


def test_region_zooms_into_the_mask():
    phantom = draw_phantom(0)
    full = phantom.mask(256, 256)
    np.testing.assert_array_equal(phantom.mask(128, 64, region=(0.25, 0.5, 0.5, 1.0)), full[128:, 64:128])
    zoomed = phantom.mask(256, 256, region=(0.25, 0.25, 0.5, 0.5))
    np.testing.assert_array_equal(zoomed, phantom.mask(1024, 1024)[256:512, 256:512])
    assert len(np.unique(zoomed)) > 1


def test_every_image_has_one_lesion_of_sensible_size(test_split):
    for phantom in test_split[:50]:
        mask = phantom.mask(256, 256)
        assert sum(shape.label == 1 for shape in phantom.shapes) == 1
        assert 0.02 < (mask == 1).mean() < 0.25
        assert not (np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]) == 1).any()
    assert {phantom.kind for phantom in test_split} == set(PHANTOM_KINDS)


def test_image_shows_the_same_scene_at_every_resolution(test_split):
    for phantom in test_split[:6]:
        small = phantom.image(64, 64).astype(float)
        large = phantom.image(256, 256).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        assert small.shape == (64, 64, 3)
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.8


def test_only_endoscopy_is_in_colour(test_split):
    for phantom in test_split[:12]:
        image = phantom.image(32, 32)
        assert (image == image[..., :1]).all() == (phantom.kind != "endoscopy")


def test_box_and_threshold_do_not_solve_the_lesions(test_split):
    ellipse, otsu = [], []
    for phantom in test_split:
        lesion = phantom.mask(256, 256) == 1
        grey = np.asarray(Image.fromarray(phantom.image(256, 256)).convert("L"))
        ellipse.append(_dice(_inscribed_ellipse(lesion), lesion))
        otsu.append(_dice(_otsu_in_box(grey, lesion), lesion))
    assert 80 < np.mean(ellipse) < 88
    assert 55 < np.mean(otsu) < 85


def _box(mask):
    """Half-open (row, column) slices of the smallest box around the mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _inscribed_ellipse(mask):
    ellipse = np.zeros_like(mask)
    box = _box(mask)
    height, width = mask[box].shape
    y, x = (np.arange(height) + 0.5) / height * 2 - 1, (np.arange(width) + 0.5) / width * 2 - 1
    ellipse[box] = y[:, None] ** 2 + x**2 <= 1
    return ellipse


def _otsu_in_box(grey, mask, ring=8):
    """Otsu's threshold in the mask's box; foreground is the class farther in its mean from a ring around the box."""
    rows, columns = box = _box(mask)
    around = np.zeros_like(mask)
    around[max(rows.start - ring, 0) : rows.stop + ring, max(columns.start - ring, 0) : columns.stop + ring] = True
    around[box] = False
    inside = grey[box]
    values, counts = np.unique(inside, return_counts=True)
    weight = counts.cumsum()[:-1] / inside.size
    mean = (values * counts).cumsum()[:-1] / counts.cumsum()[:-1]
    # Between-class variance w0 w1 (m0 - m1)^2 = w0 (m0 - m)^2 / w1.
    threshold = values[np.argmax(weight * (mean - inside.mean()) ** 2 / (1 - weight))]
    bright, outside = inside > threshold, grey[around].mean()
    is_bright = abs(inside[bright].mean() - outside) > abs(inside[~bright].mean() - outside)
    foreground = np.zeros_like(mask)
    foreground[box] = bright == is_bright
    return foreground


def _dice(prediction, target):
    return 200 * (prediction & target).sum() / (prediction.sum() + target.sum())


def test_dataset_holds_the_drawn_phantoms():
    dataset = phantoms_dataset("val", 8, seed=5, size=40, num_classes=2)
    lesions = phantoms_dataset("val", 8, seed=5, size=40)
    assert dataset.column_names == ["image", "mask", "name"]
    assert dataset["name"][7] == "phantom_000007"
    assert not dataset.cache_files
    for index, (row, lesion_row) in enumerate(zip(dataset, lesions, strict=True)):
        phantom = draw_phantom((PHANTOM_SPLIT_SEEDS["val"], 5, index))
        assert (row["image"].mode, row["mask"].mode, row["image"].size) == ("RGB", "L", (40, 40))
        np.testing.assert_array_equal(np.asarray(row["image"]), phantom.image(40, 40))
        np.testing.assert_array_equal(np.asarray(row["mask"]), phantom.mask(40, 40))
        np.testing.assert_array_equal(np.asarray(lesion_row["mask"]), phantom.mask(40, 40) == 1)
    assert max(np.asarray(row["mask"]).max() for row in dataset) == 2


def test_smaller_dataset_is_a_prefix_of_a_larger_one():
    small, large = (phantoms_dataset("train", n, size=24) for n in (2, 4))
    for a, b in zip(small, large, strict=False):
        assert a["name"] == b["name"] and a["image"].tobytes() == b["image"].tobytes()


def test_splits_and_seeds_are_disjoint():
    streams = [("train", 0), ("val", 0), ("test", 0), ("train", 1)]
    images = {
        row["image"].tobytes() for split, seed in streams for row in phantoms_dataset(split, 6, seed=seed, size=24)
    }
    assert len(images) == 6 * len(streams)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "Expected split to be one of train, val, test, got 'dev'"),
        ({"size": 0}, "Expected size to be at least 1, got 0"),
        ({"num_images": 0}, "Expected num_images to be at least 1, got 0"),
        ({"seed": -1}, "Expected seed to be at least 0, got -1"),
        ({"num_classes": 3}, r"Expected num_classes to be 1 \(lesion\) or 2 \(lesion, organ\), got 3"),
    ],
)
def test_dataset_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        phantoms_dataset(**({"split": "train", "num_images": 2} | arguments))


def test_phantom_refuses_empty_grids():
    phantom = draw_phantom(0)
    with pytest.raises(ValueError, match="Expected height and width to be at least 1 pixel, got 0 and 8"):
        phantom.image(0, 8)
    with pytest.raises(ValueError, match=r"Expected region to be \(x_min, y_min, x_max, y_max\) with min < max"):
        phantom.mask(8, 8, region=(0.5, 0.0, 0.5, 1.0))
