"""Scores of a model on images with masks, and of what the boxes alone are worth."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit
from tqdm.auto import tqdm

from imedsam.false_corrector import SampleKind, correct_false_regions, sample_masks
from imedsam.processing.image_processing_imedsam import sample_pixels
from imedsam.training.calibration import calibration_metrics
from imedsam.training.data import check_prompt, collate_prompts, encode, innermost_click, jitter_box, split_by_class
from imedsam.training.examples import Examples
from imedsam.training.metrics import (
    MetricTable,
    box_from_mask,
    filled_box,
    inscribed_ellipse,
    overlap_metrics,
    surface_metrics,
)

METRIC_GROUPS = ("overlap", "surface", "calibration")
PROMPT_INPUTS = ("input_boxes", "input_points", "input_labels", "class_labels")
FLOORS = {"filled box": filled_box, "inscribed ellipse": inscribed_ellipse}


@dataclass
class PromptedObject:
    """
    An object of an image, on the grid that masks are compared on.

    Args:
        name: of the image, and of the class if the masks are label maps ("name/class").
        index: of the example.
        class_index: index of the class.
        target: (H, W), bool.
        box: (4,), x0, y0, x1, y1 in pixels of the grid.
        pixel: (height, width) of the grid's pixels, in the unit that distances are measured in.
        click: (2,), x, y in pixels of the grid; None where the box is the prompt.
    """

    name: str
    index: int
    class_index: int
    target: np.ndarray
    box: np.ndarray
    pixel: tuple[float, float]
    click: np.ndarray | None = None

    @property
    def prompt(self) -> np.ndarray:
        """What the model is given of the object: the click (2,), or the box (4,)."""
        return self.box if self.click is None else self.click


@dataclass
class Prediction:
    """
    What a model says about an object, on the same grid.

    Args:
        logits: (H, W), float32; the mask is where they are positive, unless it was corrected.
        uncertainty: (H, W), float32.
        corrected: (H, W), bool, the corrected mask, if that was asked for.
    """

    logits: np.ndarray
    uncertainty: np.ndarray
    corrected: np.ndarray | None = None

    @property
    def mask(self) -> np.ndarray:
        return self.logits > 0 if self.corrected is None else self.corrected

    @property
    def probability(self) -> np.ndarray:
        """In double precision, in which it is above 0.5 wherever a logit is positive."""
        return expit(self.logits.astype(np.float64))


def evaluate_masks(
    model,
    processor,
    examples: Examples,
    *,
    output_size: int | None = None,
    mode: str | None = "exact",
    prompt: str = "box",
    box_jitter: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    indices: Sequence[int] | None = None,
    progress: bool = True,
    metrics: Collection[str] = METRIC_GROUPS,
    spacing: tuple[float, float] | None = None,
    tolerance: float = 1.0,
    correct: SampleKind | None = None,
) -> MetricTable:
    """
    Prompts the model with the box of each object, or a click on it, and compares the masks; images without an object
    are left out.

    Args:
        model: an `IMedSamModel`, evaluated in eval mode and left in the mode it was in.
        output_size: side of the square that the image is rendered and the mask sampled at (at pixel centres); by
            default each image's own size.
        mode: of rendering: "exact", "adaptive", or None for the field's default.
        prompt: "box", or "click": the centre of the object's innermost pixel.
        box_jitter: as in training; 0 prompts with the exact boxes. Not of clicks.
        seed: of the jitter, which depends on the image's index beside it.
        batch_size: images encoded at once.
        indices: of the examples to evaluate, such as one process's share; all by default.
        metrics: groups of metrics: "overlap", which takes next to no time, "surface" and "calibration".
        spacing: (height, width) of an image's pixel, such as in millimetres, which distances are then in. By default
            distances are in pixels of what is compared.
        tolerance: of the surface Dice, in the same unit.
        correct: "prompts" or "dropout" corrects the masks as `IMedSamPipeline.predict` does. Calibration is of the
            probabilities, which stay as they are.

    Returns:
        A row per object, in the order of the examples, named after the image, and the class if the masks are label
        maps ("name/class").
    """
    table = MetricTable()
    for prompted, prediction in predict_objects(
        model,
        processor,
        examples,
        output_size=output_size,
        mode=mode,
        prompt=prompt,
        box_jitter=box_jitter,
        seed=seed,
        batch_size=batch_size,
        indices=indices,
        progress=progress,
        spacing=spacing,
        correct=correct,
    ):
        table.add(prompted.name, prediction_metrics(prompted, prediction, metrics, tolerance))
    return table


def floor_metrics(
    examples: Examples,
    indices: Sequence[int] | None = None,
    *,
    output_size: int | None = None,
    box_jitter: float = 0.0,
    seed: int = 0,
    metrics: Collection[str] = METRIC_GROUPS,
    spacing: tuple[float, float] | None = None,
    tolerance: float = 1.0,
) -> dict[str, MetricTable]:
    """The metrics of the box itself and of the ellipse inscribed in it; arguments as in `evaluate_masks`."""
    tables = {name: MetricTable() for name in FLOORS}
    for index in range(len(examples)) if indices is None else indices:
        prompted_objects = get_objects(examples, index, output_size, box_jitter, seed, spacing)[1]
        for prompted in prompted_objects:
            for name, shape in FLOORS.items():
                mask = shape(prompted.target.shape, prompted.box)
                tables[name].add(prompted.name, mask_metrics(prompted, mask, metrics, tolerance))
    return tables


def class_tables(table: MetricTable, examples: Examples) -> dict[str, MetricTable]:
    """The rows of each class of label maps; nothing for binary masks."""
    tables: dict[str, MetricTable] = {}
    for class_name in examples.id2label.values() if examples.labels is not None else ():
        tables[class_name] = MetricTable()
        tables[class_name].rows = [row for row in table.rows if row["name"].endswith(f"/{class_name}")]
    return tables


def class_means(table: MetricTable, examples: Examples) -> dict[str, dict[str, float]]:
    """The mean metrics of each class of label maps."""
    return {name: rows.mean() for name, rows in class_tables(table, examples).items()}


def prediction_metrics(
    prompted: PromptedObject, prediction: Prediction, metrics: Collection[str] = METRIC_GROUPS, tolerance: float = 1.0
) -> dict[str, float]:
    """The groups of metrics of one prediction."""
    values = _hard_metrics(prompted, prediction.mask, metrics, tolerance)
    if "calibration" in metrics:
        values |= calibration_metrics(prediction.probability, prompted.target, prediction.uncertainty)
    return values


def mask_metrics(
    prompted: PromptedObject, mask: np.ndarray, metrics: Collection[str] = METRIC_GROUPS, tolerance: float = 1.0
) -> dict[str, float]:
    """The groups of metrics of a mask (H, W) that is sure of itself: its probabilities are 0 and 1."""
    values = _hard_metrics(prompted, mask, metrics, tolerance)
    if "calibration" in metrics:
        values |= calibration_metrics(mask.astype(np.float64), prompted.target)
    return values


@torch.no_grad()  # as a decorator: a block would leave the consumer without gradients between two objects
def predict_objects(
    model,
    processor,
    examples: Examples,
    *,
    output_size: int | None = None,
    mode: str | None = "exact",
    prompt: str = "box",
    box_jitter: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    indices: Sequence[int] | None = None,
    progress: bool = True,
    description: str = "Evaluating",
    spacing: tuple[float, float] | None = None,
    correct: SampleKind | None = None,
) -> Iterator[tuple[PromptedObject, Prediction]]:
    """
    What the model says about each object when prompted with its box or a click; arguments as in `evaluate_masks`, and
    the progress bar's `description`.
    """
    training = model.training
    model.eval()
    indices = range(len(examples)) if indices is None else indices
    try:
        with tqdm(total=len(indices), desc=description, unit="image", disable=not progress, leave=False) as bar:
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                read = [
                    get_objects(examples, index, output_size, box_jitter, seed, spacing, prompt) for index in batch
                ]
                shown = [(image, objects) for image, objects in read if objects]
                if shown:
                    yield from _predict_batch(model, processor, shown, mode, correct)
                bar.update(len(batch))
    finally:
        model.train(training)


def get_objects(
    examples: Examples,
    index: int,
    output_size: int | None = None,
    box_jitter: float = 0.0,
    seed: int = 0,
    spacing: tuple[float, float] | None = None,
    prompt: str = "box",
) -> tuple:
    """The image of an example, and its objects with their prompts: one per class that its mask shows."""
    check_prompt(prompt)
    example = examples[index]
    native = example["mask"].shape
    size = native if output_size is None else (output_size, output_size)
    scale = np.array(size) / native
    pixel = (1.0, 1.0) if spacing is None else (spacing[0] / scale[0], spacing[1] / scale[1])
    rng = np.random.default_rng([seed, index])
    objects = []
    for class_index, mask in zip(*split_by_class(example["mask"]), strict=True):
        name = example["name"] if examples.labels is None else f"{example['name']}/{examples.id2label[class_index]}"
        box = jitter_box(box_from_mask(mask), box_jitter, native, rng) * np.tile(scale[::-1], 2)
        click = innermost_click(mask) * scale[::-1] if prompt == "click" else None
        objects.append(PromptedObject(name, index, class_index, sample_mask(mask, size), box, pixel, click))
    return example["image"], objects


def sample_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) at the pixel centres of a grid of another size over the same image."""
    if tuple(size) == mask.shape:
        return mask
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, mask.shape, strict=True)
    )
    return mask[np.ix_(rows, columns)]


