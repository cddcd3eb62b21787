"""The moving average of the weights while training."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

FILE = "average.safetensors"


class WeightAverage:
    """
    The exponential moving average of some weights: after the first step they themselves, then decay * average +
    (1 - decay) * weights. Small data sets make single steps noisy, and the average is what is worth validating and
    keeping.

    Args:
        parameters: the trained ones, which the optimiser keeps changing, and the statistics that the batches do.
        decay: in [0, 1).
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        # As parameters, so that statistics are averaged alike; nothing here has a gradient.
        self.parameters = nn.ParameterList(
            p if isinstance(p, nn.Parameter) else nn.Parameter(p, requires_grad=False) for p in parameters
        )
        self.average = AveragedModel(self.parameters, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def update(self) -> None:
        """After every step of the optimiser."""
        self.average.update_parameters(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the model has the averaged weights."""
        trained = [parameter.detach().clone() for parameter in self.parameters]
        self._set(self.average.module.parameters())
        try:
            yield
        finally:
            self._set(trained)

    def save(self, models, weights, folder: str) -> None:
        """A hook of `Accelerator.save_state`. What is registered for checkpoints instead would be unpickled."""
        if PartialState().is_main_process:
            save_file(self.average.state_dict(), Path(folder) / FILE)

    def load(self, models, folder: str) -> None:
        """A hook of `Accelerator.load_state`."""
        self.average.load_state_dict(load_file(Path(folder) / FILE))

    @torch.no_grad()
    def _set(self, values):
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
