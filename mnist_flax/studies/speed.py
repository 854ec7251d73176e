"""Training steps timed beside each other: contenders take turns, so load meets all alike."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mnist_flax.loop import Trainer, initial_progress
from mnist_flax.recipe import Recipe, replica_recipes
from mnist_flax.replicas import make_mesh


class Contender(NamedTuple):
    """Something to time.

    Attributes:
      panel: what its size counts.
      line: its name.
      size: its size.
      images: images that a run trains on, over all replicas.
      run: trains.
    """

    panel: str
    line: str
    size: int
    images: int
    run: Callable[[], Any]


def training(
    recipe: Recipe, splits, *, replicas: int, devices: int, steps: int, loop: bool | None = None
) -> Callable[[], Any]:
    """Returns a compiled function that takes `steps` steps of `replicas` replicas, and waits."""
    mesh = make_mesh(devices=devices, replicas=replicas)
    recipes = replica_recipes(recipe, seeds=range(replicas), vary={})
    trainer = Trainer(recipes, splits, varied=(), mesh=mesh)
    progress = initial_progress(recipes, splits.info, steps=trainer.steps, mesh=mesh)
    chunk = trainer.feed(progress, 1)(0, steps)
    trainer.compile(progress, chunk, loop=loop)
    train = trainer.train(progress)

    def run():
        states = jax.tree.map(jnp.copy, progress.states)
        return jax.block_until_ready(train(states, progress.metrics, *chunk))

    return run


def time_turns(made: list[Contender], *, turns: int) -> list[list[float]]:
    """Returns each contender's images a second, a number a turn, after one run to warm up."""
    speeds: list[list[float]] = [[] for _ in made]
    for contender in made:
        contender.run()
    for _ in range(turns):
        for contender, measured in zip(made, speeds, strict=True):
            began = time.perf_counter()
            contender.run()
            measured.append(contender.images / (time.perf_counter() - began))
    return speeds
