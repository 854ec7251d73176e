"""Early stopping against sequences worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnist_flax.errors import InputError
from mnist_flax.stopping import EarlyStopping


def run(losses, **options):
    stopping = EarlyStopping(**options)
    for epoch, loss in enumerate(losses, start=1):
        stopping = stopping.update(loss, epoch=epoch)
        if stopping.should_stop:
            return stopping, epoch
    return stopping, None


@pytest.mark.parametrize(
    ("losses", "options", "stopped_at", "best_epoch"),
    [
        ([5, 4, 3, 3, 3, 2], {"patience": 2}, 5, 3),
        ([5, 4, 3, 3, 2, 2, 2], {"patience": 2}, 7, 5),
        ([5, 4, 3, 3, 3, 3], {"patience": None}, None, 3),
        ([5.0, 4.9, 4.8, 4.7], {"patience": 2, "min_delta": 0.15}, None, 3),
        ([5.0, 4.9, 4.9, 4.0], {"patience": 2, "min_delta": 0.2}, 3, 1),
        ([math.nan, 3, math.nan, math.nan], {"patience": 2}, 4, 2),
        ([math.nan, math.nan], {"patience": 2}, 2, None),
        ([math.inf, math.inf], {"patience": 2}, 2, None),
    ],
)
def test_by_hand(losses, options, stopped_at, best_epoch):
    stopping, epoch = run(losses, **options)
    assert (epoch, stopping.best_epoch) == (stopped_at, best_epoch)


@given(st.lists(st.floats(allow_nan=True), max_size=30), st.integers(1, 5))
def test_best_is_the_first_lowest_and_patience_is_kept(losses, patience):
    stopping, epoch = run(losses, patience=patience)
    seen = [loss for loss in losses[:epoch] if not math.isnan(loss) and loss < math.inf]
    assert stopping.best == min(seen, default=math.inf)
    if seen:
        assert stopping.best_epoch == losses.index(min(seen)) + 1
    if epoch is not None:
        assert epoch - (stopping.best_epoch or 0) == patience


@pytest.mark.parametrize("options", [{"patience": 0}, {"min_delta": -1.0}, {"min_delta": math.nan}])
def test_impossible_values(options):
    with pytest.raises(InputError, match=next(iter(options))):
        EarlyStopping(**options)
