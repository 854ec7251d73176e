"""Schedules and optimizers against values worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_flax.errors import InputError
from mnist_flax.optimizer import (
    SGD,
    AdamW,
    Constant,
    Muon,
    OneCycle,
    Staircase,
    decayed,
    muon_dimensions,
)
from mnist_flax.recipe import TRACEABLE, Recipe, recipe_optimizer, recipe_schedule
from mnist_flax.recipes import RECIPES

PARAMS = {
    "convs": {"kernel": jnp.full((3, 3, 2, 4), 2.0), "bias": jnp.full((4,), 2.0)},
    "norms": {"scale": jnp.full((4,), 2.0)},
    "head": {"kernel": jnp.full((8, 10), 2.0)},
}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), {0: 0.4, 39: 0.4}),
        (Staircase(decay=0.5), {0: 0.4, 9: 0.4, 10: 0.2, 19: 0.2, 20: 0.1, 39: 0.05}),
        (OneCycle(warmup=0.25), {0: 0.04, 5: 0.22, 10: 0.4, 25: 0.2, 40: 0.0}),
        (OneCycle(warmup=0.0), {0: 0.4, 10: 0.3, 20: 0.2, 40: 0.0}),
    ],
    ids=str,
)
def test_schedules_by_hand(schedule, expected):
    schedule = schedule.make(0.4, steps_per_epoch=10, epochs=4)
    for step, value in expected.items():
        np.testing.assert_allclose(schedule(step), value, rtol=1e-6, atol=1e-8)


def test_a_run_of_few_steps_has_its_fall_too():
    """Rounded, the rise would take both steps."""
    schedule = OneCycle(warmup=0.9).make(0.4, steps_per_epoch=2, epochs=1)
    np.testing.assert_allclose([schedule(step) for step in range(3)], [0.04, 0.4, 0.0], atol=1e-8)


def test_sgd_by_hand():
    """Two steps of Nesterov momentum with decoupled decay, on gradient 1 at rate 0.1."""
    optimizer = SGD(momentum=0.9, nesterov=True, weight_decay=0.5).make(lambda _: 0.1)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(2):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    # Nesterov: m1 = 1, u1 = 1 + .9*1 = 1.9; m2 = 1.9, u2 = 1 + .9*1.9 = 2.71.
    bias = 2 - 0.1 * 1.9 - 0.1 * 2.71
    kernel = 2 - 0.1 * (1.9 + 0.5 * 2)
    kernel -= 0.1 * (2.71 + 0.5 * kernel)
    np.testing.assert_allclose(params["convs"]["bias"], bias, rtol=1e-6)
    np.testing.assert_allclose(params["norms"]["scale"], bias, rtol=1e-6)
    np.testing.assert_allclose(params["convs"]["kernel"], kernel, rtol=1e-6)
    np.testing.assert_allclose(params["head"]["kernel"], kernel, rtol=1e-6)


@pytest.mark.parametrize("kind", [SGD, AdamW, Muon])
def test_decay_spares_biases_and_batch_norm(kind):
    """With gradients of 0, only decay moves a parameter."""
    optimizer = kind(weight_decay=0.5).make(lambda _: 0.1)
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    assert not updates["convs"]["bias"].any()
    assert not updates["norms"]["scale"].any()
    np.testing.assert_allclose(updates["convs"]["kernel"], -0.1 * 0.5 * 2, rtol=1e-5)
    assert jax.tree.leaves(decayed(PARAMS)) == [False, True, True, False]


def test_a_newton_schulz_iteration_by_hand():
    """X to aX + bAX + cAAX with A = XX', after X is divided by its Frobenius norm."""
    optimizer = Muon(momentum=0.0, nesterov=False, ns_steps=1).make(lambda _: 1.0)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    x = np.asarray(grads["convs"]["kernel"], np.float64).reshape(-1, 4).T
    x /= np.linalg.norm(x)
    a = x @ x.T
    expected = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    actual = np.asarray(updates["convs"]["kernel"]).reshape(-1, 4).T
    np.testing.assert_allclose(actual, -expected, rtol=1e-4, atol=1e-5)


def test_muon_leaves_the_classifier_of_every_column_to_adam():
    dimensions = muon_dimensions({"columns": [PARAMS, PARAMS]})
    assert dimensions == {"columns": [muon_dimensions(PARAMS)] * 2}


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam():
    dimensions = muon_dimensions(PARAMS)
    assert dimensions["convs"]["kernel"] == ((0, 1, 2), 3)
    assert dimensions["convs"]["bias"] is None
    assert dimensions["norms"]["scale"] is None
    assert dimensions["head"]["kernel"] is None
    optimizer = Muon(momentum=0.9, ns_steps=5, adam_ratio=0.25).make(lambda _: 1.0)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    singular = np.linalg.svd(np.asarray(updates["convs"]["kernel"]).reshape(-1, 4))[1]
    # Newton-Schulz's coefficients map singular values to about [0.7, 1.2].
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    # Adam's first step, with Nesterov momentum and bias correction: the learning rate times
    # 0.9 * 0.1 / (1 - 0.9**2) + 0.1 / (1 - 0.9), along the gradient's sign.
    step = 0.25 * (0.09 / 0.19 + 1)
    np.testing.assert_allclose(
        updates["head"]["kernel"], -step * np.sign(grads["head"]["kernel"]), rtol=1e-3
    )


