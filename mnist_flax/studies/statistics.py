"""What many networks of a recipe reach: mean, standard deviation, interval, comparison."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from mnist_flax.errors import DivergedError
from mnist_flax.evaluation import Evaluation, average_probabilities


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the 95% interval of the mean by Student's t."""
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    return float(low), float(high)


def estimate(accuracies: np.ndarray) -> dict[str, Any]:
    """Returns the mean of the replicas' accuracies, their deviation and the mean's interval.

    Where only one did not diverge there is no spread: both are None.
    """
    several = len(accuracies) > 1
    return {
        "mean": float(accuracies.mean()),
        "deviation": float(accuracies.std(ddof=1)) if several else None,
        "interval": interval(accuracies) if several else None,
    }


def test_statistics(tests: Sequence[Evaluation]) -> dict[str, Any]:
    """Returns what the replicas reach on the test split, apart and together."""
    ensemble = average_probabilities(tests)
    return {
        **estimate(np.array([test.accuracy for test in tests])),
        "ensemble_accuracy": ensemble.accuracy,
        "ensemble_loss": ensemble.loss,
    }


def survivors(diverged: Sequence[str | None]) -> list[int]:
    """Returns which replicas did not diverge.

    Raises:
      DivergedError: all did.
    """
    alive = [i for i, reason in enumerate(diverged) if reason is None]
    if not alive:
        raise DivergedError(f"all {len(diverged)} networks diverged; the first: {diverged[0]}")
    return alive


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float | int]:
    """Returns how much better ours are on average, and the p-value of a paired t-test.

    Pairs of which one is NaN, because it diverged, are left out.

    Raises:
      DivergedError: that leaves fewer than two pairs.
    """
    both = np.isfinite(ours) & np.isfinite(theirs)
    if both.sum() < 2:
        raise DivergedError("too many networks diverged: fewer than 2 pairs are left to compare")
    return {
        "pairs": int(both.sum()),
        "difference": float((ours - theirs)[both].mean()),
        "p_value": float(stats.ttest_rel(ours[both], theirs[both]).pvalue),
    }


def spread(study: dict[str, Any]) -> list[str]:
    """Returns the mean, the deviation and the mean's interval in words."""
    if study["interval"] is None:
        return [f"{study['mean']:.3%}", "-", "-"]
    low, high = study["interval"]
    return [f"{study['mean']:.3%}", f"{study['deviation']:.3%}", f"{low:.3%} to {high:.3%}"]


def describe(name: str, study: dict[str, Any]) -> str:
    """Returns a study as a line."""
    mean, deviation, interval = spread(study)
    seeds = study["diverged"]
    words = ", ".join(map(str, seeds))
    count = len(study["replicas"]) - len(seeds)
    return (
        f"{name}: mean {mean}, deviation {deviation}, 95% interval {interval}, {count} seeds"
        f"{f' ({len(seeds)} more diverged: {words})' if seeds else ''}; "
        f"ensemble {study['ensemble_accuracy']:.2%}; "
        f"training {study['train_seconds_mean']:.2f} s each, {study['fit_seconds']:.1f} s in all"
    )
