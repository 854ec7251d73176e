"""Models, losses and optimizers of one's own, through the step and through whole runs."""

import copy
import dataclasses
import functools
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import RECIPE, head
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from mnist_flax.compat import List
from mnist_flax.data import DatasetInfo, Examples
from mnist_flax.errors import InputError, Interrupted
from mnist_flax.evaluation import evaluate, predict
from mnist_flax.launch import command_line
from mnist_flax.loop import epochs, fit
from mnist_flax.optimizer import SGD, AdamW, Constant
from mnist_flax.recipe import AugmentConfig, from_dict, to_dict
from mnist_flax.reports import export
from mnist_flax.reports.runs import load_run
from mnist_flax.steps import (
    apply_gradients,
    create_state,
    eval_step,
    loss_and_grads,
    train_step,
)

KEY = jax.random.key(0)  # of the runs


class MLP(nnx.Module):
    """A dense layer between pixels and logits: it takes images and nothing else."""

    def __init__(self, pixels, classes, *, width, rngs):
        self.hidden = nnx.Linear(pixels, width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images_BHWC):
        x = images_BHWC.reshape(images_BHWC.shape[0], -1)
        return self.head(nnx.relu(self.hidden(x)))


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    width: int = 32

    def make(self, info: DatasetInfo, *, rngs: nnx.Rngs) -> nnx.Module:
        return MLP(int(np.prod(info.image_shape)), info.num_classes, width=self.width, rngs=rngs)


class ResNet(nnx.Module):
    """One residual block with BatchNorm, switched by `train`."""

    def __init__(self, channels, classes, *, width, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), strides=2, rngs=rngs)
        self.stem = conv(channels, width)
        self.convs = List([conv(width, width, strides=1) for _ in range(2)])
        self.norms = List([nnx.BatchNorm(width, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images_BHWC, *, train):
        x = inner = self.stem(images_BHWC)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            inner = conv(nnx.relu(norm(inner, use_running_average=not train)))
        return self.head((x + inner).mean((1, 2)))


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    width: int = 4

    def make(self, info: DatasetInfo, *, rngs: nnx.Rngs) -> nnx.Module:
        return ResNet(info.image_shape[-1], info.num_classes, width=self.width, rngs=rngs)


class ViT(nnx.Module):
    """One block of attention over patches; Dropout has random streams, and `train()` a switch."""

    def __init__(self, shape, classes, *, patch, width, rngs):
        places = (shape[0] // patch) * (shape[1] // patch)
        self.embed = nnx.Conv(shape[2], width, (patch, patch), strides=patch, rngs=rngs)
        self.places = nnx.Param(0.02 * jax.random.normal(rngs.params(), (places, width)))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images_BHWC):
        x_BHWF = self.embed(images_BHWC)
        x_BPF = x_BHWF.reshape(x_BHWF.shape[0], -1, x_BHWF.shape[-1]) + self.places[...][None]
        x_BPF = x_BPF + self.dropout(self.attend(self.norm(x_BPF)))
        return self.head(x_BPF.mean(1))


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    patch: int = 7
    width: int = 8

    def make(self, info: DatasetInfo, *, rngs: nnx.Rngs) -> nnx.Module:
        options = {"patch": self.patch, "width": self.width}
        return ViT(info.image_shape, info.num_classes, **options, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Focal:
    """The focal loss of Lin et al. (2017)."""

    gamma: float = 2.0

    def __call__(self, logits_BK, batch):
        ce_B = optax.softmax_cross_entropy_with_integer_labels(logits_BK, batch.labels)
        return (1 - jnp.exp(-ce_B)) ** self.gamma * ce_B


OWN = dataclasses.replace(
    RECIPE,
    epochs=2,
    model=MLPConfig(),
    augment=AugmentConfig(),
    optimizer=AdamW(learning_rate=3e-3),
    schedule=Constant(),
    plateau=None,
)


def host(state):
    """Returns what a step changes in a state, as numpy's arrays, keys as their data."""
    arrays = (state.params, state.batch_stats, state.opt_state)
    is_key = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda a: np.asarray(jax.random.key_data(a) if is_key(a) else a), arrays)


@pytest.mark.parametrize(
    "model",
    [
        MLPConfig(),
        *(pytest.param(own(), marks=pytest.mark.slow) for own in (ResNetConfig, ViTConfig)),
    ],
)
def test_a_model_of_ones_own_trains_stops_and_resumes(model, small, tmp_path):
    """To the bits of a run that was not stopped; and the run is read with its model."""
    recipe = dataclasses.replace(OWN, model=model)
    whole = fit(recipe, small, progress=False)
    assert whole.history[-1]["train_loss"] < whole.history[0]["train_loss"] < 2.5
    options = dict(workdir=tmp_path / "run", progress=False)
    with pytest.raises(Interrupted):
        fit(recipe, small, should_stop=lambda: True, **options)
    resumed = fit(recipe, small, resume=True, **options)
    jax.tree.map(assert_array_equal, host(whole.state), host(resumed.state))
    run = load_run(tmp_path / "run")
    assert run.recipe == recipe
    logits = [evaluate(state, small.val).logits_NK for state in (run.state, whole.state)]
    assert_array_equal(*logits)


@pytest.mark.slow
def test_a_study_of_a_model_of_ones_own(small):
    """Dropout's own streams differ by replica, as the runs of these seeds have them."""
    recipe = dataclasses.replace(OWN, epochs=1, model=ViTConfig())
    study = fit(recipe, small, seeds=(0, 1), progress=False)
    for i in range(2):
        own = fit(dataclasses.replace(recipe, seed=i), small, progress=False)
        assert_allclose(
            study.replica(i).history[0]["train_loss"], own.history[0]["train_loss"], rtol=1e-5
        )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x, r"must return logits \[4, K\], not \[4, 28, 28, 1\]"),
        (lambda x, extra: x, "call takes images, and by name train, key and dropout_rate"),
    ],
)
def test_what_a_model_must_be_is_one_sentence(model, message, splits):
    class Own(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(()))

        __call__ = staticmethod(model)

    state = create_state(jax.random.key(0), Own(), optax.sgd(0.1))
    with pytest.raises(InputError, match=message):
        train_step(KEY, state, head(splits.train, 4))


