"""What a user may hand in, and what is refused in one line before any work: data, states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import first
from flax import nnx

from mnist_flax.data import DatasetInfo, Examples, Splits, check_examples
from mnist_flax.errors import InputError
from mnist_flax.evaluation import evaluate, evaluate_replicas, predict
from mnist_flax.loop import check_fits, epochs, fit
from mnist_flax.model import CNN, CNNConfig
from mnist_flax.optimizer import SGD
from mnist_flax.recipe import Recipe
from mnist_flax.replicas import make_mesh
from mnist_flax.steps import create_state, eval_logits, eval_step, train_step

MODEL = CNNConfig(widths=(2,), padding=("SAME",), pool=(True,), hidden=(), dropout=0.0)
RECIPE = Recipe(
    val_size=12,
    epochs=2,
    batch_size=10,
    model=MODEL,
    optimizer=SGD(learning_rate=0.05),
)
INFO = DatasetInfo("own", "1", 3, ("a", "b", "c"), (8, 6, 1), "0" * 16)


def make_examples(count, seed=0):
    """Images of three classes, of which each is bright in other rows."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % 3
    images = rng.integers(0, 100, (count, 8, 6, 1)).astype(np.uint8)
    for row in range(8):
        images[labels == row % 3, row] += 100
    return Examples(images, labels)


SPLITS = Splits(make_examples(60, 1), make_examples(12, 2), make_examples(12, 3), INFO)


def with_labels(change):
    return lambda examples: Examples(examples.images, change(examples.labels))


def with_images(change):
    return lambda examples: Examples(change(examples.images), examples.labels)


WRONG = {
    "labels from 1": (with_labels(lambda y: y + 1), r"\[0, 3\), but there is a 3"),
    "padding": (with_labels(lambda y: y - 1), r"\[0, [3K]\), but there is a -1"),
    "column": (with_labels(lambda y: y[:, None]), r"labels\[:, 0\]"),
    "one-hot": (with_labels(lambda y: np.eye(3, dtype=np.int32)[y]), r"labels\.argmax\(-1\)"),
    "float labels": (with_labels(lambda y: y.astype(np.float32)), "not float32 .*astype"),
    "bool labels": (with_labels(lambda y: y > 0), "not bool"),
    "fewer labels": (with_labels(lambda y: y[:-1]), "one an image"),
    "no channels": (with_images(lambda x: x[..., 0]), r"images\[\.\.\., None\]"),
    "NCHW": (with_images(lambda x: x.transpose(0, 3, 1, 2)), r"transpose\(0, 2, 3, 1\)"),
    "other size": (with_images(lambda x: x[:, :, :4]), r"\[N, 8, 6, 1\], not \[\d+, 8, 4, 1\]"),
    "int32 images": (with_images(lambda x: x.astype(np.int32)), "not int32 .*astype"),
    "0 to 255 in floats": (with_images(lambda x: x.astype(np.float32)), r"\[0, 1\]"),
    "-1 to 1": (with_images(lambda x: x / 127.5 - 1), r"\[0, 1\]"),
    "NaN": (with_images(lambda x: np.where(x > 99, np.nan, 0.5)), r"\[nan, nan\]"),
    "empty": (lambda examples: examples[:0], "no examples"),
}
wrong = pytest.mark.parametrize(("spoil", "found"), WRONG.values(), ids=WRONG)


@pytest.fixture(scope="module")
def state():
    key = jax.random.key(0)
    sizes = {"image_shape": INFO.image_shape, "num_classes": INFO.num_classes}
    return create_state(key, lambda rngs: CNN(MODEL, rngs=rngs, **sizes), optax.sgd(0.1))


@pytest.fixture(scope="module")
def results():
    """Both epochs of RECIPE."""
    return list(epochs(RECIPE, SPLITS))


def refused(found, function, *args, **kwargs):
    with pytest.raises(InputError, match=found) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@wrong
def test_a_run_is_refused(spoil, found, tmp_path):
    splits = dataclasses.replace(SPLITS, train=spoil(SPLITS.train))
    message = refused(found, fit, RECIPE, splits, workdir=tmp_path / "run", progress=False)
    assert message.startswith("train: ")
    assert not (tmp_path / "run").exists()
    if len(val := spoil(SPLITS.val)) == RECIPE.val_size:
        splits = dataclasses.replace(SPLITS, val=val)
        assert refused(found, check_fits, RECIPE, splits, mesh=make_mesh(devices=1)).startswith(
            "val: "
        )


def test_a_run_needs_its_validation_examples():
    splits = dataclasses.replace(SPLITS, val=SPLITS.val[:0])
    refused(
        "val_size is 12, but the splits hold 0",
        check_fits,
        RECIPE,
        splits,
        mesh=make_mesh(devices=1),
    )


@wrong
def test_an_evaluation_is_refused(spoil, found, state):
    refused(found, evaluate, state, spoil(SPLITS.test))
    stacked = jax.tree.map(lambda leaf: leaf[None], state)
    if "there is a 3" not in found:  # that needs K, and so the program
        refused(found, evaluate_replicas, stacked, spoil(SPLITS.test), mesh=None)


