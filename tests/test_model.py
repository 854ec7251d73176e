"""The network's shapes, counts and arithmetic, against numpy and plain Flax."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from flax import nnx

from mnist_flax import kernels, ops
from mnist_flax.data import DatasetInfo, Examples
from mnist_flax.errors import InputError
from mnist_flax.model import CNN, CNNConfig, feature_shape, space_to_depth
from mnist_flax.models.columns import Columns, ColumnsConfig
from mnist_flax.models.separable import (
    SeparableConfig,
    SeparableConv,
    derivative_patterns,
    pattern_sums,
)
from mnist_flax.moments import normalize
from mnist_flax.recipe import recipe_state
from mnist_flax.recipes import BASELINE, RECIPES
from mnist_flax.steps import create_state, eval_logits, to_model, train_step, with_ops

INFO = DatasetInfo("mnist", "", 10, tuple("0123456789"), (28, 28, 1), "")


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def images(batch, shape=(28, 28, 1), seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(batch, *shape)), jnp.float32)


def test_the_seed_recipes_model_is_the_notebooks_network():
    model = CNN(BASELINE.model, rngs=nnx.Rngs(0))
    assert count(nnx.state(model, nnx.Param)) == 915_146
    assert count(nnx.state(model, nnx.BatchStat)) == 448
    assert feature_shape(BASELINE.model, (28, 28, 1)) == (5, 5, 128)
    assert model.features(images(2)).shape == (2, 256)


def call_prepared(model, x, *, train):
    return model(model.preprocess_images(x), train=train, key=jax.random.key(1))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_shapes_and_dtypes(name):
    model = nnx.eval_shape(lambda: RECIPES[name].model.make(INFO, rngs=nnx.Rngs(0)))
    for train in (False, True):
        forward = functools.partial(call_prepared, train=train)
        logits_BK = nnx.eval_shape(forward, model, images(4))
        assert (logits_BK.shape, logits_BK.dtype) == ((4, 10), jnp.float32)


def test_other_images_and_classes():
    config = CNNConfig(widths=(4,), padding=("SAME",), pool=(True,), hidden=(), patch=2)
    model = CNN(config, image_shape=(12, 8, 3), num_classes=7, rngs=nnx.Rngs(0))
    assert model(images(2, (12, 8, 3))).shape == (2, 7)


SMALL = CNNConfig(widths=(4,), padding=("SAME",), pool=(True,), hidden=(), dropout=0.0, patch=2)


@functools.partial(jax.jit, static_argnames=("train", "both"))
def columns_and_both(x, key, *, train, both):
    """Returns what two columns give, each by itself and together, and all running means.

    The first is of normalized images.
    """
    configs = (dataclasses.replace(SMALL, normalize=True), SMALL)
    columns = [CNN(config, rngs=nnx.Rngs(seed)) for seed, config in enumerate(configs)]
    if both:
        together = Columns(columns)
        x = together.preprocess_images(x)
        outputs = together(x, train=train, key=key)
    else:
        seen = [column.preprocess_images(x) for column in columns]
        dealt = [images[j::2] for j, images in enumerate(seen)] if train else seen
        pairs = zip(columns, dealt, strict=True)
        outputs = [column(images, train=train) for column, images in pairs]
        x = jnp.concatenate(seen, axis=-1)
    return outputs, [column.norms[0].mean[...] for column in columns], x


def test_columns_average_their_probabilities():
    own, _, seen = columns_and_both(images(4), None, train=False, both=False)
    logits, _, x = columns_and_both(images(4), None, train=False, both=True)
    np.testing.assert_allclose(x, seen, atol=1e-6)
    assert np.abs(x[..., 0] - x[..., 1]).max() > 0.1
    assert (logits.shape, logits.dtype) == ((4, 10), jnp.float32)
    probabilities = [scipy.special.softmax(np.asarray(each, np.float64), axis=-1) for each in own]
    np.testing.assert_allclose(np.exp(logits), np.mean(probabilities, axis=0), rtol=1e-5)


def test_columns_are_dealt_the_examples_of_a_training_batch():
    own, own_means, _ = columns_and_both(images(6), None, train=True, both=False)
    logits, means, _ = columns_and_both(images(6), None, train=True, both=True)
    for j in range(2):
        np.testing.assert_allclose(logits[j::2], own[j], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(means[j], own_means[j], rtol=1e-5)
    with pytest.raises(InputError, match="a training batch of 3 cannot be dealt to 2"):
        columns_and_both(images(3), None, train=True, both=True)


def test_a_columns_step_is_that_of_the_network_alone_on_its_share():
    """By SGD, whose steps are as large as gradients are; and the loss is the mean of all."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 8, 8, 1)).astype(np.uint8)
    batch = Examples(pixels, np.arange(8, dtype=np.int32))

    def network(seed):
        return CNN(SMALL, image_shape=(8, 8, 1), rngs=nnx.Rngs(seed))

    step, key = jax.jit(train_step), jax.random.key(0)

    def stepped(model, batch):
        state, metrics = step(key, create_state(key, model, optax.sgd(0.1)), batch)
        return state.params, metrics.loss

    together, loss = stepped(Columns([network(0), network(1)]), batch)
    alone = [stepped(network(j), Examples(*(a[j::2] for a in batch))) for j in range(2)]
    for j, (params, _) in enumerate(alone):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            together["columns"][j],
            params,
        )
    np.testing.assert_allclose(loss, np.mean([own for _, own in alone]), rtol=1e-5)


