"""The pipeline and prediction on files: from images to masks of their own size."""

import json
import shutil
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import cKDTree
from typer.testing import CliRunner

from imedsam import IMedSamImageProcessor, IMedSamModel, IMedSamPipeline, IMedSamProcessor
from imedsam.rendering import RENDER_MODES
from imedsam.training.cli import Mode, app
from imedsam.training.pictures import displayable, draw_curves, outline, overlay, uncertainty_picture
from imedsam.training.predict import read_image

BOX = [10.0, 8.0, 60.0, 40.0]


@pytest.fixture(scope="module")
def folder(tiny_config, tmp_path_factory):
    """A model and its processor, saved together."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = IMedSamModel(tiny_config())
    model.add_adapter()
    model.save_pretrained(folder)
    IMedSamProcessor(IMedSamImageProcessor(size=64, resize_mode="longest_side")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image():
    values = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def pipeline(folder):
    return IMedSamPipeline.from_pretrained(folder)


def test_masks_have_the_images_size_and_equal_processor_and_model(pipeline, image):
    segmentation = pipeline(image, input_boxes=[BOX])
    assert segmentation.masks.shape == segmentation.uncertainty.shape == (1, 1, 50, 80)
    assert segmentation.scores.shape == (1, 1)
    np.testing.assert_array_equal(segmentation.masks, segmentation.logits > 0)

    inputs = pipeline.processor(image, input_boxes=[[BOX]])
    with torch.no_grad():
        embeddings = pipeline.model.get_image_embeddings(inputs["pixel_values"], inputs["reshaped_input_sizes"])
        field = pipeline.model.get_mask_field(
            embeddings, inputs["input_boxes"], reshaped_input_sizes=inputs["reshaped_input_sizes"]
        )
        region = pipeline.processor.get_image_regions(inputs["original_sizes"], inputs["reshaped_input_sizes"])
        rendered = field.render((50, 80), region)
    torch.testing.assert_close(torch.from_numpy(segmentation.logits), rendered.logits[0])
    assert region[0, 3] < 1  # the image is padded below: the region matters


@pytest.mark.parametrize(("dtype", "merged"), [(torch.float32, True), (torch.bfloat16, False)])
def test_lora_is_merged_where_that_loses_nothing(folder, image, dtype, merged):
    pipeline = IMedSamPipeline.from_pretrained(folder, dtype=dtype)
    model = IMedSamModel.from_pretrained(folder, dtype=dtype)
    assert any("lora" in name for name in model.state_dict())
    assert any("lora" in name for name in pipeline.model.state_dict()) != merged
    expected = IMedSamPipeline(model, pipeline.processor)(image, input_boxes=[BOX])
    np.testing.assert_allclose(pipeline(image, input_boxes=[BOX]).logits, expected.logits, atol=1e-4)


def test_the_weights_order_in_memory_is_not_saved(pipeline, tmp_path):
    kernels = [m.weight for m in pipeline.model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert kernels and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    pipeline.model.save_pretrained(tmp_path)
    state = pipeline.model.state_dict()
    for name, weight in IMedSamModel.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(weight, state[name])


def test_prompts_are_answered_on_one_encoding(pipeline, image, monkeypatch):
    pipeline.set_image(image)
    monkeypatch.setattr(pipeline.model, "get_image_embeddings", None)
    both = pipeline.predict(input_boxes=[BOX, [0, 0, 20, 20]])
    one = pipeline.predict(input_boxes=[[0, 0, 20, 20]])
    np.testing.assert_allclose(both.logits[1], one.logits[0], atol=1e-5)
    assert pipeline.predict(input_boxes=[BOX], output_size=(100, 30)).masks.shape == (1, 1, 100, 30)


def test_a_region_is_a_window_on_the_same_masks(pipeline, image):
    """At one pixel per pixel its values are those of the whole image; its outlines are in the image's pixels too."""
    prompts = {"input_boxes": [[24.0, 12.0, 56.0, 28.0]], "mode": "exact", "contours": True}
    pipeline.set_image(image)
    whole, window = pipeline.predict(**prompts), pipeline.predict(**prompts, region=(20, 10, 60, 30))
    assert window.masks.shape == (1, 1, 20, 40)
    np.testing.assert_allclose(window.logits, whole.logits[..., 10:30, 20:60], atol=1e-4)
    everything = pipeline.predict(**prompts, region=(0, 0, image.width, image.height))
    np.testing.assert_array_equal(everything.logits, whole.logits)
    points = [
        np.concatenate([ring for outline in one.contours[0][0] for ring in (outline.exterior, *outline.holes)])
        for one in (whole, window)
    ]
    for one, other in (points, points[::-1]):
        inner = one[((one > [22, 12]) & (one < [58, 28])).all(axis=1)]
        assert len(inner) > 20 and cKDTree(other).query(inner)[0].max() < 0.02

    zoomed = pipeline.predict(**prompts, region=(20, 10, 60, 30), output_size=(60, 120))
    np.testing.assert_allclose(zoomed.logits[..., 1::3, 1::3], window.logits, atol=1e-4)  # the same centres
    points = np.concatenate([outline.exterior for outline in zoomed.contours[0][0]])
    assert points.min() >= 10 and (points.min(axis=0) >= [20, 10]).all() and (points.max(axis=0) <= [60, 30]).all()
    for region in ((20, 10, 20, 30), (20, 10, 90, 30), (-1, 10, 60, 30), (60, 30, 20, 10), (20, 10), "1234", 5):
        with pytest.raises(ValueError, match=r"80 pixels wide and 50 high, got "):
            pipeline.predict(**prompts, region=region)


