"""
The implicit decoder as the paper's authors evaluate it, the reference of the benchmarks, written from its description:
every pixel of the output in one piece, all inputs joined for each, and two whole passes of the coarse network for the
uncertainty, whose dropout acts while training alone. The weights are random; they do not change the cost.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PASSES = 2
SHARE = 0.125


class AuthorsDecoder(nn.Module):
    def __init__(self, channels: int = 32, prompt: int = 256):
        super().__init__()
        inputs = channels + prompt + 63
        self.coarse = nn.Sequential(
            nn.Linear(inputs, 1024),
            nn.BatchNorm1d(1024),
            nn.ReLU(),
            nn.Linear(1024, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(),
            nn.Linear(512, 1 + 256),
        )
        self.fine = nn.Sequential(
            nn.Linear(inputs + 256, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Linear(128, 1),
        )

    def forward(self, features: Tensor, prompt: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Features (R, C, h, w) and the prompts' embeddings (R, E) -> merged and coarse logits, (R, H W) each."""
        axes = [torch.linspace(-1, 1, length) for length in size]
        y, x = torch.meshgrid(*axes, indexing="ij")
        points = torch.stack([x, y, torch.zeros_like(x)], dim=-1).flatten(0, 1).expand(len(features), -1, -1)
        sampled = F.grid_sample(features, points[:, :, None, :2], align_corners=True)[..., 0].transpose(1, 2)
        inputs = torch.cat([sampled, prompt[:, None].expand(-1, points.shape[1], -1), _encode(points)], dim=-1)
        rows = inputs.flatten(0, 1)
        passes = torch.stack([F.dropout(self.coarse(rows), 0.5, self.training) for _ in range(PASSES)])
        uncertainty = passes.var(dim=0).mean(dim=-1)
        coarse = passes.mean(dim=0)
        chosen = uncertainty.topk(round(SHARE * len(rows))).indices
        refined = self.fine(torch.cat([rows[chosen], coarse[chosen, 1:]], dim=-1))[:, 0]
        merged = coarse[:, 0].index_put((chosen,), refined)
        return merged.unflatten(0, (len(features), -1)), coarse[:, 0].unflatten(0, (len(features), -1))


def memory_needed(pixels: int) -> int:
    """Bytes at a time at most, without gradients, measured."""
    return 12_500 * pixels


def _encode(points: Tensor) -> Tensor:
    angles = (points[..., None] * math.pi * 2.0 ** torch.arange(10)).flatten(-2)
    return torch.cat([points, angles.sin(), angles.cos()], dim=-1)
