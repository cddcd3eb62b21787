"""The processors against hand-made numpy: intensities, geometry there and back, prompts, messages, files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

from imedsam.processing.image_processing_imedsam import IMedSamImageProcessor, to_numpy
from imedsam.processing.processing_imedsam import IMedSamProcessor

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
SIZES = [(384, 384), (352, 352), (288, 384), (578, 1048), (1048, 578), (17, 1000), (1, 5)]
MODES = ["stretch", "longest_side"]


def make_processor(size=8, **options):
    return IMedSamProcessor(IMedSamImageProcessor(size=size, **options))


def expect(unit):
    """(H, W) or (H, W, 3) intensities in [0, 1] to (3, H, W) normalised."""
    unit = np.asarray(unit, np.float64)
    unit = np.repeat(unit[..., None], 3, axis=-1) if unit.ndim == 2 else unit
    return torch.from_numpy(((unit - MEAN) / STD).transpose(2, 0, 1).astype(np.float32))


RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
RGBA = RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
RGB = RGBA[..., :3]
GREY16 = RNG.integers(0, 65536, (8, 8), dtype=np.uint16)
UNIT = RNG.random((8, 8), dtype=np.float32)
BITS = RNG.random((8, 8)) > 0.5
PALETTE = Image.fromarray(RGB).quantize(16)
TRANSPARENT = PALETTE.copy()
TRANSPARENT.info["transparency"] = bytes([0] + [255] * 15)
GREY_ALPHA = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(RGBA[..., 3].copy())))

# name: (image, its intensities in [0, 1])
IMAGES = {
    "PIL L": (Image.fromarray(GREY), GREY / 255),
    "PIL RGB": (Image.fromarray(RGB), RGB / 255),
    "PIL RGBA": (Image.fromarray(RGBA), RGB / 255),
    "PIL LA": (GREY_ALPHA, GREY / 255),
    "PIL I;16": (Image.fromarray(GREY16), GREY16 / 65535),
    "PIL F": (Image.fromarray(UNIT), UNIT),
    "PIL 1": (Image.fromarray(BITS), BITS),
    "PIL P": (PALETTE, np.asarray(PALETTE.convert("RGB")) / 255),
    "PIL P transparent": (TRANSPARENT, np.asarray(PALETTE.convert("RGB")) / 255),
    "PIL CMYK": (Image.fromarray(RGB).convert("CMYK"), RGB / 255),
    "numpy (H, W) uint8": (GREY, GREY / 255),
    "numpy (H, W) uint16": (GREY16, GREY16 / 65535),
    "numpy (H, W) big-endian uint16": (GREY16.astype(">u2"), GREY16 / 65535),
    "numpy (H, W) float64": (UNIT.astype(np.float64), UNIT),
    "numpy (H, W) bool": (BITS, BITS),
    "numpy (H, W, 1)": (GREY[..., None], GREY / 255),
    "numpy (H, W, 3)": (RGB, RGB / 255),
    "numpy (H, W, 4)": (RGBA, RGB / 255),
    "numpy (3, H, W)": (RGB.transpose(2, 0, 1), RGB / 255),
    "torch (H, W)": (torch.from_numpy(GREY), GREY / 255),
    "torch (1, H, W) uint16": (torch.from_numpy(GREY16[None]), GREY16 / 65535),
    "torch (3, H, W)": (torch.from_numpy(RGB.transpose(2, 0, 1).copy()), RGB / 255),
    "torch (4, H, W)": (torch.from_numpy(RGBA.transpose(2, 0, 1).copy()), RGB / 255),
    "torch float": (torch.from_numpy(UNIT).requires_grad_(), UNIT),
    "torch bfloat16": (torch.full((8, 8), 0.25, dtype=torch.bfloat16), np.full((8, 8), 0.25)),
}


def copy(image):
    return to_numpy(image).copy() if isinstance(image, torch.Tensor) else np.array(image)


@pytest.mark.parametrize("name", IMAGES)
def test_every_kind_of_image_gives_the_computed_values(name):
    image, unit = IMAGES[name]
    before = copy(image)
    output = make_processor().image_processor(image)
    assert_close(output["pixel_values"], expect(unit)[None], rtol=0, atol=2e-6)
    assert output["original_sizes"].tolist() == output["reshaped_input_sizes"].tolist() == [[8, 8]]
    assert [output[key].dtype for key in output] == [torch.float32, torch.int64, torch.int64]
    assert np.array_equal(before, copy(image))


@pytest.mark.parametrize("mode", MODES)
def test_batch_equals_singles(mode):
    processor = make_processor(16, resize_mode=mode)
    images = [RGB, Image.fromarray(GREY16), torch.rand(3, 5, 40), np.full((7, 3), 9, np.uint8)]
    batch = processor.image_processor(images)
    for i, image in enumerate(images):
        single = processor.image_processor(image)
        for key in batch:
            assert_close(batch[key][i : i + 1], single[key], rtol=0, atol=0)
    stacked = processor.image_processor(np.stack([RGB, RGB[::-1]]))
    assert_close(stacked["pixel_values"][1:], processor.image_processor(RGB[::-1].copy())["pixel_values"])


def test_sixteen_bit_detail_survives():
    image = np.array([[30000, 30001], [30002, 30003]], np.uint16).repeat(4, 0).repeat(4, 1)
    for kind in (image, Image.fromarray(image), torch.from_numpy(image)):
        red = make_processor(8).image_processor(kind)["pixel_values"][0, 0] * 0.229 + 0.485
        levels = [red[0, 0], red[0, 7], red[7, 0], red[7, 7]]
        assert_close(torch.stack(levels) * 65535, torch.tensor([30000.0, 30001, 30002, 30003]), rtol=0, atol=0.02)
    shrunk = make_processor(4).image_processor(image)["pixel_values"][0, 0]
    assert (shrunk[0, 0] < shrunk[0, 3]) and (shrunk[0, 3] < shrunk[3, 0])


def test_window_maps_and_clips():
    image = np.array([[-1000, -160], [40, 3000]], np.int16)
    unit = np.array([[0, 0], [0.5, 1]])
    kinds = (image, image.astype(np.int32), image.astype(np.float32), torch.from_numpy(image))
    for kind in (*kinds, Image.fromarray(image.astype(np.int32))):
        for processor, options in (
            (make_processor(2, window=(-160, 240)), {}),
            (make_processor(2), {"window": [-160, 240]}),
        ):
            output = processor(kind, **options)
            assert_close(output["pixel_values"][0], expect(unit), rtol=0, atol=1e-6)
    uint8 = make_processor(2, window=(0, 10))(np.array([[0, 5], [10, 20]], np.uint8))["pixel_values"][0]
    assert_close(uint8, expect([[0, 0.5], [1, 1]]), rtol=0, atol=1e-6)


def test_resizing_is_bilinear_and_the_padding_exactly_zero():
    image = np.array([[0.0, 1.0]])
    processor = make_processor(4, resize_mode="longest_side", image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 1.0))
    output = processor.image_processor(image)
    assert output["reshaped_input_sizes"].tolist() == [[2, 4]]
    row = torch.tensor([-1.0, -0.5, 0.5, 1.0])  # 0, 0.25, 0.75, 1 at the centres of four pixels
    assert_close(output["pixel_values"][0, 0], torch.stack([row, row, 0 * row, 0 * row]))
    assert_close(output["pixel_values"][0, 2], torch.stack([row, row, 0 * row, 0 * row]) / 2)


def test_shrinking_smooths_as_pillow_does():
    image = RNG.random((50, 64), dtype=np.float32)
    pillow = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR))
    assert_close(make_processor(16).image_processor(image)["pixel_values"][0], expect(pillow), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_boxes_there_and_back(size, mode):
    height, width = size
    processor = make_processor(384, resize_mode=mode)
    boxes = [
        [0, 0, width, height],
        [0, 0, 1, 1],
        [width - 1, height - 1, width, height],
        [width / 3, height / 7, width / 2, height / 3],
        [width / 2, 0, width / 2, height],
    ]
    output = processor(np.zeros(size, np.uint8), input_boxes=boxes)
    reshaped = output["reshaped_input_sizes"][0].tolist()
    assert reshaped == ([384, 384] if mode == "stretch" else [max(1, round(384 * side / max(size))) for side in size])
    assert output["input_boxes"].dtype == torch.float32
    assert output["input_boxes"][0, 0].tolist() == [0, 0, reshaped[1], reshaped[0]]
    back = processor.boxes_to_image(output["input_boxes"], output["original_sizes"], output["reshaped_input_sizes"])
    assert_close(back[0], torch.tensor(boxes, dtype=torch.float32), rtol=0, atol=1e-3)


def draw_boxes(height, width, shortest):
    """Integer boxes at each border, in the corners and inside, at least `shortest` (x, y) pixels long."""
    dx, dy = min(shortest[0], width), min(shortest[1], height)
    x, y = (width - dx) // 2, (height - dy) // 3
    corners = [(0, 0), (width - dx, 0), (0, height - dy), (width - dx, height - dy)]
    starts = [*corners, (x, y), (x, 0), (0, y), (x, height - dy), (width - dx, y)]
    return [(x0, y0, x0 + dx, y0 + dy) for x0, y0 in starts] + [(0, 0, width, height), (x, 0, x + dx, height)]


def find_box(mask):
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]


def render(output, side, inside):
    """(B, P, 1, S, S) logits of the boxes at the model's pixel centres: +-1 or the distance to the box's border."""
    centres = torch.arange(side) + 0.5
    x0, y0, x1, y1 = output["input_boxes"][..., None, None, None].unbind(2)
    x = torch.minimum(centres - x0, x1 - centres)
    y = torch.minimum(centres[:, None] - y0, y1 - centres[:, None])
    return torch.minimum(x, y) if not inside else ((x > 0) & (y > 0)) * 2.0 - 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_masks_come_back_on_the_boxes(size, mode):
    """Rendered +-1 at the model's pixels, every side comes back within half a model pixel.

    On the user's grid that is round(half a model pixel): exact where the model's pixels are the finer ones.
    """
    processor = make_processor(384, resize_mode=mode)
    scale = np.array(size)[::-1] / np.array(processor.image_processor.get_reshaped_size(*size))[::-1]
    shortest = np.ceil(3 * scale).astype(int) if (scale > 1).any() else np.array([2, 2])
    boxes = draw_boxes(*size, shortest.tolist())
    output = processor(np.zeros(size, np.uint8), input_boxes=boxes)
    masks = processor.post_process_masks(
        render(output, 384, inside=True), output["original_sizes"], output["reshaped_input_sizes"]
    )[0]
    assert masks.dtype == torch.bool and masks.shape == (len(boxes), 1, *size)
    tolerance = np.where(scale > 1, scale / 2 + 0.5, 0).tolist() * 2
    for box, mask in zip(boxes, masks[:, 0], strict=True):
        assert (np.abs(np.subtract(find_box(mask), box)) <= tolerance).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "size, side", [((384, 384), 384), ((352, 352), 384), ((17, 100), 384), ((1, 5), 384), ((288, 522), 576)]
)
def test_boxes_of_one_pixel_come_back_exactly(size, mode, side):
    """Where the model's pixels are the finer ones, also a single pixel comes back, with a box on every border."""
    processor = make_processor(side, resize_mode=mode)
    boxes = draw_boxes(*size, (1, 1)) + draw_boxes(*size, (2, 3))
    output = processor(np.zeros(size, np.uint8), input_boxes=boxes)
    masks = processor.post_process_masks(
        render(output, side, inside=False), output["original_sizes"], output["reshaped_input_sizes"]
    )[0]
    assert [find_box(mask) for mask in masks[:, 0]] == [list(box) for box in boxes]
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes]
    assert masks.sum((1, 2, 3)).tolist() == areas


