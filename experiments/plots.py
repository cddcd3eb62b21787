"""A plot of a table's rows, with their intervals."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from runs import Table
from scored_rows import METRICS, Scored, difference, interval, reference_of

# Of a plot of differences, the more welcome first, and the share of a panel's width that a label takes.
TICKS, TICK_ROOM = (0, 10, 100, 30, 3, 300, 1), 0.1
SERIES_WIDTH = 0.6  # of the distance between two places of an axis


def draw(table: Table, scored: Sequence[Scored], data: str, path: Path) -> None:
    """
    The compared metrics, a panel each: along an axis a curve per series, otherwise the differences to the reference, a
    line per row. All with their intervals.
    """
    figure = draw_curves(table, scored, data) if table.x else draw_differences(table, scored, data)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=100)


def draw_curves(table: Table, scored: Sequence[Scored], data: str) -> Figure:
    """The places of the axis are evenly spaced, and the series side by side around them."""
    placed = [one for one in scored if one.row.x is not None]
    places = {x: place for place, x in enumerate(sorted({one.row.x for one in placed}))}
    series = list(dict.fromkeys(one.row.series for one in placed))
    panels = len(table.compared)
    figure = Figure(figsize=(4 + 5 * panels, 4), layout="constrained")
    for axis, metric in zip(figure.subplots(1, panels, squeeze=False)[0], table.compared, strict=True):
        for number, label in enumerate(series):
            chosen = sorted((one for one in placed if one.row.series == label), key=lambda one: one.row.x)
            means = [interval(one, metric, data) for one in chosen]
            aside = SERIES_WIDTH * ((number + 0.5) / len(series) - 0.5)
            x, y = [places[one.row.x] + aside for one in chosen], [mean.mean for mean in means]
            style = {"marker": "o", "markersize": 4, "linewidth": 1, "capsize": 2}
            axis.errorbar(x, y, _errors(means), label=label or None, **style)
        axis.set(
            xlabel=table.x,
            ylabel=METRICS[metric][0],
            xticks=range(len(places)),
            xticklabels=[f"{x:g}" for x in places],
        )
        axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


def draw_differences(table: Table, scored: Sequence[Scored], data: str) -> Figure:
    pairs = [(one, other) for one in scored if (other := reference_of(one, scored, table))]
    labels = [
        one.row.label if other.row.label == table.reference else f"{one.row.label}\n(to {other.row.label})"
        for one, other in pairs
    ]
    places, panels = range(len(pairs)), len(table.compared)
    figure = Figure(figsize=(4 + 2.8 * panels, 1.1 + 0.3 * len(pairs)), layout="constrained")
    for axis, metric in zip(figure.subplots(1, panels, sharey=True, squeeze=False)[0], table.compared, strict=True):
        differences = [difference(one, other, metric, data) for one, other in pairs]
        axis.set_xscale("symlog", linthresh=5)  # a network that has learnt nothing is to leave room for the others
        axis.errorbar([one.mean for one in differences], places, xerr=_errors(differences), fmt="o", capsize=3)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.update_datalim([(-1, 0), (1, 0)])  # tiny differences are to look tiny
        axis.margins(x=0.06)
        axis.autoscale_view()
        axis.xaxis.set_major_locator(FixedLocator(readable_ticks(axis)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.tick_params(axis="x", labelsize=7)
        axis.set(xlabel=METRICS[metric][0], yticks=places, yticklabels=labels, ylim=(len(pairs) - 0.4, -0.6))
        axis.grid(alpha=0.3)
    figure.suptitle(f"Difference to: {table.reference}", fontsize=10)
    return figure


def readable_ticks(axis: Axes) -> list[float]:
    """Of TICKS those that lie in a panel, but for what would come too close to one before it."""
    (low, high), shown = axis.get_xlim(), []
    for tick in (tick for size in TICKS for tick in dict.fromkeys((size, -size)) if low <= tick <= high):
        places = [axis.transLimits.transform(axis.transScale.transform((one, 0)))[0] for one in (tick, *shown)]
        if all(abs(place - places[0]) >= TICK_ROOM for place in places[1:]):
            shown.append(tick)
    return sorted(shown)


def _errors(intervals):
    return np.nan_to_num([[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]).clip(min=0)
