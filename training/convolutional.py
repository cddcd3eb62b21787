"""A baseline: convolutions in the place of the implicit decoder."""

import math
from itertools import count

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamLayerNorm

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.implicit_decoder import EllipsePrior
from imedsam.layers import HiddenConvolution
from imedsam.mask_field import InterpolatedMaskField, MaskField
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.pixel_decoder import PixelDecoder
from imedsam.tiles import pixel_centres, whole_square

# Channels that are normalised against each other are not to be too few.
LEAST_CHANNELS = 8


@strict
class ConvolutionalConfig(IMedSamConfig):
    """
    Configuration of [`ConvolutionalModel`]. What describes the implicit decoder (widths, octaves, selection, ...)
    decides how many parameters the convolutions have; `prompt_frame` also whether they are given coordinates in it,
    and `ellipse_prior` whether they start from the ellipse in it.
    """

    model_type = "imedsam_convolutional"


class ConvolutionalModel(IMedSamModel):
    """I-MedSAM with convolutions in the place of the implicit decoder; encoder, adapters and prompts are the same."""

    config: ConvolutionalConfig  # type: ignore[assignment]  # SAM's base class has its own
    config_class = ConvolutionalConfig
    part_patterns = [("convolutional head", r"implicit_decoder\.(?!ellipse)"), *IMedSamModel.part_patterns]

    def __init__(self, config: ConvolutionalConfig):
        super().__init__(config)
        if self.implicit_decoder is None:
            raise ValueError("Expected implicit_decoder=True, whose place the convolutions take, got False.")
        budget = sum(parameter.numel() for parameter in self.implicit_decoder.parameters())
        # Under its name, so that adapters, loading and saving treat it alike.
        self.implicit_decoder = ConvolutionalDecoder(config, budget)  # type: ignore[assignment]
        self.post_init()

    def bind_decoder(
        self, features: Tensor, prompt: Tensor, frame: Tensor, classes: Tensor, lattice_region: Tensor
    ) -> MaskField:
        assert self.implicit_decoder is not None  # as `get_mask_field` has seen
        logits = self.implicit_decoder(features, prompt, frame)
        chosen = logits.take_along_dim(classes[..., None, None], dim=1)
        return InterpolatedMaskField(chosen.unflatten(0, (len(lattice_region), -1)))


class ConvolutionalDecoder(nn.Module):
    """
    A plain upsampling head of 3 x 3 convolutions, each with LayerNorm over the channels and ReLU: a [`PixelDecoder`],
    one before every bilinear doubling, which halves the channels, and one at the image's size; then 1 x 1 to a logit
    per class. The logits are added to the ellipse, if the configuration says so, as the fields' outputs are.

    Args:
        config: of the model.
        num_parameters: how many to have; the width is the multiple of 4 that comes nearest.
    """

    def __init__(self, config: IMedSamConfig, num_parameters: int):
        super().__init__()
        classes = config.num_labels
        self.ellipse = EllipsePrior(classes) if config.ellipse_prior else None
        doublings = max(0, round(math.log2(config.patch_size / 4)))  # from the features to the image

        def excess(width: int) -> int:
            with torch.device("meta"):
                pixel_decoder = PixelDecoder(config, width)
            widths = _layer_widths(width, doublings)
            layers = sum(9 * i * o + 3 * o for i, o in widths)
            head = (widths[-1][1] + 1 + config.ellipse_prior) * classes
            return sum(p.numel() for p in pixel_decoder.parameters()) + layers + head - num_parameters

        least = 4 * LEAST_CHANNELS
        above = next(width for width in count(least, 4) if excess(width) >= 0)
        width = min((above, max(least, above - 4)), key=lambda width: abs(excess(width)))
        widths = _layer_widths(width, doublings)
        self.pixel_decoder = PixelDecoder(config, width)
        self.layers = nn.ModuleList(HiddenConvolution(i, o, 3, padding=1) for i, o in widths)
        self.norms = nn.ModuleList(SamLayerNorm(o, data_format="channels_first") for _, o in widths)
        sizes = [config.image_size >> left for left in reversed(range(doublings))]
        self.enlarge = nn.ModuleList([*(nn.Upsample(size, mode="bilinear") for size in sizes), nn.Identity()])
        self.head = nn.Conv2d(widths[-1][1], classes, 1)

    def forward(self, features: Tensor, prompt: Tensor, frame: Tensor) -> Tensor:
        """
        Args:
            features: (R, C, H, W), one map per prompt.
            prompt: (R, E), the prompts' embeddings.
            frame: (R, 4), centre (x, y) and half size (x, y) of the prompts' frames.

        Returns:
            Logits of each class, (R, classes, S, S).
        """
        hidden = self.pixel_decoder(features, prompt, frame)
        for layer, norm, enlarge in zip(self.layers, self.norms, self.enlarge, strict=True):
            hidden = enlarge(F.relu(norm(layer(hidden))))
        logits = self.head(hidden)
        if self.ellipse is None:
            return logits
        square = whole_square(len(features), features.device)
        classes = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        prior = self.ellipse(pixel_centres(logits.shape[-2:], square), frame, classes)
        return logits + prior.unflatten(-1, logits.shape[-2:])


def _layer_widths(width: int, doublings: int) -> list[tuple[int, int]]:
    """Channels into and out of each 3 x 3 convolution after a pixel decoder of this width."""
    narrowing = [max(LEAST_CHANNELS, width // 4 >> step) for step in range(doublings + 1)]
    return list(zip(narrowing, [*narrowing[1:], narrowing[-1]], strict=True))
