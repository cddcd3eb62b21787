"""SF-RecSAM: SAM for breast ultrasound, whose image encoder is fused with spatial and frequency features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import SamModel

from imedsam.configuration.configuration_sf_recsam import SFRecSamConfig
from imedsam.configuration.false_corrector import FalseCorrectorConfig
from imedsam.false_corrector import sample_prompts
from imedsam.frequency import FrequencyView
from imedsam.learned_corrector import LearnedCorrector
from imedsam.mask_field import InterpolatedMaskField, MaskField
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.spatial_frequency_encoder import SpatialFrequencyEncoder

if TYPE_CHECKING:
    from typing_extensions import Self


class SFRecSamModel(IMedSamModel):
    """
    SF-RecSAM (ECCV 2024) as an [`IMedSamModel`] to its callers: prompts, output and training are the same, the masks
    are those of SAM's decoder. What is trained is the fusion of the image encoder, its adapters and positions; SAM's
    own layers, prompt encoder and mask decoder are frozen (the last unless `train_mask_decoder`). What is trained
    leaves SAM's layers as they are at first: with `overlapping_patches=False` a new model is exactly the SAM that it
    is put on, and with them the same SAM on four times as many tokens.
    """

    config: SFRecSamConfig  # type: ignore[assignment]  # SAM's base class has its own
    config_class = SFRecSamConfig  # type: ignore[assignment]
    base_model_prefix = "sf_recsam"
    own_parts = r"learned_corrector|vision_encoder\.(stem|token_adapter|layers\.\d+\.(adapter|cross|spectral|side))"
    part_patterns = [
        ("learned corrector", r"learned_corrector\."),
        ("positions", r"vision_encoder\.pos_embed"),
        ("convolutional branch", r"vision_encoder\.(stem|layers\.\d+\.side_(conv|norm))\."),
        ("cross attention", r"vision_encoder\.layers\.\d+\.cross_attention\."),
        ("spectral filter", r"vision_encoder\.layers\.\d+\.spectral_filter\."),
        ("adapters", r"vision_encoder\.(token_adapter|layers\.\d+\.adapter)\."),
        ("upscaling", r"mask_decoder\.upscale"),
        ("mask head", r"mask_decoder\.output_hypernetworks_mlps\.0\."),
        # Without SAM's heads for three masks and their scores, which are not used.
        ("mask decoder", r"mask_decoder\.(?!output_hypernetworks_mlps|iou_prediction_head)"),
    ]
    # 0.8 Dice + 0.2 cross entropy, in which an object's pixel counts twice.
    dice_share, positive_weight = 0.8, 2.0

    def __init__(self, config: SFRecSamConfig):
        super().__init__(config)  # type: ignore[arg-type]  # has all that is asked of it
        self.learned_corrector: LearnedCorrector | None = None
        if config.learned_corrector:
            self.add_corrector()

    @property
    def false_corrector(self) -> FalseCorrectorConfig:  # type: ignore[override]
        return self.config.false_corrector

    def add_corrector(self) -> None:
        """
        Adds a new learned corrector, which alone is trained from then on: the second stage of a training.

        Raises:
            ValueError: there is one.
        """
        if self.learned_corrector is not None:
            raise ValueError("Expected a model without a learned corrector, got one with: train that on.")
        self.config.learned_corrector = True
        self.learned_corrector = LearnedCorrector(self.config).to(self.device, self.dtype)
        self.learned_corrector.apply(self._init_weights)
        self.set_trainable()

    def train(self, mode: bool = True) -> Self:
        """With a learned corrector that one alone: what is frozen keeps its statistics too."""
        super().train(mode and self.learned_corrector is None)
        if self.learned_corrector is not None:
            self.learned_corrector.train(mode)
        return self

    def get_image_embeddings(self, pixel_values: Tensor, reshaped_input_sizes: Tensor | None = None) -> Tensor:
        self._check_pixel_values(pixel_values)
        picture = None
        if self.frequency_view is not None:
            picture = self.frequency_view(pixel_values, reshaped_input_sizes).to(self.dtype)
        return self.vision_encoder(pixel_values.to(self.dtype), picture)

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
        """As of [`IMedSamModel`]. Without boxes and points, which it varies, a learned corrector is idle."""
        given = {
            "input_boxes": input_boxes,
            "input_points": input_points,
            "input_labels": input_labels,
            "input_masks": input_masks,
        }
        bind: Any = super().get_mask_field
        field = bind(image_embeddings, **given, class_labels=class_labels)
        if self.learned_corrector is None or (input_boxes is None and input_points is None):
            return field
        size = self.config.image_size
        if reshaped_input_sizes is None:
            reshaped_input_sizes = torch.full((len(image_embeddings), 2), size, device=image_embeddings.device)
        samples = sample_prompts(
            lambda varied: bind(image_embeddings, **varied).logits,
            {name: prompt for name, prompt in given.items() if prompt is not None},
            field,
            self.false_corrector,
            size,
            reshaped_input_sizes,
        )
        inside = self._inside(reshaped_input_sizes, field).repeat_interleave(field.num_prompts, dim=0)
        logits = self.learned_corrector(field.logits.flatten(0, 1), field.features, samples.flatten(1, 2), inside)
        return InterpolatedMaskField(logits.unflatten(0, field.logits.shape[:2]))

    def _inside(self, reshaped_input_sizes: Tensor, field: InterpolatedMaskField) -> Tensor:
        """Where a field's grid is of the image and not of the padding, (B, 1, H, W)."""
        side = field.logits.shape[-1]
        centres = (torch.arange(side, device=field.device) + 0.5) * self.config.image_size / side
        rows, columns = (centres < sizes[:, None] for sizes in reshaped_input_sizes.to(field.device).unbind(-1))
        return (rows[:, :, None] & columns[:, None])[:, None]

    def to_sam(self) -> SamModel:
        raise ValueError("Expected a model whose image encoder is SAM's, got SF-RecSAM's, which no SamModel has.")

    def _add_own_parts(self, config: Any) -> None:
        sees_frequencies = config.fusion in ("frequency", "spatial_frequency")
        self.frequency_view = FrequencyView("haar", log=False) if sees_frequencies else None
        self.frequency_branch = self.implicit_decoder = None

    def _make_vision_encoder(self, config: Any) -> Any:
        return SpatialFrequencyEncoder(config)

    def _parts(self) -> dict[str, list[nn.Parameter]]:
        parts = super()._parts()
        if self.config.learned_corrector:
            return {"learned corrector": parts["learned corrector"]}
        frozen = () if self.config.trains_mask_decoder else ("upscaling", "mask head")
        return {name: part for name, part in parts.items() if name not in frozen}
