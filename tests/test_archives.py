"""IDX archives: what is read, what is refused and at what cost, and who checks the bundled ones."""

import functools
import gzip
import hashlib
import math
import os
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_flax.datasets import load_splits
from mnist_flax.datasets.archives import (
    BUNDLED,
    BUNDLED_SHA256,
    CLASS_NAMES,
    FILE_NAMES,
    MNIST_FINGERPRINT,
    NAMES,
    dataset_dir,
    disputed_test_labels,
    find_archives,
    local_archives,
    prepare,
    read_examples,
    read_idx,
)
from mnist_flax.errors import InputError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

IMAGES = struct.pack(">IIII", 0x803, 2, 3, 4) + bytes(range(24))
LABELS = struct.pack(">II", 0x801, 3) + bytes([7, 0, 9])
# Without the time: a test's name holds it, and two processes must collect the same names.
ZIPPED = gzip.compress(IMAGES, mtime=0)


@functools.cache
def raw_bytes(name):
    """An archive's content after its header, read without the code under test."""
    content = gzip.decompress((BUNDLED / f"{name}.gz").read_bytes())
    return np.frombuffer(content, np.uint8, offset=16 if "images" in name else 8)


def idx(array):
    """An array of bytes as an IDX file."""
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_subset(directory, *, num_train, num_test, first=0, compress=True):
    """Writes archives that hold some of MNIST's examples, from the one with index `first`."""
    directory.mkdir()
    for name in FILE_NAMES:
        part = slice(first, first + (num_train if name.startswith("train") else num_test))
        array = raw_bytes(name).reshape((-1, 28, 28) if "images" in name else -1)[part]
        if compress:
            (directory / f"{name}.gz").write_bytes(gzip.compress(idx(array), mtime=0))
        else:
            (directory / name).write_bytes(idx(array))
    return directory


