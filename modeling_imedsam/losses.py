"""Losses on points or pixels, with weights for points that stand for unequal areas, and of spectra."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Its logarithm is the most that the uncertainty of a point can cost.
SMALLEST_UNCERTAINTY = 1e-6


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    dice_share: float = 0.5,
    positive_weight: float = 1.0,
) -> Tensor:
    """
    0.5 cross entropy + 0.5 Dice (paper, Eq. 8), or in other shares.

    Args:
        logits: (..., N), one probability per point by a sigmoid.
        labels: (..., N), 0 or 1.
        weights: (..., N), importance weights of the points, of mean 1 over the draws; 1 by default.
        dice_share: of the Dice loss; the cross entropy's is 1 - dice_share.
        positive_weight: of the points of label 1 in the cross entropy.

    Returns:
        (...,).
    """
    cross_entropy = cross_entropy_loss(logits, labels, weights, positive_weight)
    return (1 - dice_share) * cross_entropy + dice_share * dice_loss(logits, labels, weights)


def cross_entropy_loss(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, positive_weight: float = 1.0
) -> Tensor:
    """
    Mean over the points of the weighted binary cross entropy, (..., N) -> (...,). Weights that are the inverse of the
    density which the points were drawn from make it an unbiased estimate of the mean over the image; the Dice loss, a
    ratio of such means, is a consistent one.
    """
    positive = None if positive_weight == 1.0 else logits.new_tensor(positive_weight)
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none", pos_weight=positive)
    return (loss if weights is None else weights * loss).mean(dim=-1)


def dice_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None, smooth: float = 1e-5) -> Tensor:
    """1 - (2 sum p y + smooth) / (sum p + sum y + smooth), weighted sums over the points, (..., N) -> (...,)."""
    probabilities = logits.sigmoid()
    area = 1.0 if weights is None else weights
    overlap = (area * probabilities * labels).sum(dim=-1)
    total = (area * probabilities).sum(dim=-1) + (area * labels).sum(dim=-1)
    return 1 - (2 * overlap + smooth) / (total + smooth)


def uncertainty_guided_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """
    Mean over the points of the weighted binary cross entropy between u = H(p) / ln 2, the normalised entropy of the
    predicted probability p, taken for the probability of an error, and whether there is one, [(p > 0.5) != y]: the
    prediction is to be uncertain where it errs, and certain where it does not. It is least where a share u of the
    points with this entropy is wrong.

    The aim is that of a review of SF-RecSAM, an uncertainty-guided loss that asks for a higher uncertainty where the
    model errs; no formula is published: this one is ours. It does not see which side a point is on, so it is to be
    added to a loss that does.

    Args:
        logits: (..., N).
        labels: (..., N), 0 or 1.
        weights: (..., N), as in `segmentation_loss`.

    Returns:
        (...,), at least 0.
    """
    logits = logits.float()  # 1 - u has no place in half precision
    entropy = logits.sigmoid() * F.softplus(-logits) + (-logits).sigmoid() * F.softplus(logits)
    uncertainty = (entropy / math.log(2)).clamp(SMALLEST_UNCERTAINTY, 1 - SMALLEST_UNCERTAINTY)
    errors = (logits > 0) != (labels > 0.5)
    loss = -torch.where(errors, uncertainty.log(), (-uncertainty).log1p())
    return (loss if weights is None else weights * loss).mean(dim=-1)


def spectral_correlation_loss(
    logits: Tensor, labels: Tensor, log_amplitude: bool = False, smooth: float = 1e-6
) -> Tensor:
    """
    1 - r, the correlation of the amplitude spectra of prediction and target over all frequencies, after the spectral
    objective of arXiv:2401.10373, whose formula is not published: this one is ours. It depends on the masks alone, so
    any model on a grid can be trained with it.

    Amplitudes say how much of a mask is coarse or fine, and at which angle, not where: shifted around the grid's edges
    a mask has the same ones. So this is to be added to a loss that sees places.

    Lemma (Parseval): with complex coefficients instead of amplitudes, but for that of frequency 0, r would be
    Pearson's correlation of the masks' pixels, and the transform would add nothing.

    Args:
        logits: (..., H, W).
        labels: (..., H, W), 0 or 1.
        log_amplitude: of log(1 + amplitude), in which the middle and high frequencies count for more.
        smooth: added to the means of products, so that an empty mask is like another one.

    Returns:
        (...,), in [0, 2]: 0 for equal masks, near 1 where one of the two is empty.
    """
    predicted, expected = (_amplitudes(mask, log_amplitude) for mask in (logits.sigmoid(), labels))
    covariance = (predicted * expected).mean(dim=-1) + smooth
    variances = (predicted.square().mean(dim=-1) + smooth) * (expected.square().mean(dim=-1) + smooth)
    return 1 - covariance / variances.sqrt()


def _amplitudes(masks: Tensor, log_amplitude: bool) -> Tensor:
    """Of masks (..., H, W), over all frequencies, the mean taken off, (..., H W); in float32: half has no FFT."""
    amplitudes = torch.fft.fft2(masks.float(), norm="ortho").abs().flatten(-2)
    if log_amplitude:
        amplitudes = amplitudes.log1p()
    return amplitudes - amplitudes.mean(dim=-1, keepdim=True)
