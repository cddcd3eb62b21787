"""Outlines of fields whose outlines are known."""

import math

import numpy as np
import pytest
import torch
from known_fields import KnownField
from scipy.spatial import cKDTree
from torch.testing import assert_close

from imedsam import IMedSamModel
from imedsam.contours import Contour, _run_lengths, find_contours, to_coco, to_geojson
from imedsam.mask_field import FieldValues


class Field(KnownField):
    """One image, one prompt: a function of x and y in [-1, 1]."""

    def __init__(self, function):
        super().__init__(1, 1, torch.device("cpu"))
        self.function = function

    def values(self, coordinates, point_areas=None):
        x, y = coordinates[:, :, None].unbind(dim=-1)
        logits = self.function(x, y)
        return FieldValues(logits, logits, logits.abs())


ELLIPSE = {"centre": (0.1, -0.05), "axes": (0.62, 0.31), "angle": 0.5}


def ellipse_level(x, y):
    """1 on the ellipse, linear along every ray."""
    (cx, cy), (a, b), angle = ELLIPSE.values()
    u = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
    v = -(x - cx) * math.sin(angle) + (y - cy) * math.cos(angle)
    return ((u / a) ** 2 + (v / b) ** 2) ** 0.5


def ellipse_outline(size, n=100_000):
    (cx, cy), (a, b), angle = ELLIPSE.values()
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    u, v = a * np.cos(t), b * np.sin(t)
    x, y = cx + u * np.cos(angle) - v * np.sin(angle), cy + u * np.sin(angle) + v * np.cos(angle)
    return (np.stack([x, y], axis=-1) + 1) / 2 * [size[1], size[0]]


def distances_to_curve(points, curve):
    """Of each point to the nearest segment of a closed curve."""
    start, way = curve[:-1], np.diff(curve, axis=0)
    to = points[:, None] - start
    share = ((to * way).sum(-1) / np.maximum((way**2).sum(-1), 1e-12)).clip(0, 1)
    return np.linalg.norm(to - share[..., None] * way, axis=-1).min(axis=1)


@pytest.mark.parametrize("size", [(64, 64), (200, 300), (384, 384)])
def test_an_ellipse_is_found_to_a_fiftieth_of_a_pixel(size):
    """The logit is far from linear between the pixels, as a trained field's is."""
    field = Field(lambda x, y: torch.sinh(8 * (1 - ellipse_level(x, y))) + 3 * (1 - ellipse_level(x, y)))
    ((((contour,),),),) = find_contours(field, size)
    outline = ellipse_outline(size)
    assert distances_to_curve(outline[::200], contour.exterior).mean() < 0.02
    assert cKDTree(outline).query(contour.exterior)[0].max() < 0.05
    assert np.array_equal(contour.exterior[0], contour.exterior[-1]) and contour.holes == []
    area = math.pi * ELLIPSE["axes"][0] * ELLIPSE["axes"][1] * size[0] * size[1] / 4
    assert contour.area == pytest.approx(area, rel=2e-3)


def test_a_jump_through_zero_is_an_outline():
    def function(x, y):
        return torch.where((x > -0.4123) & (x < 0.3217) & (y.abs() < 0.501), 3.0, -0.2)

    ((((contour,),),),) = find_contours(Field(function), (100, 100))
    left, right = (1 - 0.4123) * 50, (1 + 0.3217) * 50
    x, y = contour.exterior.T
    on_sides = np.abs(y - 50) < 24
    assert np.minimum(np.abs(x - left), np.abs(x - right))[on_sides].mean() < 0.02
    assert contour.area == pytest.approx((right - left) * 50.1, rel=5e-3)


def test_every_vertex_lies_on_the_outline():
    """Of a disk with a jump whose values vary on both sides; the vertices' places on the grid are all different."""

    def function(x, y):
        radius = ((x - 0.013) ** 2 + (y + 0.027) ** 2) ** 0.5
        return torch.where(radius < 0.61, 1.5 + torch.sin(7 * x), -0.4 + 0.3 * torch.cos(5 * y))

    ((((contour,),),),) = find_contours(Field(function), (300, 300))
    distance = np.linalg.norm(contour.exterior - 150 * (1 + np.array([0.013, -0.027])), axis=-1) - 150 * 0.61
    assert len(distance) > 700 and np.abs(distance).max() < 0.05 and np.abs(distance).mean() < 0.02


