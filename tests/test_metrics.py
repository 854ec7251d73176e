"""Sums over examples, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_flax.metrics import Metrics


def batch(seed, size):
    rng = np.random.default_rng(seed)
    return {
        "losses_B": rng.uniform(0, 3, size).astype(np.float32),
        "logits_BK": rng.normal(size=(size, 10)).astype(np.float32),
        "labels_B": rng.integers(-1, 10, size).astype(np.int32),
    }


def test_of_batch_counts_what_numpy_counts():
    b = batch(0, 100)
    real = b["labels_B"] >= 0
    assert 0 < real.sum() < 100
    metrics = Metrics.of_batch(**jax.tree.map(jnp.asarray, b))
    hits = (b["logits_BK"].argmax(-1) == b["labels_B"])[real]
    assert int(metrics.count) == real.sum()
    assert int(metrics.correct) == hits.sum()
    np.testing.assert_allclose(metrics.loss, b["losses_B"][real].astype(np.float64).mean(), 1e-6)
    np.testing.assert_allclose(metrics.accuracy, hits.mean(), 1e-6)
    dtypes = [a.dtype.name for a in (metrics.loss_sum, metrics.correct, metrics.count)]
    assert dtypes == ["float32", "int32", "int32"]


def test_a_nan_in_padding_does_not_spread():
    metrics = Metrics.of_batch(
        losses_B=jnp.array([1.0, jnp.nan]),
        logits_BK=jnp.array([[0.0, 1.0], [0.0, 0.0]]),
        labels_B=jnp.array([1, -1]),
    )
    assert (float(metrics.loss), float(metrics.accuracy)) == (1.0, 1.0)


def test_merge_weighs_batches_by_their_size():
    small = Metrics(jnp.float32(2), jnp.int32(1), jnp.int32(1))
    large = Metrics(jnp.float32(3), jnp.int32(4), jnp.int32(9))
    both = small.merge(large)
    assert float(both.loss) == pytest.approx(0.5)
    assert float(both.accuracy) == pytest.approx(0.5)
    assert int(Metrics.zero().merge(large).count) == 9
