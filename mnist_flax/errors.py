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
      step: that step.
      progress: the `Progress` after it; None where training was done.
    """

    def __init__(self, step: int, progress: Any = None):
        super().__init__(f"interrupted after step {step}")
        self.step = step
        self.progress = progress
