"""
Tables and plots of all results there are, into docs/results.md between its two markers, and docs/images.

    python experiments/report.py

Cost: seconds. A table is left out where none of its runs has been scored. Intervals are of 95 %, by bootstrap over the
objects (the sequences of CVC-ClinicDB, ACDC's patients, the scenes of the other sets); the means of several seeds are
taken object by object before, and those of folds stand together.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from duplicates import read_pairs
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from runner import FILES, HERE, load_tables
from runs import Row, Scoring, Table
from splits import clusters

from imedsam.training.intervals import Interval, mean_interval, paired_bootstrap

BENCHMARK = HERE.parent / "benchmarks" / "methods.json"
BEGIN, END = "<!-- experiments: begin -->", "<!-- experiments: end -->"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--document", type=Path, default=HERE.parent / "docs" / "results.md")
    args = parser.parse_args()
    images = args.document.parent / "images" / "experiments"
    sections = [section for table in load_tables(FILES) for section in write_table(table, args.results, images)]
    parts = [hygiene(args.results), *sections, fine_field(args.results), times(BENCHMARK)]
    write_between_markers(args.document, "\n\n".join(part for part in parts if part))


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


def write_table(table: Table, results: Path, images: Path) -> list[str]:
    """A section for each part of the data that has results, and its plot as a file."""
    sections = []
    for data, split in table.parts(test=True):
        scored = [one for row in table.rows if (one := read_row(row, table.scoring(row, data, split), results))]
        if not says_something(table, scored):
            continue
        path = images / f"{table.name}-{data.replace(':', '_')}-{split}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(table, scored, data, path)
        num = max(len(one.objects) for one in scored)
        title = f"### {table.title}: {data}, {split} ({num} objects)"
        picture = f"![{table.title}](images/{path.parent.name}/{path.name})"
        parts = [title, table.about, markdown(table, scored, data), details(scored), picture]
        sections.append("\n\n".join(part for part in parts if part))
    return sections


def says_something(table: Table, scored: Sequence[Scored]) -> bool:
    """Whether there is a trained row beside the reference, and along an axis at more than one place."""
    trained = [one for one in scored if one.facts]
    if table.x and len({one.row.x for one in trained}) < 2:
        return False
    return any(one.row.label == table.reference for one in trained) and len(trained) > 1


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
    means = {name: {metric: _mean(values) for metric, values in own.items()} for name, own in objects.items()}
    per_run = [{metric: _mean(values) for metric, values in columns.items() if metric != "name"} for columns in tables]
    facts = [json.loads((results / run.name / "run.json").read_text()) for run in row.runs]
    return Scored(row, means, per_run, facts, adaptive=row.floor is None and paths is adaptive)


def markdown(table: Table, scored: Sequence[Scored], data: str) -> str:
    """A row each, without columns that would be empty."""
    titles = [METRICS[metric][0] for metric in table.columns]
    differences = [f"{METRICS[metric][0]}, difference" for metric in table.compared]
    heads = ["", "runs", *titles, *differences, "trained", "s / image", "training (GB)"]
    rows = []
    by_label = {one.row.label: one for one in scored}
    for one in scored:
        cells = [one.row.label, str(len(one.facts) or ""), *(average(one, metric) for metric in table.columns)]
        reference = by_label.get(one.row.against or table.reference)
        for metric in table.compared:
            if reference is None or reference is one:
                cells.append("")
            else:
                interval = difference(one, reference, metric, data)
                cells.append(f"{interval.mean:+.1f} [{interval.low:.1f}, {interval.high:.1f}]")
        rows.append([*cells, *cost(one)])
    columns = [column for column in zip(heads, *rows, strict=True) if column[0] == "" or any(column[1:])]
    return grid(*zip(*columns, strict=True))


def grid(heads: Sequence[str], *rows: Sequence[str]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def average(one: Scored, metric: str) -> str:
    """The mean over the objects, and the standard deviation over the seeds, if there are several."""
    scale = METRICS[metric][1]
    mean = scale * _mean(one.values(metric))
    if not math.isfinite(mean):
        return ""
    if not one.repeated:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {scale * np.std([means[metric] for means in one.per_run], ddof=1):.1f}"


def difference(one: Scored, reference: Scored, metric: str, data: str) -> Interval:
    """Of the objects that both have, one to one, in the table's unit."""
    names, scale = [name for name in one.objects if name in reference.objects], METRICS[metric][1]
    ours, theirs = ([scale * value for value in row.values(metric, names)] for row in (one, reference))
    return paired_bootstrap(ours, theirs, clusters(data, plain(names), read_pairs()))


