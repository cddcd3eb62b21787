"""Fields on grids: where the pixel centres are, tiles, regions, scores."""

import pytest
import torch
from known_fields import KnownField
from torch.testing import assert_close

import imedsam.tiles
from imedsam.mask_field import FieldValues, InterpolatedMaskField
from imedsam.rendering import RenderedMasks, render
from imedsam.tiles import evaluate_points, pixel_centres

SQUARE = torch.tensor([[-1.0, -1.0, 1.0, 1.0]])


class Plane(KnownField):
    """2 images, 3 prompts: logits 10 x + y + 100 image + 1000 prompt."""

    def __init__(self):
        super().__init__(2, 3, torch.device("cpu"))
        self.asked = []

    def values(self, coordinates, point_areas=None):
        self.asked.append(coordinates.shape[2])
        x, y = coordinates.expand(-1, 3, -1, -1).unbind(dim=-1)
        image, prompt = torch.arange(2.0)[:, None, None], torch.arange(3.0)[None, :, None]
        logits = (10 * x + y + 100 * image + 1000 * prompt)[:, :, None]
        return FieldValues(logits, logits + 1, logits + 2)


def test_pixel_centres_by_hand():
    centres = pixel_centres((2, 4), SQUARE)
    x, y = [-0.75, -0.25, 0.25, 0.75], [-0.5, 0.5]
    assert_close(centres, torch.tensor([[[a, b] for b in y for a in x]]))
    regions = torch.tensor([[0.0, 0.0, 1.0, 0.5], [-1.0, -0.5, -0.5, 1.0]])
    centres = pixel_centres((1, 2), regions)
    assert_close(centres, torch.tensor([[[0.25, 0.25], [0.75, 0.25]], [[-0.875, 0.25], [-0.625, 0.25]]]))


@pytest.mark.parametrize("size", [1, 3, 64, 384, 896])
def test_pixel_centres_are_those_of_interpolation(size):
    """`interpolate(align_corners=False)` of a ramp that is linear over the image gives back the coordinates."""
    centres = pixel_centres((size, size), SQUARE).reshape(size, size, 2)
    expected = (2 * torch.arange(size) + 1) / size - 1
    assert_close(centres[0, :, 0], expected)
    assert_close(centres[:, 0, 1], expected)


