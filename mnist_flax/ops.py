"""A network's operations as a value, in plain `lax` and in the forms that CPUs and GPUs run fast.

    Ops                             the operations; REFERENCE, CPU and GPU are some
    for_platform(platform) -> Ops   the fastest there

    ops.conv(lhs_BHWC, rhs_HWIO, strides, padding, ...)                 -> out_BHWO
    ops.separable_conv(x_BHWC, depth_IJC, point_CO, *, padding)         -> out_BHWO
    ops.max_pool(x_BHWC, *, window)                                     -> y_BHWC
    ops.relu_norm_pool(x_BHWC, scale_C, bias_C, *, epsilon, window)     -> y_BHWC, mean_C, var_C
    ops.materialize(function, images_BHWC)                              -> function(images_BHWC)

`REFERENCE` is plain `lax` and `nnx`: it can be differentiated in every way, runs anywhere, and is
what a TPU and an exported program get. `CPU` has all five in forms of its own, `GPU` the two that
pool, for XLA scatters the gradient of max-pooling and has no form of that which sums in the same
order each time. They have the same values, and gradients written by hand: reverse mode of any order
(`jax.grad` of `jax.grad`), but no forward mode (`jvp`, `jacfwd`, `hessian`).

The choice is made outside of any trace, and travels with the model (`CNN(config, ops=...)`): a
static part of its graph definition, so `jax.jit` keeps programs of different operations apart.

A sharded batch is worked on where it lies: `_on_each_device` says how.

Too few channels to fill a vector register are slow as the last axis. What `Ops.few_channels` holds
works in planes, [C, H, W, B], on the CPU. What it takes and returns is [B, H, W, C] all the same:
XLA drops the transpositions between two of them.

Times are the best of many on two cores of a Zen 4 EPYC, jax 0.10.2, float32, one JAX device a core,
for the convolution of 128 images of 26x26x32 to 24x24x64: `python experiments/operations.py` prints
them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from mnist_flax import winograd
from mnist_flax.winograd import chunk_rows, chunked, joined

BATCH_AXIS = "data"  # the mesh axis that `fit` shards a batch over
NHWC = ("NHWC", "HWIO", "NHWC")
MANY = 8  # channels, of input and output, from which Winograd's algorithm beats products of patches
CHUNK_BYTES = 512 * 1024  # of a chunk's patches; with input and output, one core's L2


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


def for_platform(platform: str) -> Ops:
    """Returns the operations that are fastest on a device of `platform` (`jax.Device.platform`)."""
    return {"cpu": CPU, "gpu": GPU, "cuda": GPU, "rocm": GPU}.get(platform, REFERENCE)


# The reference: plain `lax` and `nnx`


def _reference_separable_conv(x_BHWC, depth_IJC, point_CO, *, padding):
    return _one_conv(lax.conv_general_dilated, x_BHWC, depth_IJC, point_CO, padding)


def _one_conv(conv, x_BHWC, depth_IJC, point_CO, padding):
    """Convolves once, for with nothing between the two convolutions they are one."""
    kernel_IJCO = jnp.einsum("ijc,co->ijco", depth_IJC, point_CO)
    return conv(x_BHWC, kernel_IJCO, (1, 1), padding, dimension_numbers=NHWC)


def _reference_max_pool(x_BHWC, *, window):
    if window == 1:
        return x_BHWC
    return nnx.max_pool(x_BHWC, window_shape=(window, window), strides=(window, window))


def _reference_relu_norm_pool(x_BHWC, scale_C, bias_C, *, epsilon, window=1):
    relu = nnx.relu(x_BHWC)
    wide = functools.partial(_widened, axis=3)
    mean_C, var_C = _moments(relu, 3)
    slope_C = scale_C * lax.rsqrt(var_C + epsilon)
    y_BHWC = (relu - wide(mean_C)) * wide(slope_C) + wide(bias_C)
    return _reference_max_pool(y_BHWC, window=window), mean_C, var_C


def _call(function, images_BHWC):
    return function(images_BHWC)


REFERENCE = Ops(
    conv=lax.conv_general_dilated,
    separable_conv=_reference_separable_conv,
    max_pool=_reference_max_pool,
    relu_norm_pool=_reference_relu_norm_pool,
    materialize=_call,
)


# The CPU's and the GPU's


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
        return _plane_conv(lhs, rhs, ((top, bottom), (left, right)))
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
        return _one_conv(conv, x_BHWC, depth_IJC, point_CO, padding)
    pads = lax.padtype_to_pads(x_BHWC.shape[1:3], depth_IJC.shape[:2], (1, 1), padding)
    return _separable_conv(x_BHWC, depth_IJC, point_CO, tuple(pads))


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
        return _in_planes(lambda x_CHWB: _max_pool(x_CHWB, window, x_BHWC.shape[1:3]), x_BHWC)
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
        out: Any = _relu_norm_pool(_swapped(x_BHWC), scale_C, bias_C, epsilon, window, 0)
        return _swapped(out[0]), *out[1:]
    return _relu_norm_pool(x_BHWC, scale_C, bias_C, epsilon, window, 3)


def materialize(function: Callable[[jax.Array], jax.Array], images_BHWC: jax.Array) -> jax.Array:
    """Returns `function(images_BHWC)`, computed once, as `Ops.materialize` does on the CPU.

    There XLA computes anew, for each read, what no loop or matrix product keeps apart, and heeds no
    `lax.optimization_barrier` (256 images resampled twice: 12 ms; in this loop over chunks of the
    batch 1.8).

    Args:
      function: of images [b, H, W, C], each by itself, to as many.
      images_BHWC: the images.
    """

    def of_chunks(x_BHWC):
        row_bytes = math.prod(x_BHWC.shape[1:]) * x_BHWC.dtype.itemsize
        rows = chunk_rows(len(x_BHWC), row_bytes=row_bytes, chunk_bytes=CHUNK_BYTES // 8)
        return joined(lax.map(function, chunked(x_BHWC, rows)), len(x_BHWC))

    return _on_each_device(of_chunks, (images_BHWC,))


CPU = Ops(
    conv=conv,
    separable_conv=separable_conv,
    max_pool=max_pool,
    relu_norm_pool=relu_norm_pool,
    materialize=materialize,
    few_channels=Ops(
        conv=few_channels_conv,
        separable_conv=separable_conv,
        max_pool=functools.partial(max_pool, few_channels=True),
        relu_norm_pool=functools.partial(relu_norm_pool, few_channels=True),
        materialize=materialize,
    ),
)
GPU = dataclasses.replace(REFERENCE, max_pool=max_pool, relu_norm_pool=relu_norm_pool)


# Convolution


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x_BHWC, w_HWIO, padding):
    return _conv_fwd(x_BHWC, w_HWIO, padding)[0]


def _patch_product(x_BHWC, w_HWIO, padding):
    """Convolves by matrix products, of the patches around each pixel with the kernel."""
    I, J, C, O = w_HWIO.shape
    dtype = x_BHWC.dtype
    x_BHWC = _padded(x_BHWC, padding)
    H, W = x_BHWC.shape[1] - I + 1, x_BHWC.shape[2] - J + 1

    def of_chunk(x, w):
        taps = [x[:, i : i + H, j : j + W] for i, j in np.ndindex(I, J)]
        patches = _from_bits(jnp.concatenate(taps, -1), dtype)
        return _to_bits(_product(patches, w.reshape(I * J * C, O)).astype(dtype))

    def of_chunks(x, w):
        # A loop, for XLA would compute the padding anew in each shifted copy.
        row_bytes = H * W * I * J * C * x.dtype.itemsize
        rows = chunk_rows(len(x), row_bytes=row_bytes, chunk_bytes=CHUNK_BYTES)
        y = lax.map(lambda chunk: of_chunk(chunk, w), chunked(_to_bits(x), rows))
        return joined(_from_bits(y, dtype), len(x))

    return _on_each_device(of_chunks, (x_BHWC,), (w_HWIO,))


def _to_bits(x):
    """Returns bfloat16 as the integers of its bits, and other types as they are.

    XLA copies bfloat16 number by number, and what a loop fills with it whole in each iteration.
    """
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(x, dtype):
    if dtype != jnp.bfloat16:
        return x
    return lax.bitcast_convert_type(lax.optimization_barrier(x), jnp.bfloat16)


def _product(a_MK, b_KN):
    """Multiplies matrices; sums bfloat16 in float32, which is also what CPUs are fast at."""
    dtype = jnp.promote_types(a_MK.dtype, jnp.float32)
    return jnp.matmul(a_MK, b_KN, preferred_element_type=dtype)


def _conv_fwd(x_BHWC, w_HWIO, padding):
    if _by_winograd(x_BHWC, w_HWIO):
        convolve = functools.partial(winograd.convolve, padding=padding)
        y_BHWO = _on_each_device(convolve, (x_BHWC,), (w_HWIO,))
    else:
        y_BHWO = _patch_product(x_BHWC, w_HWIO, padding)
    return y_BHWO, (x_BHWC, w_HWIO)


def _by_winograd(x_BHWC, w_HWIO):
    I, J, C, O = w_HWIO.shape
    square = I == J and I in winograd.KERNEL_SIZES
    return square and min(C, O) >= MANY and x_BHWC.dtype != jnp.bfloat16


def _conv_bwd(padding, residuals, dy_BHWO):
    x_BHWC, w_HWIO = residuals
    if _by_winograd(x_BHWC, w_HWIO):
        gradients = functools.partial(winograd.gradients, padding=padding)
        return _on_each_device(gradients, (x_BHWC, dy_BHWO), (w_HWIO,), total=(False, True))
    kernel_gradient = functools.partial(_kernel_gradient, size=w_HWIO.shape[:2], padding=padding)
    dx_BHWC = _input_gradient(w_HWIO, dy_BHWO, padding)
    dw_HWIO = _on_each_device(kernel_gradient, (x_BHWC, dy_BHWO), total=True)
    return dx_BHWC, dw_HWIO.astype(w_HWIO.dtype)


_conv.defvjp(_conv_fwd, _conv_bwd)


def _input_gradient(w_HWIO, dy_BHWO, padding):
    """Convolves the output's gradient by the flipped kernel."""
    flipped_HWOI = jnp.flip(w_HWIO, (0, 1)).swapaxes(2, 3)
    return _patch_product(dy_BHWO, flipped_HWOI, _complement(padding, w_HWIO.shape[:2]))