def plain(names: Sequence[str]) -> list[str]:
    """Of the images; objects of label maps are called name/class."""
    return [name.partition("/")[0] for name in names]


def cost(one: Scored) -> list[str]:
    if not one.facts:
        return ["", "", ""]
    fact = one.facts[0]
    memory = fact["peak_memory"] or {}
    peak = memory.get("gpu") or memory.get("process")
    trained = f"{sum(fact['trainable_parameters'].values()) / 1e6:.2f} M"
    alone = fact["side_by_side"] == 1  # what was timed beside others says nothing
    seconds = f"{fact['seconds_per_image']:.2f}" if alone else ""
    return [trained, seconds, "" if peak is None else f"{peak / 1e9:.1f}"]


def details(scored: Sequence[Scored]) -> str:
    """Hardware, precision, steps, time, seeds, and what each row has trained."""
    facts = [fact for one in scored for fact in one.facts]
    machines = sorted({fact["machine"]["gpu"] or f"{fact['machine']['processor']}" for fact in facts})
    steps = sorted({fact["arguments"]["max_train_steps"] for fact in facts})
    epochs = sorted({fact["arguments"]["num_train_epochs"] for fact in facts})
    precisions = sorted({fact["arguments"]["mixed_precision"] or "as the machine has it" for fact in facts})
    together = sorted({fact["side_by_side"] for fact in facts})
    seconds = [fact["seconds"] for fact in facts]
    minutes = dict.fromkeys(f"{time / 60:.0f}" for time in (min(seconds), max(seconds)))
    dates = sorted({fact["date"][:10] for fact in facts})
    trained: dict[str, list[str]] = {}
    for one in scored:
        if one.facts:
            parts = ", ".join(f"{name} {count:,}" for name, count in one.facts[0]["trainable_parameters"].items())
            trained.setdefault(f"{one.facts[0]['start']}; {parts}", []).append(one.row.label)
    lines = [
        f"{' and '.join(map(str, steps))} steps ({' to '.join(map(str, dict.fromkeys((epochs[0], epochs[-1]))))} "
        f"epochs), {' to '.join(minutes)} minutes of training a run, {' and '.join(map(str, together))} side by side; "
        f"precision {' and '.join(precisions)}; "
        f"seeds {', '.join(map(str, sorted({fact['arguments']['seed'] for fact in facts})))}; "
        f"{', '.join(machines)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; "
        f"{_rendering(scored)} rendering. Start and trained parameters:",
        "",
        *(f"- {parts}: {'; '.join(labels) if len(trained) > 1 else 'all rows'}" for parts, labels in trained.items()),
    ]
    return "\n".join(lines)


def _rendering(scored):
    return " and ".join(sorted({"adaptive" if one.adaptive else "exact" for one in scored if one.facts}))


def draw(table: Table, scored: Sequence[Scored], data: str, path: Path) -> None:
    """
    Along an axis the first metric, a curve per series; otherwise the differences to the reference, a line per row. All
    with their intervals.
    """
    figure = draw_curves(table, scored, data) if table.x else draw_differences(table, scored, data)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=100)


def draw_curves(table: Table, scored: Sequence[Scored], data: str) -> Figure:
    metric = table.columns[0]
    name, scale = METRICS[metric]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    for series in dict.fromkeys(one.row.series for one in scored if one.row.x is not None):
        chosen = [one for one in scored if one.row.series == series]
        means = [scaled_interval(one, metric, data, scale) for one in chosen]
        x, y = [one.row.x for one in chosen], [mean.mean for mean in means]
        axis.errorbar(x, y, _errors(means), marker="o", capsize=3, label=series or None)
    axis.set(xlabel=table.x, ylabel=name)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
        figure.legend(loc="outside right upper", fontsize=8)
    return figure


