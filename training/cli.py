"""The command `imedsam`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Mode = Literal["exact", "adaptive"]  # of rendering
Correct = Annotated[
    bool,
    typer.Option("--correct", help="Correct masks by the brightness of the pixels where they are least certain."),
]
Base = Annotated[
    str | None, typer.Option("--base-model", help="The SAM of an adapter, if it is not where the adapter says.")
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of the model on the Hub; its main one by default."),
]

app = typer.Typer(
    help="I-MedSAM: medical image segmentation with Segment Anything and an implicit decoder.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train on phantoms, a folder or a data set; the flags of `python -m imedsam.training.train --help`."""
    from imedsam.training.train import command

    command(context.args)


@app.command()
def predict(
    model: Annotated[str, typer.Option(help="Folder or Hub name of a trained model.")],
    image: Annotated[Path, typer.Option(help="An image, or a folder of images.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    box: Annotated[
        tuple[float, float, float, float] | None,
        typer.Option(help="x0 y0 x1 y1 in the image's pixels."),
    ] = None,
    boxes: Annotated[
        Path | None,
        typer.Option(help=r'JSON file {"name.png": [\[x0, y0, x1, y1], ...]}, for several boxes or images.'),
    ] = None,
    click: Annotated[
        tuple[float, float] | None,
        typer.Option(help="x y on the object instead of a box, for a model trained with --prompt click."),
    ] = None,
    size: Annotated[
        tuple[int, int] | None, typer.Option(help="Height and width of the masks; the image's own by default.")
    ] = None,
    window: Annotated[
        tuple[float, float] | None, typer.Option(help="Low and high of the intensities, for 16-bit and float images.")
    ] = None,
    mode: Annotated[
        Mode | None, typer.Option(help="Evaluate all pixels, or only near boundaries: the default where possible.")
    ] = None,
    class_name: Annotated[
        str | None, typer.Option("--class", help="Name of the class to segment; the best-scored one by default.")
    ] = None,
    contours: Annotated[
        Path | None, typer.Option(help="GeoJSON file for the masks' outlines, in pixels, (0, 0) the image's corner.")
    ] = None,
    spacing: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Width and height of a pixel in millimetres, for outlines in millimetres."),
    ] = None,
    correct: Correct = False,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    base: Base = None,
    revision: Revision = None,
) -> None:
    """Segment what is in the boxes, or under the click: mask, overlay and uncertainty as PNG, and report.json."""
    from imedsam.training.baselines import load_pipeline
    from imedsam.training.predict import find_images, predict_files, read_boxes

    if sum(prompt is not None for prompt in (box, boxes, click)) != 1:
        raise typer.BadParameter(
            "Expected one of --box x0 y0 x1 y1, --boxes FILE and --click x y, got another number."
        )
    if spacing is not None and (contours is None or min(spacing) <= 0):
        raise typer.BadParameter(
            f"Expected --spacing to be positive and together with --contours, got {spacing} and contours {contours}."
        )
    check_device(device)
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"Expected a folder for the results, got the file {output}: name another one.")
    if output.is_dir() and output.resolve() == image.resolve():
        raise typer.BadParameter(f"Expected another folder for the results than that of the images, {image}.")
    with explain_errors():
        images = find_images(image)
        prompts = read_boxes(boxes, images) if boxes is not None else {path: [box or click or ()] for path in images}
        check_model_name("--model", model, revision)
        pipeline = load_pipeline(model, device, base_model_name_or_path=base, revision=revision)
        classes = pipeline.model.config.label2id
        if class_name is not None and class_name not in classes:
            raise ValueError(f"Expected --class to be one of {', '.join(classes)}, got {class_name!r}.")
        class_label = None if class_name is None else classes[class_name]
        report = predict_files(
            pipeline,
            prompts,
            output,
            size=size,
            mode=mode,
            window=window,
            class_label=class_label,
            contours=contours,
            spacing=spacing,
            correct=correct,
        )
    for name, result in report.items():
        for mask in result["masks"]:
            typer.echo(f"{name}: {mask['area']} pixels, score {mask['score']:.3f}")
    typer.echo(f"Masks, pictures and report.json are in {output}.")


