"""Augmentation keeps image and mask together, whatever it does to them."""

import numpy as np
import pytest
from drawn_folders import disk

from imedsam.training.augmentation import Augmentation, copy_paste


@pytest.mark.parametrize("strength", ["light", "strong"])
@pytest.mark.parametrize("mask_scale", [1, 2])
def test_augmentation_keeps_image_and_mask_aligned(strength, mask_scale):
    mask = np.zeros((60, 80), np.uint8)
    mask[15:40, 25:60] = 1
    image = np.repeat((mask * 200)[..., None], 3, axis=2)
    large = mask.repeat(mask_scale, axis=0).repeat(mask_scale, axis=1)
    augment, moved = Augmentation(strength), 0
    for seed in range(12):
        new_image, new_mask = augment(image, large, seed)
        assert new_image.shape[:2] in ((60, 80), (80, 60)) and new_image.dtype == np.uint8
        assert new_mask.size == large.size and set(np.unique(new_mask)) <= {0, 1}
        new_mask = new_mask[::mask_scale, ::mask_scale]
        agreement = ((new_image.mean(axis=2) > 100) == new_mask).mean()
        assert agreement > 0.96, seed
        moved += new_mask.shape != mask.shape or (new_mask != mask).mean() > 0.05
    assert moved > 4


def test_augmentation_depends_on_the_seed_alone():
    mask = disk(50, 50, 20, 25, 12)
    image = (disk(50, 50, 25, 25, 20) * 90 + 50).astype(np.uint8)
    augment = Augmentation("strong")
    first = augment(image, mask, 7)
    augment(image, mask, 8)
    for a, b in zip(first, augment(image, mask, 7), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], augment(image, mask, 8)[0])


def test_augmentation_keeps_the_type_and_range_of_other_images():
    mask = disk(50, 50, 25, 25, 12)
    image = (disk(50, 50, 25, 25, 20) * 30000.0).astype(np.uint16) + 100
    new_image, _ = Augmentation("strong")(image, mask, 0)
    assert new_image.dtype == np.uint16 and new_image.shape == (50, 50)
    assert new_image.min() >= 100 and new_image.max() <= 30100 and new_image.max() > 20000


def test_an_object_that_leaves_the_picture_brings_the_pair_back():
    mask = np.zeros((50, 50), np.uint8)
    mask[:2, :2] = 1
    image = mask * 200
    results = [Augmentation("strong")(image, mask, seed) for seed in range(15)]
    assert all(new_mask.any() for _, new_mask in results)
    assert any(new_mask is mask and new_image is image for new_image, new_mask in results)
    assert any(new_mask is not mask for _, new_mask in results)


def test_copy_paste_puts_the_other_objects_on_top():
    image, mask = np.full((6, 8, 3), 10, np.uint8), np.zeros((6, 8), np.uint8)
    mask[0:3, 0:3] = 1
    other_image, other_mask = np.full((6, 8, 3), 200, np.uint8), np.zeros((6, 8), np.uint8)
    other_mask[2:5, 2:6] = 2
    new_image, new_mask = copy_paste(image, mask, other_image, other_mask)
    assert new_image.dtype == np.uint8 and new_mask.dtype == np.uint8
    np.testing.assert_array_equal(new_mask, np.where(other_mask == 2, 2, mask))
    np.testing.assert_array_equal(new_image, np.where(other_mask == 2, 200, 10)[..., None].repeat(3, axis=2))
    assert (image == 10).all() and mask.sum() == 9


def test_copy_paste_between_pictures_of_other_sizes():
    mask, other_mask = np.zeros((60, 80), np.uint8), np.zeros((40, 40), np.uint8)
    other_mask[10:30, 20:40] = 1
    image, other_image = np.full((30, 40), 1000, np.uint16), np.full((20, 20), 5000, np.uint16)
    new_image, new_mask = copy_paste(image, mask, other_image, other_mask)
    assert new_image.shape == (30, 40) and new_image.dtype == np.uint16
    expected = np.zeros((60, 80), np.uint8)
    expected[15:45, 40:80] = 1
    np.testing.assert_array_equal(new_mask, expected)
    assert new_image[15, 30] == 5000 and new_image[15, 10] == 1000
    assert ((new_image > 3000) == (expected[::2, ::2] > 0)).mean() > 0.95


def test_copy_paste_shrinks_and_moves():
    mask, other_mask = np.zeros((40, 80), np.uint8), np.zeros((40, 80), np.uint8)
    other_mask[10:30, 20:60] = 1
    image, other_image = np.zeros((40, 80), np.uint8), np.full((40, 80), 90, np.uint8)
    new_image, new_mask = copy_paste(image, mask, other_image, other_mask, scale=0.5, corner=(0.25, 0.5))
    expected = np.zeros((40, 80), np.uint8)
    expected[20 + 5 : 20 + 15, 20 + 10 : 20 + 30] = 1
    np.testing.assert_array_equal(new_mask, expected)
    assert np.abs(new_image.astype(float) - 90.0 * expected).mean() < 1 and new_image.max() == 90


def test_copy_paste_labels_what_it_paints():
    """An object a pixel wide, which shrinking may lose."""
    image, mask, other_mask = (np.zeros((60, 60), np.uint8) for _ in range(3))
    other_mask[10:50, 31] = 1
    for scale in np.linspace(0.3, 1, 20):
        new_image, new_mask = copy_paste(image, mask, np.full_like(image, 200), other_mask, scale)
        np.testing.assert_array_equal(new_image > 0, new_mask > 0)


def test_copy_paste_leaves_a_grey_image_alone_beside_a_coloured_one():
    image, mask = np.zeros((6, 6), np.uint8), np.zeros((6, 6), np.uint8)
    new_image, new_mask = copy_paste(image, mask, np.ones((6, 6, 3), np.uint8), np.ones((6, 6), np.uint8))
    assert new_image is image and new_mask is mask
