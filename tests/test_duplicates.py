"""Near-duplicates, the splits that are cleared of them, and folds."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from duplicates import MAX_DISTANCE, Pair, draw_pairs, find_pairs, group, perceptual_hash, read_pairs, write_pairs
from PIL import Image, ImageEnhance
from splits import NUM_FOLDS, clusters, make_folds, make_splits, write_folder

from imedsam.training.examples import load_examples
from imedsam.training.phantoms import phantoms_dataset

WHOLE = (0.0, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Three phantoms, and the first of them again: smaller, brighter and as a JPEG file of low quality."""
    folder = tmp_path_factory.mktemp("set") / "drawn"
    (folder / "images").mkdir(parents=True)
    images = [row["image"].convert("RGB") for row in phantoms_dataset("train", 3, size=128, kind="ultrasound")]
    for name, image in zip("abc", images, strict=True):
        image.save(folder / "images" / f"{name}.png")
    again = ImageEnhance.Brightness(images[0].resize((100, 90))).enhance(1.2)
    again.save(folder / "images" / "again.jpg", quality=40)
    return folder


def pair(first, second, distance=0, dataset="set"):
    return Pair((dataset, first), (dataset, second), distance)


def test_a_copy_is_found_by_its_hash_and_other_images_are_not(drawn):
    pytest.importorskip("imagehash", reason="needs the extra `experiments`")
    paths = sorted((drawn / "images").iterdir())
    hashes = np.stack([perceptual_hash(path, WHOLE) for path in paths])
    assert hashes.shape == (4, 256) and hashes.dtype == bool
    names = [("drawn", path.stem) for path in paths]
    (found,) = find_pairs(names, hashes, MAX_DISTANCE)
    assert (found.first, found.second) == (("drawn", "a"), ("drawn", "again"))
    assert found.distance == (hashes[0] != hashes[1]).sum() > 0
    assert find_pairs(names, hashes, found.distance - 1) == []


def test_only_the_region_is_hashed(drawn):
    pytest.importorskip("imagehash", reason="needs the extra `experiments`")
    path = drawn / "images" / "a.png"
    marked = path.with_name("marked.png")
    image = Image.open(path)
    image.paste((255, 255, 255), (0, 80, 40, 128))
    image.save(marked)
    region = (0.4, 0.0, 1.0, 0.6)
    one, other = perceptual_hash(path, region), perceptual_hash(marked, region)
    marked_whole = perceptual_hash(marked, WHOLE)
    marked.unlink()
    np.testing.assert_array_equal(one, other)
    assert (perceptual_hash(path, WHOLE) != marked_whole).any()


def test_pairs_are_written_and_read(tmp_path):
    pairs = [pair("a", "b", 3), Pair(("set", "a"), ("other", "c"), 40)]
    write_pairs(tmp_path / "pairs.json", pairs, 44, {"set": 2, "other": 1})
    assert read_pairs(tmp_path / "pairs.json") == pairs
    assert json.loads((tmp_path / "pairs.json").read_text())["num_images"] == {"set": 2, "other": 1}
    write_pairs(tmp_path / "none.json", [], 44, {})
    assert read_pairs(tmp_path / "none.json") == []


def test_pairs_are_drawn(drawn):
    path = drawn.parent / "pairs.png"
    draw_pairs([pair("a", "again", 9, "drawn")], drawn.parent, path)
    with Image.open(path) as sheet:
        assert sheet.width > sheet.height > 200


def test_a_scene_is_what_pairs_connect():
    names = [("set", name) for name in "abcdef"]
    scenes = group(names, [pair("a", "c"), pair("e", "f"), pair("c", "e"), pair("b", "x")])
    assert scenes[0] == scenes[2] == scenes[4] == scenes[5]
    assert len(set(scenes)) == 3


