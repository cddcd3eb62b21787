"""
Pairs of slices of two contrasts, from two folders with files of equal names.

A file is a slice (PNG or TIFF of 8 or 16 bits, or of 32) or a volume (`.nii`, `.nii.gz`). The patient is the part of
its name before the last `_`, or the whole name without one: `PATIENT_017.png`, `PATIENT_scan2.nii.gz`; in names as
BIDS has them the subject, `sub-01_ses-02_017.png`. Intensities are scaled by the range of the volume: of a NIfTI file,
or of all slices together whose names are the same before the last `_`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from imedsam.processing.image_processing_sam_i2i import SamI2IImageProcessor
from imedsam.processing.volumes import (
    BACKGROUND,
    NIFTI,
    TISSUE_SHARE,
    get_patient,
    get_series,
    get_stem,
    get_tissue_shares,
    is_nifti,
    is_one_place,
    read_nifti,
)
from imedsam.training.predict import read_image
from imedsam.training.report import write_json

PICTURES = (".png", ".tif", ".tiff")


@dataclass(frozen=True)
class SliceFile:
    """
    A slice of one contrast.

    Args:
        path: of a picture, or of a `.npy` file (S, H, W).
        index: of the slice in the latter.
        intensity_range: (low, high) of its volume.
        size: (H, W).
    """

    path: Path
    index: int | None
    intensity_range: tuple[float, float]
    size: tuple[int, int]

    def read(self) -> Image.Image | np.ndarray:
        if self.index is None:
            return read_image(self.path)
        return np.array(np.load(self.path, mmap_mode="r")[self.index])  # of the file no more than the slice


@dataclass(frozen=True)
class SlicePair:
    """The same slice in the two contrasts."""

    name: str
    patient: str
    source: SliceFile
    target: SliceFile


class SlicePairs(Dataset):
    """
    Items of `pixel_values` (3, H, W), `labels` (1, H, W) and `original_sizes` (2,), as of the processor, without the
    batch's axis. Slices are read when they are asked for.
    """

    def __init__(self, pairs: Sequence[SlicePair], processor: SamI2IImageProcessor):
        self.pairs = pairs
        self.processor = processor

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pair = self.pairs[index]
        inputs = self.processor.preprocess(
            [pair.source.read()],
            [pair.target.read()],
            intensity_range=pair.source.intensity_range,
            label_range=pair.target.intensity_range,
        )
        return {key: inputs[key][0] for key in ("pixel_values", "labels", "original_sizes")}

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stacks items; of several sizes, the smaller ones are padded as the processor pads, with black."""
        height, width = (max(item["labels"].shape[axis] for item in items) for axis in (1, 2))
        mean, std = torch.tensor(self.processor.image_mean), torch.tensor(self.processor.image_std)
        return {
            "pixel_values": torch.stack([_pad(item["pixel_values"], height, width, -mean / std) for item in items]),
            "labels": torch.stack([_pad(item["labels"], height, width, torch.zeros(1)) for item in items]),
            "original_sizes": torch.stack([item["original_sizes"] for item in items]),
        }


def find_pairs(
    source: Path,
    target: Path,
    processor: SamI2IImageProcessor,
    cache_dir: Path,
    tissue_share: float = TISSUE_SHARE,
    progress: bool = False,
) -> list[SlicePair]:
    """
    Args:
        source, target: folders with files of equal names.
        processor: whose percentiles are a volume's range.
        cache_dir: where NIfTI volumes are unpacked, once, to be read slice by slice.
        tissue_share: axial slices of NIfTI volumes are taken where more than this share of the source is above the
            background, a tenth of the volume's range. Pictures are all taken.

    Returns:
        The pairs, by patient and name.

    Raises:
        ValueError: no files, names without a partner, sizes that differ, or what is no grey image.
    """
    names = _equal_names(source, target)
    volumes: dict[str, list[str]] = {}  # which files are one volume
    for name in names:
        volumes.setdefault(name if is_nifti(Path(name)) else f"{get_series(name)}/", []).append(name)
    pairs = []
    for files in tqdm(volumes.values(), desc="Reading volumes", disable=not progress):
        if is_nifti(Path(files[0])):
            pairs += _volume_pairs(source / files[0], target / files[0], processor, cache_dir, tissue_share)
        else:
            contrasts = (_read_pictures([folder / name for name in files], processor) for folder in (source, target))
            pairs += [_pair(a.path.stem, get_patient(a.path.name), a, b) for a, b in zip(*contrasts, strict=True)]
    if not pairs:
        raise ValueError(
            f"Expected slices with more than {tissue_share:g} of tissue in {source}, got none: lower --tissue_share."
        )
    return sorted(pairs, key=lambda pair: (pair.patient, pair.name))


