"""SAM-I2I's decoder: attention inside mask units, which are windows, from coarse features to fine ones."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam2.configuration_sam2 import Sam2HieraDetConfig
from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleBlock

from imedsam.configuration.configuration_sam_i2i import SamI2IConfig


class MaskUnitDecoder(nn.Module):
    """
    Three blocks, each of which fuses what comes from the coarser one with a finer stage, and a convolution.

    Args:
        config: of the model.
        channels: of the stages, from fine to coarse.

    Raises:
        ValueError: channels that cannot be split among the heads.
    """

    def __init__(self, config: SamI2IConfig, channels: Sequence[int]):
        super().__init__()
        coarse_to_fine = list(channels)[::-1]
        if any(width % heads for width, heads in zip(coarse_to_fine[1:], config.decoder_heads, strict=True)):
            raise ValueError(
                f"Expected decoder_heads that divide the channels {coarse_to_fine[1:]}, got "
                f"{list(config.decoder_heads)}: choose others for this backbone."
            )
        hiera = Sam2HieraDetConfig(
            embed_dim_per_stage=coarse_to_fine[1:],
            num_attention_heads_per_stage=list(config.decoder_heads),
            window_size_per_stage=list(config.decoder_windows),
            global_attention_blocks=[],
        )
        hiera._attn_implementation = config._attn_implementation
        self.blocks = nn.ModuleList(
            FusionBlock(hiera, index, coarse, fine)
            for index, (coarse, fine) in enumerate(zip(coarse_to_fine[:-1], coarse_to_fine[1:], strict=True))
        )
        self.head = nn.Conv2d(channels[0], 1, 3, padding=1)

    def forward(self, stages: Sequence[Tensor], output_size: Sequence[int]) -> Tensor:
        """
        Args:
            stages: (B, h, w, C) each, from fine to coarse.
            output_size: (H, W) of the image.

        Returns:
            Logits, (B, 1, H, W).
        """
        hidden_states = stages[-1]
        for block, finer in zip(self.blocks, stages[-2::-1], strict=True):
            hidden_states = block(hidden_states, finer)
        return self.head(resize(hidden_states, output_size).permute(0, 3, 1, 2))


class FusionBlock(nn.Module):
    """
    Mask unit attention over two stages together.

    Args:
        config: of Hiera's blocks, one per stage.
        index: of the stage.
        coarse, fine: channels of the coarser stage, and of this one.
    """

    def __init__(self, config: Sam2HieraDetConfig, index: int, coarse: int, fine: int):
        super().__init__()
        self.fuse = nn.Linear(coarse + fine, fine)
        # Not the first block of its stage, which would pool the queries of the one before.
        self.attention = Sam2MultiScaleBlock(config, stage_idx=index, block_idx=1, total_block_idx=index)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """(B, h, w, C'), (B, H, W, C) -> (B, H, W, C)."""
        return self.attention(self.fuse(torch.cat([resize(coarse, fine.shape[1:3]), fine], dim=-1)))


def resize(features: Tensor, size: Sequence[int]) -> Tensor:
    """(B, h, w, C) -> (B, H, W, C), bilinearly."""
    if tuple(features.shape[1:3]) == tuple(size):
        return features
    resized = F.interpolate(features.permute(0, 3, 1, 2), tuple(size), mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1)
