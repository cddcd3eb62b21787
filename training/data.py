"""Images with masks, read lazily, and the prompts and points that supervise the field on them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers.utils import logging

from imedsam.training.augmentation import Augmentation
from imedsam.training.metrics import box_from_mask

logger = logging.get_logger(__name__)

SPLITS = ("train", "validation", "test")
VALIDATION_NAMES = ("val", "valid")
SPLIT_SHARES = (0.6, 0.2, 0.2)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
MASK_COLUMNS = ("mask", "label", "annotation")
# The points that are not drawn from the whole image are drawn from the prompt's box with its sides this much longer.
BOX_GROWTH = 0.3


class PromptedSegmentationDataset(Dataset):
    """
    Training items: an augmented image, a box per object and the points that supervise the field. An item depends on
    (seed, epoch, index) alone, so neither workers nor processes nor a resumed run change it.

    A binary mask gives one prompt, a label map one per class present, with `class_labels` = label - 1.

    Args:
        examples: the images and masks; none of the masks may be empty (see `without_empty_masks`).
        processor: an `IMedSamProcessor`.
        num_points: N, points per prompt.
        uniform_share: share of the points drawn from the whole image, in [0, 1]; the others come from the prompt's box
            grown by 30 %.
        point_weighting: "importance" (weights undo the sampling: weighted means are means over the image) or "none".
        box_jitter: each side of a box moves by up to this share of the box's width or height, in or out; in [0, 0.5).
        augmentation: "none", "light" or "strong".
        supervision: "points", or "dense": labels at the pixel centres of a `label_size` square over `pixel_values`.
    """

    def __init__(
        self,
        examples: "Examples",
        processor,
        *,
        num_points: int = 4096,
        uniform_share: float = 0.5,
        point_weighting: str = "importance",
        box_jitter: float = 0.1,
        augmentation: str = "strong",
        supervision: str = "points",
        label_size: int = 384,
        seed: int = 0,
    ):
        if not 0 <= uniform_share <= 1:
            raise ValueError(f"Expected uniform_share in [0, 1], got {uniform_share}.")
        if not 0 <= box_jitter < 0.5:
            raise ValueError(
                f"Expected box_jitter in [0, 0.5), got {box_jitter}: a larger one can turn a box inside out."
            )
        if point_weighting not in ("importance", "none"):
            raise ValueError(f'Expected point_weighting "importance" or "none", got {point_weighting!r}.')
        if supervision not in ("points", "dense"):
            raise ValueError(f'Expected supervision "points" or "dense", got {supervision!r}.')
        self.examples = examples
        self.processor = processor
        self.num_points = num_points
        self.uniform_share = uniform_share
        self.point_weighting = point_weighting
        self.box_jitter = box_jitter
        self.augment = Augmentation(augmentation)
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
            `input_boxes`, `class_labels`, ..., and `coordinates` (P, N, 2) (x, y) in model coordinates with `labels`,
            `point_areas` and `point_weights` (P, N), or `labels` (P, label_size, label_size).
        """
        rng = np.random.default_rng([self.seed, int(self._epoch), index])
        example = self.examples[index]
        image = _shrink(example["image"], self.processor.image_processor.size["height"])
        image, mask = self.augment(_to_array(image), example["mask"], seed=int(rng.integers(2**32)))
        classes, masks = split_by_class(mask)
        boxes = np.stack([jitter_box(box_from_mask(m), self.box_jitter, mask.shape, rng) for m in masks])
        item = encode(self.processor, image, mask.shape, boxes, classes)
        side, reshaped = item["pixel_values"].shape[-1], item["reshaped_input_sizes"].tolist()
        if self.supervision == "dense":
            return {**item, "labels": dense_labels(masks, self.label_size, side, reshaped)}
        points, density = sample_points(boxes, mask.shape, self.num_points, self.uniform_share, rng)
        areas = torch.from_numpy(1 / density / (1 / density).mean(axis=1, keepdims=True)).float()
        return {
            **item,
            "coordinates": torch.from_numpy(model_coordinates(points, mask.shape, side, reshaped)).float(),
            "labels": torch.from_numpy(labels_at(masks, points)).float(),
            "point_areas": areas,
            "point_weights": areas if self.point_weighting == "importance" else torch.ones_like(areas),
        }


class EpochSampler(Sampler[int]):
    """A permutation of the data set that depends on (seed, epoch) alone; tells the data set its epoch too."""

    def __init__(self, dataset: PromptedSegmentationDataset, seed: int):
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __iter__(self):
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(len(self.dataset)).tolist())


