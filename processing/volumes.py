"""Volumes in NIfTI files as axial slices, and slices as volumes again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

NIFTI = (".nii", ".nii.gz")


@dataclass
class Volume:
    """
    Args:
        slices: (S, H, W) of any real type, from the feet up; rows from front to back, columns from the patient's right
            to the left, as radiologists look at them.
        image: what was read, with its affine and header.
    """

    slices: np.ndarray
    image: Nifti1Image


def is_nifti(path: Path) -> bool:
    return path.name.endswith(NIFTI)


def read_nifti(path: Path) -> Volume:
    """
    Raises:
        ValueError: a file that is no NIfTI volume of three axes.
        ImportError: nibabel is missing.
    """
    nibabel = _import_nibabel()
    try:
        image = nibabel.load(path)
        values = np.asanyarray(image.dataobj)
    except (nibabel.filebasedimages.ImageFileError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"Expected a whole NIfTI file, got {path}, which cannot be read: {error}") from error
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise ValueError(f"Expected a volume of three axes in {path}, got shape {values.shape}: split it first.")
    # Right to left, back to front, feet to head.
    canonical = nibabel.orientations.apply_orientation(values, nibabel.orientations.io_orientation(image.affine))
    return Volume(canonical.transpose(2, 1, 0)[:, ::-1, ::-1], image)


def write_nifti(path: Path, slices: np.ndarray, like: Volume) -> None:
    """Writes slices (S, H, W) where those of another volume are: with its affine, axes and header, as float32."""
    nibabel = _import_nibabel()
    canonical = np.asarray(slices, dtype=np.float32)[:, ::-1, ::-1].transpose(2, 1, 0)
    back = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.io_orientation(like.image.affine)
    )
    header = like.image.header.copy()
    header.set_data_dtype(np.float32)
    header.set_slope_inter(1, 0)
    image = nibabel.Nifti1Image(nibabel.orientations.apply_orientation(canonical, back), like.image.affine, header)
    temporary = path.with_name(f".{path.name}")
    nibabel.save(image, temporary)
    temporary.replace(path)


def _import_nibabel():
    try:
        import nibabel
    except ImportError as error:
        raise ImportError('Expected nibabel for NIfTI files, got none: pip install "imedsam[medical]".') from error
    return nibabel
