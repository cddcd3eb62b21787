"""Exported files give what the model gives, without the package."""

import json
import logging
import os
import subprocess
import sys
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from clean_site import make_site
from PIL import Image
from typer.testing import CliRunner

from imedsam import IMedSamImageProcessor, IMedSamPipeline, IMedSamProcessor
from imedsam.tiles import pixel_centres
from imedsam.training.cli import app
from imedsam.training.examples import load_examples
from imedsam.training.export import example_inputs, export_to_folder, largest_difference, run_files
from imedsam.training.unet import UNetConfig, UNetModel

BOX = [8.0, 12.0, 50.0, 44.0]
EXAMPLE = Path(__file__).parents[1] / "examples" / "serve_onnx.py"


def save(model, folder, **options):
    model.save_pretrained(folder)
    IMedSamProcessor(IMedSamImageProcessor(size=64, **options)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(from_sam, tmp_path_factory):
    """A model of two classes, and its ONNX files."""
    folder = tmp_path_factory.mktemp("exported")
    save(from_sam(num_labels=2), folder / "model")
    assert export_to_folder(str(folder / "model"), folder / "onnx") < 1e-4
    return folder


def run_on_image(folder, pipeline, image, boxes, labels, size, file_format="onnx"):
    """Logits (P, H, W) of the files, and of the pipeline."""
    inputs = pipeline.processor(image, input_boxes=[boxes], return_tensors="pt")
    region = torch.tensor([[-1.0, -1.0, 1.0, 1.0]])
    values = {
        "pixel_values": inputs["pixel_values"],
        "input_boxes": inputs["input_boxes"][0],
        "class_labels": torch.tensor(labels),
        "region": region,
        "coordinates": pixel_centres(size, region)[0],
    }
    logits = run_files(folder, file_format, values)["logits"].unflatten(1, size).numpy()
    found = pipeline(image, input_boxes=boxes, class_labels=labels, output_size=size, mode="exact")
    return logits, found.logits[:, 0]


def assert_equal_masks(logits, expected, tolerance=1e-3):
    assert np.abs(logits - expected).max() < tolerance
    assert 0 < (expected > 0).mean() < 1
    assert not ((logits > 0) != (expected > 0))[np.abs(expected) > tolerance].any()


@pytest.mark.slow
@pytest.mark.parametrize("boxes", [[BOX], [BOX, [20.0, 4.0, 60.0, 30.0]], [BOX] * 5], ids=len)
def test_any_number_of_boxes_and_any_size(exported, boxes):
    pipeline = IMedSamPipeline.from_pretrained(exported / "model")
    image = load_examples("phantoms", "test", num_images=1, image_size=64)[0]["image"]
    labels = [index % 2 for index in range(len(boxes))]
    for size in ((64, 64), (37, 90)):
        assert_equal_masks(*run_on_image(exported / "onnx", pipeline, image, boxes, labels, size))


@pytest.mark.slow
def test_on_real_images(exported):
    data = Path(os.environ.get("IMEDSAM_DATA", "")) / "data" / "kvasir_sessile"
    if not data.is_dir():
        pytest.skip("IMEDSAM_DATA is not set, or holds no data/kvasir_sessile")
    pipeline = IMedSamPipeline.from_pretrained(exported / "model")
    for path in sorted((data / "images").iterdir())[:3]:
        with Image.open(path) as image:
            box = [image.width * 0.2, image.height * 0.3, image.width * 0.7, image.height * 0.8]
            size = (image.height, image.width)
            assert_equal_masks(*run_on_image(exported / "onnx", pipeline, image, [box], [1], size))


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"frequency_view": None, "selection": None},
        {"frequency_view": "haar", "selection_share": 1.0, "ellipse_prior": False},
        {"frequency_log": False, "prompt_frame": False, "lora_rank": 0},
        {"pixel_decoder_width": 12, "num_labels": 3, "train_mask_decoder": True},
    ],
    ids=str,
)
def test_every_ablation_can_be_exported(from_sam, tmp_path, values):
    save(from_sam(**values), tmp_path / "model")
    assert export_to_folder(str(tmp_path / "model"), tmp_path / "onnx") < 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
