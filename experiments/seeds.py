"""Train a recipe from many seeds: mean test accuracy, its spread and its 95% interval.

    python experiments/seeds.py --recipe quick --seeds 10 --first-seed 100

Ten seeds of `quick` take about half a minute on 2 cores and give 99.3% or more on average. They
are trained in one program, on the CPU a seed a core. The recipe's fields are options, as in
train.py; `--versus NAME` compares with another recipe on the same seeds.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from mnist_flax.errors import InputError, Interrupted
from mnist_flax.launch import command_line, options, runtime
from mnist_flax.studies.statistics import compare, describe, spread
from mnist_flax.views import require_views
from mnist_flax.workdir import holds_run, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(options.Training):
    """Options of the script, beside the recipe's.

    Attributes:
      recipe: the recipe's fields; its seed is not used.
      seeds: how many seeds, at least 2.
      first_seed: the first of them.
      versus: another recipe to train from the same seeds, as it is named: options that change
        fields change those of the first recipe alone.
      views: test also the mean of this many random views of each image, by the recipe's own
        augmentation; 0 tests the images as they are alone.
      workdir: where study.json, the strip plot and checkpoints go; by default runs/seeds-NAME.
      resume: continue the study in workdir.
    """

    seeds: int = 10
    first_seed: int = 100
    versus: str | None = None
    views: int = 0

    def __post_init__(self):
        if self.seeds < 2:
            raise InputError(f"seeds is {self.seeds}; a spread needs at least 2")


def rows(name: str, study: dict[str, Any]) -> list[str]:
    """Returns a study as rows of a table, one of them for views."""
    lines = [table_row(f"`{name}`", study)]
    if "views" in study:
        label = f"`{name}`, the mean of {study['views']['number']} views"
        lines.append(table_row(label, study | study["views"]))
    return lines


def table_row(label: str, study: dict[str, Any]) -> str:
    """Returns a study as a row: the columns from `recipe` to `s each` of RESULTS.md's table."""
    cells = [
        label,
        *spread(study),
        str(len(study["replicas"]) - len(study["diverged"])),
        f"{study['ensemble_accuracy']:.2%}",
        f"{study['ensemble_loss']:.4f}",
        f"{study['train_seconds_mean']:.3g}",
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments):
    """Trains every seed, prints the statistics, writes study.json and seeds.png."""
    name, command = options.parse_training(Command, arguments, description=__doc__ or "")
    recipes = {name: command.recipe}
    if command.versus is not None:
        recipes[f"{command.versus} (other)"] = command_line.named_recipe(command.versus)
    for recipe in recipes.values():
        require_views(recipe, count=command.views)
    workdir = command.workdir or Path("runs") / f"seeds-{name}"
    if command.resume and not holds_run(workdir / "replicas-0"):
        raise InputError(f"there is no study to resume in {workdir}; leave out --resume")
    cores = min(runtime.share_cores(recipe.batch_size) for recipe in recipes.values())
    command_line.begin(cpu_devices=command.devices or cores)

    from mnist_flax.reports.figures import plot_seeds, save_figure
    from mnist_flax.studies.seeds import run_seeds

    interrupts = runtime.Interrupts()
    interrupts.install()
    studies, accuracies = {}, {}
    for number, (label, recipe) in enumerate(recipes.items()):
        checkpoints = workdir / f"replicas-{number}"
        try:
            studies[label], accuracies[label] = run_seeds(
                recipe,
                seeds=range(command.first_seed, command.first_seed + command.seeds),
                views=command.views,
                data_dir=command.data_dir,
                archives=command.archives,
                devices=command.devices,
                workdir=checkpoints,
                resume=command.resume and holds_run(checkpoints),
                should_stop=interrupts,
            )
        except Interrupted as end:
            return interrupts.stop(end)
    for label, study in studies.items():
        print(describe(label, study))
        print(*rows(label, study), sep="\n")
    summary: dict[str, Any] = {"studies": studies}
    if command.versus is not None:
        summary |= compare(*accuracies.values())
        print(f"difference {summary['difference']:+.3%}, paired t-test p {summary['p_value']:.2g}")
    write_json(workdir / "study.json", summary)
    finite = {label: values[np.isfinite(values)] for label, values in accuracies.items()}
    save_figure(plot_seeds(finite), workdir / "seeds.png")
    print(f"written to {workdir}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
