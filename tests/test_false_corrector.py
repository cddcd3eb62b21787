"""The Dual False Corrector: by hand, by its properties, and behind the pipeline, the evaluation and the commands."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from drawn_folders import disk, make_processor, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from typer.testing import CliRunner

from imedsam import IMedSamModel, IMedSamPipeline
from imedsam.configuration.false_corrector import FalseCorrectorConfig
from imedsam.false_corrector import (
    correct_false_regions,
    default_samples,
    sample_masks,
    vary_prompts,
)
from imedsam.mask_field import InterpolatedMaskField
from imedsam.modeling_sf_recsam import SFRecSamModel
from imedsam.processing.image_processing_imedsam import sample_pixels
from imedsam.training.cli import app
from imedsam.training.evaluation import evaluate_masks, predict_objects
from imedsam.training.evaluation_report import evaluate_to_folder
from imedsam.training.examples import load_examples
from imedsam.uncertainty import ProbabilitySamples

SIZES = torch.tensor([[64, 64]])
BOX = [10.0, 8.0, 60.0, 40.0]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def fields_model(tiny_config, randomised):
    torch.manual_seed(0)
    model = IMedSamModel(tiny_config())
    model.add_adapter()
    return randomised(model).eval()


@pytest.fixture(scope="module")
def sam_model(tiny_config, randomised):
    """SAM's own decoder, whose parts are all moved so that a click matters."""
    torch.manual_seed(0)
    model = IMedSamModel(tiny_config(implicit_decoder=False, lora_rank=0, frequency_view=None))
    return randomised(model.requires_grad_(True)).eval()


@pytest.fixture(scope="module")
def embeddings():
    return torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(2))


def two_samples(mean):
    """Two samples of this mean that differ."""
    mean = torch.tensor(mean)
    spread = 0.5 * torch.minimum(mean, 1 - mean)
    return torch.stack([mean - spread, mean + spread])


