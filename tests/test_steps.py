"""The steps: a golden step, purity, determinism, and what vmap and scan make of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mnist_flax.augment import random_affine
from mnist_flax.data import Examples
from mnist_flax.errors import InputError
from mnist_flax.model import CNN, CNNConfig
from mnist_flax.moments import normalize
from mnist_flax.optimizer import SGD, AdamW, Muon
from mnist_flax.steps import (
    Purpose,
    create_state,
    draw_key,
    eval_logits,
    eval_step,
    reduce_on_plateau,
    to_float,
    to_model,
    train_step,
)

CONFIG = CNNConfig(widths=(4, 8), padding=("SAME", "VALID"), pool=(True, True), hidden=(16,))
OPTIMIZER = SGD(momentum=0.9, weight_decay=0.01).make(lambda _: 0.1)
AUGMENT = functools.partial(random_affine, rotate=10.0, shift=0.1, zoom=0.1)


# What three steps came to when this test was written, on the CPU.
GOLDEN_LOSSES = [3.6836660, 2.6777792, 2.2424724]
GOLDEN_NORM = 9.0447979


KEY = jax.random.key(0)  # of the runs


def make_state(seed=0):
    return create_state(jax.random.key(seed), lambda rngs: CNN(CONFIG, rngs=rngs), OPTIMIZER)


def same_bits(one, other):
    one, other = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(one) == len(other) and all(map(np.array_equal, one, other))


@pytest.fixture(scope="module")
def batch(splits):
    return Examples(jnp.asarray(splits.train.images[:32]), jnp.asarray(splits.train.labels[:32]))


@pytest.fixture(scope="module")
def step():
    return jax.jit(functools.partial(train_step, augment=AUGMENT, label_smoothing=0.1))


def test_a_step_by_hand(batch):
    """Logistic regression's gradient in numpy: the last layer, with everything before it frozen."""
    config = dataclasses.replace(CONFIG, dropout=0.0)
    optimizer = optax.sgd(0.1)
    state = create_state(jax.random.key(0), lambda rngs: CNN(config, rngs=rngs), optimizer)
    see = nnx.jit(functools.partial(CNN.features, train=True))
    features_BF = np.asarray(see(to_model(state), to_float(batch.images)), np.float64)
    step = jax.jit(functools.partial(train_step, label_smoothing=0.1))
    new_state, metrics = step(KEY, state, batch)
    kernel = np.asarray(state.params["head"]["kernel"], np.float64)
    bias = np.asarray(state.params["head"]["bias"], np.float64)
    logits = features_BF @ kernel + bias
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    targets = 0.9 * np.eye(10)[np.asarray(batch.labels)] + 0.01
    np.testing.assert_allclose(metrics.loss, -(targets * np.log(softmax)).sum(-1).mean(), 1e-5)
    assert int(metrics.correct) == (logits.argmax(-1) == np.asarray(batch.labels)).sum()
    gradient = features_BF.T @ (softmax - targets) / 32
    new_kernel = new_state.params["head"]["kernel"]
    np.testing.assert_allclose(new_kernel, kernel - 0.1 * gradient, rtol=1e-4, atol=1e-6)
    assert int(new_state.step) == 1


def test_golden_step(batch, step):
    """Three steps land where they landed on the day this was written, within float32 rounding."""
    state, losses = make_state(), []
    for _ in range(3):
        state, metrics = step(KEY, state, batch)
        losses.append(float(metrics.loss))
    np.testing.assert_allclose(losses, GOLDEN_LOSSES, rtol=1e-4)
    np.testing.assert_allclose(optax.tree.norm(state.params), GOLDEN_NORM, rtol=1e-5)


def test_two_runs_are_the_same_bits_and_another_seed_is_not(batch, step):
    one, other = (step(KEY, step(KEY, make_state(), batch)[0], batch) for _ in range(2))
    assert same_bits(one, other)
    again = step(jax.random.key(1), make_state(), batch)[0]
    assert not same_bits(again.params, step(KEY, make_state(), batch)[0].params)


def test_a_step_leaves_its_inputs_alone(batch, step):
    state = make_state()
    before = jax.tree.map(np.array, state)
    new_state, _ = step(KEY, state, batch)
    assert same_bits(state, before)
    assert not same_bits(new_state.params, state.params)
    assert not same_bits(new_state.batch_stats, state.batch_stats)


