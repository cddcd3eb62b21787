"""
Field -> mask at any size: the field is evaluated at pixel centres, in tiles that bound the memory; at all of them, or
only where a coarse lattice leaves the mask undecided.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from imedsam.implicit_decoder import at_least_float32

if TYPE_CHECKING:
    from imedsam.mask_field import MaskField

RENDER_MODES = ("exact", "adaptive")
# Points times prompts that are evaluated at once: on a CPU few enough for their hidden vectors to stay in its cache,
# on an accelerator enough to keep it busy.
TILE_POINTS = 4096
ACCELERATOR_TILE_POINTS = 65536
# Prompts, and pixels of all of them, that are rendered at once: what is kept beside the result does not grow with the
# number of prompts.
PROMPTS_AT_ONCE = 32
PIXELS_AT_ONCE = 2**22
# Adaptive rendering begins with so many points along each side.
FIRST_LATTICE = 32
# A cell of it is decided if its corners have one sign and the smallest logit is larger than so many times their range;
# a part of a cell, by interpolated corners, if that logit is larger than the error of interpolation at the whole's.
MARGIN = 0.5
# ... and if the variance of the probability, at most 0.25, differs by less than this between them.
UNCERTAINTY_TOLERANCE = 0.05
# The cells in a prompt's frame are split until so many lie along its shorter side: what holds 1.5 of them, an eighth
# of the side, is always found.
FRAME_CELLS = 12


@dataclass
class RenderedMasks:
    """
    A field on a grid of pixel centres, (B, P, M, H, W) each.

    Args:
        logits: foreground where positive.
        coarse_logits: the coarse field's alone. Adaptive rendering does not follow their boundary, where that is not
            the mask's.
        uncertainty: variance of the probability.
        num_points: points at which values were asked for, of all images and prompts; those of the lattice on which the
            threshold is taken, which every rendering needs, are not among them.
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
        mode: "exact": every pixel. "adaptive": a lattice of 32 x 32 points first (or, of the whole image, of
            `config.selection_lattice` if that is more), then the pixels near a boundary; all other values are
            interpolated. A structure that holds an ellipse of 1.5 / 32 of the grid's height and width is never missed,
            nor, within the frame of the prompt, a disk of an eighth of its shorter side (or of 1.5 pixels). Adaptive
            by default, but exact for a field that ranks the grid's pixels (`selection="top_k"`), and for a grid with
            a side of 32 pixels or fewer.
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
    region, field = check_region(region, field), field.eval()
    if field.device.type == "cpu":
        _keep_freed_memory()
    evaluate = _evaluate_near_boundaries if mode == "adaptive" else _evaluate_everywhere
    maps, num_points = None, 0
    prompts_at_once = max(1, min(PROMPTS_AT_ONCE, PIXELS_AT_ONCE // (height * width)))
    for rows in torch.arange(field.batch_size * field.num_prompts, device=field.device).split(prompts_at_once):
        values, points = evaluate(field.at(rows), (height, width), region[rows // field.num_prompts])
        # A tensor of its own for each map, so that who keeps one of them does not keep all.
        maps = maps or [v.new_empty(field.batch_size * field.num_prompts, *v.shape[1:]) for v in values]
        for whole, value in zip(maps, values, strict=True):
            whole[rows[0] : rows[-1] + 1] = value
        num_points += points
    logits, coarse_logits, uncertainty = (whole.unflatten(0, (field.batch_size, -1)) for whole in maps or ())
    return RenderedMasks(logits, coarse_logits, uncertainty, num_points)


@functools.cache
def _keep_freed_memory() -> None:
    """
    Lets one tile's memory serve the next, in this process from now on. glibc gives what is freed back to the system if
    it is more than twice the largest block that was freed before, of those up to 32 MiB (mallopt(3),
    M_MMAP_THRESHOLD): every tile would begin with pages that are to be mapped and zeroed.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


def _evaluate_everywhere(field: MaskField, size: tuple[int, int], region: Tensor) -> tuple[Tensor, int]:
    """Logits, coarse logits and uncertainty of R prompts, (3, R, M, H, W), and the number of points evaluated."""
    tiles = torch.arange(math.prod(size), device=field.device).split(_tile_length(field.device, field.batch_size))
    if bool((region == region[:1]).all()):
        region = region[:1]  # so that the prompts share what depends on the position alone
    if field.selects_on_the_grid:
        uncertainty = [field.uncertainty(_centres(tile, size, region)[:, None]) for tile in tiles]
        field = field.selecting_from(torch.cat(uncertainty, dim=-1))
    values = None
    for tile in tiles:
        part = _evaluate(field, _centres(tile, size, region)[:, None])[:, :, 0]
        values = part.new_empty(*part.shape[:-1], math.prod(size)) if values is None else values
        values[..., tile] = part
    assert values is not None  # a grid has a pixel
    return values.unflatten(-1, size), values[0, :, 0].numel()


def _evaluate_near_boundaries(field: MaskField, size: tuple[int, int], region: Tensor) -> tuple[Tensor, int]:
    if min(size) <= FIRST_LATTICE:
        return _evaluate_everywhere(field, size, region)
    first, num_points = field.known_lattice(region), 0
    if first is None or not FIRST_LATTICE <= first.shape[-1] <= min(size):
        first, num_points = _evaluate_everywhere(field, (FIRST_LATTICE, FIRST_LATTICE), region)
    lattice = _Lattice(field, size, region, first)
    while lattice.stride > 1:
        lattice.split()
    return lattice.values[..., : size[0], : size[1]].transpose(1, 2), num_points + lattice.num_points


def check_region(region: Tensor | None, field: MaskField) -> Tensor:
    """The rectangle x0, y0, x1, y1 to render of each image, (B, 4), from what `render` takes."""
    region = at_least_float32(torch.tensor([-1.0, -1.0, 1.0, 1.0]) if region is None else torch.as_tensor(region))
    if tuple(region.shape) not in ((4,), (1, 4), (field.batch_size, 4)) or not bool(
        (region[..., 2:] > region[..., :2]).all()
    ):
        raise ValueError(
            "Expected region as x0, y0, x1, y1 in [-1, 1] with x0 < x1 and y0 < y1, (4,) or (B, 4) with B = "
            f"{field.batch_size}, got {region.tolist()}."
        )
    return region.expand(field.batch_size, 4).to(field.device)


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
        first: (3, R, M, S, S), the values at the pixel centres of S x S, no finer than the grid.
    """

    def __init__(self, field: MaskField, size: tuple[int, int], region: Tensor, first: Tensor):
        self.field, self.size, self.region = field, size, region
        self.stride = 2 ** int(math.log2(min(size) / first.shape[-1]))
        self.num_points = 0
        self.known = torch.zeros(self.shape, dtype=torch.bool, device=field.device)  # which ones are not interpolated
        # Where the points lie in the first values, from 0 to S.
        i, j = (
            ((torch.arange(points, device=field.device) * self.stride + 0.5) / length).clamp_max(1) * first.shape[-1]
            for points, length in zip(self.shape[1:], size, strict=True)
        )
        places = torch.stack(torch.meshgrid(j, i, indexing="xy"), dim=-1)[None].to(first.dtype)
        values = F.grid_sample(
            first.flatten(0, 2)[None], 2 * places / first.shape[-1] - 1, padding_mode="border", align_corners=False
        )
        self.values = values[0].unflatten(0, first.shape[:3]).transpose(1, 2).contiguous()  # (3, M, R, h, w)
        # The cells of the first values, and half a one along each edge; a finer cell meets those of its corners.
        padded = F.pad(first.flatten(0, 1), (1, 1, 1, 1), mode="replicate").unflatten(0, first.shape[:2])
        corners = padded.unfold(3, 2, 1).unfold(4, 2, 1).flatten(5).transpose(1, 2)
        low, high = corners[0].aminmax(dim=-1)
        undecided = _are_undecided(corners, MARGIN * (high - low))
        around = undecided[:, (i + 0.5).long()][:, :, (j + 0.5).long()]  # (R, h, w)
        spacing = max(length / first.shape[-1] for length in size)
        undecided = self._meet_small_frames(torch.arange(self.known.numel(), device=field.device), spacing)
        undecided = undecided.view_as(self.known)
        for part in (around[:, :-1], around[:, 1:]):
            undecided[:, :-1, :-1] |= part[:, :, :-1] | part[:, :, 1:]
        undecided[:, -1], undecided[:, :, -1] = False, False  # these points begin no cell
        self._refine(undecided.flatten().nonzero()[:, 0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, one per prompt, height and width; the last points may lie beyond the grid."""
        height, width = (-(-length // self.stride) + 1 for length in self.size)
        return len(self.region), height, width

    def split(self) -> None:
        """Halves the stride: interpolates between the points, then refines what that leaves undecided."""
        rows, i, j = self._unravel(self.cells)
        spacing, self.stride = self.stride, self.stride // 2
        _, height, width = self.shape
        finer = [2 * length - 1 for length in self.values.shape[-2:]]
        values = F.interpolate(self.values.flatten(0, 1), finer, mode="bilinear", align_corners=True)
        self.values = values[..., :height, :width].unflatten(0, (3, -1)).contiguous()
        known = self.known.new_zeros(self.shape)
        known[:, ::2, ::2] = self.known[:, : -(-height // 2), : -(-width // 2)]
        self.known = known
        # Each cell's four parts.
        i, j = 2 * i[:, None] + i.new_tensor([0, 0, 1, 1]), 2 * j[:, None] + j.new_tensor([0, 1, 0, 1])
        exist = (i < height - 1) & (j < width - 1)
        cells = ((rows[:, None] * height + i) * width + j)[exist]
        # Pixels that the boundary does not touch stay interpolated, however wrong that may be.
        errors = self.errors if self.stride > 1 else torch.zeros_like(self.errors)
        undecided = _are_undecided(self._values_at(cells), errors[:, exist.nonzero()[:, 0]])
        self._refine(cells[undecided | self._meet_small_frames(cells, spacing)])

    def _refine(self, cells: Tensor) -> None:
        """
        Evaluates the corners of some cells. Their parts are looked at next, and those of the cells around each point
        where interpolation had the wrong sign.
        """
        errors, turned = self._evaluate_corners(cells)
        around = self._cells_around(turned)
        if self.stride == 1:
            self._follow(around)
            return
        around = around[~torch.isin(around, cells)]
        # How far interpolated logits were off at the corners of each cell, (M, K).
        self.cells, self.errors = torch.cat([cells, around]), F.pad(errors, (0, len(around)))

    def _follow(self, cells: Tensor) -> None:
        """
        Evaluates the corners of those of some cells of one pixel that are undecided, of those around each that turns
        out to be on the other side, and so on: in the end all corners of every cell that a boundary crosses have been
        evaluated.
        """
        while len(cells):
            cells = cells[~self.known.view(-1)[self._corners(cells)].all(dim=-1)]
            cells = cells[_are_undecided(self._values_at(cells), 0.0)]
            cells = self._cells_around(self._evaluate_corners(cells)[1])

    def _evaluate_corners(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """
        Evaluates the corners of K cells that are not known yet. Returns how far interpolated logits were off there at
        most, (M, K), and the points where one of them had the wrong sign.
        """
        corners = self._corners(cells)
        unknown = ~self.known.view(-1)[corners]
        points, index = corners[unknown].unique(return_inverse=True)
        errors = self.values.new_zeros(self.values.shape[1], *corners.shape)
        if not len(points):
            return errors.amax(dim=-1), points
        interpolated, values = self.values.flatten(2)[..., points], self._evaluate(points)
        self.values.flatten(2)[..., points], self.known.view(-1)[points] = values, True
        errors[:, unknown] = (values - interpolated)[0].abs()[:, index]
        turned = ((values > 0) != (interpolated > 0))[0].any(dim=0)
        return errors.amax(dim=-1), points[turned]

    def _meet_small_frames(self, cells: Tensor, spacing: float) -> Tensor:
        """
        Which of some cells meet their prompt's frame, if too few points that are so many pixels apart lie along its
        shorter side.
        """
        if self.field.frame is None:
            return torch.zeros_like(cells, dtype=torch.bool)
        pixels = self.region.new_tensor(self.size[::-1]) / (self.region[:, 2:] - self.region[:, :2])
        centre, half_size = self.field.frame.to(self.region.dtype).split(2, dim=-1)
        low, high = ((edge - self.region[:, :2]) * pixels for edge in (centre - half_size, centre + half_size))
        small = spacing * FRAME_CELLS > (high - low).amin(dim=-1)
        rows, i, j = self._unravel(cells)
        first = torch.stack([j, i], dim=-1) * self.stride + 0.5
        return small[rows] & ((first < high[rows]) & (first + self.stride > low[rows])).all(dim=-1)

    def _evaluate(self, points: Tensor) -> Tensor:
        """The field at K points, in ascending order: (3, M, K)."""
        rows, i, j = self._unravel(points)
        self.num_points += len(points)
        places = torch.stack([j, i], dim=-1) * self.stride + 0.5
        return evaluate_points(self.field, rows, to_coordinates(places, self.size, self.region[rows]))

    def _values_at(self, cells: Tensor) -> Tensor:
        """At the corners of K cells: (3, M, K, 4)."""
        return self.values.flatten(2)[..., self._corners(cells)]

    def _corners(self, cells: Tensor) -> Tensor:
        """(K,) -> (K, 4)."""
        width = self.shape[2]
        return cells[:, None] + cells.new_tensor([0, 1, width, width + 1])

    def _cells_around(self, points: Tensor) -> Tensor:
        """The cells that some points are corners of, each once."""
        _, height, width = self.shape
        rows, i, j = (numbers[:, None] for numbers in self._unravel(points))
        i, j = i - i.new_tensor([1, 1, 0, 0]), j - j.new_tensor([1, 0, 1, 0])
        exist = (i >= 0) & (i < height - 1) & (j >= 0) & (j < width - 1)
        return ((rows * height + i) * width + j)[exist].unique()

    def _unravel(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row, i and j."""
        _, height, width = self.shape
        return numbers // (height * width), numbers // width % height, numbers % width


def _are_undecided(corners: Tensor, error: Tensor | float) -> Tensor:
    """
    Whether the boundary of a mask passes through each cell, or may, or the uncertainty changes much.

    Args:
        corners: (3, M, ..., 4), the values at its corners.
        error: (M, ...), how far from the field's their logits may be.

    Returns:
        (...).
    """
    logits, _, uncertainty = corners
    low, high = logits.aminmax(dim=-1)
    crossed = (low <= 0) & (high > 0)
    close = torch.minimum(low.abs(), high.abs()) < error
    steep = uncertainty.amax(dim=-1) - uncertainty.amin(dim=-1) > UNCERTAINTY_TOLERANCE
    return (crossed | close | steep).any(dim=0)


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
    return _centres(torch.arange(size[0] * size[1], device=region.device), size, region)


def _centres(numbers: Tensor, size: Sequence[int], region: Tensor) -> Tensor:
    """Of some of a grid's pixels, numbered row by row: (N,) -> (B, N, 2)."""
    places = torch.stack([numbers % size[1], numbers // size[1]], dim=-1) + 0.5
    return to_coordinates(places, size, region[:, None])


def to_coordinates(places: Tensor, size: Sequence[int], region: Tensor) -> Tensor:
    """Places (..., 2) as (x, y) in pixels of a grid, (0, 0) its corner, and the rectangle (..., 4) that it covers."""
    low, high = region.split(2, dim=-1)
    return low + (high - low) * (places.to(region.dtype) / region.new_tensor([size[1], size[0]]))