def test_image_regions():
    sizes = [(100, 200), (200, 100), (50, 50)]
    stretched = make_processor(8).get_image_regions(sizes, [(8, 8)] * 3)
    assert_close(stretched, torch.tensor([[-1.0, -1, 1, 1]] * 3))
    regions = make_processor(8, resize_mode="longest_side").get_image_regions(
        sizes, torch.tensor([(4, 8), (8, 4), (8, 8)])
    )
    assert_close(regions, torch.tensor([[-1.0, -1, 1, 0], [-1, -1, 0, 1], [-1, -1, 1, 1]]))
    assert regions.dtype == torch.float32


def test_masks_at_another_size_and_resolution():
    processor = make_processor(8, resize_mode="longest_side")
    ramp = (torch.arange(16) + 0.5) / 16  # x / S at the centres of a mask twice as fine as the model's pixels
    masks = ramp.expand(1, 2, 1, 16, 16).contiguous()
    sizes, reshaped = [(30, 24)], [(8, 6)]
    logits = processor.post_process_masks(masks, sizes, reshaped, output_sizes=[(5, 12)], binarize=False)
    assert len(logits) == 1 and logits[0].shape == (2, 1, 5, 12) and logits[0].dtype == torch.float32
    assert_close(logits[0][1, 0], (0.75 * (torch.arange(12) + 0.5) / 12).expand(5, 12))
    halves = processor.post_process_masks(masks, sizes, reshaped, output_sizes=[(5, 12)], mask_threshold=0.375)
    assert halves[0][0, 0].sum(1).tolist() == [6] * 5
    # The border of the image falls between two pixels of a coarse mask: 3.5 of 4 rows. Nothing beyond row 4 is read.
    coarse = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(1, 1, 1, 4, 4).contiguous()
    rows = processor.post_process_masks(coarse, [(7, 8)], [(7, 8)], binarize=False)[0][0, 0, :, 0]
    assert_close(rows, torch.tensor([1.0, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75]))


