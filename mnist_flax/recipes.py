"""Recipes: everything that decides a run's bits, as frozen dataclasses, and the named ones."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx

from mnist_flax.augment import random_affine
from mnist_flax.checks import check_field_types
from mnist_flax.data import DatasetInfo
from mnist_flax.errors import InputError
from mnist_flax.model import CNN, CNNConfig, Columns
from mnist_flax.ops import REFERENCE, Ops
from mnist_flax.optimizer import OptimizerName, ScheduleName, make_optimizer, make_schedule
from mnist_flax.steps import Augment, Purpose, TrainState, View, create_state, draw_key

# What each schedule and optimizer reads beside the fields that all of them read.
SCHEDULE_FIELDS = {"constant": (), "exponential": ("decay",), "one_cycle": ("warmup",)}
SCHEDULE_FIELDS["cosine"] = ("warmup",)
OPTIMIZER_FIELDS = {
    "sgd": ("momentum",),
    "adamw": (),
    "muon": ("momentum", "ns_steps", "adam_ratio"),
}


def _require(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raises InputError unless `value` is in [low, high), or in (low, high) where `open_low`."""
    above = value > low if open_low else value >= low
    if not (above and value < high):  # NaN fails both
        raise InputError(
            f"{name} is {value}; give a number in {'(' if open_low else '['}{low}, {high})"
        )


def _require_fields(kind: str, name: str, config: Any, fields: dict[str, tuple[str, ...]]) -> None:
    """Raises InputError unless `config` sets exactly the optional fields that `name` reads."""
    if name not in fields:
        raise InputError(f"{kind} {name!r} is unknown; choose from {', '.join(fields)}")
    for field in sorted(set().union(*fields.values())):
        value = getattr(config, field)
        if field in fields[name] and value is None:
            raise InputError(f"{kind}.{field} is None, but {kind} {name!r} needs it; give a number")
        if field not in fields[name] and value is not None:
            raise InputError(
                f"{kind}.{field} is {value}, but {kind} {name!r} never reads it; give None"
            )


@dataclasses.dataclass(frozen=True)
class AffineConfig:
    """Ranges of the random affine augmentation; all 0 trains on the images as they are.

    Attributes:
      rotate: largest rotation in degrees, either way, in [0, 180).
      shift: largest shift as a fraction of the height and of the width, in [0, 1).
      zoom: largest change of scale, x and y apart, as a fraction, in [0, 1).
      shear: largest shear angle in degrees, either way, in [0, 90).
    """

    rotate: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0

    def __post_init__(self):
        check_field_types(self, prefix="augment.")
        _require("augment.rotate", self.rotate, 0, 180)
        _require("augment.shift", self.shift, 0, 1)
        _require("augment.zoom", self.zoom, 0, 1)
        _require("augment.shear", self.shear, 0, 90)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer.

    Attributes:
      name: "sgd", "adamw" or "muon".
      learning_rate: the schedule's peak, above 0.
      momentum: of sgd and muon, in [0, 1); None for adamw.
      nesterov: whether the momentum of sgd and muon is Nesterov's.
      ns_steps: Newton-Schulz iterations of muon, at least 1; None for sgd and adamw.
      adam_ratio: Adam's learning rate as a fraction of Muon's, for what Muon leaves to it; None for
        sgd and adamw.
      weight_decay: decoupled, of kernels: the fraction that a step at learning rate 1 takes away.
    """

    name: OptimizerName = "sgd"
    learning_rate: float = 0.01
    momentum: float | None = 0.9
    nesterov: bool = True
    ns_steps: int | None = None
    adam_ratio: float | None = None
    weight_decay: float = 0.0

    def __post_init__(self):
        check_field_types(self, prefix="optimizer.")
        _require_fields("optimizer", self.name, self, OPTIMIZER_FIELDS)
        _require("optimizer.learning_rate", self.learning_rate, 0, math.inf, open_low=True)
        _require("optimizer.weight_decay", self.weight_decay, 0, math.inf)
        if self.momentum is not None:
            _require("optimizer.momentum", self.momentum, 0, 1)
        if self.ns_steps is not None:
            _require("optimizer.ns_steps", self.ns_steps, 1, math.inf)
        if self.adam_ratio is not None:
            _require("optimizer.adam_ratio", self.adam_ratio, 0, math.inf)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate as a function of the step.

    Attributes:
      name: "constant", "exponential", "one_cycle" or "cosine".
      decay: the factor an epoch, for exponential, in (0, 1); None otherwise.
      warmup: the fraction of the run in which one_cycle and cosine rise, in [0, 1); None otherwise.
    """

    name: ScheduleName = "constant"
    decay: float | None = None
    warmup: float | None = None

    def __post_init__(self):
        check_field_types(self, prefix="schedule.")
        _require_fields("schedule", self.name, self, SCHEDULE_FIELDS)
        if self.decay is not None:
            _require("schedule.decay", self.decay, 0, 1, open_low=True)
        if self.warmup is not None:
            _require("schedule.warmup", self.warmup, 0, 1)


