"""Many members at once: one recipe from many seeds, or with numbers that differ by member.

Shapes: M members; the other letters as in `data.py`. Members' states are stacked along a leading
axis, which the mesh axis "member" divides among devices; each group of devices works on its own
members, and shares their batches over the mesh axis "data" as `fit` does.

The steps are `train_step` and `eval_step` as they stand: under `jax.vmap` on a GPU or TPU, and one
member after another on the CPU, where a vmapped convolution is slow. There 8 members of `quick`
train 19,600 images a second vmapped and 37,200 one after another (`python experiments/scaling.py`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm.auto import tqdm

from mnist_flax import checkpoint
from mnist_flax.data import (
    DatasetInfo,
    Examples,
    Records,
    Splits,
    check_examples,
    epoch_order,
)
from mnist_flax.errors import DivergedError, InputError, Interrupted
from mnist_flax.evaluate import Evaluation, batched_logits
from mnist_flax.fit import (
    FitResult,
    Latch,
    Programs,
    Window,
    check_fits,
    check_same_recipe,
    compiled,
    epoch_bar,
    eval_steps,
    first_devices,
    light_compilation,
    never,
    no_seconds,
    once,
    place,
    platform_of,
    require_workdir,
    resident_feed,
    sharded_batches,
    timed,
    train_epoch,
    train_steps,
    without_nan_search,
)
from mnist_flax.metrics import Metrics
from mnist_flax.ops import BATCH_AXIS, for_platform
from mnist_flax.recipes import (
    TRACEABLE,
    PlateauConfig,
    Recipe,
    get_field,
    recipe_optimizer,
    recipe_schedule,
    recipe_state,
    step_options,
    to_dict,
    traceable,
    with_fields,
    without_seed,
)
from mnist_flax.steps import (
    Purpose,
    TrainState,
    View,
    draw_key,
    reduce_on_plateau,
    without_optimizer,
)
from mnist_flax.stopping import EarlyStopping
from mnist_flax.workdir import METRICS_FILE, RECIPE_FILE, claim, write_json, write_text

MEMBER_AXIS = "member"  # the mesh axis that members are divided over
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class MembersResult:
    """What a study's members came to, in the order of their seeds.

    Attributes:
      recipes: each member's own recipe.
      states: the states that `FitResult.state` would hold, stacked [M, ...].
      histories: each member's rows of numbers, as `EpochResult.row` gives them; `train_seconds`,
        `eval_seconds` and `compile_seconds` are an equal share of what the members took together.
      best_epochs: the epoch that each state belongs to; 0 where none was finite.
      stopped_early: whether early stopping ended it.
      diverged: why the member was given up; None for the others.
    """

    recipes: tuple[Recipe, ...]
    states: TrainState
    histories: tuple[tuple[dict[str, Any], ...], ...]
    best_epochs: tuple[int, ...]
    stopped_early: tuple[bool, ...]
    diverged: tuple[str | None, ...]

    def member(self, index: int) -> FitResult:
        """Returns one member as the result of its own run.

        Raises:
          DivergedError: it diverged.
        """
        if (reason := self.diverged[index]) is not None:
            raise DivergedError(f"member {index} (seed {self.recipes[index].seed}): {reason}")
        keyless = dataclasses.replace(self.states, key=None)  # a slice would use the keys up
        own = jax.tree.map(lambda array: array[index], keyless)
        return FitResult(
            state=dataclasses.replace(own, key=jax.random.key(self.recipes[index].seed)),
            history=self.histories[index],
            best_epoch=self.best_epochs[index],
            stopped_early=self.stopped_early[index],
        )


@dataclasses.dataclass(frozen=True)
class MembersProgress:
    """How far a study is: what a checkpoint holds beside the recipes.

    Attributes:
      states: the training states, stacked [M, ...].
      metrics: training metrics of the epoch that is under way, [M].
      best: the states of the best epochs so far, or without validation of the last, [M, ...].
      stopping: each member's early stopping.
      histories: each member's rows, one an epoch done.
      diverged: why a member was given up; None for the others.
      seconds: as in `Progress`, of all members together.
    """

    states: TrainState
    metrics: Metrics
    best: TrainState
    stopping: tuple[EarlyStopping, ...]
    histories: tuple[tuple[dict[str, Any], ...], ...]
    diverged: tuple[str | None, ...]
    seconds: dict[str, float]

    @property
    def step(self) -> int:
        """Steps that the members still in training have taken."""
        return int(np.max(self.states.step))

    @property
    def active_M(self) -> np.ndarray:
        """Which members are still in training, bool [M]."""
        members = zip(self.stopping, self.diverged, strict=True)
        return np.array([not stop.should_stop and reason is None for stop, reason in members])


def member_mesh(members: int, *, devices: int | None = None) -> Mesh:
    """Returns a mesh of the axes "member" and "data" for `members` members.

    As many devices as divide both the members and the devices work on members of their own; what
    is left shares their batches.

    Args:
      members: M.
      devices: how many devices to use; None takes all.

    Raises:
      InputError: there are fewer devices.
    """
    chosen = first_devices(devices)
    apart = math.gcd(members, len(chosen))
    axes = (MEMBER_AXIS, BATCH_AXIS)
    return Mesh(chosen.reshape(apart, -1), axes, axis_types=(AxisType.Auto,) * 2)


def member_recipes(
    recipe: Recipe, *, seeds: Sequence[int], vary: Mapping[str, Sequence[float]]
) -> tuple[Recipe, ...]:
    """Returns each member's own recipe.

    Raises:
      InputError: there is no seed; a varied field is not `traceable`, or has not one value a seed,
        or cannot have a value.
    """
    if not len(seeds):
        raise InputError("seeds is empty; give a seed a member")
    for name, values in vary.items():
        if name not in TRACEABLE:
            raise InputError(
                f"{name!r} cannot differ by member; choose from {', '.join(TRACEABLE)}"
            )
        if name not in traceable(recipe):
            raise InputError(f"{name} is one column's; it cannot differ by member beside others")
        if len(values) != len(seeds):
            raise InputError(f"vary {name} has {len(values)} values for {len(seeds)} seeds")
    return tuple(
        with_fields(recipe, {"seed": seed, **{name: vary[name][i] for name in vary}})
        for i, seed in enumerate(seeds)
    )


def for_each_member(
    fun: Callable[[Any, Any], T], *, mesh: Mesh, loop: bool | None = None
) -> Callable[[Any, Any], T]:
    """Returns `fun(member, shared)` as a function of all members' arrays, [M, ...].

    Args:
      fun: a function of one member's arrays and of what is the same for all.
      mesh: the devices; each works on its own members.
      loop: whether a device takes its members one after another instead of under `jax.vmap`; None
        does what is faster there.
    """
    one_by_one = platform_of(mesh) == "cpu" if loop is None else loop

    def on_each_device(members, shared):
        if one_by_one:
            return jax.lax.map(lambda member: fun(member, shared), members)
        return jax.vmap(fun, in_axes=(0, None))(members, shared)

    members = PartitionSpec(MEMBER_AXIS)
    return jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=(members, PartitionSpec()),
        out_specs=members,
        axis_names={MEMBER_AXIS},
        check_vma=False,
    )


@jax.jit
def choose(mask_M: jax.Array | np.ndarray, new: T, old: T) -> T:
    """Returns the arrays of `new` for the members in the mask, those of `old` for the others."""

    def choose_array(new, old):
        if jnp.issubdtype(new.dtype, jax.dtypes.prng_key):
            return new  # a run's key never changes
        return jnp.where(mask_M.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose_array, new, old)


def fresh_progress(
    recipes: Sequence[Recipe], info: DatasetInfo, *, steps: int, mesh: Mesh
) -> MembersProgress:
    """Returns a study's progress at step 0; an epoch has `steps` steps."""
    by_member = NamedSharding(mesh, PartitionSpec(MEMBER_AXIS))
    keys_M = jnp.stack([jax.random.key(recipe.seed) for recipe in recipes])

    create_all = states_program(without_seed(recipes[0]), info, steps=steps, mesh=mesh)
    states = create_all(jax.device_put(keys_M, by_member), ())
    M = len(recipes)
    return MembersProgress(
        states=states,
        metrics=no_metrics(M, mesh=mesh),
        best=states,
        stopping=(EarlyStopping(**dataclasses.asdict(recipes[0].stopping)),) * M,
        histories=((),) * M,
        diverged=(None,) * M,
        seconds=no_seconds(),
    )