def test_masks_of_a_stretched_image_are_interpolated_as_torch_does():
    masks = torch.randn(2, 3, 2, 8, 8)
    result = make_processor(32).post_process_masks(masks, [(20, 31), (5, 9)], [(32, 32)] * 2, binarize=False)
    for mask, got, size in zip(masks, result, [(20, 31), (5, 9)], strict=True):
        assert_close(got, torch.nn.functional.interpolate(mask, size=size, mode="bilinear"), rtol=1e-4, atol=1e-5)


def test_label_map_rule():
    processor = make_processor(2)
    sizes = dict(original_sizes=[(2, 2)], reshaped_input_sizes=[(2, 2)])
    # One prompt, two classes: the higher of the positive logits wins.
    classes = torch.tensor([[[1.0, -1.0], [2.0, -3.0]], [[0.5, 4.0], [3.0, -0.1]]])[None, None]
    labels = processor.post_process_label_map(classes, **sizes)
    assert labels[0].dtype == torch.int64 and labels[0].tolist() == [[1, 2], [2, 0]]
    # The same masks as two prompts of one mask each, with their classes and without.
    prompts = classes.transpose(1, 2)
    assert processor.post_process_label_map(prompts, **sizes)[0].tolist() == [[1, 1], [1, 0]]
    asked = torch.tensor([[4, 1]])
    assert processor.post_process_label_map(prompts, **sizes, class_labels=asked)[0].tolist() == [[5, 2], [2, 0]]
    # A padded prompt has no say; several prompts and classes compete together.
    real = torch.tensor([[True, False]])
    padded = processor.post_process_label_map(prompts, **sizes, class_labels=asked, prompt_attention_mask=real)
    assert padded[0].tolist() == [[5, 0], [5, 0]]
    both = torch.cat([classes, 2 * classes.flip(2)], dim=1)
    assert processor.post_process_label_map(both, **sizes)[0].tolist() == [[2, 1], [1, 0]]
    assert processor.post_process_label_map(classes, **sizes, output_sizes=[(4, 6)])[0].shape == (4, 6)


