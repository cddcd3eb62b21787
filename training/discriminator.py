"""The adversary of SAM-I2I's training: heads on a frozen CLIP that tell slices from translations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from imedsam.sam_checkpoints import read_config, refuse_damaged

HEAD_WIDTH = 256
SLOPE = 0.2  # of the leaky ReLUs


class ClipFeatures(nn.Module):
    """
    What a frozen CLIP sees in slices, at three depths. Gradients pass through it to the slices, and change nothing
    of it; it is always in evaluation mode.

    The paper says that the discriminator has CLIP's image encoder for a backbone, as in vision-aided GANs (Kumari et
    al., 2022), and not which of its features: these are ours.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: CLIPVisionModelWithProjection):
        super().__init__()
        self.clip = clip.requires_grad_(False)
        depth = clip.config.num_hidden_layers
        self.layers = (depth // 3, 2 * depth // 3)
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).reshape(3, 1, 1), persistent=False)
        self.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> ClipFeatures:
        """
        Raises:
            ValueError: a checkpoint of another model, or one without all of CLIP's image encoder.
        """
        path = str(pretrained_model_name_or_path)
        model_type = read_config(path, **kwargs).get("model_type")
        if model_type not in ("clip", "clip_vision_model"):
            raise ValueError(f"Expected a CLIP at {path}, got a model of type {model_type!r}: name one.")
        with refuse_damaged(path):
            # Declared to return the model alone.
            loaded: Any = CLIPVisionModelWithProjection.from_pretrained(path, output_loading_info=True, **kwargs)
        clip, found = loaded
        if missing := sorted(found["missing_keys"]):  # which transformers filled at random
            raise ValueError(
                f"Expected CLIP's image encoder at {path}, got none of {', '.join(missing[:4])}: name another, or "
                "copy or download it again."
            )
        return cls(clip)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            images: (B, 1, H, W) in [0, 1], stretched to CLIP's square.

        Returns:
            The patches after a third and after two thirds of the layers, (B, C, h, w) each, and the embedding of the
            image, (B, P).
        """
        side: Any = self.clip.config.image_size
        squares = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        # Grey to three channels by broadcasting.
        seen = self.clip((squares - self.mean) / self.std, output_hidden_states=True)
        first, second = (_to_grid(seen.hidden_states[layer]) for layer in self.layers)
        return first, second, seen.image_embeds

    def train(self, mode: bool = True) -> ClipFeatures:
        return super().train(False)


class DiscriminatorHeads(nn.Module):
    """
    A head per kind of features: convolutions on patches, and linear layers on the embedding. Spectral norms bound how
    fast they change (Miyato et al., 2018).

    Args:
        config: of the CLIP.
    """

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.patches = nn.ModuleList(_patch_head(config.hidden_size) for _ in range(2))
        self.embedding = nn.Sequential(
            spectral_norm(nn.Linear(config.projection_dim, HEAD_WIDTH)),
            nn.LeakyReLU(SLOPE),
            spectral_norm(nn.Linear(HEAD_WIDTH, 1)),
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features as of [`ClipFeatures`] -> logits of being real, (B, h * w), (B, h * w) and (B, 1)."""
        *grids, embeddings = features
        logits = [head(grid).flatten(1) for head, grid in zip(self.patches, grids, strict=True)]
        return [*logits, self.embedding(embeddings)]


def generator_loss(fake: Sequence[Tensor]) -> Tensor:
    """
    -log D(G(x)), which does not saturate as log(1 - D(G(x))) of equation 2 does where the discriminator is sure
    (Goodfellow et al., 2014); the mean over the heads.
    """
    return _cross_entropy(fake, 1.0)


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Equation 2 with its sign turned, -log D(y) - log(1 - D(G(x))); the mean over the heads."""
    return _cross_entropy(real, 1.0) + _cross_entropy(fake, 0.0)


@contextmanager
def held_still(heads: nn.Module) -> Iterator[None]:
    """Within it the heads get no gradients, and their spectral norms keep their vectors."""
    training = heads.training
    heads.requires_grad_(False).eval()
    try:
        yield
    finally:
        heads.requires_grad_(True).train(training)


def _patch_head(width: int) -> nn.Sequential:
    return nn.Sequential(
        spectral_norm(nn.Conv2d(width, HEAD_WIDTH, 1)),
        nn.LeakyReLU(SLOPE),
        spectral_norm(nn.Conv2d(HEAD_WIDTH, HEAD_WIDTH, 3, padding=1)),
        nn.LeakyReLU(SLOPE),
        spectral_norm(nn.Conv2d(HEAD_WIDTH, 1, 1)),
    )


def _to_grid(hidden_states: Tensor) -> Tensor:
    """(B, 1 + N, C) -> (B, C, h, w), without the class token."""
    side = int((hidden_states.shape[1] - 1) ** 0.5)
    return hidden_states[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)


def _cross_entropy(logits: Sequence[Tensor], target: float) -> Tensor:
    losses = [F.binary_cross_entropy_with_logits(part, torch.full_like(part, target)) for part in logits]
    return torch.stack(losses).mean()
