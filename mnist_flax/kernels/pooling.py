"""Max-pooling, and ReLU, BatchNorm and pooling in one, with gradients that XLA need not scatter."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mnist_flax.kernels.planes import in_planes, swapped
from mnist_flax.ops import maximum, moments, others, widened


def max_pool(x_BHWC: jax.Array, *, window: int, few_channels: bool = False) -> jax.Array:
    """Pools as `Ops.max_pool` does, and records where each maximum lies, as a byte.

    Args:
      x_BHWC: [B, H, W, C], floating point.
      window: side of the blocks; 1 is no pooling.
      few_channels: whether to work in planes.
    """
    if window == 1:
        return x_BHWC
    if few_channels:
        return in_planes(lambda x_CHWB: _max_pool(x_CHWB, window, x_BHWC.shape[1:3]), x_BHWC)
    return _max_pool(x_BHWC, window, x_BHWC.shape[1:3])


def relu_norm_pool(
    x_BHWC: jax.Array,
    scale_C: jax.Array,
    bias_C: jax.Array,
    *,
    epsilon: float,
    window: int = 1,
    few_channels: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """ReLU, BatchNorm and max-pooling as `Ops.relu_norm_pool`, with one pass for the gradient.

    Where a window's maximum lies was recorded, as a byte, and ReLU, BatchNorm and pooling are
    undone together. Autodiff of the three takes several passes; a step of the three-convolution
    network takes 12% longer with it.

    BatchNorm keeps the order of a channel's values or, where its scale is negative, turns it
    around, so the pooling is done first, on a quarter of the work for a window of 2.

    Args:
      x_BHWC: [B, H, W, C], before the ReLU.
      scale_C: BatchNorm's scale, of any sign or zero.
      bias_C: BatchNorm's bias.
      epsilon: added to the variance.
      window: side of the pooling window; 1 is no pooling.
      few_channels: whether to work in planes.
    """
    if few_channels:
        out: Any = _relu_norm_pool(swapped(x_BHWC), scale_C, bias_C, epsilon, window, 0)
        return swapped(out[0]), *out[1:]
    return _relu_norm_pool(x_BHWC, scale_C, bias_C, epsilon, window, 3)


def _pool(x_BHWC, window):
    """Returns the maximum of each window and which element it is, the first of equals."""
    H, W = (n // window * window for n in x_BHWC.shape[1:3])
    elements = [x_BHWC[:, i:H:window, j:W:window] for i in range(window) for j in range(window)]
    best, winner = elements[0], jnp.zeros(elements[0].shape, jnp.uint8)
    for n, element in enumerate(elements[1:], 1):
        winner = jnp.where(element > best, jnp.uint8(n), winner)
        best = maximum(best, element)
    return best, winner


def _unpool(y_BHWC, winner_BHWC, window, size):
    """Puts each value where its window's maximum was, in zeros of height and width `size`."""
    B, h, w, C = y_BHWC.shape
    index = jnp.arange(window**2, dtype=jnp.uint8).reshape(1, 1, window, 1, window, 1)
    x = jnp.where(winner_BHWC[:, :, None, :, None] == index, y_BHWC[:, :, None, :, None], 0)
    x = jnp.reshape(x, (B, h * window, w * window, C), out_sharding=_own_sharding(y_BHWC))
    return jnp.pad(x, ((0, 0), (0, size[0] - h * window), (0, size[1] - w * window), (0, 0)))


def _own_sharding(x):
    """Returns how Explicit mesh axes divide an array; None where there are none."""
    sharding = jax.typeof(x).sharding
    return sharding if any(axis is not None for axis in sharding.spec) else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x_BHWC, window, size):
    return _pool(x_BHWC, window)[0]


def _max_pool_fwd(x_BHWC, window, size):
    return _pool(x_BHWC, window)


def _max_pool_bwd(window, size, winner_BHWC, dy_BHWC):
    return (_unpool(dy_BHWC, winner_BHWC, window, size),)


_max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


# ReLU, BatchNorm and pooling, of [B, H, W, C] with the channels' axis 3 or of [C, H, W, B] with 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _relu_norm_pool(x, scale_C, bias_C, epsilon, window, axis):
    return _relu_norm_pool_fwd(x, scale_C, bias_C, epsilon, window, axis)[0]


def _relu_norm_pool_fwd(x, scale_C, bias_C, epsilon, window, axis):
    wide = functools.partial(widened, axis=axis)
    pooled = relu = nnx.relu(x)  # whose slope at 0 is 0; that of jnp.maximum is 0.5
    winner = None
    mean_C, var_C = moments(relu, axis)
    if window > 1:
        sign = wide(jnp.where(scale_C < 0, -1, 1).astype(relu.dtype))
        pooled, winner = _pool(relu * sign, window)
        pooled *= sign
    slope_C = scale_C * lax.rsqrt(var_C + epsilon)
    y = pooled * wide(slope_C) + wide(bias_C - mean_C * slope_C)
    return (y, mean_C, var_C), (relu, pooled, winner, scale_C, mean_C, var_C)


def _relu_norm_pool_bwd(epsilon, window, axis, residuals, cotangents):
    relu, pooled, winner, scale_C, mean_C, var_C = residuals
    dy, dmean_C, dvar_C = cotangents
    wide = functools.partial(widened, axis=axis)
    rstd_C = lax.rsqrt(var_C + epsilon)
    slope_C = scale_C * rstd_C
    dbias_C = dy.sum(others(axis))
    dscale_C = (dy * (pooled - wide(mean_C))).sum(others(axis)) * rstd_C
    # Ioffe & Szegedy (2015), section 3: through the output, the mean and the variance.
    count = relu.size // relu.shape[axis]
    dmean_C = (dmean_C - slope_C * dbias_C) / count
    dvar_C = (2 * dvar_C - slope_C * rstd_C * dscale_C) / count
    through_y = dy * wide(slope_C)
    if window > 1:
        through_y = _unpool(through_y, winner, window, relu.shape[1:3])
    through_moments = wide(dmean_C - dvar_C * mean_C) + wide(dvar_C) * relu
    dx = jnp.where(relu > 0, through_y + through_moments, 0).astype(relu.dtype)
    return dx, dscale_C, dbias_C


_relu_norm_pool.defvjp(_relu_norm_pool_fwd, _relu_norm_pool_bwd)
