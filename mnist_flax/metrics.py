"""Loss and accuracy as sums and a count: merged by addition, divided once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

PADDING = -1  # the label of what fills up the last batch of an evaluation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Sums over examples. A pytree; `merge` is associative up to float32 rounding.

    Attributes:
      loss_sum: sum of the examples' losses in nats, float32 [].
      correct: number of examples whose largest logit is the label's, int32 [].
      count: number of examples, int32 [].
    """

    loss_sum: jax.Array
    correct: jax.Array
    count: jax.Array

    @classmethod
    def zero(cls) -> Metrics:
        """Returns the metrics of no examples."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    @classmethod
    def of_batch(
        cls, *, losses_B: jax.Array, logits_BK: jax.Array, labels_B: jax.Array | np.ndarray
    ) -> Metrics:
        """Sums over a batch; an example whose label is -1 is padding and counts for nothing."""
        real_B = labels_B != PADDING
        hits_B = (jnp.argmax(logits_BK, axis=-1) == labels_B) & real_B
        return cls(
            loss_sum=jnp.sum(jnp.where(real_B, losses_B, 0)).astype(jnp.float32),
            correct=jnp.sum(hits_B, dtype=jnp.int32),
            count=jnp.sum(real_B, dtype=jnp.int32),
        )

    def merge(self, other: Metrics) -> Metrics:
        """Returns the metrics of both sets of examples together."""
        return jax.tree.map(jnp.add, self, other)

    @property
    def loss(self) -> jax.Array:
        """Mean loss in nats; NaN for no examples."""
        return self.loss_sum / self.count

    @property
    def accuracy(self) -> jax.Array:
        """Fraction of correct examples in [0, 1]; NaN for no examples."""
        return self.correct / self.count
