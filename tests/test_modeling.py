"""The whole model: outputs, messages, parity with stock SAM, batches, training, precision, files."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoModel

import imedsam.modeling_imedsam
import imedsam.prompt_fusion
from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.losses import segmentation_loss, spectral_correlation_loss, uncertainty_guided_loss
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.tiles import pixel_centres

SQUARE = torch.tensor([[-1.0, -1.0, 1.0, 1.0]])


@pytest.fixture(scope="module")
def model(from_sam):
    return from_sam()


@pytest.fixture(scope="module")
def two_classes(from_sam):
    return from_sam(num_labels=2)


# Outputs


@torch.no_grad()
def test_outputs(model, inputs):
    output = model(**inputs)
    assert output.pred_masks.shape == output.coarse_masks.shape == output.uncertainty.shape == (2, 2, 1, 64, 64)
    assert output.iou_scores.shape == (2, 2, 1) and output.image_embeddings.shape == (2, 32, 4, 4)
    assert output.loss is None and output.point_logits is None
    assert output.pred_masks.std() > 0.1 and (output.pred_masks != output.coarse_masks).any()
    small = model(**inputs, output_size=(10, 20))
    assert small.pred_masks.shape == (2, 2, 1, 10, 20)
    points = torch.rand(2, 2, 7, 2) * 2 - 1
    at_points = model(**inputs, coordinates=points)
    assert at_points.point_logits.shape == (2, 2, 1, 7) and at_points.pred_masks is None
    assert set(output.keys()) == {"pred_masks", "iou_scores", "coarse_masks", "uncertainty", "image_embeddings"}
    tuples = model(**inputs).to_tuple()
    assert torch.equal(tuples[0], output.pred_masks)


def test_rendering_is_the_same_while_training(from_sam, inputs):
    model = from_sam()
    expected = model.eval()(**inputs, output_size=(200, 200))
    labels = torch.ones(2, 2, 16, 16)
    output = model.train()(**inputs, labels=labels, output_size=(200, 200))
    assert_close(output.pred_masks, expected.pred_masks)
    assert output.loss.requires_grad and not output.pred_masks.requires_grad


@torch.no_grad()
def test_scores_by_hand(model, inputs):
    output = model(**inputs, output_size=(12, 12))
    for image in range(2):
        for prompt in range(2):
            p = output.pred_masks[image, prompt, 0].sigmoid().flatten().tolist()
            overlap, size = sum(q for q in p if q > 0.5), sum(q > 0.5 for q in p)
            assert output.iou_scores[image, prompt, 0].item() == pytest.approx(2 * overlap / (sum(p) + size), rel=1e-4)


@torch.no_grad()
def test_forward_composes_the_public_parts(model, inputs):
    embeddings = model.get_image_embeddings(inputs["pixel_values"])
    field = model.get_mask_field(embeddings, inputs["input_boxes"])
    output = model(**inputs, output_size=(20, 20))
    assert_close(field.render((20, 20)).logits, output.pred_masks)
    assert_close(model(image_embeddings=embeddings, input_boxes=inputs["input_boxes"]).pred_masks.shape[-1], 64)
    again = model(image_embeddings=embeddings, input_boxes=inputs["input_boxes"], output_size=(20, 20))
    assert_close(again.pred_masks, output.pred_masks)
    points = pixel_centres((20, 20), SQUARE).expand(2, 2, -1, -1)[:, :, :50]
    expected = output.pred_masks.flatten(-2)[..., :50]
    assert_close(model(**inputs, coordinates=points).point_logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["closed_form", "monte_carlo"])
def test_both_uncertainties_at_test_time(from_sam, inputs, kind):
    uncertainty = from_sam(uncertainty=kind)(**inputs, output_size=(16, 16)).uncertainty
    assert uncertainty.shape == (2, 2, 1, 16, 16)
    assert uncertainty.min() >= 0 and 1e-4 < uncertainty.max() <= 0.25


@torch.no_grad()
def test_no_prompt_is_one_field_of_the_whole_image(model, inputs):
    output = model(inputs["pixel_values"], output_size=(8, 8))
    assert output.pred_masks.shape == (2, 1, 1, 8, 8) and output.pred_masks.isfinite().all()
    field = model.get_mask_field(output.image_embeddings)
    assert field.prompt.abs().max() == 0
    assert_close(field.frame, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4))


@torch.no_grad()
def test_each_kind_of_prompt_acts(model, inputs):
    pixels, boxes = inputs.values()
    points, masks = torch.tensor([[[[30.0, 30.0]]] * 2] * 2), torch.zeros(2, 2, 16, 16)
    masks[..., 4:12, 4:12] = 4.0
    given = {
        "none": {},
        "boxes": {"input_boxes": boxes},
        "points": {"input_points": points},
        "masks": {"input_masks": masks},
        "boxes and points": {"input_boxes": boxes, "input_points": points},
        "boxes and masks": {"input_boxes": boxes, "input_masks": masks},
    }
    results = {name: model(pixels, **prompts, output_size=(8, 8)).pred_masks for name, prompts in given.items()}
    names = list(results)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert (results[one] - results[other]).abs().max() > 1e-3, (one, other)
    outside = model(pixels, input_points=points, input_labels=torch.zeros(2, 2, 1).long(), output_size=(8, 8))
    assert (outside.pred_masks - results["points"]).abs().max() > 1e-3


@torch.no_grad()
def test_the_prompts_embedding_is_the_mean_of_its_tokens(model, inputs):
    """Of the corners and points that were given, SAM's own tokens for them."""
    boxes = inputs["input_boxes"]
    points, labels = torch.tensor([[[[30.0, 30.0], [5.0, 9.0]]] * 2] * 2), torch.tensor([[[1, -10], [1, 0]]] * 2)
    encoder = model.prompt_encoder.modules_to_save["default"]
    corners = encoder._embed_boxes(boxes - 0.5).flatten(0, 1)
    clicks = encoder._embed_points(points - 0.5, labels, pad=False).flatten(0, 1)
    embeddings = torch.zeros(2, 32, 4, 4)

    def prompt(**given):
        return model.get_mask_field(embeddings, **given).prompt

    assert_close(prompt(input_boxes=boxes), corners.mean(dim=1))
    expected = torch.stack([clicks[0, 0], clicks[1].mean(dim=0)])
    assert_close(prompt(input_points=points, input_labels=labels)[:2], expected)
    both = prompt(input_boxes=boxes, input_points=points, input_labels=labels)
    assert_close(both[0], (clicks[0, 0] + corners[0].sum(dim=0)) / 3)
    assert_close(both[1], torch.cat([clicks[1], corners[1]]).mean(dim=0))


