"""Images of one's own: DIR/train/CLASS/*.png and DIR/test/CLASS/*.png, or DIR/CLASS/*.png.

The layout of TFDS's `ImageFolder` and of torchvision's, whose readers need TensorFlow and PyTorch.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mnist_flax.data import DatasetInfo, Examples, Splits, fingerprint, split_indices
from mnist_flax.errors import InputError
from mnist_flax.workdir import local_path

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VERSION = "images"  # the `DatasetInfo.version` of what comes from folders
TEST_SHARE = 0.2  # of a folder that is not split, by the seed 0


def load_image_folder(
    directory: str | os.PathLike[str],
    *,
    image_shape: Sequence[int] = (28, 28, 1),
    val_size: int = 0,
    seed: int = 0,
) -> Splits[Examples]:
    """Loads images from folders whose names are their classes'.

    Args:
      directory: holds the folders train and test, each with a folder per class; or a folder per
        class, of whose images every fifth, chosen at random, is for testing: always the same ones.
      image_shape: (H, W, C) of the images: others are resized to it, bilinearly, whatever their
        proportions; C is 1 for grey images, or 3 for colour.
      val_size: how many training examples to hold out for validation (`split_indices`).
      seed: which ones.

    Returns:
      The splits, uint8, in the order of the files' names; classes in the order of theirs.

    Raises:
      InputError: there is no such folder, or no image in it, or test has a class that train lacks;
        or a file cannot be read.
    """
    root = local_path(directory, name="images")
    if not root.is_dir():
        raise InputError(f"images: {root} is not a directory")
    train_root = root / "train" if (root / "train").is_dir() else root
    names = tuple(sorted(path.name for path in train_root.iterdir() if path.is_dir()))
    if len(names) < 2:
        raise InputError(f"images: {train_root} holds {len(names)} folders; give one per class")
    train = _read_folder(train_root, names, image_shape)
    if train_root == root:
        test_size = max(1, round(TEST_SHARE * len(train)))
        train_indices, test_indices = split_indices(len(train), val_size=test_size, seed=0)
        train, test = train[train_indices], train[test_indices]
    elif not (root / "test").is_dir():
        raise InputError(
            f"images: {root} holds train, but no test; give both, or folders of classes"
        )
    else:
        test = _read_folder(root / "test", names, image_shape)
    height, width, channels = image_shape
    digest = fingerprint([train], [test])
    info = DatasetInfo(root.name, VERSION, len(names), names, (height, width, channels), digest)
    train_indices, val_indices = split_indices(len(train), val_size=val_size, seed=seed)
    return Splits(train[train_indices], train[val_indices], test, info)


def _read_folder(root: Path, names: tuple[str, ...], image_shape: Sequence[int]) -> Examples:
    folders = {path.name for path in root.iterdir() if path.is_dir()}
    if unknown := sorted(folders - set(names)):
        raise InputError(f"images: {root} has the class {unknown[0]}, which train lacks")
    files = [
        (path, label)
        for label, name in enumerate(names)
        for path in sorted((root / name).glob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise InputError(f"images: {root} holds no image ({', '.join(SUFFIXES)})")
    images = np.stack([read_image(path, image_shape=image_shape) for path, _ in files])
    return Examples(images, np.array([label for _, label in files], np.int32))


def read_image(path: str | Path, *, image_shape: Sequence[int]) -> np.ndarray:
    """Reads an image file as uint8 [H, W, C], resized if it is of another size.

    Raises:
      InputError: it is not there, or no image.
    """
    height, width, channels = image_shape
    try:
        with Image.open(path) as picture:
            picture = picture.convert({1: "L", 3: "RGB"}[channels])
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            return np.asarray(picture, np.uint8).reshape(height, width, channels)
    except KeyError:
        raise InputError(f"image_shape has {channels} channels; give 1 or 3") from None
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error})") from None