def _on_each_device(
    fun: Callable,
    batched: tuple,
    shared: tuple = (),
    *,
    total: bool | tuple[bool, ...] = False,
):
    """Returns `fun(*batched, *shared)`, computed on each device for its own examples.

    The compiler would gather a loop over chunks of a sharded batch onto every device. What `fun`
    returns is batched too, or a sum over examples: `total` says so, of all or of each.

    Where the batch lies, of Explicit axes the array's type says. Of Auto axes nothing does, but a
    mesh in context (`jax.set_mesh`) is the one that the program runs on: the batch is divided over
    as many of its axes as can share it. Without a mesh in context it is divided into a group for
    each CPU device, which the compiler divides over those that turn out to hold the batch; on
    a single one of several devices, the groups are worked on together. Only where the batch is no
    multiple of the devices, or they do not divide the CPU's devices, is it computed whole on each.
    """
    mesh, axes = _batch_axes(batched[0])
    if axes:
        return _in_shards(fun, batched, shared, total=total, mesh=mesh, axes=axes)
    groups = math.gcd(len(batched[0]), jax.device_count("cpu")) if mesh.empty else 1
    if groups == 1:
        return fun(*batched, *shared)
    divided = [a.reshape(groups, -1, *a.shape[1:]) for a in batched]
    in_axes = (0,) * len(batched) + (None,) * len(shared)
    out = jax.vmap(fun, in_axes=in_axes)(*divided, *shared)

    def together(sum_, ys):
        return jax.tree.map(lambda y: y.sum(0) if sum_ else joined(y, len(batched[0])), ys)

    return jax.tree.map(together, total, out)