@dataclasses.dataclass(frozen=True)
class PlateauConfig:
    """Lowering the learning rate when the validation loss stops falling.

    Attributes:
      patience: epochs without improvement before the rate is lowered; None never lowers it.
      factor: what the rate is multiplied by, in (0, 1).
      min_delta: smallest improvement that counts, as a fraction of the best loss, in (0, 1).
      min_scale: the product of all factors never falls below this, in [0, 1).
    """

    patience: int | None = None
    factor: float = 0.5
    min_delta: float = 1e-4
    min_scale: float = 0.0

    def __post_init__(self):
        check_field_types(self, prefix="plateau.")
        if self.patience is not None:
            _require("plateau.patience", self.patience, 1, math.inf)
        _require("plateau.factor", self.factor, 0, 1, open_low=True)
        _require("plateau.min_delta", self.min_delta, 0, 1, open_low=True)
        _require("plateau.min_scale", self.min_scale, 0, 1)


@dataclasses.dataclass(frozen=True)
class StoppingConfig:
    """Stopping when the validation loss stops falling.

    Attributes:
      patience: epochs without improvement after which to stop; None trains to the end.
      min_delta: smallest decrease of the loss, in nats, that counts, at least 0.
    """

    patience: int | None = None
    min_delta: float = 0.0

    def __post_init__(self):
        check_field_types(self, prefix="stopping.")
        if self.patience is not None:
            _require("stopping.patience", self.patience, 1, math.inf)
        _require("stopping.min_delta", self.min_delta, 0, math.inf)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's bits, beside versions and hardware.

    Attributes:
      dataset: TFDS's name of the dataset.
      val_size: training examples set aside for validation; 0 trains on all of them, for a fixed
        number of epochs, and keeps the last state instead of the best.
      split_seed: seed of the permutation that chooses them.
      seed: seed of initialization, order, augmentation and Dropout, in [0, 2**32).
      epochs: epochs to train, at most.
      batch_size: examples in a training step; a last partial batch is left out of its epoch.
      label_smoothing: the share of each target that is spread evenly over classes, in [0, 1).
      plain_share: the share of the steps of all `epochs`, the last ones, in which images are not
        augmented, in [0, 1): the network ends on images such as it will be tested on (He et al.
        2019, arXiv 1909.09148), unless it stops early. 0 where the augmentation's ranges are.
      model: the architecture.
      columns: further networks beside `model`, each of which trains on its own share of every
        batch; the probabilities of all are averaged (`mnist_flax.model.Columns`). On the command
        line they can be changed (`--columns.0.dropout`), not added.
      augment: the augmentation's ranges.
      optimizer: the optimizer.
      schedule: the learning rate's course.
      plateau: lowering the learning rate on the validation loss.
      stopping: early stopping on the validation loss.
    """

    dataset: str = "mnist"
    val_size: int = 5000
    split_seed: int = 0
    seed: int = 0
    epochs: int = 10
    batch_size: int = 128
    label_smoothing: float = 0.0
    plain_share: float = 0.0
    model: CNNConfig = CNNConfig()
    columns: tuple[CNNConfig, ...] = ()
    augment: AffineConfig = AffineConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    plateau: PlateauConfig = PlateauConfig()
    stopping: StoppingConfig = StoppingConfig()

    def __post_init__(self):
        check_field_types(self)
        _require("val_size", self.val_size, 0, math.inf)
        _require("split_seed", self.split_seed, 0, 2**32)
        _require("seed", self.seed, 0, 2**32)
        _require("epochs", self.epochs, 1, math.inf)
        _require("batch_size", self.batch_size, 1, math.inf)
        _require("label_smoothing", self.label_smoothing, 0, 1)
        _require("plain_share", self.plain_share, 0, 1)
        if self.plain_share and self.augment == AffineConfig():
            raise InputError(
                f"plain_share is {self.plain_share}, but images are never augmented; give 0"
            )
        if self.batch_size % (networks := 1 + len(self.columns)):
            raise InputError(
                f"batch_size is {self.batch_size}, which {networks} columns cannot share evenly; "
                "give a multiple"
            )
        for name, config in (("plateau", self.plateau), ("stopping", self.stopping)):
            if config.patience is not None and self.val_size == 0:
                raise InputError(
                    f"{name}.patience is {config.patience}, but val_size is 0: there is no "
                    f"validation loss to watch; set val_size above 0 or {name}.patience to None"
                )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe as nested JSON values (tuples become lists)."""
    return _lists(dataclasses.asdict(recipe))


