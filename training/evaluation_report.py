"""
The evaluation of a model on a data set as a folder: metrics.json, tables, plots, and the worst and best cases.

With several processes, each evaluates a share of the images, and the first one writes the report:

    torchrun --nproc-per-node 4 -m imedsam.training.cli evaluate --model MODEL --data DATA -o REPORT
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from imedsam.false_corrector import default_samples, refuse_corrected
from imedsam.pipeline import IMedSamPipeline
from imedsam.training.baselines import load_pipeline
from imedsam.training.calibration import RETENTION_LEVELS, error_retention_curve, region_around, reliability_bins
from imedsam.training.evaluation import (
    FLOORS,
    Prediction,
    PromptedObject,
    class_tables,
    get_objects,
    mask_metrics,
    predict_objects,
    prediction_metrics,
)
from imedsam.training.evaluation_plots import Case, draw_cases, plot_boxes, plot_calibration, plot_retention
from imedsam.training.evaluation_tables import comparison_table, csv_table, markdown_report, summary_table
from imedsam.training.examples import PHANTOM_SIZE, Examples, load_examples
from imedsam.training.intervals import mean_interval, paired_bootstrap
from imedsam.training.metrics import MetricTable, check_distances
from imedsam.training.report import provenance, weights_hash, write_atomically, write_json

NUM_CASES = 6


@dataclass
class MethodScores:
    """
    How a method does on the objects of one setting.

    Args:
        table: a row per object.
        indices: of the objects' images.
        curves: per object what its plots are made of, see `_curves`; none for a floor.
    """

    table: MetricTable = field(default_factory=MetricTable)
    indices: list[int] = field(default_factory=list)
    curves: list[dict[str, np.ndarray]] = field(default_factory=list)


@dataclass
class Setting:
    """
    A grid to compare masks on and a way to prompt, with the scores of every method.

    Args:
        output_size: side of the grid, None for each image's own size.
        box_jitter: of the prompts.
        methods: the model evaluated is the first, the floors are the last.
        prompt: "box" or "click".
        correct: whether the model's masks are corrected.
    """

    output_size: int | None
    box_jitter: float
    methods: dict[str, MethodScores] = field(default_factory=dict)
    prompt: str = "box"
    correct: bool = False

    @property
    def title(self) -> str:
        size = "native size" if self.output_size is None else f"{self.output_size} x {self.output_size}"
        jitter = f"boxes jittered by {100 * self.box_jitter:g} %" if self.box_jitter else "exact boxes"
        prompts = "a click each" if self.prompt == "click" else jitter
        return f"{size}, {prompts}{', corrected' if self.correct else ''}"


@dataclass(frozen=True)
class Protocol:
    """What all settings have in common; see `evaluate_to_folder`."""

    examples: Examples
    spacing: tuple[float, float] | None
    tolerance: float
    mode: str
    seed: int
    batch_size: int
    correct: bool = False

    def prompts(self, setting: Setting) -> dict:
        """The arguments of `get_objects`."""
        grid = {"output_size": setting.output_size, "box_jitter": setting.box_jitter}
        return {**grid, "seed": self.seed, "spacing": self.spacing, "prompt": setting.prompt}

    def predict(self, pipeline: IMedSamPipeline, setting: Setting, indices: Sequence[int], **options):
        """What a model says about the objects of some images."""
        return predict_objects(
            pipeline.model,
            pipeline.processor,
            self.examples,
            **self.prompts(setting),
            mode=self.mode,
            batch_size=self.batch_size,
            indices=indices,
            correct=default_samples(pipeline.model) if self.correct else None,
            **options,
        )


def evaluate_to_folder(
    model: str,
    data: str,
    output: Path,
    *,
    split: str = "test",
    sizes: Sequence[int | None] = (None,),
    box_jitters: Sequence[float] = (0.0,),
    spacing: tuple[float, float] | None = None,
    tolerance: float = 1.0,
    compare: str | None = None,
    mode: str = "exact",
    prompt: str = "box",
    num_images: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    device: str = "cpu",
    base_model: str | None = None,
    revision: str | None = None,
    correct: bool = False,
) -> dict:
    """
    Evaluates a model, and another one to compare with, at every size and jitter, beside the box and the ellipse.

    Args:
        model: folder or Hub name.
        data: as `load_examples` takes it.
        output: folder, where metrics.json is written last, and so is the sign of a finished evaluation.
        split: as `load_examples` takes it; "all" for the whole of a folder or data set.
        sizes: sides of the squares that masks are compared on; None is each image's own size. Phantoms are drawn at
            the largest of them, where their masks are then exact, or at 256 if that is more.
        box_jitters: shares of a box's width and height by which its sides move; 0 prompts with the exact boxes.
        spacing: (height, width) of an image's pixel in millimetres, for distances in millimetres.
        tolerance: of the surface Dice, in millimetres, or in pixels if there is no spacing.
        compare: folder or Hub name of another model.
        mode: of rendering, "exact" or "adaptive".
        prompt: "box", or "click": the centre of the object's innermost pixel.
        num_images: at most this many of the split.
        seed: of jitter and intervals, and of the split of data that have none: the one that the model trained with.
        device: "cpu", or any other name for what Accelerate finds.
        base_model: the SAM of the model, if that is an adapter and it is not where the adapter says.
        revision: branch, tag or commit of the model on the Hub; not of the other one.
        correct: correct the models' masks, with dropout samples where a model has an implicit decoder, else by varied
            prompts; see `evaluate_masks`.

    Returns:
        What metrics.json holds; nothing in processes other than the first.

    Raises:
        ValueError: before anything is evaluated, an `output` that is a file, a spacing that is not positive, a
            negative tolerance, jitter of clicks, the same model twice, `correct` with a model whose masks are
            corrected as they come, or data with other classes; and data without an object.
    """
    check_distances((1.0, 1.0) if spacing is None else spacing, tolerance)
    if prompt == "click" and any(box_jitters):
        raise ValueError(f"Expected no box jitter with clicks, got {max(box_jitters):g}: leave one of them out.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"Expected a folder for the report, got the file {output}: name another one.")
    state = PartialState(cpu=device == "cpu")
    names = method_names(model, compare)
    of_model = {"base_model_name_or_path": base_model, "revision": revision}
    pipelines = {
        name: load_pipeline(path, state.device, **(of_model if path == model else {})) for name, path in names.items()
    }
    for pipeline in pipelines.values() if correct else ():
        refuse_corrected(pipeline.model)
    num_classes = next(iter(pipelines.values())).model.config.num_labels
    examples = load_examples(
        data,
        split,
        seed=seed,
        num_images=num_images,
        image_size=max([PHANTOM_SIZE, *(size for size in sizes if size is not None)]),
        num_classes=num_classes,
    )
    for name, pipeline in pipelines.items():
        check_classes(pipeline, examples, name)
    output.mkdir(parents=True, exist_ok=True)
    protocol = Protocol(examples, spacing, tolerance, mode, seed, batch_size, correct)
    settings = [Setting(size, jitter, prompt=prompt, correct=correct) for size, jitter in product(sizes, box_jitters)]
    for setting in settings:
        for name, pipeline in pipelines.items():
            setting.methods[name] = _gather(_model_records(protocol, setting, state, name, pipeline))
        for name, records in _floor_records(protocol, setting, state).items():
            setting.methods[name] = _gather(records)
    if not settings[0].methods[next(iter(names))].indices:
        raise ValueError(f"Expected masks with an object in them in {split} of {data}, got empty ones only.")
    if not state.is_main_process:
        return {}
    report = {
        "model": model,
        "revision": revision,
        "weights": weights_hash(model),
        "compare": compare,
        "data": data,
        "split": split,
        "num_images": len(examples),
        "spacing": spacing,
        "tolerance": tolerance,
        "unit": "px" if spacing is None else "mm",
        "mode": mode,
        "prompt": prompt,
        "correct": correct,
        "seed": seed,
        **provenance(),
        "settings": [_summary(setting, examples, seed) for setting in settings],
    }
    write_folder(output, report, protocol, settings, pipelines)
    return report


def method_names(model: str, compare: str | None) -> dict[str, str]:
    """What the tables call each model: the last part of its path, or the whole path where that is not enough."""
    if compare is not None and Path(model).resolve() == Path(compare).resolve():
        raise ValueError(f"Expected another model to compare with, got {model!r} and {compare!r}: they are the same.")
    paths = [model] if compare is None else [model, compare]
    short = [Path(path).resolve().name for path in paths]
    names = short if len({*short, *FLOORS}) == len(short) + len(FLOORS) else paths
    return dict(zip(names, paths, strict=True))


def check_classes(pipeline: IMedSamPipeline, examples: Examples, name: str) -> None:
    classes = pipeline.model.config.id2label
    if len(classes) != len(examples.id2label) or (examples.labels is not None and classes != examples.id2label):
        raise ValueError(
            f"Expected data with the classes {', '.join(classes.values())} of {name}, got "
            f"{', '.join(examples.id2label.values())}: name and number them alike in labels.json."
        )


def share_of_images(num_images: int, batch_size: int, process: int, num_processes: int) -> list[int]:
    """The images of one process: every n-th batch, so that batches, and with them the numbers, are those of one."""
    starts = range(0, num_images, batch_size)[process::num_processes]
    return [index for start in starts for index in range(start, min(start + batch_size, num_images))]


def write_folder(
    output: Path,
    report: dict,
    protocol: Protocol,
    settings: Sequence[Setting],
    pipelines: dict[str, IMedSamPipeline],
) -> None:
    """Tables, plots and pictures of what `report` says, and then metrics.json."""
    (output / "metrics.json").unlink(missing_ok=True)
    write_atomically(output / "report.md", markdown_report(report))
    write_atomically(output / "summary.csv", csv_table(summary_table(report)))
    write_atomically(output / "comparisons.csv", csv_table(comparison_table(report)))
    objects = [
        {"setting": setting.title, "method": name, **row}
        for setting in settings
        for name, scores in setting.methods.items()
        for row in scores.table.rows
    ]
    write_atomically(output / "objects.csv", csv_table(objects))
    plot_boxes(settings, report["unit"], output / "boxes.png")
    plot_calibration(settings, output / "calibration.png")
    plot_retention(settings, output / "retention.png")
    order = np.argsort(-settings[0].methods[next(iter(pipelines))].table.column("dice"), kind="stable")
    for name, chosen in {"best": order[:NUM_CASES], "worst": order[::-1][:NUM_CASES]}.items():
        cases = [_predict_again(protocol, settings[0], pipelines, row) for row in chosen]
        draw_cases(cases, output / f"{name}.png")
    write_json(output / "metrics.json", report)


def _model_records(protocol, setting, state, name, pipeline):
    num_images, batch_size = len(protocol.examples), protocol.batch_size
    indices = share_of_images(num_images, batch_size, state.process_index, state.num_processes)
    options = {"description": f"{name}, {setting.title}", "progress": state.is_main_process}
    records = []
    for prompted, prediction in protocol.predict(pipeline, setting, indices, **options):
        metrics = prediction_metrics(prompted, prediction, tolerance=protocol.tolerance)
        records.append((prompted.index, prompted.name, metrics, _curves(prompted, prediction)))
    return records


def _floor_records(protocol, setting, state):
    records: dict[str, list] = {name: [] for name in FLOORS}
    for index in range(len(protocol.examples))[state.process_index :: state.num_processes]:
        for prompted in get_objects(protocol.examples, index, **protocol.prompts(setting))[1]:
            for name, shape in FLOORS.items():
                mask = shape(prompted.target.shape, prompted.box)
                metrics = mask_metrics(prompted, mask, tolerance=protocol.tolerance)
                records[name].append((prompted.index, prompted.name, metrics, None))
    return records


def _gather(records):
    """The records of all processes, in the order of the examples, as the scores of a method."""
    scores = MethodScores()
    for index, name, metrics, curves in sorted(gather_object(records), key=lambda record: record[0]):
        scores.table.add(name, metrics)
        scores.indices.append(index)
        if curves is not None:
            scores.curves.append(curves)
    return scores


def _curves(prompted: PromptedObject, prediction: Prediction) -> dict[str, np.ndarray]:
    """
    Within the region around the object: `reliability` (3, 15), the sums over the pixels of each bin of their
    probability and foreground, and their number; and error-retention curves (101,), by uncertainty, by the
    probability's confidence, the best that there is and that of chance.
    """
    region = region_around(prompted.target)
    probability, target = prediction.probability[region].ravel(), prompted.target[region].ravel()
    errors = prediction.mask[region].ravel() != target
    predicted, observed, counts = reliability_bins(probability, target)
    return {
        "reliability": np.nan_to_num(np.stack([predicted * counts, observed * counts, counts])),
        "uncertainty": error_retention_curve(prediction.uncertainty[region].ravel(), errors),
        "confidence": error_retention_curve(-np.abs(probability - 0.5), errors),
        "ideal": np.maximum(0.0, RETENTION_LEVELS - (1 - errors.mean())),
        "random": RETENTION_LEVELS * errors.mean(),
    }


def _summary(setting: Setting, examples: Examples, seed: int) -> dict:
    """What metrics.json says about a setting. Intervals resample whole groups: their objects are not independent."""
    groups = [examples.groups[index] for index in next(iter(setting.methods.values())).indices]  # of the objects
    methods = {}
    for name, scores in setting.methods.items():
        table = scores.table
        intervals = {key: mean_interval(table.column(key), groups, seed=seed) for key in table.mean()}
        methods[name] = {
            **_moments(table),
            "interval": {key: [interval.low, interval.high] for key, interval in intervals.items()},
            "classes": {name: _moments(rows) for name, rows in class_tables(table, examples).items()},
            "objects": table.rows,
        }
        if scores.curves:
            curves = {key: np.mean([curve[key] for curve in scores.curves], axis=0) for key in scores.curves[0]}
            methods[name]["reliability"] = (curves.pop("reliability") * len(scores.curves)).tolist()
            methods[name]["retention"] = {key: curve.tolist() for key, curve in curves.items()}
    first, *others = setting.methods
    comparisons = []
    for other in others:
        a, b = setting.methods[first], setting.methods[other]
        for key in a.table.mean():
            difference = paired_bootstrap(a.table.column(key), b.table.column(key), groups, seed=seed)
            if difference.count:
                comparisons.append({"method": first, "against": other, "metric": key, **vars(difference)})
    return {
        "title": setting.title,
        "output_size": setting.output_size,
        "box_jitter": setting.box_jitter,
        "num_groups": len(set(groups)),
        "methods": methods,
        "comparisons": comparisons,
    }


def _moments(table: MetricTable) -> dict:
    return {"num_objects": len(table.rows), "mean": table.mean(), "std": table.std(), "count": table.count()}


def _predict_again(protocol: Protocol, setting: Setting, pipelines: dict[str, IMedSamPipeline], row: int) -> Case:
    scores = {method: setting.methods[method] for method in pipelines}
    index, name = next((score.indices[row], score.table.rows[row]["name"]) for score in scores.values())
    image, objects = get_objects(protocol.examples, index, **protocol.prompts(setting))
    predictions = {}
    for method, pipeline in pipelines.items():
        found = protocol.predict(pipeline, setting, [index], progress=False)
        prediction = next(prediction for prompted, prediction in found if prompted.name == name)
        predictions[method] = (prediction, scores[method].table.rows[row]["dice"])
    return image, next(prompted for prompted in objects if prompted.name == name), predictions