def _batch_axes(x):
    """Returns the mesh, and those of its axes that the first axis of `x` is to be divided over."""
    sharding = jax.typeof(x).sharding
    mesh = jax.sharding.get_abstract_mesh()
    mesh = sharding.mesh if mesh.empty else mesh
    explicit = sharding.spec[0] if sharding.spec else None
    axes = list(explicit) if isinstance(explicit, tuple) else [explicit] if explicit else []
    shares = math.prod(mesh.shape[axis] for axis in axes)
    for axis, type_ in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if type_ == AxisType.Auto and len(x) % (shares * mesh.shape[axis]) == 0:
            axes.append(axis)
            shares *= mesh.shape[axis]
    return mesh, tuple(axis for axis in axes if mesh.shape[axis] > 1)


def _in_shards(fun, batched, shared, *, total, mesh, axes):
    batch, all_ = PartitionSpec(axes), PartitionSpec()

    def of_local(*local):
        return jax.tree.map(lambda sum_, y: lax.psum(y, axes) if sum_ else y, total, fun(*local))

    return jax.shard_map(
        of_local,
        mesh=mesh,
        in_specs=(batch,) * len(batched) + (all_,) * len(shared),
        out_specs=jax.tree.map(lambda sum_: all_ if sum_ else batch, total),
        axis_names=set(axes),
        check_vma=False,
    )(*batched, *shared)