def test_columns_draw_their_own_dropout():
    config = dataclasses.replace(SMALL, dropout=0.5)

    @jax.jit
    def logits(x, key):
        one = CNN(config, rngs=nnx.Rngs(0))
        together = Columns([one, one])
        return together(together.preprocess_images(x), train=True, key=key)

    twice = jnp.repeat(images(1), 2, axis=0)
    first, second = logits(twice, jax.random.key(0))
    assert np.abs(first - second).max() > 0.1
    with pytest.raises(InputError, match="needs a key"):
        logits(twice, None)


def tiny_columns(own, *, rngs):
    """One column of a separable network on normalized images, one of neither."""
    config = dataclasses.replace(SMALL, widths=(4, 8), padding=("SAME",) * 2, pool=(False, True))
    fields = dataclasses.asdict(config) | dict(normalize=True, conv_bias=False)
    separable = SeparableConfig(**fields)
    options = {"image_shape": (12, 12, 1), "ops": own, "rngs": rngs}
    return Columns([CNN(each, **options) for each in (separable, SMALL)])


def tiny_state(own):
    model = tiny_columns(own, rngs=nnx.Rngs(0))
    return create_state(jax.random.key(0), model, optax.sgd(0.1))


def test_operations_are_a_part_of_the_graph():
    """So no jitted function takes a program of one form for another's."""
    reference, fast = tiny_state(ops.REFERENCE), tiny_state(kernels.CPU)
    assert fast.graphdef == tiny_state(kernels.CPU).graphdef
    assert fast.graphdef != reference.graphdef
    assert with_ops(fast, ops.REFERENCE).graphdef == reference.graphdef
    assert with_ops(reference, kernels.CPU).graphdef == fast.graphdef
    # A function of its own, whose cache no other test has filled.
    run, x = jax.jit(lambda state, x: eval_logits(state, x)), images(3, (12, 12, 1))
    logits = [run(state, x) for state in (reference, fast)]
    assert run._cache_size() == 2
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)
    texts = [run.lower(state, x).as_text() for state in (reference, fast, reference)]
    assert ["stablehlo.while" in text for text in texts] == [False, True, False]


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_recipes_state_has_the_operations_that_it_is_given(splits, platform):
    recipe = dataclasses.replace(
        RECIPES["quick"], model=ColumnsConfig((RECIPES["quick"].model, RECIPES["tiny700"].model))
    )
    own = ops.for_platform(platform)
    state = jax.eval_shape(lambda: recipe_state(recipe, splits.info, steps_per_epoch=1, ops=own))
    model = nnx.merge(state.graphdef, state.params, state.batch_stats)
    quick, tiny = model.columns
    assert quick.ops is own
    assert all(conv.conv_general_dilated is own.conv for conv in quick.convs)
    few = own.few_channels or own
    assert tiny.ops is few
    assert all(conv.ops is few for conv in tiny.convs)


