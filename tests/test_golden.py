"""A run that an earlier commit wrote, and left in its second epoch, is read and goes on.

    python tests/test_golden.py

writes it anew into tests/golden: for a checkpoint format that has changed on purpose, in a commit
that says so.
"""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import head

from mnist_flax.datasets import load_splits
from mnist_flax.errors import Interrupted
from mnist_flax.evaluation import predict
from mnist_flax.loop import fit
from mnist_flax.model import CNNConfig
from mnist_flax.optimizer import Muon, OneCycle
from mnist_flax.recipe import (
    AugmentConfig,
    PlateauConfig,
    Recipe,
    StoppingConfig,
    from_dict,
)
from mnist_flax.reports.runs import load_run

GOLDEN = Path(__file__).with_name("golden")
# Of all that a state can hold, a little: Muon, Adam, momentum, plateau, Dropout, statistics.
RECIPE = Recipe(
    val_size=500,
    epochs=3,
    batch_size=50,
    model=CNNConfig(
        widths=(4, 6), padding=("SAME", "VALID"), pool=(True, True), hidden=(), dropout=0.1
    ),
    augment=AugmentConfig(rotate=5.0),
    optimizer=Muon(learning_rate=0.1, ns_steps=3, adam_ratio=0.1),
    schedule=OneCycle(warmup=0.2),
    plateau=PlateauConfig(patience=1),
    stopping=StoppingConfig(patience=5),
)
STEPS = 12  # of 24, half of the second epoch


def few(splits):
    """410 training examples, 8 steps an epoch, and 500 for validation."""
    return dataclasses.replace(splits, train=head(splits.train, 410), val=head(splits.val, 500))


def losses(history):
    return [[row["train_loss"], row["val_loss"]] for row in history]


@pytest.fixture
def golden(tmp_path):
    return shutil.copytree(GOLDEN / "run", tmp_path / "run")


@pytest.fixture(scope="module")
def expected():
    return json.loads((GOLDEN / "expected.json").read_text())


def test_it_is_read_with_its_best_weights(golden, expected, splits):
    """The logits are those of one epoch, to what processors round differently in it."""
    run = load_run(golden)
    assert (run.best_epoch, run.epochs) == (1, 1)
    logits = predict(run.state, splits.test.images[:8])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)


def test_it_goes_on_to_its_end(golden, expected, splits):
    """What is left are 12 steps, so rounding has no time to grow."""
    recipe = from_dict(json.loads((golden / "recipe.json").read_text()))
    result = fit(recipe, few(splits), workdir=golden, resume=True, progress=False)
    assert [row["step"] for row in result.history] == [8, 16, 24]
    np.testing.assert_allclose(losses(result.history), expected["losses"], rtol=1e-3)


def write():
    """Writes the run, without its TensorBoard events, and what it comes to."""
    splits = few(load_splits("mnist", val_size=5000))
    run = GOLDEN / "run"
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for step in itertools.count(1):
        try:
            fit(RECIPE, splits, workdir=run, resume=step > 1, should_stop=lambda: True)
        except Interrupted as stop:
            if stop.step == STEPS:
                break
    for path in (*run.glob("events*"), run / ".lock", *run.glob("checkpoints/11")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in run.rglob("commit_success.txt"):
        path.write_text("")  # it names the directory, which nobody else has
    logits = predict(load_run(run).state, splits.test.images[:8])
    end = shutil.copytree(run, GOLDEN / "end")
    result = fit(RECIPE, splits, workdir=end, resume=True)
    shutil.rmtree(end)
    expected = {"losses": losses(result.history), "logits": np.asarray(logits).tolist()}
    (GOLDEN / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 1)
    write()
