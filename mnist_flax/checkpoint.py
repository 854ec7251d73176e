"""Checkpoints: everything that a run is, in one Orbax item, written asynchronously.

Each holds a record, as JSON, of what was trained and how far it came, and a digest of all of its
contents. A checkpoint is damaged where a file is missing or the digest is not that of what is read,
and only then; whatever else keeps one from being read is an error that changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from mnist_flax import hosts
from mnist_flax.data import DatasetInfo
from mnist_flax.errors import CheckpointError, InputError
from mnist_flax.progress import Progress
from mnist_flax.recipe import completed, differences
from mnist_flax.steps import TrainState, is_key, without_keys
from mnist_flax.stopping import EarlyStopping
from mnist_flax.workdir import (
    LOCK_FILE,
    RECIPE_FILE,
    lock_workdir,
    read_json,
    require_no_checkpoint_lost,
)

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

CHECKPOINT_DIR = "checkpoints"
ITEM = "progress"
FORMAT = 4  # of the record; one that cannot be read any more gets another number
KEEP_LATEST = 2  # one to continue from, and one more for when that is damaged
SET_ASIDE = "damaged-"  # what the directory of a damaged checkpoint is renamed to, with its step
PACKAGES = ("mnist_flax", "jax", "flax", "optax", "orbax-checkpoint")

log = logging.getLogger(__name__)


class DamagedError(CheckpointError):
    """A checkpoint lacks a file, or is not what was saved."""


class Saved(NamedTuple):
    """A checkpoint as it is read.

    Attributes:
      step: its step.
      arrays: its arrays.
      record: its record.
    """

    step: int
    arrays: Any
    record: dict[str, Any]


def lock_run(
    held: contextlib.ExitStack, workdir: Path, run: dict[str, Any], *, resume: bool
) -> None:
    """Locks a run directory for this job until `held` is closed; `run` is the run's identity.

    Raises:
      InputError: `workdir` is not as `fit` needs it.
    """
    with hosts.sync_errors():
        if resume:
            check_same_recipe(workdir, run["recipe"])
        if hosts.is_primary():
            held.enter_context(lock_workdir(workdir, resume=resume))
    with hosts.sync_errors():
        check_shared(workdir)


def check_shared(workdir: Path) -> None:
    """Checks that process 0's lock on `workdir` is seen here; Orbax would wait for it for ever.

    Raises:
      InputError: it is not.
    """
    if not (workdir / LOCK_FILE).exists():
        raise InputError(
            f"{workdir} is not the directory that process 0 made; give one on a file system that "
            "all processes share"
        )


def check_same_recipe(workdir: Path, recipe: dict[str, Any]) -> None:
    """Checks that the run in `workdir`, if there is one, is of this recipe, as JSON values.

    Raises:
      InputError: it is of another; the differing fields are named.
    """
    path = workdir / RECIPE_FILE
    if path.exists() and (lines := differences(completed(read_json(path)), recipe)):
        raise InputError(
            f"the run in {workdir} has another recipe ({'; '.join(lines)}); leave these options "
            "out to continue it; or give another workdir to train by them from the beginning, or "
            "from the weights of this run with --start-from"
        )


@contextlib.contextmanager
def open_checkpoints(workdir: Path) -> Iterator[ocp.CheckpointManager]:
    """Opens `workdir`/checkpoints to write; on leaving, waits until what was saved is on disk.

    Raises:
      CheckpointError: on leaving, if what was saved last could not be written.
    """
    import orbax.checkpoint as ocp  # not before a run begins: it takes a second

    manager = ocp.CheckpointManager(
        (workdir / CHECKPOINT_DIR).absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=KEEP_LATEST),
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
    dataset = json.loads(json.dumps(dataclasses.asdict(info)))
    return {"recipe": recipe, "dataset": dataset}


def require_same(record: dict[str, Any], run: dict[str, Any], *, where: object) -> None:
    """Checks that a record is of the run whose `identity` is `run`.

    Raises:
      InputError: it is of another recipe, or of a dataset of another fingerprint.
    """
    lines = differences(completed(record["recipe"]), run["recipe"])
    old, new = ({"fingerprint": each["dataset"]["fingerprint"]} for each in (record, run))
    if lines := lines + differences(old, new):
        raise InputError(
            f"{where} has another recipe or dataset ({'; '.join(lines)}); continue it with its "
            "own, or train anew in another workdir"
        )


def save(manager: ocp.CheckpointManager, run: dict[str, Any], progress: Progress) -> None:
    """Saves a run's progress under its step; returns once the arrays are copied.

    `run` is the run's `identity`.

    Raises:
      CheckpointError: it, or the checkpoint before it, could not be written.
    """
    record = {
        "stopping": [dataclasses.asdict(stopping) for stopping in progress.stopping],
        "histories": progress.histories,
        "diverged": progress.diverged,
        "seconds": progress.seconds,
    }
    write(manager, run, step=progress.step, arrays=progress_arrays(progress), record=record)


def write(
    manager: ocp.CheckpointManager,
    run: dict[str, Any],
    *,
    step: int,
    arrays: Any,
    record: dict[str, Any],
) -> None:
    """Writes a checkpoint; returns once the arrays are copied.

    Args:
      manager: where it goes.
      run: the `identity` of what is trained.
      step: the steps taken.
      arrays: a pytree of arrays, none of them keys.
      record: whatever else belongs to it, as JSON values.

    Raises:
      CheckpointError: it, or the one before it, could not be written.
    """
    import orbax.checkpoint as ocp

    about = {"format": FORMAT, "versions": versions(), "tree": describe(arrays)}
    text = json.dumps(about | run | record)
    item = {"arrays": arrays, "run": text, "digest": _digest(arrays, text)}
    with _one_error(manager):
        manager.save(step, args=ocp.args.Composite(**{ITEM: ocp.args.PyTreeSave(item)}))


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide what a checkpoint is made of."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def describe(arrays: Any) -> list[str]:
    """Returns a line for each array: where it stands in the tree, its dtype and its shape."""

    def name(part) -> str:
        return str(next(getattr(part, a) for a in ("name", "key", "idx") if hasattr(part, a)))

    return [
        f"{'/'.join(map(name, path))} {array.dtype} {list(array.shape)}"
        for path, array in jax.tree.leaves_with_path(arrays)
    ]


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


def newest(
    workdir: Path, expect: Callable[[dict[str, Any]], Any], *, strict: bool, set_aside: bool
) -> Saved | None:
    """Reads the newest checkpoint that is not damaged. Processes agree on which that is.

    Damaged ones are named in the log. They are set aside, by renaming, only once an older one was
    read: then it is they that are at fault, and not the reader.

    Args:
      workdir: the run's directory.
      expect: takes a checkpoint's record, and returns arrays whose tree, shapes and shardings are
        taken; raises InputError where the checkpoint is another run's.
      strict: refuse where the newest is damaged.
      set_aside: whether to rename damaged ones; else nothing is changed.

    Returns:
      It, its arrays placed as those that `expect` returned; None where there never was one.

    Raises:
      InputError: `expect` raised it, or the checkpoint is of another format.
      CheckpointError: one cannot be read, though it is not damaged; or all are damaged; or the
        newest is, and `strict` is set. Nothing was changed.
    """
    directory = (workdir / CHECKPOINT_DIR).absolute()
    damaged: dict[int, str] = {}
    while (step := _step_before(directory, min(damaged, default=None))) is not None:
        reason = ""
        with hosts.sync_errors():
            try:
                saved, like = _read(directory / str(step), step, expect)
            except DamagedError as error:
                if strict:
                    raise
                reason = str(error)
        if any(hosts.agree(bool(reason))):
            damaged[step] = (
                reason or f"the checkpoint of step {step} is damaged for another process"
            )
            continue
        for reason in damaged.values():
            log.warning("%s; going back to the one of step %d", reason, step)
        if set_aside:
            _set_aside(directory, damaged)
        arrays = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), saved.arrays, like)
        return saved._replace(arrays=arrays)
    if damaged:
        raise CheckpointError(
            f"{next(iter(damaged.values()))}, and so is every other one there: nothing was "
            "changed; restore a copy of the directory, or train anew in another workdir"
        )
    return None


def restored(workdir: Path, run: dict[str, Any], fresh: Progress, *, strict: bool) -> Progress:
    """Returns the progress of the run in `workdir`, whose identity is `run`; `fresh` before any.

    Errors are as in `fit`.
    """

    def expect(record: dict[str, Any]) -> Any:
        require_same(record, run, where=f"the run in {workdir}")
        return progress_arrays(fresh)

    saved = newest(workdir, expect, strict=strict, set_aside=True)
    if saved is None:
        with hosts.sync_errors():
            require_no_checkpoint_lost(workdir)
        return fresh
    return progress_of(saved, fresh.states)


def _step_before(directory: Path, limit: int | None) -> int | None:
    """Returns the newest step saved before `limit`, as process 0 sees it; None if there is none.

    Raises:
      CheckpointError: the directory cannot be listed.
    """
    steps = [-1]
    with hosts.sync_errors():
        try:
            names = os.listdir(directory) if hosts.is_primary() and directory.exists() else []
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be read: {error.strerror}") from error
        steps += [int(name) for name in names if name.isdecimal()]
    step = hosts.from_first(max(s for s in steps if limit is None or s < limit))
    return None if step < 0 else step


def _set_aside(directory: Path, damaged: Iterable[int]) -> None:
    """Renames damaged checkpoints, which no step's name is taken from then."""
    with hosts.sync_errors():
        for step in damaged if hosts.is_primary() else ():
            name, number = f"{SET_ASIDE}{step}", 1
            while (directory / name).exists():
                number += 1
                name = f"{SET_ASIDE}{step}-{number}"
            (directory / str(step)).rename(directory / name)