def test_what_is_no_model_is_refused():
    with pytest.raises(InputError, match=r"model is 3; give a frozen dataclass with a make"):
        dataclasses.replace(OWN, model=3)


def test_a_recipe_file_has_its_own_model(small, tmp_path):
    """Found again by its file's path when the run is read."""
    path = tmp_path / "own.py"
    path.write_text(
        "import dataclasses\nfrom test_own import MLPConfig, OWN\n"
        "@dataclasses.dataclass(frozen=True)\nclass Narrow(MLPConfig):\n    width: int = 3\n"
        "MINE = dataclasses.replace(OWN, model=Narrow(), epochs=1)\n"
    )
    recipe = command_line.named_recipe(f"{path}:MINE")
    assert to_dict(recipe)["model"] == {"kind": f"{path}:Narrow", "width": 3}
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    parsed = command_line.parse(
        type(recipe), ["--model.width", "5"], default=recipe, description=""
    )
    assert parsed.model.width == 5


def make_state(optimizer, model=None):
    make = model or (lambda rngs: MLP(784, 10, width=16, rngs=rngs))
    return create_state(jax.random.key(0), make, optimizer)


def test_a_loss_of_ones_own_by_hand(splits):
    """The gradient of its mean, by plain JAX; a single number is as good as the mean."""
    batch = head(splits.train, 16)
    state = make_state(optax.sgd(1.0))

    def mean(logits_BK, batch):
        return Focal()(logits_BK, batch).mean()

    def by_hand(params):
        x = batch.images.reshape(16, -1) / np.float32(255)
        hidden = nnx.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
        logits = hidden @ params["head"]["kernel"] + params["head"]["bias"][None]
        return mean(logits, batch)

    expected = jax.grad(by_hand)(state.params)
    for loss in (Focal(), mean):
        new, metrics = train_step(KEY, state, batch, loss=loss)
        moved = jax.tree.map(jnp.subtract, state.params, new.params)
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), moved, expected)
        assert_allclose(metrics.loss, by_hand(state.params), rtol=1e-5)


def test_what_a_loss_must_be_is_refused_in_one_line(splits):
    batch, state = head(splits.train, 4), make_state(optax.sgd(0.1))
    with pytest.raises(InputError, match=r"loss must return \[4\], or their mean, not \[4, 10\]"):
        train_step(KEY, state, batch, loss=lambda logits_BK, batch: logits_BK)
    with pytest.raises(InputError, match=r"label_smoothing is 0\.1, but the loss is your own"):
        train_step(KEY, state, batch, loss=Focal(), label_smoothing=0.1)
    with pytest.raises(InputError, match=r"label_smoothing is 0\.1, but the recipe has a loss"):
        dataclasses.replace(OWN, loss=Focal(), label_smoothing=0.1)
    with pytest.raises(InputError, match="loss is 'focal'; give a frozen dataclass"):
        dataclasses.replace(OWN, loss="focal")


