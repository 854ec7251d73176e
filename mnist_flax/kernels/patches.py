"""Convolution by matrix products of patches, the pixels around each pixel."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from mnist_flax.kernels import chunks
from mnist_flax.kernels.chunks import chunk_rows, chunked, joined
from mnist_flax.kernels.devices import on_each_device


def patch_product(x_BHWC, w_HWIO, padding):
    """Convolves by matrix products, of the patches around each pixel with the kernel."""
    I, J, C, O = w_HWIO.shape
    dtype = x_BHWC.dtype
    x_BHWC = padded(x_BHWC, padding)
    H, W = x_BHWC.shape[1] - I + 1, x_BHWC.shape[2] - J + 1

    def of_chunk(x, w):
        taps = [x[:, i : i + H, j : j + W] for i, j in np.ndindex(I, J)]
        patches = _from_bits(jnp.concatenate(taps, -1), dtype)
        return _to_bits(_product(patches, w.reshape(I * J * C, O)).astype(dtype))

    def of_chunks(x, w):
        # A loop, for XLA would compute the padding anew in each shifted copy.
        row_bytes = H * W * I * J * C * x.dtype.itemsize
        rows = chunk_rows(len(x), row_bytes=row_bytes, chunk_bytes=chunks.CHUNK_BYTES)
        y = lax.map(lambda chunk: of_chunk(chunk, w), chunked(_to_bits(x), rows))
        return joined(_from_bits(y, dtype), len(x))

    return on_each_device(of_chunks, (x_BHWC,), (w_HWIO,))


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


def input_gradient(w_HWIO, dy_BHWO, padding):
    """Convolves the output's gradient by the flipped kernel."""
    flipped_HWOI = jnp.flip(w_HWIO, (0, 1)).swapaxes(2, 3)
    return patch_product(dy_BHWO, flipped_HWOI, complement(padding, w_HWIO.shape[:2]))


def kernel_gradient(x_BHWC, dy_BHWO, *, size, padding):
    """Sums x[b, h + i, w + j, c] * dy[b, h, w, o] over b, h and w: [I, J, C, O]."""
    dtype = x_BHWC.dtype
    x_BHWC = padded(_to_bits(x_BHWC), padding)
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
    rows = chunk_rows(len(x_BHWC), row_bytes=row_bytes, chunk_bytes=chunks.CHUNK_BYTES)
    pairs = chunked(x_BHWC, rows), chunked(_to_bits(dy_BHWO), rows)
    total = jnp.zeros((len(taps) * C, O), jnp.promote_types(dtype, jnp.float32))
    total, _ = lax.scan(lambda sum_, xs: (sum_ + of_chunk(*xs), None), total, pairs)
    return total.reshape(*size, C, O)


def padded(x, padding):
    """Puts zeros around each image of [B, H, W, C] or [C, H, W, B]; less than none cuts it."""
    config = ((0, 0, 0), *((lo, hi, 0) for lo, hi in padding), (0, 0, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def complement(padding, size):
    """Returns the padding with which the flipped kernel undoes a convolution's loss of pixels."""
    return tuple((k - 1 - lo, k - 1 - hi) for k, (lo, hi) in zip(size, padding, strict=True))
