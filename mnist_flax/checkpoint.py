"""Checkpoints: everything that a run is, in one Orbax item, written asynchronously.

Each holds a digest of its contents, so that what a disk or a stray write did to it is noticed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from mnist_flax.data import DatasetInfo
from mnist_flax.errors import CheckpointError, InputError
from mnist_flax.metrics import Metrics
from mnist_flax.recipes import differences
from mnist_flax.steps import TrainState
from mnist_flax.stopping import EarlyStopping

CHECKPOINT_DIR = "checkpoints"
ITEM = "progress"
# One to continue from, and one more for when that is damaged; and the best that each names.
KEEP_LATEST = 2

T = TypeVar("T")

log = logging.getLogger(__name__)


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
    """Orbax preservation policy: the newest checkpoints and those that they call the best.

    What an earlier process called the best is not known: while its checkpoints are among the
    newest, nothing is deleted.
    """

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        latest = checkpoints[-KEEP_LATEST:]
        if any(c.metrics is None for c in latest):
            return [True] * len(checkpoints)
        kept = {c.step for c in latest} | {c.metrics["best_step"] for c in latest}
        return [c.step in kept for c in checkpoints]


@contextlib.contextmanager
def open_checkpoints(workdir: Path) -> Iterator[ocp.CheckpointManager]:
    """Opens `workdir`/checkpoints; on leaving, waits until what was saved is on disk.

    Raises:
      CheckpointError: on leaving, if what was saved last could not be written.
    """
    options = ocp.CheckpointManagerOptions(preservation_policy=_LatestAndBest())
    manager = ocp.CheckpointManager(
        (workdir / CHECKPOINT_DIR).absolute(),
        options=options,
        # Named, or Orbax would guess from the newest directory, which may be damaged.
        item_handlers={ITEM: ocp.PyTreeCheckpointHandler()},
    )
    try:
        yield manager
    finally:
        try:
            wait(manager)
        finally:
            with contextlib.suppress(Exception):  # it waits, and raises, once more
                manager.close()


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits until what was saved is on disk.

    Raises:
      CheckpointError: it could not be written.
    """
    with _one_error(manager):
        manager.wait_until_finished()


def identity(recipe: dict[str, Any], info: DatasetInfo) -> dict[str, Any]:
    """Returns what is trained, and on what, as JSON values: only the same may continue it."""
    return recipe | {"fingerprint": info.fingerprint}


def save(manager: ocp.CheckpointManager, run: dict[str, Any], progress: Progress) -> None:
    """Saves a run's progress under the state's step; returns once the arrays are copied.

    `run` is the run's `identity`.

    Raises:
      CheckpointError: it, or the checkpoint before it, could not be written.
    """
    record = {"stopping": dataclasses.asdict(progress.stopping), "history": progress.history}
    write(
        manager,
        run,
        step=int(progress.state.step),
        arrays=_arrays(progress),
        record=record,
        best_step=progress.best_step,
    )


def write(
    manager: ocp.CheckpointManager,
    run: dict[str, Any],
    *,
    step: int,
    arrays: Any,
    record: dict[str, Any],
    best_step: int | None = None,
) -> None:
    """Writes a checkpoint; returns once the arrays are copied.

    Args:
      manager: where it goes.
      run: what is being trained, and on what, as JSON values: only the same may continue.
      step: the steps taken.
      arrays: a pytree of arrays, none of them keys.
      record: whatever else belongs to it, as JSON values.
      best_step: the step of an earlier checkpoint that is to be kept too.

    Raises:
      CheckpointError: it, or the one before it, could not be written.
    """
    text = json.dumps({"recipe": run, **record})
    item = {"arrays": arrays, "run": text, "digest": _digest(arrays, text)}
    with _one_error(manager):
        args = ocp.args.Composite(**{ITEM: ocp.args.PyTreeSave(item)})
        manager.save(step, args=args, metrics={"best_step": best_step})