def test_torch_export(from_sam, tmp_path):
    save(from_sam(), tmp_path / "model")
    result = CliRunner().invoke(
        app, f"export --model {tmp_path / 'model'} -o {tmp_path / 'torch'} --format torch".split()
    )
    assert result.exit_code == 0, result.output
    pipeline = IMedSamPipeline.from_pretrained(tmp_path / "model")
    image = load_examples("phantoms", "test", num_images=1, image_size=64)[0]["image"]
    assert_equal_masks(*run_on_image(tmp_path / "torch", pipeline, image, [BOX], [0], (50, 70), "torch"), 1e-4)


@pytest.mark.slow
def test_int8_is_smaller_and_near(exported, tmp_path, caplog):
    filters = list(logging.getLogger().filters)
    result = CliRunner().invoke(app, f"export --model {exported / 'model'} -o {tmp_path / 'int8'} --int8".split())
    assert "pre-processing" not in caplog.text + result.output and logging.getLogger().filters == filters
    assert result.exit_code == 0 and "with the quantised encoder" in result.output
    difference = largest_difference(
        IMedSamPipeline.from_pretrained(exported / "model").model,
        tmp_path / "int8",
        "onnx",
        example_inputs(IMedSamPipeline.from_pretrained(exported / "model").model),
    )
    assert difference > 1e-3 and f"Logits differ by at most {difference:.0e} with" in result.output
    sizes = [(folder / "encoder.onnx").stat().st_size for folder in (tmp_path / "int8", exported / "onnx")]
    assert sizes[0] < sizes[1]
    pipeline = IMedSamPipeline.from_pretrained(exported / "model")
    image = load_examples("phantoms", "test", num_images=1, image_size=64)[0]["image"]
    logits, expected = run_on_image(tmp_path / "int8", pipeline, image, [BOX], [0], (64, 64))
    assert 0 < np.abs(logits - expected).max() and ((logits > 0) == (expected > 0)).mean() > 0.97


def test_what_has_no_such_files_is_refused(from_sam, tmp_path):
    refused = [
        ({"uncertainty": "monte_carlo"}, {}, "Expected uncertainty=\"closed_form\" to export, got 'monte_carlo'"),
        ({"selection": "top_k"}, {}, 'Expected selection="threshold" or None to export'),
        ({"implicit_decoder": False}, {}, "Expected implicit_decoder=True to export"),
        ({"frequency_view": "phase"}, {}, "Expected a frequency_view other than 'phase' to export"),
        ({}, {"resize_mode": "longest_side"}, 'Expected resize_mode="stretch" with a frequency branch to export'),
    ]
    for index, (values, options, message) in enumerate(refused):
        model = save(from_sam(**values), tmp_path / str(index), **options)
        with pytest.raises(ValueError, match=message):
            export_to_folder(str(model), tmp_path / "out")
    with pytest.raises(ValueError, match="Expected int8 with the onnx format, got torch"):
        export_to_folder(str(save(from_sam(), tmp_path / "model")), tmp_path / "out", file_format="torch", int8=True)
    assert not (tmp_path / "out").exists()


def test_baselines_are_refused(tmp_path):
    UNetModel(UNetConfig(image_size=64)).save_pretrained(tmp_path / "unet")
    IMedSamProcessor(IMedSamImageProcessor(size=64)).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="Expected an I-MedSAM to export, got a UNetModel"):
        export_to_folder(str(tmp_path / "unet"), tmp_path / "out")


def test_a_difference_that_is_no_number_is_none_to_accept(from_sam, tmp_path, monkeypatch):
    nan = {"logits": torch.full((1, 500), torch.nan)}
    monkeypatch.setattr("imedsam.training.export.run_files", lambda *arguments: nan)
    assert np.isnan(largest_difference(from_sam(), tmp_path, "onnx", example_inputs(from_sam())))


