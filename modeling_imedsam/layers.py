"""Layers that start otherwise than PyTorch's: before a ReLU, or at nothing until they are trained."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.sam.modeling_sam import SamLayerNorm


@torch.no_grad()
def init_layer(module: nn.Module) -> None:
    """For every model's `_init_weights`; leaves modules of other classes alone."""
    if isinstance(module, HiddenLinear | HiddenConvolution):
        init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, ZeroLinear | ZeroLayerNorm):
        init.zeros_(module.weight)


class HiddenLinear(nn.Linear):
    """A linear layer before a ReLU, initialised for one (He et al., 2015)."""

    def last(self, inputs: Tensor) -> Tensor:
        """What the last ones of the inputs, and the bias, add to the outputs: (..., at most all) -> (..., outputs)."""
        return F.linear(inputs, self.weight[:, -inputs.shape[-1] :], self.bias)

    def first(self, inputs: Tensor, rest: Tensor) -> Tensor:
        """
        The outputs for the first ones of the inputs, (..., at most all), and what `last` gave for the rest: (outputs,)
        if all share it.
        """
        weight = self.weight[:, : inputs.shape[-1]]
        if rest.ndim == 1:
            return F.linear(inputs, weight, rest.to(weight.dtype))  # one pass over the outputs less
        return F.linear(inputs, weight).add_(rest)


class HiddenConvolution(nn.Conv2d):
    """A convolution before a ReLU, initialised for one (He et al., 2015)."""


class ZeroLinear(nn.Linear):
    """A linear layer whose weights start at 0."""


class ZeroLayerNorm(SamLayerNorm):
    """A norm whose weights start at 0."""
