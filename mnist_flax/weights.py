"""Weights that were trained before: what is taken over from them, and what of them stays frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mnist_flax.errors import InputError


def names_of(path: Sequence[Any]) -> tuple[str, ...]:
    """Returns the names of what leads to a leaf of a tree."""
    keys = (getattr(part, "key", getattr(part, "name", getattr(part, "idx", ""))) for part in path)
    return tuple(map(str, keys))


def taken_over(fresh: Any, trained: Any, *, num_classes: int) -> Any:
    """Returns trained parameters or statistics in the shapes of a model's fresh ones.

    Where another number of classes is all that differs, in the last axis of the last layer, the
    fresh ones are kept.

    Raises:
      InputError: they are of another model.
    """
    here, there = (
        {names_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (fresh, trained)
    )
    if other := sorted(here.keys() ^ there.keys()):
        raise InputError(
            f"the weights to start from are of another model: {'/'.join(other[0])} is not in both"
        )

    def choose(path, own):
        old = there[names_of(path)]
        if old.shape == own.shape:
            return jnp.asarray(old, own.dtype)
        if own.ndim and old.shape[:-1] == own.shape[:-1] and own.shape[-1] == num_classes:
            return own
        raise InputError(
            f"the weights to start from are of another model: {'/'.join(names_of(path))} is "
            f"{list(old.shape)}, and here {list(own.shape)}"
        )

    return jax.tree.map_with_path(choose, fresh)


def check_freeze(params: Any, freeze: Sequence[str]) -> None:
    """Checks that parameters are of layers of those names, and of others to train.

    Raises:
      InputError: they are not.
    """
    paths = [names_of(path) for path, _ in jax.tree.leaves_with_path(params)]
    names = {name for path in paths for name in path[:-1]}
    if unknown := set(freeze) - names:
        own = ", ".join(sorted(name for name in names if not name.isdecimal()))
        raise InputError(f"freeze names {', '.join(sorted(unknown))}; the model's layers are {own}")
    if freeze and all(set(freeze) & set(path) for path in paths):
        raise InputError("freeze names every layer: nothing would be trained")


def without(tree: Any, freeze: Sequence[str], *, instead: Any = None) -> Any:
    """Returns a tree whose leaves in frozen layers are zeros, or those of `instead`."""
    if not freeze:
        return tree
    held = jax.tree.map(jnp.zeros_like, tree) if instead is None else instead

    def choose(path, leaf, own):
        return own if set(freeze) & set(names_of(path)) else leaf

    return jax.tree.map_with_path(choose, tree, held)


def frozen(model: Any, freeze: Sequence[str]) -> Any:
    """Returns the model, whose frozen BatchNorms are told to use their running statistics."""
    if freeze:
        for path, node in nnx.iter_graph(model):
            if isinstance(node, nnx.BatchNorm) and set(freeze) & set(map(str, path)):
                node.use_running_average = True
    return model