def from_dict(values: dict[str, Any]) -> Recipe:
    """Rebuilds a recipe from `to_dict`'s result.

    Raises:
      InputError: a field is unknown or impossible, or of another type.
    """
    return _build(Recipe, values)


# Fields that recipes of earlier versions lack, and what those did.
_ADDED = {"plain_share": 0.0, "columns": []}


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns a "field: old -> new" for each field in which two recipes' dicts differ."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = (table.get(name, _ADDED.get(name)) for table in (old, new))
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {before} -> {after}")
    return lines


def get_field(recipe: Recipe, name: str) -> Any:
    """Returns the value of a field named with dots, which must exist."""
    return functools.reduce(getattr, name.split("."), recipe)


def with_fields(recipe: Recipe, values: Mapping[str, float]) -> Recipe:
    """Returns the recipe with some of its numbers changed, named with dots.

    Raises:
      InputError: there is no such number, or it cannot have the value.
    """
    tables = to_dict(recipe)
    for name, value in values.items():
        *path, last = name.split(".")
        table: Any = tables
        for part in path:
            table = table.get(part) if isinstance(table, dict) else None
        old = table.get(last) if isinstance(table, dict) else None
        if isinstance(old, bool) or not isinstance(old, int | float):
            raise InputError(f"the recipe has no number {name!r}")
        if isinstance(old, int) and not float(value).is_integer():
            raise InputError(f"{name} is {value}; it is a whole number")
        table[last] = int(value) if isinstance(old, int) else float(value)
    return from_dict(tables)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lists(entry) for name, entry in value.items()}
    return [_lists(entry) for entry in value] if isinstance(value, tuple) else value


def _build(cls: type, values: Any) -> Any:
    hints = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        raise InputError(f"the recipe's {cls.__name__} is {values!r}, not a table of fields")
    if unknown := sorted(values.keys() - hints.keys()):
        raise InputError(f"the recipe's {cls.__name__} has unknown fields: {', '.join(unknown)}")
    fields = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = _build(hints[name], value)
        elif hints[name] == tuple[CNNConfig, ...] and isinstance(value, list):
            value = [_build(CNNConfig, entry) for entry in value]
        fields[name] = tuple(value) if isinstance(value, list) else value
    return cls(**fields)