def test_ragged_boxes_are_padded():
    images = [np.zeros((8, 16), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((2, 2), np.uint8)]
    boxes = [[[0, 0, 4, 4]], np.array([[0, 0, 4, 4], [1, 1, 2, 4]]), []]
    output = make_processor(8, resize_mode="longest_side")(images, input_boxes=boxes, class_labels=[[3], [1, 2], []])
    square = [0, 0, 8, 8]
    assert output["input_boxes"].tolist() == [[[0, 0, 2, 2], square], [square, [2, 2, 4, 8]], [square, square]]
    assert output["prompt_attention_mask"].tolist() == [[True, False], [True, True], [False, False]]
    assert output["class_labels"].tolist() == [[3, 0], [1, 2], [0, 0]]
    assert [output[key].dtype for key in ("input_boxes", "prompt_attention_mask", "class_labels")] == [
        torch.float32,
        torch.bool,
        torch.int64,
    ]


def test_ragged_points_are_padded_with_sams_label():
    images = [np.zeros((4, 4), np.uint8), np.zeros((8, 16), np.uint8)]
    points = [[[[1, 2], [4, 4]], [[0, 0]]], [torch.tensor([[16.0, 8.0]])]]
    output = make_processor(8)(images, input_points=points, input_labels=[[[1, 0], [1]], [[0]]])
    assert output["input_points"].tolist() == [
        [[[2, 4], [8, 8]], [[0, 0], [0, 0]]],
        [[[8, 8], [0, 0]], [[0, 0], [0, 0]]],
    ]
    assert output["input_labels"].tolist() == [[[1, 0], [1, -10]], [[0, -10], [-10, -10]]]
    assert output["prompt_attention_mask"].tolist() == [[True, True], [True, False]]
    assert output["input_points"].dtype == torch.float32 and output["input_labels"].dtype == torch.int64
    default = make_processor(8)(images, input_points=points)
    assert default["input_labels"].tolist() == [[[1, 1], [1, -10]], [[1, -10], [-10, -10]]]


def test_a_single_image_may_leave_out_the_leading_levels():
    processor, image = make_processor(8), np.zeros((8, 8), np.uint8)
    box, mask = [1, 2, 3, 4], np.zeros((8, 8), bool)
    for boxes in (box, [box], [[box]], np.array(box), torch.tensor([box]), (tuple(box),), [torch.tensor(box)]):
        assert processor(image, input_boxes=boxes)["input_boxes"].tolist() == [[box]]
    for points in ([1, 2], [[1, 2]], [[[1, 2]]], [[[[1, 2]]]], torch.tensor([[[1, 2]]])):
        assert processor(image, input_points=points)["input_points"].tolist() == [[[[1, 2]]]]
    assert processor(image, input_points=[[1, 2], [3, 4]], input_labels=[1, 0])["input_labels"].tolist() == [[[1, 0]]]
    for masks in (mask, [mask], [[mask]], mask[None], mask.tolist(), torch.from_numpy(mask), Image.fromarray(mask)):
        assert processor(image, input_masks=masks)["input_masks"].shape == (1, 1, 2, 2)
    for labels in (3, [3], [[3]], np.int64(3), torch.tensor([3])):
        assert processor(image, class_labels=labels)["class_labels"].tolist() == [[3]]
    assert set(processor(image)) == {"pixel_values", "original_sizes", "reshaped_input_sizes"}


def test_boxes_over_the_border_are_clipped():
    image = np.zeros((10, 20), np.uint8)
    boxes = [[-5, 2, 4, 99], [-1, -1, 0, 0], [20, 10, 25, 12]]
    output = make_processor(20, resize_mode="longest_side")(image, input_boxes=boxes)
    assert output["input_boxes"][0].tolist() == [[0, 2, 4, 10], [0, 0, 0, 0], [20, 10, 20, 10]]


def test_mask_prompts_follow_the_image():
    mask = np.zeros((8, 16), bool)
    mask[:, :8] = True  # the left half of an image that takes the upper half of the square
    stretched = make_processor(16)(mask, input_masks=mask)["input_masks"]
    assert stretched.shape == (1, 1, 4, 4) and stretched.dtype == torch.float32
    assert_close(stretched[0, 0], torch.tensor([10.0, 10, -10, -10]).expand(4, 4))
    padded = make_processor(16, resize_mode="longest_side")(mask, input_masks=[mask, mask * np.uint8(255)])[
        "input_masks"
    ]
    assert_close(padded[0, 0, :2], torch.tensor([10.0, 10, -10, -10]).expand(2, 4))
    assert_close(padded[0, 0, 2:], torch.full((2, 4), -10.0))
    assert_close(padded[0, 1], padded[0, 0])
    # The image's border falls in the middle of the second row of the mask.
    border = make_processor(16, resize_mode="longest_side")(mask[:6], input_masks=np.ones((6, 16)))["input_masks"]
    assert_close(border[0, 0], torch.tensor([10.0, 0, -10, -10])[:, None].expand(4, 4))
    soft = make_processor(16)(mask, input_masks=np.full((8, 16), 0.75, np.float32))["input_masks"]
    assert_close(soft, torch.full((1, 1, 4, 4), 5.0))
    images = [mask, np.ones((2, 2), bool)]
    ragged = make_processor(8)(images, input_masks=[[], [np.ones((2, 2)), np.zeros((2, 2), np.int16)]])
    assert ragged["prompt_attention_mask"].tolist() == [[False, False], [True, True]]
    assert ragged["input_masks"][:, :, 0, 0].tolist() == [[-10, -10], [10, -10]]


def test_prompts_of_an_encoded_image_and_numpy_output():
    processor, image = make_processor(8), np.zeros((4, 4), np.uint8)
    prompts = dict(input_boxes=[0, 0, 2, 2], input_points=[1, 1], class_labels=2, input_masks=np.ones((4, 4)))
    together = processor(image, **prompts)
    sizes = {key: together[key] for key in ("original_sizes", "reshaped_input_sizes")}
    alone = processor.process_prompts(**sizes, **prompts)
    assert set(alone) == set(together) - set(sizes) - {"pixel_values"}
    for key in alone:
        assert_close(alone[key], together[key])
    arrays = processor(image, **prompts, return_tensors="np")
    assert set(processor.model_input_names) == set(together)
    for key, value in together.items():
        assert isinstance(arrays[key], np.ndarray)
        assert np.array_equal(arrays[key], value.numpy()) and arrays[key].dtype == value.numpy().dtype


ZEROS = np.zeros((8, 8), np.uint8)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(size={"height": 8, "width": 4}), "Expected a square size.*longest_side"),
        (dict(size={"longest_edge": 8}), "Expected a square size"),
        (dict(resize_mode="crop"), "resize_mode to be one of.*got 'crop'"),
        (dict(window=(5, 5)), "low < high"),
        (dict(window=(0, float("inf"))), "both finite"),
        (dict(image_mean=(0.5,)), "image_mean as three"),
        (dict(image_std=(1, 1, 0)), "image_std above 0"),
        (dict(do_resize=False, resizemode="stretch"), "options among size.*got do_resize, resizemode"),
    ],
)
def test_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IMedSamImageProcessor(**options)


