"""Learning-rate schedules and optimizers, a frozen dataclass each: optax's own parts, put together.

A schedule's `make(peak, *, steps_per_epoch, epochs)` returns the learning rate as a function of the
step; an optimizer's `make(learning_rate, **traced)` takes such a function. Whatever has the fields
and the `make` of one of these can stand in a recipe in its place.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mnist_flax.checks import check_field_types, check_range
from mnist_flax.errors import InputError

# The one-cycle schedule starts at this fraction of its peak.
START_FRACTION = 0.1


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same learning rate in every step."""

    def make(self, peak: float | jax.Array, *, steps_per_epoch: int, epochs: int) -> optax.Schedule:
        """Returns the learning rate as a function of the step."""
        return optax.constant_schedule(peak)


@dataclasses.dataclass(frozen=True)
class Staircase:
    """Piecewise constant: `peak * decay**epoch` in an epoch that is counted from 0.

    Attributes:
      decay: the factor per epoch, in (0, 1).
    """

    decay: float = 0.9

    def __post_init__(self):
        check_field_types(self, prefix="schedule.")
        check_range("schedule.decay", self.decay, 0, 1, open_low=True)

    def make(self, peak: float | jax.Array, *, steps_per_epoch: int, epochs: int) -> optax.Schedule:
        """Returns the learning rate as a function of the step."""
        return optax.exponential_decay(peak, steps_per_epoch, self.decay, staircase=True)


@dataclasses.dataclass(frozen=True)
class OneCycle:
    """Linear from a tenth of the peak up to it, then linear to 0 at the run's end.

    Smith and Topin (2018, arXiv 1708.07120), without the momentum's cycle.

    Attributes:
      warmup: the fraction of the run in which the rate rises, in [0, 1).
    """

    warmup: float = 0.2

    def __post_init__(self):
        check_field_types(self, prefix="schedule.")
        check_range("schedule.warmup", self.warmup, 0, 1)

    def make(self, peak: float | jax.Array, *, steps_per_epoch: int, epochs: int) -> optax.Schedule:
        """Returns the learning rate as a function of the step."""
        total = epochs * steps_per_epoch
        rising = min(round(self.warmup * total), total - 1)  # the fall takes a step at least
        rise = optax.linear_schedule(START_FRACTION * peak, peak, rising)
        fall = optax.linear_schedule(peak, 0.0, total - rising)
        return optax.join_schedules([rise, fall], [rising])


@dataclasses.dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum.

    Attributes:
      learning_rate: the schedule's peak, above 0.
      momentum: in [0, 1).
      nesterov: whether the momentum is Nesterov's.
      weight_decay: decoupled, of kernels: the fraction that a step at learning rate 1 takes away.
    """

    learning_rate: float = 0.01
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0

    def __post_init__(self):
        check_optimizer(self)

    def make(
        self, learning_rate: optax.Schedule, *, weight_decay: float | jax.Array | None = None
    ) -> optax.GradientTransformation:
        """Returns the optimizer; `weight_decay` may be traced, instead of the field."""
        return optax.chain(
            optax.trace(self.momentum, nesterov=self.nesterov),
            optax.add_decayed_weights(_given(weight_decay, self.weight_decay), decayed),
            optax.scale_by_learning_rate(learning_rate),
        )


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Attributes:
      learning_rate: the schedule's peak, above 0.
      weight_decay: as in `SGD`.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self):
        check_optimizer(self)

    def make(
        self, learning_rate: optax.Schedule, *, weight_decay: float | jax.Array | None = None
    ) -> optax.GradientTransformation:
        """Returns the optimizer; `weight_decay` may be traced, instead of the field."""
        decay = _given(weight_decay, self.weight_decay)
        return optax.adamw(learning_rate, weight_decay=decay, mask=decayed)


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al. 2024), and Adam for biases, BatchNorm and the classifier.

    Attributes:
      learning_rate: the schedule's peak, above 0.
      momentum: in [0, 1).
      nesterov: whether the momentum is Nesterov's.
      ns_steps: Newton-Schulz iterations that make an update nearly orthogonal, at least 1.
      adam_ratio: Adam's learning rate as a fraction of Muon's, at least 0.
      weight_decay: as in `SGD`, of what Muon updates.
      classifier: the name of the model's last layer, which Adam updates; None for a model that
        has none of its own.
    """

    learning_rate: float = 0.5
    momentum: float = 0.8
    nesterov: bool = True
    ns_steps: int = 3
    adam_ratio: float = 0.05
    weight_decay: float = 0.0
    classifier: str | None = "head"

    def __post_init__(self):
        check_optimizer(self)
        check_range("optimizer.ns_steps", self.ns_steps, 1, math.inf)
        check_range("optimizer.adam_ratio", self.adam_ratio, 0, math.inf)

    def make(
        self,
        learning_rate: optax.Schedule,
        *,
        adam_ratio: float | jax.Array | None = None,
        weight_decay: float | jax.Array | None = None,
    ) -> optax.GradientTransformation:
        """Returns the optimizer; what may be traced stands instead of the field.

        Its `init` raises InputError where no layer has the classifier's name.
        """
        ratio = _given(adam_ratio, self.adam_ratio)
        muon = optax.contrib.muon(
            learning_rate,
            beta=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            weight_decay=_given(weight_decay, self.weight_decay),
            adam_learning_rate=lambda step: ratio * jnp.asarray(learning_rate(step)),
            muon_weight_dimension_numbers=functools.partial(
                muon_dimensions, classifier=self.classifier
            ),
        )
        return with_classifier(optax.with_extra_args_support(muon), name=self.classifier)