@contextmanager
def explain_errors() -> Iterator[None]:
    """A line instead of a traceback for what the user can mend."""
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, OSError, SafetensorError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error


def check_model_name(flag: str, model: str, revision: str | None = None) -> None:
    """Without asking the Hub for what cannot be there."""
    if revision is not None and Path(model).exists():
        raise typer.BadParameter(f"Expected no --revision of what is here, got {revision} of {model}: leave it out.")
    if not Path(model).exists() and (model.count("/") != 1 or model.startswith((".", "/"))):
        raise typer.BadParameter(
            f"Expected {flag} to be a folder or a name on the Hub such as user/model, got {model!r}."
        )


def check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        message = f"Expected a device that is there, got {device}: use --device cpu. {error}"
        raise typer.BadParameter(message) from error


def check_hub_name(flag: str, name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        good = name.count("/") == 1
    except HFValidationError:
        good = False
    if not good:
        raise typer.BadParameter(f"Expected {flag} as user/name, of letters, digits, - _ and ., got {name!r}.")


@app.command()
def translate(
    model: Annotated[str, typer.Option(help="Folder or Hub name of a trained SAM-I2I.")],
    image: Annotated[
        Path,
        typer.Option(
            help="A NIfTI volume or a slice, or a folder of either; slices named alike before the last _ are one "
            "volume, as PATIENT_SLICE.png."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the results.")],
    target: Annotated[
        Path | None, typer.Option(help="The true contrast, a file or a folder like the image, to compare with.")
    ] = None,
    intensity_range: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Low and high of what is written to a volume; 0 and 1 by default."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Slices at once.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    revision: Revision = None,
) -> None:
    """Translate MR slices or a volume to another contrast: PNG or NIfTI, pictures, and report.json."""
    from imedsam.training.translate import translate_to_folder

    check_device(device)
    if intensity_range is not None and not intensity_range[0] < intensity_range[1]:
        raise typer.BadParameter(f"Expected --intensity-range as low and high, low < high, got {intensity_range}.")
    check_model_name("--model", model, revision)
    with explain_errors():
        report = translate_to_folder(
            model,
            image,
            output,
            target=target,
            intensity_range=intensity_range,
            batch_size=batch_size,
            device=device,
            revision=revision,
        )
    for name, mean in report.get("mean", {}).items():
        interval = f" [{mean['low']:.4g}, {mean['high']:.4g}]" if report["num_patients"] > 1 else ""
        typer.echo(f"{name}: {mean['mean']:.4g}{interval}, slices: {mean['count']}")
    typer.echo(f"Slices, pictures and report.json are in {output}.")


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Folder or Hub name of a trained model.")],
    data: Annotated[str, typer.Option(help='Folder with images/ and masks/, a data set, or "phantoms".')],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")],
    split: Annotated[str, typer.Option(help="train, validation, test, or all of a folder or data set.")] = "test",
    sizes: Annotated[
        str,
        typer.Option(
            help='Sides of the squares that masks are compared on, such as "128,384,native"; phantoms are drawn at '
            "the largest, or at 256 if that is more."
        ),
    ] = "native",
    box_jitter: Annotated[
        str, typer.Option(help='Shares of a box\'s width and height by which its sides move, such as "0,0.05".')
    ] = "0",
    spacing: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Width and height of a pixel in millimetres, for distances in millimetres."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Of the surface Dice, in millimetres or pixels.")] = 1.0,
    compare: Annotated[str | None, typer.Option(help="Folder or Hub name of another model.")] = None,
    mode: Annotated[Mode, typer.Option(help="Evaluate all pixels, or only near boundaries: faster.")] = "exact",
    prompt: Annotated[
        Literal["box", "click"], typer.Option(help="Of each object: its box, or a click in its middle.")
    ] = "box",
    num_images: Annotated[int | None, typer.Option(help="At most so many images.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images encoded at once.", min=1)] = 8,
    seed: Annotated[
        int, typer.Option(help="Of jitter, intervals, and the split of data that have none: as in training.", min=0)
    ] = 0,
    correct: Correct = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda for the process's own GPU.")] = "cpu",
    base: Base = None,
    revision: Revision = None,
) -> None:
    """Measure a model on images with masks: metrics.json, tables, plots, and the worst and best cases."""
    from accelerate import PartialState

    from imedsam.training.evaluation_report import evaluate_to_folder

    check_model_name("--model", model, revision)
    if compare is not None:
        check_model_name("--compare", compare)
    if spacing is not None and not all(length > 0 for length in spacing):
        raise typer.BadParameter(f"Expected --spacing as a positive width and height, got {spacing}.")
    with explain_errors():
        report = evaluate_to_folder(
            model,
            data,
            output,
            split=split,
            sizes=parse_sizes(sizes),
            box_jitters=parse_jitters(box_jitter),
            spacing=None if spacing is None else (spacing[1], spacing[0]),
            tolerance=tolerance,
            compare=compare,
            mode=mode,
            prompt=prompt,
            num_images=num_images,
            seed=seed,
            batch_size=batch_size,
            device=device,
            base_model=base,
            revision=revision,
            correct=correct,
        )
    PartialState().destroy_process_group()
    for setting in report.get("settings", ()):
        typer.echo(setting["title"])
        for name, summary in setting["methods"].items():
            typer.echo(f"  {name}: Dice {100 * summary['mean']['dice']:.1f}, HD95 {summary['mean']['hd95']:.1f}")
    if report:
        typer.echo(f"report.md, metrics.json, tables and plots are in {output}.")