@pytest.mark.parametrize(
    "image, error, message",
    [
        (np.zeros((0, 5)), ValueError, "image 0 to have pixels, got 0 rows and 5 columns"),
        (torch.zeros(3, 5, 0), ValueError, "got 5 rows and 0 columns"),
        ([GREY, np.full((2, 2), np.nan)], ValueError, "finite values in image 1"),
        (np.array([[0, np.inf]]), ValueError, "NaN or infinity"),
        (np.array([[0.0, 1.5]]), ValueError, r"floats in \[0, 1\] in image 0, got 0 to 1.5.*window"),
        (np.array([[-0.5, 1.0]], np.float32), ValueError, "got -0.5 to 1"),
        (np.zeros((2, 2), np.int16), ValueError, r"window=\(low, high\) for the int16 values"),
        (Image.fromarray(np.zeros((2, 2), np.int32)), ValueError, "window.*int32"),
        (torch.zeros(4, 4, dtype=torch.int64), ValueError, "window.*int64"),
        (np.zeros((8, 8, 2), np.uint8), ValueError, r"\(H, W\) or \(H, W, 1 | 3 | 4\), got \(8, 8, 2\)"),
        (torch.zeros(8, 8, 3), ValueError, r"got \(8, 8, 3\).*channels first"),
        (np.zeros(8), ValueError, r"got \(8,\)"),
        (np.zeros((2, 2), complex), TypeError, "bools, integers or floats"),
        ("scan.png", TypeError, "got str.*PIL.Image.open"),
        ([[1, 2], [3, 4]], TypeError, "got list"),
        ([], ValueError, "at least one image"),
    ],
)
def test_images_are_refused(image, error, message):
    with pytest.raises(error, match=message):
        make_processor()(image)


