"""Networks of few parameters: separable convolutions, kernels that are sums of patterns."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mnist_flax.errors import InputError
from mnist_flax.model import HE_NORMAL, CNNConfig, Padding, compute_dtype
from mnist_flax.ops import NHWC, REFERENCE

MAX_PATTERNS = 6


@dataclasses.dataclass(frozen=True)
class SeparableConfig(CNNConfig):
    """A `CNNConfig` of which each convolution but the first is depthwise separable.

    One kernel a channel, then a matrix over channels, with nothing between them. Such networks have
    few channels, and are computed in the form that suits few.

    Attributes:
      conv_bias: whether the first convolution has a bias, where its kernels are free.
      patterns: for each convolution, how many of `derivative_patterns` its kernels are sums of:
        that many parameters a kernel. Empty leaves every pixel free.
    """

    conv_bias: bool = False
    patterns: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.patterns and len(self.patterns) != len(self.widths):
            raise InputError(
                f"model patterns has {len(self.patterns)} entries for {len(self.widths)} "
                "convolutions; give one of each"
            )
        if not all(1 <= n <= MAX_PATTERNS for n in self.patterns):
            raise InputError(
                f"model patterns is {self.patterns}; give numbers from 1 to {MAX_PATTERNS}"
            )
        if self.patterns and self.conv_bias:
            raise InputError(
                "model conv_bias and patterns are both set, but kernels that are sums of patterns "
                "have no bias; set conv_bias to False"
            )

    @property
    def few_channels(self) -> bool:
        """Whether the network is computed in the form that suits few channels."""
        return True

    def make_conv(self, index: int, n_in: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the convolution number `index`, of `n_in` channels."""
        options = {"padding": self.padding[index], "dtype": compute_dtype(self), "rngs": rngs}
        patterns = self.patterns[index] if self.patterns else None
        if index > 0:
            return SeparableConv(n_in, self.widths[index], patterns=patterns, **options)
        if patterns is not None:
            return PatternConv(n_in, self.widths[index], patterns=patterns, **options)
        return super().make_conv(index, n_in, rngs=rngs)


@functools.cache
def derivative_patterns(number: int) -> np.ndarray:
    """Returns orthonormal patterns, whose sums are an image's derivatives at a pixel.

    In order: the smoothed image, its two slopes, its Laplacian, its mixed second derivative and the
    difference of its two pure ones. A derivative of order m along an axis is m differences of a
    binomially smoothed signal: [1, 2, 1], [1, 0, -1] and [1, -2, 1]. Kernels that are such sums are
    the structured receptive fields of Jacobsen et al. (2016, arXiv 1605.02971), there of Gaussians.

    Args:
      number: how many of the six.

    Returns:
      float32 [number, 3, 3].
    """
    smooth, slope, bend = np.array([[1.0, 2, 1], [1, 0, -1], [1, -2, 1]])
    across, along = np.outer(smooth, bend), np.outer(bend, smooth)
    patterns = [np.outer(smooth, smooth), np.outer(smooth, slope), np.outer(slope, smooth)]
    patterns += [across + along, np.outer(slope, slope), across - along]
    columns = np.stack([pattern.ravel() for pattern in patterns[:number]], axis=1)
    return np.linalg.qr(columns)[0].T.reshape(-1, 3, 3).astype(np.float32)


def pattern_sums(weights_NX: jax.Array) -> jax.Array:
    """Returns kernels [3, 3, ...]: sums of N derivatives' patterns by weights [N, ...]."""
    patterns_NIJ = derivative_patterns(len(weights_NX))
    return jnp.tensordot(patterns_NIJ.astype(weights_NX.dtype), weights_NX, axes=(0, 0))


def as_computed(x: jax.Array, *params: jax.Array, dtype: Any) -> tuple[jax.Array, ...]:
    """Returns a layer's inputs and parameters in `dtype`, or in the inputs' own if it is None."""
    return tuple(a.astype(x.dtype if dtype is None else dtype) for a in (x, *params))


class PatternConv(nnx.Module):
    """A convolution whose kernels are sums of derivatives' patterns."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        patterns: int,
        padding: Padding,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the patterns' weights with the variance 2 / fan-in of He et al. (2015).

        `dtype` is what the convolution computes in, by default the inputs' own.
        """
        init = HE_NORMAL
        self.weights = nnx.Param(init(rngs.params(), (patterns, n_in, n_out), jnp.float32))
        self.padding = padding
        self.dtype = dtype
        self.ops = REFERENCE

    @property
    def kernel(self) -> jax.Array:
        """The kernels [I, J, C, O]."""
        return pattern_sums(self.weights[...])

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Returns the convolution [B, H', W', O]."""
        x_BHWC, kernel_IJCO = as_computed(x_BHWC, self.kernel, dtype=self.dtype)
        return self.ops.conv(x_BHWC, kernel_IJCO, (1, 1), self.padding, dimension_numbers=NHWC)


class SeparableConv(nnx.Module):
    """A depthwise convolution, one kernel a channel, and a matrix over channels."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        patterns: int | None = None,
        padding: Padding,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the kernels; their product has the variance 2 / fan-in of He et al. (2015).

        `patterns` is of how many derivatives' patterns the kernels are sums; by default pixels are
        free. `dtype` is what the convolution computes in, by default the inputs' own.
        """
        shape = (3, 3) if patterns is None else (patterns,)
        init = nnx.initializers.normal(1 / math.sqrt(math.prod(shape)))
        self.depth = nnx.Param(init(rngs.params(), (*shape, n_in), jnp.float32))
        init = HE_NORMAL
        self.point = nnx.Param(init(rngs.params(), (n_in, n_out), jnp.float32))
        self.padding = padding
        self.dtype = dtype
        self.ops = REFERENCE

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """Returns the convolution [B, H', W', O]."""
        depth = self.depth[...]
        depth_IJC = pattern_sums(depth) if depth.ndim == 2 else depth
        x_BHWC, depth_IJC, point_CO = as_computed(
            x_BHWC, depth_IJC, self.point[...], dtype=self.dtype
        )
        return self.ops.separable_conv(x_BHWC, depth_IJC, point_CO, padding=self.padding)
