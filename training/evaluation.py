"""Scores of a model on images with masks, and of what the boxes alone are worth."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from imedsam.training.data import collate_prompts, encode, jitter_box, split_by_class
from imedsam.training.examples import Examples
from imedsam.training.metrics import MetricTable, box_from_mask, filled_box, inscribed_ellipse, segmentation_metrics


def evaluate_masks(
    model,
    processor,
    examples: Examples,
    *,
    output_size: int | None = None,
    mode: str | None = "exact",
    box_jitter: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    indices: Sequence[int] | None = None,
    progress: bool = True,
) -> MetricTable:
    """
    Prompts the model with the box of each object and compares the masks; images without an object are left out.

    Args:
        model: an `IMedSamModel`, evaluated in eval mode and left in the mode it was in.
        output_size: side of the square that the image is rendered and the mask sampled at (at pixel centres); by
            default each image's own size.
        mode: of rendering: "exact", "adaptive", or None for the field's default.
        box_jitter: as in training; 0 prompts with the exact boxes.
        seed: of the jitter, which depends on the image's index beside it.
        batch_size: images encoded at once.
        indices: of the examples to evaluate, such as one process's share; all by default.

    Returns:
        A row per object, in the order of the examples, named after the image, and the class if the masks are label
        maps ("name/class").
    """
    table = MetricTable()
    training = model.training
    model.eval()
    indices = range(len(examples)) if indices is None else indices
    with torch.no_grad(), tqdm(total=len(indices), desc="Evaluating", disable=not progress, leave=False) as bar:
        for batch in _batches(indices, batch_size):
            read = [examples[index] for index in batch]
            shown = [(index, example) for index, example in zip(batch, read, strict=True) if example["mask"].any()]
            if shown:
                _evaluate_batch(model, processor, shown, table, examples, output_size, mode, box_jitter, seed)
            bar.update(len(batch))
    model.train(training)
    return table


def floor_metrics(examples: Examples, indices: Sequence[int] | None = None) -> dict[str, MetricTable]:
    """The metrics, at the masks' own size, of the exact box itself and of the ellipse inscribed in it."""
    tables = {"filled box": MetricTable(), "inscribed ellipse": MetricTable()}
    for index in range(len(examples)) if indices is None else indices:
        example = examples[index]
        for row_name, mask in _named_masks(example, examples):
            box = box_from_mask(mask)
            tables["filled box"].add(row_name, segmentation_metrics(filled_box(mask.shape, box), mask))
            tables["inscribed ellipse"].add(row_name, segmentation_metrics(inscribed_ellipse(mask.shape, box), mask))
    return tables


def class_means(table: MetricTable, examples: Examples) -> dict[str, dict[str, float]]:
    """The mean metrics of each class of label maps."""
    means = {}
    for class_name in examples.id2label.values() if examples.labels is not None else ():
        rows = MetricTable()
        rows.rows = [row for row in table.rows if row["name"].endswith(f"/{class_name}")]
        means[class_name] = rows.mean()
    return means


def _evaluate_batch(model, processor, batch, table, examples, output_size, mode, box_jitter, seed):
    items = []
    for index, example in batch:
        rng = np.random.default_rng([seed, index])
        classes, masks = split_by_class(example["mask"])
        boxes = np.stack([jitter_box(box_from_mask(mask), box_jitter, mask.shape, rng) for mask in masks])
        items.append(encode(processor, example["image"], example["mask"].shape, boxes, classes))
    inputs = {key: value.to(model.device) for key, value in collate_prompts(items).items()}
    embeddings = model.get_image_embeddings(
        inputs["pixel_values"], reshaped_input_sizes=inputs["reshaped_input_sizes"]
    )
    regions = processor.get_image_regions(inputs["original_sizes"], inputs["reshaped_input_sizes"])
    for position, (_, example) in enumerate(batch):
        one = slice(position, position + 1)
        prompts = inputs["prompt_attention_mask"][position]
        field = model.get_mask_field(
            embeddings[one],
            input_boxes=inputs["input_boxes"][one, prompts],
            class_labels=inputs["class_labels"][one, prompts],
            reshaped_input_sizes=inputs["reshaped_input_sizes"][one],
        )
        size = example["mask"].shape if output_size is None else (output_size, output_size)
        predictions = (field.render(size, regions[one], mode).logits[0, :, 0] > 0).cpu().numpy()
        for prediction, (row_name, mask) in zip(predictions, _named_masks(example, examples), strict=True):
            table.add(row_name, segmentation_metrics(prediction, sample_mask(mask, size)))


def sample_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) at the pixel centres of a grid of another size over the same image."""
    if tuple(size) == mask.shape:
        return mask
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, mask.shape, strict=True)
    )
    return mask[np.ix_(rows, columns)]


def _named_masks(example, examples) -> Iterator[tuple[str, np.ndarray]]:
    for index, mask in zip(*split_by_class(example["mask"]), strict=True):
        yield example["name"] if examples.labels is None else f"{example['name']}/{examples.id2label[index]}", mask


def _batches(indices, size):
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
