"""Datasets: their order, their splits, their cache, what is refused; epochs and batches."""

import functools
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import first, tries
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import datasets
from test_archives import raw_bytes, refusal, write_subset

from mnist_flax.data import Examples, epoch_order, eval_batches, split_indices
from mnist_flax.datasets import load_splits

TESTS = str(Path(__file__).parent)

TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]

STREAM = """
import sys
from mnist_flax.datasets import load_splits
splits = load_splits("mnist", val_size=10, data_dir=sys.argv[1], archives=sys.argv[2], stream=True)
print(splits.info.fingerprint)
"""


def start(code, *args):
    """Starts Python on some code, in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], **pipes)


def run(code, *args):
    """What some code prints, in a process of its own."""
    process = start(code, *args)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


def same(examples, others):
    if isinstance(others, Examples):
        others = others.images, others.labels
    return all(map(np.array_equal, (examples.images, examples.labels), others))


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The first 600 training and 100 test examples of MNIST, as archives."""
    return write_subset(tmp_path_factory.mktemp("subset") / "a", num_train=600, num_test=100)


@pytest.fixture(scope="module")
def subset_dir(tmp_path_factory):
    """A data directory for the subset."""
    return tmp_path_factory.mktemp("subset_data")


@pytest.fixture
def subset(archives, subset_dir):
    """The subset, with 100 of its training examples for validation."""
    return load_splits("mnist", val_size=100, data_dir=subset_dir, archives=archives)


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    """A data directory in which TFDS prepared scikit-learn's digits."""
    data_dir = tmp_path_factory.mktemp("digits")
    digits_builder(data_dir).download_and_prepare()
    return data_dir


class TestMnist:
    def test_shapes_and_dtypes(self, splits):
        for examples, num_examples in (
            (splits.train, 55_000),
            (splits.val, 5000),
            (splits.test, 10_000),
        ):
            assert examples.num_examples == num_examples
            assert examples.images.shape == (num_examples, 28, 28, 1)
            assert examples.images.dtype == np.uint8
            assert examples.labels.shape == (num_examples,)
            assert examples.labels.dtype == np.int32

    def test_info(self, splits):
        info = splits.info
        assert (info.name, info.version, info.num_classes) == ("mnist", "3.0.1", 10)
        assert info.class_names == tuple("0123456789")
        assert info.image_shape == (28, 28, 1)

    def test_order_is_that_of_the_archives_byte_for_byte(self, splits):
        train, val = split_indices(60_000, val_size=5000, seed=0)
        for part, indices in ((splits.train, train), (splits.val, val)):
            images = raw_bytes("train-images-idx3-ubyte").reshape(-1, 28, 28, 1)[indices]
            assert np.array_equal(part.images, images)
            assert np.array_equal(part.labels, raw_bytes("train-labels-idx1-ubyte")[indices])
        images = raw_bytes("t10k-images-idx3-ubyte").reshape(-1, 28, 28, 1)
        assert np.array_equal(splits.test.images, images)
        assert np.array_equal(splits.test.labels, raw_bytes("t10k-labels-idx1-ubyte"))

    def test_class_counts(self, splits):
        labels = np.concatenate([splits.train.labels, splits.val.labels])
        assert np.bincount(labels).tolist() == TRAIN_COUNTS
        assert np.bincount(splits.test.labels).tolist() == TEST_COUNTS

    def test_fingerprint_is_the_hash_of_pixels_and_labels(self, splits):
        digest = hashlib.sha256()
        for split in ("train", "t10k"):
            digest.update(
                hashlib.sha256(raw_bytes(f"{split}-images-idx3-ubyte").tobytes()).digest()
            )
            labels = raw_bytes(f"{split}-labels-idx1-ubyte").astype("<i4")
            digest.update(hashlib.sha256(labels.tobytes()).digest())
        assert splits.info.fingerprint == digest.hexdigest()[:16]

    def test_it_needs_no_tfds_and_writes_nothing(self, splits, tmp_path):
        code = """
import sys, time
from pathlib import Path
from mnist_flax.datasets import load_splits
start = time.perf_counter()
splits = load_splits("mnist", val_size=5000, data_dir=sys.argv[1])
seconds = time.perf_counter() - start
heavy = {"tensorflow", "tensorflow_datasets", "grain", "array_record"} & set(sys.modules)
assert not list(Path(sys.argv[1]).iterdir())
print(splits.info.fingerprint, int(splits.train.labels.sum()), sorted(heavy), seconds < 3)
"""
        label_sum = splits.train.labels.sum()
        assert run(code, tmp_path) == f"{splits.info.fingerprint} {label_sum} [] True"


