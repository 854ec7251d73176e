"""The loop, written by hand: `epochs()` yields the progress after each epoch, `fit()` keeps it.

Both train R replicas of a recipe at once: one per seed. A run is the study of one replica.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm.auto import tqdm

from mnist_flax import checkpoint, hosts
from mnist_flax.data import (
    DatasetInfo,
    Examples,
    Records,
    Splits,
    balanced_weights,
    check_splits,
)
from mnist_flax.errors import DivergedError, InputError, Interrupted
from mnist_flax.feed import Chunk, Feed, resident_feed, streamed_feed
from mnist_flax.metrics import Metrics
from mnist_flax.programs import (
    FLAGS,
    compiled,
    eval_program,
    keys_program,
    norm_program,
    order_program,
    plateau_program,
    rates_program,
    state_program,
    state_shape,
    train_program,
    zero_program,
)
from mnist_flax.progress import FitResult, Progress, Row, diverged_line, epoch_rows, result_of
from mnist_flax.recipe import (
    Recipe,
    early_stopping,
    get_field,
    replica_recipes,
    to_dict,
    without_seed,
)
from mnist_flax.replicas import (
    BATCH_AXIS,
    REPLICA_AXIS,
    by_replica,
    choose,
    everywhere,
    make_mesh,
    place,
    sharded_batches,
    stack,
)
from mnist_flax.steps import TrainState
from mnist_flax.workdir import (
    RECIPE_FILE,
    MetricsLog,
    NoLog,
    write_json,
)

T = TypeVar("T")
# How long the device works between two looks of the host at the metrics and at interrupts.
CALL_SECONDS = 0.5


def check_fits(recipe: Recipe, splits: Splits, *, mesh: Mesh, replicas: int = 1) -> None:
    """Checks that replicas of the recipe can train on the splits and devices.

    Raises:
      InputError: they can not.
    """
    check_splits(splits)
    if replicas % (groups := mesh.shape[REPLICA_AXIS]):
        raise InputError(
            f"{replicas} replicas cannot be divided over the {groups} of the mesh's axis "
            f"{REPLICA_AXIS!r}; give a multiple, or another mesh"
        )
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
    if recipe.balance and isinstance(splits.train, Records):
        raise InputError(
            "balance needs the labels of all training examples, which streamed records do not have "
            "at hand; hold them in memory, or set it to False"
        )
    steps = recipe.steps_per_epoch(splits.train.num_examples)
    state_shape(without_seed(recipe), splits.info, steps=steps)


def keys_of(recipes: Sequence[Recipe], *, mesh: Mesh) -> jax.Array:
    """Returns the replicas' keys, [R]."""
    return keys_program(mesh)(np.array([recipe.seed for recipe in recipes], np.uint32))


def initial_progress(
    recipes: Sequence[Recipe],
    info: DatasetInfo,
    *,
    steps: int,
    mesh: Mesh,
    start_params: TrainState | None = None,
) -> Progress:
    """Returns a study's progress at step 0; an epoch has `steps` steps.

    Raises:
      InputError: `start_params`, whose weights all replicas take over, is of another model.
    """
    create = state_program(without_seed(recipes[0]), info, steps=steps, mesh=mesh)
    weights: tuple[Any, ...] = ()
    if start_params is not None:
        weights = jax.tree.map(np.asarray, (start_params.params, start_params.batch_stats))
    states = create(keys_of(recipes, mesh=mesh), weights)
    return progress_from(states, recipes, step=0, mesh=mesh)


def progress_from(
    states: TrainState, recipes: Sequence[Recipe], *, step: int, mesh: Mesh
) -> Progress:
    """Returns the progress of a study that knows nothing of its states but their step."""
    R = len(recipes)
    return Progress(
        step=step,
        states=states,
        metrics=zero_program(R, mesh)(),
        best=states,
        stopping=(early_stopping(recipes[0]),) * R,
        histories=((),) * R,
        diverged=(None,) * R,
        seconds=no_seconds(),
    )


def initial_state(recipe: Recipe, info: DatasetInfo, *, steps: int, mesh: Mesh) -> TrainState:
    """Returns a run's state at step 0, on all of the mesh's devices; an epoch has `steps` steps."""
    return initial_progress([recipe], info, steps=steps, mesh=mesh).state


