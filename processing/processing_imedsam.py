"""Images and prompts in the user's pixels to the model's inputs.

The frames are those of `imedsam.processing.image_processing_imedsam`: prompts come in user coordinates, continuous
(x, y) with (0, 0) at the top-left corner of the image and (W, H) at its bottom-right corner, and leave in model
pixels, the same frame in the S x S square. B images, P prompts per image, N points per prompt.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from imedsam.processing.image_processing_imedsam import IMedSamImageProcessor, to_numpy

# The nesting of every prompt; a single image may leave out the leading levels.
LAYOUTS = {
    "input_boxes": ("image", "box", "(x0, y0, x1, y1)"),
    "input_points": ("image", "prompt", "point", "(x, y)"),
    "input_labels": ("image", "prompt", "point"),
    "input_masks": ("image", "prompt", "row", "column"),
    "class_labels": ("image", "prompt"),
}
PADDED_POINT = -10  # SAM's label for a point that is only padding
MASK_LOGIT = 10.0  # logit of a mask prompt at probability 1, as SAM's own low-resolution logits
MASK_STRIDE = 4  # SAM's mask prompts are four times finer than its patches of 16 pixels


class IMedSamProcessor(ProcessorMixin):
    """An image processor and the prompts that go with its images."""

    def __init__(self, image_processor: IMedSamImageProcessor):
        super().__init__(image_processor)

    def __call__(
        self,
        images: Any,
        input_boxes: Any = None,
        input_points: Any = None,
        input_labels: Any = None,
        input_masks: Any = None,
        class_labels: Any = None,
        return_tensors: str = "pt",
        **images_kwargs,
    ) -> BatchFeature:
        """Prepares images and prompts for the model: `preprocess` of the image processor and `process_prompts`.

        Args:
            images: as in `IMedSamImageProcessor.preprocess`, which also takes `images_kwargs`.
            input_boxes, input_points, input_labels, input_masks, class_labels: as in `process_prompts`.

        Returns:
            `pixel_values`, `original_sizes`, `reshaped_input_sizes`, and what `process_prompts` returns.
        """
        encoding = self.image_processor(images, return_tensors="pt", **images_kwargs)
        prompts = self.process_prompts(
            encoding["original_sizes"],
            encoding["reshaped_input_sizes"],
            input_boxes=input_boxes,
            input_points=input_points,
            input_labels=input_labels,
            input_masks=input_masks,
            class_labels=class_labels,
        )
        return BatchFeature({**encoding, **prompts}, tensor_type=return_tensors)

    def process_prompts(
        self,
        original_sizes: torch.Tensor,
        reshaped_input_sizes: torch.Tensor,
        input_boxes: Any = None,
        input_points: Any = None,
        input_labels: Any = None,
        input_masks: Any = None,
        class_labels: Any = None,
    ) -> dict[str, torch.Tensor]:
        """Prompts alone, for images that are encoded already.

        Prompts are nested lists, arrays or tensors, one entry per image; a single image may leave out the leading
        levels. What is ragged is padded at the end.

        Args:
            original_sizes, reshaped_input_sizes: (B, 2) as the image processor returned them.
            input_boxes: per image boxes (x0, y0, x1, y1). They may reach over the image's border, where they are
                clipped, and may have no width or height.
            input_points: per image and prompt points (x, y) within the image.
            input_labels: per image, prompt and point 1 (object) or 0 (background). All 1 unless given.
            input_masks: per image and prompt a mask (H, W) of the image's size: bools, integers 0/1 or 0/255, or
                probabilities in [0, 1].
            class_labels: per image and prompt the index of a class.

        Returns:
            Of these what was given, and the attention mask with any of them: `input_boxes` (B, P, 4) float32 in model
            pixels, (0, 0, S, S) for padded prompts; `input_points` (B, P, N, 2) float32 in model pixels and
            `input_labels` (B, P, N) int64, padded points being (0, 0) with the label -10; `input_masks`
            (B, P, S / 4, S / 4) float32, logits 10 (2 p - 1) of the probability p, -10 in the padding; `class_labels`
            (B, P) int64, 0 for padded prompts; `prompt_attention_mask` (B, P) bool, True for real prompts.

        Raises:
            ValueError: for prompts that are nested otherwise, lie outside their image or disagree in number.
        """
        if input_labels is not None and input_points is None:
            raise ValueError("Expected input_labels with input_points, got labels alone: pass the points too.")
        sizes = [tuple(size) for size in torch.as_tensor(original_sizes).tolist()]
        reshaped = [tuple(size) for size in torch.as_tensor(reshaped_input_sizes).tolist()]
        values = {
            "input_boxes": _read_prompts("input_boxes", input_boxes, sizes, _read_boxes),
            "input_points": _read_prompts("input_points", input_points, sizes, _read_points),
            "input_labels": _read_prompts("input_labels", input_labels, sizes, _read_labels),
            "input_masks": _read_prompts("input_masks", input_masks, sizes, _read_masks),
            "class_labels": _read_prompts("class_labels", class_labels, sizes, _read_class_labels),
        }
        given = {name: value for name, value in values.items() if value is not None}
        if not given:
            return {}
        counts = _count_prompts(given)
        batch, prompts, side = len(counts), max(counts), self.image_processor.size["height"]

        inputs = {}
        if "input_boxes" in given:
            inputs["input_boxes"] = torch.tensor([0.0, 0.0, side, side]).repeat(batch, prompts, 1)
            for i, boxes in enumerate(given["input_boxes"]):
                inputs["input_boxes"][i, : len(boxes)] = torch.from_numpy(boxes * _scale(sizes[i], reshaped[i], 2))
        if "input_points" in given:
            inputs["input_points"], inputs["input_labels"] = _pad_points(given, prompts, sizes, reshaped)
        if "input_masks" in given:
            shape = (batch, prompts, *self._get_mask_size())
            inputs["input_masks"] = torch.full(shape, -MASK_LOGIT)
            for i, masks in enumerate(given["input_masks"]):
                for p, mask in enumerate(masks):
                    inputs["input_masks"][i, p] = self._get_mask_logits(mask, reshaped[i])
        if "class_labels" in given:
            inputs["class_labels"] = torch.zeros(batch, prompts, dtype=torch.int64)
            for i, labels in enumerate(given["class_labels"]):
                inputs["class_labels"][i, : len(labels)] = torch.from_numpy(labels)
        inputs["prompt_attention_mask"] = torch.arange(prompts) < torch.tensor(counts)[:, None]
        return inputs

    def boxes_to_image(
        self, input_boxes: torch.Tensor, original_sizes: torch.Tensor, reshaped_input_sizes: torch.Tensor
    ) -> list[torch.Tensor]:
        """Boxes (B, P, 4) in model pixels to B tensors (P, 4) in user coordinates, padded prompts included."""
        sizes, reshaped = torch.as_tensor(original_sizes).tolist(), torch.as_tensor(reshaped_input_sizes).tolist()
        return [
            boxes * torch.from_numpy(_scale(old, new, 2)).to(boxes)
            for boxes, old, new in zip(input_boxes, reshaped, sizes, strict=True)
        ]

    def get_image_regions(self, *args, **kwargs) -> torch.Tensor:
        """See `IMedSamImageProcessor.get_image_regions`."""
        return self.image_processor.get_image_regions(*args, **kwargs)

    def post_process_masks(self, *args, **kwargs) -> list[torch.Tensor]:
        """See `IMedSamImageProcessor.post_process_masks`."""
        return self.image_processor.post_process_masks(*args, **kwargs)

    def post_process_label_map(self, *args, **kwargs) -> list[torch.Tensor]:
        """See `IMedSamImageProcessor.post_process_label_map`."""
        return self.image_processor.post_process_label_map(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        sizes = ["original_sizes", "reshaped_input_sizes"]
        return [*self.image_processor.model_input_names, *sizes, *LAYOUTS, "prompt_attention_mask"]

    def _get_mask_size(self) -> tuple[int, int]:
        side = self.image_processor.size["height"]
        if side % MASK_STRIDE:
            raise ValueError(
                f"Expected a size that {MASK_STRIDE} divides for input_masks, got {side}: SAM takes mask prompts of a "
                "quarter of the image's size, so prompt with boxes or points, or choose another size."
            )
        return side // MASK_STRIDE, side // MASK_STRIDE

    def _get_mask_logits(self, mask: np.ndarray, reshaped: tuple[int, int]) -> torch.Tensor:
        """Probabilities (H, W) of the image to logits (S / 4, S / 4) of the square, by the image's own way."""
        square = self.image_processor.pad(self.image_processor.resize(torch.from_numpy(mask)[None], reshaped))
        return MASK_LOGIT * (2 * F.avg_pool2d(square, MASK_STRIDE)[0] - 1)


