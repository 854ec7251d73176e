"""The loop, written by hand: `epochs()` yields one result an epoch, `fit()` consumes them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import tempfile
import time
import types
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from mnist_flax import checkpoint, hosts
from mnist_flax.checkpoint import Progress
from mnist_flax.data import (
    EVAL_BATCH,
    DatasetInfo,
    Examples,
    Records,
    Splits,
    check_splits,
    epoch_order,
    eval_batches,
    stream_batches,
)
from mnist_flax.errors import DivergedError, InputError, Interrupted
from mnist_flax.metrics import Metrics
from mnist_flax.ops import BATCH_AXIS, for_platform
from mnist_flax.recipes import (
    PlateauConfig,
    Recipe,
    differences,
    recipe_optimizer,
    recipe_schedule,
    recipe_state,
    step_options,
    to_dict,
    without_seed,
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
from mnist_flax.workdir import (
    LOCK_FILE,
    RECIPE_FILE,
    MetricsLog,
    NoLog,
    claim,
    read_json,
    require_no_checkpoint_lost,
    write_json,
)

T = TypeVar("T")
FLAGS: Any = jax.config  # its attributes are made as they are defined

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
      compile_seconds: time that compilation took, in the first epoch of each process.
      train_seconds: time in its training steps, that before an interruption included.
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
    return Mesh(first_devices(devices), (BATCH_AXIS,), axis_types=(AxisType.Auto,))


def first_devices(devices: int | None) -> np.ndarray:
    """Returns the first `devices` devices, or all.

    Raises:
      InputError: there are fewer.
    """
    present = jax.devices()
    if devices is not None and not 1 <= devices <= len(present):
        raise InputError(f"devices is {devices}; this process has {len(present)}")
    return np.array(present[:devices])


def mesh_of(state: TrainState) -> Mesh:
    """Returns a mesh of the devices that hold a state, with one axis, "data"."""
    sharding = jnp.asarray(state.step).sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    devices = mesh.devices.ravel() if isinstance(mesh, Mesh) else list(sharding.device_set)
    return Mesh(np.array(devices), (BATCH_AXIS,), axis_types=(AxisType.Auto,))


def check_fits(recipe: Recipe, splits: Splits, *, mesh: Mesh) -> None:
    """Checks that the recipe can train on the splits.

    Raises:
      InputError: it can not.
    """
    check_splits(splits)
    if recipe.batch_size > splits.train.num_examples:
        raise InputError(
            f"batch_size is {recipe.batch_size}, larger than the {splits.train.num_examples} "
            "training examples; give a smaller one"
        )
    if recipe.batch_size % (sharing := mesh.shape[BATCH_AXIS]):
        raise InputError(
            f"batch_size is {recipe.batch_size}, which {sharing} devices cannot share evenly; "
            "give a multiple, or fewer devices"
        )
    if len(splits.val.labels) != recipe.val_size:
        raise InputError(
            f"val_size is {recipe.val_size}, but the splits hold {len(splits.val.labels)} "
            "validation examples; load them with the recipe's val_size"
        )
    steps = splits.train.num_examples // recipe.batch_size
    state_shape(without_seed(recipe), splits.info, steps=steps)


# The functions that JAX compiles are made once for whatever decides them, so that a second run of a
# recipe in a process, from whatever seed, compiles nothing.
once = functools.lru_cache(maxsize=16)


@once
def state_program(recipe: Recipe, info: DatasetInfo, *, steps: int, mesh: Mesh) -> Callable:
    """Returns the compiled `recipe_state`, a function of the run's key."""
    ops = for_platform(platform_of(mesh))

    def create(key):
        return recipe_state(recipe, info, steps_per_epoch=steps, key=key, ops=ops)

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(create, out_shardings=everywhere, compiler_options=light_compilation(mesh))


@once
def state_shape(recipe: Recipe, info: DatasetInfo, *, steps: int) -> TrainState:
    """Returns the shapes of a run's state.

    Raises:
      InputError: the recipe's network cannot take the dataset's images.
    """
    return jax.eval_shape(lambda: recipe_state(recipe, info, steps_per_epoch=steps))


