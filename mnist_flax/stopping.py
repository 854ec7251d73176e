"""Early stopping as a value: each observed loss gives the next one."""

from __future__ import annotations

import dataclasses
import math

from mnist_flax.errors import InputError


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """The best loss so far, and for how many epochs nothing better was seen.

    An epoch improves when its loss is below `best - min_delta`. A loss of NaN never improves and
    never becomes the best.

    Attributes:
      patience: epochs without improvement after which to stop, at least 1; None never stops.
      min_delta: smallest decrease that counts, at least 0, in the loss's unit.
      best: the lowest loss that counted; infinity before the first.
      best_epoch: the epoch of `best`; None before the first.
      waited: epochs since `best_epoch`.
    """

    patience: int | None = None
    min_delta: float = 0.0
    best: float = math.inf
    best_epoch: int | None = None
    waited: int = 0

    def __post_init__(self):
        if self.patience is not None and self.patience < 1:
            raise InputError(f"stopping patience is {self.patience}; give at least 1, or None")
        if not (self.min_delta >= 0 and math.isfinite(self.min_delta)):
            raise InputError(f"stopping min_delta is {self.min_delta}; give a number of at least 0")

    def update(self, loss: float, *, epoch: int) -> EarlyStopping:
        """Returns the state after an epoch whose validation loss was `loss`."""
        if loss < self.best - self.min_delta:
            return dataclasses.replace(self, best=float(loss), best_epoch=epoch, waited=0)
        return dataclasses.replace(self, waited=self.waited + 1)

    @property
    def should_stop(self) -> bool:
        """Whether `patience` epochs have passed without improvement."""
        return self.patience is not None and self.waited >= self.patience
