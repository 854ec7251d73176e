"""Metrics against scikit-learn, scipy and hand-computed values."""

import functools
import math

import hypothesis.strategies as st
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from sklearn import metrics

from mnist_flax.augment import random_affine
from mnist_flax.errors import InputError
from mnist_flax.evaluation import (
    Evaluation,
    _logits,
    average_probabilities,
    padded_size,
    predict,
)
from mnist_flax.reports.calibration import (
    fit_temperature,
    reliability,
    risk_coverage,
    wilson_interval,
)
from mnist_flax.steps import create_state
from mnist_flax.views import View


@pytest.fixture(scope="module")
def evaluation():
    """1,000 examples of 4 classes, right about two times in three, too sure of themselves."""
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=1000).astype(np.int32)
    logits = rng.normal(size=(1000, 4)) + 1.5 * np.eye(4)[labels]
    return Evaluation((4 * logits).astype(np.float32), labels)


def test_class_metrics_against_scikit_learn(evaluation):
    truth, predictions = evaluation.labels_N, evaluation.predictions_N
    precision, recall, _, _ = metrics.precision_recall_fscore_support(truth, predictions)
    assert_allclose(evaluation.precision_K, precision)
    assert_allclose(evaluation.recall_K, recall)
    assert_array_equal(evaluation.confusion_KK, metrics.confusion_matrix(truth, predictions))
    assert evaluation.loss == pytest.approx(metrics.log_loss(truth, evaluation.probabilities_NK))


def test_brier_score_against_scikit_learn(evaluation):
    each = [
        metrics.brier_score_loss(evaluation.labels_N == k, evaluation.probabilities_NK[:, k])
        for k in range(4)
    ]
    assert evaluation.brier == pytest.approx(sum(each))


def test_a_class_that_is_never_predicted_has_no_precision():
    evaluation = Evaluation(np.array([[1.0, 0], [1, 0]], np.float32), np.array([0, 1], np.int32))
    assert evaluation.precision_K[0] == 0.5
    assert math.isnan(evaluation.precision_K[1])
    assert_array_equal(evaluation.recall_K, [1, 0])


@pytest.mark.parametrize(("correct", "total"), [(9950, 10_000), (0, 10), (10, 10), (3, 7)])
def test_wilson_interval_against_scipy(correct, total):
    expected = stats.binomtest(correct, total).proportion_ci(method="wilson")
    assert_allclose(wilson_interval(correct, total), expected, atol=1e-7)


def log(probabilities, labels):
    return Evaluation(np.log(np.array(probabilities, np.float32)), np.array(labels, np.int32))


def test_a_mixture_of_hand_computed_values():
    """Probabilities are averaged, not logits, whose mean would say 0 for the second example."""
    one = Evaluation(np.log([[0.6, 0.4], [0.999, 0.001]]).astype(np.float32) + 7, np.array([1, 1]))
    other = log([[0.2, 0.8], [0.1, 0.9]], [1, 1])
    third = log([[0.4, 0.6], [0.1, 0.9]], [1, 1])
    found = average_probabilities([one, other, third])
    assert_allclose(found.probabilities_NK, [[0.4, 0.6], [1.199 / 3, 1.801 / 3]], rtol=1e-5)
    assert_array_equal(found.labels_N, [1, 1])
    assert (found.correct, one.correct) == (2, 0)


def test_reliability_of_hand_computed_values():
    # Confidences 0.6 (right), 0.7 (wrong), 0.9 (right), 0.95 (right); bins of a quarter.
    evaluation = log([[0.6, 0.4], [0.7, 0.3], [0.1, 0.9], [0.05, 0.95]], [0, 1, 1, 1])
    result = reliability(evaluation, bins=4)
    assert_array_equal(result.counts, [0, 0, 2, 2])
    assert_allclose(result.confidence, [np.nan, np.nan, 0.65, 0.925], rtol=1e-6)
    assert_allclose(result.accuracy, [np.nan, np.nan, 0.5, 1])
    assert result.ece == pytest.approx(0.5 * 0.15 + 0.5 * 0.075)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_reliability_counts_every_example_once(seed, bins):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=rng.uniform(0.1, 20), size=(57, 3)).astype(np.float32)
    evaluation = Evaluation(logits, rng.integers(3, size=57).astype(np.int32))
    result = reliability(evaluation, bins=bins)
    assert result.counts.sum() == 57
    full = result.counts > 0
    mean = (result.accuracy[full] * result.counts[full]).sum() / 57
    assert mean == pytest.approx(evaluation.accuracy)
    assert 0 <= result.ece <= 1


