"""Image encoders of four stages, (B, H / 4, W / 4, C1) to (B, H / 32, W / 32, C4), for SAM-I2I."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, Sam2Model, SamModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamLayerNorm, SamVisionEncoder
from transformers.models.sam2.configuration_sam2 import Sam2HieraDetConfig
from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModel

from imedsam.configuration.configuration_sam_i2i import NUM_STAGES


def make_backbone(config: PreTrainedConfig) -> "HieraBackbone | PlainBackbone | StagedBackbone":
    """A new backbone, whose weights are random."""
    if isinstance(config, Sam2HieraDetConfig):
        return HieraBackbone(config)
    if isinstance(config, SamVisionConfig):
        return PlainBackbone(config)
    return StagedBackbone(AutoBackbone.from_config(config))


def load_backbone(name_or_path: str, **loading: Any) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """
    The configuration and the weights of a checkpoint's backbone.

    Args:
        name_or_path: Hub name or folder of a `Sam2Model`, a `SamModel`, or a model that `AutoBackbone` takes.
        loading: what `from_pretrained` takes to find files.
    """
    config = AutoConfig.from_pretrained(name_or_path, **loading)
    if config.model_type in ("sam2", "sam2_video"):
        encoder = Sam2Model.from_pretrained(name_or_path, **loading).vision_encoder.backbone
    elif config.model_type == "sam":
        encoder = SamModel.from_pretrained(name_or_path, **loading).vision_encoder
    else:
        with torch.device("meta"):
            backbone_class = type(AutoBackbone.from_config(config))
        # Not that of AutoBackbone, which asks the Hub first and takes no folder.
        encoder = backbone_class.from_pretrained(name_or_path, **loading)
        return encoder.config, {f"model.{name}": weight for name, weight in encoder.state_dict().items()}
    return encoder.config, encoder.state_dict()


class HieraBackbone(Sam2HieraDetModel):
    """SAM 2's Hiera."""

    @property
    def channels(self) -> list[int]:
        return list(self.config.embed_dim_per_stage or ())

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> four stages, (B, H / 4, W / 4, C1) to (B, H / 32, W / 32, C4)."""
        return super().forward(pixel_values).intermediate_hidden_states


class StagedBackbone(nn.Module):
    """A backbone of `AutoBackbone` that gives four stages."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        if len(model.channels) != NUM_STAGES:
            raise ValueError(
                f"Expected a backbone of four stages, got {len(model.channels)} of {type(model).__name__}: name four "
                "in the out_features of its configuration."
            )

    @property
    def channels(self) -> list[int]:
        return self.model.channels

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(stage.permute(0, 2, 3, 1) for stage in self.model(pixel_values).feature_maps)


class PlainBackbone(SamVisionEncoder):
    """SAM's ViT at any size: positions are interpolated. Its one stage, at stride 16, needs a [`SimplePyramid`]."""

    @property
    def channels(self) -> list[int]:
        return [self.config.output_channels]

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> one stage, (B, H / 16, W / 16, C)."""
        tokens = self.patch_embed.projection(pixel_values)
        if self.pos_embed is not None:
            positions = self.pos_embed.permute(0, 3, 1, 2)
            tokens = tokens + F.interpolate(positions, tokens.shape[-2:], mode="bilinear", align_corners=False)
        hidden_states = tokens.permute(0, 2, 3, 1)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return (self.neck(hidden_states).permute(0, 2, 3, 1),)


class SimplePyramid(nn.Module):
    """
    Four stages out of a plain ViT's one: deconvolutions for the finer two, pooling for the coarsest (ViTDet, Li et
    al., 2022).
    """

    def __init__(self, width: int):
        super().__init__()
        self.channels = [width // 4, width // 2, width, width]
        self.to_stride_8 = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
        self.to_stride_4 = nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, 2, stride=2),
            SamLayerNorm(width // 2, data_format="channels_first"),
            nn.GELU(),
            nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
        )

    def forward(self, stages: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        features = stages[0].permute(0, 3, 1, 2)
        pyramid = (self.to_stride_4(features), self.to_stride_8(features), features, F.max_pool2d(features, 2))
        return tuple(stage.permute(0, 2, 3, 1) for stage in pyramid)
