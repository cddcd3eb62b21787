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
from functools import cache
from pathlib import Path

import numpy as np
from duplicates import read_pairs
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from runner import FILES, HERE, load_tables
from runs import STARTS, WITH_PIXEL_DECODER, Row, Run, Scoring, Table
from splits import clusters

from imedsam.training.arguments import parse_args
from imedsam.training.intervals import Interval, mean_interval, paired_bootstrap
from imedsam.training.report import write_atomically

BENCHMARK = HERE.parent / "benchmarks" / "methods.json"
BENCHMARK_SIDE = 384  # of the square of the models that it measures
# What leaves the time of their masks as it is, LoRA being merged; and what of a row's scoring does.
TIMELESS = {"lora_rank", "lora_alpha", "train_mask_decoder", "train_image_encoder", "ellipse_prior"}
TIMELESS_CHANGES = {"box_jitter"}
# Of a plot of differences, the more welcome first, and the share of a panel's width that a label takes.
TICKS, TICK_ROOM = (0, 10, 100, 30, 3, 300, 1), 0.1
SERIES_WIDTH = 0.6  # of the distance between two places of an axis
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
    if not any(args.results.glob("*/run.json")):
        raise SystemExit(
            f"Expected results of runs, RUN/run.json each, in {args.results}, got none: give the --results of "
            "runner.py, or start that before."
        )
    images = args.document.parent / "images" / "experiments"
    benchmark = json.loads(BENCHMARK.read_text()) if BENCHMARK.exists() else None
    sections = [
        section for table in load_tables(FILES) for section in write_table(table, args.results, images, benchmark)
    ]
    parts = [hygiene(args.results), *sections, fine_field(args.results), times(benchmark)]
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


def write_table(table: Table, results: Path, images: Path, benchmark: dict | None) -> list[str]:
    """
    A section for each part of the data that has results, and its plot as a file.

    Args:
        benchmark: what benchmarks/methods.py has measured, if it has.
    """
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
        rows = markdown(table, scored, data, benchmark)
        parts = [title, table.about, rows, not_scored(table, scored), details(scored, benchmark), picture]
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


def markdown(table: Table, scored: Sequence[Scored], data: str, benchmark: dict | None) -> str:
    """A row each, without columns that would be empty."""
    titles = [METRICS[metric][0] for metric in table.columns]
    differences = [f"{METRICS[metric][0]}, difference" for metric in table.compared]
    heads = ["", "runs", *titles, *differences, "trained", "s / image", "training (GB)"]
    rows = []
    for one in scored:
        cells = [one.row.label, str(len(one.facts) or ""), *(average(one, metric) for metric in table.columns)]
        reference = reference_of(one, scored, table)
        for metric in table.compared:
            if reference is None:
                cells.append("")
            else:
                interval = difference(one, reference, metric, data)
                cells.append(f"{interval.mean:+.1f} [{interval.low:.1f}, {interval.high:.1f}]")
        rows.append([*cells, *cost(one, benchmark)])
    columns = [column for column in zip(heads, *rows, strict=True) if column[0] == "" or any(column[1:])]
    return grid(*zip(*columns, strict=True))


def reference_of(one: Scored, scored: Sequence[Scored], table: Table) -> Scored | None:
    """The other row that a row is compared with; None where that has not been scored."""
    label = one.row.against or table.reference
    return next((other for other in scored if other.row.label == label and other is not one), None)


def not_scored(table: Table, scored: Sequence[Scored]) -> str:
    """The trained rows that a table lacks."""
    there = {one.row.label for one in scored}
    missing = [row.label for row in table.rows if row.runs and row.label not in there]
    return f"Not scored here: {'; '.join(missing)}." if missing else ""


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


def cost(one: Scored, benchmark: dict | None) -> list[str]:
    if not one.facts:
        return ["", "", ""]
    seconds, fact = seconds_per_image(one, benchmark), one.facts[0]
    trained = f"{sum(fact['trainable_parameters'].values()) / 1e6:.2f} M"
    return [trained, "" if seconds is None else f"{seconds:.2f}", training_memory(fact)]


