"""NIfTI volumes as axial slices and back: places, axes, headers, and files that are none."""

import gzip
import sys

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff

from imedsam.processing.volumes import (
    get_patient,
    get_series,
    get_stem,
    get_tissue_shares,
    is_nifti,
    on_one_grid,
    read_nifti,
    write_nifti,
)

SHAPE = (5, 6, 7)
ORIENTATIONS = ("RAS", "LPS", "LAS", "PSR", "AIL", "SRP", "IPL")


def affine_of(codes, shape=SHAPE, spacing=(0.9, 1.1, 3.0), degrees=0.0):
    """Of a volume whose axes go to `codes`, then turned around two axes."""
    a, b = np.radians(degrees), np.radians(degrees / 2)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag(spacing)
    affine[:3, 3] = (-40, 20, 7)
    return affine @ np.linalg.inv(inv_ornt_aff(axcodes2ornt(codes), shape))


def save(path, values, affine, **header):
    image = nibabel.Nifti1Image(values, affine)
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("degrees", [0, 20])
def test_round_trip(tmp_path, codes, degrees):
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    path = save(tmp_path / "a.nii.gz", values, affine_of(codes, degrees=degrees))
    volume = read_nifti(path)
    write_nifti(tmp_path / "b.nii.gz", volume.slices, volume)
    one, other = nibabel.load(path), nibabel.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(other.get_fdata(), values)
    np.testing.assert_array_equal(other.affine, one.affine)
    assert nibabel.aff2axcodes(other.affine) == tuple(codes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]
    assert is_nifti(path) and is_nifti(tmp_path / "a.nii") and not is_nifti(tmp_path / "a.nii.png")


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("degrees", [0, 20])
def test_slices_lie_as_radiologists_look_at_them(tmp_path, codes, degrees):
    """Markers at places known in millimetres: x to the right of the patient, y to the front, z up (RAS)."""
    affine = affine_of(codes, degrees=degrees)
    indices = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    places = indices @ affine[:3, :3].T + affine[:3, 3]
    turn = affine_of("RAS", degrees=degrees)[:3, :3]
    turn = turn / np.linalg.norm(turn, axis=0)
    right, front, up = np.moveaxis(places @ turn, -1, 0)  # along the volume's own axes
    for values, axis, sign in ((right, 2, -1), (front, 1, -1), (up, 0, 1)):
        slices = read_nifti(save(tmp_path / "a.nii", values, affine)).slices
        steps = np.diff(slices, axis=axis) * sign
        assert (steps > 0.5).all()  # columns from right to left, rows from front to back, slices from the feet up
        others = [other for other in range(3) if other != axis]
        assert all(np.abs(np.diff(slices, axis=other)).max() < 1e-9 for other in others)


def test_header_and_values(tmp_path):
    """Values are those that the file means; what says how they are stored and shown is not carried along."""
    stored = np.arange(210, dtype=np.int16).reshape(SHAPE)
    image = nibabel.Nifti1Image(stored, affine_of("LPS", degrees=10))
    image.header.set_slope_inter(0.5, -3)
    image.header["descrip"] = b"a head"
    image.header["cal_max"] = 90
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=2)
    image.header.set_xyzt_units("mm", "sec")
    path = tmp_path / "a.nii.gz"
    nibabel.save(image, path)
    volume = read_nifti(path)
    assert (volume.slices.min(), volume.slices.max()) == (-3, 0.5 * 209 - 3)
    write_nifti(tmp_path / "b.nii.gz", volume.slices / 100, volume)
    written = nibabel.load(tmp_path / "b.nii.gz")
    assert written.get_data_dtype() == np.float32 and written.header["cal_max"] == 0
    np.testing.assert_allclose(written.get_fdata(), (0.5 * stored - 3) / 100, rtol=1e-6)
    assert written.header["descrip"].item() == b"a head" and written.header.get_xyzt_units() == ("mm", "sec")
    assert (written.header["qform_code"], written.header["sform_code"]) == (1, 2)
    np.testing.assert_allclose(written.get_qform(), image.affine, atol=1e-5)
    np.testing.assert_array_equal(volume.slices, read_nifti(path).slices)  # what was read is as it was


def test_nifti_2_stays_nifti_2(tmp_path):
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    image = nibabel.Nifti2Image(values, affine_of("PSR"))
    image.set_sform(image.affine, code=4)
    nibabel.save(image, tmp_path / "a.nii")
    volume = read_nifti(tmp_path / "a.nii")
    write_nifti(tmp_path / "b.nii", volume.slices, volume)
    written = nibabel.load(tmp_path / "b.nii")
    assert type(written) is nibabel.Nifti2Image and written.header["sform_code"] == 4
    np.testing.assert_array_equal(written.get_fdata(), values)


