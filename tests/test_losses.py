"""The losses against MONAI's, and what weights mean."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from torch.testing import assert_close

from imedsam.losses import (
    cross_entropy_loss,
    dice_loss,
    segmentation_loss,
    spectral_correlation_loss,
    uncertainty_guided_loss,
)

with warnings.catch_warnings():  # of libraries that MONAI imports
    warnings.simplefilter("ignore")
    from monai.losses import DiceCELoss, DiceLoss


@pytest.fixture
def points():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 3, 50, generator=generator)
    return logits.requires_grad_(), (torch.rand(2, 3, 50, generator=generator) > 0.6).float()


def test_dice_against_monai(points):
    logits, labels = points
    monai = DiceLoss(sigmoid=True, smooth_nr=1e-5, smooth_dr=1e-5, reduction="none")
    assert_close(dice_loss(logits, labels), monai(logits, labels)[..., 0])


def test_cross_entropy_from_its_definition(points):
    logits, labels = points
    p = logits.sigmoid()
    assert_close(cross_entropy_loss(logits, labels), -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(dim=-1))


def test_the_sum_against_monai(points):
    logits, labels = points
    monai = DiceCELoss(sigmoid=True, smooth_nr=1e-5, smooth_dr=1e-5, lambda_dice=0.5, lambda_ce=0.5)
    # MONAI's cross entropy of one channel is the binary one, if the labels are floats.
    expected = monai(logits.reshape(6, 1, 50), labels.reshape(6, 1, 50))
    assert_close(segmentation_loss(logits, labels).mean(), expected)


@pytest.mark.parametrize("loss", [cross_entropy_loss, dice_loss])
def test_each_term_has_a_gradient(points, loss):
    logits, labels = points
    value = loss(logits, labels)
    assert value.shape == (2, 3)
    value.sum().backward()
    # A foreground logit wants to rise, a background logit to fall.
    assert (logits.grad[labels == 1] < 0).all() and (logits.grad[labels == 0] > 0).all()


@pytest.mark.parametrize("loss", [cross_entropy_loss, dice_loss, segmentation_loss])
def test_weights_repeat_points(points, loss):
    logits, labels = points
    repeats = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(1))
    expected = loss(logits.repeat_interleave(repeats, -1), labels.repeat_interleave(repeats, -1))
    weights = (repeats / repeats.float().mean()).expand(2, 3, -1)
    assert_close(loss(logits, labels, weights), expected)
    assert not torch.allclose(loss(logits, labels), expected, atol=1e-3)


@pytest.mark.parametrize("foreground", [0, 1, 25, 50])
def test_a_perfect_prediction_costs_nothing(foreground):
    labels = (torch.arange(50) < foreground).float()
    assert segmentation_loss(60 * labels - 30, labels) < 1e-3
    # The opposite costs a logit of 30 at each point, and a Dice of 0 where there is foreground.
    assert cross_entropy_loss(30 - 60 * labels, labels).item() == pytest.approx(30.0)
    assert dice_loss(30 - 60 * labels, labels).item() == pytest.approx(1.0, abs=1e-4)


def test_by_hand():
    logits, labels = torch.tensor([0.0, math.log(3.0)]), torch.tensor([0.0, 1.0])  # probabilities 1/2 and 3/4
    assert cross_entropy_loss(logits, labels).item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    assert dice_loss(logits, labels).item() == pytest.approx(1 - 2 * 0.75 / (1.25 + 1), abs=1e-5)


# Uncertainty


def test_the_uncertainty_guided_loss_by_hand():
    """Probabilities 3/4, 1/4 and 3/4, of which the last one is wrong; the entropy of each is 0.8113 bits."""
    logits, labels = math.log(3) * torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])
    entropy = 2 - 0.75 * math.log2(3)
    right, wrong = -math.log(1 - entropy), -math.log(entropy)
    assert uncertainty_guided_loss(logits, labels).item() == pytest.approx((2 * right + wrong) / 3, rel=1e-5)
    weights = torch.tensor([0.0, 1.0, 2.0])
    expected = pytest.approx((right + 2 * wrong) / 3, rel=1e-5)
    assert uncertainty_guided_loss(logits, labels, weights).item() == expected
    assert uncertainty_guided_loss(logits.expand(4, 2, 3), labels.expand(4, 2, 3)).shape == (4, 2)


@pytest.mark.parametrize("wrong", [0, 1, 2, 4, 5, 8])
def test_the_uncertainty_is_to_be_the_share_of_errors(wrong):
    """Of points that all have one entropy, on whichever side they are."""
    labels = (torch.arange(8) >= wrong).float()
    logits = torch.linspace(0.01, 12, 1200, dtype=torch.float64)
    loss = uncertainty_guided_loss(logits[:, None].expand(-1, 8), labels.expand(1200, -1))
    p = logits[loss.argmin()].sigmoid().item()
    entropy = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert entropy == pytest.approx(wrong / 8, abs=0.005)
    mirrored = uncertainty_guided_loss(-logits[:, None].expand(-1, 8), 1 - labels.expand(1200, -1))
    assert_close(mirrored, loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_uncertainty_are_finite_and_lead_to_the_errors(dtype):
    logits = torch.tensor([-1000.0, -40, -2, -1e-4, 0, 1e-4, 2, 40, 1000], dtype=dtype).repeat(2, 1).requires_grad_()
    labels = torch.tensor([[0.0], [1.0]]).expand(2, 9)
    loss = uncertainty_guided_loss(logits, labels)
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()
    # What is wrong is led to the boundary, what is right away from it.
    assert logits.grad[0, 2] > 0 and logits.grad[0, 6] > 0 and logits.grad[1, 2] < 0 and logits.grad[1, 6] < 0


# Spectra


@pytest.fixture
def masks():
    """Two different ones, as probabilities of 0 and 1."""
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    disk = ((rows - 10) ** 2 + (columns - 12) ** 2 < 36).float()
    return disk, ((rows - 14).abs() + (columns - 18).abs() < 9).float()


def logits_of(mask):
    return (1000 * (mask - 0.5)).requires_grad_()


@pytest.mark.parametrize("log_amplitude", [False, True])
def test_the_spectral_loss_from_its_definition(masks, log_amplitude):
    """By NumPy's transform and SciPy's correlation."""
    a, b = (np.abs(np.fft.fft2(mask.numpy(), norm="ortho")).ravel() for mask in masks)
    if log_amplitude:
        a, b = np.log1p(a), np.log1p(b)
    expected = 1 - pearsonr(a, b).statistic
    assert 0.01 < expected < 1
    loss = spectral_correlation_loss(logits_of(masks[0]), masks[1], log_amplitude)
    assert_close(loss.item(), float(expected), atol=1e-4, rtol=0)


def test_spectra_of_equal_and_of_empty_masks(masks):
    mask, empty = masks[0], torch.zeros_like(masks[0])
    for same in (mask, empty, torch.ones_like(mask)):
        assert abs(spectral_correlation_loss(logits_of(same), same)) < 1e-5
    for one, other in ((mask, empty), (empty, mask)):
        assert 0.99 < spectral_correlation_loss(logits_of(one), other) <= 1


def test_the_spectral_loss_is_bounded():
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(50, 8, 8, generator=generator)
    loss = spectral_correlation_loss(logits, (torch.rand(50, 8, 8, generator=generator) > 0.5).float())
    assert loss.shape == (50,) and loss.min() >= 0 and loss.max() <= 2 and loss.std() > 0.05


def test_spectra_see_no_shift_and_no_scale(masks):
    mask, other = masks
    expected = spectral_correlation_loss(logits_of(mask), other)
    shifted = spectral_correlation_loss(logits_of(mask.roll((3, -5), dims=(-2, -1))), other)
    assert_close(shifted, expected, atol=1e-5, rtol=0)
    half = torch.where(mask > 0, 0.0, -1000.0)  # a probability of 0.5
    assert_close(spectral_correlation_loss(half, other), expected, atol=1e-4, rtol=0)
    assert spectral_correlation_loss(half, mask) < 1e-4


def test_complex_coefficients_would_add_nothing(masks):
    """The lemma of the docstring: without amplitudes it is Pearson's correlation of the pixels."""
    a, b = (torch.fft.fft2(mask, norm="ortho").flatten()[1:] for mask in masks)
    r = (a * b.conj()).sum().real / (a.abs().square().sum() * b.abs().square().sum()).sqrt()
    expected = pearsonr(*(mask.flatten().numpy() for mask in masks)).statistic
    assert r.item() == pytest.approx(float(expected), abs=1e-5)


def test_gradients_of_spectra_are_finite_and_lead_down(masks):
    logits = torch.zeros(4, 24, 32)
    logits[1] = -1000
    logits[2] = masks[1] - 0.5
    logits[3] = 1000 * (masks[0] - 0.5)
    logits.requires_grad_()
    loss = spectral_correlation_loss(logits, masks[0].expand(4, -1, -1))
    loss.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[2].abs().max() > 0
    with torch.no_grad():
        lower = spectral_correlation_loss(logits - 5 * logits.grad, masks[0].expand(4, -1, -1))
    assert lower[2] < loss[2]
