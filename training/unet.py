"""A baseline: MONAI's U-Net, with the box as a fourth channel or without a prompt."""

import os
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import SamModel
from transformers.configuration_utils import PreTrainedConfig

from imedsam.configuration.sam_based import INHERITED_KEYS
from imedsam.mask_field import InterpolatedMaskField, MaskField
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.prompt_fusion import Prompts
from imedsam.training.box_mask import box_coverage


@strict
class UNetConfig(PreTrainedConfig):
    """
    Configuration of [`UNetModel`].

    Args:
        image_size (int, defaults to 384):
            Side of the square `pixel_values`.
        box_channel (bool, defaults to True):
            Give the box as a fourth channel; without it the network sees no prompt.
        channels (list[int], defaults to [16, 32, 64, 128, 256]):
            Channels of the levels, each of half the resolution of the one before.
        num_res_units (int, defaults to 2):
            Convolutions per level, with a residual connection around them; 0 is one without.
        id2label (dict[int, str], optional):
            Names of the classes. One class by default.
    """

    model_type = "imedsam_unet"

    image_size: int = 384
    box_channel: bool = True
    channels: list[int] | tuple[int, ...] = (16, 32, 64, 128, 256)
    num_res_units: int = 2

    def __post_init__(self, **kwargs: Any):
        own = {item.name for item in fields(self)} - {item.name for item in fields(PreTrainedConfig)}
        if unknown := sorted(set(kwargs) - INHERITED_KEYS):
            raise TypeError(
                f"Unknown configuration key {unknown[0]!r}: UNetConfig takes {', '.join(sorted(own))} and id2label. "
                "Correct or remove it."
            )
        if self.id2label is None:
            self.id2label = {0: "object"}
        super().__post_init__(**kwargs)
        self.label2id = {str(name): int(index) for index, name in (self.id2label or {}).items()}
        if len(self.channels) < 2 or min(self.channels) < 1 or self.num_res_units < 0:
            raise ValueError(
                "Expected at least 2 positive numbers of channels and num_res_units of at least 0, got "
                f"{list(self.channels)} and {self.num_res_units}."
            )
        stride = 2 ** (len(self.channels) - 1)
        if self.image_size < 2 * stride or self.image_size % stride:
            raise ValueError(
                f"Expected an image_size of {2 * stride} or another multiple of {stride} above it for "
                f"{len(self.channels)} levels, got {self.image_size}: change it, or the number of channels."
            )

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved, always with the classes."""
        return {**super().to_diff_dict(), "id2label": self.id2label}


class UNetModel(IMedSamModel):
    """
    MONAI's `UNet` on `pixel_values`, a class per output channel. It starts from nothing, and its `image_embeddings`
    are the `pixel_values`.

    Of MONAI's U-Nets this is the one of its tutorials, and as large (1.6 M) as what I-MedSAM trains on SAM ViT-B.
    `BasicUNet`, without strides and residual connections, takes five times as long, more than I-MedSAM; `DynUNet`
    leaves its layout to nnU-Net's planning. The instance norms depend on no other image and keep no running
    statistics, which an average of the weights would leave behind.
    """

    config: UNetConfig  # type: ignore[assignment]  # has no SAM
    config_class = UNetConfig  # type: ignore[assignment]

    def __init__(self, config: UNetConfig):
        from monai.networks.nets import UNet

        super(IMedSamModel, self).__init__(config)  # without SAM's parts
        self.frequency_view = self.frequency_branch = self.implicit_decoder = None
        self.network = UNet(
            spatial_dims=2,
            in_channels=4 if config.box_channel else 3,
            out_channels=len(config.id2label or {}),
            channels=config.channels,
            strides=[2] * (len(config.channels) - 1),
            num_res_units=config.num_res_units,
        )
        self.post_init()

    @classmethod
    def from_sam_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, image_size: int | None = None, **kwargs: Any
    ) -> "UNetModel":
        """A new U-Net: nothing is taken from the SAM."""
        size = UNetConfig.image_size if image_size is None else image_size
        return cls(cls.config_class(image_size=size, **kwargs)).eval()

    def get_image_embeddings(self, pixel_values: Tensor, reshaped_input_sizes: Tensor | None = None) -> Tensor:
        self._check_pixel_values(pixel_values)
        return pixel_values.to(self.dtype)

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
        """As of [`IMedSamModel`]. Boxes are the only prompts; without the box's channel every prompt is ignored."""
        prompts = Prompts.check(len(image_embeddings), input_boxes, input_points, input_labels, input_masks)
        self._check_class_labels(class_labels, prompts.shape)
        pictures = image_embeddings.repeat_interleave(prompts.shape[1], dim=0)
        if self.config.box_channel:
            if input_points is not None or input_masks is not None:
                raise ValueError("Expected boxes for a U-Net, got points or masks: prompt it with input_boxes alone.")
            size = self.config.image_size
            whole = pictures.new_tensor([0, 0, size, size]).expand(*prompts.shape, 4)
            channel = box_coverage(whole if input_boxes is None else input_boxes, size, size)
            logits = self.network(torch.cat([pictures, channel.flatten(0, 1)[:, None].to(pictures.dtype)], dim=1))
        else:
            logits = self.network(image_embeddings).repeat_interleave(prompts.shape[1], dim=0)
        if class_labels is not None:
            logits = logits.take_along_dim(class_labels.to(logits.device).reshape(-1, 1, 1, 1), dim=1)
        return InterpolatedMaskField(logits.unflatten(0, prompts.shape))

    def to_sam(self) -> SamModel:
        raise ValueError("Expected a model on a SAM, got a U-Net, of which no part is one.")

    def _parts(self) -> dict[str, list[nn.Parameter]]:
        return {"U-Net": list(self.parameters())}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if reset := getattr(module, "reset_parameters", None):
            reset()  # PyTorch's, which MONAI relies on
