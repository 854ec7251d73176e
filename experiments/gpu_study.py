"""Everything that is to be known about a GPU (or TPU), in under nine minutes and one JSON file.

    python experiments/gpu_study.py

1. One network of each recipe, by precision: seconds of training after compilation, and accuracy;
   hence the time to 99.17, 99.40 and 99.60%. The goals on an H200 are 0.25, 1 and 5 seconds.
2. Images a second against the number of replicas, under vmap and one after another.
3. All replicas of each recipe's study at once: seconds, mean accuracy, its interval.

The file is written anew after each part. A part for which no time is left says so.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mnist_flax.errors import DivergedError, InputError, Interrupted
from mnist_flax.launch import command_line, options
from mnist_flax.models.columns import ColumnsConfig
from mnist_flax.recipe import Recipe

Precision = Literal["float32", "tensorfloat32", "bfloat16"]
GOALS = (0.9917, 0.9940, 0.9960)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(options.DataDir):
    """Options of the script.

    Attributes:
      recipes: the recipes to train many replicas of; `accurate`, at some 11 seconds per replica,
        would take too long (`--recipes accurate --seeds 10`).
      study_precision: how convolutions and products of many replicas are computed.
      single_recipes: the recipes to train single networks of.
      precisions: how those of one network are computed.
      seeds: how many replicas each study has, at least 2.
      singles: how many single networks are trained, from seeds 0 upwards, at least 1.
      sizes: numbers of replicas whose images a second are measured, with the first recipe.
      minutes: no part goes on for longer.
      epochs: epochs instead of the recipes' own; for a rehearsal.
      output: the JSON file.
    """

    recipes: tuple[str, ...] = ("quick", "fast", "strong")
    study_precision: Precision = "tensorfloat32"
    single_recipes: tuple[str, ...] = ("quick", "fast", "strong")
    precisions: tuple[Precision, ...] = ("float32", "tensorfloat32", "bfloat16")
    seeds: int = 100
    singles: int = 3
    sizes: tuple[int, ...] = (1, 4, 16, 64, 100)
    minutes: float = 8.5
    epochs: int | None = None
    output: Path = Path("runs/gpu_study.json")

    def __post_init__(self):
        if not (self.recipes or self.single_recipes):
            raise InputError("recipes and single_recipes are empty; give one at least")
        if self.seeds < 2 or self.singles < 1 or min(self.sizes, default=1) < 1:
            raise InputError("give at least 2 seeds, 1 single and sizes of at least 1")
        if not self.minutes > 0:
            raise InputError(f"minutes is {self.minutes}; give a number above 0")


def at_precision(recipe: Recipe, precision: Precision) -> Recipe:
    """Returns the recipe at a precision; JAX is told the one of float32's products."""
    import jax

    products = "tensorfloat32" if precision == "tensorfloat32" else "float32"
    jax.config.update("jax_default_matmul_precision", products)
    compute = "bfloat16" if precision == "bfloat16" else "float32"
    model = recipe.model
    if not isinstance(model, ColumnsConfig):
        return dataclasses.replace(recipe, model=dataclasses.replace(model, precision=compute))
    columns = tuple(dataclasses.replace(own, precision=compute) for own in model.columns)
    return dataclasses.replace(recipe, model=ColumnsConfig(columns))


def images(recipe: Recipe, splits, *, epochs: int) -> int:
    """Returns how many images so many epochs train on."""
    steps = recipe.steps_per_epoch(splits.train.num_examples)
    return epochs * steps * recipe.batch_size


def single(recipe: Recipe, splits, *, seeds: range, late: Callable[[], bool]) -> dict[str, Any]:
    """Trains networks one at a time, each on one device."""
    from mnist_flax.evaluation import evaluate
    from mnist_flax.loop import fit
    from mnist_flax.replicas import make_mesh

    seconds, rates, accuracies = [], [], []
    for seed in seeds:
        seeded = dataclasses.replace(recipe, seed=seed)
        result = fit(seeded, splits, mesh=make_mesh(devices=1), progress=False, should_stop=late)
        seconds.append(sum(row["train_seconds"] for row in result.history))
        rates.append(images(recipe, splits, epochs=len(result.history)) / seconds[-1])
        accuracies.append(evaluate(result.state, splits.test).accuracy)
    return {
        "train_seconds": seconds,
        "images_per_second": statistics.median(rates),
        "compile_seconds": result.history[0]["compile_seconds"],
        "test_accuracies": accuracies,
        "mean": sum(accuracies) / len(accuracies),
    }