def started(
    start: Progress | TrainState | None,
    recipes: Sequence[Recipe],
    info: DatasetInfo,
    *,
    steps: int,
    mesh: Mesh,
    start_params: TrainState | None,
) -> Progress:
    """Returns the progress to train on from, with the optimizer of the recipes.

    Raises:
      InputError: it was trained by another kind of optimizer; or it cannot be gone on with, as
        `check_start` says.
    """
    if start is None:
        return initial_progress(recipes, info, steps=steps, mesh=mesh, start_params=start_params)
    if start_params is not None:
        raise InputError("start has weights of its own; give either it or start_params")
    if isinstance(start, TrainState):
        states = stack(start, mesh=mesh)
        start = progress_from(states, recipes, step=int(start.step), mesh=mesh)
    like = state_shape(without_seed(recipes[0]), info, steps=steps)
    if jax.tree.structure(like.opt_state) != jax.tree.structure(start.states.opt_state):
        raise InputError("the state to start from was trained by another kind of optimizer")
    check_start(start, recipe=recipes[0], steps=steps)

    def moved(states: TrainState) -> TrainState:
        own = dataclasses.replace(states, optimizer=like.optimizer)
        return jax.device_put(own, by_replica(mesh))

    return dataclasses.replace(
        start,
        states=moved(start.states),
        best=moved(start.best),
        metrics=jax.device_put(start.metrics, everywhere(mesh)),
    )


def check_start(start: Progress, *, recipe: Recipe, steps: int) -> None:
    """Checks that the recipe can go on from a progress; an epoch has `steps` steps.

    Raises:
      InputError: it would be over; or it is within an epoch and its metrics have counted other
        examples, or its optimizer other steps: it was trained with another batch size, or on other
        data.
    """
    anew = "to train anew from its parameters, give a recipe_state with its params and batch_stats"
    total = recipe.epochs * steps
    if start.step >= total:
        raise InputError(
            f"the state to start from is at step {start.step}, and {recipe.epochs} epochs of "
            f"{steps} steps are over at {total}: nothing is left to train; {anew}, or raise epochs"
        )
    seen, active = int(np.max(start.metrics.count)), start.active_R
    if seen != (wanted := start.step % steps * recipe.batch_size):
        raise InputError(
            f"the state to start from is at step {start.step}, {wanted} examples into an epoch of "
            f"{steps} steps, but its metrics have counted {seen}: it was trained with another "
            f"batch size or on other data; {anew}"
        )
    counts = [count for _, count in optax.tree.get_all_with_path(start.states.opt_state, "count")]
    held = [np.asarray(count)[active] for count in counts if count.is_fully_addressable]
    updates = start.step // recipe.accumulate
    if others := {int(count) for count_R in held for count in count_R} - {updates}:
        raise InputError(
            f"the state to start from is at step {start.step}, but its optimizer at "
            f"{min(others)}; {anew}"
        )


class Latch:
    """A `should_stop` that goes on being true once it was."""

    def __init__(self, should_stop: Callable[[], bool]):
        self._should_stop = should_stop
        self._was = False

    def __call__(self) -> bool:
        """Returns whether `should_stop` has ever returned True."""
        self._was = self._was or self._should_stop()
        return self._was


def never() -> bool:
    """Returns False: nothing stops."""
    return False


def no_seconds() -> dict[str, float]:
    """Returns what an epoch has taken before it began, by the names of its row."""
    return {"compile_seconds": 0.0, "train_seconds": 0.0}


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


