"""Streaming: the same bits as from memory, from any batch on, and little of it held."""

import json
import tracemalloc

import jax
import numpy as np
import pytest
from conftest import ALL
from test_archives import refusal, write_subset

from mnist_flax.data import Records, epoch_order, take
from mnist_flax.datasets import load_splits
from mnist_flax.feed import stream_batches

BATCH_SIZE = 128


NUM_TRAIN, NUM_TEST = (60_000, 10_000) if ALL else (2500, 300)
VAL_SIZE = NUM_TEST // 2


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Archives of MNIST, whole or the beginning of it, and where they are prepared."""
    directory = tmp_path_factory.mktemp("stream")
    archives = write_subset(directory / "archives", num_train=NUM_TRAIN, num_test=NUM_TEST)
    return {"archives": archives, "data_dir": directory / "data", "val_size": VAL_SIZE}


@pytest.fixture(scope="module")
def splits(places):
    return load_splits("mnist", **places)


@pytest.fixture(scope="module")
def streamed(places):
    """The same splits, streamed."""
    return load_splits("mnist", **places, stream=True)


@pytest.fixture(scope="module")
def indices_SB():
    train_size = NUM_TRAIN - VAL_SIZE
    order = epoch_order(jax.random.key(5), num_examples=train_size, batch_size=BATCH_SIZE)
    return np.asarray(order)[:12]


@pytest.fixture(params=["Records", "Examples"])
def source(request, splits, streamed):
    return {"Records": streamed.train, "Examples": splits.train}[request.param]


def assert_batch(batch, splits, indices_B):
    assert batch.images.dtype == np.uint8
    assert batch.labels.dtype == np.int32
    assert np.array_equal(batch.images, splits.train.images[indices_B])
    assert np.array_equal(batch.labels, splits.train.labels[indices_B])


def test_streamed_splits_are_the_resident_ones(splits, streamed):
    assert streamed.info == splits.info
    for part in ("val", "test"):
        for field in ("images", "labels"):
            array, other = (getattr(getattr(own, part), field) for own in (streamed, splits))
            assert array.dtype == other.dtype
            assert np.array_equal(array, other)


def test_records_are_a_sequence(splits, streamed):
    assert isinstance(streamed.train, Records)
    assert len(streamed.train) == streamed.train.num_examples == NUM_TRAIN - VAL_SIZE
    assert streamed.train.image_shape == (28, 28, 1)
    for index in (0, 17, NUM_TRAIN - VAL_SIZE - 1, -1):
        example = streamed.train[index]
        assert example.images.shape == (28, 28, 1)
        assert np.array_equal(example.images, splits.train.images[index])
        assert example.labels == splits.train.labels[index]
    with pytest.raises(IndexError):
        streamed.train[NUM_TRAIN - VAL_SIZE]


def test_little_is_held_in_memory(tmp_path):
    archives = write_subset(tmp_path / "archives", num_train=5000, num_test=10)
    arguments = {"val_size": 10, "data_dir": tmp_path, "archives": archives, "stream": True}
    load_splits("mnist", **arguments)
    assert not list(tmp_path.rglob("*.npz"))
    tracemalloc.start()
    try:
        splits = load_splits("mnist", **arguments)
        batch = splits.train.take(np.arange(10))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1e6 < len(splits.train) * batch.images[0].nbytes / 3


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_batches_are_those_taken_from_memory(splits, source, indices_SB, num_threads):
    batches = list(stream_batches(source, indices_SB, num_threads=num_threads, prefetch=4))
    assert len(batches) == len(indices_SB)
    for batch, indices_B in zip(batches, indices_SB, strict=True):
        assert_batch(batch, splits, indices_B)


def test_take_takes_device_arrays(splits, source, indices_SB):
    assert_batch(take(source, jax.device_put(indices_SB[0])), splits, indices_SB[0])


@pytest.mark.parametrize("start", [0, 7, 12])
def test_it_starts_where_it_is_told(splits, source, indices_SB, start):
    batches = list(stream_batches(source, indices_SB, start=start))
    assert len(batches) == 12 - start
    for batch, indices_B in zip(batches, indices_SB[start:], strict=True):
        assert_batch(batch, splits, indices_B)


@pytest.mark.parametrize("start", [-1, 13])
def test_it_refuses_to_start_outside_the_epoch(source, indices_SB, start):
    assert "start must be from 0 to the 12" in refusal(
        stream_batches, source, indices_SB, start=start
    )


@pytest.mark.parametrize("done", [0, 1, 5, 12])
def test_its_position_can_be_saved_and_restored(splits, source, indices_SB, done):
    batches = stream_batches(source, indices_SB)
    for _ in range(done):
        next(batches)
    saved = json.dumps(batches.get_state())
    resumed = stream_batches(source, indices_SB)
    next(resumed)  # Wherever it is, and whatever it has read ahead.
    resumed.set_state(json.loads(saved))
    rest = list(resumed)
    assert len(rest) == 12 - done
    for batch, indices_B in zip(rest, indices_SB[done:], strict=True):
        assert_batch(batch, splits, indices_B)
