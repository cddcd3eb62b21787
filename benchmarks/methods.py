"""
Methods: time and memory from an image and a box to the mask of the image's own size, of I-MedSAM, adaptively and
exactly rendered and with a pixel decoder, and of what it is compared with, beside SAM's own decoder. The encoder is
the same. How many points adaptive rendering takes depends on the mask, so the fields are those of trained models, one
for each kind; the other networks have random weights, which take the same time whatever the weights.

    python benchmarks/methods.py

About 3 minutes on two cores, once the two models are trained; 2 GB of memory.
"""

from collections.abc import Callable

import torch
from harness import Goals, finish, measure, parse_args, peak_memory, ratio, trained_pipeline
from matplotlib.figure import Figure

from imedsam import IMedSamPipeline
from imedsam.training.baselines import METHODS
from imedsam.training.metrics import box_from_mask
from imedsam.training.unet import UNetModel

EXACT, PIXEL_DECODER = "imedsam, exact", "imedsam, pixel decoder"
# As in experiments/runs.py; the fields are so much smaller that the model has as many parameters as without.
PIXEL_DECODER_CONFIG = {
    "pixel_decoder_width": 192,
    "coarse_widths": [256, 128],
    "coarse_features": 128,
    "fine_widths": [128, 128],
}


def main() -> None:
    args = parse_args(__doc__, models=("model", "pixel_decoder_model"))
    trained, examples, what = trained_pipeline(args, num_images=4)
    config = {**PIXEL_DECODER_CONFIG, "ellipse_prior": trained.model.config.ellipse_prior}
    convolved, _, _ = trained_pipeline(args, num_images=4, option="pixel_decoder_model", config=config)
    pipelines = {name: trained if name == "imedsam" else make_pipeline(name, trained) for name in METHODS}
    functions = {name: over_images(pipeline, examples) for name, pipeline in pipelines.items()}
    functions[EXACT] = over_images(trained, examples, mode="exact")
    functions[PIXEL_DECODER] = over_images(convolved, examples)
    times = measure(functions, rounds=2 if args.quick else 7)
    methods = {
        name: {
            **values,
            "seconds_per_image": values["seconds"] / len(examples),
            "over_sam_decoder": ratio(values, times["sam_decoder"]),
            "peak_bytes": peak_memory(functions[name]),
        }
        for name, values in times.items()
    }
    for name, row in methods.items():
        print(f"{name}: {row['seconds_per_image']:.3f} s an image, {row['over_sam_decoder']:.2f} of SAM's decoder")
    goals = Goals()
    # Quick runs have an encoder that costs next to nothing.
    goals.at_most(
        "an image and a box to a mask",
        methods["imedsam"]["over_sam_decoder"],
        30 if args.quick else 1.5,
        " of SAM's decoder",
    )
    models = {"pixel_decoder_model": str(args.pixel_decoder_model or "trained for the benchmark")}
    finish("methods", args, {**models, "images": what, "methods": methods}, goals, plot(methods))


def make_pipeline(name: str, trained: IMedSamPipeline) -> IMedSamPipeline:
    """With a trained model's configuration, and its fields where the method has them."""
    method, config = METHODS[name], trained.model.config
    if issubclass(method.model_class, UNetModel):
        values = {"image_size": config.image_size}
    else:
        values = {"sam_config": config.sam_config.to_dict(), "ellipse_prior": config.ellipse_prior, "lora_rank": 0}
    torch.manual_seed(0)
    model = method.model_class(method.model_class.config_class(**method.get_values(values)))
    if name == "imedsam_box_mask":
        model.load_state_dict(trained.model.state_dict())
    return IMedSamPipeline(model, trained.processor)


def over_images(pipeline: IMedSamPipeline, examples, mode: str | None = None) -> Callable[[], object]:
    prompts = [(example["image"], [list(map(float, box_from_mask(example["mask"] > 0)))]) for example in examples]

    def predict():
        for image, boxes in prompts:
            pipeline.set_image(image)
            pipeline.predict(input_boxes=boxes, mode=mode)

    return predict


def plot(methods: dict[str, dict]) -> Figure:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(methods), [row["over_sam_decoder"] for row in methods.values()])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="time from an image and a box to the mask, with SAM's decoder being 1")
    return figure


if __name__ == "__main__":
    main()
