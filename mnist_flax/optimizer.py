"""Learning-rate schedules and the optimizer: optax's own parts, put together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from mnist_flax.errors import InputError

ScheduleName = Literal["constant", "exponential", "one_cycle", "cosine"]
OptimizerName = Literal["sgd", "adamw", "muon"]

# One-cycle and cosine start at this fraction of their peak.
START_FRACTION = 0.1


def make_schedule(
    name: ScheduleName,
    *,
    peak: float | jax.Array,
    steps_per_epoch: int,
    epochs: int,
    decay: float = 1.0,
    warmup: float = 0.0,
) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Args:
      name: "constant"; "exponential": `peak * decay**epoch`, constant within an epoch;
        "one_cycle": linear from a tenth of the peak up to it, then linear to 0; "cosine": the same
        rise, then half a cosine to 0.
      peak: the highest learning rate.
      steps_per_epoch: steps in an epoch.
      epochs: epochs in the run; one-cycle and cosine reach 0 at their end.
      decay: the factor an epoch, for "exponential".
      warmup: the rise's fraction of the run, in [0, 1), for "one_cycle" and "cosine".
    """
    total = epochs * steps_per_epoch
    rising = min(round(warmup * total), total - 1)  # the fall takes a step at least
    match name:
        case "constant":
            return optax.constant_schedule(peak)
        case "exponential":
            return optax.exponential_decay(peak, steps_per_epoch, decay, staircase=True)
        case "one_cycle":
            fall = optax.linear_schedule(peak, 0.0, total - rising)
        case "cosine":
            fall = optax.cosine_decay_schedule(peak, total - rising)
        case _:
            raise ValueError(f"unknown schedule {name!r}")
    rise = optax.linear_schedule(START_FRACTION * peak, peak, rising)
    return optax.join_schedules([rise, fall], [rising])


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


def make_optimizer(
    name: OptimizerName,
    *,
    learning_rate: optax.Schedule,
    weight_decay: float | jax.Array = 0.0,
    momentum: float = 0.0,
    nesterov: bool = True,
    ns_steps: int = 5,
    adam_ratio: float | jax.Array = 1.0,
    classifier: str | None = "head",
) -> optax.GradientTransformation:
    """Returns the optimizer; weight decay is decoupled and spares biases and BatchNorm.

    Args:
      name: "sgd", "adamw" or "muon".
      learning_rate: the learning rate as a function of the step.
      weight_decay: the fraction of a kernel that a step at learning rate 1 takes away.
      momentum: of "sgd" and "muon", in [0, 1).
      nesterov: whether the momentum of "sgd" and "muon" is Nesterov's.
      ns_steps: Newton-Schulz iterations with which "muon" makes an update nearly orthogonal.
      adam_ratio: Adam's learning rate as a fraction of Muon's, for what "muon" leaves to it:
        biases, BatchNorm and the classifier, none of which is decayed.
      classifier: the name of the last layer, for "muon": as in `muon_dimensions`.

    Returns:
      The optimizer. That of "muon" raises InputError in `init` where no layer has that name.
    """
    match name:
        case "sgd":
            return optax.chain(
                optax.trace(momentum, nesterov=nesterov),
                optax.add_decayed_weights(weight_decay, decayed),
                optax.scale_by_learning_rate(learning_rate),
            )
        case "adamw":
            return optax.adamw(learning_rate, weight_decay=weight_decay, mask=decayed)
        case "muon":
            muon = optax.contrib.muon(
                learning_rate,
                beta=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                weight_decay=weight_decay,
                adam_learning_rate=lambda step: adam_ratio * jnp.asarray(learning_rate(step)),
                muon_weight_dimension_numbers=functools.partial(
                    muon_dimensions, classifier=classifier
                ),
            )
            return with_classifier(optax.with_extra_args_support(muon), name=classifier)
        case _:
            raise ValueError(f"unknown optimizer {name!r}")
