"""Reading data sets: folders, `datasets`, phantoms, and what is wrong with them."""

import json

import numpy as np
import pytest
from datasets import DatasetDict
from drawn_folders import disk, write_folder
from PIL import Image

from imedsam.training.data import (
    split_by_class,
)
from imedsam.training.examples import load_examples, read_labels, without_empty_masks
from imedsam.training.phantoms import phantoms_dataset

GROUPS = {"a": "1", "b": "2", "c": "2", "d": "3", "e": "4"}


def test_a_folder_without_splits_is_split_60_20_20(folder):
    names = {split: load_examples(str(folder), split).names for split in ("train", "validation", "test")}
    assert [len(names[split]) for split in names] == [3, 1, 1]
    assert sorted(sum(names.values(), [])) == list("abcde")
    assert names["train"] == load_examples(str(folder), "train").names
    assert any(load_examples(str(folder), "train", seed=seed).names != names["train"] for seed in range(1, 6))


def test_a_random_split_is_told_once(folder, caplog):
    with caplog.at_level("WARNING", logger="imedsam"):
        load_examples(str(folder), "all")
        assert not caplog.text
        for split in ("train", "validation", "test"):
            load_examples(str(folder), split, seed=3)
    assert caplog.text.count("WARNING") == 1
    assert f"Splitting {folder} at random, 60:20:20 by seed 3, as it has no splits of its own" in caplog.text


def test_all_of_a_data_set(folder, tmp_path):
    (folder / "groups.json").write_text(json.dumps(GROUPS))
    (folder / "splits.json").write_text(json.dumps({"train": ["a"], "test": ["d"]}))
    whole = load_examples(str(folder), "all")
    assert (whole.names, whole.groups) == (list("abcde"), list(GROUPS.values()))
    rows = phantoms_dataset("train", 5, size=32)
    rows.save_to_disk(tmp_path / "rows")
    splits = {"train": rows.select([3, 0]), "val": rows.select([1])}
    DatasetDict(splits).save_to_disk(tmp_path / "splits")
    names = rows["name"][:]
    assert load_examples(str(tmp_path / "rows"), "all").names == names
    assert load_examples(str(tmp_path / "splits"), "all").names == [names[3], names[0], names[1]]
    with pytest.raises(ValueError, match="train, validation, test for phantoms, got 'all': there is no end of them"):
        load_examples("phantoms", "all")


def test_groups_stay_together_in_a_random_split(folder):
    (folder / "groups.json").write_text(json.dumps({f"{name}.jpg": group for name, group in GROUPS.items()}))
    for seed in range(8):
        parts = [load_examples(str(folder), split, seed=seed) for split in ("train", "validation", "test")]
        assert all(part.groups == [GROUPS[name] for name in part.names] for part in parts)
        assert sorted(sum((part.names for part in parts), [])) == list(GROUPS)
        assert sum(len(set(part.groups)) for part in parts) == 4 and 2 <= len(parts[0]) <= 3
    assert parts[0].select([1]).groups == parts[0].groups[1:]
    (folder / "groups.json").write_text(json.dumps(dict.fromkeys("abc", "x") | dict.fromkeys("de", "y")))
    with pytest.raises(ValueError, match="test split of .*, got none: .*too few images or groups"):
        load_examples(str(folder), "test")


def test_random_splits_have_their_shares(tmp_path):
    folder = write_folder(tmp_path / "data", [disk(20, 20, 10, 10, 5)] * 10)
    names = [load_examples(str(folder), split).names for split in ("train", "validation", "test")]
    assert [len(part) for part in names] == [6, 2, 2] and len({*names[0], *names[1], *names[2]}) == 10