class TestSplitIndices:
    @given(num_examples=st.integers(1, 300), data=st.data(), seed=st.integers(0, 2**64))
    @settings(deadline=None)
    def test_every_index_is_in_one_part_and_each_part_ascends(self, num_examples, data, seed):
        val_size = data.draw(st.integers(0, num_examples - 1))
        train, val = split_indices(num_examples, val_size=val_size, seed=seed)
        assert len(val) == val_size
        assert sorted([*train, *val]) == list(range(num_examples))
        assert np.all(np.diff(train) > 0)
        assert np.all(np.diff(val) > 0)

    def test_it_sorts_the_raw_draws_of_pcg64(self):
        # PCG XSL-RR 128/64 (O'Neill 2014, section 6.3), from the state that NumPy seeds.
        state = np.random.PCG64(7).state["state"]
        value, draws = state["state"], []
        for _ in range(50):
            value = (value * 0x2360ED051FC65DA44385DF649FCCF645 + state["inc"]) % 2**128
            word, turn = (value >> 64 ^ value) % 2**64, value >> 122
            draws.append((word >> turn | word << (64 - turn)) % 2**64)
        expected = sorted(range(50), key=draws.__getitem__)
        train, val = split_indices(50, val_size=20, seed=7)
        assert val.tolist() == sorted(expected[:20])
        assert train.tolist() == sorted(expected[20:])

    def test_the_choice_for_mnist_never_changes(self):
        _, val = split_indices(60_000, val_size=5000, seed=0)
        assert val[:5].tolist() == [2, 3, 11, 13, 20]
        assert not np.array_equal(val, split_indices(60_000, val_size=5000, seed=1)[1])

    @pytest.mark.parametrize("val_size", [-1, 600, 601])
    def test_impossible_sizes_are_refused(self, archives, subset_dir, val_size):
        message = refusal(
            load_splits, "mnist", val_size=val_size, data_dir=subset_dir, archives=archives
        )
        assert "val_size" in message
        assert str(val_size) in message

    def test_a_negative_seed_is_refused(self, subset_dir):
        assert "seed" in refusal(load_splits, "mnist", val_size=1, seed=-1, data_dir=subset_dir)

    def test_nothing_need_be_held_out(self, archives, subset_dir, subset):
        splits = load_splits("mnist", val_size=0, data_dir=subset_dir, archives=archives)
        assert splits.val.images.shape == (0, 28, 28, 1)
        assert splits.val.labels.shape == (0,)
        assert splits.train.num_examples == 600
        assert same(splits.test, subset.test)


class TestArchives:
    def test_variants_in_one_data_dir_keep_apart(self, tmp_path, subset, archives, subset_dir):
        other = write_subset(
            tmp_path / "b", num_train=600, num_test=100, first=1000, compress=False
        )
        splits = load_splits("mnist", val_size=100, data_dir=subset_dir, archives=other)
        labels = raw_bytes("t10k-labels-idx1-ubyte")
        assert splits.test.labels.tolist() == labels[1000:1100].tolist()
        assert splits.info.fingerprint != subset.info.fingerprint
        again = load_splits("mnist", val_size=100, data_dir=subset_dir, archives=archives)
        assert again.test.labels.tolist() == labels[:100].tolist()

    def test_they_can_stand_for_fashion_mnist(self, archives, tmp_path, subset):
        splits = load_splits("fashion_mnist", val_size=100, data_dir=tmp_path, archives=archives)
        assert splits.info.class_names[9] == "Ankle boot"
        assert splits.info.name == "fashion_mnist"
        assert same(splits.train, subset.train)
        assert splits.info.fingerprint == subset.info.fingerprint

    def test_they_stand_for_no_other_dataset(self, archives, tmp_path):
        message = refusal(load_splits, "cifar10", val_size=1, data_dir=tmp_path, archives=archives)
        assert "cifar10" in message

    def test_the_data_dir_is_tfds_s_by_default(self, archives, tmp_path, monkeypatch):
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
        load_splits("mnist", val_size=1, archives=archives)
        assert not list(tmp_path.iterdir())
        load_splits("mnist", val_size=1, archives=archives, stream=True)
        assert [path.name for path in (tmp_path / "mnist").iterdir()] == [
            path.name for path in (tmp_path / "mnist").glob("archives-*")
        ]


