"""Recipes: everything that decides a run's bits, as frozen dataclasses, and what they stand for."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx

from mnist_flax.augment import random_changes
from mnist_flax.checks import check_field_types, check_range
from mnist_flax.data import DatasetInfo
from mnist_flax.errors import InputError
from mnist_flax.model import CNNConfig
from mnist_flax.ops import REFERENCE, Ops
from mnist_flax.optimizer import SGD, Constant
from mnist_flax.steps import Augment, TrainState, create_state, use_ops
from mnist_flax.stopping import EarlyStopping
from mnist_flax.weights import taken_over


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """The augmentation (`mnist_flax.augment`); by default the images are trained on as they are.

    Attributes:
      rotate: largest rotation in degrees, either way, in [0, 180).
      shift: largest shift as a fraction of the height and of the width, in [0, 1).
      zoom: largest change of scale, x and y apart, as a fraction, in [0, 1).
      shear: largest shear angle in degrees, either way, in [0, 90).
      flip: whether images are mirrored, each with an even chance.
      crop: pixels of padding of a random crop, at least 0.
      erase: how likely it is that a rectangle is blanked out, in [0, 1).
    """

    rotate: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    flip: bool = False
    crop: int = 0
    erase: float = 0.0

    def __post_init__(self):
        check_field_types(self, prefix="augment.")
        check_range("augment.rotate", self.rotate, 0, 180)
        check_range("augment.shift", self.shift, 0, 1)
        check_range("augment.zoom", self.zoom, 0, 1)
        check_range("augment.shear", self.shear, 0, 90)
        check_range("augment.crop", self.crop, 0, math.inf)
        check_range("augment.erase", self.erase, 0, 1)


@dataclasses.dataclass(frozen=True)
class PlateauConfig:
    """Lowering the learning rate when the validation loss stops falling.

    Attributes:
      patience: epochs without improvement before the rate is lowered, at least 1.
      factor: what the rate is multiplied by, in (0, 1).
      min_delta: smallest improvement that counts, as a fraction of the best loss, in (0, 1).
      min_scale: the product of all factors never falls below this, in [0, 1).
    """

    patience: int = 1
    factor: float = 0.5
    min_delta: float = 1e-4
    min_scale: float = 0.0

    def __post_init__(self):
        check_field_types(self, prefix="plateau.")
        check_range("plateau.patience", self.patience, 1, math.inf)
        check_range("plateau.factor", self.factor, 0, 1, open_low=True)
        check_range("plateau.min_delta", self.min_delta, 0, 1, open_low=True)
        check_range("plateau.min_scale", self.min_scale, 0, 1)


@dataclasses.dataclass(frozen=True)
class StoppingConfig:
    """Stopping when the validation loss stops falling.

    Attributes:
      patience: epochs without improvement after which to stop, at least 1.
      min_delta: smallest decrease of the loss, in nats, that counts, at least 0.
    """

    patience: int = 2
    min_delta: float = 0.0

    def __post_init__(self):
        check_field_types(self, prefix="stopping.")
        check_range("stopping.patience", self.patience, 1, math.inf)
        check_range("stopping.min_delta", self.min_delta, 0, math.inf)


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
      balance: whether classes are equally frequent in an epoch (`data.balanced_weights`): examples
        of rare ones are repeated, and of others some are left out.
      accumulate: steps whose gradients are averaged into one update of the optimizer; the learning
        rate is that of the first of them, and an epoch need not be a multiple of them.
      freeze: names of layers, such as "convs" and "norms" of a `CNN`, that stay exactly as they are
        (`train_step`); of use with weights to start from.
      no_augment_fraction: the share of the steps of all `epochs`, the last ones, in which images
        are not augmented, in [0, 1): the network ends on images such as it will be tested on (He et
        al. 2019, arXiv 1909.09148), unless it stops early. 0 where nothing is augmented.
      model: the architecture: any frozen dataclass with `make(info, *, rngs) -> nnx.Module`, such
        as `CNNConfig`. One that has a `batch_multiple` takes batches of its multiples.
      augment: the augmentation's ranges.
      loss: `loss(logits_BK, batch) -> losses_B` instead of the cross-entropy in training: a frozen
        dataclass that can be called. None for the cross-entropy, which validation always has.
      optimizer: the optimizer: any frozen dataclass with the fields and the `make` of one of
        `mnist_flax.optimizer`.
      schedule: the learning rate's course, likewise.
      plateau: lowering the learning rate on the validation loss; None never does.
      stopping: early stopping on the validation loss; None trains to the end.
    """

    dataset: str = "mnist"
    val_size: int = 5000
    split_seed: int = 0
    seed: int = 0
    epochs: int = 10
    batch_size: int = 128
    label_smoothing: float = 0.0
    balance: bool = False
    accumulate: int = 1
    freeze: tuple[str, ...] = ()
    no_augment_fraction: float = 0.0
    model: Any = CNNConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: Any = None
    optimizer: Any = SGD()
    schedule: Any = Constant()
    plateau: PlateauConfig | None = None
    stopping: StoppingConfig | None = None

    def __post_init__(self):
        check_field_types(self)
        check_range("val_size", self.val_size, 0, math.inf)
        check_range("split_seed", self.split_seed, 0, 2**32)
        check_range("seed", self.seed, 0, 2**32)
        check_range("epochs", self.epochs, 1, math.inf)
        check_range("batch_size", self.batch_size, 1, math.inf)
        check_range("label_smoothing", self.label_smoothing, 0, 1)
        check_range("accumulate", self.accumulate, 1, math.inf)
        check_range("no_augment_fraction", self.no_augment_fraction, 0, 1)
        if self.no_augment_fraction and self.augment == AugmentConfig():
            raise InputError(
                f"no_augment_fraction is {self.no_augment_fraction}, but images are never "
                "augmented; give 0"
            )
        for name in ("model", "optimizer", "schedule"):
            config = getattr(self, name)
            if not (dataclasses.is_dataclass(config) and hasattr(config, "make")):
                raise InputError(f"{name} is {config!r}; give a frozen dataclass with a make")
        if self.loss is not None:
            self._check_loss()
        if self.batch_size % (multiple := getattr(self.model, "batch_multiple", 1)):
            raise InputError(
                f"batch_size is {self.batch_size}, which {multiple} columns cannot share evenly; "
                "give a multiple"
            )
        for name in ("plateau", "stopping"):
            if getattr(self, name) is not None and self.val_size == 0:
                raise InputError(
                    f"{name} is set, but val_size is 0: there is no validation loss to watch; set "
                    f"val_size above 0 or {name} to None"
                )

    def steps_per_epoch(self, num_examples: int) -> int:
        """Returns the steps in an epoch of so many training examples."""
        return num_examples // self.batch_size

    def _check_loss(self) -> None:
        if not (dataclasses.is_dataclass(self.loss) and callable(self.loss)):
            raise InputError(f"loss is {self.loss!r}; give a frozen dataclass that can be called")
        if self.label_smoothing:
            raise InputError(
                f"label_smoothing is {self.label_smoothing}, but the recipe has a loss of its own, "
                "which never reads it; give 0"
            )


