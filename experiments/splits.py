"""
The images of a run: the splits of a data set, or five folds over its training and validation images, without what has
a near-duplicate (duplicates.json) where the model or its start point learnt.
"""

import json
import shutil
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from duplicates import Pair, group, read_pairs

from imedsam.training.examples import SPLITS, images_by_name
from imedsam.training.report import write_json

NUM_FOLDS = 5
# What the medical start point has been trained on, of the sets that are looked through: all, or a split. The images
# are left out whatever a run starts from, so that all runs are scored on the same ones. (ACDC's training patients too,
# but its splits are of patients.)
SEEN = {"kvasir_other": None, "busi": "train"}
# The first frames of CVC-ClinicDB's sequences: frames of one are not independent.
# fmt: off
CVC_SEQUENCES = (
    1, 26, 51, 68, 79, 104, 127, 152, 178, 200, 206, 228, 253, 278, 298, 318, 343, 364, 384, 409, 429, 448, 467, 479,
    504, 529, 547, 572, 592,
)
# fmt: on


@dataclass
class Splits:
    """
    Args:
        names: of the images of each split.
        dropped: validation and test images that are left out, and the image, "set/name", that each is too close to.
    """

    names: dict[str, list[str]]
    dropped: dict[str, dict[str, str]] = field(default_factory=dict)


def make_splits(root: Path, dataset: str, fold: int | None = None, pairs: list[Pair] | None = None) -> Splits:
    """
    Args:
        root: the folder of the data sets.
        dataset: its folder; without a splits.json all of it is for test.
        fold: validate on this one of the five folds over training and validation images, and train on the others.
            Near-duplicates are in one fold, and the test split is not part of any.
        pairs: near-duplicates; those of duplicates.json by default.
    """
    pairs = read_pairs() if pairs is None else pairs
    names = read_names(root, dataset)
    if fold is not None:
        names = make_folds(names["train"] + names["validation"], dataset, pairs)[fold]
    splits = Splits(names)
    learnt = {(dataset, name) for name in names["train"]}
    for other, split in SEEN.items():
        if split is None:  # what is near to it is in the pairs, whether the set is here or not
            learnt |= {image for pair in pairs for image in (pair.first, pair.second) if image[0] == other}
        elif (root / other).is_dir():
            learnt |= {(other, name) for name in read_names(root, other)[split]}
    for split in ("validation", "test"):
        own = [(dataset, name) for name in names[split]]
        too_close = find_relatives(own, sorted(learnt - set(own)), pairs)
        splits.dropped[split] = {name: "/".join(relative) for (_, name), relative in too_close.items()}
        splits.names[split] = [name for name in names[split] if name not in splits.dropped[split]]
        learnt |= set(own)  # the test images are not to be known from the choice of the epoch either
    return splits


def read_names(root: Path, dataset: str) -> dict[str, list[str]]:
    path = root / dataset / "splits.json"
    if path.exists():
        return {split: json.loads(path.read_text())[split] for split in SPLITS}
    return {"train": [], "validation": [], "test": list(images_by_name(root / dataset / "images"))}


def make_folds(names: list[str], dataset: str, pairs: list[Pair]) -> list[dict[str, list[str]]]:
    """The splits of each fold: whole scenes, in random order, each to the fold that has the fewest images."""
    names = sorted(names)
    scenes = group([(dataset, name) for name in names], pairs)
    folds: list[list[str]] = [[] for _ in range(NUM_FOLDS)]
    for scene in np.random.default_rng(0).permutation(sorted(set(scenes))):
        min(folds, key=len).extend(name for name, own in zip(names, scenes, strict=True) if own == scene)
    return [{"train": sorted(set(names) - set(fold)), "validation": sorted(fold), "test": []} for fold in folds]


def find_relatives(names: list[tuple], others: list[tuple], pairs: list[Pair]) -> dict[tuple, tuple]:
    """For the images that share a scene with any of the others, the first such other."""
    scenes = group([*names, *others], pairs)
    of_others = dict(zip(reversed(scenes[len(names) :]), reversed(others), strict=True))
    return {name: of_others[scene] for name, scene in zip(names, scenes, strict=False) if scene in of_others}


def clusters(dataset: str, names: list[str], pairs: list[Pair]) -> list[Hashable]:
    """What is resampled together: frames of a sequence, slices of a patient, images of a scene."""
    if dataset == "cvc_clinicdb":
        return [int(np.searchsorted(CVC_SEQUENCES, int(name), side="right")) for name in names]
    if dataset == "acdc":
        return [name.partition("_")[0] for name in names]
    return list(group([(dataset, name) for name in names], pairs))


def write_folder(root: Path, dataset: str, splits: Splits, folder: Path) -> None:
    """A data set of these splits: links to the images and masks of another one."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("images", "masks"):
        if not (folder / part).exists():
            (folder / part).symlink_to((root / dataset / part).resolve(), target_is_directory=True)
    if (root / dataset / "labels.json").exists():
        shutil.copy(root / dataset / "labels.json", folder)
    write_json(folder / "splits.json", splits.names)
