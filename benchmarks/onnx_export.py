"""
The exported encoder: its time in onnxruntime, in float32 and with products in 8-bit integers, beside torch's, and what
the integers cost in Dice. The rest of the model stays in torch, so that the embeddings alone differ.

    python benchmarks/onnx_export.py

About 3 minutes on two cores, once the model is trained; with `--model` a model of yours, without a trained one of its
own.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import Goals, finish, measure, parse_args, ratio, trained_pipeline
from matplotlib.figure import Figure
from torch import Tensor

from imedsam import IMedSamPipeline
from imedsam.training.evaluation import evaluate_masks
from imedsam.training.export import (
    check_exportable,
    example_inputs,
    export_programs,
    open_session,
    quantise,
    write_onnx,
)

TORCH, FLOAT32, INT8 = "torch", "onnxruntime", "onnxruntime, int8"
Encoder = Callable[[Tensor], Tensor]


def main() -> None:
    args = parse_args(__doc__)
    pipeline, examples, what = trained_pipeline(args, num_images=4 if args.quick else None)
    encoders, sizes = make_encoders(pipeline)
    pixel_values = example_inputs(pipeline.model)["pixel_values"]
    functions = {name: lambda encode=encode: encode(pixel_values) for name, encode in encoders.items()}
    times = measure(functions, rounds=3 if args.quick else 21)
    tables = {name: scores_with(pipeline, encode, examples) for name, encode in encoders.items()}
    rows = {
        name: {
            **times[name],
            "over_torch": ratio(times[name], times[TORCH]),
            "megabytes": sizes.get(name),
            "dice": float(np.mean(tables[name])),
            "dice_difference": float(np.mean(tables[name] - tables[TORCH])),
            "largest_loss": float(np.max(tables[TORCH] - tables[name])),
        }
        for name in encoders
    }
    for name, row in rows.items():
        print(f"{name}: {row['over_torch']:.2f} of torch's time, Dice {100 * row['dice']:.2f}")
    goals = Goals()
    goals.at_most("Dice that float32 loses", 100 * abs(rows[FLOAT32]["dice_difference"]), 0.01, " points")
    goals.at_most("Dice that int8 loses", -100 * rows[INT8]["dice_difference"], 2 if args.quick else 0.5, " points")
    finish("onnx_export", args, {"images": what, "num_images": len(examples), "encoders": rows}, goals, plot(rows))


def make_encoders(pipeline: IMedSamPipeline) -> tuple[dict[str, Encoder], dict[str, float]]:
    """What gives image embeddings, and the megabytes of the files."""
    check_exportable(pipeline)
    model = pipeline.model.requires_grad_(False)
    program = export_programs(model, example_inputs(model))["encoder"]
    encoders: dict[str, Encoder] = {TORCH: torch.inference_mode()(model.get_image_embeddings)}
    sizes = {}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "encoder.onnx")
        for name in (FLOAT32, INT8):
            if name == FLOAT32:
                write_onnx(program, path, ["image_embeddings"])
            else:
                quantise(path)
            session, sizes[name] = open_session(path), path.stat().st_size / 1e6
            encoders[name] = lambda values, session=session: torch.from_numpy(
                session.run(None, {"pixel_values": values.numpy()})[0]
            )
    return encoders, sizes


def scores_with(pipeline: IMedSamPipeline, encode: Encoder, examples) -> np.ndarray:
    """The Dice of each image's object, with the embeddings of this encoder."""
    model = pipeline.model
    own = model.get_image_embeddings
    try:
        model.get_image_embeddings = lambda pixel_values, reshaped_input_sizes=None: encode(pixel_values)
        table = evaluate_masks(model, pipeline.processor, examples, mode="adaptive", batch_size=1)
    finally:
        model.get_image_embeddings = own
    return table.column("dice")


def plot(rows: dict[str, dict]) -> Figure:
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(list(rows), [row["over_torch"] for row in rows.values()])
    left.axvline(1, color="black", linewidth=0.8)
    left.set(xlabel="time of the encoder, with torch's being 1")
    right.barh(list(rows), [100 * row["dice_difference"] for row in rows.values()])
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="Dice, difference to torch, points")
    left.invert_yaxis()
    return figure


if __name__ == "__main__":
    main()