def draw_differences(table: Table, scored: Sequence[Scored], data: str) -> Figure:
    reference = next(one for one in scored if one.row.label == table.reference)
    others, panels = [one for one in scored if one is not reference], len(table.compared)
    figure = Figure(figsize=(4 + 2.6 * panels, 1.1 + 0.3 * len(others)), layout="constrained")
    for axis, metric in zip(figure.subplots(1, panels, sharey=True, squeeze=False)[0], table.compared, strict=True):
        differences = [difference(one, reference, metric, data) for one in others]
        places = range(len(others))
        axis.errorbar([one.mean for one in differences], places, xerr=_errors(differences), fmt="o", capsize=3)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.update_datalim([(-1, 0), (1, 0)])  # tiny differences are to look tiny
        axis.autoscale_view()
        axis.set_xscale("symlog", linthresh=5)  # a network that has learnt nothing is to leave room for the others
        axis.xaxis.set_major_locator(FixedLocator((-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlabel=METRICS[metric][0], yticks=places, yticklabels=[one.row.label for one in others])
        axis.grid(alpha=0.3)
    axis.invert_yaxis()
    figure.suptitle(f"Difference to: {reference.row.label}", fontsize=10)
    return figure


def scaled_interval(one: Scored, metric: str, data: str, scale: float) -> Interval:
    values = [scale * value for value in one.values(metric)]
    return mean_interval(values, clusters(data, plain(list(one.objects)), read_pairs()))


def _errors(intervals):
    return np.nan_to_num([[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]).clip(min=0)


def _mean(values: Sequence[float | None]) -> float:
    """Of those that are there."""
    numbers = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.mean(numbers)) if numbers else math.nan


def hygiene(results: Path) -> str:
    """How many near-duplicates there are, and how many images each split has lost to them."""
    pairs: dict[str, int] = {}
    for pair in read_pairs():
        name = " and ".join(dict.fromkeys(pair.datasets))
        pairs[name] = pairs.get(name, 0) + 1
    parts = ["### Near-duplicates", grid(("between", "pairs"), *((name, str(pairs[name])) for name in sorted(pairs)))]
    dropped: dict[str, dict[str, int]] = {}
    for path in sorted(results.glob("*/run.json")):
        fact = json.loads(path.read_text())
        data = fact["run"].partition("-medical")[0].partition("-imagenet")[0]  # and the fold
        dropped[data] = {split: len(names) for split, names in fact["dropped"].items()}
    dropped = {data: splits for data, splits in dropped.items() if splits}  # phantoms have none
    if dropped:
        rows = ((name, *(str(n.get(split, 0)) for split in ("validation", "test"))) for name, n in dropped.items())
        parts.append(grid(("left out", "validation", "test"), *rows))
    return "\n\n".join(parts)


def fine_field(results: Path) -> str:
    """What fine_field.py has counted, as shares."""
    heads = ["run", "selected", "coarse errors", "of them selected", "of these mended", "errors made, against mended"]
    rows = []
    paths = sorted(results.glob("*/fine_field.json"))
    for path in paths:
        count = json.loads(path.read_text())
        of = {
            "selected": "pixels",
            "coarse_errors": "pixels",
            "coarse_errors_selected": "coarse_errors",
            "mended": "coarse_errors_selected",
        }
        cells = [path.parent.name, *(f"{100 * _share(count[part], count[whole]):.1f} %" for part, whole in of.items())]
        rows.append([*cells, f"{_share(count['made'], count['mended']):.2f}"])
    return f"### What the fine field does\n\n{grid(heads, *rows)}" if paths else ""


def times(path: Path) -> str:
    """What benchmarks/methods.py has measured."""
    if not path.exists():
        return ""
    report = json.loads(path.read_text())
    rows = [
        (
            name,
            f"{row['seconds_per_image']:.2f}",
            f"{row['over_sam_decoder']:.2f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
        )
        for name, row in report["methods"].items()
    ]
    machine = report["machine"]
    about = (
        f"From an image and a box to the mask of the image's own size, models having a square of 384 pixels "
        f"([methods.py](../benchmarks/methods.py); {machine['threads']} threads, {machine['processor']}; "
        f"{report['date'][:10]}; {report['images']}):"
    )
    table = grid(("method", "s / image", "SAM's decoder being 1", "peak memory (MB)"), *rows)
    return f"### Time and memory of a mask\n\n{about}\n\n{table}"


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def write_between_markers(path: Path, content: str) -> None:
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"Expected the lines {BEGIN} and {END} once each in {path}, got others: put them in.")
    before, _, rest = text.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
