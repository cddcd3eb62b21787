"""
Adaptive rendering: the field is evaluated on a coarse lattice, then at the pixel centres of finer and finer ones where
these leave the mask undecided; all other values are interpolated.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from imedsam.tiles import evaluate_everywhere, evaluate_points, to_coordinates

if TYPE_CHECKING:
    from imedsam.mask_field import MaskField

# The lattice has so many points along each side at first.
FIRST_LATTICE = 32
# A cell of it is decided if its corners have one sign, the smallest logit is larger than so many times their range,
MARGIN = 0.5
# and the variance of the probability, at most 0.25, differs by less than this between them.
UNCERTAINTY_TOLERANCE = 0.05
# The cells in a prompt's frame are split until so many lie along its shorter side: what holds 1.5 of them, an eighth
# of the side, is always found.
FRAME_CELLS = 12
# Interpolation is taken to be off in a part of a cell by at least so many times what it was in the whole: it is 1/4
# where the field is smooth, and more where it has octaves as short as the cell.
ERROR_DECAY = 0.5


def evaluate_near_boundaries(field: MaskField, size: tuple[int, int], region: Tensor) -> tuple[list[Tensor], int]:
    """As `evaluate_everywhere`, but interpolated where the mask is decided."""
    if min(size) <= FIRST_LATTICE:
        return evaluate_everywhere(field, size, region)
    first, num_points = field.known_lattice(region), 0
    if first is None or not FIRST_LATTICE <= first.shape[-1] <= min(size):
        values, num_points = evaluate_everywhere(field, (FIRST_LATTICE, FIRST_LATTICE), region)
        first = torch.stack(values)
    lattice = Lattice(field, size, region, first)
    while lattice.stride > 1:
        lattice.split()
    return [values.transpose(0, 1).contiguous() for values in lattice.values], num_points + lattice.num_points


class Lattice:
    """
    The values of a field at every `stride`-th pixel centre of a grid. Four neighbours are the corners of a cell.

    Points and cells are numbered through all prompts: number = (row * height + i) * width + j. A cell has the number
    of its first corner.

    Args:
        field: of R images with one prompt each.
        size: (height, width) of the grid.
        region: (R, 4), the rectangles x0, y0, x1, y1 in [-1, 1] that it covers.
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
        interpolated = F.grid_sample(
            first.flatten(0, 2)[None], 2 * places / first.shape[-1] - 1, padding_mode="border", align_corners=False
        )
        # Logits, coarse logits and uncertainty, (M, R, h, w) each, in memory of their own.
        self.values = [
            values.transpose(0, 1).clone(memory_format=torch.contiguous_format)
            for values in interpolated[0].unflatten(0, first.shape[:3])
        ]
        # A cell meets those of the first values that its corners lie in.
        met = _undecided_between(first)[:, (i + 0.5).long()][:, :, (j + 0.5).long()]  # (R, h, w)
        spacing = max(length / first.shape[-1] for length in size)
        undecided = self._meet_small_frames(torch.arange(self.known.numel(), device=field.device), spacing)
        undecided = undecided.view_as(self.known)
        for part in (met[:, :-1], met[:, 1:]):
            undecided[:, :-1, :-1] |= part[:, :, :-1] | part[:, :, 1:]
        undecided[:, -1], undecided[:, :, -1] = False, False  # these points begin no cell
        cells = undecided.flatten().nonzero()[:, 0]
        self._refine(cells, self._corners(cells), first.new_zeros(first.shape[2], len(cells)))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, one per prompt, height and width; the last points lie at the grid's edge if not within it."""
        height, width = (-(-(length - 1) // self.stride) + 1 for length in self.size)
        return len(self.region), height, width

    def split(self) -> None:
        """Halves the stride: interpolates between the points, then refines what that leaves undecided."""
        rows, i, j = self._unravel(self.cells)
        spacing, self.stride = self.stride, self.stride // 2
        _, height, width = self.shape
        self.values = [_insert_midpoints(values, (height, width)) for values in self.values]
        known = self.known.new_zeros(self.shape)
        known[:, ::2, ::2] = self.known[:, : -(-height // 2), : -(-width // 2)]
        self.known = known
        # Each cell's four parts.
        i, j = 2 * i[:, None] + i.new_tensor([0, 0, 1, 1]), 2 * j[:, None] + j.new_tensor([0, 1, 0, 1])
        exist = (i < height - 1) & (j < width - 1)
        cells = ((rows[:, None] * height + i) * width + j)[exist]
        errors, corners = self.errors[:, exist.nonzero()[:, 0]], self._corners(cells)
        logits, uncertainty = (self.values[kind].flatten(1)[:, corners] for kind in (0, 2))
        whole = _is_crossed(logits) | _is_steep(uncertainty) | self._meet_small_frames(cells, spacing)
        asked = whole[:, None] | (logits.abs() < errors[..., None]).any(dim=0)
        undecided = asked.any(dim=-1)
        self._refine(cells[undecided], corners[asked], errors[:, undecided])

    def _refine(self, cells: Tensor, corners: Tensor, errors: Tensor) -> None:
        """
        Evaluates some corners of K cells, where interpolation was taken to be off by `errors`, (M, K). Their parts are
        looked at next, and those of the cells around each point where interpolation had the wrong sign.
        """
        points, off, turned = self._evaluate(corners)
        around = self._cells_around(turned)
        if self.stride == 1:
            self._follow(around)
            return
        around = around[~torch.isin(around, cells)]
        self.cells = torch.cat([cells, around])
        self.errors = torch.maximum(self._largest_error(off, points), F.pad(ERROR_DECAY * errors, (0, len(around))))

    def _largest_error(self, errors: Tensor, points: Tensor) -> Tensor:
        """The largest of the errors at some points, (M, N), in ascending order, among each cell's corners, or 0."""
        corners = self._corners(self.cells)
        index = torch.searchsorted(points, corners)
        found = F.pad(points, (0, 1), value=-1)[index] == corners
        return torch.where(found, F.pad(errors, (0, 1))[:, index], 0.0).amax(dim=-1)

    def _follow(self, cells: Tensor) -> None:
        """
        Evaluates the corners of those of some cells of one pixel that the boundary crosses, of those around each that
        turns out to be on the other side, and so on.
        """
        while len(cells):
            corners = self._corners(cells)
            crossed = _is_crossed(self.values[0].flatten(1)[:, corners])
            _, _, turned = self._evaluate(corners[crossed])
            cells = self._cells_around(turned)

    def _evaluate(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Evaluates the field where that has not been done. Returns these K points in ascending order, how far their
        interpolated logits were off, (M, K), and the points where one of them had the wrong sign.
        """
        points = points[~self.known.view(-1)[points]].unique()
        logits = self.values[0].flatten(1)
        before = logits[:, points]
        if len(points):
            rows, i, j = self._unravel(points)
            places = (torch.stack([j, i], dim=-1) * self.stride + 0.5).minimum(i.new_tensor(self.size[::-1]))
            values = evaluate_points(self.field, rows, to_coordinates(places, self.size, self.region[rows]))
            for whole, part in zip(self.values, values, strict=True):
                whole.view(len(whole), -1)[:, points] = part
            self.known.view(-1)[points] = True
            self.num_points += len(points)
        after = logits[:, points]
        return points, (after - before).abs(), points[((after > 0) != (before > 0)).any(dim=0)]

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


def _undecided_between(first: Tensor) -> Tensor:
    """The undecided cells of the first values (3, R, M, S, S), with half a one at each edge: (R, S + 1, S + 1)."""
    padded = F.pad(first.flatten(0, 1), (1, 1, 1, 1), mode="replicate").unflatten(0, first.shape[:2])
    logits, _, uncertainty = padded.unfold(3, 2, 1).unfold(4, 2, 1).flatten(5).transpose(1, 2)
    low, high = logits.aminmax(dim=-1)
    close = (torch.minimum(low.abs(), high.abs()) < MARGIN * (high - low)).any(dim=0)
    return _is_crossed(logits) | close | _is_steep(uncertainty)


def _insert_midpoints(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolates half way between neighbours: (..., h, w) -> (..., *size), which is at most (2 h - 1, 2 w - 1)."""
    height, width = size
    rows = values.new_empty(*values.shape[:-1], width)
    rows[..., ::2] = values[..., : -(-width // 2)]
    torch.lerp(values[..., : width // 2], values[..., 1 : width // 2 + 1], 0.5, out=rows[..., 1::2])
    result = values.new_empty(*values.shape[:-2], height, width)
    result[..., ::2, :] = rows[..., : -(-height // 2), :]
    torch.lerp(rows[..., : height // 2, :], rows[..., 1 : height // 2 + 1, :], 0.5, out=result[..., 1::2, :])
    return result


def _is_crossed(logits: Tensor) -> Tensor:
    """Whether the boundary of a mask passes between the corners of each cell: (M, ..., 4) -> (...)."""
    inside = logits > 0
    return (inside.any(dim=-1) & ~inside.all(dim=-1)).any(dim=0)


def _is_steep(uncertainty: Tensor) -> Tensor:
    """Whether it changes much from corner to corner of each cell: (M, ..., 4) -> (...)."""
    return (uncertainty.amax(dim=-1) - uncertainty.amin(dim=-1) > UNCERTAINTY_TOLERANCE).any(dim=0)
