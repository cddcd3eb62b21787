"""A model that translates is published with its card, and without a word of patients and machines."""

import json
import re
import shutil

import nibabel
import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState
from translation_folders import save_sam2, write_pictures
from typer.testing import CliRunner

from imedsam.training import train_sam_i2i
from imedsam.training.cli import app
from imedsam.training.translate import load_translator, translate
from imedsam.training.translation_metrics import mean_metrics

PATIENTS = {"anna": 3, "ben": 2, "carl": 2, "dora": 2}


@pytest.fixture(scope="module", params=["sam_i2i", "unet"])
def trained(request, tmp_path_factory):
    """A training's folder."""
    root = tmp_path_factory.mktemp("somebody")
    pictures = write_pictures(root / "pictures", PATIENTS)
    flags = f"--source {pictures / 'source'} --target {pictures / 'target'} --output_dir {root / 'negative'} --no_gan "
    flags += "--max_train_steps 2 --validation_patients anna --test_patients ben carl --do_test --config "
    flags += "upsampling=1 " if request.param == "sam_i2i" else "channels=[4,8] "
    start = f"--model_name_or_path {save_sam2(root / 'sam2')}" if request.param == "sam_i2i" else "--model unet"
    train_sam_i2i.main([*flags.split(), *start.split()])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return root / "negative"


def publish(*arguments, model):
    command = ["publish", "--model", model, "--repo", "somebody/negative", "--license", "mit", "--dry-run", *arguments]
    return CliRunner().invoke(app, list(map(str, command)))


def test_what_is_published(trained, tmp_path):
    result = publish("-o", tmp_path / "out", "--task", "negatives of drawings", model=trained)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out"
    names = {"README.md", "config.json", "metrics.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    texts = {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md")}
    for name, text in texts.items():
        assert str(trained.parent) not in text and "/tmp" not in text, name
        assert not any(patient in text for patient in PATIENTS), name
    card, metrics = texts["README.md"], json.loads((trained / "metrics.json").read_text())
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["license"], head["pipeline_tag"], head["library_name"]) == ("mit", "image-to-image", "imedsam")
    assert "base_model" not in head and "negatives of drawings" in card and "make `target` out of `source`" in card
    rows = metrics["test_slices"]
    means = mean_metrics(
        [{k: row[k] for k in ("psnr", "ssim", "nrmse")} for row in rows], [r["patient"] for r in rows]
    )
    psnr = means["psnr"]
    assert f"| test (4 slices of 2 patients) | {psnr.mean:.2f} [{psnr.low:.2f}, {psnr.high:.2f}] |" in card
    assert f"| validation (3 slices of 1 patient) | {metrics['validation']['psnr']:.2f} |" in card
    assert json.loads(texts["metrics.json"])["test"] == metrics["test"]


def test_the_cards_example_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).integers(0, 900, (24, 32, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 1, 3, 1])), "source.nii.gz")
    (usage,) = re.findall(r"```python\n(.*?)```", (trained / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(usage.replace("path/to/negative", str(trained)), names)
    np.testing.assert_array_equal(nibabel.load("target.nii.gz").affine, nibabel.load("source.nii.gz").affine)
    expected = translate(*load_translator(str(trained)), names["volume"].slices)
    np.testing.assert_array_equal(np.stack(names["slices"]), np.stack(expected))


@pytest.mark.parametrize("flag", [["--adapter", "--base-model", "a/b"], ["--with-code"], ["--report", "report"]])
def test_what_only_models_that_segment_have(trained, tmp_path, flag, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    result = publish(*flag, "-o", tmp_path / "out", model=trained)
    assert result.exit_code == 2 and "Expected a model that segments for an adapter, for reports" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trained", ["sam_i2i"], indirect=True)
def test_the_sam_2_that_it_is_on(trained, tmp_path):
    """By its name on the Hub, where it was trained from a copy."""
    shutil.copytree(trained, tmp_path / "copy")
    result = publish("-o", tmp_path / "out", "--base-model", "somebody/sam2", model=tmp_path / "copy")
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["base_model"], head["base_model_relation"]) == ("somebody/sam2", "finetune")
    assert "trained from `somebody/sam2`" in card
