"""IDX archives, the format MNIST is published in, and their preparation by TFDS.

The four archives of MNIST lie in `archives/` beside this file, so MNIST needs no network; to hold
it in memory needs no TFDS either, nor any file but them.

To stream or to download, TFDS prepares records. Its own builders for MNIST, Fashion-MNIST and
Kuzushiji-MNIST need TensorFlow to extract and to encode. The builders here subclass them, read the
archives with gzip and NumPy, and hand TFDS images that PIL encoded. They also keep the order of the
archives, where TFDS would shuffle: index i of a split is image i of its archive, the numbering that
audits of MNIST's labels use.
"""

import contextlib
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import shutil
import string
import struct
import types
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from mnist_flax.errors import InputError
from mnist_flax.workdir import local_path

NAMES = ("mnist", "fashion_mnist", "kmnist")
"""The TFDS datasets that are published as four IDX archives of 28x28 images in 10 classes."""

VERSION = "3.0.1"
"""The version of those datasets in TFDS."""

EMNIST_VERSION = "3.1.0"
"""The version of EMNIST's parts in TFDS."""

BUNDLED = Path(__file__).with_name("archives")
"""The directory of the four MNIST archives that come with this package."""

BUNDLED_SHA256 = (
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
"""SHA-256 of MNIST's archives in the order of `Archives`, as TFDS registers them."""

LABEL_VOTES = BUNDLED / "mnist_test_label_votes.json"
"""Five people's votes on each of the 100 MNIST test labels that confident learning doubted."""

CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}
"""The names of the classes, by label, as in TFDS."""

_UPPER, _LOWER = string.ascii_uppercase, string.ascii_lowercase
CLASS_NAMES |= {
    "emnist/byclass": tuple(string.digits + _UPPER + _LOWER),
    "emnist/bymerge": tuple(string.digits + _UPPER + "abdefghnqrt"),
    "emnist/balanced": tuple(string.digits + _UPPER + "abdefghnqrt"),
    "emnist/letters": tuple(_LOWER),
    "emnist/digits": tuple(string.digits),
    "emnist/mnist": tuple(string.digits),
}
"""EMNIST's parts (Cohen et al. 2017, arXiv 1702.05373), which `archives` can stand for."""

_IMAGE_SHAPE = (28, 28)

_MAX_BYTES = 2**30  # Twice EMNIST "byclass", the largest of the family.
_CHUNK_BYTES = 2**20


class Archives(NamedTuple):
    """The paths of the four IDX archives of a dataset; each may be gzipped or not."""

    train_images: Path
    train_labels: Path
    test_images: Path
    test_labels: Path


MNIST_FINGERPRINT = "9c723dd0d6c9788c"
"""The `DatasetInfo.fingerprint` of MNIST as it was published, in the order of its archives."""


def disputed_test_labels(*, fingerprint: str) -> list[int]:
    """Returns the MNIST test images whose label fewer than three of five people supported.

    Indices in the order of the archives. The votes are from the repository cleanlab/label-errors,
    `mturk/mnist_mturk.json` (Northcutt, Athalye and Mueller 2021, arXiv 2103.14749).

    Args:
      fingerprint: the `DatasetInfo.fingerprint` of the data that is asked about; for any but
        MNIST's own, under whatever name, nothing is disputed.
    """
    if fingerprint != MNIST_FINGERPRINT:
        return []
    rows = json.loads(LABEL_VOTES.read_text())["rows"]
    return [index for index, _given, _suggested, for_given, *_others in rows if for_given < 3]


FILE_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
"""The usual names of the four archives, without `.gz`, in the order of `Archives`."""

EMNIST_NAMES = (*FILE_NAMES[:2], "test-images-idx3-ubyte", "test-labels-idx1-ubyte")
"""The names of EMNIST's archives, after "emnist-PART-"."""

_ALL_FILES = ", ".join(f"{name}.gz" for name in FILE_NAMES)


def _spellings(root: Path, name: str) -> list[Path]:
    """Returns where an archive may lie: gzipped or not, and with a dot, as some sites have it."""
    names = name, name.replace("-idx", ".idx")
    return [root / f"{own}{suffix}" for own in names for suffix in (".gz", "")]


