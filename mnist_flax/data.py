"""A TFDS dataset as uint8 arrays, or as records read lazily; the order of an epoch; batches.

Shapes: N examples, S steps, B batch, H height, W width, C channels.

MNIST, and what is given as archives, is read from its archives, without TFDS and without a file
written. TFDS prepares records of it when it is to be streamed. Of other datasets the first
`load_splits` decodes every record once; the arrays are kept beside the records, so that later loads
read one file and import no TFDS.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, TypeVar

import filelock
import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from mnist_flax import archives as archives_lib
from mnist_flax.checks import (
    check_image_array,
    check_image_shape,
    check_image_values,
    check_label_array,
    check_label_values,
)
from mnist_flax.errors import InputError
from mnist_flax.metrics import PADDING
from mnist_flax.workdir import local_path

if TYPE_CHECKING:
    import grain

EVAL_BATCH = 500  # examples of a batch in evaluation, where the caller has no wish

_INFO_FILE = "decoded.json"
_ARRAYS_FILE = "decoded.npz"
_READ_RECORDS = 1024  # At a time: one by one, records take three times as long to read.
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAME = re.compile(
    rf"(?P<dataset>\w+)(/(?P<config>\w[\w.=+-]*))?(:(?P<version>{_VERSION.pattern}))?"
)


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

    def __init__(self, prepared: "_Prepared", *, split: str, indices_N: np.ndarray):
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


def load_splits(
    name: str,
    *,
    val_size: int = 5000,
    seed: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
    archives: str | os.PathLike[str] | None = None,
    stream: bool = False,
) -> Splits:
    """Loads a dataset, having TFDS prepare it first where that is needed and has not been done.

    Args:
      name: "mnist", which comes with this package; "fashion_mnist" or "kmnist", which TFDS
        downloads, unless there are `archives`. Or any dataset of uint8 images of one shape that
        TFDS has already prepared under `data_dir` as array_record, with splits "train" and "test":
        "name", "name/config" or "name/config:version" (by default, the highest version there is).
      val_size: How many examples to hold out of "train" (see `split_indices`).
      seed: Which ones to hold out.
      data_dir: TFDS's root directory. By default $TFDS_DATA_DIR, or ~/tensorflow_datasets. Nothing
        is read from there or written to it for what is held in memory from archives.
      archives: A directory of the four IDX archives to read the dataset from, instead of
        those that TFDS knows: for one that cannot be downloaded, or for variants of MNIST.
      stream: Make `train` a `Records`, of which nothing is held in memory.

    Returns:
      The splits. All are in the order of the prepared records, which for MNIST and its like is
      that of the archives.

    Raises:
      InputError: The dataset is unknown, unsuitable or damaged, cannot be downloaded or written,
        or has no `val_size` examples to spare; or TFDS is needed and cannot be imported.
    """
    if val_size < 0 or seed < 0:
        raise InputError(f"val_size and seed must not be negative, got {val_size} and {seed}")
    if data_dir is not None:
        local_path(data_dir, name="data_dir")  # Refused even where it is not needed.
    if archives is not None and name not in archives_lib.NAMES:
        raise InputError(f"archives can stand for {_known()}, not for {name!r}")
    files = archives_lib.local_archives(name, archives) if name in archives_lib.NAMES else None
    if stream:
        return _load_streamed(name, _root(data_dir), files, val_size=val_size, seed=seed)
    if files:
        train, test, info = _read_archives(name, files)
    else:
        directory, prepare = _records(name, _root(data_dir))
        train, test, info = _read_decoded(directory) or _decode_once(directory, prepare)
    train_indices, val_indices = split_indices(train.num_examples, val_size=val_size, seed=seed)
    return Splits(take(train, train_indices), take(train, val_indices), test, info)


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


def epoch_order(key: jax.Array, *, num_examples: int, batch_size: int) -> jax.Array:
    """Shuffles the examples of an epoch into full batches.

    Args:
      key: A fresh key for each epoch.
      num_examples: N.
      batch_size: B, from 1 to N.

    Returns:
      indices_SB int32: S = N // B batches of distinct examples. The N % B examples left over
      differ from epoch to epoch.

    Raises:
      InputError: `batch_size` is not from 1 to N.
    """
    if not 1 <= batch_size <= num_examples:
        raise InputError(
            f"batch_size must be from 1 to the {num_examples} training examples, got {batch_size}"
        )
    steps = num_examples // batch_size
    order_N = jax.random.permutation(key, jnp.arange(num_examples, dtype=jnp.int32))
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


def stream_batches(
    examples: Examples | Records,
    indices_SB: np.ndarray | jax.Array,
    *,
    start: int = 0,
    num_threads: int = 1,
    prefetch: int = 8,
) -> "grain.DatasetIterator[Examples]":
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


def _root(data_dir: str | os.PathLike[str] | None) -> Path:
    given = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return local_path(given, name="data_dir").absolute()


def _read_archives(
    name: str, files: archives_lib.Archives
) -> tuple[Examples, Examples, DatasetInfo]:
    train, test = (
        Examples(images_NHW[..., None], labels_N.astype(np.int32))
        for images_NHW, labels_N in archives_lib.read_splits(files).values()
    )
    names = archives_lib.CLASS_NAMES[name]
    height, width, channels = train.images.shape[1:]
    info = DatasetInfo(
        name=name,
        version=archives_lib.VERSION,
        num_classes=len(names),
        class_names=names,
        image_shape=(height, width, channels),
        fingerprint=_fingerprint([train], [test]),
    )
    return train, test, info


def _records(
    name: str, root: Path, files: archives_lib.Archives | None = None
) -> tuple[Path, Callable[[], None]]:
    """Returns where the records of a dataset lie, or will lie, and what prepares them."""
    if name not in archives_lib.NAMES:
        return _find_prepared(name, root), lambda: None
    directory = archives_lib.dataset_dir(name, data_dir=root, files=files)
    return directory, functools.partial(archives_lib.prepare, name, directory, files)


def _known() -> str:
    return ", ".join(archives_lib.NAMES[:-1]) + " and " + archives_lib.NAMES[-1]


def _find_prepared(name: str, root: Path) -> Path:
    """Finds what TFDS prepared, at `<root>/<dataset>[/<config>]/<version>`."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(f"{name!r} is no dataset name: write name, name/config or name:1.2.3")
    parent = root / match["dataset"] / (match["config"] or "")
    found = {path.parent.name for path in parent.glob("*/dataset_info.json")}
    versions = [tuple(map(int, v.split("."))) for v in found if _VERSION.fullmatch(v)]
    if match["version"] in found:
        return parent / match["version"]
    if versions and not match["version"]:
        return parent / ".".join(map(str, max(versions)))
    close = difflib.get_close_matches(name.lower(), archives_lib.NAMES, n=1)
    suggestion = f"did you mean {close[0]!r}? Or " if close else ""
    configs = sorted({path.parents[1].name for path in parent.glob("*/*/dataset_info.json")})
    if configs:
        suggestion = f"name a config ({', '.join(f'{name}/{config}' for config in configs)}), or "
    raise InputError(
        f"no dataset {name!r} in {root}: {suggestion}prepare it there with TFDS and "
        f"file_format='array_record' ({_known()} need no preparation)"
    )


