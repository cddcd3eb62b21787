"""Segmentation losses on points or pixels, with weights for points that stand for unequal areas."""

import torch.nn.functional as F
from torch import Tensor


def segmentation_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """
    0.5 cross entropy + 0.5 Dice (paper, Eq. 8).

    Args:
        logits: (..., N), one probability per point by a sigmoid.
        labels: (..., N), 0 or 1.
        weights: (..., N), importance weights of the points, of mean 1 over the draws; 1 by default.

    Returns:
        (...,).
    """
    return 0.5 * cross_entropy_loss(logits, labels, weights) + 0.5 * dice_loss(logits, labels, weights)


def cross_entropy_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """
    Mean over the points of the weighted binary cross entropy, (..., N) -> (...,). Weights that are the inverse of the
    density which the points were drawn from make it an unbiased estimate of the mean over the image; the Dice loss, a
    ratio of such means, is a consistent one.
    """
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (loss if weights is None else weights * loss).mean(dim=-1)


def dice_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None, smooth: float = 1e-5) -> Tensor:
    """1 - (2 sum p y + smooth) / (sum p + sum y + smooth), weighted sums over the points, (..., N) -> (...,)."""
    probabilities = logits.sigmoid()
    area = 1.0 if weights is None else weights
    overlap = (area * probabilities * labels).sum(dim=-1)
    total = (area * probabilities).sum(dim=-1) + (area * labels).sum(dim=-1)
    return 1 - (2 * overlap + smooth) / (total + smooth)
