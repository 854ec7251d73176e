"""What a finished run leaves for its reader: result.json and the pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mnist_flax.data import DatasetInfo, Examples
from mnist_flax.evaluation import Evaluation
from mnist_flax.progress import FitResult
from mnist_flax.recipe import Recipe, to_dict
from mnist_flax.reports import figures
from mnist_flax.steps import TrainState, without_keys
from mnist_flax.workdir import write_json

RESULT_FILE = "result.json"

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def digest(state: TrainState) -> str:
    """Returns the SHA-256 of the parameters' and BatchNorm statistics' names, dtypes and bits."""
    sha = hashlib.sha256()
    arrays = without_keys((state.params, state.batch_stats))
    for path, array in jax.tree.leaves_with_path(arrays):
        host = np.asarray(array)
        sha.update(f"{jax.tree_util.keystr(path)} {host.dtype} {host.shape}".encode())
        sha.update(host.tobytes())
    return sha.hexdigest()


def summarize(
    recipe: Recipe,
    info: DatasetInfo,
    result: FitResult,
    *,
    test: Evaluation,
    data_seconds: float,
    test_seconds: float,
) -> dict[str, Any]:
    """Returns the contents of result.json.

    Seconds are those that led to the result, in all of the run's processes; "data" is of the last.
    """
    best = next(row for row in result.history if row["epoch"] == result.best_epoch)

    def total(name: str) -> float:
        return sum(row[name] for row in result.history)

    return {
        "test_accuracy": test.accuracy,
        "test_correct": test.correct,
        "test_total": test.total,
        "test_loss": test.loss,
        "val_accuracy": best["val_accuracy"],
        "val_loss": best["val_loss"],
        "best_epoch": result.best_epoch,
        "epochs": len(result.history),
        "stopped_early": result.stopped_early,
        "parameters": sum(p.size for p in jax.tree.leaves(result.state.params)),
        "digest": digest(result.state),
        "seconds": {
            "data": data_seconds,
            "compile": total("compile_seconds"),
            "train": total("train_seconds"),
            "eval": total("eval_seconds") + test_seconds,
        },
        "recipe": to_dict(recipe),
        "seed": recipe.seed,
        "dataset": dataclasses.asdict(info),
        "device": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": len(result.state.step.sharding.device_set),
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def draw(workdir: Path, result: FitResult, test_examples: Examples, test: Evaluation, info) -> None:
    """Writes curves.png, predictions.png, mistakes.png and confusion.png into `workdir`."""
    columns = {name: [row[name] for row in result.history] for name in result.history[0]}
    has_val = columns["val_loss"][0] is not None
    curves = figures.plot_curves(
        epochs=columns["epoch"],
        train_loss=columns["train_loss"],
        val_loss=columns["val_loss"] if has_val else None,
        train_accuracy=columns["train_accuracy"],
        val_accuracy=columns["val_accuracy"] if has_val else None,
        learning_rate=columns["learning_rate"],
        best_epoch=result.best_epoch if has_val else None,
    )
    shown = {
        "images_NHWC": test_examples.images,
        "labels": test_examples.labels,
        "probabilities_NK": test.probabilities_NK,
        "class_names": info.class_names,
    }
    pictures = {
        "curves": curves,
        "predictions": figures.plot_predictions(**shown),
        "mistakes": figures.plot_mistakes(**shown),
        "confusion": figures.plot_confusion(
            confusion_KK=test.confusion_KK, class_names=info.class_names
        ),
    }
    for name, figure in pictures.items():
        figures.save_figure(figure, workdir / f"{name}.png")


def write_results(
    workdir: Path,
    recipe: Recipe,
    info: DatasetInfo,
    result: FitResult,
    *,
    test_examples: Examples,
    test: Evaluation,
    data_seconds: float,
    test_seconds: float,
) -> dict[str, Any]:
    """Writes the pictures and then result.json; returns the latter's contents."""
    draw(workdir, result, test_examples, test, info)
    summary = summarize(
        recipe, info, result, test=test, data_seconds=data_seconds, test_seconds=test_seconds
    )
    write_json(workdir / RESULT_FILE, summary)
    return summary
