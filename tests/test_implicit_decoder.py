"""The implicit decoder and its field: frames, encodings, networks, selection, each against something independent."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import imedsam.contours
import imedsam.coordinates
import imedsam.mask_field
import imedsam.rendering
import imedsam.tiles
from imedsam.coordinates import CoordinateEncoding, fourier_features
from imedsam.implicit_decoder import ClassLinear, EllipsePrior, ImplicitDecoder, normalise
from imedsam.layers import HiddenLinear
from imedsam.losses import segmentation_loss
from imedsam.mask_field import ImplicitMaskField
from imedsam.prompt_fusion import Prompts
from imedsam.uncertainty import selection_threshold

CHANNELS, EMBEDDING = 4, 32  # of the tiny SAM: features per point, and of a prompt
SQUARE = [[-1.0, -1.0, 1.0, 1.0]] * 2


@pytest.fixture
def make_field(tiny_config, randomised):
    """`make_field(classes=None, side=8, train=False, dtype=..., **config)`: a field, 2 images with 3 prompts each."""

    def make(classes=None, side=8, train=False, dtype=torch.float32, **values):
        config = tiny_config(lora_rank=0, **values)
        torch.manual_seed(0)
        decoder = randomised(ImplicitDecoder(config)).to(dtype).train(train)
        generator = torch.Generator().manual_seed(1)
        features = torch.randn(6, CHANNELS, side, side, generator=generator).to(dtype)
        prompt = torch.randn(6, EMBEDDING, generator=generator).to(dtype)
        frame = torch.tensor([0.1, -0.2, 0.5, 0.6]) + 0.1 * torch.rand(6, 4, generator=generator)
        if classes is None:
            classes = torch.arange(config.num_labels).expand(6, -1)
        return ImplicitMaskField(decoder, config, features, prompt, frame, classes, torch.tensor(SQUARE))

    return make


def with_tensors(field, **tensors):
    """The field of other features, prompts, ..."""
    names = ("features", "prompt", "frame", "classes", "lattice_region")
    return ImplicitMaskField(field.decoder, field.config, **{name: getattr(field, name) for name in names} | tensors)


def random_points(count, prompts=3, seed=2):
    return 2 * torch.rand(2, prompts, count, 2, generator=torch.Generator().manual_seed(seed)) - 1


# Frames and encodings


@pytest.mark.parametrize("side", [4, 24, 96])
def test_features_are_sampled_in_the_frame_of_the_coordinates(tiny_config, side):
    """A feature map that holds its own pixel centres is the identity between the outermost centres."""
    decoder = ImplicitDecoder(tiny_config())
    centres = (2 * torch.arange(side) + 1) / side - 1
    features = torch.zeros(1, CHANNELS, side, side)
    features[0, 0], features[0, 1], features[0, 2] = centres, centres[:, None], 3 * centres - centres[:, None]
    inner = 1 - 1 / side
    points = inner * (2 * torch.rand(1, 200, 2, generator=torch.Generator().manual_seed(0)) - 1)
    frame = torch.tensor([[0.1, -0.2, 0.3, 0.4]])
    encoded = decoder.encode(points, features, frame)
    x, y = points.unbind(dim=-1)
    assert_close(encoded[..., :3], torch.stack([x, y, 3 * x - y], dim=-1), atol=1e-5, rtol=0)
    assert_close(encoded[..., CHANNELS:], decoder.coordinates(points, frame))
    border = decoder.encode(torch.tensor([[[-1.0, 1.0]]]), features, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    assert_close(border[0, 0, :2], torch.tensor([-inner, inner]))


@torch.no_grad()
def test_features_are_normalised_at_each_place(from_sam, inputs):
    features = 0.05 * torch.randn(2, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0)) + 3
    mean, variance = features.mean(dim=1, keepdim=True), features.var(dim=1, keepdim=True, correction=0)
    expected = (features - mean) / (variance + 1e-5).sqrt()
    assert_close(normalise(features), expected, atol=1e-4, rtol=1e-4)
    model = from_sam()
    field = model.get_mask_field(model.get_image_embeddings(inputs["pixel_values"]), inputs["input_boxes"])
    assert field.features.shape == (4, CHANNELS, 16, 16)
    assert_close(field.features.mean(dim=1), torch.zeros(4, 16, 16), atol=1e-5, rtol=0)
    assert_close(field.features.std(dim=1, correction=0), torch.ones(4, 16, 16), atol=0.05, rtol=0)


def test_gamma_against_numpy():
    points = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    expected = []
    for point in points.reshape(-1, 2).numpy():
        angles = [2**k * np.pi * axis for axis in point for k in range(10)]
        expected.append([np.sin(a) for a in angles] + [np.cos(a) for a in angles])
    features = fourier_features(points, 10)
    assert features.shape == (2, 5, 40)
    assert_close(features.reshape(-1, 40).numpy(), np.array(expected))


def test_gamma_in_float32_at_the_finest_octave():
    """0.7 and 1.3 cycles per pixel at 384: float32 coordinates still resolve them."""
    points = torch.rand(1, 500, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert_close(fourier_features(points, 10).double(), fourier_features(points.double(), 10), atol=3e-4, rtol=0)


def test_the_prompts_frame_by_hand():
    encoding = CoordinateEncoding(octaves=1, frame_octaves=2)
    assert encoding.width == 4 + 2 + 8
    frame = torch.tensor([[0.5, -0.25, 0.25, 0.5]])  # box from (0.25, -0.75) to (0.75, 0.25)
    points = torch.tensor([[[0.5, -0.25], [0.75, 0.25], [0.25, -0.75], [-1.0, 1.0], [0.625, -0.5]]])
    local = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-1.0, -1.0], [-3.0, 2.5], [0.5, -0.5]])
    encoded = encoding(points, frame)[0]
    assert_close(encoded[:, :4], fourier_features(points, 1)[0])
    assert_close(encoded[:, 4:6], local)
    x, y = (math.pi * local / 3).unbind(dim=-1)
    angles = torch.stack([x, 2 * x, y, 2 * y], dim=-1)
    assert_close(encoded[:, 6:], torch.cat([angles.sin(), angles.cos()], dim=-1))


def test_widths(tiny_config):
    assert CoordinateEncoding(10, 4).width == 58 and CoordinateEncoding(10, None).width == 40
    assert CoordinateEncoding(8, 0).width == 34
    for values, width in [({}, 58), ({"prompt_frame": False}, 40), ({"coordinate_octaves": 8}, 50)]:
        decoder = ImplicitDecoder(tiny_config(**values))
        assert decoder.coarse.layers[0].in_features == CHANNELS + width + EMBEDDING
        assert decoder.fine.layers[0].in_features == CHANNELS + width + EMBEDDING + 8


def test_the_ellipse_by_hand():
    prior = EllipsePrior(2)
    prior.slope.data.copy_(torch.tensor([4.0, 2.0]))
    frame = torch.tensor([[0.5, -0.25, 0.25, 0.5]])  # box from (0.25, -0.75) to (0.75, 0.25)
    points = torch.tensor([[[0.5, -0.25], [0.75, -0.25], [0.5, 0.25], [0.75, 0.25], [-1.0, -0.25], [0.5, -0.5]]])
    expected = torch.tensor([1.0, 0.0, 0.0, 1 - 2**0.5, -2.0, 0.5])  # at -1 the distance is clamped to 3
    assert_close(prior(points, frame, torch.tensor([[0, 1]])), torch.stack([4 * expected, 2 * expected])[None])


def prompts(**given):
    check = {"boxes": None, "points": None, "labels": None, "masks": None}
    return Prompts.check(1, **{**check, **given})


def test_frames_of_prompts_by_hand():
    """In a square of 64 pixels, whose corners are -1 and 1."""
    boxes = torch.tensor([[[16.0, 0.0, 48.0, 64.0], [0.0, 32.0, 64.0, 32.0]]])
    half_pixel = 1 / 64
    assert_close(prompts(boxes=boxes).frame(64), torch.tensor([[0, 0, 0.5, 1.0], [0, 0, 1.0, half_pixel]]))
    points = torch.tensor([[[[16.0, 16.0], [48.0, 32.0], [0.0, 0.0]]]])
    labels = torch.tensor([[[1, 1, 0]]])  # the outside point does not count
    assert_close(prompts(points=points, labels=labels).frame(64), torch.tensor([[0.0, -0.25, 0.5, 0.25]]))
    labels = torch.tensor([[[0, 0, -10]]])  # unless there are only such; padding never does
    assert_close(prompts(points=points, labels=labels).frame(64), torch.tensor([[0.0, -0.25, 0.5, 0.25]]))
    labels = torch.tensor([[[1, 0, 0]]])
    assert_close(prompts(points=points, labels=labels).frame(64), torch.tensor([[-0.5, -0.5, 0.125, 0.125]]))
    labels = torch.tensor([[[-10, -10, -10]]])
    assert_close(prompts(points=points, labels=labels).frame(64), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    masks = torch.full((1, 1, 16, 16), -1.0)
    assert_close(prompts(masks=masks).frame(64), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    masks[..., 4:12, 8:16] = 1.0
    assert_close(prompts(masks=masks).frame(64), torch.tensor([[0.5, 0.0, 0.5, 0.5]]))
    assert_close(prompts(boxes=boxes[:, :1], masks=masks).frame(64), torch.tensor([[0.0, 0.0, 0.5, 1.0]]))
    assert_close(prompts().frame(64), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))


def test_a_box_is_the_unit_square_of_its_frame(tiny_config):
    """From the user's pixels to the encoding: the corners of a box are at (-1, -1) and (1, 1)."""
    box = torch.tensor([[[10.0, 20.0, 30.0, 60.0]]])
    corners = box.view(1, 2, 2) * 2 / 64 - 1
    local = CoordinateEncoding(10, 4)(corners, prompts(boxes=box).frame(64))[0, :, 40:42]
    assert_close(local, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))