@once
def states_program(recipe: Recipe, info: DatasetInfo, *, steps: int, mesh: Mesh) -> Callable:
    """Returns the compiled `recipe_state` of all members, a function of their keys."""
    ops = for_platform(platform_of(mesh))

    def create(key, _):
        return recipe_state(recipe, info, steps_per_epoch=steps, key=key, ops=ops)

    return jax.jit(
        for_each_member(create, mesh=mesh),
        out_shardings=NamedSharding(mesh, PartitionSpec(MEMBER_AXIS)),
        compiler_options=light_compilation(mesh),
    )


@once
def orders_program(*, num_examples: int, batch_size: int, mesh: Mesh) -> Callable:
    """Returns the compiled order of an epoch of all members, a function of keys and the epoch."""

    def order(key, epoch):
        order_key = draw_key(key, Purpose.ORDER, epoch)
        return epoch_order(order_key, num_examples=num_examples, batch_size=batch_size)

    return jax.jit(
        for_each_member(order, mesh=mesh),
        out_shardings=NamedSharding(mesh, PartitionSpec(MEMBER_AXIS, None, BATCH_AXIS)),
    )


def no_metrics(members: int, *, mesh: Mesh) -> Metrics:
    """Returns the metrics of no examples, [M]."""
    zeros = jax.tree.map(lambda zero: jnp.zeros(members, zero.dtype), Metrics.zero())
    return jax.device_put(zeros, NamedSharding(mesh, PartitionSpec(MEMBER_AXIS)))