# The numbers that may be traced instead of the recipe's own, by their dotted names: what
# `train_step` and the optimizer only compute with. `Traced` maps some of them to scalars.
TRACEABLE = (
    "label_smoothing",
    "model.dropout",
    *(f"augment.{field.name}" for field in dataclasses.fields(AffineConfig)),
    "optimizer.learning_rate",
    "optimizer.adam_ratio",
    "optimizer.weight_decay",
)
Traced = Mapping[str, jax.Array]
NOTHING: Traced = types.MappingProxyType({})


def traceable(recipe: Recipe) -> tuple[str, ...]:
    """Returns those of `TRACEABLE` that can be traced for this recipe.

    A traced Dropout rate would be every column's, and the recipe's is the first one's alone.
    """
    return tuple(name for name in TRACEABLE if not (recipe.columns and name == "model.dropout"))


def replica_recipes(
    recipe: Recipe, *, seeds: Sequence[int], vary: Mapping[str, Sequence[float]]
) -> tuple[Recipe, ...]:
    """Returns each replica's own recipe.

    Raises:
      InputError: there is no seed; a varied field is not `traceable`, or has not one value a seed,
        or cannot have a value.
    """
    if not len(seeds):
        raise InputError("seeds is empty; give one per replica")
    for name, values in vary.items():
        if name not in TRACEABLE:
            raise InputError(
                f"{name!r} cannot differ by replica; choose from {', '.join(TRACEABLE)}"
            )
        if name not in traceable(recipe):
            raise InputError(f"{name} is one column's; it cannot differ by replica beside others")
        if len(values) != len(seeds):
            raise InputError(f"vary {name} has {len(values)} values for {len(seeds)} seeds")
    return tuple(
        with_fields(recipe, {"seed": seed, **{name: vary[name][i] for name in vary}})
        for i, seed in enumerate(seeds)
    )


def make_augment(recipe: Recipe, *, traced: Traced = NOTHING) -> Augment | None:
    """Returns `augment(key, images_BHWC)` for `train_step`, or None where every range is 0."""
    own = dataclasses.asdict(recipe.augment)
    varied = {name: traced[f"augment.{name}"] for name in own if f"augment.{name}" in traced}
    if varied:
        return functools.partial(random_affine, **own | varied)
    return _affine(recipe.augment) if any(own.values()) else None


@functools.cache
def _affine(config: AffineConfig) -> Augment:
    """Returns one function for one configuration: `jax.jit` compiles anew for another object."""
    return functools.partial(random_affine, **dataclasses.asdict(config))


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


def step_options(
    recipe: Recipe, *, steps_per_epoch: int, traced: Traced = NOTHING
) -> dict[str, Any]:
    """Returns `train_step`'s options."""
    augmented = round((1 - recipe.plain_share) * recipe.epochs * steps_per_epoch)
    return {
        "augment": make_augment(recipe, traced=traced),
        "augment_steps": augmented if recipe.plain_share else None,
        "label_smoothing": traced.get("label_smoothing", recipe.label_smoothing),
        "dropout_rate": traced.get("model.dropout"),
    }


def recipe_schedule(
    recipe: Recipe, *, steps_per_epoch: int, traced: Traced = NOTHING
) -> optax.Schedule:
    """Returns the recipe's learning rate as a function of the step."""
    return make_schedule(
        recipe.schedule.name,
        peak=traced.get("optimizer.learning_rate", recipe.optimizer.learning_rate),
        steps_per_epoch=steps_per_epoch,
        epochs=recipe.epochs,
        decay=recipe.schedule.decay or 1.0,
        warmup=recipe.schedule.warmup or 0.0,
    )


def without_seed(recipe: Recipe) -> Recipe:
    """Returns the recipe with the seed 0: what runs from all seeds have in common."""
    return dataclasses.replace(recipe, seed=0)