# The networks


def naive_coarse(decoder, encoded, prompt):
    """Dec_c with the prompt's embedding concatenated to every point."""
    hidden = torch.cat([encoded, prompt[:, None].expand(-1, encoded.shape[1], -1)], dim=-1)
    for layer, norm in zip(decoder.coarse.layers, decoder.coarse.norms, strict=True):
        hidden = F.relu(F.layer_norm(hidden @ layer.weight.T + layer.bias, norm.bias.shape, norm.weight, norm.bias))
    return hidden


def naive_prior(field, points, label):
    """What the ellipse in the prompt's frame adds at points (R, N, 2)."""
    if field.decoder.ellipse is None:
        return 0.0
    q = (points - field.frame[:, None, :2]) / field.frame[:, None, 2:]
    return field.decoder.ellipse.slope[label] * (1 - (q.clamp(-3, 3) ** 2).sum(dim=-1).sqrt())


def naive_values(field, points, label):
    """Coarse and fine logits of one class at every point (B, P, N, 2), from the equations."""
    decoder, points = field.decoder, points.flatten(0, 1)
    encoded = decoder.encode(points, field.features, field.frame)
    hidden = naive_coarse(decoder, encoded, field.prompt)
    head = hidden @ decoder.coarse.head.weight[label].T + decoder.coarse.head.bias[label]
    prompt = field.prompt[:, None].expand(-1, points.shape[1], -1)
    hidden = torch.cat([encoded, head[..., 1:], prompt], dim=-1)
    for layer in decoder.fine.layers:
        hidden = F.relu(hidden @ layer.weight.T + layer.bias)
    hidden = F.relu(hidden @ decoder.fine.head_hidden.weight[label].T + decoder.fine.head_hidden.bias[label])
    fine = hidden @ decoder.fine.head_out.weight[label].T + decoder.fine.head_out.bias[label]
    prior = naive_prior(field, points, label)
    return (head[..., 0] + prior).unflatten(0, (2, 3)), (fine[..., 0] + prior).unflatten(0, (2, 3))