def speeds(recipe: Recipe, splits, *, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Returns the images a second of so many replicas, in both forms; median of five turns."""
    import jax
    import numpy as np

    from mnist_flax.studies.speed import Contender, time_turns, training

    made = []
    for size in sizes:
        for line, loop in (("vmap", False), ("one after another", True)):
            run = training(
                recipe, splits, replicas=size, devices=len(jax.devices()), steps=20, loop=loop
            )
            images = 20 * size * recipe.batch_size
            made.append(Contender("replicas", line, size, images, run))
    measured = time_turns(made, turns=5)
    return [
        {"replicas": c.size, "form": c.line, "images_per_second": float(np.median(values))}
        for c, values in zip(made, measured, strict=True)
    ]


def study(recipe: Recipe, splits, *, seeds: range, late: Callable[[], bool]) -> dict[str, Any]:
    """Trains all replicas at once."""
    import numpy as np

    from mnist_flax.evaluation import evaluate_replicas
    from mnist_flax.loop import fit
    from mnist_flax.studies.statistics import estimate, survivors

    began = time.perf_counter()
    result = fit(recipe, splits, seeds=seeds, progress=False, should_stop=late)
    fitted = time.perf_counter()
    tests = evaluate_replicas(result.states, splits.test)
    alive = survivors(result.diverged)
    accuracies = np.array([tests[i].accuracy for i in alive])
    rows = [row for history in result.histories for row in history]
    train_seconds = sum(row["train_seconds"] for row in rows)
    return {
        "replicas": len(seeds),
        "fit_seconds": fitted - began,
        "train_seconds": train_seconds,
        "images_per_second": images(recipe, splits, epochs=len(rows)) / train_seconds,
        "compile_seconds": sum(row["compile_seconds"] for row in rows),
        "test_seconds": time.perf_counter() - fitted,
        **estimate(accuracies),
        "test_accuracies": accuracies.tolist(),
        "diverged": len(seeds) - len(alive),
        "diverged_seeds": [seed for i, seed in enumerate(seeds) if i not in alive],
    }


def times_to(goals: tuple[float, ...], singles: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns for each accuracy the quickest recipe that reaches it on average.

    Its seconds are the median of its networks: the first of a process also loads CUDA's libraries.
    """
    rows = []
    for goal in goals:
        reached = [
            {
                "goal": goal,
                "part": name,
                "seconds": statistics.median(part["train_seconds"]),
                "mean": part["mean"],
            }
            for name, part in singles.items()
            if part.get("mean", 0) >= goal
        ]
        rows.append(min(reached, key=lambda row: row["seconds"], default={"goal": goal}))
    return rows


def main(arguments):
    """Runs every part, and writes the file after each."""
    began = time.perf_counter()
    command = command_line.parse(Command, arguments, default=Command(), description=__doc__ or "")
    names = (*command.recipes, *command.single_recipes)
    recipes = {name: command_line.named_recipe(name) for name in names}
    if command.epochs is not None:
        recipes = {n: dataclasses.replace(r, epochs=command.epochs) for n, r in recipes.items()}
    command_line.begin(cpu_devices=1)

    import jax

    from mnist_flax.datasets import load_splits
    from mnist_flax.workdir import write_json

    def late() -> bool:
        return time.perf_counter() - began > 60 * command.minutes

    loaded: dict[int, Any] = {}

    def splits_of(recipe: Recipe):
        if recipe.val_size not in loaded:
            loaded[recipe.val_size] = load_splits(
                recipe.dataset,
                val_size=recipe.val_size,
                seed=recipe.split_seed,
                data_dir=command.data_dir,
            )
        return loaded[recipe.val_size]

    device = jax.devices()[0]
    found: dict[str, Any] = {
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "jax": jax.__version__,
        "singles": {},
        "speeds": [],
        "studies": {},
    }
    command.output.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        found["times"] = times_to(GOALS, found["singles"])
        write_json(command.output, found)

    def keep(part: str, work: Callable[[], Any]) -> Any:
        try:
            result = {"unfinished": "no time was left"} if late() else work()
        except Interrupted:
            result = {"unfinished": "stopped when the time was over"}
        except DivergedError as error:
            result = {"unfinished": str(error)}
        found["seconds"] = time.perf_counter() - began
        print(f"{found['seconds']:6.1f} s  {part}", flush=True)
        return result

    for name in command.single_recipes:
        recipe = recipes[name]
        for precision in command.precisions:
            part = f"{name} {precision}"
            found["singles"][part] = keep(
                part,
                lambda recipe=recipe, precision=precision: single(
                    at_precision(recipe, precision),
                    splits_of(recipe),
                    seeds=range(command.singles),
                    late=late,
                ),
            )
            save()
    first = recipes[names[0]]
    found["speeds"] = keep(
        "speeds",
        lambda: speeds(
            at_precision(first, command.study_precision), splits_of(first), sizes=command.sizes
        ),
    )
    save()
    for name in command.recipes:
        recipe = recipes[name]
        found["studies"][name] = keep(
            f"study of {name}",
            lambda recipe=recipe: study(
                at_precision(recipe, command.study_precision),
                splits_of(recipe),
                seeds=range(1000, 1000 + command.seeds),
                late=late,
            ),
        )
        save()
    for row in found["times"]:
        seconds = f"{row['seconds']:.2f} s ({row['part']})" if "seconds" in row else "not reached"
        print(f"to {row['goal']:.2%}: {seconds}")
    print(f"written to {command.output}")


if __name__ == "__main__":
    command_line.run(main)
