"""Calibration: what a network's probabilities are worth, and intervals of its accuracy."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mnist_flax.evaluation import Evaluation


def wilson_interval(correct: int, total: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Returns Wilson's score interval of a proportion, 95% by default (Wilson 1927, JASA 22)."""
    p, n = correct / total, total
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


class Reliability(NamedTuple):
    """Confidence against accuracy, by bins of confidence (Guo et al. 2017, arXiv 1706.04599).

    Attributes:
      edges: the bins' limits [bins + 1], of equal width from 0 to 1; a bin includes its upper one.
      counts: examples in each bin [bins].
      confidence: mean probability of the predicted class in each bin, NaN where empty.
      accuracy: share of right predictions in each bin, NaN where empty.
      ece: expected calibration error: mean over examples of their bin's |confidence - accuracy|.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float


def reliability(evaluation: Evaluation, *, bins: int = 15) -> Reliability:
    """Returns the reliability of the predicted class's probability."""
    confidence_N = evaluation.probabilities_NK.max(axis=-1)
    hits_N = evaluation.predictions_N == evaluation.labels_N
    edges = np.linspace(0, 1, bins + 1)
    bin_N = np.clip(np.digitize(confidence_N, edges, right=True) - 1, 0, bins - 1)
    counts = np.bincount(bin_N, minlength=bins)
    divisor = np.where(counts, counts, np.nan)
    confidence = np.bincount(bin_N, confidence_N, bins) / divisor
    accuracy = np.bincount(bin_N, hits_N, bins) / divisor
    gaps = np.nan_to_num(np.abs(confidence - accuracy))
    return Reliability(edges, counts, confidence, accuracy, float(gaps @ counts / counts.sum()))


def fit_temperature(evaluation: Evaluation) -> float:
    """Returns the temperature of the lowest loss, in [0.05, 20]: fit it on validation.

    Temperature scaling, Guo et al. (2017), section 4.2.
    """
    from scipy import optimize  # slow to import, and no run needs it

    def loss(log_temperature):
        return evaluation.at_temperature(math.exp(log_temperature)).loss

    found = optimize.minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded")
    return math.exp(found.x)


class RiskCoverage(NamedTuple):
    """What is wrong among the most confident predictions.

    Attributes:
      coverage: shares of the examples that are answered, ascending [N].
      risk: share of errors among those [N].
      error_free: the largest coverage at which there is no error.
    """

    coverage: np.ndarray
    risk: np.ndarray
    error_free: float


def risk_coverage(evaluation: Evaluation) -> RiskCoverage:
    """Orders the examples by the probability of the predicted class and accumulates errors."""
    order = np.argsort(-evaluation.probabilities_NK.max(axis=-1), kind="stable")
    errors = np.cumsum((evaluation.predictions_N != evaluation.labels_N)[order])
    answered = np.arange(1, evaluation.total + 1)
    error_free = float((errors == 0).sum() / evaluation.total)
    return RiskCoverage(answered / evaluation.total, errors / answered, error_free)
