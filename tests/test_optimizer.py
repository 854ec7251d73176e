"""Schedules and optimizers against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_flax.errors import InputError
from mnist_flax.optimizer import decayed, make_optimizer, make_schedule, muon_dimensions
from mnist_flax.recipes import (
    RECIPES,
    OptimizerConfig,
    Recipe,
    recipe_optimizer,
    recipe_schedule,
)

PARAMS = {
    "convs": {"kernel": jnp.full((3, 3, 2, 4), 2.0), "bias": jnp.full((4,), 2.0)},
    "norms": {"scale": jnp.full((4,), 2.0)},
    "head": {"kernel": jnp.full((8, 10), 2.0)},
}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("constant", {}, {0: 0.4, 39: 0.4}),
        ("exponential", {"decay": 0.5}, {0: 0.4, 9: 0.4, 10: 0.2, 19: 0.2, 20: 0.1, 39: 0.05}),
        ("one_cycle", {"warmup": 0.25}, {0: 0.04, 5: 0.22, 10: 0.4, 25: 0.2, 40: 0.0}),
        ("cosine", {"warmup": 0.25}, {0: 0.04, 5: 0.22, 10: 0.4, 25: 0.2, 40: 0.0}),
        ("cosine", {"warmup": 0.0}, {0: 0.4, 10: 0.2 * (1 + 2**-0.5), 20: 0.2, 40: 0.0}),
    ],
)
def test_schedules_by_hand(name, options, expected):
    schedule = make_schedule(name, peak=0.4, steps_per_epoch=10, epochs=4, **options)
    for step, value in expected.items():
        np.testing.assert_allclose(schedule(step), value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["one_cycle", "cosine"])
def test_a_run_of_few_steps_has_its_fall_too(name):
    """Rounded, the rise would take both steps."""
    schedule = make_schedule(name, peak=0.4, steps_per_epoch=2, epochs=1, warmup=0.9)
    np.testing.assert_allclose([schedule(step) for step in range(3)], [0.04, 0.4, 0.0], atol=1e-8)


def test_sgd_by_hand():
    """Two steps of Nesterov momentum with decoupled decay, on gradient 1 at rate 0.1."""
    optimizer = make_optimizer(
        "sgd", learning_rate=lambda _: 0.1, momentum=0.9, nesterov=True, weight_decay=0.5
    )
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


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_decay_spares_biases_and_batch_norm(name):
    """With gradients of 0, only decay moves a parameter."""
    optimizer = make_optimizer(name, learning_rate=lambda _: 0.1, momentum=0.9, weight_decay=0.5)
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    assert not updates["convs"]["bias"].any()
    assert not updates["norms"]["scale"].any()
    np.testing.assert_allclose(updates["convs"]["kernel"], -0.1 * 0.5 * 2, rtol=1e-5)
    assert jax.tree.leaves(decayed(PARAMS)) == [False, True, True, False]


def test_a_newton_schulz_iteration_by_hand():
    """X to aX + bAX + cAAX with A = XX', after X is divided by its Frobenius norm."""
    optimizer = make_optimizer("muon", learning_rate=lambda _: 1.0, nesterov=False, ns_steps=1)
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
    optimizer = make_optimizer("muon", learning_rate=lambda _: 1.0, momentum=0.9, adam_ratio=0.25)
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
    schedule = recipe_schedule(RECIPES["seed"], steps_per_epoch=10)
    np.testing.assert_allclose([schedule(step) for step in (0, 9, 10)], [0.01, 0.01, 0.009])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", dict(momentum=0.5, nesterov=False, weight_decay=0.3)),
        ("muon", dict(momentum=0.5, nesterov=False, ns_steps=1, adam_ratio=0.7, weight_decay=0.3)),
    ],
)
def test_a_recipes_optimizer_has_all_of_its_options(name, options):
    """Two updates, by options of which none is a default."""
    recipe = Recipe(optimizer=OptimizerConfig(name, learning_rate=0.2, **options))
    made = make_optimizer(name, learning_rate=lambda _: 0.2, **options)
    grads = jax.tree.map(lambda p: jnp.arange(p.size, dtype=p.dtype).reshape(p.shape) - 3, PARAMS)
    ends = []
    for optimizer in (recipe_optimizer(recipe, steps_per_epoch=10), made):
        params, state = PARAMS, optimizer.init(PARAMS)
        for _ in range(2):
            updates, state = optimizer.update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        ends.append(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), *ends)


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
    optimizer = make_optimizer("muon", learning_rate=lambda _: 0.1, classifier=classifier)
    with pytest.raises(InputError, match=f"no layer is named '{classifier}'.*classifier"):
        optimizer.init(OWN)


def test_an_own_classifier_is_left_to_adam():
    """Adam's first step is the rate in every element; Muon's differs by element."""
    optimizer = make_optimizer("muon", learning_rate=lambda _: 1.0, classifier="fc")
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
    optimizer = make_optimizer("sgd", learning_rate=lambda _: 0.1, weight_decay=0.5)
    grads = jax.tree.map(jnp.zeros_like, stacked)
    updates, _ = optimizer.update(grads, optimizer.init(stacked), stacked)
    assert not updates["convs"]["bias"].any()
    np.testing.assert_allclose(updates["convs"]["kernel"], -0.1, rtol=1e-6)
