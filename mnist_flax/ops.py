"""Convolution and ReLU-BatchNorm-pool, written so that XLA's CPU backend runs them fast.

    conv(lhs_BHWC, rhs_HWIO, window_strides, padding, ...)       -> out_BHWO
    relu_norm_pool(inputs_BHWC, scale_C, bias_C, *, epsilon, pool) -> (out_BHWC, mean_C, var_C)
    max_pool(inputs_BHWC)                                        -> out_BHWC

`conv` takes the place of `jax.lax.conv_general_dilated`: `nnx.Conv(..., conv_general_dilated=conv)`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

BATCH_AXIS = "data"
"""The mesh axis over which a batch is sharded."""

_NHWC = ("NHWC", "HWIO", "NHWC")
_CHUNK_BYTES = 512 * 1024


def conv(
    lhs,
    rhs,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers=None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision=None,
    preferred_element_type=None,
    out_sharding=None,
):
    """Convolves as `jax.lax.conv_general_dilated` does, with the same arguments."""
    dims = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    plain = (
        jax.default_backend() == "cpu"
        and lhs.ndim == 4
        and dims == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC)
        and set(window_strides) == {1}
        and set(lhs_dilation or (1,)) == {1}
        and set(rhs_dilation or (1,)) == {1}
        and feature_group_count == batch_group_count == 1
        and lhs.dtype == rhs.dtype
        and preferred_element_type in (None, lhs.dtype)
        and out_sharding is None
    )
    if not plain:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], (1, 1), padding)
    (top, bottom), (left, right) = padding
    if top or bottom or left or right:
        lhs = jnp.pad(lhs, ((0, 0), (top, bottom), (left, right), (0, 0)))
    return _conv_valid(lhs, rhs)


@jax.custom_vjp
def _conv_valid(x_BHWC, w_HWIO):
    # One row of padding, cropped again, moves XLA to a path twice as fast.
    y = lax.conv_general_dilated(x_BHWC, w_HWIO, (1, 1), ((0, 1), (0, 0)), dimension_numbers=_NHWC)
    return y[:, :-1]


def _conv_valid_fwd(x_BHWC, w_HWIO):
    return _conv_valid(x_BHWC, w_HWIO), (x_BHWC, w_HWIO)


def _conv_valid_bwd(residuals, dy_BHWO):
    x_BHWC, w_HWIO = residuals
    h, w = w_HWIO.shape[:2]
    w_HWOI = jnp.flip(w_HWIO, (0, 1)).swapaxes(2, 3)
    dx_BHWC = lax.conv_general_dilated(
        dy_BHWO, w_HWOI, (1, 1), ((h - 1, h - 1), (w - 1, w - 1)), dimension_numbers=_NHWC
    )
    dw_HWIO = _over_batch(functools.partial(_kernel_gradient, size=(h, w)))(x_BHWC, dy_BHWO)
    return dx_BHWC, dw_HWIO


_conv_valid.defvjp(_conv_valid_fwd, _conv_valid_bwd)


def _over_batch(sum_over_examples):
    """Makes a sum over the examples local to each device of the mesh in effect, then summed."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(BATCH_AXIS, 1) == 1 or BATCH_AXIS in mesh.manual_axes:
        return sum_over_examples
    return jax.shard_map(
        lambda *arrays: lax.psum(sum_over_examples(*arrays), BATCH_AXIS),
        mesh=mesh,
        in_specs=P(BATCH_AXIS),
        out_specs=P(),
        check_vma=False,
    )


