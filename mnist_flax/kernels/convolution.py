"""Convolution on the CPU: by Winograd's algorithm, by products of patches, or in planes.

Times are the best of many on two cores of a Zen 4 EPYC, jax 0.10.2, float32, one JAX device per
core, for the convolution of 128 images of 26x26x32 to 24x24x64: `python experiments/operations.py`
prints them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mnist_flax.kernels import planes, winograd
from mnist_flax.kernels.devices import on_each_device
from mnist_flax.kernels.patches import input_gradient, kernel_gradient, patch_product
from mnist_flax.ops import NHWC, one_conv

MANY = 8  # channels, of input and output, from which Winograd's algorithm beats products of patches


def conv(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    few_channels: bool = False,
) -> jax.Array:
    """Convolves on the CPU as `lax.conv_general_dilated` does, with its arguments.

    Fast is a stride-1 convolution of one group in NHWC/HWIO order; anything else is handed to
    `lax`.

    - Square kernels of 2 to 5 pixels and at least 8 channels of input and output: by Winograd's
      algorithm (`winograd.py`; forward 11 ms, both gradients 16; `lax` 42 and 65). Its rounding
      errors are larger than a plain sum's: `winograd.POINTS` has the factor that bounds them.
    - Others: matrix products of patches, the pixels around each pixel (256 images of 14x14x4 to 16
      channels: forward 0.8 ms; `lax` 1.8).
    - In bfloat16 always patches, summed in float32 and rounded once. Processors with units for it
      (AMX) multiply it five times as fast as float32; without them float32 is the faster one.
    - Both are loops over chunks that stay in cache. A `lax` convolution in a loop, as in training,
      has gradients in scalar code (jax-ml/jax#12868).
    - With `few_channels`, one input channel is convolved in planes: a sum of nine shifted images.

    Returns:
      The convolution [B, H, W, O], in the inputs' dtype.
    """
    kwargs: dict[str, Any] = dict(
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    unit = all(set(n or (1,)) == {1} for n in (window_strides, lhs_dilation, rhs_dilation))
    single = feature_group_count == batch_group_count == 1
    same_type = lhs.dtype == rhs.dtype and preferred_element_type in (None, lhs.dtype)
    known = lhs.dtype in (jnp.bfloat16, jnp.float32, jnp.float64)
    if not (
        lhs.ndim == 4
        and unit
        and single
        and same_type
        and known
        and lhs.size
        and precision is None
        and out_sharding is None
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, NHWC)
    ):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], (1, 1), padding)
    (top, bottom), (left, right) = padding
    if few_channels and lhs.shape[-1] == 1 and lhs.dtype != jnp.bfloat16:
        return planes.plane_conv(lhs, rhs, ((top, bottom), (left, right)))
    return _conv(lhs, rhs, ((top, bottom), (left, right)))


# One object, so that two models that are given it have equal graph definitions.
few_channels_conv = functools.partial(conv, few_channels=True)


def separable_conv(
    x_BHWC: jax.Array, depth_IJC: jax.Array, point_CO: jax.Array, *, padding: str
) -> jax.Array:
    """Convolves on the CPU as `Ops.separable_conv` does.

    It is a sum of shifted planes, a channel at a time, and one matrix product; the gradient of
    a channel's kernel is again a channel at a time (64 images of 14x14x10 to 14 channels, forward
    and gradients: 0.9 ms; `lax` 1.4, and many times that inside a loop). bfloat16 is convolved by
    the kernel depth[i, j, c] * point[c, o].
    """
    if jnp.finfo(x_BHWC.dtype).bits < 32 or not x_BHWC.size:
        return one_conv(conv, x_BHWC, depth_IJC, point_CO, padding)
    pads = lax.padtype_to_pads(x_BHWC.shape[1:3], depth_IJC.shape[:2], (1, 1), padding)
    return planes.separable_conv(x_BHWC, depth_IJC, point_CO, tuple(pads))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x_BHWC, w_HWIO, padding):
    return _conv_fwd(x_BHWC, w_HWIO, padding)[0]


def _conv_fwd(x_BHWC, w_HWIO, padding):
    if _by_winograd(x_BHWC, w_HWIO):
        convolve = functools.partial(winograd.convolve, padding=padding)
        y_BHWO = on_each_device(convolve, (x_BHWC,), (w_HWIO,))
    else:
        y_BHWO = patch_product(x_BHWC, w_HWIO, padding)
    return y_BHWO, (x_BHWC, w_HWIO)


def _by_winograd(x_BHWC, w_HWIO):
    I, J, C, O = w_HWIO.shape
    square = I == J and I in winograd.KERNEL_SIZES
    return square and min(C, O) >= MANY and x_BHWC.dtype != jnp.bfloat16


def _conv_bwd(padding, residuals, dy_BHWO):
    x_BHWC, w_HWIO = residuals
    if _by_winograd(x_BHWC, w_HWIO):
        gradients = functools.partial(winograd.gradients, padding=padding)
        return on_each_device(gradients, (x_BHWC, dy_BHWO), (w_HWIO,), total=(False, True))
    of_kernel = functools.partial(kernel_gradient, size=w_HWIO.shape[:2], padding=padding)
    dx_BHWC = input_gradient(w_HWIO, dy_BHWO, padding)
    dw_HWIO = on_each_device(of_kernel, (x_BHWC, dy_BHWO), total=True)
    return dx_BHWC, dw_HWIO.astype(w_HWIO.dtype)


_conv.defvjp(_conv_fwd, _conv_bwd)
