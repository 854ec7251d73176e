"""Deterministic corruptions of images, at stated severities. No recipe trains on them.

Images are float [N, H, W, C] in [0, 1], 0 meaning background; so are the corrupted ones.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from mnist_flax.augment import affine_matrix, warp_affine
from mnist_flax.data import Examples
from mnist_flax.evaluation import Evaluation, predict
from mnist_flax.steps import TrainState, to_float

SEED = 0  # of noise and of where occlusions lie


def affine(images_NHWC: jax.Array, **parameters: float) -> jax.Array:
    """Moves every image by the same map; parameters as in `affine_matrix`."""
    N, H, W, _ = images_NHWC.shape
    matrix_23 = affine_matrix(height=H, width=W, **parameters)
    return warp_affine(images_NHWC, jnp.broadcast_to(matrix_23, (N, 2, 3)))


def rotate(images_NHWC: jax.Array, degrees: float) -> jax.Array:
    """Rotates about the centre."""
    return affine(images_NHWC, rotate=degrees)


def shift(images_NHWC: jax.Array, pixels: float) -> jax.Array:
    """Shifts up and left, by as much each."""
    _, H, W, _ = images_NHWC.shape
    return affine(images_NHWC, shift_y=pixels / H, shift_x=pixels / W)


def zoom(images_NHWC: jax.Array, factor: float) -> jax.Array:
    """Makes the digit `factor` times as large."""
    return affine(images_NHWC, zoom_y=1 / factor, zoom_x=1 / factor)


def shear(images_NHWC: jax.Array, degrees: float) -> jax.Array:
    """Shears about the centre."""
    return affine(images_NHWC, shear=degrees)


def noise(images_NHWC: jax.Array, deviation: float) -> jax.Array:
    """Adds Gaussian noise of this standard deviation, and clips."""
    drawn = jax.random.normal(jax.random.key(SEED), images_NHWC.shape)
    return jnp.clip(images_NHWC + deviation * drawn, 0, 1)


def blur(images_NHWC: jax.Array, sigma: float) -> jax.Array:
    """Blurs by a Gaussian of this many pixels."""
    sigmas = (0, sigma, sigma, 0)
    return jnp.asarray(ndimage.gaussian_filter(np.asarray(images_NHWC), sigmas, mode="constant"))


def occlude(images_NHWC: jax.Array, side: float) -> jax.Array:
    """Blackens a square of `side` whole pixels, but in a margin of a seventh of the image.

    Without it a 28 x 28 image is the middle 20 x 20, where the digit is. A larger square has the
    image's centre.
    """
    N, H, W, _ = images_NHWC.shape
    first = [min(size // 7, max(0, (size - side) // 2)) for size in (H, W)]
    last = [max(low, size - size // 7 - side) for low, size in zip(first, (H, W), strict=True)]
    limits = jnp.array([[low] for low in first]), jnp.array([[high + 1] for high in last])
    corners_2N = jax.random.randint(jax.random.key(SEED), (2, N), *limits)
    top_N1, left_N1 = corners_2N[..., None]
    rows_1H, columns_1W = jnp.arange(H)[None], jnp.arange(W)[None]
    in_rows = (rows_1H >= top_N1) & (rows_1H < top_N1 + side)
    in_columns = (columns_1W >= left_N1) & (columns_1W < left_N1 + side)
    hidden_NHW = in_rows[:, :, None] & in_columns[:, None, :]
    return jnp.where(hidden_NHW[..., None], 0, images_NHWC)


def contrast(images_NHWC: jax.Array, share: float) -> jax.Array:
    """Leaves this share of the contrast about mid-grey."""
    return 0.5 + share * (images_NHWC - 0.5)


def invert(images_NHWC: jax.Array, share: float) -> jax.Array:
    """Mixes in this share of the negative."""
    return (1 - share) * images_NHWC + share * (1 - images_NHWC)


@dataclasses.dataclass(frozen=True)
class Corruption:
    """A corruption and the severities at which to look at it.

    Attributes:
      name: what the severity is, with its unit.
      apply: `apply(images_NHWC, severity)`.
      severities: ascending; among them the one that changes nothing.
      neutral: that one.
    """

    name: str
    apply: Callable[[jax.Array, float], jax.Array]
    severities: tuple[float, ...]
    neutral: float


CORRUPTIONS = (
    Corruption("rotation (degrees)", rotate, (-45, -30, -15, 0, 15, 30, 45), 0),
    Corruption("shift (pixels, both ways)", shift, (-6, -4, -2, 0, 2, 4, 6), 0),
    Corruption("zoom (factor)", zoom, (0.5, 0.7, 0.85, 1, 1.15, 1.3), 1),
    Corruption("shear (degrees)", shear, (-40, -20, 0, 20, 40), 0),
    Corruption("Gaussian noise (deviation)", noise, (0, 0.1, 0.2, 0.3, 0.5), 0),
    Corruption("blur (sigma, pixels)", blur, (0, 0.5, 1, 1.5, 2), 0),
    Corruption("occlusion (side, pixels)", occlude, (0, 4, 6, 8, 10), 0),
    Corruption("contrast (share left)", contrast, (0.1, 0.3, 0.5, 0.75, 1), 1),
    Corruption("inversion (share)", invert, (0, 0.25, 0.75, 1), 0),
)
# Rotation in degrees, and shifts up and left in pixels: 27 maps.
GRID = tuple(itertools.product((-10, 0, 10), (-2, 0, 2), (-2, 0, 2)))


def hits(state: TrainState, images_NHWC: jax.Array, labels_N: np.ndarray) -> np.ndarray:
    """Returns whether each image's prediction is its label, bool [N]."""
    evaluation = Evaluation(predict(state, images_NHWC), labels_N)
    return evaluation.predictions_N == evaluation.labels_N


def robustness(
    state: TrainState,
    examples: Examples,
    *,
    corruptions: Sequence[Corruption] = CORRUPTIONS,
) -> Iterator[tuple[Corruption, list[float]]]:
    """Yields each corruption with the accuracy at each of its severities."""
    images = to_float(examples.images)
    labels = np.asarray(examples.labels)
    unharmed = float(hits(state, images, labels).mean())
    for corruption in corruptions:
        apply = corruption.apply
        yield (
            corruption,
            [
                unharmed
                if severity == corruption.neutral
                else float(hits(state, apply(images, severity), labels).mean())
                for severity in corruption.severities
            ],
        )


def worst_case(
    state: TrainState,
    examples: Examples,
    *,
    grid: Sequence[tuple[float, float, float]] = GRID,
) -> float:
    """Returns the share of examples that are classified rightly under every map of the grid."""
    images = to_float(examples.images)
    labels = np.asarray(examples.labels)
    _, H, W, _ = images.shape

    def moved(degrees, up, left):
        return affine(images, rotate=degrees, shift_y=up / H, shift_x=left / W)

    every = (hits(state, moved(*parameters), labels) for parameters in grid)
    return float(functools.reduce(np.logical_and, every).mean())
