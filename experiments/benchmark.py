"""Time this package beside PyTorch, Keras and plain Flax, in one run on one machine.

    make bench                                # everything, about 15 minutes on 2 cores
    python experiments/benchmark.py --peers .venv-peers/bin/python --sections steps

Contenders are processes that wait while another works; they take turns, and each figure is the
median of `rounds` turns. Expected on 2 cores: the notebook's step at 1.3 times the faster
peer, and 99.17% test accuracy in a few seconds where the notebook's recipe takes minutes.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mnist_flax.datasets import load_splits
from mnist_flax.errors import InputError
from mnist_flax.launch import command_line
from mnist_flax.workdir import require_directory, write_json

HERE = Path(__file__).parent
CONTENDERS = HERE / "contenders"
PAUSE_SECONDS = 0.5  # thread pools of the last contender spin for a while
DATA_BATCHES = 200  # a turn: many more than are read ahead while a contender waits
# The C library's allocator keeps what is freed, for every contender alike.
ALLOCATOR = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296"
Section = Literal["steps", "data", "phases", "accuracy"]


@dataclasses.dataclass(frozen=True)
class Command:
    """Options of the script.

    Attributes:
      sections: what to measure.
      rounds: turns that each contender takes.
      batch_size: examples per batch, in steps and data.
      peers: the Python that has PyTorch and Keras; without one only ours are measured.
      keras_epochs: epochs of the notebook's recipe to run in Keras; its five are extrapolated.
      seeds: seeds of our recipe in the section accuracy.
      recipe: the recipe that races to the notebook's accuracy.
      out: the JSON file to write.
    """

    sections: tuple[Section, ...] = ("steps", "data", "phases", "accuracy")
    rounds: int = 7
    batch_size: int = 128
    peers: Path | None = None
    keras_epochs: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    recipe: str = "quick"
    out: Path = Path("runs/benchmark.json")

    def __post_init__(self):
        if min(self.rounds, self.batch_size, self.keras_epochs, len(self.seeds)) < 1:
            raise InputError("rounds, batch_size, keras_epochs and seeds are at least 1")
        if self.peers is not None and not self.peers.exists():
            raise InputError(f"there is no Python at {self.peers}; `make bench` makes one")
        command_line.named_recipe(self.recipe)


def printed(words: list[str]) -> str:
    """Returns what a process printed.

    Raises:
      InputError: it failed; its last words are given.
    """
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    if run.returncode:
        last = last_line(run.stderr).removeprefix("error: ")
        raise InputError(f"{shlex.join(words)[:200]} failed: {last}")
    return run.stdout


def last_line(text: str) -> str:
    """Returns the last line of what a process said."""
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def answer(process: subprocess.Popen[str], request: str = "") -> str:
    """Sends a contender the request and returns its next line; "" where it has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request)
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline()


