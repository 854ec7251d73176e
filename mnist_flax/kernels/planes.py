"""Convolution of few channels in planes, [C, H, W, B].

Too few channels to fill a vector register are slow as the last axis. What is taken and returned is
[B, H, W, C] all the same: XLA drops the transpositions between two of them.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mnist_flax.kernels.devices import on_each_device
from mnist_flax.kernels.patches import complement, input_gradient, padded


def swapped(x):
    """Returns [B, H, W, C] as [C, H, W, B], and the other way around."""
    return x.transpose(3, 1, 2, 0)


def in_planes(fun, x_BHWC):
    """Returns `fun` of the planes, as [B, H, W, C]."""
    return swapped(fun(swapped(x_BHWC)))


def _shifted_sum(x_CHWB, w_IJC, padding):
    """Sums x[c, h + i, w + j, b] * w[i, j, c] over i and j; a single plane serves every c.

    A loop over c, whose operand XLA computes once: it would compute the terms of a plain sum each
    from the beginning.
    """
    x_CHWB = padded(x_CHWB, padding)
    size = w_IJC.shape[:2]

    def plane(x_HWB, w_IJ):
        terms = [tap * w for tap, w in zip(_shifted(x_HWB, size), w_IJ.ravel(), strict=True)]
        return sum(terms[1:], terms[0])

    w_CIJ = jnp.moveaxis(w_IJC, 2, 0)
    if x_CHWB.shape[0] == 1:
        return lax.map(lambda w_IJ: plane(x_CHWB[0], w_IJ), w_CIJ)
    return lax.map(lambda xw: plane(*xw), (x_CHWB, w_CIJ))


def _shifted(x_HWB, size):
    """Returns a shifted copy of the image for each position (i, j) of a kernel of `size`."""
    H, W = (n - k + 1 for n, k in zip(x_HWB.shape, size, strict=False))
    return [x_HWB[i : i + H, j : j + W] for i, j in np.ndindex(*size)]


def _over_channels(x_BHWC, w_CO):
    """Applies a matrix to the channels."""

    def product(x_BHWC, w_CO):
        x_CHWB = swapped(x_BHWC)
        y_ON = w_CO.T @ x_CHWB.reshape(x_CHWB.shape[0], -1)
        return swapped(y_ON.reshape(-1, *x_CHWB.shape[1:]))

    return on_each_device(product, (x_BHWC,), (w_CO,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def separable_conv(x_BHWC, depth_IJC, point_CO, padding):
    """Convolves as `Ops.separable_conv` does; padding is ((top, bottom), (left, right))."""
    return _separable_conv_fwd(x_BHWC, depth_IJC, point_CO, padding)[0]


def _separable_conv_fwd(x_BHWC, depth_IJC, point_CO, padding):
    deep_BHWC = swapped(_shifted_sum(swapped(x_BHWC), depth_IJC, padding))
    return _over_channels(deep_BHWC, point_CO), (x_BHWC, deep_BHWC, depth_IJC, point_CO)


def _separable_conv_bwd(padding, residuals, dy_BHWO):
    x_BHWC, deep_BHWC, depth_IJC, point_CO = residuals
    size = depth_IJC.shape[:2]
    ddeep_BHWC = _over_channels(dy_BHWO, point_CO.T)
    flipped_IJC = jnp.flip(depth_IJC, (0, 1))
    dx_CHWB = _shifted_sum(swapped(ddeep_BHWC), flipped_IJC, complement(padding, size))

    def gradients(x_BHWC, deep_BHWC, ddeep_BHWC, dy_BHWO):
        def of_plane(planes):
            x_HWB, dy_HWB = planes
            return jnp.stack([(tap * dy_HWB).sum((0, 1)) for tap in _shifted(x_HWB, size)])

        x_CHWB = padded(swapped(x_BHWC), padding)
        ddepth_CTB = lax.map(of_plane, (x_CHWB, swapped(ddeep_BHWC)))
        deep_CN, dy_ON = (swapped(a).reshape(a.shape[-1], -1) for a in (deep_BHWC, dy_BHWO))
        return ddepth_CTB.sum(-1).T.reshape(depth_IJC.shape), deep_CN @ dy_ON.T

    batched = (x_BHWC, deep_BHWC, ddeep_BHWC, dy_BHWO)
    return swapped(dx_CHWB), *on_each_device(gradients, batched, total=True)


separable_conv.defvjp(_separable_conv_fwd, _separable_conv_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def plane_conv(x_BHW1, w_IJ1O, padding):
    """Convolves images of one channel."""
    return in_planes(lambda x_1HWB: _shifted_sum(x_1HWB, w_IJ1O[:, :, 0], padding), x_BHW1)


def _plane_conv_fwd(x_BHW1, w_IJ1O, padding):
    return plane_conv(x_BHW1, w_IJ1O, padding), (x_BHW1, w_IJ1O)


def _plane_conv_bwd(padding, residuals, dy_BHWO):
    x_BHW1, w_IJ1O = residuals
    *size, _, O = w_IJ1O.shape
    # The other convolutions' way: most often nobody asks for it, and XLA leaves it out.
    dx_BHW1 = input_gradient(w_IJ1O, dy_BHWO, padding)

    def gradient(x_BHW1, dy_BHWO):
        # A product for each row of the image, whose shifted copies stay in cache.
        x_HWB, dy_OHWB = padded(swapped(x_BHW1), padding)[0], swapped(dy_BHWO)

        def add_row(h, dw_TO):
            x_IWB = lax.dynamic_slice_in_dim(x_HWB, h, size[0])
            taps = [tap.ravel() for tap in _shifted(x_IWB, size)]
            dy_OWB = lax.dynamic_index_in_dim(dy_OHWB, h, 1, keepdims=False)
            return dw_TO + jnp.stack(taps) @ dy_OWB.reshape(O, -1).T

        zeros_TO = jnp.zeros((math.prod(size), O), dy_BHWO.dtype)
        dw_TO = lax.fori_loop(0, dy_OHWB.shape[1], add_row, zeros_TO)
        return dw_TO.reshape(w_IJ1O.shape)

    return dx_BHW1, on_each_device(gradient, (x_BHW1, dy_BHWO), total=True)


plane_conv.defvjp(_plane_conv_fwd, _plane_conv_bwd)
