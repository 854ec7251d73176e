"""The process that an experiment runs in: devices, threads, caches. For scripts, not on import."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import tempfile
from pathlib import Path

import absl.logging
import jax

from mnist_flax.errors import InputError, Interrupted

# Each device of the CPU holds all training images, of MNIST 47 MB. A process that had just put them
# there took 0.3 GB with one device, 0.9 GB with 16 and 2.9 GB with 64.
MAX_CPU_DEVICES = 16
# A run compiles some 40 programs of 11 kB on average, so these are of 500 runs that share none.
# JAX's own limit, `jax_compilation_cache_max_size`, looks at every entry whenever it writes one:
# with 1,000 in the directory that took 0.3 s a program, with 5,000 nearly 2 s.
CACHE_BYTES = 2**28


def cpu_quota(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float:
    """Returns how many cores' time the process's control groups leave it; infinity for all.

    Args:
      root: where the control groups are mounted, of version 1 or 2.
      membership: the file that names the process's groups, as in cgroups(7).
    """
    quotas = [math.inf]
    with contextlib.suppress(OSError):
        groups = [line.split(":", 2) for line in membership.read_text().splitlines()]
        for _, controllers, path in groups:
            # Within a container the path may be the host's, and the container's group the root.
            places = [Path(path.lstrip("/")), *Path(path.lstrip("/")).parents, Path()]
            for place in dict.fromkeys(places):
                if not controllers:
                    files = [root / place / "cpu.max"]
                elif "cpu" in controllers.split(","):
                    group = root / "cpu" / place
                    files = [group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"]
                else:
                    continue
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
                    quota, period = " ".join(file.read_text() for file in files).split()
                    quotas += [int(quota) / int(period)] if int(quota) > 0 else []
    return min(quotas)


def usable_cores() -> int:
    """Returns how many of the machine's cores the process may use: affinity and quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(min(cores or 1, cpu_quota())))


def share_cores(batch_size: int) -> int:
    """Returns the largest number of usable cores, up to 16, that can share a batch evenly."""
    cores = min(usable_cores(), MAX_CPU_DEVICES)
    return max(n for n in range(1, cores + 1) if batch_size % n == 0)


def configure(*, cpu_devices: int | None = None) -> None:
    """Sets JAX up, before its backend starts.

    Compiled programs are kept in the user's cache directory, or in $JAX_COMPILATION_CACHE_DIR, so
    the second start is fast; where neither can be written, nowhere. In the user's cache directory
    they take 256 MiB at most: what was used longest ago is deleted. Of other packages' log
    messages only critical ones are shown.

    Args:
      cpu_devices: how many JAX devices the CPU becomes; None leaves it one.
    """
    # Orbax and its event loop log tracebacks of what they raise too, and we report.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # Where it cannot write its configuration, Matplotlib takes a temporary directory and says so.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    sys.unraisablehook = _unraisable
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (cache := _cache()):
        prune(cache, limit=CACHE_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", cpu_devices)


def start() -> None:
    """Starts JAX's backend.

    Raises:
      InputError: the platform that was asked for is not there.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for CUDA without its plugin
        asked = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        line = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0]
        reason = f" ({line})" if line else ""
        what = f"JAX_PLATFORMS is {asked}, but it" if asked else "JAX"
        raise InputError(
            f"{what} cannot be used here{reason}; unset JAX_PLATFORMS, or set it to cpu"
        ) from None


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


def _cache() -> Path | None:
    """Returns the directory for compiled programs, made if need be; None if it cannot be used."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        cache = home / "mnist_flax" / "jax"
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return None


def prune(directory: Path, *, limit: int) -> None:
    """Deletes the files of a directory that were used longest ago, until `limit` bytes are left."""
    files = []
    for path in directory.iterdir():
        with contextlib.suppress(OSError):  # another process was quicker
            about = path.stat()
            files.append((max(about.st_atime_ns, about.st_mtime_ns), about.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size


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
