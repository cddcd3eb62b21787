"""Training items: the prompts on an image, and the points that supervise the field there."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from imedsam.training.augmentation import Augmentation, copy_paste
from imedsam.training.examples import Examples, label_values
from imedsam.training.metrics import box_from_mask

PROMPTS = ("box", "click")
# The points that are not drawn from the whole image are drawn from the prompt's box with its sides this much longer.
BOX_GROWTH = 0.3
# Pasted objects are shrunk to this share of their size at most.
SMALLEST_PASTE = 0.4
# What counts as near an object's boundary, as a share of the image's longer side.
BAND = 0.02


class PromptedSegmentationDataset(Dataset):
    """
    Training items: an augmented image, a box or a click per object and the points that supervise the field. An item
    depends on (seed, epoch, index) alone, so neither workers nor processes nor a resumed run change it.

    A binary mask gives one prompt, a label map one per class present, with `class_labels` = label - 1.

    Args:
        examples: the images and masks; none of the masks may be empty (see `without_empty_masks`).
        processor: an `IMedSamProcessor`.
        prompt: "box", or "click": a point drawn uniformly from the object.
        num_points: N, points per prompt.
        uniform_share: share of the points drawn from the whole image, in [0, 1].
        boundary_share: share drawn from near the object's boundary; what is left comes from the box grown by 30 %: the
            prompt, or with clicks the object's own.
        point_weighting: "importance" (weights undo the sampling: weighted means are means over the image) or "none".
        box_jitter: each side of a box moves by up to this share of the box's width or height, in or out; in [0, 0.5).
            Not of clicks.
        augmentation: "none", "light" or "strong".
        copy_paste: probability, in [0, 1], that the objects of another image are pasted onto an image.
        supervision: "points", or "dense": labels at the pixel centres of a `label_size` square over `pixel_values`.
    """

    def __init__(
        self,
        examples: Examples,
        processor,
        *,
        prompt: str = "box",
        num_points: int = 4096,
        uniform_share: float = 0.5,
        boundary_share: float = 0.0,
        point_weighting: str = "importance",
        box_jitter: float = 0.1,
        augmentation: str = "strong",
        copy_paste: float = 0.0,
        supervision: str = "points",
        label_size: int = 384,
        seed: int = 0,
    ):
        check_prompt(prompt)
        if not 0 <= uniform_share <= 1:
            raise ValueError(f"Expected uniform_share in [0, 1], got {uniform_share}.")
        if boundary_share < 0 or uniform_share + boundary_share > 1:
            raise ValueError(
                f"Expected boundary_share from 0 to 1 - uniform_share = {1 - uniform_share:g}, got {boundary_share}."
            )
        if not 0 <= box_jitter < 0.5:
            raise ValueError(
                f"Expected box_jitter in [0, 0.5), got {box_jitter}: a larger one can turn a box inside out."
            )
        if not 0 <= copy_paste <= 1:
            raise ValueError(f"Expected copy_paste in [0, 1], got {copy_paste}.")
        if point_weighting not in ("importance", "none"):
            raise ValueError(f'Expected point_weighting "importance" or "none", got {point_weighting!r}.')
        if supervision not in ("points", "dense"):
            raise ValueError(f'Expected supervision "points" or "dense", got {supervision!r}.')
        self.examples = examples
        self.processor = processor
        self.prompt = prompt
        self.num_points = num_points
        self.uniform_share = uniform_share
        self.boundary_share = boundary_share
        self.point_weighting = point_weighting
        self.box_jitter = box_jitter
        self.augment = Augmentation(augmentation)
        self.copy_paste = copy_paste
        self.supervision = supervision
        self.label_size = label_size
        self.seed = seed
        # In shared memory, so that data loader workers that live longer than an epoch see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.examples)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """
        Returns:
            What the model takes for one image of P prompts, without the batch's axis: the processor's `pixel_values`,
            `input_boxes` or `input_points`, `class_labels`, ..., and `coordinates` (P, N, 2) (x, y) in model
            coordinates with `labels`, `point_areas` and, with importance weighting, `point_weights` (P, N), or
            `labels` (P, label_size, label_size).
        """
        rng = np.random.default_rng([self.seed, int(self._epoch), index])
        image, mask = self._augmented(index, rng)
        if self.copy_paste and rng.random() < self.copy_paste:
            other_image, other_mask = self._augmented(int(rng.integers(len(self))), rng)
            scale = rng.uniform(SMALLEST_PASTE, 1)
            x, y = (1 - scale) * rng.random(2)
            image, mask = copy_paste(image, mask, other_image, other_mask, scale, corner=(x, y))
        classes, masks = split_by_class(mask)
        jitter = self.box_jitter if self.prompt == "box" else 0.0
        boxes = np.stack([jitter_box(box_from_mask(m), jitter, mask.shape, rng) for m in masks])
        prompts = boxes if self.prompt == "box" else np.stack([draw_click(m, rng) for m in masks])
        item = encode(self.processor, image, mask.shape, prompts, classes)
        side, reshaped = item["pixel_values"].shape[-1], item["reshaped_input_sizes"].tolist()
        if self.supervision == "dense":
            return {**item, "labels": dense_labels(masks, self.label_size, side, reshaped)}
        points, density = sample_points(masks, boxes, self.num_points, self.uniform_share, self.boundary_share, rng)
        areas = torch.from_numpy(1 / density).float()
        item["coordinates"] = torch.from_numpy(model_coordinates(points, mask.shape, side, reshaped)).float()
        item["labels"] = torch.from_numpy(labels_at(masks, points)).float()
        item["point_areas"] = areas
        if self.point_weighting == "importance":
            item["point_weights"] = areas
        return item

    def _augmented(self, index, rng):
        example = self.examples[index]
        image = _shrink(example["image"], self.processor.image_processor.size["height"])
        return self.augment(_to_array(image), example["mask"], seed=int(rng.integers(2**32)))


class EpochSampler(Sampler[int]):
    """
    A permutation of the data set that depends on (seed, epoch) alone; a data set that has `set_epoch` is told its
    epoch too.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self):
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(len(self)).tolist())


