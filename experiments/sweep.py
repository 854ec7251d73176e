"""Search numeric fields of a recipe: chosen on validation, the winner trained anew on fresh seeds.

    python experiments/sweep.py --recipe quick --vary optimizer.learning_rate=0.2,0.4,0.8
    python experiments/sweep.py --recipe fast --vary augment.rotate=0:20 augment.zoom=0:.2 --draws 8

A list of values is a grid; with `--draws` the values are drawn at random, from lists and from
ranges LOW:HIGH (log-uniform where LOW is above 0). The first takes about half a minute on 2 cores:
its three rates reach 99.1 to 99.3%, and chance decides. The test split is looked at for the winner
alone.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mnist_flax.errors import DivergedError, InputError, Interrupted
from mnist_flax.launch import command_line, options, runtime
from mnist_flax.recipe import traceable, with_fields
from mnist_flax.workdir import holds_run, write_json

SET_BY_THE_SEARCH = ("seed", "val_size", "split_seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(options.Training):
    """Options of the script, beside the recipe's.

    Attributes:
      recipe: the recipe's fields; its seed and val_size serve the winner's training only.
      vary: fields and their values, as NAME=V1,V2,... or NAME=LOW:HIGH.
      draws: how many points to draw at random; 0 tries every point of the grid.
      seeds: how many seeds at each point.
      search_val_size: validation examples that choose, taken from training.
      fresh_seeds: how many seeds to train the winner from, at least 2.
      first_seed: the first seed of the search; the winner's begin at 1000 above it.
      workdir: where sweep.json, response.png and checkpoints go; by default runs/sweep-NAME.
      resume: continue the sweep in workdir; give the same options again.
    """

    vary: tuple[str, ...] = ()
    draws: int = 0
    seeds: int = 2
    search_val_size: int = 10_000
    fresh_seeds: int = 3
    first_seed: int = 0

    def __post_init__(self):
        if self.draws < 0:
            raise InputError(f"draws is {self.draws}; give 0 for the grid, or a number of points")
        if self.seeds < 1 or self.fresh_seeds < 2:
            raise InputError("give at least 1 seed a point, and 2 fresh_seeds for the winner")
        if self.search_val_size < 1:
            raise InputError(f"search_val_size is {self.search_val_size}; validation must choose")


class Choice(NamedTuple):
    """What a field may be: one of the numbers or, where `ranged`, anything between the two."""

    numbers: tuple[float, ...]
    ranged: bool

    def draw(self, random: np.random.Generator) -> float:
        """Returns a number at random; log-uniform in a range above 0."""
        if not self.ranged:
            return float(random.choice(self.numbers))
        low, high = self.numbers
        if low > 0:
            return float(np.exp(random.uniform(np.log(low), np.log(high))))
        return float(random.uniform(low, high))


def parse_vary(words: tuple[str, ...]) -> dict[str, Choice]:
    """Returns what each field may be.

    Raises:
      InputError: there is no word, or one is neither NAME=V1,V2,... nor NAME=LOW:HIGH, or names a
        field twice, or one that the search sets itself.
    """
    if not words:
        raise InputError("vary is empty; give a field, as optimizer.learning_rate=0.1,0.2")
    fields: dict[str, Choice] = {}
    for word in words:
        name, _, text = word.partition("=")
        name, ranged = name.replace("-", "_"), ":" in text
        try:
            numbers = tuple(float(number) for number in text.split(":" if ranged else ","))
        except ValueError:
            numbers = ()
        sound = bool(numbers) and all(map(math.isfinite, numbers)) and name not in fields
        if not sound or (ranged and not (len(numbers) == 2 and numbers[0] < numbers[1])):
            raise InputError(f"vary {word!r} is not NAME=V1,V2,... or NAME=LOW:HIGH, each once")
        if name in SET_BY_THE_SEARCH:
            raise InputError(f"vary names {name}, which the search sets itself; see --help")
        fields[name] = Choice(numbers, ranged)
    return fields


def points(fields: dict[str, Choice], *, draws: int, seed: int) -> list[dict[str, float]]:
    """Returns the points to try: the grid, or `draws` at random.

    Raises:
      InputError: a range without draws.
    """
    if draws:
        random = np.random.default_rng(seed)
        return [
            {name: choice.draw(random) for name, choice in fields.items()} for _ in range(draws)
        ]
    if ranges := [name for name, choice in fields.items() if choice.ranged]:
        raise InputError(f"{ranges[0]} has a range; give --draws, or a list of values")
    grid = itertools.product(*(choice.numbers for choice in fields.values()))
    return [dict(zip(fields, numbers, strict=True)) for numbers in grid]


def load(command: Command):
    """Returns the splits that the search trains and chooses on."""
    return command.load(command.recipe, val_size=command.search_val_size)


def search(
    tried: list[dict[str, float]],
    command: Command,
    splits,
    *,
    workdir: Path,
    should_stop: Callable[[], bool],
) -> np.ndarray:
    """Returns the validation accuracies [points, seeds]; that of a run that diverged is NaN.

    Points that differ only in what replicas of one program may differ in are trained together.

    Raises:
      Interrupted: `should_stop()` became true.
    """
    from mnist_flax.loop import fit
    from mnist_flax.replicas import make_mesh

    accuracies = np.full((len(tried), command.seeds), np.nan)
    replicas = list(itertools.product(range(len(tried)), range(command.seeds)))
    together = [name for name in tried[0] if name in traceable(command.recipe)]
    apart = [name for name in tried[0] if name not in together]
    groups = dict.fromkeys(tuple(point[name] for name in apart) for point in tried)
    for number, values in enumerate(groups):
        fixed = dict(zip(apart, values, strict=True))
        here = [(row, seed) for row, seed in replicas if fixed.items() <= tried[row].items()]
        common = with_fields(command.recipe, fixed | {"val_size": command.search_val_size})
        directory = workdir / f"search-{number}"
        result = fit(
            common,
            splits,
            seeds=[command.first_seed + seed for _, seed in here],
            vary={name: [tried[row][name] for row, _ in here] for name in together},
            mesh=make_mesh(devices=command.devices, replicas=len(here)),
            workdir=directory,
            resume=command.resume and holds_run(directory),
            should_stop=should_stop,
        )
        best = command.recipe.val_size > 0
        for i, (row, seed) in enumerate(here):
            accuracies[row, seed] = val_accuracy(result, i, best=best)
    return accuracies


def val_accuracy(result, index: int, *, best: bool) -> float:
    """Returns what a replica is chosen by; NaN for one that diverged.

    It is the accuracy of the epoch whose state the winner will end with: the best one, or the last
    where the winner trains without validation.
    """
    if result.diverged[index] is not None:
        return math.nan
    epoch = result.best_epochs[index] if best else len(result.histories[index])
    return result.histories[index][epoch - 1]["val_accuracy"]


def mean_of_finite(values: np.ndarray) -> float:
    """Returns the mean of the numbers among `values`; NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def winner(accuracies: np.ndarray) -> int:
    """Returns the point of the highest mean, among those of which the fewest seeds diverged.

    Raises:
      DivergedError: every seed of every point did.
    """
    counts = np.isfinite(accuracies).sum(axis=1)
    if not counts.any():
        raise DivergedError(f"all {accuracies.size} networks diverged; lower the learning rate")
    return max(range(len(counts)), key=lambda p: (counts[p], mean_of_finite(accuracies[p])))