def test_one_frame(tmp_path):
    values = np.random.default_rng(0).normal(size=(*SHAPE, 1)).astype(np.float32)
    volume = read_nifti(save(tmp_path / "a.nii", values, affine_of("LAS")))
    assert volume.slices.shape == SHAPE[::-1]
    write_nifti(tmp_path / "b.nii", volume.slices, volume)
    np.testing.assert_array_equal(nibabel.load(tmp_path / "b.nii").get_fdata(), values[..., 0])


def test_grids(tmp_path):
    """However two volumes are stored, they agree if the same voxels have the same places."""
    values = np.random.default_rng(0).normal(size=SHAPE)
    image = nibabel.Nifti1Image(values, affine_of("RAS", degrees=10))
    back = nibabel.orientations.ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("PIR"))
    nibabel.save(image.as_reoriented(back), tmp_path / "turned.nii")
    volume, turned = read_nifti(save(tmp_path / "a.nii", values, image.affine)), read_nifti(tmp_path / "turned.nii")
    assert turned.image.shape != volume.image.shape and on_one_grid(volume, turned)
    np.testing.assert_array_equal(turned.slices, volume.slices)
    assert volume.spacing == turned.spacing == pytest.approx((3.0, 1.1, 0.9))
    moved = image.affine.copy()
    moved[2, 3] += 1
    assert not on_one_grid(volume, read_nifti(save(tmp_path / "b.nii", values, moved)))
    assert not on_one_grid(volume, read_nifti(save(tmp_path / "c.nii", values[1:], image.affine)))


def test_files_that_are_no_volumes(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.arange(8000.0).reshape(20, 20, 20), np.eye(4))
    whole, plain = path.read_bytes(), gzip.decompress(path.read_bytes())
    header = bytearray(plain)
    header[70:72] = b"\xff\x7f"  # a type of values that there is none of
    damaged = {
        "half.nii.gz": whole[: len(whole) // 2],
        "changed.nii.gz": whole[:5000] + bytes(1) + whole[5001:],
        "worse.nii.gz": whole[:1000] + b"\xff" * 2000 + whole[3000:],
        "short.nii": plain[:5000],
        "type.nii": bytes(header),
        "text.nii.gz": b"no volume",
        "empty.nii": b"",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=f"Expected a whole NIfTI file, got .*{name}, which cannot be read: [^\n]+$"
        ):
            read_nifti(tmp_path / name)
    with pytest.raises(ValueError, match="Expected a NIfTI file at .*none.nii, got no such file"):
        read_nifti(tmp_path / "none.nii")
    with pytest.raises(ValueError, match=r"three axes in .*, got shape \(4, 4, 4, 2\): split it first"):
        read_nifti(save(tmp_path / "b.nii", np.zeros((4, 4, 4, 2)), np.eye(4)))
    with pytest.raises(ValueError, match="grey values in .*, got complex64: convert it first"):
        read_nifti(save(tmp_path / "c.nii", np.zeros((4, 4, 4), np.complex64), np.eye(4)))


def test_without_nibabel(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii", np.zeros(SHAPE), np.eye(4))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(
        ImportError, match=r'Expected nibabel for NIfTI files, got none: pip install "imedsam\[medical\]"'
    ):
        read_nifti(path)


def test_patients_of_names():
    names = {
        "a_12.png": "a",
        "a.png": "a",
        "_1.png": "_1",
        "x_y_3.tif": "x_y",
        "s_t1.nii.gz": "s",
        "IXI002-Guys.nii": "IXI002-Guys",
        "sub-01_ses-02_T1w.nii.gz": "sub-01",
    }
    assert {name: get_patient(name) for name in names} == names
    assert get_series("sub-01_ses-02_041.png") == "sub-01_ses-02" and get_series("x_y_3.tif") == "x_y"
    assert [get_stem(name) for name in ("a.b_1.nii.gz", "a.nii", "a.b.png")] == ["a.b_1", "a", "a.b"]


def test_affines_that_place_nothing(tmp_path):
    for affine in (np.zeros((4, 4)), np.diag([np.nan, 1, 1, 1])):
        header = nibabel.Nifti1Header()
        header.set_data_shape((3, 4, 5))
        header["sform_code"], header["qform_code"] = 1, 0
        for name, row in zip(("srow_x", "srow_y", "srow_z"), affine, strict=False):
            header[name] = row
        path = tmp_path / "a.nii"
        path.write_bytes(header.binaryblock + bytes(4) + bytes(4 * 60))
        with pytest.raises(ValueError, match="Expected an affine that places voxels in .*a.nii, got"):
            read_nifti(path)


def test_tissue_is_what_is_above_a_tenth_of_the_range():
    slices = np.zeros((2, 10, 10))
    slices[0, :2, :5], slices[1, 0, :2] = -80, -79.99  # of -100 to 100
    slices[slices == 0] = -100
    assert get_tissue_shares(slices, (-100, 100)).tolist() == [0.0, 0.02]
