"""Field -> closed curves: the outlines of masks with sub-pixel accuracy, from the field and not from its pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from contourpy import FillType, contour_generator
from torch import Tensor

from imedsam.mask_field import MaskField
from imedsam.rendering import RenderedMasks, check_region, render
from imedsam.tiles import evaluate_points, to_coordinates

# A vertex is found when it moves by less than this, in pixels; at most so many evaluations find it.
TOLERANCE = 0.01
MAX_STEPS = 8


@dataclass
class Contour:
    """
    The outline of one component of a mask. Curves are closed: the last point is the first.

    Args:
        exterior: (N, 2), (x, y); with y downward the curve runs clockwise as one sees it (its shoelace area is > 0).
        holes: of (K, 2), the other way round.
    """

    exterior: np.ndarray
    holes: list[np.ndarray]

    @property
    def area(self) -> float:
        """Of the component, without its holes."""
        return _signed_area(self.exterior) + sum(map(_signed_area, self.holes))


@torch.no_grad()
def find_contours(
    field: MaskField,
    output_size: Sequence[int],
    region: Tensor | None = None,
    spacing: tuple[float, float] = (1.0, 1.0),
    rendered: RenderedMasks | None = None,
    origin: tuple[float, float] = (0.0, 0.0),
) -> list[list[list[list[Contour]]]]:
    """
    The outlines of a field's masks. A grid tells which components and holes there are; each vertex is then moved along
    its grid edge to the root of the field itself, or to the place where the field jumps through 0.

    Args:
        output_size: (height, width) of the grid.
        region: (4,) or (B, 4), the rectangle x0, y0, x1, y1 in [-1, 1] that it covers; the whole square by default.
        spacing: (x, y) size of a pixel, such as in millimetres.
        rendered: what `field.render(output_size, region)` gave, if that has been done already.
        origin: (x, y) of the grid's upper left corner, in the unit of the spacing.

    Returns:
        For each image, prompt and mask its components, the largest first. `origin` is the upper left corner of the
        upper left pixel, `origin + spacing` its lower right one. What the rectangle cuts is closed along its edge.
    """
    field = field.eval()
    rendered = render(field, output_size, region) if rendered is None else rendered
    if (size := tuple(rendered.logits.shape[-2:])) != tuple(output_size):
        expected = tuple(output_size)
        raise ValueError(f"Expected rendered masks of the output_size {expected}, got {size}: give theirs.")
    if field.selects_on_the_grid:
        field = field.selecting_from(rendered.uncertainty.flatten(-2))  # the threshold of the masks
    height, width = rendered.logits.shape[-2:]
    square = check_region(region, field)

    def logits_at(rows: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Of all masks (M, K), at K points of the grid's frame, rows ascending."""
        of = torch.from_numpy(rows).to(field.device)
        places = torch.from_numpy(points).to(square)
        coordinates = to_coordinates(places, (height, width), square[of // field.num_prompts])
        return evaluate_points(field, of, coordinates)[0].cpu().numpy().astype(np.float64)

    x, y = (np.concatenate([[-1, 0], np.arange(n) + 0.5, [n, n + 1]]) for n in (width, height))
    logits = rendered.logits.flatten(0, 1).cpu().numpy().astype(np.float64)  # (R, M, H, W)
    logits = _with_border(logits, x, y, logits_at)
    rings, owners, vertices = [], [], []
    for row in range(logits.shape[0]):
        for mask in range(logits.shape[1]):
            for component in _trace(logits[row, mask], x, y):
                rings.append([len(ring) for ring in component])
                owners.append((row, mask))
                vertices += component
    components: list[list[list[Contour]]] = [[[] for _ in range(logits.shape[1])] for _ in range(logits.shape[0])]
    if vertices:
        lengths = [sum(component) for component in rings]
        rows, masks_ = np.repeat(np.array(owners), lengths, axis=0).T
        points = _refine(np.concatenate(vertices), rows, masks_, logits, x, y, logits_at)
        points = np.array(origin) + points.clip(0, [width, height]) * np.array(spacing)
        curves = iter(np.split(points, np.cumsum([n for component in rings for n in component])[:-1]))
        for (row, mask), ring_lengths in zip(owners, rings, strict=True):
            exterior, *holes = (_closed(next(curves)) for _ in ring_lengths)
            components[row][mask].append(Contour(exterior, holes))
    for row_components in components:
        for found in row_components:
            found.sort(key=lambda contour: -contour.area)
    prompts = field.num_prompts
    return [components[image * prompts : (image + 1) * prompts] for image in range(field.batch_size)]


def to_geojson(
    contours: Sequence[Contour], properties: Mapping[str, Any], spacing: tuple[float, float] = (1.0, 1.0)
) -> dict:
    """
    The components of a mask as a GeoJSON Feature (RFC 7946), a MultiPolygon in the contours' own coordinates times
    `spacing`, the (x, y) size of a pixel.
    """
    polygons = [
        [(curve * np.array(spacing)).tolist() for curve in (contour.exterior, *contour.holes)] for contour in contours
    ]
    return {
        "type": "Feature",
        "properties": dict(properties),
        "geometry": {"type": "MultiPolygon", "coordinates": polygons},
    }


def to_coco(contours: Sequence[Contour], mask: np.ndarray) -> dict:
    """
    The components of a mask as the fields `segmentation`, `area` and `bbox` of a COCO annotation.

    Args:
        contours: in pixels of the mask, (0, 0) the corner of its first.
        mask: (H, W), bool, the same mask: COCO's polygons have no holes, so that a mask with some is given by its runs
            of pixels, not compressed.

    Raises:
        ValueError: a mask of another shape, or that cannot be the contours': its area differs by more than its outline
            can explain, or pixels lie outside of their box, as in a mask of another size or of a part of the image.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(
            f"Expected one mask (H, W), got an array of shape {mask.shape}: take one prompt's, one class's."
        )
    points = np.concatenate([contour.exterior for contour in contours]) if contours else np.zeros((1, 2))
    low, high = points.min(axis=0), points.max(axis=0)
    area = sum(contour.area for contour in contours)
    rings = [ring for contour in contours for ring in (contour.exterior, *contour.holes)]
    length = sum(np.linalg.norm(np.diff(ring, axis=0), axis=-1).sum() for ring in rings)
    centres = np.argwhere(mask)[:, ::-1] + 0.5
    if abs(area - len(centres)) > length + len(rings) or ((centres < low - 1) | (centres > high + 1)).any():
        raise ValueError(
            f"Expected the mask that the contours are of, in its pixels, got contours of area {area:.1f} from "
            f"{low.round(1).tolist()} to {high.round(1).tolist()} and a mask of {len(centres)} pixels out of "
            f"{mask.shape[1]} x {mask.shape[0]}: take both of the whole image, at its own size."
        )
    segmentation: Any = [contour.exterior[:-1].flatten().tolist() for contour in contours]
    if any(contour.holes for contour in contours):
        segmentation = {"size": list(mask.shape), "counts": _run_lengths(mask)}
    return {"segmentation": segmentation, "area": area, "bbox": [*low.tolist(), *(high - low).tolist()]}


def _run_lengths(mask: np.ndarray) -> list[int]:
    """Column by column, of 0 and 1 in turn, from a run of 0."""
    pixels = np.concatenate([[0], mask.T.flatten().astype(np.int8), [0]])
    changes = np.flatnonzero(np.diff(pixels))
    ends = np.concatenate([changes, [mask.size]]) if not mask[-1, -1] else changes
    return np.diff(ends, prepend=0).tolist()


def _with_border(logits, x, y, logits_at):
    """The grid with the field along the rectangle's edge around it, and around that nothing."""
    rows, masks, height, width = logits.shape
    framed = np.full((rows, masks, height + 4, width + 4), -1.0)
    framed[..., 2:-2, 2:-2] = logits
    on_border = np.zeros((height + 4, width + 4), dtype=bool)
    on_border[1:-1, 1:-1] = True
    on_border[2:-2, 2:-2] = False
    i, j = on_border.nonzero()
    points = np.tile(np.stack([x[j], y[i]], axis=-1), (rows, 1))
    border = logits_at(np.repeat(np.arange(rows), len(i)), points)
    framed[..., i, j] = border.reshape(masks, rows, len(i)).transpose(1, 0, 2)
    return framed


def _trace(logits: np.ndarray, x: np.ndarray, y: np.ndarray) -> list[list[np.ndarray]]:
    """Components as [exterior, *holes], whose vertices lie on the grid's edges."""
    generator = contour_generator(x, y, logits, fill_type=FillType.OuterOffset)
    points, offsets = cast(tuple[list, list], generator.filled(0.0, max(1.0, 2 * logits.max())))
    return [
        [component[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]
        for component, ends in zip(points, offsets, strict=True)
    ]


def _refine(points, rows, masks, logits, x, y, logits_at):
    """
    Moves vertices on edges of the grid to the field's roots. Each stays between two points of different signs: the
    next one is the secant's, or half way where the secant did not get much closer to 0, as at a jump.
    """
    (j, from_x), (i, from_y) = (_nearest_line(lines, points[:, axis]) for axis, lines in enumerate((x, y)))
    along_x = np.abs(from_y) <= np.abs(from_x)  # the edge lies on a line of the other axis, up to rounding
    j, i = j - (along_x & (from_x < 0)), i - (~along_x & (from_y < 0))
    low, high = np.stack([x[j], y[i]], axis=-1), np.stack([x[j + along_x], y[i + ~along_x]], axis=-1)
    at_low, at_high = logits[rows, masks, i, j], logits[rows, masks, i + ~along_x, j + along_x]
    # What the rectangle's edge cuts has no root; a vertex on a point of the grid has its root already.
    inner = ((low >= 0) & (high <= [x[-2], y[-2]])).all(axis=-1)
    active = np.flatnonzero(inner & ((at_low > 0) != (at_high > 0)))
    points = points.copy()
    low, high, at_low, at_high = low[active], high[active], at_low[active], at_high[active]
    halve = np.zeros(len(active), dtype=bool)
    for step in range(MAX_STEPS):
        if not len(active):
            break
        share = np.where(halve, 0.5, at_low / (at_low - at_high))
        middle = low + (high - low) * share[:, None]
        value = logits_at(rows[active], middle)[masks[active], np.arange(len(active))]
        moved = np.abs(middle - points[active]).max(axis=-1)
        points[active] = middle
        halve = np.abs(value) > 0.5 * np.minimum(np.abs(at_low), np.abs(at_high))
        is_low = (value > 0) == (at_low > 0)
        low, at_low = np.where(is_low[:, None], middle, low), np.where(is_low, value, at_low)
        high, at_high = np.where(is_low[:, None], high, middle), np.where(is_low, at_high, value)
        keep = (moved > TOLERANCE) | halve | (step == 0)
        active, low, high, at_low, at_high, halve = (
            values[keep] for values in (active, low, high, at_low, at_high, halve)
        )
    return points


def _nearest_line(lines: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the nearest of ascending lines, and the distance from it, with its sign."""
    index = np.searchsorted((lines[:-1] + lines[1:]) / 2, places)
    return index, places - lines[index]


def _closed(ring: np.ndarray) -> np.ndarray:
    """Its last point was found apart from its first, and may differ by rounding."""
    ring[-1] = ring[0]
    return ring


def _signed_area(ring: np.ndarray) -> float:
    x, y = ring.T
    return float(0.5 * np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))
