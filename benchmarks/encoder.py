"""
Encoder: what the adapters cost beside SAM's own ViT-B, merged and not, in float32 and bfloat16, at three image sizes;
whether channels-last weights are faster; and what a mask costs once the image is encoded. The weights of the encoder
and of the prompt's fusion are random; the field that is rendered is a trained model's, of the same widths: of eight
images the one with the median boundary.

    python benchmarks/encoder.py

About 15 minutes on two cores, of which 1024 pixels take most; 6 GB of memory.
"""

import copy
import functools

import torch
from harness import Goals, finish, make_field, measure, median_first, parse_args, ratio, trained_pipeline
from matplotlib.figure import Figure
from torch import nn
from transformers import SamConfig, SamVisionModel

from imedsam import IMedSamConfig, IMedSamModel

SIZES = (384, 512, 1024)
SCREEN = (2160, 3840)


def main() -> None:
    args = parse_args(__doc__)
    pipeline, examples, what = trained_pipeline(args)
    fields = [make_field(pipeline, example) for example in examples]
    field = fields[median_first(fields)[0]]
    goals, rows = Goals(), []
    for size in (128,) if args.quick else SIZES:
        # Processors without instructions for bfloat16 take minutes at the larger sizes.
        half = not rows or rows[-1].get("bf16_over_fp32", 2) < 1
        outputs = {"box": (size, size)} | ({} if args.quick else {"box on a screen": SCREEN})
        rounds = 3 if args.quick else {384: 15, 512: 11, 1024: 5}[size]
        rows.append(measure_size(size, field, outputs, rounds, half))
        print(f"{size}: { ({k: v for k, v in rows[-1].items() if not isinstance(v, dict)}) }", flush=True)
    if not args.quick:
        for row in rows:
            for kind in ("merged", "unmerged"):
                price = 100 * (row[f"{kind}_over_stock"] - 1)
                goals.at_most(f"adapters' price at {row['size']}, {kind}", price, 8, " %")
        first = rows[0]
        goals.at_most("image to mask at 384", first["image_to_mask_over_stock"], 1.2, " encoders")
        goals.at_most("a new box at 384", 100 * first["box_over_stock"], 12, " % of the encoder")
        goals.at_most("a new box at 384, shown at 3840 x 2160", first["box_on_a_screen_over_stock"], 1, " encoders")
    else:
        goals.at_most("adapters' price at 128, merged", 100 * (rows[0]["merged_over_stock"] - 1), 50, " %")
    finish("encoder", args, {"fields": what, "sizes": rows}, goals, plot(rows))


@torch.no_grad()
def measure_size(size, field, outputs, rounds, half) -> dict:
    config = IMedSamConfig(
        sam_config=SamConfig(
            vision_config={"image_size": size, "initializer_range": 0.02, "scale": 1.0},
            prompt_encoder_config={"image_size": size},
        ).to_dict()
    )
    stock = SamVisionModel(config.sam_config.vision_config).eval()
    unmerged, merged = IMedSamModel(config), IMedSamModel(config)
    for model in (unmerged, merged):
        model.add_adapter()
        model.eval()
    merged = merged.merge_and_unload()
    channels_last = copy.deepcopy(merged)  # as the pipeline has it
    for module in channels_last.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.to(memory_format=torch.channels_last)
    pixels = torch.randn(1, 3, size, size)
    encoders = {
        "stock": lambda: stock(pixels).last_hidden_state,
        "unmerged": lambda: unmerged.get_image_embeddings(pixels),
        "merged": lambda: merged.get_image_embeddings(pixels),
        "channels-last": lambda: channels_last.get_image_embeddings(pixels),
    }

    def in_bfloat16(function):
        with torch.autocast("cpu", torch.bfloat16):
            return function()

    embeddings = merged.get_image_embeddings(pixels)
    boxes = size * torch.tensor([[[0.3, 0.3, 0.7, 0.7]]])

    def answer_a_box(output):
        channels_last.get_mask_field(embeddings, input_boxes=boxes)
        return field.as_new().render(output)

    def image_to_mask():
        channels_last.get_image_embeddings(pixels)
        return answer_a_box(outputs["box"])

    answers = {name: functools.partial(answer_a_box, output) for name, output in outputs.items()}
    times = measure({**encoders, **answers, "image to mask": image_to_mask}, rounds)
    compared = ("merged", "unmerged", *answers)
    ratios = {f"{name}_over_stock".replace(" ", "_"): ratio(times[name], times["stock"]) for name in compared}
    ratios["channels_last_over_merged"] = ratio(times["channels-last"], times["merged"])
    ratios["image_to_mask_over_stock"] = ratio(times["image to mask"], times["stock"])
    if half:
        times |= measure({f"{name}, bf16": lambda f=f: in_bfloat16(f) for name, f in encoders.items()}, rounds=3)
        ratios["bf16_over_fp32"] = times["merged, bf16"]["seconds"] / times["merged"]["seconds"]
    return {"size": size, **ratios, **times}


def plot(rows) -> Figure:
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    names = (
        "stock",
        "merged",
        "channels-last",
        "unmerged",
        "stock, bf16",
        "merged, bf16",
        "image to mask",
        "box",
        "box on a screen",
    )
    width, top = 0.8 / len(names), 1.6
    for index, name in enumerate(names):
        measured = [(position, row) for position, row in enumerate(rows) if name in row]
        places = [position + index * width for position, _ in measured]
        heights = [row[name]["seconds"] / row["stock"]["seconds"] for _, row in measured]
        axes.bar(places, heights, width, label=name)
        for place, height in zip(places, heights, strict=True):
            if height > top:  # bfloat16 where it is emulated
                axes.text(place, top, f"{height:.1f} ", rotation=90, ha="center", va="top", color="white")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks([position + 0.4 for position in range(len(rows))], [f"{row['size']} px" for row in rows])
    axes.set(ylabel="time, SAM's own encoder being 1", title="ViT-B, one image", ylim=(0, top))
    figure.legend(loc="outside lower center", ncols=4)
    return figure


if __name__ == "__main__":
    main()
