"""Image in, masks of the image's own size out: what every front end is written on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from imedsam.contours import Contour, find_contours
from imedsam.false_corrector import SampleKind, correct_false_regions, sample_masks
from imedsam.mask_field import InterpolatedMaskField
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.processing.image_processing_imedsam import sample_pixels
from imedsam.processing.processing_imedsam import IMedSamProcessor
from imedsam.sam_checkpoints import only_finding


@dataclass
class Segmentation:
    """
    P prompts with M masks each, on the image's pixels or on the grid that was asked for.

    Args:
        masks: (P, M, H, W), bool.
        logits: (P, M, H, W), float32; a mask is where its logits are positive, unless it was corrected. Logits,
            uncertainty and scores are of the masks before that.
        uncertainty: (P, M, H, W), float32, variance of the probability, at most 0.25.
        scores: (P, M), float32, the Dice that each mask is expected to have by its own probabilities.
        contours: for each prompt and mask its components, the largest first, in the image's pixels whatever the grid;
            None unless asked for.
    """

    masks: np.ndarray
    logits: np.ndarray
    uncertainty: np.ndarray
    scores: np.ndarray
    contours: list[list[list[Contour]]] | None = None


class IMedSamPipeline:
    """
    Encodes an image once and answers prompts on it. Prompts are in the image's pixels, (0, 0) being the upper left
    corner of the upper left pixel, as in the processor.

    ```python
    pipeline = IMedSamPipeline.from_pretrained("outputs/demo")
    pipeline.set_image(image)
    segmentation = pipeline.predict(input_boxes=[[30, 40, 120, 160]])
    ```

    For interactive work, `add_box` and `add_point` refine one object, and `undo` takes the last of them back.
    """

    def __init__(self, model: IMedSamModel, processor: IMedSamProcessor):
        self.model, self.processor = model.eval(), processor
        self._image: dict[str, torch.Tensor] | None = None
        self._source: tuple[Any, tuple[float, float] | None] = None, None  # of what is encoded
        self._history: list[tuple[str, tuple[float, ...]]] = []

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        device: str | torch.device = "cpu",
        model_class: type[IMedSamModel] = IMedSamModel,
        **kwargs: Any,
    ) -> IMedSamPipeline:
        """
        Loads a model and its processor. In float32, LoRA is merged into the encoder: the same function without its
        price, and without adapters to switch. In half precision it is not, where a small update would drown in the
        rounding of the weights. Convolutions get their weights in channels-last order, which is faster on CPUs.

        Args:
            pretrained_model_name_or_path: Hub name or folder with a model and its processor.
            device: where to run.
            model_class: of the model, if it is a subclass.
            kwargs: of `IMedSamModel.from_pretrained`.
        """
        model = model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        model.to(torch.device(device))  # type: ignore[arg-type]  # transformers wraps it as a plain function
        if model.dtype == torch.float32:
            model.merge_and_unload()
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        finding = only_finding(kwargs)
        return cls(model, IMedSamProcessor.from_pretrained(pretrained_model_name_or_path, **finding))

    def __call__(self, image: Any, window: tuple[float, float] | None = None, **prompts: Any) -> Segmentation:
        """`set_image` and `predict`."""
        self.set_image(image, window)
        return self.predict(**prompts)

    @torch.inference_mode()
    def set_image(self, image: Any, window: tuple[float, float] | None = None) -> None:
        """
        Encodes an image; what was prompted on another one is forgotten.

        Args:
            image: what the image processor takes: PIL, numpy or torch; grey, RGB or RGBA. A photograph is taken as its
                pixels are stored: `PIL.ImageOps.exif_transpose` turns it as viewers show it.
            window: (low, high) of the intensities to see, for 16-bit and float images.
        """
        images_kwargs: dict[str, Any] = {} if window is None else {"window": window}
        inputs = self.processor(image, **images_kwargs)
        if len(inputs["pixel_values"]) != 1:
            raise ValueError(
                f"Expected one image, got {len(inputs['pixel_values'])}: call the pipeline once for each of them."
            )
        sizes = {key: inputs[key] for key in ("original_sizes", "reshaped_input_sizes")}
        embeddings = self.model.get_image_embeddings(
            inputs["pixel_values"].to(self.model.device), sizes["reshaped_input_sizes"]
        )
        self._image = {"image_embeddings": embeddings, **sizes}
        self._source = image, window
        self._history = []

    @torch.inference_mode()
    def predict(
        self,
        input_boxes: Any = None,
        input_points: Any = None,
        input_labels: Any = None,
        input_masks: Any = None,
        class_labels: Any = None,
        output_size: Sequence[int] | None = None,
        region: Sequence[float] | None = None,
        mode: str | None = None,
        contours: bool = False,
        correct: SampleKind | None = None,
    ) -> Segmentation:
        """
        Args:
            input_boxes: boxes (x0, y0, x1, y1), or one.
            input_points: per prompt its points (x, y).
            input_labels: per prompt and point 1 (inside) or 0 (outside).
            input_masks: per prompt a mask of the image's size.
            class_labels: per prompt the index of its class; all classes by default.
            output_size: (height, width) of the masks; by default that of the region in pixels of the image, rounded.
            region: the rectangle (x0, y0, x1, y1) of the image that the masks show, and scores are of; all of it by
                default.
            mode: "exact" or "adaptive", see [`~imedsam.rendering.render`]; adaptive by default where that is of use.
            contours: whether to find the masks' outlines too.
            correct: corrects the masks by the image's brightness where the mean of samples is uncertain, see
                [`~imedsam.false_corrector.correct_false_regions`]; with samples by "prompts" like those given or by
                "dropout", see [`~imedsam.false_corrector.sample_masks`]. Contours then lie half way between pixels.
        """
        image = self._require_image()
        prompts = self.processor.process_prompts(
            image["original_sizes"],
            image["reshaped_input_sizes"],
            input_boxes=input_boxes,
            input_points=input_points,
            input_labels=input_labels,
            input_masks=input_masks,
            class_labels=class_labels,
        )
        prompts.pop("prompt_attention_mask", None)
        prompts = {name: prompt.to(self.model.device) for name, prompt in prompts.items()}
        field = self.model.get_mask_field(
            image["image_embeddings"], **prompts, reshaped_input_sizes=image["reshaped_input_sizes"]
        )
        (x0, y0, x1, y1), square = self._resolve_region(region)
        width, height = x1 - x0, y1 - y0
        if output_size is None:
            output_size = max(1, round(height)), max(1, round(width))
        rendered = field.render(output_size, square, mode)
        masks, outlines = rendered.logits > 0, None
        if correct is not None:
            samples = sample_masks(
                self.model,
                image["image_embeddings"],
                prompts,
                image["reshaped_input_sizes"],
                output_size,
                square,
                mode,
                correct,
            )
            (grey_values,) = self.processor.image_processor.get_grey_values(*self._source)
            grey_values = sample_pixels(grey_values, output_size, (x0, y0, x1, y1))
            masks = correct_false_regions(grey_values.to(samples.device), samples, self.model.false_corrector).masks
        if contours:
            pixel = width / output_size[1], height / output_size[0]
            if correct is None:
                (outlines,) = find_contours(field, output_size, square, pixel, rendered, origin=(x0, y0))
            else:
                corrected = InterpolatedMaskField(2 * masks.float() - 1)
                (outlines,) = find_contours(corrected, output_size, spacing=pixel, origin=(x0, y0))
        logits, uncertainty, scores = (
            values[0].cpu().numpy() for values in (rendered.logits, rendered.uncertainty, rendered.scores)
        )
        return Segmentation(masks[0].cpu().numpy(), logits, uncertainty, scores, outlines)

    def add_box(self, box: Sequence[float]) -> Segmentation:
        """Prompts the object with a box (x0, y0, x1, y1), instead of an earlier box."""
        return self._add(("box", tuple(box)))

    def add_point(self, point: Sequence[float], label: int = 1) -> Segmentation:
        """Adds a point (x, y) to the object's prompts: 1 says inside, 0 outside."""
        return self._add(("point", (*point, label)))

    def undo(self) -> Segmentation | None:
        """Takes the last `add_box` or `add_point` back; None if no prompt is left."""
        if not self._history:
            raise ValueError("Expected a prompt to undo, got none: use add_box or add_point first.")
        self._history.pop()
        return self._predict_history() if self._history else None

    def _add(self, prompt: tuple[str, tuple[float, ...]]) -> Segmentation:
        self._require_image()
        self._history.append(prompt)
        try:
            return self._predict_history()
        except ValueError:
            self._history.pop()
            raise

    def _predict_history(self) -> Segmentation:
        boxes = [list(values) for kind, values in self._history if kind == "box"]
        points = [values for kind, values in self._history if kind == "point"]
        return self.predict(
            input_boxes=[boxes[-1:]] if boxes else None,
            input_points=[[[list(point[:2]) for point in points]]] if points else None,
            input_labels=[[[int(point[2]) for point in points]]] if points else None,
        )

    def _resolve_region(self, region: Sequence[float] | None) -> tuple[list[float], torch.Tensor]:
        """A rectangle in the image's pixels, by default all of it, as it is and in the model's coordinates, (4,)."""
        image = self._require_image()
        height, width = image["original_sizes"][0].tolist()
        edges = [0.0, 0.0, width, height] if region is None else _read_numbers(region)
        if len(edges) != 4 or not (0 <= edges[0] < edges[2] <= width and 0 <= edges[1] < edges[3] <= height):
            raise ValueError(
                "Expected region as four numbers x0, y0, x1, y1 with x0 < x1 and y0 < y1 within the image, which is "
                f"{width} pixels wide and {height} high, got {region}: give pixels of the image as it was passed."
            )
        whole = self.processor.get_image_regions(image["original_sizes"], image["reshaped_input_sizes"])[0].double()
        shares = torch.tensor(edges, dtype=torch.float64) / torch.tensor([width, height, width, height])
        return edges, whole[:2].tile(2) + (whole[2:] - whole[:2]).tile(2) * shares

    def _require_image(self) -> dict[str, torch.Tensor]:
        if self._image is None:
            raise ValueError("Expected an image to prompt on, got none: call set_image(image) first.")
        return self._image


def _read_numbers(values: Any) -> list[float]:
    """None of them if they are not numbers in a row."""
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        return []
    return array.astype(float).tolist() if array.ndim == 1 and array.dtype.kind in "iuf" else []
