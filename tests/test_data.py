import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from imedsam.losses import cross_entropy_loss, dice_loss
from imedsam.processing.image_processing_imedsam import IMedSamImageProcessor
from imedsam.processing.processing_imedsam import IMedSamProcessor
from imedsam.training.augmentation import Augmentation, copy_paste
from imedsam.training.data import (
    EpochSampler,
    PromptedSegmentationDataset,
    boundary_band,
    collate_prompts,
    dense_labels,
    jitter_box,
    labels_at,
    model_coordinates,
    sample_points,
    split_by_class,
)
from imedsam.training.examples import load_examples, read_labels, without_empty_masks
from imedsam.training.metrics import box_from_mask
from imedsam.training.phantoms import phantoms_dataset

SIDE = 64


@pytest.fixture(params=["stretch", "longest_side"])
def processor(request):
    return make_processor(request.param)


def make_processor(resize_mode="stretch"):
    return IMedSamProcessor(IMedSamImageProcessor(size=SIDE, resize_mode=resize_mode))


def disk(height, width, x, y, radius, value=1):
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return (((columns - x) ** 2 + (rows - y) ** 2) < radius**2).astype(np.uint8) * value


def write_folder(folder, masks, scale=255):
    """A data set whose images show their masks; names a, b, c, ..."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for name, mask in zip("abcdefghij", masks, strict=False):
        Image.fromarray(mask * np.uint8(100)).convert("RGB").save(folder / "images" / f"{name}.jpg")
        Image.fromarray(mask * np.uint8(scale)).save(folder / "masks" / f"{name}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data", [disk(40, 60, 12 + 4 * i, 20, 8 + i) for i in range(5)])


@pytest.fixture
def label_folder(tmp_path):
    masks = [disk(40, 60, 15, 20, 9), disk(40, 60, 15, 20, 9) + disk(40, 60, 45, 20, 6, value=2)]
    folder = write_folder(tmp_path / "labels", [*masks, *masks], scale=1)
    (folder / "labels.json").write_text(json.dumps({"0": "background", "1": "organ", "2": "lesion"}))
    (folder / "splits.json").write_text(json.dumps({"train": ["a", "b", "c"], "val": ["d"]}))
    return folder


# Points and boxes


def test_point_labels_are_the_mask_at_the_pixel_that_holds_the_point(folder, processor):
    examples = load_examples(str(folder), "train")
    dataset = PromptedSegmentationDataset(examples, processor, num_points=500, augmentation="none")
    item, mask = dataset[0], examples[0]["mask"]
    scale = np.array(mask.shape[::-1]) / item["reshaped_input_sizes"].numpy()[::-1]
    pixels = (item["coordinates"][0].double().numpy() + 1) * SIDE / 2 * scale
    assert (pixels > -1e-3).all() and (pixels < np.array(mask.shape[::-1]) + 1e-3).all()
    sure = (np.abs(pixels - pixels.round()) > 1e-3).all(axis=1)
    columns, rows = pixels[sure].astype(int).T
    assert sure.mean() > 0.95
    np.testing.assert_array_equal(item["labels"][0].numpy()[sure], mask[rows, columns])
    assert 0.2 < item["labels"].mean() < 0.8


def test_points_fill_their_pixels():
    mask = disk(10, 12, 5, 4, 2) == 1
    points, _ = sample_points([mask], np.array([[2.0, 2, 8, 6]]), 30000, 0.3, 0.3, np.random.default_rng(0))
    within = points - np.floor(points)
    np.testing.assert_allclose(within.mean(axis=(0, 1)), 0.5, atol=0.01)
    np.testing.assert_allclose(within.std(axis=(0, 1)), 12**-0.5, atol=0.01)


SHARES = [(0.1, 0.0), (0.5, 0.0), (1.0, 0.0), (0.2, 0.5), (0.3, 0.7), (0.05, 0.9)]


@pytest.mark.parametrize(("uniform_share", "boundary_share"), SHARES)
def test_sampled_losses_are_those_of_every_pixel(uniform_share, boundary_share):
    """The cross entropy without bias, however few points; the Dice loss as their number grows."""
    mask = disk(80, 100, 30, 50, 17) == 1
    box = np.array([box_from_mask(mask)])
    rows, columns = np.mgrid[:80, :100]
    logits = np.sin(rows / 9) * 2 + np.cos(columns / 13) * 3 - 1.0
    dense = [torch.from_numpy(values).double().flatten() for values in (logits, mask)]

    def sampled(loss, num_points, seed):
        rng = np.random.default_rng(seed)
        points, density = sample_points([mask], box, num_points, uniform_share, boundary_share, rng)
        values = [torch.from_numpy(labels_at([of], points)[0]).double() for of in (logits, mask)]
        return loss(*values, torch.from_numpy(1 / density[0])).item()

    few = np.array([sampled(cross_entropy_loss, 20, seed) for seed in range(4000)])
    assert abs(few.mean() - cross_entropy_loss(*dense).item()) < 4 * few.std() / len(few) ** 0.5
    assert few.std() > 0.02  # so that the line above says something
    assert sampled(dice_loss, 200000, 0) == pytest.approx(dice_loss(*dense).item(), abs=0.005)


@pytest.mark.parametrize(("uniform_share", "boundary_share"), [(0.5, 0.5), (0.8, 0.2), (0.9, 0.1)])
def test_shares_that_leave_nothing_around_the_box(folder, uniform_share, boundary_share):
    examples = load_examples(str(folder), "train")
    shares = {"uniform_share": uniform_share, "boundary_share": boundary_share}
    for num_points in (1, 3, 7, 2503):
        item = PromptedSegmentationDataset(examples, make_processor(), num_points=num_points, **shares)[0]
        assert item["coordinates"].shape == (1, num_points, 2) and item["point_areas"].isfinite().all()


def test_points_gather_where_they_are_asked_for():
    mask = disk(80, 100, 30, 50, 17) == 1
    box, band = np.array([box_from_mask(mask)]), boundary_band(mask)
    for uniform_share, boundary_share in SHARES:
        points, _ = sample_points([mask], box, 5000, uniform_share, boundary_share, np.random.default_rng(1))
        near = labels_at([band], points)[0].mean()
        assert (near > 0.95 * boundary_share) and (near < boundary_share + 0.35)
        assert labels_at([mask], points)[0].mean() > (2 if uniform_share <= 0.5 else 0.9) * mask.mean()


def test_the_band_around_a_boundary_by_hand():
    mask = np.zeros((100, 50), bool)
    mask[:, 20:] = True
    band = boundary_band(mask)  # 2 % of 100: two pixels to either side, and none along the image's edges
    assert (band == (np.abs(np.arange(50) - 19.5) < 2)).all()
    assert boundary_band(np.ones((5, 5), bool)).all()


def test_point_weights_undo_the_sampling_or_are_left_out(folder):
    examples = load_examples(str(folder), "train")
    for weighting in ("importance", "none"):
        item = PromptedSegmentationDataset(examples, make_processor(), num_points=2000, point_weighting=weighting)[1]
        assert item["point_areas"].mean().item() == pytest.approx(1, abs=0.05)
        assert item["point_areas"].std() > 0.1  # of the selection, however the loss is weighted
        assert ("point_weights" in item) == (weighting == "importance")
        if weighting == "importance":
            assert torch.equal(item["point_weights"], item["point_areas"])


def test_box_jitter_goes_both_ways_and_stays_in_bounds():
    rng = np.random.default_rng(0)
    box = np.array([20.0, 30, 60, 40])
    boxes = np.stack([jitter_box(box, 0.2, (100, 100), rng) for _ in range(2000)])
    shares = (boxes - box) / np.array([40, 10, 40, 10])
    assert np.abs(shares).max() <= 0.2
    assert (shares.min(axis=0) < -0.19).all() and (shares.max(axis=0) > 0.19).all()
    np.testing.assert_allclose(shares.mean(axis=0), 0, atol=0.01)
    np.testing.assert_array_equal(jitter_box(box, 0.0, (100, 100), rng), box)


def test_jittered_boxes_are_clipped_and_keep_a_pixel():
    rng = np.random.default_rng(0)
    for box in ((0, 0, 100, 50), (99, 49, 100, 50), (0, 10, 1, 11)):
        for _ in range(200):
            x0, y0, x1, y1 = jitter_box(box, 0.4, (50, 100), rng)
            assert 0 <= x0 and x1 <= 100 and 0 <= y0 and y1 <= 50
            assert x1 - x0 >= 1 - 1e-9 and y1 - y0 >= 1 - 1e-9


def test_boxes_and_classes_of_label_maps(label_folder):
    examples = load_examples(str(label_folder), "train")
    item = PromptedSegmentationDataset(examples, make_processor(), box_jitter=0, augmentation="none")[1]
    assert item["class_labels"].tolist() == [0, 1]
    scale = np.array([SIDE / 60, SIDE / 40] * 2)
    expected = [np.array(box_from_mask(examples[1]["mask"] == label)) * scale for label in (1, 2)]
    np.testing.assert_allclose(item["input_boxes"].numpy(), expected, rtol=1e-5)
    assert examples.id2label == {0: "organ", 1: "lesion"}


def test_large_images_are_shrunk_and_labels_are_not(tmp_path, processor):
    folder = write_folder(tmp_path / "large", [disk(300, 205, 100, 150, 40)] * 5)
    examples = load_examples(str(folder), "train")
    item = PromptedSegmentationDataset(examples, processor, box_jitter=0, augmentation="none")[0]
    whole = processor(
        images=[examples[0]["image"]], input_boxes=[[box_from_mask(examples[0]["mask"] == 1)]], return_tensors="pt"
    )
    assert min(item["original_sizes"]) == SIDE
    torch.testing.assert_close(item["input_boxes"], whole["input_boxes"][0], atol=0.3, rtol=0)
    torch.testing.assert_close(item["pixel_values"], whole["pixel_values"][0], atol=0.5, rtol=0)


# Dense labels


def test_dense_labels_are_the_mask_at_its_own_size():
    mask = disk(SIDE, SIDE, 20, 30, 11) == 1
    labels = dense_labels([mask], SIDE, SIDE, (SIDE, SIDE))
    np.testing.assert_array_equal(labels[0].numpy(), mask)


@pytest.mark.parametrize("label_size", [17, 64, 100])
def test_dense_labels_agree_with_points_at_the_pixel_centres(label_size):
    mask, reshaped = disk(40, 60, 12, 20, 9) == 1, (43, 64)
    labels = dense_labels([mask], label_size, SIDE, reshaped)[0].numpy()
    for row, column in np.ndindex(label_size, label_size):
        x, y = (np.array([column, row]) + 0.5) / label_size * SIDE * np.array([60 / 64, 40 / 43])
        expected = mask[int(y), int(x)] if y < 40 else False
        assert labels[row, column] == expected


def test_model_coordinates_of_the_corners():
    corners = np.array([[[0.0, 0], [60, 40], [30, 20]]])
    np.testing.assert_allclose(
        model_coordinates(corners, (40, 60), 64, (43, 64)), [[[-1, -1], [1, 2 * 43 / 64 - 1], [0, 43 / 64 - 1]]]
    )


def test_dense_items(label_folder):
    examples = load_examples(str(label_folder), "train")
    item = PromptedSegmentationDataset(examples, make_processor(), supervision="dense", label_size=32)[1]
    assert item["labels"].shape == (2, 32, 32) and "coordinates" not in item
    assert set(item["labels"].unique().tolist()) == {0, 1}


# Reproducibility


def assert_equal_items(a, b):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=0, rtol=0)


def test_items_depend_on_seed_epoch_and_index_alone(folder):
    examples = load_examples(str(folder), "train")
    make = lambda seed: PromptedSegmentationDataset(examples, make_processor(), num_points=50, seed=seed)  # noqa: E731
    dataset, other = make(0), make(0)
    items = [dataset[index] for index in (0, 1, 2)]
    np.random.seed(3)
    torch.manual_seed(3)
    for index in (2, 0, 1):
        assert_equal_items(other[index], items[index])
    other.set_epoch(1)
    assert not torch.equal(other[0]["coordinates"], items[0]["coordinates"])
    assert not torch.equal(make(1)[0]["coordinates"], items[0]["coordinates"])
    other.set_epoch(0)
    assert_equal_items(other[0], items[0])


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_workers_follow_the_epoch(folder, persistent_workers):
    examples = load_examples(str(folder), "train")
    dataset = PromptedSegmentationDataset(examples, make_processor(), num_points=20, augmentation="light")
    sampler = EpochSampler(dataset, seed=5)
    options = {"sampler": sampler, "collate_fn": collate_prompts, "batch_size": 2}
    alone = DataLoader(dataset, **options)
    parallel = DataLoader(dataset, num_workers=2, persistent_workers=persistent_workers, **options)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for a, b in zip(alone, parallel, strict=True):
            assert_equal_items(a, b)


def test_the_sampler_permutes_by_epoch(folder):
    dataset = PromptedSegmentationDataset(load_examples(str(folder), "train"), make_processor(), augmentation="none")
    dataset.examples = list(range(20))
    sampler = EpochSampler(dataset, seed=0)
    first = list(sampler)
    assert sorted(first) == list(range(20)) and first == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_collate_pads_ragged_prompts(label_folder):
    dataset = PromptedSegmentationDataset(load_examples(str(label_folder), "train"), make_processor(), num_points=30)
    batch = collate_prompts([dataset[0], dataset[1]])
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert batch["prompt_attention_mask"].tolist() == [[True, False], [True, True]]
    assert batch["coordinates"].shape == (2, 2, 30, 2)
    assert (batch["labels"][0, 1] == 0).all() and (batch["point_weights"][0, 1] == 0).all()
    width, height = (batch["input_boxes"][0, 1, 2:] - batch["input_boxes"][0, 1, :2]).tolist()
    assert width > 0 and height > 0


# Augmentation


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


def test_items_get_the_objects_of_other_images(folder):
    examples = load_examples(str(folder), "train")
    options = {"augmentation": "none", "box_jitter": 0, "num_points": 2000, "uniform_share": 1.0}
    plain, pasted, half = (
        PromptedSegmentationDataset(examples, make_processor(), copy_paste=share, **options) for share in (0, 1, 0.5)
    )
    areas = [item["labels"].mean().item() for item in (plain[0], plain[1], plain[2])]
    grown, mixed = 0, []
    for epoch in range(10):
        pasted.set_epoch(epoch), half.set_epoch(epoch)
        assert_equal_items(pasted[0], pasted[0])
        share = pasted[0]["labels"].mean().item()
        assert areas[0] - 0.05 < share < sum(areas) + 0.05
        grown += share > areas[0] + 0.02
        mixed.append(not torch.equal(half[0]["pixel_values"], plain[0]["pixel_values"]))
    assert grown and any(mixed) and not all(mixed)


# Reading data sets


def test_a_folder_without_splits_is_split_60_20_20(folder):
    names = {split: load_examples(str(folder), split).names for split in ("train", "validation", "test")}
    assert [len(names[split]) for split in names] == [3, 1, 1]
    assert sorted(sum(names.values(), [])) == list("abcde")
    assert names["train"] == load_examples(str(folder), "train").names
    assert any(load_examples(str(folder), "train", seed=seed).names != names["train"] for seed in range(1, 6))


def test_examples_of_a_folder(label_folder):
    examples = load_examples(str(label_folder), "validation")
    assert examples.names == ["d"] and examples[0]["name"] == "d"
    assert examples[0]["image"].size == (60, 40)
    assert set(np.unique(examples[0]["mask"])) == {0, 1, 2}
    classes, masks = split_by_class(examples[0]["mask"])
    assert classes == [0, 1] and all(mask.dtype == bool for mask in masks)
    assert len(load_examples(str(label_folder), "train", num_images=2)) == 2


@pytest.mark.parametrize("scale", [1, 255])
def test_binary_masks_of_either_kind(tmp_path, scale):
    folder = write_folder(tmp_path / "data", [disk(20, 20, 10, 10, 5)] * 5, scale=scale)
    mask = load_examples(str(folder), "train")[0]["mask"]
    np.testing.assert_array_equal(mask, disk(20, 20, 10, 10, 5))


def test_phantoms():
    examples = load_examples("phantoms", "validation", num_images=3, image_size=32, num_classes=2)
    assert len(examples) == 3 and examples[0]["mask"].shape == (32, 32)
    assert examples.id2label == {0: "lesion", 1: "organ"}
    assert load_examples("phantoms", "train", num_images=1).id2label == {0: "object"}


def test_a_saved_data_set(tmp_path):
    rows = phantoms_dataset("train", 10, size=32)
    rows.save_to_disk(tmp_path / "saved")
    splits = [load_examples(str(tmp_path / "saved"), split) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [6, 2, 2]
    row = rows[rows["name"][:].index(splits[2].names[1])]
    np.testing.assert_array_equal(splits[2][1]["mask"], np.asarray(row["mask"]) > 0)
    rows.remove_columns("mask").save_to_disk(tmp_path / "images")
    with pytest.raises(ValueError, match="Expected the columns image and mask or label or annotation"):
        load_examples(str(tmp_path / "images"), "train")


def test_images_without_an_object_are_skipped_with_a_word(tmp_path, caplog):
    empty = np.zeros((20, 20), np.uint8)
    folder = write_folder(tmp_path / "data", [empty, *[disk(20, 20, 10, 10, 5)] * 2, empty])
    (folder / "splits.json").write_text(json.dumps({"train": ["a", "b", "c"], "test": ["d"]}))
    with caplog.at_level("WARNING", logger="imedsam"):
        assert without_empty_masks(load_examples(str(folder), "train")).names == ["b", "c"]
    assert "Skipping 1 of 3 images whose mask is empty" in caplog.text
    with pytest.raises(ValueError, match="Expected masks with an object"):
        without_empty_masks(load_examples(str(folder), "test"))


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere to hold images/ and masks/"):
        load_examples(str(tmp_path / "nowhere"), "train")
    (folder / "splits.json").write_text(json.dumps({"train": ["a", "x"], "validation": []}))
    with pytest.raises(FileNotFoundError, match="Expected an image for 'x'"):
        load_examples(str(folder), "train")
    with pytest.raises(ValueError, match="Expected images in the validation split"):
        load_examples(str(folder), "validation")
    with pytest.raises(ValueError, match="Expected a test split in .*splits.json, got train, validation"):
        load_examples(str(folder), "test")
    (folder / "masks" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected a mask for .*a\.jpg, got none: .*a\.png"):
        load_examples(str(folder), "train")


def test_wrong_masks_are_named(folder, label_folder):
    (folder / "splits.json").write_text(json.dumps({"train": list("abcd")}))
    examples = load_examples(str(folder), "train")
    Image.new("L", (50, 40)).save(folder / "masks" / "a.png")
    with pytest.raises(ValueError, match="one size, got 60x40 and 50x40 for 'a'"):
        examples[0]
    grey = disk(40, 60, 20, 20, 5) * 255
    grey[0, 0] = 128
    Image.fromarray(grey).save(folder / "masks" / "b.png")
    with pytest.raises(ValueError, match="values 0, 128, 255 for 'b'"):
        examples[1]
    Image.new("RGB", (60, 40), (255, 0, 0)).save(folder / "masks" / "c.png")
    with pytest.raises(ValueError, match="one channel, got colours for 'c'"):
        examples[2]
    Image.fromarray(disk(40, 60, 20, 20, 5, value=7)).save(label_folder / "masks" / "a.png")
    with pytest.raises(ValueError, match="values 0, 1, 2, got 7 for 'a'"):
        load_examples(str(label_folder), "train")[0]
    with pytest.raises(ValueError, match="without gaps, got \\[0, 50\\]"):
        load_examples(str(folder), "train", labels={0: "background", 50: "liver"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"0": "background",', "Expected JSON in .*labels.json, got .*: write"),
        ('["background", "organ"]', "Expected an object in .*labels.json, got list: write"),
        ('{"background": 0, "organ": 1}', 'Expected entries "integer": "name" in .*, got {"background": 0}: write'),
        ('{"0": "background", "1": 7}', 'got {"1": 7}: write'),
        ('{"0": "background"}', "Expected a class beside the background in .*labels.json"),
        ("{}", "Expected a class beside the background in .*labels.json"),
        ('{"0": "background", "1": "organ", "2": "organ"}', "name of its own .*labels.json, got 'organ' twice"),
    ],
)
def test_wrong_labels_are_refused(label_folder, content, message):
    (label_folder / "labels.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_labels(label_folder / "labels.json")
    with pytest.raises(ValueError, match=message):
        load_examples(str(label_folder), "train")


def test_labels_are_read(label_folder):
    assert read_labels(label_folder / "labels.json") == {0: "background", 1: "organ", 2: "lesion"}


def test_two_images_of_one_name_are_refused(folder):
    Image.new("RGB", (60, 40)).save(folder / "images" / "b.bmp")
    with pytest.raises(ValueError, match="Expected one image of each name in .*images, got b.bmp and b.jpg"):
        load_examples(str(folder), "train")


@pytest.mark.parametrize("validation", ["validation", "val"])
def test_an_image_in_two_splits_is_refused(folder, validation):
    splits = {"train": ["a", "b"], validation: ["c", "b"], "everything": list("abcde")}
    (folder / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(ValueError, match=f"one split of .*splits.json, got 'b' in train and {validation}"):
        load_examples(str(folder), "train")
    (folder / "splits.json").write_text(json.dumps({**splits, validation: ["c"]}))
    assert load_examples(str(folder), "validation").names == ["c"]


@pytest.mark.parametrize("whole", [False, True])
def test_a_broken_image_is_named(folder, whole):
    (folder / "splits.json").write_text(json.dumps({"train": ["a", "b"]}))
    path = folder / "images" / "b.jpg"
    path.write_bytes(b"no image" if whole else path.read_bytes()[:-300])
    examples = load_examples(str(folder), "train")
    with pytest.raises(ValueError, match=r"Expected a whole image in .*b\.jpg, got .*: replace it or remove it"):
        examples[1]


def test_wrong_options_are_refused(folder):
    examples = load_examples(str(folder), "train")
    for dataset in ("phantoms", str(folder)):
        with pytest.raises(ValueError, match="Expected num_images of 1 or more, got 0"):
            load_examples(dataset, "train", num_images=0)
    with pytest.raises(ValueError, match="Expected split to be one of"):
        load_examples(str(folder), "val")
    for name, value in {
        "uniform_share": 1.5,
        "box_jitter": 0.5,
        "point_weighting": "some",
        "supervision": "all",
        "augmentation": "wild",
        "copy_paste": 1.5,
        "boundary_share": 0.6,
    }.items():
        with pytest.raises(ValueError, match=f"Expected {name}"):
            PromptedSegmentationDataset(examples, make_processor(), **{name: value})
