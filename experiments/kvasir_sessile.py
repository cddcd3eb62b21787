"""
Kvasir-Sessile from two small start points: Dice and Hausdorff distance at the images' own size.

    python experiments/kvasir_sessile.py            # trains, and scores the validation split
    python experiments/kvasir_sessile.py --test     # scores the test split too: once, when the recipe is decided

Needs IMEDSAM_DATA (see README.md beside this file). Cost: 7 runs of 45 to 60 minutes on one core each. Expected: the
tables of docs/results.md. A run that is done is skipped, one that was cut goes on. With SAM's own weights and the
paper's schedule: `--medical facebook/sam-vit-base --epochs 1000`.

- medical: the encoder is frozen but for LoRA and the frequency branch, the paper's setting in small; the prompt
  encoder, SAM's two-way transformer, the upscaling and the fields are trained.
- ImageNet: a trunk that has never seen a prompt, so that everything is trained but SAM's mask heads; no LoRA.
"""

import argparse
import json
import os
import platform
from pathlib import Path

import numpy as np

from imedsam import IMedSamPipeline
from imedsam.training.arguments import parse_args
from imedsam.training.checkpoints import STATE_FILE, find_checkpoints
from imedsam.training.demo import draw
from imedsam.training.evaluation import evaluate_masks, floor_metrics
from imedsam.training.examples import load_examples
from imedsam.training.report import write_json
from imedsam.training.train import main as train

SEEDS = (0, 1, 2)
RECIPE = (
    "--per_device_train_batch_size 2 --num_points 2500 --uniform_share 0.3 --point_weighting none --box_jitter 0.01 "
    "--copy_paste 0.3 --learning_rate 1e-3 --adapter_learning_rate 1e-3 --weight_decay 0.1 --ema_decay 0.997 "
    "--mixed_precision bf16 --evaluation_size 128 --eval_every 3 --resume_from_checkpoint latest"
)
STARTS = {
    "medical": "--num_train_epochs 44 --augmentation light --encoder_learning_rate 2e-4 "
    "--config lora_rank=16 lora_alpha=16 train_mask_decoder=true",
    "ImageNet": "--num_train_epochs 40 --augmentation strong --encoder_learning_rate 2e-4 --num_warmup_steps 50 "
    "--config lora_rank=0 train_image_encoder=true train_mask_decoder=true",
}
RUNS = {f"{start}-{seed}": (start, seed, "") for start in STARTS for seed in SEEDS}
RUNS["medical-0-no-prompt-frame"] = ("medical", 0, "--config prompt_frame=false")
BOXES = {"exact": 0.0, "jittered by 3 %": 0.03}
METRICS = {"dice": 100, "iou": 100, "hd": 1, "hd95": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(os.environ.get("IMEDSAM_DATA", "."))
    parser.add_argument("--data", type=Path, default=root / "data" / "kvasir_sessile")
    parser.add_argument("--medical", default=str(root / "checkpoints" / "medical-tiny-sam-384"))
    parser.add_argument("--imagenet", default=str(root / "checkpoints" / "deit-tiny-sam-384"))
    parser.add_argument("--epochs", type=int, help="By default those of the recipe.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/kvasir_sessile"))
    parser.add_argument("--runs", nargs="*", choices=list(RUNS), help="Only these, such as medical-0; all by default.")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--test", action="store_true")
    args = parser.parse_args()
    checkpoints = {"medical": args.medical, "ImageNet": args.imagenet}
    for name in args.runs or RUNS:
        start, seed, extra = RUNS[name]
        folder = args.output_dir / name
        flags = f"{RECIPE} {STARTS[start]} {extra} --seed {seed}".split()
        flags += ["--num_train_epochs", str(args.epochs)] if args.epochs else []
        flags += ["--model_name_or_path", checkpoints[start], "--dataset_name", str(args.data)]
        flags += ["--output_dir", str(folder)]
        if not (folder / "metrics.json").exists():
            for checkpoint in find_checkpoints(folder)[-1:]:
                refuse_another_recipe(checkpoint / STATE_FILE, flags)
            train(flags)
        refuse_another_recipe(folder / "metrics.json", flags)
        for split in ("validation", "test") if args.test else ("validation",):
            score(folder, args.data, split)
        record(name, folder, args.results)
    print_tables(json.loads(args.results.read_text())["runs"])


def refuse_another_recipe(path: Path, flags: list[str]) -> None:
    """A run from before, finished or not, counts if it was made with the flags that are given now."""
    made_with, asked_for = json.loads(path.read_text())["arguments"], vars(parse_args(flags))
    asked_for = json.loads(json.dumps(asked_for))
    if different := [key for key, value in asked_for.items() if value not in (None, made_with.get(key))]:
        raise SystemExit(
            f"Expected a run of this recipe in {path.parent}, got another {', '.join(different)}: move it away, or "
            "choose another --output_dir."
        )


def score(folder: Path, data: Path, split: str) -> None:
    """Scores a split with the model of the best validation epoch, once, and draws eight of its images."""
    if (folder / f"{split}.json").exists():
        return
    pipeline, examples = IMedSamPipeline.from_pretrained(folder), load_examples(str(data), split)
    tables = {
        f"boxes {name}": evaluate_masks(pipeline.model, pipeline.processor, examples, box_jitter=jitter)
        for name, jitter in BOXES.items()
    }
    tables |= floor_metrics(examples)
    draw(pipeline, examples, folder / f"{split}.png", range(0, len(examples), max(1, len(examples) // 8))[:8])
    write_json(folder / f"{split}.json", {name: table.mean() for name, table in tables.items()})


def record(run: str, folder: Path, path: Path) -> None:
    """Adds a finished run's scores to the JSON file of all of them, where runs of other days and machines stay."""
    report = json.loads((folder / "metrics.json").read_text())
    result = {"date": report["date"], "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    result |= {key: report[key] for key in ("best_epoch", "seconds", "trainable_parameters", "versions")}
    machine_dependent = ("model_name_or_path", "dataset_name", "output_dir")
    result["arguments"] = {key: v for key, v in report["arguments"].items() if key not in machine_dependent}
    for split in ("validation", "test"):
        if (folder / f"{split}.json").exists():
            result[split] = json.loads((folder / f"{split}.json").read_text())
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    write_json(path, {"runs": {name: result if name == run else runs[name] for name in RUNS if name in {*runs, run}}})


def print_tables(runs: dict[str, dict]) -> None:
    """Means and standard deviations over the seeds."""
    for split in ("validation", "test"):
        rows: dict[str, list[dict]] = {}
        for run, result in runs.items():
            start, _, variant = run.partition("-")
            for row, metrics in result.get(split, {}).items():
                if row in ("filled box", "inscribed ellipse"):
                    rows[row] = [metrics]  # the same for every run
                else:
                    rows.setdefault(f"{start}{variant[1:].replace('-', ' ')}, {row}", []).append(metrics)
        if rows:
            print(f"\n| {split} | runs | Dice | IoU | HD (px) | HD95 (px) |\n|---|---:|---:|---:|---:|---:|")
        for name, metrics in rows.items():
            columns = [np.array([scale * m[key] for m in metrics]) for key, scale in METRICS.items()]
            print(
                f"| {name} | {len(metrics)} | "
                + " | ".join(f"{c.mean():.1f}" + (f" ± {c.std(ddof=1):.1f}" if len(c) > 1 else "") for c in columns)
                + " |"
            )


if __name__ == "__main__":
    main()
