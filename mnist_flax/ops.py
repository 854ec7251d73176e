"""A network's operations as a value, and the reference ones in plain `lax` and `nnx`.

    ops.conv(lhs_BHWC, rhs_HWIO, strides, padding, ...)                 -> out_BHWO
    ops.separable_conv(x_BHWC, depth_IJC, point_CO, *, padding)         -> out_BHWO
    ops.max_pool(x_BHWC, *, window)                                     -> y_BHWC
    ops.relu_norm_pool(x_BHWC, scale_C, bias_C, *, epsilon, window)     -> y_BHWC, mean_C, var_C
    ops.materialize(function, images_BHWC)                              -> function(images_BHWC)

`REFERENCE` can be differentiated in every way, runs anywhere, and is what a TPU and an exported
program get. `mnist_flax.kernels` has others, which `for_platform` chooses, outside of any trace:
the choice travels with the model (`CNN(config, ops=...)`), a static part of its graph definition,
so `jax.jit` keeps programs of different operations apart.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

NHWC = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class Ops:
    """What a network computes with. Hashable; instances of the same functions are equal.

    Attributes:
      conv: `conv(lhs, rhs, window_strides, padding, ...)`, as `lax.conv_general_dilated` and for
        `nnx.Conv`, which takes it as `conv_general_dilated`.
      separable_conv: `separable_conv(x_BHWC, depth_IJC, point_CO, *, padding)` convolves each
        channel by its own kernel, depth[i, j, c], then applies the matrix point[c, o] over
        channels; padding is "SAME" or "VALID". Returns [B, H', W', O], in the inputs' dtype.
      max_pool: `max_pool(x_BHWC, *, window)` returns the maximum of each `window` x `window` block,
        [B, H // window, W // window, C]; what is left over is dropped. Among equal maxima the first
        in row-major order receives the gradient.
      relu_norm_pool: `relu_norm_pool(x_BHWC, scale_C, bias_C, *, epsilon, window=1)` is ReLU, then
        BatchNorm by the statistics of this batch, then max-pooling. Returns the output, and the
        mean [C] and the biased variance [C] of the ReLU's output over the whole (global) batch:
        what running statistics follow. The scale may have any sign or be zero.
      materialize: `materialize(function, images_BHWC)` returns `function(images_BHWC)`, of images
        each by itself to as many, computed once however often its values are read.
      few_channels: the operations for networks of few channels; None if they are the same.
    """

    conv: Callable[..., jax.Array]
    separable_conv: Callable[..., jax.Array]
    max_pool: Callable[..., jax.Array]
    relu_norm_pool: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    materialize: Callable[[Callable[[jax.Array], jax.Array], jax.Array], jax.Array]
    few_channels: Ops | None = None


def _reference_separable_conv(x_BHWC, depth_IJC, point_CO, *, padding):
    return one_conv(lax.conv_general_dilated, x_BHWC, depth_IJC, point_CO, padding)


def one_conv(conv, x_BHWC, depth_IJC, point_CO, padding):
    """Convolves once, for with nothing between the two convolutions they are one."""
    kernel_IJCO = jnp.einsum("ijc,co->ijco", depth_IJC, point_CO)
    return conv(x_BHWC, kernel_IJCO, (1, 1), padding, dimension_numbers=NHWC)


def _reference_max_pool(x_BHWC, *, window):
    if window == 1:
        return x_BHWC
    return nnx.max_pool(x_BHWC, window_shape=(window, window), strides=(window, window))


def _reference_relu_norm_pool(x_BHWC, scale_C, bias_C, *, epsilon, window=1):
    relu = nnx.relu(x_BHWC)
    wide = functools.partial(widened, axis=3)
    mean_C, var_C = moments(relu, 3)
    slope_C = scale_C * lax.rsqrt(var_C + epsilon)
    y_BHWC = (relu - wide(mean_C)) * wide(slope_C) + wide(bias_C)
    return _reference_max_pool(y_BHWC, window=window), mean_C, var_C


def _call(function, images_BHWC):
    return function(images_BHWC)


@jax.custom_jvp
def maximum(x, y):
    """`jnp.maximum`, whose slope at a tie is x's alone instead of half of each."""
    return jnp.maximum(x, y)


@maximum.defjvp
def _maximum_jvp(primals, tangents):
    x, y = primals
    dx, dy = tangents
    return maximum(x, y), jnp.where(y > x, dy, dx)


def others(axis):
    """Returns the axes of an image batch beside the channels'."""
    return tuple(n for n in range(4) if n != axis)


def widened(a_C, *, axis):
    """Returns a number per channel in the shape of images whose channels are axis `axis`."""
    return jnp.expand_dims(a_C, others(axis))


def moments(x, axis):
    """Returns the mean and the biased variance of each channel."""
    mean_C = x.mean(others(axis))
    var_C = maximum((x * x).mean(others(axis)) - mean_C * mean_C, 0.0)
    return mean_C, var_C


REFERENCE = Ops(
    conv=lax.conv_general_dilated,
    separable_conv=_reference_separable_conv,
    max_pool=_reference_max_pool,
    relu_norm_pool=_reference_relu_norm_pool,
    materialize=_call,
)


def for_platform(platform: str) -> Ops:
    """Returns the operations that are fastest on a device of `platform` (`jax.Device.platform`)."""
    if importlib.util.find_spec("mnist_flax.kernels") is None:  # a copy that does without them
        return REFERENCE
    from mnist_flax import kernels  # which stands on this module

    own = {"cpu": kernels.CPU, "gpu": kernels.GPU, "cuda": kernels.GPU, "rocm": kernels.GPU}
    return own.get(platform, REFERENCE)
