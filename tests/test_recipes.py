"""Recipes as values: what is refused, by name, when one is made or read back."""

import dataclasses
import json

import numpy as np
import pytest

from mnist_flax.errors import InputError
from mnist_flax.model import CNNConfig
from mnist_flax.optimizer import SGD
from mnist_flax.recipe import (
    AugmentConfig,
    PlateauConfig,
    Recipe,
    StoppingConfig,
    from_dict,
    to_dict,
)
from mnist_flax.recipes import RECIPES

EVERYTHING = dataclasses.replace(RECIPES["default"], plateau=PlateauConfig())
WRONG = [
    ("epochs", 2.5, "a whole number"),
    ("epochs", True, "a whole number"),
    ("epochs", np.int64(2), "a whole number"),
    ("batch_size", 64.0, "a whole number"),
    ("seed", "1", "a whole number"),
    ("label_smoothing", "0.1", "a number"),
    ("label_smoothing", None, "a number"),
    ("dataset", 7, "a string"),
    ("model.widths", 8, "a tuple, each entry a whole number"),
    ("model.widths", [8, 16.0, 8], "a tuple, each entry a whole number"),
    ("model.normalize", 1, "True or False"),
    ("model.norm_epsilon", "small", "a number"),
    ("model.precision", 32, "'float32' or 'bfloat16'"),
    ("augment.rotate", "10", "a number"),
    ("optimizer.learning_rate", "1e-3", "a number"),
    ("optimizer.nesterov", 0, "True or False"),
    ("optimizer.ns_steps", 3.0, "a whole number"),
    ("schedule.warmup", "0.2", "a number"),
    ("plateau.patience", 1.5, "a whole number"),
    ("stopping.patience", False, "a whole number"),
]


@pytest.mark.parametrize(("name", "value", "wanted"), WRONG)
def test_a_field_of_another_type_is_refused_by_its_name(name, value, wanted):
    values = to_dict(EVERYTHING)
    *path, last = name.split(".")
    table = values
    for part in path:
        table = table[part]
    table[last] = value
    with pytest.raises(InputError) as caught:
        from_dict(values)
    shown = tuple(value) if isinstance(value, list) else value
    assert str(caught.value) == f"{name} is {shown!r}; give {wanted}"


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Recipe(epochs=2.5), "epochs"),  # type: ignore
        (lambda: CNNConfig(widths=[8, 8, 8]), "model.widths"),  # type: ignore
        (lambda: AugmentConfig(rotate="10"), "augment.rotate"),  # type: ignore
        (lambda: SGD(learning_rate=None), "optimizer.learning_rate"),  # type: ignore
        (lambda: PlateauConfig(patience=1.0), "plateau.patience"),  # type: ignore
        (lambda: StoppingConfig(min_delta="0"), "stopping.min_delta"),  # type: ignore
        (lambda: Recipe(model={"widths": [8]}), "model"),  # type: ignore
    ],
)
def test_a_dataclass_is_refused_as_it_is_made(make, name):
    with pytest.raises(InputError, match=f"^{name} is .*; give "):
        make()


def test_whole_numbers_and_numpys_floats_stand_for_numbers():
    recipe = Recipe(
        label_smoothing=0,
        model=CNNConfig(dropout=0),
        optimizer=SGD(learning_rate=np.float64(1)),
    )
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_comes_back_from_json(name):
    assert from_dict(json.loads(json.dumps(to_dict(RECIPES[name])))) == RECIPES[name]


def test_running_statistics_settle_in_a_short_run_by_default():
    """In 100 steps: 0.9**100 is 3e-5, and of the notebook's 0.99 a third would be left."""
    assert CNNConfig().norm_momentum == 0.9
    assert RECIPES["baseline"].model == dataclasses.replace(CNNConfig(), norm_momentum=0.99)
