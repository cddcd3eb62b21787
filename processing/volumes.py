"""Volumes in NIfTI files as axial slices, and slices as volumes again."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

NIFTI = (".nii", ".nii.gz")
# Of a volume's range, what lies above is tissue; a slice counts if more than this share of it is tissue.
BACKGROUND, TISSUE_SHARE = 0.1, 0.05


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

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), from voxels to millimetres, of the volume whose axes go to the right, to the front and up."""
        nibabel = _import_nibabel()
        turned = nibabel.orientations.io_orientation(self.image.affine)
        return self.image.affine @ nibabel.orientations.inv_ornt_aff(turned, self.image.shape[:3])

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distances of slices, rows and columns in millimetres."""
        columns, rows, slices = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return slices, rows, columns


def is_nifti(path: Path) -> bool:
    return path.name.endswith(NIFTI)


def get_stem(name: str) -> str:
    """A file's name without its ending: "scan.nii.gz" -> "scan"."""
    suffix = next((end for end in NIFTI if name.endswith(end)), Path(name).suffix)
    return name.removesuffix(suffix)


def get_series(name: str) -> str:
    """What a volume's slices share: the part of a name before the last `_`, "patient-7_041.png" -> "patient-7"."""
    stem = get_stem(name)
    return stem.rpartition("_")[0] or stem


def get_patient(name: str) -> str:
    """
    The part of a file's name before the last `_`, or all of it without one; of names as BIDS has them the subject,
    whatever the session: "sub-01_ses-02_041.png" -> "sub-01".
    """
    series = get_series(name)
    return series.partition("_")[0] if series.startswith("sub-") else series


def get_tissue_shares(slices: np.ndarray, intensity_range: tuple[float, float]) -> np.ndarray:
    """Of slices (S, H, W) of one volume with that range: the share of each that is no background, (S,)."""
    low, high = intensity_range
    return (slices > low + BACKGROUND * (high - low)).mean(axis=(1, 2))


def read_nifti(path: Path) -> Volume:
    """
    Raises:
        ValueError: a file that is no NIfTI volume of three axes and of grey values.
        ImportError: nibabel is missing.
    """
    nibabel = _import_nibabel()
    from nibabel.spatialimages import HeaderDataError

    try:
        image = nibabel.load(path)
        values = np.asanyarray(image.dataobj)
        if path.suffix == ".gz":
            _check_sum(path)
    except FileNotFoundError:
        raise ValueError(f"Expected a NIfTI file at {path}, got no such file.") from None
    except (nibabel.filebasedimages.ImageFileError, HeaderDataError, zlib.error, EOFError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected a whole NIfTI file, got {path}, which cannot be read: {reason}") from error
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise ValueError(f"Expected a volume of three axes in {path}, got shape {values.shape}: split it first.")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"Expected a volume of grey values in {path}, got {values.dtype}: convert it first.")
    if not np.isfinite(image.affine).all() or np.linalg.matrix_rank(image.affine) < 4:
        raise ValueError(f"Expected an affine that places voxels in {path}, got {image.affine.tolist()}: mend it.")
    # Left to right, back to front, feet to head.
    canonical = nibabel.orientations.apply_orientation(values, nibabel.orientations.io_orientation(image.affine))
    return Volume(canonical.transpose(2, 1, 0)[:, ::-1, ::-1], image)


def on_one_grid(one: Volume, other: Volume) -> bool:
    """Whether voxels of the same indices have the same place, however the two are stored, to a thousandth."""
    return one.slices.shape == other.slices.shape and is_one_place(one.affine, other.affine)


def is_one_place(affine: ArrayLike, other: ArrayLike) -> bool:
    """Whether two affines of slices, (4, 4), agree to a thousandth."""
    return np.allclose(affine, other, rtol=1e-3, atol=1e-3)


def write_nifti(path: Path, slices: np.ndarray, like: Volume) -> None:
    """Writes slices (S, H, W) where those of another volume are: with its affine, axes and header, as float32."""
    nibabel = _import_nibabel()
    canonical = np.asarray(slices, dtype=np.float32)[:, ::-1, ::-1].transpose(2, 1, 0)
    back = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.io_orientation(like.image.affine)
    )
    header = like.image.header.copy()
    header.set_data_dtype(np.float32)
    header["cal_min"] = header["cal_max"] = 0  # what viewers show is of the values that were read
    image = type(like.image)(nibabel.orientations.apply_orientation(canonical, back), like.image.affine, header)
    temporary = path.with_name(f".{path.name}")
    nibabel.save(image, temporary)
    temporary.replace(path)


def _check_sum(path: Path) -> None:
    """Of what is compressed; nibabel reads no further than the last voxel, and so not as far as the sum."""
    with gzip.open(path) as file:
        while file.read(2**24):
            pass


def _import_nibabel():
    try:
        import nibabel
    except ImportError as error:
        raise ImportError('Expected nibabel for NIfTI files, got none: pip install "imedsam[medical]".') from error
    return nibabel
