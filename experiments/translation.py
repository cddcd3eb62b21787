"""
SAM-I2I between MR contrasts, each of four patients left out once, beside what needs no training and MONAI's U-Net.

    python experiments/translation.py --rates     # tries RATES, by validation, for those of METHODS
    python experiments/translation.py [--jobs 2]  # trains what is not trained, and scores the patient left out
    python experiments/translation.py --report    # writes the table of docs/translation.md

Needs IMEDSAM_DATA (see README.md beside this file). Cost: 24 runs of 1000 steps, whose slices a core takes some
hundreds of milliseconds (U-Net) to a second (Hiera) for. Expected: not known. The paper has 28.01 dB from T1 to T2 and
30.53 dB back, on another data set and with SAM 2's pretrained Hiera, which these backbones are not: the differences
between rows are what counts.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import write_between_markers
from skimage.exposure import match_histograms

from imedsam.processing.image_processing_sam_i2i import SamI2IImageProcessor
from imedsam.training.intervals import Interval, paired_bootstrap
from imedsam.training.report import write_json
from imedsam.training.translation_metrics import mean_metrics, slice_metrics

HERE = Path(__file__).parent
DATA = Path(os.environ.get("IMEDSAM_DATA", "."))
DOCUMENT = HERE.parent / "docs" / "translation.md"
PATIENTS = ("AURORA", "BraTS-GLI-00001-000", "TCGA-DU-7294", "TCGA-FG-6692")
DIRECTIONS = (("t1", "t2"), ("t2", "t1"))
# No weights of CLIP are at hand, so L1 alone; the paper's 20 epochs would be 3500 steps.
RECIPE = "--no_gan --max_train_steps 1000 --lr_scheduler_type cosine --mixed_precision bf16 --seed 0 --do_test"
# A quarter of the channels of SAM 2's tiny Hiera: 1.9 M parameters with the decoder, where the U-Net has 3.1 M.
SMALL_HIERA = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 24,
    "embed_dim_per_stage": [24, 48, 96, 192],
}
TRUNK = shlex.quote(str(DATA / "checkpoints" / "deit-tiny-sam-384"))
METHODS = {
    "MONAI's U-Net": "--model unet --learning_rate 1e-3",
    "SAM-I2I, Hiera from nothing": "--config train_backbone=true upsampling=2 "
    f"backbone_config={shlex.quote(json.dumps(SMALL_HIERA))} --learning_rate 1e-3",
    "SAM-I2I, ImageNet DeiT-Tiny trunk": f"--model_name_or_path {TRUNK} --config upsampling=2 --learning_rate 1e-3",
}
RATES = (3e-4, 1e-3, 3e-3)  # tried on a task that is not tested, from FLAIR to T1 with contrast agent


@dataclass(frozen=True)
class Run:
    """
    Args:
        method: of METHODS.
        source, target: contrasts.
        patient: who is left out.
        rate: to be tried instead of the method's, by validation on that patient.
    """

    method: str
    source: str
    target: str
    patient: str
    rate: float | None = None

    @property
    def name(self) -> str:
        words = self.method.replace("'", "").replace(",", "").replace(" ", "_")
        return f"{words}-{self.source}-{self.target}-{self.patient}" + (f"-{self.rate:g}" if self.rate else "")

    def flags(self) -> list[str]:
        source, target = (DATA / "data" / "brain_mr" / contrast for contrast in (self.source, self.target))
        flags = [*shlex.split(f"{RECIPE} {METHODS[self.method]}"), "--source", str(source), "--target", str(target)]
        if self.rate is None:
            return [*flags, "--test_patients", self.patient]
        return [*flags, "--learning_rate", str(self.rate), "--validation_patients", self.patient, "--test_patients"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", action="store_true", help="Try the rates.")
    parser.add_argument("--report", action="store_true", help="Write the table.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=1, help="Runs side by side.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/translation"))
    parser.add_argument("--results", type=Path, default=HERE / "translation")
    args = parser.parse_args()
    if args.report:
        write_between_markers(DOCUMENT, report(args.results))
        return
    args.results.mkdir(parents=True, exist_ok=True)
    if args.rates:
        runs = [Run(method, "flair", "t1c", PATIENTS[0], rate) for method, rate in product(args.methods, RATES)]
    else:
        write_json(args.results / "floors.json", floors())
        runs = [Run(method, *way, one) for one, way, method in product(PATIENTS, DIRECTIONS, args.methods)]
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [name for name in pool.map(lambda run: carry_out(run, args), runs) if name]
    if failed:
        raise SystemExit(f"Expected every run to finish, got errors in {', '.join(failed)}: see above.")


def carry_out(run: Run, args: argparse.Namespace) -> str | None:
    """Trains and scores, unless that is done; the name of a run that failed."""
    path = args.results / f"{run.name}.json"
    if path.exists():
        return None
    folder = args.output_dir / run.name
    command = [sys.executable, "-m", "imedsam.training.train_sam_i2i", *run.flags()]
    command += ["--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    if subprocess.run(command, env={**threads, **os.environ}).returncode:
        return run.name
    left = json.loads((folder / "metrics.json").read_text())
    arguments = {key: value for key, value in left.pop("arguments").items() if not str(value).startswith("/")}
    write_json(path, {"run": vars(run), **left, "arguments": arguments})
    return None


def floors() -> dict[str, list[dict]]:
    """What the source itself is worth, as it is and with the histogram of the other patients' targets."""
    volumes = {one: read_volumes(one) for one in {name for way in DIRECTIONS for name in way}}
    rows: dict[str, list[dict]] = {"identity": [], "histogram match": []}
    for (source, target), patient in product(DIRECTIONS, PATIENTS):
        others = np.concatenate([volumes[target][other] for other in PATIENTS if other != patient])
        given, true = volumes[source][patient], volumes[target][patient]
        for name, made in (("identity", given), ("histogram match", match_histograms(given, others))):
            rows[name] += [
                {"way": f"{source}-{target}", "patient": patient, **slice_metrics(torch.tensor(a), torch.tensor(b))}
                for a, b in zip(made, true, strict=True)
            ]
    return rows


