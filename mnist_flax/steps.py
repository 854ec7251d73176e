"""The train and eval steps: pure functions of pytrees, not jitted.

`jax.jit`, `jax.vmap` over stacked states, `jax.lax.scan` over batches and a sharded mesh apply to
them as they stand.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from mnist_flax.data import Examples
from mnist_flax.metrics import Metrics
from mnist_flax.ops import Ops

Augment = Callable[[jax.Array, jax.Array], jax.Array]
T = TypeVar("T")


class Purpose(enum.IntEnum):
    """What a random draw is for. The numbers are part of every run's identity."""

    INIT = 0
    ORDER = 1
    AUGMENT = 2
    DROPOUT = 3
    VIEW = 4


def draw_key(key: jax.Array, purpose: Purpose, index: jax.Array | int) -> jax.Array:
    """Returns the key of one draw: `purpose` at step or epoch `index` of the run that `key` names.

    So a resumed run needs no record of what was drawn, and a longer run draws the same at first.
    """
    return jax.random.fold_in(jax.random.fold_in(key, purpose), index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes. A pytree.

    Attributes:
      step: steps taken, int32 [].
      key: the run's key; it never changes.
      params: trainable parameters.
      batch_stats: BatchNorm's running means and variances.
      opt_state: the optimizer's state.
      plateau: the plateau schedule's state; its `scale` multiplies every update.
      graphdef: the model's structure (static).
      optimizer: the gradient transformation (static).
    """

    step: jax.Array
    key: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    plateau: Any
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    optimizer: optax.GradientTransformation = dataclasses.field(metadata={"static": True})


def create_state(
    key: jax.Array, model: nnx.Module, optimizer: optax.GradientTransformation
) -> TrainState:
    """Splits `model` into a state at step 0, with `optimizer` at its start.

    `key` seeds every later draw.
    """
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    params = nnx.as_pure(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=params,
        batch_stats=nnx.as_pure(batch_stats),
        opt_state=optimizer.init(params),
        plateau=optax.contrib.reduce_on_plateau().init(params),
        graphdef=graphdef,
        optimizer=optimizer,
    )


_NO_OPTIMIZER = optax.identity()


def without_optimizer(state: TrainState) -> TrainState:
    """Returns the state without its optimizer, which `jax.jit` would compile anew for.

    Optimizers are functions, and no two of them are equal.
    """
    return dataclasses.replace(state, opt_state=optax.EmptyState(), optimizer=_NO_OPTIMIZER)


def to_model(state: TrainState) -> Any:
    """Returns the model with copies of the state's parameters and statistics."""
    return nnx.merge(state.graphdef, state.params, state.batch_stats, copy=True)


def with_ops(state: TrainState, ops: Ops) -> TrainState:
    """Returns the state with every network in its model that has a method `use` computing by `ops`.

    With `mnist_flax.ops.REFERENCE` a trained state can be differentiated in forward mode.
    """
    model = to_model(state)
    for _, node in nnx.iter_graph(model):
        if hasattr(node, "use"):
            node.use(ops)
    return dataclasses.replace(state, graphdef=nnx.graphdef(model))


def to_float(images_BHWC: jax.Array | np.ndarray) -> jax.Array:
    """Maps uint8 images [0, 255] to float32 [0, 1]; float images pass unchanged."""
    if images_BHWC.dtype == jnp.uint8:
        return jnp.asarray(images_BHWC, jnp.float32) / 255
    return jnp.asarray(images_BHWC)


def prepared(model: Any, images_BHWC: jax.Array | np.ndarray) -> jax.Array:
    """Returns float images as `model` takes them: by its method `prepare`, where it has one."""
    images_BHWC = to_float(images_BHWC)
    return model.prepare(images_BHWC) if hasattr(model, "prepare") else images_BHWC


def on_auto_axes(fun: Callable[..., T], *operands: Any, out_specs: Any) -> T:
    """Returns `fun(*operands)`; within it the mesh's Explicit axes are Auto ones.

    Otherwise each operation of a model, a loss and an augmentation would have to say how its result
    is sharded. Without Explicit axes it is a call.

    Args:
      fun: the function.
      *operands: pytrees.
      out_specs: the `PartitionSpec`s of the result, as a prefix of its tree.
    """
    leaves, treedef = jax.tree.flatten(operands)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
    # The mesh in context (`jax.set_mesh`), or the one that an array's type names.
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [jax.typeof(array).sharding.mesh for array in arrays.values()]
    mesh = next((mesh for mesh in meshes if not mesh.empty), meshes[0])
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(axis for axis, type_ in types if type_ == AxisType.Explicit)
    if not explicit:
        return fun(*operands)

    def call(arrays):
        own = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        return fun(*jax.tree.unflatten(treedef, own))

    with jax.sharding.use_abstract_mesh(mesh):
        within: Any = jax.sharding.auto_axes(call, axes=explicit, out_sharding=out_specs)
        return within(arrays)


def specs_of(tree: Any) -> Any:
    """Returns how Explicit mesh axes divide each array of a tree."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def train_step(
    state: TrainState,
    batch: Examples,
    *,
    augment: Augment | None = None,
    augment_steps: int | None = None,
    label_smoothing: float | jax.Array = 0.0,
    dropout_rate: float | jax.Array | None = None,
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step on the mean cross-entropy of a full batch.

    Args:
      state: the state before the step; its arrays stay valid.
      batch: images [B, H, W, C], uint8 or float in [0, 1], and labels [B] int32 in [0, K).
      augment: `augment(key, images_BHWC) -> images_BHWC` on float images, such as
        `functools.partial(random_affine, rotate=10)`, after the model's own `prepare`; None trains
        on the images as they are.
      augment_steps: the first steps of the run, in which images are augmented; None augments in
        all.
      label_smoothing: the share of each target that is spread evenly over the classes, in [0, 1).
      dropout_rate: Dropout's rate, in [0, 1); None for the model's own.

    Returns:
      The state after the step, and the batch's metrics under the parameters before it: the
      (smoothed) training loss and the accuracy with Dropout and augmentation on.
    """
    step = functools.partial(_train_step, augment=augment, augment_steps=augment_steps)
    options = {"label_smoothing": label_smoothing, "dropout_rate": dropout_rate}
    out_specs = specs_of(state), PartitionSpec()
    return on_auto_axes(
        lambda state, batch, options: step(state, batch, **options),
        state,
        batch,
        options,
        out_specs=out_specs,
    )


def _train_step(state, batch, *, augment, augment_steps, label_smoothing, dropout_rate):
    images_BHWC = prepared(to_model(state), batch.images)
    if augment is not None:
        plain_BHWC = images_BHWC
        images_BHWC = augment(draw_key(state.key, Purpose.AUGMENT, state.step), plain_BHWC)
        if augment_steps is not None:
            images_BHWC = jnp.where(state.step < augment_steps, images_BHWC, plain_BHWC)

    def loss_fn(params):
        model = to_model(dataclasses.replace(state, params=params))
        dropout_key = draw_key(state.key, Purpose.DROPOUT, state.step)
        # A researcher's own model need not know the option.
        options = {} if dropout_rate is None else {"dropout_rate": dropout_rate}
        logits_BK = model(images_BHWC, train=True, key=dropout_key, **options)
        targets_BK = jax.nn.one_hot(batch.labels, logits_BK.shape[-1], dtype=logits_BK.dtype)
        targets_BK = optax.smooth_labels(targets_BK, label_smoothing)
        losses_B = optax.softmax_cross_entropy(logits_BK, targets_BK)
        batch_stats = nnx.as_pure(nnx.state(model, nnx.BatchStat))
        return jnp.mean(losses_B), (batch_stats, losses_B, logits_BK)

    grads, (batch_stats, losses_B, logits_BK) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = state.optimizer.update(grads, state.opt_state, state.params)
    updates = optax.tree.scale(state.plateau.scale, updates)
    new_state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return new_state, Metrics.of_batch(
        losses_B=losses_B, logits_BK=logits_BK, labels_B=batch.labels
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """A random view of images, for test-time augmentation. A pytree.

    Attributes:
      key: what `augment` draws by.
      augment: as in `train_step`, `augment(key, images_BHWC) -> images_BHWC` (static).
    """

    key: jax.Array
    augment: Augment = dataclasses.field(metadata={"static": True})

    def at(self, index: jax.Array | int) -> View:
        """Returns the view of batch number `index`."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, index))

    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Returns the images as they are seen."""
        return self.augment(self.key, images_BHWC)


def eval_logits(
    state: TrainState,
    images_BHWC: jax.Array | np.ndarray,
    *,
    view: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Returns logits [B, K] with running statistics, without Dropout.

    Args:
      state: the state; its arrays stay valid.
      images_BHWC: images [B, H, W, C], uint8 or float in [0, 1].
      view: what to show the model of the images after its own `prepare`, such as an augmentation
        with its key; None shows the images as they are.
    """

    def logits(state, images_BHWC, view):
        model = to_model(state)
        images_BHWC = prepared(model, images_BHWC)
        return model(images_BHWC if view is None else view(images_BHWC), train=False)

    batch_axes = jax.typeof(images_BHWC).sharding.spec[:1]
    return on_auto_axes(logits, state, images_BHWC, view, out_specs=PartitionSpec(*batch_axes))


def eval_step(state: TrainState, batch: Examples) -> Metrics:
    """Returns the metrics of a batch: plain cross-entropy and accuracy.

    Args:
      state: the state; its arrays stay valid.
      batch: images [B, H, W, C] and labels [B] int32; a label of -1 marks padding, which counts
        for nothing.
    """
    logits_BK = eval_logits(state, batch.images)
    losses_B = optax.softmax_cross_entropy_with_integer_labels(
        logits_BK, jnp.maximum(batch.labels, 0)
    )
    return Metrics.of_batch(losses_B=losses_B, logits_BK=logits_BK, labels_B=batch.labels)


def reduce_on_plateau(
    state: TrainState,
    loss: jax.Array,
    *,
    patience: int,
    factor: float,
    min_delta: float,
    min_scale: float,
) -> TrainState:
    """Returns the state after an epoch whose validation loss was `loss`.

    `optax.contrib.reduce_on_plateau` does the counting: after `patience` epochs in which the loss
    was not below the best by `min_delta` (a fraction of it), the scale of every update is
    multiplied by `factor`, down to `min_scale`.
    """
    schedule = optax.contrib.reduce_on_plateau(
        factor=factor, patience=patience, rtol=min_delta, min_scale=min_scale
    )
    _, plateau = schedule.update({}, state.plateau, value=loss)
    return dataclasses.replace(state, plateau=plateau)
