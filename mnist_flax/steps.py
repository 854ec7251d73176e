"""The train and eval steps: pure functions of pytrees, not jitted.

`jax.jit`, `jax.vmap` over stacked states, `jax.lax.scan` over batches and a sharded mesh apply to
them as they stand.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from mnist_flax.checks import check_image_array, check_label_array
from mnist_flax.data import Examples
from mnist_flax.errors import InputError
from mnist_flax.metrics import PADDING, Metrics
from mnist_flax.ops import Ops
from mnist_flax.weights import frozen, without

Augment = Callable[[jax.Array, jax.Array], jax.Array]
Loss = Callable[[jax.Array, Examples], jax.Array]
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

    `jax.tree.map(jnp.stack)` of several is one of many networks for `jax.vmap`; an average over
    steps is a `jax.tree.map` over `params` and `batch_stats`. `copy.deepcopy` copies the arrays.
    `pickle` cannot write an optimizer, which is made of closures: pickle `jax.tree.leaves(state)`
    and `jax.tree.unflatten` them into the structure of a fresh state. A step that is jitted with
    `donate_argnums=1` deletes every array of the state that it is given, and no other.

    Attributes:
      step: steps taken, int32 [].
      params: trainable parameters, nested dicts of arrays by the model's attributes.
      batch_stats: what else the model holds and its calls change: BatchNorm's running means and
        variances, and where an own model has them, its random streams and other variables.
      opt_state: the optimizer's state.
      plateau: the plateau schedule's state; its `scale` multiplies every update.
      graphdef: the model's structure (static).
      optimizer: the gradient transformation (static).
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    plateau: Any
    graphdef: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    optimizer: optax.GradientTransformation = dataclasses.field(metadata={"static": True})


def create_state(
    key: jax.Array,
    make_model: Callable[[nnx.Rngs], nnx.Module] | nnx.Module,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """Makes a model and splits it into a state at step 0, with `optimizer` at its start.

    A model is any `nnx.Module` that maps images [B, H, W, C] to logits [B, K]. What else its call
    takes, of `train`, `key` (Dropout's) and `dropout_rate`, it is given by name; one that does not
    take `train` is switched by NNX's own `model.train()` and `model.eval()`. A method
    `preprocess_images(images_BHWC)`, where it has one, is called before augmentation.

    Args:
      key: seeds every draw: the model's parameters and, later, augmentation and Dropout.
      make_model: `make_model(rngs) -> model`, such as `lambda rngs: CNN(config, rngs=rngs)`.
        `rngs.params` draws from a key that the run uses for nothing else, and so do other streams.
        Or a model that there is already, whose parameters are taken as they are: those of
        `nnx.Rngs(n)` must not be of the seed of `key`, from which the run would draw the same.
      optimizer: optax's; one that needs the loss or its gradient in `update` is given them.
    """
    if isinstance(make_model, nnx.Module):
        model = make_model
    else:
        params_key, other_key = (draw_key(key, Purpose.INIT, index) for index in (0, 1))
        model = make_model(nnx.Rngs(other_key, params=params_key))
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=nnx.to_pure_dict(batch_stats),
        opt_state=optimizer.init(params),
        plateau=optax.contrib.reduce_on_plateau().init(params),
        graphdef=graphdef,
        optimizer=optimizer,
    )


def is_key(array: Any) -> bool:
    """Returns whether an array is of keys, such as those of a model's own random streams."""
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def without_keys(tree: Any) -> Any:
    """Returns a tree in which keys are their data, which NumPy and every backend can hold."""
    return jax.tree.map(lambda a: jax.random.key_data(a) if is_key(a) else a, tree)


def to_model(state: TrainState) -> Any:
    """Returns the model with copies of the state's parameters and statistics."""
    variables: Any = (nnx.State(state.params), nnx.State(state.batch_stats))
    return nnx.merge(state.graphdef, *variables, copy=True)


def with_ops(state: TrainState, ops: Ops) -> TrainState:
    """Returns the state with every network in its model that has a method `use` computing by `ops`.

    With `mnist_flax.ops.REFERENCE` a trained state can be differentiated in forward mode.
    """
    model = to_model(state)
    use_ops(model, ops)
    return dataclasses.replace(state, graphdef=nnx.graphdef(model))


def use_ops(model: nnx.Module, ops: Ops) -> None:
    """Makes every network in the model that has a method `use` compute by `ops`."""
    for _, node in nnx.iter_graph(model):
        if hasattr(node, "use"):
            node.use(ops)


def to_float(images_BHWC: jax.Array | np.ndarray) -> jax.Array:
    """Maps uint8 images [0, 255] to float32 [0, 1]; half-precision ones become float32, too.

    float32 and, where JAX has it, float64 pass unchanged.

    Raises:
      InputError: they are not uint8 or floating-point, or not [B, H, W, C].
    """
    check_image_array(images_BHWC)
    if images_BHWC.dtype == jnp.uint8:
        return jnp.asarray(images_BHWC, jnp.float32) / 255
    images_BHWC = jnp.asarray(images_BHWC)
    return images_BHWC.astype(jnp.promote_types(images_BHWC.dtype, jnp.float32))


def to_labels(labels_B: jax.Array | np.ndarray, *, num_examples: int) -> jax.Array:
    """Returns integer labels [B] as int32.

    Raises:
      InputError: they are not integers, or not one an image.
    """
    check_label_array(labels_B, num_examples=num_examples)
    return jnp.asarray(labels_B, jnp.int32)


def prepared(model: Any, images_BHWC: jax.Array | np.ndarray) -> jax.Array:
    """Returns float images as `model` takes them, by its `preprocess_images` where it has one."""
    images_BHWC = to_float(images_BHWC)
    if not hasattr(model, "preprocess_images"):
        return images_BHWC
    return model.preprocess_images(images_BHWC)


def accepted(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Returns those of the options that a function takes by name."""
    parameters = inspect.signature(function).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return options
    return {name: value for name, value in options.items() if name in parameters}


def call_model(model: Any, images_BHWC: jax.Array, *, train: bool, **options: Any) -> jax.Array:
    """Returns `model`'s logits [B, K] of images as `prepared` returns them.

    Args:
      model: a copy that is the caller's own, such as `to_model` returns.
      images_BHWC: the images.
      train: whether BatchNorm uses batch statistics and Dropout is on.
      **options: further arguments; those that the model's call does not take are left out.

    Raises:
      InputError: the logits are not [B, K].
    """
    options = accepted(model.__call__, options | {"train": train})
    if "train" not in options:
        model.train() if train else model.eval()
    try:
        inspect.signature(model.__call__).bind(images_BHWC, **options)
    except TypeError as error:
        raise InputError(
            "a model's call takes images, and by name train, key and dropout_rate or fewer of "
            f"them: {type(model).__name__} cannot be called so ({error})"
        ) from None
    logits_BK = model(images_BHWC, **options)
    B, shape = images_BHWC.shape[0], list(logits_BK.shape)  # B may be symbolic
    if len(shape) != 2 or shape[0] != B:
        raise InputError(f"the model must return logits [{B}, K], not {shape}")
    return logits_BK


def require_share(name: str, value: Any) -> None:
    """Raises InputError where `value` is a plain number that is not in [0, 1)."""
    if isinstance(value, int | float) and not 0 <= value < 1:
        raise InputError(f"{name} is {value}; give a number in [0, 1)")


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
        auto: Any = jax.sharding.auto_axes(call, axes=explicit, out_sharding=out_specs)
        return auto(arrays)


def specs_of(tree: Any) -> Any:
    """Returns how Explicit mesh axes divide each array of a tree."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gradients:
    """What a batch says of a state. A pytree.

    Attributes:
      grads: the gradient of the mean loss by the state's parameters, a tree like them.
      batch_stats: the state's `batch_stats` after the batch was seen.
      metrics: the batch's metrics under the parameters: the training loss and the accuracy with
        Dropout and augmentation on.
    """

    grads: Any
    batch_stats: Any
    metrics: Metrics


def loss_and_grads(
    key: jax.Array,
    state: TrainState,
    batch: Examples,
    *,
    loss: Loss | None = None,
    augment: Augment | None = None,
    augment_steps: int | None = None,
    label_smoothing: float | jax.Array = 0.0,
    dropout_rate: float | jax.Array | None = None,
    freeze: Sequence[str] = (),
) -> Gradients:
    """Returns the gradients of a batch's mean loss; `apply_gradients` takes the step.

    Between the two, gradients can be changed or added to: by those of a penalty, of another batch,
    of noise. All arguments are as in `train_step`, which is the one after the other.

    Raises:
      InputError: as in `train_step`.
    """
    own = functools.partial(
        _gradients, loss=loss, augment=augment, augment_steps=augment_steps, freeze=freeze
    )
    params, stats = specs_of((state.params, state.batch_stats))
    return on_auto_axes(
        lambda *operands: own(*operands)[0],
        key,
        state,
        batch,
        label_smoothing,
        dropout_rate,
        out_specs=Gradients(params, stats, PartitionSpec()),  # type: ignore
    )


def apply_gradients(
    state: TrainState, gradients: Gradients, *, freeze: Sequence[str] = (), value_fn: Any = None
) -> TrainState:
    """Returns the state after one optimizer step by the gradients.

    Args:
      state: the state before the step; its arrays stay valid.
      gradients: those of `loss_and_grads`, or others in its place.
      freeze: as in `train_step`.
      value_fn: the loss as a function of the parameters, for optimizers that search along a line;
        the others are given the loss and its gradient.
    """
    own = {"value": gradients.metrics.loss, "grad": gradients.grads, "value_fn": value_fn}
    update: Any = state.optimizer.update
    updates, opt_state = update(
        gradients.grads, state.opt_state, state.params, **accepted(update, own)
    )
    updates = without(optax.tree.scale(state.plateau.scale, updates), freeze)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=gradients.batch_stats,
        opt_state=opt_state,
    )


def train_step(
    key: jax.Array,
    state: TrainState,
    batch: Examples,
    *,
    loss: Loss | None = None,
    augment: Augment | None = None,
    augment_steps: int | None = None,
    label_smoothing: float | jax.Array = 0.0,
    dropout_rate: float | jax.Array | None = None,
    freeze: Sequence[str] = (),
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step on the mean loss of a full batch.

    Args:
      key: the run's key, the same in every step: `state.step` tells the draws of one from another.
      state: the state before the step; its arrays stay valid.
      batch: images [B, H, W, C], uint8 or float in [0, 1], and labels [B], integers in [0, K). A
        label outside makes the loss NaN, and so does -1: BatchNorm would see the padding.
      loss: `loss(logits_BK, batch) -> losses_B`, or their mean; None for the cross-entropy.
      augment: `augment(key, images_BHWC) -> images_BHWC` on float images, such as
        `functools.partial(random_affine, rotate=10)`, after the model's own `preprocess_images`;
        None trains on the images as they are.
      augment_steps: the first steps of the run, in which images are augmented; None augments in
        all.
      label_smoothing: the share of each target that is spread evenly over the classes, in [0, 1);
        0 with a loss of one's own.
      dropout_rate: Dropout's rate, in [0, 1); None for the model's own.
      freeze: names of layers, as the model's attributes, whose parameters and statistics stay
        exactly as they are; `CNN` normalises by those statistics then, as in evaluation.

    Returns:
      The state after the step, and the batch's metrics under the parameters before it: the
      training loss and the accuracy with Dropout and augmentation on.

    Raises:
      InputError: images, labels or losses have no such shape or dtype, or an option cannot have
        its value.
    """
    own = functools.partial(
        _gradients, loss=loss, augment=augment, augment_steps=augment_steps, freeze=freeze
    )

    def step(key, state, *operands):
        gradients, value_fn = own(key, state, *operands)
        after = apply_gradients(state, gradients, freeze=freeze, value_fn=value_fn)
        return after, gradients.metrics

    out_specs = specs_of(state), PartitionSpec()
    operands = (key, state, batch, label_smoothing, dropout_rate)
    return on_auto_axes(step, *operands, out_specs=out_specs)


def check_options(*, loss: Loss | None, label_smoothing: Any, dropout_rate: Any) -> None:
    """Raises InputError where options of `train_step` cannot have their values."""
    require_share("label_smoothing", label_smoothing)
    require_share("dropout_rate", dropout_rate)
    if loss is not None and not (isinstance(label_smoothing, int | float) and label_smoothing == 0):
        raise InputError(
            f"label_smoothing is {label_smoothing}, but the loss is your own, which never reads "
            "it; give 0"
        )


def _gradients(
    key, state, batch, label_smoothing, dropout_rate, *, loss, augment, augment_steps, freeze
):
    """Returns the `Gradients`, and the mean loss as a function of the parameters."""
    check_options(loss=loss, label_smoothing=label_smoothing, dropout_rate=dropout_rate)
    labels_B = to_labels(batch.labels, num_examples=batch.images.shape[0])

    def loss_fn(params):
        model = frozen(to_model(dataclasses.replace(state, params=params)), freeze)
        images_BHWC = prepared(model, batch.images)
        if augment is not None:
            augmented_BHWC = augment(draw_key(key, Purpose.AUGMENT, state.step), images_BHWC)
            if augment_steps is not None:
                is_early = state.step < augment_steps
                augmented_BHWC = jnp.where(is_early, augmented_BHWC, images_BHWC)
            images_BHWC = augmented_BHWC
        options: dict[str, Any] = {"key": draw_key(key, Purpose.DROPOUT, state.step)}
        if dropout_rate is not None:
            options["dropout_rate"] = dropout_rate
        logits_BK = call_model(model, images_BHWC, train=True, **options)
        if loss is None:
            losses_B = smoothed_losses(logits_BK, labels_B, label_smoothing=label_smoothing)
        else:
            losses_B = own_losses(loss, logits_BK, Examples(batch.images, labels_B))
        return jnp.mean(losses_B), (changed_stats(state, model), losses_B, logits_BK)

    grads, (batch_stats, losses_B, logits_BK) = jax.grad(loss_fn, has_aux=True)(state.params)
    # Out here, for within the loss XLA would round the gradient of right labels otherwise.
    known_B = (labels_B >= 0) & (labels_B < logits_BK.shape[-1])
    losses_B = jnp.where(known_B, losses_B, jnp.nan)
    # No label is padding here, so that the NaN of one outside [0, K) counts.
    metrics = Metrics.of_batch(
        losses_B=losses_B, logits_BK=logits_BK, labels_B=jnp.maximum(labels_B, 0)
    )
    batch_stats = without(batch_stats, freeze, instead=state.batch_stats)
    return Gradients(without(grads, freeze), batch_stats, metrics), lambda p: loss_fn(p)[0]


def own_losses(loss: Loss, logits_BK: jax.Array, batch: Examples) -> jax.Array:
    """Returns what `loss` gives, as each example's loss [B].

    Raises:
      InputError: it is neither [B] nor a single number.
    """
    losses, B = jnp.asarray(loss(logits_BK, batch)), len(logits_BK)
    if losses.shape not in ((B,), ()):
        raise InputError(f"the loss must return [{B}], or their mean, not {list(losses.shape)}")
    return jnp.broadcast_to(losses, B)


def smoothed_losses(
    logits_BK: jax.Array, labels_B: jax.Array, *, label_smoothing: float | jax.Array
) -> jax.Array:
    """Returns each example's cross-entropy in nats [B], of labels in [0, K)."""
    targets_BK = jax.nn.one_hot(labels_B, logits_BK.shape[-1], dtype=logits_BK.dtype)
    targets_BK = optax.smooth_labels(targets_BK, label_smoothing)
    return optax.softmax_cross_entropy(logits_BK, targets_BK)


def changed_stats(state: TrainState, model: Any) -> Any:
    """Returns what `model` holds beside parameters after a call, in the dtypes of the state."""
    other: Any = nnx.split(model, nnx.Param, ...)[2]
    batch_stats = nnx.to_pure_dict(other)

    def as_before(new, old):
        return new if new.dtype == old.dtype else new.astype(old.dtype)

    return jax.tree.map(as_before, batch_stats, state.batch_stats)


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
      view: what to show the model of the images after its own `preprocess_images`, such as an
        augmentation with its key; None shows the images as they are.

    Raises:
      InputError: the images have no such shape or dtype.
    """

    def logits(state, images_BHWC, view):
        model = to_model(state)
        images_BHWC = prepared(model, images_BHWC)
        return call_model(model, images_BHWC if view is None else view(images_BHWC), train=False)

    batch_axes = jax.typeof(images_BHWC).sharding.spec[:1]
    return on_auto_axes(logits, state, images_BHWC, view, out_specs=PartitionSpec(*batch_axes))


def eval_step(state: TrainState, batch: Examples) -> Metrics:
    """Returns the metrics of a batch: plain cross-entropy and accuracy.

    Args:
      state: the state; its arrays stay valid.
      batch: images [B, H, W, C], uint8 or float in [0, 1], and labels [B], integers in [0, K); a
        label of -1 marks padding, which counts for nothing, and any other outside makes the loss
        NaN.

    Raises:
      InputError: images or labels have no such shape or dtype.
    """
    labels_B = to_labels(batch.labels, num_examples=batch.images.shape[0])
    logits_BK = eval_logits(state, batch.images)
    # A negative label would count from the last class.
    above_B = jnp.where(labels_B < PADDING, logits_BK.shape[-1], jnp.maximum(labels_B, 0))
    losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BK, above_B)
    return Metrics.of_batch(losses_B=losses_B, logits_BK=logits_BK, labels_B=labels_B)


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
