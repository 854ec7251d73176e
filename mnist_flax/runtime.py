"""The process that an experiment runs in: devices, threads, caches. For scripts, not on import."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import absl.logging
import jax


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


def describe_devices() -> str:
    """Returns JAX's devices in words: "cpu: 2 devices (cpu)", "gpu: 1 device (NVIDIA H200)".

    Where JAX has only the CPU although an accelerator is attached, a second sentence says so.
    """
    devices = jax.devices()
    kinds = ", ".join(dict.fromkeys(device.device_kind for device in devices))
    count = f"{len(devices)} device{'s' if len(devices) > 1 else ''}"
    text = f"{devices[0].platform}: {count} ({kinds})"
    attached = _attached_accelerator() if devices[0].platform == "cpu" else None
    if attached is None:
        return text
    extra = "cuda12" if attached == "GPU" else "tpu"
    return (
        f"{text}. A {attached} is attached, but JAX does not use it: look at JAX_PLATFORMS, or "
        f"pip install 'jax[{extra}]=={jax.__version__}'"
    )


def _attached_accelerator() -> str | None:
    """Returns "GPU" or "TPU" if the operating system or Colab tells of one."""
    # Drivers make these files, and containers are given them; a newer TPU's is a VFIO group, which
    # other hardware has too, but its machine sets a variable.
    if list(Path("/dev").glob("nvidia[0-9]*")) or Path("/proc/driver/nvidia/version").exists():
        return "GPU"
    variables = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "COLAB_TPU_ADDR")
    if list(Path("/dev").glob("accel[0-9]*")) or any(os.environ.get(name) for name in variables):
        return "TPU"
    return "GPU" if os.environ.get("COLAB_GPU", "0") not in ("", "0") else None


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

    @property
    def exit_status(self) -> int:
        """The status that a shell expects of a process that a signal ended: 128 + its number.

        Where the signal came to another process of the job, it is that of SIGTERM.
        """
        return 128 + (self.signal or signal.SIGTERM)
