"""Moments of images, and images brought to nearly the same ones.

Handwriting differs in slant and width more than digits do. Taking that away beforehand is the
moment normalization of Casey (1970, "Moment normalization of handprinted characters"); LeCun et al.
(1998, "Gradient-based learning applied to document recognition") deslant MNIST by it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mnist_flax.augment import check_images

PIXEL_VARIANCE = 1 / 12  # of a square's points along a side of 1, so no spread is 0
# The standard deviations of ink, as fractions of the image's height and width, that stay as they
# are: above those of most digits, so most grow. And how far the others are brought there.
# experiments/log/2026-11-28-diary.md has what other numbers do.
SPREADS = (0.22, 0.15)
POWER = 0.75


class Moments(NamedTuple):
    """Where each image's ink lies, which is its values; in pixels, each [B].

    Attributes:
      center_y: mean row.
      center_x: mean column.
      spread_y: standard deviation of rows.
      spread_x: standard deviation of columns about the slanted axis.
      slant: columns to the right that the axis goes with each row down: the regression of columns
        on rows.
    """

    center_y: jax.Array
    center_x: jax.Array
    spread_y: jax.Array
    spread_x: jax.Array
    slant: jax.Array


def moments(images_BHWC: jax.Array) -> Moments:
    """Returns the moments of images [B, H, W, C] of values of at least 0, summed over channels.

    A pixel's ink fills its square. An image of zeros has the moments of a uniform one.
    """
    _, height, width, _ = images_BHWC.shape
    ink_BHW = images_BHWC.sum(-1)
    total_B11 = ink_BHW.sum((1, 2), keepdims=True)
    uniform = 1 / (height * width)
    share_BHW = jnp.where(
        total_B11 > 0, ink_BHW / jnp.where(total_B11 > 0, total_B11, 1.0), uniform
    )
    y_1H1 = jnp.arange(height, dtype=share_BHW.dtype)[None, :, None]
    x_11W = jnp.arange(width, dtype=share_BHW.dtype)[None, None, :]

    # Sums and not matrix products, which a GPU or TPU would round to fewer bits.
    def mean(values_BHW):
        return (share_BHW * values_BHW).sum((1, 2), keepdims=True)

    center_y_B11, center_x_B11 = mean(y_1H1), mean(x_11W)
    y_BH1, x_B1W = y_1H1 - center_y_B11, x_11W - center_x_B11
    variance_y_B11 = mean(y_BH1**2) + PIXEL_VARIANCE
    covariance_B11 = mean(y_BH1 * x_B1W)
    slant_B11 = covariance_B11 / variance_y_B11
    variance_x_B11 = mean((x_B1W - slant_B11 * y_BH1) ** 2) + PIXEL_VARIANCE
    all_B11 = (
        center_y_B11,
        center_x_B11,
        jnp.sqrt(variance_y_B11),
        jnp.sqrt(variance_x_B11),
        slant_B11,
    )
    return Moments(*(moment_B11[:, 0, 0] for moment_B11 in all_B11))


def normalize(images_BHWC: jax.Array) -> jax.Array:
    """Centres images, takes their slant away and brings their spreads near `SPREADS`.

    In one bilinear resampling, with 0 outside the image as in `warp_affine`: rows first, since the
    row that an output pixel shows does not depend on its column. That is cheaper than
    `warp_affine`, whose reads beyond the border ONNX Runtime refuses. A spread of s becomes about
    SPREAD**POWER * s**(1 - POWER), so a narrow digit remains narrower than a wide one.

    Args:
      images_BHWC: floating-point images [B, H, W, C] of values of at least 0, 0 the background.

    Returns:
      The images [B, H, W, C], in the same dtype.

    Raises:
      InputError: `images_BHWC` is not a floating-point array of rank 4.
    """
    check_images(images_BHWC)
    _, height, width, _ = images_BHWC.shape
    own = Moments(*(moment_B[:, None] for moment_B in moments(images_BHWC)))
    y_1H = jnp.arange(height, dtype=images_BHWC.dtype)[None] - (height - 1) / 2
    x_1W = jnp.arange(width, dtype=images_BHWC.dtype)[None] - (width - 1) / 2
    y_BH = (own.spread_y / (SPREADS[0] * height)) ** POWER * y_1H
    x_BW = (own.spread_x / (SPREADS[1] * width)) ** POWER * x_1W
    axis_BH = own.center_x + own.slant * y_BH
    rows_BH11 = (own.center_y + y_BH)[:, :, None, None]
    columns_BHW1 = (axis_BH[:, :, None] + x_BW[:, None, :])[..., None]
    return interpolate(interpolate(images_BHWC, rows_BH11, axis=1), columns_BHW1, axis=2)


def interpolate(values: jax.Array, places: jax.Array, *, axis: int) -> jax.Array:
    """Returns what is at fractional `places` along an axis, linearly between its values.

    Beyond the first and the last value it fades to 0 within 1.

    Args:
      values: floating-point values.
      places: indices into `axis`, of the same rank; other axes are the same or 1.
      axis: the axis.
    """
    size = values.shape[axis]
    low = jnp.floor(places)
    total = jnp.zeros((), values.dtype)
    for index in (low, low + 1):
        inside = (index >= 0) & (index < size)
        weight = jnp.where(inside, 1 - jnp.abs(places - index), 0.0)
        at = jnp.clip(index, 0, size - 1).astype(jnp.int32)
        total = total + weight * jnp.take_along_axis(values, at, axis)
    return total
