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
from functools import cache
from pathlib import Path

import numpy as np
from duplicates import read_pairs
from plots import draw
from runner import FILES, HERE, load_tables
from runs import PLACES, STARTS, WITH_PIXEL_DECODER, Run, Table
from scored_rows import METRICS, Scored, difference, mean_of, read_row, reference_of

from imedsam.training.arguments import parse_args
from imedsam.training.report import write_atomically

GENERALIST = HERE / "generalist.json"
BENCHMARK = HERE.parent / "benchmarks" / "methods.json"
BENCHMARK_SIDE = 384  # of the square of the models that it measures
# What leaves the time of their masks as it is, LoRA being merged; and what of a row's scoring does.
TIMELESS = {"lora_rank", "lora_alpha", "train_mask_decoder", "train_image_encoder", "ellipse_prior"}
TIMELESS_CHANGES = {"box_jitter", "noise"}
BEGIN, END = "<!-- experiments: begin -->", "<!-- experiments: end -->"


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
    parts = [hygiene(args.results), *sections, fine_field(args.results), times(benchmark), generalist(GENERALIST)]
    write_between_markers(args.document, "\n\n".join(part for part in parts if part))


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
    mean = scale * mean_of(one.values(metric))
    if not math.isfinite(mean):
        return ""
    if not one.repeated:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {scale * np.std([means[metric] for means in one.per_run], ddof=1):.1f}"


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
    return _without(parse_args([*PLACES, *Run(flags=WITH_PIXEL_DECODER).arguments()]).config, TIMELESS)


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


def generalist(path: Path) -> str:
    """What generalist.py has written: the released model on each set, and by how much it is ahead of the ellipse."""
    if not path.exists():
        return ""
    content = json.loads(path.read_text())
    heads = ["", "objects"]
    for metric in ("dice", "hd95", "nsd"):
        heads += [METRICS[metric][0], "ellipse", "difference"]
    rows = []
    for evaluation in content["evaluations"]:
        for setting in evaluation["settings"]:
            cells = [f"{evaluation['data']}, {setting['title'].partition(', ')[2]}", str(setting["num_objects"])]
            for metric in ("dice", "hd95", "nsd"):
                scale = METRICS[metric][1]
                own, ellipse = (setting["means"][name][metric] for name in ("this model", "inscribed ellipse"))
                row = next(
                    row
                    for row in setting["differences"]
                    if (row["against"], row["metric"]) == ("inscribed ellipse", metric)
                )
                bounds = (math.nan if row[key] is None else scale * row[key] for key in ("mean", "low", "high"))
                cells += [f"{scale * own:.1f}", f"{scale * ellipse:.1f}"]
                cells.append("{:+.1f} [{:.1f}, {:.1f}]".format(*bounds))
            rows.append(cells)
    training = content["training"]
    arguments, images, machine = (training[key] for key in ("arguments", "num_images", "machine"))
    about = (
        f"[generalist.py](../experiments/generalist.py): {images['train']} objects, "
        f"{arguments['max_train_steps']} steps of {arguments['per_device_train_batch_size']}, seed "
        f"{arguments['seed']}, {training['seconds'] / 3600:.1f} hours beside other work on {machine['threads']} "
        f"cores of {machine['processor']}; {training['date'][:10]}; the epoch is the best of {images['validation']} "
        "validation objects. Test images, rendered adaptively; cvc_clinicdb is unseen."
    )
    return f"### The released generalist\n\n{about}\n\n{grid(heads, *rows)}"


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
