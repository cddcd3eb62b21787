"""
Rendering: time, memory and agreement of the decoder as the authors evaluate it, of exact and of adaptive rendering,
and of SAM's own mask decoder with bilinear upsampling, at output sizes from 128 to 4096. That decoder has no part in
the trained model: its time and memory count here, its masks do not.

    python benchmarks/rendering.py

About 20 minutes on two cores; 12 GB of memory.
"""

import functools
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from authors_decoder import AuthorsDecoder, memory_needed
from harness import (
    MATRIX_PRODUCTS_FLOPS,
    Goals,
    available_memory,
    finish,
    make_field,
    matrix_products,
    measure,
    median_first,
    parse_args,
    peak_memory,
    ratio,
    trained_pipeline,
)
from matplotlib.figure import Figure
from scipy.ndimage import distance_transform_edt
from torch.utils.flop_counter import FlopCounterMode

from imedsam.rendering import RENDER_MODES
from imedsam.tiles import evaluate_points, pixel_centres
from imedsam.training.evaluation import sample_mask
from imedsam.training.metrics import dice

SIZES = (128, 256, 384, 896, 2048, 4096)
GOAL_SIZE = 896  # the largest at which exact rendering and the reference are timed in several rounds
QUICK_SIZE = 256
NEAR = 2  # pixels
PRODUCTS = ("products before", "products after")


def main() -> None:
    args = parse_args(__doc__)
    pipeline, examples, what = trained_pipeline(args, num_images=3 if args.quick else 8)
    fields = [make_field(pipeline, example) for example in examples]
    order = median_first(fields)
    fields, examples = [fields[number] for number in order], examples.select(order)
    reference = AuthorsDecoder().eval()
    measure_size(64, pipeline, fields, examples, reference, once=("reference",))  # warms everything up
    rows = []
    for size in (QUICK_SIZE,) if args.quick else SIZES:
        once = ("reference",) if args.quick else ("reference", "exact", *PRODUCTS) if size > GOAL_SIZE else ()
        rows.append(measure_size(size, pipeline, fields, examples, reference, once))
        print({key: value for key, value in rows[-1].items() if not isinstance(value, dict)}, flush=True)
    results: dict = {"images": what, "num_images": len(fields), "sizes": rows}
    if not args.quick:
        results["separable_over_joined_first_layer"] = measure_separable_layer()
        results["shares_of_exact_at_384"] = profile_exact(fields[0])
    goals = Goals()
    size = QUICK_SIZE if args.quick else GOAL_SIZE
    row = next(row for row in rows if row["size"] == size)
    for mode, times in (("exact", 3 if args.quick else 6), ("adaptive", 3 if args.quick else 80)):
        name = f"{mode} at {size} against the reference"
        if "reference" in row:
            goals.at_least(name, row[f"reference_over_{mode}"], times, " times faster")
        else:
            goals.not_measured(name, "the reference needs more memory than is free")
    products = 1.5 if args.quick else 1.3  # so few pixels bear the lattice as well
    goals.at_most(f"exact at {size} against its own matrix products", row["exact_over_products"], products, " times")
    if row["exact"]["peak_bytes"] is None:
        goals.not_measured(f"memory of exact at {size}", "peak memory can be had on Linux alone")
    else:
        goals.at_most(f"memory of exact at {size}", row["exact"]["peak_bytes"] / 1e9, 1, " GB")
    equal, near, difference = (99, 90, 2) if args.quick else (99.99, 98, 0.05)  # one hardly trained is full of specks
    goals.at_least(f"equal pixels at {size}", 100 * row["equal"], equal, " %")
    goals.at_least(f"equal pixels near the boundary at {size}", 100 * row["equal_near_boundary"], near, " %")
    goals.at_most(f"Dice difference at {size}", 100 * row["dice_difference"], difference, " points")
    finish("rendering", args, results, goals, plot(rows, fields[0]))


@torch.no_grad()
def measure_size(size, pipeline, fields, examples, reference, once) -> dict:
    """
    Times on the first image; agreement on all of them, or on that one if anything is to be called once alone: it is,
    without warm-up, for its time, its memory and its masks.
    """
    output, first = (size, size), fields[0]
    mask_decoder = pipeline.model.mask_decoder

    def stock():
        logits = mask_decoder.predict(first.features, mask_decoder.mask_tokens.weight[:1])
        return F.interpolate(logits, output, mode="bilinear", align_corners=False)

    # The rate of the products is taken right before and after what it is compared with: it drifts.
    functions = {
        "products before": matrix_products(),
        "exact": lambda: first.as_new().render(output, mode="exact"),
        "products after": matrix_products(),
        "adaptive": lambda: first.as_new().render(output, mode="adaptive"),
        "SAM's mask decoder": stock,
    }
    if memory_needed(size**2) < 0.9 * available_memory():
        functions = {"reference": lambda: reference(first.features, first.prompt, output), **functions}
    rendered, peaks = {}, {}

    def measure_peak(name):
        peaks[name] = peak_memory(lambda: rendered.update({name: functions[name]()}))

    slow = {
        name: function if name in PRODUCTS else functools.partial(measure_peak, name)
        for name, function in functions.items()
        if name in once
    }
    times = measure(slow, rounds=1, warm_up=0)
    fast = {name: function for name, function in functions.items() if name not in slow}
    times |= measure(fast, rounds=3)
    for name in fast.keys() - {*PRODUCTS}:
        measure_peak(name)
    row: dict = {"size": size}
    for name in sorted(peaks):
        row[name] = {**times[name], "peak_bytes": peaks[name]}
    for name in ("exact", "adaptive"):
        if "reference" in functions:
            row[f"reference_over_{name}"] = ratio(times["reference"], times[name])
    per_pixel, lattice = flops(first)
    rounds = zip(*(times[name]["rounds"] for name in ("exact", *PRODUCTS)), strict=True)
    rates = [2 * MATRIX_PRODUCTS_FLOPS / (before + after) for _, before, after in rounds]
    seconds = [(per_pixel * size**2 + lattice) / rate for rate in rates]  # that the products alone would take
    row["exact_over_products"] = float(np.median(np.divide(times["exact"]["rounds"], seconds)))
    row["gflops"] = float(np.median(rates)) / 1e9
    agreements = [agreement(first, rendered["exact"], rendered["adaptive"], examples[0])]
    if not once:
        for field, example in list(zip(fields, examples, strict=True))[1:]:
            masks = (field.render(output, mode=mode) for mode in RENDER_MODES)
            agreements.append(agreement(field, *masks, example))
    row |= {key: float(np.mean([a[key] for a in agreements])) for key in agreements[0]}
    row["images_compared"] = len(agreements)
    return row