def compile_programs(
    recipe: Recipe,
    progress: MembersProgress,
    traced: Mapping[str, jax.Array],
    window: Window,
    val_batches: Examples | None,
    *,
    steps: int,
    mesh: Mesh,
    loop: bool | None = None,
) -> Programs:
    """Compiles training and validation of all members; runs nothing.

    The training program takes, before what `train_steps` takes, which members are to be trained,
    bool [M] (the others take no step), and the numbers that differ.

    Args:
      recipe: what the members have in common.
      progress: a progress like those to come.
      traced: numbers that differ by member, [M] each.
      window: what feeds training, indices [M, S, B].
      val_batches: validation, on the devices; None without.
      steps: steps in an epoch.
      mesh: the devices.
      loop: as in `for_each_member`.
    """
    began = time.perf_counter()
    by_member = NamedSharding(mesh, PartitionSpec(MEMBER_AXIS))
    active_M = jax.device_put(progress.active_M, by_member)
    train: Any = train_program(without_seed(recipe), steps=steps, mesh=mesh, loop=loop)
    evaluate: Any = None
    window = window._replace(start=0, stop=0)
    with jax.set_mesh(mesh):
        train = compiled(train, active_M, traced, progress.states, progress.metrics, *window)
        if val_batches is not None:
            evaluate = compiled(eval_program(mesh=mesh, loop=loop), progress.states, val_batches)
    return Programs(train, evaluate, time.perf_counter() - began)


