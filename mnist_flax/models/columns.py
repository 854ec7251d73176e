"""Several networks as one: each learns from its own share of every batch, and all are averaged."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mnist_flax.checks import check_field_types
from mnist_flax.compat import List
from mnist_flax.data import DatasetInfo
from mnist_flax.errors import InputError
from mnist_flax.model import CNN
from mnist_flax.ops import Ops


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Networks side by side (`Columns`).

    Attributes:
      columns: a configuration per network, such as a `CNNConfig`. On the command line they can be
        changed (`--model.columns.0.dropout`), not added.
    """

    columns: tuple[Any, ...] = ()

    def __post_init__(self):
        check_field_types(self, prefix="model.")
        if not self.columns:
            raise InputError("model columns is empty; give a configuration per network")

    @property
    def batch_multiple(self) -> int:
        """Whose multiple a training batch is: the number of columns that share it evenly."""
        return len(self.columns)

    def make(self, info: DatasetInfo, *, rngs: nnx.Rngs) -> Columns:
        """Returns the networks for images and classes such as a dataset's.

        Raises:
          InputError: the images do not suit one of them.
        """
        return Columns([column.make(info, rngs=rngs) for column in self.columns])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """Returns `x`, with its derivative multiplied by `factor`."""
    return x


@scale_gradient.defjvp
def _scale_gradient_jvp(factor, primals, tangents):
    return primals[0], factor * tangents[0]


class Columns(nnx.Module):
    """Networks side by side, of which each learns by itself; their probabilities are averaged.

    Ciresan, Meier and Schmidhuber (2012, arXiv 1202.2745) call it a multi-column network. In
    training a batch is dealt out, column j of J taking the examples j, J + j, 2 J + j, ...: so each
    column has a loss of its own. With one loss for all they would come to lean on each other, and
    be hardly better than one of them.

    A mean over all B examples is a J-th of the sum of the columns' own means, so in training the
    gradients of the logits are multiplied by J: each column learns as it would alone on its share.
    """

    def __init__(self, columns: Sequence[CNN]):
        """Puts networks of images of one shape side by side."""
        self.columns = List(columns)

    def use(self, ops: Ops) -> None:
        """Computes with `ops` from now on, as `CNN.use`."""
        for column in self.columns:
            column.use(ops)

    def preprocess_images(self, images_BHWC: jax.Array) -> jax.Array:
        """Returns float images in [0, 1] as each column takes them, side by side in channels."""
        return jnp.concatenate(
            [column.preprocess_images(images_BHWC) for column in self.columns], axis=-1
        )

    def features(self, images_BHWC: jax.Array) -> jax.Array:
        """Returns the activations [B, F] that the columns' classifiers see, side by side."""
        return jnp.concatenate(
            [column.features(x) for column, x in self._seen(images_BHWC)], axis=-1
        )

    def _seen(self, images_BHWC):
        """Returns each column with what it sees of images as `preprocess_images` returns them."""
        shown = jnp.split(images_BHWC, len(self.columns), axis=-1)
        return list(zip(self.columns, shown, strict=True))

    def __call__(
        self,
        images_BHWC: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        dropout_rate: float | jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits [B, K]: the log of the columns' mean probability.

        In training each row is of the column that was dealt the example, so the training loss and
        accuracy are the columns' own.

        Args:
          images_BHWC: images as `preprocess_images` returns them; in training B is a multiple of J.
          train: as in `CNN`.
          key: as in `CNN`.
          dropout_rate: as in `CNN`; the same for all columns.

        Raises:
          InputError: the columns cannot share a training batch evenly, or Dropout has no key.
        """
        B, J = images_BHWC.shape[0], len(self.columns)
        seen = self._seen(images_BHWC)
        if not train:
            logs = [jax.nn.log_softmax(column(x)) for column, x in seen]
            return jax.nn.logsumexp(jnp.stack(logs), axis=0) - math.log(J)
        if B % J:
            raise InputError(f"a training batch of {B} cannot be dealt to {J} columns evenly")
        keys = [None] * J if key is None else jax.random.split(key, J)
        # What `preprocess_images` and the augmentation made of the others' examples is dropped.
        # Neighbours, not halves: of a batch that devices share, each deals out its own part.
        logits = [
            column(
                x.reshape(-1, J, *x.shape[1:])[:, j],
                train=True,
                key=keys[j],
                dropout_rate=dropout_rate,
            )
            for j, (column, x) in enumerate(seen)
        ]
        return scale_gradient(jnp.stack(logits, axis=1).reshape(B, -1), J)
