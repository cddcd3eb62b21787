"""
The released model: one small generalist for box prompts, of polyps, breast lesions and the heart's chambers, and what
it is worth on each of them and on CVC-ClinicDB, which it has not seen.

    python experiments/generalist.py           # trains, and scores validation splits
    python experiments/generalist.py --test    # scores test splits too: once, when all is decided; writes the folder

Needs IMEDSAM_DATA (see README.md beside this file). Cost: an hour and a half on two cores with bfloat16 units
(`--flags="--mixed_precision bf16"`, as it was trained). Expected: ahead of the ellipse in the box on every set.

It learns from the training splits of Kvasir-Sessile, BUSI and ACDC, each class of ACDC as an object of its own, and
from the other polyps of Kvasir but for what has a near-duplicate among Sessile's validation and test images. The
recipe is that of the other runs with the pixel decoder, without pasted objects, for longer, and with boxes whose sides
move by up to 5 %. What is published is in --output_dir/published, with its card; generalist.json holds its scores.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from duplicates import read_pairs
from PIL import Image
from runs import RECIPE, STARTS, WITH_PIXEL_DECODER, start_folder
from splits import clusters, find_relatives, make_splits, read_names

from imedsam.training.evaluation_report import NUM_CASES, evaluate_to_folder
from imedsam.training.examples import SPLITS, images_by_name, label_values, read_labels
from imedsam.training.model_card import Publication, shown_name
from imedsam.training.publish import prepare_folder, read_evaluation, read_metrics, summary_of
from imedsam.training.report import write_json
from imedsam.training.train import main as train

LEARNT = ("kvasir_sessile", "busi", "acdc")  # by their training splits
MORE = "kvasir_other"  # without near-duplicates of what is scored
UNSEEN = "cvc_clinicdb"
TOGETHER = "polyps_lesions_hearts"
START = "medical"
FLAGS = (
    f"{RECIPE} {STARTS[START][1]} {WITH_PIXEL_DECODER} --per_device_train_batch_size 4 --max_train_steps 3500 "
    "--num_warmup_steps 50 --copy_paste 0 --box_jitter 0.05 --eval_every 1 --coarse_ramp_epochs 1 --seed 0 "
    "--checkpointing_steps 100 --resume_from_checkpoint latest"
)
JITTERS = (0.0, 0.1)
PUBLICATION = Publication(
    repo_id="imedsam/imedsam-generalist-tiny",
    license="cc-by-nc-4.0",
    task="the object in the box: polyps in colonoscopy, lesions in breast ultrasound, and the right ventricle, "
    "myocardium and left ventricle in cardiac MR; cvc_clinicdb, below, is unseen",
    data_terms="Kvasir-SEG (Jha et al., 2020), research and education: its sessile polyps' training split, and all "
    "others but for near-duplicates of what is scored, by perceptual hash; BUSI (Al-Dhabyani et al., 2020), public, "
    "and ACDC (Bernard et al., 2018), non-commercial research, each class an object: their training splits. The start "
    "point, an encoder of SAM's kind with a DeiT-Tiny trunk from ImageNet, has learnt from their training images too, "
    "from public images of nuclei (DSB 2018), chest X-rays (Montgomery, Shenzhen) and atria (2018 left atrium "
    "challenge), and is no SAM. So: research, and nothing commercial. CVC-ClinicDB (Bernal et al., 2015) is another "
    "hospital's, which "
    "neither has seen. Near-duplicates of training images are left out of the scores.",
)
METRICS = ("dice", "hd95", "nsd")
TRAINING_FACTS = (
    *("arguments", "image_size", "num_images", "trainable_parameters", "best_epoch", "validation"),
    *("seconds", "machine", "date", "versions"),
)
RESULTS = Path(__file__).with_suffix(".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(os.environ.get("IMEDSAM_DATA", "."))
    parser.add_argument("--data", type=Path, default=root / "data", help="Folder of the data sets.")
    parser.add_argument("--start", default=start_folder(root, START), help="Folder or Hub name of the start point.")
    parser.add_argument("--test", action="store_true", help="Score test splits, and write what is published.")
    parser.add_argument("--flags", default="", help="Of the training script, after those of the recipe.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/generalist"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    model, folders = str(args.output_dir / "model"), args.output_dir / "data"
    write_folders(args.data, folders)
    if not Path(model, "metrics.json").exists():
        places = ["--model_name_or_path", args.start, "--dataset_name", str(folders / TOGETHER), "--output_dir", model]
        train([*places, *FLAGS.split(), *args.flags.split()])
    split = "test" if args.test else "validation"
    reports = []
    for dataset in (*LEARNT, UNSEEN) if args.test else LEARNT:
        reports.append(args.output_dir / "reports" / f"{dataset}-{split}")
        if not (reports[-1] / "metrics.json").exists():
            options = {"split": split, "box_jitters": JITTERS, "mode": "adaptive"}
            evaluate_to_folder(model, str(folders / dataset), reports[-1], **options)
    evaluations = [read_evaluation(report, Path(model)) for report in reports]
    for evaluation in evaluations:
        print(summary(evaluation))
    if args.test:
        training = summary_of(read_metrics(Path(model), "of the training"))
        facts = {key: training[key] for key in TRAINING_FACTS}
        write_json(args.results, {"training": facts, "evaluations": list(map(scores, evaluations))})
        if not (published := args.output_dir / "published").exists():
            picture = draw(model, folders, args.output_dir / "reports" / "picture")
            prepare_folder(model, published, PUBLICATION, reports=reports, picture=picture)


def draw(model: str, folders: Path, report: Path) -> Path:
    """What the model makes of the first six test images of BUSI, which is public, the worst first."""
    evaluate_to_folder(model, str(folders / "busi"), report, num_images=NUM_CASES, mode="adaptive")
    return report / "worst.png"


def split_names(root: Path) -> dict[str, dict[str, list[str]]]:
    """The images of each split of each data set, without near-duplicates between what is learnt and what is scored."""
    names = {dataset: make_splits(root, dataset).names for dataset in (*LEARNT, UNSEEN)}
    sessile = read_names(root, "kvasir_sessile")
    scored = [("kvasir_sessile", name) for split in ("validation", "test") for name in sessile[split]]
    others = [(MORE, name) for name in images_by_name(root / MORE / "images")]
    too_close = find_relatives(others, scored, read_pairs())
    learnt = [name for _, name in others if (MORE, name) not in too_close]
    names[MORE] = {"train": learnt, "validation": [], "test": []}
    return names


@dataclass
class ObjectsFolder:
    """A data set of binary masks, one object each."""

    path: Path
    splits: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    groups: dict[str, str] = field(default_factory=dict)

    def add(self, split: str, name: str, group: str, image: Path, mask: np.ndarray) -> None:
        self.splits[split].append(name)
        self.groups[name] = group
        link = self.path / "images" / f"{name}{image.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(image.resolve())
        (self.path / "masks").mkdir(exist_ok=True)
        Image.fromarray(255 * mask.astype(np.uint8)).save(self.path / "masks" / f"{name}.png")

    def close(self) -> None:
        write_json(self.path / "groups.json", self.groups)
        write_json(self.path / "splits.json", self.splits)


def write_folders(root: Path, output: Path) -> None:
    """The objects of each data set by themselves, to be scored, and of all that are learnt together."""
    together = ObjectsFolder(output / TOGETHER)
    for dataset, splits in split_names(root).items():
        alone, images = ObjectsFolder(output / dataset), images_by_name(root / dataset / "images")
        everything = [name for names in splits.values() for name in names]
        scenes = dict(zip(everything, clusters(dataset, everything, read_pairs()), strict=True))
        for split, names in splits.items():
            for image_name in names:
                image, group = images[image_name], f"{dataset} {scenes[image_name]}"
                for name, mask in objects_of(root / dataset, image_name):
                    alone.add(split, name, group, image, mask)
                    if dataset != UNSEEN:
                        together.add(split, f"{dataset}_{name}", group, image, mask)
        alone.close()
    together.close()


def objects_of(folder: Path, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """A name and a mask, bool, for each class that an image shows."""
    labels = read_labels(folder / "labels.json") if (folder / "labels.json").exists() else None
    mask = np.asarray(Image.open(folder / "masks" / f"{name}.png"))
    for value in sorted(label_values(mask) - {0}):
        yield name if labels is None else f"{name}_{labels[value].replace(' ', '_')}", mask == value


def summary(evaluation: dict) -> str:
    """What the model and each floor score on a data set, in lines."""
    lines = []
    for setting in evaluation["settings"]:
        lines.append(f"{shown_name(evaluation['data'])}, {evaluation['split']}, {setting['title']}")
        for name, values in setting["methods"].items():
            dice, hd95, nsd = (values["mean"][key] for key in METRICS)
            lines.append(f"  {name}: Dice {100 * dice:.1f}, HD95 {hd95:.1f}, NSD {100 * nsd:.1f}")
    return "\n".join(lines)


def scores(evaluation: dict) -> dict:
    """The means of a report, and by how much the model is ahead of each floor, with intervals."""
    settings = []
    for setting in evaluation["settings"]:
        compared = [row for row in setting["comparisons"] if row["metric"] in METRICS]
        means = {name: {key: values["mean"][key] for key in METRICS} for name, values in setting["methods"].items()}
        objects = next(iter(setting["methods"].values()))["num_objects"]
        settings.append({"title": setting["title"], "num_objects": objects, "means": means, "differences": compared})
    return {
        "data": shown_name(evaluation["data"]),
        **{key: evaluation[key] for key in ("split", "num_images", "mode", "date", "versions")},
        "settings": settings,
    }


if __name__ == "__main__":
    main()