def _load_streamed(
    name: str, root: Path, files: archives_lib.Archives | None, *, val_size: int, seed: int
) -> Splits[Records]:
    directory, prepare = _records(name, root, files)
    archives_lib.import_tfds()  # Refused before anything is written.
    info = _read_info(directory) or _scan_once(name, directory, files, prepare)
    prepared = _Prepared(directory)
    num_train = prepared.num_examples("train")
    train_indices, val_indices = split_indices(num_train, val_size=val_size, seed=seed)
    return Splits(
        train=Records(prepared, split="train", indices_N=train_indices),
        val=prepared.decode("train", val_indices),
        test=prepared.decode("test"),
        info=info,
    )


def _decode_once(
    directory: Path, prepare: Callable[[], None]
) -> tuple[Examples, Examples, DatasetInfo]:
    """Prepares the dataset if need be, decodes it, and keeps the arrays for `_read_decoded`."""
    archives_lib.import_tfds()  # Refused before anything is written.
    with _lock(directory):
        if decoded := _read_decoded(directory):  # Another process did it meanwhile.
            return decoded
        prepare()
        prepared = _Prepared(directory)
        train, test = prepared.decode("train"), prepared.decode("test")
        info = prepared.info(_fingerprint([train], [test]))
        arrays: dict[str, Any] = {
            "train_images": train.images,
            "train_labels": train.labels,
            "test_images": test.images,
            "test_labels": test.labels,
        }
        _write(directory / _ARRAYS_FILE, lambda file: np.savez(file, **arrays))
        _write_info(directory, info)
        return train, test, info


