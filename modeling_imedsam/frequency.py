"""The frequency branch: a picture of the image's spectrum, and the adapters that feed it into SAM's encoder."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imedsam.bottleneck import Bottleneck
from imedsam.configuration.configuration_imedsam import IMedSamConfig


class FrequencyBranch(nn.Module):
    """
    A chain of frequency adapters beside the encoder's blocks (paper, Fig. 3). Adapter i turns the frequency tokens
    f into f <- y + A_i(y), y = LN(f), and g_i * f is added to the output of block i. The gates g_i start at 0, so that
    a new branch leaves the encoder exactly as it is.
    """

    def __init__(self, config: IMedSamConfig):
        super().__init__()
        vision = config.sam_config.vision_config
        width, depth = vision.hidden_size, vision.num_hidden_layers
        self.adapters = nn.ModuleList(Bottleneck(width, config.frequency_hidden) for _ in range(depth))
        self.gates = nn.Parameter(torch.zeros(depth, width))

    def forward(self, frequency_tokens: Tensor) -> list[Tensor]:
        """
        Args:
            frequency_tokens: (B, H, W, C), the spectrum's picture after SAM's patch and position embedding.

        Returns:
            What to add to the output of each block, (B, H, W, C) each.
        """
        injections = []
        for adapter, gate in zip(self.adapters, self.gates, strict=True):
            frequency_tokens = F.layer_norm(frequency_tokens, frequency_tokens.shape[-1:])
            frequency_tokens = frequency_tokens + adapter(frequency_tokens)
            injections.append(gate * frequency_tokens)
        return injections


class FrequencyView(nn.Module):
    """
    A picture of the image's spectrum that SAM's patch embedding can read. Differentiable and always float32, since
    half-precision transforms do not exist everywhere.

    - `amplitude`: |DFT|, with the logarithm log(1 + a) if `log`, zero frequency in the middle;
    - `phase`: arg DFT, zero frequency in the middle;
    - `haar`: sum of the three detail bands of a one-level Haar transform, each scaled to [0, 1].
    """

    def __init__(self, view: str, log: bool):
        super().__init__()
        self.of_places = view == "haar"
        self.picture = {"amplitude": log_amplitude if log else amplitude, "phase": phase, "haar": haar_details}[view]

    def forward(self, pixel_values: Tensor, reshaped_input_sizes: Tensor | None = None) -> Tensor:
        """
        Args:
            pixel_values: (B, 3, S, S).
            reshaped_input_sizes: (B, 2), height and width of each image inside a padded square. The spectrum is taken
                of the image alone, whose padding would otherwise dominate it with an edge. It fills the square; `haar`
                is where the image is, and 0 in the padding.

        Returns:
            (B, 3, S, S) in [0, 1], three equal channels, in the dtype of `pixel_values`.
        """
        size = pixel_values.shape[-2:]
        with torch.autocast(pixel_values.device.type, enabled=False):
            grey = pixel_values.float().mean(dim=1)
            if reshaped_input_sizes is None or bool(
                (reshaped_input_sizes == torch.tensor(size).to(reshaped_input_sizes)).all()
            ):
                pictures = min_max(self.picture(grey))[:, None]
            else:
                images = (image[:h, :w] for image, (h, w) in zip(grey, reshaped_input_sizes.tolist(), strict=True))
                pictures = torch.cat(
                    [self._fill(min_max(self.picture(i[None]))[:, None], i.shape, size) for i in images]
                )
        if pictures.shape[-2:] != size:
            pictures = F.interpolate(pictures, size, mode="bilinear")
        return pictures.to(pixel_values.dtype).expand(-1, pixel_values.shape[1], -1, -1)

    def _fill(self, picture: Tensor, image_size: Sequence[int], size: Sequence[int]) -> Tensor:
        """The picture of an image inside a square: over all of it, or if its places are the image's, where that is."""
        if not self.of_places:
            return F.interpolate(picture, size, mode="bilinear")
        (height, width), (below, right) = image_size, (side - own for side, own in zip(size, image_size, strict=True))
        return F.pad(F.interpolate(picture, (height, width), mode="bilinear"), (0, right, 0, below))


def amplitude(grey: Tensor) -> Tensor:
    return torch.fft.fftshift(torch.fft.fft2(grey, norm="ortho").abs(), dim=(-2, -1))


def log_amplitude(grey: Tensor) -> Tensor:
    return torch.log1p(amplitude(grey))


def phase(grey: Tensor) -> Tensor:
    return torch.fft.fftshift(torch.fft.fft2(grey, norm="ortho").angle(), dim=(-2, -1))


def haar_details(grey: Tensor) -> Tensor:
    """(B, H, W) -> (B, H // 2, W // 2), the sum of the three detail bands, each scaled to [0, 1]."""
    return torch.stack([min_max(band) for band in haar_bands(grey)[1:]]).sum(dim=0)


def haar_bands(grey: Tensor) -> tuple[Tensor, ...]:
    """
    One level of the orthonormal Haar transform, (B, H, W) -> (B, H // 2, W // 2) each: the approximation, and the
    details across columns, across rows and across both. An odd last row or column is left out.
    """
    height, width = grey.shape[-2] // 2 * 2, grey.shape[-1] // 2 * 2
    a, b = grey[:, 0:height:2, 0:width:2], grey[:, 0:height:2, 1:width:2]
    c, d = grey[:, 1:height:2, 0:width:2], grey[:, 1:height:2, 1:width:2]
    return (a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2


def min_max(pictures: Tensor) -> Tensor:
    """Scales each (H, W) of (B, H, W) to [0, 1]; a constant, up to rounding, becomes 0."""
    low, high = pictures.amin(dim=(-2, -1), keepdim=True), pictures.amax(dim=(-2, -1), keepdim=True)
    return (pictures - low) / (high - low).clamp_min(1e-6)
