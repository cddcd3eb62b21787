"""Scores of a trained model under changes that need no training, as columns of small numbers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image
from runs import NUM_PHANTOMS, PHANTOM_SIZE, Scoring
from torch import Tensor

from imedsam import IMedSamModel, IMedSamProcessor
from imedsam.image_encoder import resize_positions
from imedsam.mask_field import MaskField
from imedsam.rendering import check_region
from imedsam.tiles import pixel_centres, whole_square
from imedsam.training.data import split_by_class
from imedsam.training.evaluation import evaluate_masks, floor_metrics
from imedsam.training.examples import Examples, load_examples
from imedsam.training.metrics import MetricTable, box_from_mask

OUTSIDE = -20.0  # logit of what is outside for sure
DIGITS = 5


def score(model: IMedSamModel, processor: IMedSamProcessor, examples: Examples, scoring: Scoring) -> dict[str, list]:
    """The metrics of each object in columns, `name` being the first."""
    model, processor = at_input_size(model, processor, scoring.input_size)
    correct = {} if scoring.correct is None else {"correct": scoring.correct}
    with changed_config(model, dict(scoring.config)):
        shown = UpsampledModel(model) if scoring.upsampled else model
        table = evaluate_masks(
            ModelWithinBox(shown) if scoring.within_box else shown,
            processor,
            with_noise(examples, scoring.noise) if scoring.noise else examples,
            output_size=scoring.output_size,
            mode=scoring.mode,
            prompt=scoring.prompt,
            box_jitter=scoring.box_jitter,
            **correct,
        )
    return to_columns(table)


def score_floors(examples: Examples, scoring: Scoring) -> dict[str, dict[str, list]]:
    tables = floor_metrics(examples, output_size=scoring.output_size, box_jitter=scoring.box_jitter)
    return {name: to_columns(table) for name, table in tables.items()}


def open_examples(folder: Path | None, data: str, split: str) -> Examples:
    """Of a prepared folder, or phantoms, which are drawn large."""
    if folder is None:
        return load_examples(data, split, num_images=NUM_PHANTOMS, image_size=PHANTOM_SIZE)
    return load_examples(str(folder), split)


def with_noise(examples: Examples, noise: float) -> Examples:
    """The examples, with noise on their images: see `add_noise`. The seed is the image's index."""
    return Examples(NoisySource(examples.source, noise), examples.names, examples.labels, examples.groups)


@dataclass
class NoisySource:
    source: Any
    noise: float

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        image, mask = self.source[index]
        return add_noise(image, self.noise, index), mask