# Messages


def rand(*shape):
    return torch.rand(*shape)


REFUSED = [
    ({"pixel_values": None}, "one of pixel_values and image_embeddings, got both or neither"),
    ({"image_embeddings": rand(2, 32, 4, 4)}, "one of pixel_values and image_embeddings, got both or neither"),
    (
        {"pixel_values": rand(2, 3, 32, 32)},
        r"pixel_values of shape \(B, 3, 64, 64\), got \(2, 3, 32, 32\): use IMedSamProcessor with this model's image_",
    ),
    ({"pixel_values": rand(3, 64, 64)}, r"pixel_values of shape \(B, 3, 64, 64\), got \(3, 64, 64\)"),
    (
        {"pixel_values": None, "image_embeddings": rand(2, 32, 6, 6)},
        r"image_embeddings of shape \(B, C, 4, 4\), got \(2, 32, 6, 6\): they come from get_image_embeddings",
    ),
    ({"input_boxes": rand(2, 4)}, r"input_boxes of shape \(B, P, 4\), got \(2, 4\): B images, P prompts"),
    ({"input_boxes": rand(2, 0, 4)}, r"at least one prompt per image, got .*'input_boxes': \(2, 0\)"),
    ({"input_boxes": rand(2, 2, 5)}, r"input_boxes of shape \(B, P, 4\), got \(2, 2, 5\)"),
    (
        {"input_boxes": rand(3, 2, 4)},
        r"Expected 2 images .* got \(images, prompts\) {'input_boxes': \(3, 2\)}: pad them",
    ),
    ({"input_points": rand(2, 2, 2)}, r"input_points of shape \(B, P, N, 2\), got \(2, 2, 2\)"),
    ({"input_points": rand(2, 2, 5, 3)}, r"input_points of shape \(B, P, N, 2\), got \(2, 2, 5, 3\)"),
    (
        {"input_points": rand(2, 3, 1, 2)},
        r"equally many prompts of each kind, got .*'input_boxes': \(2, 2\), 'input_points': \(2, 3\)",
    ),
    ({"input_labels": rand(2, 2, 1)}, r"a label for each point, got input_labels of shape \(2, 2, 1\) and .* None"),
    (
        {"input_points": rand(2, 2, 3, 2), "input_labels": rand(2, 2, 1)},
        r"a label for each point, got input_labels of shape \(2, 2, 1\) and input_points of shape \(2, 2, 3, 2\)",
    ),
    ({"input_masks": rand(2, 64, 64)}, r"input_masks of shape \(B, P, H, W\), got \(2, 64, 64\)"),
    ({"input_masks": rand(2, 1, 16, 16)}, r"got .*'input_boxes': \(2, 2\), 'input_masks': \(2, 1\)"),
    ({"class_labels": torch.zeros(2).long()}, r"class_labels of shape \(B, P\) = \(2, 2\), got \(2,\)"),
    (
        {"class_labels": torch.tensor([[0, 2], [1, 0]])},
        r"class_labels in \[0, 1\], got \[0, 1, 2\]: the background is no class",
    ),
    ({"class_labels": torch.tensor([[0, -1], [1, 0]])}, r"class_labels in \[0, 1\], got \[-1, 0, 1\]"),
    ({"prompt_attention_mask": torch.ones(2)}, r"prompt_attention_mask of shape \(B, P\) = \(2, 2\), got \(2,\)"),
    ({"labels": rand(2, 64, 64)}, r"labels of shape \(B, P, H, W\) with \(B, P\) = \(2, 2\), got \(2, 64, 64\): or"),
    ({"labels": rand(2, 3, 64, 64)}, r"labels of shape \(B, P, H, W\) with \(B, P\) = \(2, 2\), got \(2, 3, 64, 64\)"),
    (
        {"coordinates": rand(2, 2, 9, 2), "labels": rand(2, 2, 8)},
        r"coordinates \(B, P, N, 2\) and labels .* = \(2, 2\), got \(2, 2, 9, 2\) and \(2, 2, 8\)",
    ),
    ({"coordinates": rand(2, 1, 9, 2), "labels": rand(2, 1, 9)}, r"got \(2, 1, 9, 2\) and \(2, 1, 9\)"),
    ({"coordinates": rand(9, 2)}, r"coordinates of shape \(B, P, N, 2\) .*, got \(9, 2\)"),
    (
        {"coordinates": rand(2, 2, 9, 2), "labels": rand(2, 2, 9).round(), "class_labels": None},
        "class_labels with labels and 2 classes, got none: say which class",
    ),
    (
        {"coordinates": rand(2, 2, 9, 2), "labels": rand(2, 2, 9).round(), "point_weights": rand(2, 2, 8)},
        r"a value for each label, got point_weights of shape \(2, 2, 8\) and labels of shape \(2, 2, 9\)",
    ),
    ({"output_size": (64,)}, r"output_size as \(height, width\), both at least 1, got \(64,\)"),
]


