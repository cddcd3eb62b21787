"""Mask fields: logits and uncertainty as functions of a continuous position, bound to images and their prompts."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.implicit_decoder import FineField, ImplicitDecoder, at_least_float32
from imedsam.rendering import RenderedMasks, render
from imedsam.tiles import pixel_centres, position_dtype, split_in_tiles
from imedsam.uncertainty import (
    closed_form_variance,
    dropout_masks,
    monte_carlo_variance,
    selection_threshold,
)

# Prompts of an image whose thresholds are taken at once.
LATTICES_AT_ONCE = 4


@dataclass
class FieldValues:
    """
    Values of a field at N points of each prompt, (B, P, M, N) each.

    Args:
        logits: the coarse field's, replaced by the fine field's where a point is selected.
        coarse_logits: the coarse field's.
        uncertainty: variance of the probability.
    """

    logits: Tensor
    coarse_logits: Tensor
    uncertainty: Tensor


class MaskField(ABC):
    """
    A mask as a function of position. B images with P prompts each; M masks per prompt.

    ```python
    field = model.get_mask_field(model.get_image_embeddings(pixel_values), input_boxes=input_boxes)
    logits, uncertainty = field(coordinates)  # anywhere
    masks = field.render((896, 896)).logits > 0  # on a grid
    ```

    Args:
        batch_size: B.
        num_prompts: P.
        device: of the field's tensors.
    """

    # How it is rendered where that is not said.
    default_mode: str = "adaptive"
    # Whether the points to refine are the most uncertain ones of a rendered grid (the paper's rule).
    selects_on_the_grid: bool = False
    # Whether values are those after training even while the decoder trains.
    evaluating: bool = False
    # (B P, 4), centre and half size of where each prompt's object is, if that is known.
    frame: Tensor | None = None

    def __init__(self, batch_size: int, num_prompts: int, device: torch.device):
        self.batch_size, self.num_prompts, self.device = batch_size, num_prompts, device

    @abstractmethod
    def values(self, coordinates: Tensor, point_areas: Tensor | None = None) -> FieldValues:
        """
        The field at some points: finite numbers, each of its point alone.

        Args:
            coordinates: (B, P, N, 2) or, for the same points of every prompt, (B, 1, N, 2) or (1, 1, N, 2); (x, y) in
                [-1, 1] over the model's square.
            point_areas: (B, P, N), only while training: areas that the points stand for, equal by default.
        """

    @abstractmethod
    def at(self, rows: Tensor) -> "MaskField":
        """The fields of some of the B P prompts, `rows`, as those of so many images with one prompt each."""

    def eval(self) -> "MaskField":
        """This field as it is after training."""
        field = self.as_new()
        field.evaluating = True
        return field

    def as_new(self) -> "MaskField":
        """This field without what it has found out while it was asked."""
        return copy(self)

    def known_lattice(self, region: Tensor) -> Tensor | None:
        """
        Logits, coarse logits and uncertainty at the pixel centres of a square grid over a rectangle, (B, 4), if this
        field has them anyway: (3, B P, M, S, S).
        """
        return None

    def dropout_fields(self, samples: int, seed: int = 0) -> Sequence["MaskField"]:
        """
        This field as so many thinned networks see it, always the same ones for a seed.

        Raises:
            ValueError: a field without dropout.
        """
        raise ValueError(
            "Expected the field of an implicit decoder for dropout samples, got one without dropout: vary the prompts."
        )

    def selecting_from(self, uncertainty: Tensor) -> "MaskField":
        """This field, refined at the most uncertain ones of a grid's points, (B, P, M, N)."""
        return self

    def uncertainty(self, coordinates: Tensor) -> Tensor:
        """The uncertainty alone, (B, P, M, N), at coordinates as in `values`."""
        return self.values(coordinates).uncertainty

    def __call__(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and uncertainty at points (x, y) in [-1, 1], shaped as for `values`; (B, P, M, N) each."""
        shapes = [(self.batch_size, self.num_prompts), (self.batch_size, 1), (1, 1)]
        if coordinates.ndim != 4 or coordinates.shape[-1] != 2 or tuple(coordinates.shape[:2]) not in shapes:
            raise ValueError(
                f"Expected coordinates of shape (B, P, N, 2) with (B, P) = {shapes[0]}, or {shapes[1]} or {shapes[2]} "
                f"for the same points of every prompt, got {tuple(coordinates.shape)}."
            )
        values = self.values(coordinates)
        return values.logits, values.uncertainty

    def render(
        self, output_size: Sequence[int], region: Tensor | None = None, mode: str | None = None
    ) -> RenderedMasks:
        """
        Evaluates the field on a grid of pixel centres, see [`~imedsam.rendering.render`].

        Args:
            output_size: (height, width).
            region: (4,) or (B, 4), the rectangle x0, y0, x1, y1 in [-1, 1] to render; the whole square by default.
            mode: "exact", or "adaptive": only near the boundaries; `default_mode` by default.
        """
        return render(self, output_size, region, mode)


class ImplicitMaskField(MaskField):
    """
    The coarse and fine fields of the implicit decoder. The prompts' part of the first layers is multiplied, and the
    rows of the coarse logits are taken, when a field is made; its threshold, and with it the values where adaptive
    rendering begins, is taken when it is first used. After a change of the weights or of the precision, get a new
    field.

    Args:
        decoder: the networks.
        config: dropout, uncertainty and selection.
        features: (B P, 32, H, W), one map per prompt.
        prompt: (B P, E), the prompts' embeddings.
        frame: (B P, 4), centre and half size of the prompts' frames.
        classes: (B P, M), the classes to decode.
        lattice_region: (B, 4), the rectangle x0, y0, x1, y1 in [-1, 1] on which the threshold is taken: the image.
    """

    frame: Tensor

    def __init__(
        self,
        decoder: ImplicitDecoder,
        config: IMedSamConfig,
        features: Tensor,
        prompt: Tensor,
        frame: Tensor,
        classes: Tensor,
        lattice_region: Tensor,
    ):
        super().__init__(len(lattice_region), len(frame) // len(lattice_region), frame.device)
        self.lattice_region = lattice_region
        self.decoder, self.config = decoder, config
        self.features, self.prompt, self.frame, self.classes = features, prompt, frame, classes
        self.coarse_part, self.fine_part = decoder.prompt_parts(prompt)
        head = decoder.coarse.head
        self.coarse_head = head.weight[:, 0][classes], head.bias[:, 0][classes]  # of the logits, (R, M, D) and (R, M)
        if config.selection == "top_k" and decoder.fine is not None:
            self.selects_on_the_grid, self.default_mode = True, "exact"
        self.dropout_masks: Tensor | None = None  # of the Monte Carlo passes, (T, D)
        if config.uncertainty == "monte_carlo":
            weight = at_least_float32(head.weight)
            self.dropout_masks = dropout_masks(
                config.monte_carlo_samples, weight.shape[-1], config.dropout, weight.device, weight.dtype
            )
        self.thinning: Tensor | None = None  # the dropout mask of one pass, (D,), in the place of none
        self._threshold: Tensor | None = None
        self._lattice: Tensor | None = None

    @property
    def training(self) -> bool:
        """Whether values are a training step's: one dropout pass, and of the points asked for a share refined."""
        return self.decoder.training and not self.evaluating

    @property
    def threshold(self) -> Tensor:
        """
        tau, (B P, M): the fine field decides where the uncertainty exceeds it. Taken once, on a fixed lattice, so that
        the field at a point does not depend on which other points are asked for.
        """
        if self._threshold is None:
            with without_gradients(self.device):
                self._threshold, self._lattice = self._take_lattice()
        return self._threshold

    def _take_lattice(self) -> tuple[Tensor, Tensor]:
        """The threshold, (B P, M), and the values that it is taken from, (3, B P, M, S, S)."""
        if (fine := self.decoder.fine) is None:
            raise ValueError("Expected a field with a selection for a threshold, got selection=None.")
        side, thresholds, values = self.config.selection_lattice, [], []
        lattices = pixel_centres((side, side), self.lattice_region.to(position_dtype(self.device)))
        # The prompts of an image share its lattice. Hidden vectors of all of it are kept for some of them at a time.
        for image, prompts in enumerate(torch.arange(len(self.frame), device=self.device).split(self.num_prompts)):
            for rows in prompts.split(LATTICES_AT_ONCE):
                part = self._rows(rows)
                part.evaluating = True
                tiles = [part._coarse(tile) for tile in split_in_tiles(lattices[image, None], len(rows))]
                encoded, hidden, prior, coarse, uncertainty = (
                    torch.cat(parts, dim=dim)
                    for parts, dim in zip(zip(*tiles, strict=True), (1, 1, -1, -1, -1), strict=True)
                )
                threshold = selection_threshold(uncertainty, self.config.selection_share)
                logits = part._refine(fine, encoded, hidden, prior, coarse, uncertainty > threshold[..., None])
                thresholds.append(threshold)
                values.append(torch.stack([logits, coarse, uncertainty]))
        return torch.cat(thresholds), torch.cat(values, dim=1).unflatten(-1, (side, side))

    def known_lattice(self, region: Tensor) -> Tensor | None:
        if self._lattice is None or not torch.allclose(region.to(self.lattice_region), self.lattice_region, atol=1e-6):
            return None
        return self._lattice

    def eval(self) -> "ImplicitMaskField":
        if not self.training:
            return self  # so that the threshold is taken once
        return cast(ImplicitMaskField, super().eval())

    def as_new(self) -> "ImplicitMaskField":
        field = copy(self)
        field._threshold = field._lattice = None
        return field

    def at(self, rows: Tensor) -> "ImplicitMaskField":
        field = self._rows(rows)
        # A field that ranks the grid's pixels takes its threshold there, unless it has got one.
        if (
            self.decoder.fine is not None
            and not self.training
            and not (self.selects_on_the_grid and self._threshold is None)
        ):
            field._threshold = self.threshold[rows]
            field._lattice = None if self._lattice is None else self._lattice[:, rows]
        return field

    def _rows(self, rows: Tensor) -> "ImplicitMaskField":
        field = self.as_new()
        field.batch_size, field.num_prompts = len(rows), 1
        field.features, field.prompt, field.frame, field.classes, field.coarse_part = (
            values[rows] for values in (self.features, self.prompt, self.frame, self.classes, self.coarse_part)
        )
        field.fine_part = None if self.fine_part is None else self.fine_part[rows]
        field.coarse_head = self.coarse_head[0][rows], self.coarse_head[1][rows]
        field.lattice_region = self.lattice_region[rows // self.num_prompts]
        return field

    def dropout_fields(self, samples: int, seed: int = 0) -> list["ImplicitMaskField"]:
        """
        Passes with dropout as in training: the coarse head, and the fine field behind it, see the hidden vectors
        through one mask for all points. Uncertainty, and with it which points are refined, is that of this field.
        """
        width, fields = self.coarse_head[0].shape[-1], []
        for mask in dropout_masks(samples, width, self.config.dropout, self.device, torch.float32, seed):
            fields.append(self.as_new())
            fields[-1].thinning = mask
        return fields

    def selecting_from(self, uncertainty: Tensor) -> "ImplicitMaskField":
        field = self.as_new()
        field._threshold = selection_threshold(uncertainty.flatten(0, 1), self.config.selection_share)
        return field

    def values(self, coordinates: Tensor, point_areas: Tensor | None = None) -> FieldValues:
        encoded, hidden, prior, coarse, uncertainty = self._coarse(coordinates.flatten(0, 1))
        logits = coarse
        if (fine := self.decoder.fine) is not None:
            if self.training:
                areas = None if point_areas is None else point_areas.flatten(0, 1)[:, None]
                threshold = selection_threshold(uncertainty, self.config.selection_share, areas)
            else:
                threshold = self.threshold
            logits = self._refine(fine, encoded, hidden, prior, coarse, uncertainty > threshold[..., None])
        shape = (self.batch_size, self.num_prompts)
        return FieldValues(*(values.unflatten(0, shape) for values in (logits, coarse, uncertainty)))

    def uncertainty(self, coordinates: Tensor) -> Tensor:
        with without_gradients(self.device):
            points = coordinates.flatten(0, 1)
            _, hidden = self._trunk(points)
            uncertainty = self._uncertainty(hidden, self._coarse_logits(hidden, self._prior(points)))
        return uncertainty.unflatten(0, (self.batch_size, self.num_prompts))

    def _coarse(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """
        The coarse field at (R, N, 2), or (G, N, 2) for R / G prompts each: encoded points (R, N, C), hidden vectors
        after dropout (R, N, D), what both fields' outputs are added to, logits and uncertainty (R, M, N). While
        training, and of one of the `dropout_fields`, the logits are one dropout pass, otherwise the pass without
        dropout.
        """
        encoded, hidden = self._trunk(points)
        prior = self._prior(points)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
            logits = self._coarse_logits(hidden, prior)
        uncertainty = self._uncertainty(hidden, logits)
        if self.training:
            hidden = F.dropout(hidden, self.config.dropout)
            logits = self._coarse_logits(hidden, prior)
        elif self.thinning is not None:
            hidden = hidden * self.thinning.to(hidden.dtype)
            logits = self._coarse_logits(hidden, prior)
        return encoded, hidden, prior, logits, uncertainty

    def _prior(self, points: Tensor) -> Tensor:
        """What the prompt's frame says by itself, (R, M, N), in float32 at least; zeros without such a part."""
        points = points.to(torch.promote_types(self.features.dtype, torch.float32))
        if (ellipse := self.decoder.ellipse) is None:
            return points.new_zeros(*self.classes.shape, points.shape[1])
        return ellipse(points, self.frame, self.classes)

    def _trunk(self, points: Tensor) -> tuple[Tensor, Tensor]:
        encoded, part = self.decoder.encode(points, self.features, self.frame), self.coarse_part
        return encoded, self.decoder.coarse(encoded, part[0] if len(part) == 1 else part[:, None])

    def _coarse_logits(self, hidden: Tensor, prior: Tensor) -> Tensor:
        """Of hidden vectors (R, N, D), (R, M, N), in float32 at least."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = at_least_float32(hidden)
            weight, bias = (values.to(hidden.dtype) for values in self.coarse_head)
            return weight @ hidden.transpose(1, 2) + bias[..., None] + prior

    @torch.no_grad()
    def _uncertainty(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Of hidden vectors (R, N, D) before dropout and their logits, (R, M, N), in float32 at least."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = at_least_float32(hidden)
            weight = self.coarse_head[0].to(hidden.dtype)
            if self.dropout_masks is not None:
                return monte_carlo_variance(hidden, logits, weight, self.dropout_masks)
            return closed_form_variance(hidden, logits, weight, self.config.dropout)

    def _refine(
        self, fine: FineField, encoded: Tensor, hidden: Tensor, prior: Tensor, coarse: Tensor, selected: Tensor
    ) -> Tensor:
        """The fine field's logits where `selected` (R, M, N), the coarse ones elsewhere."""
        rows, masks, points = selected.nonzero(as_tuple=True)
        classes, numbers = self.classes[rows, masks], rows * selected.shape[-1] + points
        encoded, hidden = (vectors.flatten(0, 1).index_select(0, numbers) for vectors in (encoded, hidden))
        coarse_features = self.decoder.coarse.head(hidden, classes, slice(1, None))
        refined = fine(encoded, coarse_features, self.fine_part, rows, classes) + prior[rows, masks, points]
        return coarse.index_put((rows, masks, points), refined.to(coarse.dtype))


class InterpolatedMaskField(MaskField):
    """
    A grid of logits, interpolated bilinearly: SAM's own mask decoder seen as a field. Its uncertainty is the variance
    p (1 - p) of the label itself. It is rendered exactly by default: a value costs no more than to know where to ask.

    Args:
        logits: (B, P, M, H, W).
        features: (B P, C, H, W), of which a decoder made the logits, for those who look at them again.
    """

    default_mode = "exact"

    def __init__(self, logits: Tensor, features: Tensor | None = None):
        super().__init__(logits.shape[0], logits.shape[1], logits.device)
        self.logits, self.features = logits, features

    def at(self, rows: Tensor) -> "InterpolatedMaskField":
        return InterpolatedMaskField(self.logits.flatten(0, 1)[rows, None])

    def values(self, coordinates: Tensor, point_areas: Tensor | None = None) -> FieldValues:
        points = coordinates.expand(self.batch_size, self.num_prompts, -1, -1).flatten(0, 1)
        grid = at_least_float32(self.logits.flatten(0, 1))
        sampled = F.grid_sample(grid, points[:, :, None].to(grid.dtype), padding_mode="border", align_corners=False)
        logits = sampled[..., 0].unflatten(0, (self.batch_size, self.num_prompts))
        probability = logits.detach().sigmoid()
        return FieldValues(logits, logits, probability * (1 - probability))


@contextmanager
def without_gradients(device: torch.device) -> Iterator[None]:
    """
    `no_grad`, and apart from autocast's cache: weights that it casts here have no gradient, and a pass that needs one
    must not find them.
    """
    kind = device.type
    with torch.no_grad(), torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
        yield