@pytest.mark.parametrize("name", [name for name in WRONG if "label" not in name])
def test_a_prediction_is_refused(name, state):
    spoil, found = WRONG[name]
    if (images := spoil(SPLITS.test).images) is not SPLITS.test.images:
        refused("no images" if name == "empty" else found, predict, state, images)


# What a trace knows: shapes and dtypes.
KNOWN = ("column", "one-hot", "float labels", "fewer labels", "no channels", "NCHW", "other size")


@pytest.mark.parametrize("name", [*KNOWN, "int32 images", "bool labels"])
def test_a_step_is_refused_while_it_is_traced(name, state):
    spoil, found = WRONG[name]
    train = functools.partial(train_step, jax.random.key(0))
    for step in (train, eval_step):
        refused(found, jax.eval_shape, step, state, spoil(SPLITS.test))


def test_the_models_own_images_are_named(state):
    images = np.zeros((2, 28, 28, 1), np.float32)
    refused(r"\[N, 8, 6, 1\], not \[2, 28, 28, 1\]", jax.eval_shape, eval_logits, state, images)


VAL = ("val_loss", "val_accuracy")


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", first([np.uint8, np.int8, np.int64, np.uint32]))
def test_labels_of_any_integer_type_train_and_validate_to_the_same_bits(dtype, results):
    cast = with_labels(lambda labels: labels.astype(dtype))
    splits = dataclasses.replace(SPLITS, train=cast(SPLITS.train), val=cast(SPLITS.val))
    found = list(epochs(RECIPE, splits))
    assert bits(found[-1].state.params) == bits(results[-1].state.params)
    for one, other in zip(found[-1].history, results[-1].history, strict=True):
        assert [one[name] for name in VAL] == [other[name] for name in VAL]
    accuracy = results[-1].row["val_accuracy"]
    assert accuracy > 0.9
    assert evaluate(found[-1].state, cast(SPLITS.val)).accuracy == accuracy


@pytest.mark.bits
@pytest.mark.parametrize("dtype", first([np.float16, np.float64, jnp.bfloat16]))
def test_images_of_any_floating_point_type_train_alike(dtype):
    """In steps of an eighth, which each of them has."""

    def losses(dtype):
        cast = with_images(lambda images: (images // 32 / 8).astype(dtype))
        splits = dataclasses.replace(SPLITS, train=cast(SPLITS.train), val=cast(SPLITS.val))
        return [row["val_loss"] for row in list(epochs(RECIPE, splits))[-1].history]

    np.testing.assert_allclose(losses(dtype), losses(np.float32), rtol=1e-5)


def test_images_that_were_resampled_may_pass_1_by_a_rounding():
    images = np.full((2, 8, 6, 1), 1.004, np.float32)
    check_examples(Examples(images, np.zeros(2, np.int32)), name="these")


def refused_start(found, recipe=RECIPE, splits=SPLITS, **start):
    return refused(found, next, epochs(recipe, splits, **start))


def test_to_start_from_a_run_that_is_over(results):
    message = refused_start("nothing is left", start=results[1].state)
    assert "step 12, and 2 epochs of 6 steps are over at 12" in message


def test_to_start_with_another_batch_size(results):
    """12 steps of 10 would be 6 epochs of 30 each: more than 5."""
    larger = dataclasses.replace(RECIPE, batch_size=30, epochs=5)
    refused_start("nothing is left", larger, start=results[1].state)
    smaller = dataclasses.replace(RECIPE, batch_size=6)
    message = refused_start("batch size", smaller, start=results[0].state)
    assert "36 examples into an epoch of 10 steps" in message


def test_to_start_on_more_data(results):
    more = dataclasses.replace(SPLITS, train=make_examples(100))
    refused_start("on other data", splits=more, start=results[0].state)


def test_to_start_with_metrics_of_within_an_epoch(results):
    metrics = dataclasses.replace(results[0].metrics, count=jnp.array([20]))
    refused_start("have counted 20", start=dataclasses.replace(results[0], metrics=metrics))


def test_to_start_at_a_step_that_is_not_the_optimizers(results):
    reset = dataclasses.replace(results[1].state, step=jnp.int32(0))
    refused_start("step 0, but its optimizer at 12", start=reset)


def test_to_start_with_more_epochs_goes_on(results):
    longer = dataclasses.replace(RECIPE, epochs=3)
    (third,) = epochs(longer, SPLITS, start=results[1].state)
    assert (third.row["epoch"], third.step) == (3, 18)
    assert bits(third.state.params) == bits(list(epochs(longer, SPLITS))[-1].state.params)


def test_create_state_takes_a_model_as_it_is():
    model = CNN(MODEL, image_shape=INFO.image_shape, rngs=nnx.Rngs(0))
    state = create_state(jax.random.key(0), model, optax.sgd(0.1))
    own = create_state(
        jax.random.key(0),
        lambda rngs: CNN(MODEL, image_shape=INFO.image_shape, rngs=rngs),
        optax.sgd(0.1),
    )
    kernel = np.asarray(model.head.kernel[...])
    np.testing.assert_array_equal(state.params["head"]["kernel"], kernel)
    assert not np.allclose(own.params["head"]["kernel"], kernel)
