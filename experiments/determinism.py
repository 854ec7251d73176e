"""Run one recipe in several processes, with other threads and processors, to one digest.

    make determinism
    python experiments/determinism.py --data-dir DIR

Each line is one run in its own process. Expected on a CPU: one digest for all runs on two
devices, whatever the processors; one for all runs on one device, of as many processors. Takes a
minute and a half. Expected on a GPU, which each run compiles for anew: one digest for all.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mnist_flax.errors import InputError
from mnist_flax.launch import command_line, options

TRAIN = Path(__file__).parent / "train.py"
SMALL = ["--recipe", "default", "--val-size", "45000", "--epochs", "1"]
ONE = {0}
# Name, devices, processors (None: all), whether streamed, and the group that must agree.
CPU_RUNS = [
    ("two devices", 2, None, False, "two devices"),
    ("two devices, again", 2, None, False, "two devices"),
    ("two devices, on one processor", 2, ONE, False, "two devices"),
    ("two devices, streamed", 2, None, True, "two devices"),
    ("one device", 1, None, False, "one device"),
    ("one device, again", 1, None, False, "one device"),
    # XLA divides one device's sums among the processors that there are.
    ("one device, on one processor", 1, ONE, False, "one device and processor"),
    ("one device, on one processor, again", 1, ONE, False, "one device and processor"),
]
ACCELERATOR_RUNS = [
    ("one device", 1, None, False, "one device"),
    ("one device, again", 1, None, False, "one device"),
    ("one device, streamed", 1, None, True, "one device"),
]
# Kernels that sum in the same order each time, and are not chosen by timing them.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(options.DataDir):
    """Options of the script."""


def digest(
    workdir: Path,
    options: list[str],
    *,
    processors: set[int] | None,
    environment: Mapping[str, str],
) -> str:
    """Returns the digest of a run's final parameters and statistics."""

    def restrict():
        if processors is not None:
            os.sched_setaffinity(0, processors)

    words = [sys.executable, str(TRAIN), *SMALL, "--workdir", str(workdir), *options]
    run = subprocess.run(
        words, check=False, capture_output=True, text=True, preexec_fn=restrict, env=environment
    )
    if run.returncode:
        raise InputError(run.stderr.strip().splitlines()[-1].removeprefix("error: "))
    return json.loads((workdir / "result.json").read_text())["digest"]


def main(arguments):
    """Prints each run's digest; fails where two of a group differ."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    digests: dict[str, set[str]] = {}
    runs, environment = CPU_RUNS, dict(os.environ)
    if command_line.backend_of_children() != "cpu":
        runs = ACCELERATOR_RUNS
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {DETERMINISTIC}"
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # or only the first would compile
    with tempfile.TemporaryDirectory() as directory:
        for name, devices, processors, stream, group in runs:
            extra = ["--devices", str(devices), *(["--stream"] if stream else [])]
            extra += ["--data-dir", str(command.data_dir)] if command.data_dir else []
            workdir = Path(directory) / name
            found = digest(workdir, extra, processors=processors, environment=environment)
            digests.setdefault(group, set()).add(found)
            print(f"{found[:16]}  {name}", flush=True)
    same = all(len(found) == 1 for found in digests.values())
    print("the same bits" if same else "THE BITS DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    command_line.run(main)