def _scale(size: Sequence[int], new_size: Sequence[int], repeats: int) -> np.ndarray:
    """The factors (x, y), repeated for the corners of a box, between two sizes (height, width)."""
    return np.tile([new_size[1] / size[1], new_size[0] / size[0]], repeats)


def _pad_points(
    given: dict[str, list], prompts: int, sizes: list[tuple], reshaped: list[tuple]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (B, P, N, 2) in model pixels and their labels (B, P, N)."""
    labels_given = given.get("input_labels")
    longest = max(len(points) for image in given["input_points"] for points in image)
    if longest == 0:
        raise ValueError("Expected at least one point in input_points, got none: pass None for no points.")
    padded = torch.zeros(len(sizes), prompts, longest, 2)
    labels = torch.full((len(sizes), prompts, longest), PADDED_POINT)
    for i, image in enumerate(given["input_points"]):
        for p, points in enumerate(image):
            label = np.ones(len(points), np.int64) if labels_given is None else labels_given[i][p]
            if len(label) != len(points):
                raise ValueError(
                    f"Expected one label per point, got {len(label)} labels for {len(points)} points of prompt {p} of "
                    f"image {i}: nest input_labels as input_points, without the coordinates."
                )
            padded[i, p, : len(points)] = torch.from_numpy(points * _scale(sizes[i], reshaped[i], 1))
            labels[i, p, : len(points)] = torch.from_numpy(label)
    return padded, labels


def _count_prompts(given: dict[str, list]) -> list[int]:
    """The number of prompts of each image, which all kinds of prompts must agree on."""
    counts = {name: [len(prompts) for prompts in images] for name, images in given.items()}
    first, *others = counts
    for other in others:
        for i, (expected, got) in enumerate(zip(counts[first], counts[other], strict=True)):
            if expected != got:
                raise ValueError(
                    f"Expected as many prompts in {other} as in {first}, got {got} and {expected} for image {i}: give "
                    "each prompt an entry in both (a list of points may be empty)."
                )
    if max(counts[first]) == 0:
        raise ValueError(f"Expected at least one prompt in the batch, got none in {first}: pass None for no prompts.")
    return counts[first]


def _read_prompts(name: str, value: Any, sizes: list[tuple], read: Callable) -> list | None:
    """One entry per image, each read by `read(entry, (height, width), where)`."""
    if value is None:
        return None
    layout = LAYOUTS[name]
    missing = len(layout) - _get_depth(value)
    levels = " > ".join(layout)
    if missing < 0 or (missing > 0 and len(sizes) > 1):
        raise ValueError(
            f"Expected {name} nested as {levels}, got {len(layout) - missing} levels for {len(sizes)} images: only a "
            "single image may leave out the leading levels."
        )
    for _ in range(missing):
        value = [value]
    if len(value) != len(sizes):
        raise ValueError(
            f"Expected {name} for {len(sizes)} images, got {len(value)}: nest them as {levels}, with an empty list "
            "for an image without prompts."
        )
    return [
        read(entry, size, f"{name} of image {i}") for i, (entry, size) in enumerate(zip(value, sizes, strict=True))
    ]


def _get_depth(value: Any) -> int:
    if isinstance(value, Image.Image):
        return 2
    if isinstance(value, (list, tuple)):
        return 1 + max(map(_get_depth, value), default=0)
    return getattr(value, "ndim", 0)


def _to_array(value: Any, where: str) -> np.ndarray:
    """Numbers of any container as an array in their own type."""

    def plain(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return to_numpy(item)
        return [plain(child) for child in item] if isinstance(item, (list, tuple)) else item

    try:
        array = np.asarray(plain(value))
    except ValueError as error:
        raise ValueError(f"Expected {where} with equally long rows, got {value}: complete the short ones.") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"Expected numbers in {where}, got {array.dtype} values: {value}.")
    return array


def _read_boxes(value: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """(P, 4) float64 in user coordinates, clipped to the image."""
    boxes = _to_array(value, where).astype(np.float64)
    if boxes.size == 0:
        return np.zeros((0, 4))
    if boxes.shape[1:] != (4,):
        raise ValueError(f"Expected {where} as boxes (x0, y0, x1, y1), got {boxes.tolist()}: give each four numbers.")
    height, width = size
    for p, (x0, y0, x1, y1) in enumerate(boxes):
        got = f"got box {p} = {boxes[p].tolist()} in {where}"
        if not np.isfinite(boxes[p]).all():
            raise ValueError(f"Expected finite boxes (x0, y0, x1, y1), {got}: leave out prompts without a box.")
        if x1 < x0 or y1 < y0:
            raise ValueError(
                f"Expected boxes (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, {got}: swap its corners, or add "
                "x0 and y0 if its last numbers are a width and a height."
            )
        if x1 < 0 or y1 < 0 or x0 > width or y0 > height:
            raise ValueError(
                f"Expected boxes that meet the image, {got}, which is {width} pixels wide and {height} high: give "
                "pixels of the image as it was passed, in the order (x, y)."
            )
    return boxes.clip(0, [width, height, width, height])


def _read_points(value: Any, size: tuple[int, int], where: str) -> list[np.ndarray]:
    """Per prompt (N, 2) float64 in user coordinates."""
    height, width = size
    prompts = [_to_array(points, where).astype(np.float64) for points in value]
    for p, points in enumerate(prompts):
        if points.size == 0:
            prompts[p] = np.zeros((0, 2))
            continue
        got = f"got {points.tolist()} for prompt {p} in {where}"
        if points.shape[1:] != (2,):
            raise ValueError(f"Expected points (x, y), {got}: give each two numbers.")
        if not ((points >= 0) & (points <= [width, height])).all():
            raise ValueError(
                f"Expected points within the image, {width} pixels wide and {height} high, {got}: give pixels of the "
                "image as it was passed, in the order (x, y)."
            )
    return prompts


def _read_labels(value: Any, size: tuple[int, int], where: str) -> list[np.ndarray]:
    """Per prompt (N,) int64 of 0 and 1."""
    prompts = [_to_array(labels, where) for labels in value]
    for p, labels in enumerate(prompts):
        if not np.isin(labels, (0, 1)).all():
            raise ValueError(
                f"Expected labels 1 (object) or 0 (background), got {labels.tolist()} for prompt {p} in {where}: "
                "leave padding out, ragged points are padded here."
            )
    return [labels.astype(np.int64) for labels in prompts]


def _read_masks(value: Any, size: tuple[int, int], where: str) -> list[np.ndarray]:
    """Per prompt (H, W) float32 probabilities."""
    masks = [_to_array(mask, where) for mask in value]
    for p, mask in enumerate(masks):
        if mask.shape != size:
            raise ValueError(
                f"Expected masks of the image's size {size}, got {mask.shape} for prompt {p} in {where}: draw or "
                "resize them at the size (height, width) of the image as it was passed."
            )
        if mask.dtype.kind == "f" and not ((mask >= 0) & (mask <= 1)).all():
            raise ValueError(
                f"Expected probabilities in [0, 1], got {mask.min():g} to {mask.max():g} for prompt {p} in {where}: "
                "apply a sigmoid to logits first."
            )
        if mask.dtype.kind in "iu" and not (np.isin(mask, (0, 1)).all() or np.isin(mask, (0, 255)).all()):
            raise ValueError(
                f"Expected integer masks of 0 and 1 or of 0 and 255, got {np.unique(mask)[:5].tolist()} for prompt "
                f"{p} in {where}: pass one mask per label (mask == label)."
            )
    return [mask.astype(np.float32) if mask.dtype.kind in "bf" else (mask > 0).astype(np.float32) for mask in masks]


def _read_class_labels(value: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """(P,) int64."""
    labels = _to_array(value, where)
    if labels.size == 0:
        return np.zeros(0, np.int64)
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(f"Expected class indices 0, 1, ... in {where}, got {labels.tolist()}: pass integers.")
    return labels.astype(np.int64)