def find_archives(directory: str | os.PathLike[str], name: str = "mnist") -> Archives:
    """Finds the four archives of a dataset by their usual names.

    Args:
      directory: Where they lie. Where a file is there twice, `.gz` is taken.
      name: Of which dataset they are: EMNIST's are named after its parts, all others' alike.

    Returns:
      Their paths.

    Raises:
      InputError: There is no such directory, or a file is missing from it.
    """
    root = local_path(directory, name="archives")
    if not root.is_dir():
        raise InputError(f"archives: {root} is not a directory; it should hold {_ALL_FILES}")
    part = name.removeprefix("emnist/")
    names = FILE_NAMES if part == name else tuple(f"emnist-{part}-{own}" for own in EMNIST_NAMES)
    paths = [next((p for p in _spellings(root, own) if p.is_file()), None) for own in names]
    missing = [own for own, path in zip(names, paths, strict=True) if path is None]
    if missing:
        raise InputError(f"archives: {root} lacks {', '.join(missing)} (each .gz or not)")
    return Archives(*(path for path in paths if path is not None))


def read_idx(path: str | os.PathLike[str], *, ndim: int) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, gzipped or not.

    An IDX file is the bytes 0, 0, 8 (for unsigned byte) and `ndim`; then `ndim` sizes, each a
    big-endian uint32; then the elements in C order. Never more than the file holds is allocated,
    and never more than its header says is inflated.

    Args:
      path: The file.
      ndim: The number of dimensions it must have: 3 for images, 1 for labels.

    Returns:
      uint8, with the shape that the header gives.

    Raises:
      InputError: It is no such file, is truncated, is damaged, has bytes left over, or claims
        more than 1 GiB.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            return _read_stream(gzip.GzipFile(fileobj=file) if is_gzip else file, path, ndim)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}") from error


def _read_stream(stream: IO[bytes] | gzip.GzipFile, path: Path, ndim: int) -> np.ndarray:
    header = stream.read(4 + 4 * ndim)
    magic = bytes([0, 0, 8, ndim])
    if header[:4] != magic:
        raise InputError(
            f"{path} is not an IDX file of unsigned bytes in {ndim} dimensions: it starts with "
            f"0x{header[:4].hex()} instead of 0x{magic.hex()}"
        )
    if len(header) < 4 + 4 * ndim:
        raise InputError(f"{path} is truncated: its header ends after {len(header)} bytes")
    shape = struct.unpack(f">{ndim}I", header[4:])
    size = math.prod(shape)
    # numpy refuses lengths whose product is too large, even beside a 0.
    if math.prod(max(length, 1) for length in shape) > _MAX_BYTES:
        raise InputError(f"{path} claims the shape {shape}, more than {_MAX_BYTES:,} bytes")
    # Grown as the bytes arrive, since the header may promise more than the file holds.
    data = bytearray()
    while len(data) < size and (chunk := stream.read(min(size - len(data), _CHUNK_BYTES))):
        data += chunk
    if len(data) < size:
        raise InputError(f"{path} is truncated: {len(data):,} of the {size:,} bytes of {shape}")
    if stream.read(1):  # At the end of a gzip file this is also what checks its CRC-32.
        raise InputError(f"{path} has bytes left over after the {size:,} of its shape {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_examples(
    images_path: str | os.PathLike[str],
    labels_path: str | os.PathLike[str],
    *,
    name: str = "mnist",
) -> tuple[np.ndarray, np.ndarray]:
    """Reads one split of MNIST, or of a dataset published in its form.

    Args:
      images_path: An IDX file of 28x28 images.
      labels_path: An IDX file of as many labels, each of a class from 0 on.
      name: The dataset. EMNIST's images lie on their side, and its letters are counted from 1.

    Returns:
      images_NHW uint8 and labels_N uint8.

    Raises:
      InputError: A file cannot be read, or the two do not make such a split.
    """
    images_NHW = read_idx(images_path, ndim=3)
    labels_N = read_idx(labels_path, ndim=1)
    if images_NHW.shape[1:] != _IMAGE_SHAPE:
        raise InputError(
            f"{images_path} holds images of {images_NHW.shape[1:]}, not {_IMAGE_SHAPE}"
        )
    if len(images_NHW) != len(labels_N):
        raise InputError(
            f"{images_path} holds {len(images_NHW):,} images but {labels_path} {len(labels_N):,} "
            "labels"
        )
    if not len(labels_N):
        raise InputError(f"{images_path} holds no images")
    if name == "emnist/letters":
        if labels_N.min() < 1:
            raise InputError(f"{labels_path} holds the label 0; letters are counted from 1")
        labels_N = labels_N - 1
    if labels_N.max() >= (classes := len(CLASS_NAMES[name])):
        raise InputError(f"{labels_path} holds the label {labels_N.max()}: more than {classes - 1}")
    return images_NHW.transpose(0, 2, 1) if name.startswith("emnist/") else images_NHW, labels_N


