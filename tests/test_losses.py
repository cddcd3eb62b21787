"""The losses against MONAI's, and what weights mean."""

import math
import warnings

import pytest
import torch
from torch.testing import assert_close

from imedsam.losses import cross_entropy_loss, dice_loss, segmentation_loss

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
