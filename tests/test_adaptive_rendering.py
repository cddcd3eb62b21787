"""Adaptive rendering: the masks of exact rendering from a few of its points."""

import numpy as np
import pytest
import torch
from known_fields import KnownField
from scipy.ndimage import distance_transform_edt
from torch.testing import assert_close

import imedsam.adaptive_rendering
import imedsam.rendering
from imedsam.mask_field import FieldValues
from imedsam.rendering import RENDER_MODES, render
from imedsam.training.phantoms import LESION, draw_phantom


class Shapes(KnownField):
    """
    2 images, 2 prompts, 2 classes. The logit is 20 times the signed distance to a few disks that get smaller from
    prompt to prompt; where x > 0.35, there is a jump.
    """

    def __init__(self, radius=0.4, jump=0.0):
        super().__init__(2, 2, torch.device("cpu"))
        self.radius, self.jump = radius, jump
        self.centres = torch.tensor([[[-0.3, 0.1], [0.55, 0.6]], [[0.2, -0.35], [-0.5, 0.5]]])  # class, disk

    def values(self, coordinates, point_areas=None):
        points = coordinates.expand(-1, 2, -1, -1)[:, :, None]  # (B, P, 1, N, 2)
        shrink = torch.tensor([[1.0, 0.6], [0.8, 0.4]])[:, :, None, None]
        radii = self.radius * torch.tensor([1.0, 0.3])
        distances = [radii[d] * shrink - (points - self.centres[:, d, None]).norm(dim=-1) for d in range(len(radii))]
        logits = 20 * torch.maximum(*distances)
        merged = torch.where(points[..., 0] > 0.35, logits + self.jump, logits)
        return FieldValues(merged, logits, 0.25 * torch.exp(-logits.abs()))


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 200), (200, 1), (33, 50), (63, 63), (97, 96), (192, 193), (384, 384), (40, 500), (120, 500)]
)
@pytest.mark.parametrize("jump", [0.0, -3.0])
@pytest.mark.parametrize("region", [None, [[-0.9, -0.5, 0.7, 1.0], [0.0, 0.0, 1.0, 1.0]]])
def test_adaptive_masks_are_the_exact_ones(size, jump, region):
    field = Shapes(jump=jump)
    region = None if region is None else torch.tensor(region)
    exact, adaptive = (render(field, size, region, mode) for mode in RENDER_MODES)
    assert adaptive.logits.shape == exact.logits.shape == (2, 2, 2, *size)
    assert torch.equal(adaptive.logits > 0, exact.logits > 0)
    assert exact.num_points == 4 * size[0] * size[1]
    if min(size) > 96:
        assert adaptive.num_points < 0.4 * exact.num_points
        # What lies beside the boundary is not interpolated.
        inside = (exact.logits > 0).flatten(0, 2).float()
        edge = torch.nn.functional.max_pool2d(inside, 3, 1, 1) != -torch.nn.functional.max_pool2d(-inside, 3, 1, 1)
        for name in ("logits", "coarse_logits", "uncertainty"):
            got, expected = (getattr(masks, name).flatten(0, 2)[edge] for masks in (adaptive, exact))
            assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_share_of_points_falls_with_the_size():
    """The work follows the boundary's length: doubling the size about doubles the points."""
    points = [render(Shapes(), (size, size), mode="adaptive").num_points for size in (384, 768, 1536)]
    assert points[1] < 2.2 * points[0] and points[2] < 2.2 * points[1]
    assert points[2] < 0.03 * 4 * 1536**2


class Function(KnownField):
    """Of x and y, for one prompt."""

    def __init__(self, function):
        super().__init__(1, 1, torch.device("cpu"))
        self.function = function

    def values(self, coordinates, point_areas=None):
        logits = self.function(*coordinates.unbind(dim=-1))[:, :, None]
        return FieldValues(logits, logits, torch.zeros_like(logits))


def test_a_straight_boundary_costs_hardly_more_than_the_pixels_beside_it():
    """Interpolation is right there: only the cells that the boundary crosses are split."""
    straight = Function(lambda x, y: 10 * (x - 0.3 * y - 0.05))
    exact, adaptive = (render(straight, (768, 768), mode=mode) for mode in RENDER_MODES)
    assert torch.equal(adaptive.logits > 0, exact.logits > 0)
    assert adaptive.num_points - imedsam.adaptive_rendering.FIRST_LATTICE**2 < 7 * 768