def local_archives(
    name: str, archives: str | os.PathLike[str] | None = None, *, bundled: Path = BUNDLED
) -> Archives | None:
    """Finds the archives of a dataset that need no download.

    Args:
      name: One of `NAMES`.
      archives: A directory of four archives to take instead of those that TFDS knows. Their
        checksums are not looked at.
      bundled: The directory of MNIST's own.

    Returns:
      Their paths. None for a dataset that TFDS has to download.

    Raises:
      InputError: `archives` is no directory of four archives, or MNIST's own are not the originals.
    """
    if archives is not None:
        return find_archives(archives, name)
    if name != "mnist":
        return None
    files = find_archives(bundled)
    for path, expected in zip(files, BUNDLED_SHA256, strict=True):
        if _sha256(path).hexdigest() != expected:
            raise InputError(
                f"{path} is not the original, whose SHA-256 is {expected}: install the package "
                "again, or pass archives"
            )
    return files


def dataset_dir(name: str, *, data_dir: Path, files: Archives | None = None) -> Path:
    """Returns the directory in which `prepare` puts a dataset: `<data_dir>/<name>/<config>/3.0.1`.

    The config keeps it apart from a `<data_dir>/<name>/3.0.1` that TFDS itself prepared, and one
    set of archives from another.

    Args:
      name: One of `NAMES`.
      data_dir: TFDS's root directory.
      files: Its archives, if they are at hand.

    Returns:
      The directory, which need not exist. Its config is "canonical" for what TFDS knows, and else
      named by the SHA-256 of the archives' contents.

    Raises:
      InputError: An archive cannot be read.
    """
    if files is None or (name == "mnist" and files == find_archives(BUNDLED)):
        return data_dir / name / "canonical" / VERSION
    return data_dir / name / f"archives-{_digest(files)}" / VERSION