def test_a_group_in_two_splits_is_refused(folder):
    (folder / "groups.json").write_text(json.dumps(GROUPS))
    (folder / "splits.json").write_text(json.dumps({"train": ["a", "b"], "validation": ["c"], "test": ["d"]}))
    with pytest.raises(ValueError, match="Expected every group in one split of .*, got '2' in train and validation"):
        load_examples(str(folder), "train")
    (folder / "splits.json").write_text(json.dumps({"train": ["a", "b", "c"], "test": ["d", "e"]}))
    assert load_examples(str(folder), "test").groups == ["3", "4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expected JSON in .*groups.json"),
        ('["a"]', "Expected an object in .*groups.json, got list"),
        (
            '{"a": "1", "b": "1", "c": "2", "d": "2"}',
            "Expected the name of a group for .*groups.json, got none for 'e'",
        ),
        ('{"a": "1", "b": 1, "c": "2", "d": "2", "e": "2"}', "Expected the name of a group for .*, got 1 for 'b'"),
    ],
)
def test_wrong_groups_are_refused(folder, text, message):
    (folder / "groups.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_examples(str(folder), "train")


def test_examples_of_a_folder(label_folder):
    examples = load_examples(str(label_folder), "validation")
    assert examples.names == ["d"] and examples[0]["name"] == "d"
    assert examples[0]["image"].size == (60, 40)
    assert set(np.unique(examples[0]["mask"])) == {0, 1, 2}
    classes, masks = split_by_class(examples[0]["mask"])
    assert classes == [0, 1] and all(mask.dtype == bool for mask in masks)
    assert len(load_examples(str(label_folder), "train", num_images=2)) == 2


def test_names_with_suffixes_and_turned_photographs(folder):
    image = Image.open(folder / "images" / "a.jpg")
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image.rotate(90, expand=True).save(folder / "images" / "a.jpg", exif=exif)
    splits = {"train": ["a.jpg", "b"], "validation": ["c"], "test": ["d.png"]}
    (folder / "splits.json").write_text(json.dumps(splits))
    examples = load_examples(str(folder), "train")
    assert examples[0]["image"].size == examples[1]["image"].size == (60, 40)
    difference = np.asarray(examples[0]["image"], dtype=float) - np.asarray(image, dtype=float)
    assert np.abs(difference).mean() < 5
    assert len(load_examples(str(folder), "test")) == 1


@pytest.mark.parametrize("scale", [1, 255])
def test_binary_masks_of_either_kind(tmp_path, scale):
    folder = write_folder(tmp_path / "data", [disk(20, 20, 10, 10, 5)] * 5, scale=scale)
    mask = load_examples(str(folder), "train")[0]["mask"]
    np.testing.assert_array_equal(mask, disk(20, 20, 10, 10, 5))


def test_phantoms():
    examples = load_examples("phantoms", "validation", num_images=3, image_size=32, num_classes=2)
    assert len(examples) == 3 and examples[0]["mask"].shape == (32, 32)
    assert examples.id2label == {0: "lesion", 1: "organ"}
    assert load_examples("phantoms", "train", num_images=1).id2label == {0: "object"}


def test_a_saved_data_set(tmp_path):
    rows = phantoms_dataset("train", 10, size=32)
    rows.save_to_disk(tmp_path / "saved")
    splits = [load_examples(str(tmp_path / "saved"), split) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [6, 2, 2]
    row = rows[rows["name"][:].index(splits[2].names[1])]
    np.testing.assert_array_equal(splits[2][1]["mask"], np.asarray(row["mask"]) > 0)
    rows.remove_columns("mask").save_to_disk(tmp_path / "images")
    with pytest.raises(ValueError, match="Expected the columns image and mask or label or annotation"):
        load_examples(str(tmp_path / "images"), "train")


def test_images_without_an_object_are_skipped_with_a_word(tmp_path, caplog):
    empty = np.zeros((20, 20), np.uint8)
    folder = write_folder(tmp_path / "data", [empty, *[disk(20, 20, 10, 10, 5)] * 2, empty])
    (folder / "splits.json").write_text(json.dumps({"train": ["a", "b", "c"], "test": ["d"]}))
    with caplog.at_level("WARNING", logger="imedsam"):
        assert without_empty_masks(load_examples(str(folder), "train")).names == ["b", "c"]
    assert "Skipping 1 of 3 images whose mask is empty" in caplog.text
    with pytest.raises(ValueError, match="Expected masks with an object"):
        without_empty_masks(load_examples(str(folder), "test"))


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere to hold images/ and masks/"):
        load_examples(str(tmp_path / "nowhere"), "train")
    (folder / "splits.json").write_text(json.dumps({"train": ["a", "x"], "validation": []}))
    with pytest.raises(FileNotFoundError, match="Expected an image for 'x'"):
        load_examples(str(folder), "train")
    with pytest.raises(ValueError, match="Expected images in the validation split"):
        load_examples(str(folder), "validation")
    with pytest.raises(ValueError, match="Expected a test split in .*splits.json, got train, validation"):
        load_examples(str(folder), "test")
    (folder / "masks" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected a mask for .*a\.jpg, got none: .*a\.png"):
        load_examples(str(folder), "train")


def test_wrong_masks_are_named(folder, label_folder):
    (folder / "splits.json").write_text(json.dumps({"train": list("abcd")}))
    examples = load_examples(str(folder), "train")
    Image.new("L", (50, 40)).save(folder / "masks" / "a.png")
    with pytest.raises(ValueError, match="one size, got 60x40 and 50x40 for 'a'"):
        examples[0]
    grey = disk(40, 60, 20, 20, 5) * 255
    grey[0, 0] = 128
    Image.fromarray(grey).save(folder / "masks" / "b.png")
    with pytest.raises(ValueError, match="values 0, 128, 255 for 'b'"):
        examples[1]
    Image.new("RGB", (60, 40), (255, 0, 0)).save(folder / "masks" / "c.png")
    with pytest.raises(ValueError, match="one channel, got colours for 'c'"):
        examples[2]
    Image.fromarray(disk(40, 60, 20, 20, 5, value=7)).save(label_folder / "masks" / "a.png")
    with pytest.raises(ValueError, match="values 0, 1, 2, got 7 for 'a'"):
        load_examples(str(label_folder), "train")[0]
    with pytest.raises(ValueError, match="without gaps, got \\[0, 50\\]"):
        load_examples(str(folder), "train", labels={0: "background", 50: "liver"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"0": "background",', "Expected JSON in .*labels.json, got .*: write"),
        ('["background", "organ"]', "Expected an object in .*labels.json, got list: write"),
        ('{"background": 0, "organ": 1}', 'Expected entries "integer": "name" in .*, got {"background": 0}: write'),
        ('{"0": "background", "1": 7}', 'got {"1": 7}: write'),
        ('{"0": "background"}', "Expected a class beside the background in .*labels.json"),
        ("{}", "Expected a class beside the background in .*labels.json"),
        ('{"0": "background", "1": "organ", "2": "organ"}', "name of its own .*labels.json, got 'organ' twice"),
    ],
)
def test_wrong_labels_are_refused(label_folder, content, message):
    (label_folder / "labels.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_labels(label_folder / "labels.json")
    with pytest.raises(ValueError, match=message):
        load_examples(str(label_folder), "train")


def test_labels_are_read(label_folder):
    assert read_labels(label_folder / "labels.json") == {0: "background", 1: "organ", 2: "lesion"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "Expected JSON in .*splits.json, got"),
        ('["a"]', "Expected an object in .*splits.json, got list"),
        ('{"train": 3}', "Expected a list of names for train in .*splits.json, got 3"),
        ('{"train": [1, 2]}', r"Expected a list of names for train in .*splits.json, got \[1, 2\]"),
    ],
)
def test_wrong_splits_are_named(folder, text, message):
    (folder / "splits.json").write_text(text)
    with pytest.raises(ValueError, match=message + '.*write .*"train"'):
        load_examples(str(folder), "train")


def test_two_images_of_one_name_are_refused(folder):
    Image.new("RGB", (60, 40)).save(folder / "images" / "b.bmp")
    with pytest.raises(ValueError, match="Expected one image of each name in .*images, got b.bmp and b.jpg"):
        load_examples(str(folder), "train")


@pytest.mark.parametrize("validation", ["validation", "val"])
def test_an_image_in_two_splits_is_refused(folder, validation):
    splits = {"train": ["a", "b"], validation: ["c", "b"], "everything": list("abcde")}
    (folder / "splits.json").write_text(json.dumps(splits))
    with pytest.raises(ValueError, match=f"one split of .*splits.json, got 'b' in train and {validation}"):
        load_examples(str(folder), "train")
    (folder / "splits.json").write_text(json.dumps({**splits, validation: ["c", "b.jpg"]}))
    with pytest.raises(ValueError, match=f"got 'b' in train and {validation}"):
        load_examples(str(folder), "train")
    (folder / "splits.json").write_text(json.dumps({**splits, validation: ["c.JPG"], "seed": 3}))
    assert load_examples(str(folder), "validation").names == ["c"]


@pytest.mark.parametrize("whole", [False, True])
def test_a_broken_image_is_named(folder, whole):
    (folder / "splits.json").write_text(json.dumps({"train": ["a", "b"]}))
    path = folder / "images" / "b.jpg"
    path.write_bytes(b"no image" if whole else path.read_bytes()[:-300])
    examples = load_examples(str(folder), "train")
    with pytest.raises(ValueError, match=r"Expected a whole image in .*b\.jpg, got .*: replace it or remove it"):
        examples[1]
