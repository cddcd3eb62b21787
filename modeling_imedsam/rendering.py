"""
Field -> mask at any size: the field is evaluated at pixel centres, in tiles that bound the memory; at all of them, or
only where a coarser lattice leaves the mask undecided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from imedsam.mask_field import MaskField

RENDER_MODES = ("exact", "adaptive")
# Points times prompts that are evaluated at once: on a CPU few enough for their hidden vectors to stay in its cache,
# on an accelerator enough to keep it busy.
TILE_POINTS = 2048
ACCELERATOR_TILE_POINTS = 65536
# Prompts that are rendered at once: what is kept beside the result does not grow with their number.
PROMPTS_AT_ONCE = 32
# The first lattice of adaptive rendering has at least so many cells along the grid's longer side.
FIRST_CELLS = 48
# A cell is decided if its corners have one sign and the smallest logit is larger than so many times their range.
MARGIN = 1.0
# ... and if the variance of the probability, at most 0.25, differs by less than this between them.
UNCERTAINTY_TOLERANCE = 0.05
# The cells in a prompt's frame are split until so many lie along its shorter side.
FRAME_CELLS = 16


@dataclass
class RenderedMasks:
    """
    A field on a grid of pixel centres, (B, P, M, H, W) each.

    Args:
        logits: foreground where positive.
        coarse_logits: the coarse field's alone.
        uncertainty: variance of the probability.
        num_points: points at which values were asked for, of all images and prompts.
    """

    logits: Tensor
    coarse_logits: Tensor
    uncertainty: Tensor
    num_points: int

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
def render(
    field: MaskField, output_size: Sequence[int], region: Tensor | None = None, mode: str | None = None
) -> RenderedMasks:
    """
    Evaluates a field at the pixel centres of a grid. Without gradients, which would keep every tile in memory: to
    train, take the field's values at points.

    Args:
        output_size: (height, width).
        region: (4,) or (B, 4), the rectangle x0, y0, x1, y1 in [-1, 1] to render; the whole square by default.
        mode: "exact": every pixel. "adaptive": every 2^k-th pixel first, then the pixels near a boundary; all other
            values are interpolated. A structure that holds a disk of 1.5 * 2^k pixels across is never missed, 2^k
            being at most 1 / 48 of the grid's longer side and, within the frame of the prompt, 1 / 16 of its shorter
            side (or 1). Adaptive by default, but exact for a field that ranks the grid's pixels
            (`selection="top_k"`).
    """
    if mode is None:
        mode = "exact" if field.selects_on_the_grid else "adaptive"
    if mode not in RENDER_MODES:
        raise ValueError(f"Expected mode to be one of {', '.join(RENDER_MODES)}, got {mode!r}.")
    if mode == "adaptive" and field.selects_on_the_grid:
        raise ValueError(
            'Expected mode="exact" with selection="top_k", which ranks all pixels of the grid, got "adaptive": use '
            'it, or selection="threshold" in the configuration.'
        )
    height, width = _check_size(output_size)
    region = torch.tensor([-1.0, -1.0, 1.0, 1.0]) if region is None else torch.as_tensor(region, dtype=torch.float32)
    if tuple(region.shape) not in ((4,), (1, 4), (field.batch_size, 4)) or bool(
        (region[..., 2:] <= region[..., :2]).any()
    ):
        raise ValueError(
            "Expected region as x0, y0, x1, y1 in [-1, 1] with x0 < x1 and y0 < y1, (4,) or (B, 4) with B = "
            f"{field.batch_size}, got {region.tolist()}."
        )
    region, field = region.expand(field.batch_size, 4).to(field.device), field.eval()
    evaluate = _evaluate_near_boundaries if mode == "adaptive" else _evaluate_everywhere
    maps, num_points = None, 0
    for rows in torch.arange(field.batch_size * field.num_prompts, device=field.device).split(PROMPTS_AT_ONCE):
        values, points = evaluate(field.at(rows), (height, width), region[rows // field.num_prompts])
        # A tensor of its own for each map, so that who keeps one of them does not keep all.
        maps = maps or [v.new_empty(field.batch_size * field.num_prompts, *v.shape[1:]) for v in values]
        for whole, value in zip(maps, values, strict=True):
            whole[rows] = value
        num_points += points
    logits, coarse_logits, uncertainty = (whole.unflatten(0, (field.batch_size, -1)) for whole in maps or ())
    return RenderedMasks(logits, coarse_logits, uncertainty, num_points)


def _evaluate_everywhere(field: MaskField, size: tuple[int, int], region: Tensor) -> tuple[Tensor, int]:
    """Logits, coarse logits and uncertainty of R prompts, (3, R, M, H, W), and the number of points evaluated."""
    numbers = torch.arange(size[0] * size[1], device=field.device)

    def evaluate(field):
        tiles = numbers.split(_tile_length(field.device, field.batch_size))
        return torch.cat([_evaluate(field, _centres(tile, size, region)[:, None]) for tile in tiles], dim=-1)

    if field.selects_on_the_grid:
        field = field.selecting_from(evaluate(field)[2])
    values = evaluate(field)[:, :, 0].unflatten(-1, size)
    return values, values[0, :, 0].numel()


def _evaluate_near_boundaries(field: MaskField, size: tuple[int, int], region: Tensor) -> tuple[Tensor, int]:
    stride = 1
    while max(size) >= 2 * stride * FIRST_CELLS:
        stride *= 2
    if stride == 1:
        return _evaluate_everywhere(field, size, region)
    lattice = _Lattice(field, size, region, stride)
    while lattice.stride > 1:
        lattice.split()
    return lattice.values[..., : size[0], : size[1]].transpose(1, 2), lattice.num_points


def _check_size(output_size: Sequence[int]) -> tuple[int, int]:
    sides = np.asarray(output_size)
    if sides.shape != (2,) or not np.issubdtype(sides.dtype, np.integer) or (sides < 1).any():
        raise ValueError(f"Expected output_size as (height, width), both at least 1, got {output_size}.")
    return int(sides[0]), int(sides[1])


class _Lattice:
    """
    The values of a field at every `stride`-th pixel centre of a grid. Four neighbours are the corners of a cell.

    Points and cells are numbered through all prompts: number = (row * height + i) * width + j. A cell has the number
    of its first corner.

    Args:
        field: of R images with one prompt each.
        size: (height, width) of the grid.
        region: (R, 4), the rectangles that it covers.
    """

    def __init__(self, field: MaskField, size: tuple[int, int], region: Tensor, stride: int):
        self.field, self.size, self.region, self.stride = field, size, region, stride
        self.num_points = 0
        points = torch.arange(math.prod(self.shape), device=field.device)
        self.values = self._evaluate(points).unflatten(-1, self.shape)  # (3, M, R, h, w)
        self.known = torch.ones(self.shape, dtype=torch.bool, device=field.device)  # which ones are not interpolated
        rows, i, j = self._unravel(points)
        cells = points[(i < self.shape[1] - 1) & (j < self.shape[2] - 1)]
        self.undecided = cells[self._are_undecided(cells) | self._are_too_large(cells)]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, one per prompt, height and width; the last points may lie beyond the grid."""
        height, width = (-(-length // self.stride) + 1 for length in self.size)
        return len(self.region), height, width

    def split(self) -> None:
        """Halves the stride: interpolates between the points, then refines what was undecided."""
        rows, i, j = self._unravel(self.undecided)
        self.stride //= 2
        _, height, width = self.shape
        finer = [2 * length - 1 for length in self.values.shape[-2:]]
        values = F.interpolate(self.values.flatten(0, 1), finer, mode="bilinear", align_corners=True)
        self.values = values[..., :height, :width].unflatten(0, (3, -1)).contiguous()
        known = self.known.new_zeros(self.shape)
        known[:, ::2, ::2] = self.known[:, : -(-height // 2), : -(-width // 2)]
        self.known = known
        self.undecided = self._refine(self._cells_around(rows, 2 * i, 2 * j, (0, 1)))

    def _refine(self, cells: Tensor) -> Tensor:
        """
        Evaluates the corners of some cells, then those of the neighbours of the undecided ones among them, and so on
        along the boundary. Returns the undecided cells.
        """
        examined, undecided = torch.zeros_like(self.known), []
        while len(cells):
            examined.view(-1)[cells] = True
            points = self._corners(cells).flatten()
            points = points[~self.known.view(-1)[points]].unique()
            if len(points):
                self.known.view(-1)[points] = True
                self.values.flatten(2)[..., points] = self._evaluate(points)
            undecided.append(cells[self._are_too_large(cells)])
            cells = cells[self._are_undecided(cells)]
            undecided.append(cells)
            cells = self._cells_around(*self._unravel(cells), (-1, 0, 1))
            cells = cells[~examined.view(-1)[cells]]
        return torch.cat(undecided).unique() if undecided else cells

    def _are_undecided(self, cells: Tensor) -> Tensor:
        """Whether the boundary of a mask passes through each cell, or may, or the uncertainty changes much."""
        logits, coarse, uncertainty = self.values.flatten(2)[..., self._corners(cells)]  # (M, K, 4)
        low, high = logits.aminmax(dim=-1)
        close = torch.minimum(low.abs(), high.abs()) < MARGIN * (high - low)
        crossed = ((low <= 0) & (high > 0)) | ((coarse.amin(dim=-1) <= 0) & (coarse.amax(dim=-1) > 0))
        steep = uncertainty.amax(dim=-1) - uncertainty.amin(dim=-1) > UNCERTAINTY_TOLERANCE
        return (crossed | close | steep).any(dim=0)

    def _are_too_large(self, cells: Tensor) -> Tensor:
        """Whether each cell meets the frame of its prompt, and the frame is small for it."""
        if self.field.frame is None:
            return torch.zeros_like(cells, dtype=torch.bool)
        rows, i, j = self._unravel(cells)
        centre, half_size = self.field.frame.split(2, dim=-1)
        pixels = self.region.new_tensor(self.size[::-1]) / (self.region[:, 2:] - self.region[:, :2])
        low, high = ((edge - self.region[:, :2]) * pixels for edge in (centre - half_size, centre + half_size))
        small = self.stride * FRAME_CELLS > (high - low).amin(dim=-1)
        first = torch.stack([j, i], dim=-1) * self.stride + 0.5
        meets = (first < high[rows]) & (first + self.stride > low[rows])
        return small[rows] & meets.all(dim=-1)

    def _evaluate(self, points: Tensor) -> Tensor:
        """The field at K points, in ascending order: (3, M, K)."""
        rows, i, j = self._unravel(points)
        x0, y0, x1, y1 = self.region[rows].unbind(dim=-1)
        x = x0 + (x1 - x0) * (j * self.stride + 0.5) / self.size[1]
        y = y0 + (y1 - y0) * (i * self.stride + 0.5) / self.size[0]
        self.num_points += len(points)
        return evaluate_points(self.field, rows, torch.stack([x, y], dim=-1))

    def _corners(self, cells: Tensor) -> Tensor:
        """(K,) -> (K, 4)."""
        width = self.shape[2]
        return cells[:, None] + torch.tensor([0, 1, width, width + 1], device=cells.device)

    def _cells_around(self, rows: Tensor, i: Tensor, j: Tensor, offsets: tuple[int, ...]) -> Tensor:
        """The cells whose indices differ from given ones by `offsets` along each axis, each once."""
        _, height, width = self.shape
        shifts = torch.tensor(offsets, device=rows.device)
        i, j = torch.broadcast_tensors(i[:, None, None] + shifts[:, None], j[:, None, None] + shifts)
        exists = (i >= 0) & (i < height - 1) & (j >= 0) & (j < width - 1)
        return ((rows[:, None, None] * height + i) * width + j)[exists].unique()

    def _unravel(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row, i and j."""
        _, height, width = self.shape
        return numbers // (height * width), numbers // width % height, numbers % width


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
    """(..., N, 2), which so many prompts are asked for, in parts of bounded memory."""
    return coordinates.split(_tile_length(coordinates.device, prompts), dim=-2)


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
    return _centres(torch.arange(size[0] * size[1], device=region.device), size, region)


def _centres(numbers: Tensor, size: Sequence[int], region: Tensor) -> Tensor:
    """Of some of a grid's pixels, numbered row by row: (N,) -> (B, N, 2)."""
    height, width = size
    places = torch.stack([(numbers % width + 0.5) / width, (numbers // width + 0.5) / height], dim=-1)
    low, high = region[:, None].split(2, dim=-1)
    return low + (high - low) * places
