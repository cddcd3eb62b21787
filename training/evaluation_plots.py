"""Plots and picture sheets of an evaluation."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from imedsam.training.calibration import RETENTION_LEVELS
from imedsam.training.evaluation import Prediction, PromptedObject
from imedsam.training.pictures import displayable, overlay, save_sheet, uncertainty_picture

if TYPE_CHECKING:
    from imedsam.training.evaluation_report import Setting

# What a picture shows: the object with this share of its box's longer side around it.
CONTEXT = 0.5
LONGEST_NAME = 40  # of a model, in characters
Case = tuple[Image.Image, PromptedObject, dict[str, tuple[Prediction, float]]]


def plot_boxes(settings: Sequence[Setting], unit: str, path: Path) -> None:
    """Box plots of Dice, surface Dice and HD95: a row per setting, a box per method; whiskers from 5 to 95 %."""
    columns = {"dice": "Dice", "nsd": "surface Dice (NSD)", "hd95": f"HD95 ({unit})"}
    figure, axes = _figure(len(settings), len(columns), width=4.2, height=3.2)
    for row, setting in zip(axes, settings, strict=True):
        for axis, (key, title) in zip(row, columns.items(), strict=True):
            values = [scores.table.column(key) for scores in setting.methods.values()]
            axis.boxplot(values, whis=(5, 95), showmeans=True, medianprops={"color": "black"}, widths=0.6)
            axis.set_xticks(range(1, len(values) + 1), [_broken(name) for name in setting.methods], fontsize=8)
            axis.set_title(title, fontsize=10)
            axis.grid(axis="y", alpha=0.3)
            if key == "hd95":
                axis.set_yscale("symlog", linthresh=1)
                axis.set_ylim(0, 1.3 * max(1.0, *(column.max() for column in values)))
        row[0].set_ylabel(setting.title, fontsize=8)
    figure.savefig(path, dpi=120)


def plot_calibration(settings: Sequence[Setting], path: Path) -> None:
    """
    Share of foreground against probability, over the pixels around all objects: a panel per setting. The ECE beside it
    is the tables', the mean over the objects' own.
    """
    figure, axes = _figure(1, len(settings), width=4, height=4)
    for axis, setting in zip(axes[0], settings, strict=True):
        axis.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
        for name, scores in setting.methods.items():
            if not scores.curves:
                continue
            predicted, observed, counts = np.sum([curve["reliability"] for curve in scores.curves], axis=0)
            filled = counts > 0
            ece = np.nanmean(scores.table.column("ece"))
            axis.plot(
                predicted[filled] / counts[filled],
                observed[filled] / counts[filled],
                marker=".",
                label=f"{_short(name)}\nmean ECE per object {100 * ece:.1f} %",
            )
        axis.set(xlabel="probability", ylabel="share of foreground", xlim=(0, 1), ylim=(0, 1))
        axis.set_title(setting.title, fontsize=9)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_retention(settings: Sequence[Setting], path: Path) -> None:
    """Wrong pixels among those kept, over the share kept, mean over objects: a row per setting, a panel per model."""
    models = [name for name, scores in settings[0].methods.items() if scores.curves]
    styles = {
        "random": {"color": "grey", "linestyle": ":", "label": "in random order"},
        "confidence": {"color": "tab:orange", "linestyle": "--", "label": "by confidence |p - 0.5|"},
        "uncertainty": {"color": "tab:blue", "label": "by uncertainty"},
        "ideal": {"color": "grey", "label": "errors last"},
    }
    figure, axes = _figure(len(settings), len(models), width=4.4, height=3.4)
    for row, setting in zip(axes, settings, strict=True):
        for axis, name in zip(row, models, strict=True):
            curves = setting.methods[name].curves
            for key, style in styles.items():
                mean = 100 * np.mean([curve[key] for curve in curves], axis=0)
                axis.plot(100 * RETENTION_LEVELS, mean, **style)
            axis.set(xlabel="pixels kept, the most certain ones (%)", ylabel="wrong pixels (%)")
            axis.set_title(f"{_short(name)}\n{setting.title}", fontsize=9)
            axis.legend(fontsize=8)
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_cases(cases: Sequence[Case], path: Path) -> None:
    """
    A row per object, cut out of its image: the prompt, the reference, and each model's mask and uncertainty (white at
    its largest).
    """
    rows, names = [], []
    for image, prompted, predictions in cases:
        target, cut = prompted.target, _window(prompted)
        picture = displayable(image).resize(target.shape[::-1], Image.Resampling.BILINEAR)
        shown = prompted.box if prompted.click is None else prompted.click
        pictures = [overlay(picture, target[None] & False, [shown]), overlay(picture, target[None])]
        for prediction, _ in predictions.values():
            largest = prediction.uncertainty.max()
            pictures += [
                overlay(picture, prediction.mask[None], [shown]),
                uncertainty_picture(prediction.uncertainty, largest),
            ]
        rows.append([drawn.crop(cut) for drawn in pictures])
        dices = " / ".join(f"{100 * dice:.1f}" for _, dice in predictions.values())
        names.append(f"{prompted.name}\nDice {dices}")
    titles = ["image and box" if cases[0][1].click is None else "image and click", "reference"]
    for name in cases[0][2]:
        titles += [_broken(name), "uncertainty"]
    save_sheet(rows, titles, path, names)


def _window(prompted: PromptedObject) -> tuple[int, int, int, int]:
    """A square around prompt and object, (x0, y0, x1, y1) in whole pixels of the grid."""
    height, width = prompted.target.shape
    rows, columns = np.nonzero(prompted.target)
    x, y = np.append(columns, prompted.box[[0, 2]]), np.append(rows, prompted.box[[1, 3]])
    half = (0.5 + CONTEXT) * max(np.ptp(x), np.ptp(y), 8)
    centre_x, centre_y = (x.min() + x.max()) / 2, (y.min() + y.max()) / 2
    return (
        max(0, int(centre_x - half)),
        max(0, int(centre_y - half)),
        min(width, int(np.ceil(centre_x + half))),
        min(height, int(np.ceil(centre_y + half))),
    )


def _figure(num_rows, num_columns, width, height):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def _short(name: str) -> str:
    """The ends of a long name."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME // 2]}...{name[-LONGEST_NAME // 2 :]}"


def _broken(name: str) -> str:
    """On several lines."""
    return "\n".join(textwrap.wrap(_short(name), 16))
