"""What arrays and fields must be; whatever is not is refused in one line.

Shapes and dtypes are checked wherever they are known, under `jax.jit` too; values only where this
process holds them.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnist_flax.errors import InputError

# How far floating-point images may lie outside of [0, 1]: what resampling in bfloat16 rounds.
ROUNDING = 0.01


def check_image_array(images: Any) -> None:
    """Checks that images are uint8 or floating-point [N, H, W, C]; their values need not be there.

    Raises:
      InputError: they are not.
    """
    found = f"{images.dtype} {list(images.shape)}"
    if len(images.shape) != 4:
        missing = "; add the channels with images[..., None]" if len(images.shape) == 3 else ""
        raise InputError(f"images must be [N, H, W, C], not {found}{missing}")
    if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(
            f"images must be uint8 from 0 to 255 or floating-point from 0 to 1, not {found}; "
            "convert with images.astype(np.uint8), or divide by the largest value"
        )


def check_image_shape(shape: Sequence[int], image_shape: Sequence[int]) -> None:
    """Checks that images [N, H, W, C] of `shape` have the (H, W, C) that is wanted.

    Raises:
      InputError: they have another.
    """
    H, W, C = image_shape
    if tuple(shape[1:]) == (H, W, C):
        return
    channels_first = "; move the channels with images.transpose(0, 2, 3, 1)"
    hint = channels_first if tuple(shape[1:]) == (C, H, W) else ""
    raise InputError(f"images must be [N, {H}, {W}, {C}], not {list(shape)}{hint}")


def check_label_array(labels: Any, *, num_examples: int) -> None:
    """Checks that labels are integers [N], one an image; their values need not be there.

    Raises:
      InputError: they are not.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != (num_examples,):
        shape = list(labels.shape)
        hint = ""
        if shape == [num_examples, 1]:
            hint = "; take labels[:, 0]"
        elif len(shape) == 2:
            hint = "; take labels.argmax(-1) of one-hot labels"
        elif shape == [num_examples]:
            hint = "; convert with labels.astype(np.int32)"
        raise InputError(
            f"labels must be integers [{num_examples}], one an image, not {labels.dtype} "
            f"{shape}{hint}"
        )


def check_image_values(images: np.ndarray | jax.Array) -> None:
    """Checks that floating-point images lie in [0, 1], where this process holds their values.

    Raises:
      InputError: they do not, or some value is not a number.
    """
    if images.dtype == np.uint8 or not _is_here(images) or not images.size:
        return
    low, high = float(images.min()), float(images.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN fails both
        raise InputError(
            f"floating-point images must lie in [0, 1], not in [{low:.4g}, {high:.4g}]; scale them"
        )


def check_label_values(labels: np.ndarray | jax.Array, *, num_classes: int | None) -> None:
    """Checks that labels lie in [0, K), where this process holds their values.

    Raises:
      InputError: they do not.
    """
    if not _is_here(labels) or not labels.size:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        upper = "K" if num_classes is None else num_classes
        wrong = low if low < 0 else high
        raise InputError(f"labels must be in [0, {upper}), but there is a {wrong}; renumber them")


def _is_here(array: Any) -> bool:
    return getattr(array, "is_fully_addressable", True)


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_field_types(config: Any, *, prefix: str = "") -> None:
    """Checks that the fields of a dataclass hold what they are annotated with.

    A whole number stands for a float, too; a bool for no number, and a float for no whole one.

    Args:
      config: the dataclass, of bools, numbers, strings, tuples of them and other dataclasses.
      prefix: what precedes a field's name in an error, such as "optimizer.".

    Raises:
      InputError: a field holds another type.
    """
    for name, wanted in _field_types(type(config)).items():
        value = getattr(config, name)
        if not _is_of(value, wanted):
            raise InputError(f"{prefix}{name} is {value!r}; give {_described(wanted)}")


def _is_of(value: Any, wanted: Any) -> bool:
    if wanted is Any:
        return True
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, each) for each in args)
    if origin is typing.Literal:
        return isinstance(value, str)  # which one is its dataclass's own to check
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of(entry, args[0]) for entry in value)
    if wanted is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted)


_DESCRIPTIONS = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
_DESCRIPTIONS |= {types.NoneType: "None"}


def _described(wanted: Any) -> str:
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_described, args))
    if origin is typing.Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        return f"a tuple, each entry {_described(args[0])}"
    return _DESCRIPTIONS.get(wanted) or f"a {wanted.__name__}"


def check_range(
    name: str, value: float, low: float, high: float, *, open_low: bool = False
) -> None:
    """Checks that `value` is in [low, high), or in (low, high) where `open_low`.

    Raises:
      InputError: it is not.
    """
    above = value > low if open_low else value >= low
    if not (above and value < high):  # NaN fails both
        raise InputError(
            f"{name} is {value}; give a number in {'(' if open_low else '['}{low}, {high})"
        )
