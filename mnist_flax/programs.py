"""A study's compiled programs, each made once for whatever decides it.

So a second run of a recipe in a process, from whatever seed, compiles nothing. What `over_replicas`
takes are functions of a replica's own arrays and of what all share.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mnist_flax.data import DatasetInfo, Examples, epoch_order
from mnist_flax.metrics import Metrics
from mnist_flax.ops import for_platform
from mnist_flax.recipe import (
    PlateauConfig,
    Recipe,
    recipe_optimizer,
    recipe_schedule,
    recipe_state,
    step_options,
)
from mnist_flax.replicas import by_batch, by_replica, everywhere, over_replicas, platform_of
from mnist_flax.steps import (
    Purpose,
    TrainState,
    draw_key,
    eval_step,
    reduce_on_plateau,
    train_step,
)
from mnist_flax.weights import check_freeze

FLAGS: Any = jax.config  # its attributes are made as they are defined

once = functools.lru_cache(maxsize=16)


@once
def state_shape(recipe: Recipe, info: DatasetInfo, *, steps: int) -> TrainState:
    """Returns the shapes of a replica's state.

    Raises:
      InputError: the recipe's network cannot take the dataset's images.
    """
    state = jax.eval_shape(lambda: recipe_state(recipe, info, steps_per_epoch=steps))
    check_freeze(state.params, recipe.freeze)
    return state


@once
def keys_program(mesh: Mesh) -> Callable[[np.ndarray], jax.Array]:
    """Returns the runs' keys [R], a function of their seeds."""
    return jax.jit(jax.vmap(jax.random.key), out_shardings=by_replica(mesh))


@once
def state_program(recipe: Recipe, info: DatasetInfo, *, steps: int, mesh: Mesh) -> Callable:
    """Returns the compiled `recipe_state` of all replicas, a function of keys [R] and weights."""
    ops = for_platform(platform_of(mesh))

    def create(key, weights):
        return recipe_state(
            recipe, info, steps_per_epoch=steps, key=key, ops=ops, weights=weights or None
        )

    # At LLVM's highest level the CPU's random numbers take six times as long to compile as at the
    # first, 3.6 s for the parameters of `quick`, and have the same bits.
    light = {"xla_backend_optimization_level": 1} if platform_of(mesh) == "cpu" else None
    return jax.jit(
        over_replicas(create, mesh=mesh), out_shardings=by_replica(mesh), compiler_options=light
    )


@once
def order_program(*, num_examples: int, batch_size: int, mesh: Mesh) -> Callable:
    """Returns the compiled order of an epoch, [R, S, B].

    It is a function of keys [R], and of the epoch and `epoch_order`'s weights.
    """

    def order(key, shared):
        epoch, weights_N = shared
        return epoch_order(
            draw_key(key, Purpose.ORDER, epoch),
            num_examples=num_examples,
            batch_size=batch_size,
            weights_N=weights_N,
        )

    return jax.jit(over_replicas(order, mesh=mesh), out_shardings=by_batch(mesh))


@once
def train_program(recipe: Recipe, *, steps: int, mesh: Mesh, loop: bool | None = None) -> Callable:
    """Returns the training of all replicas, to be compiled; it takes over the states' arrays.

    Before what `train_steps` takes beside its key, it takes of the replicas a tuple: their keys,
    [R]; which of them are to be trained, bool [R] (the others take no step); and the numbers in
    which they differ, [R] each.
    """

    def train_replica(one, shared):
        (key, active, own), state, metrics, examples, indices_SB = one
        resident, start, stop = shared
        # The optimizer is a static part of the state: one with traced numbers must not leave.
        optimizer = state.optimizer
        if own:
            with_own = recipe_optimizer(recipe, steps_per_epoch=steps, traced=own)
            state = dataclasses.replace(state, optimizer=with_own)
        state, metrics = train_steps(
            key,
            state,
            metrics,
            resident if examples is None else examples,
            indices_SB,
            start,
            jnp.where(active, stop, start),
            **step_options(recipe, steps_per_epoch=steps, traced=own),
        )
        return dataclasses.replace(state, optimizer=optimizer), metrics

    def train_all(about, states, metrics, examples, indices_RSB, start, stop):
        # Streamed examples are a replica's own batches.
        own, resident = (examples, None) if indices_RSB is None else (None, examples)
        replicas = (about, states, metrics, own, indices_RSB)
        train_each = over_replicas(train_replica, mesh=mesh, loop=loop)
        return train_each(replicas, (resident, start, stop))

    # Metrics are for every process to read.
    return jax.jit(train_all, donate_argnums=1, out_shardings=(by_replica(mesh), everywhere(mesh)))


