"""How far a study of R replicas is, and what it came to; a run is the study of one.

States and metrics are stacked along a leading axis [R], as `replicas` says.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mnist_flax.errors import DivergedError
from mnist_flax.metrics import Metrics
from mnist_flax.recipe import Recipe
from mnist_flax.replicas import choose, replica
from mnist_flax.steps import TrainState
from mnist_flax.stopping import EarlyStopping

# A row of a history holds: epoch, from 1; step, taken since the start of the run; learning_rate, of
# its last step, the plateau's scale included; train_loss and train_accuracy, the means over its
# batches, each before its step; val_loss and val_accuracy after it, None without validation; losses
# in nats, accuracies in [0, 1]; compile_seconds, in the first epoch of each process; train_seconds,
# those before an interruption included; eval_seconds. Several replicas have an equal share each of
# what they took together.
Row = dict[str, Any]


class _Outcome:
    """What `Progress` and `FitResult` have in common: one replica's numbers, without an index."""

    states: TrainState
    histories: tuple[tuple[Row, ...], ...]

    @functools.cached_property
    def state(self) -> TrainState:
        """The state of a run: of the one replica."""
        (_,) = self.histories
        return replica(self.states, 0)

    @property
    def history(self) -> tuple[Row, ...]:
        """The rows of a run: of the one replica."""
        (history,) = self.histories
        return history

    @property
    def row(self) -> Row:
        """The row of a run's last epoch."""
        return self.history[-1]


@dataclasses.dataclass(frozen=True)
class Progress(_Outcome):
    """How far a study is: what a checkpoint holds beside the recipe.

    Attributes:
      step: steps that the replicas still in training have taken; it says which epoch, and where in
        it.
      states: the training states, [R, ...], on the devices; the reader's to keep.
      metrics: training metrics of the epoch that is under way, [R]; of no example at its start.
      best: the states at the end of the best epochs so far, or without validation of the last ones,
        [R, ...]; before there is one, the initial states.
      stopping: each replica's early stopping, which also names its best epoch.
      histories: each replica's rows, one per epoch done.
      diverged: why a replica was given up; None for the others.
      seconds: what the epoch that is under way has taken, by the names of its row.
    """

    step: int
    states: TrainState
    metrics: Metrics
    best: TrainState
    stopping: tuple[EarlyStopping, ...]
    histories: tuple[tuple[Row, ...], ...]
    diverged: tuple[str | None, ...]
    seconds: dict[str, float]

    @property
    def active_R(self) -> np.ndarray:
        """Which replicas are still in training, bool [R]."""
        replicas = zip(self.stopping, self.diverged, strict=True)
        return np.array([not stop.should_stop and reason is None for stop, reason in replicas])

    @property
    def best_epochs(self) -> tuple[int, ...]:
        """The epochs that `best` belongs to; 0 before there is one."""
        kept = zip(self.stopping, self.histories, strict=True)
        return tuple(stop.best_epoch or len(history) for stop, history in kept)

    def after_epoch(self, states: TrainState, rows: Sequence[Row], *, norms_R: np.ndarray):
        """Returns the progress once an epoch is done; replicas that had ended stay as they were.

        A replica of which a loss or the norm of the parameters is not finite is given up: it keeps
        its best state.

        Raises:
          DivergedError: every replica has been given up.
        """
        active_R = self.active_R
        improved_R = np.zeros(len(rows), bool)
        stopping, histories = list(self.stopping), list(self.histories)
        diverged = list(self.diverged)
        for i, row in enumerate(rows):
            if not active_R[i]:
                continue
            if (reason := why_diverged(row, norm=float(norms_R[i]))) is not None:
                diverged[i] = reason
                continue
            histories[i] = (*histories[i], row)
            improved_R[i] = True
            if row["val_loss"] is not None:
                stopping[i] = stopping[i].update(row["val_loss"], epoch=row["epoch"])
                improved_R[i] = stopping[i].best_epoch == row["epoch"]
        if all(reason is not None for reason in diverged):
            raise DivergedError(diverged[0])
        return dataclasses.replace(
            self,
            step=rows[0]["step"],
            states=states,
            best=choose(improved_R, states, self.best),
            stopping=tuple(stopping),
            histories=tuple(histories),
            diverged=tuple(diverged),
        )


def why_diverged(row: Row, *, norm: float) -> str | None:
    """Returns which number of an epoch is not finite, in words; None where all are."""
    watched = {
        "training loss": row["train_loss"],
        "norm of the parameters": norm,
        "validation loss": row["val_loss"] or 0.0,
    }
    for name, value in watched.items():
        if not math.isfinite(value):
            return diverged_line(name, value, epoch=row["epoch"])
    return None


def diverged_line(name: str, value: float, *, epoch: int) -> str:
    """Returns the error of a number that is not finite."""
    return f"the {name} is {value} in epoch {epoch}: training diverged; lower the learning rate"


def epoch_rows(
    metrics: Metrics, val: Metrics | None, *, epoch: int, step: int, rates_R: np.ndarray
) -> list[Row]:
    """Returns each replica's row of an epoch, without seconds."""
    none_R = [None] * len(rates_R)
    columns = {
        "learning_rate": rates_R.tolist(),
        "train_loss": np.asarray(metrics.loss).tolist(),
        "train_accuracy": np.asarray(metrics.accuracy).tolist(),
        "val_loss": none_R if val is None else np.asarray(val.loss).tolist(),
        "val_accuracy": none_R if val is None else np.asarray(val.accuracy).tolist(),
    }
    rows = zip(*columns.values(), strict=True)
    return [{"epoch": epoch, "step": step} | dict(zip(columns, row, strict=True)) for row in rows]


@dataclasses.dataclass(frozen=True)
class FitResult(_Outcome):
    """What a study came to, in the order of its seeds; a run's by `state`, `history`, `best_epoch`.

    Attributes:
      recipes: each replica's own recipe.
      states: [R, ...] the best epochs' states where there is a validation split, else the last.
      histories: each replica's rows of numbers, one per epoch.
      best_epochs: the epoch that each state belongs to; 0 where none was finite.
      stopped: whether early stopping ended the replica.
      diverged: why the replica was given up; None for the others.
    """

    recipes: tuple[Recipe, ...]
    states: TrainState
    histories: tuple[tuple[Row, ...], ...]
    best_epochs: tuple[int, ...]
    stopped: tuple[bool, ...]
    diverged: tuple[str | None, ...]

    @property
    def best_epoch(self) -> int:
        """The epoch of a run's state."""
        (epoch,) = self.best_epochs
        return epoch

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping ended a run."""
        (stopped,) = self.stopped
        return stopped

    def replica(self, index: int) -> FitResult:
        """Returns one replica as the result of its own run.

        Raises:
          DivergedError: it diverged.
        """
        if (reason := self.diverged[index]) is not None:
            raise DivergedError(f"replica {index} (seed {self.recipes[index].seed}): {reason}")
        one = slice(index, index + 1)
        return FitResult(
            recipes=self.recipes[one],
            states=jax.tree.map(lambda a: a[None], replica(self.states, index)),
            histories=self.histories[one],
            best_epochs=self.best_epochs[one],
            stopped=self.stopped[one],
            diverged=self.diverged[one],
        )


def result_of(recipes: tuple[Recipe, ...], progress: Progress) -> FitResult:
    """Returns what the replicas came to."""
    return FitResult(
        recipes=recipes,
        states=progress.best,
        histories=progress.histories,
        best_epochs=progress.best_epochs,
        stopped=tuple(stop.should_stop for stop in progress.stopping),
        diverged=progress.diverged,
    )
