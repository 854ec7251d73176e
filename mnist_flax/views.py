"""Random views of images, whose probabilities are averaged: test-time augmentation."""

from __future__ import annotations

import dataclasses
import functools

import jax

from mnist_flax.errors import InputError
from mnist_flax.recipe import Recipe, make_augment
from mnist_flax.steps import Augment, Purpose, draw_key


class EqualPartial(functools.partial):
    """A partial that equals another of the same function and arguments.

    `jax.jit` compiles anew for a static argument that equals none before it.
    """

    def _parts(self):
        return self.func, self.args, frozenset(self.keywords.items())

    def __eq__(self, other):
        return isinstance(other, EqualPartial) and self._parts() == other._parts()

    def __hash__(self):
        return hash(self._parts())


def by_value(augment: functools.partial) -> functools.partial:
    """Returns the partial as one that is compared by value, where its arguments can be hashed."""
    equal = EqualPartial(augment.func, *augment.args, **augment.keywords)
    try:
        hash(equal)
    except TypeError:
        return augment
    return equal


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """A random view of images, for test-time augmentation. A pytree.

    Attributes:
      key: what `augment` draws by.
      augment: as in `train_step`, `augment(key, images_BHWC) -> images_BHWC` (static). A
        `functools.partial` of hashable arguments equals any other of the same ones.
    """

    key: jax.Array
    augment: Augment = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        if isinstance(self.augment, functools.partial):
            object.__setattr__(self, "augment", by_value(self.augment))

    def at(self, index: jax.Array | int) -> View:
        """Returns the view of batch number `index`."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, index))

    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Returns the images as they are seen."""
        return self.augment(self.key, images_BHWC)


def require_views(recipe: Recipe, *, count: int) -> None:
    """Raises InputError unless `recipe_views` can draw so many; starts no JAX backend."""
    if count < 0:
        raise InputError(f"views is {count}; give at least 0")
    if count and make_augment(recipe) is None:
        raise InputError(f"views is {count}, but the recipe has no augmentation; give 0")


def recipe_views(recipe: Recipe, *, count: int) -> list[View]:
    """Returns random views of test images by the recipe's augmentation, the same in every call.

    Raises:
      InputError: `count` is negative, or the recipe has no augmentation to draw any.
    """
    require_views(recipe, count=count)
    augment = make_augment(recipe)
    if augment is None:
        return []
    key = jax.random.key(0)
    return [View(draw_key(key, Purpose.VIEW, number), augment) for number in range(count)]
