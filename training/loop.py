"""What the loops of the training scripts share."""

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import skip_first_batches
from accelerate.utils import broadcast
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm

from imedsam.training.checkpoints import TrainerState


@contextmanager
def refusals_in_a_line() -> Iterator[None]:
    """A line instead of a traceback for what the user can mend, as argparse does of wrong flags."""
    try:
        yield
    except (ValueError, OSError, SafetensorError, ImportError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def count_epochs_and_steps(args: argparse.Namespace, batches_per_epoch: int) -> tuple[int, int]:
    steps_per_epoch = math.ceil(batches_per_epoch / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        return args.num_train_epochs, args.num_train_epochs * steps_per_epoch
    return math.ceil(args.max_train_steps / steps_per_epoch), args.max_train_steps


def remaining_batches(train_loader, state: TrainerState):
    """The loader of what is left of the epoch."""
    train_loader.set_epoch(state.epoch)
    loader = skip_first_batches(train_loader, state.batch) if state.batch else train_loader
    loader.set_epoch(state.epoch)  # older releases of Accelerate begin again with 0 after skipping
    return loader


def seed_step(seed: int, epoch: int, batch: int, process_index: int) -> None:
    """Makes dropout a function of the position in the run, so that a checkpoint needs no generator's state."""
    key = np.random.SeedSequence([seed, epoch, batch, process_index]).generate_state(1, np.uint64)
    torch.manual_seed(int(key[0]))


def check_finite(loss: float, state: TrainerState) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"Expected a finite loss, got {loss} at step {state.global_step}: lower the rates.")


def batch_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of batch norms that are trained."""
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    trained = [norm for norm in norms if norm.weight.requires_grad]
    return [statistic for norm in trained for statistic in (norm.running_mean, norm.running_var)]


def share_batch_statistics(model: nn.Module) -> None:
    """Gives all processes the first one's, which are those that are saved."""
    for statistic in batch_statistics(model):
        statistic.copy_(broadcast(statistic))


def show_progress(bar: tqdm, loss: float, state: TrainerState, score: str = "dice") -> None:
    best = {f"best_{score}": f"{state.best_score:.4f}"} if state.best_epoch >= 0 else {}
    bar.set_postfix(loss=f"{loss:.4f}", **best)


def flatten(values: dict) -> dict[str, float]:
    """{"a": {"b": 1}, "c": [2]} -> {"a/b": 1, "c/0": 2}."""
    flat = {}
    for key, value in values.items():
        items = value.items() if isinstance(value, dict) else enumerate(value)
        flat.update({f"{key}/{inner}": number for inner, number in items})
    return flat
