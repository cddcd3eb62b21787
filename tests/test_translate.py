"""`imedsam translate`: slices and volumes in another contrast, their scores, and what is refused before it begins."""

import json
import re
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from drawn_folders import disk
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import Sam2HieraDetConfig
from translation_folders import HIERA
from typer.testing import CliRunner

from imedsam import SamI2IConfig, SamI2IImageProcessor, SamI2IModel
from imedsam.processing.volumes import read_nifti
from imedsam.training import translate as translate_module
from imedsam.training.cli import app
from imedsam.training.intervals import mean_interval
from imedsam.training.translate import choose, find_series, load_translator, translate
from imedsam.training.translation_metrics import slice_metrics


@pytest.fixture(scope="module")
def folder(randomised, tmp_path_factory):
    """A tiny model, whose weights are all random, and its processor."""
    folder = tmp_path_factory.mktemp("model") / "t1_to_t2"
    torch.manual_seed(0)
    model = randomised(SamI2IModel(SamI2IConfig(backbone_config=Sam2HieraDetConfig(**HIERA), upsampling=2)))
    model.save_pretrained(folder)
    SamI2IImageProcessor(size_divisor=model.config.size_divisor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def translator(folder):
    return load_translator(str(folder))


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """Folders of two contrasts: three 8-bit slices of one patient, two 16-bit slices of a second one."""
    root = tmp_path_factory.mktemp("slices")
    for kind in ("t1", "t2"):
        (root / kind).mkdir()
    for index in range(3):
        for kind, value in (("t1", 100 + 50 * index), ("t2", 60)):
            values = disk(20, 30, 15, 10, 4 + index, value=value) + draw_noise(20, 30)
            Image.fromarray(values).save(root / kind / f"a_b_{index}.png")
    for index in range(2):
        for kind, suffix in (("t1", "tif"), ("t2", "png")):
            values = disk(20, 30, 12, 10, 7, value=1).astype(np.uint16) * 3000 + draw_noise(20, 30)
            Image.fromarray(values).save(root / kind / f"c_{index}.{suffix}")
    return root


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Two volumes of 7 slices, air in the first two, whose axes are not those of slices."""
    root = tmp_path_factory.mktemp("volumes")
    affine = np.array([[0, 0, -2.0, 9], [0, 1.5, 0, -4], [3.0, 0, 0, 5], [0, 0, 0, 1]])  # up, front, left
    for name, value in (("t1", 900), ("t2", 300)):
        values = np.stack([disk(24, 18, 9, 11, max(2 * index - 2, 0), value=1) for index in range(7)]).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(values * value, affine), root / f"{name}.nii.gz")
    return root


def draw_noise(height, width):
    return np.random.default_rng(0).integers(0, 20, (height, width), dtype=np.uint8)


def run(*arguments):
    return CliRunner().invoke(app, ["translate", *map(str, arguments)])


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_translate_is_processor_and_model(translator):
    model, processor = translator
    volume = np.random.default_rng(0).normal(50, 9, size=(5, 20, 30))
    expected = []
    for values in volume:
        inputs = processor(values, intensity_range=processor.get_intensity_range(list(volume)))
        assert inputs["pixel_values"].shape == (1, 3, 32, 32)
        with torch.no_grad():
            expected.append(model(inputs["pixel_values"]).reconstruction[0, 0, :20, :30])
    for batch_size in (1, 2, 8):
        outputs = translate(model, processor, volume, batch_size)
        assert_close(outputs, expected)
    assert outputs[0].dtype == torch.float32 and 0 <= outputs[0].min() < outputs[0].max() <= 1
    alone = translate(model, processor, volume[:1])[0]
    assert not torch.allclose(alone, outputs[0], atol=1e-3)  # by another range
    sizes = [volume[0], volume[1, :9], volume[2, :, :7], volume[3]]
    mixed = translate(model, processor, sizes, batch_size=4)
    assert [tuple(one.shape) for one in mixed] == [(20, 30), (9, 30), (20, 7), (20, 30)]
    assert_close(translate(model, processor, sizes, batch_size=1), mixed)


def test_a_folder_of_slices(folder, slices, translator, tmp_path):
    output = tmp_path / "new" / "out"
    arguments = ["--model", folder, "--image", slices / "t1", "--target", slices / "t2", "-o", output]
    result = run(*arguments, "--batch-size", 2)
    assert result.exit_code == 0, result.output
    names = ["a_b_0", "a_b_1", "a_b_2", "c_0", "c_1"]
    assert sorted(path.relative_to(output).as_posix() for path in output.rglob("*.*")) == [
        *[f"{name}.png" for name in names],
        "pictures/a_b.png",
        "pictures/c.png",
        "report.json",
    ]
    report = json.loads((output / "report.json").read_text())
    rows = {}
    for patient, number, kind in (("a_b", 3, np.uint8), ("c", 2, np.uint16)):
        sources = [read(path) for path in sorted((slices / "t1").glob(f"{patient}_*"))]
        targets = np.stack([read(path) for path in sorted((slices / "t2").glob(f"{patient}_*"))])
        outputs = translate(*translator, sources)
        assert len(sources) == number and sources[0].dtype == kind
        low, high = np.percentile(np.stack(sources), (0, 99.9))
        assert report["volumes"][patient]["intensity_range"] == pytest.approx([low, high])
        low, high = np.percentile(targets, (0, 99.9))
        labels = ((targets - low) / (high - low)).clip(0, 1).astype(np.float32)
        for index, (values, label) in enumerate(zip(outputs, labels, strict=True)):
            written = read(output / f"{patient}_{index}.png")
            assert written.dtype == kind
            np.testing.assert_allclose(written, values.double().numpy() * np.iinfo(kind).max, atol=0.6)
            rows[patient, index] = slice_metrics(values, torch.from_numpy(label))
            assert report["volumes"][patient]["slices"][f"{patient}_{index}"] == pytest.approx(
                rows[patient, index], rel=1e-4
            )
    assert report["num_patients"] == 2 and report["model"] == str(folder) and len(report["weights"]) == 64
    for key, mean in report["mean"].items():
        interval = mean_interval([row[key] for row in rows.values()], [patient for patient, _ in rows])
        assert mean == pytest.approx(vars(interval), rel=1e-4)
        assert f"{key}: {interval.mean:.4g} [{interval.low:.4g}, {interval.high:.4g}], slices: 5" in result.output
    for name, height in (("a_b", 3), ("c", 2)):
        picture = read(output / "pictures" / f"{name}.png")
        assert picture.shape == (260 * height + 30, 1100, 4) and picture.std() > 20
    again = run(*arguments)
    assert again.exit_code == 2 and "Expected a new folder" in again.output


@pytest.mark.parametrize("limits", [None, (-100, 700)])
def test_a_volume(folder, volumes, translator, tmp_path, limits):
    flags = [] if limits is None else ["--intensity-range", *limits]
    arguments = ["--model", folder, "--image", volumes / "t1.nii.gz", "--target", volumes / "t2.nii.gz"]
    result = run(*arguments, *flags, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    source, written = read_nifti(volumes / "t1.nii.gz"), read_nifti(tmp_path / "out" / "t1.nii.gz")
    np.testing.assert_array_equal(written.image.affine, source.image.affine)
    assert written.image.get_data_dtype() == np.float32 and written.image.shape == source.image.shape == (7, 24, 18)
    outputs = torch.stack(translate(*translator, source.slices)).numpy()
    low, high = limits or (0, 1)
    np.testing.assert_allclose(written.slices, low + outputs * (high - low), rtol=1e-5)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = report["volumes"]["t1"]["slices"]
    assert [row["tissue"] for row in rows.values()] == [False, False, False, True, True, True, True]
    assert rows["0"]["nrmse"] is None
    counted = [row for row in rows.values() if row["tissue"]]
    assert report["mean"]["psnr"]["mean"] == pytest.approx(np.mean([row["psnr"] for row in counted]))
    assert (report["mean"]["psnr"]["count"], report["mean"]["psnr"]["low"], report["num_patients"]) == (4, None, 1)
    assert f"psnr: {report['mean']['psnr']['mean']:.4g}, slices: 4" in result.output
    assert report["intensity_range"] == (None if limits is None else list(limits))


def test_one_slice_without_a_target(folder, slices, translator, tmp_path):
    result = run("--model", folder, "--image", slices / "t1" / "c_1.tif", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["c_1.png", "pictures", "report.json"]
    (expected,) = translate(*translator, [read(slices / "t1" / "c_1.tif")])
    np.testing.assert_allclose(read(tmp_path / "out" / "c_1.png"), expected * 65535, atol=0.51)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["target"] is None and "mean" not in report and report["volumes"]["c"]["slices"] == {"c_1": {}}
    assert read(tmp_path / "out" / "pictures" / "c.png").shape == (290, 580, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nothing.png"], "Expected an image or a folder of images at nothing.png, got no such file"),
        (["--image", "nothing.nii"], "Expected an image or a folder of images at nothing.nii, got no such file"),
        (["--image", "text.png", "--target", "a_0.png"], "cannot be read as one"),
        (["--image", "text.nii"], "Expected a whole NIfTI file, got text.nii, which cannot be read"),
        (["--image", "empty"], "Expected images (.jpg"),
        (["--image", "one", "--target", "a_0.png"], "Expected a target like the image one, got a_0.png: two files"),
        (["--image", "a_0.png", "--target", "one"], "Expected a target like the image a_0.png, got one"),
        (["--image", "a_0.png", "--target", "t1.nii.gz"], "two files, volumes or folders"),
        (["--image", "a_0.png", "--target", "nothing.png"], "at nothing.png, got no such file"),
        (
            ["--image", "two", "--target", "one"],
            "target of the same name for each image, got none in one for a_1.png.",
        ),
        (
            ["--image", "a_0.png", "--target", "small.png"],
            "on one grid, got other sizes or places of a_0.png and small",
        ),
        (
            ["--image", "t1.nii.gz", "--target", "moved.nii.gz"],
            "got other sizes or places of t1.nii.gz and moved.nii.gz",
        ),
        (["--image", "a_0.png", "-o", "one"], "Expected a new folder"),
        (["--image", "a_0.png", "-o", "text.png"], "Expected a new folder"),
        (["--image", "colours"], "a: Expected slice 1 to be grey, got colours"),
        (
            ["--image", "a_0.png", "--intensity-range", 0, 9],
            "an intensity range for a NIfTI volume, got one for a_0.png",
        ),
        (["--image", "t1.nii.gz", "--intensity-range", 9, 9], "as low and high, low < high, got (9.0, 9.0)"),
        (["--image", "a_0.png", "--model", "no/such/folder"], "no/such/folder"),
        (
            ["--image", "a_0.png", "--model", "segmenter"],
            "got a model of type 'imedsam': `imedsam predict` takes those",
        ),
        (["--image", "a_0.png", "--model", "empty"], "empty"),
        (["--image", "a_0.png", "--revision", "v1"], "Expected no --revision of what is here"),
        (["--image", "a_0.png", "--device", "elsewhere"], "Expected a device that is there, got elsewhere"),
        (["--image", "a_0.png", "--batch-size", 0], "--batch-size"),
    ],
)
def test_translate_says_what_is_wrong(folder, volumes, tiny_config, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    for name in ("empty", "one", "two", "colours"):
        Path(name).mkdir()
    image = Image.fromarray(disk(20, 30, 15, 10, 6, value=100))
    for path in ("a_0.png", "one/a_0.png", "two/a_0.png", "two/a_1.png", "colours/a_0.png"):
        image.save(path)
    image.resize((10, 10)).save("small.png")
    Image.merge("RGB", [image, image, Image.new("L", image.size)]).save("colours/a_1.png")
    for name in ("text.png", "text.nii"):
        Path(name).write_text("not an image")
    shutil.copy(volumes / "t1.nii.gz", "t1.nii.gz")
    volume = nibabel.load("t1.nii.gz")
    moved = volume.affine.copy()
    moved[0, 3] += 2
    nibabel.save(nibabel.Nifti1Image(volume.dataobj, moved), "moved.nii.gz")
    if "segmenter" in arguments:
        tiny_config().save_pretrained("segmenter")
    before = sorted(tmp_path.rglob("*"))
    result = run("--model", folder, "-o", "out", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


def test_predict_sends_a_translator_to_translate(folder, slices, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    image = slices / "t1" / "a_b_0.png"
    arguments = ["predict", "--model", folder, "--image", image, "--box", 1, 1, 9, 9, "-o", tmp_path / "out"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "got one of type 'sam_i2i': a SAM-I2I translates, with `imedsam translate`" in result.output


def test_without_nibabel(folder, volumes, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    result = run("--model", folder, "--image", volumes / "t1.nii.gz", "-o", tmp_path / "out")
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "Expected nibabel for NIfTI files, got none: pip install" in result.output


def test_checkpoints_that_are_not_whole(folder, tmp_path):
    def copy(name):
        return Path(shutil.copytree(folder, tmp_path / name))

    weights = copy("damaged") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="Expected a whole checkpoint at .*damaged, got a damaged one"):
        load_translator(str(tmp_path / "damaged"))
    weights = copy("missing") / "model.safetensors"
    state = {key: value for key, value in load_file(weights).items() if not key.startswith("decoder.head")}
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="got one without decoder.head.bias, decoder.head.weight: copy or download"):
        load_translator(str(tmp_path / "missing"))
    config = json.loads((copy("other") / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "windows": 4}))
    with pytest.raises(
        ValueError, match="configuration of this version in .*, got: Unknown configuration key 'windows'"
    ):
        load_translator(str(tmp_path / "other"))
    SamI2IImageProcessor(size_divisor=8).save_pretrained(copy("unfit"))
    with pytest.raises(ValueError, match="size_divisor is a multiple of 16 at .*, got 8: save SamI2IImageProcessor"):
        load_translator(str(tmp_path / "unfit"))


def test_series(slices, volumes):
    series = find_series(slices / "t1", slices / "t2")
    assert [(item.name, len(item.images)) for item in series] == [("a_b", 3), ("c", 2)]
    assert [path.name for path in series[1].images] == ["c_0.tif", "c_1.tif"]
    assert [path.name for path in series[1].targets] == ["c_0.png", "c_1.png"]
    assert find_series(volumes / "t1.nii.gz")[0].name == "t1"


def test_a_folder_of_volumes(folder, volumes, tmp_path, monkeypatch):
    assert [(item.name, item.patient) for item in find_series(volumes)] == [("t1", "t1"), ("t2", "t2")]
    aspects = []
    monkeypatch.setattr(
        translate_module, "save_translations", lambda path, rows, aspect: aspects.append((path.name, aspect))
    )
    result = run("--model", folder, "--image", volumes, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").glob("*.gz")} == {"t1.nii.gz", "t2.nii.gz"}
    assert aspects == [("t1.png", 0.75), ("t2.png", 0.75)]  # rows are 1.5 mm apart, columns 2


def test_which_slices_are_shown():
    assert choose([True] * 5, 4) == [0, 1, 3, 4] and choose([True] * 100, 4) == [12, 37, 62, 87]
    assert choose([False, True, False, True], 4) == [1, 3] and choose([False] * 3, 1) == [1]


def test_the_guides_example_runs(folder, volumes, translator, tmp_path, monkeypatch):
    guide = (Path(__file__).parents[1] / "docs" / "translation.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    shutil.copytree(folder, tmp_path / "outputs" / "t1_to_t2")
    shutil.copy(volumes / "t1.nii.gz", tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example, names)
    outputs = translate(*translator, read_nifti(volumes / "t1.nii.gz").slices)
    np.testing.assert_allclose(read_nifti(tmp_path / "t2.nii.gz").slices, torch.stack(outputs), atol=1e-5)
    assert_close(names["slice_of_t2"].float(), outputs[3])
