"""What feeds an epoch: examples that lie on the devices, or records read as they are needed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mnist_flax.data import Examples, Records, take
from mnist_flax.errors import InputError
from mnist_flax.replicas import by_batch, place

if TYPE_CHECKING:
    import grain

STREAM_STEPS = 8  # steps' worth of streamed examples that are on the devices at a time


class Chunk(NamedTuple):
    """Examples on the devices and the steps to take next, as the training program takes them.

    Attributes:
      examples: all training examples; or, where they are streamed, batches [R, T, B, ...].
      indices_RSB: the examples of each batch of the epoch; None where they are streamed.
      start: the first step to take.
      stop: the step after the last.
    """

    examples: Examples
    indices_RSB: jax.Array | None
    start: int
    stop: int


Feed = Callable[[int, int], Chunk]  # of the steps done and wanted


def resident_feed(examples: Examples, indices_RSB: jax.Array) -> Feed:
    """Feeds an epoch from examples that are all on the devices."""
    steps = indices_RSB.shape[1]

    def feed(done: int, wanted: int) -> Chunk:
        return Chunk(examples, indices_RSB, done, min(done + wanted, steps))

    return feed


def streamed_feed(records: Records, indices_RSB: jax.Array, *, start: int, mesh: Mesh) -> Feed:
    """Feeds an epoch from records read on threads, a few steps' worth on the devices at a time.

    A process reads what its own devices train on.
    """
    R, S, B = indices_RSB.shape
    # One of each, where several devices hold the same.
    shards = {str(shard.index): shard for shard in indices_RSB.addressable_shards}.values()
    shards = sorted(shards, key=lambda shard: [part.start or 0 for part in shard.index])
    own = [(shard.index[0], shard.index[2]) for shard in shards]
    data = [np.asarray(shard.data).swapaxes(0, 1).reshape(S, -1) for shard in shards]
    own_SX = np.concatenate(data, axis=1)
    ends = np.cumsum([part_SX.shape[1] for part_SX in data])[:-1]
    batches = stream_batches(records, own_SX, start=start)

    def put(name: str, read: list[Examples], shape: tuple[int, ...], dtype) -> jax.Array:
        chunk = np.zeros((R, STREAM_STEPS, B, *shape), dtype)
        for step, examples in enumerate(read):
            parts = np.split(getattr(examples, name), ends)
            for (rows, columns), part in zip(own, parts, strict=True):
                chunk[rows, step, columns] = part.reshape(chunk[rows, step, columns].shape)
        return place(chunk, by_batch(mesh))

    def feed(done: int, wanted: int) -> Chunk:
        count = min(wanted, STREAM_STEPS, S - done)
        read = [next(batches) for _ in range(count)]
        images = put("images", read, records.image_shape, np.uint8)
        return Chunk(Examples(images, put("labels", read, (), np.int32)), None, 0, count)

    return feed


def stream_batches(
    examples: Examples | Records,
    indices_SB: np.ndarray | jax.Array,
    *,
    start: int = 0,
    num_threads: int = 1,
    prefetch: int = 8,
) -> grain.DatasetIterator[Examples]:
    """Reads the batches of an epoch ahead of their use, in threads, with Grain.

    Batch s equals `take(examples, indices_SB[s])` bit for bit. The iterator's `get_state` and
    `set_state` save and restore its position, counted from `start`.

    Args:
      examples: What to read from.
      indices_SB: An epoch, from `epoch_order`.
      start: The first batch to read, to resume within an epoch.
      num_threads: How many batches to read at a time; 0 reads in the caller's thread. Decoding
        holds Python's lock, so more than one pays only where storage is slow.
      prefetch: How many batches to hold ready.

    Returns:
      An iterator over the batches `start` to S - 1.

    Raises:
      InputError: `start` is not from 0 to S.
    """
    import grain

    indices_SB = np.asarray(indices_SB)
    if not 0 <= start <= len(indices_SB):
        raise InputError(f"start must be from 0 to the {len(indices_SB)} batches, got {start}")
    rows: Any = indices_SB[start:]
    batches = grain.MapDataset.source(rows).map(functools.partial(take, examples))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))
