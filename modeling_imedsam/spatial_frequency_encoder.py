"""
SF-RecSAM's image encoder: SAM's ViT with adapters, fused with a convolutional branch on the image and its
high-frequency image, or with its own features after a learnable spectral filter.

After a description of the authors' code (github.com/dodooo1/SFRecSAM), and a review of the paper for the spectral
filter. Ours: every injection starts at 0, so that training starts at SAM; positions are trained themselves instead of
through a convolution of them, which is a constant in the end; the first convolutions are trained, which stay at random
there; image and high-frequency image go through the shared convolutions as one batch, whose statistics are then those
that batch normalisation keeps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.sam.modeling_sam import SamLayerNorm, SamVisionLayer

from imedsam.bottleneck import Bottleneck
from imedsam.configuration.configuration_sf_recsam import SFRecSamConfig
from imedsam.image_encoder import IMedSamVisionEncoder
from imedsam.layers import HiddenConvolution, ZeroLayerNorm, ZeroLinear, init_layer
from imedsam.lora import SplitProjection

STEM_WIDTH = 64


class SpatialFrequencyEncoder(IMedSamVisionEncoder):
    """SAM's ViT with adapters, whose fusing layers attend to a side branch."""

    def __init__(self, config: SFRecSamConfig):
        vision = config.sam_config.vision_config
        super().__init__(vision)
        self.reads_image, self.side_scale = config.fusion != "frequency", config.side_scale
        if config.overlapping_patches:
            channels, width, patch = vision.num_channels, vision.hidden_size, vision.patch_size
            self.patch_embed.projection = nn.Conv2d(channels, width, 2 * patch, stride=patch)
        self.token_adapter = Bottleneck(vision.hidden_size, config.adapter_width, zero=True)
        self.stem: ConvolutionalStem | None = None
        if config.fusion in ("spatial", "frequency", "spatial_frequency"):
            self.stem = ConvolutionalStem(vision.hidden_size, vision.patch_size)
        for index in config.fused_layers:
            self.layers[index] = FusionLayer(config, last=index == config.fused_layers[-1])
        self.post_init()

    def embed(self, pictures: Tensor) -> Tensor:
        """(B, 3, S, S) -> tokens (B, S / patch, S / patch, C), with their positions."""
        projection = self.patch_embed.projection
        if overlap := projection.kernel_size[0] - projection.stride[0]:
            pictures = F.interpolate(pictures, [side + overlap for side in pictures.shape[-2:]], mode="bilinear")
        tokens = projection(pictures).permute(0, 2, 3, 1)
        tokens = tokens if self.pos_embed is None else tokens + self.pos_embed
        return tokens + self.token_adapter(tokens)

    def forward(self, pixel_values: Tensor, frequency_picture: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """
        Args:
            pixel_values: (B, 3, S, S).
            frequency_picture: (B, 3, S, S), for the side branch, if it is to see one.

        Returns:
            Image embeddings, (B, 256, S / patch, S / patch).
        """
        hidden_states = self.embed(pixel_values)
        pictures = [pixel_values] if self.reads_image else []
        pictures += [] if frequency_picture is None else [frequency_picture]
        side = None if self.stem is None else self.stem(pictures)
        for layer in self.layers:
            if isinstance(layer, FusionLayer):
                hidden_states, side = layer(hidden_states, side)
            else:
                hidden_states = layer(hidden_states)
        if side is not None:
            hidden_states = hidden_states + self.side_scale * side.permute(0, 2, 3, 1)
        return self.neck(hidden_states)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_layer(module)
        if isinstance(module, SpectralFilter):
            init.zeros_(module.weight)


class FusionLayer(SamVisionLayer):
    """
    A layer of SAM's ViT with global attention, and two injections: attention to the side branch after the first norm,
    and an adapter beside the MLP. The side branch passes a convolution in each of these layers.
    """

    def __init__(self, config: SFRecSamConfig, last: bool):
        vision = config.sam_config.vision_config
        super().__init__(vision, window_size=0)
        width = vision.hidden_size
        self.attn.qkv = SplitProjection(width, bias=vision.qkv_bias)  # type: ignore[assignment]
        self.adapter_scale = config.adapter_scale
        self.adapter = Bottleneck(width, config.adapter_width, zero=True)
        self.cross_attention = None if config.fusion is None else CrossAttention(width, vision.num_attention_heads)
        self.spectral_filter: SpectralFilter | None = None
        self.side_conv: nn.Conv2d | None = None
        self.side_norm: SamLayerNorm | None = None
        if config.fusion == "spectral_filter":
            self.spectral_filter = SpectralFilter(width, config.image_size // config.patch_size)
        elif config.fusion is not None:
            self.side_conv = HiddenConvolution(width, width, 3, padding=1)
            # What leaves the last one is added to the tokens: GELU(0) is 0, and its slope is not.
            norm = ZeroLayerNorm if last else SamLayerNorm
            self.side_norm = norm(width, data_format="channels_first")

    def forward(self, hidden_states: Tensor, side: Tensor | None) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """
        Args:
            hidden_states: (B, H, W, C).
            side: (B, C, H, W), if there is a side branch.

        Returns:
            Both, for the next layer.
        """
        normed = self.layer_norm1(hidden_states)
        if self.cross_attention is not None:
            filtered = None if self.spectral_filter is None else self.spectral_filter(normed)
            keys = side.permute(0, 2, 3, 1) if side is not None else filtered
            normed = normed + self.cross_attention(normed, keys)
        if side is not None and self.side_conv is not None and self.side_norm is not None:
            side = F.gelu(self.side_norm(self.side_conv(side)))
        hidden_states = hidden_states + self.attn(normed)[0]
        normed = self.layer_norm2(hidden_states)
        return hidden_states + self.mlp(normed) + self.adapter_scale * self.adapter(normed), side


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to others of the same shape, (B, H, W, C)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = ZeroLinear(width, width)

    def forward(self, tokens: Tensor, others: Tensor) -> Tensor:
        query, key, value = (
            layer(x.flatten(1, 2)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.q_proj, tokens), (self.k_proj, others), (self.v_proj, others))
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2)).view_as(tokens)


