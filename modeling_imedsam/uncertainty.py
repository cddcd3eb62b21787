"""
Uncertainty of the coarse field under dropout (paper, Eq. 7), and the selection of the points to refine.

With inverted dropout of probability p on the hidden vector h before a linear head o = w . h + b, T passes differ in
the head alone. Their limit T -> infinity has a closed form: the logit's mean is the pass without dropout, its
variance is p / (1 - p) * sum_j (w_j h_j)^2, exactly.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Nodes and weights with sum_i weight_i f(node_i) = E f(x) for a standard normal x and polynomials f up to degree 15.
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(8)
_NODES, _WEIGHTS = _NODES.tolist(), (_WEIGHTS / math.sqrt(2 * math.pi)).tolist()


@dataclass
class ProbabilitySamples:
    """
    Samples of probabilities, and what they say together.

    Args:
        values: (N, ...), in [0, 1].
    """

    values: Tensor

    @property
    def mean(self) -> Tensor:
        return self.values.mean(dim=0)

    @property
    def variance(self) -> Tensor:
        """Of the population, as in Eq. 7; at most 0.25."""
        return self.values.var(dim=0, correction=0)

    @property
    def entropy(self) -> Tensor:
        """Of a label with the mean probability, in nats; at most ln 2."""
        mean = self.mean
        return torch.special.entr(mean) + torch.special.entr(1 - mean)


def closed_form_variance(hidden: Tensor, logits: Tensor, weight: Tensor, dropout: float) -> Tensor:
    """
    Variance of the coarse probability over dropout masks: exact for the logit, and for the probability as far as the
    logit is normal.

    Args:
        hidden: (R, N, D), before the head, without dropout.
        logits: (R, M, N), of the pass without dropout.
        weight: (R, M, D), of the head.

    Returns:
        (R, M, N), in [0, 0.25].
    """
    return probability_variance(logits, logit_variance(hidden, weight, dropout))


def logit_variance(hidden: Tensor, weight: Tensor, dropout: float) -> Tensor:
    """p / (1 - p) * sum_j (w_j h_j)^2, (R, M, N) from hidden (R, N, D) and weight (R, M, D)."""
    return dropout / (1 - dropout) * (weight.square() @ hidden.square().transpose(1, 2))


def probability_variance(mean: Tensor, variance: Tensor) -> Tensor:
    """Var sigmoid(x) for x ~ N(mean, variance), by Gauss-Hermite quadrature with 8 nodes."""
    # Of -x it is the same, and a probability near 0 keeps the digits that one near 1 would lose.
    nodes, weights = mean.new_tensor(_NODES), mean.new_tensor(_WEIGHTS)
    probabilities = torch.sigmoid(-mean.abs()[..., None] + variance.sqrt()[..., None] * nodes)
    expected = (probabilities * weights).sum(dim=-1, keepdim=True)
    return ((probabilities - expected).square() * weights).sum(dim=-1)


def monte_carlo_variance(hidden: Tensor, logits: Tensor, weight: Tensor, masks: Tensor) -> Tensor:
    """
    Variance of the coarse probability over T dropout masks. The same masks serve every point, as each stands for one
    thinned network: the uncertainty is then a function of the point alone, and a pass costs one more row of the head.

    Args:
        hidden: (R, N, D).
        logits: (R, M, N), of the pass without dropout. What they have beside the head, a prior, every pass has.
        weight: (R, M, D), of the head.
        masks: (T, D), 0 or 1 / (1 - p).

    Returns:
        (R, M, N), in [0, 0.25]; population variance, as in Eq. 7.
    """
    probabilities = [torch.sigmoid(logits + (weight * (mask - 1)) @ hidden.transpose(1, 2)) for mask in masks]
    return ProbabilitySamples(torch.stack(probabilities)).variance


def dropout_masks(
    samples: int, width: int, dropout: float, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Tensor:
    """(T, D) masks of inverted dropout, always the same ones for a seed."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(samples, width, generator=generator) >= dropout
    return (keep / (1 - dropout)).to(device, dtype)


def selection_threshold(uncertainty: Tensor, share: float, weights: Tensor | None = None) -> Tensor:
    """
    The threshold above which lies the given share of the points, or of their weight where points stand for unequal
    areas. With share 1 it is -inf: every point is selected.

    Args:
        uncertainty: (..., N).
        weights: (..., N), not negative.

    Returns:
        (...,). At most the asked share of the weight lies above it.
    """
    if share >= 1.0:
        return uncertainty.new_full(uncertainty.shape[:-1], -torch.inf)
    values, order = uncertainty.sort(dim=-1)
    if weights is None:  # by counting, which a graph can be made of
        last = values.shape[-1] - 1
        low = max(0, math.ceil(round((1 - share) * (last + 1), 6)) - 1)
        return (values[..., low] + values[..., min(low + 1, last)]) / 2
    cumulative = weights.expand_as(values).gather(-1, order).cumsum(dim=-1)
    rank = torch.searchsorted(cumulative, (1 - share) * cumulative[..., -1:].contiguous())
    below, above = (values.gather(-1, r.clamp_max(values.shape[-1] - 1)) for r in (rank, rank + 1))
    # Half way between two points: on a point itself, rounding would decide whether it is selected.
    return ((below + above) / 2).squeeze(-1)


def draw_uncertain(uncertainty: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    """
    Draws some of the points, half of them evenly and half in proportion to their uncertainty, with replacement. In
    contrast to taking the most uncertain ones (PointRend, Kirillov et al., CVPR 2020), a draw has a density, and so
    weights that undo it.

    Args:
        uncertainty: (..., N).

    Returns:
        Indices (..., num_points) and weights (..., num_points), at most 2: weighted means over the drawn points are
        unbiased estimates of means over all.
    """
    uncertainty = uncertainty.nan_to_num()  # a diverged run is to end with what its loss says
    density = uncertainty + uncertainty.mean(dim=-1, keepdim=True) + 1e-12
    density = density / density.mean(dim=-1, keepdim=True)
    indices = density.reshape(-1, density.shape[-1]).multinomial(num_points, replacement=True)
    indices = indices.view(*density.shape[:-1], num_points)
    return indices, 1 / density.gather(-1, indices)