@pytest.mark.parametrize("wrong, message", REFUSED)
def test_mistakes_are_refused(two_classes, inputs, wrong, message):
    given = {**inputs, "class_labels": torch.tensor([[0, 1], [1, 0]])}
    with pytest.raises(ValueError, match=message):
        two_classes(**{**given, **wrong})


# Parity with stock SAM


@torch.no_grad()
@pytest.mark.parametrize("kind", ["boxes", "points", "masks", "boxes and points", "boxes and masks"])
def test_with_sams_decoder_it_is_stock_sam(tiny_sam, sam_folder, inputs, kind):
    """SAM counts from the centre of the first pixel, we count from its corner: half a pixel between them."""
    sam = tiny_sam()
    model = IMedSamModel.from_sam_pretrained(sam_folder, image_size=64, implicit_decoder=False)
    pixels, boxes = inputs.values()
    generator = torch.Generator().manual_seed(0)
    points, labels = 64 * torch.rand(2, 2, 3, 2, generator=generator), torch.tensor([[[1, 0, 1], [1, 1, 0]]] * 2)
    masks = torch.randn(2, 2, 16, 16, generator=generator)
    given = {}
    if "boxes" in kind:
        given["input_boxes"] = boxes
    if "points" in kind:
        given.update(input_points=points, input_labels=labels)
    if "masks" in kind:
        given["input_masks"] = masks
    ours = model(pixels, **given, output_size=(16, 16)).pred_masks
    theirs = {key: value - 0.5 if key in ("input_boxes", "input_points") else value for key, value in given.items()}
    if "masks" in kind:  # stock SAM takes one mask per image: compare prompt by prompt
        for prompt in range(2):
            single = {key: value[:, prompt : prompt + 1] for key, value in theirs.items()}
            single["input_masks"] = masks[:, prompt, None]
            expected = sam(pixels, **single, multimask_output=False).pred_masks
            assert_close(ours[:, prompt : prompt + 1], expected, atol=1e-4, rtol=1e-4)
    else:
        expected = sam(pixels, **theirs, multimask_output=False).pred_masks
        assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        shifted = sam(pixels, **given, multimask_output=False).pred_masks
        assert (shifted - expected).abs().max() > 1e-3  # the half pixel shows
    assert ours.std() > 0.01


@torch.no_grad()
def test_with_sams_decoder_the_mask_is_interpolated(sam_folder, inputs):
    model = IMedSamModel.from_sam_pretrained(sam_folder, image_size=64, implicit_decoder=False, num_labels=3)
    low = model(**inputs, output_size=(16, 16))
    assert low.pred_masks.shape[2] == 1  # class-agnostic
    field = model.get_mask_field(low.image_embeddings, inputs["input_boxes"])
    high = field.render((64, 64), mode="exact").logits
    expected = F.interpolate(low.pred_masks[:, :, 0], (64, 64), mode="bilinear")
    assert_close(high[:, :, 0], expected, atol=1e-4, rtol=1e-4)
    p = low.pred_masks.sigmoid()
    assert_close(low.uncertainty, p * (1 - p))


# Batches


