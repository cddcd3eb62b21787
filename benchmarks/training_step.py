"""
Training step: CPU time and memory of one step with ViT-B at 384 pixels, supervised at every pixel through the decoder
as the authors evaluate it, at every pixel through ours, and at sampled points; and two trainings of equal wall time
on phantoms, at every pixel and at sampled points.

    python benchmarks/training_step.py

About 20 minutes on two cores; 12 GB of memory.
"""

import json
from pathlib import Path

import numpy as np
import torch
from authors_decoder import AuthorsDecoder
from harness import Goals, finish, measure, parse_args, peak_memory, ratio, save_start
from matplotlib.figure import Figure

from imedsam import IMedSamConfig, IMedSamModel
from imedsam.losses import segmentation_loss
from imedsam.training.arguments import parse_args as parse_training_args
from imedsam.training.train import main as train

POINTS = parse_training_args(["--model_name_or_path", "", "--dataset_name", "", "--output_dir", ""], "").num_points
TRAINING_SECONDS = 150
SEEDS = (0, 1, 2)
TRAINING = (
    "--dataset_name phantoms:ultrasound --phantom_size 192 --augmentation none "
    "--per_device_train_batch_size 2 --num_warmup_steps 20 --encoder_learning_rate 5e-4 --box_jitter 0.05 "
    "--eval_every 1000 --evaluation_size 128 --num_train_epochs 1000"
)


def main() -> None:
    args = parse_args(__doc__, models=())
    steps = measure_steps(64 if args.quick else 384, rounds=1 if args.quick else 3)
    trainings = measure_trainings(quick=args.quick)
    goals = Goals()
    goals.at_least(
        "a step's CPU time against the dense reference",
        ratio(steps["reference"], steps["points"], "cpu_rounds"),
        1.5 if args.quick else 7,
        " times less",
    )
    if not args.quick:
        difference = 100 * (np.mean(trainings["points"]["dice"]) - np.mean(trainings["dense"]["dice"]))
        goals.at_least("Dice of points less dense, equal time", difference, -0.5, " points")
    finish(
        "training_step",
        args,
        {"num_points": POINTS, "steps": steps, "trainings": trainings},
        goals,
        plot(steps, trainings),
    )


def measure_steps(size: int, rounds: int) -> dict:
    sam = {"vision_config": {"image_size": size, "initializer_range": 0.02, "scale": 1.0}}
    model = IMedSamModel(IMedSamConfig(sam_config=sam | {"prompt_encoder_config": {"image_size": size}}))
    model.add_adapter()
    model.train()
    reference = AuthorsDecoder()
    inputs = {"pixel_values": torch.randn(1, 3, size, size)}
    inputs["input_boxes"] = size * torch.tensor([[[0.25, 0.25, 0.75, 0.75]]])
    labels = (torch.rand(1, 1, size, size) > 0.5).float()
    coordinates = 2 * torch.rand(1, 1, POINTS, 2) - 1

    def step(get_loss):
        for parameters in (model.parameters(), reference.parameters()):
            for parameter in parameters:
                parameter.grad = None
        get_loss().backward()

    def reference_loss():
        embeddings = model.get_image_embeddings(inputs["pixel_values"])
        field = model.get_mask_field(embeddings, input_boxes=inputs["input_boxes"])
        merged, coarse = reference(field.features, field.prompt, (size, size))
        target = labels.flatten(2)[:, 0]
        return 0.5 * segmentation_loss(merged, target).mean() + 0.5 * segmentation_loss(coarse, target).mean()

    def sampled_loss():
        return model(**inputs, coordinates=coordinates, labels=(coordinates.sum(dim=-1) > 0).float()).loss

    functions = {
        "reference": lambda: step(reference_loss),
        "dense": lambda: step(lambda: model(**inputs, labels=labels).loss),
        "points": lambda: step(sampled_loss),
        "encoder": lambda: step(lambda: model.get_image_embeddings(inputs["pixel_values"]).square().mean()),
    }
    times = measure(functions, rounds)
    memory = {}
    for name, function in functions.items():
        step(lambda: model.prompt_encoder.no_mask_embed.weight.sum())  # drops the gradients of the step before
        memory[name] = peak_memory(function)
    for name, other in times.items():
        print(f"{name}: {other['cpu_seconds']:.2f} CPU s, {(memory[name] or 0) / 1e9:.2f} GB", flush=True)
    return {
        name: {**values, "peak_bytes": memory[name], "over_points": ratio(values, times["points"])}
        for name, values in times.items()
    }


def measure_trainings(quick: bool) -> dict:
    """Each supervision trains for as many steps as fit into the time, on a schedule of its own length."""
    start, results = save_start(), {}
    supervisions = {
        "dense": "--supervision dense --label_size 128",
        "points": f"--supervision points --num_points {POINTS // 2}",
    }
    for name, flags in supervisions.items():
        folder = Path("outputs/benchmarks") / f"training-{name}"
        base = f"{TRAINING} {flags} --model_name_or_path {start} --output_dir {folder}".split()

        def run(steps, seed, num_eval_images, base=base, folder=folder):
            images = f"--num_train_images {10 if quick else 400} --num_eval_images {num_eval_images}"
            train([*base, *f"--max_train_steps {steps} --seed {seed} {images}".split()])
            return json.loads((folder / "metrics.json").read_text())

        if quick:
            steps, reports = 3, [run(3, 0, 1)]
        else:
            run(2, 0, 1)  # warms up
            few, more = (run(steps, 0, 1)["seconds"] for steps in (5, 25))
            steps = int(20 * TRAINING_SECONDS / (more - few))
            reports = [run(steps, seed, 40) for seed in SEEDS]
        results[name] = {
            "steps": steps,
            "seconds": [report["seconds"] for report in reports],
            "dice": [report["validation"]["dice"] for report in reports],
        }
        print(f"{name}: {results[name]}", flush=True)
    return results


def plot(steps, trainings) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    time, memory, dice = figure.subplots(1, 3)
    names = list(steps)
    time.bar(names, [steps[name]["cpu_seconds"] for name in names])
    time.set(ylabel="CPU seconds", title="One step, ViT-B at 384")
    if steps["points"]["peak_bytes"] is not None:
        memory.bar(names, [steps[name]["peak_bytes"] / 1e9 for name in names])
    memory.set(ylabel="peak memory (GB)", title="One step, ViT-B at 384")
    for name, row in trainings.items():
        dice.plot([name] * len(row["dice"]), [100 * score for score in row["dice"]], "o")
    dice.set(ylabel="Dice", title="Trained for the same time", xlim=(-0.5, 1.5))
    return figure


if __name__ == "__main__":
    main()