def _kernel_gradient(x_BHWC, dy_BHWO, *, size, padding):
    """Sums x[b, h + i, w + j, c] * dy[b, h, w, o] over b, h and w: [I, J, C, O]."""
    dtype = x_BHWC.dtype
    x_BHWC = _padded(_to_bits(x_BHWC), padding)
    _, H, W, O = dy_BHWO.shape
    C = x_BHWC.shape[-1]
    taps = list(np.ndindex(*size))

    def of_chunk(x, dy):
        # Matrix products are fast where the summed index is the left side's last.
        x = lax.optimization_barrier(jnp.moveaxis(x, -1, 0))
        patches = jnp.concatenate([x[:, :, i : i + H, j : j + W] for i, j in taps])
        patches_PT = _from_bits(patches, dtype).reshape(len(taps) * C, -1)
        return _product(patches_PT, _from_bits(dy, dtype).reshape(-1, O))

    row_bytes = H * W * len(taps) * C * jnp.dtype(dtype).itemsize
    rows = chunk_rows(len(x_BHWC), row_bytes=row_bytes, chunk_bytes=CHUNK_BYTES)
    chunks = chunked(x_BHWC, rows), chunked(_to_bits(dy_BHWO), rows)
    total = jnp.zeros((len(taps) * C, O), jnp.promote_types(dtype, jnp.float32))
    total, _ = lax.scan(lambda sum_, xs: (sum_ + of_chunk(*xs), None), total, chunks)
    return total.reshape(*size, C, O)


