"""Prediction on files: masks, overlays and uncertainties as PNG, and a JSON report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from imedsam.contours import to_geojson
from imedsam.false_corrector import default_samples, refuse_corrected
from imedsam.pipeline import IMedSamPipeline, Segmentation
from imedsam.training.examples import IMAGE_SUFFIXES
from imedsam.training.pictures import displayable, overlay, uncertainty_picture
from imedsam.training.report import write_json

Box = Sequence[float]
Click = Sequence[float]  # (x, y) on the object


def predict_files(
    pipeline: IMedSamPipeline,
    prompts: Mapping[Path, Sequence[Box] | Sequence[Click]],
    output_dir: Path,
    size: tuple[int, int] | None = None,
    mode: str | None = None,
    window: tuple[float, float] | None = None,
    class_label: int | None = None,
    contours: Path | None = None,
    spacing: tuple[float, float] | None = None,
    correct: bool = False,
) -> dict:
    """
    Segments image files and writes for each `NAME_mask.png` (0 and 255; `NAME_mask_2.png` and so on for further
    prompts), `NAME_overlay.png` and `NAME_uncertainty.png`, and for all of them `report.json`.

    Args:
        prompts: the boxes (x0, y0, x1, y1), or the clicks (x, y), to prompt with, in pixels of each image.
        size: (height, width) of what is written; each image's own by default.
        mode: of rendering, "exact" or "adaptive"; adaptive where that is possible by default.
        window: (low, high) of the intensities to see, for 16-bit and float images.
        class_label: index of the class to segment; by default each prompt gets the class with the best score.
        contours: a GeoJSON file to write the masks' outlines to.
        spacing: (x, y) size of a pixel, such as in millimetres, which the outlines are then in; in pixels by default.
        correct: correct the masks by the image's brightness, with dropout samples where the model has an implicit
            decoder, else with varied prompts; see `IMedSamPipeline.predict`.

    Raises:
        ValueError: some images could not be segmented; the results of the others have been written. Before anything
            is written, `correct` with a model whose masks are corrected as they come.

    Returns:
        The report: per image its size, boxes or clicks, and for each of them the class, the area in pixels, the score
        and the mean uncertainty.
    """
    if correct:
        refuse_corrected(pipeline.model)
    for folder in (output_dir, *([] if contours is None else [contours.parent])):
        folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, dict] = {}
    features: list[dict] = []
    errors: list[str] = []
    for path, of_image in tqdm(prompts.items(), desc="Segmenting", unit="image"):
        kind = "clicks" if len(of_image[0]) == 2 else "boxes"
        given: dict = {"input_boxes": [[list(box) for box in of_image]]}
        if kind == "clicks":
            given = {"input_points": [[[list(click)] for click in of_image]]}
        if class_label is not None:
            given["class_labels"] = [[class_label] * len(of_image)]
        try:
            if kind == "boxes":
                check_extent(of_image)
            image = read_image(path)
            pipeline.set_image(image, window)
            segmentation = pipeline.predict(
                **given,
                output_size=size,
                mode=mode,
                contours=contours is not None,
                correct=default_samples(pipeline.model) if correct else None,
            )
        except ValueError as error:  # the other images' results are not lost for it
            errors.append(f"{path}: {error}")
            continue
        _write_pictures(output_dir / path.stem, displayable(image, window), of_image, segmentation)
        report[path.name] = {
            "size": list(segmentation.masks.shape[-2:]),
            kind: [list(prompt) for prompt in of_image],
            "masks": [
                {
                    "class": pipeline.model.config.id2label[best if class_label is None else class_label],
                    "area": int(mask.sum()),
                    "score": float(score),
                    "uncertainty": float(uncertainty.mean()),
                }
                for best, mask, score, uncertainty in _per_prompt(segmentation)
            ],
        }
        if segmentation.contours is not None:
            for index, (best, *_) in enumerate(_per_prompt(segmentation)):
                found, unit = segmentation.contours[index][best], np.array(spacing or (1.0, 1.0))
                properties = {"image": path.name, **report[path.name]["masks"][index]}
                # In the unit of the coordinates, whatever the masks' size.
                properties["area"] = float(sum(contour.area for contour in found) * unit.prod())
                prompt = np.array(of_image[index])
                properties[{"boxes": "box", "clicks": "click"}[kind]] = (
                    prompt * np.resize(unit, len(prompt))
                ).tolist()
                if spacing is not None:
                    properties["spacing"] = list(spacing)
                features.append(to_geojson(found, properties, tuple(unit)))
    write_json(output_dir / "report.json", report)
    if contours is not None:
        write_json(contours, {"type": "FeatureCollection", "features": features})
    if errors:
        raise ValueError(f"{len(errors)} of {len(prompts)} images could not be segmented. " + "\n".join(errors))
    return report


def check_extent(boxes: Sequence[Box]) -> None:
    """The processor takes boxes without a width or a height; whoever gives one here has made a slip."""
    for x0, y0, x1, y1 in boxes:
        if x0 == x1 or y0 == y1:
            raise ValueError(
                f"Expected boxes (x0, y0, x1, y1) with a width and a height, got {[x0, y0, x1, y1]}: give the corners "
                "of what the object fills."
            )


def read_image(path: Path) -> Image.Image:
    """
    Raises:
        ValueError: the file is not there or not an image.
    """
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"Expected one image in {path}, got {image.n_frames} pages: save one of them.")
            return ImageOps.exif_transpose(image)  # as every viewer shows it, and boxes were drawn
    except FileNotFoundError:
        raise ValueError(f"Expected an image at {path}, got no such file.") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"Expected an image at {path}, got a file that cannot be read as one: {error}.") from error


def find_images(path: Path) -> list[Path]:
    """The image itself, or the images of a folder."""
    if not path.exists():
        raise ValueError(f"Expected an image or a folder of images at {path}, got no such file or folder.")
    if not path.is_dir():
        return [path]
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise ValueError(f"Expected images ({', '.join(IMAGE_SUFFIXES)}) in {path}, got none.")
    stems = [image.stem for image in images]
    if len(set(stems)) < len(stems):
        twice = sorted({stem for stem in stems if stems.count(stem) > 1})
        raise ValueError(f"Expected images of different names in {path}, got {twice} twice: results would collide.")
    return images


def read_boxes(path: Path, images: Sequence[Path]) -> dict[Path, list[Box]]:
    """
    Args:
        path: a JSON file {"name.png": [[x0, y0, x1, y1], ...], ...}.
        images: that need boxes.
    """
    try:
        named = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"Expected a JSON file of boxes at {path}, got: {error}.") from error
    if not isinstance(named, dict) or not all(_is_list_of_boxes(boxes) for boxes in named.values()):
        raise ValueError(f'Expected {{"name.png": [[x0, y0, x1, y1], ...], ...}} in {path}, got another layout.')
    missing = [image.name for image in images if not named.get(image.name)]
    if missing:
        raise ValueError(f"Expected a list of boxes for each image in {path}, got none for {', '.join(missing[:5])}.")
    return {image: named[image.name] for image in images}


def _is_list_of_boxes(boxes) -> bool:
    return isinstance(boxes, list) and all(
        isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int | float) for edge in box) for box in boxes
    )


def _per_prompt(segmentation: Segmentation):
    """Index, mask, score and uncertainty of each prompt's best mask, which with several classes has the best score."""
    for masks, scores, uncertainties in zip(
        segmentation.masks, segmentation.scores, segmentation.uncertainty, strict=True
    ):
        best = int(np.argmax(scores))
        yield best, masks[best], scores[best], uncertainties[best]


def _write_pictures(
    prefix: Path, image: Image.Image, prompts: Sequence[Box] | Sequence[Click], segmentation: Segmentation
) -> None:
    best, masks, _, uncertainties = (np.stack(parts) for parts in zip(*_per_prompt(segmentation), strict=True))
    for index, mask in enumerate(masks):
        suffix = "mask" if index == 0 else f"mask_{index + 1}"
        Image.fromarray(mask.astype(np.uint8) * 255).save(f"{prefix}_{suffix}.png")
    height, width = masks.shape[-2:]
    scale = np.array([width / image.width, height / image.height])
    curves = None
    if segmentation.contours is not None:
        curves = [
            [curve * scale for contour in outlines[index] for curve in (contour.exterior, *contour.holes)]
            for outlines, index in zip(segmentation.contours, best, strict=True)
        ]
    places = np.asarray(prompts, dtype=np.float64)
    overlay(image, masks, places * np.resize(scale, places.shape[1]), curves).save(f"{prefix}_overlay.png")
    uncertainty_picture(uncertainties.max(axis=0)).save(f"{prefix}_uncertainty.png")
