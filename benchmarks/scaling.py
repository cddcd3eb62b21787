"""
Scaling: how the work of adaptive rendering grows with the output's size. It follows the boundary's length, which grows
with the side of the output, not the area; the exponent is fitted on a log-log plot.

    python benchmarks/scaling.py

About 5 minutes on two cores.
"""

import numpy as np
import torch
from harness import Goals, finish, make_field, measure, parse_args, ratio, trained_pipeline
from matplotlib.figure import Figure

SIZES = (384, 512, 768, 1024, 1536, 2048, 3072, 4096)


def main() -> None:
    args = parse_args(__doc__)
    pipeline, examples, what = trained_pipeline(args)
    sizes = (96, 192, 384) if args.quick else SIZES
    examples = examples.select(range(1)) if args.quick else examples
    images = [measure_image(make_field(pipeline, example), sizes, args.quick) for example in examples]
    rows = {key: np.median([image[key] for image in images], axis=0).tolist() for key in images[0]}
    rows |= {"sizes": list(sizes), "shares": [p / size**2 for p, size in zip(rows["points"], sizes, strict=True)]}
    exponents = {key: float(np.polyfit(np.log(sizes), np.log(rows[key]), 1)[0]) for key in ("seconds", "points")}
    goals = Goals()
    limit = 1.8 if args.quick else 1.2  # a field that has hardly been trained has long boundaries
    goals.at_most("exponent of the time", exponents["seconds"], limit)
    goals.at_most("exponent of the points", exponents["points"], limit)
    if not args.quick:
        goals.at_most("time at 4096 against 384", rows["over_the_first"][-1], 12, " times")
        goals.at_most("points at 4096", 100 * rows["shares"][-1], 1.5, " %")
    results = {"images": what, "num_images": len(images), "medians": rows, "exponents": exponents}
    finish("scaling", args, results, goals, plot(rows, exponents))


@torch.no_grad()
def measure_image(field, sizes, quick) -> dict[str, list[float]]:
    """Of a field that is new each time, as a new prompt's is: the lattice of its threshold counts with the points."""
    functions = {size: lambda size=size: field.as_new().render((size, size), mode="adaptive") for size in sizes}
    times = measure({str(size): function for size, function in functions.items()}, rounds=1 if quick else 3)
    return {
        "seconds": [times[str(size)]["seconds"] for size in sizes],
        "points": [field.config.selection_lattice**2 + function().num_points for function in functions.values()],
        "over_the_first": [ratio(times[str(size)], times[str(sizes[0])]) for size in sizes],
    }


def plot(rows, exponents) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    sizes = np.array(rows["sizes"])
    for axes, key, label in zip(
        figure.subplots(1, 2), ("points", "seconds"), ("points evaluated", "seconds"), strict=True
    ):
        values = np.array(rows[key])
        axes.loglog(sizes, values, marker="o", label=f"adaptive: side$^{{{exponents[key]:.2f}}}$")
        if key == "points":
            axes.loglog(sizes, sizes**2, "--", color="grey", label="every pixel: side$^2$")
        else:
            axes.loglog(sizes, values[0] * (sizes / sizes[0]) ** 2, "--", color="grey", label="side$^2$")
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        axes.minorticks_off()
        axes.set(xlabel="output size (pixels a side)", ylabel=label)
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
