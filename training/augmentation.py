"""Training augmentation: MONAI's transforms on an image and its mask together, and copy-paste between two images."""

import math

import numpy as np
from PIL import Image

STRENGTHS = ("none", "light", "strong")


class Augmentation:
    """
    Flips, turns, deforms and recolours an image, and its mask with it. The mask follows by nearest neighbour, the
    image bilinearly; what comes in from outside is 0. If the object leaves the picture, the pair comes back as it was.

    Args:
        strength: "none", "light" (flips, quarter turns, a small affine map, brightness) or "strong" (affine map
            with rotation up to 20 degrees, scale 0.8 to 1.25, translation up to 10 %; gamma, colour, noise, blur).
    """

    def __init__(self, strength: str = "strong"):
        if strength not in STRENGTHS:
            raise ValueError(f"Expected augmentation to be one of {', '.join(STRENGTHS)}, got {strength!r}.")
        self.strength = strength
        if strength != "none":
            import monai.transforms  # noqa: F401  slow to load: once here, not in every data loader worker

    def __call__(self, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            image: (H, W) or (H, W, 3), of any numeric type.
            mask: (H', W'), integers. Both cover the same area, so H / W is about H' / W', at any two resolutions.
            seed: of all random draws; nothing else decides them.

        Returns:
            The new image and mask in the given types and sizes, but for a quarter turn, which swaps height and width.
        """
        if self.strength == "none":
            return image, mask
        new_mask = _seeded(_geometry(self.strength, mask.shape, "nearest"), seed)(mask[None].astype(np.float32))
        new_mask = np.asarray(new_mask)[0].round().astype(mask.dtype)
        if not new_mask.any():
            return image, mask
        low, high = _intensity_range(image)
        new_image = (np.atleast_3d(image).transpose(2, 0, 1).astype(np.float32) - low) / (high - low)
        new_image = _seeded(_geometry(self.strength, image.shape[:2], "bilinear"), seed)(new_image)
        new_image = np.asarray(_seeded(_intensity(self.strength), seed)(new_image))
        new_image = new_image.clip(0, 1).transpose(1, 2, 0).reshape(*new_image.shape[1:], *image.shape[2:])
        new_image = new_image * (high - low) + low
        if np.issubdtype(image.dtype, np.integer):
            new_image = new_image.round()
        return new_image.astype(image.dtype), new_mask


def copy_paste(
    image: np.ndarray,
    mask: np.ndarray,
    other_image: np.ndarray,
    other_mask: np.ndarray,
    scale: float = 1.0,
    corner: tuple[float, float] = (0.0, 0.0),
) -> tuple[np.ndarray, np.ndarray]:
    """
    Puts the objects of another image on top of this one's (Ghiasi et al., CVPR 2021): the way to several objects in
    one box, and to small ones, where a data set has few of them.

    Args:
        image: (H, W) or (H, W, 3); `mask` (H', W') covers the same area. The others may have other sizes.
        scale: of the other image's sides, in (0, 1], as a share of this one's.
        corner: where the other image's upper left corner comes to lie, (x, y) as shares of this one's sides.

    Returns:
        The new image and mask in this image's types and sizes; unchanged if the other image is of another type, as a
        grey one beside a coloured one.
    """
    if image.dtype != other_image.dtype or image.ndim != other_image.ndim:
        return image, mask
    pasted = _place(other_mask, mask.shape, scale, corner, Image.Resampling.NEAREST)
    other_image = _place(other_image, image.shape[:2], scale, corner, Image.Resampling.BILINEAR)
    # What is painted is what is labelled, also of objects that are hardly a pixel wide.
    alpha = _place((pasted > 0).astype(np.float32), image.shape[:2], 1.0, (0.0, 0.0), Image.Resampling.BILINEAR)
    alpha = alpha.reshape(*alpha.shape, *[1] * (image.ndim - 2))
    new_image = image + alpha * (other_image - image.astype(np.float32))
    if np.issubdtype(image.dtype, np.integer):
        new_image = new_image.round()
    return new_image.astype(image.dtype), np.where(pasted > 0, pasted, mask).astype(mask.dtype)


def _place(array, size, scale, corner, resampling):
    """An array (H, W) or (H, W, C) shrunk onto a canvas of `size` (H, W) that is 0 elsewhere, in float32."""
    height, width = (max(1, round(scale * side)) for side in size)
    left, top = (round(share * side) for share, side in zip(corner, size[::-1], strict=True))
    channels = np.atleast_3d(array).astype(np.float32).transpose(2, 0, 1)
    small = [np.asarray(Image.fromarray(channel).resize((width, height), resampling)) for channel in channels]
    canvas = np.zeros((*size, len(channels)), np.float32)
    canvas[top : top + height, left : left + width] = np.stack(small, axis=-1)[: size[0] - top, : size[1] - left]
    return canvas.reshape(*size, *array.shape[2:])


def _seeded(transforms, seed):
    return transforms.set_random_state(seed=seed)


def _geometry(strength, size, mode):
    """The same seed draws the same map at any size: translations are shares of it."""
    from monai import transforms

    amount = 1.0 if strength == "strong" else 0.4
    # MONAI's scales map output to input coordinates, as s - 1: 1 / 1.25 - 1 enlarges by 1.25.
    scale_range = (1 / (1 + 0.25 * amount) - 1, 1 / (1 - 0.2 * amount) - 1)
    return transforms.Compose(
        [
            transforms.RandFlip(prob=0.5, spatial_axis=0),
            transforms.RandFlip(prob=0.5, spatial_axis=1),
            transforms.RandAffine(
                prob=0.8 if strength == "strong" else 0.5,
                rotate_range=math.radians(20) * amount,
                scale_range=(scale_range, scale_range),
                translate_range=(0.1 * amount * size[0], 0.1 * amount * size[1]),
                shear_range=(0.05 * amount, 0.05 * amount),
                mode=mode,
                padding_mode="zeros",
            ),
            transforms.RandRotate90(prob=0.5),
        ]
    )


def _intensity(strength):
    from monai import transforms

    amount = 1.0 if strength == "strong" else 0.4
    brightness = [
        transforms.RandScaleIntensity(factors=0.2 * amount, prob=0.5),
        transforms.RandShiftIntensity(offsets=0.1 * amount, prob=0.5),
    ]
    if strength == "light":
        return transforms.Compose(brightness)
    colour = [
        transforms.RandScaleIntensity(factors=0.1, prob=0.5, channel_wise=True),
        transforms.RandAdjustContrast(prob=0.3, gamma=(0.7, 1.4)),
    ]
    quality = [
        transforms.RandGaussianNoise(prob=0.2, std=0.03),
        transforms.RandGaussianSmooth(prob=0.2, sigma_x=(0.3, 1.2), sigma_y=(0.3, 1.2)),
    ]
    return transforms.Compose(brightness + colour + quality)


def _intensity_range(image):
    if image.dtype == np.uint8:
        return 0.0, 255.0
    low, high = float(image.min()), float(image.max())
    return low, high if high > low else low + 1.0
