"""Batches read or augmented by the package: a contender of `benchmark.py`.

python experiments/contenders/flax_data.py mnist.npz 128 affine
"""

import sys
import time

BEGAN = time.perf_counter()

from typing import Any

import jax
import numpy as np
from worker import serve

from mnist_flax.datasets import load_splits
from mnist_flax.feed import stream_batches
from mnist_flax.launch import runtime
from mnist_flax.recipe import make_augment
from mnist_flax.recipes import BASELINE

AFFINE: Any = make_augment(BASELINE)


def affine(images_NHWC: np.ndarray, batch_size: int):
    """Returns `work(batches)`: the notebook's augmentation, on the device."""
    images_BHWC = jax.device_put(images_NHWC[:batch_size] / np.float32(255))
    transform = jax.jit(AFFINE)

    def work(batches):
        for index in range(batches):
            transform(jax.random.key(index), images_BHWC).block_until_ready()

    return work


def resident(images_NHWC: np.ndarray, batch_size: int):
    """Returns `work(batches)`: random batches gathered from what lies on the device."""
    on_device = jax.device_put(images_NHWC)
    indices_SB = np.random.default_rng(0).integers(len(images_NHWC), size=(64, batch_size))
    gather = jax.jit(lambda images, indices: images[indices])

    def work(batches):
        for index in range(batches):
            gather(on_device, indices_SB[index % 64]).block_until_ready()

    return work


def stream(_images, batch_size: int):
    """Returns `work(batches)`: random batches read from the prepared records on threads."""
    records = load_splits("mnist", val_size=0, seed=0, stream=True).train
    indices_SB = np.random.default_rng(0).integers(len(records), size=(10_000, batch_size))
    batches_of_epoch = stream_batches(records, indices_SB.astype(np.int32), start=0)

    def work(batches):
        for _ in range(batches):
            next(batches_of_epoch)

    return work


def main(data: str, batch_size: int, kind: str) -> None:
    """Serves batches of one kind."""
    runtime.configure()
    with np.load(data) as arrays:
        images_NHWC = arrays["images"]
    work = {"affine": affine, "resident": resident, "stream": stream}[kind](images_NHWC, batch_size)
    work(2)
    serve(work, began=BEGAN)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