def race(contenders: dict[str, list[str]], *, batches: int, rounds: int) -> dict[str, list[float]]:
    """Lets contenders work in turns; returns the seconds of each turn by name.

    One that cannot start, or ends before its last turn, is named on stderr and left out.
    """
    environment = os.environ | {"GLIBC_TUNABLES": ALLOCATOR}
    running: dict[str, subprocess.Popen[str]] = {}
    seconds: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        # Files, not pipes: nobody would read what a contender says while it works.
        logs = {name: stack.enter_context(tempfile.TemporaryFile("w+")) for name in contenders}

        def leave_out(name: str) -> None:
            del running[name], seconds[name]
            logs[name].seek(0)
            print(f"{name} is left out: {last_line(logs[name].read())}", file=sys.stderr)

        for name, words in contenders.items():
            running[name] = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=logs[name],
                text=True,
                env=environment,
            )
            stack.callback(stop, running[name])
            seconds[name] = []
            if not answer(running[name]):
                leave_out(name)
        for _ in range(rounds):
            for name, process in list(running.items()):
                time.sleep(PAUSE_SECONDS)
                if line := answer(process, f"{batches}\n"):
                    seconds[name].append(json.loads(line)["seconds"])
                else:
                    leave_out(name)
    return seconds


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a contender."""
    process.kill()
    process.communicate()


def rates(seconds: dict[str, list[float]], *, images: int) -> list[dict[str, Any]]:
    """Returns a row a contender: median, lowest and highest images a second."""
    return [
        {
            "contender": name,
            "images_per_second": images / statistics.median(values),
            "lowest": images / max(values),
            "highest": images / min(values),
            "rounds": len(values),
        }
        for name, values in seconds.items()
    ]


def contender(script: str, *arguments: object, python: Path | str = sys.executable) -> list[str]:
    """Returns the command line of a contender."""
    return [str(python), str(CONTENDERS / script), *map(str, arguments)]


def time_steps(command: Command, data: Path) -> dict[str, Any]:
    """Times training steps of the notebook's network, float32, the same batch for everyone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    batch = command.batch_size
    contenders = {
        f"mnist_flax, {cores} devices": contender("flax_step.py", data, batch, "ours", cores),
        "mnist_flax, 1 device": contender("flax_step.py", data, batch, "ours", 1),
        "Flax, plain layers": contender("flax_step.py", data, batch, "plain", 1),
    }
    if peers := command.peers:
        for layout in ("channels_last", "contiguous_format"):
            for mode in ("eager", "compile"):
                words = contender("torch_step.py", data, batch, layout, mode, python=peers)
                contenders[f"PyTorch {mode}, {layout}"] = words
        for mode in ("graph", "xla"):
            words = contender("keras_step.py", data, batch, mode, python=peers)
            contenders[f"Keras/TensorFlow {mode}"] = words
    batches = max(8, 1536 // batch)
    rows = rates(race(contenders, batches=batches, rounds=command.rounds), images=batch * batches)
    speeds = {row["contender"]: row["images_per_second"] for row in rows}
    ours = speeds.get(next(iter(contenders)))  # unless it was left out
    others = [speed for name, speed in speeds.items() if not name.startswith("mnist")]
    ratio = ours / max(others) if ours and others else None
    return {"rows": rows, "batch_size": batch, "ours_over_fastest_other": ratio}


def time_data(command: Command, data: Path) -> dict[str, Any]:
    """Times preparing, loading, reading and augmenting."""
    code = (
        "import sys, time; from mnist_flax.data import load_splits; "
        "imported = time.perf_counter(); load_splits('mnist', val_size=5000, seed=0, "
        "data_dir=sys.argv[1]); print(time.perf_counter() - imported)"
    )
    with tempfile.TemporaryDirectory() as directory:
        words = [sys.executable, "-c", code, directory]
        prepare, second = (float(printed(words)) for _ in range(2))
    batch = command.batch_size
    contenders = {
        name: contender("flax_data.py", data, batch, kind)
        for name, kind in {
            "mnist_flax, resident batches": "resident",
            "mnist_flax, streamed batches": "stream",
            "mnist_flax, random_affine": "affine",
        }.items()
    }
    if peers := command.peers:
        contenders["PyTorch, affine_grid and grid_sample"] = contender(
            "torch_data.py", data, batch, python=peers
        )
        for name, kind in {"ImageDataGenerator": "generator", "layers": "layers"}.items():
            words = contender("keras_data.py", data, batch, kind, python=peers)
            contenders[f"Keras, {name}"] = words
    seconds = race(contenders, batches=DATA_BATCHES, rounds=command.rounds)
    rows = rates(seconds, images=DATA_BATCHES * batch)
    return {"rows": rows, "prepare_seconds": prepare, "second_load_seconds": second}


def train(directory: Path, *arguments: object) -> dict[str, Any]:
    """Runs train.py in a process; returns its result.json with the process's own seconds."""
    words = [sys.executable, str(HERE / "train.py"), "--workdir", str(directory)]
    began = time.perf_counter()
    printed([*words, *map(str, arguments)])
    whole = time.perf_counter() - began
    return json.loads((directory / "result.json").read_text()) | {"process_seconds": whole}


def time_phases(_command: Command, _data: Path) -> dict[str, Any]:
    """Times the default recipe's whole run, the second of two, from process start to exit."""
    code = "import time; t = time.perf_counter(); import mnist_flax; print(time.perf_counter() - t)"
    words = [sys.executable, "-c", code]
    imported = printed(words)
    with tempfile.TemporaryDirectory() as directory:
        train(Path(directory) / "first", "--epochs", 1)
        result = train(Path(directory) / "second")
    phases = {"import": float(imported), **result["seconds"], "process": result["process_seconds"]}
    return {"seconds": phases, "test_accuracy": result["test_accuracy"]}


def time_to_accuracy(command: Command, data: Path) -> dict[str, Any]:
    """Races our recipe and the notebook's in Keras to the notebook's accuracy."""
    with tempfile.TemporaryDirectory() as directory:
        runs = [
            train(Path(directory) / str(seed), "--recipe", command.recipe, "--seed", seed)
            for seed in command.seeds
        ]
    ours = {
        "recipe": command.recipe,
        "seeds": list(command.seeds),
        "test_accuracies": [run["test_accuracy"] for run in runs],
        "train_seconds": [run["seconds"]["train"] for run in runs],
        "process_seconds": [run["process_seconds"] for run in runs],
    }
    if not command.peers:
        return {"ours": ours}
    words = contender("keras_recipe.py", data, command.keras_epochs, python=command.peers)
    rows = [json.loads(line) for line in printed(words).splitlines() if line.startswith("{")]
    five = 5 * statistics.mean(row["seconds"] for row in rows)
    return {"ours": ours, "keras": {"epochs": rows, "five_epochs_seconds": five}}


def matrix_product() -> float:
    """Returns the GFLOP/s of a float32 product of two 2048 x 2048 matrices: the machine's speed."""
    code = (
        "import time, jax, jax.numpy as jnp\n"
        "a = jnp.ones((2048, 2048)); f = jax.jit(jnp.matmul); f(a, a).block_until_ready()\n"
        "def once():\n"
        "    t = time.perf_counter(); f(a, a).block_until_ready(); return time.perf_counter() - t\n"
        "print(2 * 2048**3 / min(once() for _ in range(20)) / 1e9)"
    )
    return float(printed([sys.executable, "-c", code]))


MEASURES = {
    "steps": time_steps,
    "data": time_data,
    "phases": time_phases,
    "accuracy": time_to_accuracy,
}


def show(name: str, result: dict[str, Any]) -> None:
    """Prints a section."""
    print(f"\n{name}")
    for row in result.get("rows", ()):
        print(
            f"  {row['contender']:40s} {row['images_per_second']:10,.0f} images/s"
            f"  ({row['lowest']:,.0f} to {row['highest']:,.0f})"
        )
    for key, value in result.items():
        if key != "rows":
            print(f"  {key}: {json.dumps(value)}")


def main(arguments):
    """Measures, prints a table and writes a JSON file."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    require_directory(command.out.parent, "out's directory")
    command_line.backend_of_children()
    splits = load_splits("mnist", val_size=0, seed=0)
    results: dict[str, Any] = {"gflops": matrix_product(), "cores": os.cpu_count()}
    print(f"matrix product {results['gflops']:.0f} GFLOP/s on {results['cores']} cores")
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "mnist.npz"
        np.savez(
            data,
            images=splits.train.images,
            labels=splits.train.labels,
            test_images=splits.test.images,
            test_labels=splits.test.labels,
        )
        for name in command.sections:
            results[name] = MEASURES[name](command, data)
            show(name, results[name])
            command.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(command.out, results)
    print(f"\nwritten to {command.out}")


if __name__ == "__main__":
    command_line.run(main)