def _scan_once(
    name: str, directory: Path, files: archives_lib.Archives | None, prepare: Callable[[], None]
) -> DatasetInfo:
    """Prepares the dataset if need be; takes its fingerprint from its archives or its records."""
    with _lock(directory):
        if info := _read_info(directory):
            return info
        is_new = not (directory / "dataset_info.json").is_file()
        prepare()
        if is_new and files:
            _, _, info = _read_archives(name, files)
        else:
            prepared = _Prepared(directory)
            info = prepared.info(_fingerprint(prepared.chunks("train"), prepared.chunks("test")))
        _write_info(directory, info)
        return info


def _read_decoded(directory: Path) -> tuple[Examples, Examples, DatasetInfo] | None:
    """Reads what `_decode_once` kept; None if it is not there, or is damaged."""
    info = _read_info(directory)
    if info is None:
        return None
    try:
        with (directory / _ARRAYS_FILE).open("rb") as file, np.load(file) as arrays:
            train = Examples(arrays["train_images"], arrays["train_labels"])
            test = Examples(arrays["test_images"], arrays["test_labels"])
    # A damaged zip file fails in many ways; its CRC-32s see to it that it does fail.
    except Exception:
        return None
    return train, test, info


def _read_info(directory: Path) -> DatasetInfo | None:
    try:
        return DatasetInfo.from_dict(json.loads((directory / _INFO_FILE).read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write_info(directory: Path, info: DatasetInfo) -> None:
    text = json.dumps(dataclasses.asdict(info), indent=2)
    _write(directory / _INFO_FILE, lambda file: file.write(text.encode()))


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file whole or not at all. A directory that is shared read-only is left as it is."""
    if not os.access(path.parent, os.W_OK):
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error}") from error


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Lets one process at a time prepare and decode the dataset in `directory`."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot prepare a dataset in {directory}: {error}") from error
    if not os.access(directory.parent, os.W_OK):
        yield  # Shared read-only: nobody can prepare it, and whoever reads it needs no lock.
        return
    lock = filelock.FileLock(directory.parent / f"{directory.name}.lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        print(f"waiting for the process that prepares {directory}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fingerprint(*splits: Iterable[Examples]) -> str:
    """Hashes splits that are given in chunks, however they are cut."""
    digest = hashlib.sha256()
    for chunks in splits:
        images, labels = hashlib.sha256(), hashlib.sha256()
        for chunk in chunks:
            images.update(np.ascontiguousarray(chunk.images).data)
            labels.update(np.ascontiguousarray(chunk.labels, "<i4").data)
        digest.update(images.digest() + labels.digest())
    return digest.hexdigest()[:16]


class _Prepared:
    """A dataset that TFDS has prepared, checked to be one of images and labels."""

    def __init__(self, directory: Path):
        tfds: Any = archives_lib.import_tfds()
        self._directory = directory
        try:
            with archives_lib.quiet():
                self._builder: Any = tfds.builder_from_directory(directory)
        except Exception as error:
            raise self._damaged(error) from error
        info: Any = self._builder.info
        if missing := {"train", "test"} - set(info.splits):
            raise InputError(f"{directory} has no split named {' or '.join(sorted(missing))}")
        keys: Any = info.supervised_keys or ()
        is_pair = len(keys) == 2 and all(isinstance(key, str) for key in keys)
        self._keys: tuple[str, str] = keys if is_pair else ("image", "label")
        is_dict = isinstance(info.features, tfds.features.FeaturesDict)
        features: dict[str, Any] = dict(info.features.items()) if is_dict else {}
        image: Any = features.get(self._keys[0])
        label: Any = features.get(self._keys[1])
        shape: Any = (None,)
        if isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8:
            shape = image.shape
        names: Any = ()
        if isinstance(label, tfds.features.ClassLabel) and label.num_classes:
            names = label.names
        if None in shape or not names:
            found = " ".join(f"{' and '.join(self._keys)} are {image} and {label}".split())
            raise InputError(
                f"{directory} is not a dataset of uint8 images of one shape with class labels: its "
                f"features {found}"
            )
        self.image_shape: tuple[int, int, int] = tuple(shape)
        self._class_names: tuple[str, ...] = tuple(names)
        # TFDS logs how it decodes at the first record it decodes.
        with archives_lib.quiet():
            self.read(self.source("train"), np.arange(1))

    def info(self, fingerprint: str) -> DatasetInfo:
        name, config = self._builder.name, self._builder.builder_config_name
        if config and name not in archives_lib.NAMES:  # Theirs says only where the archives lay.
            name = f"{name}/{config}"
        return DatasetInfo(
            name=name,
            version=str(self._builder.version),
            num_classes=len(self._class_names),
            class_names=self._class_names,
            image_shape=self.image_shape,
            fingerprint=fingerprint,
        )

    def num_examples(self, split: str) -> int:
        return self._builder.info.splits[split].num_examples

    def source(self, split: str) -> Any:
        try:
            return self._builder.as_data_source(split=split, file_format="array_record")
        except (NotImplementedError, ValueError) as error:
            raise InputError(
                f"{self._directory} is prepared as {self._builder.info.file_format.value}: prepare "
                "it with file_format='array_record'"
            ) from error
        except (OSError, RuntimeError) as error:
            raise self._damaged(error) from error

    def read(self, source: Any, indices_B: np.ndarray) -> Examples:
        image_key, label_key = self._keys
        try:
            records = source.__getitems__(indices_B.tolist())
        except (OSError, RuntimeError) as error:
            raise self._damaged(error) from error
        images = np.empty((len(records), *self.image_shape), np.uint8)
        labels = np.empty(len(records), np.int32)
        for i, record in enumerate(records):
            if record[image_key].shape != self.image_shape:
                raise self._damaged(f"an image of shape {record[image_key].shape}")
            images[i], labels[i] = record[image_key], record[label_key]
        if np.any((labels < 0) | (labels >= len(self._class_names))):
            raise InputError(f"{self._directory} has examples without a label")
        return Examples(images, labels)

    def chunks(self, split: str, indices_N: np.ndarray | None = None) -> Iterator[Examples]:
        source = self.source(split)
        if indices_N is None:
            indices_N = np.arange(len(source))
        with tqdm(total=len(indices_N), desc=f"Decoding {split}", unit="", leave=False) as bar:
            for start in range(0, len(indices_N), _READ_RECORDS):
                chunk = self.read(source, indices_N[start : start + _READ_RECORDS])
                bar.update(chunk.num_examples)
                yield chunk

    def decode(self, split: str, indices_N: np.ndarray | None = None) -> Examples:
        num_examples = self.num_examples(split) if indices_N is None else len(indices_N)
        images = np.empty((num_examples, *self.image_shape), np.uint8)
        labels = np.empty(num_examples, np.int32)
        start = 0
        for chunk in self.chunks(split, indices_N):
            stop = start + chunk.num_examples
            images[start:stop], labels[start:stop] = chunk.images, chunk.labels
            start = stop
        return Examples(images, labels)

    def _damaged(self, reason: object) -> InputError:
        first_line = str(reason).strip().partition("\n")[0]
        return InputError(
            f"{self._directory} is damaged ({first_line}): delete it and prepare it again"
        )
