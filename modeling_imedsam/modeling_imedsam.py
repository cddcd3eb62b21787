"""I-MedSAM: SAM's encoder with two small adapters, and an implicit field that answers at any coordinate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.configuration.false_corrector import FalseCorrectorConfig
from imedsam.frequency import FrequencyBranch, FrequencyView
from imedsam.image_encoder import IMedSamVisionEncoder
from imedsam.implicit_decoder import ImplicitDecoder, normalise
from imedsam.losses import segmentation_loss, spectral_correlation_loss, uncertainty_guided_loss
from imedsam.mask_field import FieldValues, ImplicitMaskField, InterpolatedMaskField, MaskField
from imedsam.pretrained import IMedSamPreTrainedModel
from imedsam.prompt_fusion import PromptEncoder, PromptFusion, Prompts
from imedsam.tiles import pixel_centres, whole_square
from imedsam.uncertainty import draw_uncertain


@dataclass
class IMedSamOutput(ModelOutput):
    """
    Output of [`IMedSamModel`]. B images, P prompts per image, M masks per prompt: one with `class_labels` or one
    class, else one per class. SAM's own decoder (`implicit_decoder=False`) knows no classes: M is 1.

    Args:
        loss (`Tensor` of shape `()`): with `labels`.
        pred_masks (`Tensor` of shape `(B, P, M, H, W)`):
            Logits over the model's square at `output_size`; a padded prompt's are -100, while its other values are as
            they come. Not rendered with `coordinates`, nor with `labels` unless there is an `output_size`.
        iou_scores (`Tensor` of shape `(B, P, M)`):
            The Dice that each mask is expected to have by its own probabilities p: 2 sum_mask p / (sum p + |mask|).
        coarse_masks (`Tensor` of shape `(B, P, M, H, W)`): the coarse field's logits alone.
        uncertainty (`Tensor` of shape `(B, P, M, H, W)`): variance of the coarse probability.
        point_logits (`Tensor` of shape `(B, P, M, N)`): logits at `coordinates`.
        image_embeddings (`Tensor` of shape `(B, 256, S / patch, S / patch)`): of the encoder, to prompt again.
    """

    loss: Tensor | None = None
    pred_masks: Tensor | None = None
    iou_scores: Tensor | None = None
    coarse_masks: Tensor | None = None
    uncertainty: Tensor | None = None
    point_logits: Tensor | None = None
    image_embeddings: Tensor | None = None


class IMedSamModel(IMedSamPreTrainedModel):
    """
    I-MedSAM (Wei et al., ECCV 2024; arXiv:2311.17081).

    `IMedSamModel(config)` is the base: SAM, with the frequency branch and the implicit decoder at their start, which
    leave the encoder as it is. `add_adapter()` puts the trainable parts on it as a PEFT adapter; `from_sam_pretrained`
    and `from_pretrained` do so by themselves. Boxes and points are in pixels of `pixel_values`, (0, 0) being the upper
    left corner of the upper left pixel; the processor brings them there.
    """

    # Of the loss: Dice's share, and the weight of an object's points in the cross entropy (paper, Eq. 8).
    dice_share, positive_weight = 0.5, 1.0
    # Of the masks, for those who ask for it.
    false_corrector: FalseCorrectorConfig = FalseCorrectorConfig()

    def __init__(self, config: IMedSamConfig):
        super().__init__(config)
        sam = config.sam_config
        self.vision_encoder = self._make_vision_encoder(config)
        self.prompt_encoder = PromptEncoder(sam)
        sam.mask_decoder_config._attn_implementation = config._attn_implementation
        self.mask_decoder = PromptFusion(sam.mask_decoder_config)
        self._add_own_parts(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_masks: Tensor | None = None,
        class_labels: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        reshaped_input_sizes: Tensor | None = None,
        output_size: Sequence[int] | None = None,
        coordinates: Tensor | None = None,
        labels: Tensor | None = None,
        point_areas: Tensor | None = None,
        point_weights: Tensor | None = None,
        num_points: int | None = None,
        coarse_loss_weight: float = 0.5,
        spectral_loss_weight: float = 0.0,
        uncertainty_loss_weight: float = 0.0,
        original_sizes: Tensor | None = None,
    ) -> IMedSamOutput:
        """
        Args:
            pixel_values: (B, 3, S, S), from the processor. This or `image_embeddings`.
            input_boxes, input_points, input_labels, input_masks, class_labels: as in `get_mask_field`.
            prompt_attention_mask: (B, P), False for padded prompts.
            image_embeddings: (B, 256, S / patch, S / patch), from `get_image_embeddings`.
            reshaped_input_sizes: (B, 2), height and width of each image inside a padded square.
            output_size: (height, width) of the masks over the model's square; S x S by default.
            coordinates: (B, P, N, 2), points to supervise; (x, y) in [-1, 1] over the model's square.
            labels: 0 or 1 at the coordinates, (B, P, N), or without coordinates on a grid over the model's square,
                (B, P, H, W). With several classes, `class_labels` says which class a prompt's labels are of.
            point_areas: (B, P, N), areas that the coordinates stand for, equal by default. While training, the share
                of points to refine is a share of the area, as it is at test time.
            point_weights: (B, P, N), weights of the points in the loss, 1 by default; those of mean 1 that are
                proportional to the areas make its means those over the whole square.
            num_points: supervise only so many of the labelled points, drawn by their uncertainty (see
                [`~imedsam.uncertainty.draw_uncertain`]); areas and, if they are given, weights take account of it:
                with weights, such as ones for a grid, the cross entropy is unbiased.
            coarse_loss_weight: weight of the coarse field's loss; the merged output's has the rest.
            spectral_loss_weight: adds this times [`~imedsam.losses.spectral_correlation_loss`] of the merged output,
                which takes all labels of a grid.
            uncertainty_loss_weight: adds this times [`~imedsam.losses.uncertainty_guided_loss`] of the merged output.
            original_sizes: not used; what the processor returns can be passed as it is.
        """
        if pixel_values is not None and image_embeddings is None:
            image_embeddings = self.get_image_embeddings(pixel_values, reshaped_input_sizes)
        elif pixel_values is not None or image_embeddings is None:
            raise ValueError("Expected one of pixel_values and image_embeddings, got both or neither.")
        field = self.get_mask_field(
            image_embeddings,
            input_boxes,
            input_points,
            input_labels,
            input_masks,
            class_labels,
            reshaped_input_sizes,
        )
        shape = (field.batch_size, field.num_prompts)
        if prompt_attention_mask is not None and tuple(prompt_attention_mask.shape) != shape:
            raise ValueError(
                f"Expected prompt_attention_mask of shape (B, P) = {shape}, got {tuple(prompt_attention_mask.shape)}."
            )
        output: dict[str, Tensor] = {}
        if labels is not None:
            grid = labels.shape[-2:]
            if spectral_loss_weight and (coordinates is not None or num_points is not None):
                raise ValueError(
                    "Expected labels on a grid, without coordinates and num_points, for a spectral loss, got points: "
                    "they have no spectrum."
                )
            values, labels, point_weights = self._values_at_labels(
                field, coordinates, labels, point_areas, point_weights, num_points
            )
            loss = self._loss_of_prompts(values, labels, point_weights, coarse_loss_weight)
            if spectral_loss_weight:
                grids = (points.unflatten(-1, grid) for points in (values.logits[:, :, 0], labels))
                spectral = spectral_correlation_loss(*grids)
                loss = loss + spectral_loss_weight * spectral
            if uncertainty_loss_weight:
                guided = uncertainty_guided_loss(values.logits[:, :, 0], labels, point_weights)
                loss = loss + uncertainty_loss_weight * guided
            output["loss"] = _mean_over_prompts(loss, prompt_attention_mask)
            output["point_logits"] = values.logits
        elif coordinates is not None:
            output["point_logits"], _ = field(coordinates)
        if coordinates is None and (labels is None or output_size is not None):
            masks = field.render((self.config.image_size,) * 2 if output_size is None else output_size)
            output["pred_masks"], output["coarse_masks"] = masks.logits, masks.coarse_logits
            output["uncertainty"], output["iou_scores"] = masks.uncertainty, masks.scores
            if prompt_attention_mask is not None:
                padded = ~prompt_attention_mask.bool()[:, :, None, None, None]
                output["pred_masks"] = masks.logits.masked_fill(padded, -100.0)
        return IMedSamOutput(**output, image_embeddings=image_embeddings)

    def _add_own_parts(self, config: Any) -> None:
        """What no SAM has beside its encoder."""
        self.frequency_view: FrequencyView | None = None
        self.frequency_branch: FrequencyBranch | None = None
        if config.frequency_view is not None:
            self.frequency_view = FrequencyView(config.frequency_view, config.frequency_log)
            self.frequency_branch = FrequencyBranch(config)
        self.implicit_decoder = ImplicitDecoder(config) if config.implicit_decoder else None

    def _make_vision_encoder(self, config: Any) -> Any:
        return IMedSamVisionEncoder(config.sam_config.vision_config)

    def get_image_embeddings(self, pixel_values: Tensor, reshaped_input_sizes: Tensor | None = None) -> Tensor:
        """
        (B, 3, S, S) -> (B, 256, S / patch, S / patch), with gradients where they are enabled.

        Args:
            reshaped_input_sizes: (B, 2), height and width of each image inside a padded square. Leave them out where
                images fill it, to compile this as one graph: their values decide what is computed.
        """
        self._check_pixel_values(pixel_values)
        injections = self._injections(pixel_values, reshaped_input_sizes)
        return self.vision_encoder(pixel_values.to(self.dtype), injections)

    def get_mask_field(
        self,
        image_embeddings: Tensor,
        input_boxes: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_masks: Tensor | None = None,
        class_labels: Tensor | None = None,
        reshaped_input_sizes: Tensor | None = None,
    ) -> MaskField:
        """
        Binds the decoder to images and prompts. Without any prompt, each image gets one field of the whole image.

        Args:
            image_embeddings: (B, 256, S / patch, S / patch).
            input_boxes: (B, P, 4), x0, y0, x1, y1 in pixels of `pixel_values`.
            input_points: (B, P, N, 2), x, y in pixels of `pixel_values`.
            input_labels: (B, P, N), 1 inside, 0 outside, -10 padding; all 1 by default.
            input_masks: (B, P, H, W), logits of a previous mask over the model's square, at any resolution.
            class_labels: (B, P), the class to decode for each prompt; all classes by default.
            reshaped_input_sizes: (B, 2), height and width of each image inside a padded square: the share of points
                to refine is one of the image.
        """
        batch_size, side = len(image_embeddings), self.config.image_size // self.config.patch_size
        if image_embeddings.ndim != 4 or tuple(image_embeddings.shape[2:]) != (side, side):
            raise ValueError(
                f"Expected image_embeddings of shape (B, C, {side}, {side}), got {tuple(image_embeddings.shape)}: "
                "they come from get_image_embeddings of this model."
            )
        prompts = Prompts.check(batch_size, input_boxes, input_points, input_labels, input_masks)
        self._check_class_labels(class_labels, prompts.shape)
        encoded = self.prompt_encoder(prompts)
        features, mask_token = self.mask_decoder.fuse(image_embeddings, self.prompt_encoder.image_positions(), encoded)
        if self.implicit_decoder is None or self._adapter_disabled:
            logits = self.mask_decoder.predict(features, mask_token)
            return InterpolatedMaskField(logits.unflatten(0, prompts.shape), features)
        if class_labels is None:
            classes = torch.arange(self.config.num_labels, device=features.device).expand(len(features), -1)
        else:
            classes = class_labels.to(features.device).reshape(-1, 1)
        lattice_region = whole_square(batch_size, features.device)
        if reshaped_input_sizes is not None:
            lattice_region[:, 2:] = 2 * reshaped_input_sizes.to(features.device).flip(-1) / self.config.image_size - 1
        frame = prompts.frame(self.config.image_size).to(features.device)
        return self.bind_decoder(normalise(features), encoded.mean, frame, classes, lattice_region)

    def bind_decoder(
        self, features: Tensor, prompt: Tensor, frame: Tensor, classes: Tensor, lattice_region: Tensor
    ) -> MaskField:
        """The field that the decoder makes of fused prompts, as in [`~imedsam.mask_field.ImplicitMaskField`]."""
        assert self.implicit_decoder is not None  # as `get_mask_field` has seen
        if (pixel_decoder := self.implicit_decoder.pixel_decoder) is not None:
            features = pixel_decoder(features, prompt, frame)
        return ImplicitMaskField(self.implicit_decoder, self.config, features, prompt, frame, classes, lattice_region)

    @torch.no_grad()
    def frequency_ratio(self, pixel_values: Tensor, reshaped_input_sizes: Tensor | None = None) -> Tensor:
        """
        |g f| / |x| per block: how much the frequency branch adds to what the block puts out, (depth,). A branch that
        stays silent proves nothing in an ablation.
        """
        injections = self._injections(pixel_values, reshaped_input_sizes)
        if injections is None:
            raise ValueError(
                "Expected a model with a frequency branch, got frequency_view=None or a disabled adapter."
            )
        hidden_states, ratios = self.vision_encoder.embed(pixel_values.to(self.dtype)), []
        for block, injection in zip(self.vision_encoder.layers, injections, strict=True):
            hidden_states = block(hidden_states)
            ratios.append(injection.norm() / hidden_states.norm())
            hidden_states = hidden_states + injection
        return torch.stack(ratios)

    def _injections(self, pixel_values: Tensor, reshaped_input_sizes: Tensor | None) -> list[Tensor] | None:
        """What the frequency branch adds to the blocks' outputs; None without one."""
        if self.frequency_view is None or self.frequency_branch is None or self._adapter_disabled:
            return None
        # Of the pixels as they are given: half precision would add its rounding noise to every frequency.
        spectrum = self.frequency_view(pixel_values, reshaped_input_sizes).to(self.dtype)
        return self.frequency_branch(self.vision_encoder.embed(spectrum))

    def _values_at_labels(
        self,
        field: MaskField,
        coordinates: Tensor | None,
        labels: Tensor,
        point_areas: Tensor | None,
        point_weights: Tensor | None,
        num_points: int | None,
    ) -> tuple[FieldValues, Tensor, Tensor | None]:
        """The field where the labels are, at the coordinates or on the labels' grid; the labels, and their weights."""
        shape = (field.batch_size, field.num_prompts)
        if coordinates is None:
            if labels.ndim != 4 or tuple(labels.shape[:2]) != shape:
                raise ValueError(
                    f"Expected labels of shape (B, P, H, W) with (B, P) = {shape}, got {tuple(labels.shape)}: "
                    "or give their coordinates."
                )
            square = whole_square(len(labels), labels.device)
            coordinates, labels = pixel_centres(labels.shape[-2:], square)[:, None], labels.flatten(2)
        elif tuple(coordinates.shape[:2]) != shape or labels.shape != coordinates.shape[:-1]:
            raise ValueError(
                f"Expected coordinates (B, P, N, 2) and labels (B, P, N) with (B, P) = {shape}, got "
                f"{tuple(coordinates.shape)} and {tuple(labels.shape)}."
            )
        for name, weights in {"point_areas": point_areas, "point_weights": point_weights}.items():
            if weights is not None and weights.shape != labels.shape:
                raise ValueError(
                    f"Expected a value for each label, got {name} of shape {tuple(weights.shape)} and labels of shape "
                    f"{tuple(labels.shape)}."
                )
        if num_points is not None:
            if num_points < 1:
                raise ValueError(f"Expected num_points of at least 1, got {num_points}: leave it out for all points.")
            chosen, factors = draw_uncertain(field.uncertainty(coordinates)[:, :, 0], num_points)
            coordinates = coordinates.expand(*shape, -1, -1).gather(2, chosen[..., None].expand(-1, -1, -1, 2))
            labels = labels.gather(2, chosen)
            point_areas = factors if point_areas is None else factors * point_areas.gather(2, chosen)
            point_weights = None if point_weights is None else factors * point_weights.gather(2, chosen)
        values = field.values(coordinates, point_areas)
        if values.logits.shape[2] != 1:
            raise ValueError(
                f"Expected class_labels with labels and {values.logits.shape[2]} classes, got none: "
                "say which class the labels of each prompt are of."
            )
        return values, labels, point_weights

    def _loss_of_prompts(
        self, values: FieldValues, labels: Tensor, point_weights: Tensor | None, coarse_loss_weight: float
    ) -> Tensor:
        """(B, P)."""
        labels = labels.to(values.logits.dtype)
        coarse, merged = (
            segmentation_loss(logits[:, :, 0], labels, point_weights, self.dice_share, self.positive_weight)
            for logits in (values.coarse_logits, values.logits)
        )
        return coarse_loss_weight * coarse + (1 - coarse_loss_weight) * merged

    def _check_pixel_values(self, pixel_values: Tensor) -> None:
        size = self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ValueError(
                f"Expected pixel_values of shape (B, 3, {size}, {size}), got {tuple(pixel_values.shape)}: "
                "use IMedSamProcessor with this model's image_size."
            )

    def _check_class_labels(self, class_labels: Tensor | None, shape: tuple[int, int]) -> None:
        if class_labels is None:
            return
        if tuple(class_labels.shape) != shape:
            raise ValueError(f"Expected class_labels of shape (B, P) = {shape}, got {tuple(class_labels.shape)}.")
        if int(class_labels.min()) < 0 or int(class_labels.max()) >= self.config.num_labels:
            raise ValueError(
                f"Expected class_labels in [0, {self.config.num_labels - 1}], got {class_labels.unique().tolist()}: "
                "the background is no class."
            )


def _mean_over_prompts(loss: Tensor, prompt_attention_mask: Tensor | None) -> Tensor:
    """
    The mean over the images of the mean over each image's prompts, (B, P) -> (), so that it does not matter how images
    are spread over processes and accumulation steps of one size.
    """
    present = torch.ones_like(loss) if prompt_attention_mask is None else prompt_attention_mask.to(loss.dtype)
    return ((loss * present).sum(dim=1) / present.sum(dim=1).clamp_min(1)).mean()