def collate_prompts(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """
    Stacks items of different numbers of prompts. Padded prompts repeat the item's first, with `prompt_attention_mask`
    false, labels, areas and weights 0.
    """
    num_prompts = max(len(item["prompt_attention_mask"]) for item in items)
    return {
        key: torch.stack(
            [_pad_prompts(key, item[key], num_prompts) if key in _PER_PROMPT else item[key] for item in items]
        )
        for key in items[0]
    }


_PER_PROMPT = (
    "input_boxes",
    "input_points",
    "input_labels",
    "class_labels",
    "prompt_attention_mask",
    "coordinates",
    "labels",
    "point_areas",
    "point_weights",
)


def _pad_prompts(key, values, num_prompts):
    padding = values[:1].expand(num_prompts - len(values), *values.shape[1:])
    if key in ("prompt_attention_mask", "labels", "point_areas", "point_weights", "class_labels"):
        padding = torch.zeros_like(padding)
    return torch.cat([values, padding])


def encode(processor, image, mask_size, prompts, classes) -> dict[str, Tensor]:
    """
    One image through the processor, without the batch's axis.

    Args:
        image: PIL image or array, at any resolution.
        mask_size: (H, W) of the pixels that the prompts are given in.
        prompts: boxes (P, 4), x0, y0, x1, y1, or clicks on P objects (P, 2), x, y.
        classes: P class indices.
    """
    height, width = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
    scaled = prompts * np.resize([width / mask_size[1], height / mask_size[0]], prompts.shape[1])
    given = (
        {"input_boxes": [scaled.tolist()]} if scaled.shape[1] == 4 else {"input_points": [scaled[:, None].tolist()]}
    )
    inputs = processor(images=[image], **given, class_labels=[list(classes)], return_tensors="pt")
    return {key: value[0] for key, value in inputs.items()}


def split_by_class(mask: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """The class indices (label - 1) present in a label map (H, W), and a boolean mask for each."""
    classes = [label - 1 for label in label_values(mask) if label > 0]
    return classes, [mask == index + 1 for index in classes]


def jitter_box(box: Sequence[float], jitter: float, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """
    Moves each side by a uniform share of up to `jitter` of the box's width or height, inward or outward. The box stays
    in the image of `size` (H, W) and at least 1 pixel wide and high.
    """
    low, high = np.array(box[:2], dtype=float), np.array(box[2:], dtype=float)
    extent, limit = high - low, np.array(size[::-1], dtype=float)
    offsets = rng.uniform(-jitter, jitter, size=(2, 2)) * extent
    low, high = np.clip(low + offsets[0], 0, limit), np.clip(high + offsets[1], 0, limit)
    thin = high - low < 1
    middle = np.clip((low + high) / 2, 0.5, limit - 0.5)
    return np.concatenate([np.where(thin, middle - 0.5, low), np.where(thin, middle + 0.5, high)])


def draw_click(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A point (x, y), in pixels, drawn uniformly from a mask (H, W) with an object."""
    pixels = np.argwhere(mask)
    return pixels[rng.integers(len(pixels)), ::-1] + rng.random(2)


def innermost_click(mask: np.ndarray) -> np.ndarray:
    """
    The centre (x, y), in pixels, of the pixel of a mask (H, W) that is farthest from the background, which begins at
    the image's border too; the first in row order of several.
    """
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), mask.shape)
    return np.array([column + 0.5, row + 0.5])


def check_prompt(prompt: str) -> None:
    if prompt not in PROMPTS:
        raise ValueError(f'Expected prompt "box" or "click", got {prompt!r}.')


def sample_points(
    masks: Sequence[np.ndarray],
    boxes: np.ndarray,
    num_points: int,
    uniform_share: float,
    boundary_share: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Draws points for each object: the first `uniform_share` of them from the whole image, the last `boundary_share`
    from the band around the object's boundary, the others from its grown box.

    Args:
        masks: P of (H, W), bool.
        boxes: (P, 4) in pixels of the masks.

    Returns:
        Points (P, N, 2), (x, y) in pixels, and the density (P, N) they were drawn from, relative to a uniform one.
    """
    limit = np.array(masks[0].shape[::-1], dtype=float)
    num_uniform = round(uniform_share * num_points)
    num_boundary = min(round(boundary_share * num_points), num_points - num_uniform)
    num_around = num_points - num_uniform - num_boundary
    margin = (boxes[:, 2:] - boxes[:, :2]) * BOX_GROWTH / 2
    low = np.clip(boxes[:, :2] - margin, 0, limit)[:, None]
    high = np.clip(boxes[:, 2:] + margin, 0, limit)[:, None]
    everywhere = rng.random((len(boxes), num_uniform, 2)) * limit
    around = low + rng.random((len(boxes), num_around, 2)) * (high - low)
    points = np.concatenate([everywhere, around], axis=1)
    density = np.full(points.shape[:2], num_uniform / num_points)
    if num_boundary:
        bands = [boundary_band(mask) for mask in masks]
        pixels = [np.argwhere(band)[rng.integers(band.sum(), size=num_boundary), ::-1] for band in bands]
        points = np.concatenate([points, np.stack(pixels) + rng.random((len(boxes), num_boundary, 2))], axis=1)
        areas = np.array([[band.mean()] for band in bands])
        density = num_uniform / num_points + labels_at(bands, points) * (num_boundary / num_points / areas)
    inside = ((points >= low) & (points <= high)).all(axis=-1)
    return points, density + inside * (num_around / num_points * limit.prod() / (high - low).prod(axis=-1))


def boundary_band(mask: np.ndarray) -> np.ndarray:
    """The pixels within `BAND` of the longer side from a mask's boundary, (H, W), bool; all where there is none."""
    size = 2 * max(1, round(BAND * max(mask.shape))) + 1
    band = maximum_filter(mask, size, mode="nearest") != minimum_filter(mask, size, mode="nearest")
    return band if band.any() else np.ones_like(mask, dtype=bool)


def labels_at(masks: Sequence[np.ndarray], points: np.ndarray) -> np.ndarray:
    """The value (P, N) of each of P masks (H, W) at the pixel that holds each of its points (P, N, 2)."""
    limit = np.array(masks[0].shape[::-1]) - 1
    pixels = np.minimum(points.astype(np.int64), limit)
    return np.stack([mask[xy[:, 1], xy[:, 0]] for mask, xy in zip(masks, pixels, strict=True)])


def model_coordinates(points: np.ndarray, size: tuple[int, int], side: int, reshaped: Sequence[int]) -> np.ndarray:
    """
    From pixels of an image of `size` (H, W) to model coordinates: the image fills the top-left `reshaped` (h, w) of
    the `side` x `side` pixel values, whose edges are at -1 and 1.
    """
    scale = np.array([reshaped[1] / size[1], reshaped[0] / size[0]])
    return 2 * points * scale / side - 1


def dense_labels(masks: Sequence[np.ndarray], label_size: int, side: int, reshaped: Sequence[int]) -> Tensor:
    """The masks at the pixel centres of a `label_size` square over the pixel values, (P, h, w); 0 in the padding."""
    height, width = masks[0].shape
    centres = (np.arange(label_size) + 0.5) * side / label_size
    rows = np.floor(centres * height / reshaped[0]).astype(np.int64)
    columns = np.floor(centres * width / reshaped[1]).astype(np.int64)
    inside = np.outer(rows < height, columns < width)
    rows, columns = rows.clip(max=height - 1), columns.clip(max=width - 1)
    return torch.from_numpy(np.stack([mask[np.ix_(rows, columns)] & inside for mask in masks])).float()


def _shrink(image, side):
    """Takes off an image what is beyond the model's resolution, before the costly transforms."""
    shorter = min(image.size)
    if shorter <= side or image.mode not in ("L", "RGB"):
        return image
    size = tuple(max(1, round(length * side / shorter)) for length in image.size)
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _to_array(image):
    return np.asarray(image if image.mode in ("L", "RGB", "F") or image.mode.startswith("I") else image.convert("RGB"))
