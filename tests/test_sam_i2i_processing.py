"""SAM-I2I's image processor: intensities by hand, per volume, padding, and exactly back."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import AutoImageProcessor

from imedsam import SamI2IImageProcessor


@pytest.fixture
def processor():
    """Whose `pixel_values` are intensities in [0, 1], and whose range is all of a volume's."""
    return SamI2IImageProcessor(percentiles=(0, 100), image_mean=(0, 0, 0), image_std=(1, 1, 1))


def draw(height, width, dtype=np.uint8, seed=0):
    limits = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(limits.min, limits.max, (height, width), dtype, endpoint=True)


def test_by_hand():
    processor = SamI2IImageProcessor(percentiles=(0, 100), image_mean=(0.5, 0, 0.1), image_std=(0.5, 1, 0.2))
    inputs = processor(np.array([[10, 20], [30, 50]]))
    assert inputs["pixel_values"].shape == (1, 3, 8, 8) and inputs["pixel_values"].dtype == torch.float32
    grey = torch.tensor([[0, 0.25], [0.5, 1]])
    expected = torch.stack([(grey - 0.5) / 0.5, grey, (grey - 0.1) / 0.2])
    assert_close(inputs["pixel_values"][0, :, :2, :2], expected)
    assert_close(inputs["pixel_values"][0, :, 2:, 2:], torch.tensor([-1.0, 0, -0.5])[:, None, None].expand(3, 6, 6))
    assert inputs["original_sizes"].tolist() == [[2, 2]] and inputs["intensity_range"].tolist() == [10, 50]
    assert inputs["intensity_range"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32])
def test_integers_come_back_exactly(processor, dtype):
    slices = [draw(13, 10, dtype, seed) for seed in range(3)]
    inputs = processor(slices, labels=slices)
    assert inputs["labels"].shape == (3, 1, 16, 16)
    back = processor.post_process_reconstruction(inputs["labels"], inputs["original_sizes"], inputs["label_range"])
    for values, expected in zip(back, slices, strict=True):
        if dtype is np.int32:  # of which float32 has the first 24 bits
            assert_close(values, torch.from_numpy(expected).double(), rtol=0, atol=2**32 / 2**24)
        else:
            assert (values.round() == torch.from_numpy(expected.astype(np.int64))).all()


def test_what_it_reads(processor):
    """One slice in every form that it can have."""
    grey = draw(9, 12)
    expected = processor(grey)["pixel_values"]
    assert_close(expected[0, 0, :9, :12], torch.from_numpy((grey - grey.min()) / np.ptp(grey).astype(np.float32)))
    forms = [
        Image.fromarray(grey),
        Image.fromarray(grey).convert("RGB"),
        Image.fromarray(grey).convert("LA"),
        Image.fromarray(grey).convert("I"),
        Image.fromarray(grey).convert("F"),
        Image.fromarray(grey.astype(np.uint16) * 257),
        torch.from_numpy(grey),
        torch.from_numpy(grey)[None].double() / 7 - 3,
        grey.astype(np.int16) - 300,
        grey.astype(">f4"),
        np.stack([grey] * 3, axis=-1),
        [grey],
    ]
    assert [form.mode for form in forms[:6]] == ["L", "RGB", "LA", "I", "F", "I;16"]
    for form in forms:
        assert_close(processor(form)["pixel_values"], expected)
    colours = np.stack([grey, grey, 255 - grey], axis=-1)
    for image in (colours, Image.fromarray(colours)):
        with pytest.raises(ValueError, match="Expected image 0 to be grey, got colours: choose a channel"):
            processor(image)


def test_the_range_is_of_the_volume(processor):
    dark, bright = np.array([[0, 100]]), np.array([[50, 400]])
    together = processor([dark, bright])
    assert together["intensity_range"].tolist() == [0, 400]
    assert_close(together["pixel_values"][:, 0, 0, :2], torch.tensor([[0, 0.25], [0.125, 1]]))
    volume_range = processor.get_intensity_range([dark, bright])
    alone = processor(dark, intensity_range=volume_range)
    assert_close(alone["pixel_values"][0], together["pixel_values"][0])
    assert not torch.equal(processor(dark)["pixel_values"][0], together["pixel_values"][0])
    clipped = processor(bright, intensity_range=(100, 200), labels=bright, label_range=(0, 100))
    assert clipped["pixel_values"][0, 0, 0, :2].tolist() == [0, 1]
    assert clipped["labels"][0, 0, 0, :2].tolist() == [0.5, 1] and clipped["label_range"].tolist() == [0, 100]
    assert processor(np.full((4, 4), 7))["pixel_values"].abs().max() == 0  # one value is no range


