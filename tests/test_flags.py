"""Short runs under JAX's debugging flags, each in a process of its own."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import dataclasses
import jax
from mnist_flax import CNNConfig, Recipe, evaluate, fit, load_splits
from mnist_flax.errors import DivergedError
from mnist_flax.optimizer import SGD

splits = load_splits("mnist")
splits = dataclasses.replace(splits, train=splits.train[:20], val=splits.val[:10])
model = CNNConfig(widths=(2,), padding=("SAME",), pool=(True,), hidden=(), patch=2, dropout=0.0)
recipe = Recipe(val_size=10, epochs=1, batch_size=10, model=model)
fast = dataclasses.replace(recipe, optimizer=SGD(learning_rate=1e30))
try:
    fit(fast, splits, progress=False)
except DivergedError as error:
    print(error)
state = fit(recipe, splits, progress=False).state
print({str(array.dtype) for array in jax.tree.leaves(state.params)})
print(evaluate(state, splits.test[:5]).total)
"""


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["JAX_DISABLE_JIT", "JAX_DEBUG_NANS", "JAX_ENABLE_X64"])
def test_a_run_that_ends_and_one_that_diverges(flag):
    words = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(
        words, capture_output=True, text=True, check=False, env=os.environ | {flag: "1"}
    )
    diverged, *others = run.stdout.splitlines() or [""]
    assert diverged.endswith("training diverged; lower the learning rate"), run.stderr
    assert others == ["{'float32'}", "5"]
