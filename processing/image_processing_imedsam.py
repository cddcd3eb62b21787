"""Images to the model's square and masks back to the user's pixels: the geometry and the intensities of I-MedSAM.

Frames, all continuous and in the order (x, y); sizes are (height, width):

- User coordinates: pixels of the user's image. (0, 0) is the top-left corner of the image, (W, H) its bottom-right
  corner, and the centre of the pixel in column j and row i is (j + 0.5, i + 0.5). The box around a mask is
  (xmin, ymin, xmax + 1, ymax + 1). Going to another size is a multiplication without half-pixel terms.
- Model pixels: the same frame in the square `pixel_values` of S x S pixels.
- Model coordinates: x = 2 u / S - 1 in [-1, 1] for u in model pixels (pixel centres, `align_corners=False`).

The image fills the square (`resize_mode="stretch"`) or keeps its proportions in the top-left part, with zeros at the
bottom and at the right (`resize_mode="longest_side"`).
"""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

RESIZE_MODES = ("stretch", "longest_side")
# Keys that transformers writes into the saved file beside the options.
SAVED_KEYS = {"image_processor_type", "processor_class", "feature_extractor_type", "auto_map"}


class IMedSamImageProcessorKwargs(TypedDict, total=False):
    """The options of `IMedSamImageProcessor`; `from_pretrained` lets a caller override each of them."""

    size: dict[str, int]
    resize_mode: str
    image_mean: Sequence[float]
    image_std: Sequence[float]
    window: Sequence[float] | None