@functools.cache
def flops(field) -> tuple[float, float]:
    """Of the matrix products of exact rendering: per pixel, and of the lattice on which the threshold is taken."""
    field, totals = field.as_new(), []
    for _ in range(2):  # the second time the threshold is known
        with FlopCounterMode(display=False) as counter:
            field.render((256, 256), mode="exact")
        totals.append(counter.get_total_flops())
    return totals[1] / 256**2, totals[0] - totals[1]


def measure_separable_layer(height=32, width=64) -> float:
    """
    The first layer on a tile: 32 features and 58 coordinates in one product, against the features' product and the sum
    of a row and a column vector.
    """
    features, coordinates = torch.randn(height * width, 32), torch.randn(height * width, 58)
    weight, row, column = torch.randn(90, 1024), torch.randn(1, width, 1024), torch.randn(height, 1, 1024)

    def separable():
        hidden = (features @ weight[:32]).view(height, width, -1)
        return hidden.add_(row).add_(column)

    times = measure(
        {"joined": lambda: torch.cat([features, coordinates], dim=-1) @ weight, "separable": separable},
        rounds=50,
        warm_up=5,
    )
    return ratio(times["separable"], times["joined"])


@torch.no_grad()
def profile_exact(field, size=384) -> dict[str, float]:
    """What exact rendering spends its time on, as shares of the operators' own time, of 1 % or more."""
    field.render((size, size), mode="exact")
    with torch.profiler.profile() as profiler:
        field.render((size, size), mode="exact")
    operators = profiler.key_averages()
    total = sum(operator.self_cpu_time_total for operator in operators)
    shares = {operator.key: operator.self_cpu_time_total / total for operator in operators}
    return {name: share for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share >= 0.01}


def agreement(field, rendered, adapted, example) -> dict[str, float]:
    """Of exact and adaptive rendering, what the latter costs in Dice, and its points, the threshold's among them."""
    exact, adaptive = ((masks.logits[0, 0, 0] > 0).numpy() for masks in (rendered, adapted))
    truth = sample_mask(example["mask"] > 0, exact.shape)
    distance = np.maximum(distance_transform_edt(exact), distance_transform_edt(~exact))
    equal, near = exact == adaptive, distance <= NEAR
    points = field.config.selection_lattice**2 + adapted.num_points
    return {
        "points": points,
        "share_of_points": points / exact.size,
        "equal": equal.mean(),
        "equal_near_boundary": equal[near].mean() if near.any() else 1.0,
        "dice_difference": abs(dice(exact, truth) - dice(adaptive, truth)),
    }


def plot(rows, field) -> Figure:
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    picture, time, memory = figure.subplots(1, 3)
    draw_points(picture, field)
    for name in ("reference", "exact", "adaptive", "SAM's mask decoder"):
        measured = [row for row in rows if name in row]
        sizes = [row["size"] for row in measured]
        time.loglog(sizes, [row[name]["seconds"] for row in measured], marker="o", label=name)
        if measured and measured[0][name]["peak_bytes"] is not None:
            memory.loglog(sizes, [row[name]["peak_bytes"] / 1e9 for row in measured], marker="o", label=name)
    time.set(xlabel="output size (pixels a side)", ylabel="seconds", title="One mask, image encoded before")
    memory.set(xlabel="output size (pixels a side)", ylabel="peak memory (GB)", title="Above what the encoder left")
    for axes in (time, memory):
        axes.set_xticks([row["size"] for row in rows], [str(row["size"]) for row in rows])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower right", ncols=4)
    return figure


def draw_points(axes, field, size=384) -> None:
    """Where adaptive rendering evaluates the field, with the mask's outline; not the image, which may not be ours."""
    asked = [pixel_centres((field.config.selection_lattice,) * 2, field.lattice_region)[0]]

    def record(of, rows, coordinates):
        asked.append(coordinates)
        return evaluate_points(of, rows, coordinates)

    with patch("imedsam.adaptive_rendering.evaluate_points", record):
        mask = (field.render((size, size), mode="adaptive").logits[0, 0, 0] > 0).numpy()
    x, y = ((torch.cat(asked) + 1) * size / 2).T.numpy()
    axes.scatter(x, y, s=1, color="tab:blue", linewidths=0)
    axes.contour(np.arange(size) + 0.5, np.arange(size) + 0.5, mask, [0.5], colors="red", linewidths=1)
    title = f"{len(asked[0])} + {len(x) - len(asked[0])} points for {size} x {size} pixels"
    axes.set(title=title, xlim=(0, size), ylim=(size, 0), xticks=[], yticks=[], aspect="equal")


if __name__ == "__main__":
    main()