@once
def train_program(recipe: Recipe, *, steps: int, mesh: Mesh) -> Callable:
    """Returns `train_steps` of a recipe to be compiled; it takes over the state's arrays."""
    options = step_options(recipe, steps_per_epoch=steps)
    return jax.jit(
        functools.partial(train_steps, **options),
        donate_argnums=0,
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


@once
def order_program(*, num_examples: int, batch_size: int, mesh: Mesh) -> Callable:
    """Returns the compiled `epoch_order`, a function of a key, shared over the batch."""
    return jax.jit(
        functools.partial(epoch_order, num_examples=num_examples, batch_size=batch_size),
        out_shardings=NamedSharding(mesh, PartitionSpec(None, BATCH_AXIS)),
    )


@once
def schedule_program(recipe: Recipe, *, steps: int) -> Callable:
    """Returns the compiled learning rate, a function of the step."""
    return jax.jit(recipe_schedule(recipe, steps_per_epoch=steps))


@once
def plateau_program(config: PlateauConfig) -> Callable[..., TrainState]:
    """Returns the compiled `reduce_on_plateau`, a function of a state and a loss."""
    return jax.jit(functools.partial(reduce_on_plateau, **dataclasses.asdict(config)))


norm = jax.jit(optax.tree.norm)


def initial_state(recipe: Recipe, info: DatasetInfo, *, steps: int, mesh: Mesh) -> TrainState:
    """Returns a run's state at step 0, on all of the mesh's devices; an epoch has `steps` steps."""
    create = state_program(without_seed(recipe), info, steps=steps, mesh=mesh)
    return create(jax.random.key(recipe.seed))


def continued(
    start: TrainState, optimizer: optax.GradientTransformation, *, mesh: Mesh
) -> TrainState:
    """Returns the state `start` on all of the mesh's devices, to go on with `optimizer`.

    Raises:
      InputError: it was trained by another kind of optimizer.
    """
    own = jax.eval_shape(optimizer.init, start.params)
    if jax.tree.structure(own) != jax.tree.structure(start.opt_state):
        raise InputError("the state to start from was trained by another kind of optimizer")
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.device_put(dataclasses.replace(start, optimizer=optimizer), everywhere)


def check_start(
    start: TrainState, start_metrics: Metrics | None, *, recipe: Recipe, steps: int
) -> None:
    """Checks that a run of the recipe can go on from a state; an epoch has `steps` steps.

    Raises:
      InputError: the run would be over; or the state's step is within an epoch whose metrics so
        far are others than `start_metrics`, or is not that of its optimizer: it was trained with
        another batch size, or on other data.
    """
    anew = "to train anew from its parameters, give a recipe_state with its params and batch_stats"
    step, total = int(start.step), recipe.epochs * steps
    if step >= total:
        raise InputError(
            f"the state to start from is at step {step}, and {recipe.epochs} epochs of {steps} "
            f"steps are over at {total}: nothing is left to train; {anew}, or raise epochs"
        )
    seen = 0 if start_metrics is None else int(start_metrics.count)
    if seen != (wanted := step % steps * recipe.batch_size):
        raise InputError(
            f"the state to start from is at step {step}, {wanted} examples into an epoch of "
            f"{steps} steps, but start_metrics has counted {seen}: it was trained with another "
            f"batch size or on other data; {anew}"
        )
    counts = {int(count) for _, count in optax.tree.get_all_with_path(start.opt_state, "count")}
    if others := counts - {step}:
        raise InputError(
            f"the state to start from is at step {step}, but its optimizer at {min(others)}; {anew}"
        )


def platform_of(mesh: Mesh) -> str:
    """Returns what the mesh's devices are: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def light_compilation(mesh: Mesh) -> dict[str, int] | None:
    """Returns `jax.jit`'s compiler options for a program that draws many numbers and runs once.

    At LLVM's highest level the CPU's random numbers take six times as long to compile as at the
    first, 3.6 s for the parameters of `quick`, and have the same bits.
    """
    return {"xla_backend_optimization_level": 1} if platform_of(mesh) == "cpu" else None


@once
def zero_program(mesh: Mesh) -> Callable[[], Metrics]:
    """Returns the compiled `Metrics.zero`, on all of the mesh's devices."""
    return jax.jit(Metrics.zero, out_shardings=NamedSharding(mesh, PartitionSpec()))


def zero_metrics(mesh: Mesh) -> Metrics:
    """Returns an epoch's metrics before its first step, on all of the mesh's devices."""
    return zero_program(mesh)()


def fresh_progress(recipe: Recipe, info: DatasetInfo, *, steps: int, mesh: Mesh) -> Progress:
    """Returns a run's progress at step 0, on all of the mesh's devices."""
    state = initial_state(recipe, info, steps=steps, mesh=mesh)
    return Progress(
        state=state,
        metrics=zero_metrics(mesh),
        best=state,
        stopping=EarlyStopping(**dataclasses.asdict(recipe.stopping)),
        seconds=no_seconds(),
    )


def train_steps(
    state: TrainState,
    metrics: Metrics,
    examples: Examples,
    indices_SB: jax.Array | None,
    start: jax.Array,
    stop: jax.Array,
    *,
    augment: Augment | None,
    augment_steps: int | None = None,
    label_smoothing: float | jax.Array,
    dropout_rate: float | jax.Array | None = None,
) -> tuple[TrainState, Metrics]:
    """Takes the steps `start` to `stop` of an epoch, as one program.

    The bounds are not static: one compilation serves a single step and a whole epoch, and so the
    bits do not depend on how an epoch is divided into calls.

    Args:
      state: the state before.
      metrics: the epoch's metrics before.
      examples: images [N, H, W, C] uint8 and labels [N], on the device.
      indices_SB: the examples of each step's batch; None where `examples` are the batches,
        images [S, B, H, W, C] and labels [S, B].
      start: first batch to train on.
      stop: the batch after the last.
      augment: as in `train_step`.
      augment_steps: as in `train_step`.
      label_smoothing: as in `train_step`.
      dropout_rate: as in `train_step`.
    """

    def body(row, carry):
        state, metrics = carry
        chosen = row if indices_SB is None else indices_SB[row]
        batch = jax.tree.map(lambda a: a[chosen], examples)
        state, step_metrics = train_step(
            state,
            batch,
            augment=augment,
            augment_steps=augment_steps,
            label_smoothing=label_smoothing,
            dropout_rate=dropout_rate,
        )
        return state, metrics.merge(step_metrics)

    return jax.lax.fori_loop(start, stop, body, (state, metrics))


def eval_steps(state: TrainState, batches: Examples) -> Metrics:
    """Returns the metrics of stacked batches, images [S, B, H, W, C] and labels [S, B]."""

    def body(metrics, batch):
        return metrics.merge(eval_step(state, batch)), None

    return jax.lax.scan(body, Metrics.zero(), batches)[0]


eval_program = jax.jit(eval_steps)


class Window(NamedTuple):
    """Examples on the device and the batches to train on next, as `train_steps` takes them."""

    examples: Examples
    indices_SB: jax.Array | None
    start: int
    stop: int


Feed = Callable[[int, int], Window]


def resident_feed(examples: Examples, indices_SB: jax.Array) -> Feed:
    """Feeds an epoch from examples that are all on the device, by indices [..., S, B]."""
    steps = indices_SB.shape[-2]

    def feed(done: int, wanted: int) -> Window:
        return Window(examples, indices_SB, done, min(done + wanted, steps))

    return feed


def streamed_feed(records: Records, indices_SB: jax.Array, *, start: int, mesh: Mesh) -> Feed:
    """Feeds an epoch from records read on threads, a few steps' worth on the device at a time.

    A process reads what its own devices train on: their columns of `indices_SB`, which is sharded
    over the batch.
    """
    S, B = indices_SB.shape
    shards = sorted(indices_SB.addressable_shards, key=lambda shard: shard.index[1].start or 0)
    own_SB = np.concatenate([np.asarray(shard.data) for shard in shards], axis=1)
    batches = stream_batches(records, own_SB, start=start)
    own = own_SB.shape[1]
    blank = Examples(np.zeros((own, *records.image_shape), np.uint8), np.zeros(own, np.int32))
    by_batch = NamedSharding(mesh, PartitionSpec(None, BATCH_AXIS))

    def put(own_SB: np.ndarray) -> jax.Array:
        shape = (STREAM_STEPS, B, *own_SB.shape[2:])
        return jax.make_array_from_process_local_data(by_batch, own_SB, shape)

    def feed(done: int, wanted: int) -> Window:
        count = min(wanted, STREAM_STEPS, S - done)
        read = [next(batches) for _ in range(count)] + [blank] * (STREAM_STEPS - count)
        stacked = jax.tree.map(lambda *parts: put(np.stack(parts)), *read)
        return Window(stacked, None, 0, count)

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
    *,
    steps: int,
    mesh: Mesh,
) -> Programs:
    """Compiles training and validation for arrays like these, on a mesh; runs nothing."""
    began = time.perf_counter()
    train: Any = train_program(without_seed(recipe), steps=steps, mesh=mesh)
    evaluate = None
    with jax.set_mesh(mesh):
        train = compiled(train, state, metrics, *window._replace(start=0, stop=0))
        if val_batches is not None:
            evaluate = compiled(eval_program, state, val_batches)
    return Programs(train, evaluate, time.perf_counter() - began)


