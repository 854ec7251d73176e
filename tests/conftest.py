"""Strict JAX settings for every test, and the real MNIST, prepared once a session."""

import dataclasses
import os
from pathlib import Path

import jax
import pytest

from mnist_flax.data import Examples, Splits
from mnist_flax.datasets import load_splits
from mnist_flax.loop import fit
from mnist_flax.model import CNNConfig
from mnist_flax.optimizer import SGD, OneCycle
from mnist_flax.recipe import AugmentConfig, PlateauConfig, Recipe

# Most of the tests' time is compilation, which takes half without most of LLVM's optimizations and
# without XLA's fusion emitters (at LLVM's level 0, runs that must be the same bits are not). `make
# test-all` compiles as users do, and so do, always, the tests of what the bits of several devices
# depend on: they clear the variable.
QUICK_COMPILATION = "--xla_backend_optimization_level=1"
if jax.__version_info__ < (0, 11):  # XLA lost the flag
    QUICK_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
ALL = "MNIST_FLAX_TEST_ALL" in os.environ
if not ALL:
    os.environ.setdefault("XLA_FLAGS", QUICK_COMPILATION)
if not hasattr(jax, "enable_x64"):  # its place until jax 0.8
    jax.enable_x64 = jax.experimental.enable_x64
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# A run of seconds, for what loops and checkpoints must do.
MODEL = CNNConfig(widths=(4, 8), padding=("SAME", "VALID"), pool=(True, True), hidden=(16,))
# For runs of which the network does not matter: half as much to compile.
TINY = CNNConfig(widths=(4,), padding=("SAME",), pool=(True,), hidden=(16,), patch=2)
RECIPE = Recipe(
    val_size=500,
    epochs=3,
    batch_size=50,
    model=MODEL if ALL else TINY,
    augment=AugmentConfig(rotate=10.0, shift=0.05),
    optimizer=SGD(learning_rate=0.05),
    schedule=OneCycle(warmup=0.2),
    plateau=PlateauConfig(patience=1),
)


def tries(number: int) -> int:
    """Returns how many examples of a property to try of `number`: a third, but in `make test-all`.

    For properties of which each example compiles a program of its own.
    """
    return number if ALL else -(-number // 3)


def first(values):
    """Returns a test's parameters, of which `make test` tries the first, `make test-all` all."""
    kept, *others = values
    return [kept, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]


def head(examples, count):
    return Examples(examples.images[:count], examples.labels[:count])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Compiles what a test runs in this process with still less care, if it is not of bits.

    Programs that are compiled apart, such as of streamed and of resident data, need LLVM's first
    level to have the same ones.
    """
    less = not (ALL or item.get_closest_marker("bits"))
    jax.config.update("jax_disable_most_optimizations", less)


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory) -> Path:
    """A new directory that all workers of this test session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def _compile_once(shared_dir):
    """Keeps compiled programs for the session: most fits in the tests compile the same ones.

    JAX reads the variables too, in the processes that tests start.
    """
    cache = str(shared_dir / "compiled")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("JAX_COMPILATION_CACHE_DIR", cache)
        environment.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="session")
def data_dir(shared_dir):
    """A directory that holds the datasets prepared by this test session.

    MNIST_FLAX_TEST_DATA names one to keep from session to session.
    """
    if kept := os.environ.get("MNIST_FLAX_TEST_DATA"):
        return Path(kept)
    return shared_dir / "datasets"


@pytest.fixture(scope="session")
def splits(data_dir) -> Splits:
    """MNIST with 55,000 training, 5,000 validation and 10,000 test examples."""
    return load_splits("mnist", val_size=5000, seed=0, data_dir=data_dir)


@pytest.fixture(scope="session")
def small(splits) -> Splits:
    """1,230 training and 500 validation examples: 24 steps an epoch, and 30 left over."""
    return dataclasses.replace(splits, train=head(splits.train, 1230), val=head(splits.val, 500))


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """An uninterrupted run of RECIPE, and its directory, which is not to be changed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return fit(RECIPE, small, workdir=workdir, progress=False), workdir