class TestCache:
    """What is kept of a dataset that TFDS prepared, once it has been decoded."""

    @pytest.fixture
    def load(self, digits_dir):
        return functools.partial(load_splits, "digits", val_size=100, data_dir=digits_dir)

    @pytest.fixture
    def digits(self, load):
        return load()

    @pytest.fixture
    def directory(self, digits, digits_dir):
        """Where the dataset is prepared, and kept decoded."""
        return digits_dir / "digits" / "1.0.0"

    @pytest.mark.parametrize("damage", ["truncated", "empty", "absent", "not a zip"])
    def test_damaged_arrays_are_decoded_again(self, directory, digits, load, damage):
        path = directory / "decoded.npz"
        content = path.read_bytes()
        if damage == "absent":
            path.unlink()
        else:
            damaged = {"truncated": content[:-1000], "empty": b"", "not a zip": b"x" * 100}[damage]
            path.write_bytes(damaged)
        splits = load()
        assert same(splits.train, digits.train)
        assert same(splits.test, digits.test)
        # Not the same bytes: a zip file holds the time at which it was written.
        assert len(path.read_bytes()) == len(content)

    def test_a_flipped_byte_anywhere_changes_nothing_that_is_loaded(self, directory, digits, load):
        path = directory / "decoded.npz"
        rng = random.Random(0)
        for _ in range(tries(12)):
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            splits = load()
            assert same(splits.train, digits.train)
            assert same(splits.test, digits.test)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "mnist"}'])
    def test_damaged_info_is_written_again(self, directory, digits, load, content):
        path = directory / "decoded.json"
        before = path.read_text()
        path.write_text(content)
        assert load().info == digits.info
        assert path.read_text() == before

    def test_damaged_records_are_named_when_they_are_needed(self, directory, digits, load):
        (records,) = directory.glob("*test.array_record*")
        good = records.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2 :] = bytes(len(bad) - len(bad) // 2)
        records.write_bytes(bad)
        assert same(load().test, digits.test)  # They are not needed.
        (directory / "decoded.npz").unlink()
        message = refusal(load)
        assert str(directory) in message
        assert "damaged" in message
        records.write_bytes(good)
        assert same(load().test, digits.test)

    def test_what_a_killed_writer_left_goes_away(self, directory, digits, load):
        partial = directory / "decoded.npz.partial"
        partial.write_bytes(b"half")
        (directory / "decoded.npz").unlink()
        assert same(load().train, digits.train)
        assert not partial.exists()

    def test_later_loads_import_no_tfds(self, digits, digits_dir):
        code = """
import sys
from mnist_flax.datasets import load_splits
splits = load_splits("digits", val_size=100, data_dir=sys.argv[1])
print(splits.info.fingerprint, {"tensorflow_datasets", "array_record"} & set(sys.modules))
"""
        assert run(code, digits_dir) == f"{digits.info.fingerprint} set()"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only directory")
    def test_a_prepared_dataset_that_is_shared_read_only_loads(self, directory, digits, load):
        (directory / "decoded.npz").unlink()
        directory.chmod(0o555)
        directory.parent.chmod(0o555)
        try:
            assert same(load().train, digits.train)
            assert not (directory / "decoded.npz").exists()
        finally:
            directory.parent.chmod(0o755)
            directory.chmod(0o755)


class TestProcesses:
    @pytest.mark.slow
    def test_killed_at_any_moment_it_prepares_again(self, tmp_path):
        archives = write_subset(tmp_path / "archives", num_train=4000, num_test=500)
        rng = random.Random(0)
        seen = set()
        for delay in (0.0, rng.uniform(0, 0.5), rng.uniform(0.5, 1), rng.uniform(1, 1.5)):
            process = start(STREAM, tmp_path / "data", archives)
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                if new := set(tmp_path.glob("data/mnist/*/*3.0.1/")) - seen:
                    seen |= new
                    break
                time.sleep(0.005)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert delay or process.returncode == -signal.SIGKILL
        arguments = {"val_size": 0, "data_dir": tmp_path / "data", "archives": archives}
        splits = load_splits("mnist", **arguments, stream=True)
        labels = raw_bytes("train-labels-idx1-ubyte")[:4000]
        images = raw_bytes("train-images-idx3-ubyte").reshape(-1, 28, 28, 1)[:4000]
        assert same(splits.train.take(np.arange(4000)), (images, labels))
        assert splits.test.num_examples == 500
        (config,) = (tmp_path / "data" / "mnist").iterdir()
        assert sorted(path.name for path in config.iterdir()) == ["3.0.1", "3.0.1.lock"]
        assert not list(config.rglob("*partial*"))
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["mnist"]

    @pytest.mark.slow
    def test_two_at_once_load_the_same(self, tmp_path, archives, subset):
        processes = [start(STREAM, tmp_path, archives) for _ in range(2)]
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            assert out.strip() == subset.info.fingerprint
            assert "WARNING" not in err
        (config,) = (tmp_path / "mnist").iterdir()
        assert sorted(path.name for path in config.iterdir()) == ["3.0.1", "3.0.1.lock"]

    @pytest.mark.slow
    def test_tensorflow_is_never_imported(self, tmp_path, archives):
        code = """
import sys
import mnist_flax.feed
late = {"tensorflow", "tensorflow_datasets", "grain", "array_record"}
print(sorted(late & set(sys.modules)))
arguments = {"val_size": 10, "data_dir": sys.argv[1], "archives": sys.argv[2]}
mnist_flax.load_splits("mnist", **arguments)
splits = mnist_flax.load_splits("mnist", **arguments, stream=True)
batch = next(mnist_flax.feed.stream_batches(splits.train, [[3, 1], [2, 0]]))
print(batch.images.shape, sorted(late & set(sys.modules)))
"""
        assert run(code, tmp_path, archives).splitlines() == [
            "[]",
            "(2, 28, 28, 1) ['array_record', 'grain', 'tensorflow_datasets']",
        ]

    # What a full disk does to a writer, without filling one: a limit on the size of a file.
    @pytest.mark.slow
    def test_a_disk_that_takes_no_more_is_one_clear_line(self, tmp_path, archives, subset):
        code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from mnist_flax.datasets import load_splits
try:
    load_splits("mnist", val_size=10, data_dir=sys.argv[1], archives=sys.argv[2], stream=True)
except ValueError as error:
    print(type(error).__name__, error)
"""
        limited = run(code, tmp_path, archives)
        assert limited.startswith("InputError cannot prepare")
        assert "File too large" in limited
        assert str(tmp_path) in limited
        assert len(limited.splitlines()) == 1
        assert not list(tmp_path.rglob("incomplete*"))
        assert run(STREAM, tmp_path, archives) == subset.info.fingerprint

    @pytest.mark.slow
    def test_a_disk_that_takes_no_arrays_is_one_clear_line(self, tmp_path):
        digits_builder(tmp_path).download_and_prepare()
        code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from mnist_flax.datasets import load_splits
try:
    load_splits("digits", val_size=10, data_dir=sys.argv[1])
except ValueError as error:
    print(type(error).__name__, error)
"""
        limited = run(code, tmp_path)
        assert limited.startswith("InputError cannot write")
        assert "File too large" in limited
        assert len(limited.splitlines()) == 1
        assert not list(tmp_path.rglob("*partial*"))

    def test_a_data_dir_that_cannot_be_made_is_one_clear_line(self, tmp_path, archives, subset):
        (tmp_path / "file").write_text("")
        arguments = {"val_size": 100, "data_dir": tmp_path / "file", "archives": archives}
        assert same(load_splits("mnist", **arguments).train, subset.train)  # It needs none.
        assert str(tmp_path / "file") in refusal(load_splits, "mnist", **arguments, stream=True)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only directory")
    def test_a_data_dir_that_is_read_only_is_one_clear_line(self, tmp_path, archives, subset):
        tmp_path.chmod(0o555)
        arguments = {"val_size": 100, "data_dir": tmp_path, "archives": archives}
        assert same(load_splits("mnist", **arguments).train, subset.train)
        message = refusal(load_splits, "mnist", **arguments, stream=True)
        assert str(tmp_path) in message
        assert "Permission denied" in message

    @pytest.mark.parametrize("kind", [str, Path])
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_data_dir_elsewhere_is_refused(self, kind, stream):
        address = kind("gs://bucket/tfds")
        refused = refusal(load_splits, "mnist", data_dir=address, stream=stream)
        assert "data_dir must be a local path" in refused
        assert not list(Path().glob("gs:*"))

    def test_a_data_dir_elsewhere_in_the_environment_matters_only_where_needed(self, monkeypatch):
        monkeypatch.setenv("TFDS_DATA_DIR", "gs://tfds-data/datasets")
        assert load_splits("mnist").val.num_examples == 5000
        assert "must be a local path" in refusal(load_splits, "mnist", stream=True)

    def test_a_tilde_is_the_home_directory(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        digits_builder(tmp_path / "data").download_and_prepare()
        assert load_splits("digits", val_size=1, data_dir="~/data").info.name == "digits"

    def test_a_user_without_a_home_trains_on_mnist(self, tmp_path):
        # What a container does with a random user id: neither HOME nor an entry in passwd.
        code = """
import os, pwd
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
for variable in ("HOME", "TFDS_DATA_DIR"):
    os.environ.pop(variable, None)
from mnist_flax import InputError, load_splits
print(load_splits("mnist").info.fingerprint)
try:
    load_splits("mnist", stream=True)
except InputError as error:
    print(error)
"""
        fingerprint, refused = run(code).splitlines()
        assert fingerprint == "9c723dd0d6c9788c"
        assert "data_dir is ~/tensorflow_datasets, but this user has no home directory" in refused


class TestWithoutTfds:
    """Colab cannot import it beside its protobuf, and elsewhere it may not be installed."""

    BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in {names}:
            raise TypeError("Descriptors cannot be created directly.\\nIf this call came from ...")
sys.meta_path.insert(0, Blocker())
from mnist_flax import InputError, load_splits
splits = load_splits("mnist")
print(splits.info.fingerprint)
for arguments in ({{"name": "mnist", "stream": True}}, {{"name": "kmnist"}}):
    try:
        load_splits(**arguments, data_dir=sys.argv[1])
    except InputError as error:
        print(error)
"""

    @pytest.mark.parametrize("absent", first(["array_record", "tensorflow_datasets", "grain"]))
    @pytest.mark.slow
    def test_mnist_loads_and_the_rest_is_one_clear_line(self, tmp_path, absent):
        code = self.BLOCKED.format(names=repr({absent}))
        fingerprint, *refused = run(code, tmp_path).splitlines()
        assert fingerprint == "9c723dd0d6c9788c"
        assert len(refused) == 2
        for message in refused:
            assert "Descriptors cannot be created directly." in message
            assert "pip install 'mnist_flax[tfds]'" in message
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_a_run_imports_neither_tfds_nor_an_installed_tensorflow(self, tmp_path):
        package = tmp_path / "tensorflow"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('tensorflow was imported')")
        code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import dataclasses
from conftest import RECIPE, head
from mnist_flax import fit, load_splits
splits = load_splits("mnist")
splits = dataclasses.replace(splits, train=head(splits.train, 200), val=head(splits.val, 500))
fit(dataclasses.replace(RECIPE, epochs=1), splits, workdir={str(tmp_path / "run")!r})
print(sorted({{"tensorflow", "tensorflow_datasets"}} & set(sys.modules)))
"""
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([TESTS, *sys.path])}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == "[]", done.stderr
        assert (tmp_path / "run" / "checkpoints").is_dir()

    @pytest.mark.slow
    def test_streaming_imports_no_installed_tensorflow(self, tmp_path, archives):
        package = tmp_path / "tensorflow"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('tensorflow was imported')")
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + STREAM
        assert run(code, tmp_path / "data", archives) == (
            load_splits("mnist", val_size=10, archives=archives).info.fingerprint
        )


def load_digits():
    """scikit-learn's digits: images [1797, 8, 8, 1] uint8 and labels [1797]."""
    digits: Any = datasets.load_digits()
    return Examples((digits.images * 15).astype(np.uint8)[..., None], digits.target)


def digits_builder(
    data_dir, *, shape=(8, 8, 1), splits=("train", "test"), config=None, version="1.0.0", label=None
):
    """A TFDS builder of scikit-learn's digits, or of something like it that is unsuitable."""
    digits = load_digits()

    class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=shape),
                        "label": tfds.features.ClassLabel(num_classes=10),
                        "id": tfds.features.Scalar(np.int64),
                    }
                ),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            halves = (range(900), range(900, 1797))
            return {
                split: self._generate_examples(half)
                for split, half in zip(splits, halves, strict=True)
            }

        def _generate_examples(self, indices):
            for i in indices:
                image = Image.fromarray(np.asarray(digits.images[i, ..., 0]))
                own = int(digits.labels[i]) if label is None else label
                yield i, {"image": image, "label": own, "id": i}

    return Digits(
        data_dir=data_dir,
        file_format="array_record",
        config=config and tfds.core.BuilderConfig(name=config),
    )


