"""The hand-written operations against `lax` and its autodiff, in float64 on the CPU."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first, tries
from flax import nnx
from hypothesis import given, settings
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

from mnist_flax import kernels, ops
from mnist_flax.kernels import chunks

EPSILON = 1e-3


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def close(actual, expected, *, tolerance=1e-10):
    jax.tree.map(lambda a, b: assert_allclose(a, b, tolerance, tolerance), actual, expected)


def lax_conv(x, w, padding):
    return lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=ops.NHWC)


def cpu(few):
    return kernels.CPU.few_channels if few else kernels.CPU


def fast_conv(x, w, padding, few=False, own=None):
    conv = (own or cpu(few)).conv
    return conv(x, w, (1, 1), padding, dimension_numbers=ops.NHWC)


def lax_separable_conv(x, depth, point, padding):
    channels = x.shape[-1]
    depth = depth[:, :, None]
    deep = lax.conv_general_dilated(
        x, depth, (1, 1), padding, dimension_numbers=ops.NHWC, feature_group_count=channels
    )
    return deep @ point


def fast_separable_conv(x, depth, point, padding):
    return kernels.CPU.separable_conv(x, depth, point, padding=padding)


def lax_max_pool(x, window):
    shape = (1, window, window, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, shape, shape, "VALID")


def lax_relu_norm_pool(x, scale, bias, window):
    """The textbook order of operations, each differentiated by JAX."""
    relu = jax.nn.relu(x)
    mean, var = (f(relu, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
    scale, bias = (a.reshape(1, 1, 1, -1) for a in (scale, bias))
    normed = (relu - mean) / jnp.sqrt(var + EPSILON) * scale + bias
    return lax_max_pool(normed, window), mean.ravel(), var.ravel()


def fast_relu_norm_pool(x, scale, bias, window, few=False, own=None):
    relu_norm_pool = (own or cpu(few)).relu_norm_pool
    return relu_norm_pool(x, scale, bias, epsilon=EPSILON, window=window)


def value_and_vjp(fun, *args, seed=0):
    """Returns the outputs and the gradients for random cotangents of every output."""

    @jax.jit
    def run(args):
        out, vjp = jax.vjp(fun, *args)
        rng = np.random.default_rng(seed)
        return out, vjp(jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), out))

    return run(args)


def normal(*shape, seed=0, dtype: type = np.float64):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


# Convolution


@settings(deadline=None, max_examples=tries(12), derandomize=True)
@given(
    batch=st.integers(1, 13),
    size=st.tuples(st.integers(5, 12), st.integers(5, 12)),
    channels=st.tuples(st.sampled_from([1, 2, 4, 7, 8, 15, 16, 19]), st.integers(1, 18)),
    kernel=st.sampled_from([(1, 1), (3, 3), (5, 5), (2, 3)]),
    padding=st.sampled_from(["SAME", "VALID", ((2, 0), (1, 3))]),
)
def test_conv_agrees_with_lax(batch, size, channels, kernel, padding):
    x, w = normal(batch, *size, channels[0]), normal(*kernel, *channels)
    actual = value_and_vjp(lambda x, w: fast_conv(x, w, padding), x, w)
    close(actual, value_and_vjp(lambda x, w: lax_conv(x, w, padding), x, w))


@settings(deadline=None, max_examples=tries(6), derandomize=True)
@given(
    batch=st.integers(1, 9),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    channels=st.tuples(st.sampled_from([1, 1, 3]), st.integers(1, 7)),
    kernel=st.sampled_from([(3, 3), (2, 5)]),
    padding=st.sampled_from(["SAME", "VALID", ((2, 0), (1, 3))]),
)
def test_conv_of_few_channels_agrees_with_lax(batch, size, channels, kernel, padding):
    x, w = normal(batch, *size, channels[0]), normal(*kernel, *channels)
    actual = value_and_vjp(lambda x, w: fast_conv(x, w, padding, few=True), x, w)
    close(actual, value_and_vjp(lambda x, w: lax_conv(x, w, padding), x, w))


@settings(deadline=None, max_examples=tries(8), derandomize=True)
@given(
    batch=st.integers(1, 9),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    channels=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 5)]),
    padding=st.sampled_from(["SAME", "VALID"]),
)
def test_separable_conv_agrees_with_a_grouped_and_a_pointwise_one(
    batch, size, channels, kernel, padding
):
    args = normal(batch, *size, channels[0]), normal(*kernel, channels[0]), normal(*channels)
    actual = value_and_vjp(lambda *args: fast_separable_conv(*args, padding), *args)
    close(actual, value_and_vjp(lambda *args: lax_separable_conv(*args, padding), *args))


@pytest.mark.parametrize("batch", first([13, 12]))
def test_materialize_is_the_function_in_a_loop_of_its_own(monkeypatch, batch):
    """Without the loop XLA computes anew what is read more than once, and nothing else shows it."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 8 * 4 * 5 * 6 * 2 * 8)  # 4 images in an eighth of it
    x = normal(batch, 5, 6, 2)

    def run(own):
        return jax.jit(lambda x: own.materialize(lambda x: jnp.sin(x) * 2, x))

    close(run(kernels.CPU)(x), np.sin(x) * 2)
    assert " while(" in run(kernels.CPU).lower(x).compile().as_text()
    assert " while(" not in run(ops.REFERENCE).lower(x).compile().as_text()