@once
def train_program(recipe: Recipe, *, steps: int, mesh: Mesh, loop: bool | None) -> Callable:
    """Returns the training of all members, to be compiled; it takes over the states' arrays."""

    def train_member(member, shared):
        active, own, state, metrics, indices_SB = member
        examples, start, stop = shared
        # The optimizer is a static part of the state: one with traced numbers must not leave.
        optimizer = state.optimizer
        if own:
            with_own = recipe_optimizer(recipe, steps_per_epoch=steps, traced=own)
            state = dataclasses.replace(state, optimizer=with_own)
        state, metrics = train_steps(
            state,
            metrics,
            examples,
            indices_SB,
            start,
            jnp.where(active, stop, start),
            **step_options(recipe, steps_per_epoch=steps, traced=own),
        )
        return dataclasses.replace(state, optimizer=optimizer), metrics

    def train_all(active_M, traced, states, metrics, examples, indices_MSB, start, stop):
        members = (active_M, traced, states, metrics, indices_MSB)
        train_each = for_each_member(train_member, mesh=mesh, loop=loop)
        return train_each(members, (examples, start, stop))

    by_member = NamedSharding(mesh, PartitionSpec(MEMBER_AXIS))
    return jax.jit(train_all, donate_argnums=2, out_shardings=by_member)


@once
def eval_program(*, mesh: Mesh, loop: bool | None) -> Callable:
    """Returns the validation of all members, to be compiled."""
    by_member = NamedSharding(mesh, PartitionSpec(MEMBER_AXIS))
    return jax.jit(for_each_member(eval_steps, mesh=mesh, loop=loop), out_shardings=by_member)


def show(bar: tqdm, metrics: Metrics) -> None:
    """Waits for the members' metrics so far and puts their means on the progress bar."""
    loss, correct, count = (float(np.sum(sums_M)) for sums_M in jax.tree.leaves(metrics))
    if count:
        means = {"loss": f"{loss / count:.4f}", "accuracy": f"{correct / count:.2%}"}
        bar.set_postfix(means, refresh=False)
        bar.update(int(count) - bar.n)


@functools.partial(jax.jit, static_argnames="options")
def lower_rates(
    states: TrainState, losses_M: jax.Array, active_M: jax.Array, *, options: PlateauConfig
) -> TrainState:
    """Returns the states after `reduce_on_plateau` of the active ones."""
    lower = functools.partial(reduce_on_plateau, **dataclasses.asdict(options))
    return choose(active_M, jax.vmap(lower)(states, losses_M), states)


@jax.jit
def norms(states: TrainState) -> jax.Array:
    """Returns the norm of each member's parameters, [M]."""
    return jax.vmap(optax.tree.norm)(states.params)


