"""Field -> mask at any size: at all pixel centres, or only where a coarse lattice leaves the mask undecided."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from imedsam.adaptive_rendering import evaluate_near_boundaries
from imedsam.tiles import evaluate_everywhere, position_dtype

if TYPE_CHECKING:
    from imedsam.mask_field import MaskField

RENDER_MODES = ("exact", "adaptive")
# Prompts, and pixels of all of them, that are rendered at once: what is kept beside the result does not grow with the
# number of prompts.
PROMPTS_AT_ONCE = 32
PIXELS_AT_ONCE = 2**22


@dataclass
class RenderedMasks:
    """
    A field on a grid of pixel centres, (B, P, M, H, W) each.

    Args:
        logits: foreground where positive.
        coarse_logits: the coarse field's alone. Adaptive rendering does not follow their boundary, where that is not
            the mask's.
        uncertainty: variance of the probability. Away from boundaries adaptive rendering interpolates it, as the
            logits, and `scores` are of what it gives: compare them with those of the same mode.
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
            nor, within the frame of the prompt (of an implicit field), a disk of an eighth of its shorter side (or of
            1.5 pixels). A grid with a side of 32 pixels or fewer is exact. The field's `default_mode` by default:
            adaptive, but exact for a field that ranks the grid's pixels (`selection="top_k"`) or interpolates another
            grid (SAM's own decoder).
    """
    mode = field.default_mode if mode is None else mode
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
    evaluate = evaluate_near_boundaries if mode == "adaptive" else evaluate_everywhere
    num_masks, num_points = field.batch_size * field.num_prompts, 0
    prompts_at_once = max(1, min(PROMPTS_AT_ONCE, PIXELS_AT_ONCE // (height * width)))
    maps: list[Tensor] = []
    for rows in torch.arange(num_masks, device=field.device).split(prompts_at_once):
        values, points = evaluate(field.at(rows), (height, width), region[rows // field.num_prompts])
        num_points += points
        if len(rows) == num_masks:
            maps = values
        else:
            maps = maps or [part.new_empty(num_masks, *part.shape[1:]) for part in values]
            for whole, part in zip(maps, values, strict=True):
                whole[rows[0] : rows[-1] + 1] = part
    logits, coarse_logits, uncertainty = (whole.unflatten(0, (field.batch_size, -1)) for whole in maps)
    return RenderedMasks(logits, coarse_logits, uncertainty, num_points)


def check_region(region: Tensor | None, field: MaskField) -> Tensor:
    """
    The rectangle x0, y0, x1, y1 to render of each image, (B, 4), in `position_dtype`, from what `render` takes.
    """
    try:
        region = torch.as_tensor([-1.0, -1.0, 1.0, 1.0] if region is None else region, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected region as numbers x0, y0, x1, y1, got {region!r}: {error}.") from error
    if tuple(region.shape) not in ((4,), (1, 4), (field.batch_size, 4)) or not bool(
        (region[..., 2:] > region[..., :2]).all() and (region.abs() < 1 + 1e-6).all()
    ):
        raise ValueError(
            "Expected region as x0, y0, x1, y1 in [-1, 1] with x0 < x1 and y0 < y1, (4,) or (B, 4) with B = "
            f"{field.batch_size}, got {region.tolist()}."
        )
    return region.expand(field.batch_size, 4).to(field.device, position_dtype(field.device))


def _check_size(output_size: Sequence[int]) -> tuple[int, int]:
    try:
        sides = np.asarray(output_size)
    except ValueError:  # rows of different lengths
        sides = np.empty(0)
    if sides.shape != (2,) or not np.issubdtype(sides.dtype, np.integer) or (sides < 1).any():
        raise ValueError(
            f"Expected output_size as (height, width), both at least 1, got {output_size}: give two integers."
        )
    return int(sides[0]), int(sides[1])


@functools.cache
def _keep_freed_memory() -> None:
    """
    Lets one tile's memory serve the next, in this process from now on. glibc gives what is freed back to the system if
    it is more than twice the largest block that was freed before, of those up to 32 MiB (mallopt(3),
    M_MMAP_THRESHOLD): every tile would begin with pages that are to be mapped and zeroed.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")
