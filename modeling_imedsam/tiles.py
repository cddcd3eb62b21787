"""A field at many points: their coordinates, and their values tile by tile, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from imedsam.mask_field import MaskField

# Points times prompts that are evaluated at once: on a CPU few enough for their hidden vectors to stay in its cache,
# on an accelerator enough to keep it busy.
TILE_POINTS = 4096
ACCELERATOR_TILE_POINTS = 65536


def evaluate_everywhere(field: MaskField, size: tuple[int, int], region: Tensor) -> tuple[list[Tensor], int]:
    """
    A field at all pixel centres of a grid.

    Args:
        field: of R images with one prompt each.
        size: (height, width) of the grid.
        region: (R, 4), the rectangles x0, y0, x1, y1 in [-1, 1] that it covers.

    Returns:
        Logits, coarse logits and uncertainty, (R, M, H, W) each, and the number of points evaluated.
    """
    num_pixels, length = math.prod(size), _tile_length(field.device, field.batch_size)
    tiles = [range(start, min(start + length, num_pixels)) for start in range(0, num_pixels, length)]
    if bool((region == region[:1]).all()):
        region = region[:1]  # so that the prompts share what depends on the position alone
    if field.selects_on_the_grid:
        uncertainty = [field.uncertainty(_centres(tile, size, region)[:, None]) for tile in tiles]
        field = field.selecting_from(torch.cat(uncertainty, dim=-1))
    maps: list[Tensor] = []
    for tile in tiles:
        values = _evaluate(field, _centres(tile, size, region)[:, None])[:, :, 0]
        maps = maps or [part.new_empty(*part.shape[:-1], num_pixels) for part in values]
        for whole, part in zip(maps, values, strict=True):
            whole[..., tile.start : tile.stop] = part
    return [values.unflatten(-1, size) for values in maps], maps[0][:, 0].numel()


def evaluate_points(field: MaskField, rows: Tensor, coordinates: Tensor) -> Tensor:
    """
    A field at points of different numbers per prompt.

    Args:
        rows: (K,), ascending, image * P + prompt of each point.
        coordinates: (K, 2), (x, y) in [-1, 1].

    Returns:
        Logits, coarse logits and uncertainty, (3, M, K).
    """
    counts = rows.bincount(minlength=field.batch_size * field.num_prompts)
    starts, lengths, values, places = counts.cumsum(0) - counts, counts.tolist(), [], []
    if len(set(lengths)) == 1:  # as with one prompt: nothing to pad
        points = coordinates.unflatten(0, (field.batch_size, field.num_prompts, -1))
        return _evaluate(field, points).flatten(1, 2).transpose(1, 2).flatten(2)
    # Prompts whose numbers of points differ by less than a factor of 2 go together, padded to the largest.
    for size in {length.bit_length() for length in lengths} - {0}:
        group = torch.tensor([r for r, n in enumerate(lengths) if n.bit_length() == size], device=rows.device)
        part = field if len(group) == len(lengths) else field.at(group)
        offsets = torch.arange(max(lengths[r] for r in group.tolist()), device=rows.device)
        slots, valid = starts[group, None] + offsets, offsets < counts[group, None]
        padded = coordinates[slots.clamp_max(len(rows) - 1)].unflatten(0, (part.batch_size, part.num_prompts))
        values.append(_evaluate(part, padded).flatten(1, 2).transpose(1, 2)[:, :, valid])
        places.append(slots[valid])
    return torch.cat(values, dim=-1)[..., torch.cat(places).argsort()]


def _evaluate(field: MaskField, coordinates: Tensor) -> Tensor:
    """Logits, coarse logits and uncertainty at (B, P, N, 2), tile by tile: (3, B, P, M, N)."""
    prompts = field.batch_size * field.num_prompts
    values = [field.values(tile) for tile in split_in_tiles(coordinates, prompts)]
    return torch.cat([torch.stack([v.logits, v.coarse_logits, v.uncertainty]) for v in values], dim=-1)


def split_in_tiles(coordinates: Tensor, prompts: int = 1) -> tuple[Tensor, ...]:
    """(..., N, 2), which so many prompts are asked for, in equal parts of bounded memory."""
    tiles = math.ceil(coordinates.shape[-2] / _tile_length(coordinates.device, prompts))
    return coordinates.chunk(tiles, dim=-2)


def _tile_length(device: torch.device, prompts: int) -> int:
    return max(1, (TILE_POINTS if device.type == "cpu" else ACCELERATOR_TILE_POINTS) // prompts)


def pixel_centres(size: Sequence[int], region: Tensor) -> Tensor:
    """
    Args:
        size: (height, width) of the grid.
        region: (B, 4), x0, y0, x1, y1 of the rectangle that it covers.

    Returns:
        (B, height * width, 2), row by row, (x, y) of each pixel's centre.
    """
    return _centres(range(math.prod(size)), size, region)


def whole_square(count: int, device: torch.device) -> Tensor:
    """The region of so many grids that cover all of [-1, 1]^2: (count, 4)."""
    return torch.tensor([[-1.0, -1.0, 1.0, 1.0]], device=device).repeat(count, 1)


def _centres(pixels: range, size: Sequence[int], region: Tensor) -> Tensor:
    """Of some of a grid's pixels, numbered row by row: (B, N, 2)."""
    numbers = torch.arange(pixels.start, pixels.stop, device=region.device)
    places = torch.stack([numbers % size[1], numbers // size[1]], dim=-1) + 0.5
    return to_coordinates(places, size, region[:, None])


def position_dtype(device: torch.device) -> torch.dtype:
    """
    In which positions are computed before a field rounds them, once: its finest octave multiplies the error by 1,600.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def to_coordinates(places: Tensor, size: Sequence[int], region: Tensor) -> Tensor:
    """Places (..., 2) as (x, y) in pixels of a grid, (0, 0) its corner, and the rectangle (..., 4) that it covers."""
    low, high = region.split(2, dim=-1)
    return low + (high - low) * (places.to(region.dtype) / region.new_tensor([size[1], size[0]]))