def check_optimizer(optimizer: SGD | AdamW | Muon) -> None:
    """Checks the fields that optimizers share.

    Raises:
      InputError: one is of another type, or cannot have its value.
    """
    check_field_types(optimizer, prefix="optimizer.")
    rate, decay = optimizer.learning_rate, optimizer.weight_decay
    check_range("optimizer.learning_rate", rate, 0, math.inf, open_low=True)
    check_range("optimizer.weight_decay", decay, 0, math.inf)
    if not isinstance(optimizer, AdamW):
        check_range("optimizer.momentum", optimizer.momentum, 0, 1)


def _given(traced: Any, own: float) -> Any:
    return own if traced is None else traced


# Names of parameters that are no kernels, of however many axes: attention's biases have two, and
# those of stacked states one more than their layer's.
NOT_KERNELS = ("bias", "scale")


def is_kernel(path: Sequence[Any], param: jax.Array) -> bool:
    """Returns whether the parameter at `path` is a kernel, and not a bias or BatchNorm's scale."""
    return param.ndim > 1 and _names(path)[-1] not in NOT_KERNELS


def _names(path: Sequence[Any]) -> list[Any]:
    return [getattr(part, "key", getattr(part, "name", None)) for part in path]


def decayed(params: optax.Params) -> optax.Params:
    """Marks what weight decay applies to: kernels, not biases or BatchNorm's scales."""
    return jax.tree.map_with_path(is_kernel, params)


def is_classifier(path: Sequence[Any], param: jax.Array, *, name: str | None) -> bool:
    """Returns whether the parameter at `path` is the kernel of the layer of that name."""
    return is_kernel(path, param) and name in _names(path)[-2:]


def muon_dimensions(params: optax.Params, *, classifier: str | None = "head") -> optax.Params:
    """Marks what Muon updates, and how it sees a matrix in it.

    Every kernel but the classifier's, as [inputs, outputs]; Adam updates the rest, as Muon's
    author advises (https://kellerjordan.github.io/posts/muon/).

    Args:
      params: the parameters of one network; of stacked ones under `jax.vmap`.
      classifier: the name of the last layer, as the model's attribute; None for a model without.
    """

    def dimensions(path, param):
        if not is_kernel(path, param) or is_classifier(path, param, name=classifier):
            return None
        inputs = tuple(range(param.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(inputs, param.ndim - 1)

    return jax.tree.map_with_path(dimensions, params)


def with_classifier(
    optimizer: optax.GradientTransformationExtraArgs, *, name: str | None
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer, whose `init` raises InputError where no layer has that name."""

    def init(params):
        is_it = functools.partial(is_classifier, name=name)
        if name is not None and not any(jax.tree.leaves(jax.tree.map_with_path(is_it, params))):
            raise InputError(
                f"muon leaves the classifier to Adam, but no layer is named {name!r}; give the "
                "last one's name as classifier"
            )
        return optimizer.init(params)

    return optax.GradientTransformationExtraArgs(init, optimizer.update)
