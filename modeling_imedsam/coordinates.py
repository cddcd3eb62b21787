"""
Coordinates as features. Points are (x, y) in [-1, 1], see `imedsam.implicit_decoder`; a prompt's frame is its centre
(x, y) and half size (x, y).
"""

import math

import torch
from torch import Tensor, nn


class CoordinateEncoding(nn.Module):
    """
    gamma(p) of Eq. 4 in the image's frame, 4 L numbers; and, unless `frame_octaves` is None, the position in the
    prompt's frame q = (p - centre) / half size, clamped to [-3, 3], raw and with its own octaves.
    """

    def __init__(self, octaves: int, frame_octaves: int | None):
        super().__init__()
        self.octaves, self.frame_octaves = octaves, frame_octaves
        self.width = 4 * octaves + (0 if frame_octaves is None else 2 + 4 * frame_octaves)

    def forward(self, coordinates: Tensor, frame: Tensor) -> Tensor:
        """(R, N, 2), or (G, N, 2) for the same points of R / G prompts, and (R, 4) -> (R, N, width)."""
        encoded = [for_each_prompt(fourier_features(coordinates, self.octaves), frame.shape[0])]
        if self.frame_octaves is not None:
            local = position_in_frame(coordinates, frame)
            # The octaves run over the clamped range once: k = 0 has period 6.
            encoded += [local, fourier_features(local / 3.0, self.frame_octaves)]
        return torch.cat(encoded, dim=-1)


def position_in_frame(coordinates: Tensor, frame: Tensor) -> Tensor:
    """(p - centre) / half size, clamped to [-3, 3]: (R, N, 2), or (G, N, 2), and (R, 4) -> (R, N, 2)."""
    centre, half_size = frame[:, None].split(2, dim=-1)
    return ((for_each_prompt(coordinates, frame.shape[0]) - centre) / half_size).clamp(-3.0, 3.0)


def for_each_prompt(values: Tensor, prompts: int) -> Tensor:
    """(G, N, C), each for R / G of the R prompts in turn -> (R, N, C)."""
    return values[:, None].expand(-1, prompts // values.shape[0], -1, -1).flatten(0, 1)


def fourier_features(positions: Tensor, octaves: int) -> Tensor:
    """sin and cos of 2^k pi p for k = 0 ... octaves - 1 (Eq. 4): (..., 2) -> (..., 4 octaves)."""
    frequencies = math.pi * 2.0 ** torch.arange(octaves, device=positions.device, dtype=positions.dtype)
    angles = (positions[..., None] * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