def recipe_optimizer(
    recipe: Recipe, *, steps_per_epoch: int, traced: Traced = NOTHING
) -> optax.GradientTransformation:
    """Returns the recipe's optimizer, its schedule included.

    Without `traced` it is one object for all runs of a recipe, whose states are then of one form:
    optimizers are functions, no two of them equal, and a static part of the state.
    """
    if not traced:
        return _one_optimizer(without_seed(recipe), steps_per_epoch)
    return _new_optimizer(recipe, steps_per_epoch, traced)


@functools.lru_cache(maxsize=64)
def _one_optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    return _new_optimizer(recipe, steps_per_epoch, NOTHING)


def _new_optimizer(
    recipe: Recipe, steps_per_epoch: int, traced: Traced
) -> optax.GradientTransformation:
    return make_optimizer(
        recipe.optimizer.name,
        learning_rate=recipe_schedule(recipe, steps_per_epoch=steps_per_epoch, traced=traced),
        weight_decay=traced.get("optimizer.weight_decay", recipe.optimizer.weight_decay),
        momentum=recipe.optimizer.momentum or 0.0,
        nesterov=recipe.optimizer.nesterov,
        ns_steps=recipe.optimizer.ns_steps or 0,
        adam_ratio=traced.get("optimizer.adam_ratio", recipe.optimizer.adam_ratio or 0.0),
    )


def recipe_state(
    recipe: Recipe,
    info: DatasetInfo,
    *,
    steps_per_epoch: int,
    key: jax.Array | None = None,
    ops: Ops = REFERENCE,
) -> TrainState:
    """Returns the state at step 0. Traceable: it can be jitted, or shaped by `jax.eval_shape`.

    Args:
      recipe: the recipe.
      info: the dataset that it trains on.
      steps_per_epoch: steps in an epoch.
      key: the run's key; None takes that of the recipe's seed.
      ops: what its networks compute with: `ops.for_platform` of the devices that will.
    """
    key = jax.random.key(recipe.seed) if key is None else key

    def make_model(rngs: nnx.Rngs) -> nnx.Module:
        size = {"image_shape": info.image_shape, "num_classes": info.num_classes}
        networks = [
            CNN(config, **size, ops=ops, rngs=rngs) for config in (recipe.model, *recipe.columns)
        ]
        return Columns(networks) if recipe.columns else networks[0]

    return create_state(key, make_model, recipe_optimizer(recipe, steps_per_epoch=steps_per_epoch))


# The recipe of an older Keras notebook, and elsewhere called the notebook's: 915,146 parameters,
# plain SGD, five epochs.
SEED = Recipe(
    epochs=5,
    batch_size=64,
    model=CNNConfig(norm_momentum=0.99),
    augment=AffineConfig(rotate=10.0, shift=0.1, zoom=0.1),
    optimizer=OptimizerConfig("sgd", learning_rate=0.01, momentum=0.9, nesterov=False),
    schedule=ScheduleConfig("exponential", decay=0.9),
)

# Chosen on held-out training examples, then trained on all 60,000; README has what they reach.
# 72,058 parameters. Without padding the patches become 12 x 12 places, then 6, 4 and 2: of even
# sides, which Winograd's tiles fill. A network of 14, 7, 5 and 3 takes nearly twice as long.
QUICK = Recipe(
    val_size=0,
    epochs=1,
    batch_size=256,
    label_smoothing=0.1,
    model=CNNConfig(
        patch=2,
        widths=(24, 48, 128),
        padding=("VALID", "VALID", "VALID"),
        pool=(True, False, False),
        conv_bias=False,
        norm_momentum=0.9,
        hidden=(),
        dropout=0.0,
    ),
    optimizer=OptimizerConfig("muon", learning_rate=0.5, momentum=0.8, ns_steps=3, adam_ratio=0.05),
    schedule=ScheduleConfig("one_cycle", warmup=0.2),
)

# The same network, augmented.
FAST = dataclasses.replace(
    QUICK,
    epochs=3,
    plain_share=0.05,
    augment=AffineConfig(rotate=7.0, shift=0.03, zoom=0.06),
)

