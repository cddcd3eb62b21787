"""SAM, and I-MedSAM on it, with the box as a mask prompt beside its corners."""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.mask_field import MaskField
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.prompt_fusion import Prompts

# SAM takes a mask prompt as logits: these are the logits of 0.999 and, negative, of 0.001, as in micro-sam.
BOX_LOGIT = 6.9


@strict
class BoxMaskConfig(IMedSamConfig):
    """Configuration of [`BoxMaskModel`]."""

    model_type = "imedsam_box_mask"


class BoxMaskModel(IMedSamModel):
    """
    Prompts SAM with each box twice: by its corners, and as a mask prompt of logits `BOX_LOGIT` inside and -`BOX_LOGIT`
    outside, at the resolution that SAM's prompt encoder takes, 4 S / patch. Pixels that the box's edge crosses lie
    between, by the share that is inside. A mask prompt that is given is taken as it is.
    """

    config: BoxMaskConfig  # type: ignore[assignment]  # SAM's base class has its own
    config_class = BoxMaskConfig

    def get_mask_field(
        self,
        image_embeddings: Tensor,
        input_boxes: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_masks: Tensor | None = None,
        class_labels: Tensor | None = None,
        reshaped_input_sizes: Tensor | None = None,
    ) -> MaskField:
        Prompts.check(len(image_embeddings), input_boxes, input_points, input_labels, input_masks)
        if input_boxes is not None and input_masks is None:
            side = 4 * self.config.image_size // self.config.patch_size
            input_masks = BOX_LOGIT * (2 * box_coverage(input_boxes, self.config.image_size, side) - 1)
        return super().get_mask_field(
            image_embeddings, input_boxes, input_points, input_labels, input_masks, class_labels, reshaped_input_sizes
        )


def box_coverage(boxes: Tensor, image_size: int, side: int) -> Tensor:
    """
    The share of each pixel that lies in a box.

    Args:
        boxes: (..., 4), x0, y0, x1, y1 in pixels of a square of side `image_size`.
        side: of the grid over the same square.

    Returns:
        (..., side, side), rows from top to bottom.
    """
    boxes = boxes.float() * side / image_size
    low = torch.arange(side, device=boxes.device)
    x0, y0, x1, y1 = boxes[..., None].unbind(-2)
    columns, rows = ((torch.minimum(b, low + 1) - torch.maximum(a, low)).clamp_min(0) for a, b in ((x0, x1), (y0, y1)))
    return rows[..., :, None] * columns[..., None, :]