def split_patients(
    patients: Iterable[str], validation: Sequence[str] | float = (), test: Sequence[str] | float = (), seed: int = 0
) -> dict[str, list[str]]:
    """
    Args:
        patients: of all pairs.
        validation, test: names, or a share of all patients to draw by the seed, at least one patient of it. Which
            patients are drawn for the test does not depend on the validation's share.

    Returns:
        The patients of "train", "validation" and "test"; none is in two of them.

    Raises:
        ValueError: names that are in no pair or in two splits, and splits that leave nothing to train on.
    """
    everyone = sorted(set(patients))
    splits = {"test": test, "validation": validation}
    named = {split: [] if isinstance(asked, float) else list(asked) for split, asked in splits.items()}
    taken = [name for names in named.values() for name in names]
    if unknown := sorted(set(taken) - set(everyone)):
        raise ValueError(
            f"Expected patients among {_some(everyone)}, got {_some(unknown)}: a patient is the part of a file's name "
            'before the last "_".'
        )
    if twice := sorted({name for name in taken if taken.count(name) > 1}):
        raise ValueError(f"Expected every patient in one split, got {_some(twice)} in two: name them once.")
    free = [name for name in everyone if name not in taken]
    drawn = np.random.default_rng(seed).permutation(free).tolist()
    for split, asked in splits.items():
        if isinstance(asked, float):
            count = max(1, round(asked * len(everyone)))
            named[split], drawn = sorted(drawn[:count]), drawn[count:]
    if not drawn:
        raise ValueError(
            f"Expected patients to train on beside those to validate and test on, got {_some(everyone)} in all: leave "
            'some out of those, or rename the files; a patient is the part of a name before the last "_".'
        )
    return {"train": sorted(drawn), "validation": sorted(named["validation"]), "test": sorted(named["test"])}


def batches_of_one_size(pairs: Sequence[SlicePair], batch_size: int) -> list[list[int]]:
    """Indices in batches of neighbours of one size, so that no slice is padded for another's sake."""
    batches: list[list[int]] = []
    for index, pair in enumerate(pairs):
        last = batches[-1] if batches else []
        if last and len(last) < batch_size and pairs[last[0]].source.size == pair.source.size:
            last.append(index)
        else:
            batches.append([index])
    return batches


def _equal_names(source: Path, target: Path) -> list[str]:
    found = []
    for folder in (source, target):
        if not folder.is_dir():
            raise ValueError(f"Expected a folder of slices or volumes, got {folder}.")
        files = [path for path in folder.iterdir() if is_nifti(path) or path.suffix.lower() in PICTURES]
        found.append(sorted(path.name for path in files if not path.name.startswith(".")))
        if not found[-1]:
            raise ValueError(f"Expected {', '.join((*PICTURES, *NIFTI))} files in {folder}, got none.")
    for folder, other, missing in (
        (target, source, sorted(set(found[0]) - set(found[1]))),
        (source, target, sorted(set(found[1]) - set(found[0]))),
    ):
        if missing:
            raise ValueError(
                f"Expected files of equal names, got {_some(missing)} in {other} alone: put the same into {folder}, "
                "or take them away."
            )
    return found[0]


def _volume_pairs(source, target, processor, cache_dir, tissue_share):
    a, b = (_unpack(path, processor, cache_dir) for path in (source, target))
    if a["shape"] != b["shape"] or not is_one_place(a["affine"], b["affine"]):
        raise ValueError(
            f"Expected volumes on one grid, got other sizes or places of {source}, {a['shape']}, and {target}, "
            f"{b['shape']}: register and resample one to the other first."
        )
    stem = get_stem(source.name)
    return [
        SlicePair(f"{stem}_{index:03d}", get_patient(source.name), *(_slice_of(volume, index) for volume in (a, b)))
        for index, share in enumerate(a["tissue"])
        if share > tissue_share
    ]


def _slice_of(volume, index):
    return SliceFile(Path(volume["path"]), index, tuple(volume["range"]), tuple(volume["shape"][1:]))


def _unpack(path, processor, cache_dir):
    """A volume's `path` as .npy, its `shape` and `affine`, its `range`, and the share of `tissue` of each slice."""
    stat = path.stat()
    key = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns, processor.percentiles, BACKGROUND])
    unpacked = cache_dir / f"{get_stem(path.name)}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    about = unpacked.with_suffix(".json")
    if not about.exists():
        volume = read_nifti(path)
        slices = volume.slices
        if slices.dtype.kind == "f":
            slices = slices.astype(np.float32)
        low, high = _range_of(processor, list(slices), path)
        cache_dir.mkdir(parents=True, exist_ok=True)
        temporary = unpacked.with_suffix(f".{os.getpid()}.npy")
        np.save(temporary, slices)
        temporary.replace(unpacked)
        grid = {"shape": slices.shape, "affine": volume.affine.tolist()}
        tissue = get_tissue_shares(slices, (low, high)).tolist()
        write_json(about, {**grid, "range": [low, high], "tissue": tissue})
    return {**json.loads(about.read_text()), "path": unpacked}


def _read_pictures(paths, processor):
    """The slices of a patient."""
    images = [read_image(path) for path in paths]
    intensity_range = _range_of(processor, images, f"{paths[0].parent}, {_some([path.name for path in paths])}")
    return [
        SliceFile(path, None, intensity_range, (image.height, image.width))
        for path, image in zip(paths, images, strict=True)
    ]


def _range_of(processor, slices, where):
    try:
        return processor.get_intensity_range(slices)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _pair(name, patient, source, target):
    if source.size != target.size:
        raise ValueError(
            f"Expected slices of one size (height, width), got {source.size} in {source.path} and {target.size} in "
            f"{target.path}: resample one to the other's grid."
        )
    return SlicePair(name, patient, source, target)


def _pad(image, height, width, black):
    canvas = black[:, None, None].repeat(1, height, width)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas


def _some(names):
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