@pytest.mark.parametrize("tile_points", [1, 6, 13, 10**6])
def test_render(monkeypatch, tile_points):
    monkeypatch.setattr(imedsam.tiles, "TILE_POINTS", tile_points)
    field = Plane()
    masks = field.render((3, 5))
    x, y = (torch.arange(5).double() + 0.5) / 2.5 - 1, (torch.arange(3).double() + 0.5) / 1.5 - 1
    expected = 10 * x + y[:, None] + 100 * torch.arange(2.0).view(2, 1, 1, 1, 1)
    expected = expected + 1000 * torch.arange(3.0).view(1, 3, 1, 1, 1)
    assert masks.logits.shape == (2, 3, 1, 3, 5)
    assert_close(masks.logits, expected)
    assert_close(masks.coarse_logits, expected + 1)
    assert_close(masks.uncertainty, expected + 2)
    assert sum(field.asked) == 6 * 15 and max(field.asked) == min(15, max(1, tile_points // 6))


def test_render_a_region():
    field = Plane()
    whole = field.render((8, 8)).logits
    region = field.render((4, 2), torch.tensor([-0.5, 0.0, 0.0, 1.0])).logits
    assert_close(region, whole[..., 4:8, 2:4])
    regions = torch.tensor([[-0.5, 0.0, 0.0, 1.0], [0.5, -1.0, 1.0, 0.0]])
    per_image = field.render((4, 2), regions).logits
    assert_close(per_image[0], whole[0, ..., 4:8, 2:4])
    assert_close(per_image[1], whole[1, ..., 0:4, 6:8])
    assert_close(field.render([4, 2], [-0.5, 0.0, 0.0, 1.0]).logits, region)


def test_points_of_very_different_numbers_per_prompt():
    """Each at its place, and few more evaluated than there are."""
    counts = torch.tensor([5, 0, 3000, 10, 9000, 8999])
    rows = torch.arange(6).repeat_interleave(counts)
    points = torch.rand(len(rows), 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    field = Plane()
    expected = 10 * points[:, 0] + points[:, 1] + 100 * (rows // 3) + 1000 * (rows % 3)
    values = evaluate_points(field, rows, points)
    assert_close(values, torch.stack([expected, expected + 1, expected + 2])[:, None])
    assert len(rows) <= sum(field.asked) < 1.3 * len(rows)


def test_refused_modes():
    with pytest.raises(ValueError, match="Expected mode to be one of exact, adaptive, got 'fast'"):
        render(Plane(), (4, 4), mode="fast")
    field = Plane()
    field.selects_on_the_grid = True
    with pytest.raises(ValueError, match='mode="exact" with selection="top_k"'):
        render(field, (4, 4), mode="adaptive")


@pytest.mark.parametrize("size", [(4,), (0, 4), (4, -1), (4, 4, 4), (4.5, 4.0)])
def test_refused_sizes(size):
    with pytest.raises(ValueError, match=r"Expected output_size as \(height, width\), both at least 1, got"):
        render(Plane(), size)


@pytest.mark.parametrize(
    "region",
    [
        [float("nan"), 0.0, 1.0, 1.0],
        [0.0, 0.0, 1.0],
        [0.5, 0.0, 0.5, 1.0],
        [-1.1, 0.0, 0.5, 1.0],
        [0.0, 0.0, float("inf"), 1.0],
        [0.0, 1.0, 1.0, -1.0],
        [[[0, 0, 1, 1]]],
        [[0, 0, 1, 1]] * 3,
    ],
)
def test_refused_regions(region):
    with pytest.raises(ValueError, match="Expected region as x0, y0, x1, y1 .* with x0 < x1 and y0 < y1"):
        render(Plane(), (4, 4), region)


def test_refused_coordinates():
    with pytest.raises(ValueError, match=r"coordinates of shape \(B, P, N, 2\) .*, got \(5, 2\)"):
        Plane()(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"got \(2, 3, 5, 3\)"):
        Plane()(torch.zeros(2, 3, 5, 3))


def test_scores_by_hand():
    probabilities = torch.tensor([[0.9, 0.6], [0.3, 0.2]])
    logits = probabilities.logit().expand(1, 1, 1, 2, 2).contiguous()
    score = RenderedMasks(logits, logits, logits, 4).scores
    assert score.shape == (1, 1, 1)
    assert score.item() == pytest.approx(2 * 1.5 / (2.0 + 2))
    certain = torch.full((1, 1, 1, 2, 2), 200.0)
    assert RenderedMasks(certain, certain, certain, 4).scores.item() == pytest.approx(1.0)
    assert RenderedMasks(-certain, certain, certain, 4).scores.item() == pytest.approx(1.0)  # nothing, surely
    unsure = torch.full((1, 1, 1, 2, 2), -0.1)
    assert RenderedMasks(unsure, unsure, unsure, 4).scores.item() == 0.0  # empty, though half is expected


@pytest.mark.parametrize("size", [(7, 7), (16, 16), (50, 30), (200, 150)])
def test_an_interpolated_field_is_bilinear_interpolation(size):
    logits = torch.randn(2, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    masks = InterpolatedMaskField(logits).render(size)
    expected = torch.nn.functional.interpolate(logits.flatten(0, 1), size, mode="bilinear").unflatten(0, (2, 3))
    assert_close(masks.logits, expected, atol=1e-4, rtol=1e-4)
    p = expected.sigmoid()
    assert_close(masks.uncertainty, p * (1 - p), atol=1e-4, rtol=1e-4)


def test_an_interpolated_field_loses_no_small_structure():
    """A block of 2 x 2 numbers between the points of adaptive rendering's lattice."""
    logits = torch.full((1, 1, 1, 96, 96), -10.0)
    logits[..., 47:49, 47:49] = 10.0
    field = InterpolatedMaskField(logits)
    default, exact, adaptive = (field.render((384, 384), mode=mode).logits > 0 for mode in (None, "exact", "adaptive"))
    assert torch.equal(default, exact) and exact.sum() == 60
    assert not adaptive.any()  # why that is not the default


def test_an_interpolated_field_in_half_precision_knows_where_it_is():
    """Coordinates in bfloat16 would be off by up to half a pixel of 256."""
    ramp = (torch.arange(256.0) / 256).expand(1, 1, 1, 256, 256)
    masks = InterpolatedMaskField(ramp.bfloat16()).render((256, 256), mode="exact")
    assert masks.logits.dtype == torch.float32
    assert_close(masks.logits, ramp.bfloat16().float(), atol=1e-4, rtol=0)
