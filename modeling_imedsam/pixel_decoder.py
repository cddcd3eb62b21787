"""Image features that have seen their neighbours and the prompt, for a decoder to start from."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamLayerNorm

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.coordinates import CoordinateEncoding
from imedsam.layers import HiddenConvolution
from imedsam.tiles import pixel_centres, whole_square

UNFOLDED = 2  # the side of the square of places that become channels of one


class PixelDecoder(nn.Module):
    """
    Three 3 x 3 convolutions, each with LayerNorm over the channels and ReLU. SAM's upscaling unfolds each token of the
    image encoder into 4 x 4 places by itself: none of them has seen the token next to it.

    They are given what the implicit decoder is given: the features and, as in Eq. 5, the prompt's embedding and the
    position in the prompt's frame, at the features' pixel centres. The octaves of the position in the image are left
    out: they serve to tell points within one feature's cell apart. Before them the features are folded two by two into
    the channels, and unfolded again after them, which loses nothing: at the features' own stride so many parameters
    would take several times as long as the implicit decoder.

    Args:
        config: of the model.
        width: of the convolutions, a multiple of 4; a quarter of it comes out.
    """

    def __init__(self, config: IMedSamConfig, width: int):
        super().__init__()
        self.coordinates = CoordinateEncoding(0, config.prompt_frame_octaves if config.prompt_frame else None)
        channels = config.sam_config.mask_decoder_config.hidden_size
        inputs = UNFOLDED**2 * (channels // 8 + self.coordinates.width)
        self.prompt = nn.Linear(channels, width, bias=False)
        self.layers = nn.ModuleList(HiddenConvolution(i, width, 3, padding=1) for i in (inputs, width, width))
        self.norms = nn.ModuleList(SamLayerNorm(width, data_format="channels_first") for _ in self.layers)

    def forward(self, features: Tensor, prompt: Tensor, frame: Tensor) -> Tensor:
        """
        Args:
            features: (R, C, H, W), one map per prompt.
            prompt: (R, E), the prompts' embeddings.
            frame: (R, 4), centre (x, y) and half size (x, y) of the prompts' frames, in [-1, 1].

        Returns:
            (R, width / 4, H, W), at least 0.
        """
        square = whole_square(features.shape[0], features.device)
        positions = self.coordinates(pixel_centres(features.shape[-2:], square), frame).to(features.dtype)
        positions = positions.transpose(1, 2).unflatten(-1, features.shape[-2:])
        folded = F.pixel_unshuffle(torch.cat([features, positions], dim=1), UNFOLDED)
        # The places of a prompt share its embedding: its part of the first layer is multiplied once.
        hidden = F.relu(self.norms[0](self.layers[0](folded) + self.prompt(prompt)[..., None, None]))
        for layer, norm in zip(self.layers[1:], self.norms[1:], strict=True):
            hidden = F.relu(norm(layer(hidden)))
        return F.pixel_shuffle(hidden, UNFOLDED)