def compiled(program: Any, *operands: Any) -> Any:
    """Returns a jitted function compiled for operands like these; JAX_DISABLE_JIT leaves it."""
    return program if FLAGS.jax_disable_jit else program.lower(*operands).compile()


def without_nan_search(
    generate: Callable[..., Generator[T]],
) -> Callable[..., Generator[T]]:
    """Makes a generator of a run's results work without JAX_DEBUG_NANS: it tests its own losses.

    JAX cannot say where in a compiled program a NaN is from. With JAX_DISABLE_JIT it can, and does.
    """

    @functools.wraps(generate)
    def results(*args, **kwargs):
        search = bool(FLAGS.jax_debug_nans and FLAGS.jax_disable_jit)
        with contextlib.closing(generate(*args, **kwargs)) as own:
            while True:
                with jax.debug_nans(search):
                    result = next(own, None)
                if result is None:
                    return
                yield result

    return results


def train_epoch(
    programs: Programs,
    state: TrainState,
    metrics: Metrics,
    feed: Feed,
    *,
    done: int,
    steps: int,
    show: Callable[[Metrics], None],
    interrupted: Callable[[], bool],
) -> tuple[TrainState, Metrics]:
    """Takes the steps `done` to `steps` of an epoch; the arrays of `state` stay valid.

    The device works on one call while the host reads the metrics of the call before (`show` waits
    for them), and calls grow until each takes about CALL_SECONDS. Processes agree on every call.

    Raises:
      DivergedError: `show` raised it.
      Interrupted: `interrupted()` became true before the epoch's last step.
    """
    state = jax.tree.map(jnp.copy, state)
    wanted, looked = 1, time.perf_counter()
    while done < steps:
        window = feed(done, wanted)
        previous = metrics
        state, metrics = programs.train(state, previous, *window)
        done += window.stop - window.start
        show(previous)
        elapsed, looked = time.perf_counter() - looked, time.perf_counter()
        slow, stop = hosts.agree(elapsed > CALL_SECONDS, interrupted())
        wanted = max(1, wanted // 2 if slow else wanted * 2)
        if stop and done < steps:
            raise Interrupted(state, metrics)
    show(metrics)
    return state, metrics


def show(bar: tqdm, metrics: Metrics) -> None:
    """Waits for an epoch's metrics so far and puts them on the progress bar.

    Raises:
      DivergedError: the loss is not finite.
    """
    if not (count := int(metrics.count)):
        return
    require_finite(metrics.loss, "training loss")
    bar.set_postfix(loss=f"{metrics.loss:.4f}", accuracy=f"{metrics.accuracy:.2%}", refresh=False)
    bar.update(count - bar.n)


def require_finite(value: jax.Array, name: str) -> float:
    """Returns `value` as a float.

    Raises:
      DivergedError: it is infinite or not a number.
    """
    if not math.isfinite(value):
        raise DivergedError(
            f"the {name} is {float(value)}: training diverged; lower the learning rate"
        )
    return float(value)


def never() -> bool:
    """Returns False: nothing interrupts."""
    return False


class Latch:
    """An `interrupted` that goes on being true once it was."""

    def __init__(self, interrupted: Callable[[], bool]):
        self._interrupted = interrupted
        self._was = False

    def __call__(self) -> bool:
        """Returns whether `interrupted` has ever returned True."""
        self._was = self._was or self._interrupted()
        return self._was


def no_seconds() -> dict[str, float]:
    """Returns what an epoch has taken before it began, by the names of its row."""
    return {"compile_seconds": 0.0, "train_seconds": 0.0}


@without_nan_search
def epochs(
    recipe: Recipe,
    splits: Splits,
    *,
    start: TrainState | None = None,
    start_metrics: Metrics | None = None,
    start_seconds: Mapping[str, float] = types.MappingProxyType({}),
    mesh: Mesh | None = None,
    progress: bool = False,
    interrupted: Callable[[], bool] = never,
) -> Generator[EpochResult]:
    """Trains, and yields one result an epoch. Stopping early is the caller's: leave the loop.

    Args:
      recipe: what to train, and how.
      splits: the data; where `splits.train` is `Records` they are streamed, to the same bits. The
        test split is not touched.
      start: the state to continue from, at an epoch's start or within it, with the recipe's
        optimizer and schedule instead of its own; None begins anew. In several processes it must
        be on the mesh already.
      start_metrics: the metrics so far of the epoch that `start` is in; None at its start.
      start_seconds: what that epoch has taken so far, by the names of its row.
      mesh: the devices, with an axis "data" over which batches are shared; None takes all.
      progress: whether to draw a progress bar.
      interrupted: asked now and then; once it has returned True, in any process, training stops.

    Raises:
      InputError: the recipe cannot train on these splits or devices, or continue from `start`.
      DivergedError: a loss or a parameter is not finite.
      Interrupted: `interrupted()` was true before the last epoch's last step.
    """
    mesh, interrupted = mesh or data_mesh(), Latch(interrupted)
    check_fits(recipe, splits, mesh=mesh)
    steps = splits.train.num_examples // recipe.batch_size
    everywhere = NamedSharding(mesh, PartitionSpec())
    if start is None:
        state = initial_state(recipe, splits.info, steps=steps, mesh=mesh)
    else:
        check_start(start, start_metrics, recipe=recipe, steps=steps)
        state = continued(start, recipe_optimizer(recipe, steps_per_epoch=steps), mesh=mesh)
    zero = zero_metrics(mesh)
    metrics = zero if start_metrics is None else jax.device_put(start_metrics, everywhere)
    val_batches = None
    if recipe.val_size:
        val_batches = sharded_batches(splits.val, mesh=mesh)
    train = splits.train
    if not isinstance(train, Records):
        train = place(train, everywhere)
    order = order_program(
        num_examples=splits.train.num_examples, batch_size=recipe.batch_size, mesh=mesh
    )
    schedule = schedule_program(without_seed(recipe), steps=steps)
    plateau = plateau_program(recipe.plateau)
    programs, seconds = None, no_seconds() | dict(start_seconds)
    for epoch in range(int(state.step) // steps + 1, recipe.epochs + 1):
        if any(hosts.agree(programs is not None and interrupted())):
            raise Interrupted(state, metrics)
        done = int(state.step) % steps
        indices_SB = order(draw_key(state.key, Purpose.ORDER, epoch))
        if isinstance(train, Records):
            feed = streamed_feed(train, indices_SB, start=done, mesh=mesh)
        else:
            feed = resident_feed(train, indices_SB)
        if programs is None:
            programs = compile_programs(
                recipe, state, metrics, feed(done, 0), val_batches, steps=steps, mesh=mesh
            )
            seconds["compile_seconds"] += programs.seconds
        bar = epoch_bar(recipe, epoch=epoch, steps=steps, done=done, shown=progress)
        with bar, timed(seconds):
            rate = float(schedule((epoch * steps) - 1) * state.plateau.scale)
            bar.set_description(f"epoch {epoch}/{recipe.epochs} final lr {rate:.2g}")
            state, metrics = train_epoch(
                programs,
                state,
                metrics,
                feed,
                done=done,
                steps=steps,
                show=functools.partial(show, bar),
                interrupted=interrupted,
            )
            require_finite(norm(state.params), "norm of the parameters")
        trained = time.perf_counter()
        val_loss = val_accuracy = None
        if programs.evaluate is not None:
            val = programs.evaluate(state, val_batches)
            val_loss, val_accuracy = (
                require_finite(val.loss, "validation loss"),
                float(val.accuracy),
            )
            if recipe.plateau.patience is not None:
                state = plateau(state, val_loss)
        yield EpochResult(
            state=state,
            epoch=epoch,
            step=epoch * steps,
            learning_rate=rate,
            train_loss=float(metrics.loss),
            train_accuracy=float(metrics.accuracy),
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            **seconds,
            eval_seconds=time.perf_counter() - trained,
        )
        metrics, seconds = zero, no_seconds()


@contextlib.contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Adds what the block takes to the epoch's training seconds, also where it is interrupted."""
    began = time.perf_counter()
    try:
        yield
    except Interrupted as end:
        end.seconds = seconds
        raise
    finally:
        seconds["train_seconds"] += time.perf_counter() - began


def place(examples: Examples, sharding: NamedSharding) -> Examples:
    """Puts examples that every process holds on the devices.

    `jax.device_put` would send all of them to all processes, to compare.
    """
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(a.shape, sharding, a.__getitem__), examples
    )


def sharded_batches(examples: Examples, *, mesh: Mesh, batch_size: int = EVAL_BATCH) -> Examples:
    """Returns a split as `eval_batches` of this size or a little more, shared by the devices."""
    sharing = mesh.shape[BATCH_AXIS]
    batches = eval_batches(examples, batch_size=-(-batch_size // sharing) * sharing)
    return place(batches, NamedSharding(mesh, PartitionSpec(None, BATCH_AXIS)))


def epoch_bar(
    recipe: Recipe, *, epoch: int, steps: int, done: int, shown: bool, members: int = 1
) -> tqdm:
    """Returns a progress bar over an epoch's images, `done` steps of which lie behind."""
    return tqdm(
        desc=f"epoch {epoch}/{recipe.epochs}",
        total=steps * recipe.batch_size * members,
        initial=done * recipe.batch_size * members,
        unit=" images",
        unit_scale=True,
        disable=not shown,
    )


def fit(
    recipe: Recipe,
    splits: Splits,
    *,
    workdir: str | Path | None = None,
    resume: bool = False,
    strict: bool = False,
    mesh: Mesh | None = None,
    progress: bool = True,
    interrupted: Callable[[], bool] = never,
) -> FitResult:
    """Trains to the end, or until early stopping; checkpoints and logs every epoch.

    Args:
      recipe: what to train, and how.
      splits: the data; the test split is not touched.
      workdir: where checkpoints, metrics.jsonl and TensorBoard events go; None keeps nothing.
        Several processes need one that all of them can read; process 0 writes the logs.
      resume: continue the run in `workdir`, of the same recipe and dataset, instead of starting
        one, from the newest checkpoint that is not damaged; damaged ones are renamed.
      strict: refuse to resume where the newest checkpoint is damaged.
      mesh: as in `epochs`.
      progress: whether to draw progress bars.
      interrupted: asked now and then; once it returns True a checkpoint is written, within an
        epoch if need be, and `Interrupted` is raised.

    Raises:
      InputError: the recipe cannot train on these splits or devices; `workdir` holds a run and
        `resume` is not set, or holds none, or another, and it is; nothing was written.
      DivergedError: a loss or a parameter is not finite; the last checkpoint stays.
      CheckpointError: a checkpoint cannot be written or read, or none is sound, or the newest is
        damaged and `strict` is set; nothing was changed.
      Interrupted: `interrupted()` became true.
    """
    if workdir is None:
        require_workdir(resume=resume, strict=strict)
        if jax.process_count() > 1:
            raise InputError("workdir is None; several processes need one that all can read")
        with tempfile.TemporaryDirectory() as temporary:
            return fit(
                recipe,
                splits,
                workdir=temporary,
                mesh=mesh,
                progress=progress,
                interrupted=interrupted,
            )
    workdir = Path(workdir)
    mesh = mesh or data_mesh()
    first = hosts.is_first()
    with contextlib.ExitStack() as held:
        with hosts.all_or_none():
            check_fits(recipe, splits, mesh=mesh)
            if resume:
                check_same_recipe(workdir, to_dict(recipe))
            if first:
                held.enter_context(claim(workdir, resume=resume))
        with hosts.all_or_none():
            check_shared(workdir)
        steps = splits.train.num_examples // recipe.batch_size
        fresh = fresh_progress(recipe, splits.info, steps=steps, mesh=mesh)
        run = checkpoint.identity(to_dict(recipe), splits.info)
        now = restored(workdir, run, fresh, strict=strict) if resume else fresh
        manager = held.enter_context(checkpoint.open_checkpoints(workdir))
        if first:
            write_json(workdir / RECIPE_FILE, to_dict(recipe))
        with contextlib.closing(MetricsLog(workdir, now.history) if first else NoLog()) as log:
            results = epochs(
                recipe,
                splits,
                start=now.state,
                start_metrics=now.metrics,
                start_seconds=now.seconds,
                mesh=mesh,
                progress=progress and first,
                interrupted=interrupted,
            )
            try:
                while (
                    not now.stopping.should_stop
                    and int(now.state.step) < recipe.epochs * steps
                    and (result := next(results, None))
                ):
                    now = after_epoch(now, result, zero=fresh.metrics)
                    log.write(result.row())
                    checkpoint.save(manager, run, now)
            except Interrupted as end:
                if int(end.state.step) > int(now.state.step):
                    now = dataclasses.replace(
                        now, state=end.state, metrics=end.metrics, seconds=end.seconds
                    )
                    checkpoint.save(manager, run, now)
                raise
    return FitResult(
        state=now.best,
        history=now.history,
        best_epoch=now.best_epoch,
        stopped_early=now.stopping.should_stop,
    )


def restored(workdir: Path, run: dict[str, Any], fresh: Progress, *, strict: bool) -> Progress:
    """Returns the progress of the run in `workdir`, whose identity is `run`; `fresh` before any.

    Errors are as in `fit`.
    """

    def expect(record: dict[str, Any]) -> Any:
        checkpoint.require_same(record, run, where=f"the run in {workdir}")
        return checkpoint.progress_arrays(fresh)

    saved = checkpoint.newest(workdir, expect, strict=strict, set_aside=True)
    if saved is None:
        with hosts.all_or_none():
            require_no_checkpoint_lost(workdir)
        return fresh
    return checkpoint.progress_of(saved, fresh.state)


def after_epoch(progress: Progress, result: EpochResult, *, zero: Metrics) -> Progress:
    """Returns the run's progress once an epoch is done."""
    stopping, improved = progress.stopping, True
    if result.val_loss is not None:
        stopping = stopping.update(result.val_loss, epoch=result.epoch)
        improved = stopping.best_epoch == result.epoch
    return Progress(
        state=result.state,
        metrics=zero,
        best=result.state if improved else progress.best,
        stopping=stopping,
        history=(*progress.history, result.row()),
        seconds=no_seconds(),
    )


def require_workdir(*, resume: bool, strict: bool) -> None:
    """Checks the options of a run without a directory.

    Raises:
      InputError: one of them needs a directory.
    """
    if resume or strict:
        raise InputError("resume and strict need the workdir of the run to continue; give one")


def check_shared(workdir: Path) -> None:
    """Checks that process 0's claim on `workdir` is seen here; Orbax would wait for it for ever.

    Raises:
      InputError: it is not.
    """
    if not (workdir / LOCK_FILE).exists():
        raise InputError(
            f"{workdir} is not the directory that process 0 made; give one on a file system that "
            "all processes share"
        )


def check_same_recipe(workdir: Path, recipe: dict[str, Any]) -> None:
    """Checks that the run in `workdir`, if there is one, is of this recipe, as JSON values.

    Raises:
      InputError: it is of another; the differing fields are named.
    """
    path = workdir / RECIPE_FILE
    if path.exists() and (lines := differences(read_json(path), recipe)):
        raise InputError(
            f"the run in {workdir} has another recipe ({'; '.join(lines)}); leave these options "
            "out to continue it, or give another workdir to train by them from the beginning"
        )
