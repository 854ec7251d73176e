"""Kill training at random moments, resume it, and compare the end with a run that was left alone.

    python experiments/crash_test.py --kills 100

Real processes, SIGKILL. Kills land anywhere: in imports, data preparation, compilation, an epoch,
validation, while a checkpoint or a result is being written. Expected: every kill recovered, with
parameters, statistics, optimizer state, metrics and result.json the same, bit for bit (seconds
aside). A hundred kills take about a quarter of an hour on 2 cores.
"""

import collections
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mnist_flax import checkpoint
from mnist_flax.datasets import load_splits
from mnist_flax.errors import InputError
from mnist_flax.launch import command_line, options
from mnist_flax.loop import initial_progress
from mnist_flax.recipe import from_dict
from mnist_flax.replicas import make_mesh
from mnist_flax.reports.results import RESULT_FILE
from mnist_flax.workdir import METRICS_FILE, RECIPE_FILE

TRAIN = Path(__file__).parent / "train.py"
SMALL = "--val-size 57000 --epochs 4 --batch-size 100 --model.widths 4 8 --model.padding SAME VALID"
SMALL += " --model.pool True True --model.hidden 16 --model.dropout 0.2"
SCENARIOS = {
    "resident": SMALL,
    "streamed": f"{SMALL} --stream",
    # A network and calls as long as anyone's: XLA must compute them the same however divided.
    "two devices": "--recipe default --val-size 50000 --epochs 3 --devices 2",
    "plateau": f"{SMALL} --plateau.patience 1 --plateau.min-delta 0.9",
    "early stopping": f"{SMALL} --epochs 9 --stopping.patience 1 --stopping.min-delta 0.1",
}
TIMEOUT_SECONDS = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(options.DataDir):
    """Options of the script.

    Attributes:
      kills: how many processes to kill.
      seed: of the moments.
      scenarios: which kinds of run, by name; all by default.
      prepare: whether the first victim must also prepare the data, in an empty directory.
    """

    kills: int = 100
    seed: int = 0
    scenarios: tuple[str, ...] = tuple(SCENARIOS)
    prepare: bool = True

    def __post_init__(self):
        if self.kills < 1:
            raise InputError(f"kills is {self.kills}; give at least 1")
        if unknown := set(self.scenarios) - set(SCENARIOS):
            raise InputError(
                f"scenarios {sorted(unknown)} are unknown; choose from {', '.join(SCENARIOS)}"
            )


def start(scenario: str, workdir: Path, data_dir: Path | None) -> subprocess.Popen:
    """Starts a run, or continues the one that `workdir` holds."""
    words = [sys.executable, str(TRAIN), *SCENARIOS[scenario].split(), "--workdir", str(workdir)]
    words += ["--data-dir", str(data_dir)] if data_dir else []
    words += ["--resume"] if (workdir / RECIPE_FILE).exists() else []
    return subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=workdir.parent
    )


def finish(process: subprocess.Popen) -> None:
    """Waits for a run's end.

    Raises:
      RuntimeError: it failed.
    """
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    if process.returncode:
        raise RuntimeError(f"a run ended with status {process.returncode}:\n{errors[-2000:]}")


