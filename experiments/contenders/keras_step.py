"""The notebook's network in Keras on TensorFlow: a contender of `benchmark.py`, run apart.

python experiments/contenders/keras_step.py mnist.npz 128 graph
"""

import os
import sys
import time

BEGAN = time.perf_counter()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers
from worker import serve


def make_model() -> keras.Model:
    """Returns the network; 915,146 trainable parameters."""

    def block(outputs, *, pool):
        conv = layers.Conv2D(outputs, 3, activation="relu")
        return [conv, layers.BatchNormalization(), *[layers.MaxPooling2D()] * pool]

    model = keras.Sequential(
        [
            keras.Input((28, 28, 1), dtype="uint8"),
            layers.Rescaling(1 / 255),
            *block(32, pool=False),
            *block(64, pool=True),
            *block(128, pool=True),
            layers.Flatten(),
            layers.Dense(256, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(10),
        ]
    )
    assert sum(np.prod(v.shape) for v in model.trainable_variables) == 915_146
    return model


def main(data: str, batch_size: int, mode: str) -> None:
    """Serves training steps on uint8 images that lie in memory, by `Model.fit`."""
    with np.load(data) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    model = make_model()
    model.compile(
        optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=mode == "xla",
    )

    def train(steps: int) -> None:
        rows = slice(0, steps * batch_size)
        history = model.fit(
            images[rows], labels[rows], batch_size=batch_size, shuffle=False, verbose=0
        )
        assert np.isfinite(history.history["loss"][0])

    train(2)
    serve(train, began=BEGAN)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