@pytest.mark.parametrize(
    "prompts, message",
    [
        (dict(input_boxes=[[0, 0, 1, 1], [5, 0, 4, 1]]), r"x0 <= x1.*box 1 = \[5.0.*of image 0.*swap its corners"),
        (dict(input_boxes=[0, 5, 1, 4]), "y0 <= y1"),
        (dict(input_boxes=[0, 0, float("nan"), 4]), "finite boxes.*box 0"),
        (dict(input_boxes=[9, 0, 12, 4]), r"meet the image.*box 0 = \[9.0.*8 pixels wide and 8 high"),
        (dict(input_boxes=[0, -3, 2, -1]), "meet the image"),
        (dict(input_boxes=[0, 0, 2]), r"as boxes \(x0, y0, x1, y1\)"),
        (dict(input_boxes=[[0, 0, 2, 2], [0, 0, 2]]), "equally long rows"),
        (dict(input_boxes=["a", "b", "c", "d"]), "Expected numbers"),
        (dict(input_boxes=[[[[0, 0, 2, 2]]]]), r"nested as image > box > \(x0, y0, x1, y1\), got 4 levels"),
        (dict(input_boxes=[[[0, 0, 2, 2]]] * 2), "for 1 images, got 2"),
        (dict(input_boxes=[]), "at least one prompt"),
        (dict(input_points=[8.5, 1]), "points within the image.*prompt 0 in input_points of image 0"),
        (dict(input_points=[1, float("nan")]), "points within the image"),
        (dict(input_points=[1, 1, 1]), r"points \(x, y\)"),
        (dict(input_points=[[[]]]), "at least one point"),
        (dict(input_labels=[1]), "labels alone"),
        (dict(input_points=[[1, 1], [2, 2]], input_labels=[1]), "one label per point, got 1 labels for 2 points"),
        (dict(input_points=[1, 1], input_labels=[2]), r"1 \(object\) or 0 \(background\), got \[2\]"),
        (
            dict(input_points=[[[1, 1]], [[2, 2]]], input_boxes=[0, 0, 1, 1]),
            "as many prompts in input_points as in input_boxes, got 2 and 1",
        ),
        (dict(input_boxes=[0, 0, 1, 1], class_labels=[0, 1]), "as many prompts in class_labels"),
        (dict(input_masks=np.zeros((8, 7), bool)), r"image's size \(8, 8\), got \(8, 7\)"),
        (dict(input_masks=np.full((8, 8), -3.0)), r"probabilities in \[0, 1\], got -3 to -3.*sigmoid"),
        (dict(input_masks=np.full((8, 8), 2)), r"0 and 1 or of 0 and 255, got \[2\].*mask == label"),
        (dict(class_labels=[-1]), "class indices"),
        (dict(class_labels=[0.5]), "class indices"),
        (dict(size={"height": 4, "width": 4}), "`window` and `return_tensors` as options of a call, got size"),
    ],
)
def test_prompts_are_refused(prompts, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_processor()(ZEROS, **prompts)


def test_batches_are_refused_without_an_entry_per_image():
    with pytest.raises(ValueError, match="got 2 levels for 2 images: only a single image"):
        make_processor()([ZEROS, ZEROS], input_boxes=[[0, 0, 1, 1], [0, 0, 2, 2]])
    with pytest.raises(ValueError, match="got 2 and 1 for image 1"):
        make_processor()([ZEROS, ZEROS], input_boxes=[[[0, 0, 1, 1]]] * 2, class_labels=[[0], [0, 1]])
    with pytest.raises(ValueError, match="divides for input_masks, got 6"):
        make_processor(6)(ZEROS, input_masks=ZEROS)


def test_post_processing_refuses_shapes():
    processor = make_processor()
    with pytest.raises(ValueError, match=r"\(batch, prompts, masks, height, width\), got \(1, 8, 8\)"):
        processor.post_process_masks(torch.zeros(1, 8, 8), [(8, 8)], [(8, 8)])
    with pytest.raises(ValueError, match="got 1 and 1 sizes for 2 images"):
        processor.post_process_masks(torch.zeros(2, 1, 1, 8, 8), [(8, 8)], [(8, 8)])
    with pytest.raises(ValueError, match="got 2 and 1 sizes"):
        processor.get_image_regions([(8, 8)] * 2, [(8, 8)])


OPTIONS = dict(
    size=16, resize_mode="longest_side", image_mean=(0.1, 0.2, 0.3), image_std=(1.0, 2.0, 3.0), window=(-160, 240)
)


def test_image_processor_saves_and_loads(tmp_path):
    saved = IMedSamImageProcessor(**OPTIONS)
    saved.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    content = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert set(content) == {*OPTIONS, "image_processor_type"}
    loaded = IMedSamImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved.to_dict() and loaded.window == (-160.0, 240.0)
    image = np.arange(-200, 300, 5, dtype=np.int16).reshape(4, 25)
    assert_close(loaded(image)["pixel_values"], saved(image)["pixel_values"])
    assert not torch.equal(
        loaded(image)["pixel_values"], IMedSamImageProcessor(window=(0, 1), size=16)(image)["pixel_values"]
    )
    other = IMedSamImageProcessor.from_pretrained(tmp_path, window=(0, 10), resize_mode="stretch")
    assert other.window == (0.0, 10.0) and other.resize_mode == "stretch" and other.image_std == (1.0, 2.0, 3.0)


class UnusedConfig(PreTrainedConfig):
    model_type = "imedsam_processing_test"


def test_processor_saves_and_loads(tmp_path):
    if get_image_processor_class_from_name("IMedSamImageProcessor") is None:
        AutoImageProcessor.register(UnusedConfig, image_processor_classes={"pil": IMedSamImageProcessor})
    saved = make_processor(**OPTIONS)
    saved.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["processor_config.json"]
    loaded = IMedSamProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded.image_processor, IMedSamImageProcessor)
    assert loaded.to_dict() == saved.to_dict()
    image = np.arange(-200, 300, 5, dtype=np.int16).reshape(4, 25)
    for key, value in saved(image, input_boxes=[1, 1, 20, 3]).items():
        assert_close(loaded(image, input_boxes=[1, 1, 20, 3])[key], value)
