"""Dropout variance, in closed form and by sampling, against many passes; and the threshold of the selection."""

import math

import pytest
import torch
from torch.testing import assert_close

from imedsam.uncertainty import (
    closed_form_variance,
    draw_uncertain,
    dropout_masks,
    logit_variance,
    monte_carlo_variance,
    probability_variance,
    selection_threshold,
)


@pytest.fixture
def head():
    """Hidden vectors (2, 6, 64) after a ReLU, a head's weight (2, 3, 64) and bias (2, 3)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 64, generator=generator).relu() + 0.3
    return hidden, torch.randn(2, 3, 64, generator=generator) / 8, torch.randn(2, 3, generator=generator)


def passes(head, dropout, samples=20_000):
    """Logits of many dropout passes, each with its own mask per point, (T, 2, 3, 6)."""
    hidden, weight, bias = head
    torch.manual_seed(0)
    chunks = []
    for _ in range(samples // 1000):
        dropped = torch.nn.functional.dropout(hidden.expand(1000, -1, -1, -1), dropout)
        chunks.append(torch.einsum("trnd,rmd->trmn", dropped, weight) + bias[..., None])
    return torch.cat(chunks)


@pytest.mark.parametrize("dropout", [0.2, 0.5])
def test_the_closed_form_is_the_limit_of_many_passes(head, dropout):
    hidden, weight, bias = head
    logits = passes(head, dropout)
    mean = weight @ hidden.transpose(1, 2) + bias[..., None]
    variance = logit_variance(hidden, weight, dropout)
    assert variance.shape == (2, 3, 6) and variance.min() > 0.1
    assert_close(logits.mean(dim=0), mean, atol=0.05, rtol=0)
    assert_close(variance, logits.var(dim=0), rtol=0.04, atol=0)
    estimate = closed_form_variance(hidden, mean, weight, dropout)
    assert_close(estimate, logits.sigmoid().var(dim=0), rtol=0.1, atol=1e-3)


def test_probability_variance_by_integration():
    """Against a fine Riemann sum of the normal density, in float64."""
    mean = torch.tensor([0.0, 1.0, -1.0, 4.0, -4.0, 10.0], dtype=torch.float64)
    variance = torch.tensor([0.25, 1.0, 1.0, 0.5, 0.5, 1.0], dtype=torch.float64)
    x = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    probability = torch.sigmoid(mean[:, None] + variance.sqrt()[:, None] * x)
    first, second = probability @ density, probability.square() @ density
    assert_close(probability_variance(mean, variance), second - first**2, rtol=2e-3, atol=1e-12)
    assert_close(probability_variance(mean.float(), variance.float()).double(), second - first**2, rtol=2e-3, atol=0)


def test_probability_variance_is_even_and_keeps_its_digits():
    """Far inside and far outside an object the order of the points is still right in float32."""
    mean, variance = torch.linspace(-25, 25, 101), torch.full((101,), 0.5)
    values = probability_variance(mean, variance)
    assert_close(values, values.flip(0), rtol=1e-5, atol=0)
    assert (values[:50].diff() > 0).all() and values.min() > 0
    assert probability_variance(torch.tensor(3.0), torch.tensor(0.0)) < 1e-12
    assert probability_variance(torch.tensor(0.0), torch.tensor(1e8)) <= 0.25 + 1e-6


@pytest.mark.parametrize("samples", [2, 8])
def test_monte_carlo_against_a_plain_loop(head, samples):
    hidden, weight, bias = head
    masks = dropout_masks(samples, 64, 0.5, torch.device("cpu"), torch.float32)
    variance = monte_carlo_variance(hidden, weight @ hidden.transpose(1, 2) + bias[..., None], weight, masks)
    for row in range(2):
        for label in range(3):
            for point in range(6):
                values = []
                for mask in masks:
                    logit = sum(weight[row, label] * mask * hidden[row, point]) + bias[row, label]
                    values.append(1 / (1 + math.exp(-logit)))
                average = sum(values) / samples
                expected = sum((value - average) ** 2 for value in values) / samples
                assert variance[row, label, point].item() == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_monte_carlo_tends_to_the_passes(head):
    hidden, weight, bias = head
    masks = dropout_masks(4000, 64, 0.5, torch.device("cpu"), torch.float32)
    variance = monte_carlo_variance(hidden, weight @ hidden.transpose(1, 2) + bias[..., None], weight, masks)
    assert_close(variance, passes(head, 0.5).sigmoid().var(dim=0), rtol=0.1, atol=1e-3)


def test_dropout_masks():
    def make(samples, dropout):
        return dropout_masks(samples, 1000, dropout, torch.device("cpu"), torch.float32)

    state = torch.get_rng_state()
    masks = make(4, 0.25)
    assert masks.shape == (4, 1000) and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert_close(masks, make(4, 0.25), rtol=0, atol=0)
    assert_close(masks.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert masks.mean() == pytest.approx(1.0, abs=0.03)
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("share", [0.001, 0.1, 0.125, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("points", [8, 1000, 4096])
def test_the_share_is_selected(share, points):
    uncertainty = torch.rand(3, 2, points, generator=torch.Generator().manual_seed(0))
    selected = uncertainty > selection_threshold(uncertainty, share)[..., None]
    counts = selected.sum(dim=-1)
    assert (counts <= share * points + 1e-3).all() and (counts >= share * points - 1.001).all()
    if counts.max() > 0:  # no point outside is more uncertain than one inside
        inside = uncertainty.masked_fill(~selected, torch.inf).amin(dim=-1)
        outside = uncertainty.masked_fill(selected, -torch.inf).amax(dim=-1)
        assert (inside > outside).all()


def test_the_threshold_is_half_way_between_two_points():
    uncertainty = torch.tensor([0.4, 0.1, 0.3, 0.2])
    assert selection_threshold(uncertainty, 0.5).item() == pytest.approx(0.25)
    assert selection_threshold(uncertainty, 0.25).item() == pytest.approx(0.35)


def test_share_1_selects_all_and_ties_none():
    uncertainty = torch.zeros(2, 5)
    assert (uncertainty > selection_threshold(uncertainty, 1.0)[..., None]).all()
    assert not (uncertainty > selection_threshold(uncertainty, 0.5)[..., None]).any()


def test_weights_repeat_points():
    """A point of weight 3 counts as three points."""
    generator = torch.Generator().manual_seed(0)
    uncertainty = torch.rand(2, 40, generator=generator)
    repeats = torch.randint(1, 5, (40,), generator=generator)
    for share in (0.1, 0.25, 0.5, 0.8):
        weighted = selection_threshold(uncertainty, share, repeats.float())
        repeated = selection_threshold(uncertainty.repeat_interleave(repeats, dim=-1), share)
        selected = uncertainty > weighted[:, None]
        assert torch.equal(selected, uncertainty > repeated[:, None])
        unweighted = uncertainty > selection_threshold(uncertainty, share)[:, None]
        assert not torch.equal(selected, unweighted)
        mass = (selected * repeats).sum(dim=-1) / repeats.sum()
        assert (mass <= share + 1e-6).all() and (mass > share - 4.01 / repeats.sum()).all()


def test_weights_of_zero_are_no_points():
    uncertainty, weights = torch.tensor([0.1, 0.9, 0.2, 0.3, 0.4]), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    selected = uncertainty > selection_threshold(uncertainty, 0.25, weights)
    assert selected.tolist() == [False, True, False, False, True]


def test_drawn_points_are_the_uncertain_ones_and_their_means_are_unbiased():
    uncertainty = torch.tensor([0.0, 0.01, 0.03, 0.2]).repeat(2, 3, 5)
    values = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, -2, 3, 0]).repeat(
        5
    )
    torch.manual_seed(0)
    indices, weights = draw_uncertain(uncertainty, 40_000)
    assert indices.shape == weights.shape == (2, 3, 40_000)
    frequency = torch.nn.functional.one_hot(indices % 4, 4).float().mean(dim=2)
    expected = (torch.tensor([0.0, 0.01, 0.03, 0.2]) + 0.06) / (2 * 0.24)
    assert_close(frequency, expected.expand(2, 3, 4), atol=0.01, rtol=0)
    assert 0 < weights.min() and weights.max() <= 2 + 1e-5
    drawn = weights * values.gather(-1, indices)
    error = drawn.std(dim=-1) / 40_000**0.5
    assert ((drawn.mean(dim=-1) - values.mean(dim=-1)).abs() < 4 * error).all()


def test_points_of_equal_uncertainty_are_drawn_evenly():
    _, weights = draw_uncertain(torch.zeros(1, 1, 7), 5)
    assert_close(weights, torch.ones(1, 1, 5))