@pytest.mark.slow
def test_forward_mode_through_a_training_step():
    """A Hessian-vector product, forward over reverse, against differences of gradients."""
    state, x = tiny_state(ops.REFERENCE), images(4, (12, 12, 1))

    @jax.jit
    def gradient(params):
        def loss(params):
            model = to_model(dataclasses.replace(state, params=params))
            return jnp.sum(jnp.sin(model(model.preprocess_images(x), train=True)))

        return jax.grad(loss)(params)

    with jax.enable_x64(True):
        x = jnp.asarray(x, jnp.float64)
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), state.params)
        v = jax.tree.map(
            lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), params
        )
        product = jax.jit(lambda p: jax.jvp(gradient, (p,), (v,))[1])(params)
        step = 1e-6
        ends = [
            gradient(jax.tree.map(lambda a, b, s=sign: a + s * step * b, params, v))
            for sign in (1, -1)
        ]
        difference = jax.tree.map(lambda a, b: (a - b) / (2 * step), *ends)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), product, difference
    )


SHARDED = """
import contextlib, functools, re, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mnist_flax import Examples, eval_step, kernels, ops, random_affine, train_step
from test_model import tiny_state

rng = np.random.default_rng(0)
images = rng.integers(0, 256, (16, 12, 12, 1)).astype(np.uint8)
batch = Examples(images, rng.integers(0, 10, 16).astype(np.int32))
augment = functools.partial(random_affine, rotate=5.0)
step = functools.partial(train_step, augment=augment, augment_steps=3, label_smoothing=0.1)

def ends(state, batch):
    state, metrics = step(jax.random.key(0), state, batch)
    return state.params, state.batch_stats, metrics, eval_step(state, batch)

state = tiny_state(ops.REFERENCE)
expected = jax.jit(ends)(state, batch)

def check(own, type_, *, context):
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(type_,))
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        state = jax.device_put(tiny_state(own), NamedSharding(mesh, P()))
        shared = jax.device_put(batch, NamedSharding(mesh, P("batch")))
        run = jax.jit(ends).lower(state, shared).compile()
        actual = run(state, shared)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected
    )
    for name in "all-gather", "all-to-all":
        assert not re.search(rf" {name}(?:-start)?\\(", run.as_text()), (own, type_, name)

own, type_, context = sys.argv[1:]
forms = {"CPU": kernels.CPU, "GPU": kernels.GPU, "REFERENCE": ops.REFERENCE}
check(forms[own], getattr(AxisType, type_), context=context == "in context")
print("agreed")
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("quick", marks=pytest.mark.slow),
        "tiny700",
        pytest.param("tiny2k", marks=pytest.mark.slow),
    ],
)
def test_with_float64_allowed_a_state_is_float32_and_stays_so(splits, name):
    """JAX_ENABLE_X64: a step's state has the types of the one before, so steps can be scanned."""
    with jax.enable_x64(True):
        state = jax.eval_shape(lambda: recipe_state(RECIPES[name], splits.info, steps_per_epoch=1))
        batch = Examples(np.zeros((4, 28, 28, 1)), np.zeros(4, np.int32))
        after, _ = jax.eval_shape(train_step, jax.random.key(0), state, batch)
    for tree in (state, after):
        own = jax.tree.leaves((tree.params, tree.batch_stats))
        assert {leaf.dtype for leaf in own} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("CPU", "Explicit", "in no context"), marks=pytest.mark.slow),
        pytest.param(("CPU", "Auto", "in no context"), marks=pytest.mark.slow),
        pytest.param(("REFERENCE", "Explicit", "in context"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_the_steps_work_on_meshes_of_explicit_axes(words):
    """And of Auto ones; where there is no mesh in context, too. The batch is never gathered."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)])}
    run = subprocess.run(
        [sys.executable, "-c", SHARDED, *words],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "agreed\n", run.stderr


def test_batch_statistics_against_numpy():
    """One block of the network by hand: convolution, ReLU, BatchNorm, pooling."""
    config = CNNConfig(
        widths=(4,), padding=("VALID",), pool=(True,), hidden=(), dropout=0.0, norm_momentum=0.9
    )
    model = CNN(config, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    x = images(5, (8, 8, 1))
    model.norms[0].scale[...] = jnp.array([1.0, -2.0, 0.5, 0.0])
    model.norms[0].bias[...] = jnp.array([0.0, 1.0, -1.0, 2.0])
    kernel = np.asarray(model.convs[0].kernel[...], np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(x, np.float64), (3, 3), (1, 2))
    relu = np.maximum(np.einsum("bhwcij,ijco->bhwo", windows, kernel), 0)
    mean, var = relu.mean((0, 1, 2)), relu.var((0, 1, 2))
    normal = (relu - mean) / np.sqrt(var + 1e-3) * [1, -2, 0.5, 0] + [0, 1, -1, 2]
    pooled = normal.reshape(5, 3, 2, 3, 2, 4).max((2, 4)).reshape(5, -1)
    np.testing.assert_allclose(model.features(x, train=True), pooled, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(model.norms[0].mean[...], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(model.norms[0].var[...], 0.9 + 0.1 * var, rtol=1e-5)
    # And the running statistics are what evaluation normalises by.
    running_mean, running_var = 0.1 * mean, 0.9 + 0.1 * var
    normal = (relu - running_mean) / np.sqrt(running_var + 1e-3) * [1, -2, 0.5, 0] + [0, 1, -1, 2]
    pooled = normal.reshape(5, 3, 2, 3, 2, 4).max((2, 4)).reshape(5, -1)
    np.testing.assert_allclose(model.features(x), pooled, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("padding", "border"), [("VALID", 0), ("SAME", 1)])
def test_a_separable_convolution_is_a_depthwise_and_a_pointwise_one(padding, border):
    """Each channel by its own kernel, then the matrix over channels, in numpy."""
    conv = SeparableConv(3, 4, padding=padding, rngs=nnx.Rngs(0))
    x = np.asarray(images(2, (6, 7, 3)), np.float64)
    depth_IJC, point_CO = (np.asarray(p[...], np.float64) for p in (conv.depth, conv.point))
    padded = np.pad(x, ((0, 0), (border, border), (border, border), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    deep = np.einsum("bhwcij,ijc->bhwc", windows, depth_IJC)
    np.testing.assert_allclose(conv(jnp.asarray(x, jnp.float32)), deep @ point_CO, atol=2e-6)


def test_separable_convolutions_start_with_the_variance_of_full_ones():
    conv = SeparableConv(64, 256, padding="SAME", rngs=nnx.Rngs(0))
    kernel_IJCO = np.einsum("ijc,co->ijco", conv.depth[...], conv.point[...])
    assert np.var(kernel_IJCO) == pytest.approx(2 / (3 * 3 * 64), rel=0.2)


@pytest.mark.parametrize("scale", [True, False])
def test_a_separable_network_counted_by_hand(scale):
    config = SeparableConfig(
        widths=(8, 12),
        padding=("SAME", "VALID"),
        pool=(True, False),
        norm_scale=scale,
        head="mean",
        hidden=(),
        dropout=0.0,
    )
    model = CNN(config, rngs=nnx.Rngs(0))
    norm = 1 + scale
    first, second = 9 * 8 + norm * 8, 9 * 8 + 8 * 12 + norm * 12
    assert count(nnx.state(model, nnx.Param)) == first + second + 12 * 10 + 10


def test_patterns_of_three_by_hand():
    smooth, slope, bend = ([1, 2, 1], [1, 0, -1], [1, -2, 1])
    across, along = np.outer(smooth, bend), np.outer(bend, smooth)
    derivatives = [np.outer(smooth, smooth), np.outer(smooth, slope), np.outer(slope, smooth)]
    derivatives += [across + along, np.outer(slope, slope), across - along]
    found = derivative_patterns(6).reshape(6, 9)
    np.testing.assert_allclose(found @ found.T, np.eye(6), atol=1e-6)
    # Each derivative needs the patterns up to its own, and no later one.
    weights = np.stack([derivative.ravel() for derivative in derivatives]) @ found.T
    np.testing.assert_allclose(weights @ found, np.reshape(derivatives, (6, 9)), atol=1e-5)
    assert np.all(np.abs(np.triu(weights, 1)) < 1e-5)
    assert np.all(np.abs(np.diag(weights)) > 1)


@pytest.mark.parametrize("number", range(1, 7))
def test_fewer_patterns_are_the_first_of_more(number):
    first = derivative_patterns(6)[:number]
    np.testing.assert_allclose(derivative_patterns(number), first, atol=1e-6)


def test_a_network_of_patterns_against_one_of_free_kernels():
    """The same kernels, written out pixel by pixel, give the same logits; parameters are fewer."""
    shape = {
        "widths": (4, 3, 5),
        "padding": ("SAME", "VALID", "SAME"),
        "pool": (True, False, False),
    }
    config = dataclasses.replace(RECIPES["tiny700"].model, **shape, patterns=(6, 4, 1))
    free = dataclasses.replace(config, patterns=())
    few, many = (CNN(c, rngs=nnx.Rngs(0)) for c in (config, free))
    many.convs[0].kernel[...] = few.convs[0].kernel
    for structured, plain in zip(few.convs[1:], many.convs[1:], strict=True):
        plain.depth[...] = pattern_sums(structured.depth[...])
        plain.point[...] = structured.point[...]
    many.head.kernel[...] = few.head.kernel[...]
    logits = [nnx.jit(CNN.__call__)(model, images(3)) for model in (few, many)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)
    counts = [count(nnx.state(model, nnx.Param)) for model in (few, many)]
    assert counts[1] - counts[0] == (9 - 6) * 4 + (9 - 4) * 4 + (9 - 1) * 3


@pytest.mark.parametrize("normalizes", [False, True])
def test_preprocessing_normalizes_where_the_config_says_so(normalizes):
    config = CNNConfig(normalize=normalizes, widths=(4,), padding=("SAME",), pool=(True,))
    prepared = CNN(config, rngs=nnx.Rngs(0)).preprocess_images(images(3))
    normalized = normalize(images(3))
    assert not np.allclose(normalized, images(3), atol=0.1)
    expected = normalized if normalizes else images(3)
    np.testing.assert_allclose(prepared, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["quick", "tiny700"])
def test_two_networks_of_a_recipe_differ_in_parameters_alone(name):
    """Their states can be stacked, and one compiled step serves both."""
    first, second = (
        nnx.eval_shape(lambda seed=seed: CNN(RECIPES[name].model, rngs=nnx.Rngs(seed)))
        for seed in range(2)
    )
    assert nnx.graphdef(first) == nnx.graphdef(second)


def test_a_norm_without_a_scale_is_one_with_a_scale_of_one():
    config = CNNConfig(widths=(4,), padding=("SAME",), pool=(True,), hidden=(), dropout=0.0)
    models = [
        CNN(dataclasses.replace(config, norm_scale=scale), rngs=nnx.Rngs(0))
        for scale in (True, False)
    ]
    for train in (True, False):  # evaluation by the statistics that training left
        with_scale, without = (model.features(images(3), train=train) for model in models)
        np.testing.assert_array_equal(without, with_scale)


@pytest.mark.parametrize(("name", "most"), [("tiny700", 700), ("tiny2k", 2000), ("tiny8k", 8000)])
def test_the_tiny_recipes_have_few_parameters(name, most):
    model = nnx.eval_shape(lambda: RECIPES[name].model.make(INFO, rngs=nnx.Rngs(0)))
    assert 0.9 * most < count(nnx.state(model, nnx.Param)) <= most
    assert RECIPES[name].val_size == 0


def test_the_mean_head_averages_what_the_flat_one_keeps():
    flat = CNNConfig(widths=(4, 6), padding=("SAME",) * 2, pool=(True, False), hidden=())
    mean = dataclasses.replace(flat, head="mean")
    models = [CNN(config, rngs=nnx.Rngs(0)) for config in (flat, mean)]
    kept, averaged = (model.features(images(2)) for model in models)
    assert kept.shape == (2, 14 * 14 * 6)
    np.testing.assert_allclose(averaged, kept.reshape(2, -1, 6).mean(1), rtol=1e-5)
    assert models[1].head.kernel.shape == (6, 10)
    assert models[1](images(2)).shape == (2, 10)


@pytest.mark.parametrize("kind", [CNNConfig, SeparableConfig])
def test_bfloat16_rounds_what_is_multiplied_and_nothing_else(kind):
    config = kind(
        widths=(4, 6),
        padding=("VALID", "VALID"),
        pool=(False, False),
        conv_bias=False,
        hidden=(8,),
        dropout=0.0,
        precision="bfloat16",
    )
    model = CNN(config, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    full = CNN(
        dataclasses.replace(config, precision="float32"), image_shape=(8, 8, 1), rngs=nnx.Rngs(0)
    )
    x = images(5, (8, 8, 1))
    outputs = model.convs[0](x)
    assert outputs.dtype == jnp.bfloat16
    rounded = [
        np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, model.convs[0].kernel[...])
    ]
    windows = np.lib.stride_tricks.sliding_window_view(rounded[0], (3, 3), (1, 2))
    expected = np.einsum("bhwcij,ijco->bhwo", windows, rounded[1])
    # A sum of nine products, each rounded to 8 bits at worst.
    bound = 2.0**-8 * np.einsum("bhwcij,ijco->bhwo", abs(windows), abs(rounded[1]))
    assert np.all(abs(np.asarray(outputs, np.float64) - expected) <= bound)
    logits_BK, full_BK = model(x, train=True), full(x, train=True)
    assert logits_BK.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    assert 0 < np.abs(logits_BK - full_BK).max() < 0.1 * np.abs(full_BK).max()


def test_evaluation_changes_nothing_and_training_moves_statistics():
    model = CNN(BASELINE.model, rngs=nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    model(images(4))
    unchanged = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(unchanged)))
    model(images(4), train=True, key=jax.random.key(0))
    moved = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert not any(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(moved)))


def test_dropout_follows_its_key_and_is_off_in_evaluation():
    config = dataclasses.replace(BASELINE.model, dropout=0.5)
    model, x = CNN(config, rngs=nnx.Rngs(0)), images(4)
    first = model(x, train=True, key=jax.random.key(0))
    assert np.array_equal(first, model(x, train=True, key=jax.random.key(0)))
    assert not np.array_equal(first, model(x, train=True, key=jax.random.key(1)))
    assert np.array_equal(model(x), model(x, key=jax.random.key(1)))


def test_space_to_depth_by_hand():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    expected = [[[0, 1, 4, 5], [2, 3, 6, 7]], [[8, 9, 12, 13], [10, 11, 14, 15]]]
    assert space_to_depth(x, patch=2).tolist() == [expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (32, -64, 128)}, "-64"),
        ({"widths": ()}, "empty"),
        ({"pool": (True,)}, "3, 3 and 1 entries"),
        ({"padding": ("VALID", "FULL", "SAME")}, "FULL"),
        ({"head": "max"}, "head 'max' is unknown"),
        ({"precision": "float16"}, "precision 'float16' is unknown"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"norm_momentum": 1.0}, "norm_momentum"),
        ({"norm_epsilon": 0.0}, "norm_epsilon"),
    ],
)
def test_impossible_architectures(options, message):
    with pytest.raises(InputError, match=message):
        CNNConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": (6, 4)}, "2 entries for 3"),
        ({"patterns": (6, 0, 7)}, "from 1 to 6"),
        ({"patterns": (6, 4, 4), "conv_bias": True}, "conv_bias and patterns"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_impossible_separable_architectures(options, message):
    with pytest.raises(InputError, match=message):
        SeparableConfig(**options)


@pytest.mark.parametrize(("patch", "shape"), [(1, (6, 6, 1)), (3, (28, 28, 1))])
def test_images_that_do_not_fit(patch, shape):
    with pytest.raises(InputError, match="images of"):
        CNN(CNNConfig(patch=patch), image_shape=shape, rngs=nnx.Rngs(0))