def test_holes_and_components():
    def function(x, y):
        radius = (x**2 + y**2) ** 0.5
        ring = 0.2 - (radius - 0.5).abs()
        return 10 * torch.maximum(torch.maximum(ring, 0.1 - radius), 0.1 - ((x - 0.8) ** 2 + (y - 0.8) ** 2) ** 0.5)

    (((contours,),),) = find_contours(Field(function), (200, 200))
    assert [len(contour.holes) for contour in contours] == [1, 0, 0]
    areas = np.array([0.7**2 - 0.3**2, 0.1**2, 0.1**2]) * math.pi * 100**2
    np.testing.assert_allclose([contour.area for contour in contours], areas, rtol=5e-3)


def test_what_the_edge_cuts_is_closed_along_it():
    """Half of a disk; and what covers everything is the rectangle itself."""
    field = Field(lambda x, y: 10 * (0.5 - ((x + 1) ** 2 + y**2) ** 0.5))
    ((((contour,),),),) = find_contours(field, (120, 200))
    assert contour.area == pytest.approx(math.pi / 2 * 50 * 30, rel=2e-3)
    assert contour.exterior.min() == 0
    assert contour.exterior[contour.exterior[:, 0] == 0, 1].min() == pytest.approx(30, abs=0.1)
    ((((whole,),),),) = find_contours(Field(lambda x, y: torch.ones_like(x)), (10, 20))
    assert whole.area == pytest.approx(200, rel=1e-3) and whole.exterior.max(axis=0).tolist() == [20, 10]
    assert find_contours(Field(lambda x, y: -torch.ones_like(x)), (10, 20)) == [[[[]]]]


def test_a_region_a_spacing_and_an_origin():
    field = Field(lambda x, y: 5 * (1 - ellipse_level(x, y)))
    region = torch.tensor([-0.5, -1.0, 1.0, 0.5])
    ((((whole,),),),) = find_contours(field, (400, 400))
    ((((part,),),),) = find_contours(field, (300, 300), region, spacing=(0.5, 2.0), origin=(50.0, 0.0))
    in_part = part.exterior / [0.5, 2.0]
    inner = (in_part[:, 0] > 101) & (in_part[:, 1] < 299)
    assert inner.sum() > 300
    assert distances_to_curve(in_part[inner], whole.exterior).max() < 0.02


def test_images_prompts_and_masks_keep_their_own():
    """Each circle has its own radius."""
    radii = torch.tensor([[[0.5, 0.2], [0.0, 0.3]], [[0.1, 0.0], [0.7, 0.6]]])  # image, prompt, mask

    class Disks(KnownField):
        def __init__(self):
            super().__init__(2, 2, torch.device("cpu"))

        def values(self, coordinates, point_areas=None):
            distance = coordinates.expand(-1, 2, -1, -1)[:, :, None].norm(dim=-1)
            logits = 10 * (radii[..., None] - distance) - 0.01
            return FieldValues(logits, logits, logits)

    contours = find_contours(Disks(), (100, 100))
    assert [[len(mask) for mask in prompt] for image in contours for prompt in image] == [
        [1, 1],
        [0, 1],
        [1, 0],
        [1, 1],
    ]
    for image, prompt, mask in (radii > 0).nonzero().tolist():
        (contour,) = contours[image][prompt][mask]
        radius = np.linalg.norm(contour.exterior - 50, axis=-1)
        assert_close(radius, np.full_like(radius, 50 * (radii[image, prompt, mask].item() - 0.001)), atol=0.01, rtol=0)


SQUARE = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 3.0], [0.0, 3.0], [0.0, 0.0]])
HOLE = np.array([[1.0, 1.0], [1.0, 2.0], [3.0, 2.0], [3.0, 1.0], [1.0, 1.0]])


def test_geojson_by_hand():
    feature = to_geojson([Contour(SQUARE, [HOLE]), Contour(SQUARE + 5, [])], {"class": "polyp"})
    assert feature["properties"] == {"class": "polyp"} and feature["geometry"]["type"] == "MultiPolygon"
    (outer, hole), (other,) = feature["geometry"]["coordinates"]
    assert outer == SQUARE.tolist() and hole == HOLE.tolist() and other == (SQUARE + 5).tolist()
    feature = to_geojson([Contour(SQUARE, [])], {}, spacing=(0.5, 2.0))
    assert feature["geometry"]["coordinates"] == [[[[0, 0], [2, 0], [2, 6], [0, 6], [0, 0]]]]