class Trainer:
    """What a study's epochs have in common: its data and programs on the devices.

    Attributes:
      steps: steps in an epoch.
      programs: the compiled training and, where there is validation, evaluation; None before
        `compile`.
    """

    def __init__(self, recipes: Sequence[Recipe], splits: Splits, *, varied, mesh: Mesh):
        """Places the data; `varied` names the fields in which the recipes differ."""
        self.recipe = recipe = recipes[0]
        self.mesh = mesh
        self.replicas = len(recipes)
        self.keys = keys_of(recipes, mesh=mesh)
        N = splits.train.num_examples
        self.steps = recipe.steps_per_epoch(N)
        self.programs: tuple[Callable, Callable | None] | None = None
        self.zero = zero_program(self.replicas, mesh)()
        numbers = {
            name: np.array([get_field(each, name) for each in recipes], np.float32)
            for name in varied
        }
        self.varied = place(numbers, by_replica(mesh))
        streamed = isinstance(splits.train, Records)
        self._train = splits.train if streamed else place(splits.train, everywhere(mesh))
        self._val = sharded_batches(splits.val, mesh=mesh) if recipe.val_size else None
        balance = recipe.balance and isinstance(splits.train, Examples)
        self._weights = balanced_weights(splits.train.labels) if balance else None
        self._order = order_program(num_examples=N, batch_size=recipe.batch_size, mesh=mesh)
        self._rates = rates_program(without_seed(recipe), steps=self.steps, mesh=mesh)

    def feed(self, progress: Progress, epoch: int) -> Feed:
        """Returns what feeds the rest of an epoch."""
        indices_RSB = self._order(self.keys, (epoch, self._weights))
        if not isinstance(self._train, Records):
            return resident_feed(self._train, indices_RSB)
        done = progress.step % self.steps
        return streamed_feed(self._train, indices_RSB, start=done, mesh=self.mesh)

    def compile(self, progress: Progress, chunk: Chunk, *, loop: bool | None = None) -> float:
        """Compiles training and validation for arrays like these; returns the seconds it took."""
        began = time.perf_counter()
        train: Any = train_program(
            without_seed(self.recipe), steps=self.steps, mesh=self.mesh, loop=loop
        )
        evaluate = None
        operands = (self.about(progress), progress.states, progress.metrics)
        with jax.set_mesh(self.mesh):
            train = compiled(train, *operands, *chunk._replace(start=0, stop=0))
            if self._val is not None:
                evaluate = eval_program(mesh=self.mesh, loop=loop)
                evaluate = compiled(evaluate, progress.states, self._val)
        self.programs = train, evaluate
        return time.perf_counter() - began

    def about(self, progress: Progress) -> tuple[Any, ...]:
        """Returns what training is told of the replicas: keys, which are active, what differs."""
        return self.keys, place(progress.active_R, by_replica(self.mesh)), self.varied

    def rates(self, progress: Progress, step: int) -> np.ndarray:
        """Returns the replicas' learning rates at a step, [R]."""
        rates = self._rates(self.varied, progress.states, step)
        return np.broadcast_to(np.asarray(rates), self.replicas)

    def train(self, progress: Progress) -> Callable[..., tuple[TrainState, Metrics]]:
        """Returns the training program of an epoch's active replicas."""
        assert self.programs is not None
        return functools.partial(self.programs[0], self.about(progress))

    def evaluate(self, progress: Progress, states: TrainState) -> tuple[TrainState, Metrics | None]:
        """Returns the states, after the plateau schedule, and their metrics on validation."""
        assert self.programs is not None
        if self.programs[1] is None:
            return states, None
        val = jax.block_until_ready(self.programs[1](states, self._val))
        if self.recipe.plateau is not None:
            lowered = plateau_program(self.recipe.plateau)(states, val.loss)
            states = choose(progress.active_R, lowered, states)
        return states, val


