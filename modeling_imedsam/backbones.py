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
from imedsam.sam_checkpoints import read_config, refuse_damaged

STRIDES = (4, 8, 16, 32)


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
    model_type = read_config(name_or_path, **loading).get("model_type")
    if model_type in ("sam2", "sam2_video"):
        return _read_part(Sam2Model, "vision_encoder.backbone", name_or_path, loading)
    if model_type == "sam":
        return _read_part(SamModel, "vision_encoder", name_or_path, loading)
    try:
        with torch.device("meta"):
            backbone_class = type(AutoBackbone.from_config(AutoConfig.from_pretrained(name_or_path, **loading)))
    except ValueError as error:
        raise ValueError(
            f"Expected a SAM 2, a SAM, or a backbone that transformers' AutoBackbone takes at {name_or_path}, got a "
            f"model of type {model_type!r}."
        ) from error
    # Not that of AutoBackbone, which asks the Hub first and takes no folder.
    config, weights = _read_part(backbone_class, "", name_or_path, loading)
    return config, {f"model.{name}": weight for name, weight in weights.items()}


def _read_part(
    model_class: Any, part: str, path: str, loading: dict[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """Of a submodule of a checkpoint, all of whose weights have to be there: transformers fills others at random."""
    with refuse_damaged(path):
        model, found = model_class.from_pretrained(path, output_loading_info=True, **loading)
    if missing := sorted(name for name in found["missing_keys"] if name.startswith(part)):
        raise ValueError(
            f"Expected all weights of a backbone at {path}, got none of {', '.join(missing[:4])}: copy or download it "
            "again."
        )
    encoder = model.get_submodule(part)
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
        stages = tuple(stage.permute(0, 2, 3, 1) for stage in self.model(pixel_values).feature_maps)
        height, width = pixel_values.shape[-2:]
        expected = [(height // stride, width // stride) for stride in STRIDES]
        if (sizes := [tuple(stage.shape[1:3]) for stage in stages]) != expected:
            raise ValueError(
                f"Expected four stages at strides {STRIDES}, of {expected}, got {sizes} of "
                f"{type(self.model).__name__}: take a backbone of four scales, or SAM's ViT, which gets a pyramid."
            )
        return stages


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