def _padded(x, padding):
    """Puts zeros around each image of [B, H, W, C] or [C, H, W, B]; less than none cuts it."""
    config = ((0, 0, 0), *((lo, hi, 0) for lo, hi in padding), (0, 0, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _complement(padding, size):
    """Returns the padding with which the flipped kernel undoes a convolution's loss of pixels."""
    return tuple((k - 1 - lo, k - 1 - hi) for k, (lo, hi) in zip(size, padding, strict=True))


# Pooling


def _pool(x_BHWC, window):
    """Returns the maximum of each window and which element it is, the first of equals."""
    H, W = (n // window * window for n in x_BHWC.shape[1:3])
    elements = [x_BHWC[:, i:H:window, j:W:window] for i in range(window) for j in range(window)]
    best, winner = elements[0], jnp.zeros(elements[0].shape, jnp.uint8)
    for n, element in enumerate(elements[1:], 1):
        winner = jnp.where(element > best, jnp.uint8(n), winner)
        best = _maximum(best, element)
    return best, winner


@jax.custom_jvp
def _maximum(x, y):
    """`jnp.maximum`, whose slope at a tie is x's alone instead of half of each."""
    return jnp.maximum(x, y)


@_maximum.defjvp
def _maximum_jvp(primals, tangents):
    x, y = primals
    dx, dy = tangents
    return _maximum(x, y), jnp.where(y > x, dy, dx)


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


def _others(axis):
    return tuple(n for n in range(4) if n != axis)


def _widened(a_C, *, axis):
    return jnp.expand_dims(a_C, _others(axis))


def _moments(x, axis):
    mean_C = x.mean(_others(axis))
    var_C = _maximum((x * x).mean(_others(axis)) - mean_C * mean_C, 0.0)
    return mean_C, var_C


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _relu_norm_pool(x, scale_C, bias_C, epsilon, window, axis):
    return _relu_norm_pool_fwd(x, scale_C, bias_C, epsilon, window, axis)[0]


def _relu_norm_pool_fwd(x, scale_C, bias_C, epsilon, window, axis):
    wide = functools.partial(_widened, axis=axis)
    pooled = relu = nnx.relu(x)  # whose slope at 0 is 0; that of jnp.maximum is 0.5
    winner = None
    mean_C, var_C = _moments(relu, axis)
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
    wide = functools.partial(_widened, axis=axis)
    rstd_C = lax.rsqrt(var_C + epsilon)
    slope_C = scale_C * rstd_C
    dbias_C = dy.sum(_others(axis))
    dscale_C = (dy * (pooled - wide(mean_C))).sum(_others(axis)) * rstd_C
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


# Planes


def _swapped(x):
    """Returns [B, H, W, C] as [C, H, W, B], and the other way around."""
    return x.transpose(3, 1, 2, 0)


def _in_planes(fun, x_BHWC):
    return _swapped(fun(_swapped(x_BHWC)))


def _shifted_sum(x_CHWB, w_IJC, padding):
    """Sums x[c, h + i, w + j, b] * w[i, j, c] over i and j; a single plane serves every c.

    A loop over c, whose operand XLA computes once: it would compute the terms of a plain sum each
    from the beginning.
    """
    x_CHWB = _padded(x_CHWB, padding)
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
        x_CHWB = _swapped(x_BHWC)
        y_ON = w_CO.T @ x_CHWB.reshape(x_CHWB.shape[0], -1)
        return _swapped(y_ON.reshape(-1, *x_CHWB.shape[1:]))

    return _on_each_device(product, (x_BHWC,), (w_CO,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _separable_conv(x_BHWC, depth_IJC, point_CO, padding):
    return _separable_conv_fwd(x_BHWC, depth_IJC, point_CO, padding)[0]


def _separable_conv_fwd(x_BHWC, depth_IJC, point_CO, padding):
    deep_BHWC = _swapped(_shifted_sum(_swapped(x_BHWC), depth_IJC, padding))
    return _over_channels(deep_BHWC, point_CO), (x_BHWC, deep_BHWC, depth_IJC, point_CO)


def _separable_conv_bwd(padding, residuals, dy_BHWO):
    x_BHWC, deep_BHWC, depth_IJC, point_CO = residuals
    size = depth_IJC.shape[:2]
    ddeep_BHWC = _over_channels(dy_BHWO, point_CO.T)
    flipped_IJC = jnp.flip(depth_IJC, (0, 1))
    dx_CHWB = _shifted_sum(_swapped(ddeep_BHWC), flipped_IJC, _complement(padding, size))

    def gradients(x_BHWC, deep_BHWC, ddeep_BHWC, dy_BHWO):
        def of_plane(planes):
            x_HWB, dy_HWB = planes
            return jnp.stack([(tap * dy_HWB).sum((0, 1)) for tap in _shifted(x_HWB, size)])

        x_CHWB = _padded(_swapped(x_BHWC), padding)
        ddepth_CTB = lax.map(of_plane, (x_CHWB, _swapped(ddeep_BHWC)))
        deep_CN, dy_ON = (_swapped(a).reshape(a.shape[-1], -1) for a in (deep_BHWC, dy_BHWO))
        return ddepth_CTB.sum(-1).T.reshape(depth_IJC.shape), deep_CN @ dy_ON.T

    batched = (x_BHWC, deep_BHWC, ddeep_BHWC, dy_BHWO)
    return _swapped(dx_CHWB), *_on_each_device(gradients, batched, total=True)


_separable_conv.defvjp(_separable_conv_fwd, _separable_conv_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _plane_conv(x_BHW1, w_IJ1O, padding):
    """Convolves images of one channel."""
    return _in_planes(lambda x_1HWB: _shifted_sum(x_1HWB, w_IJ1O[:, :, 0], padding), x_BHW1)


def _plane_conv_fwd(x_BHW1, w_IJ1O, padding):
    return _plane_conv(x_BHW1, w_IJ1O, padding), (x_BHW1, w_IJ1O)


def _plane_conv_bwd(padding, residuals, dy_BHWO):
    x_BHW1, w_IJ1O = residuals
    *size, _, O = w_IJ1O.shape
    # The other convolutions' way: most often nobody asks for it, and XLA leaves it out.
    dx_BHW1 = _input_gradient(w_IJ1O, dy_BHWO, padding)

    def gradient(x_BHW1, dy_BHWO):
        # A product for each row of the image, whose shifted copies stay in cache.
        x_HWB, dy_OHWB = _padded(_swapped(x_BHW1), padding)[0], _swapped(dy_BHWO)

        def add_row(h, dw_TO):
            x_IWB = lax.dynamic_slice_in_dim(x_HWB, h, size[0])
            taps = [tap.ravel() for tap in _shifted(x_IWB, size)]
            dy_OWB = lax.dynamic_index_in_dim(dy_OHWB, h, 1, keepdims=False)
            return dw_TO + jnp.stack(taps) @ dy_OWB.reshape(O, -1).T

        zeros_TO = jnp.zeros((math.prod(size), O), dy_BHWO.dtype)
        dw_TO = lax.fori_loop(0, dy_OHWB.shape[1], add_row, zeros_TO)
        return dw_TO.reshape(w_IJ1O.shape)

    return dx_BHW1, _on_each_device(gradient, (x_BHW1, dy_BHWO), total=True)


_plane_conv.defvjp(_plane_conv_fwd, _plane_conv_bwd)
