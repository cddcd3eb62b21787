"""SAM's image encoder with the frequency branch beside it."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from imedsam.lora import SplitProjection


class IMedSamVisionEncoder(SamVisionEncoder):
    """SAM's ViT. Takes what a side branch adds to each block; each attention's query, key and value are apart."""

    def __init__(self, config: SamVisionConfig):
        super().__init__(config)
        for layer in self.layers:
            layer.attn.qkv = SplitProjection(config.hidden_size, bias=config.qkv_bias)  # type: ignore[union-attr]
        self.post_init()

    def embed(self, pictures: Tensor) -> Tensor:
        """(B, 3, S, S) -> tokens (B, S / patch, S / patch, C), with their positions."""
        tokens = self.patch_embed(pictures)
        return tokens if self.pos_embed is None else tokens + self.pos_embed

    def forward(self, pixel_values: Tensor, injections: Sequence[Tensor] | None = None) -> Tensor:
        """
        Args:
            pixel_values: (B, 3, S, S).
            injections: what to add to the output of each block, (B, S / patch, S / patch, C) each.

        Returns:
            Image embeddings, (B, 256, S / patch, S / patch).
        """
        hidden_states = self.embed(pixel_values)
        for index, block in enumerate(self.layers):
            hidden_states = block(hidden_states)
            if injections is not None:
                hidden_states = hidden_states + injections[index]
        return self.neck(hidden_states)


def resize_positions(state_dict: dict[str, Tensor], config: SamVisionConfig) -> dict[str, Tensor]:
    """
    Fits a SAM checkpoint's positions to another image size: the position embedding, bilinearly, and the relative
    positions of the blocks with global attention, linearly. Those of windowed blocks depend on the window alone.

    Args:
        state_dict: of a `SamModel`, at any image size.
        config: the size to fit to, and which blocks are global.
    """
    side = config.image_size // config.patch_size  # type: ignore[operator]  # IMedSamConfig holds them to integers
    resized = dict(state_dict)
    key = "vision_encoder.pos_embed"
    if key in resized and resized[key].shape[1] != side:
        grid = resized[key].permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
        resized[key] = grid.permute(0, 2, 3, 1).to(state_dict[key].dtype)
    global_blocks = config.global_attn_indexes if config.window_size > 0 else range(config.num_hidden_layers)
    for index in global_blocks:
        for axis in "hw":
            key = f"vision_encoder.layers.{index}.attn.rel_pos_{axis}"
            if key in resized and resized[key].shape[0] != 2 * side - 1:
                offsets = resized[key].T[None].float()
                offsets = F.interpolate(offsets, 2 * side - 1, mode="linear", align_corners=False)
                resized[key] = offsets[0].T.to(state_dict[key].dtype)
    return resized
