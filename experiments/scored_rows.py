"""The rows of a table with their scores, which runner.py has left, and the intervals of these."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from duplicates import read_pairs
from runs import Row, Scoring, Table
from splits import clusters

from imedsam.training.intervals import Interval, mean_interval, paired_bootstrap

METRICS = {
    "dice": ("Dice", 100),
    "iou": ("IoU", 100),
    "hd": ("HD (px)", 1),
    "hd95": ("HD95 (px)", 1),
    "nsd": ("NSD (1 px)", 100),
    "asd": ("ASD (px)", 1),
    "precision": ("precision", 100),
    "recall": ("recall", 100),
    "ece": ("ECE", 100),
    "brier": ("Brier", 100),
    "uncertainty_auroc": ("AUROC of errors", 100),
    "confidence_auroc": ("the same by p alone", 100),
}


@dataclass
class Scored:
    """
    A row with its results.

    Args:
        objects: for each object's name its metrics, means over the runs that have it.
        per_run: the means of each run.
        facts: run.json of each run; none for a floor.
        adaptive: whether masks were rendered adaptively.
    """

    row: Row
    objects: dict[str, dict[str, float]]
    per_run: list[dict[str, float]]
    facts: list[dict]
    adaptive: bool = False

    def values(self, metric: str, names: Sequence[str] | None = None) -> list[float]:
        return [self.objects[name].get(metric, math.nan) for name in names or self.objects]

    @property
    def repeated(self) -> bool:
        """Whether the runs are seeds, scored on the same objects; folds are not."""
        return len({fact["arguments"]["seed"] for fact in self.facts}) > 1


def read_row(row: Row, scoring: Scoring, results: Path) -> Scored | None:
    """None unless all of the row's runs have been scored, exactly rendered or, where that is missing, adaptively."""
    if row.floor is not None:
        path = results / "floors" / f"{scoring.name}.json"
        tables = [json.loads(path.read_text())[row.floor]] if path.exists() else []
    else:
        exact, adaptive = (
            [results / run.name / f"{replace(scoring, mode=mode).name}.json" for run in row.runs]
            for mode in ("exact", None)
        )
        paths = exact if all(path.exists() for path in exact) else adaptive
        tables = [json.loads(path.read_text()) for path in paths] if all(path.exists() for path in paths) else []
    if not tables:
        return None
    objects: dict[str, dict[str, list[float]]] = {}
    for columns in tables:
        for metric, values in columns.items():
            if metric == "name":
                continue
            for name, value in zip(columns["name"], values, strict=True):
                objects.setdefault(name, {}).setdefault(metric, []).append(math.nan if value is None else value)
    means = {name: {metric: mean_of(values) for metric, values in own.items()} for name, own in objects.items()}
    per_run = [
        {metric: mean_of(values) for metric, values in columns.items() if metric != "name"} for columns in tables
    ]
    facts = [json.loads((results / run.name / "run.json").read_text()) for run in row.runs]
    return Scored(row, means, per_run, facts, adaptive=row.floor is None and paths is adaptive)


def reference_of(one: Scored, scored: Sequence[Scored], table: Table) -> Scored | None:
    """The other row that a row is compared with; None where that has not been scored."""
    label = one.row.against or table.reference
    return next((other for other in scored if other.row.label == label and other is not one), None)


def difference(one: Scored, reference: Scored, metric: str, data: str) -> Interval:
    """Of the objects that both have, one to one, in the table's unit."""
    names, scale = [name for name in one.objects if name in reference.objects], METRICS[metric][1]
    ours, theirs = ([scale * value for value in row.values(metric, names)] for row in (one, reference))
    return paired_bootstrap(ours, theirs, clusters(data, plain(names), read_pairs()))


def interval(one: Scored, metric: str, data: str) -> Interval:
    """Of the mean over the objects, in the table's unit."""
    values = [METRICS[metric][1] * value for value in one.values(metric)]
    return mean_interval(values, clusters(data, plain(list(one.objects)), read_pairs()))


def plain(names: Sequence[str]) -> list[str]:
    """Of the images; objects of label maps are called name/class."""
    return [name.partition("/")[0] for name in names]


def mean_of(values: Sequence[float | None]) -> float:
    """Of those that are there."""
    numbers = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.mean(numbers)) if numbers else math.nan