# f > 0.45 is the mask; 0.4 and 0.6 alone are suspicious, with U = 0.3365 where 0.9 and 0.1 have 0.1625, 0.2 and 0.8
# 0.2502, and the threshold lies at 0.1625 + 0.9 (0.3365 - 0.1625) = 0.3191.
MEAN = [
    [0.1, 0.1, 0.4, 0.4],
    [0.1, 0.9, 0.9, 0.4],
    [0.2, 0.9, 0.6, 0.6],
    [0.1, 0.1, 0.1, 0.8],
]
SUSPICIOUS = [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
# The mask's six pixels have the mean (20 + 20 + 20 + 10 + 32 + 18) / 6 = 20, so that the limit is 28.
GREY = [
    [10.0, 10.0, 27.0, 0.0],
    [10.0, 20.0, 20.0, 29.0],
    [10.0, 20.0, 10.0, 32.0],
    [10.0, 10.0, 10.0, 18.0],
]
EXPECTED = [[0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_by_hand():
    """27 becomes foreground; black and 29 do not; 32 becomes background, 10 stays; 10s and 18 were not suspicious."""
    result = correct_false_regions(torch.tensor(GREY), two_samples(MEAN))
    assert_close(result.mean, torch.tensor(MEAN))
    assert result.uncertainty[0, 2].item() == pytest.approx(-(0.4 * math.log(0.4) + 0.6 * math.log(0.6)) / 2)
    assert result.suspicious.int().tolist() == SUSPICIOUS
    assert result.masks.int().tolist() == EXPECTED and result.masks.dtype == torch.bool


def test_a_suspicious_pixel_below_0_becomes_background():
    grey = torch.tensor(GREY)
    grey[2, 2] = -10.0  # the mean is then 100 / 6, and the limit 23.3
    masks = correct_false_regions(grey, two_samples(MEAN)).masks
    assert masks.int().tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("changed", "pixel", "value"),
    [
        ({"brightness": 1.3}, (0, 2), False),  # 27 > 26
        ({"brightness": 1.7}, (2, 3), True),  # 32 < 34
        ({"foreground": 0.8}, (2, 2), True),  # 0.6 < 0.72 is background, and 10 brings it back
        ({"suspicion": 1.0}, (0, 2), False),  # nothing lies above the largest
        ({"suspicion": 0.4}, (3, 3), True),
    ],
)
def test_each_threshold_matters(changed, pixel, value):
    result = correct_false_regions(torch.tensor(GREY), two_samples(MEAN), FalseCorrectorConfig(**changed))
    assert result.masks[pixel].item() is value
    if changed == {"suspicion": 0.4}:
        assert (
            result.suspicious[3, 3]
            and not correct_false_regions(torch.tensor(GREY), two_samples(MEAN)).suspicious[3, 3]
        )


def test_constant_or_no_uncertainty_leaves_the_mask_alone():
    grey = torch.tensor([[1.0, 900.0], [3.0, 0.5]])
    for mean in ([[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [1.0, 0.0]]):
        result = correct_false_regions(grey, torch.tensor(mean).expand(3, 2, 2))
        assert not result.suspicious.any()
        assert torch.equal(result.masks, torch.tensor(mean) > 0.25)


def test_an_empty_mask_stays_empty():
    """Where no sample gives a probability, and where a mask beside it is not empty."""
    samples = torch.stack([torch.zeros(2, 4, 4), two_samples(MEAN)], dim=1)
    masks = correct_false_regions(torch.tensor(GREY), samples).masks
    assert not masks[0].any() and masks[1].int().tolist() == EXPECTED


probabilities = st.integers(0, 20).map(lambda n: n / 20)


@st.composite
def cases(draw):
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    count = math.prod(shape)
    values = draw(st.lists(probabilities, min_size=count, max_size=count))
    grey = draw(st.lists(st.integers(-2, 30), min_size=count // shape[0], max_size=count // shape[0]))
    return torch.tensor(grey).view(shape[1:]), torch.tensor(values).view(shape)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_unsuspicious_pixels_are_never_touched(case):
    grey, samples = case
    result = correct_false_regions(grey, samples)
    before = result.mean > 0.5 * result.mean.max()
    assert torch.equal(result.masks[~result.suspicious], before[~result.suspicious])
    turned = result.masks != before
    assert not (turned & (grey == 0)).any()
    if not before.any():
        assert not result.masks.any()


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([2.0**-8, 0.5, 4.0, 1024.0]))
def test_the_unit_of_intensity_does_not_matter(case, scale):
    grey, samples = case
    assert torch.equal(correct_false_regions(grey, samples).masks, correct_false_regions(grey * scale, samples).masks)


def test_masks_are_corrected_by_themselves():
    """In a batch (B, P, M) with an image each, as alone."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(5, 2, 3, 2, 6, 7, generator=generator)
    samples[:, 1] *= torch.tensor([0.1, 0.5, 1.0])[:, None, None, None]
    grey = torch.rand(2, 1, 1, 6, 7, generator=generator)
    together, changed = correct_false_regions(grey, samples), 0
    for b in range(2):
        for p in range(3):
            for m in range(2):
                alone = correct_false_regions(grey[b, 0, 0], samples[:, b, p, m])
                assert torch.equal(together.masks[b, p, m], alone.masks)
                assert torch.equal(together.suspicious[b, p, m], alone.suspicious)
                changed += int((alone.masks != (alone.mean > 0.5 * alone.mean.max())).sum())
    assert changed > 0


def test_wrong_sizes_and_numbers_are_refused():
    for grey in (torch.zeros(4, 5), torch.zeros(2, 4, 4), torch.zeros(1, 1)):
        with pytest.raises(ValueError, match=r"Expected intensities .* for masks of \(4, 4\), got"):
            correct_false_regions(grey, torch.zeros(3, 4, 4))
    wrong = {
        "samples": 0,
        "click_radius": 0.2,
        "foreground": 1.0,
        "suspicion": 1.1,
        "brightness": 0,
        "box_jitter": 0.5,
    }
    assert set(wrong) == {field.name for field in dataclasses.fields(FalseCorrectorConfig)}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"Expected {name} .*, got {value}"):
            FalseCorrectorConfig(**{name: value})


def test_statistics_of_samples_by_hand():
    samples = ProbabilitySamples(torch.tensor([[0.0, 1.0, 0.2], [0.0, 1.0, 0.8]]))
    assert_close(samples.mean, torch.tensor([0.0, 1.0, 0.5]))
    assert_close(samples.variance, torch.tensor([0.0, 0.0, 0.09]))
    assert_close(samples.entropy, torch.tensor([0.0, 0.0, math.log(2)]))


# Where the clicks go


@pytest.fixture
def predicting(sam_model, monkeypatch):
    """`predicting(mask)`: a model that predicts (S, S) over its square whatever the click, with 2000 samples."""

    def make(mask):
        def get_mask_field(image_embeddings, input_points, **prompts):
            return InterpolatedMaskField((2.0 * mask - 1).repeat(*input_points.shape[:2], 1, 1, 1))

        monkeypatch.setattr(sam_model, "get_mask_field", get_mask_field)
        monkeypatch.setattr(sam_model, "false_corrector", FalseCorrectorConfig(samples=2000))
        return sam_model

    return make


def vary(model, embeddings, prompts, sizes, seed=0):
    field = model.get_mask_field(embeddings, **prompts)
    return vary_prompts(prompts, field, model.false_corrector, 64, sizes, seed)


def test_clicks_lie_in_the_disc_and_fill_it(predicting, embeddings):
    """Of a box of 40 x 20 pixels and M = 5: within 4 pixels, a quarter of them within 2. Labels and others stay."""
    mask = torch.zeros(64, 64)
    mask[10:30, 12:52] = 1
    model = predicting(mask)
    points = torch.tensor([[[[32.0, 20.0], [50.0, 5.0], [0.0, 0.0]], [[1.0, 63.0], [30.0, 30.0], [20.0, 25.0]]]])
    labels = torch.tensor([[[1, 0, -10], [1, 1, 0]]])
    varied = vary(model, embeddings, {"input_points": points, "input_labels": labels}, SIZES)
    assert varied["input_points"].shape == (1, 4000, 3, 2)
    clicks = varied["input_points"].unflatten(1, (2000, 2))
    assert torch.equal(varied["input_labels"].unflatten(1, (2000, 2)), labels[:, None].expand(1, 2000, 2, 3))
    still = (labels != 1)[:, None].expand(1, 2000, 2, 3)
    assert torch.equal(clicks[still], points[:, None].expand_as(clicks)[still])
    distance = (clicks - points[:, None]).norm(dim=-1)
    assert distance.max() <= 4 + 1e-4 and distance[0, :, 0, 0].max() > 3.9 and distance[0, :, 0, 0].min() > 0
    assert (distance[0, :, 0, 0] < 2).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert_close(clicks[0, :, 0, 0].mean(dim=0), points[0, 0, 0], atol=0.2, rtol=0)
    assert clicks[0, :, 1, 0].amin() >= 0 and clicks[0, :, 1, 0].amax() == 64  # cut at the lower edge
    # A prompt's clicks are the same beside others and with fewer points.
    alone = vary(model, embeddings, {"input_points": points[:, :1, :1]}, SIZES)["input_points"]
    assert_close(alone[0], clicks[0, :, 0, :1], atol=1e-5, rtol=0)
    other = vary(model, embeddings, {"input_points": points[:, :1, :1]}, SIZES, seed=1)["input_points"]
    assert not torch.allclose(alone, other)


def test_prompts_of_whole_numbers_vary_too(sam_model, embeddings):
    boxes, points = torch.tensor([[[20, 10, 50, 30]]]), torch.tensor([[[[30, 20]]]])
    for prompts in ({"input_boxes": boxes}, {"input_points": points}):
        ((name, given),) = prompts.items()
        assert_close(
            vary(sam_model, embeddings, {name: given}, SIZES)[name],
            vary(sam_model, embeddings, {name: given.float()}, SIZES)[name],
        )
        assert vary(sam_model, embeddings, prompts, SIZES)[name].std(dim=1).max() > 0


def test_the_radius_is_of_the_image_alone_and_0_of_an_empty_mask(predicting, embeddings):
    """In the padding there is no object: of an image in the upper half, rows 10 to 32 count."""
    mask = torch.zeros(64, 64)
    mask[10:60, 12:52] = 1
    points = torch.full((1, 1, 1, 2), 30.0)
    sizes = torch.tensor([[32, 64]])
    for predicted, radius in ((mask, 22 / 5), (torch.zeros(64, 64), 0.0)):
        clicks = vary(predicting(predicted), embeddings, {"input_points": points}, sizes)["input_points"]
        assert (clicks - points).norm(dim=-1).max().item() == pytest.approx(radius, abs=0.2)
        assert clicks[..., 1].max() <= 32


def test_boxes_move_as_in_training(sam_model, embeddings, monkeypatch):
    monkeypatch.setattr(sam_model, "false_corrector", FalseCorrectorConfig(samples=2000))
    boxes = torch.tensor([[[20.0, 10.0, 50.0, 30.0], [0.0, 0.0, 64.0, 64.0]]])
    moved = vary(sam_model, embeddings, {"input_boxes": boxes}, SIZES)["input_boxes"]
    offsets = moved.unflatten(1, (2000, 2))[0] - boxes
    assert_close(offsets[:, 0].amax(dim=0), torch.tensor([3.0, 2.0, 3.0, 2.0]), atol=0.05, rtol=0)
    assert_close(offsets[:, 0].amin(dim=0), -torch.tensor([3.0, 2.0, 3.0, 2.0]), atol=0.05, rtol=0)
    assert_close(offsets[:, 0].mean(dim=0), torch.zeros(4), atol=0.1, rtol=0)
    assert moved.min() == 0 and moved.max() == 64


# The samples


def test_clicks_in_one_call_equal_single_calls(sam_model, embeddings):
    points = torch.tensor([[[[20.0, 30.0]], [[40.0, 12.0]]]])
    prompts = {"input_points": points, "class_labels": torch.zeros(1, 2, dtype=torch.long)}
    samples = sample_masks(sam_model, embeddings, prompts, SIZES, (20, 30))
    assert samples.shape == (5, 1, 2, 1, 20, 30)
    clicks = vary(sam_model, embeddings, prompts, SIZES)["input_points"].unflatten(1, (5, 2))
    for n in range(5):
        for p in range(2):
            field = sam_model.get_mask_field(embeddings, input_points=clicks[:, n, p : p + 1])
            assert_close(samples[n, 0, p], field.render((20, 30)).logits[0, 0].sigmoid(), atol=1e-4, rtol=0)
    assert samples.var(dim=0).max() > 1e-6  # the clicks matter
    assert torch.equal(samples, sample_masks(sam_model, embeddings, prompts, SIZES, (20, 30)))


@pytest.mark.parametrize("selection", ["threshold", None])
def test_dropout_samples_are_passes_of_thinned_networks(tiny_config, randomised, embeddings, selection):
    """
    Of the coarse head as of a head whose weights are thinned; where points are refined does not change. Their mean
    tends to the expectation that the closed form is of.
    """
    torch.manual_seed(0)
    model = randomised(IMedSamModel(tiny_config(selection=selection))).eval()
    boxes = torch.tensor([[[8.0, 12.0, 40.0, 50.0]]])
    field = model.get_mask_field(embeddings, boxes)
    coordinates = 2 * torch.rand(1, 1, 300, 2, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        plain, passes = field.values(coordinates), field.dropout_fields(4)
        assert len(passes) == 4
        for sample in passes:
            values = sample.values(coordinates)
            assert torch.equal(values.uncertainty, plain.uncertainty)
            weight, bias = field.coarse_head
            sample.coarse_head = weight * sample.thinning, bias
            expected = (weight * sample.thinning) @ field._trunk(coordinates[0])[1].transpose(1, 2) + bias[..., None]
            assert_close(values.coarse_logits[0], expected + field._prior(coordinates[0]), atol=1e-4, rtol=0)
            refined = values.logits != values.coarse_logits
            assert torch.equal(refined, plain.logits != plain.coarse_logits)
            assert refined.any() == (selection is not None)
            assert not torch.allclose(values.logits, plain.logits)
            if selection is not None:  # the fine field sees the pass too
                assert not torch.allclose(values.logits[refined], plain.logits[refined])
    samples = sample_masks(model, embeddings, {"input_boxes": boxes}, SIZES, (16, 16), kind="dropout")
    assert samples.shape == (5, 1, 1, 1, 16, 16) and samples.var(dim=0).max() > 1e-6
    again = sample_masks(model, embeddings, {"input_boxes": boxes}, SIZES, (16, 16), kind="dropout")
    other = sample_masks(model, embeddings, {"input_boxes": boxes}, SIZES, (16, 16), kind="dropout", seed=1)
    assert torch.equal(samples, again) and not torch.allclose(samples, other)


def test_samples_that_cannot_be(sam_model, fields_model, embeddings):
    with pytest.raises(ValueError, match="Expected samples by one of prompts, dropout, got 'noise'"):
        sample_masks(sam_model, embeddings, {}, SIZES, (8, 8), kind="noise")
    with pytest.raises(ValueError, match="Expected boxes or points to vary, got neither"):
        sample_masks(sam_model, embeddings, {}, SIZES, (8, 8))
    with pytest.raises(ValueError, match="Expected the field of an implicit decoder for dropout samples"):
        sample_masks(sam_model, embeddings, {}, SIZES, (8, 8), kind="dropout")
    assert default_samples(sam_model) == "prompts" and default_samples(fields_model) == "dropout"


@pytest.mark.parametrize("kind", ["prompts", "dropout"])
def test_samples_of_all_classes_of_a_click_and_a_box(tiny_config, randomised, embeddings, kind):
    """Each prompt's are those that it has alone."""
    torch.manual_seed(0)
    model = randomised(IMedSamModel(tiny_config(num_labels=2))).eval()
    prompts = {
        "input_boxes": torch.tensor([[[8.0, 12.0, 40.0, 50.0], [20.0, 4.0, 60.0, 30.0]]]),
        "input_points": torch.tensor([[[[20.0, 30.0]], [[40.0, 12.0]]]]),
        "input_labels": torch.ones(1, 2, 1, dtype=torch.long),
    }
    samples = sample_masks(model, embeddings, prompts, SIZES, (12, 10), mode="exact", kind=kind)
    assert samples.shape == (5, 1, 2, 2, 12, 10)
    second = {name: prompt[:, 1:] for name, prompt in prompts.items()}
    alone = sample_masks(model, embeddings, second, SIZES, (12, 10), mode="exact", kind=kind)
    assert_close(samples[:, :, 1:], alone, atol=1e-4, rtol=0)


# Pipeline, evaluation, commands


@pytest.fixture(scope="module")
def picture():
    """Grey, brighter from left to right, with a black corner; nothing of it is a multiple of anything."""
    values = np.tile(np.linspace(40, 250, 80).astype(np.uint8), (50, 1))
    values[:8, :8] = 0
    return Image.fromarray(values)


def make_pipeline(model):
    return IMedSamPipeline(model, make_processor("longest_side"))


@pytest.mark.parametrize("kind", ["prompts", "dropout"])
def test_the_pipeline_corrects_by_the_grey_values_of_its_region(fields_model, picture, monkeypatch, kind):
    monkeypatch.setattr(fields_model, "false_corrector", FalseCorrectorConfig(suspicion=0.3))
    pipeline = make_pipeline(fields_model)
    pipeline.set_image(picture)
    prompts = {
        "input_boxes": [BOX, [0, 0, 20, 20]],
        "region": (4, 0, 64, 50),
        "output_size": (25, 60),
        "mode": "exact",
    }
    plain, corrected = pipeline.predict(**prompts), pipeline.predict(**prompts, correct=kind, contours=True)
    for name in ("logits", "uncertainty", "scores"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(corrected, name))
    # Rows 1, 3, ... of the image, since a centre between two pixels is the lower one's, and columns 4 to 63.
    grey = torch.from_numpy(np.asarray(picture)[1::2, 4:64].astype(np.float32)) / 255
    image = pipeline._image
    inputs = pipeline.processor.process_prompts(
        image["original_sizes"], image["reshaped_input_sizes"], input_boxes=prompts["input_boxes"]
    )
    samples = sample_masks(
        fields_model,
        image["image_embeddings"],
        {"input_boxes": inputs["input_boxes"]},
        image["reshaped_input_sizes"],
        (25, 60),
        torch.tensor([2 * 4 / 80 - 1, -1.0, 2 * 64 / 80 - 1, 2 * 50 / 80 - 1]),
        "exact",
        kind,
    )
    expected = correct_false_regions(grey, samples, fields_model.false_corrector).masks[0].numpy()
    np.testing.assert_array_equal(corrected.masks, expected)
    assert (corrected.masks != plain.masks).any()
    for masks, outlines in zip(corrected.masks, corrected.contours, strict=True):
        area = sum(contour.area for contour in outlines[0])  # corners of pixels are cut: at most 1 / 8 of 2 each
        length = sum(len(ring) for contour in outlines[0] for ring in (contour.exterior, *contour.holes))
        assert abs(area / 2 - masks[0].sum()) <= length / 8 + 1
        points = np.concatenate([contour.exterior for contour in outlines[0]])
        assert (points >= [4, 0]).all() and (points <= [64, 50]).all()


def test_the_corrector_is_the_models(fields_model, picture, monkeypatch):
    pipeline = make_pipeline(fields_model)
    pipeline.set_image(picture)
    masks = []
    for corrector in (FalseCorrectorConfig(), FalseCorrectorConfig(suspicion=0.2, brightness=1.1)):
        monkeypatch.setattr(fields_model, "false_corrector", corrector)
        masks.append(pipeline.predict(input_boxes=[BOX], correct="prompts").masks)
    assert (masks[0] != masks[1]).any()
    with pytest.raises(ValueError, match="got 'both'"):
        pipeline.predict(input_boxes=[BOX], correct="both")


def test_grey_values_are_not_normalised():
    processor = make_processor().image_processor
    colours = np.zeros((2, 3, 3), dtype=np.uint8)
    colours[0, 1] = (30, 60, 120)
    (grey,) = processor.get_grey_values(colours)
    assert_close(grey, torch.tensor([[0.0, 70 / 255, 0.0], [0.0, 0.0, 0.0]]))
    (windowed,) = processor.get_grey_values(np.array([[-100, 50], [100, 300]], dtype=np.int16), window=(0, 200))
    assert windowed.tolist() == [[0.0, 0.25], [0.5, 1.0]]


def test_pixels_of_another_grid_by_hand():
    values = torch.arange(12.0).view(3, 4)
    assert sample_pixels(values, (3, 4)).tolist() == values.tolist()
    assert sample_pixels(values, (1, 2)).tolist() == [[5.0, 7.0]]
    assert sample_pixels(values, (2, 4), (1, 1, 3, 2)).tolist() == [[5.0, 5.0, 6.0, 6.0]] * 2


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("data") / "set", [disk(40, 60, 20 + 8 * i, 20, 9) for i in range(3)])
    rng = np.random.default_rng(0)
    for name in "abc":  # bright in places, so that there is something to correct
        Image.fromarray(rng.integers(1, 256, (40, 60), dtype=np.uint8)).save(folder / "images" / f"{name}.png")
        (folder / "images" / f"{name}.jpg").unlink()
    (folder / "splits.json").write_text(json.dumps({"test": ["a", "b", "c"]}))
    return folder


@pytest.mark.parametrize("kind", ["prompts", "dropout"])
def test_the_evaluation_corrects_what_the_pipeline_does(fields_model, drawn, kind):
    examples, processor = load_examples(str(drawn), "test"), make_processor()
    pipeline = IMedSamPipeline(fields_model, processor)
    options = {"mode": "exact", "progress": False, "batch_size": 2}
    different = 0
    for prompted, prediction in predict_objects(fields_model, processor, examples, correct=kind, **options):
        pipeline.set_image(examples[prompted.index]["image"])
        expected = pipeline.predict(input_boxes=[prompted.box.tolist()], mode="exact", correct=kind).masks[0, 0]
        assert (prediction.mask == expected).mean() > 0.995
        different += int((prediction.mask != (prediction.logits > 0)).sum())
    assert different > 10
    plain = evaluate_masks(fields_model, processor, examples, **options)
    corrected = evaluate_masks(fields_model, processor, examples, correct=kind, **options)
    assert plain.mean()["dice"] != corrected.mean()["dice"]


def test_the_report_says_so(fields_model, drawn, tmp_path):
    fields_model.save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    reports = [
        evaluate_to_folder(str(tmp_path / "model"), str(drawn), tmp_path / str(correct), correct=correct)
        for correct in (False, True)
    ]
    assert [report["correct"] for report in reports] == [False, True]
    assert [report["settings"][0]["title"].endswith(", corrected") for report in reports] == [False, True]
    dice = [report["settings"][0]["methods"]["model"]["mean"]["dice"] for report in reports]
    expected = evaluate_masks(
        fields_model, make_processor(), load_examples(str(drawn), "test"), correct="dropout", progress=False
    ).mean()["dice"]
    assert dice[0] != dice[1] and dice[1] == pytest.approx(expected, abs=0.01)
    arguments = ["evaluate", "--model", tmp_path / "model", "--data", drawn, "-o", tmp_path / "cli", "--correct"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "cli" / "metrics.json").read_text())
    assert report["correct"] and report["settings"][0]["methods"]["model"]["mean"]["dice"] == pytest.approx(dice[1])


def test_predict_writes_the_corrected_mask(fields_model, tmp_path):
    """Of noise, of which a third is too bright for the mask and hardly anything is black: suspicious pixels turn."""
    fields_model.save_pretrained(tmp_path / "model")
    make_processor("longest_side").save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(1, 256, (50, 80), dtype=np.uint8)).save(tmp_path / "a.png")
    masks = []
    for flags in ([], ["--correct", "--contours", tmp_path / "a.geojson"]):
        arguments = [
            "--model",
            tmp_path / "model",
            "--image",
            tmp_path / "a.png",
            "--box",
            *BOX,
            "-o",
            tmp_path / "out",
        ]
        result = CliRunner().invoke(app, ["predict", *map(str, [*arguments, *flags])])
        assert result.exit_code == 0, result.output
        masks.append(np.asarray(Image.open(tmp_path / "out" / "a_mask.png")) > 0)
    pipeline = IMedSamPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_image(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(masks[1], pipeline.predict(input_boxes=[BOX], correct="dropout").masks[0, 0])
    assert (masks[0] != masks[1]).any()
    report = json.loads((tmp_path / "out" / "report.json").read_text())["a.png"]["masks"][0]
    (feature,) = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert report["area"] == masks[1].sum()
    assert feature["properties"]["area"] == pytest.approx(report["area"], rel=0.1)


def test_masks_that_are_corrected_as_they_come_are_refused_before_anything_is_written(sam_folder, drawn, tmp_path):
    model = SFRecSamModel.from_sam_pretrained(sam_folder, 64)
    model.add_corrector()
    model.save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    boxes = ["--boxes", tmp_path / "boxes.json", "--contours", tmp_path / "outlines" / "all.geojson"]
    (tmp_path / "boxes.json").write_text(json.dumps({f"{name}.png": [BOX] for name in "abc"}))
    for command in (["predict", "--image", drawn / "images", *boxes], ["evaluate", "--data", drawn]):
        arguments = [*command, "--model", tmp_path / "model", "-o", tmp_path / "out", "--correct"]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        said = " ".join(result.output.replace("│", " ").split())
        assert result.exit_code == 2 and said.count("Expected") == 1, result.output
        assert "Expected a model without a learned corrector, got one" in said
        assert "leave correct (--correct) out" in said
        assert not (tmp_path / "out").exists() and not (tmp_path / "outlines").exists()