@torch.no_grad()
def test_a_batch_of_ragged_boxes_equals_single_images(model, inputs):
    mask = torch.tensor([[True, True], [True, False]])
    together = model(**inputs, prompt_attention_mask=mask, output_size=(16, 16))
    for index, count in enumerate(mask.sum(dim=1).tolist()):
        alone = model(
            inputs["pixel_values"][index : index + 1],
            input_boxes=inputs["input_boxes"][index : index + 1, :count],
            output_size=(16, 16),
        )
        assert_close(together.pred_masks[index, :count], alone.pred_masks[0], atol=2e-4, rtol=1e-3)
        assert_close(together.uncertainty[index, :count], alone.uncertainty[0], atol=1e-4, rtol=1e-3)
    assert (together.pred_masks[1, 1] == -100).all() and (together.pred_masks[0] > -100).all()


@torch.no_grad()
@pytest.mark.parametrize("with_boxes", [False, True])
def test_a_batch_of_ragged_points_equals_single_prompts(model, inputs, with_boxes):
    pixels, boxes = inputs.values()
    generator = torch.Generator().manual_seed(0)
    points = 64 * torch.rand(2, 2, 3, 2, generator=generator)
    labels = torch.tensor([[[1, 0, 1], [1, -10, -10]], [[1, 1, -10], [0, -10, 1]]])
    given = {"input_boxes": boxes} if with_boxes else {}
    together = model(pixels, **given, input_points=points, input_labels=labels, output_size=(16, 16)).pred_masks
    for image in range(2):
        for prompt in range(2):
            valid = labels[image, prompt] != -10
            alone = model(
                pixels[image : image + 1],
                **{key: value[image : image + 1, prompt : prompt + 1] for key, value in given.items()},
                input_points=points[image, prompt, valid][None, None],
                input_labels=labels[image, prompt, valid][None, None],
                output_size=(16, 16),
            ).pred_masks
            assert_close(together[image, prompt], alone[0, 0], atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_a_batch_of_masks_equals_single_prompts(model, inputs):
    pixels, boxes = inputs.values()
    masks = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    together = model(pixels, boxes, input_masks=masks, output_size=(16, 16)).pred_masks
    for image in range(2):
        for prompt in range(2):
            one = (slice(image, image + 1), slice(prompt, prompt + 1))
            alone = model(pixels[one[0]], boxes[one], input_masks=masks[one], output_size=(16, 16)).pred_masks
            assert_close(together[one], alone, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_padding_of_the_image_reaches_the_spectrum(model, inputs):
    sizes = torch.tensor([[64, 40], [64, 64]])
    padded = model(**inputs, reshaped_input_sizes=sizes).image_embeddings
    plain = model(**inputs).image_embeddings
    assert (padded[0] - plain[0]).abs().max() > 1e-3
    assert_close(padded[1], plain[1], atol=1e-5, rtol=1e-5)


# The loss


@torch.no_grad()
def test_the_loss_is_a_mean_over_images_of_means_over_prompts(model, inputs):
    generator = torch.Generator().manual_seed(0)
    points = 2 * torch.rand(2, 2, 30, 2, generator=generator) - 1
    labels = (torch.rand(2, 2, 30, generator=generator) > 0.5).long()
    mask = torch.tensor([[True, True], [True, False]])
    field = model.get_mask_field(model.get_image_embeddings(inputs["pixel_values"]), inputs["input_boxes"])
    values = field.values(points)
    coarse = segmentation_loss(values.coarse_logits[:, :, 0], labels.float())
    merged = segmentation_loss(values.logits[:, :, 0], labels.float())
    assert (coarse - merged).abs().max() > 1e-3
    for weight in (0.0, 0.3, 1.0):
        loss = weight * coarse + (1 - weight) * merged
        output = model(**inputs, coordinates=points, labels=labels, coarse_loss_weight=weight)
        assert_close(output.loss, loss.mean())
        assert_close(output.point_logits, values.logits)
        masked = model(
            **inputs, coordinates=points, labels=labels, coarse_loss_weight=weight, prompt_attention_mask=mask
        )
        assert_close(masked.loss, ((loss[0, 0] + loss[0, 1]) / 2 + loss[1, 0]) / 2)


@torch.no_grad()
def test_the_spectral_loss_is_added_prompt_by_prompt(model, inputs):
    labels = (torch.rand(2, 2, 12, 16, generator=torch.Generator().manual_seed(0)) > 0.5).long()
    plain = model(**inputs, labels=labels)
    spectral = spectral_correlation_loss(plain.point_logits[:, :, 0].unflatten(-1, (12, 16)), labels)
    assert spectral.shape == (2, 2) and spectral.min() > 1e-2
    output = model(**inputs, labels=labels, spectral_loss_weight=0.5)
    assert_close(output.loss, plain.loss + 0.5 * spectral.mean())
    mask = torch.tensor([[True, True], [True, False]])
    masked, plain = (
        model(**inputs, labels=labels, prompt_attention_mask=mask, spectral_loss_weight=w).loss for w in (1, 0)
    )
    assert_close(masked - plain, ((spectral[0, 0] + spectral[0, 1]) / 2 + spectral[1, 0]) / 2)
    points = torch.zeros(2, 2, 30, 2)
    for given in ({"coordinates": points, "labels": points[..., 0]}, {"labels": labels, "num_points": 10}):
        with pytest.raises(ValueError, match="Expected labels on a grid, without coordinates and num_points"):
            model(**inputs, **given, spectral_loss_weight=0.5)


@torch.no_grad()
@pytest.mark.parametrize("grid", [False, True])
def test_the_uncertainty_guided_loss_is_added_prompt_by_prompt(model, inputs, grid):
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(2, 2, 12, 16, generator=generator) > 0.5).float()
    given = {"labels": labels}
    if not grid:
        given = {"labels": labels.flatten(2), "coordinates": 2 * torch.rand(2, 2, 192, 2, generator=generator) - 1}
        given["point_weights"] = 2 * torch.rand(2, 2, 192, generator=generator)
    plain = model(**inputs, **given)
    guided = uncertainty_guided_loss(plain.point_logits[:, :, 0], labels.flatten(2), given.get("point_weights"))
    assert guided.shape == (2, 2) and guided.min() > 0.1
    mask = torch.tensor([[True, True], [True, False]])
    output = model(**inputs, **given, uncertainty_loss_weight=0.5)
    assert_close(output.loss, plain.loss + 0.5 * guided.mean())
    masked, plain = (
        model(**inputs, **given, prompt_attention_mask=mask, uncertainty_loss_weight=w).loss for w in (1, 0)
    )
    assert_close(masked - plain, ((guided[0, 0] + guided[0, 1]) / 2 + guided[1, 0]) / 2)


@pytest.mark.parametrize("train", [False, True])
def test_points_drawn_by_their_uncertainty(model, inputs, monkeypatch, train):
    """Points, labels, weights and areas are taken along, and the factors of the draw join weights and areas."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2, 2, 30, 2, generator=generator) * 2 - 1
    labels = (points[..., 0] > 0).long()
    weights, areas = (torch.rand(2, 2, 30, generator=generator) + 0.5 for _ in range(2))
    chosen, factors = torch.randint(0, 30, (2, 2, 50), generator=generator), torch.rand(2, 2, 50) * 2
    given = []
    draw = lambda uncertainty, number: given.append((uncertainty, number)) or (chosen, factors)  # noqa: E731
    monkeypatch.setattr(imedsam.modeling_imedsam, "draw_uncertain", draw)
    model = copy.deepcopy(model).train(train)

    def loss(points, labels, areas, weights, **options):
        torch.manual_seed(0)
        model.zero_grad()
        output = model(
            **inputs, coordinates=points, labels=labels, point_areas=areas, point_weights=weights, **options
        )
        output.loss.backward()
        return output.loss, output.point_logits, model.implicit_decoder.coarse.layers[1].weight.grad.clone()

    taken = (values.gather(2, chosen) for values in (labels, areas, weights))
    labels_, areas_, weights_ = taken
    points_ = points.gather(2, chosen[..., None].expand(-1, -1, -1, 2))
    drawn = loss(points, labels, areas, weights, num_points=50)
    for got, expected in zip(drawn, loss(points_, labels_, factors * areas_, factors * weights_), strict=True):
        assert_close(got, expected)
    assert (drawn[0] - loss(points_, labels_, areas_, weights_)[0]).abs() > 1e-3
    field = model.get_mask_field(model.get_image_embeddings(inputs["pixel_values"]), inputs["input_boxes"])
    assert_close(given[0][0], field.values(points).uncertainty[:, :, 0])
    assert given[0][1] == 50 and not given[0][0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [True, False])
def test_neither_drawn_points_nor_a_threshold_costs_a_gradient(model, inputs, dtype, mode):
    """Autocast's cache must not keep the weights that it cast without gradients."""
    model = copy.deepcopy(model).train(mode)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        labels = (torch.rand(2, 2, 20, 20, generator=torch.Generator().manual_seed(0)) > 0.5).float()
        model(**inputs, labels=labels, num_points=60 if mode else None).loss.backward()
    trained = [(name, p) for name, p in model.implicit_decoder.named_parameters() if p.requires_grad]
    assert len(trained) > 10
    for name, parameter in trained:
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_a_rectangle_may_be_more_precise_than_the_field(model, inputs):
    embeddings = model.get_image_embeddings(inputs["pixel_values"])
    field = model.get_mask_field(embeddings, input_boxes=inputs["input_boxes"])
    for region in ([-1.0, -1.0, 1.0, 1.0], [-0.5, 0.0, 0.5, 0.75]):
        single, double = (torch.tensor(region, dtype=dtype) for dtype in (torch.float32, torch.float64))
        logits = [field.render((80, 90), rectangle).logits for rectangle in (single, double)]
        assert_close(*logits, atol=1e-3, rtol=0)


def test_no_points_to_draw_are_refused(model, inputs):
    with pytest.raises(ValueError, match="Expected num_points of at least 1, got 0"):
        model(**inputs, labels=torch.ones(2, 2, 20, 20), num_points=0)


def test_many_prompts_are_fused_in_parts(model, inputs, monkeypatch):
    embeddings = model.get_image_embeddings(inputs["pixel_values"])
    points, labels = torch.rand(2, 5, 3, 2) * 60, torch.ones(2, 5, 3)
    labels[0, 2, 1:] = labels[1, 3, 2:] = -10
    whole = model.get_mask_field(embeddings, input_points=points, input_labels=labels)
    monkeypatch.setattr(imedsam.prompt_fusion, "PROMPTS_AT_ONCE", 3)
    asked, fuse = [], model.mask_decoder._fuse
    monkeypatch.setattr(
        model.mask_decoder, "_fuse", lambda images, *of: asked.append(len(images)) or fuse(images, *of)
    )
    parts = model.get_mask_field(embeddings, input_points=points, input_labels=labels)
    assert max(asked) == 3 and sum(asked) == 10
    assert_close(parts.features, whole.features)
    assert (whole.features[0] - whole.features[1]).abs().max() > 1e-3


def test_padded_prompts_have_no_influence(model, inputs):
    mask = torch.tensor([[True, True], [True, False]])
    points = torch.rand(2, 2, 30, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = (points[..., 0] > 0).long()

    def gradient(boxes, labels):
        model.zero_grad()
        loss = model(inputs["pixel_values"], boxes, coordinates=points, labels=labels, prompt_attention_mask=mask).loss
        loss.backward()
        return loss.detach(), model.implicit_decoder.coarse.head.weight.grad.clone()

    other_boxes, other_labels = inputs["input_boxes"].clone(), labels.clone()
    other_boxes[1, 1], other_labels[1, 1] = torch.tensor([0.0, 0.0, 9.0, 9.0]), 1 - labels[1, 1]
    expected = gradient(inputs["input_boxes"], labels)
    assert_close(gradient(other_boxes, other_labels), expected)
    other_labels[0, 1] = 1 - labels[0, 1]  # a valid prompt does
    assert not torch.allclose(gradient(other_boxes, other_labels)[0], expected[0])
    all_padded = model(**inputs, coordinates=points, labels=labels, prompt_attention_mask=torch.zeros(2, 2)).loss
    assert all_padded == 0


@torch.no_grad()
def test_dense_labels_are_labels_at_the_pixel_centres(two_classes, inputs):
    labels = (torch.rand(2, 2, 12, 10, generator=torch.Generator().manual_seed(0)) > 0.5).long()
    classes = torch.tensor([[0, 1], [1, 1]])
    points = pixel_centres((12, 10), SQUARE).expand(2, 2, -1, -1)
    dense = two_classes(**inputs, class_labels=classes, labels=labels)
    sparse = two_classes(**inputs, class_labels=classes, coordinates=points, labels=labels.flatten(2))
    assert_close(dense.loss, sparse.loss)
    assert dense.pred_masks is None
    both = two_classes(**inputs, class_labels=classes, labels=labels, output_size=(5, 6))
    assert_close(both.loss, dense.loss)
    assert both.pred_masks.shape == (2, 2, 1, 5, 6)


@torch.no_grad()
def test_class_labels_pick_masks(two_classes, inputs):
    both = two_classes(**inputs, output_size=(16, 16))
    assert both.pred_masks.shape == (2, 2, 2, 16, 16) and both.iou_scores.shape == (2, 2, 2)
    classes = torch.tensor([[0, 1], [1, 0]])
    one = two_classes(**inputs, class_labels=classes, output_size=(16, 16))
    index = classes[:, :, None, None, None].expand(-1, -1, -1, 16, 16)
    assert_close(one.pred_masks, both.pred_masks.gather(2, index), atol=2e-4, rtol=1e-3)
    assert not torch.allclose(both.pred_masks[:, :, 0], both.pred_masks[:, :, 1], atol=0.1)


# Training


def training_step(model, inputs, **forward):
    points = 2 * torch.rand(2, 2, 50, 2, generator=torch.Generator().manual_seed(0)) - 1
    labels = (points.square().sum(dim=-1) < 0.5).long()
    loss = model(**inputs, coordinates=points, labels=labels, **forward).loss
    loss.backward()
    return loss


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lora_rank": 0},
        {"lora_rank": 0, "train_image_encoder": True},
        {"implicit_decoder": False},
        {"train_mask_decoder": True},
        {"train_mask_decoder": True, "lora_rank": 0},
    ],
    ids=str,
)
def test_one_step_changes_what_should_train(from_sam, inputs, values):
    model = from_sam(**values).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # a frozen parameter given by mistake would move as well
    training_step(model, inputs)
    gradients = {name: p.grad.abs().max() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    # Softmax does not see a bias of the keys: its gradient is rounding noise, too small to count.
    assert {name for name in gradients if gradients[name] > 1e-5} <= changed <= set(gradients)
    parts = model.parameter_parts()
    expected = {"prompt encoder"}
    if values.get("implicit_decoder", True):
        expected |= {"upscaling", "ellipse prior", "coarse field", "fine field"}
    expected |= {"frequency adapters", "frequency gates"}
    if values.get("lora_rank", 4):
        expected.add("LoRA")
    if values.get("train_image_encoder"):
        expected.add("image encoder")
    if values.get("train_mask_decoder"):
        expected.add("mask decoder")
    if not values.get("implicit_decoder", True):
        expected |= {"mask decoder", "mask head", "upscaling"}
    assert set(parts) == expected
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed <= trainable
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for part in parts.values() for p in part} == trainable
    for part, parameters in parts.items():  # some of every part moves
        assert {names[id(p)] for p in parameters} & changed, part
    # Of what trains, nothing idles but what this prompt does not use, and biases of keys.
    unused = ("mask_embed", "point_embed", "k_proj.bias")
    if values.get("train_mask_decoder"):  # the field takes the features, not the tokens
        unused += ("final_attn",)
    idle = {name for name in trainable - changed if not any(key in name for key in unused)}
    assert not idle


