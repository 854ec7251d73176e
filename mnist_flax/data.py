"""Examples in memory, or records read lazily; a dataset's splits; an epoch's order; batches.

Shapes: N examples, S steps, B batch, H height, W width, C channels.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mnist_flax.checks import (
    check_image_array,
    check_image_shape,
    check_image_values,
    check_label_array,
    check_label_values,
)
from mnist_flax.errors import InputError
from mnist_flax.metrics import PADDING

EVAL_BATCH = 500  # examples of a batch in evaluation, where the caller has no wish


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Images and their labels: a split, a batch, or [S, B] batches. A pytree.

    `len(examples)` is N, `examples[:100]` are the first 100, and `examples[i]` is one example,
    `Examples(image_HWC, label)`; `images, labels = examples` takes the two apart.

    Attributes:
      images: [N, H, W, C], uint8 from 0 to 255 or floating-point from 0 to 1.
      labels: [N] integers, from 0 to K - 1; in batches for evaluation, -1 marks padding.
    """

    images: np.ndarray | jax.Array
    labels: np.ndarray | jax.Array

    @property
    def num_examples(self) -> int:
        """N, the same as `len`."""
        return len(self)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Any) -> "Examples":
        return Examples(self.images[rows], self.labels[rows])

    def __iter__(self) -> Iterator[Any]:
        return iter((self.images, self.labels))


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a dataset is.

    Attributes:
      name: Its name in TFDS, such as "mnist"; with a config, "emnist/balanced".
      version: Its version in TFDS, such as "3.0.1".
      num_classes: K.
      class_names: K names, by label.
      image_shape: (H, W, C).
      fingerprint: 16 hexadecimal digits of SHA-256 over the pixels and labels of the train and
        test splits, in order: the same data has the same fingerprint on every machine.
    """

    name: str
    version: str
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    fingerprint: str

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "DatasetInfo":
        """Rebuilds it from its fields as JSON values, whose tuples have become lists."""
        tuples: dict[str, Any] = {n: tuple(fields[n]) for n in ("class_names", "image_shape")}
        return cls(**{**fields, **tuples})


class Records:
    """Examples read from the prepared records when they are asked for, and not kept.

    A sequence: `len(records)`; `records[i]` is one example, `Examples(image_HWC, label)`.

    Attributes:
      image_shape: (H, W, C).
    """

    def __init__(self, prepared: Any, *, split: str, indices_N: np.ndarray):
        """Reads `split` of a dataset that TFDS has prepared, of `mnist_flax.datasets`."""
        self.image_shape = prepared.image_shape
        self._prepared = prepared
        self._source = prepared.source(split)
        self._indices_N = indices_N

    @property
    def num_examples(self) -> int:
        """N, the same as `len`."""
        return len(self)

    def __len__(self) -> int:
        return len(self._indices_N)

    def __getitem__(self, index: int) -> Examples:
        return self.take(np.array([index]))[0]

    def take(self, indices_B: np.ndarray | jax.Array) -> Examples:
        """Reads a batch: images [B, H, W, C] uint8 and labels [B] int32."""
        return self._prepared.read(self._source, self._indices_N[np.asarray(indices_B)])


TrainT = TypeVar("TrainT", Examples, Records)


@dataclasses.dataclass(frozen=True)
class Splits(Generic[TrainT]):
    """A dataset in three parts.

    Attributes:
      train: TFDS's "train" split without `val`: `Examples`, or `Records` if streamed.
      val: The part of "train" held out for model selection. May be empty.
      test: TFDS's "test" split.
      info: What the dataset is.
    """

    train: TrainT
    val: Examples
    test: Examples
    info: DatasetInfo

    @classmethod
    def from_arrays(
        cls,
        train: tuple[Any, Any],
        test: tuple[Any, Any],
        val: tuple[Any, Any] | None = None,
        *,
        val_size: int = 0,
        seed: int = 0,
        class_names: Sequence[str] | None = None,
        name: str = "own",
    ) -> "Splits[Examples]":
        """Makes splits of a user's own arrays, as Keras, PyTorch and scikit-learn hand them over.

        Args:
          train: images [N, H, W] or [N, H, W, C], uint8 or floating-point in [0, 1], and labels, a
            whole number each, [N] or [N, 1]. Whatever NumPy makes arrays of.
          test: likewise.
          val: likewise; None takes `val_size` examples out of `train` (`split_indices`).
          val_size: how many; 0 for none.
          seed: which ones.
          class_names: the classes' names, by label from 0 to K - 1. None takes the labels of
            `train` in ascending order for names, and numbers them from 0.
          name: what to call the dataset.

        Raises:
          InputError: images or labels have no such shape, dtype or value, or the splits differ in
            shape or in their classes.
        """
        parts = [_own_examples(part) for part in (train, test, val) if part is not None]
        if class_names is None:
            classes = np.unique(parts[0].labels)
            class_names = tuple(map(str, classes))
            parts = [_numbered(part, classes) for part in parts]
        own, (height, width, channels) = parts[0], parts[0].images.shape[1:]
        image_shape = height, width, channels
        for part, label in zip(parts, ("train", "test", "val"), strict=False):
            check_examples(part, name=label, image_shape=image_shape, num_classes=len(class_names))
        info = DatasetInfo(
            name=name,
            version="",
            num_classes=len(class_names),
            class_names=tuple(class_names),
            image_shape=image_shape,
            fingerprint=fingerprint([own], [parts[1]]),
        )
        if val is not None:
            return Splits(own, parts[2], parts[1], info)
        train_indices, val_indices = split_indices(len(own), val_size=val_size, seed=seed)
        return Splits(own[train_indices], own[val_indices], parts[1], info)


def _own_examples(pair: tuple[Any, Any]) -> Examples:
    images, labels = map(np.asarray, pair)
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype == np.float64:
        images = images.astype(np.float32)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    check_image_array(images)
    check_label_array(labels, num_examples=len(images))
    return Examples(images, labels.astype(np.int32))


def _numbered(examples: Examples, classes: np.ndarray) -> Examples:
    """Returns the examples with their labels' places among `classes` for labels."""
    labels_N = np.searchsorted(classes, examples.labels).astype(np.int32)
    known_N = classes[np.minimum(labels_N, len(classes) - 1)] == examples.labels
    if not known_N.all():
        unknown = np.asarray(examples.labels)[~known_N][0]
        raise InputError(f"there is a label {unknown}, and none of its like in train; leave it out")
    return Examples(examples.images, labels_N)


