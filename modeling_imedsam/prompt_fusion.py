"""Prompts, SAM's encoder for them, and SAM's two-way transformer that fuses them with the image."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SamConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPositionalEmbedding, SamPromptEncoder

PADDING_POINT = -10
# Prompts that SAM's transformer takes at once: its memory does not grow with their number.
PROMPTS_AT_ONCE = 32


class PromptFusion(SamMaskDecoder):
    """SAM's mask decoder, opened up: the field interpolates the features that its two-way transformer makes."""

    def fuse(self, image_embeddings: Tensor, positions: Tensor, prompts: "EncodedPrompts") -> tuple[Tensor, Tensor]:
        """
        Args:
            image_embeddings: (B, C, H, W).
            positions: (1, C, H, W), encoded positions of the image embeddings.
            prompts: of R = B P prompts.

        Returns:
            Features (R, C / 8, 4 H, 4 W) and SAM's mask token (R, C).
        """
        counts, order, parts = prompts.present.sum(dim=-1), [], []
        per_image = len(counts) // len(image_embeddings)
        # SAM knows no padded tokens: prompts with equally many tokens go together, and not too many at once.
        for count in counts.unique().tolist():
            for rows in (counts == count).nonzero()[:, 0].split(PROMPTS_AT_ONCE):
                tokens = prompts.tokens[rows][prompts.present[rows]].view(len(rows), count, prompts.tokens.shape[-1])
                parts.append(self._fuse(image_embeddings[rows // per_image] + prompts.dense[rows], positions, tokens))
                order.append(rows)
        features, mask_tokens = (torch.cat(part)[torch.cat(order).argsort()] for part in zip(*parts, strict=True))
        return features, mask_tokens

    def _fuse(self, image_embeddings: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(tokens.shape[0], -1, -1)
        queries, keys = self.transformer(
            point_embeddings=torch.cat([output_tokens, tokens], dim=1)[:, None],
            image_embeddings=image_embeddings,
            image_positional_embeddings=positions.expand(tokens.shape[0], -1, -1, -1),
            attention_similarity=None,
        )
        features = keys.transpose(2, 3).reshape(image_embeddings.shape)
        features = self.activation(self.upscale_layer_norm(self.upscale_conv1(features)))
        return self.activation(self.upscale_conv2(features)), queries[:, 0, 1]

    def predict(self, features: Tensor, mask_token: Tensor) -> Tensor:
        """SAM's own single mask, as logits (R, 1, 4 H, 4 W)."""
        return torch.einsum("rc,rchw->rhw", self.output_hypernetworks_mlps[0](mask_token), features)[:, None]


class PromptEncoder(SamPromptEncoder):
    """SAM's prompt encoder for R prompts that each have their own boxes, points and mask."""

    def __init__(self, config: SamConfig):
        super().__init__(config)
        self.shared_embedding = PositionalEmbedding(config.vision_config)  # type: ignore[arg-type]  # no dict any more

    def forward(self, prompts: "Prompts") -> "EncodedPrompts":  # type: ignore[override]
        # SAM adds half a pixel, as it counts from the centre of the first pixel where we count from its corner.
        tokens, present, given = [], [], []
        if prompts.points is not None and prompts.labels is not None:
            points, labels = prompts.points.flatten(0, 1)[:, None] - 0.5, prompts.labels.flatten(0, 1)
            tokens.append(self._embed_points(points, labels[:, None], pad=False)[:, 0])
            present.append(labels != PADDING_POINT)
            given.append(present[-1])
            if prompts.boxes is None:
                tokens.append(self.not_a_point_embed.weight.expand(len(labels), 1, -1))
                present.append(torch.ones_like(labels[:, :1], dtype=torch.bool))
                given.append(torch.zeros_like(present[-1]))
        if prompts.boxes is not None:
            boxes = prompts.boxes.flatten(0, 1)
            tokens.append(self._embed_boxes(boxes[:, None] - 0.5)[:, 0])
            present.append(torch.ones_like(boxes[:, :2], dtype=torch.bool))
            given.append(present[-1])
        rows, device = prompts.shape[0] * prompts.shape[1], self.no_mask_embed.weight.device
        if not tokens:
            tokens.append(torch.zeros(rows, 0, self.hidden_size, device=device, dtype=self.no_mask_embed.weight.dtype))
            present.append(torch.zeros(rows, 0, dtype=torch.bool, device=device))
            given.append(present[-1])
        if prompts.masks is None:
            dense = self.no_mask_embed.weight[..., None, None].expand(rows, -1, *self.image_embedding_size)
        else:
            masks, size = prompts.masks.flatten(0, 1)[:, None], [4 * side for side in self.image_embedding_size]
            if list(masks.shape[-2:]) != size:
                masks = F.interpolate(masks, size, mode="bilinear", antialias=True)
            dense = self.mask_embed(masks.to(self.no_mask_embed.weight.dtype))
        return EncodedPrompts(torch.cat(tokens, dim=1), torch.cat(present, dim=1), torch.cat(given, dim=1), dense)

    def image_positions(self) -> Tensor:
        """Encoded positions of the image embeddings, (1, C, H, W)."""
        side, device = self.image_embedding_size[0], self.no_mask_embed.weight.device
        centres = (torch.arange(side, device=device) + 0.5) / side
        grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1)
        return self.shared_embedding(grid).permute(2, 0, 1)[None]


class PositionalEmbedding(SamPositionalEmbedding):
    """SAM's random Fourier features. Their matrix is never trained, so it is a buffer; angles are always float32."""

    def __init__(self, config: SamVisionConfig):
        super().__init__(config)
        matrix = self.positional_embedding.data
        del self.positional_embedding
        self.register_buffer("positional_embedding", matrix)

    def forward(self, input_coords: Tensor, input_shape: tuple[int, int] | None = None) -> Tensor:
        """(..., 2), x and y in [0, 1] or, with `input_shape`, in pixels of it -> (..., C)."""
        matrix = self.positional_embedding
        coordinates = input_coords.float()
        if input_shape is not None:
            coordinates = coordinates / coordinates.new_tensor([input_shape[1], input_shape[0]])
        with torch.autocast(coordinates.device.type, enabled=False):
            angles = 2 * math.pi * (2 * coordinates - 1) @ matrix.float()
        return torch.cat([angles.sin(), angles.cos()], dim=-1).to(matrix.dtype)


@dataclass
class EncodedPrompts:
    """
    R prompts, encoded.

    Args:
        tokens: (R, T, C), points first, then box corners.
        present: (R, T), False where a token is padding.
        given: (R, T), True where a token stands for something that the user gave.
        dense: (R, C, H, W), from mask prompts.
    """

    tokens: Tensor
    present: Tensor
    given: Tensor
    dense: Tensor

    @property
    def mean(self) -> Tensor:
        """Enc_P(P) of Eq. 5: the mean of the given tokens, (R, C); zeros if there is none."""
        given = self.given[..., None].to(self.tokens.dtype)
        return (self.tokens * given).sum(dim=1) / given.sum(dim=1).clamp_min(1)


@dataclass
class Prompts:
    """
    B images with P prompts each, in pixels of `pixel_values`, (0, 0) being the corner of the first pixel.

    Args:
        shape: (B, P).
        boxes: (B, P, 4), x0, y0, x1, y1.
        points: (B, P, N, 2), x, y.
        labels: (B, P, N), 1 inside, 0 outside, -10 padding.
        masks: (B, P, H, W), logits over the square, at any resolution.
    """

    shape: tuple[int, int]
    boxes: Tensor | None
    points: Tensor | None
    labels: Tensor | None
    masks: Tensor | None

    @classmethod
    def check(
        cls,
        batch_size: int,
        boxes: Tensor | None,
        points: Tensor | None,
        labels: Tensor | None,
        masks: Tensor | None,
    ) -> "Prompts":
        """
        Raises:
            ValueError: a shape that is not as stated above, or prompts that disagree in number.
        """
        if points is not None and labels is None:
            labels = torch.ones(points.shape[:-1], dtype=torch.long, device=points.device)
        expected = {
            "input_boxes": (boxes, "(B, P, 4)", 3, (4,)),
            "input_points": (points, "(B, P, N, 2)", 4, (2,)),
            "input_labels": (labels, "(B, P, N)", 3, ()),
            "input_masks": (masks, "(B, P, H, W)", 4, ()),
        }
        shapes = {}
        for name, (tensor, shape, ndim, tail) in expected.items():
            if tensor is None:
                continue
            if tensor.ndim != ndim or (tail and tuple(tensor.shape[-len(tail) :]) != tail):
                raise ValueError(
                    f"Expected {name} of shape {shape}, got {tuple(tensor.shape)}: B images, P prompts, as "
                    "IMedSamProcessor returns them."
                )
            shapes[name] = (tensor.shape[0], tensor.shape[1])
        if any(prompts == 0 for _, prompts in shapes.values()):
            raise ValueError(f"Expected at least one prompt per image, got (images, prompts) {shapes}.")
        if labels is not None and (points is None or labels.shape != points.shape[:-1]):
            raise ValueError(
                f"Expected a label for each point, got input_labels of shape {tuple(labels.shape)} and input_points "
                f"of shape {None if points is None else tuple(points.shape)}."
            )
        if len(set(shapes.values())) > 1 or any(shape[0] != batch_size for shape in shapes.values()):
            raise ValueError(
                f"Expected {batch_size} images with equally many prompts of each kind, got (images, prompts) "
                f"{shapes}: pad them as IMedSamProcessor does."
            )
        return cls(next(iter(shapes.values()), (batch_size, 1)), boxes, points, labels, masks)

    def frame(self, image_size: int, smallest: float = 1 / 8) -> Tensor:
        """
        The frame of each prompt, in [-1, 1] coordinates: the box; without one the bounding box of the points (of those
        inside, if any), or of the mask; without any prompt the whole image.

        Args:
            image_size: side of `pixel_values`.
            smallest: half size of the smallest frame around points or a mask, which may have no extent. Of a box it is
                half a pixel.

        Returns:
            (B P, 4), centre (x, y) and half size (x, y).
        """
        if self.boxes is not None:
            edges, smallest = self.boxes.flatten(0, 1).float(), 1 / image_size
        elif self.points is not None and self.labels is not None:
            labels = self.labels.flatten(0, 1)
            inside = labels == 1
            chosen = torch.where(inside.any(dim=-1, keepdim=True), inside, labels != PADDING_POINT)[..., None]
            points = self.points.flatten(0, 1).float()
            low = points.masked_fill(~chosen, torch.inf).amin(dim=1)
            high = points.masked_fill(~chosen, -torch.inf).amax(dim=1)
            edges = torch.cat([low, high], dim=-1)
        elif self.masks is not None:
            height, width = self.masks.shape[-2:]
            edges = _mask_edges(self.masks.flatten(0, 1) > 0) * image_size
            edges = edges / edges.new_tensor([width, height, width, height])
        else:
            return torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(self.shape[0] * self.shape[1], 4)
        edges = edges.nan_to_num(posinf=0.0, neginf=float(image_size)) * 2 / image_size - 1
        low, high = edges.split(2, dim=-1)
        return torch.cat([(low + high) / 2, ((high - low) / 2).clamp_min(smallest)], dim=-1)


def _mask_edges(masks: Tensor) -> Tensor:
    """Bounding boxes x0, y0, x1, y1 of (R, H, W) boolean masks, (R, 4); the whole mask where it is empty."""
    edges = []
    for mask in masks:
        rows, columns = mask.nonzero(as_tuple=True)
        if len(rows) == 0:
            edges.append(torch.tensor([0, 0, mask.shape[1], mask.shape[0]], device=mask.device))
        else:
            edges.append(torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]))
    return torch.stack(edges).float()
