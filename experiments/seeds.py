"""Train a recipe from many seeds: mean test accuracy, its spread and its 95% interval.

    python experiments/seeds.py --recipe quick --seeds 10 --first-seed 100

Ten seeds of `quick` take about half a minute on 2 cores and give 99.3% or more on average. They
are trained in one program, on the CPU a seed a core. The recipe's fields are options, as in
train.py; `--versus NAME` compares with another recipe on the same seeds.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from scipy import stats
from tqdm.auto import tqdm

from mnist_flax import command_line, runtime
from mnist_flax.errors import DivergedError, InputError, Interrupted
from mnist_flax.evaluation import Evaluation, mixture
from mnist_flax.recipes import Recipe, recipe_views, require_views, to_dict
from mnist_flax.workdir import holds_run, write_json


@dataclasses.dataclass(frozen=True)
class Command:
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
      data_dir: TFDS's directory; by default $TFDS_DATA_DIR or ~/tensorflow_datasets.
      archives: a directory of four IDX archives to read the dataset from.
      devices: how many devices share a batch; by default all, and on the CPU one a core.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    seeds: int = 10
    first_seed: int = 100
    versus: str | None = None
    views: int = 0
    workdir: Path | None = None
    resume: bool = False
    data_dir: Path | None = None
    archives: Path | None = None
    devices: int | None = None

    def __post_init__(self):
        if self.seeds < 2:
            raise InputError(f"seeds is {self.seeds}; a spread needs at least 2")


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the 95% interval of the mean by Student's t."""
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    return float(low), float(high)


def statistics(accuracies: np.ndarray) -> dict[str, Any]:
    """Returns the mean of the replicas' accuracies, their deviation and the mean's interval.

    Where only one did not diverge there is no spread: both are None.
    """
    several = len(accuracies) > 1
    return {
        "mean": float(accuracies.mean()),
        "deviation": float(accuracies.std(ddof=1)) if several else None,
        "interval": interval(accuracies) if several else None,
    }


def test_statistics(tests: Sequence[Evaluation]) -> dict[str, Any]:
    """Returns what the replicas reach on the test split, apart and together."""
    ensemble = mixture(tests)
    return {
        **statistics(np.array([test.accuracy for test in tests])),
        "ensemble_accuracy": ensemble.accuracy,
        "ensemble_loss": ensemble.loss,
    }


def see(
    states, examples, *, views: Sequence[Any], mesh, should_stop: Callable[[], bool]
) -> list[list[Evaluation]]:
    """Returns what each view shows of all replicas.

    Raises:
      Interrupted: `should_stop()` became true between two views.
    """
    from mnist_flax.evaluation import evaluate_replicas

    seen = []
    for view in tqdm(views, desc="views"):
        if should_stop():
            raise Interrupted(int(np.max(states.step)))
        seen.append(evaluate_replicas(states, examples, mesh=mesh, view=view))
    return seen


def over_views(seen: Sequence[Sequence[Evaluation]]) -> list[Evaluation]:
    """Returns each replica's mean over the views; `seen` has a row a view, of all replicas."""
    return [mixture(views) for views in zip(*seen, strict=True)]


def survivors(diverged: Sequence[str | None]) -> list[int]:
    """Returns which replicas did not diverge.

    Raises:
      DivergedError: all did.
    """
    alive = [i for i, reason in enumerate(diverged) if reason is None]
    if not alive:
        raise DivergedError(f"all {len(diverged)} networks diverged; the first: {diverged[0]}")
    return alive


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float | int]:
    """Returns how much better ours are on average, and the p-value of a paired t-test.

    Pairs of which one is NaN, because it diverged, are left out.

    Raises:
      DivergedError: that leaves fewer than two pairs.
    """
    both = np.isfinite(ours) & np.isfinite(theirs)
    if both.sum() < 2:
        raise DivergedError("too many networks diverged: fewer than 2 pairs are left to compare")
    return {
        "pairs": int(both.sum()),
        "difference": float((ours - theirs)[both].mean()),
        "p_value": float(stats.ttest_rel(ours[both], theirs[both]).pvalue),
    }