def write_set(root, name, **splits):
    for part in ("images", "masks"):
        (root / name / part).mkdir(parents=True)
        for image in [image for names in splits.values() for image in names]:
            Image.fromarray(np.full((8, 8), 255, np.uint8)).save(root / name / part / f"{image}.png")
    (root / name / "splits.json").write_text(json.dumps({"train": [], "validation": [], "test": [], **splits}))


def test_what_is_close_to_what_was_learnt_is_left_out(tmp_path):
    write_set(tmp_path, "set", train=["a", "b"], validation=["c", "d"], test=["e", "f", "g", "h"])
    across = Pair(("kvasir_other", "x"), ("set", "f"), 4)
    splits = make_splits(
        tmp_path, "set", pairs=[pair("a", "c"), pair("d", "e"), pair("g", "h"), pair("a", "b"), across]
    )
    assert splits.names == {"train": ["a", "b"], "validation": ["d"], "test": ["g", "h"]}
    assert splits.dropped == {"validation": {"c": "set/a"}, "test": {"e": "set/d", "f": "kvasir_other/x"}}


def test_a_set_without_splits_is_for_test(tmp_path):
    write_set(tmp_path, "set", train=["b", "a"])
    (tmp_path / "set" / "splits.json").unlink()
    assert make_splits(tmp_path, "set", pairs=[]).names == {"train": [], "validation": [], "test": ["a", "b"]}


def test_folds_share_no_scene_and_leave_the_test_split_alone(tmp_path):
    names = [f"i{number}" for number in range(23)]
    write_set(tmp_path, "set", train=names[:14], validation=names[14:], test=["t"])
    pairs = [pair("i0", "i20"), pair("i20", "i7"), pair("i3", "i4"), pair("i5", "t")]
    folds = [make_splits(tmp_path, "set", fold, pairs) for fold in range(NUM_FOLDS)]
    assert sorted(name for fold in folds for name in fold.names["validation"]) == sorted(names)
    for fold in folds:
        train, validation = set(fold.names["train"]), set(fold.names["validation"])
        assert train | validation == set(names) and not train & validation
        assert fold.dropped == {"validation": {}, "test": {}} and not fold.names["test"]
        assert all({p.first[1], p.second[1]} <= train or not {p.first[1], p.second[1]} & train for p in pairs[:3])
        assert 4 <= len(validation) <= 6
    assert make_folds(names, "set", pairs) == make_folds(names[::-1], "set", pairs)


def test_the_folder_of_a_run_is_a_data_set(tmp_path):
    write_set(tmp_path, "set", train=["a"], validation=["b", "c"])
    splits = make_splits(tmp_path, "set", pairs=[pair("a", "c")])
    for _ in range(2):
        write_folder(tmp_path, "set", splits, tmp_path / "run" / "set")
    assert load_examples(str(tmp_path / "run" / "set"), "validation").names == ["b"]


def test_clusters_are_scenes_and_sequences():
    assert len(set(clusters("set", ["a", "b", "c"], [pair("a", "c")]))) == 2
    slices = ["patient001_frame01_slice_0", "patient001_frame12_slice_3", "patient002_frame01_slice_0"]
    assert clusters("acdc", slices, []) == ["patient001", "patient001", "patient002"]
    assert clusters("cvc_clinicdb", ["1", "25", "26", "591", "592", "612"], []) == [1, 1, 2, 28, 29, 29]


@pytest.mark.parametrize("dataset", ["kvasir_sessile", "busi"])
def test_kept_splits_of_real_data_share_no_scene(dataset):
    root = Path(os.environ.get("IMEDSAM_DATA", ""), "data")
    if not (root / dataset).is_dir():
        pytest.skip(f"IMEDSAM_DATA is not set, or holds no data/{dataset}")
    pairs, splits = read_pairs(), make_splits(root, dataset)
    assert len(splits.dropped["test"]) > 0
    where = {(dataset, name): split for split, names in splits.names.items() for name in names}
    assert all(len({where[p.first], where[p.second]}) == 1 for p in pairs if {p.first, p.second} <= set(where))