def test_a_recipes_loss_is_what_it_trains_by(small):
    """At gamma 0 it is the cross-entropy; at 2 it is another, and validation is as ever."""
    rows = [
        next(epochs(dataclasses.replace(OWN, loss=loss), small)).row
        for loss in (None, Focal(gamma=0.0), Focal())
    ]
    assert_allclose(rows[1]["train_loss"], rows[0]["train_loss"], rtol=1e-4)
    assert rows[2]["train_loss"] < 0.9 * rows[0]["train_loss"]
    assert from_dict(to_dict(dataclasses.replace(OWN, loss=Focal()))).loss == Focal()


def test_gradients_can_be_changed_between_loss_and_update(splits):
    """A penalty on the parameters, whose gradient is known: each shrinks by what it weighs."""
    batch, state = head(splits.train, 16), make_state(optax.sgd(0.5))
    gradients = loss_and_grads(KEY, state, batch)
    plain, metrics = train_step(KEY, state, batch)
    jax.tree.map(assert_array_equal, apply_gradients(state, gradients).params, plain.params)
    assert_array_equal(gradients.metrics.loss, metrics.loss)
    penalty = jax.grad(lambda params: 0.1 * optax.tree.norm(params, squared=True))(state.params)
    both = jax.tree.map(jnp.add, gradients.grads, penalty)
    after = apply_gradients(state, dataclasses.replace(gradients, grads=both))
    jax.tree.map(
        lambda new, old, own: assert_allclose(new, old - 0.5 * 0.2 * own, rtol=1e-5, atol=1e-6),
        after.params,
        plain.params,
        state.params,
    )


def test_four_accumulated_batches_are_one_large_one(splits):
    """Without BatchNorm and Dropout, up to rounding; in between nothing moves."""
    batch = head(splits.train, 64)
    state = make_state(optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation())
    step, start = jax.jit(train_step), state.params
    for i in range(4):
        jax.tree.map(assert_array_equal, state.params, start)
        state, _ = step(KEY, state, batch[16 * i : 16 * (i + 1)])
    large, _ = step(KEY, make_state(optax.sgd(0.1)), batch)
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, large.params
    )


def test_a_recipe_accumulates(small, tmp_path):
    """Two batches of 25 are one of 50 in its order; and it resumes in the middle of two."""
    one = dataclasses.replace(OWN, epochs=1, optimizer=SGD(learning_rate=0.05))
    two = dataclasses.replace(one, batch_size=25, accumulate=2)
    splits = dataclasses.replace(small, train=head(small.train, 400))
    ends = [fit(recipe, splits, progress=False) for recipe in (one, two)]
    assert [int(end.state.step) for end in ends] == [8, 16]
    params = [end.state.params for end in ends]
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-6), *params)
    with pytest.raises(Interrupted, match=r"after step 1$"):
        fit(two, splits, workdir=tmp_path, progress=False, should_stop=lambda: True)
    resumed = fit(two, splits, workdir=tmp_path, resume=True, progress=False)
    jax.tree.map(assert_array_equal, resumed.state.params, ends[1].state.params)


FROZEN = {"hidden": optax.set_to_zero(), "head": optax.sgd(0.1)}


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0)),
        optax.multi_transform(FROZEN, lambda params: {name: name for name in params}),
        optax.contrib.schedule_free_sgd(0.1),
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
        optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05)),  # its update takes grad_fn, no more
    ],
    ids=["clipped", "frozen", "schedule_free", "plateau", "sharpness_aware"],
)
def test_optaxs_wrappers_are_optimizers_like_others(optimizer, splits):
    state, batch = make_state(optimizer), head(splits.train, 16)
    step, losses = jax.jit(train_step), []
    first = state.params
    for _ in range(3):
        state, metrics = step(KEY, state, batch)
        losses.append(float(metrics.loss))
    assert np.isfinite(losses).all()
    assert not np.array_equal(state.params["head"]["kernel"], first["head"]["kernel"])


def test_clipped_and_frozen_by_hand(splits):
    batch = head(splits.train, 16)
    state = make_state(optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0)))
    new, _ = train_step(KEY, state, batch)
    moved = jax.tree.map(jnp.subtract, new.params, state.params)
    assert_allclose(optax.tree.norm(moved), 1e-3, rtol=1e-3)
    labels = lambda params: {name: name for name in params}  # noqa: E731
    state = make_state(optax.multi_transform(FROZEN, labels))
    new, _ = train_step(KEY, state, batch)
    jax.tree.map(assert_array_equal, new.params["hidden"], state.params["hidden"])
    assert not np.array_equal(new.params["head"]["kernel"], state.params["head"]["kernel"])


