"""The options that scripts have in common, as dataclasses to inherit from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from mnist_flax.data import Splits
from mnist_flax.errors import InputError
from mnist_flax.launch import command_line
from mnist_flax.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataDir:
    """Where prepared datasets are.

    Attributes:
      data_dir: TFDS's directory; by default $TFDS_DATA_DIR or ~/tensorflow_datasets.
    """

    data_dir: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset(DataDir):
    """Where a recipe's dataset is.

    Attributes:
      archives: a directory of four IDX archives to read the dataset from.
      images: a directory of images of your own instead, train/CLASS/*.png and test/CLASS/*.png, or
        CLASS/*.png.
      image_shape: height, width and channels (1 or 3) that such images are resized to.
    """

    archives: Path | None = None
    images: Path | None = None
    image_shape: tuple[int, int, int] = (28, 28, 1)

    def load(self, recipe: Recipe, *, val_size: int | None = None, stream: bool = False) -> Splits:
        """Returns the recipe's dataset, with another number of validation examples if given.

        Raises:
          InputError: it is not there, or too small; or own images are to be streamed.
        """
        from mnist_flax.datasets import load_splits
        from mnist_flax.datasets.folders import load_image_folder

        val_size = recipe.val_size if val_size is None else val_size
        if self.images is not None:
            if stream or self.archives is not None:
                raise InputError("images are held in memory; leave out --stream and --archives")
            return load_image_folder(
                self.images,
                image_shape=self.image_shape,
                val_size=val_size,
                seed=recipe.split_seed,
            )

        return load_splits(
            recipe.dataset,
            val_size=val_size,
            seed=recipe.split_seed,
            data_dir=self.data_dir,
            archives=self.archives,
            stream=stream,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Dataset):
    """What is trained, where it is kept, and on which devices.

    Attributes:
      recipe: the recipe's fields.
      workdir: the directory for checkpoints and results; by default one under runs/.
      resume: continue what is in workdir; give the same options again.
      devices: how many devices share a batch; by default all, and on the CPU one a core.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    workdir: Path | None = None
    resume: bool = False
    devices: int | None = None


T = TypeVar("T", bound=Training)


def parse_training(
    kind: type[T],
    arguments: Sequence[str],
    *,
    description: str,
    adapt: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> tuple[str, T]:
    """Parses the options of a script that trains a recipe.

    Args:
      kind: the options.
      arguments: the command line; `--recipe NAME` gives the recipe whose fields they change.
      description: the script's docstring.
      adapt: makes the recipe that the script begins with out of the named one.

    Returns:
      What to call the recipe in the names of files, and the options.

    Raises:
      InputError: as `command_line.parse`; or there is no such recipe.
    """
    name, rest = command_line.split_recipe(arguments)
    default = kind(recipe=adapt(command_line.named_recipe(name)))
    command = command_line.parse(kind, rest, default=default, description=description)
    return command_line.recipe_label(name), command
