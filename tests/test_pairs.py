"""Pairs of slices from two folders."""

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from translation_folders import write_pictures, write_volumes

from imedsam.processing.image_processing_sam_i2i import SamI2IImageProcessor
from imedsam.training import pairs as pairs_module
from imedsam.training.data import EpochSampler
from imedsam.training.pairs import SlicePairs, batches_of_one_size, find_pairs, split_patients

PROCESSOR = SamI2IImageProcessor(percentiles=(0, 100))


def find(folder, **options):
    return find_pairs(folder / "source", folder / "target", PROCESSOR, folder / "cache", **options)


def test_pictures_are_paired_by_name_and_scaled_by_the_patients_range(tmp_path):
    folder = write_pictures(tmp_path, {"b": 1})
    for contrast, scale in (("source", 1000), ("target", 500)):
        for index, level in enumerate((10, 40)):
            grey = np.full((16, 24), level * scale, dtype=np.uint16)
            grey[0, 0] = 0
            Image.fromarray(grey).save(folder / contrast / f"a_2_{index}.png")
    found = find(folder)
    assert [(pair.name, pair.patient) for pair in found] == [("a_2_0", "a_2"), ("a_2_1", "a_2"), ("b_0", "b")]
    assert found[0].source.intensity_range == (0, 40000) and found[0].target.intensity_range == (0, 20000)
    item = SlicePairs(found, PROCESSOR)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (PROCESSOR.image_mean, PROCESSOR.image_std))
    expected = torch.full((3, 16, 24), 0.25)
    expected[:, 0, 0] = 0
    assert_close(item["pixel_values"] * std + mean, expected)
    assert_close(item["labels"], expected[:1])
    assert item["original_sizes"].tolist() == [16, 24]


def test_batches_pad_the_smaller_slice_with_black(tmp_path):
    write_pictures(tmp_path / "small", {"a": 1}, side=16)
    write_pictures(tmp_path / "large", {"b": 1}, side=32)
    small, large = (SlicePairs(find(tmp_path / size), PROCESSOR) for size in ("small", "large"))
    batch = small.collate([small[0], large[0]])
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["labels"].shape == (2, 1, 32, 32)
    assert torch.equal(batch["pixel_values"][0, :, :16, :16], small[0]["pixel_values"])
    assert torch.equal(batch["pixel_values"][1], large[0]["pixel_values"])
    black = PROCESSOR.preprocess(np.zeros((8, 8)), intensity_range=(0, 1))["pixel_values"][0, :, 0, 0]
    assert torch.equal(batch["pixel_values"][0, :, 20, 3], black) and torch.equal(
        batch["pixel_values"][0, :, 3, 20], black
    )
    assert batch["labels"][0, 0, 16:].abs().max() == batch["labels"][0, 0, :, 16:].abs().max() == 0
    assert batch["original_sizes"].tolist() == [[16, 16], [32, 32]]
    both = [*small.pairs, *large.pairs, *large.pairs, *large.pairs]
    assert batches_of_one_size(both, 2) == [[0], [1, 2], [3]]