def _read(directory: Path, step: int, expect: Callable[[dict[str, Any]], Any]) -> tuple[Saved, Any]:
    """Reads a checkpoint, as numpy arrays, and returns it with what `expect` returned.

    Raises:
      InputError: it is of another run or format.
      DamagedError: it is damaged.
      CheckpointError: it cannot be read.
    """
    where = f"the checkpoint of step {step} in {directory.parent}"
    saved = _restore(directory, {"run": "", "digest": ""}, where)
    try:
        record = json.loads(saved["run"])
    except (ValueError, TypeError):
        raise DamagedError(f"{where} is damaged: its record cannot be read") from None
    if record.get("format") != FORMAT:
        raise InputError(
            f"{where} is of format {record.get('format', 0)}, and this version of mnist_flax reads "
            f"format {FORMAT}; use the version that wrote it"
        )
    like = expect(record)
    if other := sorted(set(record["tree"]) ^ set(describe(like))):
        raise InputError(
            f"{where} has other arrays ({other[0]} is not in both), written with "
            f"{_words(record['versions'])}; here are {_words(versions())}: use those that wrote it"
        )
    arrays = _restore(directory, {"arrays": like}, where)["arrays"]
    if _digest(arrays, saved["run"]) != saved["digest"]:
        raise DamagedError(f"{where} is damaged: its digest is not that of its contents")
    return Saved(step, arrays, record), like


