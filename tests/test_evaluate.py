"""Metrics against scikit-learn, scipy and hand-computed values."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from sklearn import metrics

from mnist_flax.evaluate import (
    Evaluation,
    fit_temperature,
    mixture,
    reliability,
    risk_coverage,
    wilson_interval,
)


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
    found = mixture([one, other, third])
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
