"""A run's directory: who may use it, and files in it that are whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock

from mnist_flax.errors import InputError

RECIPE_FILE = "recipe.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"


def local_path(path: str | os.PathLike[str], *, name: str) -> Path:
    """Returns a path of the local file system, with `~` expanded.

    Args:
      path: what the user gave.
      name: what the error calls it.

    Raises:
      InputError: it is the address of something elsewhere, such as gs://bucket; or it begins with
        `~` and the user has no home directory.
    """
    text = os.fspath(path)
    if re.match("[A-Za-z][A-Za-z0-9+.-]+:/", text):  # pathlib has made one slash of the two
        raise InputError(f"{name} must be a local path, got {text}")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(
            f"{name} is {text}, but this user has no home directory; give an absolute path"
        ) from None


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a kill, sees the old one or the new one, whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def claim(workdir: Path, *, resume: bool) -> Iterator[None]:
    """Holds a run directory for this process, making it if it is new.

    The lock is the operating system's, so a killed process leaves none behind.

    Args:
      workdir: the directory.
      resume: whether a run is expected in it.

    Raises:
      InputError: `resume` where no run is; a run, or another kind of file, where none is expected;
        or another process that holds the directory.
    """
    holds_run = (workdir / RECIPE_FILE).exists()
    if resume and not holds_run:
        raise InputError(f"there is no run to resume in {workdir}; leave out --resume to start one")
    if not resume and holds_run:
        raise InputError(f"{workdir} holds a run; give --resume to continue it, or another workdir")
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"{workdir} is not a directory; give another workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(workdir / LOCK_FILE)
    try:
        held = lock.acquire(blocking=False)
    except filelock.Timeout:
        raise InputError(f"another process is using {workdir}; wait for it, or stop it") from None
    with held:
        yield


class MetricsLog:
    """The epochs' metrics as JSON lines and as TensorBoard events.

    The lines are rewritten from the run's history on every start, so a line that a kill tore, or
    that tells of an epoch which the newest checkpoint does not hold, is gone.
    """

    def __init__(self, workdir: Path, history: Iterable[dict[str, Any]]):
        """Opens the log in `workdir`; `history` holds the rows of the epochs done so far."""
        from tensorboardX import SummaryWriter  # not before a run begins: it takes 0.2 s

        rows = list(history)
        write_text(workdir / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
        self._lines = (workdir / METRICS_FILE).open("a")
        purge_step = rows[-1]["step"] + 1 if rows else 0
        self._events = SummaryWriter(str(workdir), purge_step=purge_step)

    def write(self, row: dict[str, Any]) -> None:
        """Appends an epoch's row; its numbers also become TensorBoard scalars."""
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        for name, value in row.items():
            if value is not None and name not in ("epoch", "step"):
                self._events.add_scalar(name, value, row["step"])
        self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        self._lines.close()
        self._events.close()


class NoLog:
    """Stands for the log in processes that keep none."""

    def write(self, row: dict[str, Any]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""
