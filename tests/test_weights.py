"""Weights to start from, and layers that stay as they are: through the step and through runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import MODEL, RECIPE, head
from flax import nnx

from mnist_flax.data import Examples
from mnist_flax.errors import InputError
from mnist_flax.evaluation import evaluate
from mnist_flax.loop import epochs, fit
from mnist_flax.model import CNN
from mnist_flax.optimizer import SGD, Constant
from mnist_flax.reports.runs import load_run
from mnist_flax.steps import create_state, train_step
from mnist_flax.weights import names_of, taken_over

TUNING = dataclasses.replace(
    RECIPE, epochs=1, optimizer=SGD(learning_rate=0.01), schedule=Constant(), plateau=None
)


def leaves(tree):
    """Returns a tree's leaves, as numpy's, by their names."""
    return {names_of(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def of_classes(splits, classes):
    """The examples of the first classes, as a dataset of its own."""

    def those(examples):
        return Examples(*(array[examples.labels < classes] for array in examples))

    names = splits.info.class_names[:classes]
    info = dataclasses.replace(splits.info, num_classes=classes, class_names=names, fingerprint="")
    val = head(those(splits.val), 100)
    return dataclasses.replace(splits, train=those(splits.train), val=val, info=info)


def test_a_run_begins_from_the_weights_of_another(whole, small, tmp_path):
    """With a learning rate of nothing it stays there; step and optimizer are fresh."""
    still = dataclasses.replace(TUNING, optimizer=SGD(learning_rate=1e-12), val_size=500)
    trained = load_run(whole[1]).state
    result = fit(still, small, start_params=trained, workdir=tmp_path / "run", progress=False)
    assert int(result.state.step) == 24
    for name, own in leaves(result.state.params).items():
        np.testing.assert_allclose(own, leaves(trained.params)[name], rtol=0, atol=1e-6)
    resumed = fit(still, small, workdir=tmp_path / "run", resume=True, progress=False)
    jax.tree.map(np.testing.assert_array_equal, result.state.params, resumed.state.params)
    with pytest.raises(InputError, match="weights of its own"):
        fit(still, small, start_params=trained, workdir=tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="give either"):
        next(epochs(TUNING, small, start=result.state, start_params=trained))


@pytest.mark.slow
def test_to_go_on_learns_faster_than_to_begin(whole, small):
    first = next(epochs(TUNING, small)).row["train_loss"]
    on = next(epochs(TUNING, small, start_params=whole[0].state)).row["train_loss"]
    assert on < 0.9 * first


@pytest.mark.slow
def test_another_number_of_classes_has_a_last_layer_of_its_own(whole, small):
    trained, splits = whole[0].state, of_classes(small, 4)
    recipe = dataclasses.replace(TUNING, val_size=100, optimizer=SGD(learning_rate=1e-12))
    state = next(epochs(recipe, splits, start_params=trained)).state
    fresh = next(epochs(recipe, splits)).state
    for name, own in leaves(state.params).items():
        other = fresh if name[0] == "head" else trained
        np.testing.assert_allclose(own, leaves(other.params)[name], rtol=0, atol=1e-6)
    assert evaluate(state, splits.val).logits_NK.shape == (100, 4)


def test_what_is_frozen_stays_as_it_is(whole, small):
    """To the bit: parameters under weight decay, and the statistics of BatchNorm."""
    trained = whole[0].state
    recipe = dataclasses.replace(
        TUNING, freeze=("convs", "norms"), optimizer=SGD(learning_rate=0.05, weight_decay=0.1)
    )
    state = next(epochs(recipe, small, start_params=trained)).state
    for tree, old in ((state.params, trained.params), (state.batch_stats, trained.batch_stats)):
        for name, own in leaves(tree).items():
            same = np.array_equal(own, leaves(old)[name])
            assert same == (name[0] in ("convs", "norms")), name


@pytest.mark.slow
def test_a_frozen_network_learns_as_in_evaluation(splits):
    """The head's gradient is that of logistic regression on what evaluation sees."""
    model = CNN(dataclasses.replace(MODEL, dropout=0.0), rngs=nnx.Rngs(0))
    batch = head(splits.train, 32)
    state = create_state(jax.random.key(0), model, optax.sgd(1.0))
    stats = jax.tree.map(lambda a: a + 0.3, state.batch_stats)
    state = dataclasses.replace(state, batch_stats=stats)
    frozen = ("convs", "norms", "hidden")
    new, _ = jax.jit(train_step, static_argnames="freeze")(
        jax.random.key(0), state, batch, freeze=frozen
    )
    own = nnx.merge(state.graphdef, state.params, stats)
    features_BF = np.asarray(own.features(jnp.asarray(batch.images / np.float32(255))), np.float64)
    probabilities = np.asarray(jax.nn.softmax(own(jnp.asarray(batch.images / np.float32(255)))))
    error_BK = probabilities - np.eye(10)[batch.labels]
    moved = np.asarray(state.params["head"]["kernel"]) - np.asarray(new.params["head"]["kernel"])
    np.testing.assert_allclose(moved, features_BF.T @ error_BK / 32, rtol=1e-3, atol=1e-5)


def test_weights_of_another_model_are_refused(whole, small):
    wider = dataclasses.replace(RECIPE.model, hidden=(24,))
    with pytest.raises(
        InputError, match=r"another model: head/kernel is \[16, 10\], and here \[24, 10\]"
    ):
        next(epochs(dataclasses.replace(TUNING, model=wider), small, start_params=whole[0].state))
    flat = dataclasses.replace(RECIPE.model, hidden=())
    with pytest.raises(InputError, match="hidden/0/bias is not in both"):
        next(epochs(dataclasses.replace(TUNING, model=flat), small, start_params=whole[0].state))
    with pytest.raises(InputError, match="another model"):
        taken_over({"a": np.zeros((2, 3))}, {"a": np.zeros((3, 3))}, num_classes=3)


def test_layers_that_are_not_there_cannot_be_frozen(small):
    for names, message in [
        (("convolutions",), "freeze names convolutions; the model's layers are convs, head"),
        (("convs", "norms", "hidden", "head"), "nothing would be trained"),
    ]:
        with pytest.raises(InputError, match=message):
            next(epochs(dataclasses.replace(TUNING, freeze=names), small))