def read_volumes(contrast: str) -> dict[str, np.ndarray]:
    """Per patient (S, H, W) in [0, 1], scaled as in training: by the range of the patient's slices."""
    processor, folder = SamI2IImageProcessor(), DATA / "data" / "brain_mr" / contrast
    volumes = {}
    for patient in PATIENTS:
        slices = [np.asarray(Image.open(path)) for path in sorted(folder.glob(f"{patient}_*"))]
        inputs = processor(slices, labels=slices)
        labels = processor.post_process_reconstruction(inputs["labels"], inputs["original_sizes"])
        volumes[patient] = torch.stack(labels).numpy()
    return volumes


def report(results: Path) -> str:
    """A table per direction: means over all slices, intervals by patient, and the differences to the U-Net."""
    return "\n\n".join(write_table(results, source, target) for source, target in DIRECTIONS)


def write_table(results: Path, source: str, target: str) -> str:
    rows = {
        name: [row for row in found if row["way"] == f"{source}-{target}"]
        for name, found in json.loads((results / "floors.json").read_text()).items()
    }
    for method in METHODS:
        paths = [results / f"{Run(method, source, target, one).name}.json" for one in PATIENTS]
        if all(path.exists() for path in paths):
            rows[method] = [row for path in paths for row in json.loads(path.read_text())["test_slices"]]
    reference = next(iter(METHODS))
    head = f"| {source.upper()} to {target.upper()} | PSNR (dB) | SSIM | NRMSE | PSNR beside the U-Net |"
    lines = [head, "|---|---:|---:|---:|---:|"]
    for name, found in rows.items():
        patients = [row["patient"] for row in found]
        cells = [shown(key, interval) for key, interval in mean_metrics(found, patients).items()]
        difference = ""
        if reference in rows and name != reference:
            pairs = ([row["psnr"] for row in one] for one in (found, rows[reference]))
            difference = shown("psnr", paired_bootstrap(*pairs, patients), sign="+")
        lines.append(f"| {name} | {' | '.join(cells)} | {difference} |")
    return "\n".join(lines)


def shown(key: str, interval: Interval, sign: str = "") -> str:
    digits = 2 if key == "psnr" else 3
    return f"{interval.mean:{sign}.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


if __name__ == "__main__":
    main()