@without_nan_search
def member_epochs(
    recipes: Sequence[Recipe],
    splits: Splits[Examples],
    *,
    varied: Sequence[str],
    start: MembersProgress,
    mesh: Mesh,
    progress: bool,
    interrupted: Callable[[], bool],
) -> Generator[MembersProgress]:
    """Trains, and yields the progress after each epoch, until every member has ended.

    Args:
      recipes: each member's own recipe; they differ in the seed and in the fields `varied`.
      splits: the data; the test split is not touched.
      varied: names of the fields in which members differ.
      start: the progress to continue from, at an epoch's start or within it.
      mesh: the devices.
      progress: whether to draw a progress bar.
      interrupted: asked now and then; once it returns True, training stops.

    Raises:
      Interrupted: `interrupted()` was true before the last epoch's last step.
    """
    recipe, M, N = recipes[0], len(recipes), splits.train.num_examples
    steps = N // recipe.batch_size
    by_member = NamedSharding(mesh, PartitionSpec(MEMBER_AXIS))
    traced = {
        name: jax.device_put(np.array([get_field(r, name) for r in recipes], np.float32), by_member)
        for name in varied
    }
    train = place(splits.train, NamedSharding(mesh, PartitionSpec()))
    val_batches = sharded_batches(splits.val, mesh=mesh) if recipe.val_size else None
    orders = orders_program(num_examples=N, batch_size=recipe.batch_size, mesh=mesh)
    schedule = jax.jit(recipe_schedule(recipe, steps_per_epoch=steps, traced=traced))
    now, zero, programs = start, no_metrics(M, mesh=mesh), None
    seconds, interrupted = no_seconds() | start.seconds, Latch(interrupted)
    for epoch in range(now.step // steps + 1, recipe.epochs + 1):
        if not (count := int(now.active_M.sum())):
            return
        if programs is not None and interrupted():
            raise Interrupted(now.states, now.metrics)
        done = now.step % steps
        feed = resident_feed(train, orders(now.states.key, epoch))
        if programs is None:
            programs = compile_programs(
                recipe, now, traced, feed(done, 0), val_batches, steps=steps, mesh=mesh
            )
            seconds["compile_seconds"] += programs.seconds
        active_M = jax.device_put(now.active_M, by_member)
        rates_M = np.broadcast_to(schedule(epoch * steps - 1) * now.states.plateau.scale, M)
        bar = epoch_bar(recipe, epoch=epoch, steps=steps, done=done, members=count, shown=progress)
        with bar, timed(seconds):
            states, metrics = train_epoch(
                programs._replace(train=functools.partial(programs.train, active_M, traced)),
                now.states,
                now.metrics,
                feed,
                done=done,
                steps=steps,
                show=functools.partial(show, bar),
                interrupted=interrupted,
            )
            norms_M = np.asarray(norms(states))
        trained = time.perf_counter()
        val = None
        if programs.evaluate is not None:
            val = programs.evaluate(states, val_batches)
            if recipe.plateau.patience is not None:
                states = lower_rates(states, val.loss, active_M, options=recipe.plateau)
            jax.block_until_ready(val)
        seconds["eval_seconds"] = time.perf_counter() - trained
        each = {name: total / count for name, total in seconds.items()}
        rows = epoch_rows(metrics, val, epoch=epoch, step=epoch * steps, rates_M=rates_M)
        now = after_epoch(now, states, [row | each for row in rows], norms_M=norms_M)
        seconds = no_seconds()
        now = dataclasses.replace(now, metrics=zero, seconds=seconds)
        yield now


def epoch_rows(
    metrics: Metrics, val: Metrics | None, *, epoch: int, step: int, rates_M: np.ndarray
) -> list[dict[str, Any]]:
    """Returns each member's numbers of an epoch, as `EpochResult.row` has them, without seconds."""
    none_M = [None] * len(rates_M)
    columns = {
        "learning_rate": rates_M.tolist(),
        "train_loss": np.asarray(metrics.loss).tolist(),
        "train_accuracy": np.asarray(metrics.accuracy).tolist(),
        "val_loss": none_M if val is None else np.asarray(val.loss).tolist(),
        "val_accuracy": none_M if val is None else np.asarray(val.accuracy).tolist(),
    }
    rows = zip(*columns.values(), strict=True)
    return [{"epoch": epoch, "step": step} | dict(zip(columns, row, strict=True)) for row in rows]


def after_epoch(
    progress: MembersProgress,
    states: TrainState,
    rows: Sequence[dict[str, Any]],
    *,
    norms_M: np.ndarray,
) -> MembersProgress:
    """Returns the study's progress once an epoch is done; members that had ended stay as they were.

    A member with a loss or a parameter that is not finite is given up: it keeps its best state.
    """
    active_M = progress.active_M
    improved_M = np.zeros(len(rows), bool)
    stopping, histories = list(progress.stopping), list(progress.histories)
    diverged = list(progress.diverged)
    for i, row in enumerate(rows):
        if not active_M[i]:
            continue
        watched = (row["train_loss"], row["val_loss"] or 0.0, float(norms_M[i]))
        if not all(map(math.isfinite, watched)):
            diverged[i] = f"training diverged in epoch {row['epoch']}; lower the learning rate"
            continue
        histories[i] = (*histories[i], row)
        improved_M[i] = True
        if row["val_loss"] is not None:
            stopping[i] = stopping[i].update(row["val_loss"], epoch=row["epoch"])
            improved_M[i] = stopping[i].best_epoch == row["epoch"]
    return dataclasses.replace(
        progress,
        states=states,
        best=choose(improved_M, states, progress.best),
        stopping=tuple(stopping),
        histories=tuple(histories),
        diverged=tuple(diverged),
    )


def fit_many(
    recipe: Recipe,
    splits: Splits,
    *,
    seeds: Sequence[int],
    vary: Mapping[str, Sequence[float]] | None = None,
    workdir: str | Path | None = None,
    resume: bool = False,
    strict: bool = False,
    mesh: Mesh | None = None,
    progress: bool = True,
    interrupted: Callable[[], bool] = never,
) -> MembersResult:
    """Trains a recipe from many seeds in one program, each member as `fit` would train it.

    Members have their own order, augmentation, Dropout, schedule, plateau and early stopping. One
    that has stopped, or diverged, is left exactly as it is; the others go on. On one device of a
    CPU a member's bits are those of its own `fit` there, unless it is augmented or separable: XLA
    rounds some sums otherwise inside a loop of members. So it does where members are divided among
    devices, or vmapped.

    Args:
      recipe: what the members have in common; its seed is not used.
      splits: the data, resident; the test split is not touched.
      seeds: each member's seed.
      vary: for fields in which members differ, named with dots, a value a member; any of
        `recipes.traceable`.
      workdir: where checkpoints and metrics.jsonl go; None keeps nothing.
      resume: as in `fit`.
      strict: as in `fit`.
      mesh: the devices, with the axes "member" and "data"; None takes `member_mesh` of all.
      progress: whether to draw progress bars.
      interrupted: as in `fit`.

    Raises:
      InputError: the recipe cannot train on these splits or devices, or the seeds or varied
        fields are not as they should be, or the workdir is not as in `fit`; nothing was written.
      CheckpointError: a checkpoint cannot be written, or is damaged and `strict` is set.
      Interrupted: `interrupted()` became true.
    """
    vary = vary or {}
    recipes = member_recipes(recipe, seeds=seeds, vary=vary)
    mesh = mesh or member_mesh(len(recipes))
    if jax.process_count() > 1:
        raise InputError("many members train in one process; start fewer processes, or use fit")
    if isinstance(splits.train, Records):
        raise InputError("many members need the training examples in memory: do not stream them")
    if len(recipes) % mesh.shape[MEMBER_AXIS]:
        raise InputError(
            f"{len(recipes)} members cannot be divided over the {mesh.shape[MEMBER_AXIS]} of "
            "the mesh's axis 'member'; give a multiple, or another mesh"
        )
    check_fits(recipes[0], splits, mesh=mesh)
    steps = splits.train.num_examples // recipe.batch_size
    fresh = fresh_progress(recipes, splits.info, steps=steps, mesh=mesh)
    train = functools.partial(
        member_epochs,
        recipes,
        splits,
        varied=tuple(vary),
        mesh=mesh,
        progress=progress,
        interrupted=interrupted,
    )
    if workdir is None:
        require_workdir(resume=resume, strict=strict)
        (last,) = collections.deque(train(start=fresh), maxlen=1)  # not every epoch's states
        return members_result(recipes, last)
    study = {
        "recipe": to_dict(recipe),
        "seeds": [int(seed) for seed in seeds],
        "vary": {name: [float(value) for value in values] for name, values in vary.items()},
    }
    run = checkpoint.identity(study, splits.info)
    workdir = Path(workdir)
    if resume:
        check_same_recipe(workdir, study)
    with claim(workdir, resume=resume):
        now = restored(workdir, run, fresh, strict=strict) if resume else fresh
        write_json(workdir / RECIPE_FILE, study)
        write_rows(workdir, now)
        with checkpoint.open_checkpoints(workdir) as manager:
            try:
                for latest in train(start=now):
                    now = latest
                    write_rows(workdir, now)
                    save(manager, run, now)
            except Interrupted as end:
                if int(np.max(end.state.step)) > now.step:
                    now = dataclasses.replace(
                        now, states=end.state, metrics=end.metrics, seconds=end.seconds
                    )
                    save(manager, run, now)
                raise
    return members_result(recipes, now)


def restored(
    workdir: Path, run: dict[str, Any], fresh: MembersProgress, *, strict: bool
) -> MembersProgress:
    """Returns the progress of the study in `workdir`; as `fit.restored`."""

    def expect(record: dict[str, Any]) -> Any:
        checkpoint.require_same(record, run, where=f"the study in {workdir}")
        return _arrays(fresh)

    saved = checkpoint.newest(workdir, expect, strict=strict, set_aside=True)
    if saved is None:
        return fresh
    record = saved.record
    return MembersProgress(
        states=checkpoint.with_arrays(fresh.states, saved.arrays["states"]),
        metrics=saved.arrays["metrics"],
        best=checkpoint.with_arrays(fresh.best, saved.arrays["best"]),
        stopping=tuple(EarlyStopping(**values) for values in record["stopping"]),
        histories=tuple(map(tuple, record["histories"])),
        diverged=tuple(record["diverged"]),
        seconds=record["seconds"],
    )


def members_result(recipes: tuple[Recipe, ...], progress: MembersProgress) -> MembersResult:
    """Returns what the members came to."""
    kept = zip(progress.stopping, progress.histories, strict=True)
    return MembersResult(
        recipes=recipes,
        states=progress.best,
        histories=progress.histories,
        best_epochs=tuple(stop.best_epoch or len(history) for stop, history in kept),
        stopped_early=tuple(stop.should_stop for stop in progress.stopping),
        diverged=progress.diverged,
    )


def write_rows(workdir: Path, progress: MembersProgress) -> None:
    """Writes every member's rows to metrics.jsonl, with the member's number."""
    rows = [
        json.dumps({"member": i, **row}) + "\n"
        for i, history in enumerate(progress.histories)
        for row in history
    ]
    write_text(workdir / METRICS_FILE, "".join(rows))


def _arrays(progress: MembersProgress) -> dict[str, Any]:
    return {
        "states": checkpoint.state_arrays(progress.states),
        "metrics": progress.metrics,
        "best": checkpoint.state_arrays(progress.best),
    }


def save(manager: ocp.CheckpointManager, run: dict[str, Any], progress: MembersProgress) -> None:
    """Saves a study's progress under the members' step; as `checkpoint.save`."""
    record = {
        "stopping": [dataclasses.asdict(stop) for stop in progress.stopping],
        "histories": progress.histories,
        "diverged": progress.diverged,
        "seconds": progress.seconds,
    }
    checkpoint.write(manager, run, step=progress.step, arrays=_arrays(progress), record=record)


@functools.partial(jax.jit, static_argnames="mesh")
def _logits(
    states: TrainState, images_SBHWC: jax.Array, view: View | None, *, mesh: Mesh
) -> jax.Array:
    def of_member(state, seen):
        return batched_logits(state, *seen)

    return for_each_member(of_member, mesh=mesh)(states, (images_SBHWC, view))


def evaluate_many(
    states: TrainState,
    examples: Examples,
    *,
    mesh: Mesh | None = None,
    view: View | None = None,
) -> list[Evaluation]:
    """Evaluates every member on every example once.

    Args:
      states: stacked states, as `MembersResult` holds them.
      examples: at least one example.
      mesh: the devices, whichever hold the states; None takes `member_mesh` of all.
      view: how all members see the images; None sees them as they are.
    """
    check_examples(examples, name="the examples to evaluate")
    mesh, N = mesh or member_mesh(len(states.step)), examples.num_examples
    by_member = NamedSharding(mesh, PartitionSpec(MEMBER_AXIS))
    states = jax.device_put(without_optimizer(states), by_member)
    images_SBHWC = sharded_batches(examples, mesh=mesh).images
    with jax.set_mesh(mesh):
        logits_MSBK = _logits(states, images_SBHWC, view, mesh=mesh)
    logits_MNK = np.asarray(logits_MSBK).reshape(len(states.step), -1, logits_MSBK.shape[-1])
    labels_N = np.asarray(examples.labels)
    return [Evaluation(logits_NK[:N], labels_N) for logits_NK in logits_MNK]