@torch.no_grad()
@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("ellipse_prior", [False, True])
def test_against_the_naive_networks(make_field, num_labels, ellipse_prior):
    field = make_field(num_labels=num_labels, selection_share=1.0, ellipse_prior=ellipse_prior)
    points = random_points(50)
    values = field.values(points)
    assert values.logits.shape == values.coarse_logits.shape == values.uncertainty.shape == (2, 3, num_labels, 50)
    for label in range(num_labels):
        coarse, fine = naive_values(field, points, label)
        assert_close(values.coarse_logits[:, :, label], coarse, atol=1e-4, rtol=1e-4)
        assert_close(values.logits[:, :, label], fine, atol=1e-4, rtol=1e-4)
        assert (coarse - fine).abs().mean() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("ellipse_prior", [False, True])
def test_monte_carlo_against_whole_passes(make_field, ellipse_prior):
    """Each pass of Eq. 7 is a coarse field with dropout before its head, the prior included."""
    field = make_field(num_labels=2, uncertainty="monte_carlo", monte_carlo_samples=5, ellipse_prior=ellipse_prior)
    points = random_points(50).flatten(0, 1)
    encoded = field.decoder.encode(points, field.features, field.frame)
    hidden, head = naive_coarse(field.decoder, encoded, field.prompt), field.decoder.coarse.head
    uncertainty = field.values(points.unflatten(0, (2, 3))).uncertainty.flatten(0, 1)
    for label in range(2):
        logits = [(hidden * mask) @ head.weight[label, 0] + head.bias[label, 0] for mask in field.dropout_masks]
        prior = naive_prior(field, points, label)
        expected = torch.stack([torch.sigmoid(one + prior) for one in logits]).var(dim=0, correction=0)
        assert_close(uncertainty[:, label], expected, atol=1e-5, rtol=1e-3)
        assert expected.max() > 0.01


