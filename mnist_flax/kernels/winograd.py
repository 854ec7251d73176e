"""Convolution with fewer multiplications: Winograd's minimal filtering.

    convolve(x_BHWC, w_KKCO, padding)             -> y_BHWO
    gradients(x_BHWC, dy_BHWO, w_KKCO, padding)   -> dx_BHWC, dw_KKCO

The output is computed in T x S tiles of m x m pixels, each from the n x n pixels of the input that
it depends on, n = m + K - 1. Tiles and kernel are transformed, linearly, to n x n numbers a
channel, which are multiplied number by number and summed over channels: n^2 matrix products. A
linear transform of the sums is the output. For a kernel of 3x3 that is 16 multiplications where a
tile of 2x2 takes 36, or 36 where a tile of 4x4 takes 144.

Sources: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), arXiv:1509.09308,
section 4, whose names the matrices have: G transforms the kernel, B^T the input, A^T the sums.
Barabasz, Anderson, Soodhalter & Gregg (2020), arXiv:1803.10986, section 3, for what they are: along
an axis, kernel and output are coefficients of polynomials, which are multiplied by their values at
n points (Toom and Cook), and a convolution is the adjoint of that product.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mnist_flax.kernels.chunks import chunk_rows, chunked, joined

Padding = tuple[tuple[int, int], tuple[int, int]]

# The n points beside infinity. Rounding errors grow with what the transforms make of absolute
# values: with kernels of 3x3 their sums are at most 7.1 times those of the convolution itself with
# (0, 1, -1), and 55 times with the other five, of the (0, a, -a, b, -b) in eighths those whose
# errors were least; (0, 1, -1, 2, -2) has 256. Between random numbers errors are far below that.
POINTS = {4: (0, 1, -1), 6: (0, 5 / 8, -5 / 8, 13 / 8, -13 / 8)}
KERNEL_SIZES = (2, 3, 4, 5)  # with 6 points larger ones would leave tiles of one pixel
CHUNK_BYTES = 1536 * 1024  # of a chunk's sums; with half or twice as many nothing is faster


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How an output of `size` (height and width) is divided, for a kernel of K x K."""

    K: int
    n: int
    size: tuple[int, int]
    padding: Padding

    @property
    def m(self) -> int:
        return self.n - self.K + 1

    @property
    def counts(self) -> tuple[int, int]:
        height, width = self.size
        return -(-height // self.m), -(-width // self.m)

    @property
    def multiplications(self) -> int:
        """How many an image takes for each channel of input and of output."""
        return self.n**2 * math.prod(self.counts)


def convolve(x_BHWC: jax.Array, w_KKCO: jax.Array, padding: Padding) -> jax.Array:
    """Convolves with stride 1.

    Args:
      x_BHWC: [B, H, W, C], float32 or float64.
      w_KKCO: [K, K, C, O], of the same dtype; K is one of KERNEL_SIZES.
      padding: zeros above and below, left and right.

    Returns:
      [B, H', W', O].
    """
    tiling = _tiling(x_BHWC.shape, w_KKCO.shape, padding)
    u_NNCO = _transform(_kernel_matrix(tiling), w_KKCO)
    chunks = chunked(x_BHWC, _rows(x_BHWC, w_KKCO, tiling))
    y_BHWO = lax.map(lambda x_BHWC: _convolved(x_BHWC, u_NNCO, tiling), chunks)
    return joined(y_BHWO, len(x_BHWC))


def gradients(
    x_BHWC: jax.Array, dy_BHWO: jax.Array, w_KKCO: jax.Array, padding: Padding
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `convolve`'s input, [B, H, W, C], and kernel, [K, K, C, O].

    They are by the same algorithm, and share the transform of the output's gradient.

    Args:
      x_BHWC: the input.
      dy_BHWO: the gradient of the output, [B, H', W', O].
      w_KKCO: the kernel.
      padding: that of the convolution.
    """
    tiling = _tiling(x_BHWC.shape, w_KKCO.shape, padding)
    u_NNCO, kernel_vjp = jax.vjp(lambda w: _transform(_kernel_matrix(tiling), w), w_KKCO)

    def add_chunk(du_NNCO, chunk):
        x_BHWC, dy_BHWO = chunk
        _, vjp = jax.vjp(lambda x, u: _convolved(x, u, tiling), x_BHWC, u_NNCO)
        dx_BHWC, more_NNCO = vjp(dy_BHWO)
        return du_NNCO + more_NNCO, dx_BHWC

    rows = _rows(x_BHWC, w_KKCO, tiling)
    chunks = chunked(x_BHWC, rows), chunked(dy_BHWO, rows)
    du_NNCO, dx_BHWC = lax.scan(add_chunk, jnp.zeros_like(u_NNCO), chunks)
    return joined(dx_BHWC, len(x_BHWC)), *kernel_vjp(du_NNCO)


def _rows(x_BHWC, w_KKCO, tiling):
    """Returns the images of a chunk, by their sums or, where it is larger, their transform."""
    row_bytes = tiling.multiplications * max(w_KKCO.shape[2:]) * w_KKCO.dtype.itemsize
    return chunk_rows(len(x_BHWC), row_bytes=row_bytes, chunk_bytes=CHUNK_BYTES)


def _tiling(x_shape, w_shape, padding):
    """Returns the tiling that takes the fewest multiplications."""
    K = w_shape[0]
    sizes = zip(x_shape[1:3], padding, strict=True)
    height, width = (n + lo + hi - K + 1 for n, (lo, hi) in sizes)
    tilings = [_Tiling(K, n, (height, width), padding) for n in POINTS if n > K]
    return min(tilings, key=lambda tiling: tiling.multiplications)


def _convolved(x_BHWC, u_NNCO, tiling):
    n, _, C, O = u_NNCO.shape
    height, width = tiling.size
    v_NNXC = _transform(_input_matrix(tiling), _tiles(x_BHWC, tiling)).reshape(n * n, -1, C)
    sums_NNXO = (v_NNXC @ u_NNCO.reshape(n * n, C, O)).reshape(n, n, -1)
    y_MMX = _transform(_output_matrix(tiling), sums_NNXO)
    y_MMBTSO = y_MMX.reshape(tiling.m, tiling.m, len(x_BHWC), *tiling.counts, O)
    return _assembled(y_MMBTSO)[:, :height, :width]


def _tiles(x_BHWC, tiling):
    """Returns what each tile of the output depends on, [n, n, B, T, S, C]."""
    n, m = tiling.n, tiling.m
    B, *size, C = x_BHWC.shape
    span = -(-n // m)  # how many blocks of m x m the input of a tile reaches into, along an axis
    blocks = [count + span - 1 for count in tiling.counts]
    edges = [
        (lo, count * m - lo - pixels, 0)
        for count, pixels, (lo, _) in zip(blocks, size, tiling.padding, strict=True)
    ]
    x_BHWC = lax.pad(x_BHWC, jnp.zeros((), x_BHWC.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    x = x_BHWC.reshape(B, blocks[0], m, blocks[1], m, C).transpose(2, 4, 0, 1, 3, 5)
    T, S = tiling.counts
    x = jnp.concatenate([x[: n - k * m, :, :, k : k + T] for k in range(span)], 0)
    return jnp.concatenate([x[:, : n - k * m, :, :, k : k + S] for k in range(span)], 1)


def _assembled(y_MMBTSO):
    """Returns the image of the tiles, [B, T * m, S * m, O].

    A transposition would do. But its gradient reads the memory in runs of O numbers, and by itself
    takes a quarter of the whole gradient's time.
    """
    m, _, B, T, S, O = y_MMBTSO.shape
    rows = []
    for row in jnp.split(y_MMBTSO, m, axis=0):
        pixels = [y.transpose(2, 3, 0, 4, 1, 5) for y in jnp.split(row, m, axis=1)]
        rows.append(jnp.concatenate(pixels, axis=4))
    return jnp.concatenate(rows, axis=2).reshape(B, T * m, S * m, O)


def _transform(matrix, x):
    """Applies a matrix to the first axis of x and to the second."""
    rows, columns = matrix.shape
    matrix = jnp.asarray(matrix, x.dtype)
    y = (matrix @ x.reshape(columns, -1)).reshape(rows, columns, -1)
    return (jnp.broadcast_to(matrix, (rows, rows, columns)) @ y).reshape(rows, rows, *x.shape[2:])


def _powers(points, count):
    """Returns the powers 0 to count - 1 of each point, and for infinity the last power alone."""
    return np.vstack([np.vander(points, count, increasing=True), np.eye(count)[-1]])


def _output_matrix(tiling):
    """Returns A^T, [m, n]: the adjoint of evaluating a polynomial of m coefficients."""
    return _powers(POINTS[tiling.n], tiling.m).T


def _kernel_matrix(tiling):
    """Returns G, [n, K]: a polynomial's values, over what Lagrange's interpolation divides by."""
    points = POINTS[tiling.n]
    divisors = [math.prod(a - b for b in points if b != a) for a in points]
    return _powers(points, tiling.K) / np.array([*divisors, 1])[:, None]


def _input_matrix(tiling):
    """Returns B^T, [n, n]: the adjoint of Lagrange's interpolation, without the division."""
    points = POINTS[tiling.n]
    rows = [np.poly([b for b in points if b != a])[::-1] for a in points]
    return np.vstack([*(np.append(row, 0) for row in rows), np.poly(points)[::-1]])
