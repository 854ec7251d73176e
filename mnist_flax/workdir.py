"""A run's directory: who may use it, and files in it that are whole or absent."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock

from mnist_flax.errors import InputError

RECIPE_FILE = "recipe.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # two letters at least: C:/ is a drive


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """Returns a path of the local file system, with `~` expanded.

    Args:
      path: what the user gave.
      name: what the error calls it.

    Raises:
      InputError: it is the address of something elsewhere, such as gs://bucket; or it begins with
        `~` and the user has no home directory.
    """
    text = os.fspath(path)
    if _SCHEME.match(text):
        address = re.sub(":/+", "://", text, count=1)  # a Path has lost one of the two slashes
        raise InputError(f"{name} must be a local path, but is {address}")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(
            f"{name} is {text}, but this user has no home directory; give an absolute path"
        ) from None


def require_directory(path: Path, name: str) -> None:
    """Checks, before any work, that files can be written into a directory, new or not.

    Raises:
      InputError: it is another kind of file, or what it would lie in may not be written.
    """
    nearest = next(p for p in (path, *path.parents) if p.exists() or p == p.parent or p == Path())
    if not nearest.is_dir():
        raise InputError(f"{name} is {path}, but {nearest} is not a directory; give another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{name} is {path}, but {nearest} cannot be written; give another")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, whole.

    So it is after a kill and, where the file system keeps its promises, after a loss of power.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # the new name is the directory's to keep
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all; null stands for NaN and infinity."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Returns `value` with None for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      InputError: it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def holds_run(workdir: Path) -> bool:
    """Returns whether a run, or a study, was begun in `workdir`."""
    return (workdir / RECIPE_FILE).exists()


def require_no_checkpoint_lost(workdir: Path) -> None:
    """Checks that a run without a checkpoint is one that was killed before its first.

    Raises:
      InputError: its log has more epochs than were ever begun without a checkpoint.
    """
    path = workdir / METRICS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    epochs = max((json.loads(line)["epoch"] for line in lines if line.endswith("}")), default=0)
    if epochs > 2:  # the second epoch's row is written before the first one's checkpoint is awaited
        raise InputError(
            f"{workdir} holds a run of {epochs} epochs and no checkpoint; put its checkpoints back,"
            " or train anew in another workdir"
        )


@contextlib.contextmanager
def lock_workdir(workdir: Path, *, resume: bool) -> Iterator[None]:
    """Holds a run directory for this process, making it if it is new.

    The lock is the operating system's, so a killed process leaves none behind.

    Args:
      workdir: the directory.
      resume: whether a run is expected in it.

    Raises:
      InputError: `resume` where no run is; a run, or another kind of file, where none is expected;
        or another process that holds the directory.
    """
    _check_expected(workdir, resume=resume)
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"{workdir} is not a directory; give another workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(workdir / LOCK_FILE)
    try:
        held = lock.acquire(blocking=False)
    except filelock.Timeout:
        raise InputError(f"another process is using {workdir}; wait for it, or stop it") from None
    with held:
        _check_expected(workdir, resume=resume)  # another process may have been here before
        yield


def _check_expected(workdir: Path, *, resume: bool) -> None:
    if resume and not holds_run(workdir):
        raise InputError(f"there is no run to resume in {workdir}; leave out --resume to start one")
    if not resume and holds_run(workdir):
        raise InputError(f"{workdir} holds a run; give --resume to continue it, or another workdir")


History = tuple[dict[str, Any], ...]


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """Returns a row's numbers by what a chart calls them: a study's names end in the replica."""
    suffix = f"/replica{row['replica']}" if "replica" in row else ""
    others = ("epoch", "step", "replica")
    found = {name: value for name, value in row.items() if name not in others}
    return {name + suffix: value for name, value in found.items() if value is not None}


class MetricsLog:
    """The epochs' metrics as JSON lines and as TensorBoard events.

    The lines are rewritten from the histories on every start, so a line that a kill tore, or
    that tells of an epoch which the newest checkpoint does not hold, is gone.
    """

    def __init__(self, workdir: Path, histories: Sequence[History], *, many: bool = False):
        """Opens the log in `workdir`.

        Args:
          workdir: the run's directory.
          histories: each replica's rows of the epochs done so far.
          many: whether rows name their replica, by its number.
        """
        from tensorboardX import SummaryWriter  # not before a run begins: it takes 0.2 s

        self._many, self._rows = many, [0] * len(histories)
        lines = [json.dumps(row) + "\n" for row in self._new(histories)]
        write_text(workdir / METRICS_FILE, "".join(lines))
        self._lines = (workdir / METRICS_FILE).open("a")
        last = max((history[-1]["step"] for history in histories if history), default=-1)
        self._events = SummaryWriter(str(workdir), purge_step=last + 1)

    def _new(self, histories: Sequence[History]) -> list[dict[str, Any]]:
        """Returns the rows that were not seen before, by epoch."""
        seen, self._rows = self._rows, [len(history) for history in histories]
        rows = [
            {"replica": i, **row} if self._many else row
            for i, history in enumerate(histories)
            for row in history[seen[i] :]
        ]
        return sorted(rows, key=lambda row: row["epoch"])

    def write(self, histories: Sequence[History]) -> None:
        """Appends the histories' new rows; their numbers also become TensorBoard scalars."""
        for row in self._new(histories):
            self._lines.write(json.dumps(row) + "\n")
            for tag, value in scalars(row).items():
                self._events.add_scalar(tag, value, row["step"])
        self._lines.flush()
        self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        self._lines.close()
        self._events.close()


class NoLog:
    """Stands for the log in processes that keep none."""

    def write(self, histories: Sequence[History]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""