@contextlib.contextmanager
def _one_error(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns whatever Orbax and TensorStore raise for a failed write into one error."""
    try:
        yield
    except Exception as error:
        text = str(error).strip() or repr(error)
        full = "RESOURCE_EXHAUSTED" in text or "No space left" in text
        cause = "no space is left on the device" if full else text.splitlines()[0][:200]
        raise CheckpointError(
            f"a checkpoint could not be written to {manager.directory}: {cause}; "
            "make room or permit writing, then resume"
        ) from error


def newest_sound(
    manager: ocp.CheckpointManager, restore: Callable[[int], T], *, strict: bool
) -> T | None:
    """Restores the newest checkpoint that is whole.

    Damaged ones are logged and deleted: the run will write them again, to the same bits.

    Args:
      manager: the run's checkpoints.
      restore: restores the checkpoint of a step, or raises.
      strict: refuse where the newest is damaged.

    Returns:
      What `restore` returned; None where no checkpoint is left.

    Raises:
      InputError: the checkpoint belongs to another run.
      CheckpointError: the newest is damaged, and `strict` is set.
    """
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            return restore(step)
        except CheckpointError as error:
            if strict:
                raise
            log.warning("%s; going back to the one before", error)
            manager.delete(step)
    return None


def restore_with_best(
    manager: ocp.CheckpointManager, run: dict[str, Any], like: Progress, *, step: int
) -> Progress:
    """Restores the checkpoint of a step, if the best one that it names is whole too.

    Arguments and errors are as in `restore`.
    """
    progress = restore(manager, run, like, step=step)
    restore_best(manager, run, like, progress)
    return progress


def restore_best(
    manager: ocp.CheckpointManager, run: dict[str, Any], like: Progress, progress: Progress
) -> Progress:
    """Returns the progress at the end of the best epoch that `progress` names.

    That is `progress` itself where it names none, or its own epoch. Errors are as in `restore`.
    """
    if progress.best_step in (None, int(progress.state.step)):
        return progress
    wait(manager)
    return restore(manager, run, like, step=progress.best_step)


def restore(
    manager: ocp.CheckpointManager, run: dict[str, Any], like: Progress, *, step: int
) -> Progress:
    """Restores a run's progress.

    Args:
      manager: the run's checkpoints.
      run: the `identity` of the run that is about to continue; it must be the checkpoint's own.
      like: a fresh run of the same recipe, whose shapes, shardings and static parts are taken.
      step: the step to restore.

    Raises:
      InputError: the checkpoint belongs to another run.
      CheckpointError: it is not there, or not what was saved.
    """
    arrays, record = read(manager, run, step=step, like=_arrays(like))
    return Progress(
        state=with_arrays(like.state, arrays["state"]),
        metrics=arrays["metrics"],
        stopping=EarlyStopping(**record["stopping"]),
        history=tuple(record["history"]),
    )


def read(
    manager: ocp.CheckpointManager, run: dict[str, Any], *, step: int, like: Any
) -> tuple[Any, dict[str, Any]]:
    """Reads what `write` wrote.

    Args:
      manager: where it is.
      run: as in `write`.
      step: as in `write`.
      like: arrays whose tree, shapes and shardings are taken.

    Returns:
      The arrays and the record.

    Raises:
      InputError: the checkpoint belongs to another run.
      CheckpointError: it is not there, or not what was saved.
    """
    where = f"the checkpoint of step {step} in {manager.directory}"
    saved = _restore(manager, step, {"run": "", "digest": ""}, where)
    try:
        record = json.loads(saved["run"])
        # The first checkpoints held no fingerprint.
        lines = differences({"fingerprint": run["fingerprint"]} | record["recipe"], run)
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{where} is damaged: its record cannot be read") from None
    if lines:
        raise InputError(f"{where} has another recipe or dataset ({'; '.join(lines)})")
    arrays = _restore(manager, step, {"arrays": like}, where)["arrays"]
    if _digest(arrays, saved["run"]) != saved["digest"]:
        raise CheckpointError(f"{where} is damaged: its digest is not that of its contents")
    return jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), arrays, like), record


def _digest(arrays: Any, record: str) -> str:
    """Returns the SHA-256 of a checkpoint's arrays and record."""
    sha = hashlib.sha256(record.encode())
    for array in jax.tree.leaves(arrays):
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _arrays(progress: Progress) -> dict[str, Any]:
    """Returns the arrays of a run's checkpoint."""
    return {"state": state_arrays(progress.state), "metrics": progress.metrics}


def state_arrays(state: TrainState) -> dict[str, Any]:
    """Returns a state's arrays by field; keys as their data, which every backend can store."""
    arrays = {
        field.name: getattr(state, field.name)
        for field in dataclasses.fields(TrainState)
        if not field.metadata.get("static")
    }
    return arrays | {"key": jax.random.key_data(state.key)}


def with_arrays(like: TrainState, arrays: dict[str, Any]) -> TrainState:
    """Returns the state whose `state_arrays` are `arrays`, with the static parts of `like`."""
    return dataclasses.replace(like, **arrays | {"key": jax.random.wrap_key_data(arrays["key"])})


def _restore(
    manager: ocp.CheckpointManager, step: int, like: dict[str, Any], where: str
) -> dict[str, Any]:
    """Restores part of an item as numpy arrays and strings.

    Raises:
      CheckpointError: it cannot be read.
    """

    def how(leaf):
        return ocp.RestoreArgs(restore_type=str if isinstance(leaf, str) else np.ndarray)

    args = ocp.args.PyTreeRestore(
        item=like, restore_args=jax.tree.map(how, like), partial_restore=True
    )
    try:
        return dict(manager.restore(step, args=ocp.args.Composite(**{ITEM: args}))[ITEM])
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
        raise CheckpointError(f"{where} is damaged: {type(error).__name__}") from error
