"""Checkpoints: everything that a run is, in one Orbax item, written asynchronously."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mnist_flax.errors import InputError
from mnist_flax.metrics import Metrics
from mnist_flax.recipes import Recipe, differences, to_dict
from mnist_flax.steps import TrainState
from mnist_flax.stopping import EarlyStopping

CHECKPOINT_DIR = "checkpoints"
KEEP_LATEST = 2


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is: what a checkpoint holds beside the recipe.

    Attributes:
      state: the training state; `state.step` says which epoch, and where in it.
      metrics: training metrics of the epoch that is under way; none at an epoch's start.
      stopping: early stopping, which also names the best epoch.
      history: one row of numbers an epoch done.
    """

    state: TrainState
    metrics: Metrics
    stopping: EarlyStopping
    history: tuple[dict[str, Any], ...] = ()

    @property
    def best_step(self) -> int | None:
        """The step at the end of the best epoch; None before the first."""
        best = [row["step"] for row in self.history if row["epoch"] == self.stopping.best_epoch]
        return best[0] if best else None


class _LatestAndBest:
    """Orbax preservation policy: the newest checkpoints and the one that the newest calls best."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        best = checkpoints[-1].metrics["best_step"] if checkpoints else None
        first_kept = len(checkpoints) - KEEP_LATEST
        return [index >= first_kept or c.step == best for index, c in enumerate(checkpoints)]


@contextlib.contextmanager
def open_checkpoints(workdir: Path) -> Iterator[ocp.CheckpointManager]:
    """Opens `workdir`/checkpoints; on leaving, waits until what was saved is on disk."""
    options = ocp.CheckpointManagerOptions(preservation_policy=_LatestAndBest())
    manager = ocp.CheckpointManager((workdir / CHECKPOINT_DIR).absolute(), options=options)
    try:
        yield manager
        manager.wait_until_finished()
    finally:
        manager.close()


def save(manager: ocp.CheckpointManager, recipe: Recipe, progress: Progress) -> None:
    """Saves a checkpoint under the state's step; returns once the arrays are copied."""
    run = {
        "recipe": to_dict(recipe),
        "stopping": dataclasses.asdict(progress.stopping),
        "history": progress.history,
    }
    item = {"arrays": _arrays(progress), "run": json.dumps(run)}
    best = {"best_step": progress.best_step}
    manager.save(int(progress.state.step), args=ocp.args.PyTreeSave(item), metrics=best)


def restore(
    manager: ocp.CheckpointManager, recipe: Recipe, like: Progress, *, step: int | None = None
) -> Progress:
    """Restores a checkpoint: the newest, or that of `step`.

    Args:
      manager: the run's checkpoints.
      recipe: the recipe that is about to continue; it must be the checkpoint's own.
      like: a fresh run of that recipe, whose shapes, shardings and static parts are taken.
      step: the step to restore.

    Raises:
      InputError: there is no checkpoint, or it belongs to another recipe.
    """
    step = manager.latest_step() if step is None else step
    if step is None:
        raise InputError(f"there is no checkpoint in {manager.directory}; start the run anew")
    run = json.loads(_restore(manager, step, {"run": ""})["run"])
    if lines := differences(run["recipe"], to_dict(recipe)):
        raise InputError(f"the checkpoint belongs to another recipe ({'; '.join(lines)})")
    arrays = _restore(manager, step, {"arrays": _arrays(like)})["arrays"]
    arrays = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), arrays, _arrays(like))
    arrays["state"]["key"] = jax.random.wrap_key_data(arrays["state"]["key"])
    return Progress(
        state=dataclasses.replace(like.state, **arrays["state"]),
        metrics=arrays["metrics"],
        stopping=EarlyStopping(**run["stopping"]),
        history=tuple(run["history"]),
    )


def _arrays(progress: Progress) -> dict[str, Any]:
    """Returns the arrays of a checkpoint; keys as their data, which every backend can store."""
    state = {
        field.name: getattr(progress.state, field.name)
        for field in dataclasses.fields(TrainState)
        if not field.metadata.get("static")
    }
    state["key"] = jax.random.key_data(state["key"])
    return {"state": state, "metrics": progress.metrics}


def _restore(manager: ocp.CheckpointManager, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """Restores part of an item as numpy arrays and strings."""

    def how(leaf):
        return ocp.RestoreArgs(restore_type=str if isinstance(leaf, str) else np.ndarray)

    args = ocp.args.PyTreeRestore(
        item=like, restore_args=jax.tree.map(how, like), partial_restore=True
    )
    return dict(manager.restore(step, args=args))
