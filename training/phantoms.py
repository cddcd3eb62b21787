"""Drawn medical images with exact masks: endoscopy-, ultrasound- and CT-like scenes made of star-shaped outlines.

A scene is analytic: every outline is a Fourier series, so its mask is exact at any resolution and in any zoomed
region. All coordinates are (x, y) in the unit square, x to the right, y down, (0, 0) the top-left corner of the image
and (1, 1) its bottom-right corner; lengths are fractions of the image side. A non-square image stretches the scene.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from datasets import Dataset

LESION, ORGAN = 1, 2
PHANTOM_KINDS = ("endoscopy", "ultrasound", "tomography")
PHANTOM_SPLIT_SEEDS = {"train": 1, "val": 2, "test": 3}

# Independent random streams of one seed: what the scene is, what its texture looks like.
_SCENE, _TEXTURE = 0, 1
# Standard deviation of the k-th harmonic of log r, k = 1, 2, ...: elongation first, then ever finer lobes.
_LOBES = np.array([0.05, 0.18, 0.11, 0.07, 0.05, 0.035, 0.025, 0.015])


def phantoms_dataset(
    split: str, num_images: int, *, seed: int = 0, size: int = 256, num_classes: int = 1, kind: str | None = None
) -> Dataset:
    """Draws a data set of phantoms in memory; image i depends on (split, seed, i) alone, so a smaller set is a prefix.

    Args:
        split: "train", "val" or "test", whose images are drawn from disjoint streams.
        size: height and width of images and masks in pixels.
        num_classes: 1 keeps the lesion only (mask values 0 and 1), 2 keeps the organ as well (0, 1 and 2).
        kind: "endoscopy", "ultrasound" or "tomography"; each image's own draw by default.

    Returns:
        A data set with the columns `image` (RGB), `mask` (single-channel label map) and `name`.

    Raises:
        ValueError: if an argument is outside its range.
    """
    if split not in PHANTOM_SPLIT_SEEDS:
        raise ValueError(
            f"Expected split to be one of {', '.join(PHANTOM_SPLIT_SEEDS)}, got {split!r}; pass one of these."
        )
    if num_classes not in (LESION, ORGAN):
        raise ValueError(
            f"Expected num_classes to be 1 (lesion) or 2 (lesion, organ), got {num_classes}; phantoms have no more."
        )
    for name, value, least in (("num_images", num_images, 1), ("size", size, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"Expected {name} to be at least {least}, got {value}; pass a larger integer.")

    if kind is not None and kind not in PHANTOM_KINDS:
        raise ValueError(f"Expected kind to be one of {', '.join(PHANTOM_KINDS)} or None, got {kind!r}.")

    # Importing datasets takes seconds, and whoever only draws phantoms does without it.
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    columns: dict[str, list] = {"image": [], "mask": [], "name": []}
    for index in range(num_images):
        phantom = draw_phantom((PHANTOM_SPLIT_SEEDS[split], seed, index), kind)
        mask = phantom.mask(size, size)
        columns["image"].append(_png(phantom.image(size, size)))
        columns["mask"].append(_png(np.where(mask <= num_classes, mask, np.uint8(0))))
        columns["name"].append(f"phantom_{index:06d}")
    features = Features({"image": ImageFeature(), "mask": ImageFeature(), "name": Value("string")})
    return Dataset.from_dict(columns, features=features)


def draw_phantom(seed: int | tuple[int, ...], kind: str | None = None) -> Phantom:
    """Draws one scene: a kind, distractors, in some kinds one large organ, and one lesion of 2.5 to 22 % of the image.

    Args:
        seed: non-negative integer, or several of them that name the image together.
        kind: of `PHANTOM_KINDS`; drawn by default.
    """
    seed = tuple(int(part) for part in np.atleast_1d(seed))
    rng = np.random.default_rng([_SCENE, *seed])
    drawn = PHANTOM_KINDS[rng.integers(len(PHANTOM_KINDS))]
    kind = drawn if kind is None else kind
    return Phantom(kind, _DRAWERS[kind](rng), seed)


@dataclass(frozen=True)
class Phantom:
    """The analytic scene of one image: its shapes from back to front, the look of its modality and its seed.

    A point has the label of the frontmost labelled shape that contains it, 0 if there is none; distractors (label 0)
    never hide a label. The lesion is the frontmost shape and lies wholly inside the image.
    """

    kind: str
    shapes: tuple[Shape, ...]
    seed: tuple[int, ...]

    def label_at(self, x, y) -> np.ndarray:
        """Labels, uint8, of the points (x, y) in the unit square; x and y broadcast against each other."""
        x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        labels = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=np.uint8)
        for shape in self.shapes:
            if shape.label:
                labels = np.where(shape.contains(x, y), np.uint8(shape.label), labels)
        return labels

    def mask(
        self, height: int, width: int, region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    ) -> np.ndarray:
        """Exact label map at any resolution: a pixel has the label of its centre.

        Args:
            region: (x_min, y_min, x_max, y_max) in the unit square, the part of the scene that the pixels tile.

        Returns:
            (height, width) uint8 of class indices.

        Raises:
            ValueError: if a size is below 1 or the region is empty.
        """
        x, y = _pixel_centres(height, width, region)
        return self.label_at(x, y[:, None])

    def image(self, height: int, width: int) -> np.ndarray:
        """The scene rendered with anti-aliased edges; its texture is the same at every resolution, its noise is not.

        Returns:
            (height, width, 3) uint8, RGB; the three channels are equal unless the kind is endoscopy.

        Raises:
            ValueError: if a size is below 1.
        """
        x, y = (axis.astype(np.float32) for axis in _pixel_centres(height, width))
        rng = np.random.default_rng([_TEXTURE, *self.seed])
        canvas = _RENDERERS[self.kind](self, rng, x, y)
        canvas += 0.012 * rng.standard_normal((height, width, 1), dtype=np.float32)
        return np.broadcast_to(np.rint(255 * canvas.clip(0, 1)).astype(np.uint8), (height, width, 3)).copy()


@dataclass(frozen=True)
class Shape:
    """A star-shaped region and its appearance: `log r(theta) = log radius + Re sum_k harmonics[k - 1] exp(i k theta)`.

    Attributes:
        label: class index; 0 is a distractor, which is visible and belongs to no class.
        centre: (x, y) in the unit square.
        radius: geometric mean radius.
        harmonics: complex Fourier coefficients of log r for k = 1, 2, ...; theta turns from x towards y.
        level: brightness in [0, 1].
        tint: shift of the colour from yellow (negative) to red (positive); only endoscopy shows it.
        roughness: standard deviation of the texture, in units of brightness.
        grain: texture cells along one side of the image.
        softness: width of the visible edge; the mask's edge is its middle.
        fade: strength (modulus in [0, 1]) and direction (angle theta) in which the shape fades into its surroundings.
    """

    label: int
    centre: tuple[float, float]
    radius: float
    harmonics: tuple[complex, ...]
    level: float = 0.5
    tint: float = 0.0
    roughness: float = 0.05
    grain: int = 30
    softness: float = 0.0
    fade: complex = 0j

    def outline(self, z: np.ndarray) -> np.ndarray:
        """Radius r in the directions z = exp(i theta)."""
        return self.radius * np.exp(_real_series(self.harmonics, z))

    def contains(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Whether the points lie inside the outline; the outline itself is inside."""
        inside, rho, z = self._polar(x, y, margin=0.0)
        inside[inside] = rho <= self.outline(z)
        return inside

    def cover(self, x: np.ndarray, y: np.ndarray, pixel: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coverage in [0, 1] with an edge at least one pixel wide, visibility in [0, 1], and signed distance.

        The distance to the outline is positive inside, exact to first order, and -1 far away.
        """
        width = max(min(self.softness, 0.4 * self.radius), pixel)
        near, rho, z = self._polar(x, y, margin=3 * width)
        distance, coverage = np.full(near.shape, -1, dtype=rho.dtype), np.zeros(near.shape, dtype=rho.dtype)
        visibility = np.ones(near.shape, dtype=rho.dtype)
        r = self.outline(z)
        slope = _real_series([1j * k * c for k, c in enumerate(self.harmonics, 1)], z)
        distance[near] = signed = (r - rho) / np.sqrt(1 + slope**2)
        coverage[near] = 0.5 + 0.5 * np.tanh(2 * signed / width)
        towards = 0.5 + 0.5 * (z * (self.fade.conjugate() / (abs(self.fade) or 1.0))).real
        visibility[near] = 1 - abs(self.fade) * (towards * np.minimum(rho / r, 1)) ** 4
        return coverage, visibility, distance

    def _polar(self, x, y, margin):
        """Which points may lie within a margin of the shape; for these, rho from its centre and exp(i theta)."""
        dx, dy = x - self.centre[0], y - self.centre[1]
        bound = self.radius * math.exp(sum(map(abs, self.harmonics))) + margin
        near = np.asarray(dx**2 + dy**2 <= bound**2)
        offset = (dx + 1j * dy)[near]
        rho = np.abs(offset)
        return near, rho, offset / np.maximum(rho, 1e-12)


def _draw_endoscopy(rng):
    level = 0.58 + rng.uniform(0.06, 0.13) * _draw_sign(rng)
    tint = rng.uniform(0.5, 1.0) * _draw_sign(rng)
    lumen = _draw_shape(
        rng, 0, rng.uniform(0.03, 0.1), lobes=0.5, margin=-0.2, level=0.2, roughness=0.02, softness=0.08
    )
    look = {"roughness": rng.uniform(0.06, 0.09), "grain": int(rng.integers(34, 48)), "softness": 0.012}
    lesion = _draw_lesion(rng, level=level, tint=tint, **look)
    look = {"roughness": 0.05, "grain": 16, "softness": 0.04}
    return lumen, *_draw_distractors(rng, 4, lesion, level=level, tint=0.4 * tint, **look), lesion


def _draw_ultrasound(rng):
    tissue, contrast, softness = rng.uniform(0.45, 0.55), rng.uniform(0.2, 0.28), rng.uniform(0.012, 0.03)
    organs = []
    if rng.random() < 0.6:
        organs.append(_draw_organ(rng, level=tissue + 0.12, roughness=0.02, grain=14, softness=0.02))
    lesion = _draw_lesion(rng, level=tissue - contrast, roughness=0.02, grain=20, softness=softness)
    look = {"level": tissue - 0.65 * contrast, "roughness": 0.05, "grain": 14, "softness": softness}
    return *organs, *_draw_distractors(rng, 5, lesion, **look), lesion


def _draw_tomography(rng):
    tissue = rng.uniform(0.35, 0.5)
    contrast, softness = rng.uniform(0.09, 0.16), rng.uniform(0.006, 0.015)
    body = _draw_shape(rng, 0, 0.95, lobes=0.2, margin=-0.3, level=tissue - 0.08, roughness=0.04, grain=40)
    organ = _draw_organ(rng, level=tissue, roughness=0.05, grain=60, softness=0.01)
    others = [
        _draw_shape(rng, 0, rng.uniform(0.01, 0.06), lobes=0.7, level=rng.uniform(0.15, 0.85), softness=0.01)
        for _ in range(3)
    ]
    level = tissue + contrast if _draw_sign(rng) > 0 else tissue - 0.08 - contrast
    grain = int(rng.integers(16, 26))
    lesion = _draw_lesion(rng, level=level, roughness=rng.uniform(0.06, 0.09), grain=grain, softness=softness)
    look = {"level": 0.8 * level + 0.2 * tissue, "roughness": 0.04, "grain": 50, "softness": softness}
    return body, organ, *others, *_draw_distractors(rng, 3, lesion, **look), lesion


def _draw_sign(rng):
    return 1 if rng.random() < 0.5 else -1


def _draw_direction(rng):
    return complex(np.exp(1j * rng.uniform(0, 2 * np.pi)))


def _draw_lesion(rng, **look):
    fade = rng.uniform(0.4, 0.95) * _draw_direction(rng)
    area = np.exp(rng.uniform(np.log(0.025), np.log(0.22)))
    return _draw_shape(rng, LESION, area, margin=0.03, fade=fade, **look)


def _draw_organ(rng, **look):
    return _draw_shape(rng, ORGAN, rng.uniform(0.28, 0.42), lobes=0.7, margin=-0.15, **look)


def _draw_distractors(rng, count, lesion, **look):
    """Unlabelled shapes as bright as the lesion, the first two of them beside it."""
    for index in range(count):
        shape = _draw_shape(rng, 0, rng.uniform(0.1, 0.4) * np.pi * lesion.radius**2, lobes=0.8, margin=-0.1, **look)
        if index < 2:
            step = lesion.radius * rng.uniform(1.2, 1.7) * _draw_direction(rng)
            shape = replace(shape, centre=(lesion.centre[0] + step.real, lesion.centre[1] + step.imag))
        yield shape


def _draw_shape(rng, label, area, *, lobes=1.0, margin=0.0, **look):
    """A shape of the given area, placed at random so that it keeps the margin from the image's border."""
    z = np.exp(2j * np.pi * np.arange(256) / 256)
    while True:
        harmonics = lobes * _LOBES * (rng.standard_normal(_LOBES.size) + 1j * rng.standard_normal(_LOBES.size))
        shape = Shape(label, (0.0, 0.0), 1.0, tuple(harmonics.tolist()), **look)
        r = shape.outline(z)
        radius = float(np.sqrt(area / (np.pi * np.mean(r**2))))
        points = radius * r * z
        low_x, high_x = margin - points.real.min(), 1 - margin - points.real.max()
        low_y, high_y = margin - points.imag.min(), 1 - margin - points.imag.max()
        if r.max() < 3.5 * r.min() and low_x < high_x and low_y < high_y:
            return replace(shape, centre=(rng.uniform(low_x, high_x), rng.uniform(low_y, high_y)), radius=radius)


def _render_endoscopy(phantom, rng, x, y):
    """Mucosa with folds and vessels, a lesion lit from one side, specular spots, darker corners."""
    folds = _noise(rng, (5, 5), x, y)
    mucosa = 0.58 - 0.1 * np.exp(-((folds / 0.15) ** 2)) + 0.05 * _noise(rng, (9, 9), x, y)
    value, tint, coverage, distance = _paint(phantom, rng, x, y, mucosa)
    lesion = phantom.shapes[-1]
    light = _draw_direction(rng)
    facing = ((x - lesion.centre[0]) * light.real + (y[:, None] - lesion.centre[1]) * light.imag) / lesion.radius
    value += 0.09 * coverage * facing
    value -= 0.16 * np.exp(-((distance / 0.015) ** 2)) * np.clip(-facing, 0, 1)
    vessels = np.exp(-((_noise(rng, (11, 11), x, y) / 0.09) ** 2)) * np.clip(_noise(rng, (6, 6), x, y), 0, 1)
    spots = np.clip(3 * (_noise(rng, (45, 45), x, y) + 0.7 * _noise(rng, (6, 6), x, y) - 2.8), 0, 1)
    falloff = 1.12 - 1.3 * ((x - rng.uniform(0.4, 0.6)) ** 2 + (y[:, None] - rng.uniform(0.4, 0.6)) ** 2)
    base = np.array([1.28, 0.74, 0.62], dtype=np.float32) + rng.uniform(-0.06, 0.06, 3).astype(np.float32)
    colour = (value * falloff)[..., None] * base
    colour += (0.07 * tint)[..., None] * np.array([0.3, -1.0, -0.6], dtype=np.float32)
    colour -= (0.14 * vessels * falloff * (1 - coverage))[..., None] * np.array([0.4, 1.0, 0.8], dtype=np.float32)
    return colour + spots[..., None] * (1 - colour)


def _render_ultrasound(phantom, rng, x, y):
    """Layered tissue under multiplicative Rayleigh speckle; the lesion shadows or enhances what lies below it."""
    layers = 0.5 + 0.06 * _noise(rng, (3, 14), x, y) + 0.03 * _noise(rng, (6, 6), x, y)
    value, _, coverage, _ = _paint(phantom, rng, x, y, layers)
    depth = np.cumsum(coverage, axis=0) / len(y)
    value *= np.exp(rng.uniform(-0.5, 0.9) * -depth * (1 - coverage) - 0.35 * y[:, None])
    cells = (int(rng.integers(70, 95)), int(rng.integers(110, 150)))
    speckle = np.hypot(_noise(rng, cells, x, y), _noise(rng, cells, x, y)) / 1.25
    return rng.uniform(0.85, 1.15) * (value * (0.4 + 0.6 * speckle))[..., None]


def _render_tomography(phantom, rng, x, y):
    """Organs of even brightness on a dark ground under a smooth bias field and fine correlated noise."""
    value, *_ = _paint(phantom, rng, x, y, np.full((len(y), len(x)), 0.05, dtype=np.float32))
    value *= 1 + 0.06 * _noise(rng, (2, 2), x, y)
    return (value + rng.uniform(0.02, 0.045) * _noise(rng, (110, 110), x, y))[..., None]


_DRAWERS = {"endoscopy": _draw_endoscopy, "ultrasound": _draw_ultrasound, "tomography": _draw_tomography}
_RENDERERS = {"endoscopy": _render_endoscopy, "ultrasound": _render_ultrasound, "tomography": _render_tomography}


def _paint(phantom, rng, x, y, level):
    """Paints the shapes over a background level (H, W), back to front.

    A shape's brightness and tint fade into its surroundings, its texture does not: the outline stays visible.

    Returns:
        Brightness with texture, tint, and the lesion's coverage and signed distance, each (H, W).
    """
    texture, tint = np.zeros_like(level), np.zeros_like(level)
    for shape in phantom.shapes:
        coverage, visibility, distance = shape.cover(x, y[:, None], 1 / min(len(x), len(y)))
        level = level + coverage * visibility * (shape.level - level)
        tint = tint + coverage * visibility * (shape.tint - tint)
        texture += coverage * (shape.roughness * _noise(rng, (shape.grain, shape.grain), x, y) - texture)
    return level + texture, tint, coverage, distance


def _real_series(coefficients, z):
    """Re sum_k coefficients[k - 1] z^k, k = 1, 2, ..., by Horner's rule."""
    total = np.zeros_like(z)
    for coefficient in reversed(coefficients):
        total += coefficient
        total *= z
    return total.real


def _noise(rng, cells, x, y):
    """Smooth noise of about unit variance: a Gaussian lattice of (along x, along y) cells under cubic B-splines."""
    lattice = rng.standard_normal((cells[1] + 3, cells[0] + 3), dtype=np.float32)
    # 151 / 315, the integral of the squared spline, is the mean variance that the weights of one axis leave.
    return np.ascontiguousarray(_bspline(_bspline(lattice, y).T, x).T) / (151 / 315)


def _bspline(knots, u):
    """Uniform cubic B-spline along the first axis: knots (cells + 3, M) at coordinates u (N,) in [0, 1) to (N, M).

    Gathers four knots each: a product with the weight matrix would start BLAS threads for every small field.
    """
    t, first = np.modf(u * (len(knots) - 3))
    t, first = t[:, None], first.astype(int)
    weights = (1 - t) ** 3, 4 - 3 * t**2 * (2 - t), 4 - 3 * (1 - t) ** 2 * (1 + t), t**3
    return sum(weight * knots[first + k] for k, weight in enumerate(weights)) / 6


def _pixel_centres(height, width, region=(0.0, 0.0, 1.0, 1.0)):
    """x (width,) and y (height,) of the centres of the pixels that tile the region."""
    if height < 1 or width < 1:
        raise ValueError(
            f"Expected height and width to be at least 1 pixel, got {height} and {width}; pass larger ones."
        )
    x_min, y_min, x_max, y_max = region
    if not (x_min < x_max and y_min < y_max):
        raise ValueError(
            f"Expected region to be (x_min, y_min, x_max, y_max) with min < max, got {region}; order it so."
        )
    x = x_min + (np.arange(width) + 0.5) / width * (x_max - x_min)
    y = y_min + (np.arange(height) + 0.5) / height * (y_max - y_min)
    return x, y


def _png(array):
    """The array as `datasets.Image` stores it, encoded in memory."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
