"""
Near-duplicates inside and across data sets, by perceptual hash: what is taken out of validation and test because the
model, or its start point, has been trained on the same scene.

    python experiments/duplicates.py            # writes duplicates.json, and sheets of the pairs to look at

Needs IMEDSAM_DATA (see README.md beside this file) and the extra `experiments`. Cost: half a minute on one core.

The hash (pHash of 16 x 16 bits: the signs of an image's low frequencies) does not see size, compression, brightness or
small marks. Of polyps it sees the part where the endoscope's own overlays are not: with them, the closest pairs of
different patients are as close as 42 bits. MAX_DISTANCE was chosen by looking at the sheets, also of pairs beyond it:
up to 72 bits all pairs of Kvasir and BUSI show one scene; the first that does not comes at 74 and at 80.
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from imedsam.training.examples import images_by_name
from imedsam.training.pictures import displayable, save_sheet
from imedsam.training.report import write_atomically

HASH_SIDE = 16
MAX_DISTANCE = 72  # of 256 bits
# What is compared with each other, and the part of the image, left, top, right and bottom as shares of its sides.
FAMILIES = {
    ("kvasir_sessile", "kvasir_other", "cvc_clinicdb"): (0.2, 0.12, 0.9, 0.65),
    ("busi",): (0.0, 0.0, 1.0, 1.0),
}
RESULTS = Path(__file__).with_suffix(".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("IMEDSAM_DATA", ".")) / "data")
    parser.add_argument("--max_distance", type=int, default=MAX_DISTANCE, help="Bits in which two hashes may differ.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/duplicates"), help="For the sheets.")
    parser.add_argument("--sheet_pairs", type=int, default=24, help="On each sheet: so many pairs, the most distant.")
    args = parser.parse_args()
    pairs: list[Pair] = []
    counts: dict[str, int] = {}
    for datasets, region in FAMILIES.items():
        images = {dataset: images_by_name(args.data / dataset / "images") for dataset in datasets}
        paths = {(dataset, name): path for dataset, part in images.items() for name, path in part.items()}
        hashes = np.stack([perceptual_hash(path, region) for path in paths.values()])
        pairs += find_pairs(list(paths), hashes, args.max_distance)
        counts |= {dataset: len(part) for dataset, part in images.items()}
    write_pairs(args.results, pairs, args.max_distance, counts)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for datasets in sorted({pair.datasets for pair in pairs}):
        chosen = [pair for pair in pairs if pair.datasets == datasets]
        print(f"{' and '.join(dict.fromkeys(datasets))}: {len(chosen)} pairs")
        draw_pairs(chosen[-args.sheet_pairs :], args.data, args.output_dir / f"{'-'.join(datasets)}.png")


@dataclass(frozen=True)
class Pair:
    """Two images, (data set, name) each, and the number of bits in which their hashes differ."""

    first: tuple[str, str]
    second: tuple[str, str]
    distance: int

    @property
    def datasets(self) -> tuple[str, str]:
        return self.first[0], self.second[0]


def perceptual_hash(path: Path, region: tuple[float, float, float, float]) -> np.ndarray:
    """The hash of a part of an image, (HASH_SIDE^2,), bool."""
    from imagehash import phash  # of the extra `experiments`

    with Image.open(path) as image:
        box = tuple(round(share * side) for share, side in zip(region, image.size * 2, strict=True))
        return phash(image.crop(box), hash_size=HASH_SIDE).hash.ravel()


def find_pairs(names: list[tuple[str, str]], hashes: np.ndarray, max_distance: int) -> list[Pair]:
    """All pairs of images whose hashes, (N, bits), differ in at most so many bits, the closest first."""
    bits = hashes.astype(np.float32)
    distances = bits @ (1 - bits).T + (1 - bits) @ bits.T
    close = np.argwhere(np.triu(distances <= max_distance, 1))
    pairs = [Pair(min(names[i], names[j]), max(names[i], names[j]), int(distances[i, j])) for i, j in close]
    return sorted(pairs, key=lambda pair: (pair.distance, pair.first, pair.second))


def read_pairs(path: Path = RESULTS) -> list[Pair]:
    return [Pair((a, name), (b, other), bits) for a, name, b, other, bits in json.loads(path.read_text())["pairs"]]


def write_pairs(path: Path, pairs: list[Pair], max_distance: int, num_images: dict[str, int]) -> None:
    """A line per pair, so that a change of the list can be read."""
    lines = ",\n".join(f"  {json.dumps([*pair.first, *pair.second, pair.distance])}" for pair in pairs)
    head = {"hash": "pHash", "bits": HASH_SIDE**2, "max_distance": max_distance, "num_images": num_images}
    write_atomically(path, f'{json.dumps(head)[:-1]}, "pairs": [\n{lines}\n]}}\n')


def group(names: list[tuple[str, str]], pairs: list[Pair]) -> list[int]:
    """The number of each image's scene: images that pairs connect, also by way of others, share one."""
    scene = {name: number for number, name in enumerate(names)}
    for pair in pairs:
        if pair.first in scene and pair.second in scene and scene[pair.first] != scene[pair.second]:
            kept, gone = sorted((scene[pair.first], scene[pair.second]))
            scene = {name: kept if number == gone else number for name, number in scene.items()}
    return list(scene.values())


def draw_pairs(pairs: list[Pair], data: Path, path: Path) -> None:
    rows, labels = [], []
    for pair in pairs:
        paths = [images_by_name(data / dataset / "images")[name] for dataset, name in (pair.first, pair.second)]
        rows.append([displayable(Image.open(path)) for path in paths])
        labels.append(f"{pair.distance} bits\n{pair.first[1]}\n{pair.second[1]}")
    save_sheet(rows, pairs[0].datasets, path, labels)


if __name__ == "__main__":
    main()
