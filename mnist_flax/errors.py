"""The errors that a user of the package is meant to see."""

from typing import Any


class InputError(ValueError):
    """Something that was asked for is unknown or impossible.

    The message is one line: what was wrong and what to do. It is raised before anything is
    written; the experiment scripts print it and exit with status 2.
    """


class DivergedError(FloatingPointError):
    """Training met a loss or a parameter that is not finite.

    The last checkpoint, written while everything was finite, is kept. The experiment scripts
    print the message and exit with status 1.
    """


class CheckpointError(OSError):
    """A checkpoint is damaged, or cannot be read or written.

    The experiment scripts print the message and exit with status 2.
    """


class Interrupted(Exception):
    """Training was asked to stop and did, after the step in flight; or a study, after its training.

    Attributes:
      state: the training state after that step.
      metrics: the training metrics of the epoch so far; None where training was done.
      seconds: what the epoch so far has taken, by the names of its row.
    """

    def __init__(self, state: Any, metrics: Any):
        super().__init__(f"interrupted after step {state.step.max()}")
        self.state = state
        self.metrics = metrics
        self.seconds: dict[str, float] = {}