def run_seeds(
    recipe: Recipe,
    *,
    seeds: range,
    views: int = 0,
    data_dir: Path | None,
    archives: Path | None,
    devices: int | None,
    workdir: Path | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Any], np.ndarray]:
    """Trains and tests each seed; returns a study's numbers and the accuracy of each seed.

    A seed that diverges is named, its accuracy is NaN, and the numbers are of the others.

    Raises:
      DivergedError: all did.
      Interrupted: `should_stop()` became true.
    """
    from mnist_flax.data import load_splits
    from mnist_flax.evaluation import evaluate_replicas
    from mnist_flax.loop import fit
    from mnist_flax.replicas import make_mesh

    splits = load_splits(
        recipe.dataset,
        val_size=recipe.val_size,
        seed=recipe.split_seed,
        data_dir=data_dir,
        archives=archives,
    )
    mesh = make_mesh(devices, replicas=len(seeds))
    began = time.perf_counter()
    result = fit(
        recipe,
        splits,
        seeds=seeds,
        workdir=workdir,
        resume=resume,
        mesh=mesh,
        should_stop=should_stop,
    )
    trained = time.perf_counter()
    tests = evaluate_replicas(result.states, splits.test, mesh=mesh)
    study = {
        "recipe": to_dict(recipe),
        **summarize(result, seeds=seeds, tests=tests),
        "fit_seconds": trained - began,
        "test_seconds": time.perf_counter() - trained,
        "mesh": dict(mesh.shape),
    }
    alive = survivors(result.diverged)
    if own_views := recipe_views(recipe, count=views):
        averaged = over_views(
            see(result.states, splits.test, views=own_views, mesh=mesh, should_stop=should_stop)
        )
        study["views"] = {"number": views, **test_statistics([averaged[i] for i in alive])}
    accuracies = [test.accuracy if i in alive else np.nan for i, test in enumerate(tests)]
    return study, np.array(accuracies)


def summarize(result, *, seeds: range, tests: Sequence[Evaluation]) -> dict[str, Any]:
    """Returns what a study's seeds came to: the numbers of each, and of those left together.

    Raises:
      DivergedError: all diverged.
    """
    alive = survivors(result.diverged)
    replicas = [replica(result, i, seed, tests[i]) for i, seed in enumerate(seeds)]
    return {
        **test_statistics([tests[i] for i in alive]),
        "train_seconds_mean": sum(replicas[i]["train_seconds"] for i in alive) / len(alive),
        "replicas": replicas,
        "diverged": [seed for i, seed in enumerate(seeds) if i not in alive],
    }


def replica(result, index: int, seed: int, test: Evaluation) -> dict[str, Any]:
    """Returns a replica's numbers; of one that diverged, the reason."""
    if (reason := result.diverged[index]) is not None:
        return {"seed": seed, "diverged": reason}
    history = result.histories[index]
    return {
        "seed": seed,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "val_accuracy": history[result.best_epochs[index] - 1]["val_accuracy"],
        "epochs": len(history),
        "train_seconds": sum(row["train_seconds"] for row in history),
    }


def spread(study: dict[str, Any]) -> list[str]:
    """Returns the mean, the deviation and the mean's interval in words."""
    if study["interval"] is None:
        return [f"{study['mean']:.3%}", "-", "-"]
    low, high = study["interval"]
    return [f"{study['mean']:.3%}", f"{study['deviation']:.3%}", f"{low:.3%} to {high:.3%}"]


def describe(name: str, study: dict[str, Any]) -> str:
    """Returns a study as a line."""
    mean, deviation, interval = spread(study)
    seeds = study["diverged"]
    words = ", ".join(map(str, seeds))
    count = len(study["replicas"]) - len(seeds)
    return (
        f"{name}: mean {mean}, deviation {deviation}, 95% interval {interval}, {count} seeds"
        f"{f' ({len(seeds)} more diverged: {words})' if seeds else ''}; "
        f"ensemble {study['ensemble_accuracy']:.2%}; "
        f"training {study['train_seconds_mean']:.2f} s each, {study['fit_seconds']:.1f} s in all"
    )


def rows(name: str, study: dict[str, Any]) -> list[str]:
    """Returns a study as rows of the table in RESULTS.md, one of them for views."""
    lines = [table_row(f"`{name}`", study)]
    if "views" in study:
        label = f"`{name}`, the mean of {study['views']['number']} views"
        lines.append(table_row(label, study | study["views"]))
    return lines


def table_row(label: str, study: dict[str, Any]) -> str:
    """Returns a study as a row of the table in RESULTS.md."""
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
    name, rest = command_line.split_recipe(arguments)
    default = Command(command_line.named_recipe(name))
    command = command_line.parse(Command, rest, default=default, description=__doc__ or "")
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

    from mnist_flax.figures import plot_seeds, save_figure

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
