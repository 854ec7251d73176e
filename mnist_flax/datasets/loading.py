"""`load_splits`: a dataset of TFDS, or archives, as `Splits`.

MNIST, and what is given as archives, is read from its archives, without TFDS and without a file
written. TFDS prepares records of it when it is to be streamed. Of other datasets the first
`load_splits` decodes every record once; the arrays are kept beside the records, so that later loads
read one file and import no TFDS.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import filelock
import numpy as np
from tqdm.auto import tqdm

from mnist_flax.data import (
    DatasetInfo,
    Examples,
    Records,
    Splits,
    fingerprint,
    split_indices,
    take,
)
from mnist_flax.datasets import archives as archives_lib
from mnist_flax.errors import InputError
from mnist_flax.workdir import local_path

_INFO_FILE = "decoded.json"
_ARRAYS_FILE = "decoded.npz"
_READ_RECORDS = 1024  # At a time: one by one, records take three times as long to read.
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_NAME = re.compile(
    rf"(?P<dataset>\w+)(/(?P<config>\w[\w.=+-]*))?(:(?P<version>{_VERSION.pattern}))?"
)


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
        those that TFDS knows: for one that cannot be downloaded, for variants of MNIST, or for
        "emnist/balanced" and its like, in memory alone.
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
    if archives is not None and name not in archives_lib.CLASS_NAMES:
        known = ", ".join(archives_lib.CLASS_NAMES)
        raise InputError(f"archives can stand for {known}, not for {name!r}")
    is_archive = name in archives_lib.NAMES or archives is not None
    files = archives_lib.local_archives(name, archives) if is_archive else None
    if stream and name.startswith("emnist/") and files:
        raise InputError(f"{name} is held in memory where it is read from archives; do not stream")
    if stream:
        return _load_streamed(name, _root(data_dir), files, val_size=val_size, seed=seed)
    if files:
        train, test, info = _read_archives(name, files)
    else:
        directory, prepare = _records(name, _root(data_dir))
        train, test, info = _read_decoded(directory) or _decode_once(directory, prepare)
    train_indices, val_indices = split_indices(train.num_examples, val_size=val_size, seed=seed)
    return Splits(take(train, train_indices), take(train, val_indices), test, info)


def _root(data_dir: str | os.PathLike[str] | None) -> Path:
    given = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return local_path(given, name="data_dir").absolute()


def _read_archives(
    name: str, files: archives_lib.Archives
) -> tuple[Examples, Examples, DatasetInfo]:
    train, test = (
        Examples(images_NHW[..., None], labels_N.astype(np.int32))
        for images_NHW, labels_N in archives_lib.read_splits(files, name=name).values()
    )
    names = archives_lib.CLASS_NAMES[name]
    height, width, channels = train.images.shape[1:]
    info = DatasetInfo(
        name=name,
        version=archives_lib.VERSION if name in archives_lib.NAMES else archives_lib.EMNIST_VERSION,
        num_classes=len(names),
        class_names=names,
        image_shape=(height, width, channels),
        fingerprint=fingerprint([train], [test]),
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
        info = prepared.info(fingerprint([train], [test]))
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
            info = prepared.info(fingerprint(prepared.chunks("train"), prepared.chunks("test")))
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

    def info(self, digest: str) -> DatasetInfo:
        name, config = self._builder.name, self._builder.builder_config_name
        if config and name not in archives_lib.NAMES:  # Theirs says only where the archives lay.
            name = f"{name}/{config}"
        return DatasetInfo(
            name=name,
            version=str(self._builder.version),
            num_classes=len(self._class_names),
            class_names=self._class_names,
            image_shape=self.image_shape,
            fingerprint=digest,
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