@pytest.mark.parametrize("difference", [1.0, float("nan")])
@pytest.mark.parametrize("int8", [False, True])
def test_files_that_give_something_else_are_not_left(exported, tmp_path, monkeypatch, difference, int8):
    found = iter([0.0, difference] if int8 else [difference])
    monkeypatch.setattr("imedsam.training.export.largest_difference", lambda *arguments: next(found))
    if int8 and difference == 1.0:  # has its price, which is told
        assert export_to_folder(str(exported / "model"), tmp_path / "out", int8=True) == 1.0
        return
    with pytest.raises(ValueError, match="Expected (files that give|finite logits)"):
        export_to_folder(str(exported / "model"), tmp_path / "out", int8=int8)
    assert not (tmp_path / "out").exists()


def test_without_onnx_it_says_what_to_install(from_sam, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"Expected onnxscript to export to ONNX, got none: pip install '.\[onnx\]'"):
        export_to_folder(str(save(from_sam(), tmp_path / "model")), tmp_path / "out")


@pytest.fixture(scope="module")
def server(exported):
    """The example, in a process that has onnxruntime, numpy and pillow alone; its address."""
    site = make_site(exported / "site", "onnxruntime", "numpy", "pillow")
    code = f"import sys, runpy; sys.path.append({str(site)!r})"
    code += f"\nsys.argv[1:] = [{str(exported / 'onnx')!r}, '--port', '0']"
    code += "\nassert runpy and not __import__('importlib.util').util.find_spec('torch')"
    code += f"\nrunpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"OMP_NUM_THREADS": "1"}) as process:
        line = process.stdout.readline()
        yield line.split()[-1].partition("?")[0]
        process.terminate()


def post(address, query, body):
    return urllib.request.urlopen(urllib.request.Request(f"{address}?{query}", data=body), timeout=60).read()


@pytest.mark.slow
def test_the_example_serves_without_torch(exported, server):
    pipeline = IMedSamPipeline.from_pretrained(exported / "model")
    image = load_examples("phantoms", "test", num_images=1, image_size=128)[0]["image"].convert("RGB").resize((90, 70))
    body = BytesIO()
    image.save(body, "PNG")
    for label, size in ((0, (90, 70)), (1, (200, 100))):
        query = f"box={','.join(map(str, BOX))}&class={label}&size={size[0]},{size[1]}"
        mask = np.asarray(Image.open(BytesIO(post(server, query, body.getvalue()))))
        expected = pipeline(image, input_boxes=[BOX], class_labels=[label], output_size=size[::-1], mode="exact")
        assert mask.shape == size[::-1] and mask.dtype == bool and 0 < mask.mean() < 1
        far = np.abs(expected.logits[0, 0]) > 1e-2
        assert (mask == expected.masks[0, 0])[far].all() and far.mean() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize(
    "query, body, message",
    [
        ("box=1,2,3", b"x", "identify image"),
        ("box=1,2,3", "image", "Expected box=x0,y0,x1,y1"),
        ("box=1,2,a,4", "image", "Expected box=x0,y0,x1,y1"),
        ("box=0,0,inf,inf", "image", "Expected box=x0,y0,x1,y1"),
        ("box=1000,1000,2000,2000", "image", "Expected box=x0,y0,x1,y1 that has a part in the image"),
        ("box=8,12,50,44&class=x", "image", "Expected class=a number"),
        ("box=8,12,50,44&size=5", "image", "Expected size=width,height"),
        ("box=8,12,50,44&class=2", "image", "Expected class in 0 ... 1, got 2"),
        ("box=8,12,50,44&size=0,5", "image", "Expected size=width,height"),
        ("box=8,12,50,44", b"", "Expected an image of at most"),
    ],
)
def test_the_example_says_what_is_wrong(server, query, body, message):
    if body == "image":
        picture = BytesIO()
        Image.new("RGB", (60, 50)).save(picture, "PNG")
        body = picture.getvalue()
    with pytest.raises(urllib.error.HTTPError) as error:
        post(server, query, body)
    assert error.value.code == 400 and message in error.value.read().decode().replace("&quot;", '"')
    error.value.close()


@pytest.mark.slow
def test_the_settings_are_written(exported):
    settings = json.loads((exported / "onnx" / "export.json").read_text())
    assert settings["image_size"] == 64 and settings["classes"] == {"0": "object 1", "1": "object 2"}
