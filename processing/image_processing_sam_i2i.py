"""Slices of a volume to SAM-I2I's `pixel_values`, and what it makes of them back to the slices' pixels and units."""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from imedsam.processing.image_processing_imedsam import SAVED_KEYS, as_list, check_channels, read_channels_first


class SamI2IImageProcessorKwargs(TypedDict, total=False):
    """The options of `SamI2IImageProcessor`; `from_pretrained` lets a caller override each of them."""

    size_divisor: int
    percentiles: Sequence[float]
    image_mean: Sequence[float]
    image_std: Sequence[float]


class SamI2IImageProcessor(BaseImageProcessor):
    """
    Scales slices by the range of the volume that they are of, and pads them at the bottom and at the right.

    MR has no units: the same tissue differs in value from scanner to scanner, not within a volume. So what is scaled
    to [0, 1] is the range between two percentiles of a volume, and the slices of one call are taken for one volume
    unless its `intensity_range` is given.

    Args:
        size_divisor: heights and widths are padded to multiples of it; `SamI2IConfig.size_divisor` of the model.
        percentiles: of a volume's values that become 0 and 1; what lies outside is clipped.
        image_mean, image_std: per channel, in intensities [0, 1]. SAM 2's (ImageNet's) unless given.

    Raises:
        ValueError: for an option that is unknown or has no meaning.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = SamI2IImageProcessorKwargs  # type: ignore[assignment]

    def __init__(
        self,
        size_divisor: int = 8,
        percentiles: Sequence[float] = (0.0, 99.9),
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
        **kwargs,
    ):
        if unknown := sorted(set(kwargs) - SAVED_KEYS):
            options = ", ".join(SamI2IImageProcessorKwargs.__annotations__)
            raise ValueError(f"Expected options among {options}, got {', '.join(unknown)}: check the spelling.")
        super().__init__(**kwargs)
        if not isinstance(size_divisor, int) or size_divisor < 1:
            raise ValueError(f"Expected size_divisor as a positive integer, got {size_divisor!r}.")
        if len(percentiles) != 2 or not 0 <= percentiles[0] < percentiles[1] <= 100:
            raise ValueError(f"Expected percentiles=(low, high) with 0 <= low < high <= 100, got {percentiles}.")
        self.size_divisor = size_divisor
        self.percentiles = (float(percentiles[0]), float(percentiles[1]))
        self.image_mean = check_channels(image_mean, "image_mean")
        self.image_std = check_channels(image_std, "image_std")
        if min(self.image_std) <= 0:
            raise ValueError(f"Expected image_std above 0, got {self.image_std}: use 1.0 to leave a channel unscaled.")

    def preprocess(
        self,
        images: Any,
        labels: Any = None,
        intensity_range: Sequence[float] | None = None,
        label_range: Sequence[float] | None = None,
        return_tensors: str = "pt",
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images: a grey slice of the source contrast, or a list of slices of one volume: (H, W) numpy arrays or
                torch tensors of any real type, or PIL images of 8, 16 or 32 bits. Of equal colours one is taken.
            labels: the same slices of the target contrast.
            intensity_range: (low, high) of the images' volume, if these are not all of its slices: of
                `get_intensity_range`.
            label_range: the same of the labels'.

        Returns:
            `pixel_values` (B, 3, H, W) float32, normalised; `original_sizes` (B, 2) int64, (height, width) without
            padding; `intensity_range` (2,) float64. With labels also `labels` (B, 1, H, W) float32 in [0, 1], 0 in the
            padding, and `label_range`.

        Raises:
            ValueError: slices that are empty, not grey or not finite, and labels of other sizes.
            TypeError: something that is no image, and an unknown option.
        """
        if kwargs:
            raise TypeError(
                "Expected only labels, intensity_range, label_range and return_tensors as options of a call, got "
                f"{', '.join(sorted(kwargs))}: set the others when the processor is made."
            )
        slices = _read_slices(images, "image")
        sizes = [tuple(values.shape) for values in slices]
        padded = [-(-max(side) // self.size_divisor) * self.size_divisor for side in zip(*sizes, strict=True)]
        low, high = self.get_intensity_range(slices) if intensity_range is None else _check_range(intensity_range)
        grey = torch.stack([_pad(_scale(values, low, high), padded) for values in slices])
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        data: dict[str, Any] = {
            "pixel_values": (grey[:, None] - mean[:, None, None]) / std[:, None, None],
            "original_sizes": torch.tensor(sizes),
            "intensity_range": torch.tensor([low, high], dtype=torch.float64),
        }
        if labels is not None:
            targets = _read_slices(labels, "label")
            label_sizes = [tuple(values.shape) for values in targets]
            if label_sizes != sizes:
                raise ValueError(
                    f"Expected labels of the images' sizes {sizes}, got {label_sizes}: "
                    "the two contrasts have to lie on one grid."
                )
            low, high = self.get_intensity_range(targets) if label_range is None else _check_range(label_range)
            data["labels"] = torch.stack([_pad(_scale(values, low, high), padded) for values in targets])[:, None]
            data["label_range"] = torch.tensor([low, high], dtype=torch.float64)
        return BatchFeature(data, tensor_type=return_tensors)

    def get_intensity_range(self, slices: Any) -> tuple[float, float]:
        """The two percentiles of all slices of a volume together."""
        values = np.concatenate([values.ravel() for values in _read_slices(slices, "slice")])
        low, high = np.percentile(values, self.percentiles)
        return float(low), float(high)

    def post_process_reconstruction(
        self, reconstruction: torch.Tensor, original_sizes: Any, intensity_range: Sequence[float] = (0.0, 1.0)
    ) -> list[torch.Tensor]:
        """
        The way back: without padding, and in the units of a range. It undoes `preprocess` exactly, but for what was
        clipped there: labels go back to the integers that they were, of up to 16 bits, as they are float32.

        Args:
            reconstruction: (B, 1, H, W) in [0, 1], as the model gives it.
            original_sizes: (B, 2) as `preprocess` returned them.
            intensity_range: (low, high) that 0 and 1 stand for.

        Returns:
            B tensors (H, W), float64.
        """
        sizes = torch.as_tensor(original_sizes).reshape(-1, 2).tolist()
        if reconstruction.ndim != 4 or reconstruction.shape[1] != 1 or len(sizes) != len(reconstruction):
            raise ValueError(
                f"Expected a reconstruction of shape (batch, 1, height, width) and a size for each, got "
                f"{tuple(reconstruction.shape)} and {len(sizes)} sizes: pass both as they were returned."
            )
        low, high = _check_range(intensity_range)
        values = low + reconstruction[:, 0].double() * (high - low)
        return [image[:height, :width] for image, (height, width) in zip(values, sizes, strict=True)]


def _read_slices(slices: Any, name: str) -> list[np.ndarray]:
    """(H, W) each, in their own type."""
    return [_read_grey(item, f"{name} {index}") for index, item in enumerate(as_list(slices))]


def _read_grey(image: Any, name: str) -> np.ndarray:
    planes = read_channels_first(image, name)
    if 0 in planes.shape:
        raise ValueError(f"Expected {name} to have pixels, got {planes.shape[1]} rows and {planes.shape[2]} columns.")
    if planes.dtype.kind not in "biuf":
        raise TypeError(f"Expected {name} of bools, integers or floats, got {planes.dtype}: convert its values first.")
    if planes.dtype.kind == "f" and not np.isfinite(planes).all():
        raise ValueError(f"Expected finite values in {name}, got NaN or infinity: replace them first (np.nan_to_num).")
    if len(planes) > 1 and (planes[:3] != planes[0]).any():
        raise ValueError(f"Expected {name} to be grey, got colours: choose a channel, or convert it.")
    return planes[0]


def _scale(values: np.ndarray, low: float, high: float) -> torch.Tensor:
    """To [0, 1], float32; a volume of one value is 0."""
    scaled = (values.astype(np.float64) - low) / ((high - low) or 1.0)
    return torch.from_numpy(np.clip(scaled, 0, 1).astype(np.float32))


def _pad(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return F.pad(image, (0, size[1] - image.shape[1], 0, size[0] - image.shape[0]))


def _check_range(values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2:
        raise ValueError(f"Expected a range (low, high), got {len(values)} values.")
    low, high = (float(value) for value in values)
    if not np.isfinite([low, high]).all() or low > high:
        raise ValueError(f"Expected a range (low, high) with low <= high, both finite, got {(low, high)}.")
    return low, high
