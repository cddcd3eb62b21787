"""
Refinement: how many points adaptive rendering evaluates, and how many pixels differ from exact rendering, with other
first lattices, margins, tolerances, cells in the prompt's frame, and decays of the error. The constants of
`imedsam.adaptive_rendering` are chosen from its results on eight images; the goals hold them to it there, and on all
the others.

    python benchmarks/refinement.py

About 15 minutes on two cores, and counts alone: it may share them.
"""

from unittest.mock import patch

import numpy as np
import torch
from harness import Goals, finish, make_field, parse_args, trained_pipeline
from matplotlib.figure import Figure
from tqdm.auto import tqdm

import imedsam.adaptive_rendering
from imedsam.mask_field import ImplicitMaskField

SIZES = (384, 896)
CHOSEN_ON = 8  # images
OTHERS = "as it is, other images"
VALUES = {
    "MARGIN": (0.0, 0.25, 1.0),
    "UNCERTAINTY_TOLERANCE": (0.02, 0.25),
    "FRAME_CELLS": (0, 8, 16),
    "FIRST_LATTICE": (24, 48, 64),
    "ERROR_DECAY": (0.0, 0.25, 0.75),
}


def main() -> None:
    args = parse_args(__doc__)
    pipeline, examples, what = trained_pipeline(args, num_images=12 if args.quick else None)
    settings = {"as it is": {}} | {f"{name} {v}": {name: v} for name, values in VALUES.items() for v in values}
    rows, goals = [], Goals()
    for size in (128,) if args.quick else SIZES:
        compared = [
            compare(make_field(pipeline, example), (size, size), settings if number < CHOSEN_ON else {OTHERS: {}})
            for number, example in enumerate(tqdm(examples, desc=f"{size}"))
        ]
        for name in [*settings, OTHERS]:
            found = [image[name] for image in compared if name in image]
            if not found:
                continue
            figures = {key: [image[key] for image in found] for key in found[0]}
            rows.append({"size": size, "setting": name, "num_images": len(found)})
            rows[-1] |= {key: float(np.mean(values)) for key, values in figures.items()}
            rows[-1]["most_unequal_pixels"] = int(max(figures["unequal_pixels"]))
            print(rows[-1], flush=True)
    least = 99.5 if args.quick else 99.99  # a field that has hardly been trained is full of specks
    for row in rows:
        if row["setting"] in ("as it is", OTHERS):
            equal = 1 - row["unequal_pixels"] / row["size"] ** 2
            goals.at_least(f"equal pixels at {row['size']}, {row['setting']}", 100 * equal, least, " %")
    constants = {name: getattr(imedsam.adaptive_rendering, name) for name in VALUES}
    results = {"images": what, "constants": constants, "settings": rows}
    finish("refinement", args, results, goals, plot(rows))


@torch.no_grad()
def compare(field, size, settings) -> dict[str, dict[str, float]]:
    exact, figures = field.render(size, mode="exact"), {}
    for name, constants in settings.items():
        # Every setting evaluates the first lattice itself: the threshold's may be another.
        with (
            patch.dict(vars(imedsam.adaptive_rendering), constants),
            patch.object(ImplicitMaskField, "known_lattice", return_value=None),
        ):
            adaptive = field.render(size, mode="adaptive")
        figures[name] = {
            "points": adaptive.num_points,
            "unequal_pixels": int(((adaptive.logits > 0) != (exact.logits > 0)).sum()),
            "uncertainty_error": float((adaptive.uncertainty - exact.uncertainty).abs().max()),
        }
    return figures


def plot(rows) -> Figure:
    """A bar per setting, beside a line at what the constants as they are give."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    sizes = sorted({row["size"] for row in rows})
    panels = figure.subplots(1, 2 * len(sizes), sharey=True)
    keys = {"points": "points evaluated", "unequal_pixels": "pixels unlike exact rendering"}
    for axes, (size, key) in zip(panels, ((size, key) for size in sizes for key in keys), strict=True):
        chosen = [row for row in rows if row["size"] == size][::-1]
        axes.barh([row["setting"] for row in chosen], [row[key] for row in chosen], color="tab:blue")
        axes.axvline(chosen[-1][key], color="red", linewidth=1)  # as it is
        axes.set(xlabel=keys[key], title=f"{size} x {size}")
        axes.grid(axis="x", alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
