"""Weights & Biases; `docs/trackers.md` says how to write to another tracker."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from mnist_flax.errors import InputError
from mnist_flax.progress import Row
from mnist_flax.recipe import Recipe, to_dict
from mnist_flax.workdir import scalars, write_text

ID_FILE = "wandb_id.txt"


class WandB:
    """Sends rows to a run of Weights & Biases, for `fit(track=...)`.

    The run begins with the first row, so what is refused leaves none. Its id is kept in the run
    directory and taken again on a resumption. WANDB_* variables go before what is chosen here.
    """

    def __init__(self, workdir: Path, recipe: Recipe):
        """Logs in, unless WANDB_MODE is offline or disabled.

        Args:
          workdir: the run's directory, in which W&B keeps its files too.
          recipe: what W&B calls the run's config.

        Raises:
          InputError: the package is not installed, or W&B cannot be logged in to.
        """
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InputError("W&B needs its package: pip install -e '.[wandb]'") from None
        self._wandb, self._workdir, self._recipe = wandb, workdir, recipe
        if os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
            self._or_one_line(wandb.login)

    def _or_one_line(self, function: Any, **options: Any) -> Any:
        """Calls a function of W&B, whose own errors become an InputError."""
        try:
            return function(**options)
        except self._wandb.Error as error:
            line = " ".join(str(error).split())
            raise InputError(f"W&B: {line}; WANDB_MODE=offline does without its server") from None

    @functools.cached_property
    def _run(self) -> Any:
        path, variables = self._workdir / ID_FILE, os.environ
        known = {"id": path.read_text(), "resume": "allow"} if path.exists() else {}
        run = self._or_one_line(
            self._wandb.init,
            project=variables.get("WANDB_PROJECT", "mnist_flax"),
            name=variables.get("WANDB_NAME", self._workdir.name),
            dir=variables.get("WANDB_DIR", str(self._workdir)),
            config=to_dict(self._recipe),
            **known,
        )
        write_text(path, run.id)
        return run

    def __call__(self, row: Row) -> None:
        """Logs a row under its epoch; the names of a study's numbers end in the replica."""
        self._run.log({"epoch": row["epoch"], **scalars(row)}, step=row["epoch"])

    def finish(self, **summary: float) -> None:
        """Ends the run, with numbers of its whole; without it W&B does so as the process ends."""
        self._run.summary.update(summary)
        self._run.finish()