@pytest.mark.slow
def test_images_are_normalized_before_they_are_augmented(batch):
    """As if they had been normalized beforehand, and the network knew nothing of it."""
    plain = CNNConfig(widths=(4,), padding=("SAME",), pool=(True,), hidden=(), dropout=0.0)
    configs = (dataclasses.replace(plain, normalize=True), plain)
    key, images = jax.random.key(0), to_float(batch.images)
    states = [
        create_state(key, lambda rngs, c=config: CNN(c, rngs=rngs), OPTIMIZER) for config in configs
    ]
    batches = [dataclasses.replace(batch, images=seen) for seen in (images, normalize(images))]

    def shift(images_BHWC):  # which normalization would take back
        return jnp.roll(images_BHWC, 4, axis=1)

    step = jax.jit(functools.partial(train_step, augment=lambda _, images: shift(images)))
    (own, metrics), (other, expected) = map(functools.partial(step, KEY), states, batches)
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(optax.tree.norm(own.params), optax.tree.norm(other.params), 1e-5)
    for view in (None, shift):
        run = jax.jit(functools.partial(eval_logits, view=view))
        logits = [run(state, b.images) for state, b in zip((own, other), batches, strict=True)]
        np.testing.assert_allclose(*logits, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_augmentation_ends_after_its_steps(batch):
    """Two steps: the first of augmented images, the second of images as they are."""

    def shift(_, images_BHWC):
        return jnp.roll(images_BHWC, 4, axis=1)

    def two_steps(*options):
        state, losses = make_state(), []
        for own in options:
            state, metrics = jax.jit(functools.partial(train_step, **own))(KEY, state, batch)
            losses.append(metrics.loss)
        return losses

    bounded = two_steps(*[{"augment": shift, "augment_steps": 1}] * 2)
    np.testing.assert_allclose(bounded, two_steps({"augment": shift}, {}), rtol=1e-5)
    assert abs(bounded[1] - two_steps(*[{"augment": shift}] * 2)[1]) > 1e-3


def test_the_plateau_scale_multiplies_the_update(batch):
    state = make_state()
    halved = dataclasses.replace(state, plateau=state.plateau._replace(scale=jnp.float32(0.5)))
    step = jax.jit(train_step)
    full, half = step(KEY, state, batch)[0], step(KEY, halved, batch)[0]

    def moved(new):
        return new.params["head"]["kernel"] - state.params["head"]["kernel"]

    np.testing.assert_allclose(moved(half), 0.5 * moved(full), rtol=1e-3, atol=1e-7)


def test_plateau_by_hand():
    """Patience 2, factor 0.5, 10% improvements count, floor 0.3."""
    state, scales = make_state(), []
    for loss in [1.0, 0.95, 0.95, 0.8, 0.79, 0.78, 0.78, 0.78]:
        state = reduce_on_plateau(
            state, jnp.float32(loss), patience=2, factor=0.5, min_delta=0.1, min_scale=0.3
        )
        scales.append(round(float(state.plateau.scale), 6))
    assert scales == [1, 1, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3]


def test_stacked_states_under_vmap_are_the_single_ones(batch):
    keys_R = jax.vmap(jax.random.key)(jnp.arange(3))
    states = [make_state(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    step = functools.partial(train_step, augment=AUGMENT)
    together, metrics = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))(keys_R, stacked, batch)
    assert metrics.loss.shape == (3,)
    for index, state in enumerate(states):
        alone, alone_metrics = jax.jit(step)(keys_R[index], state, batch)
        np.testing.assert_allclose(metrics.loss[index], alone_metrics.loss, rtol=1e-5)
        jax.tree.map(
            lambda many, one, i=index: np.testing.assert_allclose(many[i], one, atol=2e-5),
            together.params,
            alone.params,
        )


def test_eval_counts_padding_for_nothing_and_changes_nothing(batch):
    state = make_state()
    padded = Examples(
        jnp.concatenate([batch.images, jnp.zeros_like(batch.images[:5])]),
        jnp.concatenate([batch.labels, -jnp.ones_like(batch.labels[:5])]),
    )
    plain, with_padding = (jax.jit(eval_step)(state, examples) for examples in (batch, padded))
    assert int(with_padding.count) == 32
    assert int(with_padding.correct) == int(plain.correct)
    np.testing.assert_allclose(with_padding.loss, plain.loss, rtol=1e-6)


def test_draw_keys_differ_by_purpose_and_index():
    key = jax.random.key(0)
    keys = {
        tuple(np.asarray(jax.random.key_data(draw_key(key, purpose, index))).tolist())
        for purpose in Purpose
        for index in range(5)
    }
    assert len(keys) == len(Purpose) * 5


def test_to_float():
    images = np.array([0, 51, 255], np.uint8).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(to_float(images).reshape(-1), [0, 0.2, 1], rtol=1e-7)
    floats = jnp.array([0.1, 0.9]).reshape(1, 2, 1, 1)
    assert same_bits(to_float(floats), floats)


class Linear(nnx.Module):
    """An own model that takes images and nothing else."""

    def __init__(self, *, rngs):
        self.fc = nnx.Linear(784, 10, rngs=rngs)

    def __call__(self, images_BHWC):
        return self.fc(images_BHWC.reshape(len(images_BHWC), -1))


def own_state(model, optimizer=None, seed=0):
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    return create_state(jax.random.key(seed), lambda rngs: model(rngs=rngs), optimizer)


@pytest.mark.parametrize("labels", [[3, 10, 4], [3, -2, 4], [3, -1, 4]])
def test_labels_that_there_are_not_are_noticed_in_training(batch, labels):
    """-1, too: BatchNorm has seen the padding's image."""
    wrong = Examples(batch.images[:3], jnp.array(labels))
    metrics = jax.jit(train_step)(KEY, own_state(Linear), wrong)[1]
    assert np.isnan(metrics.loss)
    assert np.isfinite(jax.jit(train_step)(KEY, own_state(Linear), batch)[1].loss)
    evaluated = jax.jit(eval_step)(own_state(Linear), wrong)
    assert np.isnan(evaluated.loss) == (labels[1] != -1)
    assert int(evaluated.count) == 3 - (labels[1] == -1)


@pytest.mark.parametrize("option", ["label_smoothing", "dropout_rate"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_shares_that_there_are_not_are_refused(batch, option, value):
    with pytest.raises(InputError, match=rf"{option} is .*\[0, 1\)"):
        jax.eval_shape(functools.partial(train_step, **{option: value}), KEY, make_state(), batch)


class Gain(Linear):
    """Has a parameter that acts before augmentation."""

    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.gain = nnx.Param(jnp.ones(()))

    def preprocess_images(self, images_BHWC):
        return images_BHWC * self.gain[...]


def test_parameters_of_preprocessing_learn(batch):
    """Logits are gain * x W + b: the loss's derivative by the gain is in numpy's hands."""
    state = own_state(Gain)
    new_state, _ = jax.jit(train_step)(KEY, state, batch)
    kernel = np.asarray(state.params["fc"]["kernel"], np.float64)
    logits = np.asarray(batch.images, np.float64).reshape(32, -1) / 255 @ kernel
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    errors = softmax - np.eye(10)[np.asarray(batch.labels)]
    gradient = (errors * logits).sum(-1).mean()
    np.testing.assert_allclose(new_state.params["gain"], 1 - 0.1 * gradient, rtol=1e-5)


def test_a_model_that_takes_images_alone(batch):
    """A step of it by hand, and its evaluation."""
    state = own_state(Linear)
    new_state, metrics = jax.jit(train_step)(KEY, state, batch)

    def loss(params):
        logits = to_float(batch.images).reshape(32, -1) @ params["kernel"] + params["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(state.params["fc"])
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(eval_step)(state, batch).loss, value, rtol=1e-5)
    np.testing.assert_allclose(
        new_state.params["fc"]["kernel"],
        state.params["fc"]["kernel"] - 0.1 * grads["kernel"],
        rtol=1e-4,
        atol=1e-6,
    )


class Switched(Linear):
    """NNX's own Dropout and BatchNorm, which `model.train()` and `model.eval()` switch."""

    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.norm = nnx.BatchNorm(784, use_scale=False, momentum=0.0, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, images_BHWC):
        x_BF = self.norm(images_BHWC.reshape(len(images_BHWC), -1))
        return self.fc(self.drop(x_BF))


def test_a_model_with_random_streams_and_switches_of_its_own(batch):
    state = own_state(Switched)
    step = jax.jit(train_step)
    one, metrics = step(KEY, state, batch)
    other, again = step(KEY, dataclasses.replace(one, params=state.params), batch)
    assert jax.tree.structure(state) == jax.tree.structure(one)
    assert metrics.loss != again.loss  # another mask
    assert int(other.batch_stats["drop"]["rngs"]["count"]) == 2
    mean = (np.asarray(batch.images, np.float64).reshape(32, -1) / 255).mean(0)
    np.testing.assert_allclose(one.batch_stats["norm"]["mean"], mean, atol=1e-6)
    see = jax.jit(eval_logits)
    np.testing.assert_array_equal(see(one, batch.images), see(one, batch.images))
    alone = [see(one, batch.images[i : i + 1]) for i in range(2)]  # running statistics
    np.testing.assert_allclose(see(one, batch.images[:2]), jnp.concatenate(alone), atol=1e-4)


def test_logits_of_another_shape_are_refused(batch):
    class Flat(Linear):
        def __call__(self, images_BHWC):
            return super().__call__(images_BHWC)[:, 0]

    with pytest.raises(InputError, match=r"logits \[32, K\], not \[32\]"):
        jax.eval_shape(train_step, KEY, own_state(Flat), batch)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.polyak_sgd(),
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
        optax.lbfgs(memory_size=2, linesearch=optax.scale_by_backtracking_linesearch(5)),
    ],
    ids=["value", "value in a chain", "value, gradient and function"],
)
def test_optimizers_are_given_what_they_need(batch, optimizer):
    state, step = own_state(Linear, optimizer), jax.jit(train_step)
    state, first = step(KEY, state, batch)
    for _ in range(2):
        state, metrics = step(KEY, state, batch)
    assert metrics.loss < first.loss


def test_polyaks_step_by_hand(batch):
    """Along the gradient, by the loss divided by its squared norm (Loizou et al. 2021, eq. 3)."""
    polyak = own_state(Linear, optax.polyak_sgd(max_learning_rate=100.0, scaling=1.0))
    step = jax.jit(train_step)
    (moved, metrics), (by_sgd, _) = step(KEY, polyak, batch), step(KEY, own_state(Linear), batch)
    gradient = jax.tree.map(lambda a, b: (a - b) / 0.1, polyak.params, by_sgd.params)
    rate = metrics.loss / optax.tree.norm(gradient, squared=True)
    for part in ("kernel", "bias"):
        expected = polyak.params["fc"][part] - rate * gradient["fc"][part]
        np.testing.assert_allclose(moved.params["fc"][part], expected, rtol=1e-3, atol=1e-5)


def test_parameters_are_drawn_by_keys_that_the_run_does_not_use():
    key, seen = jax.random.key(0), []

    class Spy(Linear):
        def __init__(self, *, rngs):
            super().__init__(rngs=rngs)
            seen.extend([rngs.params(), rngs.dropout(), rngs.noise()])

    create_state(key, lambda rngs: Spy(rngs=rngs), optax.sgd(0.1))
    own = {tuple(np.asarray(jax.random.key_data(each)).tolist()) for each in seen}
    used = {
        tuple(np.asarray(jax.random.key_data(each)).tolist())
        for purpose in Purpose
        for each in (
            jax.random.fold_in(key, purpose),
            *(draw_key(key, purpose, index) for index in range(20)),
        )
    }
    assert len(own) == 3
    assert not own & used


@pytest.mark.parametrize("kind", [SGD, AdamW, Muon])
def test_dtypes_stay_in_x64(kind):
    """A state that changes them cannot be scanned over, and compiles twice."""
    rng = np.random.default_rng(0)
    images, labels = rng.uniform(size=(4, 28, 28, 1)), rng.integers(0, 10, 4)
    with jax.enable_x64(True):
        rate = optax.linear_schedule(0.1, 0.0, 10)
        optimizer = kind(weight_decay=0.01).make(rate)
        state = create_state(jax.random.key(0), lambda rngs: CNN(CONFIG, rngs=rngs), optimizer)
        batch = Examples(jnp.asarray(images), jnp.asarray(labels))
        assert (batch.images.dtype, batch.labels.dtype) == (np.float64, np.int64)
        new_state, metrics = jax.eval_shape(train_step, KEY, state, batch)
        before, after = (
            [leaf.dtype for leaf in jax.tree.leaves(tree)] for tree in (state, new_state)
        )
        assert before == after
        assert metrics.loss_sum.dtype == np.float32