def collate_prompts(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """
    Stacks items of different numbers of prompts. Padded prompts repeat the item's first, with `prompt_attention_mask`
    false, labels, areas and weights 0.
    """
    num_prompts = max(len(item["input_boxes"]) for item in items)
    return {
        key: torch.stack(
            [_pad_prompts(key, item[key], num_prompts) if key in _PER_PROMPT else item[key] for item in items]
        )
        for key in items[0]
    }


_PER_PROMPT = (
    "input_boxes",
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


def encode(processor, image, mask_size, boxes, classes) -> dict[str, Tensor]:
    """
    One image through the processor, without the batch's axis.

    Args:
        image: PIL image or array, at any resolution.
        mask_size: (H, W) of the pixels that `boxes` (P, 4) are given in.
        classes: P class indices.
    """
    height, width = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
    scale = np.array([width / mask_size[1], height / mask_size[0]] * 2)
    inputs = processor(
        images=[image], input_boxes=[(boxes * scale).tolist()], class_labels=[list(classes)], return_tensors="pt"
    )
    return {key: value[0] for key, value in inputs.items()}


def split_by_class(mask: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """The class indices (label - 1) present in a label map (H, W), and a boolean mask for each."""
    classes = [label - 1 for label in _values(mask) if label > 0]
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


def sample_points(
    boxes: np.ndarray, size: tuple[int, int], num_points: int, uniform_share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """
    Draws points for each box: the first `uniform_share` of them from the whole image, the others from the grown box.

    Args:
        boxes: (P, 4) in pixels of the image.
        size: (H, W) of the image.

    Returns:
        Points (P, N, 2), (x, y) in pixels, and the density (P, N) they were drawn from, relative to a uniform one.
    """
    limit = np.array(size[::-1], dtype=float)
    num_uniform = round(uniform_share * num_points)
    margin = (boxes[:, 2:] - boxes[:, :2]) * BOX_GROWTH / 2
    low = np.clip(boxes[:, :2] - margin, 0, limit)[:, None]
    high = np.clip(boxes[:, 2:] + margin, 0, limit)[:, None]
    everywhere = rng.random((len(boxes), num_uniform, 2)) * limit
    around = low + rng.random((len(boxes), num_points - num_uniform, 2)) * (high - low)
    points = np.concatenate([everywhere, around], axis=1)
    inside = ((points >= low) & (points <= high)).all(axis=-1)
    share = num_uniform / num_points
    return points, share + (1 - share) * inside * (limit.prod() / (high - low).prod(axis=-1))


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


class Examples:
    """
    Images with masks, read when asked for: `examples[i]` is {"image": PIL, "mask": (H, W) integers, "name": str}.
    A mask holds 0 and 1, or, where `labels` names the classes, their indices.

    Args:
        source: `source[i]` is (image, mask), two PIL images.
        names: of the images.
        labels: the name of each value of the masks, `{0: "background", 1: ...}`; None for binary masks.
    """

    def __init__(self, source, names: Sequence[str], labels: Mapping[int, str] | None = None):
        self.source = source
        self.names = list(names)
        self.labels = None if labels is None else dict(labels)
        if labels is not None and sorted(labels) != list(range(len(labels))):
            raise ValueError(f"Expected labels 0, 1, ... without gaps, got {sorted(labels)}: renumber the label maps.")

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes, without the background."""
        return {0: "object"} if self.labels is None else {v - 1: name for v, name in self.labels.items() if v > 0}

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict:
        name = self.names[index]
        image, mask = self.source[index]
        if image.size != mask.size:
            raise ValueError(
                f"Expected image and mask of one size, got {image.size[0]}x{image.size[1]} and "
                f"{mask.size[0]}x{mask.size[1]} for {name!r}: find the mask that was drawn on this image."
            )
        return {"image": image, "mask": _read_mask(mask, name, self.labels), "name": name}

    def select(self, indices: Sequence[int]) -> "Examples":
        return Examples(_Subset(self.source, indices), [self.names[i] for i in indices], self.labels)


class _Subset:
    def __init__(self, source, indices):
        self.source = source
        self.indices = list(indices)

    def __getitem__(self, index):
        return self.source[self.indices[index]]


def without_empty_masks(examples: Examples) -> Examples:
    """The examples that show an object, and so have a box. Reads every mask once."""
    keep = [index for index, example in enumerate(examples) if example["mask"].any()]
    if len(keep) < len(examples):
        logger.warning(f"Skipping {len(examples) - len(keep)} of {len(examples)} images whose mask is empty.")
    if not keep:
        raise ValueError(f"Expected masks with an object in them, got {len(examples)} empty ones.")
    return examples.select(keep)


def load_examples(
    dataset: str,
    split: str,
    *,
    seed: int = 0,
    labels: Mapping[int, str] | None = None,
    num_images: int | None = None,
    image_size: int = 256,
    num_classes: int = 1,
) -> Examples:
    """
    Opens one split of a data set.

    Args:
        dataset: "phantoms", or those of one kind, such as "phantoms:ultrasound"; a folder with
            `images/NAME.jpg|png`, `masks/NAME.png` and, if there are any, `splits.json` {"train": [names], ...} and
            `labels.json` {"0": "background", ...}; or a data set for the `datasets` library, saved in a folder or
            named, with the columns `image` and `mask`, `label` or `annotation`.
        split: "train", "validation" or "test". What has no splits is split 60:20:20, by `seed`.
        labels: the names of the masks' values, for label maps without a `labels.json`.
        num_images: at most this many, at least 1; the number to draw of phantoms (20 by default).
        image_size: of phantoms, in pixels.
        num_classes: of phantoms, 1 or 2.

    Raises:
        FileNotFoundError: no such folder, or an image without a mask.
        ValueError: an unknown or empty split, an image in two splits, a missing column, labels that name no classes.
    """
    if split not in SPLITS:
        raise ValueError(f"Expected split to be one of {', '.join(SPLITS)}, got {split!r}.")
    if num_images is not None and num_images < 1:
        raise ValueError(f"Expected num_images of 1 or more, got {num_images}: leave it out for all images.")
    name, _, kind = dataset.partition(":")
    if name == "phantoms":
        examples = _load_phantoms(
            split, 20 if num_images is None else num_images, seed, image_size, num_classes, kind or None
        )
    elif (Path(dataset) / "images").is_dir():
        examples = _load_folder(Path(dataset), split, seed, labels)
    else:
        examples = _load_datasets(dataset, split, seed, labels)
    if not len(examples):
        raise ValueError(f"Expected images in the {split} split of {dataset}, got none: check its splits.")
    return examples if num_images is None else examples.select(range(min(num_images, len(examples))))


def _load_phantoms(split, num_images, seed, size, num_classes, kind):
    from imedsam.training.phantoms import phantoms_dataset

    split = "val" if split == "validation" else split
    rows = phantoms_dataset(split, num_images, seed=seed, size=size, num_classes=num_classes, kind=kind)
    labels = {0: "background", 1: "lesion", 2: "organ"} if num_classes == 2 else None
    return Examples(_Rows(rows, "mask"), rows["name"], labels)


def _load_folder(folder, split, seed, labels):
    images = _find_images(folder / "images")
    if (folder / "splits.json").exists():
        splits = json.loads((folder / "splits.json").read_text())
        _check_splits_are_disjoint(splits, folder / "splits.json")
        names = _pick_split(splits, split, folder / "splits.json")
    else:
        names = _split_in_three(list(images), seed)[split]
    if labels is None and (folder / "labels.json").exists():
        labels = read_labels(folder / "labels.json")
    files = []
    for name in names:
        image, mask = images.get(name), folder / "masks" / f"{name}.png"
        if image is None:
            raise FileNotFoundError(
                f"Expected an image for {name!r} of the {split} split, got none in {folder / 'images'}."
            )
        if not mask.exists():
            raise FileNotFoundError(f"Expected a mask for {image}, got none: {mask} does not exist.")
        files.append((image, mask))
    return Examples(_Files(files), names, labels)


def _find_images(folder):
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if path.stem in images:
            raise ValueError(
                f"Expected one image of each name in {folder}, got {images[path.stem].name} and {path.name}: rename "
                "or remove one, as both would share a mask."
            )
        images[path.stem] = path
    return images


def _check_splits_are_disjoint(splits, where):
    seen: dict[str, str] = {}
    for split in [split for split in (*SPLITS, *VALIDATION_NAMES) if split in splits]:
        for name in splits[split]:
            if seen.setdefault(name, split) != split:
                raise ValueError(
                    f"Expected every image in one split of {where}, got {name!r} in {seen[name]} and {split}: remove "
                    "it from one, or the scores are of images trained on."
                )


def read_labels(path: Path) -> dict[int, str]:
    """
    Reads labels.json, {"0": "background", "1": "organ", ...}: the name of each value of the label maps.

    Raises:
        ValueError: the file holds something else, two classes of one name or no class.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"Expected JSON in {path}, got {error}: {_LABELS_HELP}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected an object in {path}, got {type(content).__name__}: {_LABELS_HELP}.")
    for value, name in content.items():
        if not value.isdecimal() or not isinstance(name, str):
            raise ValueError(
                f'Expected entries "integer": "name" in {path}, got {json.dumps({value: name})}: {_LABELS_HELP}.'
            )
    labels = {int(value): name for value, name in content.items()}
    if not any(value > 0 for value in labels):
        raise ValueError(f"Expected a class beside the background in {path}, got {content}: {_LABELS_HELP}.")
    names = list(labels.values())
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"Expected a name of its own for each class in {path}, got {repeated[0]!r} twice: rename one."
        )
    return labels


_LABELS_HELP = 'write {"0": "background", "1": "organ", ...}'


class _Files:
    def __init__(self, files):
        self.files = files

    def __getitem__(self, index):
        images = []
        for path in self.files[index]:
            try:
                with Image.open(path) as image:
                    image.load()
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"Expected a whole image in {path}, got {error}: replace it or remove it.") from error
            images.append(image)
        return tuple(images)


def _load_datasets(dataset, split, seed, labels):
    import datasets

    folder = Path(dataset)
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        loaded = datasets.load_from_disk(dataset)
    elif folder.exists() or folder.is_absolute() or dataset.startswith("."):
        raise FileNotFoundError(
            f"Expected {dataset} to hold images/ and masks/, or a data set written by save_to_disk, and it does not."
        )
    else:
        loaded = datasets.load_dataset(dataset)
    if isinstance(loaded, datasets.DatasetDict) and set(loaded) != {"train"}:
        rows = _pick_split(loaded, split, dataset)
    else:
        rows = loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        rows = rows.select(_split_in_three(range(len(rows)), seed)[split])
    mask = next((column for column in MASK_COLUMNS if column in rows.column_names), None)
    if "image" not in rows.column_names or mask is None:
        raise ValueError(
            f"Expected the columns image and {' or '.join(MASK_COLUMNS)} in {dataset}, "
            f"got {', '.join(rows.column_names)}."
        )
    names = rows["name"] if "name" in rows.column_names else [f"{split}-{i}" for i in range(len(rows))]
    return Examples(_Rows(rows, mask), names, labels)


class _Rows:
    def __init__(self, rows, mask):
        self.rows = rows
        self.mask = mask

    def __getitem__(self, index):
        row = self.rows[index]
        return row["image"], row[self.mask]


def _pick_split(splits, split, where):
    for name in (split, *VALIDATION_NAMES) if split == "validation" else (split,):
        if name in splits:
            return splits[name]
    raise ValueError(f"Expected a {split} split in {where}, got {', '.join(splits)}.")


def _split_in_three(items, seed):
    order = np.random.default_rng(seed).permutation(len(items))
    first, second = (round(share * len(items)) for share in np.cumsum(SPLIT_SHARES)[:2])
    parts = order[:first], order[first:second], order[second:]
    return {name: [items[i] for i in sorted(part)] for name, part in zip(SPLITS, parts, strict=True)}


def _read_mask(mask, name, labels):
    array = np.asarray(mask)
    if array.ndim == 3:
        if (array != array[..., :1]).any():
            raise ValueError(
                f"Expected a mask of one channel, got colours for {name!r}: save class indices or 0 and 255."
            )
        array = array[..., 0]
    values = _values(array)
    if labels is None:
        if not (values <= {0, 1} or values <= {0, 255}):
            raise ValueError(
                f"Expected a binary mask of 0 and 255 (or 0 and 1), got the values {_shortened(values)} for {name!r}: "
                "threshold it, or name the classes of a label map in labels.json."
            )
        return (array > 0).astype(np.uint8)
    if not values <= set(labels):
        raise ValueError(
            f"Expected a label map of the values {_shortened(labels)}, got {_shortened(values - set(labels))} for "
            f"{name!r}: name every value in labels.json."
        )
    return array.astype(np.uint8 if max(labels) < 256 else np.int32)


def _values(array):
    if array.dtype == np.uint8:  # many times faster than sorting
        return set(np.flatnonzero(np.bincount(array.ravel())).tolist())
    return set(np.unique(array).tolist())


def _shortened(values):
    values = sorted(values)
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


def _shrink(image, side):
    """Takes off an image what is beyond the model's resolution, before the costly transforms."""
    shorter = min(image.size)
    if shorter <= side or image.mode not in ("L", "RGB"):
        return image
    size = tuple(max(1, round(length * side / shorter)) for length in image.size)
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _to_array(image):
    return np.asarray(image if image.mode in ("L", "RGB", "F") or image.mode.startswith("I") else image.convert("RGB"))
