"""Strict JAX settings for every test, and the real MNIST, prepared once a session."""

import os
from pathlib import Path

import jax
import pytest

from mnist_flax.data import Splits, load_splits

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Keeps compiled programs for the session: most fits in the tests compile the same ones."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A directory that holds the datasets prepared by this test session.

    MNIST_FLAX_TEST_DATA names one to keep from session to session.
    """
    if kept := os.environ.get("MNIST_FLAX_TEST_DATA"):
        return Path(kept)
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def splits(data_dir) -> Splits:
    """MNIST with 55,000 training, 5,000 validation and 10,000 test examples."""
    return load_splits("mnist", val_size=5000, seed=0, data_dir=data_dir)
