"""Images with masks, read when asked for: from a folder, drawn phantoms or the `datasets` library."""

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers.utils import logging

logger = logging.get_logger(__name__)

SPLITS = ("train", "validation", "test")
PHANTOM_SIZE = 256
VALIDATION_NAMES = ("val", "valid")
SPLIT_SHARES = (0.6, 0.2, 0.2)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
MASK_COLUMNS = ("mask", "label", "annotation")


class Examples:
    """
    Images with masks, read when asked for: `examples[i]` is {"image": PIL, "mask": (H, W) integers, "name": str}.
    A mask holds 0 and 1, or, where `labels` names the classes, their indices.

    Args:
        source: `source[i]` is (image, mask), two PIL images.
        names: of the images.
        labels: the name of each value of the masks, `{0: "background", 1: ...}`; None for binary masks.
        groups: what each image belongs to, such as its patient; each image by itself by default.
    """

    def __init__(
        self,
        source,
        names: Sequence[str],
        labels: Mapping[int, str] | None = None,
        groups: Sequence[Hashable] | None = None,
    ):
        self.source = source
        self.names = list(names)
        self.labels = None if labels is None else dict(labels)
        self.groups = list(range(len(self.names)) if groups is None else groups)
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
        names, groups = [self.names[i] for i in indices], [self.groups[i] for i in indices]
        return Examples(_Subset(self.source, indices), names, self.labels, groups)


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
    image_size: int = PHANTOM_SIZE,
    num_classes: int = 1,
) -> Examples:
    """
    Opens one split of a data set.

    Args:
        dataset: "phantoms", or those of one kind, such as "phantoms:ultrasound"; a folder with
            `images/NAME.jpg|png`, `masks/NAME.png` and, if there are any, `splits.json` {"train": [names], ...},
            `labels.json` {"0": "background", ...} and `groups.json` {NAME: patient, ...}; or a data set for the
            `datasets` library, saved in a folder or named, with the columns `image` and `mask`, `label` or
            `annotation`.
        split: "train", "validation" or "test". What has no splits is split 60:20:20, by `seed`; groups stay together.
            "all" is every image of a folder, or every split of a data set: to evaluate on what nothing was trained on.
            Phantoms have no such split.
        labels: the names of the masks' values, for label maps without a `labels.json`.
        num_images: at most this many, at least 1; the number to draw of phantoms (20 by default).
        image_size: of phantoms, in pixels.
        num_classes: of phantoms, 1 or 2.

    Raises:
        FileNotFoundError: no such folder, or an image without a mask.
        ValueError: an unknown or empty split, an image or a group in two splits, an image without a group, a missing
            column, labels that name no classes.
    """
    if split not in (*SPLITS, "all"):
        raise ValueError(f"Expected split to be one of {', '.join(SPLITS)}, all, got {split!r}.")
    if num_images is not None and num_images < 1:
        raise ValueError(f"Expected num_images of 1 or more, got {num_images}: leave it out for all images.")
    name, _, kind = dataset.partition(":")
    if name == "phantoms":
        if split == "all":
            raise ValueError(
                f"Expected split to be one of {', '.join(SPLITS)} for phantoms, got 'all': there is no end of them."
            )
        examples = _load_phantoms(
            split, 20 if num_images is None else num_images, seed, image_size, num_classes, kind or None
        )
    elif (Path(dataset) / "images").is_dir():
        examples = _load_folder(Path(dataset), split, seed, labels)
    else:
        examples = _load_datasets(dataset, split, seed, labels)
    if not len(examples):
        raise ValueError(
            f"Expected images in the {split} split of {dataset}, got none: check its splits, or write splits.json if "
            "there are too few images or groups to be split at random."
        )
    return examples if num_images is None else examples.select(range(min(num_images, len(examples))))


def _load_phantoms(split, num_images, seed, size, num_classes, kind):
    from imedsam.training.phantoms import phantoms_dataset

    split = "val" if split == "validation" else split
    rows = phantoms_dataset(split, num_images, seed=seed, size=size, num_classes=num_classes, kind=kind)
    labels = {0: "background", 1: "lesion", 2: "organ"} if num_classes == 2 else None
    return Examples(_Rows(rows, "mask"), rows["name"], labels)


def _load_folder(folder, split, seed, labels):
    images = images_by_name(folder / "images")
    groups = _read_groups(folder / "groups.json", images) if (folder / "groups.json").exists() else None
    if split == "all":
        names = list(images)
    elif (folder / "splits.json").exists():
        splits = _read_splits(folder / "splits.json")
        _check_splits_are_disjoint(splits, folder / "splits.json")
        if groups is not None:
            of_groups = {part: [groups[name] for name in names if name in groups] for part, names in splits.items()}
            _check_splits_are_disjoint(of_groups, folder / "splits.json", "group")
        names = _pick_split(splits, split, folder / "splits.json")
    else:
        of_images = None if groups is None else [groups[name] for name in images]
        names = _draw_split(list(images), split, seed, folder, of_images)
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
    return Examples(_Files(files), names, labels, None if groups is None else [groups[name] for name in names])


