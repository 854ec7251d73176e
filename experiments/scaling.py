"""Measure images a second against replicas, batch size and devices; draw them.

    python experiments/scaling.py

On 2 cores it takes two and a half minutes. Expected: replicas that have a core each train 1.2 times
as many images as one replica on both cores; under vmap, which is for accelerators, far fewer;
larger batches help up to some 256. Contenders take turns, so other work on the machine meets all
alike.
"""

import dataclasses
from pathlib import Path

from mnist_flax.errors import InputError
from mnist_flax.launch import command_line, options, runtime
from mnist_flax.recipe import Recipe
from mnist_flax.workdir import require_directory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(options.DataDir):
    """Options of the script.

    Attributes:
      recipe: the recipe whose steps are timed.
      replicas: numbers of replicas, at the recipe's batch size.
      batches: batch sizes, for one replica.
      turns: timings of each, at least 1.
      images: how many images a timing takes at least.
      workdir: where scaling.json and scaling.png go.
    """

    recipe: str = "quick"
    replicas: tuple[int, ...] = (1, 2, 4, 8, 16)
    batches: tuple[int, ...] = (16, 64, 256, 1024)
    turns: int = 5
    images: int = 8192
    workdir: Path = Path("runs/scaling")

    def __post_init__(self):
        if self.turns < 1:
            raise InputError(f"turns is {self.turns}; give at least 1")
        if min(*self.replicas, *self.batches, 1) < 1:
            raise InputError("replicas and batches are at least 1")


def contenders(command: Command, recipe: Recipe, splits) -> list:
    """Returns everything to time, compiled."""
    import jax

    from mnist_flax.studies.speed import Contender, training

    cores = len(jax.devices())
    made = []

    def add(panel, line, size, *, replicas=1, devices=cores, batch=recipe.batch_size, loop=None):
        steps = max(1, command.images // (replicas * batch))
        sized = dataclasses.replace(recipe, batch_size=batch)
        run = training(sized, splits, replicas=replicas, devices=devices, steps=steps, loop=loop)
        made.append(Contender(panel, line, size, steps * replicas * batch, run))

    for replicas in command.replicas:
        add("replicas", "one after another", replicas, replicas=replicas, loop=True)
        add("replicas", "vmap", replicas, replicas=replicas, loop=False)
    for batch in command.batches:
        add("images in a batch", "1 device", batch, devices=1, batch=batch)
        if cores > 1 and batch % cores == 0:
            add("images in a batch", f"{cores} devices", batch, batch=batch)
    for devices in range(1, cores + 1):
        if recipe.batch_size % devices == 0:
            add("devices", "one replica", devices, devices=devices)
        add("devices", "one replica per device", devices, replicas=devices, devices=devices)
    return made


def main(arguments):
    """Prints a table, writes scaling.json and scaling.png."""
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    recipe = dataclasses.replace(command_line.named_recipe(command.recipe), val_size=0)
    require_directory(command.workdir, "workdir")
    command_line.begin(cpu_devices=runtime.share_cores(recipe.batch_size))

    import numpy as np

    from mnist_flax.datasets import load_splits
    from mnist_flax.reports.figures import plot_scaling, save_figure
    from mnist_flax.studies.speed import time_turns
    from mnist_flax.workdir import write_json

    splits = load_splits(recipe.dataset, val_size=0, data_dir=command.data_dir)
    made = contenders(command, recipe, splits)
    speeds = time_turns(made, turns=command.turns)
    rows, panels = [], {}
    for contender, measured in zip(made, speeds, strict=True):
        panel, line, size = contender[:3]
        middle = float(np.median(measured))
        print(f"{panel} {size}, {line}: {middle:,.0f} images/s")
        rows.append({"panel": panel, "line": line, "size": size, "images_per_second": measured})
        sizes, values = panels.setdefault(panel, {}).setdefault(line, ([], []))
        sizes.append(size)
        values.append(measured)
    command.workdir.mkdir(parents=True, exist_ok=True)
    write_json(command.workdir / "scaling.json", rows)
    save_figure(plot_scaling(panels), command.workdir / "scaling.png")
    print(f"written to {command.workdir}")


if __name__ == "__main__":
    command_line.run(main)
