"""The notebook's network in Flax, ours or with plain layers: a contender of `benchmark.py`.

python experiments/contenders/flax_step.py mnist.npz 128 ours 2
"""

import sys
import time

BEGAN = time.perf_counter()

import dataclasses
import itertools

import jax
import numpy as np
import optax
from flax import nnx
from worker import serve

from mnist_flax.data import DatasetInfo, Examples, Splits
from mnist_flax.launch import runtime
from mnist_flax.loop import Trainer, initial_progress
from mnist_flax.recipe import AugmentConfig
from mnist_flax.recipes import BASELINE
from mnist_flax.replicas import make_mesh
from mnist_flax.steps import create_state, train_step


class PlainCNN(nnx.Module):
    """The network as a newcomer would write it: `nnx.Conv`, `nnx.BatchNorm`, `nnx.max_pool`."""

    def __init__(self, *, rngs: nnx.Rngs):
        """Draws the parameters."""
        sizes = (1, 32, 64, 128)
        self.convs = nnx.List(
            [
                nnx.Conv(*pair, kernel_size=(3, 3), padding="VALID", rngs=rngs)
                for pair in itertools.pairwise(sizes)
            ]
        )
        self.norms = nnx.List([nnx.BatchNorm(n, epsilon=1e-3, rngs=rngs) for n in sizes[1:]])
        self.dense = nnx.Linear(3200, 256, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, images_BHWC, *, train, key):
        """Returns logits [B, K]."""
        x = images_BHWC
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(nnx.relu(conv(x)), use_running_average=not train)
            x = nnx.max_pool(x, (2, 2), strides=(2, 2)) if index else x
        x = nnx.relu(self.dense(x.reshape(x.shape[0], -1)))
        return self.head(self.dropout(x, deterministic=not train, rngs=key))


def plain(examples: Examples, batch_size: int):
    """Returns `train(steps)`: a jitted step a batch, from a Python loop."""
    optimizer = optax.sgd(0.01, momentum=0.9)
    key = jax.random.key(0)
    state = create_state(key, lambda rngs: PlainCNN(rngs=rngs), optimizer)
    step = jax.jit(train_step, donate_argnums=1)

    def train(steps):
        nonlocal state
        for i in range(steps):
            rows = slice(i * batch_size, (i + 1) * batch_size)
            state, metrics = step(
                key, state, Examples(examples.images[rows], examples.labels[rows])
            )
        assert np.isfinite(metrics.loss)

    return train


def ours(examples: Examples, batch_size: int):
    """Returns `train(steps)` as `fit` trains: the steps are one program, the data resident."""
    info = DatasetInfo("mnist", "", 10, tuple("0123456789"), (28, 28, 1), "")
    recipe = dataclasses.replace(
        BASELINE, val_size=0, batch_size=batch_size, augment=AugmentConfig()
    )
    mesh, none = make_mesh(), Examples(examples.images[:0], examples.labels[:0])
    trainer = Trainer([recipe], Splits(examples, none, none, info), varied=(), mesh=mesh)
    progress = initial_progress([recipe], info, steps=trainer.steps, mesh=mesh)
    feed = trainer.feed(progress, 1)
    trainer.compile(progress, feed(0, 0))
    take_steps, states = trainer.train(progress), progress.states

    def train(steps):
        nonlocal states
        states, seen = take_steps(states, progress.metrics, *feed(0, steps))
        assert np.isfinite(seen.loss).all()

    return train


def main(data: str, batch_size: int, kind: str, devices: int) -> None:
    """Serves training steps on uint8 images that lie in memory."""
    runtime.configure(cpu_devices=devices)
    with np.load(data) as arrays:
        examples = Examples(arrays["images"], arrays["labels"])
    train = {"ours": ours, "plain": plain}[kind](examples, batch_size)
    train(2)
    serve(train, began=BEGAN)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
