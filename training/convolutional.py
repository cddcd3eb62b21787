"""A baseline: convolutions in the place of the implicit decoder."""

import math
from itertools import count

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.sam.modeling_sam import SamLayerNorm

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.implicit_decoder import CoordinateEncoding, EllipsePrior
from imedsam.mask_field import InterpolatedMaskField, MaskField
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.tiles import pixel_centres

# Channels that are normalised against each other are not to be too few.
LEAST_CHANNELS = 8


@strict
class ConvolutionalConfig(IMedSamConfig):
    """
    Configuration of [`ConvolutionalModel`]. What describes the implicit decoder (widths, octaves, selection, ...)
    decides how many parameters the convolutions have; `prompt_frame` also whether they are given coordinates in it, and
    `ellipse_prior` whether they start from the ellipse in it.
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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HiddenConvolution):
            init.kaiming_normal_(module.weight, nonlinearity="relu")


class ConvolutionalDecoder(nn.Module):
    """
    A plain upsampling head of 3 x 3 convolutions, each with LayerNorm over the channels and ReLU: three at twice the
    features' stride, one before every bilinear doubling, which halves the channels, and one at the image's size; then
    1 x 1 to a logit per class. For the first three the features are folded two by two into the channels and unfolded
    again, which loses nothing: at the features' own stride so many parameters would take several times as long as the
    implicit decoder.

    It is given what the implicit decoder is given: the features and, as in Eq. 5, the prompt's embedding and the
    position in the prompt's frame, at the features' pixel centres. The octaves of the position in the image are left
    out: they serve to tell points within one feature's cell apart. The logits are added to the ellipse, if the
    configuration says so, as the fields' outputs are.

    Args:
        config: of the model.
        num_parameters: how many to have; the width is the multiple of 4 that comes nearest.
    """

    def __init__(self, config: IMedSamConfig, num_parameters: int):
        super().__init__()
        self.coordinates = CoordinateEncoding(0, config.prompt_frame_octaves if config.prompt_frame else None)
        channels, classes = config.sam_config.mask_decoder_config.hidden_size, config.num_labels
        inputs = 4 * (channels // 8 + self.coordinates.width)
        self.ellipse = EllipsePrior(classes) if config.ellipse_prior else None
        doublings = max(0, round(math.log2(config.patch_size / 4)))  # from the features to the image

        def excess(width: int) -> int:
            layers = _layer_widths(inputs, width, doublings)
            hidden = sum(9 * i * o + 3 * o for i, o in layers)
            head = (layers[-1][1] + 1 + config.ellipse_prior) * classes
            return hidden + channels * width + head - num_parameters

        least = 4 * LEAST_CHANNELS
        above = next(width for width in count(least, 4) if excess(width) >= 0)
        width = min((above, max(least, above - 4)), key=lambda width: abs(excess(width)))
        widths = _layer_widths(inputs, width, doublings)
        self.prompt = nn.Linear(channels, width, bias=False)
        self.layers = nn.ModuleList(HiddenConvolution(i, o, 3, padding=1) for i, o in widths)
        self.norms = nn.ModuleList(SamLayerNorm(o, data_format="channels_first") for _, o in widths)
        sizes = [config.image_size >> left for left in reversed(range(doublings))]
        enlarge = [nn.PixelShuffle(2), *(nn.Upsample(size, mode="bilinear") for size in sizes)]
        self.enlarge = nn.ModuleList([nn.Identity(), nn.Identity(), *enlarge, nn.Identity()])
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
        square = torch.tensor([[-1.0, -1.0, 1.0, 1.0]], device=features.device).expand(len(features), 4)
        positions = self.coordinates(pixel_centres(features.shape[-2:], square), frame).to(features.dtype)
        positions = positions.transpose(1, 2).unflatten(-1, features.shape[-2:])
        folded = F.pixel_unshuffle(torch.cat([features, positions], dim=1), 2)
        # The pixels of a prompt share its embedding: its part of the first layer is multiplied once.
        hidden = F.relu(self.norms[0](self.layers[0](folded) + self.prompt(prompt)[..., None, None]))
        for layer, norm, enlarge in zip(self.layers[1:], self.norms[1:], self.enlarge[1:], strict=True):
            hidden = enlarge(F.relu(norm(layer(hidden))))
        logits = self.head(hidden)
        if self.ellipse is None:
            return logits
        classes = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        prior = self.ellipse(pixel_centres(logits.shape[-2:], square), frame, classes)
        return logits + prior.unflatten(-1, logits.shape[-2:])


class HiddenConvolution(nn.Conv2d):
    """A convolution before a ReLU, initialised for one (He et al., 2015)."""


def _layer_widths(inputs: int, width: int, doublings: int) -> list[tuple[int, int]]:
    """Channels into and out of each 3 x 3 convolution."""
    narrowing = [max(LEAST_CHANNELS, width // 4 >> step) for step in range(doublings + 1)]
    into = [inputs, width, width, *narrowing]
    return list(zip(into, [width, width, width, *narrowing[1:], narrowing[-1]], strict=True))
