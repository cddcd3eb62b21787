"""`make demo` does what the README says, and the README's code blocks run as printed on what it leaves."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from transformers import AutoProcessor, SamConfig, SamModel

from imedsam import IMedSamModel
from imedsam.tiles import pixel_centres
from imedsam.training import demo

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the demo has run."""
    folder = tmp_path_factory.mktemp("demo")
    run([sys.executable, "-m", "imedsam.training.demo"], folder)
    return folder


def run(command, folder):
    """Runs a command as a user would, in a process of its own."""
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)


def save_tiny_sam(folder):
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64, "image_size": 64}
    vision |= {"global_attn_indexes": [1], "initializer_range": 0.02, "scale": 1.0}
    torch.manual_seed(0)
    SamModel(SamConfig(vision_config=vision, prompt_encoder_config={"image_size": 64})).save_pretrained(folder)


def test_demo_is_ahead_of_its_floors(workplace):
    results = json.loads((workplace / "outputs/demo/demo.json").read_text())
    assert results["this model"]["dice"] >= 0.92
    for floor in ("filled box", "inscribed ellipse", "Otsu in the box"):
        assert results["this model"]["dice"] > results[floor]["dice"] + 0.05
        assert results["this model"]["hd95"] < results[floor]["hd95"]
    with Image.open(workplace / "outputs/demo/demo.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 20


def test_closed_form_ranks_points_as_monte_carlo_does(workplace):
    model = IMedSamModel.from_pretrained(workplace / "outputs/demo")
    processor = AutoProcessor.from_pretrained(workplace / "outputs/demo")
    with Image.open(workplace / "outputs/demo/example.png") as image:
        inputs = processor(image, input_boxes=[[list(demo.EXAMPLE_BOX)]], return_tensors="pt")
    uncertainties = []
    for model.config.uncertainty in ("closed_form", "monte_carlo"):
        model.config.monte_carlo_samples = 5000
        with torch.no_grad():
            field = model.get_mask_field(
                model.get_image_embeddings(inputs["pixel_values"]), input_boxes=inputs["input_boxes"]
            )
            points = pixel_centres((64, 64), field.lattice_region)[:, None]
            uncertainties.append(field.uncertainty(points).flatten())
    assert spearmanr(*uncertainties).statistic >= 0.99


def test_readme_python_blocks_run_as_printed(workplace):
    save_tiny_sam(workplace / "sam")
    for name, classes in {"polyps": 1, "organs": 3}.items():
        model = IMedSamModel.from_sam_pretrained(workplace / "sam", image_size=64, num_labels=classes)
        model.save_adapter(workplace / "adapters" / name)
    code = "\n".join(blocks("python"))
    code += "\nassert torch.equal(torch.from_numpy(mask), masks.logits[0, 0, 0] > 0)"
    assert "expected Dice 0." in run([sys.executable, "-c", code], workplace)


def test_readme_bash_blocks_run_as_printed(workplace):
    """But for the `make` targets; the Hub's name and the reader's folder are put in, and 100 epochs are 10."""
    rng = np.random.default_rng(0)
    for name in "abcdefghij":
        for kind in ("images", "masks"):
            (workplace / "path/to/folder" / kind).mkdir(parents=True, exist_ok=True)
        mask = np.zeros((40, 40), dtype=np.uint8)
        mask[8:30, 10:28] = 255
        image = np.clip(mask[..., None] / 2 + rng.normal(60, 20, (40, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(workplace / f"path/to/folder/images/{name}.png")
        Image.fromarray(mask).save(workplace / f"path/to/folder/masks/{name}.png")
    save_tiny_sam(workplace / "facebook/sam-vit-base")
    commands = [block for block in blocks("bash") if not block.startswith("make ")]
    assert {command.split()[0] for command in commands} == {"imedsam", "accelerate"}
    for command in commands:
        run(["bash", "-c", command.replace("--num_train_epochs 100", "--num_train_epochs 10")], workplace)
    assert (workplace / "outputs/prediction/example_mask.png").exists()
    assert json.loads((workplace / "outputs/mine/metrics.json").read_text())["validation"]["dice"] > 0.8


def test_readme_names_the_example_of_the_demo():
    assert str(list(demo.EXAMPLE_BOX))[1:-1] in README.read_text()
