"""Runs as they are read: from a run's directory, or from one file of weights.

Two files come with the package: `load_run("default")` and `load_run("strong")`, each of seed 0, in
16 bits; only the first has a `familiarity`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mnist_flax import checkpoint
from mnist_flax.data import DatasetInfo
from mnist_flax.errors import InputError
from mnist_flax.loop import initial_progress
from mnist_flax.progress import Progress
from mnist_flax.recipe import Recipe, from_dict, to_dict
from mnist_flax.replicas import make_mesh, replica
from mnist_flax.reports import familiarity
from mnist_flax.reports.familiarity import Familiarity
from mnist_flax.steps import TrainState, is_key
from mnist_flax.weights import names_of
from mnist_flax.workdir import RECIPE_FILE, read_json

SUFFIX = ".safetensors"
KNOWN = "familiarity/"  # before the names of the arrays of a `Familiarity`
SHIPPED = {name: Path(__file__).with_name(f"{name}{SUFFIX}") for name in ("default", "strong")}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, finished or not, as read from its directory, or its weights from a file.

    Attributes:
      workdir: the directory, or the file.
      recipe: its recipe.
      info: what its dataset is; the dataset itself need not be there.
      state: its best epoch's state so far, or the last one's where there is no validation; one
        device's. Before the end of the first epoch, the state that it has come to. From a file, at
        step 0 of a fresh optimizer.
      best_epoch: the epoch of `state`; 0 before the end of the first.
      epochs: how many epochs are done.
      familiarity: what its training images looked like; None where nothing was kept of that.
    """

    workdir: Path
    recipe: Recipe
    info: DatasetInfo
    state: TrainState
    best_epoch: int
    epochs: int
    familiarity: Familiarity | None

    def __str__(self) -> str:
        """Returns which weights these are, in words."""
        which = f"of epoch {self.best_epoch}" if self.best_epoch else "from within epoch 1"
        return f"{self.workdir}: weights {which}; {self.epochs} of {self.recipe.epochs} epochs done"


def load_run(path: str | Path) -> Run:
    """Reads a run, whether or not it has come to its end; changes nothing.

    Args:
      path: a run's directory; a file of weights, as export.py writes it; or, where there is no such
        directory, "default" or "strong", whose weights come with the package.

    Raises:
      InputError: there is none, or none that has a checkpoint yet; or a file is not of weights.
      CheckpointError: its checkpoints cannot be read.
    """
    workdir = Path(path).expanduser()
    if not workdir.exists() and (shipped := SHIPPED.get(str(path))) is not None:
        return load_weights(shipped)
    return load_weights(workdir) if workdir.is_file() else load_directory(workdir)


def is_run(path: str | Path) -> bool:
    """Returns whether a path can only be meant for a run, and not for a picture."""
    path = Path(path)
    return path.is_dir() or path.suffix in ("", SUFFIX)


def load_directory(workdir: Path) -> Run:
    """Reads a run from its directory; errors are as in `load_run`."""
    path = workdir / RECIPE_FILE
    if not path.exists():
        raise InputError(f"there is no run in {workdir}: it has no {RECIPE_FILE}")
    if "seeds" in (values := read_json(path)):
        raise InputError(f"{workdir} holds a study of many networks; name the directory of a run")
    recipe = from_dict(values)

    @functools.cache
    def like(info: DatasetInfo) -> Progress:
        return initial_progress([recipe], info, steps=1, mesh=make_mesh(devices=1))

    def expect(record: dict[str, Any]) -> Any:
        info = DatasetInfo.from_dict(record["dataset"])
        checkpoint.require_same(
            record, checkpoint.identity(to_dict(recipe), info), where=f"the run in {workdir}"
        )
        return checkpoint.progress_arrays(like(info))

    saved = checkpoint.newest(workdir, expect, strict=False, set_aside=False)
    if saved is None:
        raise InputError(f"the run in {workdir} has no checkpoint yet; let it train for longer")
    info = DatasetInfo.from_dict(saved.record["dataset"])
    progress = checkpoint.progress_of(saved, like(info).states)
    (best_epoch,) = progress.best_epochs
    state = replica(progress.best if best_epoch else progress.states, 0)
    known = familiarity.load(workdir)
    return Run(workdir, recipe, info, state, best_epoch, len(progress.history), known)


def _named(state: TrainState) -> dict[str, Any]:
    """Returns a state's parameters and statistics by their paths in it; not a model's keys."""
    tree = {"params": state.params, "batch_stats": state.batch_stats}
    leaves = jax.tree.leaves_with_path(tree)
    return {"/".join(names_of(path)): leaf for path, leaf in leaves if not is_key(leaf)}


def pack_weights(run: Run, *, dtype: str = "float32") -> bytes:
    """Returns a run's weights as safetensors, with what `load_run` needs beside them.

    Args:
      run: the run.
      dtype: what the network's floating-point numbers are rounded to: "float16" for half the size.
    """
    from safetensors.numpy import save

    arrays = {name: np.asarray(leaf) for name, leaf in _named(run.state).items()}
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.floating):
            arrays[name] = array.astype(dtype)
    if run.familiarity is not None:
        known = run.familiarity.to_arrays()
        arrays |= {KNOWN + name: array for name, array in known.items()}
    about = {
        "recipe": to_dict(run.recipe),
        "dataset": dataclasses.asdict(run.info),
        "best_epoch": run.best_epoch,
        "epochs": run.epochs,
    }
    return save(arrays, {"run": json.dumps(about)})


def load_weights(path: Path) -> Run:
    """Reads a file of what `pack_weights` returned; errors are as in `load_run`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return dataclasses.replace(unpack_weights(data, name=str(path)), workdir=path)


def unpack_weights(data: bytes, *, name: str) -> Run:
    """Returns the run whose weights `pack_weights` has packed.

    Raises:
      InputError: they are no such weights, or of another version's recipe or network; it calls
        them by `name`.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"]["run"])
    except (SafetensorError, KeyError, ValueError):
        raise InputError(f"{name} is not a file of weights that mnist_flax wrote") from None
    recipe, info = from_dict(about["recipe"]), DatasetInfo.from_dict(about["dataset"])
    own = [key for key in arrays if key.startswith(KNOWN)]
    known = {key.removeprefix(KNOWN): arrays.pop(key) for key in own}
    state = initial_progress([recipe], info, steps=1, mesh=make_mesh(devices=1)).state
    shapes, own = ({n: a.shape for n, a in each.items()} for each in (arrays, _named(state)))
    if shapes != own:
        raise InputError(f"{name} has the weights of another network than its recipe makes")

    def placed(path, leaf):
        array = arrays.get("/".join(names_of(path)))
        return leaf if array is None else jnp.asarray(array, leaf.dtype)

    tree = {"params": state.params, "batch_stats": state.batch_stats}
    state = dataclasses.replace(state, **jax.tree.map_with_path(placed, tree))
    seen = Familiarity.from_arrays(known) if known else None
    return Run(Path(name), recipe, info, state, about["best_epoch"], about["epochs"], seen)