@once
def eval_program(*, mesh: Mesh, loop: bool | None = None) -> Callable:
    """Returns the validation of all replicas, to be compiled."""
    return jax.jit(over_replicas(eval_steps, mesh=mesh, loop=loop), out_shardings=everywhere(mesh))


@once
def zero_program(replicas: int, mesh: Mesh) -> Callable[[], Metrics]:
    """Returns the compiled metrics of no examples, [R]."""

    def zeros():
        return jax.tree.map(lambda zero: jnp.broadcast_to(zero, replicas), Metrics.zero())

    return jax.jit(zeros, out_shardings=everywhere(mesh))


@once
def rates_program(recipe: Recipe, *, steps: int, mesh: Mesh) -> Callable:
    """Returns the compiled learning rates, [R], a function of varied numbers, states and step."""
    k = recipe.accumulate

    def rates(varied, states, step):
        schedule = recipe_schedule(recipe, steps_per_epoch=steps, traced=varied)
        return schedule(step // k * k) * states.plateau.scale

    return jax.jit(rates, out_shardings=everywhere(mesh))


@once
def norm_program(mesh: Mesh) -> Callable[[TrainState], jax.Array]:
    """Returns the compiled norms of the replicas' parameters, [R]."""
    norm = jax.vmap(lambda state: optax.tree.norm(state.params))
    return jax.jit(norm, out_shardings=everywhere(mesh))


@once
def plateau_program(config: PlateauConfig) -> Callable[..., TrainState]:
    """Returns the compiled `reduce_on_plateau` of all replicas, a function of states and losses."""
    return jax.jit(jax.vmap(functools.partial(reduce_on_plateau, **dataclasses.asdict(config))))


def compiled(program: Any, *operands: Any) -> Any:
    """Returns a jitted function compiled for operands like these; JAX_DISABLE_JIT leaves it."""
    return program if FLAGS.jax_disable_jit else program.lower(*operands).compile()


def train_steps(
    key: jax.Array,
    state: TrainState,
    metrics: Metrics,
    examples: Examples,
    indices_SB: jax.Array | None,
    start: jax.Array,
    stop: jax.Array,
    **options: Any,
) -> tuple[TrainState, Metrics]:
    """Takes the steps `start` to `stop` of an epoch, as one program.

    The bounds are not static: one compilation serves a single step and a whole epoch, and so the
    bits do not depend on how an epoch is divided into calls.

    Args:
      key: the run's key.
      state: the state before.
      metrics: the epoch's metrics before.
      examples: images [N, H, W, C] uint8 and labels [N], on the device.
      indices_SB: the examples of each step's batch; None where `examples` are the batches,
        images [S, B, H, W, C] and labels [S, B].
      start: first batch to train on.
      stop: the batch after the last.
      **options: those of `train_step`.
    """

    def body(row, carry):
        state, metrics = carry
        chosen = row if indices_SB is None else indices_SB[row]
        batch = jax.tree.map(lambda a: a[chosen], examples)
        state, step_metrics = train_step(key, state, batch, **options)
        return state, metrics.merge(step_metrics)

    return jax.lax.fori_loop(start, stop, body, (state, metrics))


def eval_steps(state: TrainState, batches: Examples) -> Metrics:
    """Returns the metrics of stacked batches, images [S, B, H, W, C] and labels [S, B]."""

    def body(metrics, batch):
        return metrics.merge(eval_step(state, batch)), None

    return jax.lax.scan(body, Metrics.zero(), batches)[0]