def test_temperature_is_where_the_loss_is_lowest(evaluation):
    temperature = fit_temperature(evaluation)
    grid = np.geomspace(0.05, 20, 2000)
    losses = [evaluation.at_temperature(t).loss for t in grid]
    assert temperature == pytest.approx(grid[np.argmin(losses)], rel=0.01)
    assert temperature > 1.5  # the logits were made four times too large
    scaled = evaluation.at_temperature(temperature)
    assert_array_equal(scaled.predictions_N, evaluation.predictions_N)
    assert reliability(scaled).ece < reliability(evaluation).ece


def test_risk_coverage_of_hand_computed_values():
    # By confidence: 0.95 right, 0.9 right, 0.7 wrong, 0.6 right.
    evaluation = log([[0.6, 0.4], [0.7, 0.3], [0.1, 0.9], [0.05, 0.95]], [0, 1, 1, 1])
    result = risk_coverage(evaluation)
    assert_allclose(result.coverage, [0.25, 0.5, 0.75, 1])
    assert_allclose(result.risk, [0, 0, 1 / 3, 1 / 4])
    assert result.error_free == 0.5


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([0, 4], r"\[0, 4\), but there is a 4"),
        ([-1, 0], r"\[0, 4\), but there is a -1"),
        ([[0], [1]], r"labels\[:, 0\]"),
        ([0.0, 1.0], "not float"),
        ([0], "one an image"),
    ],
)
def test_labels_that_do_not_fit_the_logits_are_refused(labels, found):
    """A column would be compared with every prediction."""
    with pytest.raises(InputError, match=found):
        Evaluation(np.zeros((2, 4), np.float32), np.array(labels))


def test_sizes_of_batches_are_few():
    sizes = [padded_size(N) for N in range(1, 1200)]
    assert all(size >= min(N, 500) for N, size in enumerate(sizes, start=1))
    assert set(sizes) == {1, 2, 4, 8, 16, 32, 64, 128, 256, 500}


class Linear(nnx.Module):
    def __init__(self, *, rngs):
        self.fc = nnx.Linear(784, 3, rngs=rngs)

    def __call__(self, images_BHWC):
        return self.fc(images_BHWC.reshape(len(images_BHWC), -1))


@pytest.fixture(scope="module")
def linear():
    return create_state(jax.random.key(0), lambda rngs: Linear(rngs=rngs), optax.sgd(0.1))


def test_programs_are_compiled_for_few_sizes_and_give_each_image_its_logits(linear):
    images = np.random.default_rng(0).uniform(size=(40, 28, 28, 1)).astype(np.float32)
    kernel = np.asarray(linear.params["fc"]["kernel"], np.float64)
    expected = images.reshape(40, -1) @ kernel
    before = _logits._cache_size()
    for N in range(17, 33):
        logits = predict(linear, images[:N])
        assert_allclose(logits, expected[:N], atol=1e-5)
    assert _logits._cache_size() == before + 1


def test_a_view_of_equal_ranges_is_compiled_once(linear):
    images = np.zeros((4, 28, 28, 1), np.float32)
    before = _logits._cache_size()
    for ranges in ({"rotate": 10.0, "shift": 0.1}, {"shift": 0.1, "rotate": 10.0}):
        augment = functools.partial(random_affine, **ranges)
        predict(linear, images, view=View(jax.random.key(0), augment))
    assert _logits._cache_size() == before + 1
    other = View(jax.random.key(0), functools.partial(random_affine, rotate=11.0, shift=0.1))
    predict(linear, images, view=other)
    assert _logits._cache_size() == before + 2


def test_views_of_arguments_that_cannot_be_compared_are_themselves():
    augment = functools.partial(random_affine, rotate=np.ones(()))
    view = View(jax.random.key(0), augment)
    assert view.augment is augment