def test_a_ragged_boundary_is_looked_at_more_closely(monkeypatch):
    """Interpolation is wrong there: corners are asked for near which no boundary is seen, one by one."""
    ragged = Function(lambda x, y: 2 * (y - 0.1 * torch.sin(5 * x)) + 0.2 * torch.sin(60 * x) * torch.sin(54 * y))
    exact = render(ragged, (384, 384), mode="exact").logits > 0
    adaptive = render(ragged, (384, 384))
    assert adaptive.num_points < 8000  # all four corners of these cells are 9,913 points
    unequal = ((adaptive.logits > 0) != exact).sum()
    monkeypatch.setattr(
        imedsam.adaptive_rendering.Lattice,
        "_largest_error",
        lambda self, errors, points: errors.new_zeros(1, len(self.cells)),
    )
    without = ((render(ragged, (384, 384)).logits > 0) != exact).sum()
    assert unequal < 5e-4 * 384**2 and 5 * unequal < without


def test_errors_are_remembered_where_interpolation_happens_to_be_right(monkeypatch):
    """Of a field with octaves, at one size of its cells."""

    def octaves(x, y):
        rough = torch.sin(47 * x) * torch.sin(42.3 * y) + torch.sin(211 * x) * torch.sin(189.9 * y)
        return 2 * (y - 0.1 * torch.sin(5 * x)) + 0.2 * rough

    field = Function(octaves)
    exact = render(field, (896, 896), mode="exact").logits > 0
    unequal = ((render(field, (896, 896)).logits > 0) != exact).sum()
    monkeypatch.setattr(imedsam.adaptive_rendering, "ERROR_DECAY", 0.0)
    forgetful = ((render(field, (896, 896)).logits > 0) != exact).sum()
    assert unequal < 0.95 * forgetful < 3e-3 * 896**2