def _predict_batch(model, processor, batch, mode, correct=None):
    items = [
        encode(
            processor,
            image,
            objects[0].target.shape,
            np.stack([prompted.prompt for prompted in objects]),
            [prompted.class_index for prompted in objects],
        )
        for image, objects in batch
    ]
    inputs = {key: value.to(model.device) for key, value in collate_prompts(items).items()}
    embeddings = model.get_image_embeddings(
        inputs["pixel_values"], reshaped_input_sizes=inputs["reshaped_input_sizes"]
    )
    regions = processor.get_image_regions(inputs["original_sizes"], inputs["reshaped_input_sizes"])
    for position, (image, objects) in enumerate(batch):
        one, size = slice(position, position + 1), objects[0].target.shape
        present = inputs["prompt_attention_mask"][position]
        prompts = {key: inputs[key][one, present] for key in PROMPT_INPUTS if key in inputs}
        reshaped = inputs["reshaped_input_sizes"][one]
        field = model.get_mask_field(embeddings[one], **prompts, reshaped_input_sizes=reshaped)
        rendered = field.render(size, regions[one], mode)
        logits, uncertainty = (
            values[0, :, 0].float().cpu().numpy() for values in (rendered.logits, rendered.uncertainty)
        )
        corrected: Sequence[np.ndarray | None] = [None] * len(objects)
        if correct is not None:
            samples = sample_masks(model, embeddings[one], prompts, reshaped, size, regions[one], mode, correct)
            (grey_values,) = processor.image_processor.get_grey_values(image)
            grey_values = sample_pixels(grey_values, size).to(samples.device)
            masks = correct_false_regions(grey_values, samples, model.false_corrector).masks
            corrected = list(masks[0, :, 0].cpu().numpy())
        for prompted, *maps in zip(objects, logits, uncertainty, corrected, strict=True):
            yield prompted, Prediction(*maps)


def _hard_metrics(prompted, mask, metrics, tolerance):
    if unknown := set(metrics) - set(METRIC_GROUPS):
        raise ValueError(f"Expected metrics of {', '.join(METRIC_GROUPS)}, got {', '.join(sorted(unknown))}.")
    values = overlap_metrics(mask, prompted.target) if "overlap" in metrics else {}
    if "surface" in metrics:
        values |= surface_metrics(mask, prompted.target, prompted.pixel, tolerance)
    return values
