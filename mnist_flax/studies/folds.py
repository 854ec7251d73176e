"""Which examples are held out together in a cross-validation."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mnist_flax.errors import InputError


def fold_indices(labels_N: ArrayLike, *, folds: int) -> list[np.ndarray]:
    """Cuts the examples of each class, in their order, into `folds` consecutive parts.

    A fold is one part of every class, so each has the classes in the proportion of the whole, to
    within one example, however the data is ordered: sorted by class, or shuffled. Only the order
    within a class counts, so data that was sorted by class (stably) has the same folds as before.
    MNIST's training images lie by writer, and every writer wrote all digits, so there the parts of
    all classes end at about the same writers, and most of a fold's writers are in no other: of six
    folds 98% of the images are in the one that sixths of consecutive images would put them in.

    Args:
      labels_N: the classes [N].
      folds: how many, at least 2.

    Returns:
      The indices of each fold's examples, ascending; each of the N is in one of them.

    Raises:
      InputError: there are fewer than 2 folds, or too few examples to have one in each.
    """
    if folds < 2:
        raise InputError(f"folds is {folds}; give at least 2")
    labels_N = np.asarray(labels_N)
    parts = [
        np.array_split(np.flatnonzero(labels_N == label), folds) for label in np.unique(labels_N)
    ]
    found = [np.sort(np.concatenate(each)) for each in zip(*parts, strict=True)]
    if not found or not all(map(len, found)):
        raise InputError(f"folds is {folds}, too many for {len(labels_N)} examples; give fewer")
    return found
