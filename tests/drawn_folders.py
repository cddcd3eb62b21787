"""Small data sets in folders, drawn by hand."""

import numpy as np
from PIL import Image

from imedsam.processing.image_processing_imedsam import IMedSamImageProcessor
from imedsam.processing.processing_imedsam import IMedSamProcessor

SIDE = 64


def make_processor(resize_mode="stretch"):
    return IMedSamProcessor(IMedSamImageProcessor(size=SIDE, resize_mode=resize_mode))


def disk(height, width, x, y, radius, value=1):
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return (((columns - x) ** 2 + (rows - y) ** 2) < radius**2).astype(np.uint8) * value


def write_folder(folder, masks, scale=255):
    """A data set whose images show their masks; names a, b, c, ..."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for name, mask in zip("abcdefghij", masks, strict=False):
        Image.fromarray(mask * np.uint8(100)).convert("RGB").save(folder / "images" / f"{name}.jpg")
        Image.fromarray(mask * np.uint8(scale)).save(folder / "masks" / f"{name}.png")
    return folder