@torch.no_grad()
def test_class_labels_pick_from_all_classes(make_field):
    labels = torch.tensor([2, 0, 1, 1, 2, 0])
    points = random_points(50)
    everything, picked = make_field(num_labels=3), make_field(labels[:, None], num_labels=3)
    logits, uncertainty = everything(points)
    index = labels.view(2, 3, 1, 1).expand(-1, -1, -1, 50)
    one, variance = picked(points)
    assert_close(one, logits.gather(2, index), atol=1e-5, rtol=1e-4)
    assert_close(variance, uncertainty.gather(2, index), atol=1e-6, rtol=1e-4)
    assert not torch.allclose(logits[:, :, 0], logits[:, :, 1], atol=0.1)


def test_a_linear_layer_per_class():
    torch.manual_seed(0)
    layer = ClassLinear(3, 5, 4)
    torch.nn.init.normal_(layer.bias)
    inputs, classes = torch.randn(20, 5), torch.randint(0, 2, (20,))  # class 2 has no row
    expected = torch.stack([layer.weight[c] @ x + layer.bias[c] for x, c in zip(inputs, classes, strict=True)])
    assert_close(layer(inputs, classes), expected)
    assert_close(layer(inputs, classes, slice(1, None)), expected[:, 1:])
    assert layer(inputs[:0], classes[:0]).shape == (0, 4)
    layer(inputs, classes).sum().backward()
    assert layer.weight.grad[:2].abs().min() > 0 and layer.weight.grad[2].abs().max() == 0