def images_by_name(folder: Path) -> dict[str, Path]:
    """
    The images of a folder by their names without suffix, in the order of the files.

    Raises:
        ValueError: two images of one name.
    """
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


def _read_splits(path):
    content = read_object(path, _SPLITS_HELP)
    splits = {name: content[name] for name in (*SPLITS, *VALIDATION_NAMES) if name in content}
    for name, names in splits.items():
        if not isinstance(names, list) or not all(isinstance(image, str) for image in names):
            raise ValueError(f"Expected a list of names for {name} in {path}, got {names!r}: {_SPLITS_HELP}.")
    return {name: list(map(_without_suffix, names)) for name, names in splits.items()}


def read_object(path, way_out):
    """A JSON object as a dictionary; `way_out` is the end of what is said of anything else."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"Expected JSON in {path}, got {error}: {way_out}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected an object in {path}, got {type(content).__name__}: {way_out}.")
    return content


def _without_suffix(name):
    return name.removesuffix(suffix) if (suffix := Path(name).suffix).lower() in IMAGE_SUFFIXES else name


def _read_groups(path, images):
    content = read_object(path, _GROUPS_HELP)
    groups = {_without_suffix(name): group for name, group in content.items()}
    for name in images:
        if not isinstance(groups.get(name), str):
            got = repr(groups[name]) if name in groups else "none"
            raise ValueError(
                f"Expected the name of a group for every image in {path}, got {got} for {name!r}: {_GROUPS_HELP}."
            )
    return groups


def _check_splits_are_disjoint(splits, where, what="image"):
    seen: dict[str, str] = {}
    for split, names in splits.items():
        for name in names:
            if seen.setdefault(name, split) != split:
                raise ValueError(
                    f"Expected every {what} in one split of {where}, got {name!r} in {seen[name]} and {split}: remove "
                    f"it from one, or the scores are of {what}s trained on."
                )


def read_labels(path: Path) -> dict[int, str]:
    """
    Reads labels.json, {"0": "background", "1": "organ", ...}: the name of each value of the label maps.

    Raises:
        ValueError: the file holds something else, two classes of one name or no class.
    """
    content = read_object(path, _LABELS_HELP)
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
_GROUPS_HELP = 'write {"a": "patient 1", "b": "patient 1", "c": "patient 2"}'
_SPLITS_HELP = 'write {"train": ["a", "b"], "validation": ["c"], "test": ["d"]}'


class _Files:
    def __init__(self, files):
        self.files = files

    def __getitem__(self, index):
        images = []
        for path in self.files[index]:
            try:
                with Image.open(path) as opened:
                    image = ImageOps.exif_transpose(opened)  # as every viewer shows it
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
        try:
            loaded = datasets.load_dataset(dataset)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"Expected {dataset} to be a folder, or a data set that the `datasets` library finds by its name, got "
                f"neither: {error}"
            ) from error
    if split == "all":
        rows = (
            datasets.concatenate_datasets(list(loaded.values()))
            if isinstance(loaded, datasets.DatasetDict)
            else loaded
        )
    elif isinstance(loaded, datasets.DatasetDict) and set(loaded) != {"train"}:
        rows = _pick_split(loaded, split, dataset)
    else:
        rows = loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        rows = rows.select(_draw_split(range(len(rows)), split, seed, dataset))
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


def _draw_split(items, split, seed, where, groups=None):
    logger.warning_once(
        f"Splitting {where} at random, 60:20:20 by seed {seed}, as it has no splits of its own: `imedsam evaluate "
        "--split all` scores all of its images."
    )
    return _split_in_three(items, seed, groups)[split]


def _split_in_three(items, seed, groups=None):
    """Whole groups in random order, each item by itself by default, each to the split that has least of its share."""
    members: dict[Hashable, list[int]] = {}
    for number, group in enumerate(range(len(items)) if groups is None else groups):
        members.setdefault(group, []).append(number)
    whole = list(members.values())
    parts: dict[str, list[int]] = {name: [] for name in SPLITS}
    for chosen in np.random.default_rng(seed).permutation(len(whole)):
        filled = [len(part) / share for part, share in zip(parts.values(), SPLIT_SHARES, strict=True)]
        parts[SPLITS[int(np.argmin(filled))]] += whole[chosen]
    return {name: [items[i] for i in sorted(part)] for name, part in parts.items()}


def _read_mask(mask, name, labels):
    array = np.asarray(mask)
    if array.ndim == 3:
        if (array != array[..., :1]).any():
            raise ValueError(
                f"Expected a mask of one channel, got colours for {name!r}: save class indices or 0 and 255."
            )
        array = array[..., 0]
    values = label_values(array)
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


def label_values(array: np.ndarray) -> set[int]:
    """The values that occur in a mask."""
    if array.dtype == np.uint8:  # many times faster than sorting
        return set(np.flatnonzero(np.bincount(array.ravel())).tolist())
    return set(np.unique(array).tolist())


def _shortened(values):
    values = sorted(values)
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