def test_a_recipes_schedule_is_its_own():
    """The notebook's: 0.01, times 0.9 after each epoch."""
    schedule = recipe_schedule(RECIPES["baseline"], steps_per_epoch=10)
    np.testing.assert_allclose([schedule(step) for step in (0, 9, 10)], [0.01, 0.01, 0.009])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, dict(momentum=0.5, nesterov=False, weight_decay=0.3)),
        (AdamW, dict(weight_decay=0.3)),
        (
            Muon,
            dict(
                momentum=0.5,
                nesterov=False,
                ns_steps=1,
                adam_ratio=0.7,
                weight_decay=0.3,
                classifier=None,
            ),
        ),
    ],
)
def test_each_option_of_an_optimizer_has_an_effect(kind, options):
    """Of two updates, by options of which none is a default."""
    rng = np.random.default_rng(0)
    first, second = (
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)
        for _ in range(2)
    )

    def end(own, **traced):
        recipe = Recipe(optimizer=own)
        optimizer = recipe_optimizer(recipe, steps_per_epoch=10, traced=traced)
        params, state = PARAMS, optimizer.init(PARAMS)
        for grads in (first, second):
            updates, state = optimizer.update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])

    own = kind(learning_rate=0.2, **options)
    assert {field.name for field in dataclasses.fields(kind)} == {"learning_rate", *options}
    expected = end(own)
    for field in dataclasses.fields(kind):
        default = dataclasses.replace(own, **{field.name: field.default})
        assert jnp.abs(end(default) - expected).max() > 1e-4, field.name
        traced = f"optimizer.{field.name}"
        if traced in TRACEABLE:  # instead of the field
            as_traced = end(default, **{traced: jnp.asarray(getattr(own, field.name))})
            np.testing.assert_allclose(as_traced, expected, rtol=1e-6, atol=1e-6)


OWN = {
    "headless": {"kernel": jnp.ones((4, 4))},
    "head_block": {
        "head": {"mix": {"kernel": jnp.ones((4, 4))}},
        "fc": {"kernel": jnp.ones((4, 3))},
    },
    "attention": {"bias": jnp.ones((2, 4)), "scale": jnp.ones((2, 4))},
    "out": jnp.ones((4, 3)),
}


@pytest.mark.parametrize(
    ("classifier", "left"),
    [("fc", [("head_block", "fc", "kernel")]), ("out", [("out",)]), (None, [])],
)
def test_the_classifier_is_the_layer_of_that_name(classifier, left):
    """Not whatever has the name somewhere on its path; and no bias is a kernel."""
    found = muon_dimensions(OWN, classifier=classifier)
    paths = jax.tree_util.tree_leaves_with_path(OWN)
    kernels = {tuple(part.key for part in path) for path, _ in paths} - {
        ("attention", "bias"),
        ("attention", "scale"),
    }
    for path in kernels | {("attention", "bias"), ("attention", "scale")}:
        node = found
        for name in path:
            node = node[name]
        assert (node is not None) == (path in kernels and path not in left), path


@pytest.mark.parametrize("classifier", ["head", "fc_out"])
def test_a_classifier_that_is_not_there_is_refused(classifier):
    """`head` of OWN holds a layer, and is none."""
    optimizer = Muon(classifier=classifier).make(lambda _: 0.1)
    with pytest.raises(InputError, match=f"no layer is named '{classifier}'.*classifier"):
        optimizer.init(OWN)


def test_an_own_classifier_is_left_to_adam():
    """Adam's first step is the rate in every element; Muon's differs by element."""
    optimizer = Muon(adam_ratio=1.0, classifier="fc").make(lambda _: 1.0)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), OWN)
    updates, _ = optimizer.update(grads, optimizer.init(OWN), OWN)
    spreads = {
        name: np.ptp(np.abs(kernel))
        for name, kernel in (("fc", updates["head_block"]["fc"]["kernel"]), ("out", updates["out"]))
    }
    assert spreads["fc"] < 1e-3 < 0.1 < spreads["out"]


def test_biases_of_stacked_networks_are_not_kernels():
    stacked = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
    assert decayed(stacked) == decayed(PARAMS)
    optimizer = SGD(weight_decay=0.5).make(lambda _: 0.1)
    grads = jax.tree.map(jnp.zeros_like, stacked)
    updates, _ = optimizer.update(grads, optimizer.init(stacked), stacked)
    assert not updates["convs"]["bias"].any()
    np.testing.assert_allclose(updates["convs"]["kernel"], -0.1, rtol=1e-6)
