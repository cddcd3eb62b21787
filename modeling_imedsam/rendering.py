"""Field -> mask at any size: the field is evaluated at pixel centres, in tiles that bound the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from imedsam.mask_field import FieldValues, MaskField

# Points times prompts that are evaluated at once.
TILE_POINTS = 16384


@dataclass
class RenderedMasks:
    """
    A field on a grid of pixel centres, (B, P, M, H, W) each.

    Args:
        logits: foreground where positive.
        coarse_logits: the coarse field's alone.
        uncertainty: variance of the probability.
    """

    logits: Tensor
    coarse_logits: Tensor
    uncertainty: Tensor

    @property
    def scores(self) -> Tensor:
        """
        The Dice that a mask is expected to have by its own probabilities p, 2 sum_mask p / (sum p + |mask|),
        (B, P, M); 1 for an empty mask without any probability.
        """
        probability, mask = self.logits.sigmoid().flatten(-2), (self.logits > 0).flatten(-2)
        total = probability.sum(-1) + mask.sum(-1)
        return torch.where(total > 0, 2 * (probability * mask).sum(-1) / total.clamp_min(1e-12), 1.0)


@torch.no_grad()
def render(field: MaskField, output_size: Sequence[int], region: Tensor | None = None) -> RenderedMasks:
    """
    Evaluates a field at the pixel centres of a grid. Without gradients, which would keep every tile in memory: to
    train, take the field's values at points.

    Args:
        output_size: (height, width).
        region: (4,) or (B, 4), the rectangle x0, y0, x1, y1 in [-1, 1] to render; the whole square by default.
    """
    if not isinstance(output_size, Sequence) or len(output_size) != 2 or min(output_size) < 1:
        raise ValueError(f"Expected output_size as (height, width), both at least 1, got {output_size}.")
    height, width = int(output_size[0]), int(output_size[1])
    region = torch.tensor([-1.0, -1.0, 1.0, 1.0]) if region is None else torch.as_tensor(region, dtype=torch.float32)
    if region.shape[-1:] != (4,) or region.ndim > 2 or bool((region[..., 2:] <= region[..., :2]).any()):
        raise ValueError(
            "Expected region as x0, y0, x1, y1 in [-1, 1] with x0 < x1 and y0 < y1, (4,) or (B, 4), got "
            f"{region.tolist()}."
        )
    coordinates = pixel_centres((height, width), region.expand(field.batch_size, 4).to(field.device))[:, None]
    if field.selects_on_the_grid:
        uncertainty = torch.cat([values.uncertainty for values in _tiles(field, coordinates)], dim=-1)
        field = field.selecting_from(uncertainty)
    tiles = list(_tiles(field, coordinates))
    return RenderedMasks(
        *(
            torch.cat([getattr(tile, name) for tile in tiles], dim=-1).unflatten(-1, (height, width))
            for name in ("logits", "coarse_logits", "uncertainty")
        )
    )


def _tiles(field: MaskField, coordinates: Tensor) -> Iterator[FieldValues]:
    for tile in coordinates.split(max(1, TILE_POINTS // (field.batch_size * field.num_prompts)), dim=2):
        yield field.values(tile)


def pixel_centres(size: Sequence[int], region: Tensor) -> Tensor:
    """
    Args:
        size: (height, width) of the grid.
        region: (B, 4), x0, y0, x1, y1 of the rectangle that it covers.

    Returns:
        (B, height * width, 2), row by row, (x, y) of each pixel's centre.
    """
    height, width = size
    x0, y0, x1, y1 = (edge[:, None] for edge in region.unbind(dim=-1))
    x = x0 + (x1 - x0) * (torch.arange(width, device=region.device) + 0.5) / width
    y = y0 + (y1 - y0) * (torch.arange(height, device=region.device) + 0.5) / height
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    return grid.flatten(1, 2)