@pytest.mark.parametrize("size", [(9, 5), (8, 5), (9, 4), (8, 4)])
def test_midpoints_are_those_of_bilinear_interpolation(size):
    values = torch.rand(2, 3, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(values, (9, 5), mode="bilinear", align_corners=True)
    got = imedsam.adaptive_rendering._insert_midpoints(values, size)
    assert_close(got, expected[..., : size[0], : size[1]])


def test_a_thin_line_that_is_found_once_is_followed():
    """Most of a diagonal line a pixel wide falls between the points of the first lattice."""
    line = Function(lambda x, y: 4 - 1000 * (x - 0.6 * y - 0.031).abs())
    exact, adaptive = (render(line, (384, 384), mode=mode) for mode in RENDER_MODES)
    assert torch.equal(adaptive.logits > 0, exact.logits > 0) and (exact.logits > 0).any(dim=-1).all()
    assert adaptive.num_points < 0.1 * exact.num_points


def test_what_hangs_on_a_thin_neck_is_found_whole():
    """The disk at the right lies between the points of the first lattice; from the neck its rim is followed."""

    def shape(x, y):
        x, y = 448 * (x + 1), 448 * (y + 1)
        neck = ((y - 446).abs() < 0.75) & (x > 590) & (x < 670)
        inside = neck | ((x - 448).hypot(y - 448) < 150) | ((x - 672).hypot(y - 448) < 12)
        return torch.where(inside, 5.0, -5.0)

    field = Function(shape)
    exact, adaptive = (render(field, (896, 896), mode=mode) for mode in RENDER_MODES)
    assert (render(field, (32, 32), mode="exact").logits > 0)[..., 23:26].sum() == 0
    assert torch.equal(adaptive.logits > 0, exact.logits > 0)


def test_what_is_larger_than_its_small_box_is_found_whole():
    """All corners of the cell that holds the box are inside."""
    field = Disks(12.3 / 448, torch.tensor([[56.25, 56.25]]) / 448 - 1)
    field.frame = torch.tensor([[56.5 / 448 - 1, 56.5 / 448 - 1, 6.5 / 448, 6.5 / 448]])
    exact, adaptive = (render(field, (896, 896), mode=mode) for mode in RENDER_MODES)
    assert torch.equal(adaptive.logits > 0, exact.logits > 0)


def test_a_grid_that_the_cells_do_not_fit_into():
    """The last points lie beyond it; a structure touches each of its edges."""
    disks = Function(lambda x, y: 20 * (0.3 - (x.abs() - 1).hypot(y.abs() - 1)))
    for size in ((331, 257), (100, 779), (513, 130)):
        exact, adaptive = (render(disks, size, mode=mode) for mode in RENDER_MODES)
        assert torch.equal(adaptive.logits > 0, exact.logits > 0) and (exact.logits > 0)[..., 0, 0].all()


class Disks(KnownField):
    """A small disk per prompt, and no sign of it beside it."""

    def __init__(self, radius, centre):
        super().__init__(1, len(centre), torch.device("cpu"))
        self.radius, self.centre = radius, centre

    def values(self, coordinates, point_areas=None):
        distance = (coordinates - self.centre[:, None]).norm(dim=-1)
        logits = torch.where(distance < self.radius, 5.0, -5.0)[:, :, None]
        return FieldValues(logits, logits, torch.zeros_like(logits))


@pytest.mark.parametrize(
    ("size", "zoom"),
    [
        ((64, 64), 1.0),
        ((96, 96), 1.0),
        ((384, 384), 1.0),
        ((384, 384), 0.25),
        ((500, 200), 1.0),
        ((500, 200), 0.25),
        ((896, 896), 1.0),
    ],
)
def test_the_smallest_structure_that_is_always_found(size, zoom):
    """A disk of one and a half cells of the first lattice, wherever it lies in the square or in a part of it."""
    radius = 1.5 / imedsam.adaptive_rendering.FIRST_LATTICE * zoom
    generator = torch.Generator().manual_seed(size[0])
    centre = 0.6 * (1 - zoom) + (torch.rand(12, 2, generator=generator) * 2 - 1) * (zoom - radius)
    region = torch.tensor([-1.0, -1.0, 1.0, 1.0]) * zoom + 0.6 * (1 - zoom)
    exact, adaptive = (render(Disks(radius, centre), size, region, mode) for mode in RENDER_MODES)
    assert torch.equal(adaptive.logits > 0, exact.logits > 0)
    assert (exact.logits > 0).flatten(2).any(dim=-1).all()


@pytest.mark.parametrize(("size", "diameter"), [(896, 10), (384, 3)])
def test_a_small_structure_in_its_box_is_found(size, diameter):
    """The frame is twice as large as it, and the first lattice would miss it."""
    radius = diameter / size
    centre = (torch.rand(6, 2, generator=torch.Generator().manual_seed(size)) * 2 - 1) * (1 - 2 * radius)
    field = Disks(radius, centre)
    missing = (render(field, (size, size)).logits > 0).flatten(2).sum(-1) == 0
    assert missing.any()
    field.frame = torch.cat([centre, torch.full_like(centre, 2 * radius)], dim=-1)
    exact, adaptive = (render(field, (size, size), mode=mode) for mode in RENDER_MODES)
    assert torch.equal(adaptive.logits > 0, exact.logits > 0)
    assert adaptive.num_points < 0.1 * exact.num_points


@pytest.mark.parametrize(
    ("size", "side", "zoom"),
    [
        ((1000, 1000), 130, 1.0),
        ((384, 384), 66, 1.0),
        ((384, 384), 66, 0.3),
        ((896, 896), 140, 1.0),
        ((500, 4000), 200, 1.0),
        ((384, 1536), 100, 1.0),
        ((384, 1536), 100, 0.3),
        ((384, 384), 12, 1.0),
    ],
)
def test_the_smallest_structure_that_is_always_found_in_a_frame(size, side, zoom):
    """A disk of an eighth of the frame's side, or of 1.5 pixels, wherever in it; cells of unequal sides included."""
    low = torch.tensor([-1.0, 0.7 - 1.7 * zoom])
    region, scale = torch.cat([low, low + 2 * zoom]), torch.tensor([2 / size[1], 2 / size[0]]) * zoom

    class Round(Disks):
        """Disks in the pixels of the grid."""

        def values(self, coordinates, point_areas=None):
            distance = ((coordinates - self.centre[:, None]) / scale).norm(dim=-1)
            logits = torch.where(distance < self.radius, 5.0, -5.0)[:, :, None]
            return FieldValues(logits, logits, torch.zeros_like(logits))

    radius = max(0.75, 0.75 * side / imedsam.adaptive_rendering.FRAME_CELLS)
    generator = torch.Generator().manual_seed(side)
    frame = torch.rand(8, 2, generator=generator) * (torch.tensor(size[::-1]) - side)
    places = frame + radius + torch.rand(8, 2, generator=generator) * (side - 2 * radius)
    field = Round(radius, places * scale + low)
    field.frame = torch.cat([(frame + side / 2) * scale + low, (side / 2 * scale).expand(8, 2)], dim=-1)
    exact, adaptive = (render(field, size, region, mode) for mode in RENDER_MODES)
    assert torch.equal(adaptive.logits > 0, exact.logits > 0)
    assert (exact.logits > 0).flatten(2).any(dim=-1).all()
    assert adaptive.num_points < 0.1 * exact.num_points


@pytest.mark.parametrize("seed", range(8))
def test_small_lesions_of_phantoms_are_found_whole(seed):
    """Irregular outlines, shrunk until they just hold a disk of one and a half cells of the first lattice."""
    phantom, side = draw_phantom(seed), 512
    lesion = phantom.mask(side, side) == LESION
    radius = distance_transform_edt(lesion).max() / side
    zoom = radius / (0.75 / imedsam.adaptive_rendering.FIRST_LATTICE)
    place = np.random.default_rng(seed).uniform(0.1, 0.9, 2)

    class Lesion(KnownField):
        def values(self, coordinates, point_areas=None):
            offsets = (coordinates.numpy() + 1) / 2 - place
            x, y = np.moveaxis(np.argwhere(lesion).mean(axis=0)[::-1] / side + zoom * offsets, -1, 0)
            logits = torch.from_numpy(np.where(phantom.label_at(x, y) == LESION, 5.0, -5.0))[:, :, None]
            return FieldValues(logits, logits, torch.zeros_like(logits))

    field = Lesion(1, 1, torch.device("cpu"))
    exact, adaptive = (render(field, (384, 384), mode=mode) for mode in RENDER_MODES)
    assert torch.equal(adaptive.logits > 0, exact.logits > 0) and (exact.logits > 0).sum() > 9**2 / 2
    assert adaptive.num_points < 0.1 * exact.num_points


def test_a_pixel_has_one_value_in_both_modes(monkeypatch):
    """Where adaptive rendering evaluates it, to the last bit."""
    monkeypatch.setattr(imedsam.adaptive_rendering, "UNCERTAINTY_TOLERANCE", -1.0)  # no cell is decided
    region = torch.tensor([[-1.0, -1.0, 1.0, 0.4883], [-0.7, 0.1, 0.31, 0.9]])
    exact, adaptive = (render(Shapes(), (150, 170), region, mode) for mode in RENDER_MODES)
    assert torch.equal(adaptive.logits, exact.logits) and torch.equal(adaptive.uncertainty, exact.uncertainty)


def test_a_doubtful_place_is_not_smoothed_over():
    """Uncertainty without a change of sign, larger than the first lattice's cells."""

    class Doubt(KnownField):
        def values(self, coordinates, point_areas=None):
            distance = coordinates.norm(dim=-1)[:, :, None]
            logits = -0.5 - 5 * (10 * distance - 1).clamp(0, 1)
            return FieldValues(logits, logits, 0.25 * torch.exp(-((12 * distance) ** 2)))

    field = Doubt(1, 1, torch.device("cpu"))
    exact, adaptive = (render(field, (896, 896), mode=mode) for mode in RENDER_MODES)
    assert_close(
        adaptive.uncertainty, exact.uncertainty, atol=imedsam.adaptive_rendering.UNCERTAINTY_TOLERANCE, rtol=0
    )
    assert adaptive.num_points < 0.05 * exact.num_points


@pytest.mark.parametrize("mode", RENDER_MODES)
@pytest.mark.parametrize(
    ("name", "value", "at_once"), [("PROMPTS_AT_ONCE", 3, 3), ("PIXELS_AT_ONCE", 2 * 150 * 200, 2)]
)
def test_prompts_in_chunks(monkeypatch, mode, name, value, at_once):
    region = torch.tensor([[-0.9, -0.5, 0.7, 1.0], [0.0, 0.0, 1.0, 1.0]])
    together = render(Shapes(), (150, 200), region, mode)
    monkeypatch.setattr(imedsam.rendering, name, value)
    rows, at = [], Shapes.at
    monkeypatch.setattr(Shapes, "at", lambda field, chosen: rows.append(len(chosen)) or at(field, chosen))
    parts = render(Shapes(), (150, 200), region, mode)
    assert max(rows) == at_once
    for name, values in vars(together).items():
        assert_close(getattr(parts, name), values)


def test_no_more_points_are_evaluated_than_are_reported():
    field = Disks(0.3, torch.tensor([[0.1, 0.2]]))
    asked, values = [], field.values
    field.values = lambda coordinates, point_areas=None: asked.append(coordinates.shape[2]) or values(coordinates)
    masks = render(field, (300, 300))
    assert masks.num_points == sum(asked)


@pytest.mark.parametrize("size", [(40, 50), (100, 110)])
@pytest.mark.parametrize("prompts", [1, 4])
def test_rendered_maps_are_each_their_own(size, prompts):
    field = Shapes() if prompts == 4 else Disks(0.3, torch.tensor([[0.1, 0.2]]))
    for mode in RENDER_MODES:
        masks = render(field, size, mode=mode)
        for values in (masks.logits, masks.coarse_logits, masks.uncertainty):
            assert values.is_contiguous() and values.untyped_storage().nbytes() == values.nbytes