def _kernel_gradient(x_BHWC, dy_BHWO, *, size):
    """Sums over examples and positions x[h + i, w + j, c] * dy[h, w, o] for each kernel tap."""
    B, H, W, O = dy_BHWO.shape
    C = x_BHWC.shape[-1]
    shifts = [(i, j) for i in range(size[0]) for j in range(size[1])]
    # Few input channels make the products too narrow: take all taps in one.
    groups = [shifts] if C < 16 else [[shift] for shift in shifts]

    def of_chunk(x, dy):
        dy_OT = lax.optimization_barrier(dy.reshape(-1, O).T)
        taps = [jnp.concatenate([x[:, i : i + H, j : j + W] for i, j in g], -1) for g in groups]
        return jnp.concatenate([dy_OT @ t.reshape(-1, t.shape[-1]) for t in taps], -1)

    width = max(O, C * len(groups[0])) * dy_BHWO.dtype.itemsize
    chunk = max(1, min(B, _CHUNK_BYTES // (H * W * width)))
    while B % chunk:
        chunk -= 1
    chunks = [a.reshape(-1, chunk, *a.shape[1:]) for a in (x_BHWC, dy_BHWO)]
    zero = jnp.zeros((O, size[0] * size[1] * C), x_BHWC.dtype)
    total, _ = lax.scan(lambda t, c: (t + of_chunk(*c), None), zero, chunks)
    return total.T.reshape(*size, C, O)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _relu_norm_pool(x, scale, bias, epsilon, pool):
    return _relu_norm_pool_fwd(x, scale, bias, epsilon, pool)[0]


def relu_norm_pool(inputs, scale, bias, *, epsilon: float, pool: bool):
    """Training-mode `max_pool(batch_norm(relu(inputs)))` with a hand-written gradient."""
    return _relu_norm_pool(inputs, scale, bias, epsilon, pool)


def _windows(x_BHWC):
    """The four elements of each 2x2 window, in row-major order."""
    B, H, W, C = x_BHWC.shape
    x = x_BHWC[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C)
    return [x[:, :, i, :, j] for i in (0, 1) for j in (0, 1)]


def _relu_norm_pool_fwd(x, scale, bias, epsilon, pool):
    relu = jnp.maximum(x, 0)
    mean = relu.mean((0, 1, 2))
    var = jnp.maximum((relu * relu).mean((0, 1, 2)) - mean * mean, 0)
    rstd = lax.rsqrt(var + epsilon)
    winner = None
    if pool:
        # scale < 0 turns the largest output into the smallest input.
        sign = jnp.where(scale < 0, -1, 1).astype(x.dtype)
        a, b, c, d = (w * sign for w in _windows(relu))
        ab, cd = jnp.maximum(a, b), jnp.maximum(c, d)
        winner = jnp.where(ab >= cd, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
        winner = winner.astype(jnp.uint8)
        relu = jnp.maximum(ab, cd) * sign
    y = relu * (rstd * scale) + (bias - mean * rstd * scale)
    return (y, mean, var), (x, relu if pool else None, winner, scale, mean, rstd)


def _relu_norm_pool_bwd(epsilon, pool, residuals, cotangents):
    x, pooled, winner, scale, mean, rstd = residuals
    dy, _, _ = cotangents
    B, H, W, C = x.shape
    relu = jnp.maximum(x, 0)
    dbias = dy.sum((0, 1, 2))
    dscale = (dy * ((pooled if pool else relu) - mean)).sum((0, 1, 2)) * rstd
    slope = scale * rstd
    count = B * H * W
    d = dy * slope
    if pool:
        index = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
        d = jnp.where(winner[:, :, None, :, None] == index, d[:, :, None, :, None], 0)
        d = d.reshape(B, H // 2 * 2, W // 2 * 2, C)
        d = jnp.pad(d, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)))
    k2 = -slope * rstd * dscale / count
    k1 = -slope * dbias / count - k2 * mean
    dx = jnp.where(x > 0, d + k1 + k2 * x, 0)
    return dx, dscale, dbias


_relu_norm_pool.defvjp(_relu_norm_pool_fwd, _relu_norm_pool_bwd)


def max_pool(x):
    """2x2 max-pool."""
    a, b, c, d = _windows(x)
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))