def test_training_lowers_the_loss(from_sam, inputs):
    model = from_sam().train()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(15):
        torch.manual_seed(0)
        losses.append(training_step(model, inputs).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("values", [{}, {"lora_rank": 0, "train_image_encoder": True}], ids=str)
def test_gradient_checkpointing_changes_nothing(from_sam, inputs, values):
    model = from_sam(**values).train()

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        training_step(model, inputs)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    calls = []
    hook = model.vision_encoder.layers[0].layer_norm1.register_forward_hook(lambda *_: calls.append(1))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert_close(gradients(), expected)
    hook.remove()
    assert len(calls) == 2  # forward, and again in the backward pass
    assert any("vision_encoder" in name for name in expected)


def test_image_embeddings_have_gradients(model, inputs):
    model.zero_grad()
    model.get_image_embeddings(inputs["pixel_values"]).sum().backward()
    assert model.frequency_branch.gates.grad.abs().max() > 0


# Precision and attention


@torch.no_grad()
def test_eager_and_sdpa_attention_agree(sam_folder, inputs):
    models = {
        kind: IMedSamModel.from_sam_pretrained(
            sam_folder, 64, implicit_decoder=False, lora_rank=0, attn_implementation=kind
        )
        for kind in ("eager", "sdpa")
    }
    classes = {type(model.vision_encoder.layers[0].attn).__name__ for model in models.values()}
    assert classes == {"SamVisionAttention", "SamVisionSdpaAttention"}
    eager, sdpa = (model(**inputs) for model in models.values())
    assert_close(eager.image_embeddings, sdpa.image_embeddings, atol=1e-5, rtol=1e-5)
    assert_close(eager.pred_masks, sdpa.pred_masks, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("values", [{}, {"implicit_decoder": False}, {"uncertainty": "monte_carlo"}], ids=str)
def test_bfloat16(from_sam, inputs, values):
    model = from_sam(**values)
    expected = model(**inputs)
    output = model.to(torch.bfloat16)(**inputs)
    assert output.image_embeddings.dtype == torch.bfloat16 and output.pred_masks.dtype == torch.float32
    error = (output.image_embeddings - expected.image_embeddings).norm() / expected.image_embeddings.norm()
    assert error < 0.03
    for name, value in output.items():
        assert value.isfinite().all(), name
    # These random weights amplify rounding: nearly the same mask is all that one can ask.
    agreement = ((output.pred_masks > 0) == (expected.pred_masks > 0)).float().mean()
    assert agreement > 0.85


def test_autocast(from_sam, inputs):
    model = from_sam().train()
    torch.manual_seed(0)
    expected = training_step(model, inputs)
    gradient = model.implicit_decoder.coarse.head.weight.grad.clone()
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = training_step(model, inputs)
    assert loss.isfinite() and loss.item() == pytest.approx(expected.item(), rel=0.1)
    cosine = F.cosine_similarity(model.implicit_decoder.coarse.head.weight.grad.flatten(), gradient.flatten(), dim=0)
    assert cosine > 0.8


@torch.no_grad()
def test_autocast_leaves_positions_exact(model, inputs):
    """bfloat16 would move a box corner at 384 pixels by up to a pixel."""
    encoder = model.prompt_encoder.modules_to_save["default"]
    points = 64 * torch.rand(1, 1, 50, 2, generator=torch.Generator().manual_seed(0))
    expected = encoder.shared_embedding(points, (64, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(encoder.shared_embedding(points, (64, 64)), expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_of_the_image_embeddings(tiny_config, dtype):
    """At 96 pixels the centres (i + 0.5) / 6 are no bfloat16 numbers."""
    encoder = IMedSamModel(tiny_config(image_size=96)).prompt_encoder
    matrix = encoder.shared_embedding.positional_embedding.to(dtype)
    x = (torch.arange(6) + 0.5) / 6
    grid = torch.stack(torch.meshgrid(x, x, indexing="xy"), dim=-1)
    angles = 2 * torch.pi * (2 * grid - 1) @ matrix.float()
    expected = torch.cat([angles.sin(), angles.cos()], dim=-1).permute(2, 0, 1)[None].to(dtype)
    assert_close(encoder.to(dtype).image_positions(), expected)


@torch.no_grad()
def test_the_spectrum_is_of_the_pixels_as_given(from_sam, inputs):
    """A half-precision model takes it before it rounds the pixels."""
    model, seen = from_sam().to(torch.bfloat16), []
    hook = model.frequency_view.register_forward_hook(lambda module, args, output: seen.append(output))
    model.get_image_embeddings(inputs["pixel_values"])
    hook.remove()
    assert_close(seen[0], model.frequency_view(inputs["pixel_values"]))


# Size


@pytest.mark.parametrize(
    "values, parts, total",
    [
        (
            {},
            {
                "LoRA": 147_456,
                "frequency adapters": 82_992,
                "frequency gates": 9_216,
                "prompt encoder": 6_220,
                "upscaling": 73_952,
                "coarse field": 1_015_041,
                "fine field": 253_185,
            },
            1_588_063,
        ),
        ({"num_labels": 13}, {"coarse field": 2_597_133, "fine field": 649_485}, 3_566_467),
    ],
    ids=["1 class", "13 classes"],
)
def test_trainable_parameters(values, parts, total, capsys):
    """The paper's 1.6 M with one class and 3.5 M with 13, of ViT-B."""
    with torch.device("meta"):
        model = IMedSamModel(IMedSamConfig(**values))
        model.add_adapter()
    counts = {name: sum(p.numel() for p in part) for name, part in model.parameter_parts().items()}
    assert {name: counts[name] for name in parts} == parts
    assert sum(counts.values()) == total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == pytest.approx(1.6e6 if not values else 3.5e6, rel=0.03)
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert f"{total:,}" in printed and all(f"{count:,}" in printed for count in counts.values())


# Ablations and files

ABLATIONS = [
    {"lora_rank": 0},
    {"lora_rank": 0, "train_image_encoder": True},
    {"lora_rank": 8, "lora_targets": ["q_proj", "k_proj", "v_proj"]},
    {"frequency_view": None},
    {"frequency_view": "phase"},
    {"frequency_view": "haar"},
    {"frequency_log": False},
    {"implicit_decoder": False},
    {"implicit_decoder": False, "lora_rank": 0},
    {"selection": None},
    {"selection": "top_k"},
    {"selection_share": 1.0, "dropout": 0.0},
    {"prompt_frame": False},
    {"coordinate_octaves": 8},
    {"uncertainty": "monte_carlo"},
    {"train_mask_decoder": True},
    {"num_labels": 3},
]


@pytest.mark.parametrize("values", ABLATIONS, ids=str)
def test_every_ablation_trains_and_is_saved_and_loaded(from_sam, inputs, tmp_path, values):
    model = from_sam(**values).train()
    if values.get("num_labels"):
        inputs["class_labels"] = torch.tensor([[0, 1], [2, 1]])
    assert training_step(model, inputs).isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        expected = model.eval()(**inputs)
        model.save_pretrained(tmp_path)
        loaded = IMedSamModel.from_pretrained(tmp_path)
        output = loaded(**inputs)
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == model.config.to_dict() and not loaded.training
    loaded_state = loaded.state_dict()
    assert loaded_state.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded_state[name], value) for name, value in model.state_dict().items())
    for name, value in expected.items():  # matrix products round by where in memory the weights lie
        assert_close(output[name], value, atol=1e-5, rtol=1e-5, msg=name)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable


def test_a_model_from_nothing_is_saved_and_loaded(tiny_config, randomised, inputs, tmp_path):
    """Without SAM and without an adapter; every buffer comes back, and what is missing in the file is initialised."""
    torch.manual_seed(0)
    model = randomised(IMedSamModel(tiny_config(lora_rank=0))).eval()
    model.save_pretrained(tmp_path)
    loaded = IMedSamModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(loaded(**inputs).pred_masks, model(**inputs).pred_masks, atol=1e-5, rtol=1e-5)
    loaded_state = loaded.state_dict()
    assert all(torch.equal(loaded_state[name], value) for name, value in model.state_dict().items())
    assert not (tmp_path / "adapter_config.json").exists()
    assert type(AutoModel.from_pretrained(tmp_path)) is IMedSamModel
    half = IMedSamModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_seeds_decide(tiny_config):
    def make():
        torch.manual_seed(3)
        return IMedSamModel(tiny_config(lora_rank=0)).state_dict()

    assert_close(make(), make(), rtol=0, atol=0)


def test_randomness_of_a_rendering_is_none(from_sam, inputs):
    model = from_sam(uncertainty="monte_carlo")
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = model(**inputs, output_size=(8, 8)), model(**inputs, output_size=(8, 8))
    assert torch.equal(first.uncertainty, second.uncertainty) and torch.equal(first.pred_masks, second.pred_masks)
    assert torch.equal(torch.get_rng_state(), state)
