"""Pictures of images, masks and uncertainties, for people to look at."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

MASK_COLOURS = ((255, 196, 0), (0, 200, 255), (255, 64, 160), (120, 230, 80))


def overlay(
    image: Image.Image,
    masks: np.ndarray,
    prompts: np.ndarray | Sequence[Sequence[float] | np.ndarray] = (),
    curves: Sequence[Sequence[np.ndarray]] | None = None,
) -> Image.Image:
    """
    Draws masks, tinted and outlined, and prompts over an image.

    Args:
        image: resized to the masks' size if it has another one.
        masks: (P, H, W), bool, a colour each.
        prompts: boxes (x0, y0, x1, y1) or clicks (x, y) in pixels of the masks, the corner of the first pixel being
            (0, 0).
        curves: the masks' outlines, of (N, 2) points in the same frame; by default pixels along the edge.
    """
    height, width = masks.shape[-2:]
    thickness = max(1, round(min(height, width) / 200))
    canvas = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    for index, mask in enumerate(masks):
        colour = np.array(MASK_COLOURS[index % len(MASK_COLOURS)], dtype=np.float32)
        canvas = np.where(mask[..., None], 0.72 * canvas + 0.28 * colour, canvas)
        edge = outline(mask, thickness) if curves is None else draw_curves(curves[index], (height, width), thickness)
        canvas += edge[..., None] * (colour - canvas)
    picture = Image.fromarray(canvas.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for prompt in prompts:
        if len(prompt) == 2:
            draw.circle(tuple(prompt), 2 * thickness, outline=(0, 0, 0), fill=(255, 255, 255))
            continue
        x0, y0, x1, y1 = prompt
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=(255, 255, 255), width=thickness)
    return picture


def draw_curves(curves: Sequence[np.ndarray], size: tuple[int, int], thickness: float) -> np.ndarray:
    """How much of each pixel of a grid (H, W) lies under curves of (N, 2) points (x, y), in [0, 1]."""
    fine = 4
    canvas = Image.new("L", (size[1] * fine, size[0] * fine))
    draw = ImageDraw.Draw(canvas)
    for curve in curves:
        draw.line([tuple(point) for point in curve * fine], fill=255, width=round(thickness * fine), joint="curve")
    return np.asarray(canvas.reduce(fine), dtype=np.float32) / 255


def displayable(image: Image.Image, window: tuple[float, float] | None = None) -> Image.Image:
    """An image of any mode in RGB: 16-bit and float images through the window, or from their least to largest."""
    if image.mode not in ("I", "I;16", "I;16B", "F"):
        return image.convert("RGB")
    values = np.asarray(image, dtype=np.float64)
    low, high = (values.min(), values.max()) if window is None else window
    scaled = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
    return Image.fromarray((255 * scaled).round().astype(np.uint8)).convert("RGB")


def outline(mask: np.ndarray, thickness: int) -> np.ndarray:
    """The pixels of a mask (H, W) that are within `thickness` steps of its outside."""
    inner = mask
    for _ in range(thickness):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def uncertainty_picture(uncertainty: np.ndarray, largest: float = 0.25) -> Image.Image:
    """
    The standard deviation of the probability, black at 0 and white where the variance is `largest`, by default the
    largest that there is; (H, W).
    """
    return Image.fromarray((np.sqrt((uncertainty / max(largest, 1e-12)).clip(0, 1)) * 255).round().astype(np.uint8))


def save_sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], path: Path, names: Sequence[str]) -> None:
    """
    A sheet of pictures, a row per image.

    Args:
        rows: of as many pictures each as there are titles.
        titles: of the columns.
        path: a PNG file.
        names: written beside the rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(titles), 2.6 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for row, pictures, name in zip(axes, rows, names, strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, cmap="gray" if picture.mode == "L" else None, vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=100)


def save_translations(path: Path, rows: Mapping[str, Sequence[ArrayLike]], aspect: float = 1.0) -> None:
    """
    A sheet of translated slices: source, output and, if that is known, the target, and how far the output is from it.

    Args:
        path: a PNG file.
        rows: two or three slices (H, W) in [0, 1] by the name of the slice.
        aspect: of a pixel's height to its width.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    slices = [[np.asarray(image) for image in row] for row in rows.values()]
    errors = [np.abs(row[1] - row[2]) for row in slices if len(row) == 3]
    titles = ("source", "output", "target")[: len(slices[0])]
    figure = Figure(figsize=(2.6 * (len(titles) + bool(errors)) + 0.6, 2.6 * len(rows) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(titles) + bool(errors), squeeze=False)
    for of_row, images, name in zip(axes, slices, rows, strict=True):
        for axis, image in zip(of_row, images, strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=aspect)
        of_row[0].set_ylabel(name, fontsize=8)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title)
    if errors:
        largest = max(float(error.max()) for error in errors) or 1.0
        for of_row, error in zip(axes, errors, strict=True):
            shown = of_row[-1].imshow(error, cmap="inferno", vmin=0, vmax=largest, aspect=aspect)
        axes[0, -1].set_title("error")
        figure.colorbar(shown, ax=axes[:, -1], label="absolute difference")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)