def parse_sizes(sizes: str) -> list[int | None]:
    """'384,native' -> [384, None]."""
    parts = [part.strip() for part in sizes.split(",")]
    if wrong := [part for part in parts if part != "native" and not (part.isdecimal() and int(part) > 0)]:
        raise typer.BadParameter(f'Expected --sizes as numbers of pixels or "native", with commas, got {wrong[0]!r}.')
    return [None if part == "native" else int(part) for part in parts]


def parse_jitters(jitters: str) -> list[float]:
    """'0,0.05' -> [0.0, 0.05]."""
    try:
        values = [float(jitter) for jitter in jitters.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 <= value < 0.5 for value in values):
        raise typer.BadParameter(f"Expected --box-jitter as shares in [0, 0.5), with commas, got {jitters!r}.")
    return values


@app.command()
def publish(
    model: Annotated[str, typer.Option(help="Folder that a training left.")],
    repo: Annotated[str, typer.Option(help="user/name on the Hub.")],
    license: Annotated[str, typer.Option(help="Of the weights, as the Hub names it: apache-2.0, cc-by-nc-4.0, ...")],
    report: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that `imedsam evaluate` left, for the card; several times if many."),
    ] = None,
    task: Annotated[str | None, typer.Option(help='What it is for, such as "polyps in colonoscopy".')] = None,
    data_terms: Annotated[str | None, typer.Option(help="Where the training data are from, on which terms.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="PNG for the card, such as a report's best.png, if its images may be shown.")
    ] = None,
    adapter: Annotated[bool, typer.Option(help="What was trained alone: a few MB, which need their SAM.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="The SAM that it was trained from on the Hub, if from a copy.")
    ] = None,
    with_code: Annotated[bool, typer.Option(help="Loadable without this package, with trust_remote_code.")] = False,
    private: Annotated[bool, typer.Option(help="A new repository that others do not see.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; the main one by default.")] = None,
    update: Annotated[
        bool, typer.Option(help="Replace what is in a repository that exists, by a commit on top.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Write the folder and say what would be sent, without the Hub.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New folder to keep what is sent in.")] = None,
) -> None:
    """Put a trained model on the Hub: weights or adapter, processor, model card, metrics, a picture."""
    import tempfile

    from imedsam.training.model_card import Publication
    from imedsam.training.publish import find_repository, prepare_folder, upload
    from imedsam.training.report import new_folder

    for flag, name in {"--repo": repo, "--base-model": base_model}.items():
        if name is not None:
            check_hub_name(flag, name)
    if not re.fullmatch(r"[a-z][a-z0-9.-]+", license):
        raise typer.BadParameter(
            f"Expected --license as the Hub names it, in lower case, such as cc-by-nc-4.0, got {license!r}."
        )
    if revision is not None and not re.fullmatch(r"(?!refs/|.*\.\.)\w[\w.-]*(/\w[\w.-]*)*(?<!\.)", revision):
        raise typer.BadParameter(f"Expected --revision as the name of a branch, such as v1.0, got {revision!r}.")
    if output is not None and Path(model).resolve() in output.resolve().parents:
        raise typer.BadParameter(f"Expected --output outside of the model's folder, got {output}.")
    if dry_run and output is None:
        raise typer.BadParameter("Expected a folder for what would be sent with --dry-run: add -o FOLDER.")
    publication = Publication(repo, license, task, data_terms, base_model, with_code=with_code)
    # What is kept in --output is all that was sent, or nothing, so that the same command can be tried again.
    with explain_errors(), new_folder(output) if output else tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if not dry_run:
            find_repository(repo, private=private, revision=revision, update=update)
        files = prepare_folder(
            model,
            folder,
            publication,
            reports=report or (),
            picture=picture,
            adapter=adapter,
            offline=dry_run,
        )
        for path in files:
            typer.echo(f"{path.stat().st_size / 1e6:9.3f} MB  {path.relative_to(folder)}")
        if not dry_run:
            url = upload(folder, repo, private=private, revision=revision, update=update)
    if dry_run:
        typer.echo(f"Nothing was sent. What would be is in {output}.")
        return
    typer.echo(f"Sent to {url}")


@app.command()
def export(
    model: Annotated[str, typer.Option(help="Folder or Hub name of a trained model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder.")],
    file_format: Annotated[
        Literal["onnx", "torch"], typer.Option("--format", help="ONNX, or what torch.export.load takes.")
    ] = "onnx",
    int8: Annotated[bool, typer.Option(help="The encoder's products in 8-bit integers, for CPUs.")] = False,
    base: Base = None,
    revision: Revision = None,
) -> None:
    """Write a model as files that run without this package: encoder, prompts, and the field at given points."""
    from imedsam.training.export import export_to_folder

    check_model_name("--model", model, revision)
    with explain_errors():
        difference = export_to_folder(
            model, output, file_format=file_format, int8=int8, base_model=base, revision=revision
        )
    for path in sorted(output.iterdir()):
        typer.echo(f"{path.stat().st_size / 1e6:9.3f} MB  {path.name}")
    typer.echo(f"Logits differ by at most {difference:.0e}{' with the quantised encoder' if int8 else ''}.")


@app.command()
def convert(
    model: Annotated[
        str,
        typer.Option(
            help="Original file of SAM, MedSAM or SAM-Med2D (.pth), or the folder or Hub name of a trained model "
            "without a frequency branch."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder, for SamModel.from_pretrained.")],
    base: Base = None,
    revision: Revision = None,
) -> None:
    """Write a stock SamModel folder: of a checkpoint of the SAM family, or of an encoder that was trained here."""
    from imedsam.sam_checkpoints import WEIGHTS
    from imedsam.training.convert import convert_to_folder

    with explain_errors():
        if revision is not None or not model.endswith(WEIGHTS) and not Path(model).is_file():
            check_model_name("--model", model, revision)
        sam = convert_to_folder(model, output, base_model=base, revision=revision)
    vision: Any = sam.config.vision_config
    typer.echo(
        f"{output}: {vision.num_hidden_layers} blocks of width {vision.hidden_size}, {vision.image_size} x "
        f"{vision.image_size} pixels; SamModel.from_pretrained and IMedSamModel.from_sam_pretrained take it."
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("outputs/demo"),
) -> None:
    """Train a small model on drawn phantoms and show what it does, in a few minutes."""
    from imedsam.training.demo import main

    main(output)


if __name__ == "__main__":
    app()
