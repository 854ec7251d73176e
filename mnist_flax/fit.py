"""The training loop, written by hand: `epochs()` yields one result an epoch, `fit()` consumes it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from mnist_flax import checkpoint
from mnist_flax.checkpoint import Progress
from mnist_flax.data import (
    DatasetInfo,
    Examples,
    Records,
    Splits,
    epoch_order,
    eval_batches,
    stream_batches,
)
from mnist_flax.errors import DivergedError, InputError, Interrupted
from mnist_flax.metrics import Metrics
from mnist_flax.recipes import (
    Recipe,
    differences,
    make_augment,
    recipe_schedule,
    recipe_state,
    to_dict,
)
from mnist_flax.steps import (
    Augment,
    Purpose,
    TrainState,
    draw_key,
    eval_step,
    reduce_on_plateau,
    train_step,
)
from mnist_flax.stopping import EarlyStopping
from mnist_flax.workdir import RECIPE_FILE, MetricsLog, claim, write_json

EVAL_BATCH = 500
# How long the device works between two looks of the host at the metrics and at interrupts.
CALL_SECONDS = 0.5
# Steps' worth of streamed examples that are on the device at a time.
STREAM_STEPS = 8


@dataclasses.dataclass(frozen=True)
class EpochResult:
    """What an epoch came to.

    Attributes:
      state: the state after it (plateau schedule included), on the device; the caller's to keep.
      epoch: its number, from 1.
      step: steps taken since the start of the run.
      learning_rate: that of its last step, the plateau's scale included.
      train_loss: mean training loss over its batches, in nats, each before its step.
      train_accuracy: the same of the accuracy, in [0, 1].
      val_loss: validation loss after it, in nats; None without a validation split.
      val_accuracy: validation accuracy after it, in [0, 1]; None without a validation split.
      compile_seconds: time that compilation took, in the first epoch of a process.
      train_seconds: time in training steps since the epoch, or the process, began.
      eval_seconds: time in validation.
    """

    state: TrainState
    epoch: int
    step: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    val_loss: float | None
    val_accuracy: float | None
    compile_seconds: float
    train_seconds: float
    eval_seconds: float

    def row(self) -> dict[str, Any]:
        """Returns the numbers alone, as JSON values."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "state"
        }


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a run came to.

    Attributes:
      state: the best epoch's state where there is a validation split, else the last one.
      history: one row of numbers an epoch, as `EpochResult.row` gives them.
      best_epoch: the epoch that `state` belongs to.
      stopped_early: whether early stopping ended the run.
    """

    state: TrainState
    history: tuple[dict[str, Any], ...]
    best_epoch: int
    stopped_early: bool


def data_mesh(devices: int | None = None) -> Mesh:
    """Returns a mesh of the first `devices` devices (all, by default) with one axis, "data".

    Raises:
      InputError: there are fewer devices.
    """
    present = jax.devices()
    if devices is not None and not 1 <= devices <= len(present):
        raise InputError(f"devices is {devices}; this process has {len(present)}")
    chosen = np.array(present[:devices])
    return Mesh(chosen, ("data",), axis_types=(AxisType.Auto,))


def check_fits(recipe: Recipe, splits: Splits, *, mesh: Mesh) -> None:
    """Checks that the recipe can train on the splits.

    Raises:
      InputError: it can not.
    """
    if recipe.batch_size > len(splits.train):
        raise InputError(
            f"batch_size is {recipe.batch_size}, larger than the {len(splits.train)} "
            "training examples; give a smaller one"
        )
    if recipe.batch_size % mesh.size:
        raise InputError(
            f"batch_size is {recipe.batch_size}, which {mesh.size} devices cannot share evenly; "
            "give a multiple, or fewer devices"
        )
    if len(splits.val.labels) != recipe.val_size:
        raise InputError(
            f"val_size is {recipe.val_size}, but the splits hold {len(splits.val.labels)} "
            "validation examples; load them with the recipe's val_size"
        )
    jax.eval_shape(lambda: recipe_state(recipe, splits.info, steps_per_epoch=1))


def initial_state(recipe: Recipe, info: DatasetInfo, *, steps: int, mesh: Mesh) -> TrainState:
    """Returns a run's state at step 0, on all of the mesh's devices; an epoch has `steps` steps."""
    create = functools.partial(recipe_state, recipe, info, steps_per_epoch=steps)
    return jax.jit(create, out_shardings=NamedSharding(mesh, PartitionSpec()))()


def train_steps(
    state: TrainState,
    metrics: Metrics,
    examples: Examples,
    indices_SB: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    *,
    augment: Augment | None,
    label_smoothing: float,
) -> tuple[TrainState, Metrics]:
    """Takes the steps `start` to `stop` of an epoch, as one program.

    The bounds are not static: one compilation serves a single step and a whole epoch, and so the
    bits do not depend on how an epoch is divided into calls.

    Args:
      state: the state before.
      metrics: the epoch's metrics before.
      examples: images [N, H, W, C] uint8 and labels [N], on the device.
      indices_SB: the examples of each step's batch.
      start: first row of `indices_SB` to train on.
      stop: the row after the last.
      augment: as in `train_step`.
      label_smoothing: as in `train_step`.
    """

    def body(row, carry):
        state, metrics = carry
        batch = jax.tree.map(lambda a: a[indices_SB[row]], examples)
        state, step_metrics = train_step(
            state, batch, augment=augment, label_smoothing=label_smoothing
        )
        return state, metrics.merge(step_metrics)

    return jax.lax.fori_loop(start, stop, body, (state, metrics))


def eval_steps(state: TrainState, batches: Examples) -> Metrics:
    """Returns the metrics of stacked batches, images [S, B, H, W, C] and labels [S, B]."""

    def body(metrics, batch):
        return metrics.merge(eval_step(state, batch)), None

    return jax.lax.scan(body, Metrics.zero(), batches)[0]


class Window(NamedTuple):
    """Examples on the device and the rows of `indices_SB` to train on next."""

    examples: Examples
    indices_SB: jax.Array
    start: int
    stop: int


Feed = Callable[[int, int], Window]


def resident_feed(examples: Examples, indices_SB: jax.Array) -> Feed:
    """Feeds an epoch from examples that are all on the device."""

    def feed(done: int, wanted: int) -> Window:
        return Window(examples, indices_SB, done, min(done + wanted, len(indices_SB)))

    return feed


def streamed_feed(records: Records, indices_SB: np.ndarray, *, start: int, mesh: Mesh) -> Feed:
    """Feeds an epoch from records read on threads, a few steps' worth on the device at a time."""
    S, B = indices_SB.shape
    batches = stream_batches(records, indices_SB, start=start)
    rows = np.arange(STREAM_STEPS * B, dtype=np.int32).reshape(STREAM_STEPS, B)
    rows_SB = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(None, "data")))

    def feed(done: int, wanted: int) -> Window:
        count = min(wanted, STREAM_STEPS, S - done)
        read = [next(batches) for _ in range(count)]
        read += [read[-1]] * (STREAM_STEPS - count)  # one shape, one compilation
        window = jax.tree.map(lambda *parts: np.concatenate(parts), *read)
        return Window(jax.device_put(window, NamedSharding(mesh, PartitionSpec())), rows_SB, 0, count)

    return feed