class TestOtherDatasets:
    @pytest.mark.parametrize("stream", [False, True])
    def test_what_tfds_prepared_as_array_record_loads(self, tmp_path, stream):
        digits_builder(tmp_path).download_and_prepare()
        splits = load_splits("digits", val_size=100, seed=3, data_dir=tmp_path, stream=stream)
        digits = load_digits()
        images, labels = digits.images, digits.labels
        train, val = split_indices(900, val_size=100, seed=3)
        assert splits.train.num_examples == 800
        read = splits.train.take(np.arange(800)) if stream else splits.train
        assert same(read, (images[train], labels[train]))
        assert same(splits.val, (images[val], labels[val]))
        assert same(splits.test, (images[900:], labels[900:]))
        assert splits.info.name == "digits"
        assert splits.info.version == "1.0.0"
        assert splits.info.image_shape == (8, 8, 1)
        again = load_splits("digits", val_size=100, seed=3, data_dir=tmp_path)
        assert again.info == splits.info

    @pytest.mark.slow
    def test_a_config_and_a_version_can_be_named(self, tmp_path):
        for version in ("1.0.0", "9.0.0", "10.0.0"):
            digits_builder(tmp_path, config="small", version=version).download_and_prepare()
        splits = load_splits("digits/small", val_size=1, data_dir=tmp_path)
        assert (splits.info.name, splits.info.version) == ("digits/small", "10.0.0")
        splits = load_splits("digits/small:9.0.0", val_size=1, data_dir=tmp_path)
        assert splits.info.version == "9.0.0"
        assert "digits/small" in refusal(load_splits, "digits", val_size=1, data_dir=tmp_path)
        assert "no dataset" in refusal(
            load_splits, "digits/small:2.0.0", val_size=1, data_dir=tmp_path
        )

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"splits": ("train", "validation")}, "no split named test"),
            ({"shape": (None, None, 1)}, "images of one shape"),
            ({"label": -1}, "without a label"),
        ],
    )
    def test_unsuitable_ones_are_refused(self, tmp_path, kwargs, message):
        digits_builder(tmp_path, **kwargs).download_and_prepare()
        refused = refusal(load_splits, "digits", val_size=1, data_dir=tmp_path)
        assert message in refused
        assert str(tmp_path) in refused

    def test_another_record_format_is_refused(self, tmp_path):
        digits_builder(tmp_path).download_and_prepare()
        path = tmp_path / "digits" / "1.0.0" / "dataset_info.json"
        path.write_text(path.read_text().replace("array_record", "tfrecord"))
        refused = refusal(load_splits, "digits", val_size=1, data_dir=tmp_path)
        assert "file_format='array_record'" in refused
        assert "tfrecord" in refused

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("mnits", "did you mean 'mnist'?"),
            ("Fashion-MNIST", "no dataset name"),
            ("fashion_mnits", "did you mean 'fashion_mnist'?"),
            ("cifar10", "no dataset 'cifar10'"),
            ("../../etc", "no dataset name"),
            ("", "no dataset name"),
        ],
    )
    def test_unknown_ones_are_refused(self, tmp_path, name, message):
        assert message in refusal(load_splits, name, val_size=1, data_dir=tmp_path)
        assert not list(tmp_path.iterdir())