def test_percentiles():
    values = np.arange(1001.0).reshape(7, 143)
    assert SamI2IImageProcessor().get_intensity_range(values) == pytest.approx((0, 999))
    assert SamI2IImageProcessor(percentiles=(1, 90)).get_intensity_range([values, values]) == pytest.approx((10, 900))


def test_padding_and_cropping():
    processor = SamI2IImageProcessor(size_divisor=32, percentiles=(0, 100))
    slices = [draw(33, 20), draw(30, 64, seed=1)]
    inputs = processor(slices, labels=slices)
    assert inputs["pixel_values"].shape == (2, 3, 64, 64) and inputs["labels"].shape == (2, 1, 64, 64)
    assert inputs["original_sizes"].tolist() == [[33, 20], [30, 64]]
    for label, (height, width) in zip(inputs["labels"][:, 0], inputs["original_sizes"].tolist(), strict=True):
        assert label[height:].abs().max() == 0 and (label[:, width:] == 0).all() and label[:height, :width].max() > 0.9
    cropped = processor.post_process_reconstruction(torch.rand(2, 1, 64, 64), inputs["original_sizes"], (-10, 30))
    assert [tuple(values.shape) for values in cropped] == [(33, 20), (30, 64)]
    assert cropped[0].dtype == torch.float64 and -10 <= cropped[0].min() < -9 and 29 < cropped[0].max() <= 30


def test_save_and_load(tmp_path):
    processor = SamI2IImageProcessor(32, (0.5, 99), (0, 0, 0), (1, 2, 3))
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is SamI2IImageProcessor and loaded.to_dict() == processor.to_dict()
    image = draw(20, 20)
    assert_close(loaded(image)["pixel_values"], processor(image)["pixel_values"], rtol=0, atol=0)
    assert SamI2IImageProcessor.from_pretrained(tmp_path, size_divisor=16).size_divisor == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divisor": 8}, "Expected options among size_divisor, percentiles, .*, got divisor: check the spelling"),
        ({"size_divisor": 0}, "Expected size_divisor as a positive integer, got 0"),
        ({"size_divisor": 8.0}, "Expected size_divisor as a positive integer, got 8.0"),
        ({"percentiles": (50, 50)}, r"Expected percentiles=\(low, high\) with 0 <= low < high <= 100, got \(50, 50\)"),
        ({"percentiles": (0, 101)}, "Expected percentiles"),
        ({"percentiles": (99,)}, "Expected percentiles"),
        ({"image_mean": (0, 0)}, "Expected image_mean as three finite numbers"),
        ({"image_std": (1, 0, 1)}, "Expected image_std above 0"),
    ],
)
def test_options_without_a_meaning(options, message):
    with pytest.raises(ValueError, match=message):
        SamI2IImageProcessor(**options)


def test_what_it_refuses(processor):
    image = draw(8, 8)
    for given, message in (
        (np.zeros((0, 4)), "Expected image 0 to have pixels, got 0 rows and 4 columns"),
        ([image, np.full((2, 2), np.nan)], "Expected finite values in image 1, got NaN or infinity"),
        ([], "Expected at least one image, got an empty list"),
        (np.zeros((2, 3, 4, 5, 6)), r"Expected image 0 of shape \(H, W\) or"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(given)
    for given, message in ((np.zeros((4, 4), complex), "got complex128"), ("a.png", "got str: open files first")):
        with pytest.raises(TypeError, match=message):
            processor(given)
    with pytest.raises(TypeError, match="options of a call, got percentiles: set the others when the processor is"):
        processor(image, percentiles=(0, 50))
    for labels in ([image[:4]], [image, image]):
        with pytest.raises(ValueError, match=r"Expected labels of the images' sizes \[\(8, 8\)\], got .*on one grid"):
            processor(image, labels=labels)
    for wrong in ((3, 1), (0, np.inf)):
        with pytest.raises(ValueError, match=r"Expected a range \(low, high\) with low <= high, both finite, got"):
            processor(image, intensity_range=wrong)
    for reconstruction, sizes in ((torch.zeros(1, 8, 8), [[8, 8]]), (torch.zeros(2, 1, 8, 8), [[8, 8]])):
        with pytest.raises(ValueError, match="Expected a reconstruction of shape .* and 1 sizes: pass both as they"):
            processor.post_process_reconstruction(reconstruction, sizes)