def training_memory(fact: dict) -> str:
    """The peak in GB, and of what: allocated on the GPU, or resident of the whole process where there is none."""
    peaks = fact["peak_memory"] or {}
    kind = "gpu" if peaks.get("gpu") else "process"
    return f"{peaks[kind] / 1e9:.1f} {'GPU' if kind == 'gpu' else kind}" if peaks.get(kind) else ""


def seconds_per_image(one: Scored, benchmark: dict | None) -> float | None:
    """Of methods.py, where the row's model is one that it measures."""
    fact = one.facts[0]
    folders = [folder for folder, _ in STARTS.values()]  # their encoders are of one size
    if benchmark is None or fact["start"] not in ("from nothing", *folders) or fact["image_size"] != BENCHMARK_SIDE:
        return None
    config = _without(fact["arguments"]["config"] or {}, TIMELESS)
    name = fact["arguments"]["method"]
    if config and config == pixel_decoder_config():
        name = f"{name}, pixel decoder"
    elif config:
        return None
    if name not in benchmark["methods"] or _without(dict(one.row.changes), TIMELESS_CHANGES):
        return None
    return benchmark["methods"][name]["seconds_per_image"]


@cache
def pixel_decoder_config() -> dict:
    places = ["--model_name_or_path", "", "--dataset_name", "", "--output_dir", ""]
    return _without(parse_args([*places, *Run(flags=WITH_PIXEL_DECODER).arguments()]).config, TIMELESS)


def _without(values: dict, keys: set[str]) -> dict:
    return {key: value for key, value in values.items() if key not in keys}


def details(scored: Sequence[Scored], benchmark: dict | None) -> str:
    """Hardware, precision, steps, time, seeds, commits, and what each row has trained."""
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
        f"{_rendering(scored)} rendering; {_commits(facts)}. {_timing(scored, benchmark)}"
        "Start and trained parameters:",
        "",
        *(f"- {parts}: {'; '.join(labels) if len(trained) > 1 else 'all rows'}" for parts, labels in trained.items()),
    ]
    return "\n".join(lines)


def _rendering(scored):
    return " and ".join(sorted({"adaptive" if one.adaptive else "exact" for one in scored if one.facts}))


def _commits(facts):
    known = sorted({fact["commit"] for fact in facts if fact.get("commit")})
    unknown = sum(not fact.get("commit") for fact in facts)
    if not known:
        return "commits not recorded"
    gap = f" (commit not recorded for {unknown} of them)" if unknown else ""
    return f"{len(facts)} runs made from {' and '.join(known)}{gap}"


def _timing(scored, benchmark):
    if all(seconds_per_image(one, benchmark) is None for one in scored if one.facts):
        return ""
    return (
        f"Seconds are those of [methods.py](../benchmarks/methods.py), adaptively rendered ({benchmark['images']}; "
        f"{benchmark['machine']['threads']} threads, {benchmark['machine']['processor']}). "
    )


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
        name, scale = METRICS[metric]
        for number, label in enumerate(series):
            chosen = sorted((one for one in placed if one.row.series == label), key=lambda one: one.row.x)
            means = [scaled_interval(one, metric, data, scale) for one in chosen]
            aside = SERIES_WIDTH * ((number + 0.5) / len(series) - 0.5)
            x, y = [places[one.row.x] + aside for one in chosen], [mean.mean for mean in means]
            style = {"marker": "o", "markersize": 4, "linewidth": 1, "capsize": 2}
            axis.errorbar(x, y, _errors(means), label=label or None, **style)
        axis.set(xlabel=table.x, ylabel=name, xticks=range(len(places)), xticklabels=[f"{x:g}" for x in places])
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


def times(benchmark: dict | None) -> str:
    """What benchmarks/methods.py has measured."""
    if benchmark is None:
        return ""
    rows = [
        (
            name,
            f"{row['seconds_per_image']:.2f}",
            f"{row['over_sam_decoder']:.2f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
        )
        for name, row in benchmark["methods"].items()
    ]
    machine = benchmark["machine"]
    about = (
        f"From an image and a box to the mask of the image's own size, models having a square of {BENCHMARK_SIDE} "
        f"pixels ([methods.py](../benchmarks/methods.py); {machine['threads']} threads, {machine['processor']}; "
        f"{benchmark['date'][:10]}; {benchmark['images']}). Peak memory is beyond what the process had before, its "
        "models among it."
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
    write_atomically(path, f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
