"""Tables of an evaluation, made from what its metrics.json holds: Markdown to read, CSV to compute with."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Title, factor, digits.
COLUMNS = {
    "dice": ("Dice", 100, 1),
    "iou": ("IoU", 100, 1),
    "nsd": ("NSD", 100, 1),
    "hd": ("HD", 1, 1),
    "hd95": ("HD95", 1, 1),
    "asd": ("ASD", 1, 2),
    "precision": ("Precision", 100, 1),
    "recall": ("Recall", 100, 1),
    "volume_difference": ("Volume diff.", 100, 1),
    "ece": ("ECE", 100, 1),
    "brier": ("Brier", 100, 1),
    "uncertainty_auroc": ("AUROC uncertainty", 100, 1),
    "confidence_auroc": ("AUROC confidence", 100, 1),
    "retention_auc": ("Retention area", 100, 2),
}
MAIN_COLUMNS = ("dice", "iou", "nsd", "hd", "hd95", "asd")
FURTHER_COLUMNS = tuple(key for key in COLUMNS if key not in MAIN_COLUMNS)


def markdown_report(report: Mapping) -> str:
    """Everything that people read: per setting the methods, the differences between them, and the classes."""
    other = f", compared with `{report['compare']}`" if report["compare"] else ""
    parts = [
        f"# Evaluation of `{report['model']}`{other}\n",
        INTRODUCTION.format(
            num_images=report["num_images"],
            split=report["split"],
            data=report["data"],
            prompt=report["prompt"],
            whose={"box": "prompt", "click": "object's box"}[report["prompt"]],
            unit={"px": "pixels", "mm": "millimetres"}[report["unit"]],
            tolerance=f"{report['tolerance']:g} {report['unit']}",
        ),
    ]
    for setting in report["settings"]:
        methods = setting["methods"]
        parts += [f"## {setting['title'].capitalize()}\n", _means(methods, MAIN_COLUMNS, "mean ± std [95 %]")]
        parts.append(_means(methods, FURTHER_COLUMNS, "mean ± std", intervals=False))
        classes = {f"{name}, {label}": row for name, m in methods.items() for label, row in m["classes"].items()}
        if classes:
            parts.append(_means(classes, MAIN_COLUMNS, "per class, mean ± std", intervals=False))
        parts += [_differences(setting["comparisons"], keys) for keys in (MAIN_COLUMNS, FURTHER_COLUMNS)]
    return "\n".join([*parts, PICTURES.format(model=report["model"], setting=report["settings"][0]["title"])])


INTRODUCTION = """{num_images} images of `{split}` in `{data}`, prompted with a {prompt} per object. Distances are in
{unit}, NSD has a tolerance of {tolerance}, everything else is in percent. ECE, Brier score and what follows are of the
pixels around the object. The filled box and the ellipse inscribed in it are what the {whose} alone is worth.
"""
PICTURES = """## Pictures

![Box plots](boxes.png)
![Calibration](calibration.png)
![Error retention](retention.png)

The worst cases of `{model}` by Dice ({setting}):

![Worst cases](worst.png)

The best:

![Best cases](best.png)
"""


def summary_table(report: Mapping) -> list[dict[str, Any]]:
    """A row per setting, method, class and metric."""
    rows = []
    for setting in report["settings"]:
        for method, summary in setting["methods"].items():
            for label, part in {"": summary, **summary["classes"]}.items():
                for key in part["mean"]:
                    low, high = part.get("interval", {}).get(key, (math.nan, math.nan))
                    rows.append(
                        {
                            "setting": setting["title"],
                            "method": method,
                            "class": label,
                            "metric": key,
                            "mean": part["mean"][key],
                            "std": part["std"][key],
                            "low": low,
                            "high": high,
                            "count": part["count"][key],
                        }
                    )
    return rows


def comparison_table(report: Mapping) -> list[dict[str, Any]]:
    """A row per setting, pair of methods and metric."""
    return [{"setting": setting["title"], **row} for setting in report["settings"] for row in setting["comparisons"]]


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """With a head; a value that there is not is left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if _is_missing(value) else value for key, value in row.items()})
    return text.getvalue()


def _means(rows: Mapping[str, Mapping], keys: Sequence[str], title: str, intervals: bool = True) -> str:
    table = []
    for name, row in rows.items():
        cells = []
        for key in keys:
            _, factor, digits = COLUMNS[key]
            mean, std = (row[part].get(key, math.nan) for part in ("mean", "std"))
            cell = "–" if _is_missing(mean) else f"{factor * mean:.{digits}f} ± {factor * std:.{digits}f}"
            if intervals and not _is_missing(mean) and not _is_missing(row["interval"][key][0]):
                low, high = (factor * bound for bound in row["interval"][key])
                cell += f" [{low:.{digits}f}, {high:.{digits}f}]"
            cells.append(cell)
        table.append([name, str(row["num_objects"]), *cells])
    return _markdown([title, "objects", *(COLUMNS[key][0] for key in keys)], table)


def _differences(comparisons: Sequence[Mapping], keys: Sequence[str]) -> str:
    rows: dict[str, dict[str, str]] = {}
    for row in comparisons:
        _, factor, digits = COLUMNS[row["metric"]]
        mean, low, high = (_signed(factor * row[key], digits) for key in ("mean", "low", "high"))
        rows.setdefault(f"{row['method']} − {row['against']}", {})[row["metric"]] = f"{mean} [{low}, {high}]"
    table = [[name, *(cells.get(key, "–") for key in keys)] for name, cells in rows.items()]
    return _markdown(["mean difference [95 %]", *(COLUMNS[key][0] for key in keys)], table)


def _signed(value: float, digits: int) -> str:
    return "–" if _is_missing(value) else f"{value:+.{digits}f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