def test_the_mode_of_rendering_can_be_chosen(pipeline, image):
    pipeline.set_image(image)
    masks = {
        mode: pipeline.predict(input_boxes=[BOX], mode=mode, output_size=(200, 320)) for mode in ("exact", "adaptive")
    }
    assert not np.array_equal(masks["exact"].logits, masks["adaptive"].logits)
    assert (masks["exact"].masks == masks["adaptive"].masks).mean() > 0.95  # a new field is ragged
    default = pipeline.predict(input_boxes=[BOX], output_size=(200, 320))
    np.testing.assert_array_equal(default.logits, masks["adaptive"].logits)


def test_undo_takes_back_the_last_prompt(pipeline, image):
    pipeline.set_image(image)
    box = pipeline.add_box(BOX)
    point = pipeline.add_point((30, 20))
    assert not np.allclose(box.logits, point.logits)
    np.testing.assert_array_equal(pipeline.undo().logits, box.logits)
    assert pipeline.undo() is None
    with pytest.raises(ValueError, match="Expected a prompt to undo, got none"):
        pipeline.undo()


def test_a_bad_prompt_changes_nothing(pipeline, image):
    pipeline.set_image(image)
    first = pipeline.add_point((30, 20))
    with pytest.raises(ValueError, match="300"):
        pipeline.add_point((300, 20))
    pipeline.add_point((5, 5), label=0)
    np.testing.assert_array_equal(pipeline.undo().logits, first.logits)


def test_an_image_comes_first(pipeline, image):
    with pytest.raises(ValueError, match=r"Expected an image to prompt on.*set_image"):
        pipeline.predict(input_boxes=[BOX])
    with pytest.raises(ValueError, match="Expected one image, got 2"):
        pipeline.set_image([image, image])


def test_a_16_bit_image_is_seen_through_its_window(pipeline):
    values = np.random.default_rng(0).integers(-1000, 1000, (50, 80)).astype(np.int16)
    pipeline.set_image(values, window=(-200, 300))
    windowed = pipeline.predict(input_boxes=[BOX])
    np.testing.assert_array_equal(pipeline(values, (-200, 300), input_boxes=[BOX]).logits, windowed.logits)
    clipped = np.clip((values.astype(np.float32) + 200) / 500, 0, 1)
    np.testing.assert_allclose(windowed.logits, pipeline(clipped, input_boxes=[BOX]).logits, atol=1e-4)