def test_a_sampler_takes_a_data_set_without_epochs(tmp_path):
    sampler = EpochSampler(SlicePairs(find(write_pictures(tmp_path, {"a": 9})), PROCESSOR), seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == sorted(sampler) == list(range(9)) and first != list(sampler)


# Volumes


@pytest.fixture
def slices():
    """Four slices 8 x 6: empty, with 1, with 12 and with 48 of 48 pixels above the background."""
    slices = np.zeros((4, 8, 6))
    slices[1, 0, 0] = 1000
    slices[2, :2] = np.arange(12).reshape(2, 6) * 50 + 150
    slices[3] = 700
    slices[0, 4:] = 90  # less than a tenth of the range
    return slices


def test_volumes_are_read_as_axial_slices_with_tissue(tmp_path, slices):
    write_volumes(tmp_path, slices)
    found = find(tmp_path)
    assert [pair.name for pair in found] == ["p1_scan_002", "p1_scan_003"] and found[0].patient == "p1"
    assert len(find(tmp_path, tissue_share=0.0)) == 3 and len(find(tmp_path, tissue_share=0.5)) == 1
    assert found[0].source.intensity_range == (0, 1000) and found[0].target.intensity_range == (0, 2000)
    np.testing.assert_array_equal(found[0].source.read(), slices[2])
    np.testing.assert_array_equal(found[1].target.read(), 2 * slices[3])
    item = SlicePairs(found, PROCESSOR)[0]
    assert_close(item["labels"][0, :, :6], torch.from_numpy(slices[2] / 1000).float())


def test_volumes_are_unpacked_once(tmp_path, slices, monkeypatch):
    write_volumes(tmp_path, slices)
    first = find(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pairs_module, "read_nifti", None)
        assert find(tmp_path) == first
    assert len(list((tmp_path / "cache").iterdir())) == 4  # two volumes, and what is known of them
    write_volumes(tmp_path, slices + 1)  # another content is another volume
    assert find(tmp_path)[0].source.read()[0, 0] == slices[2, 0, 0] + 1


def test_volumes_that_cannot_be_paired(tmp_path, slices):
    write_volumes(tmp_path, slices)
    write_volumes(tmp_path / "other", slices[:, :, :5])
    (tmp_path / "other" / "target" / "p1_scan.nii.gz").replace(tmp_path / "target" / "p1_scan.nii.gz")
    with pytest.raises(ValueError, match=r"Expected volumes on one grid, got .* \[4, 8, 6\], and .* \[4, 8, 5\]: reg"):
        find(tmp_path)
    write_volumes(tmp_path, slices)
    path = tmp_path / "target" / "p1_scan.nii.gz"
    elsewhere = np.array([[1.0, 0, 0, 100], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(nibabel.load(path).dataobj, elsewhere), path)
    with pytest.raises(ValueError, match="Expected volumes on one grid, got other sizes or places of .*register"):
        find(tmp_path)
    empty = np.zeros_like(slices)
    write_volumes(tmp_path / "empty", empty)
    with pytest.raises(ValueError, match="Expected slices with more than 0.05 of tissue in .*lower --tissue_share"):
        find(tmp_path / "empty")


def test_a_volume_with_nan_is_named(tmp_path):
    for contrast in ("source", "target"):
        (tmp_path / contrast).mkdir()
        values = np.full((4, 4, 2), np.nan, dtype=np.float32)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / contrast / "a.nii")
    with pytest.raises(ValueError, match="source/a.nii: Expected finite values"):
        find(tmp_path)


# Errors


def test_files_without_a_partner_are_named(tmp_path):
    folder = write_pictures(tmp_path, {"a": 8})
    (folder / "target" / "a_3.png").unlink()
    with pytest.raises(ValueError, match=r"Expected files of equal names, got a_3.png in .*source alone"):
        find(folder)
    for index in range(7):
        (folder / "source" / f"a_{index}.png").unlink()
    with pytest.raises(ValueError, match=r"got a_0.png, .*, a_5.png and 1 more in .*target alone"):
        find(folder)


def test_folders_that_are_not_there_or_empty(tmp_path):
    with pytest.raises(ValueError, match="Expected a folder of slices or volumes, got .*source"):
        find(tmp_path)
    for contrast in ("source", "target"):
        (tmp_path / contrast).mkdir()
    (tmp_path / "source" / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match="Expected .png, .tif, .tiff, .nii, .nii.gz files in .*source, got none"):
        find(tmp_path)


def test_slices_that_cannot_be_paired(tmp_path):
    folder = write_pictures(tmp_path, {"a": 2})
    Image.new("L", (32, 30)).save(folder / "target" / "a_1.png")
    with pytest.raises(ValueError, match=r"got \(32, 32\) in .*source/a_1.png and \(30, 32\) in .*target/a_1.png"):
        find(folder)
    Image.new("RGB", (32, 32), (1, 2, 3)).save(folder / "target" / "a_1.png")
    with pytest.raises(ValueError, match="target, a_0.png, a_1.png: Expected slice 1 to be grey"):
        find(folder)
    (folder / "target" / "a_1.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="Expected an image at .*a_1.png, got a file that cannot be read"):
        find(folder)


# Splits


PATIENTS = [f"p{index}" for index in range(10)] * 3


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_is_in_two_splits(seed):
    splits = split_patients(PATIENTS, validation=0.1, test=0.2, seed=seed)
    assert {split: len(names) for split, names in splits.items()} == {"train": 7, "validation": 1, "test": 2}
    assert sorted(sum(splits.values(), [])) == sorted(set(PATIENTS))
    assert split_patients(PATIENTS, validation=0.3, test=0.2, seed=seed)["test"] == splits["test"]
    assert split_patients(PATIENTS[::-1], validation=0.1, test=0.2, seed=seed) == splits


def test_splits_by_name_and_by_share():
    splits = split_patients(PATIENTS, validation=["p3", "p1"], test=0.01)
    assert splits["validation"] == ["p1", "p3"] and len(splits["test"]) == 1
    assert not set(splits["test"]) & {"p1", "p3"}
    assert split_patients(PATIENTS)["train"] == sorted(set(PATIENTS))
    draws = {tuple(split_patients(PATIENTS, test=0.2, seed=seed)["test"]) for seed in range(9)}
    assert len(draws) > 3


def test_splits_that_cannot_be():
    with pytest.raises(ValueError, match="Expected patients among a, b, got c: a patient is"):
        split_patients(["a", "b"], test=["c"])
    with pytest.raises(ValueError, match="Expected every patient in one split, got b in two"):
        split_patients(["a", "b"], validation=["b"], test=["b"])
    with pytest.raises(ValueError, match="Expected patients to train on .* got a in all"):
        split_patients(["a"], test=0.2)