def test_coco_by_hand():
    mask = np.zeros((4, 9), dtype=bool)
    mask[:3, :4] = mask[1:, 5:] = True
    annotation = to_coco([Contour(SQUARE, []), Contour(SQUARE + [5, 1], [])], mask)
    assert annotation["segmentation"] == [[0, 0, 4, 0, 4, 3, 0, 3], [5, 1, 9, 1, 9, 4, 5, 4]]
    assert annotation["area"] == 24 and annotation["bbox"] == [0, 0, 9, 4]
    mask = np.array([[1, 1, 1, 1, 0], [1, 0, 0, 1, 0], [1, 1, 1, 1, 0]], dtype=bool)
    annotation = to_coco([Contour(SQUARE, [HOLE])], mask)
    assert annotation["segmentation"] == {"size": [3, 5], "counts": [0, 4, 1, 2, 1, 4, 3]}
    assert annotation["area"] == 10
    assert to_coco([], np.zeros((2, 2), dtype=bool)) == {"segmentation": [], "area": 0, "bbox": [0, 0, 0, 0]}


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (8, 2)])
def test_runs_of_pixels_are_read_back(shape):
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random(shape) < 0.6
        counts = _run_lengths(mask)
        values = np.repeat(np.arange(len(counts)) % 2, counts).astype(bool)
        assert np.array_equal(values.reshape(shape[::-1]).T, mask)


def test_coco_refuses_the_mask_of_another_frame():
    field = Field(lambda x, y: 5 * (1 - ellipse_level(x, y)))
    window = torch.tensor([-0.5, -0.5, 0.8, 0.5])
    rendered = field.render((100, 130), window)
    ((((contour,),),),) = find_contours(field, (100, 130), window, rendered=rendered)
    mask = (rendered.logits[0, 0, 0] > 0).numpy()
    assert to_coco([contour], mask)["area"] == pytest.approx(mask.sum(), rel=0.01)
    ((((elsewhere,),),),) = find_contours(field, (100, 130), window, rendered=rendered, origin=(50.0, 50.0))
    ((((zoomed,),),),) = find_contours(field, (100, 130), window, rendered=rendered, spacing=(1.5, 1.5))
    square = np.zeros((100, 130), dtype=bool)
    (x0, y0), (x1, y1) = contour.exterior.min(axis=0).round().astype(int), contour.exterior.max(axis=0).astype(int)
    square[y0:y1, x0:x1] = True
    for contours, other in (
        ([elsewhere], mask),
        ([zoomed], mask),
        ([], mask),
        ([contour], ~mask),
        ([contour], square),
    ):
        with pytest.raises(
            ValueError, match=r"Expected the mask that the contours are of, .* pixels out of 130 x 100"
        ):
            to_coco(contours, other)
    with pytest.raises(ValueError, match=r"Expected one mask \(H, W\), got an array of shape \(1, 1, 100, 130\)"):
        to_coco([contour], mask[None, None])


def test_coco_takes_components_without_a_pixel():
    """A strip along the edge, thinner than half a pixel, and a disk."""
    field = Field(lambda x, y: 20 * torch.maximum(0.3 - (x**2 + y**2).sqrt(), -0.995 - y))
    rendered = field.render((100, 100))
    ((((disk, strip),),),) = find_contours(field, (100, 100), rendered=rendered)
    assert strip.area < 50 and strip.exterior[:, 1].max() < 0.5
    mask = (rendered.logits[0, 0, 0] > 0).numpy()
    assert mask[0].sum() == 0 and to_coco([disk, strip], mask)["bbox"][:2] == [0, 0]


def test_every_ring_is_closed(randomised, tiny_config):
    """Also where its first and last vertex are found in different tiles."""
    model = randomised(IMedSamModel(tiny_config()), 0).eval()
    with torch.no_grad():
        embeddings = model.get_image_embeddings(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        field = model.get_mask_field(embeddings, torch.tensor([[[8.0, 8.0, 50.0, 40.0]]]))
        ((((*contours,),),),) = find_contours(field, (300, 300))
    rings = [ring for contour in contours for ring in (contour.exterior, *contour.holes)]
    assert len(rings) > 20 and sum(map(len, rings)) > 1000
    assert all(np.array_equal(ring[0], ring[-1]) for ring in rings)


def test_rendered_masks_of_another_size_are_refused():
    field = Field(lambda x, y: 5 * (1 - ellipse_level(x, y)))
    with pytest.raises(ValueError, match=r"Expected rendered masks of the output_size \(50, 60\), got \(40, 40\)"):
        find_contours(field, (50, 60), rendered=field.render((40, 40)))