class IMedSamImageProcessor(BaseImageProcessor):
    """Turns images of any kind into `pixel_values`, and predicted masks into masks of the user's size.

    Args:
        size: `{"height": S, "width": S}`, the square that the model sees.
        resize_mode: "stretch" or "longest_side", see the module's docstring.
        image_mean, image_std: per channel, in intensities [0, 1]. SAM's (ImageNet's) unless given.
        window: (low, high) in the image's own units, for instance Hounsfield units. It is mapped to [0, 1] and what
            lies outside is clipped. Without one, uint8 is divided by 255, uint16 by 65535, floats are taken as [0, 1].

    Raises:
        ValueError: for an option that is unknown or has no meaning.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = IMedSamImageProcessorKwargs  # type: ignore[assignment]

    def __init__(
        self,
        size: dict[str, int] | int = 384,
        resize_mode: str = "stretch",
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
        window: Sequence[float] | None = None,
        **kwargs,
    ):
        if unknown := sorted(set(kwargs) - SAVED_KEYS):
            options = ", ".join(IMedSamImageProcessorKwargs.__annotations__)
            raise ValueError(f"Expected options among {options}, got {', '.join(unknown)}: check the spelling.")
        if resize_mode not in RESIZE_MODES:
            raise ValueError(f"Expected resize_mode to be one of {RESIZE_MODES}, got {resize_mode!r}: choose one.")
        super().__init__(**kwargs)
        side = _check_size(size)
        self.size = {"height": side, "width": side}
        self.resize_mode = resize_mode
        self.image_mean = check_channels(image_mean, "image_mean")
        self.image_std = check_channels(image_std, "image_std")
        if min(self.image_std) <= 0:
            raise ValueError(f"Expected image_std above 0, got {self.image_std}: use 1.0 to leave a channel unscaled.")
        self.window = None if window is None else _check_window(window)

    def preprocess(
        self, images: Any, window: Sequence[float] | None = None, return_tensors: str = "pt", **kwargs
    ) -> BatchFeature:
        """Reads, resizes, normalises and pads images; `processor(images)` calls this.

        Args:
            images: one image or a list of them. PIL in any mode; numpy (H, W), (H, W, 1 | 3 | 4) or (3, H, W) where
                the last axis cannot be the channels; torch (H, W) or (1 | 3 | 4, H, W). Bool, uint8, uint16, floats
                in [0, 1], and with a window all real types. Grey becomes three equal channels, alpha is dropped.
            window: (low, high) for this call instead of the processor's own.

        Returns:
            `pixel_values` (B, 3, S, S) float32, the padding exactly 0; `original_sizes` (B, 2) int64, the (height,
            width) in the user's pixels; `reshaped_input_sizes` (B, 2) int64, the image's part of the square.

        Raises:
            ValueError: for an image that is empty, not finite, or whose values have no known scale.
            TypeError: for something that is no image, and for an option that cannot change from call to call.
        """
        if kwargs:
            raise TypeError(
                f"Expected only `window` and `return_tensors` as options of a call, got {', '.join(sorted(kwargs))}: "
                "the way back to the user's pixels needs the rest, so set it when the processor is made."
            )
        window = self.window if window is None else _check_window(window)
        values = [_read_intensities(image, window, f"image {i}") for i, image in enumerate(as_list(images))]
        original_sizes = [(value.shape[-2], value.shape[-1]) for value in values]
        reshaped_input_sizes = [self.get_reshaped_size(*size) for size in original_sizes]
        pixel_values = [
            self.pad(self.normalize(self.resize(value, size)))
            for value, size in zip(values, reshaped_input_sizes, strict=True)
        ]
        data = {
            "pixel_values": torch.stack(pixel_values),
            "original_sizes": torch.tensor(original_sizes),
            "reshaped_input_sizes": torch.tensor(reshaped_input_sizes),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def get_grey_values(self, images: Any, window: Sequence[float] | None = None) -> list[torch.Tensor]:
        """Intensities as `preprocess` reads them, before they are resized and normalised: the channels' mean.

        Returns:
            Per image (H, W) float32 in [0, 1], at its own size.
        """
        window = self.window if window is None else _check_window(window)
        read = [_read_intensities(image, window, f"image {i}") for i, image in enumerate(as_list(images))]
        return [values.mean(dim=0) for values in read]

    def get_reshaped_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) in model pixels that an image of the given size takes in the square."""
        side = self.size["height"]
        if self.resize_mode == "stretch":
            return side, side
        scale = side / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def resize(self, planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(C, H, W) float32 to (C, *size): bilinear, smoothed when it shrinks, never through 8 bits."""
        return F.interpolate(planes[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]

    def normalize(self, planes: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """(1 | 3, H, W) in [0, 1] to (3, H, W): (planes - image_mean) / image_std."""
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        return (planes - mean[:, None, None]) / std[:, None, None]

    def pad(self, planes: torch.Tensor) -> torch.Tensor:
        """(C, h, w) to (C, S, S) with zeros at the bottom and at the right."""
        side = self.size["height"]
        return F.pad(planes, (0, side - planes.shape[-1], 0, side - planes.shape[-2]))

    def get_image_regions(self, original_sizes: Any, reshaped_input_sizes: Any) -> torch.Tensor:
        """Each image's rectangle (x0, y0, x1, y1) in model coordinates [-1, 1]: (B, 4) float32.

        It is (-1, -1, 1, 1) when the image fills the square. A field rendered over it covers the user's image exactly.
        """
        _, reshaped = _check_sizes(original_sizes, reshaped_input_sizes)
        side = self.size["height"]
        return torch.tensor([(-1.0, -1.0, 2 * width / side - 1, 2 * height / side - 1) for height, width in reshaped])

    def post_process_masks(
        self,
        pred_masks: torch.Tensor,
        original_sizes: Any,
        reshaped_input_sizes: Any,
        output_sizes: Any = None,
        mask_threshold: float = 0.0,
        binarize: bool = True,
    ) -> list[torch.Tensor]:
        """Brings predicted masks to the user's pixels.

        The masks are interpolated bilinearly at the centres of the output's pixels, without smoothing, so the padding
        is left out exactly, also where its border falls between two mask pixels.

        Args:
            pred_masks: (B, P, M, h, w) logits that cover the square at any resolution.
            original_sizes, reshaped_input_sizes: (B, 2) as `preprocess` returned them.
            output_sizes: B pairs (H, W), each of which covers the whole image; the original sizes unless given.
            mask_threshold: a logit; what lies above belongs to the mask.

        Returns:
            B tensors (P, M, H, W), bool when `binarize`, else float32 logits.

        Raises:
            ValueError: for masks of another shape, and for numbers of images that disagree.
        """
        if pred_masks.ndim != 5:
            raise ValueError(
                f"Expected pred_masks of shape (batch, prompts, masks, height, width), got {tuple(pred_masks.shape)}: "
                "pass the model's output as it is."
            )
        original, _ = _check_sizes(original_sizes, reshaped_input_sizes, len(pred_masks))
        outputs = original if output_sizes is None else _check_sizes(output_sizes, original, len(pred_masks))[0]
        regions = self.get_image_regions(original_sizes, reshaped_input_sizes)
        logits = [_sample(*item) for item in zip(pred_masks.float(), regions.tolist(), outputs, strict=True)]
        return [mask > mask_threshold for mask in logits] if binarize else logits

    def post_process_label_map(
        self,
        pred_masks: torch.Tensor,
        original_sizes: Any,
        reshaped_input_sizes: Any,
        class_labels: torch.Tensor | None = None,
        output_sizes: Any = None,
        prompt_attention_mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """One label per pixel: 0 is the background, k + 1 stands for class k.

        A pixel takes the class of its highest logit over all prompts and classes if that logit is above 0 (a
        probability above 0.5). The class is the index on the M axis if M > 1, else the prompt's class label, else 0.

        Args:
            pred_masks, original_sizes, reshaped_input_sizes, output_sizes: as in `post_process_masks`.
            class_labels: (B, P) int64, the class that each prompt asked for.
            prompt_attention_mask: (B, P) bool, False for padded prompts, which then have no say.

        Returns:
            B tensors (H, W) int64.
        """
        masks = self.post_process_masks(
            pred_masks, original_sizes, reshaped_input_sizes, output_sizes=output_sizes, binarize=False
        )
        num_prompts, num_masks = pred_masks.shape[1:3]
        label_maps = []
        for i, logits in enumerate(masks):
            if prompt_attention_mask is not None:
                padded = ~prompt_attention_mask[i].bool().to(logits.device)
                logits = logits.masked_fill(padded[:, None, None, None], -torch.inf)
            labels = torch.arange(num_masks, device=logits.device).repeat(num_prompts)
            if num_masks == 1 and class_labels is not None:
                labels = class_labels[i].to(logits.device)
            highest, winner = logits.flatten(0, 1).max(dim=0)
            label_maps.append(torch.where(highest > 0, labels[winner] + 1, 0))
        return label_maps


def _sample(masks: torch.Tensor, region: Sequence[float], output_size: Sequence[int]) -> torch.Tensor:
    """Values of masks (P, M, h, w) over the square at the H x W pixel centres of a region (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = region
    height, width = output_size
    x = x0 + (x1 - x0) * (torch.arange(width, dtype=torch.float64) + 0.5) / width
    y = y0 + (y1 - y0) * (torch.arange(height, dtype=torch.float64) + 0.5) / height
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None].to(masks)
    sampled = F.grid_sample(masks.flatten(0, 1)[None], grid, padding_mode="border", align_corners=False)
    return sampled.view(*masks.shape[:2], height, width)


def sample_pixels(
    values: torch.Tensor, output_size: Sequence[int], region: Sequence[float] | None = None
) -> torch.Tensor:
    """
    The pixels of (H, W) that hold the pixel centres of another grid, (h, w) = `output_size`.

    Args:
        region: the rectangle (x0, y0, x1, y1) that the grid covers, in pixels of the values; all of them by default.
    """
    x0, y0, x1, y1 = (0, 0, *values.shape[::-1]) if region is None else region
    rows, columns = (
        (low + (torch.arange(new, dtype=torch.float64) + 0.5) * (high - low) / new).long().clamp(0, old - 1)
        for low, high, new, old in zip((y0, x0), (y1, x1), output_size, values.shape, strict=True)
    )
    return values[rows.to(values.device)][:, columns.to(values.device)]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor of any device and type as an array (numpy has no bfloat16)."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def as_list(images: Any) -> list:
    if getattr(images, "ndim", 0) != 4 and not isinstance(images, (list, tuple)):
        return [images]
    if len(images) == 0:
        raise ValueError("Expected at least one image, got an empty list: pass one image or a list of them.")
    return list(images)


def _read_intensities(image: Any, window: tuple[float, float] | None, name: str) -> torch.Tensor:
    """(1 | 3, H, W) float32 in [0, 1]."""
    array = read_channels_first(image, name)
    if 0 in array.shape:
        raise ValueError(
            f"Expected {name} to have pixels, got {array.shape[1]} rows and {array.shape[2]} columns: leave empty "
            "images and crops out."
        )
    array = array[:3]
    if array.dtype.kind not in "biuf":
        raise TypeError(f"Expected {name} of bools, integers or floats, got {array.dtype}: convert its values first.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"Expected finite values in {name}, got NaN or infinity: replace them first (np.nan_to_num).")
    if window is None:
        window = (0.0, _find_white(array, name))
    low, high = window
    return torch.from_numpy(np.clip((array.astype(np.float64) - low) / (high - low), 0, 1).astype(np.float32))


def _find_white(array: np.ndarray, name: str) -> float:
    """The value that stands for intensity 1 where there is no window."""
    if array.dtype.kind == "b":
        return 1.0
    if array.dtype.kind == "f":
        if array.min() < -1e-6 or array.max() > 1 + 1e-6:
            raise ValueError(
                f"Expected floats in [0, 1] in {name}, got {array.min():g} to {array.max():g}: "
                "rescale them or give a window=(low, high) that is mapped to [0, 1]."
            )
        return 1.0
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return float(np.iinfo(array.dtype).max)
    raise ValueError(
        f"Expected a window=(low, high) for the {array.dtype} values of {name}, got none: their scale is unknown, "
        "so say which values map to [0, 1], for instance window=(-160, 240) for soft tissue in CT."
    )


def read_channels_first(image: Any, name: str) -> np.ndarray:
    """(1 | 3 | 4, H, W) in the image's own type."""
    if isinstance(image, Image.Image):
        return _read_pil(image)
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise TypeError(
            f"Expected {name} as a PIL image, a numpy array or a torch tensor, got {type(image).__name__}: "
            "open files first, for instance with PIL.Image.open."
        )
    if image.ndim == 2:
        image = image[None]
    elif isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] in (1, 3, 4):
        image = np.moveaxis(image, -1, 0)
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        layout = "(H, W) or (H, W, 1 | 3 | 4)" if isinstance(image, np.ndarray) else "(H, W) or (1 | 3 | 4, H, W)"
        raise ValueError(
            f"Expected {name} of shape {layout}, got {tuple(image.shape)}: "
            "torch images have their channels first, numpy images last."
        )
    return to_numpy(image) if isinstance(image, torch.Tensor) else image


def _read_pil(image: Image.Image) -> np.ndarray:
    """Keeps 16 and 32 bit; palettes and other colour spaces become RGB; alpha is left out without compositing."""
    if image.mode == "LA":
        image = image.getchannel("L")
    elif image.mode not in ("1", "L", "I", "F", "RGB", "RGBA") and not image.mode.startswith("I;16"):
        image = image.convert("RGBA" if image.mode in ("P", "PA") else "RGB")
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _check_size(size: Any) -> int:
    height, width = (size, size) if isinstance(size, int) else (dict(size).get(key) for key in ("height", "width"))
    if not isinstance(height, int) or height != width or height < 1:
        raise ValueError(
            f'Expected a square size={{"height": S, "width": S}}, got {size}: the model sees squares, '
            'and resize_mode="longest_side" keeps the proportions of other images.'
        )
    return height


def check_channels(values: Sequence[float], name: str) -> tuple[float, ...]:
    if len(values) != 3 or not np.isfinite(values).all():
        raise ValueError(f"Expected {name} as three finite numbers (red, green, blue), got {values}.")
    return tuple(float(value) for value in values)


def _check_window(window: Sequence[float]) -> tuple[float, float]:
    if len(window) != 2 or not np.isfinite(window).all() or window[0] >= window[1]:
        raise ValueError(f"Expected window=(low, high) with low < high, both finite, got {window}.")
    return float(window[0]), float(window[1])


def _check_sizes(sizes: Any, reshaped: Any, batch: int | None = None) -> tuple[list[list[int]], list[list[int]]]:
    """Both as lists of B pairs [height, width]."""
    pairs = [torch.as_tensor(value).reshape(-1, 2).tolist() for value in (sizes, reshaped)]
    counts = {len(pairs[0]), len(pairs[1]), len(pairs[0]) if batch is None else batch}
    if len(counts) != 1:
        raise ValueError(
            f"Expected one (height, width) per image, got {len(pairs[0])} and {len(pairs[1])} sizes"
            f"{'' if batch is None else f' for {batch} images'}: pass them as the processor returned them."
        )
    return pairs[0], pairs[1]