@without_nan_search
def epochs(
    recipe: Recipe,
    splits: Splits,
    *,
    seeds: Sequence[int] | None = None,
    vary: Mapping[str, Sequence[float]] | None = None,
    start: Progress | TrainState | None = None,
    start_params: TrainState | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    should_stop: Callable[[], bool] = never,
) -> Generator[Progress]:
    """Trains, and yields the progress after each epoch, until every replica has ended.

    Args:
      recipe: what to train, and how.
      splits: the data; where `splits.train` is `Records` they are streamed, to the same bits. The
        test split is not touched.
      seeds: a seed per replica; None trains one, from the recipe's own.
      vary: for fields in which replicas differ, named with dots, a value per replica; any of
        `recipes.traceable`.
      start: what to continue from, at an epoch's start or within it, with the recipe's optimizer
        and schedule instead of its own; a state is a run's, at an epoch's start. None begins anew.
      start_params: a state whose weights a new run begins from, such as `load_run(workdir).state`;
        optimizer, schedule and step are fresh, and so is the last layer where the number of classes
        differs. None draws all of them.
      mesh: the devices, as `make_mesh` returns them; None takes all.
      progress: whether to draw a progress bar.
      should_stop: asked now and then; once it has returned True, in any process, training stops.

    Raises:
      InputError: the recipe cannot train on these splits or devices, or continue from `start`; or
        the seeds or varied fields are not as they should be.
      DivergedError: a loss or a parameter of every replica is not finite.
      Interrupted: `should_stop()` was true before the last epoch's last step.
    """
    vary, seeds = vary or {}, (recipe.seed,) if seeds is None else seeds
    recipes = replica_recipes(recipe, seeds=seeds, vary=vary)
    mesh, should_stop = mesh or make_mesh(replicas=len(recipes)), Latch(should_stop)
    check_fits(recipes[0], splits, mesh=mesh, replicas=len(recipes))
    trainer = Trainer(recipes, splits, varied=tuple(vary), mesh=mesh)
    steps = trainer.steps
    now = started(start, recipes, splits.info, steps=steps, mesh=mesh, start_params=start_params)
    for epoch in range(now.step // steps + 1, recipe.epochs + 1):
        if not now.active_R.any():
            return
        if any(hosts.agree(trainer.programs is not None and should_stop())):
            raise Interrupted(now.step, now)
        now = after_epoch(trainer, now, epoch, progress=progress, should_stop=should_stop)
        yield now


def after_epoch(
    trainer: Trainer, now: Progress, epoch: int, *, progress: bool, should_stop: Callable[[], bool]
) -> Progress:
    """Trains what is left of an epoch and evaluates; returns the progress after it.

    Raises:
      DivergedError: the loss of every replica is not finite.
      Interrupted: `should_stop()` became true before the epoch's last step.
    """
    recipe, steps, count = trainer.recipe, trainer.steps, int(now.active_R.sum())
    seconds, feed = dict(now.seconds), trainer.feed(now, epoch)
    if trainer.programs is None:
        seconds["compile_seconds"] += trainer.compile(now, feed(now.step % steps, 0))
    rates_R = trainer.rates(now, epoch * steps - 1)
    bar = epoch_bar(recipe, epoch=epoch, steps=steps, now=now, rate=rates_R[0], shown=progress)
    with bar, timed(seconds):
        states, metrics = train_epoch(
            trainer.train(now),
            now,
            feed,
            steps=steps,
            show=functools.partial(show, bar, epoch=epoch),
            should_stop=should_stop,
        )
        norms_R = np.asarray(norm_program(trainer.mesh)(states))
    trained = time.perf_counter()
    states, val = trainer.evaluate(now, states)
    seconds["eval_seconds"] = time.perf_counter() - trained
    each = {name: total / count for name, total in seconds.items()}
    rows = epoch_rows(metrics, val, epoch=epoch, step=epoch * steps, rates_R=rates_R)
    now = now.after_epoch(states, [row | each for row in rows], norms_R=norms_R)
    return dataclasses.replace(now, metrics=trainer.zero, seconds=no_seconds())


def train_epoch(
    train: Callable[..., tuple[TrainState, Metrics]],
    progress: Progress,
    feed: Feed,
    *,
    steps: int,
    show: Callable[[Metrics], None],
    should_stop: Callable[[], bool],
) -> tuple[TrainState, Metrics]:
    """Takes the steps of an epoch that are left; the arrays of `progress` stay valid.

    The devices work on one call while the host reads the metrics of the call before (`show` waits
    for them), and calls grow until each takes about CALL_SECONDS. Processes agree on every call.

    Raises:
      DivergedError: `show` raised it.
      Interrupted: `should_stop()` became true before the epoch's last step.
    """
    states, metrics = jax.tree.map(jnp.copy, progress.states), progress.metrics
    done = progress.step % steps
    first, wanted, last_look = progress.step - done, 1, time.perf_counter()
    while done < steps:
        chunk = feed(done, wanted)
        previous = metrics
        states, metrics = train(states, previous, *chunk)
        done += chunk.stop - chunk.start
        show(previous)
        elapsed, last_look = time.perf_counter() - last_look, time.perf_counter()
        slow, stop = hosts.agree(elapsed > CALL_SECONDS, should_stop())
        wanted = max(1, wanted // 2 if slow else wanted * 2)
        if stop and done < steps:
            reached = dataclasses.replace(
                progress, step=first + done, states=states, metrics=metrics
            )
            raise Interrupted(reached.step, reached)
    show(metrics)
    return states, metrics


@contextlib.contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Adds what the block takes to the epoch's training seconds, also where it is interrupted."""
    began = time.perf_counter()
    try:
        yield
    except Interrupted as end:
        end.progress = dataclasses.replace(end.progress, seconds=seconds)
        raise
    finally:
        seconds["train_seconds"] += time.perf_counter() - began


def epoch_bar(
    recipe: Recipe, *, epoch: int, steps: int, now: Progress, rate: float, shown: bool
) -> tqdm:
    """Returns a progress bar over the images of an epoch's active replicas."""
    each = recipe.batch_size * int(now.active_R.sum())
    return tqdm(
        desc=f"epoch {epoch}/{recipe.epochs} final lr {rate:.2g}",
        total=steps * each,
        initial=now.step % steps * each,
        unit=" images",
        unit_scale=True,
        disable=not shown,
    )


def show(bar: tqdm, metrics: Metrics, *, epoch: int) -> None:
    """Waits for an epoch's metrics so far and puts the replicas' means on the progress bar.

    Raises:
      DivergedError: no replica's loss is finite.
    """
    sums = (metrics.count, metrics.correct, metrics.loss_sum)
    count_R, correct_R, loss_R = map(np.asarray, sums)
    if not (seen_R := count_R > 0).any():
        return
    if not (sound_R := seen_R & np.isfinite(loss_R)).any():
        loss = float(loss_R[seen_R][0])
        raise DivergedError(diverged_line("training loss", loss, epoch=epoch))
    count = count_R[sound_R].sum()
    loss, correct = loss_R[sound_R].sum(), correct_R[sound_R].sum()
    bar.set_postfix(loss=f"{loss / count:.4f}", accuracy=f"{correct / count:.2%}", refresh=False)
    bar.update(int(count_R.sum()) - bar.n)


def fit(
    recipe: Recipe,
    splits: Splits,
    *,
    seeds: Sequence[int] | None = None,
    vary: Mapping[str, Sequence[float]] | None = None,
    start_params: TrainState | None = None,
    workdir: str | Path | None = None,
    resume: bool = False,
    strict: bool = False,
    mesh: Mesh | None = None,
    progress: bool = True,
    should_stop: Callable[[], bool] = never,
    track: Callable[[Row], None] | None = None,
) -> FitResult:
    """Trains to the end, or until early stopping; checkpoints and logs every epoch.

    Replicas have their own order, augmentation, Dropout, schedule, plateau and early stopping. One
    that has stopped, or diverged, is left exactly as it is; the others go on. With one replica per
    device its bits on a CPU are those of its own run; where a device has several, XLA rounds some
    sums otherwise inside the loop over them.

    Args:
      recipe: what to train, and how.
      splits: the data; the test split is not touched.
      seeds: as in `epochs`.
      vary: as in `epochs`.
      start_params: as in `epochs`; a run that is resumed needs them no more.
      workdir: where checkpoints, metrics.jsonl and TensorBoard events go; None writes nothing.
        Several processes need one that all of them can read; process 0 writes the logs.
      resume: continue the run in `workdir`, of the same recipe and dataset, instead of starting
        one, from the newest checkpoint that is not damaged; damaged ones are renamed.
      strict: refuse to resume where the newest checkpoint is damaged.
      mesh: as in `epochs`.
      progress: whether to draw progress bars.
      should_stop: asked now and then; once it returns True a checkpoint is written, within an
        epoch if need be, and `Interrupted` is raised.
      track: called in process 0 with each new row, as in metrics.jsonl, once its epoch is in the
        checkpoint, and with none of before a resumption. What it raises ends training, and `resume`
        goes on after that epoch. After a kill a row may come twice, or be left out.

    Raises:
      InputError: the recipe cannot train on these splits or devices; `workdir` holds a run and
        `resume` is not set, or holds none, or another, and it is; nothing was written.
      DivergedError: a loss or a parameter of every replica is not finite; the last checkpoint
        stays.
      CheckpointError: a checkpoint cannot be written or read, or none is sound, or the newest is
        damaged and `strict` is set; nothing was changed.
      Interrupted: `should_stop()` became true.
    """
    recipes = replica_recipes(
        recipe, seeds=(recipe.seed,) if seeds is None else seeds, vary=vary or {}
    )
    mesh = mesh or make_mesh(replicas=len(recipes))
    steps = recipe.steps_per_epoch(splits.train.num_examples)
    with hosts.sync_errors():
        check_fits(recipes[0], splits, mesh=mesh, replicas=len(recipes))
        check_directory(workdir, resume=resume, strict=strict, start_params=start_params)
    train = functools.partial(
        epochs,
        recipe,
        splits,
        seeds=seeds,
        vary=vary,
        mesh=mesh,
        progress=progress and hosts.is_primary(),
        should_stop=should_stop,
    )
    tell = functools.partial(tracked, track, many=seeds is not None)
    if workdir is None:  # keep the last epoch's states, not every one's
        (last,) = collections.deque(map(tell, train(start_params=start_params)), maxlen=1)
        return result_of(recipes, last)
    trained = to_dict(recipe) if seeds is None else study(recipe, seeds=seeds, vary=vary or {})
    run = checkpoint.identity(trained, splits.info)
    with contextlib.ExitStack() as held:
        checkpoint.lock_run(held, Path(workdir), run, resume=resume)
        now = initial_progress(
            recipes, splits.info, steps=steps, mesh=mesh, start_params=start_params
        )
        if resume:
            now = checkpoint.restored(Path(workdir), run, now, strict=strict)
        keep = held.enter_context(keeping(Path(workdir), run, now, many=seeds is not None))
        if now.step < recipe.epochs * steps:
            now = train_and_keep(train, now, lambda latest: (keep(latest), tell(latest)))
    return result_of(recipes, now)


def tracked(track: Callable[[Row], None] | None, progress: Progress, *, many: bool) -> Progress:
    """Returns the progress; where it is an epoch's end, `track` has been given the epoch's rows.

    Only in process 0. With `many`, rows name their replica.
    """
    if track is not None and hosts.is_primary():
        for i, history in enumerate(progress.histories):
            if history and history[-1]["step"] == progress.step:
                track({"replica": i, **history[-1]} if many else dict(history[-1]))
    return progress


def check_directory(
    workdir: str | Path | None, *, resume: bool, strict: bool, start_params: TrainState | None
) -> None:
    """Checks that options of `fit` do not contradict each other.

    Raises:
      InputError: they do.
    """
    if workdir is None and (resume or strict):
        raise InputError("resume and strict need the workdir of the run to continue; give one")
    if resume and start_params is not None:
        raise InputError("a resumed run has weights of its own; leave out start_params")


def train_and_keep(
    train: Callable[..., Iterator[Progress]], now: Progress, keep: Callable[[Progress], Any]
) -> Progress:
    """Trains to the end, keeps the progress after each epoch and where it is interrupted.

    Raises:
      Interrupted: training was, and what it had reached is kept.
    """
    try:
        for latest in train(start=now):
            now = latest
            keep(now)
    except Interrupted as end:
        if end.step > now.step:
            keep(end.progress)
        raise
    return now


def study(
    recipe: Recipe, *, seeds: Sequence[int], vary: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Returns what a study trains, as JSON values."""
    return {
        "recipe": to_dict(recipe),
        "seeds": [int(seed) for seed in seeds],
        "vary": {name: [float(value) for value in values] for name, values in vary.items()},
    }


@contextlib.contextmanager
def keeping(
    workdir: Path, run: dict[str, Any], now: Progress, *, many: bool
) -> Iterator[Callable[[Progress], None]]:
    """Opens a run's log and checkpoints, and gives a function that writes a progress to both.

    Args:
      workdir: the run's directory.
      run: its `checkpoint.identity`.
      now: the progress to train on from.
      many: whether it is a study's, whose rows name their replica.

    Raises:
      CheckpointError: a checkpoint cannot be written.
    """
    with checkpoint.open_checkpoints(workdir) as manager:
        if hosts.is_primary():
            write_json(workdir / RECIPE_FILE, run["recipe"])
        opened = MetricsLog(workdir, now.histories, many=many) if hosts.is_primary() else NoLog()
        with contextlib.closing(opened) as log:

            def keep(progress: Progress) -> None:
                log.write(progress.histories)
                checkpoint.save(manager, run, progress)

            yield keep