def add_noise(image: Image.Image, noise: float, seed: int) -> Image.Image:
    """Gaussian noise of standard deviation 255 `noise` on an image of 8 bits, rounded and clipped to its range."""
    if image.mode not in ("L", "RGB"):
        raise ValueError(f'Expected images of 8 bits ("L" or "RGB"), got {image.mode!r}: score them without noise.')
    pixels = np.asarray(image, dtype=np.float64)
    noisy = pixels + 255 * noise * np.random.default_rng(seed).standard_normal(pixels.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def load_trained(folder: Path, method: str) -> tuple[IMedSamModel, IMedSamProcessor]:
    """A run's model, on the device that Accelerate chooses, with LoRA merged into the encoder."""
    if method == "imedsam":
        model = IMedSamModel.from_pretrained(folder)
    else:
        from imedsam.training.baselines import load_model

        model = load_model(folder)
    model.to(PartialState().device)
    model.merge_and_unload()
    return model.eval(), IMedSamProcessor.from_pretrained(folder)


@contextmanager
def changed_config(model: IMedSamModel, values: dict) -> Iterator[None]:
    """The model with another uncertainty or selection; selection=None is the coarse field alone."""
    before = {key: getattr(model.config, key) for key in values}
    coarse_alone = "selection" in values and values["selection"] is None
    fine = model.implicit_decoder.fine if coarse_alone else None
    try:
        for key, value in values.items():
            setattr(model.config, key, value)
        if coarse_alone:
            model.implicit_decoder.fine = None
        yield
    finally:
        for key, value in before.items():
            setattr(model.config, key, value)
        if coarse_alone:
            model.implicit_decoder.fine = fine


def at_input_size(
    model: IMedSamModel, processor: IMedSamProcessor, size: int | None
) -> tuple[IMedSamModel, IMedSamProcessor]:
    """
    The model, its LoRA merged, and its processor for a square of another side; the positions are interpolated, as from
    SAM's 1024.
    """
    if size is None or size == model.config.image_size:
        return model, processor
    config = deepcopy(model.config)
    for part in (config.sam_config.vision_config, config.sam_config.prompt_encoder_config):
        part.image_size = size
    config.sam_config.prompt_encoder_config.image_embedding_size = size // config.patch_size
    smaller = type(model)(config).to(model.device)
    smaller.load_state_dict(resize_positions(model.state_dict(), config.sam_config.vision_config))
    image_processor = copy(processor.image_processor)
    image_processor.size = {"height": size, "width": size}
    return smaller.eval(), IMedSamProcessor(image_processor)


class UpsampledModel:
    """
    What an implicit decoder has to beat: a model whose masks are rendered on its own square, and whose logits there
    are interpolated bilinearly, at pixel centres, at whatever size is asked for.
    """

    def __init__(self, model: IMedSamModel):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def get_mask_field(self, *args, **kwargs) -> "UpsampledField":
        return UpsampledField(self.model.get_mask_field(*args, **kwargs), self.model.config.image_size)


class UpsampledField:
    def __init__(self, field, side: int):
        self.field, self.side = field, side

    def render(self, output_size, region: Tensor | None = None, mode: str | None = None):
        whole = self.field.render((self.side, self.side), None, mode)
        rendered = copy(whole)
        for name in ("logits", "uncertainty"):
            values = getattr(whole, name)
            setattr(rendered, name, crop_and_resize(values, output_size, region))
        return rendered


def crop_and_resize(values: Tensor, size: tuple[int, int], region: Tensor | None) -> Tensor:
    """Maps (B, P, M, S, S) over the square [-1, 1]^2 at the pixel centres of a grid over a rectangle of it, (B, 4)."""
    maps = values.flatten(1, 2)
    square = whole_square(len(maps), maps.device) if region is None else region.expand(len(maps), 4)
    grid = pixel_centres(size, square.to(maps)).unflatten(1, tuple(size))
    resized = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return resized.unflatten(1, values.shape[1:3])


class ModelWithinBox:
    """What a box is worth as a limit: a model whose masks end at the prompt's box."""

    def __init__(self, model: IMedSamModel):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def get_mask_field(self, *args, input_boxes: Tensor, **kwargs) -> "FieldWithinBox":
        field = self.model.get_mask_field(*args, input_boxes=input_boxes, **kwargs)
        return FieldWithinBox(field, 2 * input_boxes / self.model.config.image_size - 1)


class FieldWithinBox:
    def __init__(self, field, boxes: Tensor):
        self.field, self.boxes = field, boxes  # (B, P, 4), in [-1, 1]

    def render(self, output_size, region: Tensor | None = None, mode: str | None = None):
        rendered = copy(self.field.render(output_size, region, mode))
        square = check_region(region, self.field)
        centres = pixel_centres(output_size, square)[:, None]  # (B, 1, H W, 2)
        low, high = self.boxes[:, :, None].to(centres).split(2, dim=-1)
        inside = ((centres >= low) & (centres <= high)).all(dim=-1).unflatten(-1, tuple(output_size))[:, :, None]
        rendered.logits = torch.where(inside, rendered.logits, OUTSIDE)
        rendered.uncertainty = torch.where(inside, rendered.uncertainty, 0.0)
        return rendered


def field_of(model: IMedSamModel, processor: IMedSamProcessor, example: dict) -> tuple[MaskField, Tensor, np.ndarray]:
    """
    The field of an image and the exact box of its object (of its first class), the region of the square that the image
    fills, and the object's mask.
    """
    (index, *_), (target, *_) = split_by_class(example["mask"])
    boxes = [[list(map(float, box_from_mask(target)))]]
    inputs = processor(images=[example["image"]], input_boxes=boxes, return_tensors="pt").to(model.device)
    sizes = inputs["reshaped_input_sizes"]
    embeddings = model.get_image_embeddings(inputs["pixel_values"], sizes)
    labels = torch.tensor([[index]], device=model.device)
    field = model.get_mask_field(
        embeddings, input_boxes=inputs["input_boxes"], class_labels=labels, reshaped_input_sizes=sizes
    )
    return field, processor.get_image_regions(inputs["original_sizes"], sizes), target


def to_columns(table: MetricTable) -> dict[str, list]:
    """Rows turned to columns, with few digits; None where a metric has no value."""
    keys = list(table.rows[0])
    return {key: [_shorten(row[key]) for row in table.rows] for key in keys}


def _shorten(value):
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
