"""A recipe from many seeds: trained in one program, tested one by one and as an ensemble."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from mnist_flax.datasets import load_splits
from mnist_flax.errors import Interrupted
from mnist_flax.evaluation import Evaluation, average_probabilities, evaluate_replicas
from mnist_flax.loop import fit
from mnist_flax.recipe import Recipe, to_dict
from mnist_flax.replicas import make_mesh
from mnist_flax.studies.statistics import survivors, test_statistics
from mnist_flax.views import recipe_views


def see(
    states, examples, *, views: Sequence[Any], mesh, should_stop: Callable[[], bool]
) -> list[list[Evaluation]]:
    """Returns what each view shows of all replicas.

    Raises:
      Interrupted: `should_stop()` became true between two views.
    """
    seen = []
    for view in tqdm(views, desc="views"):
        if should_stop():
            raise Interrupted(int(np.max(states.step)))
        seen.append(evaluate_replicas(states, examples, mesh=mesh, view=view))
    return seen


def over_views(seen: Sequence[Sequence[Evaluation]]) -> list[Evaluation]:
    """Returns each replica's mean over the views; `seen` has a row a view, of all replicas."""
    return [average_probabilities(views) for views in zip(*seen, strict=True)]


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
    splits = load_splits(
        recipe.dataset,
        val_size=recipe.val_size,
        seed=recipe.split_seed,
        data_dir=data_dir,
        archives=archives,
    )
    mesh = make_mesh(devices=devices, replicas=len(seeds))
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