# The package's own models, optimizers and schedules by the names that a recipe's JSON and the
# command line have for them. Another one's is "module:Class".
KINDS: dict[str, dict[str, str]] = {
    "loss": {},
    "model": {
        "cnn": "mnist_flax.model:CNNConfig",
        "separable": "mnist_flax.models.separable:SeparableConfig",
        "columns": "mnist_flax.models.columns:ColumnsConfig",
    },
    "optimizer": {
        "sgd": "mnist_flax.optimizer:SGD",
        "adamw": "mnist_flax.optimizer:AdamW",
        "muon": "mnist_flax.optimizer:Muon",
    },
    "schedule": {
        "constant": "mnist_flax.optimizer:Constant",
        "staircase": "mnist_flax.optimizer:Staircase",
        "one_cycle": "mnist_flax.optimizer:OneCycle",
    },
}


def run_file(path: Path) -> types.ModuleType:
    """Runs a Python file as a module, whose name is its absolute path.

    So what is defined in it has a kind that can be found again: "/path/to/file.py:Class".
    """
    name = str(path.absolute())
    spec: Any = importlib.util.spec_from_file_location(name, name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def kind_class(name: str, kind: str) -> type:
    """Returns the dataclass of a kind of what the recipe's field `name` holds.

    Raises:
      InputError: there is none.
    """
    module, _, path = KINDS[name].get(kind, str(kind)).rpartition(":")
    try:
        is_new_file = module.endswith(".py") and module not in sys.modules
        own = run_file(Path(module)) if is_new_file else importlib.import_module(module)
        found: Any = functools.reduce(getattr, path.split("."), own)
    except (ImportError, AttributeError, ValueError, OSError):
        found = None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise InputError(
            f"{name} {kind!r} is unknown; choose from {', '.join(KINDS[name])}, or give a frozen "
            "dataclass as module:Class or path/to/file.py:Class"
        )
    return found


def kind_of(name: str, cls: type) -> str:
    """Returns the kind whose `kind_class` is `cls`."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    return next((kind for kind, own in KINDS[name].items() if own == path), path)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe as nested JSON values: tuples become lists, kinds have their names."""
    return _values(recipe, "")


def _values(value: Any, name: str) -> Any:
    """Returns a field's value as JSON's; what a model is made of are models, too."""
    if isinstance(value, tuple):
        return [_values(entry, name) for entry in value]
    if not dataclasses.is_dataclass(value):
        return value
    table = {"kind": kind_of(name, type(value))} if name in KINDS else {}
    for field in dataclasses.fields(value):
        table[field.name] = _values(getattr(value, field.name), name or field.name)
    return table


def from_dict(values: dict[str, Any]) -> Recipe:
    """Rebuilds a recipe from `to_dict`'s result.

    Raises:
      InputError: a field or a kind is unknown or impossible, or a field is of another type.
    """
    return _build(Recipe, values, "")


def _build(cls: type, values: Any, name: str) -> Any:
    """Returns a dataclass from its JSON values, a part of the recipe's field `name`."""
    if not isinstance(values, dict):
        raise InputError(f"the recipe's {name or 'table'} is {values!r}, not a table of fields")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(values.keys() - hints.keys()):
        raise InputError(
            f"the recipe's {cls.__name__} has unknown fields: {', '.join(unknown)}; if another "
            "version of mnist_flax wrote it, use that one"
        )
    fields = {field: _entry(value, name or field, hints[field]) for field, value in values.items()}
    return cls(**fields)


def _entry(value: Any, name: str, hint: Any) -> Any:
    """Returns a field's value from JSON's."""
    if isinstance(value, list):
        return tuple(_entry(entry, name, Any) for entry in value)
    if not isinstance(value, dict):
        return value
    if name in KINDS:
        kind = value.get("kind", "none")
        own = {field: entry for field, entry in value.items() if field != "kind"}
        return _build(kind_class(name, kind), own, name)
    classes = [cls for cls in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(cls)]
    return _build(classes[0], value, name) if classes else value  # type: ignore


def completed(trained: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe's or a study's dict with the fields that it is too old to have.

    What it did without them is what their defaults do.
    """
    if "seeds" in trained:
        return trained | {"recipe": completed(trained["recipe"])}
    try:
        return to_dict(from_dict(trained))
    except InputError:  # of another version altogether: what differs is named
        return trained


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns a "field: old -> new" for each field in which two recipes' dicts differ."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
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


# The numbers that may be traced instead of the recipe's own, by their dotted names: what
# `train_step` and the optimizer only compute with. `Traced` maps some of them to scalars.
TRACEABLE = (
    "label_smoothing",
    "model.dropout",
    *(f"augment.{name}" for name in ("rotate", "shift", "zoom", "shear", "erase")),
    "optimizer.learning_rate",
    "optimizer.adam_ratio",
    "optimizer.weight_decay",
)
Traced = Mapping[str, jax.Array]
NOTHING: Traced = types.MappingProxyType({})


def traceable(recipe: Recipe) -> tuple[str, ...]:
    """Returns those of `TRACEABLE` that can be traced for this recipe: those that it has."""
    sections = [(name, name.rpartition(".")[::2]) for name in TRACEABLE]
    return tuple(
        name
        for name, (section, field) in sections
        if hasattr(getattr(recipe, section) if section else recipe, field)
    )


def replica_recipes(
    recipe: Recipe, *, seeds: Sequence[int], vary: Mapping[str, Sequence[float]]
) -> tuple[Recipe, ...]:
    """Returns each replica's own recipe.

    Raises:
      InputError: there is no seed; a varied field is not `traceable`, lacks one value per seed, or
        cannot have a value.
    """
    if not len(seeds):
        raise InputError("seeds is empty; give one per replica")
    for name, values in vary.items():
        if name not in TRACEABLE:
            raise InputError(
                f"{name!r} cannot differ by replica; choose from {', '.join(TRACEABLE)}"
            )
        if len(values) != len(seeds):
            raise InputError(f"vary {name} has {len(values)} values for {len(seeds)} seeds")
    return tuple(
        with_fields(recipe, {"seed": seed, **{name: vary[name][i] for name in vary}})
        for i, seed in enumerate(seeds)
    )


def make_augment(recipe: Recipe, *, traced: Traced = NOTHING) -> Augment | None:
    """Returns `augment(key, images_BHWC)` for `train_step`, or None where nothing is changed."""
    own = dataclasses.asdict(recipe.augment)
    varied = {name: traced[f"augment.{name}"] for name in own if f"augment.{name}" in traced}
    if varied:
        return functools.partial(random_changes, **own | varied)
    return _changes(recipe.augment) if any(own.values()) else None


@functools.cache
def _changes(config: AugmentConfig) -> Augment:
    """Returns one function for one configuration: `jax.jit` compiles anew for another object."""
    return functools.partial(random_changes, **dataclasses.asdict(config))


def step_options(
    recipe: Recipe, *, steps_per_epoch: int, traced: Traced = NOTHING
) -> dict[str, Any]:
    """Returns `train_step`'s options."""
    augmented = round((1 - recipe.no_augment_fraction) * recipe.epochs * steps_per_epoch)
    return {
        "augment": make_augment(recipe, traced=traced),
        "augment_steps": augmented if recipe.no_augment_fraction else None,
        "loss": recipe.loss,
        "freeze": recipe.freeze,
        "label_smoothing": traced.get("label_smoothing", recipe.label_smoothing),
        "dropout_rate": traced.get("model.dropout"),
    }


def recipe_schedule(
    recipe: Recipe, *, steps_per_epoch: int, traced: Traced = NOTHING
) -> optax.Schedule:
    """Returns the recipe's learning rate as a function of the step."""
    peak = traced.get("optimizer.learning_rate", recipe.optimizer.learning_rate)
    return recipe.schedule.make(peak, steps_per_epoch=steps_per_epoch, epochs=recipe.epochs)


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
    schedule = recipe_schedule(recipe, steps_per_epoch=steps_per_epoch, traced=traced)
    prefix = "optimizer."
    own = {name.removeprefix(prefix): traced[name] for name in traced if name.startswith(prefix)}
    own.pop("learning_rate", None)  # the schedule's peak
    if (k := recipe.accumulate) == 1:
        return recipe.optimizer.make(schedule, **own)
    optimizer = recipe.optimizer.make(lambda update: schedule(update * k), **own)
    return optax.MultiSteps(optimizer, every_k_schedule=k).gradient_transformation()


def early_stopping(recipe: Recipe) -> EarlyStopping:
    """Returns the recipe's early stopping, which also names the best epoch, before any epoch."""
    return EarlyStopping(**dataclasses.asdict(recipe.stopping) if recipe.stopping else {})


def recipe_state(
    recipe: Recipe,
    info: DatasetInfo,
    *,
    steps_per_epoch: int,
    key: jax.Array | None = None,
    ops: Ops = REFERENCE,
    weights: tuple[Any, Any] | None = None,
) -> TrainState:
    """Returns the state at step 0. Traceable: it can be jitted, or shaped by `jax.eval_shape`.

    Args:
      recipe: the recipe.
      info: the dataset that it trains on.
      steps_per_epoch: steps in an epoch.
      key: the run's key; None takes that of the recipe's seed.
      ops: what its networks that have a method `use(ops)` compute with: `ops.for_platform` of the
        devices that will.
      weights: trained parameters and `batch_stats` to begin from, instead of fresh ones.

    Raises:
      InputError: the model cannot take such images, or the weights are of another model.
    """
    key = jax.random.key(recipe.seed) if key is None else key

    def make_model(rngs: nnx.Rngs) -> nnx.Module:
        model = recipe.model.make(info, rngs=rngs)
        use_ops(model, ops)
        return model

    optimizer = recipe_optimizer(recipe, steps_per_epoch=steps_per_epoch)
    state = create_state(key, make_model, optimizer)
    if weights is None:
        return state
    params, batch_stats = (
        taken_over(own, trained, num_classes=info.num_classes)
        for own, trained in zip((state.params, state.batch_stats), weights, strict=True)
    )
    return dataclasses.replace(
        state, params=params, batch_stats=batch_stats, opt_state=optimizer.init(params)
    )