def refusal(function, *args, **kwargs):
    """The message with which the input is refused: one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("name", "expected"), [*zip(FILE_NAMES, BUNDLED_SHA256, strict=True)])
def test_bundled_archives_are_those_that_tfds_registers(name, expected):
    checksums = (Path(tfds.__file__).parent / "url_checksums" / "mnist.txt").read_text()
    (registered,) = (line for line in checksums.splitlines() if f"{name}.gz" in line)
    digest = hashlib.sha256((BUNDLED / f"{name}.gz").read_bytes()).hexdigest()
    assert digest in registered
    assert digest in (BUNDLED / "README.md").read_text()
    assert digest == expected


@pytest.mark.parametrize("name", NAMES)  # EMNIST's classes are numbers there
def test_class_names_are_those_of_tfds(name, tmp_path):
    features = tfds.builder(name, data_dir=tmp_path).info.features
    assert CLASS_NAMES[name] == tuple(features["label"].names)


@pytest.mark.parametrize("name", FILE_NAMES)
def test_bundled_archives_are_read_byte_for_byte(name):
    array = read_idx(BUNDLED / f"{name}.gz", ndim=3 if "images" in name else 1)
    num_examples = 60_000 if name.startswith("train") else 10_000
    assert array.dtype == np.uint8
    assert array.shape == ((num_examples, 28, 28) if "images" in name else (num_examples,))
    assert np.array_equal(array.ravel(), raw_bytes(name))


@pytest.mark.parametrize("encode", [bytes, gzip.compress])
def test_read_idx_reads_raw_and_gzipped_files_whatever_their_name(tmp_path, encode):
    path = tmp_path / "anything"
    path.write_bytes(encode(IMAGES))
    np.testing.assert_array_equal(read_idx(path, ndim=3), np.arange(24).reshape(2, 3, 4))
    path.write_bytes(encode(LABELS))
    np.testing.assert_array_equal(read_idx(path, ndim=1), [7, 0, 9])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (LABELS, "not an IDX file of unsigned bytes in 3 dimensions: it starts with 0x00000801"),
        (b"\0\0\x0d\x03" + IMAGES[4:], "starts with 0x00000d03"),  # floats
        (b"\x80\x04\x95pickle", "not an IDX file"),
        (IMAGES[:15], "header ends after 15 bytes"),
        (IMAGES[:-1], "truncated: 23 of the 24 bytes"),
        (IMAGES + b"\0", "left over"),
        (struct.pack(">IIII", 0x803, 2**32 - 1, 28, 28), "claims the shape (4294967295, 28, 28)"),
        (struct.pack(">IIII", 0x803, 0, 2**32 - 1, 2**32 - 1), "claims the shape (0, 4294967295"),
        (ZIPPED[:-9], "cannot be read"),
        (ZIPPED[:-8] + bytes(8), "cannot be read: CRC"),
        (gzip.compress(IMAGES + b"\0", mtime=0), "left over"),
        (ZIPPED + b"x", "cannot be read"),
        (b"\x1f\x8b garbage", "cannot be read"),
    ],
)
def test_read_idx_refuses_what_is_no_whole_image_archive(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    refused = refusal(read_idx, path, ndim=3)
    assert message in refused
    assert str(path) in refused


def test_read_idx_refuses_what_is_no_file(tmp_path):
    assert "is not a file" in refusal(read_idx, tmp_path, ndim=3)
    assert "is not a file" in refusal(read_idx, tmp_path / "absent", ndim=3)


def peak_bytes(function, *args, **kwargs):
    tracemalloc.start()
    try:
        refusal(function, *args, **kwargs)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("encode", [bytes, gzip.compress])
def test_a_header_that_promises_a_gigabyte_allocates_none(tmp_path, encode):
    path = tmp_path / "images"
    path.write_bytes(encode(struct.pack(">IIII", 0x803, 2**20, 32, 32) + bytes(1000)))
    assert peak_bytes(read_idx, path, ndim=3) < 8 * 2**20


def test_a_gzip_bomb_is_inflated_no_further_than_its_header_says(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(struct.pack(">IIII", 0x803, 1, 28, 28) + bytes(2**26)))
    assert path.stat().st_size < 2**17
    assert peak_bytes(read_idx, path, ndim=3) < 2**20


@settings(max_examples=300, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=64),
        # A valid file with a few bytes overwritten, header and gzip framing included.
        st.tuples(
            st.sampled_from([IMAGES, LABELS, ZIPPED, gzip.compress(LABELS, mtime=0)]),
            st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), min_size=1, max_size=4),
        ).map(lambda args: overwrite(*args)),
        # A magic number followed by whatever sizes.
        st.tuples(st.sampled_from([1, 3]), st.binary(max_size=40)).map(
            lambda args: bytes([0, 0, 8, args[0]]) + args[1]
        ),
    ),
    ndim=st.sampled_from([1, 3]),
)
def test_read_idx_refuses_or_returns_what_the_header_says(tmp_path_factory, content, ndim):
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(content)
    try:
        array = read_idx(path, ndim=ndim)
    except InputError:
        return
    plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    assert array.shape == struct.unpack(f">{ndim}I", plain[4 : 4 + 4 * ndim])
    assert len(plain) == 4 + 4 * ndim + math.prod(array.shape)
    assert array.tobytes() == plain[4 + 4 * ndim :]


def overwrite(content, changes):
    content = bytearray(content)
    for position, value in changes:
        content[position % len(content)] = value
    return bytes(content)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 28, 28), np.uint8), [1, 10], "holds the label 10"),
        (np.zeros((2, 28, 28), np.uint8), [1, 2, 3], "holds 2 images but"),
        (np.zeros((2, 28, 27), np.uint8), [1, 2], "images of (28, 27)"),
        (np.zeros((0, 28, 28), np.uint8), [], "holds no images"),
    ],
)
def test_read_examples_refuses_what_is_no_split_of_mnist(tmp_path, images, labels, message):
    (tmp_path / "images").write_bytes(idx(images))
    (tmp_path / "labels").write_bytes(idx(np.array(labels, np.uint8)))
    assert message in refusal(read_examples, tmp_path / "images", tmp_path / "labels")


def test_find_archives_takes_each_gzipped_or_not(tmp_path):
    directory = write_subset(tmp_path / "a", num_train=2, num_test=1)
    (directory / FILE_NAMES[1]).write_bytes(
        gzip.decompress((directory / f"{FILE_NAMES[1]}.gz").read_bytes())
    )
    (directory / f"{FILE_NAMES[1]}.gz").unlink()
    found = find_archives(directory)
    assert [path.name for path in found] == [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ]
    found.test_images.unlink()
    assert "lacks t10k-images-idx3-ubyte" in refusal(find_archives, directory)
    assert "is not a directory" in refusal(find_archives, directory / "absent")


def test_dataset_dir_differs_between_contents_and_not_between_places(tmp_path):
    one = find_archives(write_subset(tmp_path / "one", num_train=3, num_test=2))
    same = find_archives(write_subset(tmp_path / "same", num_train=3, num_test=2))
    other = find_archives(write_subset(tmp_path / "other", num_train=3, num_test=2, first=5))
    canonical = tmp_path / "mnist" / "canonical" / "3.0.1"
    assert dataset_dir("mnist", data_dir=tmp_path, files=local_archives("mnist")) == canonical
    assert dataset_dir("kmnist", data_dir=tmp_path).parts[-3:] == ("kmnist", "canonical", "3.0.1")
    directories = [
        dataset_dir("mnist", data_dir=tmp_path, files=files) for files in (one, same, other)
    ]
    assert directories[0] == directories[1] != directories[2]
    assert directories[0] != dataset_dir("kmnist", data_dir=tmp_path, files=one)


@pytest.mark.parametrize("name", FILE_NAMES)
def test_a_bundled_archive_that_is_not_the_original_is_refused(tmp_path, name):
    bundled = tmp_path / "bundled"
    shutil.copytree(BUNDLED, bundled)
    damaged = bundled / f"{name}.gz"
    content = bytearray(damaged.read_bytes())
    content[2000] ^= 1
    damaged.chmod(0o644)
    damaged.write_bytes(content)
    message = refusal(local_archives, "mnist", bundled=bundled)
    assert f"{damaged} is not the original" in message


def test_only_mnist_comes_with_the_package(tmp_path):
    archives = write_subset(tmp_path / "a", num_train=3, num_test=2)
    assert local_archives("mnist") == find_archives(BUNDLED)
    assert local_archives("fashion_mnist") is None
    assert local_archives("fashion_mnist", archives) == find_archives(archives)


def test_an_archive_directory_may_begin_with_a_tilde_and_is_no_address(tmp_path, monkeypatch):
    write_subset(tmp_path / "a", num_train=3, num_test=2)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_archives("~/a") == find_archives(tmp_path / "a")
    for address in ("gs://bucket/mnist", Path("gs://bucket/mnist")):
        assert "archives must be a local path" in refusal(find_archives, address)


def test_preparing_shows_one_progress_bar(tmp_path):
    archives = write_subset(tmp_path / "a", num_train=300, num_test=20)
    code = """
