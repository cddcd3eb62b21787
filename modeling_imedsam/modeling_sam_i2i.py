"""SAM-I2I: translation between MR contrasts on SAM 2's Hiera (arXiv:2411.12755)."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import ImageSuperResolutionOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from imedsam.backbones import PlainBackbone, SimplePyramid, load_backbone, make_backbone
from imedsam.configuration.configuration_sam_i2i import SamI2IConfig
from imedsam.mask_unit_decoder import MaskUnitDecoder
from imedsam.sam_checkpoints import FINDING_KEYS


class SamI2IModel(PreTrainedModel):
    """
    A frozen backbone of four stages, and a decoder of mask unit attention that makes one slice of the target contrast
    out of them. The adversary of its training ([`~imedsam.training.discriminator`]) is no part of it.

    The paper has no public code; ours are the size of the backbone's input, how two stages are fused, and the head's
    kernel of 3 x 3.
    """

    config_class = SamI2IConfig
    config: SamI2IConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: SamI2IConfig):
        super().__init__(config)
        self.backbone = make_backbone(config.backbone_config)
        plain = isinstance(self.backbone, PlainBackbone)
        self.pyramid = SimplePyramid(self.backbone.channels[0]) if plain else None
        channels = self.backbone.channels if self.pyramid is None else self.pyramid.channels
        self.decoder = MaskUnitDecoder(config, channels)
        self.post_init()
        self.train()

    @classmethod
    def from_backbone_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> SamI2IModel:
        """
        Starts from the backbone of a checkpoint; the decoder is new.

        Args:
            pretrained_model_name_or_path: Hub name or folder of a `Sam2Model` (`facebook/sam2.1-hiera-tiny`), of a
                `SamModel`, or of a model that `AutoBackbone` takes.
            kwargs: values of the configuration ([`SamI2IConfig`]), and what `from_pretrained` takes to find files
                (`revision`, `token`, `cache_dir`, `local_files_only`, ...).
        """
        finding = {key: kwargs.pop(key) for key in list(kwargs) if key in FINDING_KEYS}
        backbone_config, weights = load_backbone(str(pretrained_model_name_or_path), **finding)
        model = cls(SamI2IConfig(backbone_config=backbone_config, **kwargs))
        model.backbone.load_state_dict(weights)
        return model.eval()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageSuperResolutionOutput:
        """
        Args:
            pixel_values: (B, 3, H, W), normalised; H and W are multiples of `config.size_divisor`.
            labels: (B, 1, H, W), the target contrast in [0, 1].

        Returns:
            `reconstruction` (B, 1, H, W) in [0, 1], and with labels `loss`, its mean absolute difference to them; both
            float32, as half precision would round what they are compared by.

        Raises:
            ValueError: tensors of another shape.
        """
        self._check_shapes(pixel_values, labels)
        size = pixel_values.shape[-2:]
        pictures = F.interpolate(pixel_values.to(self.dtype), scale_factor=self.config.upsampling, mode="bilinear")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_backbone):
            stages = self.backbone(pictures)
        if self.pyramid is not None:
            stages = self.pyramid(stages)
        reconstruction = self.decoder(stages, size).float().sigmoid()
        loss = None if labels is None else F.l1_loss(reconstruction, labels.float())
        return ImageSuperResolutionOutput(loss=loss, reconstruction=reconstruction)

    def train(self, mode: bool = True) -> SamI2IModel:
        """A frozen backbone stays in evaluation mode: its batch norms, if it has any, keep their statistics."""
        super().train(mode)
        if not self.config.train_backbone:
            # Frozen here and not when the model is made: loading makes new parameters, and then calls `eval()`.
            self.backbone.requires_grad_(False).eval()
        return self

    def _check_shapes(self, pixel_values: Tensor, labels: Tensor | None) -> None:
        divisor = self.config.size_divisor
        if (
            pixel_values.ndim != 4
            or pixel_values.shape[1] != 3
            or any(side % divisor for side in pixel_values.shape[2:])
        ):
            raise ValueError(
                f"Expected pixel_values of shape (batch, 3, height, width), sides multiples of {divisor}, got "
                f"{tuple(pixel_values.shape)}: SamI2IImageProcessor(size_divisor={divisor}) makes them."
            )
        expected = (len(pixel_values), 1, *pixel_values.shape[2:])
        if labels is not None and labels.shape != expected:
            raise ValueError(f"Expected labels of shape {expected} in [0, 1], got {tuple(labels.shape)}.")