class Programs(NamedTuple):
    """A run's compiled programs, and how long compiling took.

    Attributes:
      train: `train_steps`; it takes over the arrays of the state that it is given.
      evaluate: `eval_steps`; None without a validation split.
      seconds: how long the compilation took.
    """

    train: Callable[..., tuple[TrainState, Metrics]]
    evaluate: Callable[..., Metrics] | None
    seconds: float


def compile_programs(
    recipe: Recipe,
    state: TrainState,
    metrics: Metrics,
    window: Window,
    val_batches: Examples | None,
) -> Programs:
    """Compiles training and validation for arrays like these; runs nothing."""
    began = time.perf_counter()
    steps = functools.partial(
        train_steps, augment=make_augment(recipe), label_smoothing=recipe.label_smoothing
    )
    train = jax.jit(steps, donate_argnums=0).lower(state, metrics, *window).compile()
    evaluate = None
    if val_batches is not None:
        evaluate = jax.jit(eval_steps).lower(state, val_batches).compile()
    return Programs(train, evaluate, time.perf_counter() - began)


def train_epoch(
    programs: Programs,
    state: TrainState,
    metrics: Metrics,
    feed: Feed,
    *,
    done: int,
    steps: int,
    bar: tqdm,
    interrupted: Callable[[], bool],
) -> tuple[TrainState, Metrics]:
    """Takes the steps `done` to `steps` of an epoch; the arrays of `state` stay valid.

    The device works on one call while the host reads the metrics of the call before, and calls
    grow until each takes about CALL_SECONDS.

    Raises:
      DivergedError: the loss is not finite.
      Interrupted: `interrupted()` became true before the epoch's last step.
    """
    state = jax.tree.map(jnp.copy, state)
    wanted, looked = 1, time.perf_counter()
    while done < steps:
        window = feed(done, wanted)
        previous = metrics
        state, metrics = programs.train(state, previous, *window)
        done += window.stop - window.start
        show(bar, previous)
        elapsed, looked = time.perf_counter() - looked, time.perf_counter()
        wanted = max(1, wanted // 2 if elapsed > CALL_SECONDS else wanted * 2)
        if interrupted() and done < steps:
            raise Interrupted(state, metrics)
    show(bar, metrics)
    return state, metrics


def show(bar: tqdm, metrics: Metrics) -> None:
    """Waits for the metrics of the epoch so far and puts them on the progress bar.

    Raises:
      DivergedError: the loss is not finite.
    """
    if not (count := int(metrics.count)):
        return
    if not math.isfinite(metrics.loss_sum):
        raise DivergedError(f"the training loss is {metrics.loss:.1f} in {bar.desc or 'training'}")
    bar.set_postfix(
        loss=f"{metrics.loss:.4f}", accuracy=f"{metrics.accuracy:.2%}", refresh=False
    )
    bar.update(bar.initial + count - bar.n)


def never() -> bool:
    """Returns False: nothing interrupts."""
    return False


def epochs(
    recipe: Recipe,
    splits: Splits,
    *,
    state: TrainState | None = None,
    metrics: Metrics | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    interrupted: Callable[[], bool] = never,
) -> Iterator[EpochResult]:
    """Trains, and yields one result an epoch. Stopping is the caller's: leave the loop.

    Args:
      recipe: what to train, and how.
      splits: the data; where `splits.train` is `Records`, they are streamed, and the bits are the
        same. The test split is not touched.
      state: the state to continue from, at an epoch's start or within it; None begins anew.
      metrics: the metrics so far of the epoch that `state` is in; None at its start.
      mesh: the devices, with an axis "data" over which batches are shared; None takes all.
      progress: whether to draw a progress bar.
      interrupted: asked now and then; once it returns True, training stops.

    Raises:
      InputError: the recipe cannot train on these splits or devices.
      DivergedError: a loss or a parameter is not finite.
      Interrupted: `interrupted()` became true within an epoch.
    """
    mesh = mesh or data_mesh()
    check_fits(recipe, splits, mesh=mesh)
    steps = len(splits.train) // recipe.batch_size
    everywhere = NamedSharding(mesh, PartitionSpec())
    shared = NamedSharding(mesh, PartitionSpec(None, "data"))
    state = state or initial_state(recipe, splits.info, steps=steps, mesh=mesh)
    metrics = metrics or jax.device_put(Metrics.zero(), everywhere)
    schedule = jax.jit(recipe_schedule(recipe, steps_per_epoch=steps))
    order = jax.jit(
        functools.partial(
            epoch_order, num_examples=len(splits.train), batch_size=recipe.batch_size
        ),
        out_shardings=shared,
    )
    norm = jax.jit(optax.tree.norm)
    plateau = jax.jit(functools.partial(reduce_on_plateau, **dataclasses.asdict(recipe.plateau)))
    examples = jax.device_put(splits.train, everywhere) if resident(splits) else None
    val_batches = None
    if recipe.val_size:
        batches = eval_batches(splits.val, batch_size=EVAL_BATCH)
        val_batches = jax.device_put(batches, shared)
    programs = None
    first = int(state.step)
    for epoch in range(first // steps + 1, recipe.epochs + 1):
        done = int(state.step) % steps
        indices_SB = order(draw_key(state.key, Purpose.ORDER, epoch))