def test_a_batch_is_what_a_loss_is_given(splits):
    """Images as they came, labels as int32."""
    seen = []

    def loss(logits_BK, batch):
        seen.append((batch.images.dtype, batch.labels.dtype))
        return logits_BK.sum(-1)

    batch = Examples(splits.train.images[:4], splits.train.labels[:4].astype(np.uint8))
    train_step(KEY, make_state(optax.sgd(0.1)), batch, loss=loss)
    assert seen[0] == (np.uint8, np.int32)


def test_a_state_is_copied_pickled_averaged_and_donated_as_its_docstring_says(splits):
    batch = jax.tree.map(jnp.asarray, head(splits.train, 16))
    state = make_state(optax.sgd(0.1, momentum=0.9))
    before = host(jax.tree.map(jnp.copy, state))  # NumPy's view of an array would keep it
    copied = copy.deepcopy(state)
    assert jax.tree.structure(copied) == jax.tree.structure(state)  # compiles nothing anew
    leaves = pickle.loads(pickle.dumps(jax.tree.leaves(state)))
    fresh = make_state(optax.sgd(0.1, momentum=0.9))
    read = jax.tree.unflatten(jax.tree.structure(fresh), leaves)

    step = jax.jit(train_step, donate_argnums=1)
    with jax.debug_key_reuse(False):  # which does not donate
        after, _ = step(KEY, state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batch))
    jax.tree.map(assert_array_equal, host(copied), before)
    jax.tree.map(assert_array_equal, host(read), before)
    again, _ = step(KEY, copied, batch)
    jax.tree.map(assert_array_equal, host(again), host(after))

    averaged = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, read.params, after.params)
    mean = dataclasses.replace(after, params=averaged)
    kernel = mean.params["head"]["kernel"]
    by_hand = 0.75 * before[0]["head"]["kernel"] + 0.25 * np.asarray(after.params["head"]["kernel"])
    assert_allclose(kernel, by_hand, rtol=1e-6)
    assert eval_step(mean, batch).loss > 0


@pytest.mark.parametrize(
    "model",
    [
        MLPConfig(),
        *(pytest.param(own(), marks=pytest.mark.slow) for own in (ResNetConfig, ViTConfig)),
    ],
)
def test_a_model_of_ones_own_is_exported(model, splits):
    """Without its random streams, of any batch size; as ONNX where its converter is installed."""
    make = functools.partial(model.make, splits.info)
    state = create_state(KEY, lambda rngs: make(rngs=rngs), optax.sgd(0.1))
    images = np.asarray(splits.val.images[:30]) / np.float32(255)
    expected = predict(state, images)
    program = jax.export.deserialize(
        bytearray(export.to_stablehlo(state, image_shape=splits.info.image_shape))
    )
    assert_allclose(program.call(images), expected, rtol=1e-5, atol=1e-5)
    assert_allclose(program.call(images[:7]), expected[:7], rtol=1e-5, atol=1e-5)
    if model == ViTConfig():
        return  # jax2onnx 0.13 cannot trace the attention of Flax 0.12: the script says so
    onnxruntime = pytest.importorskip("onnxruntime")
    names = splits.info.class_names
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings(action="ignore"):
        data = export.to_onnx(state, image_shape=splits.info.image_shape, class_names=names)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    assert_allclose(session.run(None, {"images": images})[0], expected, rtol=1e-4, atol=1e-4)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax
jax.config.update("jax_num_cpu_devices", 2)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mnist_flax import Examples, create_state, train_step
from mnist_flax.data import DatasetInfo
from test_own import KEY, MLPConfig, ResNetConfig, ViTConfig

info = DatasetInfo("own", "", 10, tuple("0123456789"), (28, 28, 1), "")
rng = np.random.default_rng(0)
batch = Examples(rng.uniform(size=(16, 28, 28, 1)).astype(np.float32), rng.integers(0, 10, 16))
for config in (MLPConfig(), ResNetConfig(), ViTConfig()):
    make = lambda rngs: config.make(info, rngs=rngs)
    state = create_state(KEY, make, optax.sgd(0.1))
    step = jax.jit(train_step)
    expected, metrics = step(KEY, state, batch)
    for type_ in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("batch",), axis_types=(type_,))
        with jax.set_mesh(mesh):
            placed = jax.device_put(state, NamedSharding(mesh, P()))
            shared = jax.device_put(batch, NamedSharding(mesh, P("batch")))
            actual, own = step(jax.device_put(KEY, NamedSharding(mesh, P())), placed, shared)
        np.testing.assert_allclose(own.loss, metrics.loss, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            actual.params, expected.params,
        )
print("agreed")
"""


@pytest.mark.slow
def test_models_of_ones_own_share_their_batches_over_devices():
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-c", SHARDED]
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert done.stdout == "agreed\n", done.stderr[-2000:]
