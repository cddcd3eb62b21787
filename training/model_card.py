"""The model card: what a model is, what it scores, how to use it, and what it is not for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from huggingface_hub import EvalResult, ModelCardData

from imedsam.modeling_imedsam import IMedSamModel
from imedsam.training.baselines import METHODS
from imedsam.training.evaluation_tables import COLUMNS
from imedsam.training.unet import UNetModel

METRICS = ("dice", "iou", "hd", "hd95", "nsd")


@dataclass(frozen=True)
class Publication:
    """
    What a publisher says of a model beside what its files say.

    Args:
        repo_id: user/name on the Hub.
        license: of the weights, as the Hub names it: apache-2.0, cc-by-nc-4.0, other, ...
        task: what is segmented in what, in a few words.
        data_terms: where the training data are from, and on which terms.
        base_model: name on the Hub of the SAM that it was trained from, if it was trained from a copy.
        evaluations: what the metrics.json of `imedsam evaluate` hold, the model's own name being "this model".
        picture: a file beside the card.
        with_code: it can be loaded without this package.
        base_sha256: of the weights of the SAM that it needs, for an adapter.
        correct: how `IMedSamPipeline.predict` corrects masks as the evaluations that did; None if none did.
    """

    repo_id: str
    license: str
    task: str | None = None
    data_terms: str | None = None
    base_model: str | None = None
    evaluations: Sequence[Mapping] = ()
    picture: str | None = None
    with_code: bool = False
    base_sha256: str | None = None
    correct: str | None = None

    @property
    def name(self) -> str:
        return self.repo_id.rpartition("/")[2]


def model_card(report: Mapping, publication: Publication | None = None) -> str:
    """
    Args:
        report: what the metrics.json of a training holds.
        publication: what there is to say on the Hub; None for the folder of a training.
    """
    arguments = report["arguments"]
    dataset, method = arguments["dataset_name"], METHODS[arguments["method"]]
    base = (publication and publication.base_model) or arguments["model_name_or_path"]
    if method.model_class is UNetModel:
        base = None  # whatever was given
    # Where it was trained: a name such as data/mine may be a folder there.
    on_hub = {*report.get("on_hub", ()), *([publication.base_model] if publication and publication.base_model else [])}
    name = publication.name if publication else Path(arguments["output_dir"]).resolve().name
    is_model = method.model_class is IMedSamModel
    prompt = arguments.get("prompt", "box")
    prompts = PROMPT_ARGUMENTS[prompt]
    correct = publication.correct if publication else None
    results = [_training_results(report)] if not (publication and publication.evaluations) else []
    results += [_evaluation_results(evaluation) for evaluation in (publication.evaluations if publication else ())]
    return CARD.format(
        head=_metadata(report, publication, name, base, on_hub),
        name=name,
        method=method.description,
        prompt=prompt,
        usage=(USAGE if is_model else BASELINE_USAGE).format(
            repo=publication.repo_id if publication else f"path/to/{name}",
            prompts=prompts,
            correct=f', correct="{correct}"' if correct else "",
        ),
        adapter=ADAPTER.format(repo=publication.repo_id, sha256=publication.base_sha256)
        if publication and publication.base_sha256
        else "",
        without_package=WITHOUT_PACKAGE.format(repo=publication.repo_id, prompts=prompts)
        if publication and publication.with_code
        else "",
        task=f" Its task: {publication.task}." if publication and publication.task else "",
        picture=f"![What it gives]({publication.picture})\n\n" if publication and publication.picture else "",
        dataset=dataset if dataset in on_hub else shown_name(dataset),
        start="nothing" if base is None else f"`{base if base in on_hub else shown_name(base)}`",
        image_size=report["image_size"],
        classes=", ".join(report["classes"].values()),
        prompts_from=PROMPTS_FROM[prompt] + (CORRECTED if correct else ""),
        intervals=", with 95 % intervals in brackets" if publication and publication.evaluations else "",
        table="\n".join(results),
        trained=", ".join(f"{name} {count:,}" for name, count in report["trainable_parameters"].items()),
        images=report["num_images"]["train"],
        epochs=counted(len(report["history"]), "epoch"),
        best=report["best_epoch"] + 1,
        seed=arguments["seed"],
        time=describe_time(report["seconds"]),
        hardware=describe_hardware(report),
        terms=TERMS.format(license=publication.license, data=publication.data_terms or NO_TERMS)
        if publication
        else "",
    )


def _metadata(report: Mapping, publication: Publication | None, name: str, base: str | None, on_hub: set) -> str:
    arguments = report["arguments"]
    tags = ["medical", "image-segmentation"]
    if arguments["method"].startswith("imedsam"):
        tags += ["segment-anything", "implicit-neural-representation"]
    adapter = publication is not None and publication.base_sha256 is not None
    if adapter:
        tags.append("peft")
    data = ModelCardData(
        library_name="imedsam",
        pipeline_tag="mask-generation",
        license=publication.license if publication else None,
        tags=tags,
        base_model=base if base in on_hub else None,
        base_model_relation=("adapter" if adapter else "finetune") if base in on_hub else None,
        datasets=[arguments["dataset_name"]] if arguments["dataset_name"] in on_hub else None,
        model_name=name if publication and publication.evaluations else None,
        eval_results=[
            result
            for evaluation in (publication.evaluations if publication else ())
            for result in _eval_results(evaluation)
        ]
        or None,
    )
    return data.to_yaml().strip()


def _eval_results(evaluation: Mapping) -> list[EvalResult]:
    """As `model-index` has them: on the first size, jittered boxes apart from exact ones."""
    first, *_ = evaluation["settings"]
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name=f"Segmentation from a {evaluation.get('prompt', 'box')}, {setting['title']}",
            dataset_type=shown_name(evaluation["data"]),
            dataset_name=shown_name(evaluation["data"]),
            # Which tells them apart.
            dataset_config=setting["title"] if setting["box_jitter"] or is_corrected(evaluation) else None,
            dataset_split=evaluation["split"],
            metric_type=key,
            metric_name=_titles(evaluation)[key],
            metric_value=round(COLUMNS[key][1] * means[key], 2),
        )
        for setting in evaluation["settings"]
        if setting["output_size"] == first["output_size"]
        for means in [next(iter(setting["methods"].values()))["mean"]]
        for key in METRICS
        if means.get(key) is not None
    ]


def describe_hardware(report: Mapping) -> str:
    """Where it was trained; nothing for a report that does not say."""
    machine = report.get("machine")
    if machine is None:
        return ""
    return f" on {machine['gpu'] or counted(machine['threads'], 'core') + ' of ' + machine['processor']}"


def describe_time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} hours"
    return counted(round(seconds / 60), "minute") if seconds >= 60 else counted(round(seconds), "second")


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _training_results(report: Mapping) -> str:
    rows = {"this model": report["validation"], **report["floors"]}
    if "validation_jittered" in report:
        rows["this model, boxes jittered"] = report["validation_jittered"]
    table = markdown_table(rows, f"validation ({report['num_images']['validation']} images)")
    if "test" in report:
        rows = {"this model": report["test"], "this model, boxes jittered": report.get("test_jittered")}
        rows |= report["test_floors"]
        rows = {name: metrics for name, metrics in rows.items() if metrics}
        table += "\n" + markdown_table(rows, f"test ({report['num_images']['test']} images)")
    return table


def _evaluation_results(evaluation: Mapping) -> str:
    tables = []
    for setting in evaluation["settings"]:
        first, *others = setting["methods"]
        methods = {"this model": setting["methods"][first]} | {name: setting["methods"][name] for name in others}
        images = f"{evaluation['num_images']} images"
        title = f"{shown_name(evaluation['data'])}, {evaluation['split']} ({images}), {setting['title']}"
        means, intervals = ({name: row[part] for name, row in methods.items()} for part in ("mean", "interval"))
        tables.append(markdown_table(means, title, _titles(evaluation), intervals))
    return "\n".join(tables)


def _titles(evaluation: Mapping) -> dict[str, str]:
    """With the units of what is not in percent."""
    unit, tolerance = evaluation["unit"], evaluation["tolerance"]
    units = {"hd": f" ({unit})", "hd95": f" ({unit})", "nsd": f" at {tolerance:g} {unit}"}
    return {key: COLUMNS[key][0] + units.get(key, "") for key in METRICS}


def markdown_table(
    rows: Mapping[str, Mapping[str, float]],
    title: str = "",
    titles: Mapping[str, str] | None = None,
    intervals: Mapping[str, Mapping[str, Sequence[float | None]]] | None = None,
) -> str:
    """
    A row per method; Dice, IoU and surface Dice (NSD) in percent, distances in pixels unless the titles say so; with
    the low and high of each value behind it, if there are `intervals`.
    """
    titles = titles or _titles({"unit": "px", "tolerance": 1})
    lines = [f"| {title} | " + " | ".join(titles.values()) + " |", "|---|" + "---:|" * len(METRICS)]
    for name, metrics in rows.items():
        cells = []
        for key in METRICS:
            low, high = (intervals or {}).get(name, {}).get(key, (None, None))
            cell = _shown(key, metrics[key])
            cells.append(cell if low is None else f"{cell} [{_shown(key, low)}, {_shown(key, high)}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(key: str, value: float | None) -> str:
    return "–" if value is None else f"{COLUMNS[key][1] * value:.1f}"


def shown_name(name: str) -> str:
    """Without the folders that it is in, on whatever system."""
    return name if name.startswith("phantoms") else PureWindowsPath(name).name  # which knows both kinds of slashes


def is_corrected(evaluation: Mapping) -> bool:
    """Whether it was made with `--correct`."""
    return evaluation.get("correct", False)


def is_hub_name(name: str) -> bool:
    """Whether it is no folder here, and looks like user/name."""
    return name.count("/") == 1 and not Path(name).exists() and not name.startswith((".", "/", "~"))


# A single image needs no level of its own.
PROMPT_ARGUMENTS = {"box": "input_boxes=[[8, 12, 50, 44]]", "click": "input_points=[[[29, 28]]]"}
PROMPTS_FROM = {
    "box": "Boxes come from the reference masks, so the filled box and the ellipse inscribed\n"
    "in it are what the prompt alone is worth.",
    "click": "A click is the innermost point of the reference mask. The filled box and the\n"
    "ellipse inscribed in it are what the object's box is worth, of which a click says nothing.",
}
CORRECTED = "\nWhere a table says so, masks were corrected by the image's brightness, as `correct=` does above."
USAGE = """from PIL import Image
from imedsam import IMedSamPipeline

