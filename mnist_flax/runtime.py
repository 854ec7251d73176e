"""The process that an experiment runs in: devices, threads, caches. For scripts, not on import."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import absl.logging
import jax

from mnist_flax.errors import Interrupted


def share_cores(batch_size: int) -> int:
    """Returns the largest number of the CPU's cores that can share a batch evenly."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(n for n in range(1, (cores or 1) + 1) if batch_size % n == 0)


def configure(*, cpu_devices: int | None = None) -> None:
    """Sets JAX up, before its backend starts.

    Compiled programs are kept in the user's cache directory, or in $JAX_COMPILATION_CACHE_DIR, so
    the second start is fast. Of other packages' log messages only critical ones are shown.

    Args:
      cpu_devices: how many JAX devices the CPU becomes; None leaves it one.
    """
    # Orbax and its event loop log tracebacks of what they raise too, and we report.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "mnist_flax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", cpu_devices)


def _unraisable(event) -> None:
    """Reports what Python cannot raise, but for writes whose event loop Orbax has closed."""
    if not (isinstance(event.exc_value, RuntimeError) and "loop is closed" in str(event.exc_value)):
        sys.__unraisablehook__(event)


class Interrupts:
    """Whether SIGTERM or SIGINT (Ctrl-C) asked the process to stop.

    The first signal is noted, so that training can end its step and write a checkpoint; a second
    one ends the process at once, by the signal's default action.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None

    def install(self) -> None:
        """Starts to listen."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, _frame) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    def __call__(self) -> bool:
        """Returns whether a signal came."""
        return self.signal is not None

    def stop(self, end: Interrupted) -> int:
        """Says how a study that was interrupted goes on; returns the exit status."""
        print(f"{end}; continue with the same command and --resume", file=sys.stderr)
        return self.exit_status

    @property
    def exit_status(self) -> int:
        """The status that a shell expects of a process that a signal ended: 128 + its number.

        Where the signal came to another process of the job, it is that of SIGTERM.
        """
        return 128 + (self.signal or signal.SIGTERM)
