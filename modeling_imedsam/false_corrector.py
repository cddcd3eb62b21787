"""
The Dual False Corrector of SF-RecSAM (ECCV 2024): where the mean of a mask's samples is uncertain, brightness decides.
It has no parameters and follows any model here; the samples are those of varied prompts or of dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from imedsam.configuration.false_corrector import FalseCorrectorConfig
from imedsam.mask_field import MaskField
from imedsam.uncertainty import ProbabilitySamples

if TYPE_CHECKING:
    from imedsam.modeling_imedsam import IMedSamModel

SampleKind = Literal["prompts", "dropout"]
SAMPLE_KINDS: tuple[SampleKind, ...] = ("prompts", "dropout")


@dataclass
class CorrectedMasks:
    """
    Masks with what they were corrected by, (..., H, W) each.

    Args:
        masks: bool, corrected.
        mean: of the samples, f.
        uncertainty: half the entropy of f in nats, at most ln(2) / 2.
        suspicious: bool, the pixels that could be changed.
    """

    masks: Tensor
    mean: Tensor
    uncertainty: Tensor
    suspicious: Tensor


def correct_false_regions(
    intensities: Tensor, samples: Tensor, corrector: FalseCorrectorConfig | None = None
) -> CorrectedMasks:
    """
    The mask of the samples' mean, in which suspicious pixels are decided anew: background becomes foreground if it is
    brighter than 0 and less than `brightness` times as bright as the mask on average; foreground becomes background if
    it is darker than 0 or brighter than that. Each mask is corrected by itself, and one without a pixel is left alone.

    The mask that is corrected is where the mean exceeds a share of its largest value: of an unsure model, whose
    probabilities nowhere reach 0.5, it is larger than what the model itself calls the mask.

    Args:
        intensities: (..., H, W), grey values as they are: not normalised, since their ratios count and 0 is black.
        samples: (N, ..., H, W), probabilities; the intensities broadcast to one of them.
        corrector: its thresholds; the defaults of [`FalseCorrectorConfig`] without one.

    Raises:
        ValueError: intensities of another size.
    """
    corrector = FalseCorrectorConfig() if corrector is None else corrector
    statistics = ProbabilitySamples(samples)
    mean, uncertainty = statistics.mean, statistics.entropy / 2
    masks = mean > corrector.foreground * mean.amax((-2, -1), keepdim=True)
    suspicious = suspicious_places(uncertainty, corrector.suspicion)
    intensities = _on_the_grid(intensities, mean)
    area = masks.sum((-2, -1), keepdim=True).clamp_min(1)
    limit = corrector.brightness * (intensities * masks).sum((-2, -1), keepdim=True) / area
    missed = suspicious & ~masks & (intensities > 0) & (intensities < limit)
    false = suspicious & masks & ((intensities < 0) | (intensities > limit))
    return CorrectedMasks((masks | missed) & ~false, mean, uncertainty, suspicious)


def _on_the_grid(intensities: Tensor, mean: Tensor) -> Tensor:
    try:
        expanded = intensities.to(mean).expand_as(mean)
    except RuntimeError:
        expanded = None
    if expanded is None or intensities.shape[-2:] != mean.shape[-2:]:
        raise ValueError(
            f"Expected intensities (..., H, W) for masks of {tuple(mean.shape)}, got {tuple(intensities.shape)}: give "
            "the image's grey values on the grid of the masks."
        )
    return expanded


def suspicious_places(uncertainty: Tensor, suspicion: float) -> Tensor:
    """Where (..., H, W) exceeds this share of the way from its smallest to its largest value; nowhere if constant."""
    low, high = (extreme(uncertainty, dim=(-2, -1), keepdim=True) for extreme in (torch.amin, torch.amax))
    return uncertainty > low + suspicion * (high - low)


@torch.no_grad()
def sample_masks(
    model: IMedSamModel,
    image_embeddings: Tensor,
    prompts: Mapping[str, Tensor],
    reshaped_input_sizes: Tensor,
    output_size: Sequence[int],
    region: Tensor | None = None,
    mode: str | None = None,
    kind: SampleKind = "prompts",
    seed: int = 0,
) -> Tensor:
    """
    N = `model.false_corrector.samples` samples of each prompt's masks, as probabilities; the same for the same seed.

    "prompts": N prompts like the one given, decoded in one call. In place of each positive click N are drawn, the
    click itself not being one of them, from a disc around it in the square that the model sees; its radius is a share
    of the shorter side of the box of the mask that the prompt predicts (of all classes' masks together), and 0 where
    that is empty. Sides of boxes move as in training. All stay in the image; negative clicks and mask prompts stay
    where they are. "dropout": N thinned networks of the implicit decoder, see
    [`~imedsam.mask_field.MaskField.dropout_fields`]. All prompts get the same draws, so that a prompt's samples do not
    depend on its companions.

    Args:
        image_embeddings: (B, C, S / patch, S / patch).
        prompts: arguments of `model.get_mask_field`, with P prompts per image.
        reshaped_input_sizes: (B, 2), height and width of each image inside the square.
        output_size, region, mode: as in [`~imedsam.rendering.render`].

    Returns:
        (N, B, P, M, H, W).

    Raises:
        ValueError: another `kind`; "prompts" without boxes or points to vary; "dropout" of a model that has none; a
            model with a learned corrector.
    """
    if kind not in SAMPLE_KINDS:
        raise ValueError(f"Expected samples by one of {', '.join(SAMPLE_KINDS)}, got {kind!r}: choose one.")
    refuse_corrected(model)
    corrector, sizes = model.false_corrector, reshaped_input_sizes
    if kind == "dropout":
        field = model.get_mask_field(image_embeddings, **prompts, reshaped_input_sizes=sizes)
        fields = field.dropout_fields(corrector.samples, seed)
        return torch.stack([sample.render(output_size, region, mode).logits.sigmoid() for sample in fields])
    field = model.get_mask_field(image_embeddings, **prompts, reshaped_input_sizes=sizes)

    def decode(varied: dict[str, Tensor]) -> Tensor:
        varied_field = model.get_mask_field(image_embeddings, **varied, reshaped_input_sizes=sizes)
        return varied_field.render(output_size, region, mode).logits

    return sample_prompts(decode, prompts, field, corrector, model.config.image_size, sizes, seed)


def refuse_corrected(model: IMedSamModel) -> None:
    """
    Raises:
        ValueError: a model with a learned corrector, whose masks are not to be corrected twice.
    """
    if getattr(model.config, "learned_corrector", False):
        place = f", {model.name_or_path}" if model.name_or_path else ""
        raise ValueError(
            f"Expected a model without a learned corrector, got one{place}, whose masks are corrected as they come: "
            "leave correct (--correct) out."
        )


def default_samples(model: IMedSamModel) -> SampleKind:
    """Dropout's where the model has an implicit decoder, else those of varied prompts."""
    # By what it has, since PEFT may wrap it; a convolutional decoder has no dropout.
    return "dropout" if hasattr(model.implicit_decoder, "coarse") else "prompts"


@torch.no_grad()
def sample_prompts(
    decode: Callable[[dict[str, Tensor]], Tensor],
    prompts: Mapping[str, Tensor],
    field: MaskField,
    corrector: FalseCorrectorConfig,
    image_size: int,
    reshaped_input_sizes: Tensor,
    seed: int = 0,
) -> Tensor:
    """
    The probabilities of each varied prompt's masks, (N, B, P, M, H, W).

    Args:
        decode: from prompts, (B, N P, ...), to the logits of their masks, (B, N P, M, H, W).
        prompts, field, corrector, image_size, reshaped_input_sizes, seed: as in `vary_prompts`.
    """
    varied = vary_prompts(prompts, field, corrector, image_size, reshaped_input_sizes, seed)
    return decode(varied).unflatten(1, (corrector.samples, -1)).movedim(1, 0).sigmoid()


@torch.no_grad()
def vary_prompts(
    prompts: Mapping[str, Tensor],
    field: MaskField,
    corrector: FalseCorrectorConfig,
    image_size: int,
    reshaped_input_sizes: Tensor,
    seed: int = 0,
) -> dict[str, Tensor]:
    """
    The varied prompts of `sample_masks`, (B, N P, ...): sample n of prompt p is number n P + p.

    Args:
        field: of the prompts themselves.
        image_size: side of `pixel_values`, in whose pixels the prompts are.
    """
    boxes, points = (
        None if prompts.get(name) is None else prompts[name].float() for name in ("input_boxes", "input_points")
    )
    samples = corrector.samples
    if boxes is None and points is None:
        raise ValueError("Expected boxes or points to vary, got neither: give some, or take dropout samples.")
    generator, limit = torch.Generator().manual_seed(seed), reshaped_input_sizes.flip(-1)[:, None]  # (B, 1, 2)
    varied = {name: prompt.repeat(1, samples, *[1] * (prompt.ndim - 2)) for name, prompt in prompts.items()}
    offsets = 2 * torch.rand(samples, 4, generator=generator) - 1
    if boxes is not None:
        extent = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
        offsets = corrector.box_jitter * offsets.to(boxes)
        moved = boxes + offsets[:, None, None] * extent
        varied["input_boxes"] = _within(moved, limit.repeat(1, 1, 2)).movedim(0, 1).flatten(1, 2)
    if points is not None:
        radius = _shorter_side(field, image_size, reshaped_input_sizes) / corrector.click_radius
        radius = radius[..., None, None].to(points)
        moved = points + radius * _draw_from_disc(samples, points.shape[2], generator).to(points)[:, None, None]
        if (labels := prompts.get("input_labels")) is not None:
            moved = torch.where(labels[..., None] == 1, moved, points)
        varied["input_points"] = _within(moved, limit[:, :, None]).movedim(0, 1).flatten(1, 2)
    return varied


def _draw_from_disc(samples: int, points: int, generator: torch.Generator) -> Tensor:
    """(N, K, 2), evenly from the unit disc; the first points' do not depend on how many there are."""
    angle, share = torch.rand(points, samples, 2, generator=generator).transpose(0, 1).unbind(-1)
    return share.sqrt()[..., None] * torch.stack([(2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()], dim=-1)


def _within(places: Tensor, limit: Tensor) -> Tensor:
    return torch.minimum(places.clamp_min(0), limit.to(places))


def _shorter_side(field: MaskField, side: int, reshaped_input_sizes: Tensor) -> Tensor:
    """Of the masks' boxes, (B, P), in pixels of `pixel_values`."""
    region = torch.full((field.batch_size, 4), -1.0, device=reshaped_input_sizes.device)
    region[:, 2:] = 2 * reshaped_input_sizes.flip(-1) / side - 1
    masks = (field.render((side, side), region).logits > 0).any(dim=2)  # (B, P, S, S), the image alone
    extent = torch.stack([_extent(masks.any(dim=-1)), _extent(masks.any(dim=-2))], dim=-1)
    pixels = extent * reshaped_input_sizes[:, None].to(extent.device) / side
    return pixels.amin(dim=-1)


def _extent(occupied: Tensor) -> Tensor:
    """The length from the first to the last True of (..., N); 0 without one."""
    values = occupied.int()
    return (values.cummax(-1).values * values.flip(-1).cummax(-1).values.flip(-1)).sum(-1)