def run(*arguments):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def test_predict_writes_masks_pictures_and_a_report(folder, image, tmp_path, pipeline):
    image.save(tmp_path / "a.png")
    result = run("--model", folder, "--image", tmp_path / "a.png", "--box", *BOX, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "a.png" in result.output
    segmentation = pipeline(image, input_boxes=[BOX])
    mask = np.asarray(read_image(tmp_path / "out" / "a_mask.png"))
    np.testing.assert_array_equal(mask, segmentation.masks[0, 0] * np.uint8(255))
    assert read_image(tmp_path / "out" / "a_overlay.png").size == (80, 50)
    uncertainty = np.asarray(read_image(tmp_path / "out" / "a_uncertainty.png"))
    np.testing.assert_array_equal(uncertainty, np.asarray(uncertainty_picture(segmentation.uncertainty[0, 0])))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["a.png"]["masks"][0]["area"] == int(segmentation.masks.sum())
    assert report["a.png"]["boxes"] == [BOX]


def test_predict_on_a_folder_at_another_size(folder, image, tmp_path):
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "a.png")
    image.convert("L").save(tmp_path / "in" / "b.jpg")
    (tmp_path / "boxes.json").write_text(json.dumps({"a.png": [BOX, [0, 0, 20, 20]], "b.jpg": [BOX]}))
    arguments = ["--model", folder, "--image", tmp_path / "in", "--boxes", tmp_path / "boxes.json"]
    result = run(*arguments, "--size", 25, 40, "--mode", "exact", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert read_image(tmp_path / "out" / "a_mask_2.png").size == (40, 25)
    assert read_image(tmp_path / "out" / "b_mask.png").size == (40, 25)
    assert not (tmp_path / "out" / "b_mask_2.png").exists()


@pytest.mark.parametrize("mode", ["exact", "adaptive", None])
def test_predict_renders_in_the_mode_that_is_asked_for(folder, image, tmp_path, pipeline, mode):
    image.save(tmp_path / "a.png")
    arguments = ["--model", folder, "--image", tmp_path / "a.png", "--box", *BOX, "--size", 200, 320]
    result = run(*arguments, *([] if mode is None else ["--mode", mode]), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    uncertainties = {
        key: pipeline(image, input_boxes=[BOX], output_size=(200, 320), mode=key).uncertainty.mean()
        for key in ("exact", "adaptive")
    }
    assert uncertainties["exact"] != pytest.approx(uncertainties["adaptive"], rel=1e-6)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["a.png"]["masks"][0]["uncertainty"] == pytest.approx(uncertainties[mode or "adaptive"], rel=1e-6)
    assert get_args(Mode) == RENDER_MODES


def test_predict_writes_outlines_in_the_images_pixels(folder, image, tmp_path, pipeline):
    """Whatever the size of the masks."""
    image.save(tmp_path / "a.png")
    arguments = ["--model", folder, "--image", tmp_path / "a.png", "--box", *BOX, "-o", tmp_path / "out"]
    size = (2 * image.height, 2 * image.width)
    result = run(*arguments, "--size", *size, "--contours", tmp_path / "new" / "a.geojson")
    assert result.exit_code == 0, result.output
    (feature,) = json.loads((tmp_path / "new" / "a.geojson").read_text())["features"]
    assert feature["properties"]["image"] == "a.png" and feature["properties"]["box"] == BOX
    pipeline.set_image(image)
    ((contours,),) = pipeline.predict(input_boxes=[[BOX]], output_size=size, contours=True).contours
    assert len(feature["geometry"]["coordinates"]) == len(contours) > 0
    for polygon, contour in zip(feature["geometry"]["coordinates"], contours, strict=True):
        for ring, curve in zip(polygon, [contour.exterior, *contour.holes], strict=True):
            np.testing.assert_allclose(ring, curve)
    result = run(*arguments, "--size", *size, "--contours", tmp_path / "mm.geojson", "--spacing", 0.5, 2)
    assert result.exit_code == 0, result.output
    (scaled,) = json.loads((tmp_path / "mm.geojson").read_text())["features"]
    area = sum(contour.area for contour in contours)
    assert feature["properties"]["area"] == pytest.approx(area)
    millimetres = {"spacing": [0.5, 2], "box": [BOX[0] / 2, BOX[1] * 2, BOX[2] / 2, BOX[3] * 2]}
    assert scaled["properties"] == {**feature["properties"], **millimetres, "area": pytest.approx(area)}
    ring, pixels = (of["geometry"]["coordinates"][0][0] for of in (scaled, feature))
    np.testing.assert_allclose(ring, np.array(pixels) * [0.5, 2])
    points = np.concatenate([contour.exterior for contour in contours])
    # Vertices lie on the edges of a grid whose points are half a pixel apart: at (k + 1/2) / 2 or on the border.
    on_grid = np.isclose((2 * points - 0.5) % 1, 0, atol=1e-6) | np.isclose((2 * points - 0.5) % 1, 1, atol=1e-6)
    on_border = (points == 0) | (points == [image.width, image.height])
    assert (on_grid | on_border).any(axis=1).all()
    assert points.min() >= 0 and (points.max(axis=0) <= [image.width, image.height]).all()
    assert points.max() > 0.6 * image.width


def test_an_overlay_draws_the_curves_that_it_is_given():
    """A triangle's sides, not the mask's pixels."""
    masks, curve = np.zeros((1, 60, 80), dtype=bool), np.array([[10.0, 10], [70, 10], [40, 50], [10, 10]])
    drawn = np.asarray(overlay(Image.new("L", (80, 60)), masks, [], [[curve]]))
    assert drawn[10, 40].max() > 100 and drawn[30, 25].max() > 100 and drawn[20, 40].max() == 0
    assert np.asarray(overlay(Image.new("L", (80, 60)), masks, [])).max() == 0


def test_curves_by_hand():
    """A level line of thickness 2 along y = 3 covers the rows 2 and 3, of which the last column half."""
    drawn = draw_curves([np.array([[0.0, 3.0], [5.5, 3.0]])], (6, 8), 2)
    np.testing.assert_allclose(drawn[[2, 3], :5], 1, atol=0.3)
    assert drawn[[0, 5]].max() == 0 and drawn[:, 7].max() == 0
    assert drawn.sum() == pytest.approx(11, rel=0.15)


def test_an_overlay_draws_clicks_and_boxes():
    black, nothing = Image.new("L", (80, 60)), np.zeros((1, 60, 80), dtype=bool)
    drawn = np.asarray(overlay(black, nothing, [(20.5, 30.5), (40, 10, 70, 50)])).max(axis=-1)
    assert drawn[30, 20] == 255 and drawn[10, 40] == drawn[49, 69] == 255
    drawn[28:34, 18:24] = drawn[10, 40:70] = drawn[49, 40:70] = drawn[10:50, 40] = drawn[10:50, 69] = 0
    assert drawn.max() == 0


def test_a_click_on_the_command_line(folder, image, tmp_path):
    """As of the pipeline, and noted in the report and beside the outlines."""
    image.save(tmp_path / "a.png")
    outlines = tmp_path / "a.geojson"
    arguments = ["--model", folder, "--image", tmp_path / "a.png", "--click", 25, 20, "-o", tmp_path / "out"]
    result = run(*arguments, "--contours", outlines, "--spacing", 0.5, 2)
    assert result.exit_code == 0, result.output
    expected = IMedSamPipeline.from_pretrained(folder)(image, input_points=[[[25, 20]]])
    best = int(expected.scores[0].argmax())
    mask = np.asarray(Image.open(tmp_path / "out" / "a_mask.png")) > 0
    np.testing.assert_array_equal(mask, expected.masks[0, best])
    report = json.loads((tmp_path / "out" / "report.json").read_text())["a.png"]
    assert report["clicks"] == [[25, 20]] and "boxes" not in report
    (feature,) = json.loads(outlines.read_text())["features"]
    assert feature["properties"]["click"] == [12.5, 40] and "box" not in feature["properties"]
    result = run(*arguments, "--box", *BOX)
    assert result.exit_code == 2 and "Expected one of --box" in result.output


def test_one_bad_image_does_not_lose_the_others(folder, image, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "c.png")
    image.resize((4, 4)).save(tmp_path / "in" / "b.png")
    image.save(tmp_path / "in" / "a.tif", save_all=True, append_images=[image])
    result = run("--model", folder, "--image", tmp_path / "in", "--box", *BOX, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "2 of 3 images could not be segmented" in result.output
    assert "b.png" in result.output and "a.tif" in result.output and "2 pages" in result.output
    assert list(json.loads((tmp_path / "out" / "report.json").read_text())) == ["c.png"]
    result = run("--model", folder, "--image", tmp_path / "in", "--box", *BOX, "-o", tmp_path / "in")
    assert result.exit_code == 2 and "Expected another folder for the results" in result.output


def test_photographs_are_turned_as_viewers_show_them(tmp_path):
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nothing.png", "--box", *BOX], "no such file"),
        (["--image", "text.png", "--box", *BOX], "cannot be read"),
        (["--image", "a.png"], "got another number"),
        (["--image", "a.png", "--box", 40, 8, 10, 40], "x1"),
        (["--image", "a.png", "--box", 8, 12, 8, 44], "with a width and a height, got [8.0, 12.0, 8.0, 44.0]"),
        (["--image", "a.png", "--box", 8, 12, 44, 12], "with a width and a height, got [8.0, 12.0, 44.0, 12.0]"),
        (["--image", "a.png", "--box", *BOX, "-o", "text.png"], "Expected a folder for the results, got the file"),
        (["--image", "empty", "--box", *BOX], "Expected images"),
        (["--image", "twice", "--box", *BOX], "collide"),
        (["--image", "a.png", "--boxes", "boxes.json"], "none for a.png"),
        (["--image", "a.png", "--boxes", "text.png"], "Expected a JSON file"),
        (["--image", "a.png", "--boxes", "flat.json"], "another layout"),
        (["--image", "a.png", "--box", *BOX, "--class", "liver"], "got 'liver'"),
        (["--image", "a.png", "--box", *BOX, "--spacing", 1, 1], "together with --contours, got (1.0, 1.0)"),
        (["--image", "a.png", "--box", *BOX, "--contours", "a.json", "--spacing", 0, 1], "to be positive"),
        (["--image", "a.png", "--box", *BOX, "--mode", "fast"], "'fast'"),
        (["--image", "a.png", "--box", *BOX, "--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_predict_says_what_is_wrong(folder, image, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    image.save("a.png")
    for name in ("empty", "twice"):
        (tmp_path / name).mkdir()
    image.save("twice/a.png")
    image.save("twice/a.jpg")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "boxes.json").write_text("{}")
    (tmp_path / "flat.json").write_text('{"a.png": [1, 2, 3, 4]}')
    result = run("--model", folder, "-o", "out", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_outline_and_overlay_by_hand():
    mask = np.zeros((5, 5), dtype=bool)
    mask[1:4, 1:4] = True
    ring = mask.copy()
    ring[2, 2] = False
    np.testing.assert_array_equal(outline(mask, 1), ring)
    black = Image.new("RGB", (5, 5))
    picture = np.asarray(overlay(black, mask[None]))
    assert (picture[0] == 0).all() and (picture[1, 1] == (255, 196, 0)).all()
    assert (picture[2, 2] == np.round(0.28 * np.array((255, 196, 0)))).all()


def test_boxes_are_as_thick_as_outlines():
    """A two-hundredth of the image's side, inward."""
    masks = np.zeros((1, 600, 800), dtype=bool)
    drawn = np.asarray(overlay(Image.new("L", (800, 600)), masks, [(100, 200, 300, 400)]))[..., 0] == 255
    np.testing.assert_array_equal(np.flatnonzero(drawn[300]), [100, 101, 102, 297, 298, 299])
    np.testing.assert_array_equal(np.flatnonzero(drawn[:, 150]), [200, 201, 202, 397, 398, 399])


def test_uncertainty_picture_spans_black_to_white():
    picture = np.asarray(uncertainty_picture(np.array([[0.0, 0.25], [0.0625, 1.0]])))
    np.testing.assert_array_equal(picture, [[0, 255], [128, 255]])


def test_16_bit_images_are_displayed_through_their_window():
    values = Image.fromarray(np.array([[0, 1000], [2000, 4000]], dtype=np.uint16))
    assert np.asarray(displayable(values, (1000, 2000)))[..., 0].tolist() == [[0, 0], [255, 255]]
    assert np.asarray(displayable(values))[..., 0].tolist() == [[0, 64], [128, 255]]


def test_a_class_is_chosen_by_its_name(tiny_config, image, tmp_path):
    torch.manual_seed(0)
    model = IMedSamModel(tiny_config(id2label={0: "liver", 1: "tumour"}))
    model.add_adapter()
    model.save_pretrained(tmp_path / "model")
    processor = IMedSamProcessor(IMedSamImageProcessor(size=64))
    processor.save_pretrained(tmp_path / "model")
    image.save(tmp_path / "a.png")
    arguments = ["--model", tmp_path / "model", "--image", tmp_path / "a.png", "--box", *BOX, "-o", tmp_path / "out"]
    assert run(*arguments, "--class", "tumour").exit_code == 0
    mask = json.loads((tmp_path / "out/report.json").read_text())["a.png"]["masks"][0]
    segmentation = IMedSamPipeline(model, processor)(image, input_boxes=[BOX], class_labels=[1])
    assert mask["class"] == "tumour" and mask["area"] == int(segmentation.masks.sum())


def test_mask_prompts_of_a_model_with_small_patches(tiny_config, image):
    """The processor's mask prompts are a quarter of the image, whatever the patch size of the model."""
    sam_config = tiny_config().sam_config.to_dict()
    for part in ("vision_config", "prompt_encoder_config"):
        sam_config[part]["patch_size"] = 8
    sam_config["prompt_encoder_config"].pop("image_embedding_size", None)
    torch.manual_seed(0)
    pipeline = IMedSamPipeline(
        IMedSamModel(tiny_config(sam_config=sam_config)), IMedSamProcessor(IMedSamImageProcessor(size=64))
    )
    mask = np.zeros((50, 80), dtype=bool)
    mask[10:40, 20:60] = True
    assert pipeline(image, input_masks=[mask]).masks.shape == (1, 1, 50, 80)


def test_predict_names_a_damaged_checkpoint(folder, image, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    image.save(tmp_path / "a.png")
    shutil.copytree(folder, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    result = run("--model", tmp_path / "damaged", "--image", tmp_path / "a.png", "--box", *BOX, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "got a damaged one" in result.output and str(tmp_path / "damaged") in result.output


def test_predict_names_a_configuration_of_another_version(folder, image, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    image.save(tmp_path / "a.png")
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "lora_rnak": 4}))
    result = run("--model", tmp_path / "other", "--image", tmp_path / "a.png", "--box", *BOX, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "Unknown configuration key 'lora_rnak'" in result.output
    assert f"Expected a configuration of this version in {tmp_path / 'other'}/config.json" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_predict_refuses_a_device_that_is_not_there(folder, image, tmp_path):
    image.save(tmp_path / "a.png")
    arguments = ["--model", folder, "--image", tmp_path / "a.png", "--box", *BOX, "--device", "cuda"]
    result = run(*arguments, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "Expected a device that is there, got cuda" in " ".join(result.output.split())
