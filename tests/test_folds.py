"""Folds: balanced however the data is ordered, and of MNIST's writers as they come."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from mnist_flax.errors import InputError
from mnist_flax.studies.folds import fold_indices

LABELS = arrays(np.int32, st.integers(20, 80), elements=st.integers(0, 3))


def test_the_folds_of_a_few_labels():
    """By hand: class 0 at 0, 2, 3, 6; class 1 at 1, 4, 5, the first part one longer."""
    first, second = fold_indices([0, 1, 0, 0, 1, 1, 0], folds=2)
    assert first.tolist() == [0, 1, 2, 4]
    assert second.tolist() == [3, 5, 6]


@given(LABELS, st.integers(2, 5))
def test_each_example_is_in_one_fold_and_each_class_in_proportion(labels, folds):
    found = fold_indices(labels, folds=folds)
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(len(labels)))
    for fold in found:
        assert (np.diff(fold) > 0).all()
        share = np.bincount(labels[fold], minlength=4) - np.bincount(labels, minlength=4) / folds
        assert np.abs(share).max() < 1


@given(LABELS, st.integers(2, 5), st.randoms(use_true_random=False))
def test_how_the_classes_are_mixed_is_no_matter(labels, folds, random):
    """Any order that leaves each class its own: sorted by class, or the classes dealt anew."""
    ranks = np.empty(len(labels), int)  # of an example in its class
    for label in np.unique(labels):
        ranks[labels == label] = np.arange((labels == label).sum())
    dealt = np.array(random.sample(list(labels), len(labels)))
    identity = {
        (int(label), int(rank)): i
        for i, (label, rank) in enumerate(zip(labels, ranks, strict=True))
    }
    expected = [set(fold.tolist()) for fold in fold_indices(labels, folds=folds)]
    for other in (np.sort(labels), dealt):
        counts, whose = {}, []
        for label in other.tolist():
            whose.append(identity[label, counts.setdefault(label, 0)])
            counts[label] += 1
        found = [{whose[i] for i in fold} for fold in fold_indices(other, folds=folds)]
        assert found == expected


def test_mnists_folds_are_of_consecutive_images_all_but_a_few(splits):
    labels = splits.train.labels
    consecutive = np.arange(len(labels)) * 6 // len(labels)
    shares = [(consecutive[f] == i).mean() for i, f in enumerate(fold_indices(labels, folds=6))]
    assert min(shares) > 0.95


@pytest.mark.parametrize(("labels", "folds"), [([0, 1] * 9, 1), ([0, 1, 2], 2), ([], 2)])
def test_impossible_folds_are_refused(labels, folds):
    with pytest.raises(InputError, match=f"folds is {folds}"):
        fold_indices(labels, folds=folds)
