"""Train a recipe and write a run directory: the claim is that one command learns MNIST.

    python experiments/train.py --recipe default --seed 1

Every field of a recipe is an option; --help lists them with the recipe's own values.
"""

import dataclasses
import shlex
import sys
import time
from pathlib import Path

from mnist_flax import hosts
from mnist_flax.errors import InputError, Interrupted
from mnist_flax.launch import command_line, options, runtime, trackers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(options.Training):
    """Options of the script, beside the recipe's.

    Attributes:
      recipe: the recipe's fields.
      workdir: the run's directory; by default a new one under runs/.
      resume: continue the run in workdir, by its own recipe; one that is named too must be it.
      start_from: a run whose weights this one begins from, with an optimizer and a schedule of its
        own (`--freeze convs norms` keeps a CNN's convolutions as they are).
      strict: do not resume where the newest checkpoint is damaged.
      stream: read training records as they are needed instead of holding them all.
      devices: how many devices share a batch; by default all, and on the CPU one a core. With
        distributed, how many each process has; by default all, and on the CPU one.
      wandb: log the run to Weights & Biases too; WANDB_MODE=offline keeps it for `wandb sync`.
      distributed: this is one of several processes that train together; README.md says how to
        start them.
    """

    start_from: Path | None = None
    strict: bool = False
    stream: bool = False
    wandb: bool = False
    distributed: bool = False


def new_workdir(name: str, seed: int) -> Path:
    """Returns runs/NAME-seedN, or the first of runs/NAME-seedN-2, -3, ... that is free."""
    first = Path("runs") / f"{name}-seed{seed}"
    later = (first.with_name(f"{first.name}-{number}") for number in range(2, 10**6))
    return first if not first.exists() else next(path for path in later if not path.exists())


def main(arguments):
    """Reads the command line and trains."""
    began = time.perf_counter()
    name, command = options.parse_training(Command, arguments, description=__doc__ or "")
    if command.resume:
        if command.workdir is None:
            raise InputError("resume needs the run's directory; give --workdir")
        if command_line.split_recipe(arguments)[1] == list(arguments):  # the run's own it is
            default = Command(recipe=command_line.recipe_of_run(command.workdir))
            command = command_line.parse(
                Command, arguments, default=default, description=__doc__ or ""
            )
    start(command)
    with hosts.abort_on_failure():
        return train(command, name, began)


def start(command: Command) -> None:
    """Sets JAX up, and joins the other processes.

    Raises:
      InputError: there are none to join, or no directory that they share.
    """
    if not command.distributed:
        cores = runtime.share_cores(command.recipe.batch_size)
        command_line.begin(cpu_devices=command.devices or cores)
        return
    if command.workdir is None:
        raise InputError("the processes need one directory; give --workdir to all of them")
    runtime.configure(cpu_devices=command.devices or 1)
    hosts.initialize()
    command_line.show_devices()


def choose_mesh(command: Command):
    """Returns the mesh to train on.

    Raises:
      InputError: there are too few devices, or a process has others than it was told.
    """
    import jax

    from mnist_flax.replicas import make_mesh

    if not command.distributed:
        return make_mesh(devices=command.devices)
    if command.devices not in (None, jax.local_device_count()):
        raise InputError(
            f"devices is {command.devices}, but this process has {jax.local_device_count()}"
        )
    return make_mesh()


def resume_command(command: Command, workdir: Path) -> str:
    """Returns the command line that continues the run, on the same data and devices."""
    words = [*command_line.program(), "--resume", "--workdir", str(workdir)]
    if command.images is not None:
        words += ["--images", str(command.images), "--image-shape", *map(str, command.image_shape)]
    for option in ("data_dir", "archives", "devices"):
        if (value := getattr(command, option)) is not None:
            words += [f"--{option.replace('_', '-')}", str(value)]
    for option in ("stream", "wandb", "distributed"):
        words += [f"--{option}"] if getattr(command, option) else []
    return shlex.join(words)


def train(command: Command, name: str, began: float) -> int:
    """Trains, evaluates on the test split once, writes the results."""
    from mnist_flax.evaluation import evaluate
    from mnist_flax.loop import fit
    from mnist_flax.reports.familiarity import fit_familiarity
    from mnist_flax.reports.results import write_results
    from mnist_flax.reports.runs import load_run

    recipe = command.recipe
    workdir = command.workdir or new_workdir(name, recipe.seed)
    data_began = time.perf_counter()
    with hosts.sync_errors():
        tracker = trackers.WandB(workdir, recipe) if command.wandb and hosts.is_primary() else None
        mesh = choose_mesh(command)
        splits = command.load(recipe, stream=command.stream)
        start_params = load_run(command.start_from).state if command.start_from else None
    data_seconds = time.perf_counter() - data_began
    # Until here a signal ends the process at once: there is nothing to save.
    interrupts = runtime.Interrupts()
    interrupts.install()
    try:
        result = fit(
            recipe,
            splits,
            start_params=start_params,
            workdir=workdir,
            resume=command.resume,
            strict=command.strict,
            mesh=mesh,
            should_stop=interrupts,
            track=tracker,
        )
    except Interrupted as stop:
        print(f"{stop}; continue with: {resume_command(command, workdir)}", file=sys.stderr)
        return interrupts.exit_status
    if hosts.is_primary() and not command.distributed:
        fit_familiarity(result.state, splits).save(workdir)
    test_began = time.perf_counter()
    test = evaluate(result.state, splits.test)
    if not hosts.is_primary():
        return 0
    summary = write_results(
        workdir,
        recipe,
        splits.info,
        result,
        test_examples=splits.test,
        test=test,
        data_seconds=data_seconds,
        test_seconds=time.perf_counter() - test_began,
    )
    if tracker is not None:
        tracker.finish(test_accuracy=test.accuracy)
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in summary["seconds"].items())
    print(f"{phases}; whole run {time.perf_counter() - began:.1f} s")
    print(f"best epoch {result.best_epoch} of {len(result.history)}; results in {workdir}")
    print(f"test accuracy {test.accuracy:.2%} ({test.correct}/{test.total})")
    return 0


if __name__ == "__main__":
    command_line.run(main)