# 399,434 parameters. Slants and sizes that it need not learn are worth as much as more epochs.
# Larger batches, for Muon's products take as long for a small one.
STRONG = dataclasses.replace(
    QUICK,
    epochs=6,
    batch_size=512,
    plain_share=0.05,
    model=dataclasses.replace(
        QUICK.model,
        normalize=True,
        widths=(32, 64, 128, 256),
        padding=("VALID", "SAME", "VALID", "VALID"),
        pool=(True, False, False, False),
        dropout=0.4,
    ),
    augment=AffineConfig(rotate=5.0, shift=0.03, zoom=0.05, shear=5.0),
    optimizer=dataclasses.replace(QUICK.optimizer, learning_rate=0.4),
)

# 388,212 parameters: a network of the images as they are, in full resolution, beside one like that
# of `strong`. They err on different images. Each sees half of the images in an epoch.
ACCURATE = dataclasses.replace(
    STRONG,
    epochs=48,
    model=dataclasses.replace(
        STRONG.model,
        normalize=False,
        patch=1,
        widths=(32, 32, 32, 64, 64, 64, 128),
        padding=("VALID", "VALID", "SAME", "VALID", "VALID", "SAME", "VALID"),
        pool=(False, False, True, False, False, True, False),
    ),
    columns=(
        dataclasses.replace(
            STRONG.model, widths=(32, 64, 96, 128), padding=("SAME", "SAME", "VALID", "VALID")
        ),
    ),
    augment=AffineConfig(rotate=10.0, shift=0.06, zoom=0.09, shear=10.0),
)

# With validation and early stopping; 169,018 parameters. No label smoothing: the plain validation
# loss, which selects the epoch, would prefer an early one.
DEFAULT = dataclasses.replace(
    QUICK,
    val_size=5000,
    epochs=5,
    label_smoothing=0.0,
    model=dataclasses.replace(
        QUICK.model,
        widths=(24, 48, 96, 128),
        padding=("VALID", "SAME", "VALID", "VALID"),
        pool=(True, False, False, False),
    ),
    augment=AffineConfig(rotate=10.0, shift=0.05, zoom=0.1),
    optimizer=STRONG.optimizer,
    stopping=StoppingConfig(patience=2),
)

# The small ones were chosen on validation by one run or two of a candidate: experiments/RESULTS.md.
# 1,896 parameters. BatchNorm's scales would only cost some: the next convolution has its own.
# Slants and sizes that it need not learn leave more of them for digits.
TINY2K = dataclasses.replace(
    QUICK,
    epochs=60,
    batch_size=64,
    label_smoothing=0.0,
    model=dataclasses.replace(
        QUICK.model,
        normalize=True,
        patch=1,
        widths=(10, 14, 17, 18, 18),
        padding=("SAME", "VALID", "VALID", "VALID", "VALID"),
        pool=(True, False, False, False, False),
        separable=True,
        norm_scale=False,
        head="mean",
    ),
    optimizer=OptimizerConfig(
        "muon", learning_rate=1.0, momentum=0.8, ns_steps=5, adam_ratio=0.1, weight_decay=0.002
    ),
)

# 694 parameters. Kernels of six patterns, then of four, leave room for a few more channels.
TINY700 = dataclasses.replace(
    TINY2K,
    model=dataclasses.replace(TINY2K.model, widths=(8, 7, 10, 11, 10), patterns=(6, 4, 4, 4, 4)),
)

# 7,666 parameters. Enough to fit the training images: here augmentation pays.
TINY8K = dataclasses.replace(
    TINY2K,
    batch_size=128,
    model=dataclasses.replace(TINY2K.model, normalize=False, widths=(16, 32, 40, 44, 48)),
    augment=AffineConfig(rotate=8.0, shift=0.05, zoom=0.08),
)

RECIPES = {"seed": SEED, "default": DEFAULT, "quick": QUICK, "fast": FAST, "strong": STRONG}
RECIPES |= {"accurate": ACCURATE, "tiny700": TINY700, "tiny2k": TINY2K, "tiny8k": TINY8K}