def rows(workdir: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of metrics.jsonl."""
    path = workdir / METRICS_FILE
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def writing_checkpoint(workdir: Path) -> bool:
    """Returns whether a checkpoint is half written."""
    return any((workdir / checkpoint.CHECKPOINT_DIR).glob("*orbax-checkpoint-tmp*"))


def phase(workdir: Path) -> str:
    """Returns how far a run had come, by what it left."""
    if (workdir / RESULT_FILE).exists():
        return "after the result"
    if writing_checkpoint(workdir):
        return "checkpoint being written"
    if not (workdir / RECIPE_FILE).exists():
        return "import or data"
    if not rows(workdir):
        return "compilation or first epoch"
    return "later"


def kill(process: subprocess.Popen, workdir: Path, moments: random.Random, seconds: float) -> bool:
    """Kills a run at a random moment; returns False where it had ended before.

    One kill in three waits for a checkpoint to be under way, for those moments are short.
    """
    aimed = moments.random() < 1 / 3
    deadline = time.monotonic() + moments.uniform(0, seconds)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
        if aimed and writing_checkpoint(workdir):
            time.sleep(moments.uniform(0, 0.05))
            break
    if process.poll() is not None:
        return False
    process.kill()
    process.communicate()
    return True


def timeless(value: Any) -> Any:
    """Drops the seconds from a JSON value."""
    if isinstance(value, dict):
        return {name: timeless(v) for name, v in value.items() if not name.endswith("seconds")}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def final_arrays(workdir: Path, data_dir: Path | None) -> list[np.ndarray]:
    """Returns every array of the last checkpoint."""
    recipe = from_dict(json.loads((workdir / RECIPE_FILE).read_text()))
    splits = load_splits(recipe.dataset, val_size=recipe.val_size, seed=0, data_dir=data_dir)
    steps = recipe.steps_per_epoch(len(splits.train.labels))
    like = initial_progress([recipe], splits.info, steps=steps, mesh=make_mesh(devices=1))
    saved = checkpoint.newest(
        workdir, lambda record: checkpoint.progress_arrays(like), strict=True, set_aside=False
    )
    return [np.asarray(leaf) for leaf in jax.tree.leaves(saved and saved.arrays)]


def differences(reference: Path, victim: Path, data_dir: Path | None) -> list[str]:
    """Returns what differs between two finished runs, seconds aside."""
    found = []
    results = [json.loads((d / RESULT_FILE).read_text()) for d in (reference, victim)]
    if timeless(results[0]) != timeless(results[1]):
        found.append(RESULT_FILE)
    if timeless(rows(reference)) != timeless(rows(victim)):
        found.append(METRICS_FILE)
    ours, theirs = (final_arrays(d, data_dir) for d in (reference, victim))
    if not ours or [a.tobytes() for a in ours] != [a.tobytes() for a in theirs]:
        found.append("the arrays of the last checkpoint")
    return found


def main(arguments):
    """Kills and resumes runs until there were enough kills; fails if any end differs."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    moments = random.Random(command.seed)
    load_splits("mnist", val_size=0, seed=0, data_dir=command.data_dir)
    killed, recovered, phases = 0, 0, collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        references = {}
        trial = 0
        while killed < command.kills:
            scenario = command.scenarios[trial % len(command.scenarios)]
            if scenario not in references:
                finish(start(scenario, root / f"{scenario} first", command.data_dir))  # compiles
                reference = root / f"{scenario} reference"
                began = time.monotonic()
                finish(start(scenario, reference, command.data_dir))
                references[scenario] = reference, time.monotonic() - began
            reference, seconds = references[scenario]
            data_dir, reach = command.data_dir, seconds
            if command.prepare and trial == 0:
                data_dir, reach = root / "data", 4 * seconds
                data_dir.mkdir()
            victim = root / f"victim {trial}"
            wanted, here = min(moments.randint(2, 7), command.kills - killed), 0
            while here < wanted:
                process = start(scenario, victim, data_dir)
                if not kill(process, victim, moments, reach):
                    finish(process)
                    break
                phases[phase(victim)] += 1
                here += 1
            if not (victim / RESULT_FILE).exists() or here == wanted:
                finish(start(scenario, victim, data_dir))
            killed += here
            found = differences(reference, victim, command.data_dir)
            recovered += 0 if found else here
            verdict = f"DIFFERS: {', '.join(found)}" if found else "the same bits"
            print(f"{scenario}: {here} kills, {verdict}; {recovered}/{killed}", flush=True)
            trial += 1
    print(", ".join(f"{name} {count}" for name, count in phases.most_common()))
    print(f"{recovered}/{killed} recovered")
    return 0 if recovered == killed else 1


if __name__ == "__main__":
    command_line.run(main)
