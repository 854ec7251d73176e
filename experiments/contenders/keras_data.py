"""Augmentation as Keras's users know it: a contender of `benchmark.py`.

python experiments/contenders/keras_data.py mnist.npz 128 generator
"""

import os
import sys
import time

BEGAN = time.perf_counter()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from keras import Sequential, layers
from worker import serve


def main(data: str, batch_size: int, kind: str) -> None:
    """Serves batches from `ImageDataGenerator`, as the notebook does, or from Keras's layers."""
    with np.load(data) as arrays:
        images, labels = arrays["images"] / np.float32(255), arrays["labels"]
    if kind == "generator":
        generator = tf.keras.preprocessing.image.ImageDataGenerator(
            rotation_range=10, width_shift_range=0.1, height_shift_range=0.1, zoom_range=0.1
        )
        flow = generator.flow(images, labels, batch_size=batch_size)

        def work(batches):
            for _ in range(batches):
                next(flow)

    else:
        stack = Sequential(
            [
                layers.RandomRotation(10 / 360, fill_mode="constant"),
                layers.RandomTranslation(0.1, 0.1, fill_mode="constant"),
                layers.RandomZoom(0.1, 0.1, fill_mode="constant"),
            ]
        )
        transform = tf.function(lambda batch: stack(batch, training=True))
        batch = tf.constant(images[:batch_size])

        def work(batches):
            for _ in range(batches):
                transform(batch).numpy()

    work(1)
    serve(work, began=BEGAN)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