def describe(point: dict[str, float], accuracies: np.ndarray, first_seed: int) -> str:
    """Returns a point and what its seeds reached, as a line."""
    words = ", ".join(f"{field} {value:.4g}" for field, value in point.items())
    lost = [str(first_seed + seed) for seed in np.flatnonzero(~np.isfinite(accuracies))]
    diverged = f"; {len(lost)} more diverged: {', '.join(lost)}" if lost else ""
    mean, count = mean_of_finite(accuracies), len(accuracies) - len(lost)
    return f"{words}: validation accuracy {mean:.3%} ({count} seeds{diverged})"


def main(arguments):
    """Searches on validation, trains the winner anew, writes sweep.json and response.png."""
    began = time.perf_counter()
    name, command = options.parse_training(Command, arguments, description=__doc__ or "")
    tried = points(parse_vary(command.vary), draws=command.draws, seed=command.first_seed)
    recipes = [with_fields(command.recipe, point) for point in tried]
    workdir = command.workdir or Path("runs") / f"sweep-{name}"
    if command.resume and not holds_run(workdir / "search-0"):
        raise InputError(f"there is no sweep to resume in {workdir}; leave out --resume")
    cores = min(runtime.share_cores(recipe.batch_size) for recipe in recipes)
    command_line.begin(cpu_devices=command.devices or cores)

    from mnist_flax.reports.figures import plot_response, save_figure
    from mnist_flax.studies.seeds import run_seeds
    from mnist_flax.studies.statistics import describe as describe_study

    splits = load(command)
    interrupts = runtime.Interrupts()
    interrupts.install()
    try:
        accuracies = search(tried, command, splits, workdir=workdir, should_stop=interrupts)
        best = winner(accuracies)
        for point, row in zip(tried, accuracies, strict=True):
            print(describe(point, row, command.first_seed))
        first_fresh = command.first_seed + 1000
        study, _ = run_seeds(
            recipes[best],
            seeds=range(first_fresh, first_fresh + command.fresh_seeds),
            data_dir=command.data_dir,
            archives=command.archives,
            devices=command.devices,
            workdir=workdir / "winner",
            resume=command.resume and holds_run(workdir / "winner"),
            should_stop=interrupts,
        )
    except Interrupted as end:
        return interrupts.stop(end)
    print(describe_study("winner", study))
    summary = {
        "points": tried,
        "val_accuracies": [[a if math.isfinite(a) else None for a in row] for row in accuracies],
        "best": tried[best],
        "winner": study,
        "seconds": time.perf_counter() - began,
    }
    write_json(workdir / "sweep.json", summary)
    columns = {field: [point[field] for point in tried] for field in tried[0]}
    means = np.array([mean_of_finite(row) for row in accuracies])
    save_figure(plot_response(columns, accuracies=means, best=best), workdir / "response.png")
    print(f"written to {workdir}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