def fingerprint(*splits: Iterable[Examples]) -> str:
    """Returns the `DatasetInfo.fingerprint` of splits given in chunks, however they are cut."""
    digest = hashlib.sha256()
    for chunks in splits:
        images, labels = hashlib.sha256(), hashlib.sha256()
        for chunk in chunks:
            images.update(np.ascontiguousarray(chunk.images).data)
            labels.update(np.ascontiguousarray(chunk.labels, "<i4").data)
        digest.update(images.digest() + labels.digest())
    return digest.hexdigest()[:16]


def split_indices(num_examples: int, *, val_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Chooses which examples of "train" are for training and which for validation.

    `val` is the first `val_size` entries of the stable argsort of `num_examples` raw 64-bit draws
    of PCG64(seed). NumPy promises the raw draws of a bit generator for ever (NEP 19), and does not
    promise those of `Generator.permutation`.

    Args:
      num_examples: N, how many there are.
      val_size: How many to hold out: from 0 to N - 1.
      seed: Not negative.

    Returns:
      train_indices and val_indices, int64, each ascending; together they are 0 to N - 1.

    Raises:
      InputError: `val_size` would leave nothing to train on.
    """
    if not 0 <= val_size < num_examples:
        raise InputError(
            f"val_size must be from 0 to {num_examples - 1}, for {num_examples} training examples;"
            f" got {val_size}"
        )
    order_N = np.argsort(np.random.PCG64(seed).random_raw(num_examples), kind="stable")
    return np.sort(order_N[val_size:]), np.sort(order_N[:val_size])


def take(examples: Examples | Records, indices_B: np.ndarray | jax.Array) -> Examples:
    """Gathers a batch: images [B, H, W, C] uint8 and labels [B] int32."""
    if isinstance(examples, Records):
        return examples.take(indices_B)
    return examples[indices_B]


def check_examples(
    examples: "Examples | Records",
    *,
    name: str,
    image_shape: Sequence[int] | None = None,
    num_classes: int | None = None,
) -> None:
    """Checks a split, its values included where this process holds them.

    Args:
      examples: the split; of `Records`, which were checked as they were read, the shape alone.
      name: what to call it in an error, such as "train".
      image_shape: the (H, W, C) that images must have; None for any.
      num_classes: K; None leaves open how large a label may be.

    Raises:
      InputError: there is no example; the images are not uint8 or floating-point in [0, 1], of
        that shape; or the labels are not one integer in [0, K) an image.
    """
    if not len(examples):
        raise InputError(f"{name}: there are no examples; give at least one")
    try:
        if isinstance(examples, Records):
            if image_shape is not None:
                check_image_shape((len(examples), *examples.image_shape), image_shape)
            return
        check_image_array(examples.images)
        if image_shape is not None:
            check_image_shape(examples.images.shape, image_shape)
        check_label_array(examples.labels, num_examples=len(examples.images))
        check_image_values(examples.images)
        check_label_values(examples.labels, num_classes=num_classes)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def check_splits(splits: "Splits") -> None:
    """Checks the examples that training sees, `train` and, unless it is empty, `val`.

    Raises:
      InputError: as in `check_examples`.
    """
    wanted: dict[str, Any] = {
        "image_shape": splits.info.image_shape,
        "num_classes": splits.info.num_classes,
    }
    check_examples(splits.train, name="train", **wanted)
    if len(splits.val):
        check_examples(splits.val, name="val", **wanted)


def balanced_weights(labels_N: np.ndarray | jax.Array) -> np.ndarray:
    """Returns how often to draw each example, float32 [N], for classes that are equally frequent.

    The weights sum to N.
    """
    _, classes_N, counts = np.unique(labels_N, return_inverse=True, return_counts=True)
    return (len(classes_N) / (len(counts) * counts))[classes_N].astype(np.float32)


def epoch_order(
    key: jax.Array, *, num_examples: int, batch_size: int, weights_N: Any = None
) -> jax.Array:
    """Shuffles the examples of an epoch into full batches.

    Args:
      key: A fresh key for each epoch.
      num_examples: N.
      batch_size: B, from 1 to N.
      weights_N: how often each example is to be there, such as `balanced_weights`, on average; None
        for once.

    Returns:
      indices_SB int32: S = N // B batches of distinct examples. The N % B examples left over
      differ from epoch to epoch. With weights, the examples at S B equal steps from a random start
      along the weights' sum: each is there as often as its weight says, rounded up or down.

    Raises:
      InputError: `batch_size` is not from 1 to N.
    """
    if not 1 <= batch_size <= num_examples:
        raise InputError(
            f"batch_size must be from 1 to the {num_examples} training examples, got {batch_size}"
        )
    steps = num_examples // batch_size
    indices_N = jnp.arange(num_examples, dtype=jnp.int32)
    if weights_N is not None:
        key, start_key = jax.random.split(key)
        sums_N = jnp.cumsum(jnp.asarray(weights_N))
        places_N = (indices_N + jax.random.uniform(start_key)) * (sums_N[-1] / num_examples)
        places_N = jnp.searchsorted(sums_N, places_N, side="right")
        indices_N = jnp.minimum(places_N, num_examples - 1).astype(jnp.int32)
    order_N = jax.random.permutation(key, indices_N)
    return order_N[: steps * batch_size].reshape(steps, batch_size)


def eval_batches(examples: Examples, *, batch_size: int) -> Examples:
    """Cuts a split into batches, of which the last is padded: every example is there once.

    Args:
      examples: N examples.
      batch_size: B, at least 1.

    Returns:
      images [S, B, H, W, C] in their own dtype and labels [S, B] int32, with S = ceil(N / B).
      Padding has images of zeros and the label -1.

    Raises:
      InputError: `batch_size` is less than 1, or images or labels have no such shape or dtype.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    check_image_array(examples.images)
    check_label_array(examples.labels, num_examples=len(examples.images))
    num_examples = len(examples)
    steps = -(-num_examples // batch_size)
    padding = steps * batch_size - num_examples
    images = np.pad(examples.images, [(0, padding), (0, 0), (0, 0), (0, 0)])
    # Signed before it is padded: in uint8 the padding would be the label 255.
    labels = np.pad(
        np.asarray(examples.labels).astype(np.int32), (0, padding), constant_values=PADDING
    )
    return Examples(
        images.reshape(steps, batch_size, *images.shape[1:]), labels.reshape(steps, batch_size)
    )