import sys
from mnist_flax.datasets import load_splits
load_splits("mnist", val_size=10, data_dir=sys.argv[1], archives=sys.argv[2], stream=True)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "data"), str(archives)]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True, env=os.environ)
    assert run.stdout == ""
    shown = [part for part in run.stderr.replace("\r", "\n").splitlines() if part.strip()]
    assert shown
    # Ours, and the two of reading validation and test into memory; none of TFDS's own.
    assert {part.strip().partition(":")[0] for part in shown} - {
        "Decoding train",
        "Decoding test",
    } == {"Preparing mnist"}


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist"])
def test_without_a_network_it_says_at_once_what_to_put_where(tmp_path, monkeypatch, name):
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # Nothing listens there.
    start = time.monotonic()
    message = refusal(prepare, name, dataset_dir(name, data_dir=tmp_path), None)
    assert time.monotonic() - start < 30  # TFDS alone retries for three minutes.
    assert f"{name} cannot be downloaded" in message
    assert "archives" in message
    for file_name in FILE_NAMES:
        assert f"{file_name}.gz" in message
    assert not list(tmp_path.iterdir())


def test_a_damaged_archive_is_refused_before_anything_is_written(tmp_path):
    archives = write_subset(tmp_path / "archives", num_train=3, num_test=2)
    labels = archives / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.array([3, 12], np.uint8))))
    files = find_archives(archives)
    directory = dataset_dir("mnist", data_dir=tmp_path / "data", files=files)
    assert "holds the label 12" in refusal(prepare, "mnist", directory, files)
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif(
    not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_reads_fashion_mnist_as_debian_packages_it():
    files = find_archives(DEBIAN_FASHION_MNIST)
    images_NHW, labels_N = read_examples(files.train_images, files.train_labels)
    assert images_NHW.shape == (60_000, 28, 28)
    np.testing.assert_array_equal(np.bincount(labels_N), [6000] * 10)
    images_NHW, labels_N = read_examples(files.test_images, files.test_labels)
    assert images_NHW.shape == (10_000, 28, 28)
    np.testing.assert_array_equal(np.bincount(labels_N), [1000] * 10)


def test_the_audit_of_labels_is_mnists_own(splits, tmp_path):
    """By what the data is, not by a name that other archives go by, too."""
    assert splits.info.fingerprint == MNIST_FINGERPRINT
    disputed = disputed_test_labels(fingerprint=MNIST_FINGERPRINT)
    assert len(disputed) == 15
    assert 2597 in disputed  # a "5" that four of five called a 3, and nobody a 5
    other = write_subset(tmp_path / "other", num_train=20, num_test=10)
    own = load_splits("mnist", val_size=5, data_dir=tmp_path, archives=other)
    assert own.info.name == "mnist"
    assert disputed_test_labels(fingerprint=own.info.fingerprint) == []