def test_initialisation(tiny_config):
    """The model's own initialisation reaches every layer: He's for hidden layers, a uniform one for the heads."""
    from imedsam.modeling_imedsam import IMedSamModel

    torch.manual_seed(0)
    config = tiny_config(coarse_widths=[512, 256], fine_widths=[256], ellipse_prior=True)
    decoder = IMedSamModel(config).implicit_decoder
    hidden = [module for module in decoder.modules() if isinstance(module, HiddenLinear)]
    assert len(hidden) == 3
    for layer in hidden:
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.in_features), rel=0.1)
        assert layer.bias.abs().max() == 0
    head = decoder.coarse.head.weight
    assert head.abs().max().item() == pytest.approx(256**-0.5, rel=0.05) and decoder.coarse.head.bias.abs().max() == 0
    assert decoder.ellipse.slope.tolist() == [4.0]


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (7, 33), (64, 48), (200, 10), (90, 130)])
@pytest.mark.parametrize("region", [None, [[-0.9, -0.5, 0.7, 1.0], [0.0, 0.25, 1.0, 0.3]]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("uncertainty", "ellipse_prior"), [("closed_form", False), ("monte_carlo", True)])
def test_exact_rendering_against_the_naive_networks(
    make_field, size, region, dtype, tolerance, uncertainty, ellipse_prior
):
    """At each pixel's centre by itself."""
    field = make_field(num_labels=2, dtype=dtype, uncertainty=uncertainty, ellipse_prior=ellipse_prior)
    masks = field.render(size, region, mode="exact")
    assert masks.logits.dtype == dtype
    region = torch.tensor(SQUARE if region is None else region, dtype=torch.float64)
    x, y = ((torch.arange(length, dtype=torch.float64) + 0.5) / length for length in size[::-1])
    shares = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
    points = (1 - shares) * region[:, None, :2] + shares * region[:, None, 2:]
    points = points[:, None].expand(2, 3, -1, -1).to(dtype)
    threshold = field.threshold.view(2, 3, 2, 1, 1)
    for label in range(2):
        coarse, fine = (logits.unflatten(-1, size) for logits in naive_values(field, points, label))
        merged = torch.where(masks.uncertainty[:, :, label] > threshold[:, :, label], fine, coarse)
        assert_close(masks.coarse_logits[:, :, label], coarse, atol=tolerance, rtol=0)
        assert_close(masks.logits[:, :, label], merged, atol=tolerance, rtol=0)
    assert masks.logits.dtype == masks.uncertainty.dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("prompts_at_once", [1, 4])
def test_prompts_are_rendered_as_all_together(make_field, monkeypatch, dtype, tolerance, prompts_at_once):
    """One prompt takes other ways through the layers than several."""
    field = make_field(num_labels=2, dtype=dtype)
    together = field.render((40, 50), mode="exact")
    monkeypatch.setattr(imedsam.rendering, "PROMPTS_AT_ONCE", prompts_at_once)
    for name in ("logits", "coarse_logits", "uncertainty"):
        expected = getattr(together, name)
        assert_close(getattr(field.render((40, 50), mode="exact"), name), expected, atol=tolerance, rtol=0)
        alone = field.at(torch.tensor([4])).render((40, 50), mode="exact")
        assert_close(getattr(alone, name)[0, 0], expected[1, 1], atol=tolerance, rtol=0)


# The field: one function of position


@torch.no_grad()
def test_a_value_depends_on_its_point_alone(make_field, monkeypatch):
    """Not on the size, the tiles, the region or the other points that are asked for."""
    field = make_field(num_labels=2)

    def render(*grid):
        masks = field.render(*grid, mode="exact")
        return {name: getattr(masks, name) for name in ("logits", "coarse_logits", "uncertainty")}

    whole = render((32, 32))
    monkeypatch.setattr(imedsam.tiles, "TILE_POINTS", 50)
    assert_close(render((32, 32)), whole, atol=1e-4, rtol=1e-4)
    region = torch.tensor([-0.5, 0.0, 0.25, 1.0])  # columns 8 to 20, rows 16 to 32
    crop = {name: value[..., 16:32, 8:20] for name, value in whole.items()}
    assert_close(render((16, 12), region), crop, atol=1e-4, rtol=1e-4)
    # The centres of every third pixel of 96 are those of 32.
    large = {name: value[..., 1::3, 1::3] for name, value in render((96, 96)).items()}
    assert_close(large, whole, atol=1e-4, rtol=1e-4)
    x, y = (2 * 5 + 1) / 32 - 1, (2 * 20 + 1) / 32 - 1
    point, uncertainty = field(torch.tensor([x, y]).expand(2, 3, 1, 2))
    assert_close(point[..., 0], whole["logits"][..., 20, 5], atol=1e-4, rtol=1e-4)
    assert_close(uncertainty[..., 0], whole["uncertainty"][..., 20, 5], atol=1e-4, rtol=1e-4)
    assert whole["logits"].std() > 0.1


@torch.no_grad()
def test_points_shared_by_the_prompts(make_field):
    field, points = make_field(), random_points(20, prompts=1)
    assert_close(field(points)[0], field(points.expand(-1, 3, -1, -1))[0], rtol=0, atol=0)
    assert_close(field(points[:1])[0], field(points[:1].expand(2, 3, -1, -1))[0], rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("prompts", [1, 6])
def test_a_field_made_in_half_precision_answers_in_full(make_field, prompts):
    points = random_points(20)[:1, :1]
    rows = torch.arange(prompts)
    with torch.autocast("cpu", torch.bfloat16):
        field = make_field().at(rows)
    expected = make_field().at(rows)(points)[0]
    assert_close(field(points)[0], expected, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_each_prompt_has_its_own_field(make_field):
    """Its map, its embedding and its frame act on its values and on no other prompt's."""
    field, points = make_field(selection=None), random_points(20, prompts=1)
    before = field(points)[0].flatten(0, 1)
    for name in ("features", "prompt", "frame"):
        tensor = getattr(field, name).clone()
        tensor[4] += 0.3
        after = with_tensors(field, **{name: tensor})(points)[0].flatten(0, 1)
        assert (after[4] - before[4]).abs().max() > 1e-2
        others = [0, 1, 2, 3, 5]
        assert_close(after[others], before[others], rtol=0, atol=0)


# Uncertainty and selection


@torch.no_grad()
@pytest.mark.parametrize("uncertainty", ["closed_form", "monte_carlo"])
def test_the_fine_field_decides_where_the_coarse_one_is_uncertain(make_field, uncertainty):
    field, points = make_field(num_labels=2, uncertainty=uncertainty, selection_share=0.25), random_points(400)
    values = field.values(points)
    tau = field.threshold.unflatten(0, (2, 3))[..., None]
    selected = values.uncertainty > tau
    fine = torch.stack([naive_values(field, points, label)[1] for label in range(2)], dim=2)
    assert_close(values.logits, torch.where(selected, fine, values.coarse_logits), atol=1e-4, rtol=1e-4)
    assert torch.equal(values.logits[~selected], values.coarse_logits[~selected])
    assert 0.15 < selected.float().mean() < 0.35 and (values.logits != values.coarse_logits)[selected].all()
    assert values.uncertainty.shape == values.logits.shape and values.uncertainty.max() <= 0.25


@torch.no_grad()
def test_the_threshold_selects_its_share_of_the_lattice(make_field):
    field = make_field(num_labels=2, selection_lattice=24)
    lattice = field.render((24, 24))
    changed = (lattice.logits != lattice.coarse_logits).flatten(-2).sum(dim=-1)
    assert (changed == 72).all()  # an eighth of 576, of each prompt and class by itself


@torch.no_grad()
def test_the_share_is_one_of_the_image_not_of_its_padding(from_sam, inputs):
    """An image in the upper half of the square: the fine field decides at an eighth of that half."""
    model = from_sam().eval()
    embeddings = model.get_image_embeddings(inputs["pixel_values"])
    sizes = torch.tensor([[32, 64]] * len(embeddings))
    field = model.get_mask_field(embeddings, inputs["input_boxes"], reshaped_input_sizes=sizes)
    rendered = field.render((16, 16), torch.tensor([-1.0, -1.0, 1.0, 0.0]))
    selected = rendered.uncertainty.flatten(0, 1) > field.threshold[..., None, None]
    assert (selected.sum(dim=(-2, -1)) == 32).all()


def test_the_variance_is_that_of_the_dropout(make_field):
    """The field's own training passes have the mean and variance that it states."""
    points = random_points(8)
    field = make_field()
    stated = field.values(points)
    field.decoder.train()
    torch.manual_seed(0)
    passes = torch.stack([field.values(points).coarse_logits for _ in range(600)])
    assert_close(passes.mean(dim=0), stated.coarse_logits, atol=0.4, rtol=0)
    assert_close(passes.sigmoid().var(dim=0), stated.uncertainty, atol=0.01, rtol=0.25)
    assert stated.uncertainty.max() > 0.02


@torch.no_grad()
def test_share_1_refines_everything_and_no_selection_nothing(make_field):
    points = random_points(100)
    everything = make_field(selection_share=1.0, dropout=0.0).values(points)
    assert (everything.logits != everything.coarse_logits).all()
    nothing = make_field(selection=None)
    values = nothing.values(points)
    assert torch.equal(values.logits, values.coarse_logits) and values.uncertainty.max() > 0
    assert nothing.decoder.fine is None and not any("fine" in name for name, _ in nothing.decoder.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_top_k_takes_its_share_of_what_is_rendered(make_field, share, monkeypatch):
    monkeypatch.setattr(imedsam.tiles, "TILE_POINTS", 600)
    field = make_field(selection="top_k", selection_share=share, num_labels=2)
    region = torch.tensor([-1.0, -1.0, 0.0, 0.0])
    for size, part in [((20, 20), None), ((10, 30), region)]:
        masks = field.render(size, part)
        changed = masks.logits != masks.coarse_logits
        assert (changed.flatten(-2).sum(dim=-1) == share * size[0] * size[1]).all()
        least = masks.uncertainty.masked_fill(~changed, torch.inf).flatten(-2).amin(dim=-1)
        assert (least >= masks.uncertainty.masked_fill(changed, -torch.inf).flatten(-2).amax(dim=-1)).all()


def test_while_training_the_share_is_taken_of_the_points(make_field):
    field, points = make_field(train=True, selection_share=0.25), random_points(80)
    values = field.values(points)
    changed = values.logits != values.coarse_logits
    assert (changed.sum(dim=-1) == 20).all()
    weights = torch.ones(2, 3, 80)
    weights[..., :40] = 3.0
    changed = (lambda v: v.logits != v.coarse_logits)(field.values(points, weights))[:, :, 0]
    mass = (changed * weights).sum(dim=-1)
    assert (mass <= 40).all() and (mass > 36).all()  # a quarter of 160, up to one point


def test_dropout_acts_while_training_alone(make_field):
    points = random_points(20)
    field = make_field(train=True)
    assert not torch.equal(field.values(points).coarse_logits, field.values(points).coarse_logits)
    field.decoder.eval()
    assert torch.equal(field.values(points).coarse_logits, field.values(points).coarse_logits)


@torch.no_grad()
def test_the_threshold_is_taken_of_some_prompts_at_a_time(make_field, monkeypatch):
    expected = make_field(num_labels=2).threshold
    monkeypatch.setattr(imedsam.mask_field, "LATTICES_AT_ONCE", 2)
    asked, rows_of = [], ImplicitMaskField._rows
    monkeypatch.setattr(ImplicitMaskField, "_rows", lambda of, rows: asked.append(len(rows)) or rows_of(of, rows))
    assert_close(make_field(num_labels=2).threshold, expected)
    assert asked == [2, 1, 2, 1]  # of the three prompts of two images


@torch.no_grad()
def test_the_threshold_is_taken_once(make_field, monkeypatch):
    field, taken = make_field(), []
    monkeypatch.setattr(
        imedsam.mask_field, "selection_threshold", lambda *args: taken.append(1) or selection_threshold(*args)
    )
    for _ in range(2):
        field.render((20, 20)), field.values(random_points(10)), field.render((5, 5), mode="exact")
    assert len(taken) == 2  # one for all prompts of each image


@torch.no_grad()
def test_prompts_share_the_coordinate_part(make_field, monkeypatch):
    """gamma(p) of the same points is taken once for an image's prompts, in the lattice and in exact rendering."""
    field, points = make_field(), random_points(30, prompts=1)
    encoded = []
    monkeypatch.setattr(
        imedsam.coordinates,
        "fourier_features",
        lambda positions, octaves: encoded.append(positions.shape[:2]) or fourier_features(positions, octaves),
    )
    apart = field.values(points.expand(-1, 3, -1, -1))
    for shared in (field.values(points), field.at(torch.arange(3)).values(points[:1])):
        assert_close(shared.logits.flatten(0, 1), apart.logits.flatten(0, 1)[: len(shared.logits.flatten(0, 1))])
    assert encoded[-4:] == [(2, 30), (6, 30), (1, 30), (3, 30)]  # of the image's frame, of the prompts' frames
    encoded.clear()
    make_field().render((20, 20), mode="exact")
    assert {shape[0] for shape in encoded[::2]} == {1} and {shape[0] for shape in encoded[1::2]} == {3, 6}


@torch.no_grad()
@pytest.mark.parametrize(("side", "saved"), [(32, 6 * 32**2), (24, 0), (100, 0)])
def test_adaptive_rendering_begins_with_the_lattice_of_the_threshold(make_field, monkeypatch, side, saved):
    """It is evaluated anyway. One that is too coarse, or finer than the output, is of no use."""
    field = make_field(num_labels=2, selection_lattice=side)
    assert field.known_lattice(torch.tensor(SQUARE)) is None
    masks, exact = field.render((100, 80)), field.render((side, side), mode="exact")
    lattice = torch.stack([exact.logits, exact.coarse_logits, exact.uncertainty]).flatten(1, 2)
    assert_close(field.known_lattice(torch.tensor(SQUARE)), lattice, atol=1e-4, rtol=1e-4)
    assert field.known_lattice(0.5 * torch.tensor(SQUARE)) is None
    monkeypatch.setattr(ImplicitMaskField, "known_lattice", lambda *_: None)
    again = field.render((100, 80))
    assert again.num_points - masks.num_points == saved
    assert_close(again.logits, masks.logits, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_there_is_no_threshold_without_a_selection(make_field):
    with pytest.raises(ValueError, match="Expected a field with a selection for a threshold, got selection=None"):
        _ = make_field(selection=None).threshold


@torch.no_grad()
def test_a_ranking_field_is_asked_and_rendered_in_any_order(make_field, monkeypatch):
    """With `top_k`; its outlines are those of its masks, at their threshold."""
    expected = make_field(selection="top_k").render((20, 20)).logits
    field, thresholds = make_field(selection="top_k"), []
    field(random_points(10))
    monkeypatch.setattr(imedsam.rendering, "PROMPTS_AT_ONCE", 2)
    assert_close(field.render((20, 20)).logits, expected)
    monkeypatch.setattr(
        imedsam.contours,
        "evaluate_points",
        lambda of, *args: thresholds.append(of.threshold) or imedsam.tiles.evaluate_points(of, *args),
    )
    rendered = field.render((20, 20))
    imedsam.contours.find_contours(field, (20, 20), rendered=rendered)
    tau = selection_threshold(rendered.uncertainty.flatten(-2).flatten(0, 1), 0.125)
    assert thresholds and all(torch.equal(threshold, tau) for threshold in thresholds)


def test_outlines_are_found_without_dropout(make_field):
    field = make_field(train=True)
    areas = [
        [contour.area for prompt in image for mask in prompt for contour in mask]
        for _ in range(2)
        for image in imedsam.contours.find_contours(field, (20, 20))
    ]
    assert areas[0] and areas[:2] == areas[2:]


@torch.no_grad()
def test_the_field_of_some_prompts(make_field):
    field, points = make_field(num_labels=2), random_points(50)
    expected, rows = field.values(points), torch.tensor([5, 1, 2])
    values = field.at(rows).values(points.flatten(0, 1)[rows, None])
    for name, value in vars(values).items():
        assert_close(value, getattr(expected, name).flatten(0, 1)[rows, None])


def test_gradients_reach_everything(make_field):
    field, points = make_field(train=True, num_labels=2, ellipse_prior=True), random_points(200)
    field = with_tensors(field, features=field.features.requires_grad_(), prompt=field.prompt.requires_grad_())
    values = field.values(points)
    values.logits.sin().sum().backward()
    for name, parameter in field.decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert field.features.grad.abs().max() > 0 and field.prompt.grad.abs().max() > 0
    assert not values.uncertainty.requires_grad


def test_gradients_against_finite_differences(make_field):
    """In float64, of the weighted loss of both fields, along a random direction of each tensor."""
    field, points = make_field(dtype=torch.float64, num_labels=2), random_points(200)
    generator = torch.Generator().manual_seed(3)
    labels, weights = torch.rand(2, 2, 3, 2, 200, generator=generator, dtype=torch.float64)
    tensors = {"features": field.features, "prompt": field.prompt, **dict(field.decoder.named_parameters())}
    for tensor in tensors.values():
        tensor.requires_grad_()

    def loss():
        values = with_tensors(field).values(points)
        return sum(
            segmentation_loss(of, labels.round(), weights).sum() for of in (values.logits, values.coarse_logits)
        )

    gradients = torch.autograd.grad(loss(), list(tensors.values()))
    for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            tensor += 1e-7 * direction
            after = loss()
            tensor -= 2e-7 * direction
            difference = (after - loss()) / 2e-7
            tensor += 1e-7 * direction
        assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-6, msg=name)


@torch.no_grad()
def test_the_uncertainty_is_float32_under_autocast(make_field):
    """In bfloat16 thousands of points would tie, and the selection would miss its share."""
    field, points = make_field(selection=None), random_points(2000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        uncertainty = field.values(points).uncertainty
    assert uncertainty.dtype == torch.float32
    assert len(uncertainty[0, 0, 0].unique()) > 1900
    expected = field.values(points).uncertainty
    assert (uncertainty - expected).abs().mean() < 0.1 * expected.mean()
