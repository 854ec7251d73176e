"""Winograd's algorithm against `lax`, in float64, and its matrices against the published ones."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first, tries
from hypothesis import given, settings
from numpy.testing import assert_array_equal
from test_kernels import close, lax_conv, normal

from mnist_flax.kernels import chunks, winograd


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def operands(batch, size, channels, K, padding):
    x, w = normal(batch, *size, channels[0]), normal(K, K, *channels)
    sizes = [n + sum(pads) - K + 1 for n, pads in zip(size, padding, strict=True)]
    return x, normal(batch, *sizes, channels[1], seed=1), w


@functools.partial(jax.jit, static_argnums=3)
def plain(x, dy, w, padding):
    y, vjp = jax.vjp(lambda x, w: lax_conv(x, w, padding), x, w)
    return y, *vjp(dy)


def fast(x, dy, w, padding):
    return winograd.convolve(x, w, padding), *winograd.gradients(x, dy, w, padding)


@settings(deadline=None, max_examples=tries(12), derandomize=True)
@given(
    batch=st.integers(1, 7),
    size=st.tuples(st.integers(5, 19), st.integers(5, 19)),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    K=st.sampled_from(winograd.KERNEL_SIZES),
    padding=st.sampled_from([((0, 0), (0, 0)), ((1, 1), (1, 1)), ((2, 0), (1, 4))]),
)
def test_value_and_gradients_are_those_of_lax(batch, size, channels, K, padding):
    args = operands(batch, size, channels, K, padding)
    close(jax.jit(fast, static_argnums=3)(*args, padding), plain(*args, padding))


@pytest.mark.parametrize("batch", first([13, 12]))
def test_chunks_change_nothing(monkeypatch, batch):
    padding = ((1, 1), (1, 1))
    args = operands(batch, (6, 6), (3, 4), 3, padding)
    expected = plain(*args, padding)
    image_bytes = 6**2 * 2**2 * 4 * 8  # two by two tiles of 4x4, in 6x6 points, 4 channels, float64
    for images in (0, 1, 4, 5, 99):
        monkeypatch.setattr(winograd, "CHUNK_BYTES", images * image_bytes)
        close(fast(*args, padding), expected)


def rows_of(batch, most):
    return chunks.chunk_rows(batch, row_bytes=10, chunk_bytes=10 * most)


def test_chunks_divide_the_batch_or_are_filled_up_with_zeros():
    assert [rows_of(12, most) for most in (0, 1, 5, 11, 12, 99)] == [1, 1, 4, 6, 12, 12]
    assert rows_of(499, 30) == 30  # 17 chunks, and not 499
    parts = chunks.chunked(np.arange(1.0, 14.0), rows_of(13, 5))
    assert_array_equal(parts, [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 0, 0]])
    assert_array_equal(chunks.joined(parts, 13), np.arange(1.0, 14.0))


@settings(deadline=None)
@given(batch=st.integers(1, 600), most=st.integers(1, 100))
def test_a_batch_of_any_size_is_few_chunks(batch, most):
    """At most twice as many as must be; those that are not whole are as few as can be."""
    rows, fewest = rows_of(batch, most), -(-batch // most)
    chunks = -(-batch // rows)
    assert 1 <= rows <= most
    assert chunks <= 2 * fewest
    if batch % rows:
        assert chunks == fewest
        assert all(batch % n for n in range(-(-min(most, batch) // 2), min(most, batch) + 1))


@pytest.mark.parametrize(
    ("size", "K", "n", "multiplications"),
    [
        ((24, 24), 3, 6, 36 * 6 * 6),
        ((3, 3), 3, 6, 36),
        ((2, 2), 3, 4, 16),
        ((5, 5), 3, 4, 16 * 3 * 3),  # 36 * 2 * 2 would be as many; the smaller tiles are more exact
        ((9, 4), 5, 6, 36 * 5 * 2),
    ],
)
def test_the_tiling_takes_the_fewest_multiplications(size, K, n, multiplications):
    tiling = winograd._tiling((1, *(s + K - 1 for s in size), 1), (K, K, 1, 1), ((0, 0), (0, 0)))
    assert (tiling.n, tiling.multiplications) == (n, multiplications)


def test_the_matrices_of_2x2_tiles_are_the_published_ones():
    """Lavin & Gray (2015), section 4.1, but for the signs of the first and last rows."""
    tiling = winograd._tiling((1, 4, 4, 1), (3, 3, 1, 1), ((0, 0), (0, 0)))
    G = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
    BT = [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]
    AT = [[1, 1, 1, 0], [0, 1, -1, -1]]
    signs = np.array([-1, 1, 1, 1])
    assert_array_equal(winograd._kernel_matrix(tiling), signs[:, None] * G)
    assert_array_equal(winograd._input_matrix(tiling), np.array([-1, 1, 1, -1])[:, None] * BT)
    assert_array_equal(winograd._output_matrix(tiling), np.array([1, 1, 1, -1]) * AT)


@pytest.mark.parametrize(("size", "n"), [(2, 4), (5, 4), (8, 6)])
def test_float32_errs_by_no_more_than_its_roundings_come_to(size, n):
    """Each number's bound is the algorithm on absolute values, times the roundings on its way.

    Higham, "Accuracy and Stability of Numerical Algorithms" (2002), section 3.1: k roundings in
    a sum of products, in any order, come to at most k u / (1 - k u) of the sum of absolute values,
    u = 2^-24. So no processor may exceed it, and one that multiplies in bfloat16 would.
    """
    padding = ((0, 0), (0, 0))
    B, C, O, K = 2, 8, 12, 3
    args = operands(B, (size + K - 1,) * 2, (C, O), K, padding)
    tiling = winograd._tiling(args[0].shape, args[2].shape, padding)
    assert tiling.n == n
    exact = plain(*args, padding)
    low = jax.jit(fast, static_argnums=3)(*(a.astype(jnp.float32) for a in args), padding)
    sizes = jax.jit(of_absolute_values, static_argnums=3)(*args, padding)
    # Each transform is two products of at most n terms, whose matrix is rounded, too. Then come the
    # sums over channels, or of a kernel over tiles; a pixel of the input is in up to four of them.
    transforms = 3 * 2 * (n + 1)
    terms = C, O + 4, B * int(np.prod(tiling.counts))
    for a, b, size, count in zip(low, exact, sizes, terms, strict=True):
        assert a.dtype == jnp.float32
        roundings = (3 + transforms + 1 + count) * 2.0**-24  # 3 of the operands
        assert np.all(np.abs(a - b) <= size * roundings / (1 - roundings))
        assert np.any(np.abs(a - b) > 0)


def of_absolute_values(x, dy, w, padding):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_kernel_matrix", "_input_matrix", "_output_matrix"):
            matrix = getattr(winograd, name)
            patch.setattr(winograd, name, lambda tiling, matrix=matrix: np.abs(matrix(tiling)))
        return fast(*map(jnp.abs, (x, dy, w)), padding)


def test_how_far_sums_of_tiles_may_grow():
    """Beside those of a plain sum, of 3x3 terms: the bound of `winograd.POINTS`' comment."""

    def growth(n, points):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(winograd.POINTS, n, points)
            tiling = winograd._Tiling(3, n, (n - 2,) * 2, ((0, 0), (0, 0)))
            ones = jnp.ones((1, n, n, 1)), jnp.ones((1, n - 2, n - 2, 1)), jnp.ones((3, 3, 1, 1))
            sums = jax.jit(lambda *ones: of_absolute_values(*ones, tiling.padding)[0])(*ones)
        return float(sums.max()) / 9

    # Along an axis by hand, of (0, 1, -1): G's rows sum to 1, 3/2, 3/2, 1 and B's to 2 each, and
    # A adds three of the four products: (2 + 3 + 3) / 3.
    assert growth(4, winograd.POINTS[4]) == pytest.approx((8 / 3) ** 2)
    assert growth(6, winograd.POINTS[6]) == pytest.approx(55, abs=0.1)
    assert growth(6, (0, 1, -1, 2, -2)) == pytest.approx(16**2)
    assert growth(6, (0, 1, -1, 2, -1 / 2)) == pytest.approx(97.4, abs=0.1)
