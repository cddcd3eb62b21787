"""A bottleneck adapter."""

import torch.nn.functional as F
from torch import Tensor, nn

from imedsam.layers import ZeroLinear


class Bottleneck(nn.Module):
    """
    A(y) = W2 GELU(W1 y), (..., C) -> (..., C).

    Args:
        zero: start at A(y) = 0.
    """

    def __init__(self, width: int, hidden: int, zero: bool = False):
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.up = ZeroLinear(hidden, width) if zero else nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(tokens)))
