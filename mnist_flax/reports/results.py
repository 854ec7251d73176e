"""What a finished run leaves for its reader: result.json and the pictures; and reading it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mnist_flax import checkpoint
from mnist_flax.data import DatasetInfo, Examples
from mnist_flax.errors import InputError
from mnist_flax.evaluation import Evaluation
from mnist_flax.loop import initial_progress
from mnist_flax.progress import FitResult, Progress
from mnist_flax.recipe import Recipe, from_dict, to_dict
from mnist_flax.replicas import make_mesh, replica
from mnist_flax.reports import figures
from mnist_flax.steps import TrainState, without_keys
from mnist_flax.workdir import RECIPE_FILE, read_json, write_json

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


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, finished or not, as read from its directory.

    Attributes:
      workdir: the directory.
      recipe: its recipe.
      info: what its dataset is; the dataset itself need not be there.
      state: its best epoch's state so far, or the last one's where there is no validation; one
        device's. Before the end of the first epoch, the state that it has come to.
      best_epoch: the epoch of `state`; 0 before the end of the first.
      epochs: how many epochs are done.
    """

    workdir: Path
    recipe: Recipe
    info: DatasetInfo
    state: TrainState
    best_epoch: int
    epochs: int

    def __str__(self) -> str:
        """Returns which weights these are, in words."""
        which = f"of epoch {self.best_epoch}" if self.best_epoch else "from within epoch 1"
        return f"{self.workdir}: weights {which}; {self.epochs} of {self.recipe.epochs} epochs done"


def load_run(workdir: str | Path) -> Run:
    """Reads a run, whether or not it has come to its end; changes nothing.

    Raises:
      InputError: there is none in `workdir`, or none that has a checkpoint yet.
      CheckpointError: its checkpoints cannot be read.
    """
    workdir = Path(workdir).expanduser()
    path = workdir / RECIPE_FILE
    if not path.exists():
        raise InputError(f"there is no run in {workdir}: it has no {RECIPE_FILE}")
    if "seeds" in (values := read_json(path)):
        raise InputError(f"{workdir} holds a study of many networks; name the directory of a run")
    recipe = from_dict(values)

    @functools.cache
    def like(info: DatasetInfo) -> Progress:
        return initial_progress([recipe], info, steps=1, mesh=make_mesh(devices=1))

    def expect(record: dict[str, Any]) -> Any:
        info = DatasetInfo.from_dict(record["dataset"])
        checkpoint.require_same(
            record, checkpoint.identity(to_dict(recipe), info), where=f"the run in {workdir}"
        )
        return checkpoint.progress_arrays(like(info))

    saved = checkpoint.newest(workdir, expect, strict=False, set_aside=False)
    if saved is None:
        raise InputError(f"the run in {workdir} has no checkpoint yet; let it train for longer")
    info = DatasetInfo.from_dict(saved.record["dataset"])
    progress = checkpoint.progress_of(saved, like(info).states)
    (best_epoch,) = progress.best_epochs
    state = replica(progress.best if best_epoch else progress.states, 0)
    return Run(workdir, recipe, info, state, best_epoch, len(progress.history))