class TestEpochOrder:
    @pytest.mark.parametrize(("num_examples", "batch_size"), [(1, 1), (10, 10), (59, 6)])
    def test_full_batches_of_distinct_examples(self, num_examples, batch_size):
        order = functools.partial(epoch_order, num_examples=num_examples, batch_size=batch_size)
        orders = np.asarray(jax.vmap(order)(jax.random.split(jax.random.key(0), 50)))
        assert orders.dtype == np.int32
        assert orders.shape == (50, num_examples // batch_size, batch_size)
        for order_SB in orders:
            indices = np.unique(order_SB)
            assert len(indices) == order_SB.size
            assert set(indices) <= set(range(num_examples))
        assert set(orders.ravel()) == set(range(num_examples))  # None is always left over.

    def test_every_order_is_as_likely(self):
        # 6 orders of 3 examples: chi-squared with 5 degrees of freedom exceeds 20.5 once in 1000.
        keys = jax.random.split(jax.random.key(0), 3000)
        orders = jax.vmap(lambda key: epoch_order(key, num_examples=3, batch_size=3))(keys)
        _, counts = np.unique(np.asarray(orders).reshape(-1, 3), axis=0, return_counts=True)
        assert len(counts) == 6
        assert np.sum((counts - 500) ** 2 / 500) < 20.5

    @pytest.mark.parametrize("batch_size", [-1, 0, 11])
    def test_impossible_batches_are_refused(self, batch_size):
        message = refusal(epoch_order, jax.random.key(0), num_examples=10, batch_size=batch_size)
        assert "batch_size must be from 1 to the 10" in message


class TestEvalBatches:
    @given(num_examples=st.integers(0, 40), batch_size=st.integers(1, 50))
    @settings(deadline=None)
    def test_every_example_is_there_once_and_in_order(self, num_examples, batch_size):
        images = np.arange(num_examples * 6, dtype=np.uint8).reshape(num_examples, 2, 3, 1)
        labels = np.arange(num_examples, dtype=np.int32) % 10
        batches = eval_batches(Examples(images, labels), batch_size=batch_size)
        images_SB, labels_SB = batches.images, batches.labels
        steps = (num_examples + batch_size - 1) // batch_size
        assert images_SB.shape == (steps, batch_size, 2, 3, 1)
        assert labels_SB.shape == (steps, batch_size)
        assert (images_SB.dtype, labels_SB.dtype) == (np.uint8, np.int32)
        real = labels_SB.ravel() >= 0
        assert np.array_equal(images_SB.reshape(-1, 2, 3, 1)[real], images)
        assert np.array_equal(labels_SB.ravel()[real], labels)
        assert not images_SB.reshape(-1, 2, 3, 1)[~real].any()
        assert set(labels_SB.ravel()[~real]) <= {-1}

    @pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint32, np.int64])
    def test_padding_is_told_from_labels_of_any_type(self, dtype):
        """In uint8 -1 would be 255."""
        examples = Examples(np.ones((5, 2, 3, 1), np.uint8), np.array([4, 0, 1, 2, 3], dtype))
        labels_SB = eval_batches(examples, batch_size=4).labels
        assert labels_SB.dtype == np.int32
        assert labels_SB.tolist() == [[4, 0, 1, 2], [3, -1, -1, -1]]

    def test_no_batch_is_refused(self, subset):
        assert "batch_size" in refusal(eval_batches, subset.test, batch_size=0)


def test_examples_are_a_pytree(subset):
    doubled = jax.tree.map(lambda array: np.concatenate([array, array]), subset.test)
    assert isinstance(doubled, Examples)
    assert doubled.num_examples == 200


def test_examples_are_taken_by_index_and_apart():
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
    examples = Examples(images, np.array([7, 8, 9], np.int32))
    assert len(examples) == examples.num_examples == 3
    assert same(examples[1:], (images[1:], [8, 9]))
    assert same(examples[np.array([2, 0])], (images[[2, 0]], [9, 7]))
    assert same(examples[np.array([True, False, True])], (images[[0, 2]], [7, 9]))
    assert same(examples[-1], (images[2], 9))
    on_device = jax.tree.map(jnp.asarray, examples)
    first, second = examples
    assert first is images
    assert second is examples.labels
    halved = jax.jit(lambda examples: examples[:2])(on_device)
    assert same(halved, (images[:2], [7, 8]))


def test_5000_examples_are_held_out_by_default(splits, data_dir):
    own = load_splits("mnist", data_dir=data_dir)
    assert same(own.val, splits.val)
    assert same(own.train[:100], splits.train[:100])
    assert len(own.train) == 55_000
