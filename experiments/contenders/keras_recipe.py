"""The notebook's recipe in Keras on TensorFlow, epoch by epoch, with the test accuracy of each.

python experiments/contenders/keras_recipe.py mnist.npz 5
"""

import json
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from keras_step import make_model


def main(data: str, epochs: int) -> None:
    """Prints a line of JSON an epoch: its training seconds and the test accuracy after it."""
    with np.load(data) as arrays:
        images, labels = arrays["images"], arrays["labels"]
        test_images, test_labels = arrays["test_images"], arrays["test_labels"]
    generator = tf.keras.preprocessing.image.ImageDataGenerator(
        rotation_range=10, width_shift_range=0.1, height_shift_range=0.1, zoom_range=0.1
    )
    model = make_model()
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"], jit_compile=False)
    for epoch in range(epochs):
        optimizer.learning_rate = 0.01 * 0.9**epoch
        flow = generator.flow(images.astype(np.float32), labels, batch_size=64)
        began = time.perf_counter()
        model.fit(flow, verbose=0)
        seconds = time.perf_counter() - began
        accuracy = model.evaluate(test_images, test_labels, batch_size=500, verbose=0)[1]
        print(json.dumps({"seconds": seconds, "test_accuracy": accuracy}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