def _words(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _digest(arrays: Any, record: str) -> str:
    """Returns the SHA-256 of a checkpoint's arrays and record."""
    sha = hashlib.sha256(record.encode())
    for array in jax.tree.leaves(arrays):
        sha.update(np.ascontiguousarray(hosts.whole(array)).tobytes())
    return sha.hexdigest()


def progress_arrays(progress: Progress) -> dict[str, Any]:
    """Returns the arrays of a run's checkpoint."""
    return {
        "states": state_arrays(progress.states),
        "metrics": progress.metrics,
        "best": state_arrays(progress.best),
    }


def progress_of(saved: Saved, like: TrainState) -> Progress:
    """Returns the progress that `save` saved, with the static parts of the states `like`."""
    record = saved.record
    return Progress(
        step=saved.step,
        states=with_arrays(like, saved.arrays["states"]),
        metrics=saved.arrays["metrics"],
        best=with_arrays(like, saved.arrays["best"]),
        stopping=tuple(EarlyStopping(**values) for values in record["stopping"]),
        histories=tuple(map(tuple, record["histories"])),
        diverged=tuple(record["diverged"]),
        seconds=record["seconds"],
    )


def state_arrays(state: TrainState) -> dict[str, Any]:
    """Returns a state's arrays by field; keys as their data."""
    arrays = {
        field.name: getattr(state, field.name)
        for field in dataclasses.fields(TrainState)
        if not field.metadata.get("static")
    }
    return without_keys(arrays)


def with_arrays(like: TrainState, arrays: dict[str, Any]) -> TrainState:
    """Returns the state whose `state_arrays` are `arrays`, with the static parts of `like`."""
    fields = {name: getattr(like, name) for name in arrays}

    def as_in(own, array):
        if not is_key(own):
            return array
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(own))

    return dataclasses.replace(like, **jax.tree.map(as_in, fields, arrays))


def _restore(directory: Path, like: dict[str, Any], where: str) -> dict[str, Any]:
    """Restores part of an item as numpy arrays and strings.

    Raises:
      DamagedError: a file is missing or its contents are not what was written.
      CheckpointError: it cannot be read.
    """
    import orbax.checkpoint as ocp

    def how(leaf):
        return ocp.RestoreArgs(restore_type=str if isinstance(leaf, str) else np.ndarray)

    args = ocp.args.PyTreeRestore(
        item=like, restore_args=jax.tree.map(how, like), partial_restore=True
    )
    # The handler and not a manager, in which several processes would wait for each other.
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return dict(handler.restore(_epath(directory / ITEM), args=args))
    except Exception as error:  # Orbax and TensorStore raise many kinds
        first = error
    _require_readable(directory, first, where)
    try:
        return dict(handler.restore(_epath(directory / ITEM), args=args))
    except Exception as error:  # twice the same: it is no passing fault of a disk or a network
        _require_readable(directory, error, where)
        raise DamagedError(f"{where} is damaged: {type(error).__name__}") from error


def _epath(path: Path) -> Any:
    from etils import epath  # Orbax's own kind of path

    return epath.Path(path)


def _require_readable(directory: Path, error: Exception, where: str) -> None:
    """Checks that it was not the system that failed: every file below `directory` can be read.

    Raises:
      CheckpointError: one cannot, or `error` says that a resource ran out.
    """
    text = str(error)
    # TensorStore's words for errno, and for memory and file handles that ran out.
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "EMFILE" in text:
        line = text.strip().partition("\n")[0][-200:] or "out of memory"
        raise CheckpointError(f"{where} cannot be read ({line}); nothing was changed") from error

    def refuse(unreadable: OSError):
        if not isinstance(unreadable, FileNotFoundError):
            reason = f"{unreadable.filename}: {unreadable.strerror}"
            raise CheckpointError(f"{where} cannot be read ({reason}); nothing was changed")

    for folder, _, names in os.walk(directory, onerror=refuse):
        for name in names:
            try:
                with open(os.path.join(folder, name), "rb") as file:
                    while file.read(2**20):
                        pass
            except OSError as unreadable:
                unreadable.filename = name
                refuse(unreadable)