@pytest.mark.parametrize("batch", first([13, 12]))
def test_conv_sums_the_kernel_gradient_over_chunks(monkeypatch, batch):
    x, w = normal(batch, 6, 6, 3), normal(3, 3, 3, 2)
    expected = value_and_vjp(lambda x, w: lax_conv(x, w, "VALID"), x, w)
    for images in (1, 4, 5, 1000):
        monkeypatch.setattr(chunks, "CHUNK_BYTES", images * 4 * 4 * 9 * 3 * 8)
        close(value_and_vjp(lambda x, w: fast_conv(x, w, "VALID"), x, w), expected)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(window_strides=(2, 1), padding="SAME"),
        dict(window_strides=(1, 1), padding="VALID", rhs_dilation=(2, 2)),
        dict(window_strides=(1, 1), padding=((1, 1), (1, 1)), lhs_dilation=(2, 1)),
        dict(window_strides=(1, 1), padding="SAME", feature_group_count=2),
        dict(window_strides=(1, 1), padding="SAME", precision=lax.Precision.HIGHEST),
        dict(window_strides=(1, 1), padding="SAME", preferred_element_type=jnp.float64),
    ],
)
def test_conv_hands_other_convolutions_to_lax(kwargs):
    x, w = normal(3, 8, 8, 4), normal(3, 3, 4 // kwargs.get("feature_group_count", 1), 6)
    kwargs["dimension_numbers"] = ops.NHWC

    def fast(x, w):
        return kernels.conv(x, w, **kwargs)

    def plain(x, w):
        return lax.conv_general_dilated(x, w, **kwargs)

    close(value_and_vjp(fast, x, w), value_and_vjp(plain, x, w))


def test_conv_hands_whole_numbers_to_lax():
    x, w = (jnp.arange(n).reshape(shape) for n, shape in ((48, (1, 4, 4, 3)), (54, (3, 3, 3, 2))))
    np.testing.assert_array_equal(
        kernels.conv(x, w, (1, 1), "SAME", dimension_numbers=ops.NHWC), lax_conv(x, w, "SAME")
    )


@pytest.mark.parametrize("conv", [kernels.conv, kernels.few_channels_conv])
def test_a_batch_of_no_images_is_convolved(conv):
    x, w = jnp.zeros((0, 9, 9, 8)), jnp.zeros((3, 3, 8, 8))
    y, vjp = jax.vjp(lambda x, w: conv(x, w, (1, 1), "VALID", dimension_numbers=ops.NHWC), x, w)
    assert y.shape == (0, 7, 7, 8)
    np.testing.assert_array_equal(vjp(y)[1], np.zeros(w.shape))
    depth, point = jnp.zeros((3, 3, 8)), jnp.zeros((8, 4))
    assert kernels.separable_conv(x, depth, point, padding="SAME").shape == (0, 9, 9, 4)


def test_conv_reads_other_dimension_orders_as_lax_does():
    x, w = normal(3, 4, 8, 7), normal(6, 4, 3, 3)
    expected = value_and_vjp(lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME"), x, w)
    close(value_and_vjp(lambda x, w: kernels.conv(x, w, (1, 1), "SAME"), x, w), expected)
    x, w = normal(3, 9, 4), normal(3, 4, 6)
    dims = ("NHC", "HIO", "NHC")
    expected = lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=dims)
    close(kernels.conv(x, w, (1,), "SAME", dimension_numbers=dims), expected)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_conv_takes_the_place_of_lax_in_nnx_conv(padding):
    x = normal(3, 7, 9, 2, dtype=np.float32)

    def output(**kwargs):
        layer = nnx.Conv(2, 5, (3, 3), padding=padding, rngs=nnx.Rngs(0), **kwargs)
        return layer(x)

    fast = output(conv_general_dilated=kernels.conv)
    assert fast.dtype == jnp.float32
    close(fast, output(), tolerance=1e-5)


@pytest.mark.parametrize(("channels", "few"), [((7, 9), False), ((1, 5), True)])
def test_conv_in_float32_errs_by_no_more_than_its_roundings_come_to(channels, few):
    """There are k, in any order at most k u / (1 - k u) of the sum of absolute values.

    Higham (2002), section 3.1, with u = 2^-24; `test_winograd.py` has Winograd's bound.
    """
    B, size, (C, O) = 3, 6, channels
    x, w = normal(B, size, size, C), normal(3, 3, C, O)
    dy = normal(B, size - 2, size - 2, O)

    def run(conv, x, w, dy):
        out, vjp = jax.vjp(lambda x, w: conv(x, w, "VALID"), x, w)
        return out, *vjp(dy)

    exact = jax.jit(functools.partial(run, lax_conv))(x, w, dy)
    sizes = jax.jit(functools.partial(run, lax_conv))(*map(jnp.abs, (x, w, dy)))
    low = [a.astype(jnp.float32) for a in (x, w, dy)]
    actual = jax.jit(functools.partial(run, functools.partial(fast_conv, few=few)))(*low)
    terms = 9 * C, 9 * O, B * (size - 2) ** 2
    for a, b, most, count in zip(actual, exact, sizes, terms, strict=True):
        assert a.dtype == jnp.float32
        roundings = (2 + count) * 2.0**-24  # 2 of the operands
        assert np.all(np.abs(a - b) <= most * roundings / (1 - roundings))


@settings(deadline=None, max_examples=tries(8), derandomize=True)
@given(
    batch=st.sampled_from([4, 6]),
    channels=st.tuples(st.sampled_from([1, 4, 16]), st.integers(1, 9)),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 5)]),
    padding=st.sampled_from(["SAME", "VALID", ((2, 0), (1, 3))]),
)
def test_conv_in_bfloat16_sums_in_float32_and_rounds_once(batch, channels, kernel, padding):
    shapes = (batch, 6, 7, channels[0]), (*kernel, *channels)
    x, w = (normal(*shape, dtype=jnp.bfloat16) for shape in shapes)
    like = jax.eval_shape(lambda x, w: lax_conv(x, w, padding), x, w)
    dy = normal(*like.shape, dtype=jnp.bfloat16)

    def run(conv, x, w, dy):
        out, vjp = jax.vjp(lambda x, w: conv(x, w, padding), x, w)
        return out, *vjp(dy)

    exact = run(lax_conv, *(a.astype(jnp.float64) for a in (x, w, dy)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", 2 * 6 * 7 * 9 * channels[0] * 2)  # a few chunks
        actual = jax.jit(functools.partial(run, fast_conv))(x, w, dy)
    for a, b in zip(actual, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        # Half a unit in the last of 8 bits, and what float32 loses in up to 500 terms.
        assert_allclose(a.astype(jnp.float64), b, rtol=2.0**-8, atol=1e-4)


def test_a_loop_in_bfloat16_gives_what_a_call_gives():
    """Inside a loop XLA's own convolutions of bfloat16 take seconds."""
    x, w = normal(3, 8, 9, 9, 5, dtype=jnp.bfloat16), normal(3, 3, 5, 6, dtype=jnp.bfloat16)
    looped = jax.jit(lambda x, w: lax.map(lambda x: fast_conv(x, w, "SAME"), x))(x, w)
    singles = [fast_conv(image, w, "SAME") for image in x]
    assert np.array_equal(looped, jnp.stack(singles))


# Pooling


@settings(deadline=None, max_examples=tries(12), derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(3, 9), st.integers(3, 9), st.integers(1, 5)),
    window=st.integers(1, 3),
    ties=st.booleans(),
    few=st.booleans(),
)
def test_max_pool_agrees_with_lax(shape, window, ties, few):
    x = normal(*shape)
    x = jnp.round(x) if ties else x
    actual = value_and_vjp(lambda x: cpu(few).max_pool(x, window=window), x)
    close(actual, value_and_vjp(lambda x: lax_max_pool(x, window), x))


@pytest.mark.parametrize("own", [kernels.CPU, kernels.CPU.few_channels, ops.REFERENCE])
def test_max_pool_gives_the_gradient_to_the_first_of_equal_maxima(own):
    x = jnp.array([[1.0, 3.0, 2.0, 2.0, 9.0], [3.0, 0.0, 2.0, 2.0, 9.0]])[None, :, :, None]
    gradient = jax.grad(lambda x: own.max_pool(x, window=2)[0, 0, :, 0] @ jnp.array([5.0, 7.0]))
    assert_array_equal(gradient(x)[0, :, :, 0], [[0, 5, 7, 0, 0], [0, 0, 0, 0, 0]])


# ReLU, BatchNorm and pooling


@settings(deadline=None, max_examples=tries(15), derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(3, 9), st.integers(3, 9), st.integers(1, 5)),
    window=st.integers(1, 3),
    seed=st.integers(0, 9),
    few=st.booleans(),
)
def test_relu_norm_pool_agrees_with_autodiff(shape, window, seed, few):
    # Scales of both signs. A window of zeros ties, but ReLU stops what reaches any of them.
    args = normal(*shape, seed=seed), normal(shape[-1], seed=seed), normal(shape[-1], seed=99)
    actual = value_and_vjp(lambda x, s, b: fast_relu_norm_pool(x, s, b, window, few), *args)
    close(
        actual,
        value_and_vjp(lambda x, s, b: lax_relu_norm_pool(x, s, b, window), *args),
        tolerance=1e-8,
    )


@pytest.mark.parametrize("window", [1, 2])
def test_relu_norm_pool_differentiates_at_a_scale_of_zero(window):
    x, scale, bias = normal(3, 4, 6, 3), jnp.array([0.0, 1.0, -1.0]), normal(3)
    weights = normal(3, 4 // window, 6 // window, 3)

    def loss(scale):
        return jnp.sum(weights * fast_relu_norm_pool(x, scale, bias, window)[0])

    # At a scale of zero, pooling has a kink: the derivative is the one from above.
    step = 1e-6
    above = jnp.array([loss(scale.at[c].add(step)) - loss(scale) for c in range(3)]) / step
    close(jax.grad(loss)(scale), above, tolerance=1e-6)


def test_relu_norm_pool_of_hand_computed_values():
    # ReLU leaves 0, 2, 4, 2: mean 2, variance 2.
    x = jnp.array([[-5.0, 2.0], [4.0, 2.0]])[None, :, :, None]
    one = jnp.ones(1)
    y, mean, var = kernels.relu_norm_pool(x, 3 * one, one, epsilon=2.0, window=1)
    assert_allclose(y[0, :, :, 0], [[-2, 1], [4, 1]])
    assert_allclose([mean[0], var[0]], [2, 2])
    assert_allclose(kernels.relu_norm_pool(x, 3 * one, one, epsilon=2.0, window=2)[0].item(), 4)
    assert_allclose(kernels.relu_norm_pool(x, -3 * one, one, epsilon=2.0, window=2)[0].item(), 4)


def test_relu_norm_pool_is_nnx_batch_norm():
    x = normal(4, 5, 5, 3, dtype=np.float32)
    norm = nnx.BatchNorm(3, epsilon=EPSILON, momentum=0.0, rngs=nnx.Rngs(0))
    expected = norm(nnx.relu(x), use_running_average=False)
    scale, bias = jnp.ones(3, jnp.float32), jnp.zeros(3, jnp.float32)
    y, mean, var = fast_relu_norm_pool(x, scale, bias, 1)
    assert y.dtype == mean.dtype == var.dtype == jnp.float32
    close((y, mean, var), (expected, norm.mean[...], norm.var[...]), tolerance=1e-5)


# Programs


def network(conv, relu_norm_pool, max_pool):
    """Returns the gradient of a small network's loss, by the operations given."""

    def loss(params, x):
        for w, scale, bias in params[:-1]:
            x, _, _ = relu_norm_pool(conv(x, w, "SAME"), scale, bias, 2)
        return jnp.sum(jnp.sin(max_pool(conv(x, params[-1], "VALID"), 2)))

    return jax.grad(loss)


FAST = network(
    fast_conv, fast_relu_norm_pool, lambda x, window: kernels.CPU.max_pool(x, window=window)
)
PLAIN = network(lax_conv, lax_relu_norm_pool, lax_max_pool)


def parameters(*lead, dtype: type = np.float64):
    blocks = [
        [normal(*lead, 3, 3, *io, seed=seed), normal(*lead, io[1]), normal(*lead, io[1], seed=1)]
        for seed, io in enumerate([(1, 8), (8, 9)])
    ]
    return jax.tree.map(lambda a: a.astype(dtype), [*blocks, normal(*lead, 3, 3, 9, 2)])


@pytest.mark.slow
def test_a_loop_of_steps_is_the_same_steps_one_by_one():
    x = normal(3, 8, 17, 19, 1)

    def step(params, x):
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, FAST(params, x))

    looped = jax.jit(lambda p: lax.fori_loop(0, 3, lambda i, p: step(p, x[i]), p))(parameters())
    expected = parameters()
    for i in range(3):
        gradient = PLAIN(expected, x[i])
        expected = jax.tree.map(lambda p, g: p - 0.01 * g, expected, gradient)
    close(looped, expected, tolerance=1e-8)


def test_vmap_over_networks_is_each_network_alone():
    params, x = parameters(3), normal(8, 17, 19, 1)
    mapped = jax.jit(jax.vmap(FAST, (0, None)))(params, x)
    for i in range(3):
        alone = PLAIN(jax.tree.map(lambda p, i=i: p[i], params), x)
        close(jax.tree.map(lambda g, i=i: g[i], mapped), alone, tolerance=1e-8)


def test_the_same_bits_every_time():
    params, x = parameters(dtype=np.float32), normal(64, 17, 19, 1, dtype=np.float32)
    run = jax.jit(FAST)
    jax.tree.map(assert_array_equal, run(params, x), run(params, x))


# Differentiation of other kinds

WITH_TIES = jnp.asarray([0.0, 0.0, 0.5, 0.5, 1.5, -1.0])  # of which inputs are drawn


def tied(*shape, seed=0):
    """Numbers of which many are equal, and many exactly 0, as MNIST's background is."""
    return WITH_TIES.astype(float)[np.random.default_rng([seed, *shape]).integers(0, 6, shape)]


def second_order(fun, *args):
    """Returns the gradient of a penalty on the gradient of a loss of `fun`'s outputs."""
    where = tuple(range(len(args)))

    def loss(*args):
        outputs = enumerate(jax.tree.leaves(fun(*args)))
        return sum(jnp.sum(normal(*y.shape, seed=i) * jnp.sin(y) + y**2) for i, y in outputs)

    def penalty(*args):
        gradients = enumerate(jax.grad(loss, where)(*args))
        return sum(jnp.sum(normal(*g.shape, seed=i) * g + g**2) for i, g in gradients)

    return jax.jit(jax.grad(penalty, where))(*args)


def assert_second_order_is_lax(fast, plain, *args):
    expected = second_order(plain, *args)
    most = max(jnp.abs(g).max() for g in expected)
    for a, b in zip(second_order(fast, *args), expected, strict=True):
        assert_allclose(a, b, rtol=0, atol=1e-11 * most)


@pytest.mark.parametrize(("channels", "few"), [((8, 8), False), ((1, 3), True)])
def test_second_derivatives_of_convolutions(channels, few):
    x, w = tied(3, 6, 6, channels[0]), normal(3, 3, *channels)
    assert_second_order_is_lax(
        lambda x, w: fast_conv(x, w, "SAME", few), lambda x, w: lax_conv(x, w, "SAME"), x, w
    )


def test_second_derivatives_of_separable_convolutions():
    args = tied(3, 6, 6, 3), normal(3, 3, 3), normal(3, 4)
    assert_second_order_is_lax(
        lambda *args: fast_separable_conv(*args, "VALID"),
        lambda *args: lax_separable_conv(*args, "VALID"),
        *args,
    )


FORMS = {
    "cpu": kernels.CPU,
    "few": kernels.CPU.few_channels,
    "gpu": kernels.GPU,
    "reference": ops.REFERENCE,
}


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_of_pooling_where_maxima_tie(form):
    own = FORMS[form]
    assert_second_order_is_lax(
        lambda x: own.max_pool(x, window=2), lambda x: lax_max_pool(x, 2), tied(3, 5, 6, 2)
    )


@pytest.mark.parametrize("window", first([2, 1]))
@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_of_relu_norm_pool_where_inputs_are_zero_and_tie(form, window):
    """Channels of zeros and ties, of a constant and of numbers that do not tie."""
    x = tied(3, 5, 6, 3).at[..., 1].set(0.5).at[..., 2].set(normal(3, 5, 6))
    own, scale, bias = FORMS[form], jnp.array([1.0, -2.0, 0.5]), normal(3)
    assert_second_order_is_lax(
        lambda x, s, b: fast_relu_norm_pool(x, s, b, window, own=own),
        lambda x, s, b: lax_relu_norm_pool(x, s, b, window),
        *(x, scale, bias),
    )


@pytest.mark.parametrize("form", ["cpu", "few", "gpu", "reference"])
def test_what_is_not_a_number_stays_so(form):
    """A run that diverges is known by it."""
    x, one = jnp.ones((1, 2, 2, 1)).at[0, 1, 1].set(jnp.nan), jnp.ones(1)
    assert np.isnan(FORMS[form].max_pool(x, window=2)).all()
    assert np.isnan(fast_relu_norm_pool(x, one, one, 2, own=FORMS[form])[0]).all()


def test_forward_mode_through_the_reference():
    """Forward over reverse against reverse over reverse, and forward against reverse."""
    own, x = ops.REFERENCE, normal(2, 7, 7, 2)
    params = normal(3, 3, 2, 3), normal(3), normal(3, seed=1)

    def loss(params):
        w, scale, bias = params
        y, _, _ = fast_relu_norm_pool(fast_conv(x, w, "SAME", own=own), scale, bias, 2, own=own)
        return jnp.sum(jnp.sin(own.max_pool(y, window=2)))

    v = jax.tree.map(lambda p: normal(*p.shape, seed=7), params)

    def along_v(params):
        return sum(map(jnp.vdot, jax.grad(loss)(params), v))

    product = jax.jit(lambda params: jax.jvp(jax.grad(loss), (params,), (v,))[1])
    close(product(params), jax.jit(jax.grad(along_v))(params), tolerance=1e-8)
    depth, point = normal(3, 3, 2), normal(2, 4)
    jacobians = [
        jax.jit(jacobian(lambda d: own.separable_conv(x, d, point, padding="VALID").sum(0)))(depth)
        for jacobian in (jax.jacfwd, jax.jacrev)
    ]
    close(*jacobians)


# Platforms


def test_each_platform_has_its_operations():
    names = {
        "cpu": kernels.CPU,
        "gpu": kernels.GPU,
        "cuda": kernels.GPU,
        "rocm": kernels.GPU,
        "tpu": ops.REFERENCE,
    }
    assert {name: ops.for_platform(name) for name in names} == names
    assert ops.for_platform(jax.devices()[0].platform) == kernels.CPU


def of_platform(own):
    return network(
        functools.partial(fast_conv, own=own),
        functools.partial(fast_relu_norm_pool, own=own),
        lambda x, window: own.max_pool(x, window=window),
    )


@pytest.mark.parametrize("own", [kernels.GPU, ops.REFERENCE], ids=["gpu", "reference"])
def test_on_accelerators_the_network_is_that_of_plain_lax(own):
    params, x = parameters(), normal(8, 17, 19, 1)
    close(jax.jit(of_platform(own))(params, x), jax.jit(PLAIN)(params, x), tolerance=1e-8)
    args = normal(8, 9, 9, 5), normal(3, 3, 5), normal(5, 4)
    actual = own.separable_conv(*args, padding="SAME")
    close(actual, lax_separable_conv(*args, "SAME"))


WITHOUT_KERNELS = """
import sys
sys.path.insert(0, sys.argv[1])
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
import dataclasses
import mnist_flax
from mnist_flax import ops
assert mnist_flax.__file__.startswith(sys.argv[1])
assert mnist_flax.for_platform("cpu") == ops.REFERENCE
splits = mnist_flax.load_splits("mnist", val_size=100)
splits = dataclasses.replace(splits, train=splits.train[:640])
model = mnist_flax.CNNConfig(widths=(4, 8), padding=("SAME", "VALID"), pool=(True, True), hidden=())
recipe = mnist_flax.Recipe(val_size=100, epochs=2, batch_size=64, model=model)
(first, last) = mnist_flax.fit(recipe, splits, progress=False).history
assert last["train_loss"] < first["train_loss"]
"""


@pytest.mark.slow
def test_a_package_without_kernels_trains(tmp_path):
    package = Path(kernels.__file__).parents[1]
    hidden = shutil.ignore_patterns("kernels", "__pycache__")
    shutil.copytree(package, tmp_path / "mnist_flax", ignore=hidden)
    words = [sys.executable, "-c", WITHOUT_KERNELS, str(tmp_path)]
    run = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_on_a_gpu_no_gradient_is_scattered():
    """XLA has no form of that which sums in the same order each time."""
    params, x = parameters(), normal(8, 17, 19, 1)
    assert "scatter" in str(jax.make_jaxpr(PLAIN)(params, x))
    assert "scatter" not in str(jax.make_jaxpr(of_platform(kernels.GPU))(params, x))


def test_the_reference_is_plain_lax():
    params, x = parameters(), normal(8, 17, 19, 1)
    text = str(jax.make_jaxpr(of_platform(ops.REFERENCE))(params, x))
    assert "custom_vjp" not in text
    assert "while" not in text


# A batch that devices share

SHARDED = """
import contextlib, re, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mnist_flax import kernels, ops
from test_kernels import close, normal, shared_network

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
params = normal(3, 3, 8, 8), normal(3, 3, 8), normal(8, 4)

def check(mesh, spec, *, context, batch=8, moves=0, vmap=False):
    x = normal(batch, 6, 6, 8)
    expected = jax.jit(shared_network(ops.REFERENCE))(params, x)
    x = jax.device_put(x, NamedSharding(mesh, spec))
    own = jax.device_put(params, NamedSharding(mesh, P()))
    gradient = shared_network(kernels.CPU)
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        run = jax.jit(gradient).lower(own, x).compile()
        close(run(own, x), expected)
        if vmap:
            stacked = jax.tree.map(lambda p: p[None], own)
            mapped = jax.jit(jax.vmap(gradient, (0, None)))(stacked, x)
            close(jax.tree.map(lambda g: g[0], mapped), expected)
    names = "all-gather", "all-to-all", "collective-permute", "all-reduce"
    found = [len(re.findall(rf" {name}(?:-start)?\\(", run.as_text())) for name in names]
    if spec != P():
        assert found[:3] == [0, 0, moves] and 1 <= found[3] <= 6, (mesh, spec, context, found)

def line(axis, size, type_):
    return jax.make_mesh((size,), (axis,), axis_types=(type_,), devices=jax.devices()[:size])

if sys.argv[1] == "few":
    check(line("batch", 2, AUTO), P("batch"), context=False, vmap=True)
    check(line("data", 2, EXPLICIT), P("data"), context=False)
    check(line("data", 2, AUTO), P(), context=True, batch=7)
else:
    # Named "data" or otherwise, with a mesh in context or without, of two devices of four or all.
    check(line("data", 2, AUTO), P("data"), context=True, vmap=True)
    check(line("batch", 2, AUTO), P("batch"), context=False, vmap=True)
    check(line("batch", 4, AUTO), P("batch"), context=True)
    check(line("batch", 4, EXPLICIT), P("batch"), context=True)
    check(line("data", 2, EXPLICIT), P("data"), context=False)
    # One axis of two: over Auto axes examples move to another device, once.
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AUTO,) * 2)
    check(mesh, P("b"), context=True, moves=1)
    # Not to be shared evenly, and on every device: only the values are right.
    check(line("data", 2, AUTO), P(), context=True, batch=7)
    check(line("data", 2, AUTO), P(), context=False, batch=6)
print("agreed")
"""


def shared_network(own):
    """Returns the gradient of a loss that every operation has a part in."""

    def loss(params, x):
        w, depth, point = params
        x = own.materialize(jnp.sin, x)
        x = own.conv(x, w, (1, 1), "SAME", dimension_numbers=ops.NHWC)
        x, _, _ = own.relu_norm_pool(x, jnp.ones(8), jnp.zeros(8), epsilon=EPSILON, window=2)
        x = own.separable_conv(x, depth, point, padding="SAME")
        return jnp.sum(jnp.sin(own.max_pool(x, window=2)))

    return jax.grad(loss)


@pytest.mark.slow
@pytest.mark.parametrize("meshes", ["few", "all"])
def test_a_batch_shared_by_devices_is_worked_on_where_it_lies(meshes):
    """The gradients of one device, by sums of each device's own: the batch is never gathered."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)])}
    run = subprocess.run(
        [sys.executable, "-c", SHARDED, meshes],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "agreed\n", run.stderr


def test_on_accelerators_a_background_of_zeros_has_the_gradient_of_the_cpu():
    """At exactly 0 the slope of the ReLU is 0, whichever form computes it."""
    x_BHWC = jnp.zeros((2, 4, 4, 3)).at[0, 1].set(1.0)

    def total(x_BHWC, own):
        ones_C = jnp.ones(3)
        y_BHWC, _, _ = own.relu_norm_pool(x_BHWC, ones_C, ones_C, epsilon=1e-3, window=2)
        return (y_BHWC * jnp.arange(1.0, 4.0)[None, None, None]).sum()

    here, there = (jax.grad(total)(x_BHWC, own) for own in (kernels.CPU, ops.REFERENCE))
    assert np.abs(here).max() > 0.1
    np.testing.assert_array_equal(there[x_BHWC == 0], 0)
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-5)