def prepare(name: str, directory: Path, files: Archives | None) -> None:
    """Has TFDS write a dataset, as array_record in the order of its archives.

    Does nothing if it is there already. Only one process may do so at a time: what a killed one
    left behind is removed first.

    Args:
      name: One of `NAMES`.
      directory: The `dataset_dir` of the dataset.
      files: Its archives, whose structure is checked. None lets TFDS download those that it knows,
        and check their SHA-256.

    Raises:
      InputError: TFDS cannot be imported, the archives are damaged or cannot be had, or
        `directory` cannot be written.
    """
    downloads = directory.parent / "downloads"
    for leftover in (downloads, *directory.parent.glob("incomplete.*")):
        shutil.rmtree(leftover, ignore_errors=True)
    if (directory / "dataset_info.json").is_file():
        return
    splits = None if files is None else read_splits(files)
    tfds = import_tfds()
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    try:
        with (
            quiet(),
            contextlib.redirect_stdout(io.StringIO()),
            tqdm(desc=f"Preparing {name}", unit=" images", leave=False) as bar,
        ):
            builder = _builder_class(name)(
                data_dir=directory.parents[2],
                config=tfds.core.BuilderConfig(name=directory.parent.name),
                file_format="array_record",
            )
            builder.splits, builder.bar = splits, bar
            if splits is None:
                _check_reachable(name, builder.URL)
            builder.download_and_prepare(
                download_dir=downloads,
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except NonMatchingChecksumError as error:
        reason = _reason(error).removesuffix(":")
        raise InputError(f"{reason}; try again, or pass archives") from error
    # RuntimeError is what array_record raises, for a full disk among other things.
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot prepare {name} in {directory}: {_reason(error)}") from error
    finally:
        shutil.rmtree(downloads, ignore_errors=True)


def read_splits(
    files: Archives, *, name: str = "mnist"
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads both splits of a dataset: images_NHW uint8 and labels_N uint8 of "train" and "test".

    Raises:
      InputError: A file cannot be read, or two do not make a split.
    """
    return {
        "train": read_examples(files.train_images, files.train_labels, name=name),
        "test": read_examples(files.test_images, files.test_labels, name=name),
    }


def import_tfds() -> types.ModuleType:
    """Imports TensorFlow Datasets, which memory-resident MNIST does without.

    Raises:
      InputError: It cannot be imported, or what reads its records is not installed.
    """
    try:
        import tensorflow_datasets as tfds

        for reader in ("array_record", "grain"):
            if importlib.util.find_spec(reader) is None:
                raise ModuleNotFoundError(f"No module named '{reader}'")
    # Beside a protobuf that is too old for it, TFDS fails with an error of protobuf's own.
    except Exception as error:
        raise InputError(
            "streaming, and datasets without archives, need TensorFlow Datasets, array_record and "
            f"grain, which cannot be used here ({_reason(error)}): pip install 'mnist_flax[tfds]'"
        ) from error
    tfds.display_progress_bar(False)
    return tfds


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what TFDS logs below errors."""
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@functools.cache
def _builder_class(name: str) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered
    from tensorflow_datasets.image_classification import mnist

    published: Any = {
        "mnist": mnist.MNIST,
        "fashion_mnist": mnist.FashionMNIST,
        "kmnist": mnist.KMNIST,
    }[name]

    # The name is already registered, by the class that this one subclasses.
    with registered.skip_registration():

        class IdxBuilder(published):
            name = published.name
            VERSION = tfds.core.Version(VERSION)
            splits: dict[str, tuple[np.ndarray, np.ndarray]] | None = None
            bar: tqdm

            def _info(self):
                info = super()._info()
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=info.description,
                    features=info.features,
                    supervised_keys=info.supervised_keys,
                    homepage=info.homepage,
                    citation=info.citation,
                    disable_shuffling=True,
                )

            def _split_generators(self, dl_manager):
                if self.splits is None:
                    urls = [f"{self.URL}{file}.gz" for file in FILE_NAMES]
                    self.splits = read_splits(Archives(*dl_manager.download(urls)))
                self.bar.reset(total=sum(len(labels_N) for _, labels_N in self.splits.values()))
                return {
                    split: self._generate_examples(*examples)
                    for split, examples in self.splits.items()
                }

            def _generate_examples(self, images_NHW, labels_N):
                for i, (image_HW, label) in enumerate(zip(images_NHW, labels_N, strict=True)):
                    yield i, {"image": _png(image_HW), "label": int(label)}
                    self.bar.update()

    return IdxBuilder


def _png(image_HW: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image_HW).save(buffer, format="png", compress_level=1)  # 1 is the fastest
    return buffer.getvalue()


def _digest(archives: Archives) -> str:
    digest = hashlib.sha256()
    for path in archives:
        digest.update(_sha256(path).digest())
    return digest.hexdigest()[:16]


def _sha256(path: Path) -> "hashlib._Hash":
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}") from error


def _check_reachable(name: str, url: str) -> None:
    """Fails at once where TFDS, which retries for minutes, would fail in the end."""
    request = urllib.request.Request(f"{url}{FILE_NAMES[0]}.gz", method="HEAD")
    try:
        urllib.request.build_opener().open(request, timeout=20).close()
    except OSError as error:
        raise InputError(
            f"{name} cannot be downloaded from {url} ({_reason(error)}): put {_ALL_FILES} in a "
            "directory and pass it as archives"
        ) from error


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
