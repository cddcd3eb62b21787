"""Training items: points, boxes and dense labels, what draws them, and in what order."""

import numpy as np
import pytest
import torch
from drawn_folders import SIDE, disk, make_processor, write_folder
from torch.utils.data import DataLoader

from imedsam.losses import cross_entropy_loss, dice_loss
from imedsam.training.data import (
    EpochSampler,
    PromptedSegmentationDataset,
    boundary_band,
    collate_prompts,
    dense_labels,
    draw_click,
    innermost_click,
    jitter_box,
    labels_at,
    model_coordinates,
    sample_points,
)
from imedsam.training.examples import load_examples
from imedsam.training.metrics import box_from_mask
from imedsam.uncertainty import draw_uncertain

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


def waves_over_a_disk():
    """A mask and its box, logits that do not follow it, and both at every pixel."""
    mask = disk(80, 100, 30, 50, 17) == 1
    box = np.array([box_from_mask(mask)])
    rows, columns = np.mgrid[:80, :100]
    logits = np.sin(rows / 9) * 2 + np.cos(columns / 13) * 3 - 1.0
    dense = [torch.from_numpy(values).double().flatten() for values in (logits, mask)]
    return mask, box, logits, dense


@pytest.mark.parametrize(("uniform_share", "boundary_share"), SHARES)
def test_sampled_losses_are_those_of_every_pixel(uniform_share, boundary_share):
    """The cross entropy without bias, however few points; the Dice loss as their number grows."""
    mask, box, logits, dense = waves_over_a_disk()

    def sampled(loss, num_points, seed):
        rng = np.random.default_rng(seed)
        points, density = sample_points([mask], box, num_points, uniform_share, boundary_share, rng)
        values = [torch.from_numpy(labels_at([of], points)[0]).double() for of in (logits, mask)]
        return loss(*values, torch.from_numpy(1 / density[0])).item()

    few = np.array([sampled(cross_entropy_loss, 20, seed) for seed in range(4000)])
    assert abs(few.mean() - cross_entropy_loss(*dense).item()) < 4 * few.std() / len(few) ** 0.5
    assert few.std() > 0.02  # so that the line above says something
    assert sampled(dice_loss, 200000, 0) == pytest.approx(dice_loss(*dense).item(), abs=0.005)


def test_losses_at_uncertain_points_are_those_of_every_pixel():
    """Drawn from candidates that crowd near the boundary; the two weights of a point multiply."""
    mask, box, logits, dense = waves_over_a_disk()

    def sampled(loss, num_points, seed):
        torch.manual_seed(seed)
        points, density = sample_points([mask], box, 4 * num_points, 0.3, 0.4, np.random.default_rng(seed))
        values = [torch.from_numpy(labels_at([of], points)[0]).double() for of in (logits, mask)]
        probability = values[0].sigmoid()
        chosen, factors = draw_uncertain(probability * (1 - probability), num_points)
        return loss(*(of[chosen] for of in values), factors / torch.from_numpy(density[0])[chosen]).item()

    few = np.array([sampled(cross_entropy_loss, 20, seed) for seed in range(1000)])
    assert abs(few.mean() - cross_entropy_loss(*dense).item()) < 4 * few.std() / len(few) ** 0.5
    assert few.std() > 0.02  # so that the line above says something
    off = [abs(sampled(dice_loss, num_points, 0) - dice_loss(*dense).item()) for num_points in (20, 100_000)]
    assert off[1] < 0.005 < off[0]


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


def test_clicks_are_drawn_uniformly_from_the_object():
    mask = np.zeros((6, 9), bool)
    mask[1:3, 2:7], mask[5, 8] = True, True
    rng = np.random.default_rng(0)
    clicks = np.stack([draw_click(mask, rng) for _ in range(6000)])
    assert labels_at([mask], clicks[None]).all()
    counts = np.zeros(mask.shape)
    np.add.at(counts, tuple(clicks.astype(int)[:, ::-1].T), 1)
    np.testing.assert_allclose(counts[mask] / len(clicks), 1 / 11, atol=0.015)
    within = clicks - np.floor(clicks)
    np.testing.assert_allclose(within.mean(axis=0), 0.5, atol=0.02)
    np.testing.assert_allclose(within.std(axis=0), 12**-0.5, atol=0.02)


def test_the_innermost_pixel_by_hand():
    mask = np.zeros((9, 12), bool)
    mask[2:7, 1:6] = True
    assert innermost_click(mask).tolist() == [3.5, 4.5]
    mask[2:7, 6] = True  # two columns are as far inside
    assert innermost_click(mask).tolist() == [3.5, 4.5]
    mask[:, 8:] = True  # larger, but the image ends there
    assert innermost_click(mask).tolist() == [3.5, 4.5]
    assert innermost_click(np.ones((3, 5), bool)).tolist() == [1.5, 1.5]
    mask = np.zeros((4, 6), bool)
    mask[3, 5] = True
    assert innermost_click(mask).tolist() == [5.5, 3.5]


def test_clicks_of_label_maps(label_folder, processor):
    examples = load_examples(str(label_folder), "train")
    options = {"augmentation": "none", "num_points": 400, "uniform_share": 0.0}
    dataset = PromptedSegmentationDataset(examples, processor, prompt="click", **options)
    item, mask = dataset[1], examples[1]["mask"]
    assert item["input_points"].shape == (2, 1, 2) and item["input_labels"].tolist() == [[1], [1]]
    assert "input_boxes" not in item and item["class_labels"].tolist() == [0, 1]
    scale = np.array(mask.shape[::-1]) / item["reshaped_input_sizes"].numpy()[::-1]
    clicks = item["input_points"].double().numpy() * scale
    assert labels_at([mask == 1, mask == 2], clicks).all()
    exact = PromptedSegmentationDataset(examples, processor, box_jitter=0, **options)[1]
    for key in ("coordinates", "point_areas"):  # around the object's own box
        for edge in (torch.amin, torch.amax):
            torch.testing.assert_close(edge(item[key], dim=1), edge(exact[key], dim=1), atol=0.05, rtol=0)
    assert_equal_items(dataset[1], item)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[1]["input_points"], item["input_points"])
    loose = PromptedSegmentationDataset(examples, processor, prompt="click", box_jitter=0.4, **options)
    dataset.set_epoch(0)
    assert_equal_items(loose[1], item)
    batch = collate_prompts([dataset[0], item])
    assert batch["input_points"].shape == (2, 2, 1, 2) and batch["input_labels"].tolist() == [[[1], [1]], [[1], [1]]]
    assert torch.equal(batch["input_points"][0, 0], batch["input_points"][0, 1])
    assert batch["prompt_attention_mask"].tolist() == [[True, False], [True, True]]


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
        "prompt": "scribble",
        "point_weighting": "some",
        "supervision": "all",
        "augmentation": "wild",
        "copy_paste": 1.5,
        "boundary_share": 0.6,
    }.items():
        with pytest.raises(ValueError, match=f"Expected {name}"):
            PromptedSegmentationDataset(examples, make_processor(), **{name: value})