class SpectralFilter(nn.Module):
    """
    A learnable filter on the 2-D spectrum of features: y = irfft2(rfft2(x) (1 + W)), in float32. W starts at 0, which
    is the identity. For features of another size W is interpolated between its frequencies.

    Args:
        width: C.
        size: H = W of the features.
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        # Real and imaginary part; the rows with frequency 0 in the middle.
        self.weight = nn.Parameter(torch.zeros(2, width, size, size // 2 + 1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        height, width = features.shape[1:3]
        with torch.autocast(features.device.type, enabled=False):
            weight = self.weight.float()
            if weight.shape[-2:] != (height, width // 2 + 1):
                weight = F.interpolate(weight, (height, width // 2 + 1), mode="bilinear", align_corners=True)
            gain = 1 + torch.complex(*torch.fft.ifftshift(weight, dim=-2)).permute(1, 2, 0)
            spectrum = torch.fft.rfft2(features.float(), dim=(1, 2), norm="ortho")
            filtered = torch.fft.irfft2(spectrum * gain, s=(height, width), dim=(1, 2), norm="ortho")
        return filtered.to(features.dtype)


class ConvolutionalStem(nn.Module):
    """
    Convolutions from pixels to the encoder's tokens, the same ones for each picture, whose results are summed.

    Args:
        width: C of the tokens.
        patch: distance of the tokens in pixels, a power of 2.
    """

    def __init__(self, width: int, patch: int):
        super().__init__()
        halvings = patch.bit_length() - 1
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    HiddenConvolution(i, STEM_WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(STEM_WIDTH), nn.ReLU()
                )
                for i in (3, STEM_WIDTH)
            )
        )
        self.gate = MultiScaleGate(STEM_WIDTH)
        widths = [*(STEM_WIDTH << step for step in range(halvings)), width]
        self.halvings = nn.Sequential(
            *(
                nn.Sequential(
                    nn.MaxPool2d(2),
                    HiddenConvolution(i, o, 3, padding=1),
                    SamLayerNorm(o, data_format="channels_first"),
                    nn.GELU(),
                )
                for i, o in zip(widths, widths[1:], strict=False)
            )
        )

    def forward(self, pictures: list[Tensor]) -> Tensor:
        """(B, 3, S, S) each -> (B, C, S / patch, S / patch)."""
        # Channels last, in which convolutions are faster on CPUs and in half precision.
        hidden = self.layers(torch.cat(pictures).contiguous(memory_format=torch.channels_last))
        tokens = self.halvings(hidden + 0.5 * self.gate(hidden))
        return torch.stack(tokens.chunk(len(pictures))).sum(dim=0)


class MultiScaleGate(nn.Module):
    """Features times a gate in (0, 1) that three convolutions of different reach decide on, (B, C, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Conv2d(width, width, size, padding=dilation * (size // 2), dilation=dilation)
            for size, dilation in ((1, 1), (3, 1), (3, 2))
        )
        self.gate = nn.Conv2d(3 * width, width, 1)

    def forward(self, features: Tensor) -> Tensor:
        return features * self.gate(torch.cat([scale(features) for scale in self.scales], dim=1)).sigmoid()
