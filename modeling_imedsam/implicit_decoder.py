"""
The implicit segmentation decoder (paper, Section 3.4): a coarse and a fine field over the image plane.

Points are (x, y) in [-1, 1]: -1 is the left or upper edge of the model's square, 1 the right or lower edge, so that
the centre of pixel j of S lies at (2 j + 1) / S - 1. This is the frame of `grid_sample(..., align_corners=False)`.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.coordinates import CoordinateEncoding, for_each_prompt, position_in_frame
from imedsam.layers import HiddenLinear
from imedsam.pixel_decoder import PixelDecoder


class ImplicitDecoder(nn.Module):
    """
    Z = (interpolated features, gamma(p), p in the prompt's frame, prompt embedding) (Eq. 5) -> coarse field ->
    uncertainty -> fine field at the points selected (Eq. 6). This module holds the networks; `ImplicitMaskField` binds
    them to an image and its prompts. The points of a prompt share its embedding, so its part of the first layers is
    multiplied once (`prompt_parts`).
    """

    def __init__(self, config: IMedSamConfig):
        super().__init__()
        self.num_labels = config.num_labels
        self.coordinates = CoordinateEncoding(
            config.coordinate_octaves, config.prompt_frame_octaves if config.prompt_frame else None
        )
        channels, width = config.sam_config.mask_decoder_config.hidden_size, config.pixel_decoder_width
        inputs = (channels // 8 if width is None else width // 4) + self.coordinates.width + channels
        self.pixel_decoder = None if width is None else PixelDecoder(config, width)
        self.ellipse = EllipsePrior(config.num_labels) if config.ellipse_prior else None
        self.coarse = CoarseField(inputs, config)
        self.fine = FineField(inputs + config.coarse_features, config) if config.selection is not None else None

    def prompt_parts(self, prompt: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the prompts' embeddings (R, E) add to the first layers of the coarse and fine field, (R, D) each."""
        coarse = cast(HiddenLinear, self.coarse.layers[0]).last(prompt)
        return coarse, None if self.fine is None else cast(HiddenLinear, self.fine.layers[0]).last(prompt)

    def encode(self, coordinates: Tensor, features: Tensor, frame: Tensor) -> Tensor:
        """
        What is known of each point but for its prompt's embedding, which all points of a prompt share.

        Args:
            coordinates: (R, N, 2), or (G, N, 2) for the same points of R / G prompts that follow each other.
            features: (R, C, H, W), one map per prompt.
            frame: (R, 4), centre (x, y) and half size (x, y) of the prompt's frame.

        Returns:
            (R, N, C + coordinate features).
        """
        maps = at_least_float32(features)
        coordinates = coordinates.to(maps.dtype)
        encoded = self.coordinates(coordinates, frame).to(features.dtype)
        grid = for_each_prompt(coordinates, maps.shape[0])[:, :, None]
        sampled = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)[..., 0].transpose(1, 2)
        return torch.cat([sampled.to(features.dtype), encoded], dim=-1)


def normalise(features: Tensor) -> Tensor:
    """
    Scales the channels of (R, C, H, W) at each place to mean 0 and variance 1. SAM's upscaled features are much
    smaller than the coordinates beside them, how much depends on the checkpoint: a new field would not see them.
    """
    return F.layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision is too coarse for positions and uncertainties; what is more precise than float32 stays so."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class EllipsePrior(nn.Module):
    """
    What a box says by itself: the logit a (1 - |q|) of the ellipse inscribed in the prompt's frame, q being the point
    in that frame, clamped to [-3, 3] on each axis. The fields' outputs are added to it; each class learns its a.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.slope = nn.Parameter(torch.empty(classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.slope, 4.0)

    def forward(self, coordinates: Tensor, frame: Tensor, classes: Tensor) -> Tensor:
        """(R, N, 2), or (G, N, 2) as in `ImplicitDecoder.encode`, (R, 4) and (R, M) -> (R, M, N)."""
        inside = 1 - position_in_frame(coordinates, frame).norm(dim=-1)
        return self.slope[classes][..., None] * inside[:, None]


class CoarseField(nn.Module):
    """Dec_c: Z -> hidden vector; per class a head hidden -> logit and features for the fine field."""

    def __init__(self, inputs: int, config: IMedSamConfig):
        super().__init__()
        widths = [inputs, *config.coarse_widths]
        self.layers = nn.ModuleList(HiddenLinear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True))
        self.norms = nn.ModuleList(nn.LayerNorm(o) for o in widths[1:])
        self.head = ClassLinear(config.num_labels, widths[-1], 1 + config.coarse_features)

    def forward(self, points: Tensor, prompt: Tensor) -> Tensor:
        """Points (R, N, C) and the prompts' part of the first layer, (R, 1, D) or (D,) -> hidden vectors (R, N, D)."""
        hidden = cast(HiddenLinear, self.layers[0]).first(points, prompt)
        hidden = F.relu(self.norms[0](hidden), inplace=True)
        for layer, norm in zip(self.layers[1:], self.norms[1:], strict=True):
            hidden = F.relu(norm(layer(hidden)), inplace=True)
        return hidden


class FineField(nn.Module):
    """Dec_f: Z and the coarse features -> refined logit. The head is the class's own."""

    def __init__(self, inputs: int, config: IMedSamConfig):
        super().__init__()
        widths = [inputs, *config.fine_widths]
        self.layers = nn.ModuleList(HiddenLinear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True))
        self.head_hidden = ClassLinear(config.num_labels, widths[-1], config.fine_head_width)
        self.head_out = ClassLinear(config.num_labels, config.fine_head_width, 1)

    def forward(
        self, points: Tensor, coarse_features: Tensor, prompt: Tensor, rows: Tensor, classes: Tensor
    ) -> Tensor:
        """
        Args:
            points: (K, C), the encoded points to refine.
            coarse_features: (K, F).
            prompt: (R, D), the prompts' part of the first layer.
            rows: (K,), the prompt of each point.
            classes: (K,), the class of each point.

        Returns:
            Logits, (K,).
        """
        inputs = torch.cat([points, coarse_features], dim=-1)
        prompt = prompt[0] if len(prompt) == 1 else prompt.index_select(0, rows)
        hidden = F.relu(cast(HiddenLinear, self.layers[0]).first(inputs, prompt), inplace=True)
        for layer in self.layers[1:]:
            hidden = F.relu(layer(hidden), inplace=True)
        return self.head_out(F.relu(self.head_hidden(hidden, classes)), classes)[:, 0]


class ClassLinear(nn.Module):
    """A linear layer per class: `weight` (classes, outputs, inputs), `bias` (classes, outputs)."""

    def __init__(self, classes: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(classes, outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, inputs: Tensor, classes: Tensor, outputs: slice = slice(None)) -> Tensor:
        """Each row (K, inputs) through the layer of its class (K,) -> (K, outputs), or some of the outputs."""
        weight, bias = self.weight[:, outputs], self.bias[:, outputs]
        if weight.shape[0] == 1:
            return F.linear(inputs, weight[0], bias[0])
        rows = [(classes == label).nonzero()[:, 0] for label in range(weight.shape[0])]
        result = torch.cat([F.linear(inputs[r], w, b) for r, w, b in zip(rows, weight, bias, strict=True)])
        return result[torch.cat(rows).argsort()]
