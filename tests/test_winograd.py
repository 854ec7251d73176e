"""Winograd's algorithm against `lax`, in float64, and its matrices against the published ones."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.testing import assert_array_equal
from test_ops import close, lax_conv, normal

from mnist_flax import winograd


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


@settings(deadline=None, max_examples=12, derandomize=True)
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


@pytest.mark.parametrize("batch", [12, 13])
def test_chunks_change_nothing(monkeypatch, batch):
    padding = ((1, 1), (1, 1))
    args = operands(batch, (6, 6), (3, 4), 3, padding)
    expected = plain(*args, padding)
    image_bytes = 6**2 * 2**2 * 4 * 8  # two by two tiles of 4x4, in 6x6 points, 4 channels, float64
    for images in (0, 1, 4, 5, 99):
        monkeypatch.setattr(winograd, "CHUNK_BYTES", images * image_bytes)
        close(fast(*args, padding), expected)


def test_chunks_divide_the_batch():
    def rows(batch, most):
        return winograd.chunked(np.zeros((batch, 2)), row_bytes=10, chunk_bytes=10 * most).shape

    assert [rows(12, most) for most in (0, 1, 5)] == [(12, 1, 2), (12, 1, 2), (3, 4, 2)]
    assert [rows(12, most) for most in (11, 12, 99)] == [(2, 6, 2), (1, 12, 2), (1, 12, 2)]
    assert rows(13, 12) == (13, 1, 2)


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


def test_small_tiles_are_more_exact_than_a_plain_sum_and_large_ones_half_as_exact():
    padding = ((0, 0), (0, 0))
    for size, n, least, most in ((7, 4, 0.4, 1.0), (26, 6, 1.2, 2.2)):
        x, dy, w = operands(16, (size, size), (32, 64), 3, padding)
        assert winograd._tiling(x.shape, w.shape, padding).n == n
        exact = plain(x, dy, w, padding)[0]
        low = winograd.convolve(x.astype(jnp.float32), w.astype(jnp.float32), padding)
        patches = np.lib.stride_tricks.sliding_window_view(np.float32(x), (3, 3), (1, 2))
        product = patches.reshape(-1, 32 * 9) @ np.float32(w).transpose(2, 0, 1, 3).reshape(-1, 64)
        errors = [np.std(y - exact.reshape(y.shape)) for y in (low, product)]
        assert least < errors[0] / errors[1] < most