pipeline = IMedSamPipeline.from_pretrained("{repo}")
pipeline.set_image(Image.open("image.png"))
mask = pipeline.predict({prompts}, class_labels=[0]{correct}).masks[0, 0]"""
BASELINE_USAGE = USAGE.replace(
    "from imedsam import IMedSamPipeline", "from imedsam.training.baselines import load_pipeline"
)
BASELINE_USAGE = BASELINE_USAGE.replace("IMedSamPipeline.from_pretrained", "load_pipeline")

ADAPTER = """
This is an adapter, what was trained beside a SAM that stays as it is: it takes the SAM from the place that
`adapter_config.json` names, or from `base_model_name_or_path=`, and no other than that whose weights have the SHA-256
`{sha256}`. It loads with `IMedSamModel.from_pretrained` or onto a
model on the same SAM, `model.load_adapter("{repo}", "name")`, and not with `AutoModel`.
"""
WITHOUT_PACKAGE = """
Without the package, with transformers, peft, torch, numpy and pillow alone (this runs the code that comes with the
weights):

```python
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{repo}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)
inputs = processor(Image.open("image.png"), {prompts})
outputs = model(**inputs)
masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
```

These masks are interpolated from the model's square, and may differ by single pixels from those of the pipeline.
"""

NO_TERMS = "the publisher says nothing of the data's terms: ask before you use the weights for more than research."
TERMS = """
## Licence

The weights: `{license}`. The training data: {data}
"""

CARD = """---
{head}
---

# {name}

{method}; trained from {start} on
`{dataset}` at {image_size} x {image_size} pixels. It takes an image and a {prompt} per object and gives the object's
mask at any resolution. Classes: {classes}.{task}

{picture}## How to use

`pip install` the path of imedsam's repository, then:

```python
{usage}
```

Boxes are x0, y0, x1, y1 and clicks x, y in pixels of the image, (0, 0) being its top left corner.
{adapter}{without_package}
## Metrics

Means over objects{intervals}, at the images' own size unless stated otherwise; Dice, IoU and
surface Dice (NSD) in percent. {prompts_from}

{table}
## Training

{images} images, {epochs}, {time}{hardware}, seed {seed}; the weights are those of epoch {best}, the best by
validation Dice. Trainable parameters: {trained}. `metrics.json` holds the arguments, versions and history.
{terms}
## Limits and intended use

For research on images like those of `{dataset}`: to compare methods, to annotate faster, to start trainings from. Not
for clinical use, and nothing that it gives is a diagnosis. The scores hold for prompts as the tables have them, and
say nothing about devices and populations that are not in them. It segments whatever it is prompted for, whether the
object is there or not.
"""
