"""What a training run leaves beside its weights: metrics.json, curves.png and a model card."""

import json
import math
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from imedsam.modeling_imedsam import IMedSamModel
from imedsam.training.baselines import METHODS

LIBRARIES = ("imedsam", "torch", "transformers", "peft", "accelerate", "monai", "numpy")
COLUMNS = {
    "dice": ("Dice", 100),
    "iou": ("IoU", 100),
    "hd": ("HD (px)", 1),
    "hd95": ("HD95 (px)", 1),
    "nsd": ("NSD at 1 px", 100),
}


def write_report(folder: Path, report: dict) -> None:
    """
    Writes the three files into the folder of the trained model; metrics.json is the last, and so the sign of a
    finished run.

    Args:
        report: what goes to metrics.json: `arguments`, `history`, `validation`, `floors`, ...; versions and the date
            are added.
    """
    plot_curves(report["history"], folder / "curves.png")
    (folder / "README.md").write_text(model_card(report))
    write_json(folder / "metrics.json", {**report, **provenance()})


def provenance() -> dict:
    """With what and when a result was made."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(path: Path, content: dict) -> None:
    """Writes a file that is either the old or the new one, whenever the process is stopped; nan becomes null."""
    write_atomically(path, json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """
    A folder to write into that is at `path` once all of it is written: whatever stops the process, there is none or a
    whole one.

    Raises:
        ValueError: something is there.
    """
    if path.is_file() or path.is_dir() and any(path.iterdir()):
        raise ValueError(f"Expected a new folder, got {path}, which holds something: move it away or choose another.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        folder = Path(temporary, path.name)
        folder.mkdir()
        yield folder
        folder.replace(path)


def plot_curves(history: list[dict], path: Path) -> None:
    """The training loss and the validation Dice over the epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([row["epoch"] + 1 for row in history], [row["loss"] for row in history])
    left.set(xlabel="epoch", ylabel="training loss")
    scored = [row for row in history if "validation" in row]
    right.plot([row["epoch"] + 1 for row in scored], [row["validation"]["dice"] for row in scored], marker=".")
    right.set(xlabel="epoch", ylabel="validation Dice")
    figure.savefig(path, dpi=120)


def model_card(report: dict) -> str:
    arguments = report["arguments"]
    dataset, base = arguments["dataset_name"], arguments["model_name_or_path"]
    head = ["library_name: imedsam", "pipeline_tag: mask-generation"]
    head += ["tags:", "- medical", "- image-segmentation"]
    if arguments["method"] == "imedsam":
        head += ["- segment-anything", "- implicit-neural-representation"]
    if _is_hub_name(base):
        head.append(f"base_model: {base}")
    if _is_hub_name(dataset):
        head += ["datasets:", f"- {dataset}"]
    rows = {"this model": report["validation"], **report["floors"]}
    if "validation_jittered" in report:
        rows["this model, boxes jittered"] = report["validation_jittered"]
    table = markdown_table(rows, f"validation ({report['num_images']['validation']} images)")
    if "test" in report:
        rows = {"this model": report["test"], "this model, boxes jittered": report.get("test_jittered")}
        rows |= report["test_floors"]
        rows = {name: metrics for name, metrics in rows.items() if metrics}
        table += "\n" + markdown_table(rows, f"test ({report['num_images']['test']} images)")
    classes = ", ".join(report["classes"].values())
    trained = ", ".join(f"{name} {count:,}" for name, count in report["trainable_parameters"].items())
    return CARD.format(
        head="\n".join(head),
        name=Path(arguments["output_dir"]).resolve().name,
        method=METHODS[arguments["method"]].description,
        usage=USAGE if METHODS[arguments["method"]].model_class is IMedSamModel else BASELINE_USAGE,
        dataset=dataset if dataset == "phantoms" or _is_hub_name(dataset) else Path(dataset).name,
        base=base if _is_hub_name(base) else Path(base).name,
        image_size=report["image_size"],
        classes=classes,
        table=table,
        trained=trained,
        images=report["num_images"]["train"],
        epochs=len(report["history"]),
        best=report["best_epoch"] + 1,
        seed=arguments["seed"],
    )


USAGE = ("from imedsam import IMedSamPipeline", "IMedSamPipeline.from_pretrained")
BASELINE_USAGE = ("from imedsam.training.baselines import load_pipeline", "load_pipeline")

CARD = """---
{head}
---

# {name}

{method}; trained from `{base}` on
`{dataset}` at {image_size} x {image_size} pixels. It takes an image and a box per object and gives the object's
mask at any resolution. Classes: {classes}.

## How to use

```python
from PIL import Image
{usage[0]}

pipeline = {usage[1]}("path/to/{name}")
pipeline.set_image(Image.open("image.png"))
mask = pipeline.predict(input_boxes=[[x0, y0, x1, y1]], class_labels=[0]).masks[0, 0]
```

Boxes are in pixels of the image, (0, 0) being its top left corner.

## Metrics

Means over objects, at the images' own size; Dice, IoU and surface Dice (NSD) in percent. Boxes come from the reference
masks, so the filled box and the ellipse inscribed in it are what the prompt alone is worth.

{table}
## Training

{images} images, {epochs} epochs, seed {seed}; the weights are those of epoch {best}, the best by validation Dice.
Trainable parameters: {trained}. `metrics.json` holds the arguments, versions and history.

## Limits

For research, not for clinical use. The scores hold for images like those of `{dataset}` and for boxes that fit the
object; they say nothing about other devices, populations or loosely drawn boxes.
"""


def markdown_table(rows: Mapping[str, Mapping[str, float]], title: str = "") -> str:
    """A row per method; Dice, IoU and surface Dice (NSD) in percent, distances in pixels."""
    lines = [
        f"| {title} | " + " | ".join(name for name, _ in COLUMNS.values()) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name, metrics in rows.items():
        values = (f"{scale * metrics[key]:.1f}" for key, (_, scale) in COLUMNS.items())
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def _without_nan(content):
    if isinstance(content, Mapping):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def _is_hub_name(name):
    return name.count("/") == 1 and not Path(name).exists() and not name.startswith((".", "/", "~"))
